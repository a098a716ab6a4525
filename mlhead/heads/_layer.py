"""The decoder layer of the attention heads: post-norm, one layer, queries that do not depend on the image.

Parameter names are those of torch's TransformerDecoderLayer, which public checkpoints use.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check
from ..ops import dropout_add_layer_norm, query_attention, query_attention_weights, relu_dropout
from ..ops.dropout_add_layer_norm import dropout_add
from ._absorb import absorbs


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

    def forward(
        self,
        t: Tensor,
        memory: Tensor,
        key_mask: Tensor | None = None,
        *,
        dropout_p: float = 0.0,
        seed: Tensor | None = None,
    ) -> Tensor:
        """Queries t (G, E) or (B, G, E) over memory (B, L, E): (B, G, E).

        A bias of the keys shifts all scores of a query alike and changes nothing: it is left out, and its gradient is
        0. That of the values passes straight to the output where the weights of a query sum to 1.
        """
        B, L, E = memory.shape
        sums_to_one = dropout_p == 0.0 and key_mask is None
        options: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed, "key_mask": key_mask}
        query_bias, _, value_bias = self.in_proj_bias.split(E)
        device_type = memory.device.type
        if absorbs(B, t.shape[-2], L, E, self.num_heads, shared=t.ndim == 2, device_type=device_type):
            out = self._attend_absorbed(t, memory, sums_to_one, options)
        else:
            # Split, not sliced: the gradient of a slice is a whole weight of zeros.
            query_weight, memory_weight = self.in_proj_weight.split((E, 2 * E))
            k, v = F.linear(memory, memory_weight, None if sums_to_one else F.pad(value_bias, (E, 0))).split(E, dim=-1)
            out = query_attention(F.linear(t, query_weight, query_bias), k, v, self.num_heads, **options)
        if not sums_to_one:
            return self.out_proj(out)
        if not _is_plain(self.out_proj, nn.Linear):
            return self.out_proj(out + value_bias)
        weight = self.out_proj.weight
        return F.linear(out, weight, self.out_proj.bias + F.linear(value_bias, weight))

    def _attend_absorbed(self, t: Tensor, memory: Tensor, sums_to_one: bool, options: dict[str, Any]) -> Tensor:
        """Attention before out_proj with the projections of keys and values on the queries' side (see `_absorb`)."""
        H, E = self.num_heads, self.embed_dim
        G, d = t.shape[-2], E // H
        key_weight, value_weight = self.in_proj_weight[E:].unflatten(0, (2, H, d))
        queries = torch.einsum("...ghd,hde->...hge", self.query(t).unflatten(-1, (H, d)), key_weight).flatten(-3, -2)
        if not sums_to_one:
            # A feature that is 1 everywhere carries the sum of a query's weights to the values' bias; eight, so that
            # rows stay aligned.
            memory, queries = F.pad(memory, (0, 8), value=1.0), F.pad(queries, (0, 8))
            bias = F.pad(self.in_proj_bias[2 * E :].view(H, d, 1), (0, 7))
            value_weight = torch.cat((value_weight, bias), dim=-1)
        # One head of the memory's width: the op divides by the root of that width.
        out = query_attention(queries * math.sqrt(memory.shape[-1] / d), memory, memory, 1, **options)
        return torch.einsum("bhge,hde->bghd", out.unflatten(1, (H, G)), value_weight).flatten(-2)

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, dropout={self.dropout}"


class SelfAttention(Attention):
    """The same among the queries."""

    def forward(self, t: Tensor, dropout_p: float) -> Tensor:  # type: ignore[override]
        """Queries (G, E) or (B, G, E) over one another."""
        q, k, v = F.linear(t, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        split = (self.num_heads, self.embed_dim // self.num_heads)
        # SDPA wants a batch axis; queries shared by the batch are a batch of one.
        q, k, v = (a.reshape(-1, a.shape[-2], *split).transpose(1, 2) for a in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p)
        return self.out_proj(out.transpose(1, 2).reshape(t.shape))


class DecoderLayer(nn.Module):
    """One post-norm decoder layer.

    t = LN1(q + dropout(q)), or with self-attention LN1(q + dropout(attention(q, q, q)))
    t = LN2(t + dropout(attention(t, memory, memory)))
    t = LN3(t + dropout(linear2(dropout(relu(linear1(t))))))

    As long as no dropout tells the images apart, t up to LN1 is computed once, as (G, E), for the whole batch. In
    training every image draws its own masks, also that of the queries, unless `shared_query_dropout` is set.

    Args:
        embed_dim: E.
        num_heads: A divisor of E.
        feedforward_dim: Width between linear1 and linear2.
        dropout: Rate in [0, 1) of all dropouts, that on the attention weights included.
        self_attention: Whether the queries attend to one another first.
        shared_query_dropout: Whether all images of a batch share the masks before LN1, so that in training too the
            query path is computed once.
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
        shared_query_dropout: bool = False,
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
        self.dropout, self.shared_query_dropout = dropout, shared_query_dropout
        attention = (embed_dim, num_heads, dropout, device, dtype)
        self.self_attn = SelfAttention(*attention) if self_attention else None
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

    def queries(self, q: Tensor, batch: int, dropout_p: float = 0.0, seed: Tensor | None = None) -> Tensor:
        """The query path up to LN1 of q (G, E): (batch, G, E) where every image has its own dropout, else (G, E)."""
        alike = dropout_p == 0.0 or self.shared_query_dropout
        t = q if alike else q.expand(batch, *q.shape)
        attended = t if self.self_attn is None else self.self_attn(t, dropout_p)
        if alike:  # the op wants a batch axis
            return _add_norm(attended[None], t[None], self.norm1, dropout_p, seed)[0]
        return _add_norm(attended, t, self.norm1, dropout_p, seed)

    def forward(self, q: Tensor, memory: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Queries (G, E) decoded against memory (B, L, E): (B, G, E)."""
        p = self.dropout if self.training else 0.0
        seeds: Any = [None] * 5
        if p > 0.0:
            # One draw for all masks, on the device: no synchronisation, and CUDA graphs replay it anew.
            seeds = torch.randint(0, 2**62, (5,), dtype=torch.int64, device=memory.device).unbind()
        t = self.queries(q, memory.shape[0], p, seeds[0])
        attended = self.multihead_attn(t, memory, key_mask, dropout_p=p, seed=seeds[1])
        t = _add_norm(attended, t.expand_as(attended), self.norm2, p, seeds[2])
        hidden = relu_dropout(self.linear1(t), dropout_p=p, seed=seeds[3])
        return _add_norm(self.linear2(hidden), t, self.norm3, p, seeds[4])

    def attention_weights(self, q: Tensor, memory: Tensor, chosen: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Where the chosen queries, (K,) or (B, K) rows of q (G, E), look: (B, K, L), the mean over the heads."""
        t = self.queries(q, memory.shape[0])
        attn = self.multihead_attn
        return query_attention_weights(attn.query(t[chosen]), attn.key(memory), attn.num_heads, key_mask=key_mask)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of a module does what the forward of its kind does and nothing else, so that an op may do it."""
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) is kind and not hooks and "forward" not in module.__dict__


def _add_norm(x: Tensor, residual: Tensor, norm: nn.LayerNorm, dropout_p: float, seed: Tensor | None) -> Tensor:
    if _is_plain(norm, nn.LayerNorm):
        return dropout_add_layer_norm(x, residual, norm.weight, norm.bias, dropout_p=dropout_p, eps=norm.eps, seed=seed)
    z = dropout_add(x, residual, dropout_p=dropout_p, seed=seed)
    return norm(z).to(z.dtype)
