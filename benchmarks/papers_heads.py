"""Heads as the papers' code has them, of maps or tokens, with the parameters of those of mlhead: see end_to_end.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from mlhead import CSRAHead, GAPHead, MLDecoder

from .baselines import csra_pool_conv
from .head_baselines import PapersDecoder


def as_maps(features: Tensor) -> Tensor:
    """Tokens (B, L, D) as a view of maps (B, D, L, 1), from which the papers' heads start."""
    return features.transpose(1, 2).unsqueeze(-1) if features.ndim == 3 else features


class PapersGAP(nn.Module):
    """A pooling layer and a classifier; holds the parameters of an mlhead head, as the others do."""

    def __init__(self, head: GAPHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of maps or tokens."""
        return self.head.fc(F.adaptive_avg_pool2d(as_maps(features), 1).flatten(1))


class PapersCSRA(nn.Module):
    """CSRA's published code: for each head a convolution, softmax and sums."""

    def __init__(self, head: CSRAHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of maps or tokens."""
        head = self.head
        options: dict[str, Any] = {"temperatures": head.temperatures, "lam": head.lam, "normalize": head.normalize}
        return csra_pool_conv(as_maps(features), head.weight, head.bias, average=1.0, **options)


class PapersMLDecoder(PapersDecoder):
    """ML-Decoder's published code, of maps or tokens."""

    def forward(self, features: Tensor) -> Tensor:
        """Logits (B, C) of maps or tokens."""
        return super().forward(as_maps(features))


def _csra(in_features: int, num_classes: int) -> tuple[nn.Module, nn.Module]:
    # CSRA, Table 4: six heads on MS-COCO, eight for ViT; one where there are many classes.
    heads = 1 if num_classes > 1000 else 8 if in_features <= 1024 else 6
    head = CSRAHead(in_features, num_classes, num_heads=heads)
    return head, PapersCSRA(head)


def _ml_decoder(in_features: int, num_classes: int) -> tuple[nn.Module, nn.Module]:
    head = MLDecoder(in_features, num_classes)
    return head, PapersMLDecoder(head)


def _gap(in_features: int, num_classes: int) -> tuple[nn.Module, nn.Module]:
    head = GAPHead(in_features, num_classes)
    return head, PapersGAP(head)


# Each gives a head of mlhead and the papers' formulation of it with the same parameters.
HEADS: dict[str, Callable[[int, int], tuple[nn.Module, nn.Module]]] = {
    "gap": _gap,
    "csra": _csra,
    "ml_decoder": _ml_decoder,
}
