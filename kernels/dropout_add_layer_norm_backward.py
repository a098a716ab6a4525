"""The backward of dropout_add_layer_norm: all gradients in one pass over the rows, those of the parameters in parts.

The algorithm, its bytes and why it is fast are in dropout_add_layer_norm.py.

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
    load_tile,
    parameter,
    residual_sum,
    rows_of,
)

# Of all runs together: 528 programs of 4 warps, 4 for each multiprocessor of an H100.
MOST_WARPS = 2112


def backward_tile(E: int) -> RowTile:
    """Tiles of 512 numbers to a warp, in 256 columns where there are as many: then no sum over rows leaves a thread.

    Twice the numbers would spill where the inputs are not contiguous. Eight warps at most. Of wider rows, which are not
    held, eight at once, so that the parts of dweight and dbias are few.
    """
    if E > MOST_COLUMNS:
        return RowTile(8, 256, 8)
    block_e = block_of(E)
    warps = max(1, min(8, block_e // 256))
    return RowTile(max(1, 512 * warps // block_e), block_e, warps)


def rows_per_run(rows: int, E: int, tile: RowTile) -> int:
    """How many rows the backward adds up in one part of dweight and dbias: at least two tiles, of wide rows one.

    A function of the shape alone, so that the sum is the same on every machine.
    """
    if E > MOST_COLUMNS:
        return tile.BLOCK_R
    runs = MOST_WARPS // tile.num_warps
    return max(2, triton.cdiv(rows, runs * tile.BLOCK_R)) * tile.BLOCK_R


@triton.jit
def dropout_add_layer_norm_backward_kernel(
    dout_ptr,
    x_ptr,
    residual_ptr,
    weight_ptr,
    seed_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    dweight_parts_ptr,
    dbias_parts_ptr,
    rows,
    N,
    E,
    inverse_e,
    rows_per_run,
    threshold,
    keep_scale,
    dout_stride_b,
    dout_stride_n,
    dout_stride_e,
    x_stride_b,
    x_stride_n,
    x_stride_e,
    residual_stride_b,
    residual_stride_n,
    residual_stride_e,
    weight_stride_e,
    DROPOUT: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DRESIDUAL: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program handles a run of rows, BLOCK_R at once: WHOLE ones in registers, else in two rounds over columns.

    The parts of dweight and dbias are (runs, E) in fp32.
    """
    run = tl.program_id(0)
    parts = run.to(tl.int64) * E
    if WHOLE:
        dweight = tl.zeros((BLOCK_E,), tl.float32)
        dbias = tl.zeros((BLOCK_E,), tl.float32)
        # What all rows share; without dx and dresidual the weight is not needed.
        offs_e = tl.arange(0, BLOCK_E).to(tl.int64)
        mask_e = offs_e < E
        if NEED_DX or NEED_DRESIDUAL:
            weight = parameter(weight_ptr, offs_e, mask_e, weight_stride_e)

    for start_r in range(run * rows_per_run, tl.minimum((run + 1) * rows_per_run, rows), BLOCK_R):
        offs_r = start_r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < rows
        b, n = offs_r // N, offs_r % N
        dout_rows = rows_of(dout_ptr, b, n, dout_stride_b, dout_stride_n)
        x_rows = rows_of(x_ptr, b, n, x_stride_b, x_stride_n)
        residual_rows = rows_of(residual_ptr, b, n, residual_stride_b, residual_stride_n)
        dx_rows = (dx_ptr + offs_r.to(tl.int64) * E)[:, None]
        dresidual_rows = (dresidual_ptr + offs_r.to(tl.int64) * E)[:, None]
        mean = tl.load(mean_ptr + offs_r, mask=mask_r, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + offs_r, mask=mask_r, other=0.0)[:, None]
        key0, key1 = dropout_keys(seed_ptr, b[:, None], DROPOUT)
        first_i = (n.to(tl.int64) * E).to(tl.uint32)[:, None]

        if WHOLE:
            mask = mask_r[:, None] & mask_e[None, :]
            dout = load_tile(dout_rows, offs_e, mask, dout_stride_e)
            if NEED_DBIAS:
                dbias += tl.sum(dout, axis=0)
            if NEED_DX or NEED_DRESIDUAL or NEED_DWEIGHT:
                z, factor = residual_sum(
                    x_rows, residual_rows, offs_e, mask, x_stride_e, residual_stride_e,
                    first_i, key0, key1, threshold, keep_scale, DROPOUT,
                )  # fmt: skip
                normalized = (z - mean) * rstd
                if NEED_DWEIGHT:
                    dweight += tl.sum(dout * normalized, axis=0)
                if NEED_DX or NEED_DRESIDUAL:
                    g = dout * weight
                    mean_g = (tl.sum(g, axis=1) * inverse_e)[:, None]
                    mean_gn = (tl.sum(g * normalized, axis=1) * inverse_e)[:, None]
                    dz = (g - mean_g - normalized * mean_gn) * rstd
                    if NEED_DRESIDUAL:
                        tl.store(dresidual_rows + offs_e[None, :], dz.to(dresidual_ptr.dtype.element_ty), mask=mask)
                    if NEED_DX:
                        tl.store(dx_rows + offs_e[None, :], (dz * factor).to(dx_ptr.dtype.element_ty), mask=mask)
        else:
            sum_g = tl.zeros((BLOCK_R,), tl.float32)
            sum_gn = tl.zeros((BLOCK_R,), tl.float32)
            if NEED_DX or NEED_DRESIDUAL:
                for start_e in range(0, E, BLOCK_E):
                    offs_e = start_e + tl.arange(0, BLOCK_E).to(tl.int64)
                    mask_e = offs_e < E
                    mask = mask_r[:, None] & mask_e[None, :]
                    z, _ = residual_sum(
                        x_rows, residual_rows, offs_e, mask, x_stride_e, residual_stride_e,
                        first_i, key0, key1, threshold, keep_scale, DROPOUT,
                    )  # fmt: skip
                    weight = parameter(weight_ptr, offs_e, mask_e, weight_stride_e)
                    g = load_tile(dout_rows, offs_e, mask, dout_stride_e) * weight
                    sum_g += tl.sum(g, axis=1)
                    sum_gn += tl.sum(g * ((z - mean) * rstd), axis=1)
            mean_g = (sum_g * inverse_e)[:, None]
            mean_gn = (sum_gn * inverse_e)[:, None]
            for start_e in range(0, E, BLOCK_E):
                offs_e = start_e + tl.arange(0, BLOCK_E).to(tl.int64)
                mask_e = offs_e < E
                mask = mask_r[:, None] & mask_e[None, :]
                z, factor = residual_sum(
                    x_rows, residual_rows, offs_e, mask, x_stride_e, residual_stride_e,
                    first_i, key0, key1, threshold, keep_scale, DROPOUT,
                )  # fmt: skip
                dout = load_tile(dout_rows, offs_e, mask, dout_stride_e)
                normalized = (z - mean) * rstd
                if NEED_DWEIGHT:
                    # The run is one tile of rows, so this is its whole part.
                    tl.store(dweight_parts_ptr + parts + offs_e, tl.sum(dout * normalized, axis=0), mask=mask_e)
                if NEED_DBIAS:
                    tl.store(dbias_parts_ptr + parts + offs_e, tl.sum(dout, axis=0), mask=mask_e)
                g = dout * parameter(weight_ptr, offs_e, mask_e, weight_stride_e)
                dz = (g - mean_g - normalized * mean_gn) * rstd
                if NEED_DRESIDUAL:
                    tl.store(dresidual_rows + offs_e[None, :], dz.to(dresidual_ptr.dtype.element_ty), mask=mask)
                if NEED_DX:
                    tl.store(dx_rows + offs_e[None, :], (dz * factor).to(dx_ptr.dtype.element_ty), mask=mask)
    if WHOLE:
        if NEED_DWEIGHT:
            tl.store(dweight_parts_ptr + parts + offs_e, dweight, mask=mask_e)
        if NEED_DBIAS:
            tl.store(dbias_parts_ptr + parts + offs_e, dbias, mask=mask_e)


