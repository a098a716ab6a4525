"""Gradient fusion: against torch.optim, rounding, what goes with it, memory."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from optim_heads import (
    BLOCKS,
    CASES,
    DEVICE,
    LOSSES,
    ByTorch,
    C,
    E,
    G,
    Head,
    J,
    backends,
    block_ranges,
    drive,
    every_case,
    make,
)
from peak import printed_by
from torch import Tensor, nn

import mlhead
from mlhead.ops._loss_update import grouped
from mlhead.optim import ClassAdafactor, ClassSGD

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # then part of what gpu-check runs


@every_case
@pytest.mark.parametrize("form", ["group", "linear"])
@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("backend", backends(torch.float64))
def test_is_torch_optim(case: str, form: str, kind: str, backend: str) -> None:
    """In fp64, over several steps: the loss, the gradients of all else, and the weight."""
    head, other = Head(form), Head(form)
    for mine, theirs in ((head.weight, other.weight), (head.bias, other.bias)):
        theirs.data.copy_(mine.data)
    before = head.weight.detach().clone()
    update, torchs = make(case, head), ByTorch(other, case)
    for step in range(5):
        results = []
        for one, options in ((head, {"update": update}), (other, {})):
            one.bias.grad = None
            h, y = one.inputs(step, kind)
            h.requires_grad_()
            loss = 3 * one.loss(h, y, backend=backend, **LOSSES[kind], **options)
            loss.backward()
            results.append((loss, h.grad, one.bias.grad))
        assert head.weight.grad is None
        update.step()
        update.zero_grad()
        torchs.write(torchs.step(other.weight.grad))
        other.weight.grad = None
        torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(head.rows(), other.rows(), rtol=1e-9, atol=1e-12)
    if form == "group":  # what belongs to no class stays as it was
        assert head.weight[-1, :, C - (G - 1) * J :].equal(before[-1, :, C - (G - 1) * J :])
    state = update.state[head.weight]
    if case == "adafactor":
        assert state["col_var"].shape == (len(block_ranges(form)), E)
        assert state["row_var"].numel() == head.weight.numel() // E
    else:
        moments = [t for name, t in state.items() if isinstance(t, Tensor) and name != "step"]
        assert all(t.shape == head.weight.shape for t in moments)


@every_case
@pytest.mark.parametrize("form", ["group", "linear"])
def test_arithmetic_in_fp32(case: str, form: str) -> None:
    """The same gradients, handed over block by block: fp32 as torch.optim has it."""
    head = Head(form, torch.float32)
    update, torchs = make(case, head), ByTorch(head, case)
    for step in range(5):
        gradient = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        run = update.begin_update(head.weight, C, torch.float32)
        seen = grouped(gradient)
        for block in run.blocks:
            place = run.place(block)
            place.copy_(seen[block.groups, :, block.columns])
            run.done(block, place)
        update.step()
        torch.testing.assert_close(head.rows(), torchs.step(gradient), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("backend", backends(torch.float32))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_backend_and_dtype(dtype: torch.dtype, backend: str) -> None:
    """One step of SGD is the weight less lr times the ordinary gradient, rounded once."""
    if backend not in backends(dtype) or (backend == "triton" and dtype == torch.bfloat16 and DEVICE == "cpu"):
        pytest.skip(f"{backend} does not run {dtype} here")
    for form in ("group", "linear"):
        head = Head(form, dtype)
        h, y = head.inputs(0)
        head.loss(h, y, backend=backend, reduction="sum").backward()
        assert head.weight.grad is not None
        expected = head.rows() - 0.1 * head.rows(head.weight.grad).float()
        head.weight.grad = None
        head.step(ClassSGD([head.weight], lr=0.1, block_numbers=BLOCKS), 0, backend=backend)
        tolerance = 1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(head.rows().float(), expected.float(), rtol=tolerance, atol=tolerance)


def test_stochastic_rounding_is_unbiased() -> None:
    """Each result is one of the two neighbours in bf16, and their mean is right."""
    target = torch.linspace(-1.01, 1.02, 33)[:, None].repeat(1, 4096)
    weight = nn.Parameter(torch.zeros(target.shape, dtype=torch.bfloat16))
    drive(ClassSGD([weight], lr=1.0, rounding="stochastic", block_numbers=4096 * 16), weight, -target)
    down, up = (target.view(torch.int32) & -65536).view(torch.float32), target.view(torch.int32) + 65535
    up = (up & -65536).view(torch.float32)
    result = weight.detach().float()
    assert ((result == down) | (result == up)).all()
    unit = (up - down).abs().amax(1)
    error = (result.mean(1) - target[:, 0]).abs()
    assert (error <= 4.5 * unit * 0.5 / 64).all()  # standard deviations of a mean of 4096, of half a unit at most
    assert ((result != down).any(1) | (up == down).all(1)).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, 1e-40, 3.3e38])
def test_stochastic_rounding_of_odd_numbers(value: float) -> None:
    weight = nn.Parameter(torch.zeros(64, 8, dtype=torch.bfloat16))
    gradient = torch.full((64, 8), -value)
    if value != value:  # of all NaNs the one whose bits overflow
        gradient = torch.full((64, 8), 0x7FFFFFFF, dtype=torch.int32).view(torch.float32)
    drive(ClassSGD([weight], lr=1.0, rounding="stochastic"), weight, gradient)
    result = weight.detach().float()
    if abs(value) < 1e38 and value == value:
        assert (result - value).abs().max() <= 1e-40
    elif value == 3.3e38:
        assert ((result == float("inf")) | ((result - value).abs() < value / 100)).all()
    else:
        torch.testing.assert_close(result, torch.full_like(result, value), equal_nan=True)


def test_small_steps_move_a_bf16_weight() -> None:
    """Steps below half a unit: lost by rounding to nearest, kept on average or in the compensation otherwise."""
    steps, lr = 200, 1e-4
    moved = {}
    for rounding in ("nearest", "stochastic", "kahan"):
        weight = nn.Parameter(torch.ones(256, 64, dtype=torch.bfloat16))
        update = ClassSGD([weight], lr=lr, rounding=rounding)
        for _ in range(steps):
            drive(update, weight, torch.ones(256, 64))
        moved[rounding] = 1 - weight.detach().float()
    assert not moved["nearest"].any()
    assert abs(moved["stochastic"].mean() - steps * lr) < 0.02 * steps * lr
    torch.testing.assert_close(moved["kahan"], torch.full((256, 64), steps * lr), rtol=0, atol=2**-8)


@every_case
def test_kahan_tracks_fp32(case: str) -> None:
    """Weight and compensation together hold what a run in fp32 has; rounding to nearest loses it."""
    weight = torch.randn(C, E).bfloat16()
    runs = {}
    for name, dtype in (("exact", torch.float32), ("kahan", torch.bfloat16), ("nearest", torch.bfloat16)):
        parameter = nn.Parameter(weight.to(dtype))
        cls, _, options = CASES[case]
        update = cls([parameter], **{**options, "lr": 1e-3}, rounding="kahan" if name == "kahan" else "nearest")
        for step in range(100):
            random = torch.Generator().manual_seed(step)
            drive(update, parameter, torch.randn(C, E, generator=random) * 0.1 + 0.1)
        runs[name] = parameter.detach().float()
        assert ("compensation" in update.state[parameter]) == (name == "kahan")
        if name == "kahan":
            compensation = update.state[parameter]["compensation"]
            assert compensation.dtype == torch.bfloat16
            runs["both"] = runs[name] + compensation.float()
    error = {name: (run - runs["exact"]).abs() for name, run in runs.items()}
    assert error["both"].mean() < 0.1 * error["nearest"].mean()
    assert (error["kahan"] <= runs["exact"].abs() * 2**-8 + error["both"].max()).all()


@pytest.mark.parametrize("case", ["momentum", "adamw"])
def test_momentum_in_bf16(case: str) -> None:
    head = Head("linear", torch.float32)
    other = copy.deepcopy(head)
    narrow, wide = make(case, head, state_dtype=torch.bfloat16), make(case, other)
    for step in range(5):
        head.step(narrow, step)
        other.step(wide, step)
    name = "momentum_buffer" if case == "momentum" else "exp_avg"
    assert narrow.state[head.weight][name].dtype == torch.bfloat16
    assert case == "momentum" or narrow.state[head.weight]["exp_avg_sq"].dtype == torch.float32
    assert not head.rows().equal(other.rows())
    torch.testing.assert_close(head.rows(), other.rows(), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("asked", ["h", "bias", "weight"])
def test_autograd_grad_updates_too(asked: str) -> None:
    head = Head("linear")
    update, before = make("sgd", head), head.weight.detach().clone()
    h, y = head.inputs(0)
    h.requires_grad_()
    loss = head.loss(h, y, update=update)
    torch.autograd.grad(loss, {"h": h, "bias": head.bias, "weight": head.weight}[asked], allow_unused=True)
    assert not head.weight.equal(before)
    update.step()


def test_a_scaler_refuses_to_step() -> None:
    """As docs/loss.md says; and the other parameters' step is not disturbed."""
    head = Head("linear", torch.float32)
    update, scaler = make("sgd", head), torch.amp.GradScaler(DEVICE)
    update.loss_scale = scaler.get_scale()
    scaler.scale(head.loss(*head.inputs(0), update=update)).backward()
    with pytest.raises(AssertionError, match="No inf checks"):
        scaler.step(update)
    scaler.step(torch.optim.SGD([head.bias], lr=0.1))
    scaler.update()
    update.step()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_deterministic(rounding: str) -> None:
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        head = Head("group", torch.bfloat16)
        update = make("adafactor", head, rounding=rounding, seed=seed)
        torch.manual_seed(len(results))  # is not what the rounding goes by
        for step in range(3):
            head.step(update, step)
        results.append(head.weight.detach())
    assert results[0].equal(results[1])
    assert results[0].equal(results[2]) == (rounding == "nearest")


