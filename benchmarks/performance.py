"""Writes docs/performance.md and its pictures from the rows under benchmarks/results/, and from nothing else.

    python -m benchmarks.performance            writes
    python -m benchmarks.performance --check    writes nothing; exit status 1 if the page is not what the rows give

The same rows give the same bytes of Markdown. Pictures need matplotlib; the page and its check do not.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from mlhead.testing import CASES

from . import plot
from .machine import ROOT
from .pages.device import device_sections
from .pages.losses import contests, losses
from .pages.rows import (
    by_dtype,
    device_of,
    in_order,
    is_gpu,
    kind_of,
    median,
    missing,
    newest,
    provider_rank,
    read_all,
    timed,
    version_of,
)
from .records import Row
from .verify import BASELINE_BUDGETS

INTRODUCTION = f"""\
<!-- Written by `python -m benchmarks.performance` from the rows under benchmarks/results/. Do not edit. -->
# Performance

Every number here comes from a row under `benchmarks/results/`, of which the newest of each device, op, workload, dtype,
provider and pass counts. `python -m benchmarks.performance` writes this page; nothing on
it is modelled. A difference of a few percent may be noise.

* Times are medians of a run in which the providers took turns. "Both" is forward and backward together; the fastest of
  each workload is bold. Share of the limit, peak memory and error belong to "both".
* The limit is the larger of FLOPs over the rate of a large matrix product and bytes over copy bandwidth, both measured
  in the same run. Machines are not equally fast at all hours: compare times within a run.
* Peak MiB is what a call takes beyond what was there before it. The error is that against fp64, of the tensor that
  is worst against its budget. A backend of mlhead over its budget is "wrong" and has no time, a baseline over
  {BASELINE_BUDGETS} times the budget.
* \\* is what `backend="auto"` takes. A loss in the head makes its gradients in its forward, if they are asked for: its
  backward alone only hands them over.
* "papers" is the published formulation, "torch" the same result in plain PyTorch, "compile" `torch.compile` of these.
* Caches are flushed before each call on a GPU, and not on a CPU. On a CPU large workloads are divided by the factors
  that the sizes state.
"""

Picture = tuple[str, str, Callable[[Path], None]]  # file name, caption, how it is drawn


def _one_dtype(rows: list[Row]) -> list[Row]:
    first = min((row["dtype"] for row in rows), key=by_dtype, default=None)
    return [row for row in rows if row["dtype"] == first]


def _step_panels(memory: list[Row], value: Callable[[Row], float]) -> dict[str, plot.Panel]:
    """A value of training steps with the loss in the head against the number of classes, a panel for each loss."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for row in memory:
        dims = row["dims"]
        sizes = f"B={dims['batch']}, G={dims['groups']}, E={dims['width']}"
        panel = panels.setdefault(f"{row['memory']}, fp32, a training step, {row['loss']}, {sizes}", {})
        panel.setdefault(f"C={dims['classes']:,}", {})[row["provider"]] = value(row)
    return dict(panels)


def _step_ms(row: Row) -> float:
    return 1e3 * median(row["seconds"]) / row["dims"]["batch"]


