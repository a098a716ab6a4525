"""Host overhead: microseconds a call of every op and head on the `small` workload, against plain torch.

    python -m benchmarks.overhead                              eager and torch.compile'd; on a GPU CUDA graphs too
    python -m benchmarks.overhead --quick --subject group_fc   fewer repeats, nothing compiled

Two passes: "forward" without gradients (heads in evaluation), and "both", forward and backward to all inputs and
parameters (heads in training, with their dropout). Every provider is verified first, without dropout; what is wrong is
a row that says so. Three times of each call: `wall_us`, until its work is done, where several calls come in a row;
`host_us`, until it returns, without synchronisation; `thread_us`, what the calling thread computes meanwhile. On a GPU
torch runs the backward in a thread of its own, so there `host_us` is the one to look at. On a CPU a call returns when
its work is done: all times have the work in them, and `includes_work` says so. A loss gets sparse targets in mlhead and
dense ones in plain torch. Rows of kind "overhead" go to the results file of the commit.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor

from mlhead import SparseTargets, _backend
from mlhead.testing import CASES, Sample

from . import head as whole_head
from . import limits, machine
from .baselines import BASELINES
from .head_baselines import PlainDecoder
from .overhead_heads import HEADS, B, C, D, E, L
from .plan import DTYPES
from .records import Row, append_rows
from .verify import Verdict, attempt, verify

Function = Callable[[], Any]
PASSES = ("forward", "both")
CLOCKS = ("wall", "host", "thread")
COMPILE_MODES = ("none", "default", "reduce-overhead", "max-autotune")


@dataclass
class Provider:
    """One way to compute a subject.

    Args:
        name: "mlhead: auto", or that of a baseline.
        mode: "eager", or how it is compiled.
        functions: The passes by name.
        verdict: What its verification found.
    """

    name: str
    mode: str
    functions: dict[str, Function]
    verdict: Verdict

    @property
    def label(self) -> str:
        """One line for people."""
        return self.name if self.mode == "eager" else f"{self.name}, {self.mode}"


@dataclass
class Subject:
    """An op or a head and all that computes it.

    Args:
        providers: Verified.
        prepare: Called with the name of a pass before it is timed: heads change their mode.
        exact: The passes that give the same numbers every time, that is, have no dropout.
    """

    providers: list[Provider]
    prepare: Callable[[str], Any]
    exact: set[str]


def best_plain(op: str) -> str:
    """The simple baseline that is fastest in most places: the first of plain torch, else the papers'."""
    return next((name for name in BASELINES[op] if name.startswith("torch: ")), next(iter(BASELINES[op])))


def dense(sample: Sample) -> Sample:
    """The sample with dense targets, as plain torch has them."""
    targets = sample.options.get("targets")
    if not isinstance(targets, SparseTargets):
        return sample
    return replace(sample, options={**sample.options, "targets": targets.to_dense(torch.float32)})


def in_modes(function: Callable, modes: tuple[str, ...]) -> dict[str, Callable]:
    """The function, and torch.compile of it in each mode."""
    found = {"eager": function}
    for mode in modes:
        chosen = None if mode == "default" else mode
        label = "compiled" if chosen is None else f"compiled {mode}"
        found[label] = torch.compile(function, mode=chosen, fullgraph=True, dynamic=False)
    return found


def op_subject(op: str, dims: Mapping[str, Any], device: str, dtype: torch.dtype, modes: tuple[str, ...]) -> Subject:
    """An op by mlhead and by plain torch."""
    case, plain = CASES[op], best_plain(op)
    sample = case.make(dims, dtype, device, 0)
    drops = bool(dims.get("dropout"))  # baselines draw masks of their own
    calm = case.make({**dims, "dropout": 0.0}, dtype, device, 0) if drops else sample
    providers = []
    for name, function in (("mlhead: auto", sample.function), (plain, BASELINES[op][plain])):
        arrange = dense if name == plain else lambda s: s
        functions = in_modes(function, modes)
        verdicts = verify(arrange(calm), {f"{name}, {mode}": call for mode, call in functions.items()})
        leaves = arrange(sample).leaves()
        tensors = [t for t in leaves.tensors.values() if t is not None]
        for mode, call in functions.items():
            bound = partial(call, **leaves.tensors, **leaves.options)

            def both(bound: Function = bound, tensors: list[Tensor] = tensors) -> Any:
                return torch.autograd.grad(bound(), tensors, sample.dout)

            providers.append(Provider(name, mode, {"forward": bound, "both": both}, verdicts[f"{name}, {mode}"]))
    return Subject(providers, lambda key: None, set() if drops else set(PASSES))


