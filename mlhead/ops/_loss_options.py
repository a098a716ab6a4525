"""What the losses in the head take besides their head: the options, checked, as `LossArguments`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor

from .. import _check
from ..reference.class_loss import LossArguments, accumulation
from ._targets import SparseTargets, prepare

if TYPE_CHECKING:
    from ._loss_update import Update

LOSSES = ("bce", "asl", "softmax")

Targets = Tensor | SparseTargets | tuple[Tensor, Tensor]


class LossOptions(TypedDict, total=False):
    """The keywords of `group_fc_loss`, `csra_loss` and `linear_loss`.

    Args:
        loss: "bce" (the default), "asl" or "softmax"; `mlhead.losses` has their formulas.
        reduction: "mean" (the default), over B * C (softmax: over B) whatever the weights and `ignore`; or "sum".
        class_weight: (C), multiplies the loss of a class; with softmax the term of the target's class.
        pos_weight: (C), what a positive of a class counts in "bce".
        sample_weight: (B), multiplies the loss of an image.
        ignore: Elements whose label is unknown, which have neither loss nor gradient: a bool mask (B, C) beside dense
            targets, where it wins over a positive; `SparseTargets` beside sparse ones, which must not list a class of
            an image that the targets list too. Not for "softmax".
        label_smoothing: s in [0, 1), 0 by default, not for "asl".
        gamma_neg: Of "asl", 4 by default.
        gamma_pos: Of "asl", 0 by default.
        margin: Of "asl", 0.05 by default.
        eps: Of "asl", 1e-8 by default.
        detach_focal: Of "asl", True by default.
        class_group: Of "softmax": the name of a process group whose members each have a part of the classes, and these
            are one; the loss is then that of all, and the gradients those of this part. `mlhead.parallel` sets it.
        update: A `mlhead.optim` optimizer of `weight`, which then is updated in backward, block by block, and has no
            gradient.
        backend: "auto", "reference", "triton", "cpp", "cuda"; None takes the surrounding `backend(...)`.
    """

    loss: Literal["bce", "asl", "softmax"]
    reduction: Literal["mean", "sum"]
    class_weight: Tensor | None
    pos_weight: Tensor | None
    sample_weight: Tensor | None
    ignore: Tensor | SparseTargets | None
    label_smoothing: float
    gamma_neg: float
    gamma_pos: float
    margin: float
    eps: float
    detach_focal: bool
    class_group: str
    update: Update | None
    backend: str | None


_ASL = {"gamma_neg": 4.0, "gamma_pos": 0.0, "margin": 0.05, "eps": 1e-8, "detach_focal": True}
_WEIGHTS = {"class_weight": "(C,)", "pos_weight": "(C,)", "sample_weight": "(B,)"}


def check_asl(where: str, gamma_neg: float, gamma_pos: float, margin: float, eps: float) -> None:
    """The numbers of the asymmetric loss."""
    for name, gamma in (("gamma_neg", gamma_neg), ("gamma_pos", gamma_pos)):
        _check.check_number(where, name, gamma)
        if not 0 <= gamma < math.inf:
            _check.fail(where, name, "finite and at least 0", gamma)
    _check.check_probability(where, "margin", margin)
    _check.check_number(where, "eps", eps)
    if not 0.0 < eps < 1.0:
        _check.fail(where, "eps", "in (0, 1)", eps)


def _asl(where: str, options: dict[str, Any]) -> tuple[float, float, float, float, bool]:
    gamma_neg, gamma_pos, margin, eps, detach = (options.get(name, default) for name, default in _ASL.items())
    check_asl(where, gamma_neg, gamma_pos, margin, eps)
    return float(gamma_neg), float(gamma_pos), float(margin), float(eps), bool(detach)


def _weight(where: str, name: str, value: Any, size: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    if value is None:
        return None
    _check.check_tensor(where, name, value)
    _check.check_shape(where, name, value, _WEIGHTS[name], (size,))
    if value.device != device:
        _check.fail(where, name, f"on {device} like the features", value.device)
    if value.requires_grad:
        _check.fail(where, name, "a tensor that requires no gradient", "one that does")
    return value.to(dtype).contiguous()


def loss_arguments(
    where: str, features: Tensor, targets: Any, num_classes: int, options: dict[str, Any], make: Sequence[bool]
) -> LossArguments:
    """The options of a call, checked against features (B, ...) and C, with the targets in the kernels' form."""
    unknown = sorted(set(options) - set(LossOptions.__annotations__))
    if unknown:
        raise TypeError(f"{where}: options must be among {', '.join(LossOptions.__annotations__)}, got {unknown[0]}")
    loss, reduction = options.get("loss", "bce"), options.get("reduction", "mean")
    _check.check_choice(where, "loss", loss, LOSSES)
    _check.check_choice(where, "reduction", reduction, ("mean", "sum"))
    smoothing = options.get("label_smoothing", 0.0)
    _check.check_probability(where, "label_smoothing", smoothing)
    if loss == "asl" and smoothing:
        _check.fail(where, "label_smoothing", "0 for loss='asl'", smoothing)
    if loss != "bce" and options.get("pos_weight") is not None:
        _check.fail(where, "pos_weight", f"None for loss={loss!r}", "a tensor")
    if loss != "asl":
        for name in _ASL:
            if name in options:
                _check.fail(where, name, "left out but for loss='asl'", options[name])
    B, device, wide = features.shape[0], features.device, accumulation(features.dtype)
    class_group = options.get("class_group", "")
    if class_group and loss != "softmax":
        _check.fail(where, "class_group", f"left out for loss={loss!r}, whose classes are on their own", class_group)
    if loss == "softmax" and num_classes == 0 and not class_group:
        _check.fail(where, "num_classes", "at least 1 for loss='softmax'", num_classes)
    placed = prepare(where, targets, options.get("ignore"), loss, B, num_classes, device, wide)
    sizes = {"class_weight": num_classes, "pos_weight": num_classes, "sample_weight": B}
    weights: Any = [_weight(where, name, options.get(name), size, device, wide) for name, size in sizes.items()]
    asl = _asl(where, options)
    settings: tuple[Any, ...] = (num_classes, loss, *asl, float(smoothing), reduction, class_group, list(make))
    return LossArguments(*placed, *weights, *settings)


def refuse_update(where: str, options: dict[str, Any]) -> None:
    """Takes `update` out of the options of an op that has no gradient fusion."""
    if options.pop("update", None) is not None:
        _check.fail(where, "update", "None: gradient fusion is for group_fc_loss and linear_loss", "an optimizer")
