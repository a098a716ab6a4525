"""Argument checks, all with one message form.

csra_pool: weight must be (H, C, D) = (1, 80, 2048), got (1, 80, 1024)
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, numbers.Real)


def fail(where: str, argument: str, must: str, got: Any, error: type[Exception] = ValueError) -> NoReturn:
    """Raises `error` saying that `argument` of `where` must be `must` and what it was instead."""
    raise error(f"{where}: {argument} must be {must}, got {got}")


def check_tensor(where: str, argument: str, value: Any) -> None:
    """A tensor of a floating dtype."""
    if not isinstance(value, Tensor):
        fail(where, argument, "a torch.Tensor", type(value).__name__, TypeError)
    if not value.is_floating_point():
        fail(where, argument, "of a floating dtype", value.dtype, TypeError)


def check_real(where: str, argument: str, value: Any) -> None:
    """A tensor of any dtype that is not complex."""
    if not isinstance(value, Tensor):
        fail(where, argument, "a torch.Tensor", type(value).__name__, TypeError)
    if value.is_complex():
        fail(where, argument, "real", value.dtype, TypeError)


def check_ndim(where: str, argument: str, tensor: Tensor, letters: str) -> None:
    """As many axes as `letters`, e.g. "(B, G, E)", names."""
    if tensor.ndim != letters.count(",") + (0 if letters.endswith(",)") else 1):
        fail(where, argument, letters, tuple(tensor.shape))


def check_shape(where: str, argument: str, tensor: Tensor, letters: str, sizes: Sequence[int]) -> None:
    """Exactly the shape `sizes`, whose axes are called `letters`."""
    if tensor.ndim != len(sizes) or any(got != want for got, want in zip(tensor.shape, sizes, strict=True)):
        fail(where, argument, f"{letters} = {tuple(sizes)}", tuple(tensor.shape))


def check_like(where: str, argument: str, tensor: Tensor, other_argument: str, other: Tensor) -> None:
    """The dtype and the device of `other`."""
    if tensor.dtype != other.dtype:
        fail(where, argument, f"{other.dtype} like {other_argument}", tensor.dtype, TypeError)
    if tensor.device != other.device:
        fail(where, argument, f"on {other.device} like {other_argument}", tensor.device)


def check_choice(where: str, argument: str, value: Any, choices: Sequence[str]) -> None:
    """One of `choices`."""
    if value not in choices:
        fail(where, argument, f"one of {', '.join(map(repr, choices))}", repr(value))


def check_positive(where: str, argument: str, value: Any, least: int = 1) -> None:
    """An integer of at least 1, or of another least value."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        fail(where, argument, "an integer", type(value).__name__, TypeError)
    if value < least:
        fail(where, argument, f"at least {least}", value)


def check_number(where: str, argument: str, value: Any) -> None:
    """A real number, or a tensor of one."""
    if not isinstance(value, _NUMBERS) and not (isinstance(value, Tensor) and value.ndim == 0):
        fail(where, argument, "a number", type(value).__name__, TypeError)


def check_pair(where: str, argument: str, value: Any) -> None:
    """A tuple or list of two."""
    if not isinstance(value, (tuple, list)):
        fail(where, argument, "a pair", type(value).__name__, TypeError)
    if len(value) != 2:
        fail(where, argument, "a pair", value)


def check_probability(where: str, argument: str, value: float) -> None:
    """A number in [0, 1)."""
    check_number(where, argument, value)
    if not 0.0 <= value < 1.0:
        fail(where, argument, "in [0, 1)", value)


def as_classes(where: str, classes: Any) -> Tensor:
    """Class indices as a tensor of integers; an empty list has no dtype of its own."""
    indices = torch.as_tensor(classes)
    if indices.numel() == 0 and not isinstance(classes, Tensor):
        indices = indices.long()
    if indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        fail(where, "classes", "integers", indices.dtype, TypeError)
    return indices
