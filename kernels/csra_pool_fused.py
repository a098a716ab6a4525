"""The fused forward of csra_pool: one kernel makes a tile of scores in registers and pools it before they are written.

Tiles are cut from the B L positions of all images in a row, so no tile is padded but the last (an image of 49 positions
in a tile of 64 would waste 23 %), and a tile may hold the end of one image, a few whole ones and the beginning of
another. For every image it touches it writes four numbers per column, which a second, small kernel merges into logits:

    m = max s,  z = sum e^(T (s - m)),  w = sum e^(T (s - m)) (s - m),  t = sum s

Algorithm. The product is made with the classifiers as rows and the positions as columns, which are dealt so that a
thread holds a run of neighbours for each of its classifiers, a quarter of the tile. Where no image is shorter than a
run, a run meets at most one border, and everything is reduced twice, before the border and behind it, in registers;
then the four runs of a tile are merged for each image. No sum is the difference of others, so that an infinity stays in
its own image. Sums of s - m instead of s keep their bits where T is large. No atomics: all results are the
same bits on every run.

Why so. With positions as rows, each maximum and sum over them goes through shuffles, for each image of the tile again:
by count as many cycles as the products. Here shuffles merge four runs only. Where L is divisible by 4, fewer masks are
needed, 128 registers suffice on sm_90, two programs share a multiprocessor, and one pools while the other multiplies.

Bytes. x and the weight come once from DRAM and to every tile again from L2, which bounds the kernel; the facts are 16
bytes for each column and each tile that an image touches, where the chunked form moves 4 for each score.
`forward_design` weighs the two.

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
    """What the choice between the designs rests on: an H100's numbers, by data sheet or assumed, not yet measured.

    Args:
        flops: Rate of a large product of the vendor's library in 16 bits; assumed.
        cache_bandwidth: Bytes per second to and from L2, of what the chunked form moves; assumed.
        chunk_s: Seconds that a chunk costs besides its work; assumed.
        multiprocessors: Data sheet.
        clock: Cycles per second; that of the published peak.
        cache_bytes: Bytes a cycle from L2 to all multiprocessors; published for the A100.
        edge_cycles: What a program of the fused kernel takes besides its products; counted by benchmarks/cycles.py.
    """

    flops: float = 700e12
    cache_bandwidth: float = 4.0e12
    chunk_s: float = 12e-6
    multiprocessors: int = 132
    clock: float = 1.83e9
    cache_bytes: float = 5120.0
    edge_cycles: float = 7000.0


COSTS = Costs()
RUNS = 4  # Of a tile's positions; each of four neighbouring threads has one.


def fused_rows(element_bytes: int) -> int:
    """Positions in a tile of the fused kernel."""
    return 128 if element_bytes == 2 else 64


def fused_tile(N: int, element_bytes: int, device: Device) -> FusedTile:
    """128 positions by 64 classifiers, on sm_90 by 128 where they are many; half as many positions in fp32.

    128 by 128 would spill on sm_80 with operands that are loaded number by number, and on sm_100, whose products leave
    their sums in another memory.
    """
    block_n = 128 if N > 64 and element_bytes == 2 and device.capability == 90 else 64
    block_d = 64 if element_bytes == 2 else 16
    stages = 3 if device.shared_bytes > 128 * 1024 else 2
    return FusedTile(fused_rows(element_bytes), block_n, block_d, 8, stages)


def aligned(L: int) -> int:
    """How many neighbours at a multiple of that many positions are always of one image, 8 at the most."""
    return math.gcd(L, 8)


def segments(L: int, rows: int) -> int:
    """The most images that a tile of `rows` neighbouring positions touches; tiles begin at multiples of the gcd."""
    return triton.cdiv(L - math.gcd(L, rows) + rows, L)


def parts(L: int, rows: int) -> int:
    """The most tiles of `rows` neighbouring positions that an image touches."""
    return triton.cdiv(rows - math.gcd(L, rows) + L, rows)


def wasted(B: int, L: int, rows: int) -> float:
    """The share of the fused kernel's products that fall on positions that do not exist."""
    return 1.0 - B * L / (triton.cdiv(B * L, rows) * rows)


