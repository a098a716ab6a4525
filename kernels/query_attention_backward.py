"""The backward of query_attention: the gradients dq, dk, dv from lse, and where they need it from `out`.

As long as all queries fit one tile, all three are made by one kernel:

    p = e^(s - lse);  dv = drop(p)^T dout;  dp = drop'(dout v^T);  ds = p (dp - delta);  dk = ds^T q;  dq += ds k

One program walks over a run of images of one head: q is read once, dk and dv of a tile of positions are complete when
the tile is, and dq stays in registers over all its images. The programs' dq are added in fp32 in a fixed order and
rounded once; nothing is atomic, and the runs depend on the shape alone.
delta = sum_l p dp comes out of the tile itself where one tile holds all positions, and out is then not read; else it is
sum_e dout out. More queries than a tile make two kernels: this one makes dq by tiles of queries, and that of
query_attention_keys_backward.py (dk, dv) by tiles of positions.

Tiles are (queries, positions). Transposed ones, which would save turning p for dv and ds for dk, spill on sm_90: lse
and delta then lie along the columns, 16 registers each instead of 2, and p and ds go through shared memory anyway.

Bytes. q, k, v and dout are read once, dk and dv written once, dq once for each run in fp32. The backward of
scaled_dot_product_attention reads out and dout for delta in a kernel of its own, and its programs of different
positions then add to dq in device memory.

Not yet run on a GPU: compiled ahead of time for sm_80 to sm_100, its arithmetic tested in Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import Device, device_guard, device_of
from ._query_attention import (
    AttentionTile,
    add_product,
    arguments,
    attended_of,
    block,
    delta_of_rows,
    ds_of,
    head_parts,
    kept_weights,
    load_rows,
    products_of_parts,
    products_of_rows,
    sliced_tile,
    store_part,
    store_rows,
    vectorised,
    weights_of,
    zero_rows,
)
from .query_attention_keys_backward import keys_backward


def backward_tile(G: int, L: int, width: int, element_bytes: int, vector: bool, device: Device) -> AttentionTile:
    """The tile of the backward kernel, of dq alone where BLOCK_G < G."""
    if element_bytes == 4 or width > 128:
        return sliced_tile(G, L, width, element_bytes)
    first, second = head_parts(width)
    if device.capability < 90:
        # The older instruction takes its operands from registers, q and dout each in two layouts.
        if G <= 64:
            return AttentionTile(block(G, 64), 16, first, second, 0, 4, 2)
        return AttentionTile(64, block(L, 32), first, second, 0, 8, 2)
    # Three stages take 197 KB of an H100's 227 KB with 128 queries of 96 features.
    stages = 3 if first + second <= 96 else 2
    if G <= 64 or not vector:
        return AttentionTile(64, block(L, 64), first, second, 0, 8, stages)
    # On sm_100 the accumulators come out of another memory into registers, and 64 positions would spill.
    return AttentionTile(128, block(L, 64 if device.capability < 100 else 32), first, second, 0, 8, stages)


def images_per_program(B: int, G: int, H: int) -> int:
    """How many images a program adds up in dq: about 264 programs, two for each SM of an H100.

    A function of the shape alone, so that the sum is the same on every machine. Many queries are programs enough.
    """
    return max(1, min(B, B * H * triton.cdiv(G, 128) // 264))


@triton.jit
def _store_product(
    a, part0, part1, factor, rows_ptr, mask_rows, first, WIDTH: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Rounds factor a times two parts of rows into the features from `first` on of contiguous rows."""
    EXACT: tl.constexpr = WIDTH % (D0 + D1) == 0
    product = tl.dot(a, part0, input_precision=PRECISION)
    store_part(rows_ptr, mask_rows, first, product * factor, WIDTH, D0, EXACT)
    if D1 > 0:
        product = tl.dot(a, part1, input_precision=PRECISION)
        store_part(rows_ptr, mask_rows, first + D0, product * factor, WIDTH, D1, EXACT)


