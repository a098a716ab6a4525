"""The losses as modules, which tell a head what to compute without logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .. import _check
from ..ops._loss_options import check_asl
from .functional import REDUCTIONS, asymmetric_loss, binary_cross_entropy, softmax_cross_entropy

if TYPE_CHECKING:
    from typing_extensions import Self


class _Loss(nn.Module):
    _kind: str
    class_weight: Tensor | None

    def __init__(self, reduction: str, class_weight: Tensor | None) -> None:
        super().__init__()
        _check.check_choice(type(self).__name__, "reduction", reduction, REDUCTIONS)
        self.reduction = reduction
        self._register_weight("class_weight", class_weight)

    def _register_weight(self, name: str, weight: Tensor | None) -> None:
        """A weight of each class as a buffer that moves with the loss and is in no state dict."""
        if weight is not None:
            _check.check_tensor(type(self).__name__, name, weight)
            _check.check_ndim(type(self).__name__, name, weight, "(C,)")
        self.register_buffer(name, None if weight is None else weight.detach().clone(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Weights go to another device with what the loss belongs to, and keep their numbers.

        The arithmetic is fp32: `half()` rounds parameters, `to_empty()` leaves them without values.
        """
        weights = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, weight in weights.items():
            moved = self._buffers[name]
            if weight is not None and moved is not None:
                self._buffers[name] = weight.to(moved.device)
        return self

    def options(self) -> dict[str, Any]:
        """The same loss as keywords of `group_fc_loss`, `csra_loss` and `linear_loss`.

        Raises:
            ValueError: The reduction is "none": without logits there is nothing per element.
        """
        if self.reduction == "none":
            _check.fail(type(self).__name__, "reduction", "'mean' or 'sum' for a loss in the head", "'none'")
        return {"loss": self._kind, "reduction": self.reduction, "class_weight": self.class_weight}


class BinaryCrossEntropy(_Loss):
    """`binary_cross_entropy` as a module; the weights are buffers that move with it and are in no state dict.

    Args:
        pos_weight: (C,), or None.
        class_weight: (C,), or None.
        label_smoothing: s in [0, 1).
        reduction: "none", "mean" (over B * C) or "sum".

    Raises:
        ValueError: There is no such reduction, a weight is not (C,), or `label_smoothing` not in [0, 1).
        TypeError: A weight is no floating tensor, or `label_smoothing` no number.
    """

    _kind = "bce"
    pos_weight: Tensor | None

    def __init__(
        self,
        *,
        pos_weight: Tensor | None = None,
        class_weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction, class_weight)
        _check.check_probability(type(self).__name__, "label_smoothing", label_smoothing)
        self._register_weight("pos_weight", pos_weight)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits (B, C) against targets (B, C); arguments, result and errors of `binary_cross_entropy`."""
        return binary_cross_entropy(
            logits,
            targets,
            pos_weight=self.pos_weight,
            class_weight=self.class_weight,
            weight=weight,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def options(self) -> dict[str, Any]:
        """The same loss as keywords of the ops.

        Raises:
            ValueError: The reduction is "none".
        """
        return {**super().options(), "pos_weight": self.pos_weight, "label_smoothing": self.label_smoothing}

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return f"label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"


class AsymmetricLoss(_Loss):
    """`asymmetric_loss` as a module.

    Args:
        gamma_neg: Focusing of negatives.
        gamma_pos: Focusing of positives.
        margin: A negative with p <= margin costs nothing.
        eps: The logarithms are clamped to at least log(eps).
        detach_focal: Whether the focal weights are constants in backward; True, the default, as in the published
            training scripts.
        class_weight: (C,), a buffer that is in no state dict, or None.
        reduction: "none", "mean" (over B * C) or "sum".

    Raises:
        ValueError: There is no such reduction, a number is out of its range, or `class_weight` is not (C,); the message
            names it.
        TypeError: One of `gamma_neg`, `gamma_pos`, `margin` and `eps` is no number, or `class_weight` no floating
            tensor.
    """

    _kind = "asl"

    def __init__(
        self,
        *,
        gamma_neg: float = 4.0,
        gamma_pos: float = 0.0,
        margin: float = 0.05,
        eps: float = 1e-8,
        detach_focal: bool = True,
        class_weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> None:
        super().__init__(reduction, class_weight)
        check_asl(type(self).__name__, gamma_neg, gamma_pos, margin, eps)
        self.gamma_neg, self.gamma_pos, self.margin, self.eps = gamma_neg, gamma_pos, margin, eps
        self.detach_focal = detach_focal

    def forward(self, logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits (B, C) against targets (B, C); arguments, result and errors of `asymmetric_loss`."""
        return asymmetric_loss(
            logits,
            targets,
            gamma_neg=self.gamma_neg,
            gamma_pos=self.gamma_pos,
            margin=self.margin,
            eps=self.eps,
            detach_focal=self.detach_focal,
            class_weight=self.class_weight,
            weight=weight,
            reduction=self.reduction,
        )

    def options(self) -> dict[str, Any]:
        """The same loss as keywords of the ops.

        Raises:
            ValueError: The reduction is "none".
        """
        names = ("gamma_neg", "gamma_pos", "margin", "eps", "detach_focal")
        return {**super().options(), **{name: getattr(self, name) for name in names}}

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return (
            f"gamma_neg={self.gamma_neg}, gamma_pos={self.gamma_pos}, margin={self.margin}, eps={self.eps}, "
            f"detach_focal={self.detach_focal}, reduction={self.reduction!r}"
        )


class SoftmaxCrossEntropy(_Loss):
    """`softmax_cross_entropy` as a module.

    Args:
        class_weight: (C,), a buffer that is in no state dict, or None.
        label_smoothing: s in [0, 1).
        reduction: "none", "mean" (over B) or "sum".

    Raises:
        ValueError: There is no such reduction, `class_weight` is not (C,), or `label_smoothing` is not in [0, 1).
        TypeError: `class_weight` is no floating tensor, or `label_smoothing` is no number.
    """

    _kind = "softmax"

    def __init__(
        self, *, class_weight: Tensor | None = None, label_smoothing: float = 0.0, reduction: str = "mean"
    ) -> None:
        super().__init__(reduction, class_weight)
        _check.check_probability(type(self).__name__, "label_smoothing", label_smoothing)
        self.label_smoothing = label_smoothing

    def forward(self, logits: Tensor, targets: Tensor, weight: Tensor | None = None) -> Tensor:
        """The loss of logits (B, C) against indices (B,) or probabilities (B, C), as of `softmax_cross_entropy`."""
        return softmax_cross_entropy(
            logits,
            targets,
            class_weight=self.class_weight,
            weight=weight,
            label_smoothing=self.label_smoothing,
            reduction=self.reduction,
        )

    def options(self) -> dict[str, Any]:
        """The same loss as keywords of the ops.

        Raises:
            ValueError: The reduction is "none".
        """
        return {**super().options(), "label_smoothing": self.label_smoothing}

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return f"label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"