def _op_pictures(
    slug: str, device: str, ops: dict[str, list[Row]], memory: list[Row]
) -> tuple[list[Picture], list[str]]:
    made: list[Picture] = []
    lacking: list[str] = []
    panels: dict[str, plot.Panel] = {}
    without: list[str] = []
    used: list[Row] = []
    for op in (name for name, case in CASES.items() if any("C" in dims for dims in case.workloads.values())):
        mine, steps = plot.class_rows(ops.get(op, [])), [r for r in memory if r["memory"] == op and r["seconds"]]
        shown = {name: panel for name, panel in _step_panels(steps, _step_ms).items() if len(panel) > 1}
        panels |= shown
        used += steps if shown else []
        if not mine:
            without += [] if shown else [f"`{op}`"]
            continue
        same = (f"{name}={size}" for name, size in mine[0]["dims"].items() if name not in plot.FREE_SIZES)
        used += mine
        panels[f"{op}, {mine[0]['dtype']}, {', '.join(same)}"] = plot.class_panel(mine, "p50_ms", True)
    if panels:
        title = f"{device}: time of an image, forward and backward, against the number of classes\n{plot.commits(used)}"
        draw = partial(plot.lines, panels, "ms an image", title)
        made.append((f"{slug}-classes.png", "Time of an image against the number of classes", draw))
    if without:
        lacking.append(f"{', '.join(without)}: time against two or more numbers of classes at otherwise equal sizes")
    never = [f"`{op}`" for op in CASES if op not in ops]
    if never:
        lacking.append(f"{', '.join(never)}: time against the limit")
    for op, rows in ops.items():
        caption = f"`{op}` ({rows[0]['dtype']}): time as a multiple of the limit"
        made.append((f"{slug}-limit-{op.replace('_', '-')}.png", caption, partial(plot.draw, rows, op)))
    return made, lacking


