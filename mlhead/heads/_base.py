"""What every head has: its interface, the checks of its features, and the bias at a class prior."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from ..losses import BinaryCrossEntropy
from ..ops._fused import autocast
from ..ops._loss_options import Targets
from ..ops._loss_update import Update
from ..ops._targets import SparseTargets, check_range


class Head(nn.Module, ABC):
    """A classification head: `head(features)` is the logits (B, C), `head(features, targets)` the loss.

    Features are maps (B, D, H, W), contiguous or channels-last, or tokens (B, L, D). A subclass gives the
    abstract methods.

    The loss is a scalar, `head.loss` of the logits and the targets; the logits, their gradient and, for sparse targets,
    a dense target never exist. It works in training and in evaluation, with gradients and without.

    Under autocast logits have autocast's dtype, as those of `nn.Linear` do, and the loss is fp32; in fp64 nothing is
    cast. Attention maps have autocast's dtype too, but for `GAPHead`, whose maps are fp32.

    Args:
        in_features: D, the width of the features.
        num_classes: C.
        prior: None, or the probability in (0, 1) that every class has at the start, by way of the bias. A small one
            (the share of positives among all labels) spares a multi-label run the steps that only learn that most
            labels are absent. `set_prior` takes one probability per class.
        loss: What `head(features, targets)` computes: a module of `mlhead.losses`, or any with their `options()`. By
            default `BinaryCrossEntropy()`. It may be assigned at any time and is in no state dict.

    Raises:
        ValueError: A width, number of classes or prior does not fit, or the loss has the reduction "none".
        TypeError: A width or number of classes is no integer, the prior no number, or `loss` no module with
            `options()`.
    """

    in_features: int
    num_classes: int
    loss: nn.Module
    # `mlhead.parallel` sets these: the devices that share the classes, and the parameters of which each has a part.
    _shards: Any = None
    _class_parameters: tuple[str, ...] = ()

    def __init__(
        self, in_features: int, num_classes: int, prior: float | None = None, loss: nn.Module | None = None
    ) -> None:
        super().__init__()
        where = type(self).__name__
        _check.check_positive(where, "in_features", in_features)
        _check.check_positive(where, "num_classes", num_classes)
        if prior is not None:
            _check.check_number(where, "prior", prior)
            if not 0.0 < prior < 1.0:
                _check.fail(where, "prior", "in (0, 1)", prior)
        self.in_features = in_features
        self.num_classes = num_classes
        self.prior = prior
        self.loss = BinaryCrossEntropy() if loss is None else loss
        _loss_options(where, self.loss)

    @abstractmethod
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
        """Logits (B, C) of features (B, D, H, W) or (B, L, D), or with targets the loss.

        Args:
            features: (B, D, H, W) or (B, L, D).
            targets: None, or what the loss is taken against: y (B, C) in [0, 1], `SparseTargets`, a pair (indices,
                offsets), a sparse CSR tensor, or for softmax class indices (B,).
            pre_logits: Return what precedes the last layer; only without targets.
            sample_weight: (B,), multiplies the loss of an image; only with targets.
            ignore: Elements of unknown label, without loss: a bool mask (B, C) beside dense targets, `SparseTargets`
                beside sparse ones; only with targets.
            update: A `mlhead.optim` optimizer of `class_parameter`, which backward then updates, and which has no
                gradient; only with targets, and not of a sharded head.

        Returns:
            (B, C); with targets a scalar, fp32 (fp64 for a head in fp64).

        Raises:
            ValueError: A shape does not fit, `pre_logits` comes with targets, `sample_weight`, `ignore` or `update`
                without them, the head cannot have an `update`, or on the CPU a target's value is wrong. On CUDA wrong
                values end in an asynchronous device assertion.
            TypeError: The features are no floating tensor or, outside autocast, of another dtype than the parameters;
                the targets are of no known form; or `update` is no optimizer of `mlhead.optim`.
            BackendError: An explicitly chosen backend cannot run this call.
        """
        raise NotImplementedError

    @property
    def class_parameter(self) -> Tensor | None:
        """The weight that has a part for each class, which `update` takes: (C, D) or (G, E, J).

        None for CSRA, and for zero-shot heads, which have no weight of the classes.
        """
        return None

    @abstractmethod
    def reset(self, num_classes: int) -> None:
        """Makes the head one of `num_classes` classes, with a new last layer of the same dtype and device.

        Raises:
            ValueError: The number is below 1.
            TypeError: The number is no integer.
            RuntimeError: The head is sharded, by `mlhead.parallel.parallelize_head`.
        """
        raise NotImplementedError

    @abstractmethod
    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        raise NotImplementedError

    @abstractmethod
    def attention_maps(self, features: Tensor, classes: Tensor | Sequence[int]) -> Tensor:
        """Where the chosen classes look.

        Args:
            features: (B, D, H, W) or (B, L, D).
            classes: Class indices, (K,) for all images or (B, K) for each its own; K may be 0.

        Returns:
            Weights (B, K, L), at least 0, over the positions (row-major for maps).

        Raises:
            ValueError: A shape does not fit, or a class is out of range.
            TypeError: The features are of a wrong type, as for `forward`, or the classes are no integers.
        """
        raise NotImplementedError

    def topk(self, features: Tensor, k: int, **inputs: Any) -> tuple[Tensor, Tensor]:
        """The k best classes of each image; but for CSRA without the logits.

        Args:
            features: (B, D, H, W) or (B, L, D).
            k: How many, in [1, C].
            inputs: What else the head's forward takes beside features, as `key_mask`.

        Returns:
            Scores (B, k), largest first, and classes (B, k) int64; of equal scores the lower class comes first. They
            carry no gradient.

        Raises:
            ValueError: k is not in [1, C], or a shape does not fit.
            TypeError: k is no integer, the features are of a wrong type, as for `forward`, or the head takes no such
                input.
            BackendError: An explicitly chosen backend cannot run this call.
            NotImplementedError: The head is a subclass of your own that gives no `_topk`.
        """
        where = type(self).__name__
        _check.check_positive(where, "k", k)
        if k > self.num_classes:
            _check.fail(where, "k", f"in [1, C] = [1, {self.num_classes}]", k)
        with torch.no_grad():
            if self._shards is None:
                return self._topk(features, k, **inputs)
            return self._shards.topk(k, self._topk(features, min(k, self._shards.own), **inputs))

    def _topk(self, features: Tensor, k: int, **inputs: Any) -> tuple[Tensor, Tensor]:
        """The k best of the classes that are here, counted from the first of them."""
        raise NotImplementedError

    def _finish(
        self,
        inputs: tuple[Any, ...],
        logits: Callable[..., Tensor],
        loss: Callable[..., Tensor],
        targets: Any,
        options: dict[str, Any],
        shards: Any = None,
    ) -> Tensor:
        """The last layer: `logits(*inputs)`, or with targets `loss(*inputs, targets, **options)`, over all shards."""
        if shards is None:
            return logits(*inputs) if targets is None else loss(*inputs, targets, **options)
        if targets is None:
            return shards.logits(logits(*inputs))
        return shards.loss(functools.partial(loss, *inputs), inputs[0], targets, options)

    @abstractmethod
    def _bias_and_gain(self) -> tuple[Tensor | None, float]:
        """The bias to set for a prior, of which the last axis is C, and what multiplies it in the logits."""
        raise NotImplementedError

    @torch.no_grad()
    def set_prior(self, prior: float | Tensor) -> None:
        """Sets the bias so that features of no influence give the probabilities `prior`.

        Args:
            prior: One probability in [0, 1] for all classes, or (C,), for example each class's share of the images.
                Values are clamped to [1e-6, 1 - 1e-6], so that a class never seen does not get an infinite bias.

        Raises:
            ValueError: The head has no bias, the shape is not (C,), or on the CPU a value is NaN or outside [0, 1],
                which on CUDA ends in an asynchronous device assertion.
            TypeError: It is neither a number nor a tensor.
            RuntimeError: The head is sharded.
        """
        self._refuse_shards("set_prior")
        bias, gain = self._bias_and_gain()
        if bias is None:
            _check.fail(type(self).__name__, "bias", "True for a prior", False)
        logit = torch.logit(self._prior(prior).clamp(1e-6, 1 - 1e-6)) / gain
        bias.copy_(logit.to(bias.device, bias.dtype).expand_as(bias))

    def _prior(self, prior: float | Tensor) -> Tensor:
        """One probability or (C,), checked, in fp64."""
        where, device = type(self).__name__, None if isinstance(prior, Tensor) else "cpu"  # where numbers can be read
        try:
            p = torch.as_tensor(prior, dtype=torch.float64, device=device).detach()
        except (TypeError, ValueError, RuntimeError):
            _check.fail(where, "prior", "a number or a tensor (C,)", type(prior).__name__, TypeError)
        if p.ndim:
            _check.check_shape(where, "prior", p, "(C,)", (self.num_classes,))
        check_range(where, "prior", p)
        return p

    def _refuse_shards(self, method: str) -> None:
        if self._shards is not None:
            raise RuntimeError(f"{type(self).__name__}.{method} must be called before parallelize_head, not after it")

    def _start_bias(self) -> None:
        """The bias at the start: 0, or at the prior."""
        if self.prior is not None and self._shards is None:
            self.set_prior(self.prior)
            return
        bias, gain = self._bias_and_gain()
        if bias is not None:
            nn.init.constant_(bias, 0.0 if self.prior is None else math.log(self.prior / (1.0 - self.prior)) / gain)

    def _options(self, targets: Any, pre_logits: bool, sample_weight: Any, ignore: Any, update: Any) -> dict[str, Any]:
        """The options of the op that computes the loss; {} without targets."""
        where = type(self).__name__
        if targets is None:
            for name, value in (("sample_weight", sample_weight), ("ignore", ignore), ("update", update)):
                if value is not None:
                    _check.fail(where, name, "None without targets", type(value).__name__)
            return {}
        if isinstance(targets, bool):  # pre_logits stood here once
            _check.fail(where, "targets", "labels (pre_logits is a keyword)", targets, TypeError)
        if pre_logits:
            _check.fail(where, "pre_logits", "False with targets", pre_logits)
        options = {**_loss_options(where, self.loss), "sample_weight": sample_weight, "ignore": ignore}
        if update is None:
            return options
        if self.class_parameter is None:
            _check.fail(where, "update", "None for a head without `class_parameter`", type(update).__name__)
        if self._shards is not None:
            _check.fail(where, "update", "None for a sharded head", type(update).__name__)
        return {**options, "update": update}

    def _check_features(self, features: Tensor, like: Tensor) -> None:
        """Rank, width and dtype of the features; at least one position."""
        where = type(self).__name__
        _check.check_tensor(where, "features", features)
        D = self.in_features
        if features.ndim not in (3, 4) or features.shape[1 if features.ndim == 4 else 2] != D:
            _check.fail(where, "features", f"maps (B, {D}, H, W) or tokens (B, L, {D})", tuple(features.shape))
        positions = features.shape[1] if features.ndim == 3 else features.shape[2] * features.shape[3]
        if positions == 0:
            _check.fail(where, "features", "of at least one position (L > 0)", tuple(features.shape))
        if features.dtype != like.dtype and not _autocasts(features.device.type):
            must = f"{like.dtype} like the head's parameters, or used under torch.autocast"
            _check.fail(where, "features", must, features.dtype, TypeError)

    def _check_classes(
        self, classes: Tensor | Sequence[int], features: Tensor, num_classes: int | None = None
    ) -> Tensor:
        """Class indices (K,) or (B, K) below C as int64 on the device of the features."""
        where, C = type(self).__name__, self.num_classes if num_classes is None else num_classes
        indices = _check.as_classes(where, classes)
        B = features.shape[0]
        if indices.ndim not in (1, 2) or (indices.ndim == 2 and indices.shape[0] != B):
            _check.fail(where, "classes", f"(K,) or (B, K) with B = {B}", tuple(indices.shape))
        if indices.numel() and not (indices.min() >= 0 and indices.max() < C):
            found = f"{indices.min().item()} to {indices.max().item()}"
            _check.fail(where, "classes", f"in [0, {C})", found)
        return indices.to(features.device, torch.int64)


def _loss_options(where: str, loss: Any) -> dict[str, Any]:
    """The loss as keywords of the ops."""
    options = getattr(loss, "options", None)
    if not isinstance(loss, nn.Module) or not callable(options):
        _check.fail(where, "loss", "a module of mlhead.losses, or one with their options()", repr(loss), TypeError)
    return options()


def _autocasts(device_type: str) -> bool:
    # The meta device, among others, has no autocast and asking about it is an error.
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def as_tokens(features: Tensor) -> Tensor:
    """Features as tokens (B, L, D); a view wherever the strides allow one."""
    return features if features.ndim == 3 else features.flatten(2).transpose(1, 2)


def best_classes(op: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Any, ...], k: int) -> tuple[Tensor, Tensor]:
    """`op(*inputs, k)`, also for k = 0, which a device without classes asks for."""
    if k > 0:
        return op(*inputs, k)
    x: Any = inputs[0]
    if _autocasts(x.device.type):
        (x,) = autocast(x.device.type, x)
    return x.new_empty(len(x), 0), x.new_empty(len(x), 0, dtype=torch.int64)


def check_rate(where: str, argument: str, value: float) -> float:
    """A dropout rate in [0, 1)."""
    _check.check_probability(where, argument, value)
    return value


def linear_init(weight: Tensor, fan_in: int) -> None:
    """The default of torch's Linear and Conv2d: uniform in +-1 / sqrt(fan_in)."""
    bound = 1.0 / math.sqrt(fan_in)
    nn.init.uniform_(weight, -bound, bound)


def factory(like: Tensor) -> dict[str, Any]:
    """The device and dtype keywords of a tensor."""
    return {"device": like.device, "dtype": like.dtype}
