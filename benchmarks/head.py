"""The whole ML-Decoder head against plain torch: features in, logits out, and back.

    python -m benchmarks.head                                     the workload that the speed on a CPU is promised for
    python -m benchmarks.head --workload imagenet --compile default

All providers hold the same parameters. They are first compared in evaluation, output and gradients, then timed
interleaved in training (with dropout, drawn for each image) and in inference. The limit is the sum of the head's matrix
products at the rate of a large product measured in the same run. Rows go to the results file of the commit.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mlhead
from mlhead import MLDecoder

from . import limits, machine
from .head_baselines import PapersDecoder, RewrittenDecoder
from .plan import DTYPES
from .records import append_rows

# B, L, D, C, G; E = 768. The first is for CPUs, the others are those of the ops.
WORKLOADS: dict[str, tuple[int, int, int, int, int]] = {
    "openimages-16": (16, 49, 2048, 9605, 100),
    "voc-16": (16, 196, 2048, 20, 20),
    "small": (2, 49, 512, 20, 20),
    "imagenet": (256, 49, 2048, 1000, 100),
    "openimages": (128, 49, 2048, 9605, 100),
    "coco": (64, 196, 2048, 80, 80),
    "voc": (64, 196, 2048, 20, 20),
}
DEFAULT = {"cpu": ("openimages-16", "voc-16", "small"), "cuda": ("imagenet", "openimages", "coco", "voc", "small")}


def make(workload: str, device: str, dtype: torch.dtype) -> tuple[dict[str, nn.Module], Tensor, Tensor]:
    """The providers by name, features (B, D, height, width) and a gradient of the logits."""
    B, L, D, C, G = WORKLOADS[workload]
    torch.manual_seed(0)
    head = MLDecoder(D, C, groups=G, device=device, dtype=dtype)
    side = round(L**0.5)
    features = torch.randn(B, D, side, L // side, device=device, dtype=dtype).relu_()
    # The same parameters, but for an attribute; state dicts are equal.
    shared = copy.copy(head)
    shared._modules = dict(head._modules)
    shared.layers = nn.ModuleList([copy.copy(head.layers[0])])
    shared.layers[0].shared_query_dropout = True
    providers: dict[str, nn.Module] = {
        "mlhead": head,
        "mlhead, shared query dropout": shared,
        "papers": PapersDecoder(head),
        "torch: bmm, sdpa": RewrittenDecoder(head),
    }
    return providers, features, torch.randn(B, C, device=device, dtype=dtype)


def verify(
    providers: dict[str, Callable[..., Tensor]], features: Tensor, dlogits: Tensor
) -> dict[str, dict[str, float]]:
    """Differences from the papers' formulation in evaluation, of logits and of dx, by their norms."""
    found: dict[str, list[Tensor]] = {}
    for name, call in providers.items():
        x = features.detach().requires_grad_()
        logits = call(x)
        found[name] = [logits.detach(), *torch.autograd.grad(logits, x, dlogits)]
    exact = found["papers"]
    return {
        name: {
            key: float((a - b).float().norm() / b.float().norm())
            for key, a, b in zip(("logits", "dx"), tensors, exact, strict=True)
        }
        for name, tensors in found.items()
    }


def allowed(features: Tensor, embed_dim: int) -> dict[str, float]:
    """How far providers may differ.

    Where a feature of the memory is 0 up to rounding, ReLU lets its gradient pass or not: each such case changes dx by
    about one part in the root of the number of those features. Three are allowed for.
    """
    rounding = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[features.dtype]
    memory = features.shape[0] * features.shape[2] * features.shape[3] * embed_dim
    return {"logits": rounding, "dx": rounding + (3 / memory) ** 0.5}


def flops(head: nn.Module, features: Tensor) -> dict[str, int]:
    """What torch's counter finds in the head's products: forward in evaluation, and a training step."""
    mlhead.register_flop_formulas()
    counts = {}
    for key, training in (("inference", False), ("training", True)):
        head.train(training)
        x = features.detach().requires_grad_(training)
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
            logits = head(x)
            if training:
                logits.sum().backward()
        counts[key] = counter.get_total_flops()
    head.zero_grad(set_to_none=True)
    return counts