def pictures(device: str, rows: list[Row]) -> tuple[list[Picture], list[str]]:
    """What can be drawn of one device's newest rows, and what cannot."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    both = in_order([row for row in rows if kind_of(row) == "op" and row["pass"] == "both" and timed(row)])
    ops = {op: _one_dtype([row for row in both if row["op"] == op]) for op in sorted({row["op"] for row in both})}
    memory = [row for row in rows if kind_of(row) == "memory"]
    memory.sort(key=lambda r: (r["loss"], r["dims"]["classes"], str(r["dims"]), provider_rank(r["provider"])))
    made, lacking = _op_pictures(slug, device, ops, memory)

    steps = _step_panels(memory, lambda row: row["peak_mib"])
    panels = {f"{name}, beyond weight and gradient": ("MiB", panel) for name, panel in steps.items()}
    for op, mine in ops.items():
        panel = plot.class_panel(plot.class_rows(mine), "peak_mib", False)
        if panel:
            panels[f"{op}, {mine[0]['dtype']}, forward and backward"] = ("MiB", panel)
    if panels:
        used = memory + [row for row in both if row.get("peak_mib") is not None]
        title = f"{device}: peak memory against the number of classes\n{plot.commits(used)}"
        draw = partial(plot.bars, panels, title, log=True)
        made.append((f"{slug}-memory.png", "Peak memory against the number of classes", draw))
    if len({row["dims"]["classes"] for row in memory}) == 1:
        lacking.append("memory of the loss in the head at a second number of classes")
    elif not memory and not is_gpu(rows[0]):
        lacking.append("memory of the loss in the head")
    if not any(row.get("peak_mib") is not None for row in both):
        lacking.append("peak memory of single ops against the number of classes")

    table = sorted((r for r in rows if kind_of(r) == "table"), key=lambda row: (row["classes"], row["head"]))
    units = {"training": "images/s", "inference": "images/s", "multiply_adds_e9": "1e9 multiply-adds an image"}
    bars: dict[str, tuple[str, plot.Panel]] = {}
    for key, unit in units.items():
        found: dict[str, dict[str, float]] = {}
        for row in table:
            if row.get(key):
                found.setdefault(f"{row['classes']:,}\nclasses", {})[row["head"]] = row[key]
        if found:
            bars[key.removesuffix("_e9").replace("_", "-")] = (unit, found)
    if bars:
        draw = partial(plot.bars, bars, f"{device}: ML-Decoder's Table 9\n{plot.commits(table)}")
        made.append((f"{slug}-table-9.png", "ML-Decoder's Table 9", draw))
    lacking += ["the speeds of Table 9"] if "training" not in bars else []
    return made, lacking


def _devices(rows: list[Row]) -> dict[str, list[Row]]:
    names = sorted({device_of(row) for row in rows}, key=lambda n: (n.endswith(" threads"), n))
    return {name: [row for row in rows if device_of(row) == name] for name in names}


def page(everything: list[Row]) -> str:
    """The page that these rows give, the oldest row first."""
    rows = newest(everything)
    devices = _devices(rows)
    text = [INTRODUCTION, "## Where plain PyTorch wins", ""]
    text += [
        "Every comparison that mlhead's best, or the backend that it takes by itself, loses to plain PyTorch, to the"
    ]
    text += [
        "papers' formulation or to `torch.compile`. The factor is how far mlhead's own choice is behind. Calls are"
    ]
    text += ["compared in the same mode: eager, compiled, or a CUDA graph.", ""]
    for name, mine in devices.items():
        stated, *rest = losses(contests(mine))
        text += [f"**{name}.** {stated}", *rest]
    text += [] if devices else ["Not yet measured.", ""]
    for name, mine in devices.items():
        text += [f"## {name}", ""]
        commits = dict.fromkeys(version_of(row) for row in sorted(mine, key=lambda row: row["time"]))
        text += [f"{len(mine)} rows of commit{'s' * (len(commits) > 1)} {', '.join(commits)}.", ""]
        text += device_sections(mine)
        drawn, lacking = pictures(name, mine)
        text += ["### Pictures", ""]
        for file, caption, _ in drawn:
            text += [f"{caption}:", "", f"![{caption.replace('`', '')}](performance/{file})", ""]
        if lacking:
            text += ["Not yet measured, so not drawn:", "", *(f"* {line}" for line in lacking), ""]
    text += ["## Not yet measured", ""]
    for lines_of, names in missing(rows).items():
        text += [f"{', '.join(names)}:", "", lines_of, ""]
    unknown = [row for row in everything if not kind_of(row)]
    kinds = ", ".join(sorted({str(row.get("kind", "of no kind")) for row in unknown}))
    text += [f"{len(unknown)} rows are of kinds that this page does not show: {kinds}.", ""] if unknown else []
    return "\n".join(text).rstrip("\n") + "\n"


def problems(rows: list[Row], out: Path) -> list[str]:
    """Why the page and pictures under `out` are not what the rows give; nothing where they are."""
    path, folder = out / "performance.md", out / "performance"
    wanted = {file for name, mine in _devices(newest(rows)).items() for file, _, _ in pictures(name, mine)[0]}
    there = {picture.name for picture in folder.glob("*.png")}
    found = []
    if not path.is_file() or path.read_bytes() != page(rows).encode():
        found.append(f"{path.name} is not what the rows give")
    found += [f"{name} is missing" for name in sorted(wanted - there)]
    return found + [f"{name} is of no row" for name in sorted(there - wanted)]


def write(rows: list[Row], out: Path) -> None:
    """The page and, where matplotlib is there, its pictures; pictures of no row are removed."""
    folder = out / "performance"
    out.mkdir(parents=True, exist_ok=True)
    (out / "performance.md").write_bytes(page(rows).encode())
    if importlib.util.find_spec("matplotlib") is None:
        return
    wanted = [picture for name, mine in _devices(newest(rows)).items() for picture in pictures(name, mine)[0]]
    for old in {picture.name for picture in folder.glob("*.png")} - {file for file, _, _ in wanted}:
        (folder / old).unlink()
    for file, _, draw in wanted:
        folder.mkdir(exist_ok=True)
        draw(folder / file)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    cli = argparse.ArgumentParser(prog="python -m benchmarks.performance", description=__doc__.splitlines()[0])
    cli.add_argument("--check", action="store_true", help="write nothing; exit status 1 if something would change")
    cli.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder of result files")
    cli.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the page")
    options = cli.parse_args(arguments)
    rows = read_all(options.results)
    if not options.check:
        write(rows, options.out)
    found = problems(rows, options.out)
    if found:
        print(*found, "run: python -m benchmarks.performance (with matplotlib)", sep="\n", file=sys.stderr)
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
