"""The heads on the `small` workload, ours and rewritten in plain torch with the same parameters: see overhead.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlhead import CSRAHead, GAPHead, MLDecoder, TransformerDecoder, ZeroShotMLDecoder

from .baselines import csra_pool_matmul
from .head_baselines import PlainHead, RewrittenDecoder, plain_csra

# `small` as the ops have it; the feed-forward layer is relu_dropout's.
B, L, D, E, G, C, FEEDFORWARD, WORDS = 2, 49, 512, 256, 20, 20, 2048, 300


def _gap_logits(head: GAPHead, features: Tensor) -> Tensor:
    return F.linear(features.mean((2, 3)), head.fc.weight, head.fc.bias)


class PlainQueries(RewrittenDecoder):
    """The rewrite of ML-Decoder for heads with other queries: self-attention among them, or made of word vectors."""

    def __init__(self, head: TransformerDecoder | ZeroShotMLDecoder) -> None:
        super().__init__(head)  # type: ignore[arg-type]
        self.vectors = head.bank() if isinstance(head, ZeroShotMLDecoder) else None

    def _queries(self, t: Tensor) -> Tensor:
        if self.layer.self_attn is None:
            return super()._queries(t)
        attention, p = self.layer.self_attn, self.layer.dropout if self.training else 0.0
        qkv = F.linear(t, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        q, k, v = (a.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for a in qkv)
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return self.layer.norm1(t + self._drop(attention.out_proj(out.transpose(1, 2).flatten(2))))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of maps (B, D, height, width)."""
        head, attention = self.head, self.attention
        E, H = attention.embed_dim, attention.num_heads
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        memory = self._memory(features)
        queries = head.query_embed.weight if self.vectors is None else F.relu(head.wordvec_proj(self.vectors))
        t = self._queries(queries.expand(features.shape[0], -1, -1))
        q = F.linear(t, weight[:E], bias[:E])
        k, v = F.linear(memory, weight[E:], bias[E:]).chunk(2, -1)
        q, k, v = (a.unflatten(-1, (H, -1)).transpose(1, 2) for a in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=self.layer.dropout if self.training else 0.0)
        h = self._rest(t, attention.out_proj(out.transpose(1, 2).flatten(2)))
        # One query a class: its own weight (C, E, 1), or in the zero-shot head one (E, 1) for all.
        return (h * head.duplicate_pooling.squeeze(-1)).sum(-1) + head.duplicate_pooling_bias


def _decoder_options(device: str, dtype: torch.dtype) -> dict[str, Any]:
    return {"embed_dim": E, "feedforward_dim": FEEDFORWARD, "device": device, "dtype": dtype}


def _ml_decoder(device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    head = MLDecoder(D, C, groups=G, **_decoder_options(device, dtype))
    return head, RewrittenDecoder(head)


def _zero_shot(device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    vectors = torch.randn(C, WORDS, device=device, dtype=dtype)
    head = ZeroShotMLDecoder(D, C, word_vectors=vectors, **_decoder_options(device, dtype))
    return head, PlainQueries(head)


def _transformer(device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    head = TransformerDecoder(D, C, **_decoder_options(device, dtype))
    return head, PlainQueries(head)


def _gap(device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    head = GAPHead(D, C, device=device, dtype=dtype)
    return head, PlainHead(head, _gap_logits)


def _csra(device: str, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    head = CSRAHead(D, C, device=device, dtype=dtype)
    return head, plain_csra(head, csra_pool_matmul)


# Each gives a head and its rewrite in plain torch, which holds the same parameters.
HEADS: dict[str, Callable[[str, torch.dtype], tuple[nn.Module, nn.Module]]] = {
    "gap": _gap,
    "csra": _csra,
    "ml_decoder": _ml_decoder,
    "zero_shot_ml_decoder": _zero_shot,
    "transformer_decoder": _transformer,
}
