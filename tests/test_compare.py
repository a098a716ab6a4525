"""The comparison itself: it accepts what plain torch makes and rejects planted errors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from op_matrix import CASES, OpCase
from torch import Tensor

from mlhead.testing import Sample, check, grade, oracle, plain_torch

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _column_dropped(t: Tensor) -> Tensor:
    t[..., -1] = 0
    return t


def _row_repeated(t: Tensor) -> Tensor:
    t[-1] = t[0]
    return t


def _neighbours_swapped(t: Tensor) -> Tensor:
    return torch.cat([t[..., 1:2], t[..., 0:1], t[..., 2:]], -1)


def _one_nan(t: Tensor) -> Tensor:
    t.view(-1)[t.numel() // 2] = float("nan")
    return t


def _one_element_off(t: Tensor) -> Tensor:
    t.view(-1)[t.numel() // 3] += 0.05 * t.abs().max()
    return t


PLANTED: dict[str, Callable[[Tensor], Tensor]] = {
    "last column left out": _column_dropped,
    "last row is the first": _row_repeated,
    "two columns swapped": _neighbours_swapped,
    "one NaN": _one_nan,
    "one element off by 5 %": _one_element_off,
    "scaled by 1.05": lambda t: t * 1.05,
    "shifted by one row": lambda t: t.roll(1, 0),
    "a constant added": lambda t: t + 0.05 * t.abs().max(),
    "sign": lambda t: -t,
    "one row too many": lambda t: torch.cat([t, t[:1]]),
    "wrong dtype": lambda t: t.double(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_planted_errors_are_rejected(case: OpCase, dtype: torch.dtype) -> None:
    sample = case.make(case.shapes[-1], dtype, "cpu", 0)
    plain, exact = sample.run("reference"), oracle(sample)
    for name, result in plain.items():
        check(name, result, exact[name], result)
        for what, plant in PLANTED.items():
            if result.ndim == 0 and ("row" in what or "column" in what):
                continue  # a loss is one number
            if result.ndim and result.shape[0] < 2 and "row" in what and "too many" not in what:
                continue  # one row cannot be exchanged with another
            problem = grade(plant(result.clone()), exact[name], result).problem
            assert problem is not None, f"{case.name} {name}: '{what}' was accepted"


def test_lower_precision_accumulation_is_rejected() -> None:
    """A sum of many fp16 products accumulated in fp16, as a kernel with the wrong accumulator would do it."""
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(4096, generator=generator).half()
    b = torch.rand(4096, generator=generator).half()
    exact = (a.double() * b.double()).sum()[None]
    plain = (a.float() * b.float()).sum().half()[None]
    running = torch.zeros((), dtype=torch.float16)
    for product in a * b:
        running = running + product
    assert grade(plain, exact, plain).problem is None
    assert grade(running[None], exact, plain).problem is not None


@pytest.mark.parametrize("every", [16, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_partial_sum_kept_in_16_bits_is_rejected(dtype: torch.dtype, every: int) -> None:
    """A kernel that rounds its accumulator after every k tile, on the dims of a real model."""
    case = CASES["group_fc"]
    sample = case.make({**case.model, "bias": False}, dtype, "cpu", 0)
    h, weight = sample.tensors["h"], sample.tensors["weight"]
    assert h is not None
    assert weight is not None
    running = torch.zeros(h.shape[0], h.shape[1], weight.shape[2], dtype=dtype)
    for e in range(0, h.shape[2], every):
        part = torch.einsum("bge,gej->bgj", h[..., e : e + every].float(), weight[:, e : e + every].float())
        running = (running.float() + part).to(dtype)
    exact, plain = oracle(sample)["out"], sample.run("reference")["out"]
    assert grade(plain, exact, plain).problem is None
    assert grade(running.flatten(1)[:, : exact.shape[1]], exact, plain).problem is not None


def test_the_error_of_a_few_numbers_is_typical(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss has the largest relative error of eight samples, of which none is computed twice."""
    case = CASES["group_fc_loss"]
    sample = case.make(case.shapes[4], torch.float32, "cpu", 0)
    runs, real = [], Sample.run

    def counted(self: Sample, backend: str | None = None) -> dict[str, Tensor]:
        runs.append((self.dout.dtype, float(self.dout)))
        return real(self, backend)

    monkeypatch.setattr(Sample, "run", counted)
    plain = plain_torch(sample)
    assert len(runs) == 16
    errors = []
    for i in range(8):
        near = sample.map(lambda t, factor=1.0 - 0.003 * i: t * factor)
        exact = real(near.map(lambda t: t.double()), "reference")["out"]
        errors.append(float((real(near, "reference")["out"].double() - exact).abs() / exact.abs()))
    exact = oracle(sample)["out"]
    found = float((plain["out"].double() - exact).abs() / exact.abs())
    # Written as an fp32 number, half a unit of rounding off.
    assert abs(found - max(errors)) <= torch.finfo(torch.float32).eps / 2


def test_structural_zeros_must_be_exact() -> None:
    exact = torch.tensor([1.0, 0.0])
    assert grade(torch.tensor([1.0, 1e-9]), exact, exact).problem == "an element that must be exactly 0 is not"
    assert grade(torch.tensor([1.0, 0.0]), exact, exact).problem is None


def test_infinities_must_match() -> None:
    exact = torch.tensor([1.0, 1e300], dtype=torch.float64)
    plain = exact.float()
    assert grade(plain.clone(), exact, plain).problem is None
    assert grade(torch.tensor([1.0, 3.4e38]), exact, plain).problem is not None
