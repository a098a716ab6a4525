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

from dataclasses import asdict, dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import device_guard
from ._dropout import dropout_arguments, image_keys, survives

MOST_COLUMNS = 4096  # that a program holds in registers
# Of all runs together: 528 programs of 4 warps, 4 for each multiprocessor of an H100.
MOST_WARPS = 2112


@dataclass(frozen=True)
class RowTile:
    """Launch configuration: rows and columns of a tile, and the warps that share it."""

    BLOCK_R: int
    BLOCK_E: int
    num_warps: int

    def as_kwargs(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return asdict(self)


def forward_tile(E: int) -> RowTile:
    """Tiles of 1024 numbers to a warp, 32 to a thread: whole rows, and as many as fit; of wider rows half of that."""
    if E > MOST_COLUMNS:
        return RowTile(1, MOST_COLUMNS, 8)
    block_e = _columns(E)
    return RowTile(max(1, 1024 // block_e), block_e, max(1, block_e // 1024))


def backward_tile(E: int) -> RowTile:
    """Tiles of 512 numbers to a warp, in 256 columns where there are as many: then no sum over rows leaves a thread.

    Twice the numbers would spill where the inputs are not contiguous. Eight warps at most. Of wider rows, which are not
    held, eight at once, so that the parts of dweight and dbias are few.
    """
    if E > MOST_COLUMNS:
        return RowTile(8, 256, 8)
    block_e = _columns(E)
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


def _columns(E: int) -> int:
    return min(MOST_COLUMNS, max(32, triton.next_power_of_2(E)))


@triton.jit
def dropout_keys(seed_ptr, b, DROPOUT: tl.constexpr):
    """The two keys (uint32) of every image of b; zeros without dropout."""
    key0 = b.to(tl.uint32)
    key1 = key0
    if DROPOUT:
        key0, key1 = image_keys(tl.load(seed_ptr), b)
    return key0, key1


@triton.jit
def dropout_factor(i, key0, key1, threshold, keep_scale, DROPOUT: tl.constexpr):
    """What dropout multiplies the numbers i (uint32) of an image by: 0 or keep_scale, or 1 without dropout.

    A factor and not a selection: what is not finite stays so, as in plain torch.
    """
    factor = tl.full((1, 1), 1.0, tl.float32)
    if DROPOUT:
        factor = tl.where(survives(i, key0, key1, threshold), keep_scale, 0.0)
    return factor


@triton.jit
def _rows_of(ptr, b, n, stride_b, stride_n):
    """Pointers (R, 1) to the rows n of the images b."""
    return (ptr + b.to(tl.int64) * stride_b + n.to(tl.int64) * stride_n)[:, None]


@triton.jit
def _tile(rows_ptr, offs_e, mask, stride_e):
    """A tile of rows given by pointers in fp32, 0 outside."""
    return tl.load(rows_ptr + offs_e[None, :] * stride_e, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _parameter(ptr, offs_e, mask_e, stride_e):
    """A part of weight or bias as (1, E) in fp32, 0 outside."""
    return tl.load(ptr + offs_e * stride_e, mask=mask_e, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _residual_sum(
    x_rows,
    residual_rows,
    offs_e,
    mask,
    x_stride_e,
    residual_stride_e,
    first_i,
    key0,
    key1,
    threshold,
    keep_scale,
    DROPOUT: tl.constexpr,
):
    """The tile residual + dropout(x), 0 outside the mask, and what dropout multiplies by."""
    x = _tile(x_rows, offs_e, mask, x_stride_e)
    residual = _tile(residual_rows, offs_e, mask, residual_stride_e)
    factor = dropout_factor(first_i + offs_e.to(tl.uint32)[None, :], key0, key1, threshold, keep_scale, DROPOUT)
    return residual + x * factor, factor


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
    x_rows = _rows_of(x_ptr, b, n, x_stride_b, x_stride_n)
    residual_rows = _rows_of(residual_ptr, b, n, residual_stride_b, residual_stride_n)
    out_rows = (out_ptr + offs_r.to(tl.int64) * E)[:, None]
    key0, key1 = dropout_keys(seed_ptr, b[:, None], DROPOUT)
    first_i = (n.to(tl.int64) * E).to(tl.uint32)[:, None]

    if WHOLE:
        offs_e = tl.arange(0, BLOCK_E).to(tl.int64)
        mask_e = offs_e < E
        mask = mask_r[:, None] & mask_e[None, :]
        z, _ = _residual_sum(
            x_rows, residual_rows, offs_e, mask, x_stride_e, residual_stride_e,
            first_i, key0, key1, threshold, keep_scale, DROPOUT,
        )  # fmt: skip
        mean = tl.sum(z, axis=1) * inverse_e
        centred = tl.where(mask_e[None, :], z - mean[:, None], 0.0)
        variance = tl.sum(centred * centred, axis=1) * inverse_e
        rstd = tl.div_rn(1.0, tl.sqrt_rn(variance + eps))
        weight = _parameter(weight_ptr, offs_e, mask_e, weight_stride_e)
        out = centred * rstd[:, None] * weight + _parameter(bias_ptr, offs_e, mask_e, bias_stride_e)
        tl.store(out_rows + offs_e[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        mean = tl.zeros((BLOCK_R,), tl.float32)
        squares = tl.zeros((BLOCK_R,), tl.float32)
        count = 0.0
        for start_e in range(0, E, BLOCK_E):
            offs_e = start_e + tl.arange(0, BLOCK_E).to(tl.int64)
            mask_e = offs_e < E
            mask = mask_r[:, None] & mask_e[None, :]
            z, _ = _residual_sum(
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
            z, _ = _residual_sum(
                x_rows, residual_rows, offs_e, mask, x_stride_e, residual_stride_e,
                first_i, key0, key1, threshold, keep_scale, DROPOUT,
            )  # fmt: skip
            weight = _parameter(weight_ptr, offs_e, mask_e, weight_stride_e)
            bias = _parameter(bias_ptr, offs_e, mask_e, bias_stride_e)
            out = (z - mean[:, None]) * rstd[:, None] * weight + bias
            tl.store(out_rows + offs_e[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    tl.store(mean_ptr + offs_r, mean, mask=mask_r)
    tl.store(rstd_ptr + offs_r, rstd, mask=mask_r)


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
            weight = _parameter(weight_ptr, offs_e, mask_e, weight_stride_e)

    for start_r in range(run * rows_per_run, tl.minimum((run + 1) * rows_per_run, rows), BLOCK_R):
        offs_r = start_r + tl.arange(0, BLOCK_R)
        mask_r = offs_r < rows
        b, n = offs_r // N, offs_r % N
        dout_rows = _rows_of(dout_ptr, b, n, dout_stride_b, dout_stride_n)
        x_rows = _rows_of(x_ptr, b, n, x_stride_b, x_stride_n)
        residual_rows = _rows_of(residual_ptr, b, n, residual_stride_b, residual_stride_n)
        dx_rows = (dx_ptr + offs_r.to(tl.int64) * E)[:, None]
        dresidual_rows = (dresidual_ptr + offs_r.to(tl.int64) * E)[:, None]
        mean = tl.load(mean_ptr + offs_r, mask=mask_r, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + offs_r, mask=mask_r, other=0.0)[:, None]
        key0, key1 = dropout_keys(seed_ptr, b[:, None], DROPOUT)
        first_i = (n.to(tl.int64) * E).to(tl.uint32)[:, None]

        if WHOLE:
            mask = mask_r[:, None] & mask_e[None, :]
            dout = _tile(dout_rows, offs_e, mask, dout_stride_e)
            if NEED_DBIAS:
                dbias += tl.sum(dout, axis=0)
            if NEED_DX or NEED_DRESIDUAL or NEED_DWEIGHT:
                z, factor = _residual_sum(
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
                    z, _ = _residual_sum(
                        x_rows, residual_rows, offs_e, mask, x_stride_e, residual_stride_e,
                        first_i, key0, key1, threshold, keep_scale, DROPOUT,
                    )  # fmt: skip
                    weight = _parameter(weight_ptr, offs_e, mask_e, weight_stride_e)
                    g = _tile(dout_rows, offs_e, mask, dout_stride_e) * weight
                    sum_g += tl.sum(g, axis=1)
                    sum_gn += tl.sum(g * ((z - mean) * rstd), axis=1)
            mean_g = (sum_g * inverse_e)[:, None]
            mean_gn = (sum_gn * inverse_e)[:, None]
            for start_e in range(0, E, BLOCK_E):
                offs_e = start_e + tl.arange(0, BLOCK_E).to(tl.int64)
                mask_e = offs_e < E
                mask = mask_r[:, None] & mask_e[None, :]
                z, factor = _residual_sum(
                    x_rows, residual_rows, offs_e, mask, x_stride_e, residual_stride_e,
                    first_i, key0, key1, threshold, keep_scale, DROPOUT,
                )  # fmt: skip
                dout = _tile(dout_rows, offs_e, mask, dout_stride_e)
                normalized = (z - mean) * rstd
                if NEED_DWEIGHT:
                    # The run is one tile of rows, so this is its whole part.
                    tl.store(dweight_parts_ptr + parts + offs_e, tl.sum(dout * normalized, axis=0), mask=mask_e)
                if NEED_DBIAS:
                    tl.store(dbias_parts_ptr + parts + offs_e, tl.sum(dout, axis=0), mask=mask_e)
                g = dout * _parameter(weight_ptr, offs_e, mask_e, weight_stride_e)
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


def _arguments(
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    statistics: Tensor,
) -> dict[str, Any]:
    """What both launches share."""
    B, N, E = x.shape
    return {
        "x_ptr": x,
        "residual_ptr": residual,
        "weight_ptr": weight,
        "mean_ptr": statistics[0],
        "rstd_ptr": statistics[1],
        "rows": B * N,
        "N": N,
        "E": E,
        "inverse_e": 1.0 / E,
        "x_stride_b": x.stride(0),
        "x_stride_n": x.stride(1),
        "x_stride_e": x.stride(2),
        "residual_stride_b": residual.stride(0),
        "residual_stride_n": residual.stride(1),
        "residual_stride_e": residual.stride(2),
        "weight_stride_e": weight.stride(0),
        "WHOLE": E <= MOST_COLUMNS,
        **dropout_arguments(seed, dropout_p, x),
    }


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
            **_arguments(x, residual, weight, seed, dropout_p, statistics),
            **tile.as_kwargs(),
        )
    return out, statistics


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
                **_arguments(x, residual, weight, seed, dropout_p, statistics),
                **tile.as_kwargs(),
            )
    dweight = parts["dweight"].sum(0).to(weight.dtype) if need_dweight else dx.new_empty(0)
    dbias = parts["dbias"].sum(0).to(bias.dtype) if need_dbias else dx.new_empty(0)
    return dx, dresidual, dweight, dbias
