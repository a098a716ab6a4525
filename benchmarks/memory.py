"""Peak memory and time of a training step against the number of classes, on the CPU: the loss in the head, eager torch.

    python -m benchmarks.memory                                                1,000 to a million classes, both losses
    python -m benchmarks.memory --classes 1000000 --loss bce --width 256 --batch 32

Each provider runs in a process of its own, which measures what its step adds to the resident memory beyond inputs,
weight and, from when it is made on, the weight's gradient, and times further steps. The providers take turns. Width and
batch are smaller than those of the workload `million`, by factors that the rows state as "scale". Rows are appended to
the results file of this machine and commit, after each number of classes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

from mlhead._progress import duration
from mlhead.testing import CASES

from . import machine
from .peaks import QUICK_RETURN
from .records import Row, append_rows

PROVIDERS = ("mlhead: cpp", "mlhead: reference", "torch: bmm")

_STEP = """
import json, sys, time
from pathlib import Path
import torch
from benchmarks.baselines import BASELINES
from mlhead import SparseTargets, group_fc_loss
from mlhead._resident import resident
a = json.loads(sys.argv[1])
def peak():
    return resident()[1] / 2**20
def step(C):
    B, G, E = a["batch"], a["groups"], a["width"]
    torch.manual_seed(0)
    rows = [torch.randint(C, (5,)).unique().tolist() for _ in range(B)]
    targets = SparseTargets.from_lists(rows, C)
    # What a smaller step before had at the most is forgotten.
    Path("/proc/self/clear_refs").write_text("5")
    h = torch.randn(B, G, E, requires_grad=True)
    weight = (torch.randn(G, E, C // G).mul_(0.05)).requires_grad_()
    bias = torch.zeros(C, requires_grad=True)
    def run():
        weight.grad = None
        loss = loss_of()
        forward = peak()
        loss.backward()
        return forward
    def loss_of():
        if a["provider"].startswith("mlhead"):
            backend = a["provider"].split(": ")[1]
            return group_fc_loss(h, weight, bias, targets, C, loss=a["loss"], backend=backend)
        return BASELINES["group_fc_loss"]["torch: bmm"](
            h=h, weight=weight, bias=bias, num_classes=C, loss=a["loss"], targets=targets
        )
    before, gradient = peak(), weight.numel() * 4 / 2**20
    forward = run() - before - (gradient if a["provider"].startswith("mlhead") else 0)  # which has made it already
    most = max(forward, peak() - before - gradient)
    seconds = []
    while len(seconds) < a["steps"] or (sum(seconds) < a["seconds"] and len(seconds) < 100):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return most, seconds
step(max(1, a["classes"] // (10 * a["groups"])) * a["groups"])
print(json.dumps(step(a["classes"])))
"""


def measure(settings: dict) -> tuple[float, list[float]]:
    """MiB beyond inputs, weight and its gradient; and the seconds of further steps."""
    run = subprocess.run(
        [sys.executable, "-c", _STEP, json.dumps(settings)],
        capture_output=True, text=True, env={**os.environ, **QUICK_RETURN},
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(run.stderr.strip().splitlines()[-1])
    most, seconds = json.loads(run.stdout)
    return most, seconds


def scale(dims: dict[str, int]) -> dict[str, int]:
    """By how much sizes are smaller than those of the workload `million`."""
    whole = CASES["group_fc_loss"].workloads["million"]
    letters = {"width": "E", "batch": "B"}
    factors = {name: whole[letter] / dims[name] for name, letter in letters.items()}
    return {name: round(factor) for name, factor in factors.items() if factor > 1 and factor == round(factor)}


def run_group(loss: str, dims: dict[str, int], options: argparse.Namespace) -> list[Row]:
    """Measures all providers with one loss at one size, in turns, and prints a line for each."""
    found: dict[str, list[tuple[float, list[float]]]] = {provider: [] for provider in PROVIDERS}
    more = {"loss": loss, "steps": options.steps, "seconds": options.seconds_each}
    for _ in range(options.turns):
        for provider in PROVIDERS:
            found[provider].append(measure({**dims, **more, "provider": provider}))
    rows = []
    for provider, turns in found.items():
        mib, seconds = max(most for most, _ in turns), sorted(s for _, spent in turns for s in spent)
        title = f"{dims['classes']:>10,} {loss:4} {provider:18}"
        p50 = seconds[len(seconds) // 2]
        print(f"{title} {mib:8.1f} MiB beyond weight and gradient  {p50:8.4f} s a step", flush=True)
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        rows.append(
            {"time": now, "memory": "group_fc_loss", "dims": dims, "scale": scale(dims), "loss": loss,
             "provider": provider, "peak_mib": mib, "seconds": seconds, **machine.facts("cpu")}
        )  # fmt: skip
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints one line for each provider, loss and number of classes."""
    cli = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("--classes", type=int, nargs="+", default=[1_000, 10_000, 100_000, 1_000_000])
    add("--width", type=int, default=256)
    add("--batch", type=int, default=32)
    add("--groups", type=int, default=100)
    add("--loss", action="append", choices=("bce", "asl"), help="default: both")
    add("--steps", type=int, default=3, help="fewest timed steps of each turn")
    add("--seconds-each", type=float, default=0.5, help="time for the steps of each turn, where these take less")
    add("--turns", type=int, default=2)
    add("--out", type=Path, help="results file; default: benchmarks/results/<device>/<commit>.jsonl")
    options = cli.parse_args(arguments)
    uneven = [classes for classes in options.classes if classes % options.groups]
    if uneven:
        cli.error(f"--classes must be multiples of --groups ({options.groups}), got {uneven}")
    path = options.out or machine.results_file("cpu")
    print(f"{machine.banner('cpu')}\nrows go to {path}", flush=True)
    todo = [(classes, loss) for classes in sorted(options.classes) for loss in options.loss or ("bce", "asl")]
    began = time.monotonic()
    for done, (classes, loss) in enumerate(todo):
        print(f"[{done + 1}/{len(todo)}, {duration(time.monotonic() - began)}] {classes:,} {loss}", file=sys.stderr)
        dims = {"classes": classes, **{name: getattr(options, name) for name in ("width", "batch", "groups")}}
        append_rows(path, run_group(loss, dims, options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
