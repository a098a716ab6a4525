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
from ._device import device_guard, device_of
from .class_loss_statistics import softmax_statistics

__all__ = ["gradient", "scale", "softmax_statistics"]

LOG2E = tl.constexpr(1.4426950408889634)
TINY = tl.constexpr(1.1754943508222875e-38)  # the smallest normal number


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
def scale_kernel(x_ptr, factor_ptr, numel, step, BLOCK_M: tl.constexpr):
    """One program handles every step-th number's block of BLOCK_M, or none where the factor is 1."""
    factor = tl.load(factor_ptr).to(tl.float32)
    if factor != 1.0:
        for begin in range(tl.program_id(0).to(tl.int64) * BLOCK_M, numel, step):
            offs = begin + tl.arange(0, BLOCK_M)
            x = tl.load(x_ptr + offs, mask=offs < numel, other=0.0).to(tl.float32) * factor
            tl.store(x_ptr + offs, x.to(x_ptr.dtype.element_ty), mask=offs < numel)


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
    splits, tile, block = block_arguments(
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
            log_eps=math.log(eps) if loss == "asl" else 0.0, **smoothing(loss, label_smoothing, num_classes),
            factor=float(factor), sample_weight_stride=0 if sample_weight is None else sample_weight.stride(0),
            LOSS=loss, FOCAL_NEG=loss == "asl" and gamma_neg > 0, FOCAL_POS=loss == "asl" and gamma_pos > 0,
            DETACH=loss != "asl" or detach_focal,
            ADD_LOSS=splits == 1, NEED_DZ=need_dz, **tile.as_kwargs(),
        )  # fmt: skip
        if row_loss is not None and parts is not None and splits > 1:
            row_loss += parts.sum(1)


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
