"""Targets of a shard of the classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _check
from ..ops import SparseTargets
from ..ops._targets import as_sparse, check_mask, merge_ignore
from ._moves import Group, all_rows, own_columns_of_rows


def as_dense_or_sparse(where: str, targets: Any, ignore: Any, loss: str, C: int) -> tuple[Any, Any]:
    """Targets as a tensor (B, C) or as `SparseTargets`, which then have `ignore` within."""
    targets = as_sparse(where, targets, C)
    if isinstance(targets, Tensor) and loss == "softmax" and targets.ndim == 1 and not targets.is_floating_point():
        offsets = torch.arange(len(targets) + 1, device=targets.device)
        targets = SparseTargets(targets.long(), offsets, None, C)
    if isinstance(targets, SparseTargets):
        if targets.num_classes != C:
            _check.fail(where, "targets", f"of C = {C} classes", targets.num_classes)
        targets.check(where, "targets")
        return (targets if ignore is None else merge_ignore(where, targets, ignore)), None
    if targets.ndim != 2 or targets.shape[1] != C:
        _check.fail(where, "targets", f"(B, C) with C = {C}", tuple(targets.shape))
    if ignore is not None:
        check_mask(where, ignore, targets)
    return targets, ignore


def columns(targets: SparseTargets, first: int, stop: int) -> SparseTargets:
    """The targets of the classes [first, stop), counted from `first`. On a GPU this waits for how many there are."""
    inside = (targets.indices >= first) & (targets.indices < stop)
    before = torch.cat([inside.new_zeros(1, dtype=torch.int64), inside.cumsum(0)])
    values = None if targets.values is None else targets.values[inside]
    return SparseTargets(targets.indices[inside] - first, before[targets.offsets], values, stop - first)


def all_images(targets: SparseTargets, dtype: torch.dtype, group: Group) -> SparseTargets:
    """The targets of the images of all devices, one device's after another's; their values in `dtype`."""
    N, device = dist.get_world_size(group), targets.indices.device
    own = torch.tensor([targets.batch, len(targets.indices), targets.values is not None], device=device)
    sizes = all_rows(own.unsqueeze(0), group).tolist()
    if len({batch for batch, _, _ in sizes}) > 1:
        _check.fail("parallelize_head", "targets", "of as many images on every device", [b for b, _, _ in sizes])
    most = max(count for _, count, _ in sizes)

    def gathered(part: Tensor) -> Tensor:
        padded = torch.cat([part, part.new_zeros(most - len(part))])
        return torch.cat([row[:n] for row, (_, n, _) in zip(all_rows(padded[None], group), sizes, strict=True)])

    lengths = all_rows(targets.offsets.diff(), group) if targets.batch else targets.offsets.new_zeros(0)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    values = None
    if any(has for _, _, has in sizes):
        ones = torch.ones(len(targets.indices), dtype=dtype, device=device)
        values = gathered(ones if targets.values is None else targets.values.to(dtype))
    assert len(lengths) == N * targets.batch
    return SparseTargets(gathered(targets.indices), offsets, values, targets.num_classes)


def own_classes(targets: Any, first: int, stop: int, size: int, dtype: torch.dtype, group: Group | None) -> Any:
    """Targets, or a mask, of the classes [first, stop) of the images of all devices of `group`; None: of these.

    `dtype` is what the values of sparse targets travel in.
    """
    if targets is None:
        return None
    if isinstance(targets, SparseTargets):
        return columns(targets if group is None else all_images(targets, dtype, group), first, stop)
    if group is None:
        return targets[:, first:stop]
    wire = targets.to(torch.uint8) if targets.dtype == torch.bool else targets
    return own_columns_of_rows(wire, size, group)[:, : stop - first].to(targets.dtype)
