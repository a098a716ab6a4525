"""What a training step of class-parallel heads sends and takes in memory, measured and by the formulas; docs/scale.md.

    python -m benchmarks.scale                    measures in groups of 2 and 4 gloo processes on the CPU, appends rows
    python -m benchmarks.scale --page             writes the tables of docs/scale.md from the newest rows

Payloads are counted collective by collective. Bytes on the wire are those of the loopback interface, in a network
namespace in which nothing else is (`unshare -rn`); where that is not permitted, the rows say so. Memory is resident.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import Shard

from mlhead.heads import MLDecoder
from mlhead.memory import HeadMemory, head_memory
from mlhead.parallel import Move, step_traffic
from mlhead.parallel._traffic import PURPOSES

from . import machine
from .records import Row, append_rows, read_rows
from .scale_steps import traffic_of

PAGE = machine.ROOT / "docs" / "scale.md"
WORLDS = (2, 4)
_GAP = {"head": "gap", "dims": {"B": 256, "L": 1, "D": 4096, "C": 1001}}
_CSRA = {"head": "csra", "dims": {"B": 16, "L": 49, "D": 1024, "C": 80}}
_DECODER = {"head": "ml_decoder", "dims": {"B": 64, "L": 4, "D": 64, "C": 9605, "G": 100, "E": 256}}
_ZERO_SHOT = {"head": "zero_shot", "dims": {"B": 64, "L": 49, "D": 64, "C": 64, "G": 64, "E": 256}}
# The payload of each is megabytes, so that what gloo adds to a message does not show.
TRAFFIC: list[dict[str, Any]] = [
    {**head, "layout": layout, "loss": loss, "labels": labels}
    for head, loss, labels in ((_GAP, "softmax", 1), (_CSRA, "asl", 3), (_DECODER, "bce", 5), (_ZERO_SHOT, "asl", 3))
    for layout in ("same images", "own images")
] + [
    {"head": "gap", "layout": "own images", "loss": "bce", "dims": {"B": 64, "L": 1, "D": 512, "C": 100_001}},
    {**_DECODER, "layout": "own images", "loss": "bce", "labels": 5, "replicas": 2},
]
_WIDE = {"layout": "own images", "loss": "bce", "labels": 5}
MEMORY: list[dict[str, Any]] = [
    {**_WIDE, "head": "gap", "dims": {"B": 8, "L": 1, "D": 64, "C": 400_000}},
    {**_WIDE, "head": "gap", "dims": {"B": 8, "L": 1, "D": 64, "C": 800_000}, "dtype": "bfloat16"},
    {**_WIDE, "head": "ml_decoder", "dims": {"B": 8, "L": 4, "D": 64, "C": 400_000, "G": 100, "E": 64}},
]
# The worked example of the page.
IMAGES, LABELS, WIDTH = 64, 5, 768
CLASSES, DEVICES = (1_000_000, 10_000_000, 100_000_000), (8, 64, 256, 1024)


def why_not_own_network() -> str:
    """Why processes cannot have a network namespace of their own; "" if they can."""
    if shutil.which("unshare") is None:
        return "there is no command unshare"
    tried = subprocess.run(["unshare", "-rn", "true"], capture_output=True, text=True)
    return tried.stderr.strip()


def launch(processes: int, todo: list[tuple[str, dict[str, Any]]], own_network: bool) -> list[list[Any]]:
    """For each process what it measured: pairs of a measure of scale_steps.py and a case."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {"folder": folder, "processes": processes, "todo": todo, "own_network": own_network}
        command = [sys.executable, "-m", "benchmarks.scale_steps", json.dumps(settings)]
        if own_network:
            command = ["unshare", "-rn", *command]
        # What is freed goes back to the system at once, so that what is resident is alive.
        quick_return = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        environment = {**os.environ, **quick_return, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        ran = subprocess.run(command, cwd=machine.ROOT, env=environment, capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError(f"{processes} processes failed:\n{ran.stderr[-3000:]}")
        return [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(processes)]


def sent(counted: dict[str, int], case: dict[str, Any], processes: int) -> dict[str, float]:
    """Bytes that a process sends for counted payloads, by purpose."""
    replicas, found = case.get("replicas", 1), dict.fromkeys(PURPOSES, 0.0)
    for name, payload in counted.items():
        purpose, operation = name.split(" ")
        devices = replicas if purpose == "parameter_gradients" and replicas > 1 else processes // replicas
        found[purpose] += Move(purpose, operation, payload, devices).sent
    return found


def most(counted: list[dict[str, int]]) -> dict[str, int]:
    """The largest payload of any process; only shards of different sizes differ."""
    return {name: max(one[name] for one in counted) for name in counted[0]}


def memory_of(case: dict[str, Any], processes: int) -> HeadMemory:
    """What the formula says of the memory of a case."""
    dims = case["dims"]
    return head_memory(
        dims["C"], dims.get("E", dims["D"]), dims["B"], groups=dims.get("G", 1), devices=processes,
        own_images=case["layout"] == "own images", dtype=getattr(torch, case.get("dtype", "float32")),
    )  # fmt: skip


def measure(processes: int, own_network: bool) -> list[Row]:
    """Rows of all cases in one group of processes."""
    cases = [case for case in TRAFFIC if case.get("replicas", 1) < processes]
    todo = [("memory", case) for case in MEMORY] + [("wire" if own_network else "count", case) for case in cases]
    found = launch(processes, todo, own_network)
    about = {"kind": "scale", "processes": processes, **machine.facts("cpu")}
    about["time"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
    rows: list[Row] = []
    for i, case in enumerate(MEMORY):
        bytes_of = {"bytes": [result[i] for result in found], "formula_bytes": memory_of(case, processes).total}
        rows.append({**about, "scale": "memory", "case": case, **bytes_of})
    for i, case in enumerate(cases, len(MEMORY)):
        of_case = [result[i] if own_network else (result[i], None) for result in found]
        counted = sent(most([payloads for payloads, _ in of_case]), case, processes)
        formula = traffic_of(case, processes).sent
        row = {**about, "scale": "traffic", "case": case, "formula": formula, "counted": counted}
        rows.append({**row, "wire_bytes": of_case[0][1]})
    return rows


def newest(rows: list[Row]) -> list[Row]:
    """Of each case and number of processes the newest row, in the order of the cases."""
    found: dict[tuple[str, str, int], Row] = {}
    for row in sorted((r for r in rows if r.get("kind") == "scale"), key=lambda r: r["time"]):
        found[row["scale"], json.dumps(row["case"], sort_keys=True), row["processes"]] = row
    keys = [("traffic", case) for case in TRAFFIC] + [("memory", case) for case in MEMORY]
    wanted = [(name, json.dumps(case, sort_keys=True), world) for name, case in keys for world in WORLDS]
    return [found[key] for key in wanted if key in found]


def _sizes(case: dict[str, Any]) -> str:
    return " ".join(f"{name}={size:,}" for name, size in case["dims"].items())


def _title(case: dict[str, Any]) -> str:
    targets = "dense" if not case.get("labels") else f"{case['labels']} label{'s' * (case['labels'] > 1)}"
    axes = f", {case['replicas']} replicas" if case.get("replicas", 1) > 1 else ""
    return f"`{case['head']}` {_sizes(case)}, {case['loss']}, {targets} | {case['layout']}{axes}"


def _mb(size: float | None) -> str:
    return "not permitted" if size is None else f"{size / 1e6:.2f}"


def measured_tables(rows: list[Row]) -> str:
    """The measured part of the page, of rows as `newest` gives them."""
    if not rows:
        return "Not yet measured."
    commits = sorted({f"{row['commit']}{' (dirty)' * bool(row['dirty'])}" for row in rows})
    devices = sorted({f"{row['device']}, torch {row['versions']['torch']}" for row in rows})
    text = [f"{'; '.join(devices)}, gloo; commit {', '.join(commits)}; `python -m benchmarks.scale`.", ""]
    text += [
        "| head, loss, targets | layout | processes | formula, MB | payload, counted | wire, MB | wire / formula |"
    ]
    text += ["|---|---|---|---|---|---|---|"]
    for row in (row for row in rows if row["scale"] == "traffic"):
        same = "as the formula" if row["counted"] == row["formula"] else "**differs**"
        formula = sum(row["formula"].values())
        ratio = "-" if row["wire_bytes"] is None else f"{row['wire_bytes'] / formula:.3f}"
        text += [
            f"| {_title(row['case'])} | {row['processes']} | {_mb(formula)} | {same} "
            f"| {_mb(row['wire_bytes'])} | {ratio} |"
        ]
    text += ["", "| head, AdamW | dtype | processes | formula, MiB | resident, the most of a process | off by |"]
    text += ["|---|---|---|---|---|---|"]
    for row in (row for row in rows if row["scale"] == "memory"):
        case, resident, formula = row["case"], max(row["bytes"]), row["formula_bytes"]
        text += [
            f"| `{case['head']}` {_sizes(case)} | {case.get('dtype', 'float32')} | {row['processes']} "
            f"| {formula / 2**20:.1f} | {resident / 2**20:.1f} | {100 * (resident - formula) / formula:+.1f} % |"
        ]
    return "\n".join(text)


def worked_tables() -> str:
    """The formulas worked out for large numbers of classes and devices."""
    text = ["| C | devices | G | classes of one | memory, GiB | features, MB | their gradient | targets | all, MB |"]
    text += ["|---|---|---|---|---|---|---|---|---|"]
    for C in CLASSES:
        for N in DEVICES:
            G = N * -(-100 // N)
            with torch.device("meta"):
                head = MLDecoder(8, C, groups=G, embed_dim=WIDTH, num_heads=8, feedforward_dim=8, dtype=torch.bfloat16)
            sent = step_traffic(head, N, IMAGES, input_layouts=Shard(0), labels=LABELS * IMAGES).sent
            memory = head_memory(
                C, WIDTH, IMAGES, groups=G, dtype=torch.bfloat16, devices=N, own_images=True, device="cuda"
            )
            total = sum(sent.values())
            text += [
                f"| {C:,} | {N:,} | {G:,} | {-(-C // G) * (G // N):,} | {memory.total / 2**30:.2f} "
                f"| {sent['features'] / 1e6:.1f} | {sent['feature_gradients'] / 1e6:.1f} "
                f"| {sent['targets'] / 1e6:.3f} | {total / 1e6:.1f} |"
            ]
    return "\n".join(text)


def page(text: str, rows: list[Row]) -> str:
    """The page with its tables, which lie between comments, made anew."""
    for name, table in (("measured", measured_tables(newest(rows))), ("worked", worked_tables())):
        begin, end = f"<!-- {name}: by python -m benchmarks.scale --page -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        text = before + begin + table + end + rest.partition(end)[2]
    return text


def all_rows() -> list[Row]:
    """The rows of all result files."""
    return [
        row for path in sorted((machine.ROOT / "benchmarks" / "results").rglob("*.jsonl")) for row in read_rows(path)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measures, or writes the page."""
    cli = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.splitlines()[0])
    cli.add_argument("--processes", type=int, nargs="+", choices=WORLDS, default=list(WORLDS))
    cli.add_argument("--out", type=Path, help="results file; default: benchmarks/results/<device>/<commit>.jsonl")
    cli.add_argument("--page", action="store_true", help="write the tables of docs/scale.md, and measure nothing")
    options = cli.parse_args(arguments)
    if options.page:
        PAGE.write_text(page(PAGE.read_text(), all_rows()))
        return 0
    path, why = options.out or machine.results_file("cpu"), why_not_own_network()
    print(f"{machine.banner('cpu')}\nrows go to {path}", flush=True)
    if why:
        print(f"no bytes on the wire: {why}", flush=True)
    for processes in options.processes:
        rows = measure(processes, not why)
        append_rows(path, rows)
        print(measured_tables(rows), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
