"""The losses as functions of logits and dense targets."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _check
from ..ops._loss_options import check_asl
from ..ops._targets import check_range

REDUCTIONS = ("none", "mean", "sum")


def _prepare(where: str, logits: Tensor, reduction: str) -> Tensor:
    """The logits, checked, in the dtype of the arithmetic."""
    _check.check_tensor(where, "logits", logits)
    _check.check_ndim(where, "logits", logits, "(B, C)")
    _check.check_choice(where, "reduction", reduction, REDUCTIONS)
    return logits if logits.dtype == torch.float64 else logits.float()


def _dense_targets(where: str, targets: Tensor, z: Tensor, smoothing: float) -> Tensor:
    """Targets (B, C) in [0, 1], checked, in the dtype of the arithmetic, smoothed."""
    _check.check_real(where, "targets", targets)
    _check.check_shape(where, "targets", targets, "(B, C)", z.shape)
    _check_device(where, "targets", targets, z)
    check_range(where, "targets", targets)
    y = targets.to(z.dtype)
    return y * (1.0 - smoothing) + 0.5 * smoothing if smoothing else y


def _check_device(where: str, argument: str, tensor: Tensor, z: Tensor) -> None:
    if tensor.device != z.device:
        _check.fail(where, argument, f"on {z.device} like logits", tensor.device)


def _of_classes(where: str, argument: str, weight: Tensor | None, z: Tensor) -> Tensor | None:
    """A weight (C,) of classes, checked, in the dtype of the arithmetic."""
    if weight is None:
        return None
    _check.check_tensor(where, argument, weight)
    _check.check_shape(where, argument, weight, "(C,)", z.shape[1:])
    _check_device(where, argument, weight, z)
    return weight.to(z.dtype)


def _finish(where: str, loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Weights, then the reduction; a mean over nothing is 0, so that an empty batch does no harm."""
    if weight is not None:
        _check.check_tensor(where, "weight", weight)
        _check_device(where, "weight", weight, loss)
        if weight.shape != loss.shape[:1] and weight.shape != loss.shape:
            must = f"(B,) = {tuple(loss.shape[:1])}"
            if loss.ndim == 2:
                must += f" or (B, C) = {tuple(loss.shape)}"
            _check.fail(where, "weight", must, tuple(weight.shape))
        weight = weight.to(loss.dtype)
        loss = loss * (weight.unsqueeze(1) if weight.ndim < loss.ndim else weight)
    if reduction == "none":
        return loss
    if reduction == "sum" or loss.numel() == 0:
        return loss.sum()
    return loss.mean()


def binary_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    pos_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Binary cross-entropy of every class on its own.

    loss[b, c] = -( pos_weight[c] y log p + (1 - y) log(1 - p) ) * class_weight[c] * weight
    with p = sigmoid(logits[b, c])

    Args:
        logits: (B, C), any floating dtype.
        targets: y (B, C) in [0, 1], bool, integer or floating.
        pos_weight: (C,), what a positive of each class counts, or None.
        class_weight: (C,), what each class counts, or None.
        weight: (B,) per sample or (B, C) per element, or None.
        label_smoothing: s in [0, 1): y becomes y (1 - s) + s / 2.
        reduction: "none" gives (B, C); "sum" the sum; "mean" the sum divided by B * C, whatever the weights.

    Returns:
        fp32, or fp64 for fp64 logits. The mean over an empty batch is 0.

    Raises:
        ValueError: A shape, a device, a choice, or on the CPU a target's value, does not fit.
        TypeError: An argument is of a wrong type or dtype.

    Numerics:
        log-sum-exp form: finite for every finite logit, and the gradient does not vanish for confident errors.
    """
    where = "binary_cross_entropy"
    z = _prepare(where, logits, reduction)
    _check.check_probability(where, "label_smoothing", label_smoothing)
    y = _dense_targets(where, targets, z, label_smoothing)
    pos_weight = _of_classes(where, "pos_weight", pos_weight, z)
    class_weight = _of_classes(where, "class_weight", class_weight, z)
    loss = F.binary_cross_entropy_with_logits(z, y, pos_weight=pos_weight, reduction="none")
    return _finish(where, loss if class_weight is None else loss * class_weight, weight, reduction)


def asymmetric_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 0.0,
    margin: float = 0.05,
    eps: float = 1e-8,
    detach_focal: bool = True,
    class_weight: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Asymmetric loss (ASL): focal weights of their own for positives and negatives, easy negatives dropped.

    loss[b, c] = -( y (1 - p)^gamma_pos log p + (1 - y) (1 - pm)^gamma_neg log pm ) * class_weight[c] * weight
    with p = sigmoid(logits[b, c]) and pm = min(1 - p + margin, 1)

    Args:
        logits: (B, C), any floating dtype.
        targets: y (B, C) in [0, 1], bool, integer or floating.
        gamma_neg: Focusing of negatives, >= 0 (7 in the papers' Open Images runs).
        gamma_pos: Focusing of positives, >= 0.
        margin: m in [0, 1); a negative with p <= m costs nothing.
        eps: Both logarithms are clamped to at least log(eps).
        detach_focal: Whether the focal weights are constants in backward. True, the default, is what the published
            ML-Decoder and ASL training scripts do; False is the gradient of the formula.
        class_weight: (C,), what each class counts, or None.
        weight: (B,) per sample or (B, C) per element, or None.
        reduction: "none" gives (B, C); "sum" the sum, which is what the published scripts use (with a learning rate
            to match); "mean" the sum divided by B * C.

    Returns:
        fp32, or fp64 for fp64 logits. The mean over an empty batch is 0.

    Raises:
        ValueError: A shape, a device, a number, or on the CPU a target's value, does not fit.
        TypeError: An argument is of a wrong type or dtype.

    Numerics:
        Finite values and gradients for every finite logit and every gamma. The clamp, part of the formula, ends the
        gradient of a positive whose p is below eps.

    Source:
        Ridnik et al., Asymmetric Loss For Multi-Label Classification, Eq. 7; used by ML-Decoder.
    """
    where = "asymmetric_loss"
    z = _prepare(where, logits, reduction)
    check_asl(where, gamma_neg, gamma_pos, margin, eps)
    y = _dense_targets(where, targets, z, 0.0)
    class_weight = _of_classes(where, "class_weight", class_weight, z)

    below = z < 0
    small = torch.sigmoid(torch.where(below, z, -z))  # of p and q = 1 - p the smaller, so that no gradient cancels
    p, q = torch.where(below, small, 1.0 - small), torch.where(below, 1.0 - small, small)
    base = (p - margin).clamp(min=0.0)  # 1 - pm
    positive = F.logsigmoid(z).clamp(min=math.log(eps))
    # log pm from 1 - pm where that is small: the digits of a small p are lost in q + margin.
    negative = torch.where(base < 0.5, torch.log1p(-base.clamp(max=0.5)), (q + margin).clamp(min=eps).log())
    negative = negative.clamp(min=math.log(eps))
    if gamma_pos > 0:
        positive = positive * _focal(q, gamma_pos, detach_focal)
    if gamma_neg > 0:
        negative = negative * _focal(base, gamma_neg, detach_focal)
    loss = -(y * positive + (1.0 - y) * negative)
    return _finish(where, loss if class_weight is None else loss * class_weight, weight, reduction)


