"""The losses in the head: against losses of logits, their autograd, their targets, their memory."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peak import printed_by
from torch import Tensor

from mlhead import SparseTargets, _backend, csra_loss, csra_pool, group_fc, group_fc_loss, linear_loss, losses
from mlhead.ops import _csra_plan, _loss_chunks
from mlhead.ops._loss_kernels import ExtensionKernels, PlainKernels

BACKENDS = [name for name in ("reference", "cpp") if not _backend.unavailable(name)]
each_backend = pytest.mark.parametrize("backend", BACKENDS)
B, G, E, C = 5, 3, 7, 29
TEMPERATURES = {"temperatures": (1.0, math.inf), "lam": 0.3}


def _head(dtype: torch.dtype = torch.float64, seed: int = 0) -> list[Tensor]:
    torch.manual_seed(seed)
    shapes = ((B, G, E), (G, E, -(-C // G)), (C,))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


def _labels(seed: int = 1) -> Tensor:
    torch.manual_seed(seed)
    return torch.rand(B, C) < 0.2


def _loss_arguments(features: Tensor, targets: Tensor, options: dict[str, Any]) -> Any:
    from mlhead.ops._loss_options import loss_arguments

    return loss_arguments(
        "test",
        features,
        targets,
        targets.num_classes if isinstance(targets, SparseTargets) else targets.shape[1],
        options,
        [True] * 3,
    )


LOSSES: dict[str, Callable[..., Tensor]] = {
    "bce": losses.binary_cross_entropy,
    "asl": losses.asymmetric_loss,
    "softmax": losses.softmax_cross_entropy,
}


@each_backend
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sparse", [False, True])
def test_equals_the_loss_of_the_logits(backend: str, loss: str, reduction: str, sparse: bool) -> None:
    h, weight, bias = leaves = _head()
    y = _labels()
    weights = {"weight": torch.rand(B).double()}
    extra: dict[str, Any] = {"detach_focal": False, "gamma_pos": 1.0} if loss == "asl" else {"label_smoothing": 0.1}
    if loss == "bce":
        extra["pos_weight"] = torch.rand(C).double()
    dense = y.double() if loss == "softmax" else y
    want = LOSSES[loss](group_fc(h, weight, bias, C), dense, reduction=reduction, **weights, **extra)
    targets = SparseTargets.from_dense(y) if sparse else dense
    got = group_fc_loss(
        h, weight, bias, targets, C, loss=loss, reduction=reduction, sample_weight=weights["weight"], backend=backend,
        **extra,
    )  # fmt: skip
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)


@each_backend
@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("eps", [0.3, 0.9])
def test_asl_clamps_both_logarithms_for_any_eps(backend: str, eps: float, detach: bool) -> None:
    """An eps so large that the clamp acts on the negatives that are no error, too."""
    leaves, y = _head(), _labels()
    extra: dict[str, Any] = {"eps": eps, "gamma_neg": 1.0, "detach_focal": detach}
    want = losses.asymmetric_loss(group_fc(*leaves, C), y, **extra)
    got = group_fc_loss(*leaves, y, C, loss="asl", backend=backend, **extra)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)


@each_backend
@pytest.mark.parametrize("loss", LOSSES)
def test_csra_equals_the_loss_of_the_logits(backend: str, loss: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(B, 6, 4, 3, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(2, C, 6, dtype=torch.float64, requires_grad=True)
    y = _labels()
    want = LOSSES[loss](csra_pool(x, weight, **TEMPERATURES), y.double())
    got = csra_loss(x, weight, None, SparseTargets.from_dense(y), loss=loss, backend=backend, **TEMPERATURES)
    torch.testing.assert_close(got, want)
    pairs = zip(torch.autograd.grad(got, (x, weight)), torch.autograd.grad(want, (x, weight)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("sizes", [(1, 1), (100, 50), (400, 300), (4000, 10_000)])
def test_blocks_of_any_size_give_the_same(loss: str, sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine that Triton and CUDA use, with the kernels that run here."""
    leaves = _head()
    y = _labels()
    targets = SparseTargets.from_dense(y)
    want = group_fc_loss(*leaves, targets, C, loss=loss, backend="reference")
    grads = torch.autograd.grad(want, leaves)
    monkeypatch.setitem(_loss_chunks.SIZES, "cpu", _loss_chunks.Sizes(*sizes))
    a = _loss_arguments(leaves[0], targets, {"loss": loss})
    for kernels in (PlainKernels(), *([ExtensionKernels()] if "cpp" in BACKENDS else [])):
        launcher = _loss_chunks.Chunked(kernels)
        detached = [t.detach() for t in leaves]
        results = launcher.group_fc_loss(*detached, *a)
        for got, expected in zip(results, (want, *grads), strict=True):
            torch.testing.assert_close(got, expected)
        torch.testing.assert_close(launcher.group_fc_loss(*detached, *a._replace(make=[False] * 3))[0], want)
        dout = torch.tensor(2.5, dtype=torch.float64)
        for got, expected in zip(launcher.group_fc_loss_backward(dout, *detached, *a, [True] * 3), grads, strict=True):
            torch.testing.assert_close(got, 2.5 * expected)


