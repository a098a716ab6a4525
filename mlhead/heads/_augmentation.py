"""Augmentation of queries that are made of word vectors."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check
from ..ops import SparseTargets
from ..ops._loss_options import Targets
from ..ops._targets import as_sparse

DISTRIBUTIONS = ("normal", "uniform", "shuffled")


class QueryAugmentation(nn.Module):
    """Noise on the queries of a zero-shot head, and random queries beside them; nothing in evaluation.

    Set it as `head.augmentation`, and `head(features, targets)` uses it in training. Where the loss is not in the head,
    `head(features)` in training has the columns of the random queries at its end, and `extend` appends their targets.

    Args:
        noise: Standard deviation of what is added to the vectors of the queries at every call, as a multiple of their
            root mean square; 0 for none.
        random_queries: R, how many random vectors join the classes at every call.
        distribution: Of the random vectors: "normal" and "uniform" have, in each of the W coordinates, the mean and the
            deviation that the classes' vectors have there; "shuffled" takes every coordinate from a class of its own.
        target: The label in [0, 1] of the random queries for every image. 1, the default, is the paper's positive label
            "random".

    Draws come from torch's generator of the vectors' device, as those of dropout do: `torch.manual_seed` repeats them.

    Raises:
        ValueError: A number or the distribution does not fit; the message names it.
        TypeError: `noise` or `target` is no number, or `random_queries` no integer.

    Source:
        ML-Decoder, section 2.3.3 "Query augmentations", Table 3, Fig. 8.
    """

    def __init__(
        self, noise: float = 0.0, random_queries: int = 0, *, distribution: str = "normal", target: float = 1.0
    ) -> None:
        super().__init__()
        where = "QueryAugmentation"
        _check.check_number(where, "noise", noise)
        if not 0.0 <= noise < math.inf:
            _check.fail(where, "noise", "at least 0 and finite", noise)
        _check.check_positive(where, "random_queries", random_queries, least=0)
        _check.check_choice(where, "distribution", distribution, DISTRIBUTIONS)
        _check.check_number(where, "target", target)
        if not 0.0 <= target <= 1.0:
            _check.fail(where, "target", "in [0, 1]", target)
        self.noise, self.random_queries, self.distribution, self.target = noise, random_queries, distribution, target

    @property
    def extra(self) -> int:
        """How many classes a call adds: R in training, 0 in evaluation."""
        return self.random_queries if self.training else 0

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """What queries are made of, and the classes' vectors.

        Args:
            vectors: (C, W).

        Returns:
            (C + R, W) with noise, and (C + R, W) without: the vectors and R random ones. In evaluation the vectors,
            twice.
        """
        if not self.training:
            return vectors, vectors
        if self.random_queries:
            vectors = torch.cat([vectors, self._random(vectors)])
        if not self.noise:
            return vectors, vectors
        scale = self.noise * vectors.detach().float().square().mean().sqrt()
        return vectors + (scale * torch.randn_like(vectors, dtype=torch.float32)).to(vectors.dtype), vectors

    def _random(self, vectors: Tensor) -> Tensor:
        R, (C, W) = self.random_queries, vectors.shape
        known = vectors.detach()
        if self.distribution == "shuffled":
            return known.gather(0, torch.randint(C, (R, W), device=known.device))
        known = known.float()
        mean, deviation = known.mean(0), known.std(0, correction=0)
        shape: dict[str, Any] = {"size": (R, W), "device": known.device}
        drawn = (
            torch.randn(**shape) if self.distribution == "normal" else (torch.rand(**shape) * 2 - 1) * math.sqrt(3.0)
        )
        return (mean + deviation * drawn).to(vectors.dtype)

    def extend(self, targets: Targets, num_classes: int) -> Targets:
        """Targets with those of the random queries behind them; as they are in evaluation.

        Args:
            targets: y (B, C), or sparse in any form that the heads take. Not class indices (B,), which have room for
                one positive only.
            num_classes: C.

        Returns:
            y (B, C + R) of the targets' dtype, in fp32 where that is not floating; or `SparseTargets` of C + R classes.

        Raises:
            ValueError: In training with random queries, dense targets are not (B, C), or sparse ones do not fit, as of
                `SparseTargets.check`.
            TypeError: In training with random queries, the targets are of no known form, or complex.
        """
        if not self.extra:
            return targets
        where = "QueryAugmentation"
        targets = as_sparse(where, targets, num_classes)
        if isinstance(targets, SparseTargets):
            targets.check(where, "targets")
            return self._extend_sparse(targets)
        _check.check_real(where, "targets", targets)
        if targets.ndim != 2:
            must = "y (B, C) or sparse positives, with random queries"
            _check.fail(where, "targets", must, tuple(targets.shape))
        y = targets if targets.is_floating_point() else targets.float()
        return F.pad(y, (0, self.extra), value=self.target)

    def extend_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """Keywords of a loss in the head for the classes and the random queries, whose weights are 1."""
        result = dict(options)
        for name in ("class_weight", "pos_weight"):
            if result.get(name) is not None:
                result[name] = F.pad(result[name], (0, self.extra), value=1.0)
        ignore = result.get("ignore")
        if isinstance(ignore, SparseTargets):
            result["ignore"] = ignore._replace(num_classes=ignore.num_classes + self.extra)
        elif isinstance(ignore, Tensor):
            result["ignore"] = F.pad(ignore, (0, self.extra), value=False)
        return result

    def _extend_sparse(self, targets: SparseTargets) -> SparseTargets:
        B, C, R = targets.batch, targets.num_classes, self.extra
        indices, offsets = targets.indices, targets.offsets
        if self.target == 0.0:
            return SparseTargets(indices, offsets, targets.values, C + R)
        # The entries of row b move by b R places, and R new ones stand behind them.
        rows = targets.rows()
        places = torch.arange(len(indices), device=indices.device) + rows * R
        new = (offsets[1:, None] + torch.arange(B, device=indices.device)[:, None] * R) + torch.arange(
            R, device=indices.device
        )
        joined = indices.new_empty(len(indices) + B * R)
        joined[places] = indices
        joined[new] = torch.arange(C, C + R, device=indices.device, dtype=indices.dtype)
        values = targets.values
        if values is not None or self.target != 1.0:
            old = torch.ones(len(indices), device=indices.device) if values is None else values
            values = old.new_full((len(joined),), self.target)
            values[places] = old
        moved = offsets + torch.arange(B + 1, device=offsets.device, dtype=offsets.dtype) * R
        return SparseTargets(joined, moved, values, C + R)

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return (
            f"noise={self.noise}, random_queries={self.random_queries}, distribution={self.distribution!r}, "
            f"target={self.target}"
        )
