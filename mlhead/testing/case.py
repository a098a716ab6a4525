"""What an OpCase is: the inputs, shapes, workloads, bytes and FLOPs of one op."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

Dims = Mapping[str, Any]
Counts = dict[str, int]


@dataclass(frozen=True)
class Sample:
    """The inputs of one call.

    Args:
        function: The public op.
        tensors: The differentiable inputs by name; None where an optional one is left out.
        options: The other arguments.
        dout: A random upstream gradient of the shape of the output.
    """

    function: Callable[..., Tensor]
    tensors: dict[str, Tensor | None]
    options: dict[str, Any]
    dout: Tensor

    def call(self, backend: str | None = None) -> Tensor:
        """The output of the op."""
        return self.function(**self.tensors, **self.options, backend=backend)

    def map(self, convert: Callable[[Tensor], Tensor]) -> Sample:
        """The sample with its tensors and its upstream gradient converted."""
        tensors = {name: None if t is None else convert(t) for name, t in self.tensors.items()}
        return replace(self, tensors=tensors, dout=convert(self.dout))

    def leaves(self) -> Sample:
        """The sample with inputs that require a gradient; layouts are kept, values are shared."""
        tensors = {n: None if t is None else t.detach().requires_grad_() for n, t in self.tensors.items()}
        return replace(self, tensors=tensors)

    def gradients(self, output: Tensor, **options: Any) -> dict[str, Tensor]:
        """The gradients of the tensors that require one, for the upstream gradient `dout`."""
        names = [name for name, t in self.tensors.items() if t is not None and t.requires_grad]
        grads = torch.autograd.grad(output, [self.tensors[n] for n in names], self.dout, **options)  # type: ignore[arg-type]
        return dict(zip(names, grads, strict=True))

    def run(self, backend: str | None = None) -> dict[str, Tensor]:
        """The output, under the name "out", and all gradients."""
        sample = self.leaves()
        out = sample.call(backend)
        return {"out": out.detach(), **sample.gradients(out)}


@dataclass(frozen=True)
class OpCase:
    """Everything that tests and benchmarks need to know about an op.

    Args:
        name: Name of the op.
        function: The public op.
        make: (dims, dtype, device, seed) -> Sample.
        shapes: Small dims for tests: 0, 1, primes, powers of two and their neighbours.
        model: Dims of one real model at a small batch.
        workloads: Dims of the named workloads.
        flops: dims -> {"forward": n, "backward": n}, counting a multiply-add as two.
        bytes: (dims, element bytes) -> the same for device memory, every input read and output written once.
    """

    name: str
    function: Callable[..., Tensor]
    make: Callable[[Dims, torch.dtype, str, int], Sample]
    shapes: tuple[Dims, ...]
    model: Dims
    workloads: Mapping[str, Dims]
    flops: Callable[[Dims], Counts]
    bytes: Callable[[Dims, int], Counts]


class Draw:
    """Random tensors from one seeded generator, the same values for every dtype and device up to rounding."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int) -> None:
        self._dtype, self._device = dtype, device
        # Large tensors are drawn where they live; the values of small ones do not depend on the device.
        self._cpu = torch.Generator().manual_seed(seed)
        self._local = torch.Generator(device).manual_seed(seed) if device != "cpu" else self._cpu

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        large = math.prod(shape) > 1 << 22
        generator, device = (self._local, self._device) if large else (self._cpu, "cpu")
        dtype = self._dtype if large else torch.float64
        return (
            torch.randn(shape, generator=generator, device=device, dtype=dtype)
            .mul_(scale)
            .to(self._device, self._dtype)
        )


def rows(names: str, *values: tuple[Any, ...]) -> tuple[dict[str, Any], ...]:
    """Dims from a header "B C" and one tuple of values per row."""
    return tuple(dict(zip(names.split(), row, strict=True)) for row in values)


def workloads(names: str, dims: str, *values: tuple[Any, ...]) -> dict[str, Dims]:
    """Named dims: the names in one string, then as `rows`."""
    return dict(zip(names.split(), rows(dims, *values), strict=True))
