"""Gradient fusion: against torch.optim, rounding, state, errors, memory."""

from __future__ import annotations

import copy
import io
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peak import printed_by
from torch import Tensor, nn

import mlhead
from mlhead import _backend
from mlhead.ops._loss_update import grouped
from mlhead.optim import ClassAdafactor, ClassAdamW, ClassOptimizer, ClassSGD

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # then part of what gpu-check runs


def backends(dtype: torch.dtype) -> list[str]:
    implementations = _backend.implementations("group_fc_loss")
    return [
        name
        for name in _backend.BACKENDS
        if _backend._refusal("group_fc_loss", implementations, name, DEVICE, dtype) is None
    ]


B, G, E, C = 6, 5, 12, 98
J = 20  # two classes of the last group do not exist
BLOCKS = E * 8  # 16 classes at a time, after alignment
LOSSES = {
    "bce": {"reduction": "sum"},
    "asl": {"loss": "asl", "reduction": "sum", "gamma_pos": 1.0},
    "softmax": {"loss": "softmax"},
}
Case = tuple[type[ClassOptimizer], type[torch.optim.Optimizer], dict[str, Any]]
CASES: dict[str, Case] = {
    "sgd": (ClassSGD, torch.optim.SGD, {"lr": 0.1}),
    "sgd decay": (ClassSGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "momentum": (ClassSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    "nesterov": (ClassSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adamw": (ClassAdamW, torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "adafactor": (ClassAdafactor, torch.optim.Adafactor, {"lr": 0.3, "weight_decay": 0.1, "d": 1.5}),
}
every_case = pytest.mark.parametrize("case", CASES)


class Head:
    """A head, grouped or linear, with as many blocks as the optimizer has."""

    def __init__(self, form: str, dtype: torch.dtype = torch.float64, scale: float = 0.3) -> None:
        self.form = form
        shape = (G, E, J) if form == "group" else (C, E)
        self.weight = nn.Parameter((torch.randn(shape, dtype=torch.float64) * scale).to(DEVICE, dtype))
        self.bias = nn.Parameter((torch.randn(C, dtype=torch.float64) * scale).to(DEVICE, dtype))

    def inputs(self, step: int, kind: str = "bce") -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(step)
        shape = (B, G, E) if self.form == "group" else (B, E)
        h = torch.randn(shape, dtype=torch.float64, generator=random).to(DEVICE, self.weight.dtype)
        if kind == "softmax":
            return h, torch.randint(C, (B,), generator=random).to(DEVICE)
        return h, (torch.rand(B, C, generator=random) < 0.2).to(DEVICE)

    def loss(self, h: Tensor, y: Tensor, **options: Any) -> Tensor:
        function = mlhead.group_fc_loss if self.form == "group" else mlhead.linear_loss
        return function(h, self.weight, self.bias, y, **options)

    def rows(self, weight: Tensor | None = None) -> Tensor:
        """The weight of the classes that exist, (C, E)."""
        weight = (self.weight if weight is None else weight).detach()
        return weight if self.form == "linear" else weight.transpose(1, 2).reshape(-1, E)[:C]

    def step(self, update: ClassOptimizer, step: int, kind: str = "bce", **options: Any) -> Tensor:
        h, y = self.inputs(step, kind)
        loss = self.loss(h, y, update=update, **{**LOSSES[kind], **options})
        loss.backward()
        update.step()
        return loss.detach()


def block_ranges(form: str) -> list[slice]:
    if form == "linear":
        return [slice(c, min(c + 16, C)) for c in range(0, C, 16)]
    return [slice(c, min(c + n, C)) for g in range(G) for c, n in ((g * J, 16), (g * J + 16, 4))]


class ByTorch:
    """torch.optim on the ordinary gradient; each block is a parameter of its own."""

    def __init__(self, head: Head, case: str) -> None:
        _, kind, options = CASES[case]
        self.head = head
        self.parts = [nn.Parameter(head.rows()[block].clone()) for block in block_ranges(head.form)]
        self.optimizer = kind(self.parts, foreach=False, **options)  # type: ignore[call-arg]

    def step(self, gradient: Tensor) -> Tensor:
        """The weight (C, E) after the step."""
        for part, block in zip(self.parts, block_ranges(self.head.form), strict=True):
            part.grad = self.head.rows(gradient)[block].clone()
        self.optimizer.step()
        return torch.cat([part.detach() for part in self.parts])

    def write(self, rows: Tensor) -> None:
        with torch.no_grad():
            if self.head.form == "linear":
                self.head.weight.copy_(rows)
                return
            padded = torch.cat([rows, self.head.weight.transpose(1, 2).reshape(-1, E)[C:]])
            self.head.weight.copy_(padded.view(G, J, E).transpose(1, 2))


def make(case: str, head: Head, **options: Any) -> ClassOptimizer:
    cls, _, own = CASES[case]
    return cls([head.weight], **{"block_numbers": BLOCKS, **own, **options})  # type: ignore[call-arg]


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


def drive(update: ClassOptimizer, weight: nn.Parameter, gradient: Tensor) -> None:
    """A step with a given gradient of a weight (C, D)."""
    run = update.begin_update(weight, weight.shape[0], gradient.dtype)
    for block in run.blocks:
        run.place(block).copy_(grouped(gradient)[block.groups, :, block.columns])
        run.done(block, run.place(block))
    update.step()


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


@every_case
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
def test_state_dict_resumes_bit_for_bit(case: str, rounding: str) -> None:
    """Through torch.save; torch would cast the fp32 states to the weight's bf16 as it loads them."""
    head = Head("group", torch.bfloat16)
    update = make(case, head, rounding=rounding, seed=3)
    for step in range(3):
        head.step(update, step)
    file = io.BytesIO()
    torch.save({"weight": head.weight.detach(), "optimizer": update.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = copy.deepcopy(head)
    resumed = CASES[case][0]([other.weight], lr=7.0)  # its options come with the state
    other.weight.data.copy_(saved["weight"])
    resumed.load_state_dict(saved["optimizer"])
    for name, value in update.state[head.weight].items():
        loaded = resumed.state[other.weight][name]
        if isinstance(value, Tensor):
            assert loaded.equal(value)
            assert loaded.dtype == value.dtype
            assert loaded.data_ptr() != saved["optimizer"]["state"][0][name].data_ptr()
        else:
            assert loaded == value
    for step in range(3, 6):
        assert head.step(update, step).equal(other.step(resumed, step))
    assert head.weight.equal(other.weight)
    again = copy.deepcopy(update)
    assert isinstance(again, ClassOptimizer)
    assert again.loss_scale == 1.0


def with_state(cls: Any, weight: Tensor | None = None, **options: Any) -> tuple[nn.Parameter, Any]:
    """A weight and an optimizer that has made a step."""
    parameter = nn.Parameter(torch.randn(40, 8) if weight is None else weight)
    update = cls([parameter], **options)
    C = parameter.shape[0] if parameter.ndim == 2 else parameter.shape[0] * parameter.shape[2]
    run = update.begin_update(parameter, C, parameter.dtype)
    for block in run.blocks:
        run.done(block, run.place(block).fill_(0.1))
    update.step()
    return parameter, update


def torchs_state(cls: Any, **options: Any) -> dict[str, Any]:
    parameter = nn.Parameter(torch.randn(40, 8))
    optimizer = cls([parameter], **options)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


def state_of(cls: Any, weight: Tensor | None = None, **options: Any) -> dict[str, Any]:
    return with_state(cls, weight, **options)[1].state_dict()


def changed_state(cls: Any, **changes: Any) -> dict[str, Any]:
    """Of a (40, 8) weight; what is None is left out."""
    saved = copy.deepcopy(state_of(cls))
    saved["state"][0] = {name: v for name, v in {**saved["state"][0], **changes}.items() if v is not None}
    return saved


OF_ANOTHER: dict[str, tuple[type[ClassOptimizer], Callable[[], Any], str]] = {
    "torch's AdamW": (
        ClassAdamW,
        lambda: torchs_state(torch.optim.AdamW),
        "with the options lr, betas, .* in each group, as of ClassAdamW, got a group without rounding, state_dtype",
    ),
    "torch's SGD, which has no state": (
        ClassSGD,
        lambda: torchs_state(torch.optim.SGD),
        "as of ClassSGD, got a group without rounding",
    ),
    "AdamW's": (ClassSGD, lambda: state_of(ClassAdamW), "got a group without momentum, dampening, nesterov"),
    "SGD's": (ClassAdamW, lambda: state_of(ClassSGD), "got a group without betas, eps"),
    "Adafactor's": (ClassAdamW, lambda: state_of(ClassAdafactor), "got a group without betas"),
    "two groups": (
        ClassSGD,
        lambda: ClassSGD([{"params": [nn.Parameter(torch.zeros(2, 3))]} for _ in range(2)]).state_dict(),
        r"must be of groups with \[1\] parameters, got \[1, 1\]",
    ),
    "more classes": (
        ClassSGD,
        lambda: state_of(ClassSGD, torch.zeros(41, 8)),
        r"\['state'\]\[0\]\['num_classes'\] must be 40, as of ClassSGD for a weight \(40, 8\), got 41",
    ),
    "other features": (
        ClassAdamW,
        lambda: state_of(ClassAdamW, torch.zeros(40, 9)),
        r"\['exp_avg'\] must be a floating tensor \(40, 8\), as of .*, got torch.float32 \(40, 9\)",
    ),
    "a momentum of other features": (
        ClassSGD,
        lambda: state_of(ClassSGD, torch.zeros(40, 9), momentum=0.9),
        r"\['momentum_buffer'\] must be a floating tensor \(40, 8\), .*got torch.float32 \(40, 9\)",
    ),
    "other blocks": (
        ClassAdafactor,
        lambda: changed_state(ClassAdafactor, block_numbers=8 * 16),
        r"\['col_var'\] must be a floating tensor \(3, 8\), .*got torch.float32 \(1, 8\)",
    ),
    "a state too few": (
        ClassAdamW,
        lambda: changed_state(ClassAdamW, exp_avg_sq=None),
        "must be of step, num_classes, .*, as of ClassAdamW .*, got one without exp_avg_sq",
    ),
    "a state too many": (
        ClassAdamW,
        lambda: changed_state(ClassAdamW, max_exp_avg_sq=torch.zeros(40, 8)),
        "must be of step, .*, got one with max_exp_avg_sq",
    ),
    "no number": (
        ClassSGD,
        lambda: changed_state(ClassSGD, block_numbers="many"),
        r"\['block_numbers'\] must be an integer of at least 0, got 'many'",
    ),
    "no tensor": (
        ClassSGD,
        lambda: changed_state(ClassSGD, step=3),
        r"\['step'\] must be a floating tensor \(\), .*, got int",
    ),
    "integers": (
        ClassAdamW,
        lambda: changed_state(ClassAdamW, exp_avg=torch.zeros(40, 8, dtype=torch.int64)),
        r"must be a floating tensor \(40, 8\), .*, got torch.int64 \(40, 8\)",
    ),
    "a whole checkpoint": (ClassSGD, lambda: {"model": 1}, r"with 'state' and 'param_groups', got \['model'\]"),
}


@pytest.mark.parametrize("case", OF_ANOTHER)
def test_the_state_of_another_is_refused(case: str) -> None:
    """At load_state_dict, which then has changed nothing."""
    cls, made, message = OF_ANOTHER[case]
    parameter, update = with_state(cls, lr=0.5)
    options, before = dict(update.param_groups[0]), copy.deepcopy(update.state[parameter])
    with pytest.raises(ValueError, match=f"^{cls.__name__}: state_dict.*{message}"):
        update.load_state_dict(made())
    assert update.param_groups[0] == options
    assert update.state[parameter].keys() == before.keys()
    for name, value in before.items():
        torch.testing.assert_close(update.state[parameter][name], value, rtol=0, atol=0)


def test_state_dicts_with_wrong_options_are_refused() -> None:
    _, update = with_state(ClassSGD)
    for error, options in ((ValueError, {"lr": -1.0}), (TypeError, {"seed": 0.5})):
        saved = copy.deepcopy(update.state_dict())
        saved["param_groups"][0].update(options)
        with pytest.raises(error, match=r"^ClassSGD: .* in state_dict$"):
            update.load_state_dict(saved)
    with pytest.raises(TypeError, match="ClassSGD: state_dict must be a dictionary, got list"):
        update.load_state_dict([])


def test_state_of_other_groups_is_refused() -> None:
    """Of a weight (G, E, J) that has as many classes, and of one with another C."""
    saved = state_of(ClassSGD, torch.zeros(4, 8, 10))
    for shape in ((5, 8, 10), (4, 8, 9)):
        with pytest.raises(ValueError, match=r"\['num_classes'\] must be of . groups of \d+ classes, .*, got 40"):
            ClassSGD([nn.Parameter(torch.zeros(shape))]).load_state_dict(saved)
    saved = state_of(ClassAdafactor, torch.zeros(4, 8, 10))
    with pytest.raises(ValueError, match=r"\['row_var'\] must be a floating tensor \(2, 20\)"):
        ClassAdafactor([nn.Parameter(torch.zeros(2, 8, 20))]).load_state_dict(saved)


@every_case
@pytest.mark.parametrize("classes", [C, 81, 42])
def test_states_of_any_classes_load(case: str, classes: int) -> None:
    """Also where not all groups are full, twice, into a copy, and before the first step."""
    shape, classes = ((G, E, J), classes) if classes != 42 else ((30, E, 2), 42)  # 30 groups of 2, of which 21 are used
    weight = nn.Parameter(torch.randn(shape))
    cls, _, options = CASES[case]
    update: Any = cls([weight], **{**options, "block_numbers": BLOCKS})
    fresh = copy.deepcopy(update.state_dict())
    h = torch.randn(B, shape[0], E)
    mlhead.group_fc_loss(h, weight, None, torch.zeros(B, classes), classes, update=update).backward()
    update.step()
    saved = update.state_dict()
    for other in (cls([weight]), copy.deepcopy(update)):
        for _ in range(2):
            other.load_state_dict(saved)
    update.load_state_dict(fresh)
    assert not update.state
    mlhead.group_fc_loss(h, weight, None, torch.zeros(B, classes), classes, update=update).backward()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("through_a_state_dict", [False, True])
def test_momentum_that_begins_later(nesterov: bool, through_a_state_dict: bool) -> None:
    """As torch.optim: with the next gradient as it is, whatever the dampening."""
    weight = nn.Parameter(torch.randn(40, 8))
    other = nn.Parameter(weight.detach().clone())
    update, torchs = ClassSGD([weight], lr=0.1, block_numbers=8 * 16), torch.optim.SGD([other], lr=0.1)
    later = {"momentum": 0.9, "nesterov": nesterov, "dampening": 0.0 if nesterov else 0.3}
    for step, momentum in enumerate((False, False, True, True, False, True)):
        for optimizer in (update, torchs):
            optimizer.param_groups[0].update(later if momentum else {"momentum": 0.0, "nesterov": False})
        if through_a_state_dict:
            update.load_state_dict(copy.deepcopy(update.state_dict()))
        other.grad = torch.randn(40, 8, generator=torch.Generator().manual_seed(step))
        drive(update, weight, other.grad)
        torchs.step()
        torch.testing.assert_close(weight, other)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "adafactor"])
def test_compensation_that_begins_later(kind: str) -> None:
    """A weight that was fp32 at its first step, and one whose rounding is chosen later."""
    for dtype, rounding in ((torch.float32, "kahan"), (torch.bfloat16, "nearest")):
        weight = nn.Parameter(torch.ones(40, 8, dtype=dtype))
        cls, _, options = CASES[kind]
        update: Any = cls([weight], **{**options, "lr": 1e-4}, rounding=rounding)
        drive(update, weight, torch.ones(40, 8))
        assert "compensation" not in update.state[weight]
        weight.data = torch.ones(40, 8, dtype=torch.bfloat16)
        update.param_groups[0]["rounding"] = "kahan"
        drive(update, weight, torch.ones(40, 8))
        compensation = update.state[weight]["compensation"]
        assert compensation.dtype == torch.bfloat16
        assert weight.equal(torch.ones_like(weight))
        assert (compensation < 0).all()  # a step below half a unit
        update.load_state_dict(copy.deepcopy(update.state_dict()))


def test_a_look_at_the_state_before_the_first_step() -> None:
    """Makes an empty one, as the states of torch.optim are a defaultdict."""
    head = Head("linear")
    update = make("momentum", head)
    assert not update.state[head.weight]
    update.load_state_dict(copy.deepcopy(update.state_dict()))
    head.step(update, 0)


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


def test_accumulation_is_an_error() -> None:
    head = Head("group")
    update = make("sgd", head)
    head.loss(*head.inputs(0), update=update).backward()
    with pytest.raises(RuntimeError, match=r"step\(\) must be called between two backward passes.*accumulated"):
        head.loss(*head.inputs(1), update=update).backward()
    update.step()
    head.loss(*head.inputs(1), update=update).backward()
    update.step()
    both = head.loss(*head.inputs(1), update=update) + head.loss(*head.inputs(2), update=update)
    with pytest.raises(RuntimeError, match="accumulated"):
        both.backward()


def test_a_second_backward_is_an_error() -> None:
    head = Head("group")
    update = make("sgd", head)
    h, y = head.inputs(0)
    loss = head.loss(h, y, update=update)
    loss.backward(retain_graph=True)
    update.step()
    with pytest.raises(RuntimeError, match="backward must be called once for each loss"):
        loss.backward()
    loss = head.loss(h.requires_grad_(), y, update=update)
    with pytest.raises(RuntimeError, match="without create_graph"):
        torch.autograd.grad(loss, h, create_graph=True)


def test_a_weight_changed_before_backward_is_an_error() -> None:
    head = Head("linear")
    update = make("sgd", head)
    loss = head.loss(*head.inputs(0), update=update)
    with torch.no_grad():
        head.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(RuntimeError, match=r"step\(\) must follow a backward"):  # it does not count
        update.step()


def test_step_errors() -> None:
    head = Head("linear")
    update = make("sgd", head)
    with pytest.raises(RuntimeError, match=r"ClassSGD: step\(\) must follow a backward.*got none"):
        update.step()
    (head.loss(*head.inputs(0), update=update) + head.weight.square().sum()).backward()
    with pytest.raises(RuntimeError, match="used through `update=` only"):
        update.step()
    update.zero_grad()
    update.step()


def test_call_errors() -> None:
    head, other = Head("group"), Head("group")
    h, y = head.inputs(0)
    update = make("sgd", head)
    with pytest.raises(ValueError, match=r"group_fc_loss: weight must be itself one of the parameters of `update`"):
        other.loss(h, y, update=update)
    with pytest.raises(ValueError, match=r"linear_loss: weight must be itself one of"):
        Head("linear").loss(h[:, 0], y, update=update)
    with pytest.raises(TypeError, match=r"an optimizer of mlhead\.optim \(ClassSGD, .*\), got SGD"):
        head.loss(h, y, update=torch.optim.SGD([head.weight]))
    head.step(update, 0)
    with pytest.raises(ValueError, match=f"num_classes must be {C}, as in earlier steps"):
        mlhead.group_fc_loss(h, head.weight, None, torch.zeros(B, C + 1), C + 1, update=update)
    with pytest.raises(ValueError, match=r"update must be None under torch\.func"):
        torch.func.grad(lambda h: head.loss(h, y, update=update))(h)
    shared = nn.Parameter(torch.randn(E, 1))
    with pytest.raises(ValueError, match=r"update must be None for a weight \(E, 1\)"):
        mlhead.group_fc_loss(h.float(), shared, None, torch.zeros(B, G), update=ClassSGD([shared]))
    head.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="weight must be a parameter that requires a gradient"):
        head.loss(h, y, update=update)
    weight = nn.Parameter(torch.randn(1, 7, 4))
    with pytest.raises(ValueError, match="update must be None"):
        mlhead.csra_loss(
            torch.randn(2, 3, 4),
            weight,
            None,
            torch.zeros(2, 7),
            temperatures=(1.0,),
            lam=0.1,
            update=ClassSGD([weight]),
        )


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (ClassSGD, {"lr": -1.0}, "lr must be at least 0"),
        (ClassSGD, {"momentum": -1.0}, "momentum must be at least 0"),
        (ClassSGD, {"nesterov": True}, "nesterov must be False without momentum"),
        (ClassSGD, {"rounding": "up"}, "rounding must be one of 'nearest', 'stochastic', 'kahan'"),
        (ClassSGD, {"state_dtype": torch.int8}, "state_dtype must be"),
        (ClassSGD, {"block_numbers": 0}, "block_numbers must be at least 1"),
        (ClassAdamW, {"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        (ClassAdamW, {"eps": -1.0}, "eps must be at least 0"),
        (ClassAdafactor, {"beta2_decay": 0.1}, "beta2_decay must be at most 0"),
        (ClassAdafactor, {"d": 0.5}, "d must be at least 1"),
        (ClassAdafactor, {"eps": (-1.0, 0.0)}, "eps must be two numbers"),
        (ClassAdamW, {"betas": (0.9,)}, r"betas must be a pair, got \(0.9,\)"),
        (ClassAdamW, {"betas": [0.9, 0.99, 0.999]}, "betas must be a pair"),
        (ClassAdafactor, {"eps": (None,)}, r"eps must be a pair, got \(None,\)"),
    ],
)
def test_option_errors(cls: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{cls.__name__}: {message}"):
        cls([nn.Parameter(torch.zeros(3, 4))], **options)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (ClassSGD, {"lr": "0.1"}, "lr must be a number, got str"),
        (ClassSGD, {"momentum": None}, "momentum must be a number, got NoneType"),
        (ClassAdamW, {"eps": "1e-8"}, "eps must be a number, got str"),
        (ClassAdamW, {"weight_decay": "0"}, "weight_decay must be a number, got str"),
        (ClassAdamW, {"betas": 0.9}, "betas must be a pair, got float"),
        (ClassAdamW, {"betas": (0.9, "0.99")}, "betas must be a number, got str"),
        (ClassAdafactor, {"eps": 1e-3}, "eps must be a pair, got float"),
        (ClassAdafactor, {"eps": (1e-3, None)}, "eps must be a number, got NoneType"),
        (ClassAdafactor, {"eps": ("1", 1e-3)}, "eps must be a number, got str"),
        (ClassAdafactor, {"d": "1"}, "d must be a number, got str"),
        (ClassAdafactor, {"beta2_decay": None}, "beta2_decay must be a number, got NoneType"),
        (ClassSGD, {"seed": 0.5}, "seed must be an integer, got float"),
        (ClassAdamW, {"seed": True}, "seed must be an integer, got bool"),
    ],
)
def test_options_of_a_wrong_type(cls: type, options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"{cls.__name__}: {message}"):
        cls([nn.Parameter(torch.zeros(3, 4))], **options)


def test_parameter_errors() -> None:
    with pytest.raises(ValueError, match=r"ClassSGD: params must be \(G, E, J\) or \(C, D\) each, got \(3,\)"):
        ClassSGD([nn.Parameter(torch.zeros(3))])
    half = nn.Parameter(torch.zeros(3, 4, dtype=torch.float16))
    with pytest.raises(ValueError, match="'nearest' or 'kahan' for fp16"):
        ClassSGD([half], rounding="stochastic")
    update = ClassSGD([nn.Parameter(torch.zeros(3, 4))], rounding="stochastic")
    with pytest.raises(ValueError, match="for fp16"):
        update.add_param_group({"params": [half]})
    assert len(update.param_groups) == 1


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
