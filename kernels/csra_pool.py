"""Class-specific residual attention pooling: the kernels around, and one with, the matrix product of the scores.

    s[b, l, n] = scale[n] sum_d x[b, l, d] w[n, d]              n = h C + c: the classifiers of all heads, one matrix
    pooled[b, n] = average mean_l s + lam_h A,  A = sum_l p_l s_l,  p = softmax_l(T_h s);  A = max_l s for T = inf
    ds_l = dlogit (average / L + lam p_l (1 + T (s_l - A)))     p = [l is the first maximum], no T, for T = inf

Two designs, and the shape decides (`forward_design`).

Chunked. A chunk of columns' raw scores (B, L, n) comes from a product by the vendor's library into a scratch that fits
L2; one kernel then pools each column, or turns its scores into ds in place for the two products of the gradient. Beyond
the products it moves 4 bytes per score in 16 bits forward (write, read) and 6 backward, all in L2, and it wastes no
arithmetic on any L. Backward is always chunked: what follows ds needs all of it, in two orders.

Fused. One kernel makes a tile of scores in registers and pools it before they are written anywhere. Tiles are cut from
the B L positions of all images in a row, so no tile is padded but the last (an image of 49 positions in a tile of 64
would waste 23 %), and a tile may hold the end of one image, a few whole ones and the beginning of another. For every
image it touches it writes four numbers per column, which a second, small kernel merges:

    m = max s,  z = sum e^(T (s - m)),  w = sum e^(T (s - m)) (s - m),  t = sum s

Sums of s - m instead of s keep their bits where T is large. No atomics: all results are the same bits on every run.

Not yet run on a GPU: compiled ahead of time for sm_80 to sm_100, its arithmetic tested in Triton's interpreter.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import Device, device_guard, device_of, dot_precision

# Below any score, and finite: differences from it are no NaN.
LOWEST = tl.constexpr(-1.0e30)


@dataclass(frozen=True)
class PoolTile:
    """Launch configuration of the pooling kernels: a tile of scores."""

    BLOCK_L: int
    BLOCK_N: int
    num_warps: int

    def as_kwargs(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return asdict(self)


@dataclass(frozen=True)
class FusedTile:
    """Launch configuration of the fused kernel: rows of positions, columns of classifiers, features."""

    BLOCK_R: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int

    def as_kwargs(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return asdict(self)


@dataclass(frozen=True)
class Costs:
    """What the choice between the designs rests on; an H100's numbers, assumed and not yet measured.

    Args:
        flops: Rate of a large product of the vendor's library in 16 bits.
        fused_share: What of it the fused kernel's products reach.
        lanes: Plain fp32 operations per second.
        cache_bandwidth: Bytes per second to and from L2.
        chunk_s: Seconds that a chunk costs besides its work.
    """

    flops: float = 700e12
    fused_share: float = 0.8
    lanes: float = 25e12
    cache_bandwidth: float = 4.0e12
    chunk_s: float = 12e-6


COSTS = Costs()
MOST_SEGMENTS = 5


def pool_tile(L: int, N: int) -> PoolTile:
    """Rows of 64 columns, 128 bytes in 16 bits, and up to 32 positions: 64 spill registers, on 4 warps and on 8."""
    block_l = min(32, max(8, triton.next_power_of_2(L)))
    block_n = min(64, max(16, triton.next_power_of_2(N)))
    return PoolTile(block_l, block_n, 4)


def fused_rows(element_bytes: int) -> int:
    """Positions in a tile of the fused kernel."""
    return 128 if element_bytes == 2 else 64


def fused_tile(N: int, element_bytes: int, device: Device) -> FusedTile:
    """128 positions by 128 classifiers where they are many, else by 64; half as many positions in fp32.

    On sm_100, whose products leave their sums in another memory, 128 by 128 would spill.
    """
    block_n = 128 if N > 64 and element_bytes == 2 and device.capability < 100 else 64
    block_d = 64 if element_bytes == 2 else 16
    stages = 3 if device.shared_bytes > 128 * 1024 else 2
    return FusedTile(fused_rows(element_bytes), block_n, block_d, 8, stages)


def segments(L: int, rows: int) -> int:
    """The most images that a tile of `rows` neighbouring positions touches; tiles begin at multiples of the gcd."""
    return triton.cdiv(L - math.gcd(L, rows) + rows, L)


def parts(L: int, rows: int) -> int:
    """The most tiles of `rows` neighbouring positions that an image touches."""
    return triton.cdiv(rows - math.gcd(L, rows) + L, rows)


def wasted(B: int, L: int, rows: int) -> float:
    """The share of the fused kernel's products that fall on positions that do not exist."""
    return 1.0 - B * L / (triton.cdiv(B * L, rows) * rows)


