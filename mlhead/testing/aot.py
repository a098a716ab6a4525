"""Ahead-of-time compilation of every Triton kernel through its real launcher, without a GPU.

    python -m mlhead.testing.aot                      the representative set, as a table; exit status 1 on a problem
    python -m mlhead.testing.aot --full --json out    all workloads, shapes, layouts and dtypes, rows also as JSON

The public op is called on fake CUDA tensors of the case's dims while the facts of the device are those of a target and
every launch is turned into a compilation, so what is compiled is exactly what that GPU would run: the launch
configuration, and Triton's specialisation on strides of 1 and on divisibility by 16. Equal compilations are one row.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ..ops import _csra_chunks, _fused
from .case import Dims, OpCase, Sample
from .offline import TARGETS, compiling
from .sass import Binary, read_binary

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# Bytes of stack that are no problem. ptxas prefers a spill or two to losing a program per multiprocessor; on the
# consumer chip, which only has to fit, that is left to it.
STACK = {"sm_89": 16}
LOSS = "class_loss"
Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One way in which an op is called; `all_needs` also takes each gradient by itself and drops optional tensors."""

    name: str
    dims: Dims
    dtype: str
    layout: str = "given"
    all_needs: bool = True


def variants(case: OpCase, full: bool) -> Iterator[Variant]:
    """All variants of a case, or as many as stand for the rest: each workload, the dtypes, the layouts, ragged dims."""
    ragged = sorted(case.shapes, key=lambda dims: case.bytes(dims, 1)["forward"])
    layouts = ("transposed", "offset", "expanded")
    if full:
        for name, dims in (*case.workloads.items(), ("model", case.model), *((_name(d), d) for d in ragged)):
            for dtype in DTYPES:
                yield Variant(name, dims, dtype)
                if name == "model" or name in case.workloads:
                    yield from (Variant(f"{name} {layout}", dims, dtype, layout, False) for layout in layouts)
        return
    largest = max(case.workloads, key=lambda name: case.bytes(case.workloads[name], 1)["forward"])
    for name, dims in case.workloads.items():
        yield Variant(name, dims, "bf16", all_needs=name == largest)
    yield Variant(largest, case.workloads[largest], "fp32", all_needs=False)
    # Element by element, the largest tiles need the most registers.
    yield Variant(f"{largest} offset", case.workloads[largest], "bf16", "offset", False)
    yield Variant(f"{largest} transposed", case.workloads[largest], "fp32", "transposed", False)
    yield Variant("model expanded", case.model, "tf32", "expanded", False)
    for dims in (*ragged[-2:], *(d for d in ragged if d["B"] == 1)):  # an argument of 1 is a constant to Triton
        yield Variant(_name(dims), dims, "fp16", all_needs=False)


def _name(dims: Dims) -> str:
    return ",".join(f"{letter}={value}" for letter, value in dims.items())


@contextmanager
def _straight_to_triton(variant: Variant) -> Iterator[None]:
    """Makes every op call its Triton launchers: the forward, then the backward."""

    def launch(self: _fused.FusedOp, *inputs: Any, backend: str | None) -> Any:
        launchers = self._implementations["triton"].load()
        outputs = getattr(launchers, self.name)(*inputs)
        first, extras = outputs if isinstance(outputs, Tensor) else outputs[0], self.extras(outputs)
        dout = _laid_out(first, variant.layout)
        present = [inputs[i] is not None for i in self.differentiable]
        needs = [present]
        if variant.all_needs:
            needs += [[i == j and p for j, p in enumerate(present)] for i in range(len(present))]
        for need in needs:
            if any(need):
                getattr(launchers, self.name + "_backward")(dout, *inputs, *extras, need)
        return outputs

    with (
        mock.patch.object(_fused.FusedOp, "__call__", launch),
        # The vendor's products are not compiled here, and torch 2.11 has no fake form of one that adds in fp32.
        mock.patch.object(_csra_chunks, "add_product", return_value=None),
    ):
        yield


