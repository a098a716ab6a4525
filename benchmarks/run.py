"""`make bench`: verify, then time every op against its baselines, forward, backward and both.

    python -m benchmarks.run --quick                     under two minutes: begins no group after the first 1.5
    python -m benchmarks.run --op group_fc --workload openimages-64 --dtype fp32

Every provider (the backends of mlhead, the papers' formulations, plain torch, torch.compile) is first compared with
the fp64 oracle on the inputs that are timed, without dropout where an op draws random numbers; what is wrong is
reported and not timed. Rows are appended as JSON lines to benchmarks/results/<device>/<commit>.jsonl. On a CPU large
workloads are divided by factors that the rows state.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from mlhead import _backend
from mlhead._progress import duration
from mlhead.ops._csra_kernels import forward_design
from mlhead.testing import CASES, Sample

from . import limits, machine, report
from .baselines import ARRANGED, baselines
from .peaks import in_process as peaks_of
from .plan import DTYPES, VERIFIED_ELEMENTS, Group, elements, groups, parse_dims, shrink
from .records import Row, append_rows, op_rows
from .verify import Provider, Verdict, agree, attempt, calls, verify


def in_design(design: str, call: Provider) -> Provider:
    """The Triton form of csra_pool with one of its two forwards, to see where each wins."""

    def forced(**arguments: Any) -> Tensor:
        with forward_design(design):
            return call(**arguments)

    return forced


def providers_of(group: Group, device: str, backends: list[str] | None, modes: tuple[str, ...]) -> dict[str, Provider]:
    """The backends of the op that run here, then its baselines."""
    dtype = DTYPES[group.dtype]
    implementations = _backend.implementations(group.op)
    found: dict[str, Provider] = {}
    for name in _backend.BACKENDS:
        if (backends and name not in backends) or (name == "triton" and _backend.interpreting()):
            continue
        if _backend._refusal(group.op, implementations, name, device, dtype) is None:

            def call(name: str = name, **arguments: Any) -> Tensor:
                return group.case.function(**arguments, backend=name)

            found[f"mlhead: {name}"] = call
            if (group.op, name) == ("csra_pool", "triton"):
                found |= {f"mlhead: {name}, {design}": in_design(design, call) for design in ("fused", "chunked")}
    return {**found, **baselines(group.op, device, modes)}


def pass_functions(sample: Sample, function: Provider) -> dict[str, Callable[[], Any]]:
    """The three passes as functions without arguments."""
    leaves = calls(sample, function).leaves()
    tensors = [t for t in leaves.tensors.values() if t is not None]

    def forward() -> Any:
        with torch.no_grad():
            return leaves.call()

    # A graph that is kept for another backward may be much slower, so each backward gets a graph of its own.
    backward = limits.Prepared(leaves.call, lambda out: torch.autograd.grad(out, tensors, sample.dout))

    return {"forward": forward, "backward": backward, "both": backward.__call__}


def arranged(op: str, provider: str, sample: Sample) -> Sample:
    """The sample with the layouts that a baseline takes."""
    arrange = ARRANGED.get((op, provider.replace("compile: ", "papers: ")))
    return arrange(sample) if arrange else sample


def peak_mib(function: Callable[[], Any]) -> float:
    """Memory of the GPU that a call takes beyond what was there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def host_us(function: Callable[[], Any]) -> float:
    """What the calling thread spends on one call whose work runs on the GPU meanwhile."""
    spent = 0.0
    for _ in range(10):  # one graph at a time: ten may not fit the memory
        prepared = function.prepare() if isinstance(function, limits.Prepared) else None
        torch.cuda.synchronize()
        begin = time.perf_counter()
        kept = function.run(prepared) if isinstance(function, limits.Prepared) else function()
        spent += time.perf_counter() - begin
        del prepared, kept
    torch.cuda.synchronize()
    return spent / 10 * 1e6


def footprint(
    functions: dict[str, Callable[[], Any]], device: str, of_process: Callable[[], dict[str, float | None]] | None
) -> tuple[dict, dict]:
    """Peak memory and host time of each pass, and its first run at this size; on a CPU another process's memory."""
    if device == "cuda":
        peaks = {key: peak_mib(function) for key, function in functions.items()}
        return peaks, {key: host_us(function) for key, function in functions.items()}
    for function in functions.values():
        function()
    return of_process() if of_process else dict.fromkeys(functions), dict.fromkeys(functions)


