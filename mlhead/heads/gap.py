"""The baseline head: global average pooling and a linear classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from .. import _check
from ..ops import SparseTargets, group_fc_loss, linear_loss, linear_topk
from ..ops._loss_options import Targets
from ..ops._loss_update import Update
from ..ops.topk import first_largest
from ._base import Head, best_classes, check_rate, factory, linear_init


class GAPHead(Head):
    """Global average pooling, then a linear classifier.

    logits[b, c] = sum_d mean_l(x[b, l, d]) * weight[c, d] + bias[c]

    Args:
        in_features: D, the width of the features.
        num_classes: C.
        bias: Whether there is a bias.
        dropout: Rate in [0, 1) on the pooled features.
        prior: Probability of every class at the start, see `Head`.
        loss: What `head(features, targets)` computes, see `Head`; binary cross-entropy by default.
        device: Of the parameters.
        dtype: Of the parameters.

    State dict: `fc.weight` (C, D), `fc.bias` (C).

    Raises:
        ValueError: A width, number of classes, rate or prior does not fit, a prior has no bias, or the loss has the
            reduction "none"; the message names it.
        TypeError: A width or number of classes is no integer, or `loss` is no module with `options()`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        prior: float | None = None,
        loss: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, prior, loss)
        self.dropout = check_rate("GAPHead", "dropout", dropout)
        self.fc = nn.Linear(in_features, num_classes, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight uniform in +-1/sqrt(D), as torch's Linear; bias 0, or at the prior."""
        linear_init(self.fc.weight, self.in_features)
        self._start_bias()

    def reset(self, num_classes: int) -> None:
        """Replaces the classifier by a new one of `num_classes` classes, of the same dtype and device.

        Raises:
            ValueError: The number is below 1.
            TypeError: The number is no integer.
            RuntimeError: The head is sharded.
        """
        self._refuse_shards("reset")
        _check.check_positive("GAPHead", "num_classes", num_classes)
        weight = self.fc.weight
        self.num_classes = num_classes
        self.fc = nn.Linear(self.in_features, num_classes, bias=self.fc.bias is not None, **factory(weight))
        self.fc.train(self.training)
        self.reset_parameters()

    @property
    def class_parameter(self) -> Tensor:
        """`fc.weight` (C, D)."""
        return self.fc.weight

    def _bias_and_gain(self) -> tuple[Tensor | None, float]:
        return self.fc.bias, 1.0

    def forward(
        self,
        features: Tensor,
        targets: Targets | None = None,
        *,
        pre_logits: bool = False,
        sample_weight: Tensor | None = None,
        ignore: Tensor | SparseTargets | None = None,
        update: Update | None = None,
    ) -> Tensor:
        """Logits (B, C), with targets the loss by `linear_loss`; the pooled features (B, D) if `pre_logits`.

        Arguments and errors are those of every `Head`.
        """
        options = self._options(targets, pre_logits, sample_weight, ignore, update)
        self._check_features(features, self._like(features))
        pooled = features.mean((2, 3)) if features.ndim == 4 else features.mean(1)
        pooled = F.dropout(pooled, self.dropout, self.training)
        if pre_logits:
            return pooled
        if self._shards is None and (targets is None or not self._is_linear()):
            logits = self.fc(pooled)
            return logits if targets is None else self._loss_of(logits, targets, options)
        return self._finish(self._linear(pooled), F.linear, linear_loss, targets, options, self._shards)

    def _is_linear(self) -> bool:
        """Whether `fc` does what its weight and bias say: not wrapped, and nothing runs before it.

        What torch.nn.utils.parametrize makes of a weight is its weight; older spectral and weight norms, pruning and
        adapters change what a call does.
        """
        kind = type(self.fc).__mro__[1] if parametrize.is_parametrized(self.fc) else type(self.fc)
        return kind is nn.Linear and not self.fc._forward_pre_hooks and "forward" not in self.fc.__dict__

    def _like(self, features: Tensor) -> Tensor:
        """What the features' dtype must be that of: the weight, of another classifier anything."""
        weight = getattr(self.fc, "weight", None)
        return weight if isinstance(weight, Tensor) else features

    def _loss_of(self, logits: Tensor, targets: Targets, options: dict[str, Any]) -> Tensor:
        """The loss of logits that exist."""
        if options.pop("update", None) is not None:
            must = "None for a classifier `fc` that is no plain nn.Linear"
            _check.fail("GAPHead", "update", must, type(self.fc).__name__)
        one = logits.new_ones(1, 1)
        return group_fc_loss(logits.unsqueeze(-1), one, None, targets, logits.shape[1], **options)

    def _linear(self, pooled: Tensor) -> tuple[Any, ...]:
        """Features, weight and bias of the classes that are here."""
        weight, bias, shards = self.fc.weight, self.fc.bias, self._shards
        if shards is None:
            return pooled, weight, bias
        return shards.enter(pooled), shards.local(weight), None if bias is None else shards.local(bias)

    def _topk(self, features: Tensor, k: int, **inputs: Any) -> tuple[Tensor, Tensor]:
        pooled = self(features, pre_logits=True, **inputs)
        if self._shards is None and not self._is_linear():
            return best_classes(first_largest, (self.fc(pooled),), k)
        return best_classes(linear_topk, self._linear(pooled), k)

    def attention_maps(self, features: Tensor, classes: Tensor | Sequence[int]) -> Tensor:
        """Class activation maps: the positive part of each position's score, divided by its sum.

        Args:
            features: (B, D, H, W) or (B, L, D).
            classes: Class indices, (K,) for all images or (B, K) for each its own.

        Returns:
            (B, K, L), at least 0, each row of sum 1; or of 0 where the class has no positive score anywhere.

        Raises:
            ValueError: A shape does not fit, or a class is out of range.
            TypeError: The features are of a wrong type, as for `forward`, or the classes are no integers.

        Source:
            Zhou et al., Learning Deep Features for Discriminative Localization, Eq. 2, without the bias.
        """
        self._check_features(features, self._like(features))
        chosen = self._check_classes(classes, features)
        if self._shards is None and not self._is_linear():
            tokens = features.flatten(2).transpose(1, 2) if features.ndim == 4 else features
            scores = (self.fc(tokens) - self.fc(tokens.new_zeros(self.in_features))).transpose(1, 2)
            index = chosen.expand(len(scores), -1).unsqueeze(2).expand(-1, -1, scores.shape[2])
            return self._shares(scores.gather(1, index))
        weight = self.fc.weight
        weight = weight[chosen] if self._shards is None else self._shards.rows(weight, 0, chosen)  # (K, D) or (B, K, D)
        scores = weight @ (features.flatten(2) if features.ndim == 4 else features.transpose(1, 2))
        return self._shares(scores)

    @staticmethod
    def _shares(scores: Tensor) -> Tensor:
        scores = scores.float().relu()
        return scores / scores.sum(2, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return f"in_features={self.in_features}, num_classes={self.num_classes}, dropout={self.dropout}"
