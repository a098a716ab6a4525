"""The case of dropout_add_layer_norm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops import dropout_add_layer_norm
from ..case import Counts, Dims, Draw, OpCase, Sample, rows, workloads


def _make(dims: Dims, dtype: torch.dtype, device: str, seed: int) -> Sample:
    B, N, E = dims["B"], dims["N"], dims["E"]
    draw = Draw(dtype, device, seed)
    # Under autocast weight and bias are fp32 beside 16-bit activations.
    parameters = Draw(torch.promote_types(dtype, torch.float32), device, seed + 1) if dims.get("wide", False) else draw
    tensors: dict[str, Tensor | None] = {
        "x": draw(B, N, E),
        "residual": draw(B, N, E),
        "weight": parameters(E),
        "bias": parameters(E),
    }
    options: dict[str, Any] = {"dropout_p": dims.get("dropout", 0.0), "seed": 7, "eps": 1e-5}
    return Sample(dropout_add_layer_norm, tensors, options, draw(B, N, E))


def _flops(dims: Dims) -> Counts:
    numbers = dims["B"] * dims["N"] * dims["E"]
    return {"forward": 8 * numbers, "backward": 16 * numbers}


def _bytes(dims: Dims, element_bytes: int) -> Counts:
    numbers, E = dims["B"] * dims["N"] * dims["E"], dims["E"]
    return {"forward": element_bytes * (3 * numbers + 2 * E), "backward": element_bytes * (5 * numbers + 3 * E)}


CASE = OpCase(
    name="dropout_add_layer_norm",
    function=dropout_add_layer_norm,
    make=_make,
    shapes=(
        *rows("B N E", (0, 3, 8), (2, 0, 8), (1, 1, 1), (2, 3, 7), (3, 5, 64), (2, 9, 63), (1, 70, 65)),
        *rows("B N E dropout", (2, 3, 16, 0.3), (3, 7, 33, 0.1)),
        {"B": 2, "N": 4, "E": 40, "dropout": 0.5, "wide": True},
    ),
    model={"B": 2, "N": 100, "E": 768, "dropout": 0.1},
    workloads=workloads(
        "voc coco imagenet openimages small",
        "B N E dropout",
        (64, 20, 768, 0.1),
        (64, 80, 768, 0.1),
        (256, 100, 768, 0.1),
        (128, 100, 768, 0.1),
        (2, 20, 256, 0.1),
    ),
    flops=_flops,
    bytes=_bytes,
)
