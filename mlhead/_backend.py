"""Choosing a backend: "auto", or an explicit name that never falls back.

The choice is, in this order: the `backend=` argument of an op, the innermost `with backend(name):`, the environment
variable MLHEAD_BACKEND, "auto". "auto" takes the first backend that has the op, the device and the dtype and is
available, and the reference otherwise. An explicit choice that cannot be met is an error that says why.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

BACKENDS = ("reference", "triton", "cpp", "cuda")
CHOICES = ("auto", *BACKENDS)
PREFERENCE = {"cuda": ("triton", "cuda"), "cpu": ("cpp",)}


class BackendError(RuntimeError):
    """An explicitly chosen backend cannot run this call."""


@dataclass(frozen=True)
class Implementation:
    """One backend of one op: where it runs, and how to get at its launchers.

    `load` imports the backend on first use and returns an object whose `<op>` and `<op>_backward` are called.
    """

    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    load: Callable[[], Any]


def _from_environment() -> str:
    name = os.environ.get("MLHEAD_BACKEND", "auto")
    if name not in CHOICES:
        raise ValueError(f"MLHEAD_BACKEND: value must be one of {', '.join(CHOICES)}, got {name!r}")
    return name


_default = _from_environment()
_chosen: ContextVar[str] = ContextVar("mlhead_backend", default=_default)


class _Mirror:
    """The choice once more for torch.compile, which guards on an attribute but, in torch 2.11, reads no ContextVar."""

    choice = _default


_mirror = _Mirror()
_recorders: list[dict[str, str]] = []


def requested(argument: str | None = None) -> str:
    """The backend asked for: the argument if given, else the context's or the environment's."""
    if argument is None:
        return _mirror.choice if torch.compiler.is_compiling() else _chosen.get()
    if argument not in CHOICES:
        raise ValueError(f"backend: name must be one of {', '.join(CHOICES)}, got {argument!r}")
    return argument


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Runs the ops inside the `with` block on one backend.

    Args:
        name: "auto", "reference", "triton", "cpp" or "cuda". All but "auto" never fall back: a call that the
            backend cannot run raises `BackendError`.

    The choice is local to the thread or task; compiled code guards on it and takes that of whichever thread chose
    last. The backward of a call uses the backend of its forward, wherever it runs.

    Raises:
        ValueError: There is no backend of that name; on entering the block.
    """
    name, before = requested(name), _mirror.choice
    token = None if torch.compiler.is_compiling() else _chosen.set(name)
    _mirror.choice = name
    try:
        yield
    finally:
        if token is not None:
            _chosen.reset(token)
            before = _chosen.get()
        _mirror.choice = before


@contextmanager
def record_backends() -> Iterator[dict[str, str]]:
    """Yields a dictionary that fills with {op: backend that ran it} while the `with` block runs."""
    record: dict[str, str] = {}
    _recorders.append(record)
    try:
        yield record
    finally:
        _recorders[:] = [other for other in _recorders if other is not record]  # equal records are not the same


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


@cache
def unavailable(name: str) -> str | None:
    """Why a backend cannot be used here, or None when it can."""
    if name == "reference":
        return None
    if name == "triton":
        try:
            importlib.import_module("triton")
        except ImportError as error:
            return f"the package triton cannot be imported: {error}"
        if not torch.cuda.is_available() and not interpreting():
            return "no CUDA device (TRITON_INTERPRET=1 runs the kernels slowly on the CPU, for tests)"
        return None if interpreting() else _too_old()
    from . import _extension

    if name == "cpp":
        return _extension.load_cpu()
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _extension.load_cuda()


def _too_old() -> str | None:
    """Which visible GPU the Triton kernels do not fit, or None: their tiles are made for sm_80 and newer."""
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if capability < (8, 0):
            name = torch.cuda.get_device_name(index)
            return (
                f"compute capability 8.0 or newer is needed, cuda:{index} ({name}) has {'.'.join(map(str, capability))}"
            )
    return None


def _refusal(
    op: str, implementations: Mapping[str, Implementation], name: str, device: str, dtype: torch.dtype
) -> str | None:
    """Why backend `name` cannot run this call, or None when it can."""
    if name == "reference":
        return None
    implementation = implementations.get(name)
    if implementation is None:
        return f"it has no {op}"
    devices = implementation.devices
    if name == "triton" and interpreting():
        devices = ("cpu",)
    if device not in devices:
        return f"it runs on {' and '.join(devices)}, not on {device}"
    if dtype not in implementation.dtypes:
        return f"it has no {dtype}"
    return unavailable(name)


@cache
def _resolve(op: str, choice: str, device: str, dtype: torch.dtype) -> str:
    implementations = _implementations[op]
    if choice == "auto":
        for name in PREFERENCE.get(device, ()):
            if _refusal(op, implementations, name, device, dtype) is None:
                return name
        return "reference"
    reason = _refusal(op, implementations, choice, device, dtype)
    if reason is not None:
        usable = [name for name in BACKENDS if _refusal(op, implementations, name, device, dtype) is None]
        raise BackendError(
            f"{op}: backend must be one that can run {dtype} on {device} here ({', '.join(usable)}), "
            f"got {choice!r}: {reason}"
        )
    return choice


_implementations: dict[str, Mapping[str, Implementation]] = {}


def register(op: str, implementations: Mapping[str, Implementation]) -> None:
    """Makes the backends of an op known; called once by each op's module."""
    _implementations[op] = implementations


def implementations(op: str) -> Mapping[str, Implementation]:
    """The backends an op has besides the reference."""
    return _implementations[op]


def resolve(op: str, choice: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs this call of `op`; raises `BackendError` for an explicit choice that cannot be met."""
    name = _resolve(op, choice, device.type, dtype)
    for record in _recorders:
        record[op] = name
    return name