def test_groups_and_schedulers() -> None:
    """Each group has its learning rate; a scheduler changes both, without a warning."""
    heads = [Head("group"), Head("linear")]
    others = [copy.deepcopy(head) for head in heads]

    def groups(heads: list[Head]) -> list[dict[str, Any]]:
        return [{"params": [h.weight], "lr": lr} for h, lr in zip(heads, (0.1, 0.01), strict=True)]

    update, torchs = ClassSGD(groups(heads), block_numbers=BLOCKS), torch.optim.SGD(groups(others))
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.5) for o in (update, torchs)]
    for step in range(4):
        sum(head.loss(*head.inputs(step), reduction="sum", update=update) for head in heads).backward()
        sum(head.loss(*head.inputs(step), reduction="sum") for head in others).backward()
        for optimizer, schedule in zip((update, torchs), schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        for head, other in zip(heads, others, strict=True):
            torch.testing.assert_close(head.rows(), other.rows())
    assert update.param_groups[0]["lr"] == 0.1 * 0.5**4


def test_step_with_a_closure() -> None:
    head = Head("linear")
    update = make("sgd", head)
    before = head.weight.detach().clone()

    def closure() -> Tensor:
        loss = head.loss(*head.inputs(0), update=update)
        loss.backward()
        return loss

    assert update.step(closure) > 0
    assert not head.weight.equal(before)


@pytest.mark.parametrize("form", ["group", "linear"])
def test_autocast_updates_the_parameter(form: str) -> None:
    """The gradient is that of autocast's dtype; the fp32 weight gets it."""
    head = Head(form, torch.float32)
    other = copy.deepcopy(head)
    h, y = head.inputs(0)
    update = make("sgd", head)
    with torch.autocast(DEVICE, torch.bfloat16):
        loss = head.loss(h, y, reduction="sum", update=update)
        expected = other.loss(h, y, reduction="sum")
        loss.backward()
    expected.backward()
    update.step()
    assert head.weight.grad is None
    assert other.weight.grad is not None
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(head.weight, other.weight - 0.1 * other.weight.grad, rtol=0.01, atol=0.01)
    torch.testing.assert_close(head.bias.grad, other.bias.grad, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("scale", [1024.0, torch.tensor(1024.0)], ids=["number", "tensor"])
def test_loss_scale(scale: float | Tensor) -> None:
    head = Head("linear")
    other = copy.deepcopy(head)
    update, plain = make("adamw", head), make("adamw", other)
    update.loss_scale = scale
    (1024.0 * head.loss(*head.inputs(0), update=update)).backward()
    other.loss(*other.inputs(0), update=plain).backward()
    torch.testing.assert_close(head.weight, other.weight)


def test_frozen_parts_and_evaluation() -> None:
    """Without a gradient of h or bias; under no_grad and when the loss is not used, nothing is updated."""
    head = Head("group")
    head.bias.requires_grad_(False)
    update = make("sgd", head)
    before = head.weight.detach().clone()
    h, y = head.inputs(0)
    with torch.no_grad():
        loss = head.loss(h, y, update=update)
    assert not loss.requires_grad
    unused = head.loss(h, y, update=update)
    torch.testing.assert_close(unused.detach(), loss)
    (h.clone().requires_grad_().sum() + 0 * unused.detach()).backward()
    assert head.weight.equal(before)
    unused.backward()
    assert not head.weight.equal(before)
    assert h.grad is None
    assert head.bias.grad is None


@pytest.mark.parametrize("classes", [0, 3])
def test_empty(classes: int) -> None:
    weight = nn.Parameter(torch.randn(classes, 4))
    update = ClassAdafactor([weight])
    before = weight.detach().clone()
    loss = mlhead.linear_loss(
        torch.zeros(0 if classes else 2, 4), weight, None, torch.zeros(2 - bool(classes) * 2, classes), update=update
    )
    loss.backward()
    update.step()
    torch.testing.assert_close(weight.detach(), before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's own, which it hides
def test_compiled_code_breaks_the_graph() -> None:
    head = Head("linear")
    other = copy.deepcopy(head)
    update, plain = make("sgd", head), make("sgd", other)
    whole = torch.compile(lambda h, y: head.loss(h, y, update=update), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        whole(*head.inputs(0))

    @torch.compile(backend="eager")
    def loss(h: Tensor, y: Tensor) -> Tensor:
        return head.loss(h * 2, y, update=update) + 1

    h, y = head.inputs(0)
    loss(h, y).backward()
    (other.loss(h * 2, y, update=plain) + 1).backward()
    torch.testing.assert_close(head.weight, other.weight)


PEAK = """
import sys, torch, mlhead
from mlhead._resident import resident
from mlhead import optim
torch.set_num_threads(1)
B, D = 8, 128
def step(weight, kind):
    x, y = torch.randn(B, D, dtype=weight.dtype), (torch.arange(B), torch.arange(B + 1))
    if kind == "plain":
        mlhead.linear_loss(x, weight, None, y).backward()
        return
    cls, options = {"sgd": (optim.ClassSGD, {}), "adafactor": (optim.ClassAdafactor, {"eps": (1e-15, 1e-3)})}[kind]
    update = cls([weight], rounding="stochastic", **options)
    for _ in range(2):
        mlhead.linear_loss(x, weight, None, y, update=update, backend=sys.argv[3]).backward()
        update.step()
def make(C):
    return torch.nn.Parameter(torch.empty(C, D, dtype=torch.bfloat16).normal_())
step(make(100), sys.argv[2])
weight = make(int(sys.argv[1]))
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
before = resident()[0]
step(weight, sys.argv[2])
print(resident()[1] - before)
"""


@pytest.mark.parametrize("kind", ["plain", "sgd", "adafactor"])
@pytest.mark.parametrize("backend", [name for name in ("reference", "cpp") if name in backends(torch.bfloat16)])
def test_memory(kind: str, backend: str) -> None:
    """Peak resident memory of steps beyond the weight, 51 MB: a few blocks, 4 MiB, and what the loss takes."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("needs the peak of Linux's /proc")
    grown = printed_by(PEAK, 200_000, kind, backend)
    weight = 200_000 * 128 * 2
    if kind == "plain":
        assert grown > 0.9 * weight
    else:
        # The reference's forward makes ranges of 2^19 logits with what is made of them.
        assert grown < (0.15 if backend == "cpp" else 0.35) * weight, grown


@pytest.mark.gpu
@pytest.mark.parametrize("cls", [ClassSGD, ClassAdafactor])
def test_memory_on_a_gpu(cls: Any) -> None:
    """Weights and all else within 1.15 times the weights, for a million classes."""
    before = torch.cuda.memory_allocated()  # what other tests have left, the libraries' workspaces too
    weight = nn.Parameter(torch.empty(1_000_000, 256, device="cuda", dtype=torch.bfloat16).normal_())
    update = cls([weight], rounding="stochastic")
    x, y = torch.randn(8, 256, device="cuda", dtype=torch.bfloat16), torch.arange(8, device="cuda")
    targets = (y, torch.arange(9, device="cuda"))

    def step() -> None:
        mlhead.linear_loss(x, weight, None, targets, update=update).backward()
        update.step()

    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 1.15 * weight.numel() * 2 + (32 << 20)
