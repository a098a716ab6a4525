"""How an op that ends in a loss is registered: its gradients are made in the forward pass, and scaled in the backward.

For a sum over elements the gradient of the logits is known as soon as they are, but for the upstream gradient, one
number. So where gradients will be needed the forward makes them too, for an upstream gradient of 1, while logits,
inputs and weight are at hand; backward multiplies them, in place, and only if there is something to multiply by.

Each backward of the same graph must find its gradients untouched. The first takes those that forward made; a later one
(`retain_graph=True`) has them made again from the inputs. In fp16, where a small gradient would vanish before a
GradScaler's factor reaches it, forward makes none (`make` is all False) and backward makes them with the factor inside.
Gradients of gradients come from the reference's closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..reference.class_loss import SCHEMA, accumulation
from ._fused import FusedOp, is_transformed
from ._gradients import empty_gradient, laid_out
from ._loss_kernels import LossKernels, PlainKernels


def make_flags(*tensors: Tensor | None) -> list[bool]:
    """Which gradients the forward should make: those that will be needed, none in fp16; torch.func differentiates."""
    transformed = not torch.compiler.is_compiling() and is_transformed()
    if not torch.is_grad_enabled() or transformed or any(t is not None and t.dtype == torch.float16 for t in tensors):
        return [False] * len(tensors)
    return [t is not None and t.requires_grad for t in tensors]


class LossOp(FusedOp):
    """An op whose first output is a loss, and whose others are the gradients of its first three inputs.

    Args:
        name: The op's name; a backend's launchers are `<name>(*inputs) -> (loss, *gradients)` and
            `<name>_backward(dout, *inputs, needs) -> gradients`.
        arguments: The schema of the head's inputs, of which the first three are h or x, weight and bias.
        reference: f(*inputs) -> loss, in plain torch.
        reference_grad: (dout, *inputs) -> the gradients, in plain torch.
        implementations: The other backends; what each loads has its `LossKernels` as `kernels`.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        *,
        reference: Callable[..., Tensor],
        reference_grad: Callable[..., tuple[Tensor | None, ...]],
        implementations: dict[str, Any],
    ) -> None:
        self._loss, self._gradients = reference, reference_grad
        super().__init__(
            name,
            f"{arguments}, {SCHEMA}",
            outputs=4,
            keeps_extras=False,
            differentiable=(0, 1, 2),
            reference=self._reference,
            reference_grad=reference_grad,
            fake=self._fake_loss,
            implementations=implementations,
        )
        self._function = _MadeForward

    def loss(self, *inputs: Any, backend: str | None) -> Tensor:
        """The loss, a scalar that carries the gradients."""
        result = self(*inputs, backend=backend)
        return result if isinstance(result, Tensor) else result[0]

    def _reference(self, *inputs: Any) -> tuple[Tensor, ...]:
        loss = self._loss(*inputs)
        make = inputs[-1]
        grads: tuple[Tensor | None, ...] = (None,) * 3
        if any(make):
            grads = self._gradients(loss.new_ones(()), *inputs)
        return loss, *self._results(inputs, grads, make)

    @staticmethod
    def _results(inputs: Any, grads: Any, needs: Any) -> tuple[Tensor, ...]:
        """The gradients that are needed, in the layout of their tensors, none an alias; else empty tensors."""
        results = []
        for i, (tensor, grad, need) in enumerate(zip(inputs[:3], grads, needs, strict=True)):
            if not need or grad is None:
                results.append(inputs[0].new_empty(0))
                continue
            results.append(laid_out(grad, empty_gradient(tensor, i == 1).stride()))
        return tuple(results)

    def _reference_backward(self, *args: Any) -> Any:
        dout, *inputs = args[:-1]
        return self._results(inputs, self._gradients(dout, *inputs), args[-1])

    @staticmethod
    def _fake_loss(*args: Any) -> tuple[Tensor, ...]:
        tensors, make = args[:3], args[-2]
        loss = tensors[0].new_empty((), dtype=accumulation(tensors[0].dtype))
        return loss, *LossOp._fake_gradients(tensors, make)

    def _fake_backward(self, *args: Any) -> Any:
        return LossOp._fake_gradients(args[1:4], args[-2])

    @staticmethod
    def _fake_gradients(tensors: Any, needs: Any) -> tuple[Tensor, ...]:
        return tuple(
            empty_gradient(t, i == 1) if need else tensors[0].new_empty(0)
            for i, (t, need) in enumerate(zip(tensors, needs, strict=True))
        )

    def scale_gradients(self, grads: list[Tensor], dout: Tensor, choice: str) -> None:
        """Multiplies gradients by the upstream gradient, in place."""
        kernels = self.kernels(choice, grads[0])
        for grad in grads:
            if grad.numel():
                kernels.scale(grad, dout)

    def kernels(self, choice: str, tensor: Tensor) -> LossKernels:
        """The kernels of the backend that runs a call with this tensor; those of the reference are plain torch."""
        launcher: Any = self._launchers(choice, tensor)[0]
        return PlainKernels() if launcher == self.reference else launcher.__self__.kernels


class _MadeForward(torch.autograd.Function):
    """A loss with the gradients made beside it."""

    @staticmethod
    def forward(ctx: Any, op: LossOp, run: Callable, run_backward: Callable, *args: Any) -> Any:
        inputs, choice = args[:-1], args[-1]
        outputs = run(*args)
        ctx.set_materialize_grads(False)
        ctx.constants = [None if i in op._tensors else value for i, value in enumerate(inputs)]
        ctx.op, ctx.run, ctx.run_backward, ctx.choice = op, run, run_backward, choice
        ctx.eager = run == op._run
        tensors = op.saved(inputs, outputs)
        if ctx.eager:
            ctx.made = list(outputs[1:])
            ctx.save_for_backward(*tensors)
            return outputs[0]
        ctx.save_for_backward(*tensors, *outputs[1:])
        ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> Any:
        op: LossOp = ctx.op
        grads: list[Tensor | None] = [None] * (op._num_inputs + 4)
        if dout is None:
            return tuple(grads)
        needs = [ctx.needs_input_grad[3 + i] for i in op.differentiable]
        make = ctx.constants[-1]  # the last of `LossArguments`
        ready = all(m for m, need in zip(make, needs, strict=True) if need)
        if ctx.eager and ready and not torch.is_grad_enabled():
            made, ctx.made = ctx.made, None
            if made is None:  # an earlier backward took them
                made = list(ctx.run(*_MadeForward._inputs(ctx), ctx.choice)[1:])
            op.scale_gradients(made, dout.resolve_neg(), ctx.choice)
        elif ready and not torch.is_grad_enabled():
            made = [t * dout if t.numel() else t for t in ctx.saved_tensors[len(op._tensors) :]]
        else:
            # With create_graph the gradient is itself differentiated, so it goes through the library op's autograd.
            run = op.backward_op if torch.is_grad_enabled() else ctx.run_backward
            inputs = _MadeForward._inputs(ctx)
            made = list(run(dout.resolve_neg(), *inputs, needs, ctx.choice))
        for i, need, result in zip(op.differentiable, needs, made, strict=True):
            if need:
                grads[3 + i] = result
        return tuple(grads)

    @staticmethod
    def _inputs(ctx: Any) -> list[Any]:
        inputs = list(ctx.constants)
        for i, tensor in zip(ctx.op._tensors, ctx.saved_tensors, strict=False):
            inputs[i] = tensor
        return inputs
