"""linear_loss: the loss of a linear classifier's logits, which never exist; one group of `group_fc_loss`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from .. import _check
from ._fused import autocast, is_autocasting
from ._loss_op import make_flags
from ._loss_options import LossOptions, Targets, loss_arguments
from ._loss_update import loss_with_update
from .group_fc_loss import _group_fc_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack


def check_linear(where: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Shapes, dtypes and devices of x (B, D), weight (C, D) and bias (C)."""
    for name, value in (("x", x), ("weight", weight)):
        _check.check_tensor(where, name, value)
    _check.check_ndim(where, "x", x, "(B, D)")
    _check.check_ndim(where, "weight", weight, "(C, D)")
    _check.check_shape(where, "weight", weight, "(C, D)", (weight.shape[0], x.shape[1]))
    _check.check_like(where, "weight", weight, "x", x)
    if bias is not None:
        _check.check_tensor(where, "bias", bias)
        _check.check_shape(where, "bias", bias, "(C,)", (weight.shape[0],))
        _check.check_like(where, "bias", bias, "x", x)


def linear_loss(
    x: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets, **options: Unpack[LossOptions]
) -> Tensor:
    """The loss of `x @ weight.T + bias` and its gradients, without the logits (B, C).

    Args:
        x: Features (B, D), floating.
        weight: (C, D) of the dtype of x, as of `torch.nn.Linear`.
        bias: (C) or None.
        targets: As for `group_fc_loss`.
        options: See `LossOptions`: loss="bce" | "asl" | "softmax", reduction, weights, ignore, backend and so on.

    Returns:
        A scalar, fp32 (fp64 for fp64 inputs). Under autocast x, weight and bias are cast to autocast's dtype first.

    Raises:
        ValueError: A shape, device or option does not fit, or on the CPU a target's value; the message names it.
        TypeError: An argument is of a wrong type or dtype, or an option is unknown.
        BackendError: An explicitly chosen backend cannot run this call.

    Numerics and memory:
        As for `group_fc_loss`, of which this is one group of C classes.

    Source:
        The last layer of a GAP head with its loss: ASL, Eq. 7; softmax as in fused linear cross-entropy.
    """
    where, parameter = "linear_loss", weight
    _check.check_tensor(where, "x", x)
    if is_autocasting(x.device.type):
        x, weight, bias = autocast(x.device.type, x, weight, bias)  # type: ignore[assignment]
    check_linear(where, x, weight, bias)
    settings: dict[str, Any] = dict(options)
    backend, update = settings.pop("backend", None), settings.pop("update", None)
    arguments = loss_arguments(where, x, targets, weight.shape[0], settings, make_flags(x, weight, bias))
    h, grouped = x.unsqueeze(1), weight.t().unsqueeze(0)
    if update is not None:
        return loss_with_update(where, _group_fc_loss, update, parameter, h, grouped, bias, arguments, backend)
    return _group_fc_loss.loss(h, grouped, bias, *arguments, backend=backend)
