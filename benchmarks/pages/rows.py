"""Which rows of the result files count, by which device, and what the plan still lacks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlhead.testing import CASES

from .. import end_to_end, head, overhead_heads, plan
from ..records import Row, read_rows

# Device classes that are named as not yet measured even where no row of theirs is there.
GPU_CLASSES = ("NVIDIA A100", "NVIDIA H100", "NVIDIA H200", "NVIDIA B200")
DTYPE_ORDER = ("bf16", "fp32", "fp16", "fp64")
# What rows of each kind hold; rows of other kinds are counted and not shown.
ENTRIES = {
    "op": ("op", "workload", "title", "dims", "dtype", "provider", "pass", "status", "limit_ms"),
    "table": ("table", "backbone", "head", "classes", "multiply_adds_e9"),
    "memory": ("memory", "dims", "loss", "provider", "peak_mib", "seconds"),
    "head": ("head", "workload", "dims", "dtype", "provider", "pass", "status"),
    "overhead": (
        "subject", "subject_is", "workload", "dims", "dtype", "provider", "mode", "pass", "status", "wall_us",
        "host_us", "thread_us", "includes_work",
    ),
    "end_to_end": (
        "backbone", "classes", "image_size", "batch", "dtype", "head_name", "variant", "pass", "status", "p50_ms",
        "backbone_ms", "share", "resolved",
    ),
    "tune": ("site", "workload", "dims", "dtype", "pass", "written", "shipped", "status", "p20_ms", "p50_ms", "p80_ms"),
}  # fmt: skip
# What the rows of one model have in common, end to end.
MODEL = ("backbone", "classes", "image_size", "batch", "dtype")
# Rows of these say it themselves.
NAMED = ("overhead", "end_to_end", "tune")
PROVIDER_ORDER = ("mlhead", "papers", "torch", "compile")


def read_all(folder: Path) -> list[Row]:
    """The rows of all result files under a folder, the oldest first."""
    paths = sorted(folder.rglob("*.jsonl"), key=lambda path: path.relative_to(folder).as_posix())
    rows = [row for path in paths for row in read_rows(path) if isinstance(row, dict)]
    return sorted(rows, key=lambda row: row.get("time", ""))


def kind_of(row: Row) -> str:
    """What a row is about, a key of ENTRIES, or "" for what this page does not know."""
    kind = row.get("kind", "baseline")
    kinds = [kind] if kind in NAMED else [name for name in ENTRIES if name not in NAMED]
    if kind not in (*NAMED, "mlhead", "baseline"):
        return ""
    common = ("time", "device", "commit")
    return next((one for one in kinds if all(name in row for name in (*ENTRIES[one], *common))), "")


def device_of(row: Row) -> str:
    """The device's name; of a CPU with the number of threads."""
    return f"{row['device']}, {row['threads']} threads" if "threads" in row else str(row["device"])


def is_gpu(row: Row) -> bool:
    """Whether a row was measured on a GPU."""
    return "threads" not in row


def version_of(row: Row) -> str:
    """The commit as the page prints it."""
    return f"`{row['commit']}`" + " (dirty)" * bool(row.get("dirty"))


def run_of(row: Row) -> tuple[Any, ...]:
    """Equal where rows come from one run. Older rows do not say which: the limits are measured anew in each."""
    if "run" in row:
        return (row["run"],)
    names = ("commit", "dirty", "copy_gbps", "gemm_tflops", "backbone_ms")
    return tuple(json.dumps(row.get(name)) for name in names)


def _key(row: Row) -> tuple[Any, ...]:
    kind = kind_of(row)
    dims = json.dumps(row.get("dims"), sort_keys=True)
    about: tuple[Any, ...] = {
        "op": (row.get("op"), row.get("workload"), dims if row.get("workload") == "custom" else "", row.get("dtype")),
        "head": (row.get("head"), row.get("workload"), row.get("dtype")),
        # A row with FLOPs alone does not replace one with speeds.
        "table": (row.get("backbone"), row.get("head"), row.get("classes"), row.get("training") is None),
        "memory": (row.get("memory"), dims, row.get("loss")),
        "overhead": (row.get("subject"), row.get("workload"), row.get("dtype"), row.get("mode")),
        "end_to_end": tuple(row.get(name) for name in (*MODEL, "head_name", "variant")),
        "tune": (row.get("site"), row.get("workload"), dims, row.get("dtype"), row.get("written")),
    }[kind]
    return (device_of(row), kind, *about, row.get("provider"), row.get("pass"))


def newest(rows: Iterable[Row]) -> list[Row]:
    """The newest row of each device, op, workload, dtype, provider and pass; rows come the oldest first."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if kind_of(row):
            found[_key(row)] = row
    return list(found.values())


def provider_rank(name: str) -> tuple[int, str]:
    """The order of providers: mlhead, the papers', plain torch, torch.compile."""
    family = re.split(r"[ :,]", name)[0]
    return (PROVIDER_ORDER.index(family) if family in PROVIDER_ORDER else len(PROVIDER_ORDER), name)


