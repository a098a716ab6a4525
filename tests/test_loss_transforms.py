"""The losses in the head under torch.func, torch.export and the FLOP counter, on empty batches and at logits of 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loss_heads import LOSSES, each_backend
from torch import Tensor
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import mlhead
from mlhead import CSRAHead, GAPHead, MLDecoder, TransformerDecoder, csra_loss, group_fc_topk, linear_loss
from mlhead.losses import AsymmetricLoss, BinaryCrossEntropy, SoftmaxCrossEntropy

D, C = 8, 6
SMALL: dict[str, Any] = {"embed_dim": 8, "num_heads": 2, "feedforward_dim": 16, "dropout": 0.0}
HEADS: dict[str, Callable[..., Any]] = {
    "gap": lambda **o: GAPHead(D, C, **o),
    "csra": lambda **o: CSRAHead(D, C, num_heads=2, **o),
    "ml_decoder": lambda **o: MLDecoder(D, C, groups=3, **SMALL, **o),
    "transformer_decoder": lambda **o: TransformerDecoder(D, C, **SMALL, **o),
}
every_head = pytest.mark.parametrize("name", HEADS)
every_loss = pytest.mark.parametrize("loss", LOSSES)
MODULES = {"bce": BinaryCrossEntropy, "asl": AsymmetricLoss, "softmax": SoftmaxCrossEntropy}


def _targets(loss: str, B: int) -> Tensor:
    torch.manual_seed(5)
    return torch.randint(0, C, (B,)) if loss == "softmax" else (torch.rand(B, C) < 0.3).double()


@every_loss
def test_gradients_at_logits_of_0(loss: str) -> None:
    """Of a classifier that starts at zero."""
    x, w, y = torch.randn(4, D).double(), torch.zeros(C, D).double(), _targets(loss, 4)

    def of_logits(w: Tensor) -> Tensor:
        return LOSSES[loss](x @ w.t(), y, reduction="sum")

    def in_head(w: Tensor) -> Tensor:
        return linear_loss(x, w, None, y, loss=loss, reduction="sum")

    want = grad(of_logits)(w)
    assert want.abs().sum() > 0
    leaf = w.clone().requires_grad_()
    (backward,) = torch.autograd.grad(in_head(leaf), leaf)
    torch.testing.assert_close(backward, want)
    torch.testing.assert_close(grad(in_head)(w), want)
    along = torch.randn_like(w)
    torch.testing.assert_close(jvp(in_head, (w,), (along,))[1], (want * along).sum())


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_tangents_have_the_dtype_of_the_loss(loss: str, reduction: str) -> None:
    x, w, y = torch.randn(4, D), torch.randn(C, D), _targets(loss, 4)
    y = y if loss == "softmax" else y.float()
    for value in jvp(lambda w: linear_loss(x, w, None, y, loss=loss, reduction=reduction), (w,), (w,)):
        assert value.dtype == torch.float32


@every_loss
def test_gradients_of_each_image(loss: str) -> None:
    x, w, y = torch.randn(3, D).double(), torch.randn(C, D).double().requires_grad_(), _targets(loss, 3)

    def of_logits(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return LOSSES[loss](a[None] @ w.t(), b[None], reduction="sum")

    def in_head(w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return linear_loss(a[None], w, None, b[None], loss=loss, reduction="sum")

    each = (None, 0, 0)
    torch.testing.assert_close(vmap(grad(in_head), each)(w, x, y), vmap(grad(of_logits), each)(w, x, y))
    torch.testing.assert_close(vmap(in_head, each)(w, x, y), vmap(of_logits, each)(w, x, y))


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's own attention among the queries
@every_head
def test_gradients_of_each_image_of_a_head(name: str) -> None:
    torch.manual_seed(0)
    head = HEADS[name]().double()
    x, y = torch.randn(3, 4, D).double(), _targets("bce", 3)
    parameters = dict(head.named_parameters())

    def loss(parameters: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
        return functional_call(head, parameters, (a[None], b[None]))

    found = vmap(grad(loss), (None, 0, 0))(parameters, x, y)
    for i in range(3):
        head.zero_grad()
        head(x[i : i + 1], y[i : i + 1]).backward()
        for key, value in parameters.items():
            if value.requires_grad:
                torch.testing.assert_close(found[key][i], value.grad, rtol=1e-6, atol=1e-9, msg=f"{key} {i}")


@every_head
@pytest.mark.parametrize("gradients", [True, False])
def test_an_exported_loss_decomposes(name: str, gradients: bool) -> None:
    head, x, y = HEADS[name]().eval(), torch.randn(2, 4, D), _targets("bce", 2).float()
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(head, (x, y)).run_decompositions(mlhead.decompositions())
    assert not [n for n in program.graph.nodes if "mlhead" in str(n.target)]
    torch.testing.assert_close(program.module()(x, y), head(x, y))


@each_backend
@every_loss
@pytest.mark.parametrize("grads", [True, False])
def test_empty_batches(backend: str, loss: str, grads: bool) -> None:
    w, y = torch.randn(C, D, requires_grad=grads), _targets(loss, 0)
    if loss != "softmax":
        y = y.float()
    value = linear_loss(torch.zeros(0, D), w, None, y, loss=loss, backend=backend)
    assert value == 0
    pooled = csra_loss(torch.zeros(0, 3, D), w[None], None, y, loss=loss, temperatures=(1.0,), lam=0.1, backend=backend)
    assert pooled == 0
    if grads:
        value.backward()
        assert torch.equal(w.grad, torch.zeros(C, D))
        pooled.backward()
        assert torch.equal(w.grad, torch.zeros(C, D))


@every_head
@every_loss
def test_heads_of_an_empty_batch(name: str, loss: str) -> None:
    head = HEADS[name](loss=MODULES[loss]())
    value = head(torch.zeros(0, 4, D), _targets(loss, 0).to(torch.int64 if loss == "softmax" else torch.float32))
    assert value == 0
    value.backward()
    assert all(p.grad is None or not p.grad.any() for p in head.parameters())


def test_an_empty_batch_updates_without_a_gradient() -> None:
    head = GAPHead(D, C, loss=SoftmaxCrossEntropy())
    before = head.fc.weight.detach().clone()
    optimizer = mlhead.optim.ClassSGD([head.class_parameter], lr=0.1)
    head(torch.zeros(0, 4, D), torch.zeros(0, dtype=torch.int64), update=optimizer).backward()
    optimizer.step()
    assert torch.equal(head.fc.weight, before)


def test_flops_of_the_best_classes() -> None:
    mlhead.register_flop_formulas()
    h, weight = torch.randn(2, 4, 8), torch.randn(4, 8, 25)

    class Best(torch.nn.Module):
        def forward(self, h: Tensor, weight: Tensor) -> Any:
            return group_fc_topk(h, weight, None, 3)

    program = torch.export.export(Best(), (h, weight)).module()
    counts = []
    for run in (Best(), program):
        with FlopCounterMode(display=False) as counter:
            run(h, weight)
        counts.append(counter.get_total_flops())
    assert counts == [2 * 2 * 8 * 100] * 2


@each_backend
@every_loss
def test_class_weights_of_the_loss_modules(backend: str, loss: str) -> None:
    torch.manual_seed(1)
    weight, y = torch.rand(C).double() + 0.5, _targets(loss, 5)
    module = MODULES[loss](class_weight=weight, reduction="sum").double()
    assert not module.state_dict()
    z = torch.randn(5, C).double()
    elements = torch.nn.functional.one_hot(y, C) if loss == "softmax" else y
    if loss == "softmax":
        want = -(z.log_softmax(1) * elements * weight).sum()
    else:
        want = (LOSSES[loss](z, y, reduction="none") * weight).sum()
    torch.testing.assert_close(module(z, y), want)
    x, w = torch.randn(5, D).double().requires_grad_(), torch.randn(C, D).double().requires_grad_()
    found = linear_loss(x, w, None, y, **module.options(), backend=backend)
    logits = module(x @ w.t(), y)
    torch.testing.assert_close(found, logits)
    for a, b in zip(torch.autograd.grad(found, (x, w)), torch.autograd.grad(logits, (x, w)), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"class_weight must be \(C,\)"):
        MODULES[loss](class_weight=torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"class_weight must be \(C,\) = \(6,\), got \(2,\)"):
        MODULES[loss](class_weight=torch.ones(2))(z, y)


def test_smoothed_softmax_with_class_weights() -> None:
    torch.manual_seed(2)
    module = SoftmaxCrossEntropy(class_weight=torch.rand(C).double(), label_smoothing=0.2)
    x, w, y = torch.randn(4, D).double(), torch.randn(C, D).double(), _targets("softmax", 4)
    torch.testing.assert_close(linear_loss(x, w, None, y, **module.options()), module(x @ w.t(), y))