def dropout_add_layer_norm_backward(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    statistics: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients (dx, dresidual, dweight, dbias) for dout (B, N, E) of any strides; what is not needed is empty."""
    B, N, E = x.shape
    need_dx, need_dresidual, need_dweight, need_dbias = needs
    dx = torch.empty((B, N, E) if need_dx else 0, dtype=x.dtype, device=x.device)
    dresidual = torch.empty((B, N, E) if need_dresidual else 0, dtype=x.dtype, device=x.device)
    tile = backward_tile(E)
    run = rows_per_run(B * N, E, tile)
    runs = triton.cdiv(B * N, run)
    parts = {
        name: torch.empty((runs, E) if need else 0, dtype=torch.float32, device=x.device)
        for name, need in (("dweight", need_dweight), ("dbias", need_dbias))
    }
    if runs > 0 and any(needs):
        with device_guard(x):
            dropout_add_layer_norm_backward_kernel[(runs,)](
                dout_ptr=dout,
                dx_ptr=dx,
                dresidual_ptr=dresidual,
                dweight_parts_ptr=parts["dweight"],
                dbias_parts_ptr=parts["dbias"],
                rows_per_run=run,
                dout_stride_b=dout.stride(0),
                dout_stride_n=dout.stride(1),
                dout_stride_e=dout.stride(2),
                NEED_DX=need_dx,
                NEED_DRESIDUAL=need_dresidual,
                NEED_DWEIGHT=need_dweight,
                NEED_DBIAS=need_dbias,
                **launch_arguments(x, residual, weight, seed, dropout_p, statistics),
                **tile.as_kwargs(),
            )
    dweight = parts["dweight"].sum(0).to(weight.dtype) if need_dweight else dx.new_empty(0)
    dbias = parts["dbias"].sum(0).to(bias.dtype) if need_dbias else dx.new_empty(0)
    return dx, dresidual, dweight, dbias
