"""ReLU and dropout, between the two layers of a feed-forward network."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dropout import factors


def relu_dropout(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """ReLU, then dropout: dropout(max(x, 0)) of x (B, N, F)."""
    factor = factors(seed, dropout_p, x.shape[0], 1, *x.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32))
    return (x.relu() if factor is None else (x.relu() * factor.squeeze(1)).to(x.dtype)).contiguous()


def relu_dropout_grad(dout: Tensor, x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    """The gradient dx = dropout'(dout) where x > 0.

    `x` may be the input or the output, which is positive where the input is and nothing was dropped. As in torch, a
    NaN lets the gradient pass.
    """
    factor = factors(seed, dropout_p, x.shape[0], 1, *x.shape[1:], dtype=torch.promote_types(x.dtype, torch.float32))
    return (dout if factor is None else (dout * factor.squeeze(1)).to(dout.dtype)).masked_fill(x <= 0, 0)
