"""Group fully-connected layer, forward and backward: G matrix products that share no data.

    logits[b, gJ + j] = sum_e h[b, g, e] weight[g, e, j] + bias[gJ + j],   gJ + j < C

Algorithm. One program owns one tile of one group, so a ragged last group and groups without classes are only a mask
and an early end of a loop. Tiles of the batch are neighbours in the grid: the programs that share a weight tile run
together and read it from DRAM once. The two gradients are two kernels, because each then touches the weight once:

    dh      program (group, e tile, b tile), loop over j: reads the weight, writes dh
    dweight program (group, e tile, j tile), loop over b: writes dweight, and dbias on its first e tile

A long loop on a small grid is split (dh over j, dweight over b): every part writes its own fp32 partial result, which
are added in a fixed order, so all results are the same bits on every run.

Bytes. Forward: h, weight and bias once, logits once. Backward: weight, h (for dweight) and dlogits once each, dh,
dweight and dbias once; dlogits and h are read again by the other tiles of the group, from L2. With the usual batch the
weight dominates (E C elements against B C), so the kernels are bound by memory.

Why not bmm. On strided views it copies h and dlogits, pads the classes to G J, transposes the logits and adds the bias
in a pass of its own; here h, weight and dlogits are read where they lie, with any strides, and (B, C) is written once.

Not yet run on a GPU: compiled ahead of time for sm_80 to sm_100, its arithmetic tested in Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import Device, device_guard, device_of, dot_precision
from ._group_fc import (
    Tile,
    block,
    depth,
    stages_of,
    vectorised,
    warps_of,
)
from .group_fc_backward import group_fc_backward

__all__ = ["group_fc", "group_fc_backward"]


SPAN = 128  # in fp32: sums in two levels, as the vendor's library makes them; one of 768 products has 3 times the error


def forward_tile(B: int, E: int, J: int, element_bytes: int, vector: bool, device: Device) -> Tile:
    """The tile of the forward kernel, a function of the shape, the element size, `vectorised` and the device.

    Compiled for sm_90 in bf16 at B=128 E=768 C=9605 (J=97, no vectors), a j tile of 64 takes 92 registers and one
    of 128 takes 232, which would leave one program to a multiprocessor.
    """
    wide = element_bytes == 2
    block_b = block(B, 128 if wide else 64)
    block_j = block(J, 128 if wide and vector else 64)
    block_e = depth(E, 64, wide, device)
    stages = stages_of((block_b + block_j) * block_e, element_bytes, device)
    warps = warps_of(max(block_b * block_j, block_b * block_e, block_e * block_j), vector and wide)
    return Tile(block_b, block_e, block_j, warps, stages)


@triton.jit
def _products(
    logits, h_ptrs, weight_ptrs, first_e, last_e, mask_b, mask_j, h_stride_e, weight_stride_e,
    PRECISION: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The sums `logits` plus those of the products from first_e up to last_e."""
    for start_e in range(first_e, last_e, BLOCK_E):
        offs_e = (start_e + tl.arange(0, BLOCK_E)).to(tl.int64)
        mask_e = offs_e < last_e
        h = tl.load(h_ptrs + offs_e[None, :] * h_stride_e, mask=mask_b[:, None] & mask_e[None, :], other=0.0)
        weight = tl.load(
            weight_ptrs + offs_e[:, None] * weight_stride_e, mask=mask_e[:, None] & mask_j[None, :], other=0.0
        )
        logits = tl.dot(h, weight, logits, input_precision=PRECISION)
    return logits


@triton.jit
def group_fc_forward_kernel(
    h_ptr,
    weight_ptr,
    bias_ptr,
    logits_ptr,
    B,
    E,
    J,
    C,
    h_stride_b,
    h_stride_g,
    h_stride_e,
    weight_stride_g,
    weight_stride_e,
    weight_stride_j,
    bias_stride_c,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program handles BLOCK_B images x BLOCK_J classes of one group, and loops over e.

    SPAN: after how many e a sum is added to the whole one; 0 for never.
    """
    pid = tl.program_id(0)
    tiles_b = tl.cdiv(B, BLOCK_B)
    tiles_j = tl.cdiv(J, BLOCK_J)
    g = (pid // (tiles_b * tiles_j)).to(tl.int64)
    offs_b = ((pid % tiles_b) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    offs_j = ((pid // tiles_b) % tiles_j * BLOCK_J + tl.arange(0, BLOCK_J)).to(tl.int64)
    offs_c = g * J + offs_j
    mask_b = offs_b < B
    mask_j = (offs_j < J) & (offs_c < C)

    h_ptrs = h_ptr + g * h_stride_g + offs_b[:, None] * h_stride_b
    weight_ptrs = weight_ptr + g * weight_stride_g + offs_j[None, :] * weight_stride_j
    logits = tl.zeros((BLOCK_B, BLOCK_J), tl.float32)
    if SPAN == 0:
        logits = _products(
            logits, h_ptrs, weight_ptrs, 0, E, mask_b, mask_j, h_stride_e, weight_stride_e, PRECISION, BLOCK_E
        )
    else:
        for first_e in range(0, E, SPAN):
            logits += _products(
                tl.zeros((BLOCK_B, BLOCK_J), tl.float32), h_ptrs, weight_ptrs, first_e, tl.minimum(first_e + SPAN, E),
                mask_b, mask_j, h_stride_e, weight_stride_e, PRECISION, BLOCK_E,
            )  # fmt: skip
    if HAS_BIAS:
        logits += tl.load(bias_ptr + offs_c * bias_stride_c, mask=mask_j, other=0.0).to(tl.float32)[None, :]
    logits_ptrs = logits_ptr + offs_b[:, None] * C + offs_c[None, :]
    tl.store(logits_ptrs, logits.to(logits_ptr.dtype.element_ty), mask=mask_b[:, None] & mask_j[None, :])


def group_fc(h: Tensor, weight: Tensor, bias: Tensor | None, num_classes: int) -> Tensor:
    """Logits (B, C) of h (B, G, E), weight (G, E, J) and bias (C) or None, all of any strides."""
    B, _, E = h.shape
    J, C = weight.shape[2], num_classes
    logits = torch.empty((B, C), dtype=h.dtype, device=h.device)
    if logits.numel() == 0:
        return logits
    tile = forward_tile(B, E, J, h.element_size(), vectorised(h, weight), device_of(h))
    groups_with_classes = triton.cdiv(C, J)
    grid = (groups_with_classes * triton.cdiv(J, tile.BLOCK_J) * triton.cdiv(B, tile.BLOCK_B),)
    with device_guard(h):
        group_fc_forward_kernel[grid](
            h_ptr=h,
            weight_ptr=weight,
            bias_ptr=h if bias is None else bias,
            logits_ptr=logits,
            B=B,
            E=E,
            J=J,
            C=C,
            h_stride_b=h.stride(0),
            h_stride_g=h.stride(1),
            h_stride_e=h.stride(2),
            weight_stride_g=weight.stride(0),
            weight_stride_e=weight.stride(1),
            weight_stride_j=weight.stride(2),
            bias_stride_c=0 if bias is None else bias.stride(0),
            HAS_BIAS=bias is not None,
            PRECISION=dot_precision(h),
            SPAN=SPAN if h.dtype == torch.float32 else 0,
            **tile.as_kwargs(),
        )
    return logits
