"""The sums over all classes that softmax needs before its loss and gradient, taken block by block of logits.

The algorithm, its bytes and its accuracy are in class_loss.py.

Not yet run on a GPU: compiled ahead of time for sm_80 to sm_100, its arithmetic tested in Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._class_loss import (
    block_arguments,
    first_entry,
    load_tile,
    smoothing,
)
from ._device import device_guard

LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def merged(top, total, other_top, other_total):
    """Maximum and sum of exp(z - maximum) of two sets of logits."""
    new = tl.maximum(top, other_top)
    total = total * tl.exp(tl.where(top == new, 0.0, top - new))
    return new, total + other_total * tl.exp(tl.where(other_top == new, 0.0, other_top - new))


@triton.jit
def merged_lanes(top, total):
    """The same of all lanes."""
    new = tl.max(top, 0)
    return new, tl.sum(total * tl.exp(tl.where(top == new, 0.0, top - new)), 0)


@triton.jit
def class_loss_statistics_kernel(
    z_ptr, bias_ptr, targets_ptr, offsets_ptr, values_ptr, class_weight_ptr, statistics_ptr,
    groups, n, first, group_classes, num_classes, splits, tiles, tiles_per_split, keep, smooth,
    z_stride_g, z_stride_b, bias_stride, target_stride_b, target_stride_c,
    MERGE: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program handles a run of tiles of one image: its four statistics are stored, or merged into what is there."""
    b = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    row = z_ptr + b * z_stride_b
    target_row = targets_ptr + b * target_stride_b
    begin = split * tiles_per_split
    at, end, entry = first_entry(targets_ptr, offsets_ptr, b, begin, n, first, group_classes, BLOCK_I, BLOCK_N)

    top = tl.full([BLOCK_I, BLOCK_N], LOWEST, tl.float32)
    sums, scores, totals = tl.zeros_like(top), tl.zeros_like(top), tl.zeros_like(top)
    for tile in range(begin, tl.minimum(begin + tiles_per_split, tiles)):
        _, _, z, y, c, exists, at, entry = load_tile(
            row, bias_ptr, target_row, offsets_ptr, values_ptr, at, end, entry, tile, groups, n, first, group_classes,
            num_classes, z_stride_g, bias_stride, target_stride_c, BLOCK_I, BLOCK_N,
        )  # fmt: skip
        v = tl.where(exists, y * keep + smooth, 0.0)
        if class_weight_ptr is not None:
            v *= tl.load(class_weight_ptr + c, mask=exists, other=0.0)
        scores += v * z
        totals += v
        z = tl.where(exists, z, LOWEST)
        e = tl.where(exists, tl.exp(-tl.abs(tl.where(z == top, 0.0, z - top))), 0.0)
        above = z > top
        sums = tl.where(above, sums * e + 1.0, sums + e)
        top = tl.where(above, z, top)

    new_top, new_sum = merged_lanes(tl.reshape(top, BLOCK_I * BLOCK_N), tl.reshape(sums, BLOCK_I * BLOCK_N))
    score = tl.sum(tl.sum(scores, 1), 0)
    total = tl.sum(tl.sum(totals, 1), 0)
    result = statistics_ptr + 4 * tl.program_id(0).to(tl.int64)
    if MERGE:
        new_top, new_sum = merged(tl.load(result), tl.load(result + 1), new_top, new_sum)
        score += tl.load(result + 2)
        total += tl.load(result + 3)
    tl.store(result, new_top)
    tl.store(result + 1, new_sum)
    tl.store(result + 2, score)
    tl.store(result + 3, total)


@triton.jit
def class_loss_merge_kernel(parts_ptr, statistics_ptr, splits, BLOCK_S: tl.constexpr):
    """One program handles one image: merges the statistics of its splits into those it has."""
    b = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK_S)
    parts = parts_ptr + 4 * (b * splits + offs)
    there = offs < splits
    top, total = merged_lanes(tl.load(parts, mask=there, other=LOWEST), tl.load(parts + 1, mask=there, other=0.0))
    result = statistics_ptr + 4 * b
    top, total = merged(tl.load(result), tl.load(result + 1), top, total)
    score = tl.load(result + 2) + tl.sum(tl.load(parts + 2, mask=there, other=0.0), 0)
    total_v = tl.load(result + 3) + tl.sum(tl.load(parts + 3, mask=there, other=0.0), 0)
    tl.store(result, top)
    tl.store(result + 1, total)
    tl.store(result + 2, score)
    tl.store(result + 3, total_v)


def softmax_statistics(
    z: Tensor, bias: Tensor | None, first: int, group_classes: int, num_classes: int, targets: Tensor,
    offsets: Tensor | None, values: Tensor | None, class_weight: Tensor | None, label_smoothing: float,
    statistics: Tensor,
) -> None:  # fmt: skip
    """Takes z (g, b, n) into statistics (b, 4): maximum, sum of exp(z - maximum), sum of v z, sum of v."""
    if z.numel() == 0:
        return
    b = z.shape[1]
    splits, tile, block = block_arguments(
        z, bias, first, group_classes, num_classes, targets, offsets, values, class_weight, "softmax"
    )
    parts = statistics if splits == 1 else torch.empty(b, splits, 4, dtype=torch.float32, device=z.device)
    with device_guard(z):
        class_loss_statistics_kernel[(b * splits,)](
            **block, statistics_ptr=parts, MERGE=splits == 1, **smoothing("softmax", label_smoothing, num_classes),
            **tile.as_kwargs(),
        )  # fmt: skip
        if splits > 1:
            size = triton.next_power_of_2(splits)
            class_loss_merge_kernel[(b,)](parts, statistics, splits, BLOCK_S=size, num_warps=max(1, min(4, size // 32)))
