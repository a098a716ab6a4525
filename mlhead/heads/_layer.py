"""The decoder layer of the attention heads: post-norm, one layer, queries that do not depend on the image.

Parameter names are those of torch's TransformerDecoderLayer, which public checkpoints use.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check
from ..ops import query_attention, query_attention_weights


class Attention(nn.Module):
    """Multi-head attention with the parameters of torch's: in_proj_weight (3E, E), in_proj_bias, out_proj."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.dropout = embed_dim, num_heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, device=device, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, device=device, dtype=dtype))
        self.out_proj = nn.Linear(embed_dim, embed_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """As torch's MultiheadAttention: xavier-uniform over the stacked projections, biases 0."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.in_proj_bias)
        self.out_proj.reset_parameters()
        nn.init.zeros_(self.out_proj.bias)

    def query(self, t: Tensor) -> Tensor:
        """The projected queries."""
        E = self.embed_dim
        return F.linear(t, self.in_proj_weight[:E], self.in_proj_bias[:E])

    def key(self, memory: Tensor) -> Tensor:
        """The projected keys."""
        E = self.embed_dim
        return F.linear(memory, self.in_proj_weight[E : 2 * E], self.in_proj_bias[E : 2 * E])

    def forward(self, t: Tensor, memory: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Queries t (G, E) or (B, G, E) over memory (B, L, E): (B, G, E)."""
        E = self.embed_dim
        keys_values = F.linear(memory, self.in_proj_weight[E:], self.in_proj_bias[E:])
        k, v = keys_values.split(E, dim=-1)
        dropout_p = self.dropout if self.training else 0.0
        out = query_attention(self.query(t), k, v, self.num_heads, dropout_p=dropout_p, key_mask=key_mask)
        return self.out_proj(out)

    def attend_to_itself(self, t: Tensor, dropout_p: float) -> Tensor:
        """Self-attention of queries (G, E) or (B, G, E)."""
        q, k, v = F.linear(t, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        split = (self.num_heads, self.embed_dim // self.num_heads)
        # SDPA wants a batch axis; queries shared by the batch are a batch of one.
        q, k, v = (a.reshape(-1, a.shape[-2], *split).transpose(1, 2) for a in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        return self.out_proj(out.transpose(1, 2).reshape(t.shape))

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"


class DecoderLayer(nn.Module):
    """One post-norm decoder layer.

    t = LN1(q + dropout(q)), or with self-attention LN1(q + dropout(attention(q, q, q)))
    t = LN2(t + dropout(attention(t, memory, memory)))
    t = LN3(t + dropout(linear2(dropout(relu(linear1(t))))))

    As long as no dropout tells the images apart, t up to LN1 is computed once, as (G, E), for the whole batch. In
    training every image draws its own masks, also that of the queries.

    Args:
        embed_dim: E.
        num_heads: A divisor of E.
        feedforward_dim: Width between linear1 and linear2.
        dropout: Rate in [0, 1) of all dropouts, that on the attention weights included.
        self_attention: Whether the queries attend to one another first.
        device: Of the parameters.
        dtype: Of the parameters.

    Source:
        ML-Decoder, Eq. 2 and 4, Fig. 3. In evaluation q + dropout(q) = 2 q; checkpoints depend on it.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
        *,
        self_attention: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where = "DecoderLayer"
        for name, value in (("embed_dim", embed_dim), ("num_heads", num_heads), ("feedforward_dim", feedforward_dim)):
            _check.check_positive(where, name, value)
        if embed_dim % num_heads:
            _check.fail(where, "num_heads", f"a divisor of embed_dim = {embed_dim}", num_heads)
        _check.check_probability(where, "dropout", dropout)
        self.dropout = dropout
        attention = (embed_dim, num_heads, dropout, device, dtype)
        self.self_attn = Attention(*attention) if self_attention else None
        self.multihead_attn = Attention(*attention)
        self.linear1 = nn.Linear(embed_dim, feedforward_dim, device=device, dtype=dtype)
        self.linear2 = nn.Linear(feedforward_dim, embed_dim, device=device, dtype=dtype)
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-5, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-5, device=device, dtype=dtype)
        self.norm3 = nn.LayerNorm(embed_dim, eps=1e-5, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """The defaults of torch's TransformerDecoderLayer."""
        for module in self.children():
            module.reset_parameters()  # type: ignore[operator]

    def _drop(self, t: Tensor) -> Tensor:
        return F.dropout(t, self.dropout, self.training)

    def queries(self, q: Tensor, batch: int, dropout: bool) -> Tensor:
        """The query path up to LN1 of q (G, E): (G, E) without dropout, (batch, G, E) with it."""
        if dropout:
            q = q.expand(batch, *q.shape)
        rate = self.dropout if dropout else 0.0
        residual = q if self.self_attn is None else self.self_attn.attend_to_itself(q, rate)
        return self.norm1(q + F.dropout(residual, rate, dropout))

    def forward(self, q: Tensor, memory: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Queries (G, E) decoded against memory (B, L, E): (B, G, E)."""
        t = self.queries(q, memory.shape[0], self.training and self.dropout > 0.0)
        t = self.norm2(t + self._drop(self.multihead_attn(t, memory, key_mask)))
        return self.norm3(t + self._drop(self.linear2(self._drop(F.relu(self.linear1(t))))))

    def attention_weights(self, q: Tensor, memory: Tensor, chosen: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Where the chosen queries, (K,) or (B, K) rows of q (G, E), look: (B, K, L), the mean over the heads."""
        t = self.queries(q, memory.shape[0], dropout=False)
        attn = self.multihead_attn
        return query_attention_weights(attn.query(t[chosen]), attn.key(memory), attn.num_heads, key_mask=key_mask)
