"""Conformance: every op on every backend, forward and backward, against the fp64 oracle."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from op_matrix import CASES, LAYOUTS, OpCase, every_combination
from torch import Tensor

from mlhead import _backend, group_fc, record_backends
from mlhead.testing import Sample, check, oracle, plain_torch


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN, so an element that nobody writes shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def run_and_check(case: OpCase, sample: Sample, backend: str) -> dict[str, Tensor]:
    """Runs a sample on a backend with poisoned memory and compares the output and every gradient."""
    exact, plain = oracle(sample), plain_torch(sample)
    # The extension's allocations are not poisoned by that switch: it gets memory that has just held NaN.
    dirty = [torch.full_like(t, float("nan")) for t in plain.values()]
    del dirty
    with poisoned_memory(), record_backends() as used:
        results = sample.run(backend)
    assert used == {case.name: backend}
    assert results.keys() == exact.keys()
    for name, result in results.items():
        check(name, result, exact[name], plain[name])
        # An op of tokens leaves the gradient of a map as a channels-last view: no copy.
        # A weight's gradient from a loss has the layout of the weight.
        given = sample.tensors.get(name) if case.name.endswith("_loss") and name == "weight" else None
        like = given is not None and result.stride() == torch.empty_like(given).stride()
        plain_strides = (
            like or result.is_contiguous() or (result.ndim == 4 and result.permute(0, 2, 3, 1).is_contiguous())
        )
        assert plain_strides, f"{name} has strides {result.stride()}, which the fake does not promise"
    return results


@every_combination()
def test_values_and_gradients(case: OpCase, backend: str, device: str, dtype: torch.dtype) -> None:
    for seed, dims in enumerate(case.shapes):
        try:
            run_and_check(case, case.make(dims, dtype, device, seed), backend)
        except AssertionError as error:
            raise AssertionError(f"{dict(dims)}: {error}") from error


@every_combination((torch.float32, torch.bfloat16))
def test_one_real_model(case: OpCase, backend: str, device: str, dtype: torch.dtype) -> None:
    if backend == "triton" and _backend.interpreting():
        pytest.skip("minutes in Triton's interpreter")
    run_and_check(case, case.make(case.model, dtype, device, 0), backend)


@every_combination((torch.float32, torch.float16))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(case: OpCase, backend: str, device: str, dtype: torch.dtype, layout: str) -> None:
    dims = case.shapes[-1]
    plain = case.make(dims, dtype, device, 3)
    for name in (*plain.tensors, "dout"):
        sample = plain.map(LAYOUTS[layout]) if name == "dout" else plain
        if name != "dout" and plain.tensors[name] is not None:
            tensors = {**plain.tensors, name: LAYOUTS[layout](plain.tensors[name])}
            sample = Sample(plain.function, tensors, plain.options, plain.dout)
        results = run_and_check(case, sample, backend)
        assert results["out"].is_contiguous()


@every_combination((torch.float32,))
def test_constant_upstream_gradient(case: OpCase, backend: str, device: str, dtype: torch.dtype) -> None:
    """out.sum().backward() gives a gradient with stride 0."""
    sample = case.make(case.shapes[-1], dtype, device, 4)
    sample = Sample(
        sample.function, sample.tensors, sample.options, torch.ones((), device=device).expand(sample.dout.shape)
    )
    run_and_check(case, sample, backend)


@every_combination((torch.float32, torch.float16))
def test_inputs_are_never_written(case: OpCase, backend: str, device: str, dtype: torch.dtype) -> None:
    sample = case.make(case.shapes[-1], dtype, device, 5)
    copies = sample.map(torch.clone)
    versions = {name: t._version for name, t in sample.tensors.items() if t is not None}
    sample.run(backend)
    for name, tensor in sample.tensors.items():
        if tensor is not None:
            assert torch.equal(tensor, copies.tensors[name]), name
            assert tensor._version == versions[name], name
    assert torch.equal(sample.dout, copies.dout)


@every_combination((torch.float32, torch.float16))
@pytest.mark.parametrize("deterministic", [False, True])
def test_bitwise_repeat(case: OpCase, backend: str, device: str, dtype: torch.dtype, deterministic: bool) -> None:
    interpreted = backend == "triton" and _backend.interpreting()  # where the larger one takes a minute
    sample = case.make(case.shapes[-1 if interpreted else -2], dtype, device, 6)
    torch.use_deterministic_algorithms(deterministic)
    try:
        first, second = sample.run(backend), sample.run(backend)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in first:
        assert torch.equal(first[name], second[name]), name


@every_combination((torch.float32,))
def test_each_gradient_alone(case: OpCase, backend: str, device: str, dtype: torch.dtype) -> None:
    """A gradient does not depend on which others are asked for."""
    sample = case.make(case.shapes[-1], dtype, device, 7)
    everything = sample.run(backend)
    for name, tensor in sample.tensors.items():
        if tensor is None:
            continue
        tensors = {
            n: t.detach().requires_grad_(n == name) if t is not None else None for n, t in sample.tensors.items()
        }
        alone = Sample(sample.function, tensors, sample.options, sample.dout)
        torch.testing.assert_close(alone.gradients(alone.call(backend))[name], everything[name])


@every_combination((torch.float32,))
def test_second_backward_and_no_grad(case: OpCase, backend: str, device: str, dtype: torch.dtype) -> None:
    sample = case.make(case.shapes[-1], dtype, device, 8).leaves()
    out = sample.call(backend)
    first = sample.gradients(out, retain_graph=True)
    second = sample.gradients(out)
    assert all(torch.equal(first[name], second[name]) for name in first)
    with torch.no_grad():
        assert not sample.call(backend).requires_grad
    with torch.inference_mode():
        assert torch.equal(sample.call(backend), out)


@every_combination((torch.float32,))
def test_negative_views(case: OpCase, backend: str, device: str, dtype: torch.dtype) -> None:
    """The imaginary part of a conjugate is a view whose sign is only a bit of its tensor."""
    plain = case.make(case.shapes[-1], dtype, device, 11)

    def negative(tensor: Tensor) -> Tensor:
        view = torch.complex(torch.zeros_like(tensor), -tensor).conj().imag
        assert view.is_neg()
        return view

    results, expected = plain.map(negative).run(backend), plain.run(backend)
    for name, want in expected.items():
        torch.testing.assert_close(results[name], want)


@every_combination((torch.float64,))
def test_gradcheck_and_gradgradcheck(case: OpCase, backend: str, device: str, dtype: torch.dtype) -> None:
    for dims in case.shapes:
        if any(dims.get(letter, 1) == 0 or dims.get(letter, 1) > 20 for letter in "BCDEGL"):
            continue
        if dims.get("loss") == "asl" and dims.get("options", {}).get("detach_focal", True):
            continue  # its gradient is not the derivative, by definition
        sample = case.make(dims, dtype, device, 9).leaves()
        names = [name for name, t in sample.tensors.items() if t is not None]

        def function(*tensors: Tensor, names: list[str] = names, sample: Sample = sample) -> Tensor:
            given = {**sample.tensors, **dict(zip(names, tensors, strict=True))}
            return Sample(sample.function, given, sample.options, sample.dout).call(backend)

        inputs = tuple(sample.tensors[name] for name in names)
        assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def _far_apart(tensor: Tensor) -> Tensor:
    """The tensor with its last row more than 2^31 elements away, in memory of which only the touched pages exist."""
    rows = tensor.shape[0]
    stride = 2**31 // max(rows - 1, 1) + 64
    buffer = torch.empty(stride * (rows - 1) + tensor[0].numel(), dtype=tensor.dtype, device=tensor.device)
    return buffer.as_strided(tensor.shape, (stride, *tensor[0].contiguous().stride())).copy_(tensor)


@every_combination((torch.float16,))
def test_offsets_past_2_to_the_31(case: OpCase, backend: str, device: str, dtype: torch.dtype) -> None:
    near = case.make(case.shapes[-1], dtype, device, 10)
    expected = near.run(backend)
    for name in (*near.tensors, *(["dout"] if near.dout.ndim else [])):
        tensors = dict(near.tensors)
        if name != "dout":
            if tensors[name] is None or tensors[name].shape[0] < 2:
                continue
            tensors[name] = _far_apart(tensors[name])
        dout = _far_apart(near.dout) if name == "dout" else near.dout
        results = Sample(near.function, tensors, near.options, dout).run(backend)
        for key in expected:  # other strides may take another product, which rounds elsewhere: by a bit or two of fp16
            torch.testing.assert_close(
                results[key], expected[key], rtol=2e-3, atol=2e-3, msg=lambda m, at=(name, key): f"{at}: {m}"
            )


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_nan_spreads_alike(case: OpCase) -> None:
    """A NaN in the first input reaches the same results on every backend that runs here."""
    sample = case.make(case.shapes[-1], torch.float32, "cpu", 12)
    first = next(iter(sample.tensors))
    tensors = {**sample.tensors, first: sample.tensors[first].clone()}  # type: ignore[union-attr]
    tensors[first].view(-1)[0] = float("nan")  # type: ignore[union-attr]
    broken = Sample(sample.function, tensors, sample.options, sample.dout)
    expected = broken.run("reference")
    for backend in _backend.BACKENDS:
        if _backend._refusal(case.name, _backend.implementations(case.name), backend, "cpu", torch.float32) is None:
            results = broken.run(backend)
            for name in expected:
                assert torch.equal(results[name].isnan(), expected[name].isnan()), (backend, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("G", [8931, 9605])
def test_shared_weight_over_many_rows(G: int, dtype: torch.dtype) -> None:
    """Full decoding of many classes: thousands of rows, the last block of them short."""
    h, weight = torch.randn(1, G, 40).to(dtype), torch.randn(40, 1).to(dtype)
    dout = torch.randn(1, G).to(dtype)
    for backend in ("reference", "cpp"):
        if _backend.unavailable(backend):
            continue
        leaves = h.clone().requires_grad_(), weight.clone().requires_grad_()
        out = group_fc(*leaves, backend=backend)
        grads = torch.autograd.grad(out, leaves, dout)
        tolerance = {"rtol": 0.02, "atol": 0.02} if dtype != torch.float32 else {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(out, (h.double() @ weight.double()).squeeze(-1).to(dtype), **tolerance)
        torch.testing.assert_close(grads[0], (dout.double()[..., None] * weight.double().T).to(dtype), **tolerance)
        exact = (h.double() * dout.double()[..., None]).sum((0, 1))[:, None]
        torch.testing.assert_close(grads[1].double(), exact, rtol=0.02, atol=0.3)