def fused_seconds(B: int, L: int, D: int, N: int, element_bytes: int, costs: Costs = COSTS) -> float:
    """What the fused kernel takes by the cycles of the busiest multiprocessor, on sm_90.

    A step takes as long as its operands from L2 or its products. What surrounds the steps is hidden behind another
    program's where two are resident; else every program adds it.
    """
    tile = fused_tile(N, element_bytes, Device(90, costs.multiprocessors, 232_448))
    rate = costs.flops if element_bytes == 2 else costs.flops / 16
    share = costs.cache_bytes / costs.multiprocessors
    copies = (tile.BLOCK_R + tile.BLOCK_N) * tile.BLOCK_D * element_bytes / share
    products = 2 * tile.BLOCK_R * tile.BLOCK_N * tile.BLOCK_D * costs.multiprocessors * costs.clock / rate
    most = triton.cdiv(triton.cdiv(B * L, tile.BLOCK_R) * triton.cdiv(N, tile.BLOCK_N), costs.multiprocessors)
    edges = costs.edge_cycles * (1 if aligned(L) >= 4 else most)
    return (most * triton.cdiv(D, tile.BLOCK_D) * max(copies, products) + edges) / costs.clock


def chunked_seconds(
    B: int, L: int, D: int, N: int, element_bytes: int, chunks: int, costs: Costs = COSTS
) -> float:  # fmt: skip
    """What as many chunks take: the product, scores to L2 and back, and what each costs besides."""
    rate = costs.flops if element_bytes == 2 else costs.flops / 16
    scores = B * L * N
    return 2 * scores * D / rate + scores * 2 * element_bytes / costs.cache_bandwidth + chunks * costs.chunk_s


def forward_design(B: int, L: int, D: int, N: int, element_bytes: int, chunks: int, costs: Costs = COSTS) -> str:
    """The cheaper design of the forward, "fused" or "chunked", a function of the shape.

    Images shorter than a run of positions are chunked.
    """
    if L < fused_rows(element_bytes) // RUNS:
        return "chunked"
    fused = fused_seconds(B, L, D, N, element_bytes, costs)
    return "fused" if fused <= chunked_seconds(B, L, D, N, element_bytes, chunks, costs) else "chunked"


