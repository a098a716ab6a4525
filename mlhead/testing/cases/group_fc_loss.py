"""The case of group_fc_loss, and of linear_loss, which is the same op."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...ops import group_fc_loss, linear_loss
from ..case import Counts, Dims, Draw, OpCase, Sample, workloads
from ._loss import loss_options, upstream


def _make(dims: Dims, dtype: torch.dtype, device: str, seed: int) -> Sample:
    B, G, E, C = dims["B"], dims["G"], dims["E"], dims["C"]
    J = -(-C // G) if G else 0
    draw = Draw(dtype, device, seed)
    scale = 1.0 / math.sqrt(max(E, 1))
    options, dout = loss_options(dims, device, seed), upstream(dtype, device, seed)
    tensors: dict[str, Tensor | None]
    if dims.get("linear"):
        tensors = {"x": draw(B, E), "weight": draw(C, E, scale=scale), "bias": draw(C)}
        return Sample(linear_loss, tensors, options, dout)
    bias = draw(C) if dims.get("bias", True) else None
    tensors = {"h": draw(B, G, E), "weight": draw(G, E, J, scale=scale), "bias": bias}
    return Sample(group_fc_loss, tensors, {**options, "num_classes": C}, dout)


def _flops(dims: Dims) -> Counts:
    product = 2 * dims["B"] * dims["E"] * dims["C"]
    return {"forward": product, "backward": 2 * product}


def _bytes(dims: Dims, element_bytes: int) -> Counts:
    """The weight read once and its gradient written once in all; the logits need not exist and are not counted."""
    h, weight, C = dims["B"] * dims["G"] * dims["E"], dims["E"] * dims["C"], dims["C"]
    return {"forward": element_bytes * (h + weight + C), "backward": element_bytes * (h + weight + C)}


CASE = OpCase(
    name="group_fc_loss",
    function=group_fc_loss,
    make=_make,
    shapes=(
        {"B": 0, "G": 4, "E": 8, "C": 10},
        {"B": 2, "G": 4, "E": 0, "C": 10, "loss": "asl"},
        {"B": 2, "G": 4, "E": 8, "C": 0},
        {"B": 1, "G": 1, "E": 1, "C": 1, "loss": "asl"},
        {"B": 2, "G": 3, "E": 5, "C": 7, "loss": "asl", "weights": True},
        {"B": 5, "G": 7, "E": 13, "C": 29, "sparse": True, "weights": True, "ignore": True},
        {"B": 5, "G": 7, "E": 13, "C": 20, "loss": "softmax", "sparse": True, "weights": True},
        {"B": 3, "G": 2, "E": 6, "C": 15, "loss": "softmax", "options": {"label_smoothing": 0.1, "reduction": "sum"}},
        {"B": 4, "G": 20, "E": 6, "C": 20, "loss": "asl", "options": {"detach_focal": False, "gamma_pos": 1.0}},
        {"B": 4, "G": 3, "E": 6, "C": 11, "loss": "asl", "options": {"gamma_neg": 1.5, "margin": 0.0, "eps": 1e-3}},
        {"B": 3, "G": 2, "E": 9, "C": 17, "ignore": True, "options": {"label_smoothing": 0.2}},
        {"B": 17, "G": 4, "E": 33, "C": 65, "loss": "asl", "sparse": True, "ignore": True, "weights": True},
        {"B": 2, "G": 1, "E": 70, "C": 300, "sparse": True, "options": {"reduction": "sum"}},
        {"B": 6, "G": 1, "E": 31, "C": 129, "linear": True, "loss": "asl", "sparse": True},
        {"B": 3, "G": 1, "E": 16, "C": 64, "linear": True, "loss": "softmax"},
        {"B": 260, "G": 1, "E": 9, "C": 5, "target_dtype": torch.float32},
        {"B": 3, "G": 4, "E": 8, "C": 10, "bias": False, "loss": "asl"},
        {"B": 0, "G": 4, "E": 8, "C": 10, "loss": "softmax"},
        {"B": 3, "G": 4, "E": 8, "C": 10},
    ),
    model={"B": 4, "G": 100, "E": 768, "C": 1000, "loss": "asl", "positives": 3},
    workloads=workloads(
        "voc coco coco-vit imagenet openimages million 3-million small",
        "B G E C loss positives",
        (64, 20, 768, 20, "asl", 2),
        (64, 80, 768, 80, "asl", 3),
        (64, 80, 768, 80, "asl", 3),
        (256, 100, 768, 1000, "softmax", 1),
        (128, 100, 768, 9605, "asl", 8),
        (256, 100, 768, 1_000_000, "asl", 5),
        (128, 100, 768, 3_000_000, "asl", 5),
        (2, 20, 256, 20, "asl", 2),
    ),
    flops=_flops,
    bytes=_bytes,
)
