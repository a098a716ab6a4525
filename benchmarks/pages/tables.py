"""Rows of one device as Markdown tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from ..records import Row
from .rows import (
    device_of,
    grouped,
    in_order,
    is_gpu,
    median,
    provider_rank,
    timed,
    version_of,
)

PASSES = ("forward", "backward", "both")
# Columns that hold no numbers.
TEXT = {"provider", "pass", "commit", "quantity", "plain PyTorch", "mlhead", "mode", "head", "shape", "best candidate"}


def number(value: float | None) -> str:
    """Three figures; "-" for what is not there."""
    if value is None:
        return "-"
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2 if value >= 0.9995 else 3
    return f"{value:,.{digits}f}" if value >= 0.0995 else f"{value:#.3g}"


def percent(value: float | None) -> str:
    """A fraction."""
    return "-" if value is None else f"{100 * value:.0f} %"


def table(heads: list[str], lines: list[list[str]]) -> list[str]:
    """A Markdown table whose first column is text; a column that holds "-" only is left out."""
    kept = [i for i in range(len(heads)) if i == 0 or any(line[i] != "-" for line in lines)]
    body = [[line[i].replace("|", "\\|") for i in kept] for line in lines]
    left = [i == 0 or heads[i] in TEXT for i in kept]
    return [
        "| " + " | ".join(heads[i] for i in kept) + " |",
        "|" + "|".join("---" if text else "---:" for text in left) + "|",
        *("| " + " | ".join(line) + " |" for line in body),
        "",
    ]


def _spread(rows: list[Row], name: str) -> str:
    values = [row[name] for row in rows if row.get(name)]
    return " to ".join(dict.fromkeys((number(min(values)), number(max(values)))))


def provenance(rows: list[Row]) -> list[str]:
    """Device, driver, versions and commit of a table's rows, a line for each that differs."""
    lines = []
    stamped = [{**row, "stamp": json.dumps(row.get("versions"), sort_keys=True)} for row in rows]
    stamped.sort(key=lambda row: row["time"])
    for same in grouped(stamped, "device", "driver", "commit", "dirty", "stamp").values():
        first = same[0]
        names = {"python": "Python", "triton": "Triton", "cuda": "CUDA"}
        about = [device_of(first)]
        about += [f"driver {first['driver']}"] if first.get("driver") else []
        about += [f"{names.get(k, k)} {v}" for k, v in first.get("versions", {}).items() if v]
        days = dict.fromkeys((first["time"][:10], same[-1]["time"][:10]))
        text = f"{', '.join(about)}; commit {version_of(first)}, {' to '.join(days)}"
        if any(row.get("copy_gbps") for row in same):
            text += f"; copies {_spread(same, 'copy_gbps')} GB/s"
        for (dtype,), mine in sorted(grouped(same, "dtype").items(), key=str):
            if any(row.get("gemm_tflops") for row in mine):
                text += f"; large {dtype} products {_spread(mine, 'gemm_tflops')} TFLOP/s"
        lines.append(f"* {text}")
    return [*lines, ""]


def commit_column(rows: list[Row]) -> Callable[[list[Row]], str]:
    """What the column of commits says; nothing where all rows are of one."""
    if len({version_of(row) for row in rows}) < 2:
        return lambda mine: "-"
    return lambda mine: ", ".join(sorted({version_of(row) for row in mine}))


def sizes_of(dims: dict) -> str:
    """Dimensions on one line."""
    return " ".join(f"{name}={value}" for name, value in dims.items())


def message_of(row: Row) -> str:
    """The first line of what went wrong, without folders of the machine."""
    lines = str(row.get("message") or "").strip().splitlines()
    text = re.sub(r"(?<![\w.])(/[\w.+-]+){2,}/", "", lines[0] if lines else "no message")
    return text[:160].replace("`", "'")