def run_group(group: Group, device: str, options: argparse.Namespace) -> list[Row]:
    """Verifies and times one group."""
    case, dtype = group.case, DTYPES[group.dtype]
    # Every size is compiled for itself, and torch.compile counts the sizes that one function has seen.
    torch._dynamo.reset()
    providers = providers_of(group, device, options.backend, tuple(options.compile))
    sample = case.make(group.dims, dtype, device, options.seed)
    verified_at = dict(group.dims)
    if elements(case, group.dims) > VERIFIED_ELEMENTS:
        verified_at, _ = shrink(case, group.dims, VERIFIED_ELEMENTS)
    same = verified_at == dict(group.dims)
    drops = bool(group.dims.get("dropout"))
    if drops:  # baselines draw masks of their own: all are compared without, and timed with dropout
        verified_at, same = {**verified_at, "dropout": 0.0}, False
    verdicts = verify(sample if same else case.make(verified_at, dtype, device, options.seed), providers)
    good = {name: function for name, function in providers.items() if verdicts[name].status == "ok"}
    if not same and not drops and good:
        first = "torch: bmm" if "torch: bmm" in good else list(good)[-1]
        for name, problem in agree(sample, good, first).items():
            verdicts[name] = Verdict("wrong" if "differs" in problem else "failed", problem, verdicts[name].errors)
            del good[name]

    passes: dict[str, dict[str, Callable[[], Any]]] = {}
    peaks: dict[str, dict[str, float | None]] = {}
    host: dict[str, dict[str, float | None]] = {}
    for name, function in good.items():
        found = pass_functions(arranged(group.op, name, sample), function)
        of_process = None if options.quick or options.no_peaks else partial(peaks_of, group, name, options.seed)
        measured, verdict = attempt(partial(footprint, found, device, of_process))
        if measured is None:
            verdicts[name] = verdict
        else:
            passes[name], (peaks[name], host[name]) = found, measured
    timings = {
        key: limits.measure({name: passes[name][key] for name in passes}, device, options.seconds_each, options.least)
        for key in (report.PASSES if passes else ())
    }

    flops, size = case.flops(group.dims), case.bytes(group.dims, dtype.itemsize)
    flops, size = {**flops, "both": sum(flops.values())}, {**size, "both": sum(size.values())}
    auto = f"mlhead: {_backend.resolve(group.op, 'auto', torch.device(device), dtype)}"
    rows = []
    for name in providers:
        for key in report.PASSES:
            timing = timings[key][name] if name in passes else None
            limit, limit_by = limits.limit_ms(flops[key], size[key], device, dtype)
            # A loss in the head has made its gradients in the forward: its backward alone has no limit to speak of.
            handed_over = key == "backward" and group.op.endswith("_loss") and name.startswith("mlhead")
            row: Row = {
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "op": group.op,
                "workload": group.workload,
                "dims": dict(group.dims),
                "scale": dict(group.scale),
                "title": group.title(),
                "dtype": group.dtype,
                "provider": name,
                "kind": "mlhead" if name.startswith("mlhead") else "baseline",
                "auto": name == auto,
                "pass": key,
                "status": verdicts[name].status,
                "message": verdicts[name].message,
                **(asdict(timing) if timing else dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "samples"))),
                "gbps": size[key] / timing.p50_ms / 1e6 if timing else None,
                "tflops": flops[key] / timing.p50_ms / 1e9 if timing else None,
                "limit_ms": limit,
                "limit_by": limit_by,
                "fraction": limit / timing.p50_ms if timing and not handed_over else None,
                "copy_gbps": limits.copy_bandwidth(device) / 1e9,
                "gemm_tflops": limits.gemm_rate(device, dtype) / 1e12,
                "peak_mib": peaks[name][key] if name in passes else None,
                "host_us": host[name][key] if name in passes else None,
                "errors": verdicts[name].errors,
                "verified_at": verified_at,
                "flushed": device == "cuda",
                **machine.facts(device),
            }
            rows.append(row)
    return rows


