"""ReLU and dropout, what stands between the two layers of a feed-forward network, in one pass each way.

    out = drop(max(x, 0)),  dx = dout / (1 - dropout_p) where out > 0, else 0

Algorithm. Elementwise. Rows are cut into tiles of 4096 numbers; where the axes (N, F) of an image are contiguous the
image is one row, so only its last tile is padded. Dropout is a hash of the seed, the image and the place in (N, F): no
mask in memory. Backward needs neither seed nor hash: the output is positive where the input is and nothing was dropped.

It is bound by memory, and this moves the least bytes there are. In bf16, forward and backward:

    voc          B=64   N=20   F=2048    10 MB    16 MB
    coco         B=64   N=80   F=2048    42 MB    63 MB
    imagenet     B=256  N=100  F=2048   210 MB   315 MB
    openimages   B=128  N=100  F=2048   105 MB   157 MB

Two ops move twice as much forward, and keep a mask and both of their inputs or outputs for backward. Every thread has
four loads of 16 bytes of each tensor under way.

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
from ._dropout import dropout_arguments
from ._dropout_add_layer_norm import dropout_factor, dropout_keys


@dataclass(frozen=True)
class FlatTile:
    """Launch configuration: rows and columns of a tile, and the warps that share it."""

    BLOCK_R: int
    BLOCK_M: int
    num_warps: int

    def as_kwargs(self) -> dict[str, int]:
        """The keyword arguments of the launch."""
        return asdict(self)


def flat_tile(M: int, element_bytes: int) -> FlatTile:
    """Tiles of 64 bytes to a thread, in rows of M numbers: 4096 numbers of 16 bits."""
    numbers = 8192 // element_bytes
    block_m = min(numbers, max(16, triton.next_power_of_2(M)))
    return FlatTile(numbers // block_m, block_m, 4)


def merged(*tensors: Tensor) -> bool:
    """Whether the axes (N, F) of all tensors are one axis in memory."""
    return all(t.shape[1] == 1 or t.stride(1) == t.shape[2] * t.stride(2) for t in tensors)


@triton.jit
def relu_dropout_forward_kernel(
    x_ptr,
    seed_ptr,
    out_ptr,
    rows,
    rows_of_image,
    M,
    threshold,
    keep_scale,
    x_stride_b,
    x_stride_n,
    x_stride_m,
    DROPOUT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program handles BLOCK_M columns of BLOCK_R rows of M numbers."""
    tiles_m = (M - 1) // BLOCK_M + 1  # a sum could pass 2^31
    offs_r = tl.program_id(0) // tiles_m * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_m = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (offs_r < rows)[:, None] & (offs_m < M)[None, :]
    b, n = offs_r // rows_of_image, offs_r % rows_of_image
    x_rows = x_ptr + b.to(tl.int64) * x_stride_b + n.to(tl.int64) * x_stride_n
    x = tl.load(x_rows[:, None] + offs_m[None, :] * x_stride_m, mask=mask, other=0.0).to(tl.float32)
    key0, key1 = dropout_keys(seed_ptr, b[:, None], DROPOUT)
    i = (n.to(tl.int64) * M).to(tl.uint32)[:, None] + offs_m.to(tl.uint32)[None, :]
    # A comparison that NaN fails lets it through.
    out = tl.where(x <= 0.0, 0.0, x) * dropout_factor(i, key0, key1, threshold, keep_scale, DROPOUT)
    out_rows = out_ptr + offs_r.to(tl.int64) * M
    tl.store(out_rows[:, None] + offs_m[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def relu_dropout_backward_kernel(
    dout_ptr,
    out_ptr,
    dx_ptr,
    rows,
    rows_of_image,
    M,
    keep_scale,
    dout_stride_b,
    dout_stride_n,
    dout_stride_m,
    out_stride_b,
    out_stride_n,
    out_stride_m,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """One program handles BLOCK_M columns of BLOCK_R rows of M numbers."""
    tiles_m = (M - 1) // BLOCK_M + 1  # a sum could pass 2^31
    offs_r = tl.program_id(0) // tiles_m * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_m = (tl.program_id(0) % tiles_m).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = (offs_r < rows)[:, None] & (offs_m < M)[None, :]
    b, n = (offs_r // rows_of_image).to(tl.int64), (offs_r % rows_of_image).to(tl.int64)
    dout_rows = dout_ptr + b * dout_stride_b + n * dout_stride_n
    out_rows = out_ptr + b * out_stride_b + n * out_stride_n
    dout = tl.load(dout_rows[:, None] + offs_m[None, :] * dout_stride_m, mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_rows[:, None] + offs_m[None, :] * out_stride_m, mask=mask, other=0.0).to(tl.float32)
    # A comparison that NaN fails lets the gradient pass.
    dx = tl.where(out <= 0.0, 0.0, dout * keep_scale)
    dx_rows = dx_ptr + offs_r.to(tl.int64) * M
    tl.store(dx_rows[:, None] + offs_m[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _launch(kernel: Any, result: Tensor, inputs: dict[str, Tensor], **arguments: Any) -> Tensor:
    """Launches a kernel on inputs (B, N, F) of any strides for the result of that shape."""
    if result.numel() == 0:
        return result
    B, N, F = result.shape
    one_axis = merged(*inputs.values())
    rows_of_image, M = (1, N * F) if one_axis else (N, F)
    strides = {f"{name}_stride_{'bnm'[i]}": t.stride(i) for name, t in inputs.items() for i in range(3)}
    tile = flat_tile(M, result.element_size())
    with device_guard(result):
        kernel[(triton.cdiv(B * rows_of_image, tile.BLOCK_R) * triton.cdiv(M, tile.BLOCK_M),)](
            **{f"{name}_ptr": tensor for name, tensor in inputs.items()},
            rows=B * rows_of_image,
            rows_of_image=rows_of_image,
            M=M,
            **strides,
            **arguments,
            **tile.as_kwargs(),
        )
    return result


def relu_dropout(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """The output (B, N, F), contiguous, for x of any strides."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dropout = dropout_arguments(seed, dropout_p, x)
    return _launch(relu_dropout_forward_kernel, out, {"x": x}, out_ptr=out, **dropout)


def relu_dropout_backward(
    dout: Tensor, out: Tensor, seed: Tensor | None, dropout_p: float, needs: list[bool]
) -> Tensor:
    """The gradient dx (B, N, F) for dout and out of any strides; an empty tensor where it is not needed."""
    dx = torch.empty(out.shape if needs[0] else 0, dtype=out.dtype, device=out.device)
    inputs = {"dout": dout, "out": out}
    return _launch(relu_dropout_backward_kernel, dx, inputs, dx_ptr=dx, keep_scale=1.0 / (1.0 - dropout_p))