def test_blocks_cover_every_class_once() -> None:
    for G_, E_, C_ in ((1, 8, 1000), (100, 4, 9605), (7, 3, 20), (2000, 2, 2001), (3, 5, 3), (4, 0, 9), (2, 4, 0)):
        J = -(-C_ // G_)
        for most_logits, most_weights in ((1, 1), (64, 200), (10**9, 10**9), (3, 10**9)):
            seen = []
            for block in _loss_chunks.plan_blocks(G_, E_, J, C_, most_logits, most_weights):
                for i, g in enumerate(range(block.groups.start, block.groups.stop)):
                    classes = [g * J + j for j in range(block.columns.start, block.columns.stop)]
                    assert classes[0] == block.first + i * J
                    seen += classes
            assert seen == list(range(C_)), (G_, E_, C_, most_logits, most_weights)


@pytest.mark.parametrize("scratch", [200, 3000, 8 << 20])
@pytest.mark.parametrize("loss", LOSSES)
def test_csra_chunks_of_any_size_give_the_same(scratch: int, loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "cpp" not in BACKENDS:
        pytest.skip(str(_backend.unavailable("cpp")))
    torch.manual_seed(0)
    x = torch.randn(B, 9, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, C, 6, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, C, dtype=torch.float64, requires_grad=True)
    machine = dataclasses.replace(_csra_plan.MACHINES["cpu"], scratch_bytes=scratch)
    monkeypatch.setitem(_csra_plan.MACHINES, "cpu", machine)
    results = []
    y, leaves = _labels().double(), (x, weight, bias)
    for backend in ("reference", "cpp"):
        value = csra_loss(*leaves, y, loss=loss, normalize=True, backend=backend, **TEMPERATURES)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@each_backend
def test_linear_is_one_group(backend: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(B, E), torch.randn(C, E), torch.randn(C)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = _labels()
    got = linear_loss(*leaves, y, backend=backend)
    want = group_fc_loss(x.unsqueeze(1), weight.t().unsqueeze(0), bias, y, backend=backend)
    assert torch.equal(got, want)
    grads = torch.autograd.grad(got, leaves)
    for a, b in zip(grads, torch.autograd.grad(want, leaves), strict=True):
        assert torch.equal(a, b)
    assert all(g.is_contiguous() for g in grads)


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_backward_as_often_as_one_likes(backend: str, dtype: torch.dtype) -> None:
    leaves = _head(dtype)
    loss = group_fc_loss(*leaves, _labels(), C, loss="asl", backend=backend)
    first = torch.autograd.grad(3.7 * loss, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(3.7 * loss, leaves, retain_graph=True)
    third = torch.autograd.grad(loss, leaves)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, 3.7 * c, rtol=1e-2, atol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, leaves)


@each_backend
def test_accumulation_takes_the_gradient_over_without_a_copy(backend: str) -> None:
    leaves = _head(torch.float32)
    group_fc_loss(*leaves, _labels(), C, backend=backend).backward()
    once = [t.grad.clone() for t in leaves]  # type: ignore[union-attr]
    for _ in range(2):
        (0.5 * group_fc_loss(*leaves, _labels(), C, backend=backend)).backward()
    for tensor, grad in zip(leaves, once, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * grad)
    x, weight = torch.randn(B, E), torch.randn(C, E).requires_grad_()
    pointers = []
    loss = linear_loss(x, weight, None, _labels(), backend=backend)
    loss.grad_fn.register_hook(lambda grads, _: pointers.extend(g.data_ptr() for g in grads if g is not None))  # type: ignore[union-attr]
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() in pointers


@each_backend
def test_inputs_changed_before_backward(backend: str) -> None:
    """The gradients are those of the forward; where they have to be made again, a changed weight is an error."""
    h, weight, bias = _head(torch.float32)
    loss = group_fc_loss(h, weight, bias, _labels(), C, backend=backend)
    (want,) = torch.autograd.grad(loss, h, retain_graph=True)
    loss = group_fc_loss(h, weight, bias, _labels(), C, backend=backend)
    with torch.no_grad():
        weight.mul_(2)
    (got,) = torch.autograd.grad(loss, h, retain_graph=True)
    assert torch.equal(got, want)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, h)


@each_backend
def test_fp16_keeps_small_gradients_under_a_scaler(backend: str) -> None:
    """1 / (B C) times a small derivative is 0 in fp16; the scaler's factor comes before the rounding."""
    torch.manual_seed(0)
    classes = 20_000
    x, weight = torch.randn(2, 8).half(), (0.1 * torch.randn(classes, 8)).half()
    targets = SparseTargets.from_lists([[3], [5]], classes)
    exact = weight.double().requires_grad_()
    losses.binary_cross_entropy(x.double() @ exact.t(), targets.to_dense().double()).backward()
    weight.requires_grad_()
    (65536.0 * linear_loss(x, weight, None, targets, backend=backend)).backward()
    assert (weight.grad == 0).double().mean() < 0.001  # type: ignore[union-attr]
    torch.testing.assert_close(weight.grad.double() / 65536, exact.grad, rtol=0.01, atol=1e-8)  # type: ignore[union-attr]


@each_backend
def test_grad_scaler_and_autocast(backend: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(B, E)
    results = []
    for fused in (False, True):
        torch.manual_seed(1)
        linear = torch.nn.Linear(E, C)
        optimizer = torch.optim.SGD(linear.parameters(), lr=0.5)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(3):
            with torch.autocast("cpu", dtype=torch.float16):
                if fused:
                    loss = linear_loss(x, linear.weight, linear.bias, _labels(), backend=backend)
                else:
                    loss = losses.binary_cross_entropy(linear(x), _labels())
            assert loss.dtype == torch.float32
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(linear.weight.detach())
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-4)


@each_backend
def test_evaluation_needs_no_graph(backend: str) -> None:
    leaves = _head(torch.float32)
    want = group_fc_loss(*leaves, _labels(), C, backend=backend)
    with torch.no_grad():
        loss = group_fc_loss(*leaves, _labels(), C, backend=backend)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, want)
    with torch.inference_mode():
        torch.testing.assert_close(group_fc_loss(*leaves, _labels(), C, backend=backend), want)


@each_backend
def test_ignored_elements_count_for_nothing(backend: str) -> None:
    leaves = _head(torch.float32)
    y, unknown = _labels(), _labels(2)
    kept = group_fc_loss(*leaves, y, C, ignore=unknown, reduction="sum", loss="asl", backend=backend)
    flipped = group_fc_loss(*leaves, y ^ unknown, C, ignore=unknown, reduction="sum", loss="asl", backend=backend)
    assert torch.equal(kept, flipped)
    listed = group_fc_loss(
        *leaves, SparseTargets.from_dense(y & ~unknown), C, ignore=SparseTargets.from_dense(unknown), reduction="sum",
        loss="asl", backend=backend,
    )  # fmt: skip
    torch.testing.assert_close(listed, kept)
    elements = losses.asymmetric_loss(group_fc(*leaves, C), y, reduction="none")
    torch.testing.assert_close(kept, elements[~unknown].sum())


@each_backend
@pytest.mark.parametrize("loss", ["bce", "asl"])
def test_class_and_sample_weights(backend: str, loss: str) -> None:
    leaves = _head(torch.float32)
    y, per_class, per_sample = _labels(), torch.rand(C), torch.rand(B)
    got = group_fc_loss(
        *leaves, y, C, loss=loss, class_weight=per_class, sample_weight=per_sample, reduction="sum", backend=backend
    )
    elements = LOSSES[loss](group_fc(*leaves, C), y, reduction="none")
    torch.testing.assert_close(got, (elements * per_class * per_sample[:, None]).sum())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
@each_backend
def test_targets_of_any_dtype(backend: str, dtype: torch.dtype) -> None:
    leaves = _head(torch.float32)
    y = _labels()
    want = group_fc_loss(*leaves, y.float(), C, backend=backend)
    assert torch.equal(group_fc_loss(*leaves, y.to(dtype), C, backend=backend), want)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_every_form_of_sparse_targets() -> None:
    y = _labels()
    rows, columns = y.nonzero(as_tuple=True)
    lists = [row.nonzero().flatten().tolist() for row in y]
    sparse = SparseTargets.from_lists([row[::-1] for row in lists], C)
    assert torch.equal(sparse.to_dense().bool(), y)
    assert torch.equal(SparseTargets.from_dense(y).indices, sparse.indices)
    csr = SparseTargets.from_csr(y.float().to_sparse_csr())
    assert torch.equal(csr.to_dense().bool(), y)
    assert torch.equal(sparse.rows(), rows)
    leaves = _head()
    want = group_fc_loss(*leaves, sparse, C)
    shuffled = torch.cat([columns[rows == b].flip(0) for b in range(B)])
    for form in ((shuffled, sparse.offsets), y.double().to_sparse_csr(), csr):
        torch.testing.assert_close(group_fc_loss(*leaves, form, C), want)
    soft = torch.rand(B, C) * _labels()
    torch.testing.assert_close(
        group_fc_loss(*leaves, SparseTargets.from_dense(soft), C), group_fc_loss(*leaves, soft, C)
    )
    classes = torch.randint(C, (B,))
    want = losses.softmax_cross_entropy(group_fc(*leaves, C), classes)
    torch.testing.assert_close(group_fc_loss(*leaves, classes, C, loss="softmax"), want)


def _targets(rows: list[list[int]], **keywords: Any) -> SparseTargets:
    return SparseTargets.from_lists(rows, C, **keywords)


def _dense(y: list[Any], **keywords: Any) -> SparseTargets:
    return SparseTargets.from_dense(torch.tensor(y), **keywords)


def _csr(y: Tensor) -> SparseTargets:
    return SparseTargets.from_csr(y.to_sparse_csr())


ROWS = [[1], [2], [], [4], [5]]
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: _targets([[1], [2, C]]), ValueError, rf"classes in \[0, {C}\), got {C} in row 1"),
    (lambda: _targets([[1], [2], [-1]]), ValueError, r"got -1 in row 2"),
    (lambda: _targets([[1], [2], [7, 3, 7]]), ValueError, "at most once in a row, got class 7 twice in row 2"),
    (lambda: _targets([[1], [3]], ignore=[[], [3]]), ValueError, "class 3 twice in row 1"),
    (lambda: _targets([[1]], ignore=[[], []]), ValueError, "ignore must be 1 lists like positives, got 2"),
    (
        lambda: _dense([[2.0]]),
        ValueError,
        r"SparseTargets: targets.values must be in \[0, 1\], or -1, got 2.0 in row 0",
    ),
    (lambda: _dense([[0.0], [-0.5]]), ValueError, "got -0.5 in row 1"),
    (lambda: _dense([[math.nan]]), ValueError, "got nan in row 0"),
    (lambda: _dense([1.0]), ValueError, r"targets must be \(B, C\), got \(1,\)"),
    (lambda: _dense([[1j]]), TypeError, "targets must be real, got torch.complex64"),
    (lambda: SparseTargets.from_dense([[1]]), TypeError, "targets must be a torch.Tensor, got list"),
    (lambda: SparseTargets.from_dense(torch.eye(2).to_sparse()), TypeError, "must be dense, got torch.sparse_coo"),
    (lambda: _dense([[1.0]], ignore=torch.ones(1, 1)), TypeError, "ignore must be a bool tensor .*got torch.float32"),
    (lambda: _dense([[1.0]], ignore=[[True]]), TypeError, "ignore must be a bool tensor .*got list"),
    (lambda: _dense([[1.0]], ignore=torch.ones(1, 2) > 0), ValueError, r"ignore must be .* = \(1, 1\), got \(1, 2\)"),
    (lambda: _csr(torch.tensor([[2.0]])), ValueError, "SparseTargets: targets.values must be .*got 2.0 in row 0"),
    (lambda: _csr(torch.ones(2, 1, 1)), ValueError, r"targets must be \(B, C\), got \(2, 1, 1\)"),
    (lambda: _csr(torch.ones(1, 1).long()), TypeError, "targets.values must be of a floating dtype, got torch.int64"),
    (lambda: SparseTargets.from_csr(torch.eye(2)), TypeError, "a torch.sparse_csr tensor .*, got torch.strided"),
    (lambda: SparseTargets.from_csr([[1]]), TypeError, "a torch.sparse_csr tensor .*, got list"),
]
PAIR = torch.tensor([1, 2, 2]), torch.tensor([0, 1, 3, 3, 3, 3])
CALLS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (
        PAIR,
        {},
        ValueError,
        "group_fc_loss: targets must be each class at most once in a row, got class 2 twice in row 1",
    ),
    ((torch.tensor([C]), torch.tensor([0, 0, 0, 0, 0, 1])), {}, ValueError, f"got {C} in row 4"),
    ((torch.tensor([1]), torch.tensor([0, 1, 1])), {}, ValueError, "targets must be of B = 5 rows, got 2"),
    ((torch.tensor([1.0]), torch.tensor([0, 1])), {}, TypeError, "targets.indices must be int64"),
    (_targets(ROWS)._replace(num_classes=7), {}, ValueError, f"targets must be of C = {C} classes, got 7"),
    (_targets(ROWS)._replace(offsets=torch.tensor([0, 1, 1, 1, 1, 9])), {}, ValueError, "rising from 0 to N = 4"),
    (
        _targets(ROWS)._replace(values=torch.tensor([1.0, 1.0, math.nan, 1.0])),
        {},
        ValueError,
        r"targets.values must be in \[0, 1\], or -1, got nan in row 3",
    ),
    (
        _targets(ROWS)._replace(values=torch.ones(4).long()),
        {},
        TypeError,
        "targets.values must be of a floating dtype, got torch.int64",
    ),
    (_targets(ROWS)._replace(values=[1.0] * 4), {}, TypeError, "targets.values must be a torch.Tensor, got list"),
    (_targets(ROWS)._replace(values=torch.ones(3)), {}, ValueError, r"values must be \(N,\) = \(4,\), got \(3,\)"),
    (
        _targets(ROWS)._replace(values=[1.0] * 4),
        {"ignore": _targets([[]] * B)},
        TypeError,
        "targets.values must be a torch.Tensor, got list",
    ),
    (
        _targets(ROWS),
        {"ignore": _targets([[]] * B)._replace(indices=[])},
        TypeError,
        "ignore.indices must be int64 of one axis, got list",
    ),
    (_targets(ROWS), {"ignore": _targets([[], [2], [], [], []])}, ValueError, "got class 2 twice in row 1"),
    (_labels().float().to_sparse(), {}, TypeError, "targets must be a tensor .*, got torch.sparse_coo"),
    (torch.zeros(B, C + 1), {}, ValueError, r"targets must be \(B, C\) = \(5, 29\), got \(5, 30\)"),
    (torch.full((B, C), 2.0), {}, ValueError, r"targets must be in \[0, 1\] and not NaN, got values from 2 to 2"),
    (torch.full((B, C), math.nan), {}, ValueError, "got NaN"),
    ([1], {}, TypeError, "targets must be a tensor"),
    (_labels(), {"loss": "hinge"}, ValueError, "loss must be one of 'bce', 'asl', 'softmax', got 'hinge'"),
    (_labels(), {"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum'"),
    (_labels(), {"gamma_neg": 3}, ValueError, "gamma_neg must be left out but for loss='asl'"),
    (_labels(), {"loss": "asl", "gamma_neg": -1}, ValueError, "gamma_neg must be finite and at least 0, got -1"),
    (_labels(), {"loss": "asl", "label_smoothing": 0.1}, ValueError, "label_smoothing must be 0 for loss='asl'"),
    (_labels(), {"loss": "asl", "pos_weight": torch.ones(C)}, ValueError, "pos_weight must be None for loss='asl'"),
    (_labels(), {"class_weight": torch.ones(C - 1)}, ValueError, r"class_weight must be \(C,\) = \(29,\), got \(28,\)"),
    (_labels(), {"sample_weight": torch.ones(B).requires_grad_()}, ValueError, "requires no gradient"),
    (_labels(), {"ignore": torch.zeros(B, C)}, TypeError, "ignore must be a bool tensor"),
    (_labels(), {"gama": 1}, TypeError, "options must be among loss, .*, got gama"),
    (torch.zeros(B).long(), {"loss": "softmax", "ignore": _labels()}, ValueError, "ignore must be None for loss='soft"),
    (torch.zeros(B + 1).long(), {"loss": "softmax"}, ValueError, r"class indices \(B,\)"),
    (torch.full((B,), C), {"loss": "softmax"}, ValueError, f"got {C} in row 0"),
]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize(("make", "error", "message"), WRONG)
def test_wrong_lists(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(("targets", "options", "error", "message"), CALLS)
def test_wrong_arguments(targets: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        group_fc_loss(*_head(torch.float32), targets, C, **options)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("wrong", [0, 1, 2], ids=["features", "weight", "bias"])
def test_arguments_that_are_no_tensors(wrong: int, autocast: bool) -> None:
    temperatures = partial(csra_loss, **TEMPERATURES)
    x, weight = torch.zeros(B, E), torch.zeros(2, C, E)
    for op, inputs, names in (
        (group_fc_loss, _head(torch.float32), "h weight bias"),
        (linear_loss, [x, weight[0], torch.zeros(C)], "x weight bias"),
        (temperatures, [x.unsqueeze(1), weight, torch.zeros(2, C)], "x weight bias"),
    ):
        given: list[Any] = list(inputs)
        given[wrong] = given[wrong].tolist()
        message = f"_loss: {names.split()[wrong]} must be a torch.Tensor, got list"
        with torch.autocast("cpu", enabled=autocast), pytest.raises(TypeError, match=message):
            op(*given, _labels())  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_unknown_labels_need_a_dtype_that_holds_them(dtype: torch.dtype) -> None:
    targets = _targets([[1], [3]], ignore=[[2], []])
    with pytest.raises(ValueError, match=f"dtype must be one that holds the -1 of an unknown label, got {dtype}"):
        targets.to_dense(dtype)
    known = _targets([[1], [3]])
    for sparse in (known, known._replace(values=torch.ones(2))):
        assert torch.equal(sparse.to_dense(dtype), known.to_dense().to(dtype))
    assert targets.to_dense(torch.int8).sum() == 1


def test_shared_weight() -> None:
    torch.manual_seed(0)
    h, weight, bias = torch.randn(B, G, E), torch.randn(E, 1), torch.randn(1)
    leaves = [t.requires_grad_() for t in (h, weight, bias)]
    y = torch.rand(B, G) < 0.5
    got = group_fc_loss(*leaves, y, loss="asl")
    want = losses.asymmetric_loss(group_fc(*leaves), y)
    torch.testing.assert_close(got, want)
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="needs the C++ backend")
def test_threads_do_not_change_a_bit() -> None:
    torch.manual_seed(0)
    h, weight, bias = torch.randn(9, 3, 40), torch.randn(3, 40, 4001), torch.randn(12_001)
    leaves = [t.requires_grad_() for t in (h, weight, bias)]
    targets = SparseTargets.from_lists([[b, 100 * b, 11_000 + b] if b else [0] for b in range(9)], 12_001)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss = group_fc_loss(*leaves, targets, 12_001, loss="asl", backend="cpp")
            results.append((loss, *torch.autograd.grad(loss, leaves)))
    finally:
        torch.set_num_threads(before)
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], others, strict=True))


