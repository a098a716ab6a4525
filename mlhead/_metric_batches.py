"""Batches of logits and targets, as the metrics that see all classes take them."""

from __future__ import annotations

import torch
from torch import Tensor

from mlhead._check import check_tensor, fail
from mlhead.ops._targets import SparseTargets, check_range


def check_batch(where: str, logits: Tensor, targets: Tensor | SparseTargets, num_classes: int) -> None:
    """That both are (B, C), the logits finite in fp32 and the targets in [0, 1], or -1 where unknown."""
    check_tensor(where, "logits", logits)
    if isinstance(targets, SparseTargets):
        targets.check(where, "targets")
        shape: tuple[int, ...] = (targets.batch, targets.num_classes)
    elif isinstance(targets, Tensor):
        shape = tuple(targets.shape)
    else:
        fail(where, "targets", "a tensor (B, C) or SparseTargets", type(targets).__name__, TypeError)
    if tuple(logits.shape) != shape or len(shape) != 2 or shape[1] != num_classes:
        fail(where, "logits and targets", f"both (B, C) = (B, {num_classes})", f"{tuple(logits.shape)} and {shape}")
    if not logits.float().isfinite().all():
        fail(where, "logits", "finite", "NaN or infinity: has the training diverged?")
    if isinstance(targets, Tensor):
        check_range(where, "targets", targets, unknown=True)


def positive(targets: Tensor | SparseTargets) -> Tensor:
    """Where a target is above 0, bool (B, C)."""
    if isinstance(targets, Tensor):
        return targets > 0
    if targets.values is None:
        return targets.to_dense(torch.bool)
    return targets._replace(values=targets.values > 0).to_dense(torch.bool)


def unknown(targets: Tensor | SparseTargets) -> Tensor | None:
    """Where a target is below 0, bool (B, C); None where there is no such target."""
    values = targets if isinstance(targets, Tensor) else targets.values
    if values is None or values.dtype == torch.bool or not bool((values < 0).any()):
        return None
    return values < 0 if isinstance(targets, Tensor) else targets._replace(values=values < 0).to_dense(torch.bool)
