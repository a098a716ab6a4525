"""The case of group_fc."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...ops import group_fc
from ..case import Counts, Dims, Draw, OpCase, Sample, rows, workloads


def _make_group_fc(dims: Dims, dtype: torch.dtype, device: str, seed: int) -> Sample:
    B, G, E, C = dims["B"], dims["G"], dims["E"], dims["C"]
    J = -(-C // G) if G else 0
    draw = Draw(dtype, device, seed)
    tensors: dict[str, Tensor | None] = {
        "h": draw(B, G, E),
        "weight": draw(G, E, J, scale=1.0 / math.sqrt(max(E, 1))),
        "bias": draw(C) if dims.get("bias", True) else None,
    }
    return Sample(group_fc, tensors, {"num_classes": C}, draw(B, C))


def _group_fc_flops(dims: Dims) -> Counts:
    product = 2 * dims["B"] * dims["E"] * dims["C"]
    return {"forward": product, "backward": 2 * product}


def _group_fc_bytes(dims: Dims, element_bytes: int) -> Counts:
    B, G, E, C = dims["B"], dims["G"], dims["E"], dims["C"]
    h, weight, logits = B * G * E, E * C, B * C
    return {
        "forward": element_bytes * (h + weight + C + logits),
        "backward": element_bytes * (2 * h + 2 * weight + logits + C),
    }


_SHAPES = (
    *rows(
        "B G E C",
        (0, 4, 8, 10),
        (2, 0, 8, 0),
        (2, 4, 0, 10),
        (2, 4, 8, 0),
        (1, 1, 1, 1),
        (2, 3, 5, 7),
        (5, 7, 13, 29),
        (16, 4, 32, 64),
        (15, 4, 31, 60),
        (17, 4, 33, 65),
        (5, 20, 16, 20),
        (2, 20, 3, 21),
        (65, 2, 20, 129),
        (2, 1, 70, 300),
        (260, 1, 9, 5),
    ),
    {"B": 3, "G": 4, "E": 8, "C": 10, "bias": False},
)

CASE = OpCase(
    name="group_fc",
    function=group_fc,
    make=_make_group_fc,
    shapes=_SHAPES,
    model={"B": 4, "G": 100, "E": 768, "C": 1000},
    workloads=workloads(
        "voc coco coco-vit imagenet openimages million 3-million small",
        "B G E C",
        (64, 20, 768, 20),
        (64, 80, 768, 80),
        (64, 80, 768, 80),
        (256, 100, 768, 1000),
        (128, 100, 768, 9605),
        (256, 100, 768, 1_000_000),
        (128, 100, 768, 3_000_000),
        (2, 20, 256, 20),
    ),
    flops=_group_fc_flops,
    bytes=_group_fc_bytes,
)
