"""Peak memory and time of a training step of a large head on the CPU: the loss in the head, the reference, eager torch.

    python -m benchmarks.memory --classes 1000000 --width 256 --batch 32

Each provider runs in a process of its own, which measures what its step adds to the resident memory beyond inputs,
weight and, from when it is made on, the weight's gradient, and times further steps. The providers take turns. Rows are
appended to the results file of this machine and commit.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from datetime import datetime, timezone

from . import machine
from .records import append_rows

PROVIDERS = ("mlhead: cpp", "mlhead: reference", "torch: bmm")

_STEP = """
import json, sys, time
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
    for _ in range(a["steps"]):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return most, seconds
step(1000 * a["groups"])
print(json.dumps(step(a["classes"])))
"""


def measure(settings: dict) -> tuple[float, list[float]]:
    """MiB beyond inputs, weight and its gradient; and the seconds of further steps."""
    # What is freed goes back to the system at once, so that what is resident is alive.
    quick_return = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", _STEP, json.dumps(settings)],
        capture_output=True, text=True, env={**os.environ, **quick_return},
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(run.stderr.strip().splitlines()[-1])
    most, seconds = json.loads(run.stdout)
    return most, seconds


def main(arguments: list[str] | None = None) -> int:
    """Measures and prints one line for each provider and loss."""
    cli = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    cli.add_argument("--classes", type=int, default=1_000_000)
    cli.add_argument("--width", type=int, default=256)
    cli.add_argument("--batch", type=int, default=32)
    cli.add_argument("--groups", type=int, default=100)
    cli.add_argument("--loss", action="append", choices=("bce", "asl"), help="default: both")
    cli.add_argument("--steps", type=int, default=3, help="timed steps of each turn")
    cli.add_argument("--turns", type=int, default=2)
    options = cli.parse_args(arguments)
    rows = []
    print(machine.banner("cpu"))
    for loss in options.loss or ("bce", "asl"):
        dims = {name: getattr(options, name) for name in ("classes", "width", "batch", "groups")}
        found: dict[str, list[tuple[float, list[float]]]] = {provider: [] for provider in PROVIDERS}
        for _ in range(options.turns):
            for provider in PROVIDERS:
                found[provider].append(measure({**dims, "loss": loss, "provider": provider, "steps": options.steps}))
        for provider, turns in found.items():
            mib, seconds = max(most for most, _ in turns), sorted(s for _, spent in turns for s in spent)
            p50 = seconds[len(seconds) // 2]
            print(f"{loss:4} {provider:18} {mib:8.1f} MiB beyond weight and gradient  {p50:6.3f} s a step", flush=True)
            now = datetime.now(timezone.utc).isoformat(timespec="seconds")
            rows.append(
                {"time": now, "memory": "group_fc_loss", "dims": dims, "loss": loss, "provider": provider,
                 "peak_mib": mib, "seconds": seconds, **machine.facts("cpu")}
            )  # fmt: skip
    append_rows(machine.results_file("cpu"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
