"""The losses: against torch's and against literal fp64 formulas, gradients, extremes, precision, checks, tracing."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mlhead.losses import (
    AsymmetricLoss,
    BinaryCrossEntropy,
    SoftmaxCrossEntropy,
    asymmetric_loss,
    binary_cross_entropy,
    softmax_cross_entropy,
)

B, C = 5, 7
Loss = Callable[..., Tensor]
DENSE = {"bce": binary_cross_entropy, "asl": asymmetric_loss}
every_dense = pytest.mark.parametrize("loss", DENSE.values(), ids=DENSE.keys())
every_loss = pytest.mark.parametrize("loss", [*DENSE.values(), softmax_cross_entropy], ids=[*DENSE.keys(), "softmax"])


def inputs(dtype: torch.dtype = torch.float64, scale: float = 3.0) -> tuple[Tensor, Tensor]:
    """Logits and 0/1 targets."""
    return (torch.randn(B, C, dtype=torch.float64) * scale).to(dtype), (torch.rand(B, C) < 0.4).to(dtype)


def literal_asl(
    z: Tensor, y: Tensor, gamma_neg: float, gamma_pos: float, margin: float, eps: float, detach: bool = False
) -> Tensor:
    """The formula, letter by letter, in fp64; at base 0 its focal weight has gradient 0, also for gamma < 1."""
    z, y = z.double(), y.double()
    p = 1 / (1 + torch.exp(-z))
    pm = torch.clamp(1 - p + margin, max=1)
    pos_focal, neg_focal = (1 - p) ** gamma_pos, (1 - pm).clamp(min=1e-300) ** gamma_neg
    if detach:
        pos_focal, neg_focal = pos_focal.detach(), neg_focal.detach()
    log_p, log_pm = torch.log(p.clamp(min=eps)), torch.log(pm.clamp(min=eps))
    return -(y * pos_focal * log_p + (1 - y) * neg_focal * log_pm)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_bce_is_torchs(reduction: str) -> None:
    """With and without every weight; "mean" is over B * C."""
    z, y = inputs()
    pos_weight, weight = torch.rand(C, dtype=torch.float64) * 3, torch.rand(B, C, dtype=torch.float64)
    torch.testing.assert_close(
        binary_cross_entropy(z, y, reduction=reduction), F.binary_cross_entropy_with_logits(z, y, reduction=reduction)
    )
    torch.testing.assert_close(
        binary_cross_entropy(z, y, pos_weight=pos_weight, weight=weight, reduction=reduction),
        F.binary_cross_entropy_with_logits(z, y, weight, pos_weight=pos_weight, reduction=reduction),
    )
    module = BinaryCrossEntropy(pos_weight=pos_weight, reduction=reduction)
    torch.testing.assert_close(
        module(z, y), F.binary_cross_entropy_with_logits(z, y, pos_weight=pos_weight, reduction=reduction)
    )


@every_dense
def test_weight_per_sample_or_element(loss: Loss) -> None:
    """(B,) and (B, C); "mean" divides by the number of elements all the same."""
    z, y = inputs()
    each = loss(z, y, reduction="none")
    assert each.shape == (B, C)
    samples, elements = torch.rand(B), torch.rand(B, C)
    torch.testing.assert_close(loss(z, y, weight=samples, reduction="none"), each * samples[:, None].double())
    torch.testing.assert_close(loss(z, y, weight=samples), (each * samples[:, None]).sum() / (B * C))
    torch.testing.assert_close(loss(z, y, weight=elements, reduction="sum"), (each * elements).sum())
    with pytest.raises(ValueError, match=r"weight must be \(B,\) = \(5,\) or \(B, C\) = \(5, 7\), got \(7,\)"):
        loss(z, y, weight=torch.rand(C))


@pytest.mark.parametrize("gamma_pos", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("gamma_neg", [0.0, 0.5, 4.0, 7.0])
@pytest.mark.parametrize("margin", [0.0, 0.05, 0.3])
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "full"])
def test_asl_is_the_formula(gamma_neg: float, gamma_pos: float, margin: float, detach: bool) -> None:
    """Values and gradients in fp64, for hard and soft targets."""
    z, hard = inputs()
    z.requires_grad_()
    for y in (hard, torch.rand(B, C, dtype=torch.float64)):
        ours = asymmetric_loss(
            z, y, gamma_neg=gamma_neg, gamma_pos=gamma_pos, margin=margin, detach_focal=detach, reduction="none"
        )
        expected = literal_asl(z, y, gamma_neg, gamma_pos, margin, 1e-8, detach)
        torch.testing.assert_close(ours, expected)
        upstream = torch.randn_like(ours)
        (grad,) = torch.autograd.grad(ours, z, upstream)
        (theirs,) = torch.autograd.grad(expected, z, upstream)
        torch.testing.assert_close(grad, theirs)


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "full"])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_asl_of_negatives_keeps_its_digits(margin: float, gamma: float, detach: bool) -> None:
    """fp32 against fp64 from the easiest negatives to the clamp: a relative error, however small the loss is."""
    z = torch.linspace(-80, 18, 1961)[None].requires_grad_()
    ours = asymmetric_loss(
        z, torch.zeros_like(z), gamma_neg=gamma, margin=margin, detach_focal=detach, reduction="none"
    )
    exact = z.detach().double().requires_grad_()
    p = torch.sigmoid(exact)
    base = (p - margin).clamp(min=0)
    expected = -((base.detach() if detach else base) ** gamma) * torch.log1p(-base)
    # A unit in the last place of p is p / (p - margin) units of p - margin, which is raised to gamma; a few units more
    # are those of sigmoid, the power, the logarithm and the products.
    units = (p / base).detach() * (gamma + 1) * 8 * torch.finfo(torch.float32).eps
    for got, want in (
        (ours, expected),
        (torch.autograd.grad(ours.sum(), z)[0], torch.autograd.grad(expected.sum(), exact)[0]),
    ):
        error = (got.double() - want).abs().detach()
        some = base > 0
        assert bool((error[some] <= units[some] * want[some].abs() + torch.finfo(torch.float32).tiny).all())
        assert bool((got[~some] == 0).all())


def test_asl_clamps_both_logarithms() -> None:
    """Also where eps is so large that the clamp acts on likely labels."""
    z, y = inputs()
    for eps in (1e-3, 0.3, 0.9):
        ours = asymmetric_loss(z, y, margin=0.05, gamma_neg=0, eps=eps, reduction="none")
        torch.testing.assert_close(ours, literal_asl(z, y, 0, 0, 0.05, eps))


def test_asl_defaults() -> None:
    """Gamma 4 and 0, margin 0.05, eps 1e-8, focal weights detached, mean."""
    z, y = inputs()
    z.requires_grad_()
    expected = literal_asl(z, y, 4, 0, 0.05, 1e-8, detach=True).mean()
    for ours in (asymmetric_loss(z, y), AsymmetricLoss()(z, y)):
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(torch.autograd.grad(ours, z), torch.autograd.grad(expected, z, retain_graph=True))


def test_asl_without_focus_or_margin_is_bce() -> None:
    """Wherever the clamp does not act."""
    z, y = inputs()
    ours = asymmetric_loss(z, y, gamma_neg=0, gamma_pos=0, margin=0, reduction="none")
    torch.testing.assert_close(ours, F.binary_cross_entropy_with_logits(z, y, reduction="none"))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_softmax_is_torchs(smoothing: float) -> None:
    """Indices and probabilities."""
    z, _ = inputs()
    indices = torch.tensor([0, 6, 3, 3, 1])
    for targets in (indices, indices.int(), F.one_hot(indices, C).double(), torch.rand(B, C).double().softmax(1)):
        theirs = targets.long() if targets.ndim == 1 else targets
        for reduction in ("none", "sum", "mean"):
            torch.testing.assert_close(
                softmax_cross_entropy(z, targets, label_smoothing=smoothing, reduction=reduction),
                F.cross_entropy(z, theirs, label_smoothing=smoothing, reduction=reduction),
            )
    module = SoftmaxCrossEntropy(label_smoothing=smoothing)
    torch.testing.assert_close(module(z, indices), F.cross_entropy(z, indices, label_smoothing=smoothing))
    weight = torch.rand(B)
    torch.testing.assert_close(
        softmax_cross_entropy(z, indices, weight=weight),
        (F.cross_entropy(z, indices, reduction="none") * weight).mean(),
    )


def test_bce_label_smoothing() -> None:
    """Towards one half."""
    z, y = inputs()
    expected = F.binary_cross_entropy_with_logits(z, y * 0.8 + 0.1)
    torch.testing.assert_close(binary_cross_entropy(z, y, label_smoothing=0.2), expected)
    torch.testing.assert_close(BinaryCrossEntropy(label_smoothing=0.2)(z, y), expected)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z, y: binary_cross_entropy(z, y, pos_weight=torch.linspace(0.5, 3, C).double(), label_smoothing=0.1),
        lambda z, y: asymmetric_loss(z, y, detach_focal=False, gamma_pos=1.5, reduction="sum"),
        lambda z, y: softmax_cross_entropy(z, y, label_smoothing=0.1),
    ],
    ids=["bce", "asl", "softmax"],
)
def test_gradcheck(loss: Loss) -> None:
    """First and second derivatives by finite differences, of the logits and of soft targets."""
    z = torch.randn(3, C, dtype=torch.float64, requires_grad=True)
    y = (0.1 + 0.8 * torch.rand(3, C, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(loss, (z, y))
    assert torch.autograd.gradgradcheck(loss, (z, y))


EDGES = torch.tensor([0.0, 1e-30, 1.0, 5, 15, 16.6, 17, 20, 40, 88, 89, 104, 1e3, 1e4])


def at_the_edges(loss: Loss, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Logits to +-1e4, all negative and all positive, and the loss's gradient; both must be finite."""
    z = torch.cat([EDGES, -EDGES]).to(dtype).repeat(2, 1).requires_grad_()
    y = torch.zeros(z.shape)
    y[1] = 1
    each = loss(z, y, reduction="none")
    assert each.isfinite().all()
    assert (each >= 0).all()
    (grad,) = torch.autograd.grad(each.sum(), z)
    assert grad.isfinite().all()
    return z.detach(), y, grad