PEAK = """
import sys, torch
from mlhead._resident import peak
from mlhead import SparseTargets, csra_loss, group_fc_loss, linear_loss
C, backend, op, B, E = int(sys.argv[1]), sys.argv[2], sys.argv[3], 32, 8
def step(C):
    targets = SparseTargets.from_lists([[b, b + 40] for b in range(B)], C)
    if op == "linear":
        x, weight = torch.randn(B, E), torch.randn(C, E).requires_grad_()
        run = lambda: linear_loss(x, weight, None, targets, loss="asl", backend=backend)
    elif op == "group":
        x, weight = torch.randn(B, 10, E), torch.randn(10, E, C // 10).requires_grad_()
        run = lambda: group_fc_loss(x, weight, None, targets, C, loss="asl", backend=backend)
    else:
        x, weight = torch.randn(B, 16, E), torch.randn(1, C, E).requires_grad_()
        run = lambda: csra_loss(x, weight, None, targets, temperatures=(1.0,), lam=0.1, backend=backend)
    x.requires_grad_()
    before = peak()
    run().backward()
    assert weight.grad.abs().sum() > 0
    return peak() - before
step(2000)
print(step(C))
"""


@each_backend
@pytest.mark.parametrize("op", ["linear", "group", "csra"])
def test_memory_does_not_grow_with_the_logits(op: str, backend: str) -> None:
    """Peak resident memory of a step while C grows 8-fold; of 200,000 classes 26 MB of logits, 410 of scores."""
    few, many = (printed_by(PEAK, C, backend, op) for C in (25_000, 200_000))
    allowed = 175_000 * 8 * 4  # the weight's gradient
    assert 0.8 * allowed < many - few < allowed + 10_000_000, (few, many, allowed)