@triton.jit
def query_attention_backward_kernel(
    dout_ptr, q_ptr, k_ptr, v_ptr, key_mask_ptr, seed_ptr, out_ptr, lse_ptr, dq_ptr, dk_ptr, dv_ptr,
    B, G, L, H, images, scale, threshold, keep_scale, dout_stride_b, dout_stride_g, dout_stride_e,
    q_stride_b, q_stride_g, q_stride_e, k_stride_b, k_stride_l, k_stride_e, v_stride_b, v_stride_l, v_stride_e,
    key_mask_stride_b, key_mask_stride_l,
    WIDTH: tl.constexpr, HAS_MASK: tl.constexpr, DROPOUT: tl.constexpr, NEED_DQ: tl.constexpr, NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr, ONE_TILE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_L: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """One program handles BLOCK_G queries of one head, D0 + D1 columns of it, and loops over a run of `images` images.

    The images of a run have the same queries. dk and dv are complete only if all queries are in the tile. Run r writes
    dq[r] of dq (runs, G, E).
    ONE_TILE: a tile holds all positions.
    """
    SLICES: tl.constexpr = (WIDTH + D0 + D1 - 1) // (D0 + D1)
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
    q0, q1 = load_rows(q_rows, mask_g, q_stride_e, column, WIDTH, D0, D1)
    dq0, dq1 = zero_rows(BLOCK_G, D0, D1)
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
        dout0, dout1 = load_rows(dout_rows, mask_g, dout_stride_e, column, WIDTH, D0, D1)
        lse = tl.load(lse_ptr + (b * H + h) * G + offs_g, mask=mask_g, other=0.0)
        delta = lse
        if (NEED_DQ or NEED_DK) and not ONE_TILE:
            out_rows = out_ptr + (b * G + offs_g) * E + h * WIDTH
            delta = delta_of_rows(
                dout0, dout1, dout_rows, out_rows, mask_g, dout_stride_e, WIDTH, D0, D1, DEPTH, BLOCK_G
            )
        for start_l in range(0, last_l, BLOCK_L):
            offs_l = (start_l + tl.arange(0, BLOCK_L)).to(tl.int64)
            mask_l = offs_l < L
            k_rows = k_ptr + b * k_stride_b + h * WIDTH * k_stride_e + offs_l * k_stride_l
            v_rows = v_ptr + b * v_stride_b + h * WIDTH * v_stride_e + offs_l * v_stride_l
            k0, k1 = load_rows(k_rows, mask_l, k_stride_e, column, WIDTH, D0, D1)
            s = products_of_parts(
                q0, q1, k0, k1, q_rows, k_rows, mask_g, mask_l, q_stride_e, k_stride_e, WIDTH, D1, DEPTH, PRECISION,
                BLOCK_G, BLOCK_L,
            )  # fmt: skip
            attended = attended_of(key_mask_ptr + b * key_mask_stride_b, offs_l, mask_l, key_mask_stride_l, HAS_MASK)
            p = weights_of(s * scale, attended, lse, first_i, offs_l, seed, b, threshold, DROPOUT)
            if NEED_DV:
                weights = tl.trans(kept_weights(p, DROPOUT).to(q_ptr.dtype.element_ty))
                dv_rows = dv_ptr + (b * L * E + h * WIDTH) + offs_l * E
                _store_product(weights, dout0, dout1, keep_scale, dv_rows, mask_l, column, WIDTH, D0, D1, PRECISION)
            if NEED_DQ or NEED_DK:
                dp = products_of_rows(
                    dout0, dout1, dout_rows, v_rows, mask_g, mask_l, dout_stride_e, v_stride_e, WIDTH, D0, D1, DEPTH,
                    PRECISION, BLOCK_G, BLOCK_L,
                )  # fmt: skip
                ds = ds_of(p, dp, delta, keep_scale, DROPOUT, ONE_TILE).to(q_ptr.dtype.element_ty)
                if NEED_DK:
                    dk_rows = dk_ptr + (b * L * E + h * WIDTH) + offs_l * E
                    _store_product(tl.trans(ds), q0, q1, scale, dk_rows, mask_l, column, WIDTH, D0, D1, PRECISION)
                if NEED_DQ:
                    dq0, dq1 = add_product(dq0, dq1, ds, k0, k1, D1, PRECISION)
    if NEED_DQ:
        dq_rows = dq_ptr + (run * G + offs_g) * E + h * WIDTH
        store_rows(dq_rows, mask_g, column, dq0, dq1, scale, WIDTH, D0, D1)


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
    images = images_per_program(B, G, H) if q.ndim == 2 else 1
    runs = triton.cdiv(B, images)
    partial = q.ndim == 2 and runs > 1
    dq = torch.empty((runs, G, E), dtype=torch.float32 if partial else q.dtype, device=q.device) if need_dq else none
    dk = torch.empty((B, L, E), dtype=q.dtype, device=q.device) if need_dk else none
    dv = torch.empty((B, L, E), dtype=q.dtype, device=q.device) if need_dv else none
    shared = {
        **arguments(q, k, v, key_mask, seed, num_heads, dropout_p),
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
                **shared,
                **tile.as_kwargs(),
            )
        if not together and (need_dk or need_dv):
            keys_backward(B, facts, need_dk, need_dv, shared)
    if need_dq and q.ndim == 2:
        dq = dq.sum(0).to(q.dtype) if partial else dq.squeeze(0)
    return dq, dk, dv