every_float = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])


@every_float
def test_extreme_logits_of_bce(dtype: torch.dtype) -> None:
    """Finite at +-1e4, and the gradient of a confident error does not vanish."""
    z, y, grad = at_the_edges(binary_cross_entropy, dtype)
    torch.testing.assert_close(grad, (torch.sigmoid(z.float()) - y).to(dtype))


@every_float
@pytest.mark.parametrize("detach", [True, False], ids=["detached", "full"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_extreme_logits_of_asl(dtype: torch.dtype, detach: bool, gamma: float, margin: float) -> None:
    """Finite at +-1e4, for every gamma; the clamp of the logarithm bounds the loss."""
    module = AsymmetricLoss(gamma_neg=gamma, gamma_pos=gamma, margin=margin, detach_focal=detach, reduction="none")

    def loss(z: Tensor, y: Tensor, reduction: str) -> Tensor:
        assert module.reduction == reduction
        return module(z, y)

    z, y, _ = at_the_edges(loss, dtype)
    assert module(z, y).max() <= -math.log(1e-8) * (1 + 1e-6)


def test_extreme_logits_of_softmax() -> None:
    """A confident error costs what it should."""
    z = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    value = softmax_cross_entropy(z, torch.tensor([1]))
    assert value.item() == 2e4
    torch.testing.assert_close(torch.autograd.grad(value, z)[0], torch.tensor([[1.0, -1.0, 0.0]]))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_arithmetic_is_fp32(loss: Loss, dtype: torch.dtype) -> None:
    """16-bit logits give what their fp32 values give, bit for bit, and under autocast too; the gradient is 16-bit."""
    z, y = inputs(dtype)
    y = y if loss is not softmax_cross_entropy else torch.tensor([0, 6, 3, 3, 1])
    expected = loss(z.float(), y)
    z.requires_grad_()
    value = loss(z, y)
    assert value.dtype == torch.float32
    assert torch.equal(value, expected)
    value.backward()
    assert z.grad.dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss(z, y), expected)
    wide = loss(z.double(), y)
    assert wide.dtype == torch.float64
    torch.testing.assert_close(expected.double(), wide, rtol=1e-6, atol=1e-7)


@every_dense
def test_target_dtypes(loss: Loss) -> None:
    """bool, integers and floats mean the same."""
    z, y = inputs(torch.float32)
    for dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.float64):
        assert torch.equal(loss(z, y.to(dtype)), loss(z, y))