def forward_design(B: int, L: int, D: int, N: int, element_bytes: int, chunks: int, costs: Costs = COSTS) -> str:
    """The cheaper design of the forward, "fused" or "chunked", a function of the shape.

    Few and small chunks (`coco`, `voc`) are fused: launches and the way through L2 cost more than the slower product.
    """
    touched = segments(L, fused_rows(element_bytes))
    if touched > MOST_SEGMENTS:
        return "chunked"
    scores = B * L * N
    rate = costs.flops if element_bytes == 2 else costs.flops / 16
    product = 2 * scores * D / rate
    fused = product / costs.fused_share + scores * (8 + 8 * touched) / costs.lanes
    chunked = product + scores * 2 * element_bytes / costs.cache_bandwidth + chunks * costs.chunk_s
    return "fused" if fused <= chunked else "chunked"


@lru_cache
def sharpness(temperatures: tuple[float, ...]) -> tuple[float, ...]:
    """The temperatures times log2 e, for exp2; 0 where infinite."""
    return tuple(0.0 if T == math.inf else T * math.log2(math.e) for T in temperatures)


@lru_cache
def infinite(temperatures: tuple[float, ...]) -> tuple[float, ...]:
    """1 where a temperature is infinite, else 0."""
    return tuple(float(T == math.inf) for T in temperatures)


@triton.jit
def _of_head(values: tl.constexpr, h, H: tl.constexpr):
    """The values of the heads h."""
    found = tl.zeros_like(h).to(tl.float32)
    for i in tl.static_range(H):
        found = tl.where(h == i, values[i], found)
    return found


@triton.jit
def _merge(m, z, w, m_new, z_new, w_new, sharp):
    """Two parts of a column's positions as one: maximum, sum of e, sum of e (s - maximum)."""
    top = tl.maximum(m, m_new)
    down, down_new = m - top, m_new - top
    f, f_new = tl.exp2(down * sharp), tl.exp2(down_new * sharp)
    return top, z * f + z_new * f_new, (w + z * down) * f + (w_new + z_new * down_new) * f_new


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
        m, z, w = _merge(m, z, w, top, tl.sum(e, axis=0), tl.sum(e * below, axis=0), sharp)
    return m, first, z, w, t