def _workload_rank(row: Row) -> tuple[Any, ...]:
    dims, name = row["dims"], row["workload"]
    return (dims.get("C", dims.get("G", dims.get("N", 0))), dims.get("B", 0), name, row.get("title", ""))


def by_dtype(dtype: str) -> tuple[int, str]:
    """The order of dtypes."""
    return (DTYPE_ORDER.index(dtype) if dtype in DTYPE_ORDER else len(DTYPE_ORDER), dtype)


def in_order(rows: list[Row]) -> list[Row]:
    """Rows of one op, or of whole heads, by dtype, workload, provider and pass."""
    passes = ("training", "inference", "forward", "backward", "both")
    return sorted(
        rows,
        key=lambda row: (
            by_dtype(row["dtype"]),
            _workload_rank(row),
            passes.index(row["pass"]) if kind_of(row) == "head" else 0,
            provider_rank(row["provider"]),
            passes.index(row["pass"]),
        ),
    )


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by the values of these entries, in the order in which they first appear."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(json.dumps(row.get(n)) if n == "dims" else row.get(n) for n in names), []).append(row)
    return found


def timed(row: Row) -> bool:
    """Whether a row has a time that counts."""
    return row.get("status") == "ok" and row.get("p50_ms") is not None


def median(values: list[float]) -> float:
    """The median; the upper of the two in the middle, as where the rows are made."""
    return sorted(values)[len(values) // 2]


def _lacking(device: str, have: set[tuple[str, str, str]], heads: set[str]) -> dict[str, list[str]]:
    wanted: dict[str, dict[str, list[str]]] = {}
    for group in plan.groups(device, False, None, None, None, None):
        dtypes = wanted.setdefault(f"`{group.op}`", {}).setdefault(group.workload, [])
        if (group.op, group.workload, group.dtype) not in have:
            dtypes.append(group.dtype)
    text: dict[str, list[str]] = {}
    for op, workloads in wanted.items():
        parts: dict[tuple[str, ...], list[str]] = {}
        for name in sorted(workloads, key=lambda n: (plan.ORDER.index(n) if n in plan.ORDER else -1, n)):
            if workloads[name]:
                parts.setdefault(tuple(sorted(workloads[name], key=by_dtype)), []).append(name)
        if parts:
            line = "; ".join(f"{', '.join(names)} ({', '.join(dtypes)})" for dtypes, names in parts.items())
            text.setdefault(line, []).append(op)
    rest = [name for name in head.DEFAULT[device] if name not in heads]
    if rest:
        text[", ".join(rest)] = ["the whole head"]
    return text


def _lacking_calls(rows: list[Row]) -> list[str]:
    called = {(r["subject_is"], r["subject"]) for r in rows if kind_of(r) == "overhead" and r["status"] == "ok"}
    wanted = [("op", name) for name in CASES] + [("head", name) for name in overhead_heads.HEADS]
    rest = [f"{'head ' * (what == 'head')}`{name}`" for what, name in wanted if (what, name) not in called]
    lines = [f"* overhead of a call: {', '.join(rest) if called else 'all ops and heads'}"] if rest else []
    models = {(r["backbone"], r["classes"]) for r in rows if kind_of(r) == "end_to_end" and timed(r)}
    parts: dict[str, list[str]] = {}
    for name in end_to_end.BACKBONES:
        classes = [f"{count:,}" for count in end_to_end.CLASSES if (name, count) not in models]
        if classes:
            parts.setdefault(" and ".join(classes), []).append(name)
    text = "; ".join(f"{', '.join(names)} ({classes} classes)" for classes, names in parts.items())
    return lines + ([f"* a whole model, end to end: {text}"] if text else [])


def missing(rows: list[Row]) -> dict[str, list[str]]:
    """What the plan names and no row has: lines, with the devices that they are true of.

    The classes of GPUs are there in any case, CPUs where they have rows.
    """
    devices = {name: ("cuda", [r for r in rows if is_gpu(r) and name in device_of(r)]) for name in GPU_CLASSES}
    for row in rows:
        if not any(is_gpu(row) and name in device_of(row) for name in GPU_CLASSES):
            devices.setdefault(device_of(row), ("cuda" if is_gpu(row) else "cpu", []))[1].append(row)
    found: dict[str, list[str]] = {}
    for name, (device, mine) in devices.items():
        have = {(r["op"], r["workload"], r["dtype"]) for r in mine if kind_of(r) == "op"}
        text = _lacking(device, have, {r["workload"] for r in mine if kind_of(r) == "head"})
        lines = [f"* {', '.join(sorted(ops, key=lambda op: op.strip('`')))}: {line}" for line, ops in text.items()]
        if not any(kind_of(r) == "table" and r.get("training") for r in mine):
            lines.append("* the speeds of Table 9")
        if device == "cpu" and not any(kind_of(r) == "memory" for r in mine):
            lines.append("* memory of the loss in the head")
        lines += _lacking_calls(mine)
        if lines:
            found.setdefault("\n".join(sorted(lines)), []).append(name)
    return found
