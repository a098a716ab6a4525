"""The transformer-decoder head, the baseline of the ML-Decoder paper."""

from __future__ import annotations

import torch
from torch import nn

from ._decoder import DecoderHead, Queries


class TransformerDecoder(DecoderHead):
    """A query per class, self-attention among the queries, cross-attention, feed-forward, and a pool to one logit.

    memory = relu(Linear(tokens)); t = LN1(q + dropout(attention(q, q, q)));
    t = LN2(t + dropout(attention(t, memory, memory))); t = LN3(t + dropout(FF(t)));
    logits[b, c] = t[b, c] . weight[c] + bias[c]

    Its cost is quadratic in the number of classes; without dropout the self-attention is the same for all images and
    is computed once.

    Args:
        in_features: D, the width of the features.
        num_classes: C, also the number of queries.
        embed_dim: E.
        num_heads: Heads of both attentions, a divisor of E.
        feedforward_dim: Width of the feed-forward layer.
        dropout: Rate in [0, 1) of all dropouts, that on the attention weights included.
        queries: "learnable", as in the paper; "fixed", random and not trained; or embeddings (C, E), kept as they are.
        group_init: How the pool's weight (C, E, 1) starts: "per_class", the default, uniform in +-1/sqrt(E) as a
            Linear layer's; or "xavier3d" as in `MLDecoder`.
        prior: Probability of every class at the start, see `Head`.
        loss: What `head(features, targets)` computes, see `Head`; binary cross-entropy by default.
        shared_query_dropout: Whether all images of a batch share the dropout masks of the queries. The query path up to
            the attention is then computed once per training step and not once per image; published code draws a mask
            for each image, as the default does. In evaluation it is computed once in any case.
        device: Of the parameters.
        dtype: Of the parameters.

    State dict: as `MLDecoder`, with `layers.0.self_attn.*` beside the others and `duplicate_pooling` (C, E, 1).

    Raises:
        ValueError: A width, number, rate, prior or name, or the shape of given queries, does not fit, or the loss has
            the reduction "none"; the message names it.
        TypeError: A width or number is no integer, queries are neither a name nor a floating tensor, or `loss` is no
            module with `options()`.

    Source:
        ML-Decoder, section 2.2, Eq. 2, Fig. 3 (left).
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        embed_dim: int = 768,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        dropout: float = 0.1,
        queries: Queries = "learnable",
        group_init: str = "per_class",
        prior: float | None = None,
        loss: nn.Module | None = None,
        shared_query_dropout: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            num_classes,
            embed_dim=embed_dim,
            num_heads=num_heads,
            feedforward_dim=feedforward_dim,
            dropout=dropout,
            queries=queries,
            group_init=group_init,
            prior=prior,
            loss=loss,
            self_attention=True,
            shared_query_dropout=shared_query_dropout,
            device=device,
            dtype=dtype,
        )

    def reset(self, num_classes: int, *, queries: Queries | None = None) -> None:
        """Replaces queries and pool by new ones of `num_classes` classes; the decoder keeps its weights.

        Args:
            num_classes: The new C.
            queries: New queries; given ones must be given anew if C changes. By default kept if C stays.

        Raises:
            ValueError: The number is below 1, the queries do not fit, or they must be given anew.
            TypeError: The number is no integer, or the queries are neither a name nor a floating tensor.
            RuntimeError: The head is sharded.
        """
        self._reset_last(num_classes, num_classes, queries)