@every_loss
def test_empty_batch(loss: Loss) -> None:
    """0, with a gradient of no elements, not NaN."""
    z = torch.empty(0, C, requires_grad=True)
    value = loss(z, torch.empty(0, C))
    assert value.item() == 0
    value.backward()
    assert z.grad.shape == (0, C)


@every_dense
def test_dense_targets_are_checked(loss: Loss) -> None:
    """Shape, device, NaN and range, each by name."""
    z, y = inputs(torch.float32)
    name = loss.__name__
    with pytest.raises(ValueError, match=rf"{name}: targets must be \(B, C\) = \(5, 7\), got \(5, 6\)"):
        loss(z, y[:, :6])
    with pytest.raises(ValueError, match=rf"{name}: targets must be in \[0, 1\] and not NaN, got NaN"):
        loss(z, y.clone().fill_diagonal_(math.nan))
    with pytest.raises(ValueError, match=rf"{name}: targets must be in \[0, 1\] and not NaN, got values from 0 to 1.5"):
        loss(z, y * 1.5)
    with pytest.raises(ValueError, match=rf"{name}: targets must be in \[0, 1\] and not NaN, got values from -1"):
        loss(z, y.long() - 1)
    with pytest.raises(ValueError, match=rf"{name}: targets must be on cpu like logits, got meta"):
        loss(z, y.to("meta"))
    with pytest.raises(TypeError, match=rf"{name}: targets must be a torch.Tensor, got list"):
        loss(z, y.tolist())
    with pytest.raises(TypeError, match=rf"{name}: targets must be real"):
        loss(z, y.to(torch.complex64))
    with pytest.raises(TypeError, match=rf"{name}: logits must be of a floating dtype, got torch.int64"):
        loss(z.long(), y)
    with pytest.raises(ValueError, match=rf"{name}: logits must be \(B, C\)"):
        loss(z[0], y[0])
    with pytest.raises(ValueError, match=rf"{name}: reduction must be one of 'none', 'mean', 'sum', got 'batch'"):
        loss(z, y, reduction="batch")