@triton.jit
def csra_pool_scores_kernel(
    scores_ptr,
    scale_ptr,
    pooled_ptr,
    L,
    N,
    C,
    first_column,
    average,
    scores_stride_b,
    scores_stride_l,
    pooled_stride_b,
    HEADS: tl.constexpr,
    SHARPNESS: tl.constexpr,
    INFINITE: tl.constexpr,
    LAM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program handles BLOCK_N columns of one image, and loops over its positions."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // tiles_n).to(tl.int64)
    offs_n = (tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < N
    h = (first_column + offs_n) // C
    sharp = _of_head(SHARPNESS, h, HEADS)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=1.0)
    else:
        scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    m, _, z, w, t = _facts(
        scores_ptr + b * scores_stride_b, L, scores_stride_l, offs_n, mask_n, scale, sharp, BLOCK_L, BLOCK_N
    )
    attended = m + tl.where(_of_head(INFINITE, h, HEADS) != 0, 0.0, w / tl.where(mask_n, z, 1.0))
    pooled = t * (average / L) + _of_head(LAM, h, HEADS) * attended
    tl.store(pooled_ptr + b * pooled_stride_b + offs_n, pooled, mask=mask_n)


@triton.jit
def csra_pool_scores_backward_kernel(
    scores_ptr,
    scale_ptr,
    dlogits_ptr,
    L,
    N,
    C,
    first_column,
    average,
    scores_stride_b,
    scores_stride_l,
    dlogits_stride_b,
    dlogits_stride_c,
    HEADS: tl.constexpr,
    SHARPNESS: tl.constexpr,
    INFINITE: tl.constexpr,
    LAM: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program handles BLOCK_N columns of one image: reads their scores, then writes scale ds over them."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // tiles_n).to(tl.int64)
    offs_n = (tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < N
    h = (first_column + offs_n) // C
    sharp = _of_head(SHARPNESS, h, HEADS)
    if HAS_SCALE:
        scale = tl.load(scale_ptr + offs_n, mask=mask_n, other=1.0)
    else:
        scale = tl.full((BLOCK_N,), 1.0, tl.float32)
    scores_ptr += b * scores_stride_b
    m, first, z, w, _ = _facts(scores_ptr, L, scores_stride_l, offs_n, mask_n, scale, sharp, BLOCK_L, BLOCK_N)

    offs_c = (first_column + offs_n) % C
    dlogits_ptrs = dlogits_ptr + b * dlogits_stride_b + offs_c * dlogits_stride_c
    d = tl.load(dlogits_ptrs, mask=mask_n, other=0.0).to(tl.float32)
    is_infinite = _of_head(INFINITE, h, HEADS) != 0
    even = d * (average / L)
    z = tl.where(mask_n, z, 1.0)
    focus = d * _of_head(LAM, h, HEADS) / tl.where(is_infinite, 1.0, z)
    attended = w / z
    T = sharp * 0.6931471805599453
    for start_l in range(0, L, BLOCK_L):
        s, mask, offs_l = _tile_of_scores(scores_ptr, start_l, L, scores_stride_l, offs_n, mask_n, scale, BLOCK_L)
        below = s - m[None, :]
        soft = tl.exp2(below * sharp[None, :]) * (1.0 + T[None, :] * (below - attended[None, :]))
        hard = tl.where(offs_l[:, None] == first[None, :], 1.0, 0.0)
        ds = (even[None, :] + focus[None, :] * tl.where(is_infinite[None, :], hard, soft)) * scale[None, :]
        scores_ptrs = scores_ptr + offs_l.to(tl.int64)[:, None] * scores_stride_l + offs_n[None, :]
        tl.store(scores_ptrs, ds.to(scores_ptr.dtype.element_ty), mask=mask)


@triton.jit
def csra_unit_rows_backward_kernel(
    dw_ptr,
    weight_ptr,
    norm_ptr,
    D,
    dw_stride_n,
    weight_stride_n,
    weight_stride_d,
    DIVIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program handles one classifier: dw <- dw - u <dw, u> with u = w / |w|, divided by |w| if DIVIDE."""
    n = tl.program_id(0).to(tl.int64)
    norm = tl.load(norm_ptr + n)
    dw_ptr += n * dw_stride_n
    weight_ptr += n * weight_stride_n
    along = tl.zeros((BLOCK_D,), tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        u = tl.load(weight_ptr + offs_d * weight_stride_d, mask=offs_d < D, other=0.0).to(tl.float32) / norm
        along += u * tl.load(dw_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32)
    product = tl.sum(along)
    for start_d in range(0, D, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        u = tl.load(weight_ptr + offs_d * weight_stride_d, mask=offs_d < D, other=0.0).to(tl.float32) / norm
        dw = tl.load(dw_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32) - u * product
        if DIVIDE:
            dw = dw / norm
        tl.store(dw_ptr + offs_d, dw.to(dw_ptr.dtype.element_ty), mask=offs_d < D)


@triton.jit
def csra_fused_forward_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    facts_ptr,
    B,
    L,
    D,
    N,
    C,
    x_stride_b,
    x_stride_l,
    x_stride_d,
    weight_stride_h,
    weight_stride_c,
    weight_stride_d,
    facts_stride,
    HEADS: tl.constexpr,
    SHARPNESS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    PARTS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program handles BLOCK_R positions, of up to SEGMENTS images, x BLOCK_N columns, and loops over the features.

    GROUP tiles of positions go through the columns together, so that both operands are read again from L2.
    Writes facts[k, b, part, n] of facts (4, B, PARTS, N), k: maximum, sum of e, sum of e (s - maximum), sum of s,
    which lie facts_stride apart.
    """
    pid = tl.program_id(0)
    tiles_r, tiles_n = tl.cdiv(B * L, BLOCK_R), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP * tiles_n)
    in_group = tl.minimum(tiles_r - group * GROUP, GROUP)
    tile_r = group * GROUP + pid % (GROUP * tiles_n) % in_group
    tile_n = pid % (GROUP * tiles_n) // in_group
    offs_r = tile_r * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_r, mask_n = offs_r < B * L, offs_n < N
    image = offs_r // L
    h = offs_n // C

    x_ptrs = x_ptr + image.to(tl.int64)[:, None] * x_stride_b + (offs_r % L).to(tl.int64)[:, None] * x_stride_l
    weight_ptrs = (
        weight_ptr + h.to(tl.int64)[None, :] * weight_stride_h + (offs_n % C).to(tl.int64)[None, :] * weight_stride_c
    )
    s = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = offs_d < D
        x = tl.load(x_ptrs + offs_d[None, :] * x_stride_d, mask=mask_r[:, None] & mask_d[None, :], other=0.0)
        weight = tl.load(
            weight_ptrs + offs_d[:, None] * weight_stride_d, mask=mask_d[:, None] & mask_n[None, :], other=0.0
        )
        s = tl.dot(x, weight, s, input_precision=PRECISION)
    if HAS_SCALE:
        s *= tl.load(scale_ptr + offs_n, mask=mask_n, other=1.0)[None, :]

    sharp = _of_head(SHARPNESS, h, HEADS)
    first_image = tile_r * BLOCK_R // L
    # From here on s becomes s - m, image by image: a second tile of registers would not fit.
    for i in tl.static_range(SEGMENTS):
        b = first_image + i
        inside = (image == b) & mask_r
        m = tl.max(tl.where(inside[:, None], s, LOWEST), axis=0)
        t = tl.sum(tl.where(inside[:, None], s, 0.0), axis=0)
        s = tl.where(inside[:, None], s - m[None, :], s)
        facts_ptrs = facts_ptr + (b.to(tl.int64) * PARTS + (tile_r - b * L // BLOCK_R)) * N + offs_n
        exists = mask_n & (b < B) & (b * L < (tile_r + 1) * BLOCK_R)
        tl.store(facts_ptrs, m, mask=exists)
        tl.store(facts_ptrs + 3 * facts_stride, t, mask=exists)
    e = tl.exp2(s * sharp[None, :])
    for i in tl.static_range(SEGMENTS):
        b = first_image + i
        inside = (image == b) & mask_r
        z = tl.sum(tl.where(inside[:, None], e, 0.0), axis=0)
        w = tl.sum(tl.where(inside[:, None], e * s, 0.0), axis=0)
        facts_ptrs = facts_ptr + (b.to(tl.int64) * PARTS + (tile_r - b * L // BLOCK_R)) * N + offs_n
        exists = mask_n & (b < B) & (b * L < (tile_r + 1) * BLOCK_R)
        tl.store(facts_ptrs + facts_stride, z, mask=exists)
        tl.store(facts_ptrs + 2 * facts_stride, w, mask=exists)


@triton.jit
def csra_merge_facts_kernel(
    facts_ptr,
    pooled_ptr,
    B,
    L,
    N,
    C,
    average,
    facts_stride,
    HEADS: tl.constexpr,
    SHARPNESS: tl.constexpr,
    INFINITE: tl.constexpr,
    LAM: tl.constexpr,
    PARTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program handles BLOCK_N columns of one image: merges the facts of the tiles of ROWS positions it touches."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // tiles_n).to(tl.int64)
    offs_n = (tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < N
    h = offs_n // C
    sharp = _of_head(SHARPNESS, h, HEADS)
    touched = ((b + 1) * L - 1) // ROWS - b * L // ROWS + 1
    facts_ptrs = facts_ptr + b * PARTS * N + offs_n
    m = tl.load(facts_ptrs, mask=mask_n, other=0.0)
    z = tl.load(facts_ptrs + facts_stride, mask=mask_n, other=1.0)
    w = tl.load(facts_ptrs + 2 * facts_stride, mask=mask_n, other=0.0)
    t = tl.load(facts_ptrs + 3 * facts_stride, mask=mask_n, other=0.0)
    for part in range(1, touched):
        at = facts_ptrs + part * N
        m_part = tl.load(at, mask=mask_n, other=0.0)
        z_part = tl.load(at + facts_stride, mask=mask_n, other=1.0)
        w_part = tl.load(at + 2 * facts_stride, mask=mask_n, other=0.0)
        t += tl.load(at + 3 * facts_stride, mask=mask_n, other=0.0)
        m, z, w = _merge(m, z, w, m_part, z_part, w_part, sharp)
    attended = m + tl.where(_of_head(INFINITE, h, HEADS) != 0, 0.0, w / z)
    pooled = t * (average / L) + _of_head(LAM, h, HEADS) * attended
    tl.store(pooled_ptr + b * N + offs_n, pooled, mask=mask_n)


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
    B, L, N = scores.shape
    tile = pool_tile(L, N)
    with device_guard(scores):
        csra_pool_scores_kernel[(B * triton.cdiv(N, tile.BLOCK_N),)](
            scores_ptr=scores,
            scale_ptr=pooled if scale is None else scale,
            pooled_ptr=pooled,
            L=L,
            N=N,
            C=classes,
            first_column=first,
            average=average,
            scores_stride_b=scores.stride(0),
            scores_stride_l=scores.stride(1),
            pooled_stride_b=pooled.stride(0),
            HEADS=len(lam),
            SHARPNESS=sharpness(temperatures),
            INFINITE=infinite(temperatures),
            LAM=lam,
            HAS_SCALE=scale is not None,
            **tile.as_kwargs(),
        )


def pool_backward(
    scores: Tensor,
    scale: Tensor | None,
    temperatures: tuple[float, ...],
    lam: tuple[float, ...],
    average: float,
    classes: int,
    first: int,
    dlogits: Tensor,
) -> None:
    """Writes scale ds over raw scores (B, L, N), for dlogits (B, C) of any strides."""
    B, L, N = scores.shape
    tile = pool_tile(L, N)
    with device_guard(scores):
        csra_pool_scores_backward_kernel[(B * triton.cdiv(N, tile.BLOCK_N),)](
            scores_ptr=scores,
            scale_ptr=scores if scale is None else scale,
            dlogits_ptr=dlogits,
            L=L,
            N=N,
            C=classes,
            first_column=first,
            average=average,
            scores_stride_b=scores.stride(0),
            scores_stride_l=scores.stride(1),
            dlogits_stride_b=dlogits.stride(0),
            dlogits_stride_c=dlogits.stride(1),
            HEADS=len(lam),
            SHARPNESS=sharpness(temperatures),
            INFINITE=infinite(temperatures),
            LAM=lam,
            HAS_SCALE=scale is not None,
            **tile.as_kwargs(),
        )


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
            BLOCK_D=min(1024, max(32, triton.next_power_of_2(D))),
            num_warps=4,
        )


def fused_forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    temperatures: tuple[float, ...],
    lam: tuple[float, ...],
    average: float,
    pooled: Tensor,
) -> None:
    """Pools the scores of x (B, L, D) and weight (H, C, D), any strides, into pooled (B, H C) fp32, contiguous."""
    (B, L, D), (H, C, _) = x.shape, weight.shape
    N = H * C
    tile = fused_tile(N, x.element_size(), device_of(x))
    most_parts = parts(L, tile.BLOCK_R)
    facts = torch.empty((4, B, most_parts, N), dtype=torch.float32, device=x.device)
    block_n = min(128, max(32, triton.next_power_of_2(N)))
    with device_guard(x):
        csra_fused_forward_kernel[(triton.cdiv(B * L, tile.BLOCK_R) * triton.cdiv(N, tile.BLOCK_N),)](
            x_ptr=x,
            weight_ptr=weight,
            scale_ptr=pooled if scale is None else scale,
            facts_ptr=facts,
            B=B,
            L=L,
            D=D,
            N=N,
            C=C,
            x_stride_b=x.stride(0),
            x_stride_l=x.stride(1),
            x_stride_d=x.stride(2),
            weight_stride_h=weight.stride(0),
            weight_stride_c=weight.stride(1),
            weight_stride_d=weight.stride(2),
            facts_stride=facts.stride(0),
            HEADS=H,
            SHARPNESS=sharpness(temperatures),
            HAS_SCALE=scale is not None,
            PARTS=most_parts,
            SEGMENTS=segments(L, tile.BLOCK_R),
            GROUP=8,
            PRECISION=dot_precision(x),
            **tile.as_kwargs(),
        )
        csra_merge_facts_kernel[(B * triton.cdiv(N, block_n),)](
            facts_ptr=facts,
            pooled_ptr=pooled,
            B=B,
            L=L,
            N=N,
            C=C,
            average=average,
            facts_stride=facts.stride(0),
            HEADS=H,
            SHARPNESS=sharpness(temperatures),
            INFINITE=infinite(temperatures),
            LAM=lam,
            PARTS=most_parts,
            ROWS=tile.BLOCK_R,
            BLOCK_N=block_n,
            num_warps=4,
        )
