"""Class-specific residual attention: CSRA, Eq. 2-8, 13 and section 3.4."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def _accumulate(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _normalized(weight: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    """The classifiers w / |w| and the norms |w| (1 for a zero row, which so stays zero), in fp32 or wider."""
    weight = weight.to(_accumulate(weight.dtype))
    if not normalize:
        return weight, weight.new_ones(())
    norm = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    norm = torch.where(norm == 0, 1.0, norm)
    return weight / norm, norm


def _scores(x: Tensor, weight: Tensor, bias: Tensor | None, normalize: bool) -> Tensor:
    """s[h, b, c, l] = sum_d x[b, l, d] w[h, c, d] + bias[h, c]; the product in the dtype of x, the rest in fp32."""
    wn = _normalized(weight, normalize)[0].to(x.dtype)
    s = torch.einsum("bld,hcd->hbcl", x, wn).to(_accumulate(x.dtype))
    return s if bias is None else s + bias[:, None, :, None]


def _first_maximum(s: Tensor) -> Tensor:
    """The first position l of the maximum, as an index with a last axis of 1."""
    L = s.shape[-1]
    positions = torch.arange(L, device=s.device)
    return torch.where(s == s.amax(-1, keepdim=True), positions, L - 1).amin(-1, keepdim=True)


def _attention(s: Tensor, temperature: float) -> Tensor:
    """softmax_l(T s), or the one-hot of the first maximum for T = inf."""
    if temperature == math.inf:
        return torch.zeros_like(s).scatter(-1, _first_maximum(s), 1.0)
    return torch.softmax(temperature * s, -1)


def csra_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperatures: Sequence[float],
    lam: Sequence[float],
    normalize: bool,
) -> Tensor:
    """logits[b, c] = sum_h (mean_l s[h,b,c,l] + lam_h A_{T_h}(s[h,b,c,:])).

    A_T(s) = sum_l softmax_l(T s)_l s_l and A_inf(s) = max_l s_l.
    x (B, L, D), weight (H, C, D), bias (H, C) or None, temperatures and lam: H numbers each -> logits (B, C).
    """
    s = _scores(x, weight, bias, normalize)
    logits = s.mean(-1).sum(0)
    for s_h, T, lam_h in zip(s, temperatures, lam, strict=True):
        if T < math.inf:
            pooled = (_attention(s_h, T) * s_h).sum(-1)
        else:
            # A one-hot times a score would carry no more than the gather, and turn 0 * inf into NaN.
            pooled = s_h.gather(-1, _first_maximum(s_h)).squeeze(-1)
        logits = logits + lam_h * pooled
    return logits.to(x.dtype)


def csra_pool_grad(
    dlogits: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperatures: Sequence[float],
    lam: Sequence[float],
    normalize: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients (dx, dweight, dbias):

    ds_l = dlogit (1/L + lam p_l (1 + T (s_l - A))) with p = softmax(T s), and p_l = [l is the first maximum] without
    the factor in T for T = inf; dx = ds w; dw = ds x, through the norm: (dwn - wn <dwn, wn>) / |w|.
    """
    s = _scores(x, weight, bias, normalize)
    dlogits = dlogits.to(s.dtype)[:, :, None]
    heads = []
    for s_h, T, lam_h in zip(s, temperatures, lam, strict=True):
        p = _attention(s_h, T)
        if T < math.inf:
            p = p * (1.0 + T * (s_h - (p * s_h).sum(-1, keepdim=True)))
        heads.append(dlogits * (1.0 / s.shape[-1] + lam_h * p))
    ds = torch.stack(heads) if heads else torch.zeros_like(s)
    wn, norm = _normalized(weight, normalize)
    dx = torch.einsum("hbcl,hcd->bld", ds.to(x.dtype), wn.to(x.dtype))
    dw = torch.einsum("hbcl,bld->hcd", ds.to(x.dtype), x).to(wn.dtype)
    if normalize:
        dw = (dw - wn * (dw * wn).sum(-1, keepdim=True)) / norm
    return dx, dw.to(weight.dtype), None if bias is None else ds.sum((1, 3)).to(bias.dtype)


def csra_attention(
    x: Tensor, weight: Tensor, bias: Tensor | None, temperatures: Sequence[float], normalize: bool
) -> Tensor:
    """p[b, h, c, l] = softmax_l(T_h s[h, b, c, :]) (CSRA Eq. 2), the one-hot of the first maximum for T = inf."""
    s = _scores(x, weight, bias, normalize)
    maps = [_attention(s_h, T) for s_h, T in zip(s, temperatures, strict=True)]
    return torch.stack(maps, 1).to(x.dtype)
