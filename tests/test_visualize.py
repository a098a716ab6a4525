"""Pictures: the heat lies where the attention lay, and files are whole images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlhead import visualize
from mlhead.visualize import Panel

pytest.importorskip("matplotlib")
Image = pytest.importorskip("PIL.Image")


def picture(height=20, width=30):
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("rows", "columns", "height", "width"), [(10, 10, 40, 40), (7, 7, 224, 224), (6, 9, 64, 96)])
@pytest.mark.parametrize("as_tokens", [False, True])
def test_heat_lies_where_the_attention_lay(rows, columns, height, width, as_tokens):
    features = torch.zeros(1, rows * columns, 8) if as_tokens else torch.zeros(1, 8, rows, columns)
    for row, column in [(0, 0), (rows - 1, 2), (3, columns - 1)]:
        attention = torch.full((2, rows * columns), 0.01)
        attention[1, row * columns + column] = 1.0
        heats = visualize.heat_maps(attention, features, height, width)
        assert heats.shape == (2, height, width)
        assert heats.min() >= 0
        assert 0.9 < heats[1].max() <= 1
        assert heats[0].max() < 1e-5  # attention to everything alike is attention to nothing
        y, x = np.unravel_index(heats[1].argmax(), heats[1].shape)
        assert (y * rows // height, x * columns // width) == (row, column)


def test_no_attention_gives_no_heat():
    heats = visualize.heat_maps(torch.zeros(1, 16), torch.zeros(1, 4, 4, 4), 8, 8)
    assert (heats == 0).all()


def test_grids_follow_the_shape_of_the_image():
    assert visualize.grid_of(49, 224, 224) == (7, 7)
    assert visualize.grid_of(96, 128, 192) == (8, 12)
    assert visualize.grid_of(96, 192, 128) == (12, 8)
    with pytest.raises(ValueError, match="positions must be a grid for an image of 224x224, got 53"):
        visualize.grid_of(53, 224, 224)


def test_overlay_colours_the_heat_and_leaves_the_rest():
    ground = picture()
    heat = np.zeros((20, 30), np.float32)
    assert np.abs(visualize.overlay(ground, heat).astype(int) - ground).max() <= 1
    heat[5, 7] = 1.0
    changed = (visualize.overlay(ground, heat) != visualize.overlay(ground, heat * 0)).any(axis=2)
    assert changed.sum() == 1
    assert changed[5, 7]


def test_enlarging_repeats_pixels():
    small = picture(40, 40)
    large = visualize.enlarge(small, 320)
    assert large.shape == (320, 320, 3)
    assert (large[::8, ::8] == small).all()
    assert visualize.enlarge(picture(500, 400)).shape == (500, 400, 3)


def test_files_are_written_and_leave_pyplot_alone(tmp_path):
    heat = np.linspace(0, 1, 600, dtype=np.float32).reshape(20, 30)
    rows = [[Panel(picture(), "a"), Panel(picture(), "b", heat, [(1, 2, 8, 16)], True)], [Panel(picture(), "c"), None]]
    visualize.panel_grid(rows, tmp_path / "grid.png", title="title", row_names=["one", "two"])
    visualize.panel_grid([rows[0]], tmp_path / "deep/row.png")
    records = [{"kind": "train", "step": s, "loss": 1 / s} for s in range(1, 9)]
    records += [{"kind": "val", "step": s, "mAP": s / 9} for s in (4, 8)]
    visualize.learning_curves({"gap": records, "csra": records[:5]}, tmp_path / "curves.png", title="title")
    for name in ("grid.png", "deep/row.png", "curves.png"):
        with Image.open(tmp_path / name) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape[0] > 200
        assert pixels.shape[1] > 300
        assert pixels.std() > 10
    from matplotlib import pyplot  # only to ask what it knows

    assert pyplot.get_fignums() == []
