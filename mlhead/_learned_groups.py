"""Group decoding with learned queries or a learned last layer beside word vectors: ML-Decoder's Table 8."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlhead.heads import ZeroShotMLDecoder

QUERIES, LAST = ("words", "learned"), ("words", "learned", "shared")


class LearnedGroups(ZeroShotMLDecoder):
    """Group decoding of one fixed set of classes, some of whose labels training may not see.

    Args:
        in_features: D.
        word_vectors: (C, W), J classes of each group side by side.
        groups: G, a divisor of C.
        queries: "words" (Eq. 5), or "learned" (G, E).
        last: "words" (Eq. 6); "learned" (G, E, J), a weight of each class's own; "shared" (E, J), of each place in a
            group.
        options: of `ZeroShotMLDecoder`.

    Source:
        ML-Decoder, Appendix B, Table 8.
    """

    def __init__(
        self, in_features: int, word_vectors: Tensor, groups: int, *, queries: str, last: str, **options: Any
    ) -> None:
        C = len(word_vectors)
        super().__init__(in_features, C, word_vectors=word_vectors, groups=groups, **options)
        E, J = self.embed_dim, C // groups
        self.learned_queries = nn.Parameter(torch.randn(groups, E)) if queries == "learned" else None
        shape = {"learned": (groups, E, J), "shared": (E, J)}.get(last)
        self.learned_weight = None if shape is None else nn.Parameter(torch.randn(shape) * (2 / (E + J)) ** 0.5)

    def _queries(self, rows: Tensor, group_size: int) -> Tensor:
        return super()._queries(rows, group_size) if self.learned_queries is None else self.learned_queries

    def _last(self, classes: Any, memory: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, int]:
        if self.learned_weight is None:
            return super()._last(classes, memory, key_mask)
        C = classes.num_classes
        weight = self.learned_weight.expand(C // classes.group_size, -1, -1)
        return self._decode([classes], memory, key_mask), weight, self.duplicate_pooling_bias.expand(C), C


def mixed_order(num_seen: int, num_classes: int, groups: int) -> NDArray[np.int64]:
    """An order of the classes in which every group has as many unseen ones as another, at its end.

    Both the seen and the unseen classes must divide into the groups.
    """
    unseen = num_classes - num_seen
    if num_seen % groups or unseen % groups:
        raise ValueError(f"mixed_order: groups must be a divisor of {num_seen} and {unseen}, got {groups}")
    seen = np.arange(num_seen).reshape(groups, -1)
    return np.concatenate([seen, np.arange(num_seen, num_classes).reshape(groups, -1)], axis=1).reshape(-1)
