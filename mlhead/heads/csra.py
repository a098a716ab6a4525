"""The CSRA head: class-specific residual attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..ops import SparseTargets, csra_attention, csra_loss, csra_pool
from ..ops._loss_options import Targets
from ..ops._loss_update import Update
from ..ops.topk import first_largest, merge_topk
from ._base import Head, best_classes, factory, linear_init

# Temperatures by number of heads; the paper's last head always takes the maximum.
TEMPERATURES: dict[int, tuple[float, ...]] = {
    1: (1.0,),
    2: (1.0, math.inf),
    4: (1.0, 2.0, 4.0, math.inf),
    6: (1.0, 2.0, 3.0, 4.0, 5.0, math.inf),
    8: (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, math.inf),
}

TOPK_LOGITS = 1 << 22  # that exist at a time for the best classes

# What the logits are made of: the mean of the scores and their attention-weighted mean, or one of the two.
POOLINGS = ("both", "average", "spatial")


class CSRAHead(Head):
    """Class-specific residual attention: per class, the mean of its scores plus their attention-weighted mean.

    logits[b, c] = sum_h ( mean_l s[h, b, c, l] + lam * sum_l softmax_l(T_h s[h, b, c, :])_l s[h, b, c, l] )
    with s[h, b, c, l] = sum_d x[b, l, d] weight[h, c, d] + bias[h, c], weight optionally divided by its norm over d

    Args:
        in_features: D, the width of the features.
        num_classes: C.
        num_heads: H, each with its own classifier and temperature. By default the number of temperatures, or 1.
        temperatures: H numbers above 0, `math.inf` for the maximum. By default the paper's for 1, 2, 4, 6, 8 heads.
        lam: Weight of the attention, one number or one per head.
        pooling: "both"; or one term alone, as in the paper's Table 6: "average", where lam counts for nothing, or
            "spatial", lam times the attention.
        normalize: Whether each class's weight is divided by its norm: for faster convergence, says the paper, with
            little influence on the result (Table 8). A class whose weight is 0 has the logit 0, but for the bias.
        bias: Whether there is a bias; it counts 1 + lam times in each head ("average": once, "spatial": lam times).
        prior: Probability of every class at the start, see `Head`; needs a bias.
        loss: What `head(features, targets)` computes, see `Head`; binary cross-entropy by default.
        device: Of the parameters.
        dtype: Of the parameters.

    State dict: `weight` (H, C, D), `bias` (H, C). `weight[i]` is `classifier.multi_head.<i>.head.weight` of public
    checkpoints, without the two axes of length 1.

    Raises:
        ValueError: A width, number of classes or heads, temperature, `lam`, `pooling` or prior does not fit, a prior
            has no bias that counts, `lam` is 0 for "spatial", or the loss has the reduction "none".
        TypeError: A width or number of classes or heads is no integer, or `loss` is no module with `options()`.

    Source:
        CSRA, Eq. 2-8 and 13, section 3.4; Tables 6 and 8.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        num_heads: int | None = None,
        temperatures: Sequence[float] | None = None,
        lam: float | Sequence[float] = 0.1,
        pooling: str = "both",
        normalize: bool = True,
        bias: bool = False,
        prior: float | None = None,
        loss: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, num_classes, prior, loss)
        self.temperatures = _temperatures(num_heads, temperatures)
        self.num_heads = H = len(self.temperatures)
        self.lam: float | tuple[float, ...] = float(lam) if isinstance(lam, (int, float)) else tuple(map(float, lam))
        if isinstance(self.lam, tuple) and len(self.lam) != H:
            _check.fail("CSRAHead", "lam", f"a number or {H} numbers, one per head", lam)
        if not all(map(math.isfinite, self._lams())):
            _check.fail("CSRAHead", "lam", "finite", lam)
        _check.check_choice("CSRAHead", "pooling", pooling, POOLINGS)
        if pooling == "spatial" and not any(self._lams()):
            _check.fail("CSRAHead", "lam", "other than 0 for pooling='spatial', which has no other term", lam)
        self.pooling = pooling
        if prior is not None and not bias:
            _check.fail("CSRAHead", "bias", "True for a prior", bias)
        self.normalize = normalize
        self.weight = nn.Parameter(torch.empty(H, num_classes, in_features, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(H, num_classes, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear | nn.Conv2d, *, lam: float | Sequence[float], temperatures: Sequence[float] = (math.inf,)
    ) -> CSRAHead:
        """A head around a classifier trained with average pooling; better without any further training.

        logits = y_avg + lam * y_max    (temperatures = (inf,))

        Args:
            linear: The trained classifier, Linear or 1x1 Conv2d; its parameters are copied.
            lam: The paper's fixed value is 0.02 for ResNets and 0.2 for all other models; a classifier alone does not
                say which of them it belongs to. `with_max_score` takes it from the model.
            temperatures: The same classifier serves all of them.

        Returns:
            A head with `normalize=False`, of the sizes, the dtype and on the device of the classifier.

        Raises:
            TypeError: `linear` is neither a Linear nor a 1x1 Conv2d of one group.
            ValueError: `lam` or a temperature does not fit.

        Source:
            CSRA, Fig. 1 and Table 1.
        """
        weight, bias = linear_parameters("CSRAHead", "linear", linear)
        C, D = weight.shape
        head = cls(
            D,
            C,
            temperatures=temperatures,
            lam=lam,
            normalize=False,
            bias=bias is not None,
            **factory(weight),
        )
        with torch.no_grad():
            head.weight.copy_(weight)
            if head.bias is not None and bias is not None:
                head.bias.copy_(bias)
        return head

    def reset_parameters(self) -> None:
        """Weight uniform in +-1/sqrt(D), as torch's Conv2d; bias 0, or at the prior."""
        linear_init(self.weight, self.in_features)
        self._start_bias()

    def reset(self, num_classes: int) -> None:
        """Replaces the classifiers by new ones of `num_classes` classes, of the same dtype and device.

        Raises:
            ValueError: The number is below 1.
            TypeError: The number is no integer.
            RuntimeError: The head is sharded.
        """
        self._refuse_shards("reset")
        _check.check_positive("CSRAHead", "num_classes", num_classes)
        weight = self.weight
        self.num_classes = num_classes
        self.weight = nn.Parameter(weight.new_empty(self.num_heads, num_classes, self.in_features))
        if self.bias is not None:
            self.bias = nn.Parameter(weight.new_empty(self.num_heads, num_classes))
        self.reset_parameters()

    def _lams(self) -> tuple[float, ...]:
        return self.lam if isinstance(self.lam, tuple) else (self.lam,) * self.num_heads

    def _terms(self) -> tuple[float, float | tuple[float, ...]]:
        """The weights of the mean and of the attention, as the op takes them."""
        return float(self.pooling != "spatial"), 0.0 if self.pooling == "average" else self.lam

    def _bias_and_gain(self) -> tuple[Tensor | None, float]:
        average, _ = self._terms()
        return self.bias, sum(average + (0.0 if self.pooling == "average" else lam) for lam in self._lams())

    def set_prior(self, prior: float | Tensor) -> None:
        """As of `Head`; impossible where the weights of a bias in the logits add up to 0.

        Raises:
            ValueError: These weights add up to 0, or as of `Head.set_prior`.
            RuntimeError: The head is sharded.
        """
        if self._bias_and_gain()[1] == 0:
            _check.fail("CSRAHead", "lam", "such that a bias counts in the logits, for a prior", self.lam)
        super().set_prior(prior)

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
        """Logits (B, C) of maps or tokens, which are read where they lie; with targets the loss by `csra_loss`.

        With `pre_logits` the mean of the features over the positions (B, D): the part of the pooling that is the same
        for all classes. Arguments and errors are those of every `Head`.
        """
        options = self._options(targets, pre_logits, sample_weight, ignore, update)
        self._check_features(features, self.weight)
        if pre_logits:
            return features.mean((2, 3)) if features.ndim == 4 else features.mean(1)
        pooling = self._pooling()
        logits, loss = partial(csra_pool, **pooling), partial(csra_loss, **pooling)
        return self._finish(self._inputs(features), logits, loss, targets, options, self._shards)

    def _pooling(self) -> dict[str, Any]:
        average, lam = self._terms()
        return {"lam": lam, "normalize": self.normalize, "average": average, "temperatures": self.temperatures}

    def _inputs(self, features: Tensor) -> tuple[Any, ...]:
        """Features, weight and bias of the classes that are here."""
        weight, bias, shards = self.weight, self.bias, self._shards
        if shards is None:
            return features, weight, bias
        return shards.enter(features), shards.local(weight), None if bias is None else shards.local(bias)

    def _topk(self, features: Tensor, k: int) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        self._check_features(features, self.weight)
        x, weight, bias = self._inputs(features)
        best, C = None, weight.shape[1]
        step = max(k, TOPK_LOGITS // max(1, len(x)), 1)
        for first in range(0, max(C, 1), step):
            part = slice(first, first + step)
            logits = csra_pool(x, weight[:, part], None if bias is None else bias[:, part], **self._pooling())
            scores, classes = best_classes(first_largest, (logits,), min(k, logits.shape[1]))
            best = merge_topk(best, (scores, classes + first), k)
        assert best is not None
        return best

    def attention_maps(self, features: Tensor, classes: Tensor | Sequence[int]) -> Tensor:
        """The attention softmax_l(T s) of the chosen classes, averaged over the heads.

        Args:
            features: (B, D, H, W) or (B, L, D).
            classes: Class indices, (K,) for all images or (B, K) for each its own.

        Returns:
            (B, K, L), at least 0, each row of sum 1; a head with T = inf puts 1 on the first maximal position. It is
            the same for every `pooling`, so for "average" it is where the class would look. To lay it over an image:
            `mlhead.visualize.heat_maps`.

        Raises:
            ValueError: A shape does not fit, or a class is out of range.
            TypeError: The features are of a wrong type, as for `forward`, or the classes are no integers.

        Source:
            CSRA, Eq. 2, Fig. 4.
        """
        self._check_features(features, self.weight)
        indices = self._check_classes(classes, features)
        weight = self.weight
        if self._shards is not None:
            unique, indices = torch.unique(indices, return_inverse=True)
            weight = self._shards.rows(weight, 1, unique)
        maps = csra_attention(features, weight, indices, temperatures=self.temperatures, normalize=self.normalize)
        return maps.mean(1)

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, temperatures={self.temperatures}, "
            f"lam={self.lam}, pooling={self.pooling!r}, normalize={self.normalize}, bias={self.bias is not None}"
        )


def linear_parameters(where: str, argument: str, linear: object) -> tuple[Tensor, Tensor | None]:
    """Weight (C, D) and bias (C) or None of a linear classifier.

    Raises:
        TypeError: It is neither a Linear nor a 1x1 Conv2d of one group.
    """
    plain = isinstance(linear, nn.Linear)
    if isinstance(linear, nn.Conv2d):
        plain = linear.kernel_size == (1, 1) and linear.groups == 1
    if not plain:
        kind = type(linear).__name__
        got = f"{kind} {tuple(linear.weight.shape)}" if isinstance(linear, nn.Conv2d) else kind
        _check.fail(where, argument, "an nn.Linear or a 1x1 nn.Conv2d", got, TypeError)
    assert isinstance(linear, (nn.Linear, nn.Conv2d))
    return linear.weight.flatten(1), linear.bias


def _temperatures(num_heads: int | None, temperatures: Sequence[float] | None) -> tuple[float, ...]:
    if num_heads is not None:
        _check.check_positive("CSRAHead", "num_heads", num_heads)
    if temperatures is None:
        H = 1 if num_heads is None else num_heads
        if H not in TEMPERATURES:
            must = f"given for {H} heads (defaults exist for {', '.join(map(str, TEMPERATURES))})"
            _check.fail("CSRAHead", "temperatures", must, None)
        return TEMPERATURES[H]
    chosen = tuple(float(t) for t in temperatures)
    if not chosen or not all(t > 0 for t in chosen):
        _check.fail("CSRAHead", "temperatures", "at least one number, all above 0", temperatures)
    if num_heads is not None and len(chosen) != num_heads:
        _check.fail("CSRAHead", "temperatures", f"of length num_heads = {num_heads}", temperatures)
    return chosen
