"""dk and dv of query_attention where the queries do not fit one tile: by tiles of positions.

One program owns a tile of positions of one head and image and walks over tiles of queries; K and V are read once, dk
and dv stay in registers until they are complete, and q, dout and lse, which the programs of an image share, come from
L2 again. Weights and ds are made as in query_attention_backward.py, whose kernel makes dq; so that is two products
more, s and dp, than if one kernel made all three.

Not yet run on a GPU: compiled ahead of time for sm_80 to sm_100, its arithmetic tested in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import triton
import triton.language as tl

from ._device import Device
from ._query_attention import (
    AttentionTile,
    add_product,
    attended_of,
    block,
    delta_of_rows,
    ds_of,
    head_parts,
    kept_weights,
    load_rows,
    products_of_parts,
    sliced_tile,
    store_rows,
    weights_of,
    zero_rows,
)


def keys_tile(G: int, L: int, width: int, element_bytes: int, vector: bool, device: Device) -> AttentionTile:
    """The tile of the kernel of dk and dv, which runs where the queries do not fit one tile."""
    if element_bytes == 4 or width > 128:
        tile = sliced_tile(G, L, width, element_bytes)
        return replace(tile, BLOCK_G=16, num_warps=8) if element_bytes == 4 else tile
    first, second = head_parts(width)
    if device.capability < 90:
        return AttentionTile(16, block(L, 32), first, second, 0, 4, 2)
    if device.capability >= 100:
        # Of 64 queries, whose scores would be made by sm_100's own instruction, Triton 3.6 cannot pipeline the loop.
        return AttentionTile(32, block(L, 64), first, second, 0, 4, 2)
    return AttentionTile(64, block(L, 64), first, second, 0, 8, 2)


@triton.jit
def query_attention_keys_backward_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, key_mask_ptr, seed_ptr, out_ptr, lse_ptr, dk_ptr, dv_ptr,
    G, L, H, scale, threshold, keep_scale, dout_stride_b, dout_stride_g, dout_stride_e,
    q_stride_b, q_stride_g, q_stride_e, k_stride_b, k_stride_l, k_stride_e, v_stride_b, v_stride_l, v_stride_e,
    key_mask_stride_b, key_mask_stride_l,
    WIDTH: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, NEED_DK: tl.constexpr, NEED_DV: tl.constexpr,
    ONE_TILE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_L: tl.constexpr, D0: tl.constexpr,
    D1: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK_L positions of one head and image, D0 + D1 columns of it, and loops over queries."""
    SLICES: tl.constexpr = (WIDTH + D0 + D1 - 1) // (D0 + D1)
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
    k0, k1 = load_rows(k_rows, mask_l, k_stride_e, 0, WIDTH, D0, D1)
    v0, v1 = load_rows(v_rows, mask_l, v_stride_e, 0, WIDTH, D0, D1)
    attended = attended_of(key_mask_ptr + b * key_mask_stride_b, offs_l, mask_l, key_mask_stride_l, HAS_MASK)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    dk0, dk1 = zero_rows(BLOCK_L, D0, D1)
    dv0, dv1 = zero_rows(BLOCK_L, D0, D1)
    for start_g in range(0, G, BLOCK_G):
        offs_g = (start_g + tl.arange(0, BLOCK_G)).to(tl.int64)
        mask_g = offs_g < G
        dout_rows = dout_ptr + offs_g * dout_stride_g
        q_rows = q_ptr + offs_g * q_stride_g
        dout0, dout1 = load_rows(dout_rows, mask_g, dout_stride_e, column, WIDTH, D0, D1)
        q0, q1 = load_rows(q_rows, mask_g, q_stride_e, column, WIDTH, D0, D1)
        lse = tl.load(lse_ptr + (b * H + h) * G + offs_g, mask=mask_g, other=0.0)
        s = products_of_parts(
            q0, q1, k0, k1, q_rows, k_rows, mask_g, mask_l, q_stride_e, k_stride_e, WIDTH, D1, DEPTH, PRECISION,
            BLOCK_G, BLOCK_L,
        )  # fmt: skip
        first_i = ((h * G + offs_g) * L).to(tl.uint32)
        p = weights_of(s * scale, attended, lse, first_i, offs_l, seed, b, threshold, DROPOUT)
        if NEED_DV:
            weights = tl.trans(kept_weights(p, DROPOUT).to(q_ptr.dtype.element_ty))
            dv0, dv1 = add_product(dv0, dv1, weights, dout0, dout1, D1, PRECISION)
        if NEED_DK:
            delta = lse
            if not ONE_TILE:
                out_rows = out_ptr + (b * G + offs_g) * E + h * WIDTH
                delta = delta_of_rows(
                    dout0, dout1, dout_rows, out_rows, mask_g, dout_stride_e, WIDTH, D0, D1, DEPTH, BLOCK_G
                )
            dp = products_of_parts(
                dout0, dout1, v0, v1, dout_rows, v_rows, mask_g, mask_l, dout_stride_e, v_stride_e, WIDTH, D1, DEPTH,
                PRECISION, BLOCK_G, BLOCK_L,
            )  # fmt: skip
            ds = tl.trans(ds_of(p, dp, delta, keep_scale, DROPOUT, ONE_TILE).to(q_ptr.dtype.element_ty))
            dk0, dk1 = add_product(dk0, dk1, ds, q0, q1, D1, PRECISION)
    if NEED_DV:
        dv_rows = dv_ptr + (b * L * E + h * WIDTH) + offs_l * E
        store_rows(dv_rows, mask_l, column, dv0, dv1, keep_scale, WIDTH, D0, D1)
    if NEED_DK:
        dk_rows = dk_ptr + (b * L * E + h * WIDTH) + offs_l * E
        store_rows(dk_rows, mask_l, column, dk0, dk1, scale, WIDTH, D0, D1)


def keys_backward(
    B: int,
    facts: tuple[int, int, int, int, bool, Device],
    need_dk: bool,
    need_dv: bool,
    shared: dict[str, Any],
) -> None:
    """Writes dk and dv where they are needed.

    Args:
        B: Images.
        facts: What `keys_tile` takes.
        need_dk: Whether dk is needed.
        need_dv: Whether dv is needed.
        shared: The arguments of the launch that the kernel of dq has too.
    """
    tile = keys_tile(*facts)
    _, L, width, *_ = facts
    programs = B * shared["H"] * triton.cdiv(L, tile.BLOCK_L) * tile.slices(width)
    query_attention_keys_backward_kernel[(programs,)](
        NEED_DK=need_dk, NEED_DV=need_dv, ONE_TILE=L <= tile.BLOCK_L, **shared, **tile.as_kwargs()
    )