def _workload_lines(groups: list[list[Row]]) -> list[str]:
    lines = []
    for group in groups:
        last = max(group, key=lambda row: row["time"])
        text = f"* `{last['workload']}` {sizes_of(last['dims'])}"
        if last.get("scale"):
            divided = " and ".join(f"{name} divided by {factor}" for name, factor in last["scale"].items())
            text += f"; **not the whole workload: {divided}**"
        verified = last.get("verified_at") or last["dims"]
        changed = {name: value for name, value in verified.items() if last["dims"].get(name) != value}
        if changed:
            text += f"; verified at {sizes_of(changed)}"
        limits = {row["pass"]: row for row in sorted(group, key=lambda row: row["time"])}
        stated = [f"{name} {number(limits[name]['limit_ms'])}" for name in PASSES if name in limits]
        by = limits.get("both", last)["limit_by"]
        lines.append(f"{text}; limit {', '.join(stated)} ms ({'FLOPs' if by == 'flops' else by})")
    return [*lines, ""]


def op_section(op: str, rows: list[Row]) -> list[str]:
    """The table of one op on one device; rows are the newest."""
    rows = in_order(rows)
    text = [f"### {op}", "", *provenance(rows)]
    commits = commit_column(rows)
    for (dtype,), of_dtype in grouped(rows, "dtype").items():
        groups = list(grouped(of_dtype, "title").values())
        lines, notes = [], []
        for group in groups:
            # The backward of a loss in the head is not the others': it only hands over what the forward has made.
            best = PASSES[::2] if op.endswith("_loss") else PASSES
            least = {p: min((r["p50_ms"] for r in group if r["pass"] == p and timed(r)), default=None) for p in best}
            for (provider,), mine in grouped(group, "provider").items():
                done = {row["pass"]: row for row in mine if timed(row)}
                failed = next((row for row in mine if row["status"] != "ok"), None)
                cells = []
                for key in PASSES:
                    cell = number(done[key]["p50_ms"]) if key in done else failed["status"] if failed else "-"
                    cells.append(f"**{cell}**" if key in done and done[key]["p50_ms"] == least.get(key) else cell)
                if failed:
                    notes.append(f"* `{failed['workload']}`, {provider}: {failed['status']}: `{message_of(failed)}`")
                both = done.get("both", {})
                errors = both.get("errors", {}).values()
                worst = max(errors, key=lambda e: e["error"] / (e["budget"] or 1.0), default=None)
                name = provider + " \\*" * any(row.get("auto") for row in mine)
                lines.append(
                    [
                        f"`{mine[0]['workload']}`", name, *cells, percent(both.get("fraction")),
                        number(both.get("peak_mib")),
                        f"{worst['error']:.1e}/{worst['budget']:.1e}" if worst else "-", commits(mine),
                    ]
                )  # fmt: skip
        text += [f"{dtype}. Sizes:", "", *_workload_lines(groups)]
        heads = ["workload", "provider", "forward ms", "backward ms", "both ms", "of the limit", "peak MiB"]
        text += table([*heads, "error/budget", "commit"], lines)
        if notes:
            text += [*dict.fromkeys(notes), ""]
        if all(row.get("peak_mib") is None for row in of_dtype):
            text += ["Peak memory: not yet measured.", ""]
    return text


def head_section(rows: list[Row]) -> list[str]:
    """Features in, logits out."""
    rows = in_order(rows)
    lines, commits = [], commit_column(rows)
    for group in grouped(rows, "workload", "dtype", "pass").values():
        own = next((row["p50_ms"] for row in group if row["provider"] == "mlhead" and timed(row)), None)
        alike = [row for row in group if "shared query dropout" not in row["provider"]]
        least = min((row["p50_ms"] for row in alike if timed(row)), default=None)
        for row in group:
            time = number(row["p50_ms"]) if timed(row) else row["status"]
            errors = ", ".join(f"{key} {value:.1e}" for key, value in row.get("errors", {}).items())
            lines.append(
                [
                    f"`{row['workload']}` {row['dtype']}", row["pass"], row["provider"],
                    f"**{time}**" if row in alike and timed(row) and row["p50_ms"] == least else time,
                    f"{number(row['p20_ms'])} to {number(row['p80_ms'])}" if timed(row) else "-",
                    percent(row.get("fraction")),
                    f"{row['p50_ms'] / own:.2f}" if timed(row) and own else "-", errors or "-", commits([row]),
                ]
            )  # fmt: skip
    sizes = {row["workload"]: row["dims"] for row in rows}
    heads = [
        "workload",
        "pass",
        "provider",
        "p50 ms",
        "p20 to p80",
        "of the limit",
        "times mlhead's",
        "differs from papers'",
    ]
    return [
        "### The whole ML-Decoder head",
        "",
        *provenance(rows),
        "Sizes: "
        + "; ".join(f"`{name}` {sizes_of(dims)}" for name, dims in sizes.items())
        + ". The limit is the head's",
        "matrix products alone at the rate of a large one. Training is forward and backward with dropout. Shared query",
        "dropout draws one mask of the queries for the whole batch: another computation, left out of comparisons.",
        "",
        *table([*heads, "commit"], lines),
    ]


