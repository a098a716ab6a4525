"""Measures launch configurations of the Triton kernels, and proposes those that win as a diff of kernels/.

    python -m benchmarks.tune --op group_fc --workload openimages --minutes 10
    python -m benchmarks.tune --op group_fc --dry-run --target sm_90      no GPU: lists and compiles the candidates

Candidates are the cost model's best (benchmarks.model), the shipped configuration and its neighbours. Each is first
compared with the shipped one's results, then all of them are timed interleaved, in the pass that the site belongs to.
Rows go to benchmarks/results/<device>/<commit>.jsonl as kind "tune"; they have a "site" and no "op", so that nothing
takes them for rows of the shipped op. Nothing is written into kernels/: the diff is printed, or goes to --diff FILE.

Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from mlhead.kernels import _device
from torch import Tensor

from mlhead.testing import CASES, Sample
from mlhead.testing.offline import TARGETS

from . import limits, machine
from .cost import proposal
from .cost.candidates import Trial, compiled, resources, spills, trials, with_configuration
from .cost.devices import DEVICES, Device, total
from .cost.launches import passes
from .cost.products import Problem
from .cost.sites import OPS, Config, Picker
from .model import ELEMENT_BYTES, Ranked, device_of, microseconds, ranked_passes, short
from .plan import DTYPES
from .records import Row, append_rows
from .verify import Verdict, attempt


def written(config: Config) -> str:
    """A configuration as it stands in the source."""
    return f"{type(config).__name__}({', '.join(str(value) for value in astuple(config))})"


def pass_function(trial: Trial, sample: Sample) -> Callable[[], Any] | limits.Prepared:
    """What is timed of a sample: the pass, of backward only the gradients that the site's kernels make."""
    site, key = trial.ranking.site, trial.ranking.key
    leaves = sample.leaves()
    wanted = [
        tensor for name, tensor in leaves.tensors.items() if tensor is not None and name in (site.wrt or leaves.tensors)
    ]

    def forward() -> Any:
        with torch.no_grad():
            return leaves.call("triton")

    if key == "forward":
        return forward

    def gradients(out: Tensor) -> Any:
        return torch.autograd.grad(out, wanted, sample.dout)

    backward = limits.Prepared(lambda: leaves.call("triton"), gradients)
    return backward if key == "backward" else backward.__call__


def with_config(trial: Trial, ranked: Ranked, function: Any) -> Any:
    """The function of a pass with a configuration; what is prepared outside the timing keeps the shipped one."""
    if ranked.shipped:
        return function
    put = partial(with_configuration, trial.ranking.site, ranked.config)
    if isinstance(function, limits.Prepared):
        return replace(function, run=put(function.run))
    return put(function)


def results(function: Any) -> list[Tensor]:
    """What a pass gives, as a list."""
    found = function()
    return [found] if isinstance(found, Tensor) else list(found)


def differs(found: list[Tensor], shipped: list[Tensor]) -> str:
    """What is wrong with results, or "".

    Both round their sums in an order of their own, so they may differ by some units of rounding of the norm, as
    providers may in benchmarks.verify; in fp32 by a hundred times that, since their sums are in fp32 too.
    """
    for i, (value, expected) in enumerate(zip(found, shipped, strict=True)):
        error = norm = 0.0
        for a, b in zip(value.reshape(-1).split(1 << 24), expected.reshape(-1).split(1 << 24), strict=True):
            finite = torch.isfinite(b)
            if not torch.equal(finite, torch.isfinite(a)):
                return f"result {i} is not finite where the shipped one's is, or the reverse"
            a, b = (torch.where(finite, part, 0).double() for part in (a, b))
            error += float((a - b).square().sum())
            norm += float(b.square().sum())
        allowed = (32 if value.dtype.itemsize == 2 else 3200) * torch.finfo(value.dtype).eps
        if not error <= allowed**2 * norm:
            share = (error / norm) ** 0.5 if norm else float("inf")
            return f"result {i} differs from the shipped one's by {share:.3g} of the norm"
    return ""


