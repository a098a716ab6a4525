"""The health of a data set and the statistics of its labels, in any layout, for `mlhead data check`."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TextIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from mlhead._config import TrainConfig
from mlhead._progress import Progress
from mlhead._usage import UsageError, usage_fail
from mlhead.data._health_report import Problem, Report
from mlhead.data.layouts import layout_of
from mlhead.data.listing import ImageList, ListImages, ListSource
from mlhead.data.loading import BadSample
from mlhead.data.reporting import BadDataLog
from mlhead.data.sources import ImageSpec, Source, open_source

# What a reason speaks of, by its first words.
_KINDS = {
    "corrupt": r"(labels )?cannot be|cut short|damaged|compressed|the box is outside",
    "missing": r"no such (file|image)|no annotation in|no image beside",
    "unknown category": r"unknown ",
    "duplicate": r"the same|a second",
    "without labels": r"no labels|an annotation without objects|no person",
}
_SPLITS = ("train", "val", "test")


def check(config: TrainConfig, *, images: int | None = None, say: Any = print, stream: TextIO | None = None) -> Report:
    """Opens a data set and looks at it.

    Args:
        config: the options of a run; those about data and `workers` are used.
        images: how many images of each split are decoded, evenly spread; None for all.
        say: gets a line now and then while shards are indexed.
        stream: where the progress of decoding goes, by default stderr.

    Raises:
        UsageError: there is no such folder, it is in no known layout, or nothing in it can be used.
    """
    if config.data == "scenes":
        usage_fail("PATH", "a folder, since the scenes are drawn", repr(config.data))
    layout = layout_of(config)
    if layout == "nus-wide":
        config = dataclasses.replace(config, task="zero-shot")
    log = BadDataLog("skip", say, shown=-1)
    try:
        source = open_source(config, log)
    except UsageError:
        for name, reason in list(log.names.items())[:20]:
            say(f"bad data: {name}: {reason}")
        raise
    problems = [Problem(_kind(reason), name, reason, True) for name, reason in log.names.items()]
    splits = _splits(source)
    report = Report(config.data, layout, len(source.class_names), {}, 0, problems, {}, {})
    for name, listing in splits.items():
        report.positives[name] = listing.positives(len(source.class_names))
        report.labels[name] = _labels_per_image(listing)
        report.splits[name] = statistics(listing, report.positives[name], report.labels[name])
        for number in np.flatnonzero(report.labels[name] == 0).tolist():
            problems.append(Problem("without labels", f"{name}: {listing.names[number]}", "no positive label", False))
    _decode_all(report, splits, images, config.workers, stream)
    return report


def _kind(reason: str) -> str:
    return next((kind for kind, words in _KINDS.items() if re.match(words, reason)), "other")


def _splits(source: Source) -> dict[str, ImageList]:
    """The lists of a source; a list that serves two splits comes once, with both names."""
    lists: dict[str, ImageList] = {}
    for split in _SPLITS:
        if isinstance(source, ListSource):
            listing = source.splits.get(split)
        else:
            listing = _asked_for(source, split)
        if listing is None or len(listing) == 0:
            continue
        shared = next((name for name, other in lists.items() if other is listing), None)
        if shared is not None:
            lists[f"{shared}, {split}"] = lists.pop(shared)
        else:
            lists[split] = listing
    return lists


def _asked_for(source: Source, split: str) -> ImageList | None:
    try:
        dataset = source.dataset(split, ImageSpec(3, 8, 8, [0.5] * 3, [0.5] * 3))
    except UsageError:
        return None  # a split without images
    return cast(ListImages, dataset).listing


def _labels_per_image(listing: ImageList) -> NDArray[np.int64]:
    positive = np.ones(len(listing.indices), bool) if listing.values is None else listing.values > 0
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(positive)])
    return before[listing.offsets[1:]] - before[listing.offsets[:-1]]


def statistics(listing: ImageList, positives: NDArray[np.int64], labels: NDArray[np.int64]) -> dict[str, Any]:
    """Numbers about the labels of a split.

    Args:
        listing: of the split.
        positives: number of images of each class (C,).
        labels: number of labels of each image (n,).

    Returns:
        images; without_labels; classes_without_images; images_per_class and labels_per_image, each with its min, median
        and max; mean_labels; imbalance, the most frequent class over the least frequent that occurs; share_of_positives
        of all pairs of image and class; verified_negatives and unknown, pairs that are listed as such.
    """
    occurring = positives[positives > 0]
    values = listing.values
    return {
        "images": len(listing),
        "without_labels": int((labels == 0).sum()),
        "classes_without_images": int((positives == 0).sum()),
        "images_per_class": _spread(positives),
        "labels_per_image": _spread(labels),
        "mean_labels": float(labels.mean()),
        "imbalance": float(occurring.max() / occurring.min()) if len(occurring) else None,
        "share_of_positives": float(labels.sum() / (len(labels) * len(positives))),
        "verified_negatives": 0 if values is None else int((values == 0).sum()),
        "unknown": 0 if values is None else int((values < 0).sum()),
    }


def _spread(counts: NDArray[np.int64]) -> dict[str, float]:
    return {"min": int(counts.min()), "median": float(np.median(counts)), "max": int(counts.max())}


class _Pixels(Dataset[Any]):
    """A number from the pixels of each image, by a hash of 64 bits, or a BadSample."""

    def __init__(self, listing: ImageList, numbers: NDArray[np.int64]) -> None:
        self.listing, self.numbers = listing, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> BadSample | int:
        image = self.listing.open(int(self.numbers[place]), "RGB")
        if isinstance(image, BadSample):
            return image
        digest = hashlib.blake2b(repr(image.size).encode(), digest_size=8)
        digest.update(image.tobytes())
        return int.from_bytes(digest.digest(), "big")


def _decode_all(
    report: Report, splits: Mapping[str, ImageList], images: int | None, workers: int, stream: TextIO | None
) -> None:
    """Opens images and adds what cannot be decoded, and what shows the same pixels as another, to the problems."""
    chosen = {}
    for name, listing in splits.items():
        count = len(listing) if images is None else min(images, len(listing))
        chosen[name] = np.linspace(0, len(listing) - 1, count).round().astype(np.int64)
    report.decoded = sum(map(len, chosen.values()))
    progress = Progress(report.decoded, "decoding", stream=stream)
    found = []
    for name, listing in splits.items():
        loader: DataLoader[Any] = DataLoader(
            _Pixels(listing, chosen[name]),
            batch_size=16,
            collate_fn=list,
            num_workers=workers,
            generator=torch.Generator(),
        )
        pixels, good = np.zeros(len(chosen[name]), np.uint64), np.ones(len(chosen[name]), bool)
        for place, result in enumerate(itertools.chain.from_iterable(loader)):
            if isinstance(result, BadSample):
                report.problems.append(Problem(_kind(result.reason), *result, True))
                good[place] = False
            else:
                pixels[place] = result
            progress.advance()
        found.append(_Found(listing, name, chosen[name][good], pixels[good]))
    progress.close()
    report.problems += _same_pictures(found)


class _Found(NamedTuple):
    """What was decoded of one split: the numbers of the images and of their pixels."""

    listing: ImageList
    split: str
    numbers: NDArray[np.int64]
    pixels: NDArray[np.uint64]


def _same_pictures(found: Sequence[_Found]) -> list[Problem]:
    """Images with the same pixels as another one, of the same split or of one before it."""
    pixels = np.concatenate([np.zeros(0, np.uint64), *(part.pixels for part in found)])
    starts = np.cumsum([0, *(len(part.pixels) for part in found)])

    def where(place: int) -> str:
        at = int(np.searchsorted(starts, place, "right")) - 1
        return f"{found[at].split}: {found[at].listing.names[int(found[at].numbers[place - starts[at]])]}"

    order = np.argsort(pixels, kind="stable")
    again = np.flatnonzero(pixels[order[1:]] == pixels[order[:-1]])
    pairs = sorted(zip(order[again + 1].tolist(), order[again].tolist(), strict=True))
    return [
        Problem("same picture", where(place), f"the same pixels as {where(other)}", False) for place, other in pairs
    ]
