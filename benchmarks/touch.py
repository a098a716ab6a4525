"""Runs every CUDA kernel once or twice on small inputs and checks the results: what compute-sanitizer watches.

python -m benchmarks.touch [--device cuda] [--list]
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator

import torch

from mlhead import SparseTargets, _backend
from mlhead.testing import CASES, OpCase, grade, oracle, plain_torch


def touched(device: str) -> Iterator[tuple[OpCase, str, torch.dtype, dict]]:
    """(case, backend, dtype, dims) of every call: the three largest test shapes of each op and backend."""
    for case in CASES.values():
        for backend, implementation in _backend.implementations(case.name).items():
            if device in implementation.devices:
                for dims in sorted(case.shapes, key=lambda dims: case.bytes(dims, 1)["forward"])[-3:]:
                    for dtype in (torch.float32, torch.float16):
                        yield case, backend, dtype, dict(dims)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a result is wrong or a backend is not there."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.touch", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--list", action="store_true", help="print the calls and make none")
    options = parser.parse_args(arguments)
    bad = 0
    for case, backend, dtype, dims in touched(options.device):
        title = f"{case.name} {backend} {str(dtype).removeprefix('torch.')} {dims}"
        if options.list:
            print(title)
            continue
        # Inputs and comparison stay on the CPU, so that only the kernels in question run on the GPU.
        sample = case.make(dims, dtype, "cpu", 0)
        exact, plain = oracle(sample), plain_torch(sample)
        try:
            moved = sample.map(lambda t: t.to(options.device))
            others = {
                name: value.to(options.device) if isinstance(value, (torch.Tensor, SparseTargets)) else value
                for name, value in sample.options.items()
            }
            results = dataclasses.replace(moved, options=others).run(backend)
            problems = {name: grade(value.cpu(), exact[name], plain[name]).problem for name, value in results.items()}
            wrong = "; ".join(f"{name}: {problem}" for name, problem in problems.items() if problem)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        bad += bool(wrong)
        print(f"{title}: {wrong or 'right'}", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
