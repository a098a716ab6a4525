"""Gradient fusion: states that are saved, loaded, refused, and begin late."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_heads import (
    BLOCKS,
    CASES,
    DEVICE,
    B,
    C,
    E,
    G,
    Head,
    J,
    drive,
    every_case,
    make,
)
from torch import Tensor, nn

import mlhead
from mlhead.optim import ClassAdafactor, ClassAdamW, ClassOptimizer, ClassSGD

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # then part of what gpu-check runs


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