@triton.jit
def csra_fused_forward_kernel(
    x_ptr, weight_ptr, scale_ptr, facts_ptr, B, L, D, N, C,
    x_stride_b, x_stride_l, x_stride_d, weight_stride_h, weight_stride_c, weight_stride_d, facts_stride,
    HEADS: tl.constexpr, SHARPNESS: tl.constexpr, HAS_SCALE: tl.constexpr, PARTS: tl.constexpr,
    SEGMENTS: tl.constexpr, ALIGNED: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK_N columns x BLOCK_R positions, of up to SEGMENTS images, and loops over the features.

    GROUP tiles of positions go through the columns together, so that both operands are read again from L2. The
    positions of a thread are one run of BLOCK_R / 4, no longer than an image. The two images that it may touch meet at
    a multiple of ALIGNED positions.
    Writes facts[k, b, part, n] of facts (4, B, PARTS, N), k: maximum, sum of e, sum of e (s - maximum), sum of s,
    which lie facts_stride apart.
    """
    RUN: tl.constexpr = BLOCK_R // 4
    facts_stride = tl.cast(facts_stride, tl.int64)  # three times as much may not fit 32 bits
    pid = tl.program_id(0)
    tiles_r, tiles_n = tl.cdiv(B * L, BLOCK_R), tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP * tiles_n)
    in_group = tl.minimum(tiles_r - group * GROUP, GROUP)
    tile_r = group * GROUP + pid % (GROUP * tiles_n) % in_group
    tile_n = pid % (GROUP * tiles_n) // in_group
    place = tl.arange(0, BLOCK_R)
    # In the sums of a product a thread has places 8 j + 2 q + 0 and 1 of all j, q being its number in a quarter warp.
    offs_r = tile_r * BLOCK_R + place // 2 % 4 * RUN + place // 8 * 2 + place % 2
    offs_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_r, mask_n = offs_r < B * L, offs_n < N
    h = offs_n // C

    x_ptrs = x_ptr + (offs_r // L).to(tl.int64)[None, :] * x_stride_b + (offs_r % L).to(tl.int64)[None, :] * x_stride_l
    weight_ptrs = (
        weight_ptr + h.to(tl.int64)[:, None] * weight_stride_h + (offs_n % C).to(tl.int64)[:, None] * weight_stride_c
    )
    s = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        mask_d = offs_d < D
        weight = tl.load(
            weight_ptrs + offs_d[None, :] * weight_stride_d, mask=mask_n[:, None] & mask_d[None, :], other=0.0
        )
        x = tl.load(x_ptrs + offs_d[:, None] * x_stride_d, mask=mask_d[:, None] & mask_r[None, :], other=0.0)
        s = tl.dot(weight, x, s, input_precision=PRECISION)
    if HAS_SCALE:
        s *= tl.load(scale_ptr + offs_n, mask=mask_n, other=1.0)[:, None]
    sharp = of_head(SHARPNESS, h, HEADS)

    # (columns, runs, neighbours that are of one image, their number): all but the runs are registers of one thread.
    s = tl.permute(tl.reshape(s, (BLOCK_N, BLOCK_R // 8, 4, 2)), (0, 2, 1, 3))
    s = tl.reshape(s, (BLOCK_N, 4, RUN // ALIGNED, ALIGNED))
    start = tile_r * BLOCK_R + tl.arange(0, 4) * RUN
    image = start // L
    first = (tl.arange(0, RUN // ALIGNED)[None, :] * ALIGNED < ((image + 1) * L - start)[:, None])[None, :, :]
    top, t = tl.max(s, axis=3), tl.sum(s, axis=3)
    m_a, m_b = tl.max(tl.where(first, top, LOWEST), axis=2), tl.max(tl.where(first, LOWEST, top), axis=2)
    t_a, t_b = tl.sum(tl.where(first, t, 0.0), axis=2), tl.sum(tl.where(first, 0.0, t), axis=2)
    s -= tl.where(first, m_a[:, :, None], m_b[:, :, None])[:, :, :, None]
    e = tl.exp2(s * sharp[:, None, None, None])
    z, w = tl.sum(e, axis=3), tl.sum(e * s, axis=3)
    z_a, z_b = tl.sum(tl.where(first, z, 0.0), axis=2), tl.sum(tl.where(first, 0.0, z), axis=2)
    w_a, w_b = tl.sum(tl.where(first, w, 0.0), axis=2), tl.sum(tl.where(first, 0.0, w), axis=2)

    first_image = tile_r * BLOCK_R // L
    for i in tl.static_range(SEGMENTS):
        b = first_image + i
        is_a, is_b = (image == b)[None, :], (image + 1 == b)[None, :]
        m_run = tl.where(is_a, m_a, tl.where(is_b, m_b, LOWEST))
        z_run = tl.where(is_a, z_a, tl.where(is_b, z_b, 0.0))
        w_run = tl.where(is_a, w_a, tl.where(is_b, w_b, 0.0))
        m = tl.max(m_run, axis=1)
        down = tl.maximum(m_run - m[:, None], LOWEST)
        f = tl.exp2(down * sharp[:, None])
        z = tl.sum(z_run * f, axis=1)
        w = tl.sum((w_run + z_run * down) * f, axis=1)
        t = tl.sum(tl.where(is_a, t_a, tl.where(is_b, t_b, 0.0)), axis=1)
        facts_ptrs = facts_ptr + (b.to(tl.int64) * PARTS + (tile_r - b * L // BLOCK_R)) * N + offs_n
        exists = mask_n & (b < B) & (b * L < (tile_r + 1) * BLOCK_R)
        tl.store(facts_ptrs, m, mask=exists)
        tl.store(facts_ptrs + facts_stride, z, mask=exists)
        tl.store(facts_ptrs + 2 * facts_stride, w, mask=exists)
        tl.store(facts_ptrs + 3 * facts_stride, t, mask=exists)


@triton.jit
def csra_merge_facts_kernel(
    facts_ptr, bias_ptr, logits_ptr, B, L, C, average, facts_stride, bias_stride_h, bias_stride_c,
    HEADS: tl.constexpr, SHARPNESS: tl.constexpr, INFINITE: tl.constexpr, LAM: tl.constexpr, HAS_BIAS: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK_C classes of one image: merges the facts of the tiles of ROWS positions it touches,
    of all heads at a time, adds the heads up, and the bias.
    """
    facts_stride = tl.cast(facts_stride, tl.int64)  # three times as much may not fit 32 bits
    tiles_c = tl.cdiv(C, BLOCK_C)
    b = (tl.program_id(0) // tiles_c).to(tl.int64)
    offs_c = (tl.program_id(0) % tiles_c * BLOCK_C + tl.arange(0, BLOCK_C)).to(tl.int64)
    h = tl.broadcast_to(tl.arange(0, BLOCK_H)[:, None], (BLOCK_H, BLOCK_C))
    mask = (h < HEADS) & (offs_c < C)[None, :]
    N = HEADS * C
    sharp = of_head(SHARPNESS, h, HEADS)
    touched = ((b + 1) * L - 1) // ROWS - b * L // ROWS + 1
    facts_ptrs = facts_ptr + b * PARTS * N + h.to(tl.int64) * C + offs_c[None, :]
    m = tl.load(facts_ptrs, mask=mask, other=0.0)
    z = tl.load(facts_ptrs + facts_stride, mask=mask, other=1.0)
    w = tl.load(facts_ptrs + 2 * facts_stride, mask=mask, other=0.0)
    t = tl.load(facts_ptrs + 3 * facts_stride, mask=mask, other=0.0)
    for part in range(1, touched):
        at = facts_ptrs + part * N
        m_part = tl.load(at, mask=mask, other=0.0)
        z_part = tl.load(at + facts_stride, mask=mask, other=1.0)
        w_part = tl.load(at + 2 * facts_stride, mask=mask, other=0.0)
        t += tl.load(at + 3 * facts_stride, mask=mask, other=0.0)
        m, z, w = merge(m, z, w, m_part, z_part, w_part, sharp)
    pooled = pooled_of(m, z, w, t, h, average, L, HEADS, INFINITE, LAM)
    if HAS_BIAS:
        bias_ptrs = bias_ptr + h.to(tl.int64) * bias_stride_h + offs_c[None, :] * bias_stride_c
        bias = tl.load(bias_ptrs, mask=mask, other=0.0).to(tl.float32)
        pooled += (average + of_head(LAM, h, HEADS)) * bias
    logits = tl.sum(tl.where(mask, pooled, 0.0), axis=0)
    tl.store(logits_ptr + b * C + offs_c, logits.to(logits_ptr.dtype.element_ty), mask=offs_c < C)


def merged_classes(H: int) -> tuple[int, int]:
    """Heads and classes of a program of the merging kernel: all heads, two numbers of each thread."""
    block_h = triton.next_power_of_2(H)
    return block_h, max(16, 256 // block_h)


def fused_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: Tensor | None,
    temperatures: tuple[float, ...],
    lam: tuple[float, ...],
    average: float,
) -> Tensor:
    """Logits (B, C) of x (B, L, D), weight (H, C, D) and bias (H, C), any strides; the scores of all columns times
    `scale` (H C) fp32.
    """
    (B, L, D), (H, C, _) = x.shape, weight.shape
    N = H * C
    tile = fused_tile(N, x.element_size(), device_of(x))
    if tile.BLOCK_R // RUNS > L:
        raise ValueError(f"the fused forward needs L >= {tile.BLOCK_R // RUNS}, got L = {L}")
    most_parts = parts(L, tile.BLOCK_R)
    facts = torch.empty((4, B, most_parts, N), dtype=torch.float32, device=x.device)
    logits = x.new_empty(B, C)
    block_h, block_c = merged_classes(H)
    with device_guard(x):
        csra_fused_forward_kernel[(triton.cdiv(B * L, tile.BLOCK_R) * triton.cdiv(N, tile.BLOCK_N),)](
            x_ptr=x, weight_ptr=weight, scale_ptr=facts if scale is None else scale, facts_ptr=facts,
            B=B, L=L, D=D, N=N, C=C, x_stride_b=x.stride(0), x_stride_l=x.stride(1), x_stride_d=x.stride(2),
            weight_stride_h=weight.stride(0), weight_stride_c=weight.stride(1), weight_stride_d=weight.stride(2),
            facts_stride=facts.stride(0), HEADS=H, SHARPNESS=sharpness(temperatures), HAS_SCALE=scale is not None,
            PARTS=most_parts, SEGMENTS=segments(L, tile.BLOCK_R), ALIGNED=aligned(L), GROUP=8,
            PRECISION=dot_precision(x),
            **tile.as_kwargs(),
        )  # fmt: skip
        csra_merge_facts_kernel[(B * triton.cdiv(C, block_c),)](
            facts_ptr=facts, bias_ptr=facts if bias is None else bias, logits_ptr=logits, B=B, L=L, C=C,
            average=average, facts_stride=facts.stride(0), bias_stride_h=0 if bias is None else bias.stride(0),
            bias_stride_c=0 if bias is None else bias.stride(1), HEADS=H, SHARPNESS=sharpness(temperatures),
            INFINITE=infinite(temperatures), LAM=lam, HAS_BIAS=bias is not None, PARTS=most_parts, ROWS=tile.BLOCK_R,
            BLOCK_H=block_h, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    return logits
