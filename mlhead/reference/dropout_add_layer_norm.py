"""The residual step of a post-norm transformer layer: dropout, addition, layer norm."""

from __future__ import annotations

import torch
from torch import Tensor

from ._dropout import factors


def dropout_add(x: Tensor, residual: Tensor, seed: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor | None]:
    """The sum residual + dropout(x), and the factors of the dropout, in fp32 or wider."""
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = factors(seed, dropout_p, x.shape[0], 1, *x.shape[1:], dtype=wide)
    factor = None if factor is None else factor.squeeze(1)
    return residual.to(wide) + (x.to(wide) if factor is None else x.to(wide) * factor), factor


def _normalized(
    x: Tensor, residual: Tensor, seed: Tensor | None, dropout_p: float, eps: float
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(z - mean) / std of z = residual + dropout(x), 1 / std, and the factors of the dropout, in fp32 or wider."""
    z, factor = dropout_add(x, residual, seed, dropout_p)
    centred = z - z.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd, factor


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, seed: Tensor | None, dropout_p: float, eps: float
) -> Tensor:
    """The norm over the last axis of residual + dropout(x): x, residual (B, N, E); weight, bias (E)."""
    normalized, _, _ = _normalized(x, residual, seed, dropout_p, eps)
    return (normalized * weight.to(normalized.dtype) + bias.to(normalized.dtype)).to(x.dtype).contiguous()


def dropout_add_layer_norm_grad(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    bias: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients (dx, dresidual, dweight, dbias).

    With n the normalized z and g = dout weight:  dz = (g - mean(g) - n mean(g n)) / std;  dresidual = dz;
    dx = dropout'(dz);  dweight = sum dout n;  dbias = sum dout
    """
    normalized, rstd, factor = _normalized(x, residual, seed, dropout_p, eps)
    d = dout.to(normalized.dtype)
    g = d * weight.to(d.dtype)
    dz = (g - g.mean(-1, keepdim=True) - normalized * (g * normalized).mean(-1, keepdim=True)) * rstd
    dx = dz if factor is None else dz * factor
    dweight, dbias = (d * normalized).sum((0, 1)), d.sum((0, 1))
    return dx.to(x.dtype), dz.to(x.dtype), dweight.to(weight.dtype), dbias.to(bias.dtype)