@contextmanager
def progress(total: int) -> Iterator[Callable[[str | None], None]]:
    """A bar on a terminal, lines elsewhere; to be called with what begins, and with None when it ended."""
    if sys.stderr.isatty() and importlib.util.find_spec("tqdm"):
        from tqdm import tqdm

        with tqdm(total=total, unit="group", dynamic_ncols=True) as bar:
            yield lambda title: bar.update() if title is None else bar.set_description_str(title.split("  ")[0])
        return
    began, done = time.monotonic(), 0

    def say(title: str | None) -> None:
        nonlocal done
        if title is None:
            done += 1
            return
        left = f", about {duration((time.monotonic() - began) / done * (total - done))} left" if done else ""
        print(f"[{done + 1}/{total}{left}] {title}", file=sys.stderr, flush=True)

    yield say


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    add = result.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="few workloads, few repeats")
    add("--op", action="append", choices=list(CASES), help="default: all")
    add("--workload", action="append", help="default: all")
    add("--dims", type=parse_dims, help="one workload of your own, e.g. B=64,G=100,E=768,C=9605; needs --op")
    add("--dtype", action="append", choices=list(DTYPES), help="default: fp32 on a CPU; bf16, fp32, fp16 on a GPU")
    add("--backend", action="append", choices=_backend.BACKENDS, help="default: all that run here")
    add("--compile", action="append", choices=("none", "default", "max-autotune"), help="default: default on a GPU")
    add("--seconds-each", type=float, help="time for one provider and pass")
    add("--least", type=int, help="fewest samples; default: 5, with --quick 3")
    add("--no-peaks", action="store_true", help="on a CPU: no peak memory, for which every provider gets a process")
    add("--minutes", type=float, help="begin no further group after this time; default with --quick: 1.5")
    add("--seed", type=int, default=0)
    add("--out", type=Path, help="results file; default: benchmarks/results/<device>/<commit>.jsonl")
    add("--resume", action="store_true", help="leave out groups that the results file already has for this commit")
    add("--list", action="store_true", help="print the groups and measure nothing")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 where something of mlhead is wrong or failed."""
    cli = parser()
    options = cli.parse_args(arguments)
    if options.dims and not options.op:
        cli.error("--dims needs --op")
    device = options.device
    default_mode = ["default"] if device == "cuda" and not options.quick else []
    options.compile = [m for m in options.compile if m != "none"] if options.compile else default_mode
    options.seconds_each = options.seconds_each or (0.25 if options.quick or device == "cuda" else 1.0)
    options.least = options.least or (3 if options.quick else 5)
    options.minutes = options.minutes or (1.5 if options.quick else None)
    todo = groups(device, options.quick, options.op, options.workload, options.dtype, options.dims)
    if options.list:
        print("\n".join(group.title() for group in todo))
        return 0
    if not todo:
        cli.error("no workload is left by the filters")
    began = time.monotonic()
    path = options.out or machine.results_file(device)
    facts = machine.facts(device)
    there = {(r["title"], r["commit"], r["dirty"]) for r in op_rows(path)} if options.resume else set()
    todo = [group for group in todo if (group.title(), facts["commit"], facts["dirty"]) not in there]
    print(machine.banner(device))
    print(f"rows go to {path}", flush=True)

    rows: list[Row] = []
    unreached = []
    with progress(len(todo)) as step:
        for group in todo:
            if options.minutes and time.monotonic() - began > 60 * options.minutes:
                unreached.append(group.title())
                continue
            step(group.title())
            try:
                found, verdict = attempt(partial(run_group, group, device, options))
            except KeyboardInterrupt:
                print(f"\ninterrupted in {group.title()}; the rows of {len(rows)} measurements are in {path}")
                return 130
            if found is None:
                unreached.append(f"{group.title()}: {verdict.status}: {verdict.message}")
            else:
                append_rows(path, found)
                rows += found
            if device == "cuda":
                torch.cuda.empty_cache()
            step(None)
    print("\n" + report.table(rows) + "\n" + report.verdicts(rows))
    if rows:
        print(
            f"\nIn this run: copies {rows[0]['copy_gbps']:.1f} GB/s read and written, large GEMMs "
            + ", ".join(f"{d} {r:.2f} TFLOP/s" for d, r in {r["dtype"]: r["gemm_tflops"] for r in rows}.items())
        )
    if unreached:
        print("\nNot reached:", *unreached, sep="\n  ")
    return int(any(row["kind"] == "mlhead" and row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
