"""Every op through torch's machinery: opcheck, compile, export, FakeTensor, autocast, torch.func, vmap."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from op_matrix import CASES, OpCase
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import mlhead
from mlhead import _backend
from mlhead.ops import _fused
from mlhead.testing import Sample

BACKENDS = ("reference", "cpp")
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def _require(case: OpCase, backend: str) -> None:
    if backend == "reference":
        return
    if backend not in _backend.implementations(case.name):
        pytest.skip(f"{case.name} has no {backend} backend")
    reason = _backend.unavailable(backend)
    if reason:
        pytest.skip(reason)


def _as_function(
    sample: Sample, backend: str | None = None, with_options: bool = False
) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A sample as a function of its tensors, if asked also of those among its options, and these tensors."""
    names = [name for name, t in sample.tensors.items() if t is not None]
    missing = {name: None for name, t in sample.tensors.items() if t is None}

    given = [name for name, value in sample.options.items() if with_options and isinstance(value, Tensor)]

    def function(*tensors: Tensor) -> Tensor:
        arguments = dict(zip([*names, *given], tensors, strict=True))
        return sample.function(**{**missing, **sample.options, **arguments}, backend=backend)

    inputs = [*(sample.tensors[name] for name in names), *(sample.options[name] for name in given)]
    return function, tuple(inputs)  # type: ignore[arg-type]


@each_case
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own reading
def test_opcheck(case: OpCase, backend: str) -> None:
    _require(case, backend)
    for dims in (case.shapes[4], case.shapes[-1]):
        sample = case.make(dims, torch.float32, "cpu", 0).leaves()
        calls = _recorded_calls(case, sample, backend)
        assert [op.name() for op, _ in calls] == [f"mlhead::{case.name}", f"mlhead::{case.name}_backward"]
        for op, arguments in calls:
            results = torch.library.opcheck(op, arguments)
            assert set(results.values()) == {"SUCCESS"}


def _recorded_calls(case: OpCase, sample: Sample, backend: str) -> list[tuple]:
    """The library ops, with their arguments, that a forward and a backward call."""
    from torch.utils._python_dispatch import TorchDispatchMode

    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if op.namespace == "mlhead":
                calls.append((op, args))
            return op(*args, **(kwargs or {}))

    with Record():
        # A loss makes its gradients in the forward; only those of gradients need the other op.
        sample.gradients(sample.call(backend), create_graph=case.name.endswith("_loss"))
    # The schema leaves requires_grad to the caller.
    return [
        (op, tuple(a.detach().requires_grad_(a.is_floating_point()) if isinstance(a, Tensor) else a for a in args))
        for op, args in calls
    ]


@each_case
@pytest.mark.parametrize("backend", BACKENDS)
def test_compile_is_one_graph_with_a_dynamic_batch(case: OpCase, backend: str) -> None:
    _require(case, backend)
    torch._dynamo.reset()
    dims = dict(case.shapes[{"group_fc": 5, "group_fc_loss": 4, "csra_loss": 4}.get(case.name, 3)])
    compiled = torch.compile(
        _as_function(case.make(dims, torch.float32, "cpu", 0), backend, True)[0], fullgraph=True, dynamic=True
    )
    for B in (3, 5, 8):
        sample = case.make({**dims, "B": B}, torch.float32, "cpu", B).leaves()
        out = compiled(*_as_function(sample, with_options=True)[1])
        expected = sample.run(backend)
        torch.testing.assert_close(out, expected["out"])
        for name, grad in sample.gradients(out).items():
            torch.testing.assert_close(grad, expected[name])


@each_case
def test_compile_guards_on_the_backend(case: OpCase) -> None:
    torch._dynamo.reset()
    sample = case.make(case.shapes[-1], torch.float32, "cpu", 0)
    function, tensors = _as_function(sample)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with mlhead.backend("reference"), mlhead.record_backends() as used:
        compiled(*tensors)
    assert used == {case.name: "reference"}
    expected = _backend.resolve(case.name, "auto", torch.device("cpu"), torch.float32)
    with mlhead.record_backends() as used:
        compiled(*tensors)
    assert used == {case.name: expected}


