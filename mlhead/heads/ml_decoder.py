"""The ML-Decoder head: few group queries, each the logits of many classes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import _check
from ._decoder import DecoderHead, Queries

DEFAULT_GROUPS = 100


class MLDecoder(DecoderHead):
    """ML-Decoder: G queries attend to the image, and each makes the logits of its own J = ceil(C / G) classes.

    memory = relu(Linear(tokens)); t = LN1(q + dropout(q)); t = LN2(t + dropout(attention(t, memory, memory)));
    t = LN3(t + dropout(FF(t))); logits[b, c] = t[b, c div J] . weight[c div J, :, c mod J] + bias[c]

    Args:
        in_features: D, the width of the features.
        num_classes: C.
        groups: G, at most C; a larger number means C. C itself is full decoding, one query per class. By default
            min(100, C), or the number of given queries.
        embed_dim: E.
        num_heads: Heads of the attention, a divisor of E.
        feedforward_dim: Width of the feed-forward layer.
        dropout: Rate in [0, 1) of all dropouts, that on the attention weights included.
        queries: "fixed": random and not trained, as published; "learnable"; or embeddings (G, E), which are kept as
            they are. The paper finds the three equal in accuracy (Table 7). Fixed and given queries are in the state
            dict and do not require a gradient.
        group_init: How the group weight (G, E, J) starts. "xavier3d", the default, is the published one: a normal
            distribution of std sqrt(2 / (J (E + G))), which shrinks with the number of classes (0.049 at 80 classes,
            0.0005 at 1M in 100 groups). "per_class" is uniform in +-1/sqrt(E), a Linear layer's, at any number.
        prior: Probability of every class at the start, see `Head`.
        loss: What `head(features, targets)` computes, see `Head`; binary cross-entropy by default.
        shared_query_dropout: Whether all images of a batch share the dropout masks of the queries. The query path up to
            the attention is then computed once per training step and not once per image; published code draws a mask
            for each image, as the default does. In evaluation it is computed once in any case.
        device: Of the parameters.
        dtype: Of the parameters.

    State dict: the keys of public checkpoints without `decoder.`: `layers.0.*`, `embed_standart.*` (sic),
    `query_embed.weight` (G, E), `duplicate_pooling` (G, E, J), `duplicate_pooling_bias` (C).

    Raises:
        ValueError: A width, number, rate, prior or name, or the shape of given queries, does not fit, or the loss has
            the reduction "none"; the message names it.
        TypeError: A width or number is no integer, queries are neither a name nor a floating tensor, or `loss` is no
            module with `options()`.

    Numerics:
        Published code computes J as int(C / G + 0.999), which is not the ceiling at C = 2001, G = 2000; here it is.

    Source:
        ML-Decoder, section 2.3.2, Eq. 3 and 4, Fig. 3 and 4.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        groups: int | None = None,
        embed_dim: int = 768,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        dropout: float = 0.1,
        queries: Queries = "fixed",
        group_init: str = "xavier3d",
        prior: float | None = None,
        loss: nn.Module | None = None,
        shared_query_dropout: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check.check_positive("MLDecoder", "num_classes", num_classes)
        super().__init__(
            in_features,
            num_classes,
            _choose_groups(num_classes, groups, queries),
            embed_dim=embed_dim,
            num_heads=num_heads,
            feedforward_dim=feedforward_dim,
            dropout=dropout,
            queries=queries,
            group_init=group_init,
            prior=prior,
            loss=loss,
            self_attention=False,
            shared_query_dropout=shared_query_dropout,
            device=device,
            dtype=dtype,
        )
        self._requested, self._full = groups, groups == num_classes

    def reset(self, num_classes: int, *, groups: int | None = None, queries: Queries | None = None) -> None:
        """Replaces the group layer by a new one of `num_classes` classes; the decoder keeps its weights.

        Args:
            num_classes: The new C.
            groups: The new G. By default as asked for at construction: full decoding stays full, a number is
                min(number, C), None min(100, C).
            queries: New queries. By default they are kept if G stays, and drawn anew otherwise; given queries must
                then be given anew.

        Raises:
            ValueError: A number is below 1, the queries do not fit, or they must be given anew.
            TypeError: A number is no integer, or the queries are neither a name nor a floating tensor.
            RuntimeError: The head is sharded.
        """
        _check.check_positive("MLDecoder", "num_classes", num_classes)
        requested, full = self._requested, self._full
        if groups is not None:
            requested, full = groups, groups == num_classes
        if full:
            requested = num_classes
        if requested is None and queries is None and self.queries == "given":
            chosen = min(self.groups, num_classes)
        else:
            chosen = _choose_groups(num_classes, requested, queries)
        self._reset_last(num_classes, chosen, queries)
        self._requested, self._full = requested, full


def _choose_groups(num_classes: int, groups: int | None, queries: Queries | None) -> int:
    if groups is None:
        if not isinstance(queries, Tensor) or queries.ndim != 2:
            return min(DEFAULT_GROUPS, num_classes)
        groups = queries.shape[0]
        if groups > num_classes:
            _check.fail(
                "MLDecoder", "queries", f"at most num_classes = {num_classes} rows (G, E)", tuple(queries.shape)
            )
        return groups
    _check.check_positive("MLDecoder", "groups", groups)
    return min(groups, num_classes)
