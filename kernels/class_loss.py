"""Losses of classification on a block of raw logits z (g, b, n), which become their gradient in place.

    BCE      l = w y softplus(-z) + (1 - y) softplus(z),   dz = (1 - y) p - w y (1 - p),   p = sigmoid(z)
    ASL      l = -(y q^gp log max(p, eps) + (1 - y) pm^gn log max(1 - pm, eps)),  q = 1 - p, pm = max(p - margin, 0)
    softmax  l = sum_c v_c (lse - z_c),                    dz_c = (sum v) softmax(z)_c - v_c

The class of z[i, b, j] is first + i * group_classes + j; one at num_classes or beyond has no loss and a gradient of 0.

Algorithm. A program has one image and a run of tiles of its classes, up to 1024 logits each: whole groups where these
are short, part of one where they are long, so that no logit costs a division. Loss and gradient come from one read of
z, which the gradient overwrites. Loss is summed in every lane, and across them at the end. Where images are too few to
fill the device, each one's tiles are split, and the parts are added in their order: no atomics, the same bits in every
run. Sparse targets ascend as the tiles do: one binary search finds the first entry of a program, and the rest are met
one after another.

The softmax needs sums over all classes first: `softmax_statistics` has a maximum and a sum in every lane, one
exponential to a logit since either the logit or the maximum is the larger; `gradient` is the second pass.

Bytes. A logit is read and written once, 4 bytes in 16 bits (8 in fp32) beside the targets (1 for int8, 4 for fp32,
none for sparse ones) and the weights, which all images share in the L2 cache. Where a block of logits is chosen to stay
in that cache, device memory sees the targets alone. Unfused, BCE keeps and reads the logits again for backward and
casts 16-bit logits and the targets to fp32.

Accuracy. All arithmetic is in fp32. log(1 + e) is log(u) + (e - (u - 1)) / u with u = 1 + e rounded, which keeps the
digits of a small e; sigmoids of either sign come from exp(-|z|); a power is exp2(gamma log2(base)). Comparisons are
written so that NaN fails them and passes into loss and gradient.

Not yet run on a GPU: compiled ahead of time for sm_80 to sm_100, its arithmetic tested in Triton's interpreter.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import Device, device_guard, device_of

LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal number
LOWEST = tl.constexpr(-3.4028234663852886e38)
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


@triton.jit
def sigmoids(z):
    """sigmoid(z), sigmoid(-z) and log(1 + exp(-|z|))."""
    e = tl.exp(-tl.abs(z))
    u = 1.0 + e
    near = 1.0 / u
    far = e * near
    log_u = tl.log(u) + (e - (u - 1.0)) * near
    return tl.where(z < 0.0, far, near), tl.where(z < 0.0, near, far), log_u


@triton.jit
def asl(
    z, y, gamma_neg, gamma_pos, floor_neg, floor_pos, margin, eps, log_eps,
    FOCAL_NEG: tl.constexpr, FOCAL_POS: tl.constexpr, DETACH: tl.constexpr,
):  # fmt: skip
    """Loss and gradient of ASL."""
    p, q, log_u = sigmoids(z)
    log_p = tl.where(z < 0.0, z, 0.0) - log_u
    base = tl.where(p < margin, 0.0, p - margin)
    rest = tl.where(q + margin > 1.0, 1.0, q + margin)
    # log(1 - base): from base where that is small, from q where the rest is.
    u = tl.where(z < 0.0, 1.0 - base, tl.where(rest < eps, eps, rest))
    log_rest = tl.log(u) + tl.where(z < 0.0, (1.0 - u) - base, 0.0) / u
    log_rest = tl.where(log_rest < log_eps, log_eps, log_rest)
    bounded = tl.where(log_p < log_eps, log_eps, log_p)

    positive, dpositive = bounded, tl.where(log_p < log_eps, 0.0, q)
    negative, dnegative = log_rest, tl.where((p < margin) | (rest < eps), 0.0, -p * q / u)
    if FOCAL_POS:
        log2_q = -(tl.where(z < 0.0, 0.0, z) + log_u) * LOG2E
        focal = tl.exp2(gamma_pos * log2_q)
        positive *= tl.where(q < TINY, floor_pos, focal)
        dpositive *= focal
        if not DETACH:
            dpositive -= gamma_pos * bounded * focal * p
    if FOCAL_NEG:
        zero = base <= TINY
        log2_base = tl.log2(tl.where(zero, 1.0, base))
        focal = tl.where(zero, 0.0, tl.exp2(gamma_neg * log2_base))
        negative *= tl.where(zero, floor_neg, focal)
        dnegative *= focal
        if not DETACH:
            slope = tl.where(zero, 0.0, gamma_neg * tl.exp2((gamma_neg - 1.0) * log2_base))
            dnegative += slope * log_rest * p * q
    return -(y * positive + (1.0 - y) * negative), -(y * dpositive + (1.0 - y) * dnegative)


@triton.jit
def class_loss_gradient_kernel(
    z_ptr, bias_ptr, targets_ptr, offsets_ptr, values_ptr, class_weight_ptr, pos_weight_ptr, sample_weight_ptr,
    dout_ptr, loss_ptr, statistics_ptr, groups, n, first, group_classes, num_classes, splits, tiles, tiles_per_split,
    gamma_neg, gamma_pos, floor_neg, floor_pos, margin, eps, log_eps, keep, smooth, factor,
    z_stride_g, z_stride_b, bias_stride, target_stride_b, target_stride_c, sample_weight_stride,
    LOSS: tl.constexpr, FOCAL_NEG: tl.constexpr, FOCAL_POS: tl.constexpr, DETACH: tl.constexpr,
    ADD_LOSS: tl.constexpr, NEED_DZ: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program handles a run of tiles of one image: y becomes keep * y + smooth; its loss is stored or added."""
    b = (tl.program_id(0) // splits).to(tl.int64)
    split = tl.program_id(0) % splits
    row = z_ptr + b * z_stride_b
    target_row = targets_ptr + b * target_stride_b
    begin = split * tiles_per_split
    at, end, entry = first_entry(targets_ptr, offsets_ptr, b, begin, n, first, group_classes, BLOCK_I, BLOCK_N)

    image = 1.0
    if sample_weight_ptr is not None:
        image = tl.load(sample_weight_ptr + b * sample_weight_stride)
    scale = factor * image
    if dout_ptr is not None:
        scale = factor * tl.load(dout_ptr) * image
    if LOSS == "softmax":
        top = tl.load(statistics_ptr + 4 * b)
        log_sum = tl.log(tl.load(statistics_ptr + 4 * b + 1))
        total = tl.load(statistics_ptr + 4 * b + 3)

    sums = tl.zeros([BLOCK_I, BLOCK_N], tl.float32)
    for tile in range(begin, tl.minimum(begin + tiles_per_split, tiles)):
        z_ptrs, stored, z, y, c, exists, at, entry = load_tile(
            row, bias_ptr, target_row, offsets_ptr, values_ptr, at, end, entry, tile, groups, n, first, group_classes,
            num_classes, z_stride_g, bias_stride, target_stride_c, BLOCK_I, BLOCK_N,
        )  # fmt: skip
        counts = exists & (y >= 0.0)
        if LOSS == "bce":
            y = y * keep + smooth
            p, q, log_u = sigmoids(z)
            weighted = y
            if pos_weight_ptr is not None:
                weighted = y * tl.load(pos_weight_ptr + c, mask=exists, other=0.0)
            loss = weighted * (tl.where(z > 0.0, 0.0, -z) + log_u) + (1.0 - y) * (tl.where(z < 0.0, 0.0, z) + log_u)
            dz = (1.0 - y) * p - weighted * q
        elif LOSS == "asl":
            loss, dz = asl(
                z, y, gamma_neg, gamma_pos, floor_neg, floor_pos, margin, eps, log_eps, FOCAL_NEG, FOCAL_POS, DETACH
            )
        else:
            counts = exists
            v = y * keep + smooth
            if class_weight_ptr is not None:
                v *= tl.load(class_weight_ptr + c, mask=exists, other=0.0)
            loss = sums
            dz = total * tl.exp((z - top) - log_sum) - v
        if LOSS != "softmax" and class_weight_ptr is not None:
            weight = tl.load(class_weight_ptr + c, mask=exists, other=0.0)
            loss *= weight
            dz *= weight
        if LOSS != "softmax":
            sums += tl.where(counts, loss, 0.0)
        if NEED_DZ:
            dz = tl.where(counts, dz * scale, 0.0)
            tl.store(z_ptrs, dz.to(z_ptr.dtype.element_ty), mask=stored)

    if loss_ptr is not None:
        at_loss = loss_ptr + tl.program_id(0).to(tl.int64)
        loss_of_row = tl.sum(tl.sum(sums, 1), 0) * image
        if ADD_LOSS:
            loss_of_row += tl.load(at_loss)
        tl.store(at_loss, loss_of_row)


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


@triton.jit
def scale_kernel(x_ptr, factor_ptr, numel, step, BLOCK_M: tl.constexpr):
    """One program handles every step-th number's block of BLOCK_M, or none where the factor is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for begin in range(tl.program_id(0).to(tl.int64) * BLOCK_M, numel, step):
            offs = begin + tl.arange(0, BLOCK_M)
            x = tl.load(x_ptr + offs, mask=offs < numel, other=0.0).to(tl.float32) * factor
            tl.store(x_ptr + offs, x.to(x_ptr.dtype.element_ty), mask=offs < numel)


def _block(
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


def _smoothing(loss: str, label_smoothing: float, num_classes: int) -> dict[str, float]:
    """What y is multiplied by, and what is added to it."""
    if loss == "asl":
        return {"keep": 1.0, "smooth": 0.0}
    smooth = 0.5 * label_smoothing if loss == "bce" else label_smoothing / max(num_classes, 1)
    return {"keep": 1.0 - label_smoothing, "smooth": smooth}


def _floor(gamma: float, detach_focal: bool) -> float:
    """0 ** gamma; where a gradient is taken of it, of the smallest normal number if gamma < 1."""
    return TINY.value**gamma if gamma < 1 and not detach_focal else 0.0


def gradient(
    z: Tensor, bias: Tensor | None, first: int, group_classes: int, num_classes: int, targets: Tensor,
    offsets: Tensor | None, values: Tensor | None, class_weight: Tensor | None, pos_weight: Tensor | None,
    sample_weight: Tensor | None, loss: str, gamma_neg: float, gamma_pos: float, margin: float, eps: float,
    detach_focal: bool, label_smoothing: float, factor: float, dout: Tensor | None, row_loss: Tensor | None,
    statistics: Tensor | None, need_dz: bool,
) -> None:  # fmt: skip
    """Logits z (g, b, n) become their gradient where `need_dz`; row_loss (b), for BCE and ASL, is added to."""
    if z.numel() == 0 or (row_loss is None and not need_dz):
        return
    splits, tile, block = _block(
        z, bias, first, group_classes, num_classes, targets, offsets, values, class_weight, loss
    )
    parts = row_loss
    if row_loss is not None and splits > 1:
        parts = torch.empty(z.shape[1], splits, dtype=torch.float32, device=z.device)
    with device_guard(z):
        class_loss_gradient_kernel[(z.shape[1] * splits,)](
            **block, pos_weight_ptr=pos_weight if loss == "bce" else None, sample_weight_ptr=sample_weight,
            dout_ptr=dout, loss_ptr=parts, statistics_ptr=statistics, gamma_neg=float(gamma_neg),
            gamma_pos=float(gamma_pos), floor_neg=_floor(gamma_neg, detach_focal),
            floor_pos=_floor(gamma_pos, detach_focal), margin=float(margin), eps=float(eps),
            log_eps=math.log(eps) if loss == "asl" else 0.0, **_smoothing(loss, label_smoothing, num_classes),
            factor=float(factor), sample_weight_stride=0 if sample_weight is None else sample_weight.stride(0),
            LOSS=loss, FOCAL_NEG=loss == "asl" and gamma_neg > 0, FOCAL_POS=loss == "asl" and gamma_pos > 0,
            DETACH=loss != "asl" or detach_focal,
            ADD_LOSS=splits == 1, NEED_DZ=need_dz, **tile.as_kwargs(),
        )  # fmt: skip
        if row_loss is not None and parts is not None and splits > 1:
            row_loss += parts.sum(1)


def softmax_statistics(
    z: Tensor, bias: Tensor | None, first: int, group_classes: int, num_classes: int, targets: Tensor,
    offsets: Tensor | None, values: Tensor | None, class_weight: Tensor | None, label_smoothing: float,
    statistics: Tensor,
) -> None:  # fmt: skip
    """Takes z (g, b, n) into statistics (b, 4): maximum, sum of exp(z - maximum), sum of v z, sum of v."""
    if z.numel() == 0:
        return
    b = z.shape[1]
    splits, tile, block = _block(
        z, bias, first, group_classes, num_classes, targets, offsets, values, class_weight, "softmax"
    )
    parts = statistics if splits == 1 else torch.empty(b, splits, 4, dtype=torch.float32, device=z.device)
    with device_guard(z):
        class_loss_statistics_kernel[(b * splits,)](
            **block, statistics_ptr=parts, MERGE=splits == 1, **_smoothing("softmax", label_smoothing, num_classes),
            **tile.as_kwargs(),
        )  # fmt: skip
        if splits > 1:
            size = triton.next_power_of_2(splits)
            class_loss_merge_kernel[(b,)](parts, statistics, splits, BLOCK_S=size, num_warps=max(1, min(4, size // 32)))


def scale(tensor: Tensor, factor: Tensor) -> None:
    """Multiplies in place, for a tensor without gaps in memory and a factor of no dimension on the device."""
    numel = tensor.numel()
    if numel == 0:
        return
    flat = tensor.as_strided((numel,), (1,))
    block = 1024
    programs = min(triton.cdiv(numel, block), 8 * device_of(tensor).multiprocessors)
    with device_guard(tensor):
        scale_kernel[(programs,)](flat, factor, numel, programs * block, BLOCK_M=block, num_warps=4)
