"""The case of csra_loss."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from ...ops import csra_loss
from ..case import Counts, Dims, OpCase, Sample, workloads
from . import csra_pool
from ._loss import loss_options, upstream


def _make(dims: Dims, dtype: torch.dtype, device: str, seed: int) -> Sample:
    sample = csra_pool.CASE.make(dims, dtype, device, seed)
    options = {**sample.options, **loss_options(dims, device, seed)}
    return replace(sample, function=csra_loss, options=options, dout=upstream(dtype, device, seed))


def _flops(dims: Dims) -> Counts:
    product = 2 * dims["B"] * dims["L"] * dims["D"] * dims["C"] * dims["H"]
    return {"forward": product, "backward": 2 * product}


def _bytes(dims: Dims, element_bytes: int) -> Counts:
    """Tokens and weight read once and their gradients written once in all; neither scores nor logits."""
    x, weight = dims["B"] * dims["L"] * dims["D"], dims["H"] * dims["C"] * dims["D"]
    return {"forward": element_bytes * (x + weight), "backward": element_bytes * (x + weight)}


CASE = OpCase(
    name="csra_loss",
    function=csra_loss,
    make=_make,
    shapes=(
        {"B": 0, "L": 4, "D": 8, "H": 1, "C": 3},
        {"B": 2, "L": 4, "D": 0, "H": 1, "C": 3, "loss": "asl"},
        {"B": 2, "L": 4, "D": 8, "H": 1, "C": 0},
        {"B": 1, "L": 1, "D": 1, "H": 1, "C": 1, "loss": "asl", "normalize": False},
        {"B": 2, "L": 3, "D": 5, "H": 2, "C": 7, "weights": True},
        {"B": 3, "L": 6, "D": 8, "H": 2, "C": 5},
        {"B": 3, "L": 9, "D": 13, "H": 1, "C": 20, "loss": "asl", "sparse": True, "ignore": True},
        {"B": 3, "L": 8, "D": 16, "H": 4, "C": 5, "loss": "softmax", "sparse": True, "weights": True},
        {"B": 2, "L": 9, "D": 8, "H": 2, "C": 5, "bias": True, "normalize": False, "lam": (0.2, 0.7), "loss": "asl"},
        {"B": 2, "L": 9, "D": 8, "H": 1, "C": 5, "bias": True, "temperatures": (math.inf,), "loss": "softmax"},
        {"B": 3, "L": 12, "D": 8, "H": 2, "C": 5, "map": True, "bias": True, "options": {"reduction": "sum"}},
        {"B": 2, "L": 5, "D": 8, "H": 1, "C": 5, "bias": True, "loss": "asl", "average": 0.0, "lam": 1.0},
        {"B": 0, "L": 4, "D": 8, "H": 1, "C": 3, "loss": "softmax"},
        {"B": 2, "L": 6, "D": 8, "H": 3, "C": 4, "normalize": False, "temperatures": (0.5, 9.0, math.inf)},
    ),
    model={"B": 2, "L": 49, "D": 2048, "H": 1, "C": 80, "loss": "asl", "positives": 3},
    workloads=workloads(
        "voc coco coco-vit imagenet openimages small",
        "B L D H C loss positives",
        (64, 196, 2048, 1, 20, "asl", 2),
        (64, 196, 2048, 6, 80, "asl", 3),
        (64, 784, 1024, 8, 80, "asl", 3),
        (256, 49, 2048, 1, 1000, "softmax", 1),
        (128, 49, 2048, 1, 9605, "asl", 8),
        (2, 49, 512, 1, 20, "asl", 2),
    ),
    flops=_flops,
    bytes=_bytes,
)
