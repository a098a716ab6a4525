"""Pictures: where each class looks, and how a run went. Drawn without pyplot, so nothing global changes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mlhead._check import fail
from mlhead._usage import require
from mlhead.checkpoints import write_atomically

PIXELS = 320  # shown size of the longer side of an image
INK, PAPER, GREY = "#1b1f24", "#ffffff", "#8a929c"
COLOURS = ("#8a929c", "#d1495b", "#00798c", "#edae49", "#66507a")


class Panel(NamedTuple):
    """One image of a figure: picture (H, W, 3) uint8, title, heat (H, W) in [0, 1] or None, boxes (top, left, h, w)."""

    picture: NDArray[np.uint8]
    title: str = ""
    heat: NDArray[np.float32] | None = None
    boxes: Sequence[tuple[int, int, int, int]] = ()
    good: bool | None = None


def grid_of(positions: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a map of L = `positions` of an image of this shape: the two factors that are nearest to it.

    Raises:
        ValueError: no two factors come within a factor of 2 of the image's shape.
    """
    pairs = [(rows, positions // rows) for rows in range(1, positions + 1) if positions % rows == 0]
    rows, columns = min(pairs, key=lambda p: abs(np.log((p[0] / p[1]) / (height / width))))
    if not 0.5 <= (rows / columns) / (height / width) <= 2:
        fail("grid_of", "positions", f"a grid for an image of {height}x{width}", positions)
    return rows, columns


def heat_maps(attention: Tensor, features: Tensor, height: int, width: int) -> NDArray[np.float32]:
    """Attention over positions as pictures.

    Args:
        attention: (K, L), at least 0.
        features: of one image, (1, D, H, W) or (1, L, D): says how the positions lie.
        height: of the picture, in pixels.
        width: of the picture, in pixels.

    Returns:
        (K, height, width) fp32 in [0, 1]: attention above that of a uniform map, over the map's largest value. So
        attention to one position gives nearly 1 there, and attention to everything alike gives 0 everywhere.
    """
    rows, columns = features.shape[-2:] if features.ndim == 4 else grid_of(features.shape[1], height, width)
    maps = attention.detach().float().cpu().reshape(-1, 1, rows, columns)
    maps = F.interpolate(maps, (height, width), mode="bicubic", align_corners=False).clamp(min=0)
    top, uniform = maps.amax(dim=(2, 3), keepdim=True), maps.mean(dim=(2, 3), keepdim=True)
    return torch.where(top > 0, (maps - uniform).clamp(min=0) / top.clamp(min=1e-12), 0.0)[:, 0].numpy()


def enlarge(picture: NDArray[np.uint8], pixels: int = PIXELS) -> NDArray[np.uint8]:
    """Repeats the pixels of a small picture a whole number of times, so that they stay sharp."""
    times = max(1, pixels // max(picture.shape[:2]))
    return picture.repeat(times, axis=0).repeat(times, axis=1)


def overlay(picture: NDArray[np.uint8], heat: NDArray[np.float32], strength: float = 0.75) -> NDArray[np.uint8]:
    """Heat (H, W) in [0, 1] as colour over a picture (H, W, 3) uint8, which shows wherever the heat is low."""
    colours = require("matplotlib", "mlhead.visualize").colormaps["turbo"](0.25 + 0.65 * heat)[..., :3]
    share = (strength * np.clip(heat, 0, 1) ** 0.8)[..., None]
    ground = picture.astype(np.float32) / 255
    return np.clip(255 * (ground * (1 - share) + colours * share + 0.25 * ground * share), 0, 255).astype(np.uint8)


def plain(text: str) -> str:
    """A text as pictures show it as it is: between the dollars of a name they would show a formula."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def _figure(width: float, height: float) -> Any:
    require("matplotlib", "mlhead.visualize")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=130, facecolor=PAPER)
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Path) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def _draw(axes: Any, panel: Panel) -> None:
    from matplotlib.patches import Rectangle

    picture = enlarge(panel.picture)
    height, width = picture.shape[:2]
    if panel.heat is not None:
        heat = torch.from_numpy(panel.heat)[None, None]
        heat = F.interpolate(heat, (height, width), mode="bilinear", align_corners=False)[0, 0].clamp(0, 1)
        picture = overlay(picture, heat.numpy())
    axes.imshow(picture, interpolation="nearest")
    times = height / panel.picture.shape[0]
    for top, left, tall, wide in panel.boxes:
        corner = (left * times - 0.5, top * times - 0.5)
        axes.add_patch(Rectangle(corner, wide * times, tall * times, fill=False, edgecolor="#ffffff", linewidth=1.2))
    colour = INK if panel.good is None else ("#1a7f37" if panel.good else "#c62828")
    axes.set_title(plain(panel.title), fontsize=9, color=colour, pad=3)
    axes.set_axis_off()


def panel_grid(
    rows: Sequence[Sequence[Panel | None]], path: Path, *, title: str = "", row_names: Sequence[str] = ()
) -> None:
    """Saves rows of panels as one PNG; None leaves a place empty."""
    columns = max(len(row) for row in rows)
    left = 0.2 + 0.085 * max(map(len, row_names)) if row_names else 0.1
    top = 0.45 if title else 0.1
    # Every row as high as its pictures, so that wide ones stand as close as square ones.
    shapes = [[panel.picture.shape for panel in row if panel is not None] for row in rows]
    tall = [1.75 * min(max((shape[0] / shape[1] for shape in row), default=1.0), 2.0) for row in shapes]
    figure = _figure(left + 1.75 * columns + 0.1, top + sum(tall) + 0.23 * len(rows) + 0.1)
    width, height = figure.get_size_inches()
    grid = figure.add_gridspec(
        len(rows), columns, left=left / width, right=1 - 0.1 / width, top=1 - (top + 0.23) / height,
        bottom=0.08 / height, wspace=0.06, hspace=0.23 * len(rows) / sum(tall), height_ratios=tall,
    )  # fmt: skip
    if title:
        figure.suptitle(plain(title), x=0.12 / width, y=1 - 0.12 / height, ha="left", va="top", fontsize=11, color=INK)
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            if panel is None:
                continue
            axes = figure.add_subplot(grid[i, j])
            _draw(axes, panel)
            if j == 0 and row_names:
                axes.text(
                    -0.07, 0.5, plain(row_names[i]), transform=axes.transAxes, ha="right", va="center", fontsize=10
                )
    _save(figure, path)


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """A heading and rows as text: the first and the last column to the left, the others to the right."""
    count = len(rows[0])
    widths = [max(len(row[i]) for row in rows) for i in range(count)]

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.ljust(w) if i in (0, count - 1) else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return "\n".join([line(rows[0]), "-" * len(line(rows[0])), *map(line, rows[1:])])


def bars(panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path, *, title: str = "") -> None:
    """Saves one panel of horizontal bars for each measure: the mean of each row's values, which stand on it as dots.

    Args:
        panels: measure -> row -> its values; all panels have the same rows.
        path: of the PNG.
        title: above the panels.
    """
    rows = list(next(iter(panels.values())))
    figure = _figure(2.2 + 2.6 * len(panels), 0.9 + 0.34 * len(rows))
    axes_of = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (measure, values) in zip(axes_of, panels.items(), strict=True):
        means = [sum(values[row]) / len(values[row]) for row in rows]
        colours = [COLOURS[0] if i == 0 else COLOURS[2] for i in range(len(rows))]
        axes.barh(range(len(rows)), means, color=colours, height=0.62)
        most = max(max(values[row]) for row in rows)
        for i, row in enumerate(rows):
            axes.plot(values[row], [i] * len(values[row]), "o", color=INK, markersize=2.6)
            axes.text(max(values[row]) + 0.03 * most, i, f"{means[i]:.3f}", va="center", fontsize=8, color=INK)
        axes.set_title(measure, fontsize=10, loc="left")
        axes.set_xlim(0, 1.28 * most)
        axes.set_yticks(range(len(rows)), rows, fontsize=9)
        axes.tick_params(axis="x", labelsize=8)
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    axes_of[0].invert_yaxis()
    if title:
        figure.suptitle(title, fontsize=11, x=0.02, ha="left", color=INK)
    figure.tight_layout(rect=(0, 0, 1, 0.97))
    _save(figure, path)


def learning_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: Path, *, title: str = "") -> None:
    """Training loss and validation mAP over the steps, a line for each run.

    Args:
        runs: name of each run and the records of its log.jsonl.
        path: of the PNG.
        title: above the two panels.
    """
    figure = _figure(9.6, 3.7)
    from matplotlib import ticker

    loss_axes, map_axes = figure.subplots(1, 2)
    ends: list[tuple[float, int, str, str]] = []
    for number, (name, records) in enumerate(runs.items()):
        colour = COLOURS[number % len(COLOURS)]
        train = [(r["step"], r["loss"]) for r in records if r["kind"] == "train"]
        val = [(r["step"], r["mAP"]) for r in records if r["kind"] == "val" and "mAP" in r]
        if train:
            loss_axes.plot(*zip(*train, strict=True), color=colour, linewidth=1.6, label=name)
        if val:
            map_axes.plot(*zip(*val, strict=True), color=colour, linewidth=1.8, marker="o", markersize=3.5)
            ends.append((val[-1][1], val[-1][0], f"{name} {val[-1][1]:.3f}", colour))
    lowest = -1.0
    for height, step, text, colour in sorted(ends):
        lowest = max(height, lowest + 0.06)  # names of curves that end alike stand above one another
        map_axes.annotate(
            text, (step, lowest), xytext=(7, 0), textcoords="offset points", color=colour, fontsize=9, va="center"
        )
    loss_axes.set_title("training loss", fontsize=10, loc="left")
    loss_axes.set_yscale("log")
    loss_axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    loss_axes.yaxis.set_major_formatter(lambda value, _: f"{value:.2g}")
    loss_axes.yaxis.set_minor_locator(ticker.NullLocator())
    loss_axes.legend(frameon=False, fontsize=9)
    map_axes.set_title("validation mAP", fontsize=10, loc="left")
    map_axes.set_ylim(0, 1.08)
    for axes in (loss_axes, map_axes):
        axes.set_xlabel("step", fontsize=9)
        axes.set_xlim(left=0)
        axes.tick_params(which="both", labelsize=8)
        axes.grid(color="#e4e7eb", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11, x=0.03, ha="left", color=INK)
    figure.subplots_adjust(left=0.08, right=0.86, bottom=0.14, top=0.83 if title else 0.9, wspace=0.18)
    _save(figure, path)
