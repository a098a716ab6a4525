"""The case of query_attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...ops import query_attention
from ..case import Counts, Dims, Draw, OpCase, Sample, rows, workloads


def _make_query_attention(dims: Dims, dtype: torch.dtype, device: str, seed: int) -> Sample:
    B, L, E, G = dims["B"], dims["L"], dims["E"], dims["G"]
    draw = Draw(dtype, device, seed)
    tensors: dict[str, Tensor | None] = {
        "q": draw(B, G, E) if dims.get("per_image", False) else draw(G, E),
        "k": draw(B, L, E),
        "v": draw(B, L, E),
    }
    options: dict[str, Any] = {"num_heads": dims.get("heads", 8), "dropout_p": dims.get("dropout", 0.0), "seed": 11}
    if dims.get("masked", False):
        # The last image attends to nothing, the others to all but every third position.
        mask = (torch.arange(L) % 3 != 2).expand(B, L).clone()
        mask[-1:] = False
        options["key_mask"] = mask.to(device)
    return Sample(query_attention, tensors, options, draw(B, G, E))


def _query_attention_flops(dims: Dims) -> Counts:
    product = 2 * dims["B"] * dims["G"] * dims["L"] * dims["E"]
    return {"forward": 2 * product, "backward": 5 * product}


def _query_attention_bytes(dims: Dims, element_bytes: int) -> Counts:
    B, L, E, G = dims["B"], dims["L"], dims["E"], dims["G"]
    q, kv, out = G * E, 2 * B * L * E, B * G * E
    return {"forward": element_bytes * (q + kv + out), "backward": element_bytes * (2 * q + 2 * kv + 2 * out)}


CASE = OpCase(
    name="query_attention",
    function=query_attention,
    make=_make_query_attention,
    shapes=(
        *rows(
            "B L E G heads",
            (0, 4, 8, 3, 2),
            (2, 4, 8, 0, 2),
            (1, 1, 1, 1, 1),
            (2, 3, 10, 7, 2),
            (3, 49, 96, 5, 1),
            (2, 64, 64, 16, 4),
            (2, 63, 34, 17, 2),
            (2, 65, 66, 15, 2),
            (1, 9, 300, 4, 1),
        ),
        {"B": 2, "L": 9, "E": 8, "G": 5, "heads": 2, "per_image": True},
        {"B": 3, "L": 9, "E": 8, "G": 5, "heads": 2, "masked": True},
        {"B": 3, "L": 9, "E": 8, "G": 5, "heads": 2, "dropout": 0.3},
        # More queries than a tile.
        {"B": 1, "L": 70, "E": 192, "G": 150, "heads": 2, "dropout": 0.1},
        {"B": 2, "L": 9, "E": 8, "G": 5, "heads": 4, "dropout": 0.3, "masked": True, "per_image": True},
    ),
    model={"B": 2, "L": 49, "E": 768, "G": 100},
    workloads=workloads(
        "voc coco coco-vit imagenet openimages small",
        "B L E G",
        (64, 196, 768, 20),
        (64, 196, 768, 80),
        (64, 784, 768, 80),
        (256, 49, 768, 100),
        (128, 49, 768, 100),
        (2, 49, 256, 20),
    ),
    flops=_query_attention_flops,
    bytes=_query_attention_bytes,
)