@each_case
def test_backend_inside_compiled_code(case: OpCase) -> None:
    torch._dynamo.reset()
    sample = case.make(case.shapes[-1], torch.float32, "cpu", 0)
    function, tensors = _as_function(sample)

    def inside(*tensors: Tensor) -> Tensor:
        with mlhead.backend("reference"):
            return function(*tensors)

    with mlhead.record_backends() as used:
        torch.compile(inside, fullgraph=True, backend="aot_eager")(*tensors)
    assert used == {case.name: "reference"}
    assert _backend.requested() == "auto"


@each_case
def test_export_and_decompose(case: OpCase) -> None:
    sample = case.make(case.shapes[-1], torch.float32, "cpu", 0)
    function, tensors = _as_function(sample)

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return function(*tensors)

    program = torch.export.export(Module(), tensors)
    torch.testing.assert_close(program.module()(*tensors), sample.call())
    assert any(node.target is getattr(torch.ops.mlhead, case.name).default for node in program.graph.nodes)
    plain = program.run_decompositions(mlhead.decompositions())
    assert not any("mlhead" in str(node.target) for node in plain.graph.nodes)
    torch.testing.assert_close(plain.module()(*tensors), sample.call("reference"))


@each_case
def test_fake_tensors_on_cuda(case: OpCase) -> None:
    """Shapes, strides, dtypes and devices are known without a GPU, forward and backward."""
    real = case.make(case.shapes[-1], torch.bfloat16, "cpu", 0)
    with FakeTensorMode() as mode:
        sample = real.map(lambda t: mode.from_tensor(t).to("cuda"))
        options = {k: mode.from_tensor(v).to("cuda") if isinstance(v, Tensor) else v for k, v in real.options.items()}
        sample = Sample(sample.function, sample.tensors, options, sample.dout).leaves()
        out = sample.call()
        grads = [t for t in sample.tensors.values() if t is not None]
        op = getattr(torch.ops.mlhead, f"{case.name}_backward").default
        calls = _recorded_calls_arguments(case, sample)
        results = op(sample.dout, *calls, [t is not None for t in sample.tensors.values()], "auto")
        results = (results,) if isinstance(results, Tensor) else results
    assert out.device.type == "cuda"
    assert (out.shape, out.dtype, out.is_contiguous()) == (sample.dout.shape, sample.dout.dtype, True)
    for result, tensor in zip([r for r in results if r.numel()], grads, strict=True):
        assert (result.shape, result.dtype, result.device) == (tensor.shape, tensor.dtype, tensor.device)


def _recorded_calls_arguments(case: OpCase, sample: Sample) -> list:
    """The inputs of the forward library op of a sample, without the backend, and what it returns for backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    found: list = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = op(*args, **(kwargs or {}))
            if op.namespace == "mlhead":
                registered = next(fused for fused in _fused._all if fused.forward_op == op)
                found.append([*args[:-1], *registered.extras(result)])
            return result

    with Record():
        sample.call()
    return list(found[0])


@each_case
def test_meta_tensors(case: OpCase) -> None:
    """On the meta device: shapes without data, forward and backward, also under another device's autocast."""
    sample = case.make(case.shapes[-1], torch.float32, "cpu", 0).map(lambda t: t.to("meta")).leaves()
    options = {name: v.to("meta") if isinstance(v, Tensor) else v for name, v in sample.options.items()}
    sample = Sample(sample.function, sample.tensors, options, sample.dout)
    with torch.autocast("cpu"):
        out = sample.call()
    assert (out.shape, out.device.type, out.dtype) == (sample.dout.shape, "meta", torch.float32)
    for name, grad in sample.gradients(out).items():
        assert grad.shape == sample.tensors[name].shape  # type: ignore[union-attr]


