"""Class-specific residual attention pooling: the kernels around, and one with, the matrix product of the scores.

    s[b, l, n] = scale[n] sum_d x[b, l, d] w[n, d]              n = h C + c: the classifiers of all heads, one matrix
    pooled[b, n] = average mean_l s + lam_h A,  A = sum_l p_l s_l,  p = softmax_l(T_h s);  A = max_l s for T = inf
    ds_l = dlogit (average / L + lam p_l (1 + T (s_l - A)))     p = [l is the first maximum], no T, for T = inf

Two designs, and the shape decides (`forward_design`). The fused one, forward only, is in csra_pool_fused.py; here is
the chunked one.

A chunk of columns' raw scores (B, L, n) comes from a product by the vendor's library into a scratch that fits L2; one
kernel then pools each column, or turns its scores into ds for the two products of the gradient. Beyond the
products it moves 4 bytes per score in 16 bits forward (write, read) and 6 backward, all in L2, and it wastes no
arithmetic on any L. Backward is always chunked: what follows ds needs all of it, in two orders.

A program has a run of columns of one image and walks over tiles of its positions, with a running maximum and sums of
s - m instead of s, which keep their bits where T is large. No atomics: all results are the same bits on every run.

Not yet run on a GPU: compiled ahead of time for sm_80 to sm_100, its arithmetic tested in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._csra_pool import LOWEST, infinite, merge, of_head, pooled_of, sharpness
from ._device import device_guard
from .csra_pool_fused import forward_design, fused_forward

__all__ = ["forward_design", "fused_forward", "norms", "pool", "pool_backward", "unit_rows_backward"]

MOST_REGISTERS = 128  # of a pooling thread: unbounded, ptxas spills to fit one more program into a multiprocessor


@dataclass(frozen=True)
class PoolTile:
    """Launch configuration of the pooling kernels: a tile of scores."""

    BLOCK_L: int
    BLOCK_N: int
    num_warps: int

    def as_kwargs(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return asdict(self)


def pool_tile(L: int, N: int, element_bytes: int) -> PoolTile:
    """Rows of 128 bytes, and up to 32 positions: 64 spill registers, on 4 warps and on 8; so do 256 bytes in fp32."""
    block_l = min(32, max(8, triton.next_power_of_2(L)))
    block_n = min(128 // element_bytes, max(16, triton.next_power_of_2(N)))
    return PoolTile(block_l, block_n, 4)


@triton.jit
def _tile_of_scores(scores_ptr, start_l, L, stride_l, offs_n, mask_n, scale, BLOCK_L: tl.constexpr):
    """The tile's scores, LOWEST outside, its mask and its positions."""
    offs_l = start_l + tl.arange(0, BLOCK_L)
    mask = (offs_l < L)[:, None] & mask_n[None, :]
    s = tl.load(scores_ptr + offs_l.to(tl.int64)[:, None] * stride_l + offs_n[None, :], mask=mask, other=0.0)
    return tl.where(mask, s.to(tl.float32) * scale[None, :], LOWEST), mask, offs_l


