"""Heads as the papers' code has them, of maps or tokens, with the parameters of those of mlhead: see end_to_end.py."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from mlhead import CSRAHead, GAPHead, MLDecoder

from .baselines import csra_pool_conv
from .head_baselines import PapersDecoder, PlainHead, plain_csra


def as_maps(features: Tensor) -> Tensor:
    """Tokens (B, L, D) as a view of maps (B, D, L, 1), from which the papers' heads start."""
    return features.transpose(1, 2).unsqueeze(-1) if features.ndim == 3 else features


def _gap_logits(head: GAPHead, features: Tensor) -> Tensor:
    """A pooling layer and a classifier."""
    return head.fc(F.adaptive_avg_pool2d(as_maps(features), 1).flatten(1))


class PapersMLDecoder(PapersDecoder):
    """ML-Decoder's published code, of maps or tokens."""

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of maps or tokens."""
        return super().forward(as_maps(features))


def _csra(in_features: int, num_classes: int) -> tuple[nn.Module, nn.Module]:
    # CSRA, Table 4: six heads on MS-COCO, eight for ViT; one where there are many classes.
    heads = 1 if num_classes > 1000 else 8 if in_features <= 1024 else 6
    head = CSRAHead(in_features, num_classes, num_heads=heads)
    return head, plain_csra(head, csra_pool_conv)


def _ml_decoder(in_features: int, num_classes: int) -> tuple[nn.Module, nn.Module]:
    head = MLDecoder(in_features, num_classes)
    return head, PapersMLDecoder(head)


def _gap(in_features: int, num_classes: int) -> tuple[nn.Module, nn.Module]:
    head = GAPHead(in_features, num_classes)
    return head, PlainHead(head, _gap_logits)


# Each gives a head of mlhead and the papers' formulation of it with the same parameters.
HEADS: dict[str, Callable[[int, int], tuple[nn.Module, nn.Module]]] = {
    "gap": _gap,
    "csra": _csra,
    "ml_decoder": _ml_decoder,
}
