"""Timing, and the two limits of a device that results are compared with: copy bandwidth and a large GEMM."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

Function = Callable[[], object]


@dataclass(frozen=True)
class Prepared:
    """A function of something that is made afresh, outside the timing, before each call."""

    prepare: Function
    run: Callable[[Any], object]

    def __call__(self) -> object:
        return self.run(self.prepare())


@dataclass(frozen=True)
class Timing:
    """Quantiles of repeated timings in milliseconds."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    samples: int


def quantiles(samples: list[float]) -> Timing:
    """The 20, 50 and 80 per cent quantiles of at least one sample."""
    if len(samples) == 1:
        return Timing(samples[0], samples[0], samples[0], 1)
    cuts = statistics.quantiles(samples, n=10, method="inclusive")
    return Timing(cuts[1], cuts[4], cuts[7], len(samples))


@cache
def _flush_buffer() -> torch.Tensor:
    """Four times the L2 cache, at least 256 MiB: writing it takes long enough for the next launches to queue up."""
    size = max(256 << 20, 4 * torch.cuda.get_device_properties(0).L2_cache_size)
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _once_cuda(function: Function) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    prepared = function.prepare() if isinstance(function, Prepared) else None
    _flush_buffer().zero_()
    start.record()
    if isinstance(function, Prepared):
        function.run(prepared)
    else:
        function()
    end.record()
    return start, end


def _once_cpu(function: Function, inner: int) -> float:
    if isinstance(function, Prepared):
        run, prepared = function.run, [function.prepare() for _ in range(inner)]
        begin = time.perf_counter()
        while prepared:
            run(prepared.pop())
        return (time.perf_counter() - begin) * 1e3 / inner
    begin = time.perf_counter()
    for _ in range(inner):
        function()
    return (time.perf_counter() - begin) * 1e3 / inner


def _estimate_ms(function: Function, device: str) -> float:
    """A first guess, after a warm-up."""
    function()
    if device == "cuda":
        torch.cuda.synchronize()
        start, end = _once_cuda(function)
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    inner = 1
    while (t := _once_cpu(function, inner)) * inner < 1.0 and inner < 1024:
        inner *= 4
    return t


def measure(
    functions: Mapping[str, Function], device: str, seconds: float, least: int = 5, most: int = 50
) -> dict[str, Timing]:
    """Times several functions interleaved: in each round every one of them once, in a new order.

    On CUDA each call is timed by events, after the L2 cache was flushed. On the CPU a sample of a short function is
    the mean of so many calls that it lasts a millisecond, and caches are as the calls before left them.

    Args:
        functions: What to time, by name.
        device: "cuda" or "cpu".
        seconds: About how long each of them may take altogether, where the fewest samples do not take longer.
        least: The fewest samples, 3 for a function that takes seconds.
        most: The most samples.
    """
    estimates = {name: _estimate_ms(function, device) for name, function in functions.items()}
    flush_ms = 0.2 if device == "cuda" else 0.0
    # What takes seconds is known well enough after three.
    fewest = {n: least if t * least < 4e3 * seconds else min(3, least) for n, t in estimates.items()}
    counts = {
        n: max(fewest[n], min(most, int(1e3 * seconds / (max(t, 1e-3) + flush_ms)))) for n, t in estimates.items()
    }
    inner = {
        name: max(1, min(1000, round(1.0 / max(t, 1e-3)))) if device == "cpu" else 1 for name, t in estimates.items()
    }
    rounds = max(counts.values())
    order = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in functions}
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in functions}
    for turn in range(rounds):
        # A slow function takes part in fewer rounds, spread over all of them.
        due = [n for n in functions if (turn + 1) * counts[n] // rounds > turn * counts[n] // rounds]
        for name in order.sample(due, len(due)):
            if device == "cuda":
                events[name].append(_once_cuda(functions[name]))
            else:
                samples[name].append(_once_cpu(functions[name], inner[name]))
        if device == "cuda":
            torch.cuda.synchronize()
    if device == "cuda":
        samples = {name: [start.elapsed_time(end) for start, end in pairs] for name, pairs in events.items()}
    return {name: quantiles(values) for name, values in samples.items()}


@cache
def copy_bandwidth(device: str) -> float:
    """Bytes a second, read plus written, of a large copy on the device."""
    count = (2 << 30) if device == "cuda" else (256 << 20)
    source, target = (torch.empty(count, dtype=torch.int8, device=device).fill_(1) for _ in range(2))
    timing = measure({"copy": lambda: target.copy_(source)}, device, 0.5)["copy"]
    return 2 * count / (timing.p20_ms * 1e-3)


@cache
def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP a second of a large square matrix product on the device, by torch's own settings for TF32."""
    size = 8192 if device == "cuda" else 2048 if dtype == torch.float32 else 1024
    if dtype == torch.float64:
        size //= 4
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    timing = measure({"gemm": lambda: a @ b}, device, 0.5)["gemm"]
    return 2 * size**3 / (timing.p20_ms * 1e-3)


def limit_ms(flops: int, size: int, device: str, dtype: torch.dtype) -> tuple[float, str]:
    """The least time for so much arithmetic and memory traffic, and which of the two decides."""
    compute = flops / gemm_rate(device, dtype) * 1e3
    memory = size / copy_bandwidth(device) * 1e3
    return (compute, "flops") if compute > memory else (memory, "bytes")