def judge(trial: Trial, function: Any) -> dict[Config, Verdict]:
    """Every configuration's results against those of the shipped one."""
    shipped = results(function)
    verdicts = {}
    for ranked in trial.configs:
        found, verdict = attempt(partial(results, with_config(trial, ranked, function)))
        problem = differs(found, shipped) if found is not None else ""
        verdicts[ranked.config] = Verdict("wrong", problem) if problem else verdict
    return verdicts


def rows_of(
    trial: Trial, verdicts: dict[Config, Verdict], timings: dict[Config, limits.Timing], device: str
) -> list[Row]:
    """One row for each configuration that was tried."""
    ranking = trial.ranking
    keys = [proposal.key_of(ranking.site, arguments) for arguments in ranking.called]
    key = {"names": [name for name, _ in keys[0]], "values": [[value for _, value in pairs] for pairs in keys]}
    rows = []
    for ranked in trial.configs:
        timing = timings.get(ranked.config)
        row: Row = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "kind": "tune",
            "site": ranking.site.title,
            "case": ranking.site.op,
            "workload": ranking.workload,
            "dims": dict(trial.problem.dims),
            "title": trial.title(),
            "dtype": trial.dtype,
            "pass": ranking.key,
            "key": key,
            "config": asdict(ranked.config),
            "written": written(ranked.config),
            "shipped": ranked.shipped,
            "status": verdicts[ranked.config].status,
            "message": verdicts[ranked.config].message,
            **(asdict(timing) if timing else dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "samples"))),
            "modelled_ms": 1e3 * ranked.seconds,
            "flushed": device == "cuda",
            **machine.facts(device),
        }
        rows.append(row)
    return rows


def tune(trial: Trial, sample: Sample, device: str, seconds: float) -> list[Row]:
    """Checks and times the configurations of one trial."""
    function = pass_function(trial, sample)
    verdicts = judge(trial, function)
    good = {written(r.config): r for r in trial.configs if verdicts[r.config].status == "ok"}
    functions = {name: with_config(trial, ranked, function) for name, ranked in good.items()}
    measured = limits.measure(functions, device, seconds, least=20)
    return rows_of(trial, verdicts, {good[name].config: timing for name, timing in measured.items()}, device)


def table(rows: list[Row]) -> str:
    """The rows of one trial, the fastest first."""
    lines = []
    for row in sorted(rows, key=lambda r: r["p50_ms"] if r["p50_ms"] is not None else float("inf")):
        stated = f"{row['status']}: {row['message']}" if row["status"] != "ok" else ""
        if row["p50_ms"] is not None:
            stated = " to ".join(f"{1e3 * row[name]:.1f}" for name in ("p20_ms", "p50_ms", "p80_ms")) + " us"
        lines.append(f"  {row['written']}: {stated}, modelled {1e3 * row['modelled_ms']:.1f} us{shipped_mark(row)}")
    return "\n".join(lines)


def shipped_mark(row: Row) -> str:
    """A word for the shipped one."""
    return "  shipped" if row["shipped"] else ""


def dry_run(trial: Trial, target: str) -> int:
    """Compiles the candidates for a target and prints what they take; returns how many are left."""
    ranking, left = trial.ranking, 0
    print(trial.title())
    for ranked in trial.configs:
        mark = "  shipped" if ranked.shipped else ""
        works = passes(ranking.site.op, trial.problem, Picker({ranking.site.title: ranked.config}))[ranking.key]
        kernels = tuple({work.kernel: None for work in works if work.kernel in ranking.site.kernels})
        found, verdict = attempt(partial(compiled, trial, ranked.config, target, kernels))
        if found is None:
            print(f"  {short(ranked.config)}: dropped, {verdict.message}{mark}")
            continue
        reasons = [
            f"{name} {'spills' if spills(binary) else 'does not fit'}"
            for name, binary in found
            if spills(binary) or binary.shared > TARGETS[target][2]
        ]
        facts = "; ".join(
            f"{name}: {b.registers} registers, {b.shared} B shared, {b.stack} B stack, {b.spills} spills"
            for name, b in found
        )
        taken = resources(found)
        works = [work.given(taken[work.kernel]) if work.kernel in taken else work for work in works]
        modelled = f"modelled {microseconds(ranked.seconds)}, with these {microseconds(total(works, DEVICES[target]))}"
        left += not reasons
        dropped = f"dropped, {', '.join(reasons)}; " if reasons else ""
        print(f"  {short(ranked.config)}: {dropped}{facts}; {modelled}{mark}", flush=True)
    print(f"  {left} of {len(trial.configs)} candidates are left for {target}\n", flush=True)
    return left