@each_case
@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_rule(case: OpCase, compiled: bool) -> None:
    """Inputs are cast to autocast's dtype, the output has it, gradients come in the dtype of the inputs."""
    torch._dynamo.reset()
    sample = case.make(case.shapes[-1], torch.float32, "cpu", 0).leaves()
    first, *others = sample.tensors
    tensors = {**sample.tensors, first: sample.tensors[first].detach().bfloat16().requires_grad_()}  # type: ignore[union-attr]
    is_loss = sample.dout.ndim == 0
    dout = sample.dout if is_loss else sample.dout.bfloat16()
    mixed = Sample(sample.function, tensors, sample.options, dout)
    function, inputs = _as_function(mixed)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = (torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function)(*inputs)
    assert out.dtype == dout.dtype
    grads = mixed.gradients(out)
    assert grads[first].dtype == torch.bfloat16
    assert all(grads[name].dtype == torch.float32 for name in others if name in grads)
    # The parameters of a norm keep their dtype.
    kept = {"weight", "bias"} if case.name == "dropout_add_layer_norm" else set()
    expected = sample.map(lambda t: t.detach().bfloat16())
    tensors = {n: sample.tensors[n].detach() if n in kept else t for n, t in expected.tensors.items()}  # type: ignore[union-attr]
    expected = dataclasses.replace(expected, tensors=tensors).run()
    torch.testing.assert_close(out, expected["out"])
    for name, grad in grads.items():
        torch.testing.assert_close(grad.to(expected[name].dtype), expected[name])


@each_case
def test_mixed_dtypes_without_autocast_are_an_error(case: OpCase) -> None:
    sample = case.make(case.shapes[-1], torch.float32, "cpu", 0)
    if len(sample.tensors) < 2:
        pytest.skip("takes one tensor")
    name = list(sample.tensors)[1]
    tensors = {**sample.tensors, name: sample.tensors[name].double()}  # type: ignore[union-attr]
    with pytest.raises(TypeError, match=rf"{case.name}: \w+ must be torch.float"):
        Sample(sample.function, tensors, sample.options, sample.dout).call()


@each_case
def test_torch_func_and_forward_mode(case: OpCase) -> None:
    """Transforms run the reference: grad, vmap and jvp agree with plain autograd."""
    sample = case.make(case.shapes[-1], torch.float64, "cpu", 0)
    function, tensors = _as_function(sample)
    grads = torch.func.grad(lambda *t: (function(*t) * sample.dout).sum(), argnums=tuple(range(len(tensors))))(*tensors)
    expected = sample.run("reference")
    for grad, (name, want) in zip(grads, list(expected.items())[1:], strict=True):
        torch.testing.assert_close(grad, want, msg=name)
    batched = torch.func.vmap(function)(*(t.expand(2, *t.shape) for t in tensors))
    torch.testing.assert_close(batched[1], expected["out"])
    tangents = tuple(torch.randn_like(t) for t in tensors)
    _, jvp = torch.func.jvp(function, tensors, tangents)
    step = 1e-6
    numeric = (
        function(*(t + step * d for t, d in zip(tensors, tangents, strict=True)))
        - function(*(t - step * d for t, d in zip(tensors, tangents, strict=True)))
    ) / (2 * step)
    torch.testing.assert_close(jvp, numeric, rtol=1e-5, atol=1e-7)
    with torch.autograd.forward_ad.dual_level():
        duals = [torch.autograd.forward_ad.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent, jvp)


@each_case
def test_higher_derivatives(case: OpCase) -> None:
    """A gradient penalty, through the gradient of the gradient, matches the reference's own autograd."""
    sample = case.make(case.shapes[-1], torch.float64, "cpu", 1).leaves()

    def penalty(backend: str | None) -> list[Tensor]:
        grads = sample.gradients(sample.call(backend), create_graph=True)
        loss = sum((g**2).sum() for g in grads.values())
        return list(torch.autograd.grad(loss, [t for t in sample.tensors.values() if t is not None], allow_unused=True))

    function, tensors = _as_function(sample)
    plain = torch.func.grad(
        lambda *t: sum((g**2).sum() for g in torch.func.vjp(function, *t)[1](sample.dout)), tuple(range(len(tensors)))
    )(*(t.detach() for t in tensors))
    for got, want in zip(penalty(None), plain, strict=True):
        torch.testing.assert_close(torch.zeros_like(want) if got is None else got, want)
