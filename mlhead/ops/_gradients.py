"""Memory of the gradients that the losses in the head make."""

from __future__ import annotations

import torch
from torch import Tensor


def empty_gradient(tensor: Tensor, is_weight: bool) -> Tensor:
    """Memory for a gradient: contiguous, but a weight's in its own layout, which autograd then need not copy."""
    return torch.empty_like(tensor, memory_format=torch.preserve_format if is_weight else torch.contiguous_format)
