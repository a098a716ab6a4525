"""Class-specific residual attention: CSRA, Eq. 2-8, 13 and section 3.4.

The scores (H, B, C, L) never exist whole: both functions go through the classes a chunk at a time, and the gradient
makes the scores of a chunk again. (Where torch's autograd goes through the forward, under torch.func, it keeps them.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_CHUNK = 1 << 21  # scores that exist at a time


def _chunks(x: Tensor, weight: Tensor) -> list[slice]:
    """The classes in slices whose scores number at most _CHUNK; all at once under torch.func and symbolic sizes."""
    H, C = weight.shape[:2]
    per_class = x.shape[0] * x.shape[1] * H
    if not all(type(n) is int for n in (per_class, C)) or torch._C._functorch.maybe_current_level() is not None:
        return [slice(0, C)]
    step = max(1, _CHUNK // max(1, per_class))
    return [slice(c, min(c + step, C)) for c in range(0, C, step)] or [slice(0, 0)]


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


def _pool(s: Tensor, temperatures: Sequence[float], lam: Sequence[float], average: float) -> Tensor:
    """The logits of scores (H, B, C, L), summed over the heads, in the dtype of the scores."""
    logits = average * s.mean(-1).sum(0)
    for s_h, T, lam_h in zip(s, temperatures, lam, strict=True):
        if T < math.inf:
            pooled = (_attention(s_h, T) * s_h).sum(-1)
        else:
            # A one-hot times a score would carry no more than the gather, and turn 0 * inf into NaN.
            pooled = s_h.gather(-1, _first_maximum(s_h)).squeeze(-1)
        logits = logits + lam_h * pooled
    return logits


def csra_pool(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperatures: Sequence[float],
    lam: Sequence[float],
    normalize: bool,
    average: float,
) -> Tensor:
    """logits[b, c] = sum_h (average mean_l s[h,b,c,l] + lam_h A_{T_h}(s[h,b,c,:])).

    A_T(s) = sum_l softmax_l(T s)_l s_l and A_inf(s) = max_l s_l.
    x (B, L, D), weight (H, C, D), bias (H, C) or None, temperatures and lam: H numbers each -> logits (B, C).
    """
    chunks = _chunks(x, weight)
    if len(chunks) == 1:
        return _pool(_scores(x, weight, bias, normalize), temperatures, lam, average).to(x.dtype)
    logits = x.new_empty(x.shape[0], weight.shape[1])
    for c in chunks:
        s = _scores(x, weight[:, c], None if bias is None else bias[:, c], normalize)
        logits[:, c] = _pool(s, temperatures, lam, average).to(x.dtype)
    return logits


def _score_gradient(
    s: Tensor, dlogits: Tensor, temperatures: Sequence[float], lam: Sequence[float], average: float
) -> Tensor:
    """The gradient ds (H, B, C, L) of the scores for dlogits (B, C):

    ds_l = dlogit (average / L + lam p_l (1 + T (s_l - A))) with p = softmax(T s), and p_l = [l is the first maximum]
    without the factor in T for T = inf.
    """
    dlogits = dlogits.to(s.dtype)[:, :, None]
    heads = []
    for s_h, T, lam_h in zip(s, temperatures, lam, strict=True):
        p = _attention(s_h, T)
        if T < math.inf:
            below = s_h - s_h.amax(-1, keepdim=True)  # s - A without the bits that a common offset takes
            p = p * (1.0 + T * (below - (p * below).sum(-1, keepdim=True)))
        heads.append(dlogits * (average / s.shape[-1] + lam_h * p))
    return torch.stack(heads) if heads else torch.zeros_like(s)


def csra_pool_grad(
    dlogits: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperatures: Sequence[float],
    lam: Sequence[float],
    normalize: bool,
    average: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients (dx, dweight, dbias):

    dx = ds w; dw = ds x, through the norm: (dwn - wn <dwn, wn>) / |w|; dbias = sum_b,l ds.
    """

    def of_classes(c: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        s = _scores(x, weight[:, c], None if bias is None else bias[:, c], normalize)
        ds = _score_gradient(s, dlogits[:, c], temperatures, lam, average)
        wn, norm = _normalized(weight[:, c], normalize)
        dx = torch.einsum("hbcl,hcd->bld", ds.to(x.dtype), wn.to(x.dtype)).to(_accumulate(x.dtype))
        dw = torch.einsum("hbcl,bld->hcd", ds.to(x.dtype), x).to(wn.dtype)
        if normalize:
            dw = (dw - wn * (dw * wn).sum(-1, keepdim=True)) / norm
        return dx, dw.to(weight.dtype), None if bias is None else ds.sum((1, 3)).to(bias.dtype)

    chunks = _chunks(x, weight)
    if len(chunks) == 1:  # written without a write, for what makes a graph
        dx, dweight, dbias = of_classes(chunks[0])
        return dx.to(x.dtype), dweight, dbias
    dx = torch.zeros(x.shape, dtype=_accumulate(x.dtype), device=x.device)
    dweight = torch.zeros(weight.shape, dtype=weight.dtype, device=weight.device)
    dbias = None if bias is None else torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    for c in chunks:
        dx_part, dweight[:, c], dbias_part = of_classes(c)
        dx += dx_part
        if dbias is not None and dbias_part is not None:
            dbias[:, c] = dbias_part
    return dx.to(x.dtype), dweight, dbias


def csra_attention(
    x: Tensor, weight: Tensor, bias: Tensor | None, temperatures: Sequence[float], normalize: bool
) -> Tensor:
    """p[b, h, c, l] = softmax_l(T_h s[h, b, c, :]) (CSRA Eq. 2), the one-hot of the first maximum for T = inf.

    weight (H, C, D), or (H, B, C, D) for classes that differ between images, without a bias.
    """
    if weight.ndim == 3:
        s = _scores(x, weight, bias, normalize)
    else:
        wn = _normalized(weight, normalize)[0].to(x.dtype)
        s = torch.einsum("bld,hbcd->hbcl", x, wn).to(_accumulate(x.dtype))
    maps = [_attention(s_h, T) for s_h, T in zip(s, temperatures, strict=True)]
    return torch.stack(maps, 1).to(x.dtype)
