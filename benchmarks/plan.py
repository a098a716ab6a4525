"""Which groups are measured, in which order, and at which size.

A group is one op on one workload in one dtype; its providers (backends and baselines) are timed interleaved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from mlhead import _backend
from mlhead.testing import CASES, OpCase

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp64": torch.float64}
# The most important first: where time runs out, the rest is not reached.
ORDER = ("openimages", "million", "small", "imagenet", "coco", "3-million", "coco-vit", "voc")
# Beside the workloads of the cases: the shapes that the speed on a CPU is promised for.
CPU_WORKLOADS: dict[str, dict[str, Mapping[str, Any]]] = {
    "group_fc": {"openimages-64": {"B": 64, "G": 100, "E": 768, "C": 9605}},
    "csra_pool": {
        "coco-8": {"B": 8, "L": 196, "D": 2048, "H": 6, "C": 80, "map": True},
        "openimages-4": {"B": 4, "L": 49, "D": 2048, "H": 1, "C": 9605, "map": True},
    },
    "query_attention": {"coco-16": {"B": 16, "L": 196, "E": 768, "G": 100}},
    "dropout_add_layer_norm": {"openimages-16": {"B": 16, "N": 100, "E": 768, "dropout": 0.1}},
    "relu_dropout": {"openimages-16": {"B": 16, "N": 100, "F": 2048, "dropout": 0.1}},
    "group_fc_loss": {
        "openimages-64": {"B": 64, "G": 100, "E": 768, "C": 9605, "loss": "asl", "positives": 8},
    },
    "csra_loss": {
        "coco-8": {"B": 8, "L": 196, "D": 2048, "H": 6, "C": 80, "map": True, "loss": "asl", "positives": 3},
        "openimages-4": {"B": 4, "L": 49, "D": 2048, "H": 1, "C": 9605, "map": True, "loss": "asl", "positives": 8},
    },
}
# What --quick takes on a CPU and on a GPU.
QUICK: dict[str, dict[str, tuple[str, ...]]] = {
    "group_fc": {"cpu": ("openimages-64", "small"), "cuda": ("openimages", "small")},
    "csra_pool": {"cpu": ("coco-8", "small"), "cuda": ("coco", "small")},
    "query_attention": {"cpu": ("coco-16", "small"), "cuda": ("imagenet", "small")},
    "dropout_add_layer_norm": {"cpu": ("openimages-16",), "cuda": ("imagenet",)},
    "relu_dropout": {"cpu": ("openimages-16",), "cuda": ("imagenet",)},
    "group_fc_loss": {"cpu": ("openimages-64", "small"), "cuda": ("openimages", "million")},
    "csra_loss": {"cpu": ("coco-8", "small"), "cuda": ("openimages", "small")},
}
CPU_FLOPS = {False: 32e9, True: 6e9}
CPU_ELEMENTS = 1 << 26
# What is larger is verified at fewer classes, and at its own size against plain torch.
VERIFIED_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Group:
    """One op on one workload in one dtype.

    Args:
        op: Name of the op.
        workload: Name of the workload.
        dims: The sizes that are measured.
        dtype: A name in DTYPES.
        scale: Factors by which sizes were divided to fit this machine, e.g. {"B": 8}.
    """

    op: str
    workload: str
    dims: Mapping[str, Any]
    dtype: str
    scale: Mapping[str, int] = field(default_factory=dict)

    @property
    def case(self) -> OpCase:
        """The op's case."""
        return CASES[self.op]

    def title(self) -> str:
        """One line for people."""
        dims = " ".join(f"{letter}={value}" for letter, value in self.dims.items())
        scaled = "".join(f", {letter} divided by {factor}" for letter, factor in self.scale.items())
        return f"{self.op} {self.workload} {self.dtype}  {dims}{scaled}"


def total_flops(case: OpCase, dims: Mapping[str, Any]) -> int:
    """Forward and backward."""
    return sum(case.flops(dims).values())


def elements(case: OpCase, dims: Mapping[str, Any]) -> int:
    """About how many numbers the forward reads and writes."""
    return case.bytes(dims, 1)["forward"]


def parse_dims(text: str) -> dict[str, int]:
    """Sizes from text such as "B=64,G=100"."""
    return {name: int(value) for name, value in (part.split("=") for part in text.split(","))}


def shrink(
    case: OpCase, dims: Mapping[str, Any], most_elements: int, most_flops: float | None = None
) -> tuple[dict[str, Any], dict[str, int]]:
    """Dims that fit a budget, and the factors: first fewer classes, in steps of 5, then half the images at a time."""
    dims = dict(dims)
    scale: dict[str, int] = {}
    while elements(case, dims) > most_elements and dims.get("C", 0) >= 5000 and dims["C"] % 5 == 0:
        dims["C"] //= 5
        scale["C"] = 5 * scale.get("C", 1)
    while dims["B"] > 1 and (
        elements(case, dims) > most_elements or (most_flops is not None and total_flops(case, dims) > most_flops)
    ):
        dims["B"] //= 2
        scale["B"] = 2 * scale.get("B", 1)
    return dims, scale


def has_kernels(op: str, device: str) -> bool:
    """Whether any backend but the reference runs this op on the device here."""
    return _backend.resolve(op, "auto", torch.device(device), torch.float32) != "reference"


def groups(
    device: str,
    quick: bool,
    ops: list[str] | None,
    workloads: list[str] | None,
    dtypes: list[str] | None,
    custom: Mapping[str, Any] | None,
) -> list[Group]:
    """All groups that the filters leave, the most important first."""
    found = []
    default = ("fp32",) if device == "cpu" else ("bf16",) if quick else ("bf16", "fp32", "fp16")
    for rank, op in enumerate(sorted(ops or CASES, key=lambda name: not has_kernels(name, device))):
        case = CASES[op]
        available = {**case.workloads, **(CPU_WORKLOADS.get(op, {}) if device == "cpu" else {})}
        if custom is not None:
            available = {"custom": custom}
        elif workloads:
            available = {name: dims for name, dims in available.items() if name in workloads}
        elif quick:
            available = {n: d for n, d in available.items() if n in QUICK.get(op, {}).get(device, ("coco", "small"))}
        for name, dims in available.items():
            place = ORDER.index(name) if name in ORDER else -1
            for turn, dtype in enumerate(dtypes or default):
                scale: dict[str, int] = {}
                if device == "cpu" and custom is None:
                    dims_here, scale = shrink(case, dims, CPU_ELEMENTS, CPU_FLOPS[quick])
                else:
                    dims_here = dict(dims)
                found.append(((turn, rank, place), Group(op, name, dims_here, dtype, scale)))
    return [group for _, group in sorted(found, key=lambda pair: pair[0])]
