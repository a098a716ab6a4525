"""Attention of queries that all images share, forward and backward, without a map (B, H, G, L) in memory.

    s[b, h, g, l] = q_h[g] . k_h[b, l] / sqrt(d),  p = softmax_l(s),  out[b, g] = concat_h sum_l drop(p) v_h[b, l]

Algorithm. One program owns the queries of one head, all of them where G <= 128, and one image; it walks over tiles of
positions with a running maximum and sum, so K and V are read from DRAM once. What it keeps beside `out` is lse.
Backward, as long as all queries fit one tile, is one kernel as well:

    p = e^(s - lse);  dv = drop(p)^T dout;  dp = drop'(dout v^T);  ds = p (dp - delta);  dk = ds^T q;  dq += ds k

One program walks over a run of images of one head: q is read once, dk and dv of a tile of positions are complete when
the tile is, and dq stays in registers over all its images. The programs' dq are added in fp32 in a fixed order and
rounded once; nothing is atomic, and the runs depend on the shape alone.
delta = sum_l p dp comes out of the tile itself where one tile holds all positions, and out is then not read; else it is
sum_e dout out. More queries than a tile make two kernels: dq by tiles of queries, (dk, dv) by tiles of positions. In 16
bits from sm_90 on a tile holds 128 queries (64 of rows that are no vectors), before that 64, in fp32 32: there the
operands of the products fill the registers.

Tiles are (queries, positions). Transposed ones, which would save turning p for dv and ds for dk, spill on sm_90: lse
and delta then lie along the columns, 16 registers each instead of 2, and p and ds go through shared memory anyway.

A head is cut in two powers of two, 96 = 64 + 32, where a tile of 128 would be a quarter empty. In fp32, and for heads
wider than 128, the scores are instead summed over slices of features that are read again for every tile, and of a wide
head each program makes 128 columns of the results.

Dropout is a hash of the seed, the image and the place in (H, G, L), computed anew in backward: no mask in memory.

Bytes, bf16, forward and backward, if every operand is read once and every result written once:

    voc          B=64   L=196  G=20     41 MB     81 MB
    coco         B=64   L=196  G=80     47 MB     93 MB
    coco-vit     B=64   L=784  G=80    162 MB    324 MB
    imagenet     B=256  L=49   G=100    78 MB    156 MB
    openimages   B=128  L=49   G=100    39 MB     78 MB

Why not scaled_dot_product_attention. It wants queries per image: the gradient of an expanded q is made whole,
(B, G, E), and summed in another pass. Its backward reads out and dout for delta in a kernel of its own, and the
programs of different positions then add to dq in device memory. Here K and V are read as the projections leave them,
(B, L, E) with any strides, as are q, dout and the key mask, and nothing is copied before or after.

Not yet run on a GPU: compiled ahead of time for sm_80 to sm_100, its arithmetic tested in Triton's interpreter.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import Device, device_guard, device_of, dot_precision
from ._dropout import dropout_arguments, image_keys, survives

LOG2E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class AttentionTile:
    """Launch configuration of one kernel.

    Args:
        BLOCK_G: Queries of a tile.
        BLOCK_L: Positions of a tile.
        D0: Features of a head in the first part of the results, a power of two.
        D1: Those in the second part, a power of two or 0.
        DEPTH: Features of a slice where the scores are summed over slices; 0 where q and k are held whole.
        num_warps: Warps of a program.
        num_stages: Stages of the pipelined loads.
    """

    BLOCK_G: int
    BLOCK_L: int
    D0: int
    D1: int
    DEPTH: int
    num_warps: int
    num_stages: int

    def as_kwargs(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return asdict(self)

    def slices(self, width: int) -> int:
        """How many programs share the columns of a head."""
        return triton.cdiv(width, self.D0 + self.D1)


def head_parts(width: int) -> tuple[int, int]:
    """Two powers of two, at least 16, that cover the width of a head; the second is 0 where one is enough."""
    first = max(16, 1 << (width.bit_length() - 1))
    rest = width - first
    return first, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


def _block(size: int, most: int) -> int:
    """The power of two that covers `size`, from 16 (the least that tl.dot takes) to `most`."""
    return max(16, min(most, triton.next_power_of_2(max(size, 1))))


def vectorised(width: int, *tensors: Tensor) -> bool:
    """Whether Triton loads these 16 bytes at a time: contiguous rows, and heads and rows of whole 16 elements."""
    return width % 16 == 0 and all(
        t.stride(-1) == 1 and not (t.stride(0) | t.stride(-2) | t.storage_offset()) % 16 for t in tensors
    )


def forward_tile(G: int, L: int, width: int, element_bytes: int, vector: bool, device: Device) -> AttentionTile:
    """The tile of the forward kernel, a function of the shape, the element size, `vectorised` and the device."""
    if element_bytes == 4 or width > 128:
        return _sliced_tile(G, L, width, element_bytes)
    first, second = head_parts(width)
    if G <= 32 and device.capability < 90:
        return AttentionTile(_block(G, 32), _block(L, 32), first, second, 0, 4, 3)
    # The newer instructions take 64 rows at least; their operands are in shared memory, which leaves more registers.
    block_g = 128 if G > 64 and vector else 64
    warps = 8 if block_g > 64 or device.capability >= 100 else 4
    return AttentionTile(block_g, _block(L, 64), first, second, 0, warps, 2)


def backward_tile(G: int, L: int, width: int, element_bytes: int, vector: bool, device: Device) -> AttentionTile:
    """The tile of the backward kernel, of dq alone where BLOCK_G < G."""
    if element_bytes == 4 or width > 128:
        return _sliced_tile(G, L, width, element_bytes)
    first, second = head_parts(width)
    if device.capability < 90:
        # The older instruction takes its operands from registers, q and dout each in two layouts.
        if G <= 64:
            return AttentionTile(_block(G, 64), 16, first, second, 0, 4, 2)
        return AttentionTile(64, _block(L, 32), first, second, 0, 8, 2)
    # Three stages take 197 KB of an H100's 227 KB with 128 queries of 96 features.
    stages = 3 if first + second <= 96 else 2
    if G <= 64 or not vector:
        return AttentionTile(64, _block(L, 64), first, second, 0, 8, stages)
    # On sm_100 the accumulators come out of another memory into registers, and 64 positions would spill.
    return AttentionTile(128, _block(L, 64 if device.capability < 100 else 32), first, second, 0, 8, stages)


def keys_tile(G: int, L: int, width: int, element_bytes: int, vector: bool, device: Device) -> AttentionTile:
    """The tile of the kernel of dk and dv, which runs where the queries do not fit one tile."""
    if element_bytes == 4 or width > 128:
        tile = _sliced_tile(G, L, width, element_bytes)
        return replace(tile, BLOCK_G=16, num_warps=8) if element_bytes == 4 else tile
    first, second = head_parts(width)
    if device.capability < 90:
        return AttentionTile(16, _block(L, 32), first, second, 0, 4, 2)
    if device.capability >= 100:
        # Of 64 queries, whose scores would be made by sm_100's own instruction, Triton 3.6 cannot pipeline the loop.
        return AttentionTile(32, _block(L, 64), first, second, 0, 4, 2)
    return AttentionTile(64, _block(L, 64), first, second, 0, 8, 2)


def _sliced_tile(G: int, L: int, width: int, element_bytes: int) -> AttentionTile:
    first, second = head_parts(width) if width <= 128 else (128, 0)
    if element_bytes == 4:
        return AttentionTile(_block(G, 32), 16, first, second, 16, 4, 1)
    return AttentionTile(_block(G, 64), _block(L, 64), first, second, 64, 8, 2)


def images_per_program(B: int, H: int) -> int:
    """How many images a program of the backward kernel adds up in dq: about 264 programs, two for each SM of an H100.

    A function of the shape alone, so that the sum is the same on every machine.
    """
    return max(1, B * H // 264)


@triton.jit
def _load_rows(rows_ptr, mask_rows, stride_e, first, WIDTH: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """SIZE features from `first` on of rows given by pointers (N,): (N, SIZE), 0 outside; EXACT: all of them exist."""
    offs_d = first + tl.arange(0, SIZE)
    mask = mask_rows[:, None]
    if not EXACT:
        mask = mask & (offs_d < WIDTH)[None, :]
    return tl.load(rows_ptr[:, None] + offs_d.to(tl.int64)[None, :] * stride_e, mask=mask, other=0.0)


@triton.jit
def _store_rows(rows_ptr, mask_rows, first, values, WIDTH: tl.constexpr, SIZE: tl.constexpr, EXACT: tl.constexpr):
    """Rounds `values` (N, SIZE) into contiguous rows given by pointers (N,)."""
    offs_d = first + tl.arange(0, SIZE)
    mask = mask_rows[:, None]
    if not EXACT:
        mask = mask & (offs_d < WIDTH)[None, :]
    tl.store(rows_ptr[:, None] + offs_d[None, :], values.to(rows_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _product_of_rows(
    a_rows,
    b_rows,
    mask_a,
    mask_b,
    a_stride_e,
    b_stride_e,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """The products (BLOCK_A, BLOCK_B) of rows given by pointers, summed over slices of DEPTH features."""
    product = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    for first in range(0, WIDTH, DEPTH):
        a = _load_rows(a_rows, mask_a, a_stride_e, first, WIDTH, DEPTH, WIDTH % DEPTH == 0)
        b = _load_rows(b_rows, mask_b, b_stride_e, first, WIDTH, DEPTH, WIDTH % DEPTH == 0)
        product = tl.dot(a, tl.trans(b), product, input_precision=PRECISION)
    return product


@triton.jit
def _delta_of_rows(
    dout_rows,
    out_rows,
    mask_g,
    dout_stride_e,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """The sums of dout out over the features of a head, of rows given by pointers."""
    delta = tl.zeros((BLOCK_G,), tl.float32)
    for first in range(0, WIDTH, DEPTH):
        dout = _load_rows(dout_rows, mask_g, dout_stride_e, first, WIDTH, DEPTH, WIDTH % DEPTH == 0)
        out = _load_rows(out_rows, mask_g, 1, first, WIDTH, DEPTH, WIDTH % DEPTH == 0)
        delta += tl.sum(dout.to(tl.float32) * out.to(tl.float32), axis=1)
    return delta


@triton.jit
def _kept(i, seed, b, threshold):
    """Which of the weights with the numbers i (uint32) of an image survive."""
    key0, key1 = image_keys(seed, b)
    return survives(i, key0, key1, threshold)


@triton.jit
def _attended(key_mask_ptr, offs_l, mask_l, key_mask_stride_l, HAS_MASK: tl.constexpr):
    """Which positions of a tile exist and may be attended."""
    attended = mask_l
    if HAS_MASK:
        attended = tl.load(key_mask_ptr + offs_l * key_mask_stride_l, mask=mask_l, other=0) != 0
    return attended


@triton.jit
def _weights(s, attended, lse, i, seed, b, threshold, DROPOUT: tl.constexpr):
    """The weights of scores (queries, positions), those that dropout drops with a minus sign; 0 for -inf in lse.

    Only the difference is turned to base 2: it is smaller than s and lse, so less is rounded off.
    """
    below = tl.where(attended[None, :], s, float("-inf")) - tl.where(lse == float("-inf"), 0.0, lse)[:, None]
    p = tl.exp2(below * LOG2E)
    if DROPOUT:
        p = tl.where(_kept(i, seed, b, threshold), p, -p)
    return p


@triton.jit
def _kept_weights(p, DROPOUT: tl.constexpr):
    """The weights after dropout, but for its scale, of those of `_weights`."""
    return tl.where(p < 0.0, 0.0, p) if DROPOUT else p


@triton.jit
def _ds(p, dp, delta, keep_scale, DROPOUT: tl.constexpr, ONE_TILE: tl.constexpr):
    """The product p (drop'(dp) - delta) for the weights of `_weights`; ONE_TILE: delta is the sum over the tile."""
    if DROPOUT:
        dp = tl.where(p < 0.0, 0.0, dp * keep_scale)
        p = tl.abs(p)
    if ONE_TILE:
        delta = tl.sum(p * dp, axis=1)
    return p * (dp - delta[:, None])


@triton.jit
def query_attention_forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    G,
    L,
    H,
    scale,
    threshold,
    keep_scale,
    q_stride_b,
    q_stride_g,
    q_stride_e,
    k_stride_b,
    k_stride_l,
    k_stride_e,
    v_stride_b,
    v_stride_l,
    v_stride_e,
    key_mask_stride_b,
    key_mask_stride_l,
    WIDTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_L: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program handles BLOCK_G queries of one head and image, D0 + D1 columns of it, and loops over positions.

    lse is (B, H, G).
    """
    SLICES: tl.constexpr = (WIDTH + D0 + D1 - 1) // (D0 + D1)
    EXACT: tl.constexpr = WIDTH % (D0 + D1) == 0
    pid = tl.program_id(0)
    tiles_g = tl.cdiv(G, BLOCK_G)
    column = pid % SLICES * (D0 + D1)
    tile_g = pid // SLICES % tiles_g
    h = (pid // (SLICES * tiles_g) % H).to(tl.int64)
    b = (pid // (SLICES * tiles_g * H)).to(tl.int64)
    offs_g = (tile_g * BLOCK_G + tl.arange(0, BLOCK_G)).to(tl.int64)
    mask_g = offs_g < G

    q_rows = q_ptr + b * q_stride_b + h * WIDTH * q_stride_e + offs_g * q_stride_g
    k_ptr += b * k_stride_b + h * WIDTH * k_stride_e
    v_ptr += b * v_stride_b + h * WIDTH * v_stride_e
    key_mask_ptr += b * key_mask_stride_b
    if DEPTH == 0:
        q0 = _load_rows(q_rows, mask_g, q_stride_e, 0, WIDTH, D0, EXACT)
        if D1 > 0:
            q1 = _load_rows(q_rows, mask_g, q_stride_e, D0, WIDTH, D1, EXACT)
    if DROPOUT:
        seed = tl.load(seed_ptr)
        first_i = ((h * G + offs_g) * L).to(tl.uint32)

    m = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    z = tl.zeros((BLOCK_G,), tl.float32)
    acc0 = tl.zeros((BLOCK_G, D0), tl.float32)
    if D1 > 0:
        acc1 = tl.zeros((BLOCK_G, D1), tl.float32)
    if ONE_TILE:
        last_l = BLOCK_L
    else:
        last_l = L
    for start_l in range(0, last_l, BLOCK_L):
        offs_l = (start_l + tl.arange(0, BLOCK_L)).to(tl.int64)
        mask_l = offs_l < L
        k_rows = k_ptr + offs_l * k_stride_l
        v_rows = v_ptr + offs_l * v_stride_l
        if DEPTH == 0:
            k0 = _load_rows(k_rows, mask_l, k_stride_e, 0, WIDTH, D0, EXACT)
            s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
            if D1 > 0:
                k1 = _load_rows(k_rows, mask_l, k_stride_e, D0, WIDTH, D1, EXACT)
                s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
        else:
            s = _product_of_rows(
                q_rows, k_rows, mask_g, mask_l, q_stride_e, k_stride_e, WIDTH, DEPTH, PRECISION, BLOCK_G, BLOCK_L
            )
        attended = _attended(key_mask_ptr, offs_l, mask_l, key_mask_stride_l, HAS_MASK)
        s = tl.where(attended[None, :], s * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        # As long as no position was attended, differences from 0 instead of from -inf, which would be NaN.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2((s - base[:, None]) * LOG2E)
        shrink = tl.exp2((m - base) * LOG2E)
        z = z * shrink + tl.sum(p, axis=1)
        m = m_new
        if DROPOUT:
            p = tl.where(_kept(first_i[:, None] + offs_l.to(tl.uint32)[None, :], seed, b, threshold), p, 0.0)
        p = p.to(v_ptr.dtype.element_ty)
        v0 = _load_rows(v_rows, mask_l, v_stride_e, column, WIDTH, D0, EXACT)
        acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION)
        if D1 > 0:
            v1 = _load_rows(v_rows, mask_l, v_stride_e, column + D0, WIDTH, D1, EXACT)
            acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)

    has_keys = z != 0.0
    z = tl.where(has_keys, z, 1.0)
    inverse = keep_scale / z
    out_rows = out_ptr + (b * G + offs_g) * H * WIDTH + h * WIDTH
    _store_rows(out_rows, mask_g, column, acc0 * inverse[:, None], WIDTH, D0, EXACT)
    if D1 > 0:
        _store_rows(out_rows, mask_g, column + D0, acc1 * inverse[:, None], WIDTH, D1, EXACT)
    lse = tl.where(has_keys, m + tl.log(z), float("-inf"))
    tl.store(lse_ptr + (b * H + h) * G + offs_g, lse, mask=mask_g & (column == 0))


@triton.jit
def query_attention_backward_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    B,
    G,
    L,
    H,
    images,
    scale,
    threshold,
    keep_scale,
    dout_stride_b,
    dout_stride_g,
    dout_stride_e,
    q_stride_b,
    q_stride_g,
    q_stride_e,
    k_stride_b,
    k_stride_l,
    k_stride_e,
    v_stride_b,
    v_stride_l,
    v_stride_e,
    key_mask_stride_b,
    key_mask_stride_l,
    WIDTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEED_DQ: tl.constexpr,
    NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_L: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program handles BLOCK_G queries of one head, D0 + D1 columns of it, and loops over a run of `images` images.

    The images of a run have the same queries. dk and dv are complete only if all queries are in the tile. Run r writes
    dq[r] of dq (runs, G, E).
    ONE_TILE: a tile holds all positions.
    """
    SLICES: tl.constexpr = (WIDTH + D0 + D1 - 1) // (D0 + D1)
    EXACT: tl.constexpr = WIDTH % (D0 + D1) == 0
    pid = tl.program_id(0)
    tiles_g = tl.cdiv(G, BLOCK_G)
    column = pid % SLICES * (D0 + D1)
    tile_g = pid // SLICES % tiles_g
    h = (pid // (SLICES * tiles_g) % H).to(tl.int64)
    run = (pid // (SLICES * tiles_g * H)).to(tl.int64)
    E = H * WIDTH
    offs_g = (tile_g * BLOCK_G + tl.arange(0, BLOCK_G)).to(tl.int64)
    mask_g = offs_g < G
    first_b = run * images
    last_b = tl.minimum(first_b + images, B)

    q_rows = q_ptr + first_b * q_stride_b + h * WIDTH * q_stride_e + offs_g * q_stride_g
    if DEPTH == 0 or NEED_DK:
        q0 = _load_rows(q_rows, mask_g, q_stride_e, column, WIDTH, D0, EXACT)
        if D1 > 0:
            q1 = _load_rows(q_rows, mask_g, q_stride_e, column + D0, WIDTH, D1, EXACT)
    if NEED_DQ:
        dq0 = tl.zeros((BLOCK_G, D0), tl.float32)
        if D1 > 0:
            dq1 = tl.zeros((BLOCK_G, D1), tl.float32)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
        first_i = ((h * G + offs_g) * L).to(tl.uint32)
    if ONE_TILE:
        last_l = BLOCK_L
    else:
        last_l = L

    for b in range(first_b, last_b):
        dout_rows = dout_ptr + b * dout_stride_b + h * WIDTH * dout_stride_e + offs_g * dout_stride_g
        if DEPTH == 0 or NEED_DV:
            dout0 = _load_rows(dout_rows, mask_g, dout_stride_e, column, WIDTH, D0, EXACT)
            if D1 > 0:
                dout1 = _load_rows(dout_rows, mask_g, dout_stride_e, column + D0, WIDTH, D1, EXACT)
        lse = tl.load(lse_ptr + (b * H + h) * G + offs_g, mask=mask_g, other=0.0)
        delta = lse
        if (NEED_DQ or NEED_DK) and not ONE_TILE:
            out_rows = out_ptr + (b * G + offs_g) * E + h * WIDTH
            if DEPTH == 0:
                out0 = _load_rows(out_rows, mask_g, 1, column, WIDTH, D0, EXACT)
                delta = tl.sum(dout0.to(tl.float32) * out0.to(tl.float32), axis=1)
                if D1 > 0:
                    out1 = _load_rows(out_rows, mask_g, 1, column + D0, WIDTH, D1, EXACT)
                    delta += tl.sum(dout1.to(tl.float32) * out1.to(tl.float32), axis=1)
            else:
                delta = _delta_of_rows(dout_rows, out_rows, mask_g, dout_stride_e, WIDTH, DEPTH, BLOCK_G)
        for start_l in range(0, last_l, BLOCK_L):
            offs_l = (start_l + tl.arange(0, BLOCK_L)).to(tl.int64)
            mask_l = offs_l < L
            k_rows = k_ptr + b * k_stride_b + h * WIDTH * k_stride_e + offs_l * k_stride_l
            v_rows = v_ptr + b * v_stride_b + h * WIDTH * v_stride_e + offs_l * v_stride_l
            if DEPTH == 0 or NEED_DQ:
                k0 = _load_rows(k_rows, mask_l, k_stride_e, column, WIDTH, D0, EXACT)
                if D1 > 0:
                    k1 = _load_rows(k_rows, mask_l, k_stride_e, column + D0, WIDTH, D1, EXACT)
            if DEPTH == 0:
                s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
                if D1 > 0:
                    s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
            else:
                s = _product_of_rows(
                    q_rows, k_rows, mask_g, mask_l, q_stride_e, k_stride_e, WIDTH, DEPTH, PRECISION, BLOCK_G, BLOCK_L
                )
            attended = _attended(key_mask_ptr + b * key_mask_stride_b, offs_l, mask_l, key_mask_stride_l, HAS_MASK)
            i = 0
            if DROPOUT:
                i = first_i[:, None] + offs_l.to(tl.uint32)[None, :]
            p = _weights(s * scale, attended, lse, i, seed, b, threshold, DROPOUT)
            if NEED_DV:
                weights = tl.trans(_kept_weights(p, DROPOUT).to(q_ptr.dtype.element_ty))
                dv_rows = dv_ptr + (b * L * E + h * WIDTH) + offs_l * E
                dv0 = tl.dot(weights, dout0, input_precision=PRECISION)
                _store_rows(dv_rows, mask_l, column, dv0 * keep_scale, WIDTH, D0, EXACT)
                if D1 > 0:
                    dv1 = tl.dot(weights, dout1, input_precision=PRECISION)
                    _store_rows(dv_rows, mask_l, column + D0, dv1 * keep_scale, WIDTH, D1, EXACT)
            if NEED_DQ or NEED_DK:
                if DEPTH == 0:
                    v0 = _load_rows(v_rows, mask_l, v_stride_e, column, WIDTH, D0, EXACT)
                    dp = tl.dot(dout0, tl.trans(v0), input_precision=PRECISION)
                    if D1 > 0:
                        v1 = _load_rows(v_rows, mask_l, v_stride_e, column + D0, WIDTH, D1, EXACT)
                        dp = tl.dot(dout1, tl.trans(v1), dp, input_precision=PRECISION)
                else:
                    dp = _product_of_rows(
                        dout_rows,
                        v_rows,
                        mask_g,
                        mask_l,
                        dout_stride_e,
                        v_stride_e,
                        WIDTH,
                        DEPTH,
                        PRECISION,
                        BLOCK_G,
                        BLOCK_L,
                    )
                ds = _ds(p, dp, delta, keep_scale, DROPOUT, ONE_TILE).to(q_ptr.dtype.element_ty)
                if NEED_DK:
                    dk_rows = dk_ptr + (b * L * E + h * WIDTH) + offs_l * E
                    dk0 = tl.dot(tl.trans(ds), q0, input_precision=PRECISION)
                    _store_rows(dk_rows, mask_l, column, dk0 * scale, WIDTH, D0, EXACT)
                    if D1 > 0:
                        dk1 = tl.dot(tl.trans(ds), q1, input_precision=PRECISION)
                        _store_rows(dk_rows, mask_l, column + D0, dk1 * scale, WIDTH, D1, EXACT)
                if NEED_DQ:
                    dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
                    if D1 > 0:
                        dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    if NEED_DQ:
        dq_rows = dq_ptr + (run * G + offs_g) * E + h * WIDTH
        _store_rows(dq_rows, mask_g, column, dq0 * scale, WIDTH, D0, EXACT)
        if D1 > 0:
            _store_rows(dq_rows, mask_g, column + D0, dq1 * scale, WIDTH, D1, EXACT)


@triton.jit
def query_attention_keys_backward_kernel(
    dout_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    key_mask_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    dk_ptr,
    dv_ptr,
    G,
    L,
    H,
    scale,
    threshold,
    keep_scale,
    dout_stride_b,
    dout_stride_g,
    dout_stride_e,
    q_stride_b,
    q_stride_g,
    q_stride_e,
    k_stride_b,
    k_stride_l,
    k_stride_e,
    v_stride_b,
    v_stride_l,
    v_stride_e,
    key_mask_stride_b,
    key_mask_stride_l,
    WIDTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DROPOUT: tl.constexpr,
    NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr,
    ONE_TILE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_L: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One program handles BLOCK_L positions of one head and image, D0 + D1 columns of it, and loops over queries."""
    SLICES: tl.constexpr = (WIDTH + D0 + D1 - 1) // (D0 + D1)
    EXACT: tl.constexpr = WIDTH % (D0 + D1) == 0
    pid = tl.program_id(0)
    tiles_l = tl.cdiv(L, BLOCK_L)
    column = pid % SLICES * (D0 + D1)
    tile_l = pid // SLICES % tiles_l
    h = (pid // (SLICES * tiles_l) % H).to(tl.int64)
    b = (pid // (SLICES * tiles_l * H)).to(tl.int64)
    E = H * WIDTH
    offs_l = (tile_l * BLOCK_L + tl.arange(0, BLOCK_L)).to(tl.int64)
    mask_l = offs_l < L

    dout_ptr += b * dout_stride_b + h * WIDTH * dout_stride_e
    q_ptr += b * q_stride_b + h * WIDTH * q_stride_e
    k_rows = k_ptr + b * k_stride_b + h * WIDTH * k_stride_e + offs_l * k_stride_l
    v_rows = v_ptr + b * v_stride_b + h * WIDTH * v_stride_e + offs_l * v_stride_l
    if DEPTH == 0:
        k0 = _load_rows(k_rows, mask_l, k_stride_e, 0, WIDTH, D0, EXACT)
        v0 = _load_rows(v_rows, mask_l, v_stride_e, 0, WIDTH, D0, EXACT)
        if D1 > 0:
            k1 = _load_rows(k_rows, mask_l, k_stride_e, D0, WIDTH, D1, EXACT)
            v1 = _load_rows(v_rows, mask_l, v_stride_e, D0, WIDTH, D1, EXACT)
    attended = _attended(key_mask_ptr + b * key_mask_stride_b, offs_l, mask_l, key_mask_stride_l, HAS_MASK)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    dk0 = tl.zeros((BLOCK_L, D0), tl.float32)
    dv0 = tl.zeros((BLOCK_L, D0), tl.float32)
    if D1 > 0:
        dk1 = tl.zeros((BLOCK_L, D1), tl.float32)
        dv1 = tl.zeros((BLOCK_L, D1), tl.float32)
    for start_g in range(0, G, BLOCK_G):
        offs_g = (start_g + tl.arange(0, BLOCK_G)).to(tl.int64)
        mask_g = offs_g < G
        dout_rows = dout_ptr + offs_g * dout_stride_g
        q_rows = q_ptr + offs_g * q_stride_g
        dout0 = _load_rows(dout_rows, mask_g, dout_stride_e, column, WIDTH, D0, EXACT)
        q0 = _load_rows(q_rows, mask_g, q_stride_e, column, WIDTH, D0, EXACT)
        if D1 > 0:
            dout1 = _load_rows(dout_rows, mask_g, dout_stride_e, column + D0, WIDTH, D1, EXACT)
            q1 = _load_rows(q_rows, mask_g, q_stride_e, column + D0, WIDTH, D1, EXACT)
        lse = tl.load(lse_ptr + (b * H + h) * G + offs_g, mask=mask_g, other=0.0)
        if DEPTH == 0:
            s = tl.dot(q0, tl.trans(k0), input_precision=PRECISION)
            if D1 > 0:
                s = tl.dot(q1, tl.trans(k1), s, input_precision=PRECISION)
        else:
            s = _product_of_rows(
                q_rows, k_rows, mask_g, mask_l, q_stride_e, k_stride_e, WIDTH, DEPTH, PRECISION, BLOCK_G, BLOCK_L
            )
        i = 0
        if DROPOUT:
            i = ((h * G + offs_g) * L).to(tl.uint32)[:, None] + offs_l.to(tl.uint32)[None, :]
        p = _weights(s * scale, attended, lse, i, seed, b, threshold, DROPOUT)
        if NEED_DV:
            weights = tl.trans(_kept_weights(p, DROPOUT).to(q_ptr.dtype.element_ty))
            dv0 = tl.dot(weights, dout0, dv0, input_precision=PRECISION)
            if D1 > 0:
                dv1 = tl.dot(weights, dout1, dv1, input_precision=PRECISION)
        if NEED_DK:
            delta = lse
            if not ONE_TILE:
                out_rows = out_ptr + (b * G + offs_g) * E + h * WIDTH
                if DEPTH == 0:
                    out0 = _load_rows(out_rows, mask_g, 1, 0, WIDTH, D0, EXACT)
                    delta = tl.sum(dout0.to(tl.float32) * out0.to(tl.float32), axis=1)
                    if D1 > 0:
                        out1 = _load_rows(out_rows, mask_g, 1, D0, WIDTH, D1, EXACT)
                        delta += tl.sum(dout1.to(tl.float32) * out1.to(tl.float32), axis=1)
                else:
                    delta = _delta_of_rows(dout_rows, out_rows, mask_g, dout_stride_e, WIDTH, DEPTH, BLOCK_G)
            if DEPTH == 0:
                dp = tl.dot(dout0, tl.trans(v0), input_precision=PRECISION)
                if D1 > 0:
                    dp = tl.dot(dout1, tl.trans(v1), dp, input_precision=PRECISION)
            else:
                dp = _product_of_rows(
                    dout_rows,
                    v_rows,
                    mask_g,
                    mask_l,
                    dout_stride_e,
                    v_stride_e,
                    WIDTH,
                    DEPTH,
                    PRECISION,
                    BLOCK_G,
                    BLOCK_L,
                )
            ds = tl.trans(_ds(p, dp, delta, keep_scale, DROPOUT, ONE_TILE).to(q_ptr.dtype.element_ty))
            dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
            if D1 > 0:
                dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
    if NEED_DV:
        dv_rows = dv_ptr + (b * L * E + h * WIDTH) + offs_l * E
        _store_rows(dv_rows, mask_l, column, dv0 * keep_scale, WIDTH, D0, EXACT)
        if D1 > 0:
            _store_rows(dv_rows, mask_l, column + D0, dv1 * keep_scale, WIDTH, D1, EXACT)
    if NEED_DK:
        dk_rows = dk_ptr + (b * L * E + h * WIDTH) + offs_l * E
        _store_rows(dk_rows, mask_l, column, dk0 * scale, WIDTH, D0, EXACT)
        if D1 > 0:
            _store_rows(dk_rows, mask_l, column + D0, dk1 * scale, WIDTH, D1, EXACT)


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    dropout_p: float,
) -> dict[str, Any]:
    """What all launches share."""
    width = q.shape[-1] // num_heads
    return {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "key_mask_ptr": k if key_mask is None else key_mask,
        "G": q.shape[-2],
        "L": k.shape[1],
        "H": num_heads,
        "scale": 1.0 / math.sqrt(width),
        "q_stride_b": 0 if q.ndim == 2 else q.stride(0),
        "q_stride_g": q.stride(-2),
        "q_stride_e": q.stride(-1),
        "k_stride_b": k.stride(0),
        "k_stride_l": k.stride(1),
        "k_stride_e": k.stride(2),
        "v_stride_b": v.stride(0),
        "v_stride_l": v.stride(1),
        "v_stride_e": v.stride(2),
        "key_mask_stride_b": 0 if key_mask is None else key_mask.stride(0),
        "key_mask_stride_l": 0 if key_mask is None else key_mask.stride(1),
        "WIDTH": width,
        "HAS_MASK": key_mask is not None,
        "PRECISION": dot_precision(q),
        **dropout_arguments(seed, dropout_p, k),
    }


def query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """Out (B, G, E) and lse (B, H, G) in fp32, of q (G, E) or (B, G, E), k and v (B, L, E), all of any strides."""
    (B, L, E), G, H = k.shape, q.shape[-2], num_heads
    out = torch.empty((B, G, E), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, G), dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    width = E // H
    tile = forward_tile(G, L, width, q.element_size(), vectorised(width, q, k, v), device_of(q))
    with device_guard(q):
        query_attention_forward_kernel[(B * H * triton.cdiv(G, tile.BLOCK_G) * tile.slices(width),)](
            out_ptr=out,
            lse_ptr=lse,
            ONE_TILE=L <= tile.BLOCK_L,
            **_arguments(q, k, v, key_mask, seed, num_heads, dropout_p),
            **tile.as_kwargs(),
        )
    return out, lse


def query_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    dropout_p: float,
    out: Tensor,
    lse: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (dq, dk, dv) of `query_attention`, contiguous; those not needed are empty tensors.

    `out` and `lse` are the results of the forward, contiguous.
    """
    (B, L, E), G, H = k.shape, q.shape[-2], num_heads
    need_dq, need_dk, need_dv = needs
    none = q.new_empty(0)
    if dout.numel() == 0:
        return tuple(
            torch.zeros(t.shape, dtype=q.dtype, device=q.device) if need else none
            for t, need in zip((q, k, v), needs, strict=True)
        )  # type: ignore[return-value]
    width = E // H
    facts = (G, L, width, q.element_size(), vectorised(width, dout, q, k, v), device_of(q))
    tile = backward_tile(*facts)
    together = tile.BLOCK_G >= G
    images = images_per_program(B, H) if q.ndim == 2 else 1
    runs = triton.cdiv(B, images)
    partial = q.ndim == 2 and runs > 1
    dq = torch.empty((runs, G, E), dtype=torch.float32 if partial else q.dtype, device=q.device) if need_dq else none
    dk = torch.empty((B, L, E), dtype=q.dtype, device=q.device) if need_dk else none
    dv = torch.empty((B, L, E), dtype=q.dtype, device=q.device) if need_dv else none
    arguments = {
        **_arguments(q, k, v, key_mask, seed, num_heads, dropout_p),
        "dout_ptr": dout,
        "out_ptr": out,
        "lse_ptr": lse,
        "dk_ptr": dk,
        "dv_ptr": dv,
        "dout_stride_b": dout.stride(0),
        "dout_stride_g": dout.stride(1),
        "dout_stride_e": dout.stride(2),
    }
    with device_guard(q):
        if need_dq or (together and (need_dk or need_dv)):
            query_attention_backward_kernel[(runs * H * triton.cdiv(G, tile.BLOCK_G) * tile.slices(width),)](
                dq_ptr=dq,
                B=B,
                images=images,
                NEED_DQ=need_dq,
                NEED_DK=need_dk and together,
                NEED_DV=need_dv and together,
                ONE_TILE=L <= tile.BLOCK_L,
                **arguments,
                **tile.as_kwargs(),
            )
        if not together and (need_dk or need_dv):
            tile = keys_tile(*facts)
            query_attention_keys_backward_kernel[(B * H * triton.cdiv(L, tile.BLOCK_L) * tile.slices(width),)](
                NEED_DK=need_dk,
                NEED_DV=need_dv,
                ONE_TILE=L <= tile.BLOCK_L,
                **arguments,
                **tile.as_kwargs(),
            )
    if need_dq and q.ndim == 2:
        dq = dq.sum(0).to(q.dtype) if partial else dq.squeeze(0)
    return dq, dk, dv
