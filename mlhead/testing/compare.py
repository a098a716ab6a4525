"""When is a result right: an error budget that is derived from plain torch's own error, never negotiated.

    max |result - oracle|  <=  2 * max |torch - oracle| + eps * max |oracle|

and, for 16-bit results of at least 256 elements, where a mean says more than a maximum,

    rms(result - oracle)  <=  1.25 * rms(torch - oracle)

The oracle is the reference in fp64 on the same (rounded) inputs, `torch` the reference in the dtype of the result and
eps the rounding unit of that dtype. An element that the oracle gives as exactly 0, such as the gradient of a class that
does not exist, must be exactly 0; infinities and NaN must stand where the oracle has them. The error of a few numbers
(a loss, five biases, the few large ones among small ones) may be 0 by luck, and on another CPU is not, so plain torch's
is there the largest of eight neighbouring inputs. For an fp64 result, plain torch and the oracle are one: there plain
torch's error is its error in fp32, scaled by the ratio of the units, and the budget holds it three times, once for the
error of the oracle itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .case import Sample

TORCH_FACTOR = 2.0
RMS_FACTOR, RMS_ELEMENTS = 1.25, 256  # a sum rounded to 16 bits after every 64 terms is 1.6 times plain torch's rms
FEW, OF_MANY = 16, 4096  # elements whose largest error is a matter of luck; among so many
ROUNDING_UNIT = {
    dtype: torch.finfo(dtype).eps for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}


@dataclass(frozen=True)
class Grade:
    """How far a result is from the oracle, and how far it may be.

    Args:
        error: max |result - oracle|.
        torch_error: max |torch - oracle|.
        budget: The most that `error` may be.
        problem: What is wrong, or None.
    """

    error: float
    torch_error: float
    budget: float
    problem: str | None


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def _rms(tensor: Tensor) -> float:
    return tensor.square().mean().sqrt().item() if tensor.numel() else 0.0


def grade(result: Tensor, oracle: Tensor, plain: Tensor) -> Grade:
    """Compares a result with the fp64 oracle, given what plain torch makes of it in the dtype of the result."""
    if result.shape != oracle.shape:
        return Grade(float("nan"), float("nan"), 0.0, f"shape {tuple(result.shape)} instead of {tuple(oracle.shape)}")
    if result.dtype != plain.dtype:
        return Grade(float("nan"), float("nan"), 0.0, f"{result.dtype} instead of {plain.dtype}")
    oracle = oracle.detach().double().cpu()
    wide, plain_wide = result.detach().double().cpu(), plain.detach().double().cpu()
    # What fp64 holds and the dtype of the result does not becomes infinite there, as in plain torch.
    finite = oracle.isfinite() & plain_wide.isfinite()
    unlike = ~((wide == plain_wide) | (wide.isnan() & plain_wide.isnan()))
    error, torch_error = _largest((wide - oracle)[finite]), _largest((plain_wide - oracle)[finite])
    budget = TORCH_FACTOR * torch_error + ROUNDING_UNIT[result.dtype] * _largest(oracle[finite])
    problem = None
    rms, torch_rms = _rms((wide - oracle)[finite]), _rms((plain_wide - oracle)[finite])
    counts = result.dtype.itemsize == 2 and result.numel() >= RMS_ELEMENTS
    if bool((~finite & unlike).any()):
        problem = f"{int((~finite & unlike).sum())} elements differ where the oracle is not finite"
    elif not error <= budget:  # NaN fails too
        problem = f"error {error:.3g} exceeds the budget {budget:.3g} (plain torch: {torch_error:.3g})"
    elif counts and rms > RMS_FACTOR * torch_rms:
        problem = f"rms error {rms:.3g} exceeds {RMS_FACTOR} times plain torch's {torch_rms:.3g}"
    elif bool(((oracle == 0) & (plain_wide == 0) & (wide != 0)).any()):
        problem = "an element that must be exactly 0 is not"
    return Grade(error, torch_error, budget, problem)


def check(name: str, result: Tensor, oracle: Tensor, plain: Tensor) -> Grade:
    """As `grade`, but raises AssertionError with the name of the tensor when there is a problem."""
    outcome = grade(result, oracle, plain)
    assert outcome.problem is None, f"{name}: {outcome.problem}"
    return outcome


def oracle(sample: Sample) -> dict[str, Tensor]:
    """The reference in fp64 on the inputs of a sample: output and gradients."""
    return sample.map(lambda t: t.double()).run("reference")


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor * factor if tensor.is_floating_point() else tensor


def _relative_error(result: Tensor, exact: Tensor) -> float:
    """The largest error over the largest number, 0 where that says nothing."""
    unit = _largest(exact)
    error = _largest(result.detach().double() - exact) / unit if unit else 0.0
    return error if math.isfinite(error) else 0.0


def _is_left_to_luck(tensor: Tensor) -> bool:
    """Whether the largest error is that of a few elements, because the others, and their errors, are small."""
    if not 0 < tensor.numel() <= OF_MANY:
        return False
    size = tensor.detach().abs().nan_to_num(0.0, 0.0)
    return int((size > size.max() / 2).sum()) <= FEW


def _with_typical_errors(sample: Sample) -> dict[str, Tensor]:
    """What plain torch makes of a sample, where the error of a few numbers is not left to luck.

    A result of at most FEW elements that are more than half its largest takes, in its largest element, the largest
    relative error of eight neighbouring samples, itself among them, whose inputs are multiplied by factors near 1.
    """
    plain = sample.run("reference")
    few = [name for name, tensor in plain.items() if _is_left_to_luck(tensor)]
    if not few:
        return plain
    exact = oracle(sample)
    worst = {name: _relative_error(plain[name], exact[name]) for name in few}
    for i in range(1, 8):
        near = sample.map(partial(_scaled, factor=1.0 - 0.003 * i))
        results, exactly = near.run("reference"), oracle(near)
        worst = {name: max(worst[name], _relative_error(results[name], exactly[name])) for name in few}
    for name in few:
        flat, right = plain[name].detach().double().flatten(), exact[name].detach().flatten()
        at = right.abs().nan_to_num(0.0, 0.0).argmax()
        if flat[at].isfinite() and (flat[at] - right[at]).abs() < worst[name] * right[at].abs():
            flat[at] = right[at] * (1 + worst[name])
        plain[name] = flat.to(plain[name].dtype).view_as(plain[name])
    return plain


def plain_torch(sample: Sample) -> dict[str, Tensor]:
    """The reference in the dtype of a sample: what `grade` takes plain torch's own error from."""
    if sample.dout.dtype != torch.float64:
        return _with_typical_errors(sample)
    narrow = sample.map(lambda t: t.float())
    # 2 * 1.5: twice plain torch's error as for any dtype, and once that of the oracle, which is no more exact here.
    ratio = 1.5 * ROUNDING_UNIT[torch.float64] / ROUNDING_UNIT[torch.float32]
    exact, exact_narrow, plain_narrow = oracle(sample), oracle(narrow), plain_torch(narrow)
    return {name: exact[name] + ratio * (plain_narrow[name].double() - exact_narrow[name]) for name in exact}
