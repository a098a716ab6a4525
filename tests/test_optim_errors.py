"""Gradient fusion: wrong calls, options and parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_heads import (
    DEVICE,
    B,
    C,
    E,
    G,
    Head,
    make,
)
from torch import nn

import mlhead
from mlhead.optim import ClassAdafactor, ClassAdamW, ClassSGD

pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # then part of what gpu-check runs


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
