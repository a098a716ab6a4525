"""The residual step of a post-norm transformer layer, dropout, addition and layer norm, in one pass each way.

    z = residual + drop(x),  n = (z - mean z) / std z,  out = n weight + bias                          over a row of E
    g = dout weight,  dz = (g - mean g - n mean(g n)) / std,  dresidual = dz,  dx = drop'(dz)
    dweight = sum dout n,  dbias = sum dout                                                      over all B N rows

Algorithm. Forward: one program holds whole rows in registers, so both inputs are read once, and the variance is that
of centred values, not a difference of large sums. It keeps mean and 1 / std of every row. Backward makes n again from
them; one program walks over a run of rows with its part of dweight and dbias in registers and writes it once. The parts
are added in fp32 in a fixed order and rounded once: no atomics, and the runs depend on the shape alone. Dropout is a
hash of the seed, the image and the place in (N, E), computed anew in backward: no mask in memory. Rows of more than
4096 features do not fit the registers; they are read twice, the second time mostly out of the caches.

All of it is bound by memory, and this moves the least bytes there are. In bf16, forward and backward:

    voc          B=64   N=20   E=768     6 MB    10 MB
    coco         B=64   N=80   E=768    24 MB    39 MB
    imagenet     B=256  N=100  E=768   118 MB   197 MB
    openimages   B=128  N=100  E=768    59 MB    98 MB

and the parts of dweight and dbias, at most 528 rows of E in fp32 each: 3 MB at E = 768, which stay in L2. Three ops in
place of one (dropout, addition, norm) move 7 numbers forward where 3 do, and keep a mask and the sum for backward.

A row has 1024 numbers to a warp in forward, so up to E = 1024 it is summed by shuffles alone, and 32 programs of one
warp keep 96 KB of loads of a multiprocessor under way at E = 768. In backward a warp has 256 columns of two rows at
once, so that the sums over rows stay inside a thread.

Not yet run on a GPU: compiled ahead of time for sm_80 to sm_100, its arithmetic tested in Triton's interpreter.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import device_guard
from ._dropout_add_layer_norm import (
    MOST_COLUMNS,
    RowTile,
    block_of,
    dropout_keys,
    launch_arguments,
    parameter,
    residual_sum,
    rows_of,
)
from .dropout_add_layer_norm_backward import dropout_add_layer_norm_backward

__all__ = ["dropout_add_layer_norm", "dropout_add_layer_norm_backward"]


def forward_tile(E: int) -> RowTile:
    """Tiles of 1024 numbers to a warp, 32 to a thread: whole rows, and as many as fit; of wider rows half of that."""
    if E > MOST_COLUMNS:
        return RowTile(1, MOST_COLUMNS, 8)
    block_e = block_of(E)
    return RowTile(max(1, 1024 // block_e), block_e, max(1, block_e // 1024))


@triton.jit
def dropout_add_layer_norm_forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    seed_ptr,
    out_ptr,
    mean_ptr,
    rstd_ptr,
    rows,
    N,
    E,
    inverse_e,
    eps,
    threshold,
    keep_scale,
    x_stride_b,
    x_stride_n,
    x_stride_e,
    residual_stride_b,
    residual_stride_n,
    residual_stride_e,
    weight_stride_e,
    bias_stride_e,
    DROPOUT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program handles BLOCK_R rows: WHOLE ones in registers, else in two rounds over their columns."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r < rows
    b, n = offs_r // N, offs_r % N
    x_rows = rows_of(x_ptr, b, n, x_stride_b, x_stride_n)
    residual_rows = rows_of(residual_ptr, b, n, residual_stride_b, residual_stride_n)
    out_rows = (out_ptr + offs_r.to(tl.int64) * E)[:, None]
    key0, key1 = dropout_keys(seed_ptr, b[:, None], DROPOUT)
    first_i = (n.to(tl.int64) * E).to(tl.uint32)[:, None]

    if WHOLE:
        offs_e = tl.arange(0, BLOCK_E).to(tl.int64)
        mask_e = offs_e < E
        mask = mask_r[:, None] & mask_e[None, :]
        z, _ = residual_sum(
            x_rows, residual_rows, offs_e, mask, x_stride_e, residual_stride_e,
            first_i, key0, key1, threshold, keep_scale, DROPOUT,
        )  # fmt: skip
        mean = tl.sum(z, axis=1) * inverse_e
        centred = tl.where(mask_e[None, :], z - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, axis=1) * inverse_e
        rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
        weight = parameter(weight_ptr, offs_e, mask_e, weight_stride_e)
        out = centred * rstd[:, None] * weight + parameter(bias_ptr, offs_e, mask_e, bias_stride_e)
        tl.store(out_rows + offs_e[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        mean = tl.zeros((BLOCK_R,), tl.float32)
        squares = tl.zeros((BLOCK_R,), tl.float32)
        count = 0.0
        for start_e in range(0, E, BLOCK_E):
            offs_e = start_e + tl.arange(0, BLOCK_E).to(tl.int64)
            mask_e = offs_e < E
            mask = mask_r[:, None] & mask_e[None, :]
            z, _ = residual_sum(
                x_rows, residual_rows, offs_e, mask, x_stride_e, residual_stride_e,
                first_i, key0, key1, threshold, keep_scale, DROPOUT,
            )  # fmt: skip
            # The squares of each part are centred on its own mean; the distance of the means is added (Chan et al.).
            here = tl.sum(tl.where(mask_e, 1.0, 0.0), axis=0)
            mean_here = tl.sum(z, axis=1) / here
            centred = tl.where(mask_e[None, :], z - mean_here[:, None], 0.0)
            distance = mean_here - mean
            share = here / (count + here)
            mean += distance * share
            squares += tl.sum(centred * centred, axis=1) + distance * distance * (count * share)
            count += here
        rstd = tl.div_rn(1.0, tl.sqrt_rn(squares * inverse_e + eps))
        for start_e in range(0, E, BLOCK_E):
            offs_e = start_e + tl.arange(0, BLOCK_E).to(tl.int64)
            mask_e = offs_e < E
            mask = mask_r[:, None] & mask_e[None, :]
            z, _ = residual_sum(
                x_rows, residual_rows, offs_e, mask, x_stride_e, residual_stride_e,
                first_i, key0, key1, threshold, keep_scale, DROPOUT,
            )  # fmt: skip
            weight = parameter(weight_ptr, offs_e, mask_e, weight_stride_e)
            bias = parameter(bias_ptr, offs_e, mask_e, bias_stride_e)
            out = (z - mean[:, None]) * rstd[:, None] * weight + bias
            tl.store(out_rows + offs_e[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + offs_r, mean, mask=mask_r)
    tl.store(rstd_ptr + offs_r, rstd, mask=mask_r)


def dropout_add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Out (B, N, E), and mean and 1 / std of each row (2, B, N) in fp32, of x and residual (B, N, E) of any strides."""
    B, N, E = x.shape
    out = torch.empty((B, N, E), dtype=x.dtype, device=x.device)
    statistics = torch.empty((2, B, N), dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out, statistics
    tile = forward_tile(E)
    with device_guard(x):
        dropout_add_layer_norm_forward_kernel[(triton.cdiv(B * N, tile.BLOCK_R),)](
            bias_ptr=bias,
            out_ptr=out,
            eps=eps,
            bias_stride_e=bias.stride(0),
            **launch_arguments(x, residual, weight, seed, dropout_p, statistics),
            **tile.as_kwargs(),
        )
    return out, statistics