@pytest.mark.skipif("cpp" not in BACKENDS, reason="needs the C++ backend")
@pytest.mark.parametrize(
    "options", [{"loss": "bce"}, {"loss": "asl"}, {"loss": "asl", "margin": 0.0, "gamma_neg": 0.0}]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_elements_are_exact_for_every_logit(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Each element on its own, small losses too: the sum over a million classes is made of them."""
    from mlhead.ops._loss_kernels import Place
    from mlhead.reference import class_loss

    grid = torch.cat([torch.linspace(-80, 80, 3201), torch.linspace(-3.2, -2.7, 501)]).to(dtype)
    for label in (0.0, 1.0, 0.25):
        z = grid.clone().view(1, -1, 1)
        y = torch.full((len(grid), 1), label, dtype=dtype)
        a = _loss_arguments(z[0], y, options)
        rows = torch.zeros(len(grid), dtype=dtype)
        ExtensionKernels().gradient(z, None, Place(0, 1, 1), a, 1.0, None, rows, None, True)
        exact = grid.double()[:, None]
        a64 = a._replace(targets=y.double())
        loss = class_loss.element_loss(exact, slice(0, 1), a64).flatten()
        dz = class_loss.element_gradient(exact, slice(0, 1), a64).flatten()
        eps = torch.finfo(dtype).eps
        # (p - m)^4 and log(1 - (p - m)) have the error of p - m, which cancels near p = m.
        near = options["loss"] == "asl" and options.get("margin", 0.05) > 0
        floor = 1e-5 if near else 0.0 if label in (0.0, 1.0) else 0.01  # the two terms of a soft label cancel somewhere
        for got, want in ((rows, loss), (z.flatten(), dz)):
            error = (got.double() - want).abs() / (want.abs() + floor + torch.finfo(dtype).tiny)
            assert error.max() < 64 * eps, (label, grid[error.argmax()], got[error.argmax()], want[error.argmax()])


@each_backend
@pytest.mark.parametrize("loss", LOSSES)
def test_infinite_logits_and_nan(backend: str, loss: str) -> None:
    for value in (math.inf, -math.inf, math.nan, 1e30, -1e30):
        x, weight = torch.ones(1, 1), torch.tensor([[value], [0.5], [-0.5]])
        y = torch.tensor([[0.0, 1.0, 0.0]])
        want = LOSSES[loss](x.double() @ weight.double().t(), y.double())
        got = linear_loss(x, weight, None, y, loss=loss, backend=backend)
        torch.testing.assert_close(got.double(), want, equal_nan=True, rtol=1e-5, atol=1e-6, msg=str(value))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_memory_on_a_gpu(backend: str) -> None:
    """Beyond weight and gradient under 2 % of what eager ASL takes."""
    batch, width, classes = 256, 64, 1_000_000
    x = torch.randn(batch, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(classes, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    targets = SparseTargets.from_lists([[b] for b in range(batch)], classes).to("cuda")

    def eager() -> Tensor:
        return losses.asymmetric_loss(x @ weight.t(), targets.to_dense())

    def fused() -> Tensor:
        return linear_loss(x, weight, None, targets, loss="asl", backend=backend)

    def peak(loss: Callable[[], Tensor]) -> int:
        loss().backward()  # libraries allocate their workspaces
        x.grad = weight.grad = None
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        loss().backward()
        torch.cuda.synchronize()
        x.grad = weight.grad = None
        return torch.cuda.max_memory_allocated() - before

    gradient = weight.numel() * weight.element_size()
    assert peak(fused) - gradient < 0.02 * peak(eager)
