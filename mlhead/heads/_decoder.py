"""What the attention heads share: memory and decoder layer; queries and the group fully-connected layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check
from ..ops import SparseTargets, group_fc, group_fc_loss, group_fc_topk
from ..ops._loss_options import Targets
from ..ops._loss_update import Update
from ._base import Head, as_tokens, best_classes, factory
from ._layer import DecoderLayer

Queries = Literal["fixed", "learnable"] | Tensor
GROUP_INITS = ("xavier3d", "per_class")


class AttentionHead(Head):
    """A head whose queries read the image by attention: the memory and one decoder layer."""

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        embed_dim: int,
        num_heads: int,
        feedforward_dim: int,
        dropout: float,
        prior: float | None,
        loss: nn.Module | None,
        self_attention: bool,
        shared_query_dropout: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(in_features, num_classes, prior, loss)
        self.embed_dim = embed_dim
        self.layers = nn.ModuleList(
            [
                DecoderLayer(
                    embed_dim,
                    num_heads,
                    feedforward_dim,
                    dropout,
                    self_attention=self_attention,
                    shared_query_dropout=shared_query_dropout,
                    device=device,
                    dtype=dtype,
                )
            ]
        )
        self.embed_standart = nn.Linear(in_features, embed_dim, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Draws everything anew but given queries or word vectors."""
        for layer in self.layers:
            layer.reset_parameters()  # type: ignore[operator]
        self.embed_standart.reset_parameters()

    @property
    def _layer(self) -> DecoderLayer:
        layer = self.layers[0]
        assert isinstance(layer, DecoderLayer)
        return layer

    def _memory(self, features: Tensor) -> Tensor:
        self._check_features(features, self.embed_standart.weight)
        return F.relu(self.embed_standart(as_tokens(features)))