def test_class_targets_are_checked() -> None:
    """No index is special, torch's -100 included."""
    z, _ = inputs(torch.float32)
    for wrong, found in ((7, "0 to 7"), (-100, "-100 to 0"), (-1, "-1 to 0")):
        with pytest.raises(ValueError, match=rf"targets must be in \[0, 6\] and not NaN, got values from {found}"):
            softmax_cross_entropy(z, torch.tensor([0, 0, wrong, 0, 0]))
    with pytest.raises(ValueError, match=r"targets must be class indices \(B,\) = \(5,\) or floating probabilities"):
        softmax_cross_entropy(z, torch.zeros(B, C, dtype=torch.long))
    with pytest.raises(TypeError, match="targets must be class indices"):
        softmax_cross_entropy(z, torch.zeros(B, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"targets must be \(B, C\) = \(5, 7\), got \(5,\)"):
        softmax_cross_entropy(z, torch.zeros(B))


def test_options_are_checked() -> None:
    """Numbers out of their range."""
    z, y = inputs(torch.float32)
    for options, message in (
        ({"gamma_neg": -1}, "gamma_neg must be finite and at least 0, got -1"),
        ({"gamma_pos": math.nan}, "gamma_pos must be finite and at least 0, got nan"),
        ({"margin": 1.0}, r"margin must be in \[0, 1\), got 1.0"),
        ({"eps": 0.0}, r"eps must be in \(0, 1\), got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            asymmetric_loss(z, y, **options)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1"):
        binary_cross_entropy(z, y, label_smoothing=1)
    with pytest.raises(ValueError, match=r"pos_weight must be \(C,\) = \(7,\), got \(5,\)"):
        binary_cross_entropy(z, y, pos_weight=torch.ones(B))
    with pytest.raises(ValueError, match="AsymmetricLoss: reduction must be one of"):
        AsymmetricLoss(reduction="avg")


@pytest.mark.parametrize(
    ("kind", "loss", "options", "error", "message"),
    [
        (AsymmetricLoss, asymmetric_loss, {"margin": 5}, ValueError, r"margin must be in \[0, 1\), got 5"),
        (AsymmetricLoss, asymmetric_loss, {"gamma_neg": -1}, ValueError, "gamma_neg must be finite and at least 0"),
        (AsymmetricLoss, asymmetric_loss, {"gamma_pos": "1"}, TypeError, "gamma_pos must be a number, got str"),
        (AsymmetricLoss, asymmetric_loss, {"eps": 0.0}, ValueError, r"eps must be in \(0, 1\), got 0.0"),
        (AsymmetricLoss, asymmetric_loss, {"eps": None}, TypeError, "eps must be a number, got NoneType"),
        (BinaryCrossEntropy, binary_cross_entropy, {"label_smoothing": 2}, ValueError, r"label_smoothing must be in"),
        (BinaryCrossEntropy, binary_cross_entropy, {"pos_weight": [1.0]}, TypeError, "pos_weight must be a torch.Tens"),
        (
            BinaryCrossEntropy,
            binary_cross_entropy,
            {"pos_weight": torch.ones(1, C)},
            ValueError,
            r"pos_weight must be \(C,\)",
        ),
        (SoftmaxCrossEntropy, softmax_cross_entropy, {"label_smoothing": -0.1}, ValueError, "label_smoothing must be"),
        (SoftmaxCrossEntropy, softmax_cross_entropy, {"label_smoothing": "0"}, TypeError, "label_smoothing must be a"),
    ],
)
def test_modules_refuse_what_the_functions_do(
    kind: type[torch.nn.Module], loss: Loss, options: dict, error: type[Exception], message: str
) -> None:
    """When they are made, by the message of the call."""
    with pytest.raises(error, match=f"{kind.__name__}: {message}"):
        kind(**options)
    with pytest.raises(error, match=f"{loss.__name__}: {message}"):
        loss(*inputs(torch.float32), **options)


@every_loss
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(loss: Loss, backend: str) -> None:
    """fullgraph=True, value and gradient."""
    torch._dynamo.reset()
    z, y = inputs(torch.float32)
    y = y if loss is not softmax_cross_entropy else torch.tensor([0, 6, 3, 3, 1])
    z.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    value, expected = compiled(z, y), loss(z, y)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, z), torch.autograd.grad(expected, z))