def table9_section(rows: list[Row]) -> list[str]:
    """ML-Decoder's Table 9; FLOPs come from the newest row, speeds from the newest that has some."""
    shown, commits = [], commit_column(rows)
    for (classes, head), mine in grouped(rows, "classes", "head").items():
        fast = max((row for row in mine if row.get("training")), key=lambda row: row["time"], default={})
        shown.append((classes, head, max(mine, key=lambda row: row["time"]), fast, mine))
    shown.sort(key=lambda entry: (entry[0], entry[1]))
    gap = {classes: fast for classes, head, _, fast, _ in shown if head == "gap"}

    def lost(classes: int, fast: Row, key: str) -> str:
        base = gap.get(classes, {}).get(key)
        return f"{100 * (1 - fast[key] / base):.1f} %" if base and fast.get(key) else "-"

    lines = [
        [
            f"{classes:,}", head, f"{last['multiply_adds_e9']:.2f}",
            "-" if last["paper_multiply_adds_e9"] is None else f"{last['paper_multiply_adds_e9']}",
            number(fast.get("training")), lost(classes, fast, "training"),
            number(fast.get("inference")), lost(classes, fast, "inference"),
            str(fast.get("batch") or "-"), str(fast.get("largest_batch") or "-"), commits(mine),
        ]
        for classes, head, last, fast, mine in shown
    ]  # fmt: skip
    heads = [
        "classes",
        "provider",
        "1e9 multiply-adds",
        "paper",
        "training images/s",
        "below GAP",
        "inference images/s",
    ]
    return [
        "### ML-Decoder's Table 9",
        "",
        *provenance(rows),
        ", ".join(sorted({row["backbone"] for row in rows}))
        + ": multiply-adds of one image by torch's counter, and speeds",
        'with each head. "-" is not yet measured; "below GAP" is negative where the head was the faster.',
        "Each head ran by itself at 80 % of its largest batch."
        if is_gpu(rows[0])
        else "At a CPU's small batch only the ratios of speeds mean something.",
        "",
        *table([*heads, "below GAP", "batch", "largest batch", "commit"], lines),
    ]


def memory_section(rows: list[Row]) -> list[str]:
    """The loss in the head: memory of a training step beyond weight and gradient."""
    commits = commit_column(rows)
    rows = sorted(
        rows, key=lambda r: (r["dims"]["classes"], json.dumps(r["dims"]), r["loss"], provider_rank(r["provider"]))
    )
    lines = [
        [
            f"`{row['memory']}` {row['loss']} {sizes_of(row['dims'])}", row["provider"], number(row["peak_mib"]),
            number(median(row["seconds"])) if row["seconds"] else "-", str(len(row["seconds"])), commits([row]),
        ]
        for row in rows
    ]  # fmt: skip
    parts = {" and ".join(f"{name} by {n}" for name, n in (row.get("scale") or {}).items()) for row in rows}
    divided = [f"Of the sizes of `million` divided: {'; '.join(sorted(parts - {''}))}."] if parts - {""} else []
    return [
        "### Memory of the loss in the head",
        "",
        *provenance(rows),
        "What a training step adds to resident memory beyond inputs, weight and its gradient; median of the steps.",
        *divided,
        "",
        *table(["what", "provider", "MiB", "s a step", "steps", "commit"], lines),
    ]
