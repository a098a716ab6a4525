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

from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import Device, device_guard, device_of, dot_precision


@dataclass(frozen=True)
class Tile:
    """Launch configuration of one kernel: its tile in b, e and j, and what runs it."""

    BLOCK_B: int
    BLOCK_E: int
    BLOCK_J: int
    num_warps: int
    num_stages: int

    def as_kwargs(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return asdict(self)


def _block(size: int, most: int) -> int:
    """The power of two that covers `size`, from 16 (the least that tl.dot takes) to `most`."""
    return max(16, min(most, triton.next_power_of_2(max(size, 1))))


def _stages(stage_elements: int, element_bytes: int, device: Device) -> int:
    """As many pipeline stages, from 1 to 4, as fit in three quarters of the shared memory; on sm_90 in a half.

    There a second program is resident, less 2048 bytes that each takes besides. By the cycles of benchmarks/cycles.py,
    at B=128 E=768 G=100 C=10^6 in bf16 that is 750 us instead of 993; not yet measured.
    """
    most = device.shared_bytes // 2 - 2048 if device.capability == 90 else int(0.75 * device.shared_bytes)
    return max(1, min(4, most // (stage_elements * element_bytes)))


def _depth(size: int, most: int, wide: bool, device: Device) -> int:
    """The tile of the axis that is summed over: at most `most`, 32 where shared memory is short, 16 in fp32.

    In fp32 without TF32 a thread holds its operands of the whole tile in registers.
    """
    return _block(size, min(most, 64 if device.shared_bytes > 128 * 1024 else 32) if wide else 16)


def _warps(largest: int, light: bool) -> int:
    """8 warps where a tile has so many elements that 4 would run short of registers, else 4.

    `light` is a tile of 16-bit vectors. Without vectors every element of an operand has an address and a mask of its
    own in registers.
    """
    return 8 if largest > (8192 if light else 2048) else 4


def vectorised(*tensors: Tensor) -> bool:
    """Whether Triton loads these 16 bytes at a time: contiguous rows, and everything divisible by 16 elements."""
    return all(
        t.stride(-1) == 1 and not (t.shape[-1] | t.stride(0) | t.stride(-2) | t.storage_offset()) % 16 for t in tensors
    )


def forward_tile(B: int, E: int, J: int, element_bytes: int, vector: bool, device: Device) -> Tile:
    """The tile of the forward kernel, a function of the shape, the element size, `vectorised` and the device.

    Compiled for sm_90 in bf16 at B=128 E=768 C=9605 (J=97, no vectors), a j tile of 64 takes 92 registers and one
    of 128 takes 232, which would leave one program to a multiprocessor.
    """
    wide = element_bytes == 2
    block_b = _block(B, 128 if wide else 64)
    block_j = _block(J, 128 if wide and vector else 64)
    block_e = _depth(E, 64, wide, device)
    stages = _stages((block_b + block_j) * block_e, element_bytes, device)
    warps = _warps(max(block_b * block_j, block_b * block_e, block_e * block_j), vector and wide)
    return Tile(block_b, block_e, block_j, warps, stages)


def dh_tile(B: int, E: int, J: int, element_bytes: int, vector: bool, device: Device) -> Tile:
    """The tile of the dh kernel: a wide e tile, since every e tile reads dlogits again.

    Without vectors it is a quarter as large (as above: 128 registers instead of 254, and on sm_80 no spills).
    """
    wide = element_bytes == 2
    block_b = _block(B, 128 if wide else 64)
    block_e = _block(E, 128 if wide and vector else 64)
    block_j = _depth(J, 64 if vector else 32, wide, device)
    stages = _stages((block_b + block_e) * block_j, element_bytes, device)
    warps = _warps(max(block_b * block_e, block_b * block_j, block_e * block_j), vector and wide)
    return Tile(block_b, block_e, block_j, warps, stages)


def dweight_tile(B: int, E: int, J: int, element_bytes: int, vector: bool, device: Device) -> Tile:
    """The tile of the dweight kernel; without vectors its b and j tiles are half as wide."""
    wide = element_bytes == 2
    block_b = _depth(B, 64 if vector else 32, wide, device)
    block_e = _block(E, 128 if wide else 64)
    block_j = _block(J, 128 if wide and vector else 64)
    stages = _stages((block_e + block_j) * block_b, element_bytes, device)
    warps = _warps(max(block_e * block_j, block_b * block_e, block_b * block_j), vector and wide)
    return Tile(block_b, block_e, block_j, warps, stages)


def splits(programs: int, steps: int, device: Device) -> int:
    """Into how many parts a loop of `steps` tiles is cut so that the grid gives each multiprocessor two programs.

    Never so many that a part has fewer than 4 steps, or that the fp32 partials number more than 32.
    """
    wanted = triton.cdiv(2 * device.multiprocessors, max(programs, 1))
    return max(1, min(wanted, steps // 4, 32))


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
    BLOCK_B: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """One program handles BLOCK_B images x BLOCK_J classes of one group, and loops over e."""
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
    for start_e in range(0, E, BLOCK_E):
        offs_e = (start_e + tl.arange(0, BLOCK_E)).to(tl.int64)
        mask_e = offs_e < E
        h = tl.load(h_ptrs + offs_e[None, :] * h_stride_e, mask=mask_b[:, None] & mask_e[None, :], other=0.0)
        weight = tl.load(
            weight_ptrs + offs_e[:, None] * weight_stride_e, mask=mask_e[:, None] & mask_j[None, :], other=0.0
        )
        logits = tl.dot(h, weight, logits, input_precision=PRECISION)
    if HAS_BIAS:
        logits += tl.load(bias_ptr + offs_c * bias_stride_c, mask=mask_j, other=0.0).to(tl.float32)[None, :]
    logits_ptrs = logits_ptr + offs_b[:, None] * C + offs_c[None, :]
    tl.store(logits_ptrs, logits.to(logits_ptr.dtype.element_ty), mask=mask_b[:, None] & mask_j[None, :])


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
            **tile.as_kwargs(),
        )
    return logits


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