class DecoderHead(AttentionHead):
    """An attention head of G queries of its own, each of which makes the logits of its own classes.

    Use `MLDecoder` or `TransformerDecoder`.
    """

    def __init__(
        self, in_features: int, num_classes: int, groups: int, *, queries: Queries, group_init: str, **options: Any
    ) -> None:
        super().__init__(in_features, num_classes, **options)
        _check.check_choice(type(self).__name__, "group_init", group_init, GROUP_INITS)
        _check_queries(type(self).__name__, queries, groups, self.embed_dim)
        self.group_init = group_init
        self._make_last(groups, queries, self.embed_standart.weight)
        self.reset_parameters()

    def _make_last(self, groups: int, queries: Queries | None, like: Tensor) -> None:
        """New queries (unless None) and a new group layer, of the device and dtype of `like`, not yet drawn."""
        E, C = self.embed_dim, self.num_classes
        self.groups = groups
        if queries is not None:
            self.queries = queries if isinstance(queries, str) else "given"
            self.query_embed = nn.Embedding(groups, E, **factory(like))
            self.query_embed.train(self.training)
            self.query_embed.weight.requires_grad_(self.queries == "learnable")
            if isinstance(queries, Tensor):
                with torch.no_grad():
                    self.query_embed.weight.copy_(queries)
        self.duplicate_pooling = nn.Parameter(like.new_empty(groups, E, -(-C // groups)))
        self.duplicate_pooling_bias = nn.Parameter(like.new_empty(C))

    def _reset_last(self, num_classes: int, groups: int, queries: Queries | None) -> None:
        self._refuse_shards("reset")
        _check.check_positive(type(self).__name__, "num_classes", num_classes)
        if queries is None and groups != self.groups:
            if self.queries == "given":
                must = f"given anew for {groups} groups (they were given for {self.groups})"
                _check.fail(type(self).__name__, "queries", must, None)
            queries = "learnable" if self.queries == "learnable" else "fixed"
        if queries is not None:
            _check_queries(type(self).__name__, queries, groups, self.embed_dim)  # before anything changes
        self.num_classes = num_classes
        self._make_last(groups, queries, self.embed_standart.weight)
        if queries is not None and self.queries != "given":
            self.query_embed.reset_parameters()
        self._reset_group_fc()

    def _reset_group_fc(self) -> None:
        weight = self.duplicate_pooling
        if self.group_init == "per_class":
            bound = 1.0 / math.sqrt(self.embed_dim)
            nn.init.uniform_(weight, -bound, bound)
        else:
            nn.init.xavier_normal_(weight)
        self._start_bias()

    def reset_parameters(self) -> None:
        """Draws everything anew but given queries."""
        super().reset_parameters()
        if self.queries != "given":
            self.query_embed.reset_parameters()
        self._reset_group_fc()

    @property
    def class_parameter(self) -> Tensor:
        """`duplicate_pooling` (G, E, J)."""
        return self.duplicate_pooling

    def _bias_and_gain(self) -> tuple[Tensor | None, float]:
        return self.duplicate_pooling_bias, 1.0

    def forward(
        self,
        features: Tensor,
        targets: Targets | None = None,
        *,
        pre_logits: bool = False,
        sample_weight: Tensor | None = None,
        ignore: Tensor | SparseTargets | None = None,
        update: Update | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, C), with targets the loss by `group_fc_loss`; the decoded queries (B, G, E) if `pre_logits`.

        The arguments are those of every `Head`, and key_mask (B, L) bool, True where a position may be attended, or
        None for all.

        Raises:
            ValueError: As of every `Head`, or key_mask does not fit.
            TypeError: As of every `Head`, or key_mask is not bool.
            BackendError: An explicitly chosen backend cannot run this call.
        """
        options = self._options(targets, pre_logits, sample_weight, ignore, update)
        memory = self._memory(features)
        h = self._layer(self.query_embed.weight, memory, key_mask)
        if pre_logits:
            return h
        return self._finish(self._group_fc(h), group_fc, group_fc_loss, targets, options, self._shards)

    def _group_fc(self, h: Tensor) -> tuple[Any, ...]:
        """Embeddings, weight and bias of the classes that are here."""
        weight, bias, shards = self.duplicate_pooling, self.duplicate_pooling_bias, self._shards
        if shards is None:
            return h, weight, bias
        weight, bias = shards.local(weight), shards.local(bias).flatten()[: shards.own]
        h, filled = shards.enter_groups(h), -(-shards.own // weight.shape[2])  # groups that have a class
        if filled == len(weight):
            return h, weight, bias
        return h[:, :filled], weight[:filled], bias

    def _topk(self, features: Tensor, k: int, **inputs: Any) -> tuple[Tensor, Tensor]:
        h = self(features, pre_logits=True, **inputs)
        return best_classes(group_fc_topk, self._group_fc(h), k)

    def attention_maps(
        self, features: Tensor, classes: Tensor | Sequence[int], key_mask: Tensor | None = None
    ) -> Tensor:
        """The attention of each chosen class's query, the mean over the heads, without dropout.

        Args:
            features: (B, D, H, W) or (B, L, D).
            classes: Class indices, (K,) for all images or (B, K) for each its own. Classes of one group share a map.
            key_mask: (B, L) bool, True where a position may be attended, or None for all.

        Returns:
            (B, K, L), at least 0, each row of sum 1; of 0 for an image whose every position is masked.

        Raises:
            ValueError: A shape does not fit, or a class is out of range.
            TypeError: The features are of a wrong type, as for `forward`, the classes are no integers, or key_mask is
                not bool.
            BackendError: An explicitly chosen backend cannot run this call.
        """
        memory = self._memory(features)
        chosen = self._check_classes(classes, features) // self.duplicate_pooling.shape[2]
        return self._layer.attention_weights(self.query_embed.weight, memory, chosen, key_mask)

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, groups={self.groups}, "
            f"embed_dim={self.embed_dim}, queries={self.queries!r}, group_init={self.group_init!r}"
        )


def _check_queries(where: str, queries: Queries, groups: int, embed_dim: int) -> None:
    if isinstance(queries, Tensor):
        _check.check_tensor(where, "queries", queries)
        _check.check_shape(where, "queries", queries, "(G, E)", (groups, embed_dim))
    elif not isinstance(queries, str) or queries not in ("fixed", "learnable"):
        error = ValueError if isinstance(queries, str) else TypeError
        _check.fail(where, "queries", "'fixed', 'learnable' or a tensor (G, E)", repr(queries), error)