def run(workload: str, device: str, dtype_name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Verifies and times one workload."""
    dtype = DTYPES[dtype_name]
    torch._dynamo.reset()  # which counts the forms that one function was compiled in, and gives up after eight
    modules, features, dlogits = make(workload, device, dtype)
    head = modules["mlhead"]
    calls: dict[str, Callable[..., Tensor]] = dict(modules)
    for mode in options.compile or ():
        for name in modules:
            chosen = None if mode == "default" else mode
            calls[f"compile{'' if chosen is None else ' ' + mode}: {name}"] = torch.compile(
                modules[name], mode=chosen, dynamic=False
            )
    for module in modules.values():
        module.eval()
    errors = verify(calls, features, dlogits)
    budget = allowed(features, head.embed_dim)
    wrong = {name for name, error in errors.items() if not all(error[key] <= budget[key] for key in budget)}
    counts = flops(head, features)
    parameters = [p for p in head.parameters() if p.requires_grad]

    def step(call: Callable[..., Tensor]) -> Callable[[], Any]:
        x = features.detach().requires_grad_()
        return lambda: torch.autograd.grad(call(x), [x, *parameters], dlogits)

    def inference(call: Callable[..., Tensor]) -> Callable[[], Any]:
        @torch.no_grad()
        def once() -> Tensor:
            return call(features)

        return once

    rows = []
    for key, function in (("training", step), ("inference", inference)):
        for module in modules.values():
            module.train(key == "training")
        timings = limits.measure(
            {name: function(call) for name, call in calls.items() if name not in wrong}, device, options.seconds_each
        )
        limit = counts[key] / limits.gemm_rate(device, dtype) * 1e3
        for name in calls:
            timing = timings.get(name)
            rows.append(
                {
                    "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    "head": "ml_decoder",
                    "workload": workload,
                    "dims": dict(zip(("B", "L", "D", "C", "G"), WORKLOADS[workload], strict=True)),
                    "dtype": dtype_name,
                    "provider": name,
                    "pass": key,
                    "errors": errors[name],
                    "status": "wrong" if name in wrong else "ok",
                    **(asdict(timing) if timing else {}),
                    "limit_ms": limit,
                    "fraction": limit / timing.p50_ms if timing else None,
                    "gemm_tflops": limits.gemm_rate(device, dtype) / 1e12,
                    **machine.facts(device),
                }
            )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Times, and how many times as long as mlhead each takes."""
    lines = [
        f"{'workload':14} {'pass':10} {'provider':36} {'p50 ms':>9} {'p20':>9} {'p80':>9} {'/mlhead':>8} {'limit':>6}"
    ]
    own = {(r["workload"], r["dtype"], r["pass"]): r.get("p50_ms") for r in rows if r["provider"] == "mlhead"}
    for r in rows:
        if "p50_ms" not in r:
            lines.append(f"{r['workload']:14} {r['pass']:10} {r['provider']:36} wrong: {r['errors']}")
            continue
        base = own[r["workload"], r["dtype"], r["pass"]]
        ratio = f"{r['p50_ms'] / base:8.2f}" if base else " " * 8
        lines.append(
            f"{r['workload']:14} {r['pass']:10} {r['provider']:36} {r['p50_ms']:9.2f} {r['p20_ms']:9.2f} "
            f"{r['p80_ms']:9.2f} {ratio} {r['fraction']:6.2f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a provider of mlhead is wrong."""
    cli = argparse.ArgumentParser(prog="python -m benchmarks.head", description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--workload", action="append", choices=list(WORKLOADS), help="default: by device")
    add("--dtype", action="append", choices=("fp32", "fp16", "bf16"), help="default: fp32 on a CPU, bf16 on a GPU")
    add("--compile", action="append", choices=("default", "max-autotune"), help="also torch.compile of each provider")
    add("--seconds-each", type=float, default=4.0, help="time for one provider and pass")
    add("--out", type=Path, help="results file; default: benchmarks/results/<device>/<commit>.jsonl")
    options = cli.parse_args(arguments)
    path = options.out or machine.results_file(options.device)
    print(machine.banner(options.device))
    rows: list[dict[str, Any]] = []
    for dtype in options.dtype or (["fp32"] if options.device == "cpu" else ["bf16"]):
        for workload in options.workload or DEFAULT[options.device]:
            print(f"{workload} {dtype} ...", file=sys.stderr, flush=True)
            found = run(workload, options.device, dtype, options)
            append_rows(path, found)
            rows += found
            print(table(found), flush=True)
    print(f"rows are in {path}")
    return int(any(r["status"] != "ok" and "mlhead" in r["provider"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
