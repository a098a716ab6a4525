"""Triton without a GPU: launches of kernels on fake tensors become compilations for a given target."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

# Capability, multiprocessors, shared memory that one program may use: A100, RTX 4090, H100, B200.
TARGETS = {
    "sm_80": (80, 108, 166_912),
    "sm_89": (89, 128, 101_376),
    "sm_90": (90, 132, 232_448),
    "sm_100": (100, 148, 232_448),
}


class _Driver:
    """Stands in for Triton's CUDA driver: a device that can be compiled for and not launched on."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        # Triton keeps its compiled kernels by device, so every target is a device of its own.
        return self._target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self._target


class _Pointer:
    """What Triton looks at in a tensor argument: its dtype, and whether its address is divisible by 16."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self._address = int(tensor.storage_offset()) * tensor.element_size()

    def data_ptr(self) -> int:
        return self._address


@contextmanager
def compiling(target: str, report: Callable[[Any, Any, dict[str, Any]], None]) -> Iterator[None]:
    """Turns the launches inside the `with` block into compilations for `target`.

    Args:
        target: A name in TARGETS.
        report: Called with the kernel function, its compiled kernel and the launch's keyword arguments.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from ..kernels import _device

    capability, multiprocessors, shared_bytes = TARGETS[target]
    facts = _device.Device(capability, multiprocessors, shared_bytes)
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        args = tuple(_Pointer(a) if isinstance(a, Tensor) else a for a in args)
        pointers = {name: _Pointer(a) if isinstance(a, Tensor) else a for name, a in kwargs.items()}
        kernel = run(self, *args, grid=grid, warmup=True, **pointers)
        report(self, kernel, kwargs)
        return kernel

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(capability)))
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        stack.enter_context(mock.patch.object(_device, "_query", return_value=facts))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", return_value=0))
        yield