def _focal(base: Tensor, gamma: float, detach: bool) -> Tensor:
    """base^gamma with a finite gradient at 0 too, which a gamma below 1 does not have by itself."""
    if detach:
        return base.detach() ** gamma
    if gamma < 1:
        base = base.clamp(min=torch.finfo(base.dtype).tiny)
    return base**gamma


def softmax_cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    class_weight: Tensor | None = None,
    weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Cross-entropy of one softmax over all classes.

    loss[b] = -sum_c class_weight[c] y[b, c] log softmax(logits[b])[c] * weight[b]

    Args:
        logits: (B, C), any floating dtype.
        targets: Class indices (B,), integer, in [0, C); or probabilities y (B, C), floating, in [0, 1], whose rows are
            taken as they are, whatever they sum to. No index is special: there is no ignore_index.
        class_weight: (C,), what each class counts, or None.
        weight: (B,) per sample, or None.
        label_smoothing: s in [0, 1): y becomes y (1 - s) + s / C.
        reduction: "none" gives (B,); "sum" the sum; "mean" the sum divided by B, whatever the weights.

    Returns:
        fp32, or fp64 for fp64 logits. The mean over an empty batch is 0.

    Raises:
        ValueError: A shape, a device, a choice, or on the CPU a target's value, does not fit.
        TypeError: An argument is of a wrong type or dtype.
    """
    where = "softmax_cross_entropy"
    z = _prepare(where, logits, reduction)
    _check.check_probability(where, "label_smoothing", label_smoothing)
    if not isinstance(targets, Tensor):
        _check.fail(where, "targets", "a torch.Tensor", type(targets).__name__, TypeError)
    log_p = F.log_softmax(z, dim=1)
    class_weight = _of_classes(where, "class_weight", class_weight, z)
    if class_weight is not None:
        log_p = log_p * class_weight
    if targets.is_floating_point():
        loss = -(_dense_targets(where, targets, z, 0.0) * log_p).sum(1)
    else:
        if targets.dtype == torch.bool or targets.is_complex():
            _check.fail(
                where, "targets", "class indices (integer) or probabilities (floating)", targets.dtype, TypeError
            )
        B, C = z.shape
        if tuple(targets.shape) != (B,):
            must = f"class indices (B,) = {(B,)} or floating probabilities (B, C) = {(B, C)}"
            _check.fail(where, "targets", must, f"{targets.dtype} {tuple(targets.shape)}")
        _check_device(where, "targets", targets, z)
        check_range(where, "targets", targets, 0, C - 1)
        loss = -log_p.gather(1, targets.long().unsqueeze(1)).squeeze(1)
    if label_smoothing:
        loss = (1.0 - label_smoothing) * loss - label_smoothing * log_p.mean(1)
    return _finish(where, loss, weight, reduction)
