"""A loss in the head whose backward updates the weight block by block, so that its gradient never exists whole."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .. import _backend, _check
from ..reference.class_loss import LossArguments
from ._fused import is_transformed
from ._loss_chunks import Block, BlockCall, loss_and_gradients

if TYPE_CHECKING:
    from ._loss_op import LossOp


class BlockUpdate(Protocol):
    """One update of a weight, block by block; what `loss_and_gradients` takes as its sink."""

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks of the weight that have a class, in order."""

    def place(self, block: Block) -> Tensor:
        """Where the gradient (g, E, n) of the block is to be written."""

    def done(self, block: Block, gradient: Tensor) -> None:
        """Updates the block by its gradient; nothing reads the block after this."""


@runtime_checkable
class Update(Protocol):
    """What `update=` takes: the optimizers of `mlhead.optim`."""

    def check_update(self, where: str, parameter: Tensor, num_classes: int) -> None:
        """Raises an error unless `parameter` is one of the optimizer's and fits its state."""

    def check_backward(self, parameter: Tensor) -> None:
        """Raises an error if the parameter was updated in this step already."""

    def begin_update(self, parameter: Tensor, num_classes: int, dtype: torch.dtype) -> BlockUpdate:
        """Begins the update of a parameter by gradients of `dtype`."""


def grouped(parameter: Tensor) -> Tensor:
    """A parameter (G, E, J), or one (C, D) seen as (1, D, C), without its gradient."""
    parameter = parameter.detach()  # shares the counter of versions
    return parameter if parameter.ndim == 3 else parameter.t().unsqueeze(0)


class _Cast:
    """A weight in another dtype, which it gets block by block."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._weight, self._dtype, self.shape = weight, dtype, weight.shape

    def __getitem__(self, index: Any) -> Tensor:
        return self._weight[index].to(self._dtype)


class _UpdateInBackward(torch.autograd.Function):
    """The loss alone in forward; in backward the gradients of h and bias, and the update of the parameter."""

    @staticmethod
    def forward(
        ctx: Any,
        op: LossOp,
        update: Update,
        choice: str,
        arguments: LossArguments,
        weight: Tensor,
        parameter: Tensor,
        h: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        loss = op._run(h, weight, bias, *arguments, choice)[0]
        ctx.set_materialize_grads(False)
        ctx.op, ctx.update, ctx.choice, ctx.parameter = op, update, choice, parameter
        ctx.options, ctx.used = arguments[6:], False
        # Not `weight`: under autocast that is a whole copy.
        ctx.save_for_backward(parameter, h, bias, *arguments[:6])
        return loss

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> Any:
        if dout is None:
            return (None,) * 8
        if torch.is_grad_enabled():
            raise RuntimeError("update: backward must run without create_graph: an update has no gradient")
        if ctx.used:
            raise RuntimeError(
                "update: backward must be called once for each loss, as it updates the weight, got a second call"
            )
        # Before the tensors are asked for: of an update autograd would say only that one of them was modified.
        ctx.update.check_backward(ctx.parameter)
        parameter, h, bias, *tensors = ctx.saved_tensors
        ctx.used = True
        arguments = LossArguments(*tensors, *ctx.options)
        weight: Any = grouped(parameter)
        if weight.dtype != h.dtype:
            weight = _Cast(weight, h.dtype)
        needs = (ctx.needs_input_grad[6], True, ctx.needs_input_grad[7])
        kernels = ctx.op.kernels(ctx.choice, h)
        sink = ctx.update.begin_update(ctx.parameter, arguments.num_classes, h.dtype)
        with torch.autocast(h.device.type, enabled=False):
            call = BlockCall(kernels, h, weight, bias, arguments, sink.blocks)
            _, dh, _, dbias = loss_and_gradients(call, dout.resolve_neg(), needs, sink)
        return None, None, None, None, None, None, dh if needs[0] else None, dbias if needs[2] else None


@torch._disable_dynamo  # torch.compiler.disable, but for importing the compiler here; backward has a side effect
def loss_with_update(
    where: str,
    op: LossOp,
    update: Any,
    parameter: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    arguments: LossArguments,
    backend: str | None,
) -> Tensor:
    """The loss of an op, whose backward updates `parameter`.

    Args:
        where: The public function, for errors.
        op: `group_fc_loss`.
        update: The optimizer.
        parameter: The weight as it was given.
        h: (B, G, E).
        weight: (G, E, J), the parameter as `grouped` sees it or, under autocast, its copy in the dtype of h.
        bias: (C) or None.
        arguments: Of the loss.
        backend: As it was given.
    """
    if isinstance(update, type) or not isinstance(update, Update):
        must = "an optimizer of mlhead.optim (ClassSGD, ClassAdamW, ClassAdafactor)"
        got = f"the class {update.__name__}" if isinstance(update, type) else type(update).__name__
        _check.fail(where, "update", must, got, TypeError)
    if is_transformed():
        _check.fail(where, "update", "None under torch.func and forward-mode AD", "an optimizer")
    update.check_update(where, parameter, arguments.num_classes)
    arguments = arguments._replace(make=[False] * 3)
    if not torch.is_grad_enabled():
        return op.loss(h, weight, bias, *arguments, backend=backend)
    if not parameter.requires_grad:
        _check.fail(where, "weight", "a parameter that requires a gradient, for update", "one that does not")
    choice = _backend.requested(backend)
    return _UpdateInBackward.apply(op, update, choice, arguments, weight.detach(), parameter, h, bias)