def here() -> Device | None:
    """The model's record of the first GPU, None where it has none."""
    device = device_of(machine.facts("cuda"))
    if device is None:
        return None
    facts = _device._query(0)
    return replace(device, multiprocessors=facts.multiprocessors, program_bytes=facts.shared_bytes)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.splitlines()[0])
    add = result.add_argument
    add("--op", action="append", choices=OPS, required=True)
    add("--workload", action="append", help="default: all")
    add("--pass", dest="passes", action="append", choices=("forward", "backward", "both"), help="default: all")
    add("--dtype", choices=ELEMENT_BYTES, default="bf16")
    add("--best", type=int, default=8, help="how many of the model's best")
    add("--neighbours", type=int, help="how many of the shipped configuration's neighbours; default: all")
    add("--minutes", type=float, help="begin no further site after this time")
    add("--seconds-each", type=float, default=0.1, help="time for one configuration")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="results file; default: benchmarks/results/<device>/<commit>.jsonl")
    add("--diff", type=Path, help="file for the proposed diff; default: it is printed")
    add("--dry-run", action="store_true", help="list the candidates and compile them ahead of time, without a GPU")
    add("--target", choices=DEVICES, default="sm_90", help="what --dry-run compiles for")
    return result


def _measure(todo: list[Trial], options: argparse.Namespace) -> list[Row]:
    """Measures one trial after another, and appends their rows."""
    path = options.out or machine.results_file("cuda")
    print(f"{machine.banner('cuda')}\nrows go to {path}", flush=True)
    began = time.monotonic()
    rows: list[Row] = []
    held: tuple[tuple[str, str], Sample] | None = None
    for trial in todo:
        if options.minutes and time.monotonic() - began > 60 * options.minutes:
            print(f"not reached: {trial.title()}")
            continue
        print(trial.title(), flush=True)
        name = (trial.ranking.site.op, trial.ranking.workload)
        if held is None or held[0] != name:
            held = None  # the one before need not stay beside it
            case = CASES[name[0]]
            held = name, case.make(trial.problem.dims, DTYPES[trial.dtype], "cuda", options.seed)
        found, verdict = attempt(partial(tune, trial, held[1], "cuda", options.seconds_each))
        if found is None:
            print(f"  {verdict.status}: {verdict.message}")
        else:
            append_rows(path, found)
            rows += found
            print(table(found), flush=True)
        torch.cuda.empty_cache()
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 2 without a GPU."""
    cli = parser()
    options = cli.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        cli.error("TRITON_INTERPRET is set: its kernels can be neither compiled nor timed")
    if not options.dry_run and not torch.cuda.is_available():
        print("There is no CUDA device to measure on; --dry-run lists and compiles the candidates.", file=sys.stderr)
        return 2
    device = DEVICES[options.target] if options.dry_run else here()
    if device is None:
        print(f"The cost model does not know this device, only {', '.join(DEVICES)}.", file=sys.stderr)
        return 2
    todo = [
        trial
        for op in options.op
        for name, dims in CASES[op].workloads.items()
        if not options.workload or name in options.workload
        for trial in trials(
            op,
            name,
            Problem(dims, ELEMENT_BYTES[options.dtype], device),
            options.dtype,
            [key for key in ranked_passes(op) if not options.passes or key in options.passes],
            options.best,
            options.neighbours,
        )
    ]
    if not todo:
        cli.error("no workload is left by the filters")
    if options.dry_run:
        for trial in todo:
            dry_run(trial, options.target)
        return 0
    found = proposal.diff(proposal.proposals(_measure(todo, options)))
    if options.diff:
        options.diff.write_text(found)
    print(found or "No configuration is faster than the shipped one by more than the noise: nothing is proposed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