def head_subject(name: str, device: str, dtype: torch.dtype, modes: tuple[str, ...]) -> Subject:
    """A head by mlhead and by plain torch, each compared with the latter as in `benchmarks.head`."""
    torch.manual_seed(0)
    ours, plain = HEADS[name](device, dtype)
    side = round(L**0.5)
    features = torch.randn(B, D, side, L // side, device=device, dtype=dtype).relu_()
    dlogits = torch.randn(B, C, device=device, dtype=dtype)
    leaves = [features.clone().requires_grad_(), *(p for p in ours.parameters() if p.requires_grad)]
    budget = whole_head.allowed(features, E)
    providers = []
    for title, module in (("mlhead: auto", ours), ("torch: rewritten", plain)):
        plain.eval(), ours.eval()
        for mode, call in in_modes(module, modes).items():
            errors, verdict = attempt(partial(whole_head.verify, {"papers": plain, mode: call}, features, dlogits))
            if errors is not None:
                verdict.errors = {key: {"error": e, "budget": budget[key]} for key, e in errors[mode].items()}
                wrong = [key for key, e in verdict.errors.items() if not e["error"] <= e["budget"]]
                if wrong:
                    verdict.status, verdict.message = "wrong", f"differs from plain torch: {', '.join(wrong)}"

            def both(call: Callable = call) -> Any:
                return torch.autograd.grad(call(leaves[0]), leaves, dlogits)

            providers.append(Provider(title, mode, {"forward": partial(call, features), "both": both}, verdict))
    exact = {"forward"} if isinstance(plain, PlainDecoder) else set(PASSES)
    return Subject(providers, lambda key: (ours.train(key == "both"), plain.train(key == "both")), exact)


def captured(function: Function, exact: bool) -> Function:
    """A function that replays a CUDA graph of one call; checked against the call where that has no dropout."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = function()

    def replay() -> Any:
        graph.replay()
        return kept

    if exact:
        pairs = [(t if isinstance(t, tuple) else (t,)) for t in (replay(), function())]
        for a, b in zip(*pairs, strict=True):
            difference, norm = (a.double() - b.double()).norm(), b.double().norm()
            if not difference <= 32 * torch.finfo(b.dtype).eps * norm:
                raise RuntimeError(f"a replay differs from the call by {float(difference / norm):.3g} of the norm")
    return replay


def _once(function: Function, calls: int, device: str) -> tuple[float, float, float]:
    """Wall, host and thread time of one of several calls, in microseconds."""
    if device == "cuda":
        torch.cuda.synchronize()
    thread, begin = time.thread_time(), time.perf_counter()
    for _ in range(calls):
        function()
    host, thread = time.perf_counter() - begin, time.thread_time() - thread
    if device == "cuda":
        torch.cuda.synchronize()
    wall = time.perf_counter() - begin if device == "cuda" else host
    return wall * 1e6 / calls, host * 1e6 / calls, thread * 1e6 / calls


def measure(functions: Mapping[str, Function], device: str, rounds: int) -> dict[str, dict[str, Any]]:
    """Quantiles for each clock: in every round each function in turn, in a new order, some calls at a time.

    On a GPU ten calls, so that no queue of launches fills up; on a CPU as many as take 2 milliseconds.
    """
    calls = {}
    for name, function in functions.items():
        _once(function, 3, device)
        calls[name] = 10 if device == "cuda" else max(1, min(100, int(2000 / _once(function, 3, device)[0])))
    samples: dict[str, list[tuple[float, float, float]]] = {name: [] for name in functions}
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(list(functions), len(functions)):
            samples[name].append(_once(functions[name], calls[name], device))
    found = {}
    for name, taken in samples.items():
        found[name] = {"samples": rounds, "calls": calls[name]}
        for clock, values in zip(CLOCKS, zip(*taken, strict=True), strict=True):
            t = limits.quantiles(list(values))
            found[name][f"{clock}_us"] = {"p20": t.p20_ms, "p50": t.p50_ms, "p80": t.p80_ms}
    return found


def run_subject(name: str, device: str, dtype_name: str, modes: tuple[str, ...], rounds: int) -> list[Row]:
    """Verifies and times one op or head."""
    dtype, is_op, backend = DTYPES[dtype_name], name in CASES, None
    # torch.compile counts the sizes and modes that one function has seen.
    torch._dynamo.reset()
    dims: dict[str, Any] = {"B": B, "L": L, "D": D, "E": E, "C": C}
    if is_op:
        dims = dict(CASES[name].workloads["small"])
        backend = _backend.resolve(name, "auto", torch.device(device), dtype)
    subject = op_subject(name, dims, device, dtype, modes) if is_op else head_subject(name, device, dtype, modes)
    rows = []
    for key in PASSES:
        subject.prepare(key)
        with torch.set_grad_enabled(key == "both"):
            done = timed(subject, key, device, rounds)
        rows += [
            {
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "kind": "overhead",
                "subject": name,
                "subject_is": "op" if is_op else "head",
                "workload": "small",
                "dims": dims,
                "dtype": dtype_name,
                "provider": provider.name,
                "mode": provider.mode,
                "backend": backend if provider.name == "mlhead: auto" else None,
                "pass": key,
                "status": provider.verdict.status,
                "message": provider.verdict.message,
                "includes_work": device == "cpu",
                **(times or dict.fromkeys(("samples", "calls", *(f"{clock}_us" for clock in CLOCKS)))),
                "errors": provider.verdict.errors,
                **machine.facts(device),
            }
            for provider, times in done
        ]
    return rows


def timed(subject: Subject, key: str, device: str, rounds: int) -> list[tuple[Provider, dict[str, Any] | None]]:
    """All providers of a pass, CUDA graphs among them, with their times, interleaved; None where there are none."""
    shown: list[Provider] = []
    for provider in subject.providers:
        shown.append(provider)
        if provider.verdict.status != "ok":
            continue
        function = provider.functions[key]
        _, verdict = attempt(function)  # compiles, and finds out what is refused
        if verdict.status != "ok":
            shown[-1] = replace(provider, verdict=verdict)
        elif device == "cuda" and provider.mode == "eager":
            graph, verdict = attempt(partial(captured, function, key in subject.exact))
            verdict.errors = provider.verdict.errors
            shown.append(Provider(provider.name, "CUDA graph", {key: graph}, verdict))
    ready = {p.label: p.functions[key] for p in shown if p.verdict.status == "ok"}
    times = measure(ready, device, rounds) if ready else {}
    return [(provider, times.get(provider.label)) for provider in shown]


def table(rows: list[Row]) -> str:
    """Medians; "wall/plain" and "thread/plain" are times over those of plain torch, eager, in the same pass."""
    titles = f"{'wall us':>9} {'host us':>9} {'thread us':>9} {'wall/plain':>10} {'thread/plain':>12}"
    lines = [f"{'subject':23} {'pass':8} {'provider':45} {titles}"]
    for row in rows:
        label = row["provider"] if row["mode"] == "eager" else f"{row['provider']}, {row['mode']}"
        start = f"{row['subject']:23} {row['pass']:8} {label:45}"
        if row["status"] != "ok":
            lines.append(f"{start} {row['status']}: {row['message']}")
            continue
        alike = [r for r in rows if all(r[k] == row[k] for k in ("subject", "pass", "dtype")) and r["mode"] == "eager"]
        plain = [r for r in alike if r["status"] == "ok" and r["provider"] != "mlhead: auto"]
        ratio = "".join(
            f" {row[clock]['p50'] / plain[0][clock]['p50']:{width}.2f}" if plain else f" {'-':>{width}}"
            for clock, width in (("wall_us", 10), ("thread_us", 12))
        )
        times = " ".join(f"{row[clock + '_us']['p50']:9.1f}" for clock in CLOCKS)
        lines.append(f"{start} {times}{ratio}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 where something of mlhead is wrong or failed, or was not reached."""
    cli = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="few repeats, nothing compiled unless --compile says so")
    add("--subject", action="append", choices=[*CASES, *HEADS], help="default: all ops and heads")
    add("--dtype", action="append", choices=list(DTYPES), help="default: fp32 on a CPU, bf16 on a GPU")
    add("--compile", action="append", choices=COMPILE_MODES, help="default: default, with --quick none")
    add("--rounds", type=int, help="samples of each provider and pass; default: 30, with --quick 7")
    add("--minutes", type=float, help="begin nothing further after this time")
    add("--out", type=Path, help="results file; default: benchmarks/results/<device>/<commit>.jsonl")
    options = cli.parse_args(arguments)
    device, began = options.device, time.monotonic()
    modes = tuple(m for m in options.compile or (["none"] if options.quick else ["default"]) if m != "none")
    path = options.out or machine.results_file(device)
    print(machine.banner(device))
    print(f"rows go to {path}", flush=True)
    rows: list[Row] = []
    unreached = []
    for dtype in options.dtype or (["fp32"] if device == "cpu" else ["bf16"]):
        for name in options.subject or (*CASES, *HEADS):
            if options.minutes and time.monotonic() - began > 60 * options.minutes:
                unreached.append(f"{name} {dtype}: out of time")
                continue
            print(f"{name} {dtype} ...", file=sys.stderr, flush=True)
            rounds = options.rounds or (7 if options.quick else 30)
            found, verdict = attempt(partial(run_subject, name, device, dtype, modes, rounds))
            if found is None:
                unreached.append(f"{name} {dtype}: {verdict.status}: {verdict.message}")
            else:
                append_rows(path, found)
                rows += found
    print(table(rows))
    if device == "cpu":
        print("On a CPU a call's work is in its time.")
    if unreached:
        print("\nNot reached:", *unreached, sep="\n  ")
    failed = any(row["status"] != "ok" and row["provider"] == "mlhead: auto" for row in rows)
    return int(failed or any(": out of time" not in line for line in unreached))


if __name__ == "__main__":
    sys.exit(main())
