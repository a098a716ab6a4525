"""The fused forward of csra_pool: one kernel makes a tile of scores in registers and pools it before they are written.

Tiles are cut from the B L positions of all images in a row, so no tile is padded but the last (an image of 49 positions
in a tile of 64 would waste 23 %), and a tile may hold the end of one image, a few whole ones and the beginning of
another. For every image it touches it writes four numbers per column, which a second, small kernel merges:

    m = max s,  z = sum e^(T (s - m)),  w = sum e^(T (s - m)) (s - m),  t = sum s

Sums of s - m instead of s keep their bits where T is large. No atomics: all results are the same bits on every run.

Bytes. x and the weight come once from DRAM and to every tile again from L2; the facts are 16 bytes for each column and
each tile that an image touches, where the chunked form moves 4 for each score. Against that stand a product slower than
the vendor's, and 8 operations for a score and 8 more for each image of its tile: `forward_design` weighs them.

Not yet run on a GPU: compiled ahead of time for sm_80 to sm_100, its arithmetic tested in Triton's interpreter.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._csra_pool import LOWEST, infinite, merge, of_head, pooled_of, sharpness
from ._device import Device, device_guard, device_of, dot_precision


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


@triton.jit
def _facts_of(facts_ptr, b, tile_r, offs_n, mask_n, B, L, N, PARTS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Where a tile's facts of image b go, and which of them exist."""
    facts_ptrs = facts_ptr + (b.to(tl.int64) * PARTS + (tile_r - b * L // BLOCK_R)) * N + offs_n
    return facts_ptrs, mask_n & (b < B) & (b * L < (tile_r + 1) * BLOCK_R)


@triton.jit
def csra_fused_forward_kernel(
    x_ptr, weight_ptr, scale_ptr, facts_ptr, B, L, D, N, C, x_stride_b, x_stride_l, x_stride_d,
    weight_stride_h, weight_stride_c, weight_stride_d, facts_stride,
    HEADS: tl.constexpr, SHARPNESS: tl.constexpr, HAS_SCALE: tl.constexpr, PARTS: tl.constexpr,
    SEGMENTS: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
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

    sharp = of_head(SHARPNESS, h, HEADS)
    first_image = tile_r * BLOCK_R // L
    # From here on s becomes s - m, image by image: a second tile of registers would not fit.
    for i in tl.static_range(SEGMENTS):
        b = first_image + i
        inside = (image == b) & mask_r
        m = tl.max(tl.where(inside[:, None], s, LOWEST), axis=0)
        t = tl.sum(tl.where(inside[:, None], s, 0.0), axis=0)
        s = tl.where(inside[:, None], s - m[None, :], s)
        facts_ptrs, exists = _facts_of(facts_ptr, b, tile_r, offs_n, mask_n, B, L, N, PARTS, BLOCK_R)
        tl.store(facts_ptrs, m, mask=exists)
        tl.store(facts_ptrs + 3 * facts_stride, t, mask=exists)
    e = tl.exp2(s * sharp[None, :])
    for i in tl.static_range(SEGMENTS):
        b = first_image + i
        inside = (image == b) & mask_r
        z = tl.sum(tl.where(inside[:, None], e, 0.0), axis=0)
        w = tl.sum(tl.where(inside[:, None], e * s, 0.0), axis=0)
        facts_ptrs, exists = _facts_of(facts_ptr, b, tile_r, offs_n, mask_n, B, L, N, PARTS, BLOCK_R)
        tl.store(facts_ptrs + facts_stride, z, mask=exists)
        tl.store(facts_ptrs + 2 * facts_stride, w, mask=exists)


@triton.jit
def csra_merge_facts_kernel(
    facts_ptr, pooled_ptr, B, L, N, C, average, facts_stride,
    HEADS: tl.constexpr, SHARPNESS: tl.constexpr, INFINITE: tl.constexpr, LAM: tl.constexpr, PARTS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK_N columns of one image: merges the facts of the tiles of ROWS positions it touches."""
    tiles_n = tl.cdiv(N, BLOCK_N)
    b = (tl.program_id(0) // tiles_n).to(tl.int64)
    offs_n = (tl.program_id(0) % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_n = offs_n < N
    h = offs_n // C
    sharp = of_head(SHARPNESS, h, HEADS)
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
        m, z, w = merge(m, z, w, m_part, z_part, w_part, sharp)
    pooled = pooled_of(m, z, w, t, h, average, L, HEADS, INFINITE, LAM)
    tl.store(pooled_ptr + b * N + offs_n, pooled, mask=mask_n)


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
            x_ptr=x, weight_ptr=weight, scale_ptr=pooled if scale is None else scale, facts_ptr=facts,
            B=B, L=L, D=D, N=N, C=C, x_stride_b=x.stride(0), x_stride_l=x.stride(1), x_stride_d=x.stride(2),
            weight_stride_h=weight.stride(0), weight_stride_c=weight.stride(1), weight_stride_d=weight.stride(2),
            facts_stride=facts.stride(0), HEADS=H, SHARPNESS=sharpness(temperatures), HAS_SCALE=scale is not None,
            PARTS=most_parts, SEGMENTS=segments(L, tile.BLOCK_R), GROUP=8, PRECISION=dot_precision(x),
            **tile.as_kwargs(),
        )  # fmt: skip
        csra_merge_facts_kernel[(B * triton.cdiv(N, block_n),)](
            facts_ptr=facts, pooled_ptr=pooled, B=B, L=L, N=N, C=C, average=average, facts_stride=facts.stride(0),
            HEADS=H, SHARPNESS=sharpness(temperatures), INFINITE=infinite(temperatures), LAM=lam, PARTS=most_parts,
            ROWS=tile.BLOCK_R, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