@contextmanager
def _tf32(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def _laid_out(tensor: Tensor, layout: str) -> Tensor:
    """A fake CUDA tensor of the same shape: as it is, transposed in memory, one element off, or expanded."""
    options: dict[str, Any] = {"dtype": tensor.dtype, "device": "cuda:0"}
    if layout == "expanded":
        return torch.empty((1,) * tensor.ndim, **options).expand(tensor.shape)
    if layout == "transposed" and tensor.ndim > 1:
        return torch.empty(tensor.transpose(-1, -2).shape, **options).transpose(-1, -2)
    if layout == "offset":
        return torch.empty(tensor.numel() + 1, **options)[1:].view(tensor.shape)
    return torch.empty_strided(tensor.shape, tensor.stride(), **options)


def _allows_16_bytes(tensor: Tensor) -> bool:
    """Whether every row of a tensor is contiguous, starts at a multiple of 16 elements and is as many long."""
    *others, inner = tensor.stride()
    return (
        tensor.shape[-1] > 1
        and inner == 1
        and all(n % 16 == 0 for n in (*others, tensor.shape[-1], tensor.storage_offset()))
    )


def _widest(arguments: dict[str, Any], threads: int) -> bool:
    """Whether a launch should load 16 bytes at a time: all matrices allow it, and each thread has that much to load."""
    matrices = [a for a in arguments.values() if isinstance(a, Tensor) and a.ndim > 1]
    blocks = sorted(v for n, v in arguments.items() if n.startswith("BLOCK_"))
    if not matrices or len(blocks) < 2 or not all(_allows_16_bytes(m) for m in matrices):
        return False
    return blocks[0] * blocks[1] * min(m.element_size() for m in matrices) >= 16 * threads


def _samples(case: OpCase, variant: Variant) -> Iterator[Sample]:
    """The sample on a fake CUDA device, then without its optional tensors.

    To be iterated over under a FakeTensorMode, so that nothing is allocated.
    """
    layout = "given" if variant.layout == "expanded" else variant.layout
    sample = case.make(variant.dims, DTYPES[variant.dtype], "cpu", 0).map(lambda t: _laid_out(t, layout))
    options = {n: _laid_out(v, "given") if isinstance(v, Tensor) else v for n, v in sample.options.items()}
    yield replace(sample, options=options)
    parameters = inspect.signature(case.function).parameters
    optional = [n for n, t in sample.tensors.items() if t is not None and parameters[n].default is None]
    if optional and variant.all_needs:
        yield replace(sample, options=options, tensors={**sample.tensors, **dict.fromkeys(optional)})


def loss_launches(full: bool) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Name, dtype and call of the losses' launchers, which stand behind no op of their own.

    To be iterated over, and each called, under a FakeTensorMode.
    """
    from ..kernels import class_loss

    def call(place: tuple[int, ...], dtype: torch.dtype, loss: str, kind: str, rest: bool) -> None:
        g, b, n, first, classes, num_classes = place

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda:0")

        z = empty(b, g, n, dtype=dtype).transpose(0, 1)
        bias = empty(num_classes, dtype=dtype) if rest else None
        data: Any
        if kind == "sparse":
            data = (empty(64 * b, dtype=torch.int64), empty(b + 1, dtype=torch.int64), empty(64 * b) if rest else None)
        else:
            data = (empty(b, num_classes, dtype=torch.int8 if kind == "int8" else torch.float32), None, None)
        weight, sample = (empty(num_classes), empty(b)) if rest else (None, None)
        at = (z, bias, first, classes, num_classes, *data, weight)
        statistics, row_loss = (empty(b, 4), None) if loss == "softmax" else (None, empty(b))
        if statistics is not None:
            class_loss.softmax_statistics(*at, 0.1, statistics)
        gammas = (4.0, 1.0) if loss == "asl" else (0.0, 0.0)
        class_loss.gradient(
            *at, weight if loss == "bce" else None, sample, loss, *gammas, 0.05, 1e-8, not rest, 0.1, 1e-6,
            empty() if rest else None, row_loss, statistics, True,
        )  # fmt: skip
        class_loss.scale(z, empty())

    # g, b, n, first, group_classes, num_classes: what the engine makes of the heads' workloads.
    places = {
        "voc": (20, 64, 1, 0, 1, 20),
        "coco": (1, 64, 80, 0, 80, 80),
        "openimages": (100, 128, 97, 0, 97, 9605),
        "a million": (1, 64, 16384, 32768, 16384, 1_000_000),
        "class 1": (1, 1, 1, 1, 1, 2),
        "groups of many": (100, 32, 2048, 2048, 10_000, 1_000_000),
    }
    several = ("a million",)  # without `full` it has every form, the others the usual one
    for name, place in places.items():
        for dtype in ("bf16", *(("fp32",) if full or name in several else ()), *(("fp16",) if full else ())):
            for loss in ("bce", "asl", "softmax"):
                for kind in ("sparse", *(("int8",) if full or name in several else ()), *(("fp32",) if full else ())):
                    for rest in (False, True) if full or name in several else (True,):
                        yield name, dtype, partial(call, place, DTYPES[dtype], loss, kind, rest)


def problems(binary: Binary, target: str, widest: bool) -> list[str]:
    """What is wrong with a compiled kernel; `widest` says that all its matrices allow 16-byte access."""
    found = []
    if max(binary.stack, binary.local, binary.spills) > STACK.get(target, 0):
        found.append(f"stack {binary.stack} B, local {binary.local} B, {binary.spills} spill instructions")
    if binary.shared > TARGETS[target][2]:
        found.append(f"{binary.shared} B of shared memory, the device has {TARGETS[target][2]}")
    expected = binary.expected_matrix_instruction(TARGETS[target][0])
    if expected and not any(name in binary.matrix for name in expected):
        found.append(f"no {' or '.join(expected)}, but {binary.matrix or 'no matrix instruction'}")
    if widest and binary.matrix_loads() and binary.narrow_share() > 0.25:
        found.append(f"16-byte loads are possible, {binary.narrow_share():.0%} of the bytes come in narrower ones")
    return found


_NARROW = re.compile(r"arith\.muli [^:]*_stride[^:]* : (?:i32|tensor<[0-9x]+xi32>)")


def narrow_strides(ttir: str) -> list[str]:
    """Products with a stride in 32 bits, which a large tensor would overflow."""
    return [f"a stride is multiplied in 32 bits: {line[0]}" for line in _NARROW.finditer(ttir)]


def survey(target: str, names: list[str], full: bool = False) -> list[Row]:
    """One row for each different compilation of the kernels of the named cases for one target."""
    from .cases import CASES

    rows: dict[str, Row] = {}
    current: dict[str, str] = {}

    def report(function: Any, kernel: Any, arguments: dict[str, Any]) -> None:
        row = rows.get(kernel.hash)
        if row is not None:
            if current["at"] not in row["at"]:
                row["at"].append(current["at"])
            return
        binary = read_binary(kernel)
        # The losses load logits so, but targets of a byte, and one number at a time in the search for entries.
        widest = current["op"] != LOSS and _widest(arguments, 32 * kernel.metadata.num_warps)
        constants = {n: v for n, v in arguments.items() if n.isupper() and not isinstance(v, Tensor)}
        rows[kernel.hash] = {
            "op": current["op"],
            "kernel": function.__name__,
            "target": target,
            "dtype": current["dtype"],
            "at": [current["at"]],
            "config": constants,
            "warps": kernel.metadata.num_warps,
            "stages": kernel.metadata.num_stages,
            "widest": widest,
            "tensor_memory": getattr(kernel.metadata, "tmem_size", 0),
            **binary.as_row(),
            "problems": problems(binary, target, widest) + narrow_strides(kernel.asm["ttir"]),
        }

    for name in names:
        if name == LOSS:
            with FakeTensorMode(), compiling(target, report):
                for at, dtype, launch in loss_launches(full):
                    current.update(op=name, at=at, dtype=dtype)
                    launch()
            continue
        case = CASES[name]
        for variant in variants(case, full):
            current.update(op=name, at=variant.name, dtype=variant.dtype)
            with (
                _tf32(variant.dtype == "tf32"),
                FakeTensorMode(),
                compiling(target, report),
                _straight_to_triton(variant),
            ):
                for sample in _samples(case, variant):
                    sample.call()
    return list(rows.values())


def names_with_kernels() -> list[str]:
    """The cases whose op has a Triton backend, and the losses that several ops share."""
    from .. import _backend
    from .cases import CASES

    own = [name for name in CASES if "triton" in _backend.implementations(name) and not name.endswith("_loss")]
    return [*own, LOSS]


def table(rows: list[Row]) -> str:
    """The rows as text, one line each."""
    head = ("kernel", "target", "dtype", "tile", "warps", "regs", "stack", "shared", "matrix", "loads", "stores", "at")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        tile = " ".join(f"{n.removeprefix('BLOCK_')}{v}" for n, v in row["config"].items() if n.startswith("BLOCK_"))
        counts = [" ".join(f"{n}:{c}" for n, c in row[key].items()) for key in ("matrix", "loads", "stores")]
        at = row["at"][0] + (f" (+{len(row['at']) - 1})" if len(row["at"]) > 1 else "")
        warps = f"{row['warps']}x{row['stages']}"
        facts = (str(row[key]) for key in ("registers", "stack", "shared"))
        lines.append((row["kernel"], row["target"], row["dtype"], tile, warps, *facts, *counts, at))
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(v.ljust(w) for v, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    bad = [
        f"{r['kernel']} {r['target']} {r['dtype']} {r['at'][0]}: {'; '.join(r['problems'])}"
        for r in rows
        if r["problems"]
    ]
    return "\n".join([*text, "", f"{len(rows)} compilations, {len(bad)} with a problem", *bad])


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the number of the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mlhead.testing.aot", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--target", action="append", choices=TARGETS, help="default: all; without --full not the consumer chip"
    )
    parser.add_argument("--op", action="append", choices=names_with_kernels(), help="default: all that have kernels")
    parser.add_argument("--full", action="store_true", help="all dtypes and layouts of all shapes")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="processes")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: its kernels cannot be compiled")
    targets = options.target or [name for name in TARGETS if options.full or name not in STACK]
    names = options.op or names_with_kernels()
    tasks = [(target, name) for name in names for target in targets]
    if options.jobs == 1:
        parts = [survey(target, [name], options.full) for target, name in tasks]
    else:
        with ProcessPoolExecutor(min(options.jobs, len(tasks)), mp_context=get_context("spawn")) as pool:
            futures = [pool.submit(survey, target, [name], options.full) for target, name in tasks]
            parts = [future.result() for future in futures]
    rows = [row for part in parts for row in part]
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))
    return int(any(row["problems"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
