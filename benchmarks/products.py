"""csra_pool's training step against the matrix products it is made of, and nothing else.

    python -m benchmarks.products                                         both sizes, each some seconds
    python -m benchmarks.products --size coco-8 --seconds-each 20

Forward and backward of `csra_pool` need the scores twice, dx and dweight: four products, or three where the scores are
so few that they are kept. torch's own four products of the same matrices, into memory that is there already, are timed
in turns with the op. They pool nothing and normalise nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mlhead.testing import CASES

from . import limits, machine
from .plan import CPU_WORKLOADS

SIZES = CPU_WORKLOADS["csra_pool"]


def step(dims: Mapping[str, Any], dtype: torch.dtype, device: str) -> Callable[[], Any]:
    """Forward and backward of the op at one size, with normalised classifiers."""
    sample = CASES["csra_pool"].make(dims, dtype, device, 0)
    return sample.run


def products(dims: Mapping[str, Any], dtype: torch.dtype, device: str) -> Callable[[], Any]:
    """The four products: scores, scores, dx, dweight."""
    rows, columns, D = dims["B"] * dims["L"], dims["H"] * dims["C"], dims["D"]
    x, weight = torch.randn(rows, D, dtype=dtype, device=device), torch.randn(columns, D, dtype=dtype, device=device)
    scores, dx, dweight = x.new_empty(rows, columns), torch.empty_like(x), torch.empty_like(weight)

    def run() -> None:
        for _ in range(2):
            torch.mm(x, weight.T, out=scores)
        torch.mm(scores, weight, out=dx)
        torch.mm(scores.T, x, out=dweight)

    return run


def main(arguments: list[str] | None = None) -> int:
    """Times and prints."""
    cli = argparse.ArgumentParser(prog="python -m benchmarks.products", description=__doc__.splitlines()[0])
    cli.add_argument("--size", choices=SIZES, action="append", help="more than once for several; default: all")
    cli.add_argument("--seconds-each", type=float, default=8.0)
    options = cli.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    print(machine.banner(device))
    for size in options.size or SIZES:
        dims = SIZES[size]
        functions = {"csra_pool": step(dims, dtype, device), "products": products(dims, dtype, device)}
        times = limits.measure(functions, device, options.seconds_each, most=200)
        op, four = times["csra_pool"].p50_ms, times["products"].p50_ms
        print(f"{size}: csra_pool {op:.1f} ms, its four products {four:.1f} ms, ratio {op / four:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
