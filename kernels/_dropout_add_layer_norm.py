"""What both directions of dropout_add_layer_norm share: tiles of rows, the residual sum, the arguments of a launch.

Not yet run on a GPU: compiled ahead of time for sm_80 to sm_100, its arithmetic tested in Triton's interpreter.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._dropout import dropout_arguments, image_keys, survives

MOST_COLUMNS = 4096  # that a program holds in registers


@dataclass(frozen=True)
class RowTile:
    """Launch configuration: rows and columns of a tile, and the warps that share it."""

    BLOCK_R: int
    BLOCK_E: int
    num_warps: int

    def as_kwargs(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return asdict(self)


def block_of(E: int) -> int:
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
def rows_of(ptr, b, n, stride_b, stride_n):
    """Pointers (R, 1) to the rows n of the images b."""
    return (ptr + b.to(tl.int64) * stride_b + n.to(tl.int64) * stride_n)[:, None]


@triton.jit
def load_tile(rows_ptr, offs_e, mask, stride_e):
    """A tile of rows given by pointers in fp32, 0 outside."""
    return tl.load(rows_ptr + offs_e[None, :] * stride_e, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def parameter(ptr, offs_e, mask_e, stride_e):
    """A part of weight or bias as (1, E) in fp32, 0 outside."""
    return tl.load(ptr + offs_e * stride_e, mask=mask_e, other=0.0).to(tl.float32)[None, :]


@triton.jit
def residual_sum(
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
    x = load_tile(x_rows, offs_e, mask, x_stride_e)
    residual = load_tile(residual_rows, offs_e, mask, residual_stride_e)
    factor = dropout_factor(first_i + offs_e.to(tl.uint32)[None, :], key0, key1, threshold, keep_scale, DROPOUT)
    return residual + x * factor, factor


def launch_arguments(
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
