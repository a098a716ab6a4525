"""What the kernels of the losses share: the tile of a block of logits with its targets, and the arguments of a launch.

Not yet run on a GPU: compiled ahead of time for sm_80 to sm_100, its arithmetic tested in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import Device, device_of

BEYOND = tl.constexpr(2**62)  # the class of no entry


@dataclass(frozen=True)
class LossTile:
    """Launch configuration: groups and classes of a tile, and the warps that share it."""

    BLOCK_I: int
    BLOCK_N: int
    num_warps: int
    maxnreg: int  # unbounded, ptxas spills to fit one more program into a multiprocessor

    def tiles(self, g: int, n: int) -> int:
        """How many tiles a block (g, b, n) has for each image."""
        return triton.cdiv(g, self.BLOCK_I) * triton.cdiv(n, self.BLOCK_N)

    def as_kwargs(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return asdict(self)


def loss_tile(g: int, n: int, loss: str) -> LossTile:
    """Eight logits to a thread where they may be loaded together, else four, which have addresses of their own.

    Four for ASL too, whose powers and logarithms take the registers of more.
    Never fewer logits than threads: a thread with a copy of another's might read it after it is overwritten.
    """
    most = 1024 if n % 8 == 0 and loss != "asl" else 512
    block_n = min(most, triton.next_power_of_2(n))
    numbers = min(most, max(128, block_n * triton.next_power_of_2(g)))
    registers = 168 if loss == "asl" else 128
    return LossTile(numbers // block_n, block_n, max(1, 4 * numbers // most), registers)


def tiles_per_program(tiles: int, b: int, device: Device) -> int:
    """So that there are about eight programs to a multiprocessor, where there are tiles enough."""
    splits = max(1, min(tiles, 8 * device.multiprocessors // b))
    return triton.cdiv(tiles, splits)


@triton.jit
def entry_class(targets_ptr, at, end):
    """The class of an entry, beyond all others after the last."""
    return tl.load(targets_ptr + at, mask=at < end, other=BEYOND)


@triton.jit
def first_entry(
    targets_ptr, offsets_ptr, b, tile, n, first, group_classes, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The place of row b's first entry in a tile or after it, by binary search, the end of the row, its class."""
    begin, end, entry = tl.full((), 0, tl.int64), tl.full((), 0, tl.int64), tl.full((), 0, tl.int64)
    if offsets_ptr is not None:
        tiles_n = tl.cdiv(n, BLOCK_N)
        c = first + (tile // tiles_n * BLOCK_I).to(tl.int64) * group_classes + tile % tiles_n * BLOCK_N
        begin = tl.load(offsets_ptr + b)
        end = tl.load(offsets_ptr + b + 1)
        stop = end
        while begin < stop:
            middle = begin + (stop - begin) // 2
            below = tl.load(targets_ptr + middle) < c
            begin = tl.where(below, middle + 1, begin)
            stop = tl.where(below, stop, middle)
        entry = entry_class(targets_ptr, begin, end)
    return begin, end, entry


@triton.jit
def load_tile(
    row, bias_ptr, target_row, offsets_ptr, values_ptr, at, end, entry, tile, groups, n, first, group_classes,
    num_classes, z_stride_g, bias_stride, target_stride, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile: where it is, what of it is in the block, the logits in fp32, y, their classes, which of these exist, and
    the first entry after it with its class.
    """
    tiles_n = tl.cdiv(n, BLOCK_N)
    i0, j0 = tile // tiles_n * BLOCK_I, tile % tiles_n * BLOCK_N
    offs_i = i0 + tl.arange(0, BLOCK_I)
    offs_j = j0 + tl.arange(0, BLOCK_N)
    start = tl.cast(first, tl.int64) + offs_i.to(tl.int64) * group_classes
    c = start[:, None] + offs_j[None, :]
    left = tl.minimum(num_classes - start, n).to(tl.int32)
    stored = (offs_i < groups)[:, None] & (offs_j < n)[None, :]
    exists = (offs_i < groups)[:, None] & (offs_j[None, :] < left[:, None])
    if offsets_ptr is None:
        y = tl.load(target_row + c * target_stride, mask=exists, other=0).to(tl.float32)
    else:
        y = tl.zeros([BLOCK_I, BLOCK_N], tl.float32)
        last = tl.minimum(i0 + BLOCK_I, groups) - 1
        beyond = first + last.to(tl.int64) * group_classes + tl.minimum(j0 + BLOCK_N, n)
        while entry < beyond:
            i = (entry - first) // group_classes
            j = entry - first - i * group_classes  # at n or above it belongs to another block
            value = 1.0
            if values_ptr is not None:
                value = tl.load(values_ptr + at)
            y = tl.where((offs_i == i)[:, None] & (offs_j == j)[None, :], value, y)
            at += 1
            entry = entry_class(target_row, at, end)
    z_ptrs = row + (offs_i.to(tl.int64) * z_stride_g)[:, None] + offs_j[None, :]
    z = tl.load(z_ptrs, mask=exists, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + c * bias_stride, mask=exists, other=0.0).to(tl.float32)
    return z_ptrs, stored, z, y, c, exists, at, entry


def block_arguments(
    z: Tensor, bias: Tensor | None, first: int, group_classes: int, num_classes: int, targets: Tensor,
    offsets: Tensor | None, values: Tensor | None, class_weight: Tensor | None, loss: str,
) -> tuple[int, LossTile, dict[str, Any]]:  # fmt: skip
    """The splits of each image, the tile, and the arguments that both passes share."""
    g, b, n = z.shape
    tile = loss_tile(g, n, loss)
    tiles = tile.tiles(g, n)
    per_split = tiles_per_program(tiles, b, device_of(z))
    splits = triton.cdiv(tiles, per_split)
    targets = targets.view(torch.int8) if targets.dtype == torch.bool else targets
    stride_b, stride_c = targets.stride() if offsets is None else (0, 1)
    return splits, tile, {
        "z_ptr": z, "bias_ptr": bias, "targets_ptr": targets, "offsets_ptr": offsets, "values_ptr": values,
        "class_weight_ptr": class_weight, "groups": g, "n": n, "first": first,
        # With one group it is the distance to nothing.
        "group_classes": group_classes if g > 1 else max(num_classes, 1), "num_classes": num_classes,
        "splits": splits, "tiles": tiles, "tiles_per_split": per_split, "z_stride_g": z.stride(0),
        "z_stride_b": z.stride(1), "bias_stride": 0 if bias is None else bias.stride(0),
        "target_stride_b": stride_b, "target_stride_c": stride_c,
    }  # fmt: skip


def smoothing(loss: str, label_smoothing: float, num_classes: int) -> dict[str, float]:
    """What y is multiplied by, and what is added to it."""
    if loss == "asl":
        return {"keep": 1.0, "smooth": 0.0}
    smooth = 0.5 * label_smoothing if loss == "bce" else label_smoothing / max(num_classes, 1)
    return {"keep": 1.0 - label_smoothing, "smooth": smooth}