@triton.jit
def _facts(scores_ptr, L, stride_l, offs_n, mask_n, scale, sharp, BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of each column over all positions: maximum, its first position, sum of e, sum of e (s - maximum), sum of s."""
    m = tl.full((BLOCK_N,), LOWEST, tl.float32)
    first = tl.zeros((BLOCK_N,), tl.int32)
    z = tl.zeros((BLOCK_N,), tl.float32)
    w = tl.zeros((BLOCK_N,), tl.float32)
    t = tl.zeros((BLOCK_N,), tl.float32)
    for start_l in range(0, L, BLOCK_L):
        s, mask, offs_l = _tile_of_scores(scores_ptr, start_l, L, stride_l, offs_n, mask_n, scale, BLOCK_L)
        top = tl.max(s, axis=0)
        here = tl.min(tl.where(s == top[None, :], offs_l[:, None], L), axis=0)
        first = tl.where(top > m, here, first)
        below = tl.where(mask, s - top[None, :], 0.0)
        e = tl.where(mask, tl.exp2(below * sharp[None, :]), 0.0)
        t += tl.sum(tl.where(mask, s, 0.0), axis=0)
        m, z, w = merge(m, z, w, top, tl.sum(e, axis=0), tl.sum(e * below, axis=0), sharp)
    return m, first, z, w, t


@triton.jit
def _columns(
    scale_ptr, N, C, first_column, HEADS: tl.constexpr, SHARPNESS: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program's image and columns: which of them exist, their heads, sharpness and scale."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // tiles_n).to(tl.int64)
    offs_n = (tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < N
    h = (first_column + offs_n) // C
    sharp = of_head(SHARPNESS, h, HEADS)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=1.0)
    else:
        scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    return b, offs_n, mask_n, h, sharp, scale


@triton.jit
def csra_pool_scores_kernel(
    scores_ptr, scale_ptr, pooled_ptr, L, N, C, first_column, average,
    scores_stride_b, scores_stride_l, pooled_stride_b,
    HEADS: tl.constexpr, SHARPNESS: tl.constexpr, INFINITE: tl.constexpr, LAM: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK_N columns of one image, and loops over its positions."""
    b, offs_n, mask_n, h, sharp, scale = _columns(scale_ptr, N, C, first_column, HEADS, SHARPNESS, HAS_SCALE, BLOCK_N)
    scores_ptr += b * scores_stride_b
    m, _, z, w, t = _facts(scores_ptr, L, scores_stride_l, offs_n, mask_n, scale, sharp, BLOCK_L, BLOCK_N)
    pooled = pooled_of(m, tl.where(mask_n, z, 1.0), w, t, h, average, L, HEADS, INFINITE, LAM)
    tl.store(pooled_ptr + b * pooled_stride_b + offs_n, pooled, mask=mask_n)


@triton.jit
def csra_pool_scores_backward_kernel(
    scores_ptr, scale_ptr, dlogits_ptr, ds_ptr, L, N, C, first_column, average,
    scores_stride_b, scores_stride_l, dlogits_stride_b, dlogits_stride_c,
    HEADS: tl.constexpr, SHARPNESS: tl.constexpr, INFINITE: tl.constexpr, LAM: tl.constexpr, HAS_SCALE: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK_N columns of one image: writes scale ds, in the strides of the scores, or over them."""
    b, offs_n, mask_n, h, sharp, scale = _columns(scale_ptr, N, C, first_column, HEADS, SHARPNESS, HAS_SCALE, BLOCK_N)
    scores_ptr += b * scores_stride_b
    ds_ptr += b * scores_stride_b
    m, first, z, w, _ = _facts(scores_ptr, L, scores_stride_l, offs_n, mask_n, scale, sharp, BLOCK_L, BLOCK_N)

    offs_c = (first_column + offs_n) % C
    dlogits_ptrs = dlogits_ptr + b * dlogits_stride_b + offs_c * dlogits_stride_c
    d = tl.load(dlogits_ptrs, mask=mask_n, other=0.0).to(tl.float32)
    is_infinite = of_head(INFINITE, h, HEADS) != 0
    z = tl.where(mask_n, z, 1.0)
    even = d * (average / L) * scale
    focus = tl.div_rn(d * of_head(LAM, h, HEADS), tl.where(is_infinite, 1.0, z)) * scale
    attended = tl.div_rn(w, z)
    T = sharp * 0.6931471805599453
    for start_l in range(0, L, BLOCK_L):
        s, mask, offs_l = _tile_of_scores(scores_ptr, start_l, L, scores_stride_l, offs_n, mask_n, scale, BLOCK_L)
        below = s - m[None, :]
        soft = tl.exp2(below * sharp[None, :]) * (1.0 + T[None, :] * (below - attended[None, :]))
        hard = tl.where(offs_l[:, None] == first[None, :], 1.0, 0.0)
        ds = even[None, :] + focus[None, :] * tl.where(is_infinite[None, :], hard, soft)
        ds_ptrs = ds_ptr + offs_l.to(tl.int64)[:, None] * scores_stride_l + offs_n[None, :]
        tl.store(ds_ptrs, ds.to(ds_ptr.dtype.element_ty), mask=mask)


@triton.jit
def csra_norms_kernel(weight_ptr, norms_ptr, N, D, weight_stride_n, weight_stride_d, BLOCK_D: tl.constexpr):
    """One program handles one classifier: its norm, 1 where that is 0, to norms[0, n], and 1 / norm to norms[1, n]."""
    n = tl.program_id(0).to(tl.int64)
    weight_ptr += n * weight_stride_n
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        w = tl.load(weight_ptr + offs_d * weight_stride_d, mask=offs_d < D, other=0.0).to(tl.float32)
        squares += w * w
    norm = tl.sqrt_rn(tl.sum(squares))
    norm = tl.where(norm == 0.0, 1.0, norm)
    tl.store(norms_ptr + n, norm)
    tl.store(norms_ptr + N + n, tl.div_rn(tl.full((), 1.0, tl.float32), norm))


@triton.jit
def csra_unit_rows_backward_kernel(
    dw_ptr, weight_ptr, norm_ptr, D, dw_stride_n, weight_stride_n, weight_stride_d,
    DIVIDE: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program handles one classifier: dw <- dw - u <dw, u> with u = w / |w|, divided by |w| if DIVIDE."""
    n = tl.program_id(0).to(tl.int64)
    norm = tl.load(norm_ptr + n)
    dw_ptr += n * dw_stride_n
    weight_ptr += n * weight_stride_n
    along = tl.zeros((BLOCK_D,), tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        u = tl.load(weight_ptr + offs_d * weight_stride_d, mask=offs_d < D, other=0.0).to(tl.float32)
        along += tl.div_rn(u, norm) * tl.load(dw_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    product = tl.sum(along)
    for start_d in range(0, D, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        u = tl.load(weight_ptr + offs_d * weight_stride_d, mask=offs_d < D, other=0.0).to(tl.float32)
        dw = tl.load(dw_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32) - tl.div_rn(u, norm) * product
        if DIVIDE:
            dw = tl.div_rn(dw, norm)
        tl.store(dw_ptr + offs_d, dw.to(dw_ptr.dtype.element_ty), mask=offs_d < D)


def _launch(
    kernel: Any,
    scores: Tensor,
    scale: Tensor | None,
    temperatures: tuple[float, ...],
    lam: tuple[float, ...],
    average: float,
    classes: int,
    first: int,
    **others: Any,
) -> None:
    """Launches a kernel on the columns of raw scores (B, L, N) with what both have, and `others`."""
    B, L, N = scores.shape
    tile = pool_tile(L, N, scores.element_size())
    with device_guard(scores):
        kernel[(B * triton.cdiv(N, tile.BLOCK_N),)](
            scores_ptr=scores, scale_ptr=scores if scale is None else scale, L=L, N=N, C=classes, first_column=first,
            average=average, scores_stride_b=scores.stride(0), scores_stride_l=scores.stride(1), HEADS=len(lam),
            SHARPNESS=sharpness(temperatures), INFINITE=infinite(temperatures), LAM=lam, HAS_SCALE=scale is not None,
            maxnreg=MOST_REGISTERS, **others, **tile.as_kwargs(),
        )  # fmt: skip


def pool(
    scores: Tensor,
    scale: Tensor | None,
    temperatures: tuple[float, ...],
    lam: tuple[float, ...],
    average: float,
    classes: int,
    first: int,
    pooled: Tensor,
) -> None:
    """Pools raw scores (B, L, N) of the columns from `first` on into pooled (B, N) fp32; n contiguous in both."""
    _launch(
        csra_pool_scores_kernel, scores, scale, temperatures, lam, average, classes, first,
        pooled_ptr=pooled, pooled_stride_b=pooled.stride(0),
    )  # fmt: skip


def pool_backward(
    scores: Tensor,
    scale: Tensor | None,
    temperatures: tuple[float, ...],
    lam: tuple[float, ...],
    average: float,
    classes: int,
    first: int,
    dlogits: Tensor,
    ds: Tensor,
) -> None:
    """Writes scale ds of raw scores (B, L, N) into ds, in their strides or over them; dlogits (B, C) of any strides."""
    _launch(
        csra_pool_scores_backward_kernel, scores, scale, temperatures, lam, average, classes, first,
        dlogits_ptr=dlogits, ds_ptr=ds, dlogits_stride_b=dlogits.stride(0), dlogits_stride_c=dlogits.stride(1),
    )  # fmt: skip


def norms(weight: Tensor) -> Tensor:
    """(2, N) fp32 of the rows of weight (N, D), any strides: their norms, 1 where 0, and one over them."""
    N, D = weight.shape
    found = torch.empty((2, N), dtype=torch.float32, device=weight.device)
    with device_guard(weight):
        csra_norms_kernel[(N,)](
            weight_ptr=weight, norms_ptr=found, N=N, D=D, weight_stride_n=weight.stride(0),
            weight_stride_d=weight.stride(1), BLOCK_D=_block_d(D), num_warps=4,
        )  # fmt: skip
    return found


def _block_d(D: int) -> int:
    return min(1024, max(32, triton.next_power_of_2(D)))


def unit_rows_backward(dw: Tensor, weight: Tensor, norm: Tensor, divide: bool) -> None:
    """The gradient through the division of the rows of weight (N, D) by their norms (N), in place on dw (N, D)."""
    N, D = dw.shape
    with device_guard(dw):
        csra_unit_rows_backward_kernel[(N,)](
            dw_ptr=dw,
            weight_ptr=weight,
            norm_ptr=norm,
            D=D,
            dw_stride_n=dw.stride(0),
            weight_stride_n=weight.stride(0),
            weight_stride_d=weight.stride(1),
            DIVIDE=divide,
            BLOCK_D=_block_d(D),
            num_warps=4,
        )
