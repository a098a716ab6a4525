"""The backward of group_fc: a kernel for each of the two gradients, so that each touches the weight once.

The algorithm, its bytes and why it is fast are in group_fc.py.

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


def dh_tile(B: int, E: int, J: int, element_bytes: int, vector: bool, device: Device) -> Tile:
    """The tile of the dh kernel: a wide e tile, since every e tile reads dlogits again.

    Without vectors it is a quarter as large (as above: 128 registers instead of 254, and on sm_80 no spills).
    """
    wide = element_bytes == 2
    block_b = block(B, 128 if wide else 64)
    block_e = block(E, 128 if wide and vector else 64)
    block_j = depth(J, 64 if vector else 32, wide, device)
    stages = stages_of((block_b + block_e) * block_j, element_bytes, device)
    warps = warps_of(max(block_b * block_e, block_b * block_j, block_e * block_j), vector and wide)
    return Tile(block_b, block_e, block_j, warps, stages)


def dweight_tile(B: int, E: int, J: int, element_bytes: int, vector: bool, device: Device) -> Tile:
    """The tile of the dweight kernel; without vectors its b and j tiles are half as wide."""
    wide = element_bytes == 2
    block_b = depth(B, 64 if vector else 32, wide, device)
    block_e = block(E, 128 if wide else 64)
    block_j = block(J, 128 if wide and vector else 64)
    stages = stages_of((block_e + block_j) * block_b, element_bytes, device)
    warps = warps_of(max(block_e * block_j, block_b * block_e, block_b * block_j), vector and wide)
    return Tile(block_b, block_e, block_j, warps, stages)


def splits(programs: int, steps: int, device: Device) -> int:
    """Into how many parts a loop of `steps` tiles is cut so that the grid gives each multiprocessor two programs.

    Never so many that a part has fewer than 4 steps, or that the fp32 partials number more than 32.
    """
    wanted = triton.cdiv(2 * device.multiprocessors, max(programs, 1))
    return max(1, min(wanted, steps // 4, 32))


@triton.jit
def group_fc_dh_kernel(
    dlogits_ptr,
    weight_ptr,
    dh_ptr,
    B,
    G,
    E,
    J,
    C,
    split_j,
    dlogits_stride_b,
    dlogits_stride_c,
    weight_stride_g,
    weight_stride_e,
    weight_stride_j,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program handles BLOCK_B images x BLOCK_E features of one group, and loops over one part of its classes.

    `split_j` classes make a part; part p writes dh[p] of dh (parts, B, G, E).
    """
    pid = tl.program_id(0)
    tiles_b = tl.cdiv(B, BLOCK_B)
    tiles_e = tl.cdiv(E, BLOCK_E)
    g = (pid // (tiles_b * tiles_e) % G).to(tl.int64)
    part = (pid // (tiles_b * tiles_e * G)).to(tl.int64)
    offs_b = ((pid % tiles_b) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)
    offs_e = ((pid // tiles_b) % tiles_e * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
    mask_b = offs_b < B
    mask_e = offs_e < E
    # The group owns min(J, C - gJ) classes, none at all when gJ >= C; the part ends there or after split_j.
    first_j = part * split_j
    last_j = tl.minimum(tl.minimum(C - g * J, J), first_j + split_j)

    dlogits_ptrs = dlogits_ptr + g * J * dlogits_stride_c + offs_b[:, None] * dlogits_stride_b
    weight_ptrs = weight_ptr + g * weight_stride_g + offs_e[None, :] * weight_stride_e
    dh = tl.zeros((BLOCK_B, BLOCK_E), tl.float32)
    for start_j in range(first_j, last_j, BLOCK_J):
        offs_j = (start_j + tl.arange(0, BLOCK_J)).to(tl.int64)
        mask_j = offs_j < last_j
        dlogits = tl.load(
            dlogits_ptrs + offs_j[None, :] * dlogits_stride_c, mask=mask_b[:, None] & mask_j[None, :], other=0.0
        )
        weight = tl.load(
            weight_ptrs + offs_j[:, None] * weight_stride_j, mask=mask_j[:, None] & mask_e[None, :], other=0.0
        )
        dh = tl.dot(dlogits, weight, dh, input_precision=PRECISION)
    dh_ptrs = dh_ptr + ((part * B + offs_b[:, None]) * G + g) * E + offs_e[None, :]
    tl.store(dh_ptrs, dh.to(dh_ptr.dtype.element_ty), mask=mask_b[:, None] & mask_e[None, :])


@triton.jit
def group_fc_dweight_kernel(
    dlogits_ptr,
    h_ptr,
    dweight_ptr,
    dbias_ptr,
    B,
    G,
    E,
    J,
    C,
    split_b,
    dlogits_stride_b,
    dlogits_stride_c,
    h_stride_b,
    h_stride_g,
    h_stride_e,
    NEED_DBIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program handles BLOCK_E features x BLOCK_J classes of one group, and loops over one part of the images.

    `split_b` images make a part; part p writes dweight[p] of dweight (parts, G, E, J) and dbias[p] of dbias (parts, C).
    """
    pid = tl.program_id(0)
    tiles_e = tl.cdiv(E, BLOCK_E)
    tiles_j = tl.cdiv(J, BLOCK_J)
    g = (pid // (tiles_e * tiles_j) % G).to(tl.int64)
    part = (pid // (tiles_e * tiles_j * G)).to(tl.int64)
    pid_e = pid % tiles_e
    offs_e = (pid_e * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
    offs_j = ((pid // tiles_e) % tiles_j * BLOCK_J + tl.arange(0, BLOCK_J)).to(tl.int64)
    offs_c = g * J + offs_j
    mask_e = offs_e < E
    mask_c = (offs_j < J) & (offs_c < C)
    first_b = part * split_b
    last_b = tl.minimum(B, first_b + split_b)

    h_ptrs = h_ptr + g * h_stride_g + offs_e[:, None] * h_stride_e
    dlogits_ptrs = dlogits_ptr + offs_c[None, :] * dlogits_stride_c
    dweight = tl.zeros((BLOCK_E, BLOCK_J), tl.float32)
    dbias = tl.zeros((BLOCK_J,), tl.float32)
    for start_b in range(first_b, last_b, BLOCK_B):
        offs_b = (start_b + tl.arange(0, BLOCK_B)).to(tl.int64)
        mask_b = offs_b < last_b
        h = tl.load(h_ptrs + offs_b[None, :] * h_stride_b, mask=mask_e[:, None] & mask_b[None, :], other=0.0)
        dlogits = tl.load(
            dlogits_ptrs + offs_b[:, None] * dlogits_stride_b, mask=mask_b[:, None] & mask_c[None, :], other=0.0
        )
        dweight = tl.dot(h, dlogits, dweight, input_precision=PRECISION)
        if NEED_DBIAS:
            dbias += tl.sum(dlogits.to(tl.float32), axis=0)
    # A column that belongs to no class has gradient 0 even where h is not finite.
    dweight = tl.where(mask_c[None, :], dweight, 0.0)
    dweight_ptrs = dweight_ptr + ((part * G + g) * E + offs_e[:, None]) * J + offs_j[None, :]
    tl.store(dweight_ptrs, dweight.to(dweight_ptr.dtype.element_ty), mask=mask_e[:, None] & (offs_j < J)[None, :])
    if NEED_DBIAS:
        tl.store(dbias_ptr + part * C + offs_c, dbias.to(dbias_ptr.dtype.element_ty), mask=mask_c & (pid_e == 0))


def _dh(dlogits: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    B, G, E = h.shape
    J, C = weight.shape[2], dlogits.shape[1]
    if h.numel() == 0 or C == 0:
        return torch.zeros((B, G, E), dtype=h.dtype, device=h.device)
    device = device_of(h)
    tile = dh_tile(B, E, J, h.element_size(), vectorised(dlogits, weight), device)
    programs = G * triton.cdiv(E, tile.BLOCK_E) * triton.cdiv(B, tile.BLOCK_B)
    steps = triton.cdiv(J, tile.BLOCK_J)
    split_j = triton.cdiv(steps, splits(programs, steps, device)) * tile.BLOCK_J
    parts = triton.cdiv(J, split_j)
    dh = torch.empty((parts, B, G, E), dtype=h.dtype if parts == 1 else torch.float32, device=h.device)
    with device_guard(h):
        group_fc_dh_kernel[(programs * parts,)](
            dlogits_ptr=dlogits,
            weight_ptr=weight,
            dh_ptr=dh,
            B=B,
            G=G,
            E=E,
            J=J,
            C=C,
            split_j=split_j,
            dlogits_stride_b=dlogits.stride(0),
            dlogits_stride_c=dlogits.stride(1),
            weight_stride_g=weight.stride(0),
            weight_stride_e=weight.stride(1),
            weight_stride_j=weight.stride(2),
            PRECISION=dot_precision(h),
            **tile.as_kwargs(),
        )
    return dh.squeeze(0) if parts == 1 else dh.sum(0).to(h.dtype)


def _dweight(dlogits: Tensor, h: Tensor, weight: Tensor, need_dbias: bool) -> tuple[Tensor, Tensor]:
    B, G, E = h.shape
    J, C = weight.shape[2], dlogits.shape[1]
    if weight.numel() == 0 or B == 0:
        return (
            torch.zeros((G, E, J), dtype=h.dtype, device=h.device),
            dlogits.sum(0) if need_dbias else dlogits.new_empty(0),
        )
    device = device_of(h)
    tile = dweight_tile(B, E, J, h.element_size(), vectorised(dlogits, h), device)
    programs = G * triton.cdiv(E, tile.BLOCK_E) * triton.cdiv(J, tile.BLOCK_J)
    steps = triton.cdiv(B, tile.BLOCK_B)
    split_b = triton.cdiv(steps, splits(programs, steps, device)) * tile.BLOCK_B
    parts = triton.cdiv(B, split_b)
    dtype = h.dtype if parts == 1 else torch.float32
    dweight = torch.empty((parts, G, E, J), dtype=dtype, device=h.device)
    dbias = torch.empty((parts, C), dtype=dtype, device=h.device) if need_dbias else dweight.new_empty(0)
    with device_guard(h):
        group_fc_dweight_kernel[(programs * parts,)](
            dlogits_ptr=dlogits,
            h_ptr=h,
            dweight_ptr=dweight,
            dbias_ptr=dbias if need_dbias else dweight,
            B=B,
            G=G,
            E=E,
            J=J,
            C=C,
            split_b=split_b,
            dlogits_stride_b=dlogits.stride(0),
            dlogits_stride_c=dlogits.stride(1),
            h_stride_b=h.stride(0),
            h_stride_g=h.stride(1),
            h_stride_e=h.stride(2),
            NEED_DBIAS=need_dbias,
            PRECISION=dot_precision(h),
            **tile.as_kwargs(),
        )
    if parts == 1:
        return dweight.squeeze(0), dbias.squeeze(0)
    return dweight.sum(0).to(h.dtype), dbias.sum(0).to(h.dtype) if need_dbias else dbias.to(h.dtype)


def group_fc_backward(
    dlogits: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, num_classes: int, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (dh, dweight, dbias) of `group_fc`, contiguous; those not needed are empty tensors."""
    need_dh, need_dweight, need_dbias = needs
    dh = _dh(dlogits, h, weight) if need_dh else dlogits.new_empty(0)
    if need_dweight:
        dweight, dbias = _dweight(dlogits, h, weight, need_dbias)
    else:
        dweight = dlogits.new_empty(0)
        dbias = dlogits.sum(0) if need_dbias else dlogits.new_empty(0)
    return dh, dweight, dbias
