"""Attention of queries that all images share, forward and backward, without a map (B, H, G, L) in memory.

    s[b, h, g, l] = q_h[g] . k_h[b, l] / sqrt(d),  p = softmax_l(s),  out[b, g] = concat_h sum_l drop(p) v_h[b, l]

Algorithm. One program owns the queries of one head, all of them where G <= 128, and one image; it walks over tiles of
positions with a running maximum and sum, so K and V are read from DRAM once. What it keeps beside `out` is lse, from
which backward makes the weights of a tile again (query_attention_backward.py).

Tiles are (queries, positions). In 16 bits from sm_90 on a tile holds 128 queries (64 of rows that are no vectors),
before that 64, in fp32 32: there the operands of the products fill the registers.

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
(B, G, E), and summed in another pass. Here K and V are read as the projections leave them, (B, L, E) with any strides,
as are q, dout and the key mask, and nothing is copied before or after.

Not yet run on a GPU: compiled ahead of time for sm_80 to sm_100, its arithmetic tested in Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import Device, device_guard, device_of
from ._query_attention import (
    LOG2E,
    AttentionTile,
    arguments,
    attended_of,
    block,
    head_parts,
    kept,
    load_part,
    load_rows,
    products_of_rows,
    sliced_tile,
    store_rows,
    vectorised,
    zero_rows,
)
from .query_attention_backward import query_attention_backward

__all__ = ["query_attention", "query_attention_backward"]


def forward_tile(G: int, L: int, width: int, element_bytes: int, vector: bool, device: Device) -> AttentionTile:
    """The tile of the forward kernel, a function of the shape, the element size, `vectorised` and the device."""
    if element_bytes == 4 or width > 128:
        return sliced_tile(G, L, width, element_bytes)
    first, second = head_parts(width)
    if G <= 32 and device.capability < 90:
        return AttentionTile(block(G, 32), block(L, 32), first, second, 0, 4, 3)
    # The newer instructions take 64 rows at least; their operands are in shared memory, which leaves more registers.
    block_g = 128 if G > 64 and vector else 64
    warps = 8 if block_g > 64 or device.capability >= 100 else 4
    return AttentionTile(block_g, block(L, 64), first, second, 0, warps, 2)


@triton.jit
def query_attention_forward_kernel(
    q_ptr, k_ptr, v_ptr, key_mask_ptr, seed_ptr, out_ptr, lse_ptr, G, L, H, scale, threshold, keep_scale,
    q_stride_b, q_stride_g, q_stride_e, k_stride_b, k_stride_l, k_stride_e, v_stride_b, v_stride_l, v_stride_e,
    key_mask_stride_b, key_mask_stride_l,
    WIDTH: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, ONE_TILE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_L: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DEPTH: tl.constexpr,
):  # fmt: skip
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
    q0, q1 = load_rows(q_rows, mask_g, q_stride_e, 0, WIDTH, D0, D1)
    if DROPOUT:
        seed = tl.load(seed_ptr)
        first_i = ((h * G + offs_g) * L).to(tl.uint32)

    m = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    z = tl.zeros((BLOCK_G,), tl.float32)
    keys = 0
    acc0, acc1 = zero_rows(BLOCK_G, D0, D1)
    if ONE_TILE:
        last_l = BLOCK_L
    else:
        last_l = L
    for start_l in range(0, last_l, BLOCK_L):
        offs_l = (start_l + tl.arange(0, BLOCK_L)).to(tl.int64)
        mask_l = offs_l < L
        k_rows = k_ptr + offs_l * k_stride_l
        v_rows = v_ptr + offs_l * v_stride_l
        s = products_of_rows(
            q0, q1, q_rows, k_rows, mask_g, mask_l, q_stride_e, k_stride_e, WIDTH, D0, D1, DEPTH, PRECISION, BLOCK_G,
            BLOCK_L,
        )  # fmt: skip
        attended = attended_of(key_mask_ptr, offs_l, mask_l, key_mask_stride_l, HAS_MASK)
        if HAS_MASK:
            keys = tl.maximum(keys, tl.max(attended.to(tl.int32), axis=0))
        s = tl.where(attended[None, :], s * scale, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, axis=1))
        # As long as no score is above -inf, differences from 0 instead of from -inf, which would be NaN.
        base = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2((s - base[:, None]) * LOG2E)
        shrink = tl.exp2((m - base) * LOG2E)
        z = z * shrink + tl.sum(p, axis=1)
        m = m_new
        if DROPOUT:
            p = tl.where(kept(first_i, offs_l, seed, b, threshold), p, 0.0)
        p = p.to(v_ptr.dtype.element_ty)
        v0 = load_part(v_rows, mask_l, v_stride_e, column, WIDTH, D0, EXACT)
        acc0 = tl.dot(p, v0, acc0 * shrink[:, None], input_precision=PRECISION)
        if D1 > 0:
            v1 = load_part(v_rows, mask_l, v_stride_e, column + D0, WIDTH, D1, EXACT)
            acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)

    # Scores that are all -inf have no weights, as in softmax; an image without any key gives 0, and -inf in lse.
    z = tl.where(m == float("-inf"), float("nan"), z)
    lse = m + tl.log(z)
    if HAS_MASK:
        z = tl.where(keys > 0, z, 1.0)
        lse = tl.where(keys > 0, lse, float("-inf"))
    inverse = keep_scale / z
    out_rows = out_ptr + (b * G + offs_g) * H * WIDTH + h * WIDTH
    store_rows(out_rows, mask_g, column, acc0, acc1, inverse[:, None], WIDTH, D0, D1)
    tl.store(lse_ptr + (b * H + h) * G + offs_g, lse, mask=mask_g & (column == 0))


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
            **arguments(q, k, v, key_mask, seed, num_heads, dropout_p),
            **tile.as_kwargs(),
        )
    return out, lse
