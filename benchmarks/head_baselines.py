"""Heads of plain torch with the parameters of an mlhead head, for comparison.

Those of ML-Decoder follow its Fig. 3 and App. L: post-norm, one layer, dropout in training for each image.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlhead import CSRAHead, MLDecoder

from .baselines import Baseline


class PlainHead(nn.Module):
    """A function of a head of mlhead, whose parameters it takes, and of features."""

    def __init__(self, head: nn.Module, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.function = head, function

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C)."""
        return self.function(self.head, features)


def _csra_logits(pool: Baseline, head: CSRAHead, features: Tensor) -> Tensor:
    options: dict[str, Any] = {"temperatures": head.temperatures, "lam": head.lam, "normalize": head.normalize}
    return pool(features, head.weight, head.bias, average=1.0, **options)


def plain_csra(head: CSRAHead, pool: Baseline) -> PlainHead:
    """A CSRA head, of maps or tokens, by a baseline of csra_pool."""
    return PlainHead(head, partial(_csra_logits, pool))


class PlainDecoder(nn.Module):
    """What the two baselines share; they hold the parameters of an `MLDecoder`, so that all compute the same."""

    def __init__(self, head: MLDecoder) -> None:
        super().__init__()
        self.head, self.layer = head, head.layers[0]
        self.attention = self.layer.multihead_attn

    def _drop(self, t: Tensor) -> Tensor:
        return F.dropout(t, self.layer.dropout, self.training)

    def _queries(self, t: Tensor) -> Tensor:
        return self.layer.norm1(t + self._drop(t))

    def _rest(self, t: Tensor, attended: Tensor) -> Tensor:
        layer = self.layer
        t = layer.norm2(t + self._drop(attended))
        return layer.norm3(t + self._drop(layer.linear2(self._drop(F.relu(layer.linear1(t))))))

    def _memory(self, features: Tensor) -> Tensor:
        return F.relu(self.head.embed_standart(features.flatten(2).transpose(1, 2)))


class PapersDecoder(PlainDecoder):
    """The published formulation: queries expanded over the batch, torch's multi-head attention, a loop over groups."""

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of maps (B, D, height, width)."""
        attention, head = self.attention, self.head
        memory = self._memory(features).transpose(0, 1)
        t = self._queries(head.query_embed.weight.unsqueeze(1).expand(-1, features.shape[0], -1))
        attended, _ = F.multi_head_attention_forward(
            t, memory, memory, attention.embed_dim, attention.num_heads, attention.in_proj_weight,
            attention.in_proj_bias, None, None, False, self.layer.dropout if self.training else 0.0,
            attention.out_proj.weight, attention.out_proj.bias, training=self.training,
        )  # fmt: skip
        h = self._rest(t, attended).transpose(0, 1)
        weight = head.duplicate_pooling
        logits = torch.zeros(*h.shape[:2], weight.shape[2], device=h.device, dtype=h.dtype)
        for g in range(weight.shape[0]):
            logits[:, g, :] = torch.matmul(h[:, g, :], weight[g])
        return logits.flatten(1)[:, : head.num_classes] + head.duplicate_pooling_bias


class RewrittenDecoder(PlainDecoder):
    """A careful rewrite in plain torch: one product for keys and values, SDPA, bmm."""

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of maps (B, D, height, width)."""
        attention, head = self.attention, self.head
        E, H, B = attention.embed_dim, attention.num_heads, features.shape[0]
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        memory = self._memory(features)
        t = self._queries(head.query_embed.weight.expand(B, -1, -1))
        q = F.linear(t, weight[:E], bias[:E])
        k, v = F.linear(memory, weight[E:], bias[E:]).chunk(2, -1)
        q, k, v = (a.unflatten(-1, (H, -1)).transpose(1, 2) for a in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.layer.dropout if self.training else 0.0)
        h = self._rest(t, attention.out_proj(out.transpose(1, 2).reshape(B, -1, E)))
        logits = torch.bmm(h.transpose(0, 1), head.duplicate_pooling).transpose(0, 1).flatten(1)
        return logits[:, : head.num_classes] + head.duplicate_pooling_bias