@every_dense
def test_transforms_and_fake_tensors(loss: Loss) -> None:
    """torch.func.grad and vmap, FakeTensorMode and meta work; there the values of targets are not looked at."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    z, y = inputs()
    leaf = z.clone().requires_grad_()
    loss(leaf, y).backward()
    torch.testing.assert_close(torch.func.grad(loss)(z, y), leaf.grad)
    rows = torch.func.vmap(lambda a, b: loss(a[None], b[None]))(z, y)
    torch.testing.assert_close(rows, loss(z, y, reduction="none").mean(1))
    with FakeTensorMode():
        assert loss(torch.empty(B, C), torch.empty(B, C), reduction="none").shape == (B, C)
    assert loss(z.to("meta"), y.to("meta")).shape == ()


@every_dense
def test_nothing_is_changed(loss: Loss) -> None:
    """Inputs, the grad mode and autocast are as they were."""
    z, y = inputs(torch.float32)
    z.requires_grad_()
    copies = z.detach().clone(), y.clone()
    with torch.no_grad():
        assert not loss(z, y).requires_grad
        assert not torch.is_grad_enabled()
    loss(z, y).backward()
    assert torch.equal(z, copies[0])
    assert torch.equal(y, copies[1])
    assert torch.is_grad_enabled()


def test_modules_show_and_move() -> None:
    """pos_weight is a buffer that is not saved; the options are printed."""
    module = BinaryCrossEntropy(pos_weight=torch.ones(C), label_smoothing=0.1, reduction="sum")
    assert not module.state_dict()
    assert module.to("meta").pos_weight.device.type == "meta"
    assert repr(module) == "BinaryCrossEntropy(label_smoothing=0.1, reduction='sum')"
    assert "gamma_neg=7, gamma_pos=0.0, margin=0.05" in repr(AsymmetricLoss(gamma_neg=7))
    assert repr(SoftmaxCrossEntropy()) == "SoftmaxCrossEntropy(label_smoothing=0.0, reduction='mean')"


@pytest.mark.gpu
@every_loss
def test_no_synchronisation_on_cuda(loss: Loss) -> None:
    """Value checks included."""
    z, y = inputs(torch.float32)
    y = y if loss is not softmax_cross_entropy else torch.tensor([0, 6, 3, 3, 1])
    expected = loss(z, y)
    z, y = z.cuda(), y.cuda()
    loss(z, y)
    torch.cuda.set_sync_debug_mode("error")
    try:
        value = loss(z, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(value.cpu(), expected)


@pytest.mark.gpu
def test_wrong_targets_on_cuda_are_an_error() -> None:
    """An asynchronous one; in a process of its own, since a device assertion ends the CUDA context."""
    script = (
        "import torch\n"
        "from mlhead.losses import binary_cross_entropy\n"
        "binary_cross_entropy(torch.zeros(2, 3, device='cuda'), torch.full((2, 3), {value}, device='cuda'))\n"
        "torch.cuda.synchronize()\n"
    )
    for value, code in (("1.0", 0), ("1.5", 1), ("float('nan')", 1)):
        process = subprocess.run([sys.executable, "-c", script.format(value=value)], capture_output=True, text=True)
        assert (process.returncode != 0) == code, process.stderr
        assert ("assert" in process.stderr) == code, process.stderr


def test_options_are_keywords_of_the_ops() -> None:
    """All that a module knows; what a loss in the head cannot do is an error."""
    weight = torch.ones(C)
    bce = BinaryCrossEntropy(pos_weight=weight, label_smoothing=0.1).options()
    assert torch.equal(bce.pop("pos_weight"), weight)
    assert bce == {"loss": "bce", "reduction": "mean", "class_weight": None, "label_smoothing": 0.1}
    asl = AsymmetricLoss(gamma_neg=3, gamma_pos=1, margin=0.1, eps=1e-6, detach_focal=False, reduction="sum").options()
    assert asl == {
        "loss": "asl",
        "reduction": "sum",
        "class_weight": None,
        "gamma_neg": 3,
        "gamma_pos": 1,
        "margin": 0.1,
        "eps": 1e-6,
        "detach_focal": False,
    }
    softmax = SoftmaxCrossEntropy(label_smoothing=0.2).options()
    assert softmax == {"loss": "softmax", "reduction": "mean", "class_weight": None, "label_smoothing": 0.2}
    for kind in (BinaryCrossEntropy, AsymmetricLoss, SoftmaxCrossEntropy):
        with pytest.raises(ValueError, match=f"{kind.__name__}: reduction must be 'mean' or 'sum' for a loss in the"):
            kind(reduction="none").options()
