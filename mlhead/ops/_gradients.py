"""Memory of the gradients that the losses in the head make."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_gradient(tensor: Tensor, is_weight: bool) -> Tensor:
    """Memory for a gradient: contiguous, but a weight's in its own layout, which autograd then need not copy."""
    return torch.empty_like(tensor, memory_format=torch.preserve_format if is_weight else torch.contiguous_format)


def laid_out(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """A tensor with the order of axes that dense strides have in memory; written without a write, for tracing."""
    if tensor.stride() == strides:
        return tensor
    order = sorted(range(tensor.ndim), key=lambda axis: strides[axis], reverse=True)
    back = [order.index(axis) for axis in range(tensor.ndim)]
    return tensor.permute(order).clone(memory_format=torch.contiguous_format).permute(back)
