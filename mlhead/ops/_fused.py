"""How an op is registered: once with torch.library, and with a shorter way for plain eager calls.

An op `f` is a pair of library ops, `mlhead::f` and `mlhead::f_backward`, each with a fake for tracing:

    f(inputs..., str backend)                                   -> Tensor, or a tuple whose first is differentiable
    f_backward(dout, inputs..., extras..., bool[] needs, str backend) -> one gradient per differentiable input

where `extras` are the further outputs of f, after its first one where the op asks for that too, and a gradient that is
not needed is an empty tensor. A plain eager call
goes straight to an autograd.Function around the launchers, which costs a few microseconds; when something traces
(torch.compile, export, FakeTensor) or wraps tensors, the library op is called, whose Autograd key holds the same
Function around the library ops. Under torch.func and forward-mode AD the reference, plain differentiable torch, runs;
asking for another backend there is an error. Gradients of gradients come from the reference's closed form.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import _backend

_all: list[FusedOp] = []
_others: dict[Any, Callable[..., Any]] = {}  # library ops that are no FusedOp, with their references
_library = torch.library.Library("mlhead", "DEF")
_PLAIN = (Tensor, torch.nn.Parameter)
_functorch_level = torch._C._functorch.maybe_current_level


def is_plain_eager(tensors: Sequence[Tensor | None]) -> bool:
    """Whether nothing traces, transforms or wraps: the call may skip the dispatcher."""
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    # A view by its negative bit (the imaginary part of a conjugate) is resolved by the dispatcher only.
    return torch._C._get_tracing_state() is None and all(
        tensor is None or (type(tensor) in _PLAIN and not tensor.is_neg()) for tensor in tensors
    )


def _needs_gradient(tensors: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def is_transformed() -> bool:
    """Whether a torch.func transform or forward-mode AD is active."""
    return _functorch_level() is not None or torch.autograd.forward_ad._current_level >= 0


def is_autocasting(device_type: str) -> bool:
    """Whether autocast is on for a device; the meta device, which torch refuses to answer for, has none."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def autocast(device_type: str, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The autocast rule of every op: floating inputs but fp64 are cast to autocast's dtype, as for nn.Linear."""
    if not is_autocasting(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


class FusedOp:
    """One op: its library ops, its autograd, its backends.

    Args:
        name: The op's name; its launchers are called `<name>` and `<name>_backward`.
        arguments: The schema of the inputs, without `backend`, e.g. "Tensor h, Tensor weight, SymInt num_classes".
        outputs: How many tensors the forward returns; only the first is differentiable.
        keeps_output: Whether backward also takes the first output, as the first of its extras.
        keeps_extras: Whether backward takes the further outputs.
        replaced: Position of an input in whose place backward takes the first output, so that it is not kept alive;
            `reference_grad` must give the same for both.
        differentiable: Positions of the inputs that have a gradient.
        reference: f(*inputs) in plain torch; returns all outputs.
        reference_grad: (dout, *inputs, *extras) -> the gradients, in plain torch.
        fake: (*inputs, backend) -> the outputs without data; `backend` is the choice, perhaps "auto".
        implementations: The other backends.
    """

    def __init__(
        self,
        name: str,
        arguments: str,
        *,
        outputs: int,
        keeps_output: bool = False,
        keeps_extras: bool = True,
        replaced: int | None = None,
        differentiable: tuple[int, ...],
        reference: Callable[..., Any],
        reference_grad: Callable[..., tuple[Tensor | None, ...]],
        fake: Callable[..., Any],
        implementations: dict[str, _backend.Implementation],
    ) -> None:
        self.name = name
        self.differentiable = differentiable
        self.reference = reference
        self.reference_grad = reference_grad
        self._fake = fake
        self._implementations = implementations
        self._outputs = outputs
        self._replaced = replaced
        self._first_extra = (0 if keeps_output else 1) if keeps_extras else outputs
        self._function: type[torch.autograd.Function] = _Forward
        self._loaded: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        _backend.register(name, implementations)

        tensors = ", ".join(["Tensor"] * outputs)
        extras = "".join(f", Tensor extra{i}" for i in range(self._first_extra, outputs))
        grads = ", ".join(["Tensor"] * len(differentiable))
        result = tensors if outputs == 1 else f"({tensors})"
        _library.define(f"{name}({arguments}, str backend) -> {result}")
        _library.define(
            f"{name}_backward(Tensor dout, {arguments}{extras}, bool[] needs, str backend) -> "
            + (grads if len(differentiable) == 1 else f"({grads})")
        )
        self.forward_op = getattr(torch.ops.mlhead, name).default
        self.backward_op = getattr(torch.ops.mlhead, f"{name}_backward").default
        schema = self.forward_op._schema.arguments[:-1]
        self._num_inputs = len(schema)
        self._tensors = tuple(i for i, a in enumerate(schema) if "Tensor" in str(a.type))

        _library.impl(name, self._run, "CompositeExplicitAutograd")
        _library.impl(f"{name}_backward", self._run_backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"mlhead::{name}", self._fake_forward, lib=_library)
        torch.library.register_fake(f"mlhead::{name}_backward", self._fake_backward, lib=_library)
        _all.append(self)
        _library.impl(name, self._autograd, "Autograd")
        _library.impl(f"{name}_backward", self._autograd_backward, "Autograd")

    def extras(self, outputs: Any) -> tuple[Tensor, ...]:
        """What backward takes of the outputs of a call."""
        return ((outputs,) if isinstance(outputs, Tensor) else tuple(outputs))[self._first_extra :]

    def saved(self, inputs: Sequence[Any], outputs: Any) -> list[Tensor | None]:
        """The tensors that backward takes as inputs."""
        tensors = [inputs[i] for i in self._tensors]
        if self._replaced is not None:
            tensors[self._tensors.index(self._replaced)] = outputs if self._outputs == 1 else outputs[0]
        return tensors

    def __call__(self, *inputs: Any, backend: str | None) -> Any:
        """All outputs of the op, on the backend asked for."""
        choice = _backend.requested(backend)
        tensors = [inputs[i] for i in self._tensors]
        if torch.compiler.is_compiling():
            return self.forward_op(*inputs, choice)
        if is_transformed():
            return self._run_transformed(inputs, choice)
        if is_plain_eager(tensors):
            if not _needs_gradient(tensors):
                return self._run(*inputs, choice)
            return self._function.apply(self, self._run, self._run_backward, *inputs, choice)
        return self.forward_op(*inputs, choice)

    def _run_transformed(self, inputs: tuple[Any, ...], choice: str) -> Any:
        if choice not in ("auto", "reference"):
            raise _backend.BackendError(
                f"{self.name}: backend must be 'auto' or 'reference' under torch.func and forward-mode AD, which "
                f"differentiate plain torch, got {choice!r}"
            )
        tensor = inputs[0]
        _backend.resolve(self.name, "reference", tensor.device, tensor.dtype)
        return self.reference(*inputs)

    def _launchers(self, choice: str, tensor: Tensor) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The forward and the backward launcher of the backend that runs a call with this tensor."""
        name = _backend.resolve(self.name, choice, tensor.device, tensor.dtype)
        launchers = self._loaded.get(name)
        if launchers is None:
            if name == "reference":
                launchers = self.reference, self._reference_backward
            else:
                module = self._implementations[name].load()
                launchers = getattr(module, self.name), getattr(module, f"{self.name}_backward")
            self._loaded[name] = launchers
        return launchers

    def _run(self, *args: Any) -> Any:
        device_type = args[0].device.type
        launch = self._launchers(args[-1], args[0])[0]
        if is_autocasting(device_type):  # the inputs are in their final dtype here
            with torch.autocast(device_type, enabled=False):
                return launch(*args[:-1])
        return launch(*args[:-1])

    def _run_backward(self, *args: Any) -> Any:
        device_type = args[0].device.type
        launch = self._launchers(args[-1], args[1])[1]
        if is_autocasting(device_type):
            with torch.autocast(device_type, enabled=False):
                return launch(*args[:-1])
        return launch(*args[:-1])

    def _reference_backward(self, *args: Any) -> Any:
        *inputs, needs = args
        grads = self.reference_grad(*inputs)
        empty = inputs[0].new_empty(0)
        # A library op's outputs may not alias its inputs or one another.
        results: list[Tensor] = []
        for grad, need in zip(grads, needs, strict=True):
            grad = grad.contiguous() if need and grad is not None else empty.clone()
            results.append(grad.clone() if any(grad is other for other in results) else grad)
        return tuple(results) if len(results) > 1 else results[0]

    def _fake_forward(self, *args: Any) -> Any:
        return self._fake(*args)

    def _fake_backward(self, *args: Any) -> Any:
        *inputs, needs, _ = args
        grads = tuple(
            torch.empty_like(inputs[1 + i], memory_format=torch.contiguous_format) if need else inputs[0].new_empty(0)
            for i, need in zip(self.differentiable, needs, strict=True)
        )
        return grads if len(grads) > 1 else grads[0]

    def _autograd(self, *args: Any) -> Any:
        tensors = [args[i] for i in self._tensors]
        # As in what torch.compile has made, where a second way through the dispatcher would cost as much as the kernel.
        if is_plain_eager(tensors) and not is_transformed() and not _needs_gradient(tensors):
            return self._run(*args)

        def run(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self.forward_op(*args)

        return self._function.apply(self, run, self.backward_op, *args)

    def _autograd_backward(self, *args: Any) -> Any:
        tensors = [value for value in args if isinstance(value, Tensor)]
        if is_plain_eager(tensors) and not is_transformed() and not _needs_gradient(tensors):
            return self._run_backward(*args)

        def run(*args: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                return self.backward_op(*args)

        return _Backward.apply(self, run, *args)


class _Forward(torch.autograd.Function):
    """The op with its gradient; `run` and `run_backward` are launchers in eager mode and library ops in tracing."""

    @staticmethod
    def forward(ctx: Any, op: FusedOp, run: Callable, run_backward: Callable, *args: Any) -> Any:
        inputs, choice = args[:-1], args[-1]
        outputs = run(*args)
        if any(ctx.needs_input_grad):
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(*op.saved(inputs, outputs), *op.extras(outputs))
            ctx.constants = [None if i in op._tensors else value for i, value in enumerate(inputs)]
            ctx.op, ctx.run_backward, ctx.choice = op, run_backward, choice
            if op._outputs > 1:
                ctx.mark_non_differentiable(*outputs[1:])
        return outputs

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, *_: Any) -> Any:
        op: FusedOp = ctx.op
        grads: list[Tensor | None] = [None] * (op._num_inputs + 4)
        if dout is None:
            return tuple(grads)
        saved = ctx.saved_tensors
        inputs = list(ctx.constants)
        for i, tensor in zip(op._tensors, saved[: len(op._tensors)], strict=True):
            inputs[i] = tensor
        needs = [ctx.needs_input_grad[3 + i] for i in op.differentiable]
        arguments = (dout, *inputs, *saved[len(op._tensors) :], needs, ctx.choice)
        # With create_graph the gradient is itself differentiated, so it goes through the library op's autograd.
        run = op.backward_op if torch.is_grad_enabled() else ctx.run_backward
        if dout.is_neg():
            arguments = (dout.resolve_neg(), *arguments[1:])
        results = run(*arguments)
        results = results if len(op.differentiable) > 1 else (results,)
        for i, need, result in zip(op.differentiable, needs, results, strict=True):
            if need:
                grads[3 + i] = result
        return tuple(grads)


class _Backward(torch.autograd.Function):
    """The gradient op with its own gradient, taken through the reference's closed form."""

    @staticmethod
    def forward(ctx: Any, op: FusedOp, run: Callable, *args: Any) -> Any:
        results = run(*args)
        ctx.op = op
        ctx.needs = args[-2]
        ctx.slots = [i for i, value in enumerate(args) if isinstance(value, Tensor)]
        ctx.constants = [None if isinstance(value, Tensor) else value for value in args]
        ctx.save_for_backward(*(args[i] for i in ctx.slots))
        return results

    @staticmethod
    def backward(ctx: Any, *ggrads: Tensor | None) -> Any:
        op: FusedOp = ctx.op
        create_graph = torch.is_grad_enabled()
        device_type = ctx.saved_tensors[0].device.type
        with (
            torch.enable_grad(),
            torch.autocast(device_type, enabled=False) if device_type != "meta" else nullcontext(),
        ):
            args = list(ctx.constants)
            wanted = []
            for i, tensor in zip(ctx.slots, ctx.saved_tensors, strict=True):
                if tensor.is_floating_point() and ctx.needs_input_grad[2 + i]:
                    tensor = tensor.view_as(tensor) if create_graph else tensor.detach().requires_grad_()
                    wanted.append(i)
                args[i] = tensor
            results = op.reference_grad(*args[:-2])
            pairs = [
                (result, gg)
                for result, gg, need in zip(results, ggrads, ctx.needs, strict=True)
                if need and gg is not None and result is not None and result.requires_grad
            ]
            grads: list[Tensor | None] = [None] * (len(args) + 2)
            if pairs and wanted:
                outputs, weights = zip(*pairs, strict=True)
                inner = torch.autograd.grad(
                    outputs, [args[i] for i in wanted], weights, create_graph=create_graph, allow_unused=True
                )
                for i, grad in zip(wanted, inner, strict=True):
                    grads[2 + i] = grad
        return tuple(grads)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What each op is in plain ATen, for `ExportedProgram.run_decompositions` and ONNX: {library op: reference}.

    These have in memory what the ops avoid, such as attention weights, or all logits of a top k.
    """

    def without_backend(reference: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: reference(*args[:-1])

    references = {op.forward_op: op.reference for op in _all} | _others
    return {op: without_backend(reference) for op, reference in references.items()}
