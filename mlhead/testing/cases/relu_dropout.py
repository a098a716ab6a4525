"""The case of relu_dropout."""

from __future__ import annotations

from typing import Any

import torch

from ...ops import relu_dropout
from ..case import Counts, Dims, Draw, OpCase, Sample, rows, workloads


def _make(dims: Dims, dtype: torch.dtype, device: str, seed: int) -> Sample:
    B, N, F = dims["B"], dims["N"], dims["F"]
    draw = Draw(dtype, device, seed)
    options: dict[str, Any] = {"dropout_p": dims.get("dropout", 0.0), "seed": 7}
    return Sample(relu_dropout, {"x": draw(B, N, F)}, options, draw(B, N, F))


def _flops(dims: Dims) -> Counts:
    numbers = dims["B"] * dims["N"] * dims["F"]
    return {"forward": 2 * numbers, "backward": 2 * numbers}


def _bytes(dims: Dims, element_bytes: int) -> Counts:
    numbers = dims["B"] * dims["N"] * dims["F"]
    return {"forward": element_bytes * 2 * numbers, "backward": element_bytes * 3 * numbers}


CASE = OpCase(
    name="relu_dropout",
    function=relu_dropout,
    make=_make,
    shapes=(
        *rows("B N F", (0, 3, 8), (2, 0, 8), (1, 1, 1), (2, 3, 7), (3, 5, 64)),
        *rows("B N F dropout", (2, 3, 16, 0.3), (3, 7, 33, 0.1), (1, 70, 65, 0.5)),
    ),
    model={"B": 2, "N": 100, "F": 2048, "dropout": 0.1},
    workloads=workloads(
        "voc coco imagenet openimages small",
        "B N F dropout",
        (64, 20, 2048, 0.1),
        (64, 80, 2048, 0.1),
        (256, 100, 2048, 0.1),
        (128, 100, 2048, 0.1),
        (2, 20, 2048, 0.1),
    ),
    flops=_flops,
    bytes=_bytes,
)
