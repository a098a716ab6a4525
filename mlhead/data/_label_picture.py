"""The labels of a set as a picture: how many images each class has, and how many labels each image has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlhead.visualize import COLOURS, INK, _figure, _save, plain

_POINTS = 2000  # of a curve; a million classes need no more
_LOG_RANKS = 200  # above as many classes their ranks stand on a logarithmic axis
_BARS = 60  # of the labels per image; more of them share the last


def draw_labels(
    positives: Mapping[str, NDArray[np.int64]], labels: Mapping[str, NDArray[np.int64]], path: Path, *, title: str
) -> None:
    """Saves two panels as PNG: positives per class, sorted; labels per image. Counts are on a logarithmic axis.

    Args:
        positives: for each split the number of images of each class (C,).
        labels: for each split the number of labels of each image (n,).
        path: of the PNG.
        title: above the panels.
    """
    figure = _figure(10.4, 4.0)
    class_axes, image_axes = figure.subplots(1, 2)
    longest = 1
    for number, (split, counts) in enumerate(positives.items()):
        colour = COLOURS[(number + 1) % len(COLOURS)]
        ordered = np.sort(counts[counts > 0])[::-1]
        ranks = np.unique(np.geomspace(1, max(1, len(ordered)), _POINTS).astype(np.int64))[: len(ordered)]
        none = len(counts) - len(ordered)
        name = f"{split} ({none} without)" if none else split
        shape = {"marker": "o", "markersize": 3.5} if len(ordered) <= 30 else {}
        class_axes.plot(ranks, ordered[ranks - 1], color=colour, linewidth=1.8, label=name, **shape)
        longest = max(longest, len(counts))
    class_axes.set_title("images per class", fontsize=10, loc="left", color=INK)
    class_axes.set_xlabel("classes, the most frequent first", fontsize=9)
    if longest > _LOG_RANKS:
        class_axes.set_xscale("log")

    most = min(_BARS, max((int(counts.max()) for counts in labels.values() if len(counts)), default=0))
    width = 0.8 / max(1, len(labels))
    for number, (split, counts) in enumerate(labels.items()):
        images = np.bincount(np.minimum(counts, most), minlength=most + 1)
        places = np.arange(most + 1) + (number - (len(labels) - 1) / 2) * width
        image_axes.bar(places, images, width, color=COLOURS[(number + 1) % len(COLOURS)], label=split)
    image_axes.set_title("images by their number of labels", fontsize=10, loc="left", color=INK)
    image_axes.set_xlabel(f"labels ({most} or more at the right)" if most == _BARS else "labels", fontsize=9)
    image_axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (class_axes, image_axes):
        axes.set_yscale("log")
        axes.set_ylim(bottom=0.7)  # a single image still shows
        axes.set_ylabel("images", fontsize=9)
        axes.tick_params(which="both", labelsize=8)
        axes.grid(color="#e4e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    figure.suptitle(plain(title), fontsize=11, x=0.02, ha="left", color=INK)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    _save(figure, path)
