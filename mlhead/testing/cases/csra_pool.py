"""The case of csra_pool."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...ops import csra_pool
from ..case import Counts, Dims, Draw, OpCase, Sample, rows, workloads

_TEMPERATURES = {
    1: (1.0,),
    2: (1.0, math.inf),
    4: (1.0, 2.0, 4.0, math.inf),
    6: (1.0, 2.0, 3.0, 4.0, 5.0, math.inf),
    8: (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, math.inf),
}


def _make_csra_pool(dims: Dims, dtype: torch.dtype, device: str, seed: int) -> Sample:
    B, L, D, H, C = dims["B"], dims["L"], dims["D"], dims["H"], dims["C"]
    draw = Draw(dtype, device, seed)
    height = max(n for n in range(1, math.isqrt(L) + 1) if L % n == 0) if dims.get("map") else 0
    tensors: dict[str, Tensor | None] = {
        "x": draw(B, D, height, L // height) if height else draw(B, L, D),
        "weight": draw(H, C, D, scale=1.0 / math.sqrt(max(D, 1))),
        "bias": draw(H, C) if dims.get("bias", False) else None,
    }
    options = {
        "temperatures": dims.get("temperatures", _TEMPERATURES.get(H)),
        "lam": dims.get("lam", 0.3),
        "normalize": dims.get("normalize", True),
        "average": dims.get("average", 1.0),
    }
    return Sample(csra_pool, tensors, options, draw(B, C))


def _csra_pool_flops(dims: Dims) -> Counts:
    product = 2 * dims["B"] * dims["L"] * dims["D"] * dims["C"] * dims["H"]
    return {"forward": product, "backward": 3 * product}


def _csra_pool_bytes(dims: Dims, element_bytes: int) -> Counts:
    x = dims["B"] * dims["L"] * dims["D"]
    weight, logits = dims["H"] * dims["C"] * dims["D"], dims["B"] * dims["C"]
    return {"forward": element_bytes * (x + weight + logits), "backward": element_bytes * (2 * x + 2 * weight + logits)}


CASE = OpCase(
    name="csra_pool",
    function=csra_pool,
    make=_make_csra_pool,
    shapes=(
        *rows(
            "B L D H C",
            (0, 4, 8, 1, 3),
            (2, 4, 0, 1, 3),
            (2, 4, 8, 1, 0),
            (1, 1, 1, 1, 1),
            (1, 33, 16, 1, 29),
            (2, 3, 5, 2, 7),
            (3, 49, 13, 1, 29),
            (4, 64, 32, 4, 16),
            (2, 63, 31, 2, 17),
            (2, 65, 33, 2, 15),
            (2, 7, 16, 6, 5),
        ),
        {"B": 2, "L": 9, "D": 8, "H": 2, "C": 5, "bias": True, "normalize": False, "lam": (0.2, 0.7)},
        {"B": 2, "L": 9, "D": 8, "H": 1, "C": 5, "bias": True, "normalize": True, "temperatures": (math.inf,)},
        {"B": 3, "L": 12, "D": 8, "H": 2, "C": 5, "map": True, "bias": True},
        {"B": 2, "L": 5, "D": 8, "H": 2, "C": 5, "average": 0.0, "lam": 1.0},
        {"B": 2, "L": 5, "D": 8, "H": 1, "C": 5, "lam": 0.0, "bias": True, "normalize": False},
        {"B": 2, "L": 6, "D": 8, "H": 3, "C": 4, "normalize": False, "temperatures": (0.5, 99.0, math.inf)},
    ),
    model={"B": 2, "L": 49, "D": 2048, "H": 1, "C": 80},
    workloads=workloads(
        "voc coco coco-vit imagenet openimages small",
        "B L D H C",
        (64, 196, 2048, 1, 20),
        (64, 196, 2048, 6, 80),
        (64, 784, 1024, 8, 80),
        (256, 49, 2048, 1, 1000),
        (128, 49, 2048, 1, 9605),
        (2, 49, 512, 1, 20),
    ),
    flops=_csra_pool_flops,
    bytes=_csra_pool_bytes,
)
