"""The losses in the head: against losses of logits, and their autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from loss_heads import BACKENDS, LOSSES, TEMPERATURES, B, C, E, G, arguments_of, each_backend, make_head, make_labels

from mlhead import SparseTargets, csra_loss, csra_pool, group_fc, group_fc_loss, linear_loss, losses
from mlhead.ops._loss_kernels import ExtensionKernels


@each_backend
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("sparse", [False, True])
def test_equals_the_loss_of_the_logits(backend: str, loss: str, reduction: str, sparse: bool) -> None:
    h, weight, bias = leaves = make_head()
    y = make_labels()
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
    leaves, y = make_head(), make_labels()
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
    y = make_labels()
    want = LOSSES[loss](csra_pool(x, weight, **TEMPERATURES), y.double())
    got = csra_loss(x, weight, None, SparseTargets.from_dense(y), loss=loss, backend=backend, **TEMPERATURES)
    torch.testing.assert_close(got, want)
    pairs = zip(torch.autograd.grad(got, (x, weight)), torch.autograd.grad(want, (x, weight)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b)


@each_backend
def test_linear_is_one_group(backend: str) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(B, E), torch.randn(C, E), torch.randn(C)
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    y = make_labels()
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
    leaves = make_head(dtype)
    loss = group_fc_loss(*leaves, make_labels(), C, loss="asl", backend=backend)
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
    leaves = make_head(torch.float32)
    group_fc_loss(*leaves, make_labels(), C, backend=backend).backward()
    once = [t.grad.clone() for t in leaves]  # type: ignore[union-attr]
    for _ in range(2):
        (0.5 * group_fc_loss(*leaves, make_labels(), C, backend=backend)).backward()
    for tensor, grad in zip(leaves, once, strict=True):
        torch.testing.assert_close(tensor.grad, 2 * grad)
    x, weight = torch.randn(B, E), torch.randn(C, E).requires_grad_()
    pointers = []
    loss = linear_loss(x, weight, None, make_labels(), backend=backend)
    loss.grad_fn.register_hook(lambda grads, _: pointers.extend(g.data_ptr() for g in grads if g is not None))  # type: ignore[union-attr]
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.data_ptr() in pointers


@each_backend
def test_inputs_changed_before_backward(backend: str) -> None:
    """The gradients are those of the forward; where they have to be made again, a changed weight is an error."""
    h, weight, bias = make_head(torch.float32)
    loss = group_fc_loss(h, weight, bias, make_labels(), C, backend=backend)
    (want,) = torch.autograd.grad(loss, h, retain_graph=True)
    loss = group_fc_loss(h, weight, bias, make_labels(), C, backend=backend)
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
                    loss = linear_loss(x, linear.weight, linear.bias, make_labels(), backend=backend)
                else:
                    loss = losses.binary_cross_entropy(linear(x), make_labels())
            assert loss.dtype == torch.float32
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append(linear.weight.detach())
    torch.testing.assert_close(*results, rtol=2e-3, atol=2e-4)


@each_backend
def test_evaluation_needs_no_graph(backend: str) -> None:
    leaves = make_head(torch.float32)
    want = group_fc_loss(*leaves, make_labels(), C, backend=backend)
    with torch.no_grad():
        loss = group_fc_loss(*leaves, make_labels(), C, backend=backend)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, want)
    with torch.inference_mode():
        torch.testing.assert_close(group_fc_loss(*leaves, make_labels(), C, backend=backend), want)


@each_backend
def test_ignored_elements_count_for_nothing(backend: str) -> None:
    leaves = make_head(torch.float32)
    y, unknown = make_labels(), make_labels(2)
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
    leaves = make_head(torch.float32)
    y, per_class, per_sample = make_labels(), torch.rand(C), torch.rand(B)
    got = group_fc_loss(
        *leaves, y, C, loss=loss, class_weight=per_class, sample_weight=per_sample, reduction="sum", backend=backend
    )
    elements = LOSSES[loss](group_fc(*leaves, C), y, reduction="none")
    torch.testing.assert_close(got, (elements * per_class * per_sample[:, None]).sum())


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64])
@each_backend
def test_targets_of_any_dtype(backend: str, dtype: torch.dtype) -> None:
    leaves = make_head(torch.float32)
    y = make_labels()
    want = group_fc_loss(*leaves, y.float(), C, backend=backend)
    assert torch.equal(group_fc_loss(*leaves, y.to(dtype), C, backend=backend), want)


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
        a = arguments_of(z[0], y, options)
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
