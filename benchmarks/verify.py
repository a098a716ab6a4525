"""Verification before timing: every provider against the fp64 oracle, by the budget of mlhead.testing.compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from mlhead.testing import Sample, grade, oracle, plain_torch

Provider = Callable[..., Tensor]


@dataclass
class Verdict:
    """What became of one provider.

    Args:
        status: "ok", "wrong", "failed" or "out of memory".
        message: What is wrong, or "".
        errors: For each result its error, the budget and plain torch's own error, all divided by the largest element.
    """

    status: str
    message: str = ""
    errors: dict[str, dict[str, float]] = field(default_factory=dict)


def calls(sample: Sample, function: Provider) -> Sample:
    """The sample with another function in place of the op."""

    def call(*, backend: str | None = None, **arguments: Any) -> Tensor:
        return function(**arguments)

    return replace(sample, function=call)


def attempt(function: Callable[[], Any]) -> tuple[Any, Verdict]:
    """What the function gives, or why it gives nothing."""
    try:
        return function(), Verdict("ok")
    except torch.OutOfMemoryError as error:
        return None, Verdict("out of memory", str(error).splitlines()[0])
    except Exception as error:  # a baseline may refuse a shape in any way it likes
        lines = str(error).strip().splitlines() or [""]
        return None, Verdict("failed", f"{type(error).__name__}: {lines[0][:200]}")


# A baseline may round more than mlhead's backends may (torch.compile's softmax does, up to three times as much): its
# error stands in its rows, and it is timed as long as it computes the same thing.
BASELINE_BUDGETS = 16


def verify(sample: Sample, providers: dict[str, Provider]) -> dict[str, Verdict]:
    """Compares the output and all gradients of every provider with the oracle."""
    exact, plain = oracle(sample), plain_torch(sample)
    verdicts = {}
    for name, function in providers.items():
        results, verdict = attempt(lambda function=function: calls(sample, function).run())  # type: ignore[misc]
        for key in exact if results is not None else ():
            outcome = grade(results[key], exact[key], plain[key])
            largest = exact[key].abs().max().item() if exact[key].numel() else 0.0
            scale = largest or 1.0
            verdict.errors[key] = {
                "error": outcome.error / scale,
                "budget": outcome.budget / scale,
                "torch": outcome.torch_error / scale,
            }
            lenient = not name.startswith("mlhead: ") and outcome.error <= BASELINE_BUDGETS * outcome.budget
            if outcome.problem is not None and not lenient and verdict.status == "ok":
                verdict.status, verdict.message = "wrong", f"{key}: {outcome.problem}"
        verdicts[name] = verdict
    return verdicts


def agree(sample: Sample, providers: dict[str, Provider], first: str) -> dict[str, str]:
    """Where the full size is too large for an oracle: which providers differ from the first at a million places.

    Both are right to their budgets at a smaller size, so their difference, by its norm, may not exceed some units of
    rounding (5 have been seen in sums over 12,544 positions); a wrong offset shows as a difference of the order of 1.
    """
    expected: dict[str, tuple[Tensor, Tensor]] = {}
    problems = {}
    generator = torch.Generator(sample.dout.device).manual_seed(0)
    for name in (first, *(n for n in providers if n != first)):
        results, verdict = attempt(lambda name=name: calls(sample, providers[name]).run())  # type: ignore[misc]
        if results is None:
            problems[name] = f"{verdict.status}: {verdict.message}"
            continue
        for key, value in results.items():
            flat = value.reshape(-1)
            if key not in expected:
                places = torch.randint(flat.numel(), (1 << 20,), generator=generator, device=flat.device)
                expected[key] = places, flat[places].double()
                continue
            places, reference = expected[key]
            difference = (flat[places].double() - reference).norm() / reference.norm()
            if not difference <= 32 * torch.finfo(value.dtype).eps:
                problems[name] = f"{key}: differs from {first} at the full size, by {difference:.3g} of the norm"
        del results
    return problems
