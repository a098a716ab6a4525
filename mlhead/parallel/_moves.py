"""What moves between the devices that share the classes of a head, forward and backward.

With N devices of a class group, device r has the classes of shard r. Shards are as torch.chunk makes them: ceil(n / N)
each, the last ones perhaps smaller or empty; what is sent is padded to the largest.

The loss of a group is one number, and every function here hands on its gradient. Where the images are sharded too
(each device its own), the gradient of an image's features comes multiplied by N: data-parallel training averages the
gradients of what made the features over the devices, and the average then is the gradient of the loss.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

Group = Any  # torch.distributed.ProcessGroup

# Renamed after torch 2.11.
_all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _is_channels_last(x: Tensor) -> bool:
    return x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _flat(x: Tensor) -> Tensor:
    """A map (B, D, H, W) in channels-last order as the contiguous view (B, H, W, D) that it is; others contiguous."""
    return x.permute(0, 2, 3, 1) if _is_channels_last(x) else x.contiguous()


def _like(flat: Tensor, x: Tensor) -> Tensor:
    """Undoes `_flat`."""
    return flat.permute(0, 3, 1, 2) if _is_channels_last(x) else flat


def all_sum(x: Tensor, group: Group) -> Tensor:
    """The sum over the devices, as a new tensor in the layout of x."""
    flat = _flat(x).clone()
    dist.all_reduce(flat, group=group)
    return _like(flat, x)


def all_rows(x: Tensor, group: Group) -> Tensor:
    """The rows of all devices one after another; each has as many."""
    flat = _flat(x)
    out = flat.new_empty(dist.get_world_size(group) * flat.shape[0], *flat.shape[1:])
    _all_gather(out, flat, group)
    return _like(out, x)


def _own_rows_of_sum(x: Tensor, group: Group) -> Tensor:
    """Of the rows of the sum those of this device."""
    flat, N = _flat(x), dist.get_world_size(group)
    if dist.get_backend(group) == "gloo":
        # Its reduce-scatter sends twice as much: what an all-reduce does.
        return _like(_exchange(flat.unflatten(0, (N, -1)), group).sum(0), x)
    out = flat.new_empty(flat.shape[0] // N, *flat.shape[1:])
    _reduce_scatter(out, flat, group=group)
    return _like(out, x)


def _exchange(x: Tensor, group: Group) -> Tensor:
    """Entry i of the first axis goes to device i, and comes from it."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(out, x.contiguous(), group=group)
    return out


def _pad(x: Tensor, dim: int, size: int) -> Tensor:
    missing = size - x.shape[dim]
    return F.pad(x, (0, 0) * (x.ndim - 1 - dim) + (0, missing)) if missing else x


def own_columns_of_rows(x: Tensor, size: int, group: Group) -> Tensor:
    """Own rows of all shards (B, n, ...) to all rows of the own shard (N B, size, ...), padded."""
    N = dist.get_world_size(group)
    parts = _pad(x, 1, N * size).unflatten(1, (N, size)).transpose(0, 1)
    return _exchange(parts, group).flatten(0, 1)


def own_rows_of_shards(x: Tensor, size: int, n: int, group: Group) -> Tensor:
    """The reverse: all rows of the own shard (N B, at most size, ...) to own rows of all shards (B, n, ...)."""
    N = dist.get_world_size(group)
    parts = _exchange(_pad(x, 1, size).unflatten(0, (N, -1)), group)
    return parts.transpose(0, 1).flatten(1, 2)[:, :n]


def all_columns(x: Tensor, size: int, n: int, group: Group) -> Tensor:
    """The columns of all shards (B, n, ...) of those of the own (B, at most size, ...), on every device."""
    parts = all_rows(_pad(x, 1, size), group).unflatten(0, (dist.get_world_size(group), -1))
    return parts.transpose(0, 1).flatten(1, 2)[:, :n]


class SumGradients(torch.autograd.Function):
    """x, which all devices have; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_sum(grad, ctx.group), None


class GatherRows(torch.autograd.Function):
    """All devices' rows (N B, ...) of x (B, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_rows(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _own_rows_of_sum(grad, ctx.group).mul_(dist.get_world_size(ctx.group)), None


class OwnColumns(torch.autograd.Function):
    """The columns [first, first + own) of x (B, n, ...), which all devices have; its gradient is put together."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: int, own: int, size: int, group: Group) -> Tensor:
        ctx.n, ctx.size, ctx.group = x.shape[1], size, group
        return x[:, first : first + own]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return all_columns(grad, ctx.size, ctx.n, ctx.group), None, None, None, None


class RowsToShards(torch.autograd.Function):
    """All rows of the own columns (N B, own, ...) of own rows of all columns (B, n, ...)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, own: int, size: int, group: Group) -> Tensor:
        ctx.n, ctx.size, ctx.group = x.shape[1], size, group
        return own_columns_of_rows(x, size, group)[:, :own]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        own_rows = own_rows_of_shards(grad, ctx.size, ctx.n, ctx.group)
        return own_rows * dist.get_world_size(ctx.group), None, None, None


class ShardsToRows(torch.autograd.Function):
    """Own rows of all columns (B, n) of all rows of the own columns (N B, own): logits, each device its images'.

    Every device makes the loss of its own images; that of the group is their mean, whose gradient this hands on.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int, n: int, group: Group) -> Tensor:
        ctx.own, ctx.size, ctx.group = x.shape[1], size, group
        return own_rows_of_shards(x, size, n, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        all_images = own_columns_of_rows(grad, ctx.size, ctx.group)[:, : ctx.own]
        return all_images / dist.get_world_size(ctx.group), None, None, None


class AllColumns(torch.autograd.Function):
    """The columns of all devices (B, n), of which every one makes the same loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, first: int, size: int, n: int, group: Group) -> Tensor:
        ctx.first, ctx.own = first, x.shape[1]
        return all_columns(x, size, n, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad[:, ctx.first : ctx.first + ctx.own], None, None, None, None


class Sum(torch.autograd.Function):
    """The sum over the devices of a number, of which each has a part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_sum(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return grad, None
