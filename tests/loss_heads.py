"""Heads, labels and losses for the tests of losses in the head."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mlhead import SparseTargets, _backend, losses
from mlhead.ops._loss_options import loss_arguments

BACKENDS = [name for name in ("reference", "cpp") if not _backend.unavailable(name)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
B, G, E, C = 5, 3, 7, 29
TEMPERATURES = {"temperatures": (1.0, math.inf), "lam": 0.3}


def make_head(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = ((B, G, E), (G, E, -(-C // G)), (C,))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def make_labels(seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.rand(B, C) < 0.2


def arguments_of(features: Tensor, targets: Tensor, options: dict[str, Any]) -> Any:
    return loss_arguments(
        "test",
        features,
        targets,
        targets.num_classes if isinstance(targets, SparseTargets) else targets.shape[1],
        options,
        [True] * 3,
    )


LOSSES: dict[str, Callable[..., Tensor]] = {
    "bce": losses.binary_cross_entropy,
    "asl": losses.asymmetric_loss,
    "softmax": losses.softmax_cross_entropy,
}
