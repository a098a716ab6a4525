"""Multi-head cross-attention of a set of queries: ML-Decoder, Eq. 1 and 4."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._dropout import factors


def _heads(t: Tensor, num_heads: int) -> Tensor:
    """(..., N, E) as (..., H, N, E / H)."""
    return t.unflatten(-1, (num_heads, -1)).transpose(-2, -3)


def _merge(t: Tensor) -> Tensor:
    """(..., H, N, E / H) as (..., N, E)."""
    return t.transpose(-2, -3).flatten(-2)


def attention_weights(q: Tensor, k: Tensor, key_mask: Tensor | None, num_heads: int) -> Tensor:
    """p[b, h, g, l] = softmax_l(q_h[g] . k_h[b, l] / sqrt(E / H)), in fp32 or wider; 0 where every key is masked.

    NaN where keys may be attended and all their scores are -inf.
    """
    scale = 1.0 / math.sqrt(q.shape[-1] // num_heads)
    scores = torch.matmul(_heads(q, num_heads), _heads(k, num_heads).transpose(-1, -2))
    scores = scores.to(torch.promote_types(q.dtype, torch.float32)) * scale
    if key_mask is None:
        return torch.softmax(scores, -1)
    keep = key_mask[:, None, None, :]
    scores = scores.masked_fill(~keep, -math.inf)
    # The lowest finite score where an image has no key at all: such a row has no NaN to spread in any derivative.
    scores = scores.masked_fill(~keep.any(-1, keepdim=True), torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, -1)
    return weights * keep


def _dropped(p: Tensor, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The weights after dropout, and the factors that were applied."""
    B, H, G, L = p.shape
    factor = factors(seed, dropout_p, B, H, G, L, dtype=p.dtype)
    return (p if factor is None else p * factor), factor


def query_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    dropout_p: float,
) -> Tensor:
    """out[b, g, :] = concat_h dropout(softmax_l(q_h[g] . k_h[b, l] / sqrt(E / H))) v_h[b, l].

    q (G, E) for all images or (B, G, E); k, v (B, L, E); key_mask (B, L) bool, True where a key may be attended;
    seed: int64 scalar tensor -> out (B, G, E).
    """
    p, _ = _dropped(attention_weights(q, k, key_mask, num_heads), dropout_p, seed)
    return _merge(torch.matmul(p.to(v.dtype), _heads(v, num_heads))).contiguous()


def query_attention_grad(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    seed: Tensor | None,
    num_heads: int,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients (dq, dk, dv); dq of shared queries is summed over the batch.

    dv = p~^T dout;  dp = dropout'(dout v^T);  ds = p (dp - sum_l p dp);  dq = ds k / sqrt(d);  dk = ds^T q / sqrt(d)
    with p~ the weights after dropout and d = E / H.
    """
    scale = 1.0 / math.sqrt(q.shape[-1] // num_heads)
    p = attention_weights(q, k, key_mask, num_heads)
    p_dropped, factor = _dropped(p, dropout_p, seed)
    dout_h, v_h = _heads(dout, num_heads), _heads(v, num_heads)
    dv = torch.matmul(p_dropped.to(v.dtype).transpose(-1, -2), dout_h)
    dp = torch.matmul(dout_h, v_h.transpose(-1, -2)).to(p.dtype)
    if factor is not None:
        dp = dp * factor
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * scale).to(q.dtype)
    dk = torch.matmul(ds.transpose(-1, -2), _heads(q, num_heads))
    if q.ndim == 2:
        # One sum over images and positions, so that 16-bit inputs are rounded once.
        dq = torch.einsum("bhgl,bhld->hgd", ds, _heads(k, num_heads))
    else:
        dq = torch.matmul(ds, _heads(k, num_heads))
    return _merge(dq), _merge(dk), _merge(dv)
