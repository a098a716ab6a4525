"""End to end: a training step and inference of a whole model, and what share of them its head takes, before and after.

    python -m benchmarks.end_to_end --quick                  ResNet-50, under 100 seconds on 2 CPU cores
    python -m benchmarks.end_to_end --backbone vit_base_patch16_224 --head csra --classes 80 --batch 64

For each backbone and number of classes, one interleaved run of the backbone alone and of each head three ways, all with
the same parameters: "before", the papers' formulation; "after", mlhead; "after, loss in the head", without logits. All
are first compared on the backbone's features: the loss and its gradient. A training step is forward, mean BCE, backward
and SGD with momentum; the backbone alone gets a given gradient of its features in the place of a loss. A head's time is
the whole's less that of the backbone alone: `resolved` says whether it stands out of the spread of both. On a GPU under
bf16 autocast. On a CPU images and batches are smaller than in the papers, as `reduced` says, and so is the backbone's
work, not that of the last layer. Rows of kind "end_to_end" go to the results file of the commit.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mlhead import attach_head
from mlhead.backbones import HeadedModel

from . import head as whole_head
from . import limits, machine, plain_backbones, run
from .papers_heads import HEADS, as_maps
from .plan import DTYPES
from .records import Row, append_rows
from .verify import Verdict, attempt

BACKBONES = ("resnet50", "tresnet_m", "vit_base_patch16_224")
CLASSES = (80, 9605)  # MS-COCO and Open Images
RESOLUTION = 224
# Image size and batch.
SIZES = {("cuda", False): (224, 64), ("cuda", True): (224, 64), ("cpu", False): (128, 4), ("cpu", True): (96, 1)}
IN_HEAD = "after, loss in the head"
VARIANTS = ("before", "after", IN_HEAD)
Key = tuple[str, str]  # head and variant
ALONE = ("", "")  # the backbone
PASSES = ("training", "inference")
OPTIMIZER = {"lr": 1e-4, "momentum": 0.9}


def backbone(name: str, image_size: int) -> tuple[nn.Module, str]:
    """A model with `forward_features`, and where it is from: timm, or where there is none plain torch."""
    try:
        import timm
    except (ImportError, RuntimeError) as error:  # the latter from a torchvision that does not fit torch
        if name == "resnet50":
            return plain_backbones.ResNet50(), "plain torch"
        if name == "vit_base_patch16_224":
            return plain_backbones.ViTBase(image_size), "plain torch"
        raise RuntimeError(f"{name} needs timm, which cannot be imported here") from error
    size = {"img_size": image_size} if name.startswith("vit") else {}
    return timm.create_model(name, pretrained=False, num_classes=0, **size), f"timm {timm.__version__}"


@dataclass
class Setup:
    """What is measured in one interleaved run: a backbone with several heads, and its inputs.

    Args:
        body: The backbone with a head, of which only the features are used.
        models: By head and variant.
        images: (B, 3, image_size, image_size).
        targets: (B, C), three positives an image.
        dtype: Of autocast, or fp32 without.
        source: Where the backbone is from.
        about: The options of each head.
        verdicts: What `check` found.
    """

    body: HeadedModel
    models: dict[Key, HeadedModel]
    images: Tensor
    targets: Tensor
    dtype: torch.dtype
    source: str
    about: dict[str, str]
    verdicts: dict[Key, Verdict] = field(default_factory=dict)

    def autocast(self) -> Any:
        """The context of a forward."""
        return torch.autocast(self.images.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def clear(self) -> None:
        """Lets all gradients go."""
        for model in (self.body, *self.models.values()):
            model.zero_grad(set_to_none=True)

    def loss(self, key: Key, model: Callable[..., Tensor], x: Tensor) -> Tensor:
        """The mean binary cross-entropy, of logits or in the head; `model` takes what `x` is."""
        with self.autocast():
            if key[1] == IN_HEAD:
                return model(x, self.targets)
            return F.binary_cross_entropy_with_logits(model(x).float(), self.targets)


def make(name: str, heads: list[str], num_classes: int, device: str, options: argparse.Namespace) -> Setup:
    """Backbone and heads from seed 0; variants of one head share its parameters."""
    torch.manual_seed(0)
    model, source = backbone(name, options.image_size)
    body = attach_head(model, "gap", 1).to(device)
    images = torch.randn(options.batch, 3, options.image_size, options.image_size, device=device)
    if device == "cuda":
        body, images = body.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
    models, about = {}, {}
    for head in heads:
        ours, papers = HEADS[head](body.num_features, num_classes)
        about[head] = ours.extra_repr()
        for variant, module in zip(VARIANTS, (papers, ours, ours), strict=True):
            # One backbone for all, so that its memory is touched alike.
            models[head, variant] = HeadedModel(body.backbone, body.norm, module.to(device), body.num_features)
    targets = torch.zeros(options.batch, num_classes, device=device)
    targets.scatter_(1, torch.randint(num_classes, (options.batch, 3), device=device), 1.0)
    return Setup(body, models, images, targets, DTYPES[options.dtype], source, about)


def check(setup: Setup) -> None:
    """Compares the variants of each head on the backbone's features: the loss and its gradient, in evaluation."""
    for model in (setup.body, *setup.models.values()):
        model.eval()
    with torch.no_grad(), setup.autocast():
        features = setup.body.forward_features(setup.images)
    one = torch.ones((), device=features.device)
    for head in setup.about:
        calls = {v: partial(setup.loss, (head, v), setup.models[head, v].head) for v in VARIANTS}
        errors, _ = attempt(partial(whole_head.verify, {"papers": calls["before"], **calls}, features, one))
        ours = setup.models[head, "after"].head
        limit = whole_head.allowed(as_maps(features).to(setup.dtype), getattr(ours, "embed_dim", 1))
        # Only where there is a ReLU may its gradients differ by more than rounding.
        budget = {"loss": limit["logits"], "dx": limit["dx" if hasattr(ours, "embed_dim") else "logits"]}
        for variant in VARIANTS:
            found, verdict = errors, Verdict("ok")
            if errors is None:  # which of them was it?
                pair = {"papers": calls["before"], variant: calls[variant]}
                found, verdict = attempt(partial(whole_head.verify, pair, features, one))
            if found is not None:
                mine = {"loss": found[variant]["logits"], "dx": found[variant]["dx"]}
                verdict.errors = {name: {"error": mine[name], "budget": budget[name]} for name in mine}
                wrong = [name for name in mine if not mine[name] <= budget[name]]
                if wrong:
                    verdict.status = "wrong"
                    verdict.message = f"differs from the papers' formulation: {', '.join(wrong)}"
            setup.verdicts[head, variant] = verdict


def functions(setup: Setup, key: str) -> dict[Key, Callable[[], Any]]:
    """One training step or one inference of each variant that was right, and of the backbone alone."""
    for model in (setup.body, *setup.models.values()):
        model.train(key == "training")
    names = [name for name in setup.models if setup.verdicts[name].status == "ok"]
    if key == "inference":

        @torch.no_grad()
        def infer(call: Callable[[Tensor], Tensor]) -> None:
            with setup.autocast():
                call(setup.images)

        calls: dict[Key, Callable[[], Any]] = {ALONE: partial(infer, setup.body.forward_features)}
        return calls | {n: partial(infer, setup.models[n]) for n in names if n[1] != IN_HEAD}

    modules = nn.ModuleList([setup.body.backbone, setup.body.norm, *(m.head for m in setup.models.values())])
    # Those without a gradient are passed over: one optimizer does for the backbone alone and for every head.
    optimizer = torch.optim.SGD([p for p in modules.parameters() if p.requires_grad], **OPTIMIZER)

    def step(name: Key) -> None:
        optimizer.zero_grad(set_to_none=True)
        if name == ALONE:
            with setup.autocast():
                features = setup.body.forward_features(setup.images)
            features.backward(torch.full_like(features, 1.0 / features.numel()))
        else:
            setup.loss(name, setup.models[name], setup.images).backward()
        optimizer.step()

    return {name: partial(step, name) for name in [ALONE, *names]}


def timed(setup: Setup, key: str, device: str, options: argparse.Namespace) -> dict[Key, tuple[Verdict, Any, Any]]:
    """Verdict, timing and on a GPU peak memory of the backbone alone and of every right variant, interleaved."""
    ready = functions(setup, key)
    peaks, found = {}, {}
    for which, function in list(ready.items()) if device == "cuda" else ():  # also finds out what does not fit
        _, verdict = attempt(function)  # makes what stays: momenta, compiled kernels
        setup.clear()
        if verdict.status == "ok":
            peaks[which], verdict = attempt(partial(run.peak_mib, function, device))
        setup.clear()
        if verdict.status != "ok":
            found[which] = (verdict, None, None)
            del ready[which]
    for which, timing in limits.measure(ready, device, options.seconds_each, least=3).items():
        found[which] = (Verdict("ok"), timing, peaks.get(which))
    return found


def run_group(name: str, heads: list[str], num_classes: int, device: str, options: argparse.Namespace) -> list[Row]:
    """Verifies and times one backbone with one number of classes."""
    setup, problem = attempt(partial(make, name, heads, num_classes, device, options))
    if setup is not None:
        _, problem = attempt(partial(check, setup))
    small = options.image_size < RESOLUTION
    common = {
        "kind": "end_to_end",
        "backbone": name,
        "backbone_from": setup.source if setup is not None else None,
        "classes": num_classes,
        "image_size": options.image_size,
        "batch": options.batch,
        "reduced": {"image_size": f"{options.image_size} in place of {RESOLUTION}"} if small else {},
        "dtype": options.dtype,
        "optimizer": {"name": "SGD", **OPTIMIZER},
    }
    rows = []
    for key in PASSES:
        done, failure = (
            attempt(partial(timed, setup, key, device, options)) if problem.status == "ok" else ({}, problem)
        )
        _, alone, _ = (done or {}).get(ALONE, (None, None, None))
        for which in [ALONE, *((head, variant) for head in heads for variant in VARIANTS)]:
            if key == "inference" and which[1] == IN_HEAD:
                continue
            checked = setup.verdicts.get(which, Verdict("ok")) if setup is not None else problem
            verdict, timing, peak = (done or {}).get(which, (failure, None, None))
            verdict = checked if checked.status != "ok" else verdict
            both = timing is not None and alone is not None and which != ALONE
            rows.append(
                {
                    "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                    **common,
                    "head_name": which[0] or None,
                    "head_options": setup.about.get(which[0]) if setup is not None else None,
                    "variant": which[1] or "backbone alone",
                    "pass": key,
                    "status": verdict.status,
                    "message": verdict.message,
                    **(asdict(timing) if timing else dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "samples"))),
                    "backbone_ms": alone.p50_ms if alone else None,
                    "head_ms": timing.p50_ms - alone.p50_ms if both else None,
                    "share": 1 - alone.p50_ms / timing.p50_ms if both else None,
                    "resolved": timing.p20_ms > alone.p80_ms if both else None,
                    "peak_mib": peak,
                    "errors": checked.errors,
                    **machine.facts(device),
                }
            )
    return rows


def table(rows: list[Row]) -> str:
    """Medians; "?" where the share of the head does not stand out of the spread."""
    lines = [
        f"{'backbone':21} {'classes':>7} {'pass':9} {'head':11} {'variant':24} {'ms':>9} {'of head':>9} {'share':>8} "
        f"{'before/this':>11} {'peak MiB':>8}"
    ]
    for row in rows:
        start = (
            f"{row['backbone']:21} {row['classes']:7} {row['pass']:9} {row['head_name'] or '':11} {row['variant']:24}"
        )
        if row["p50_ms"] is None:
            lines.append(f"{start} {row['status']}: {row['message']}")
            continue
        share = "" if row["share"] is None else f"{100 * row['share']:.1f}%{' ' if row['resolved'] else '?'}"
        own = "" if row["head_ms"] is None else f"{row['head_ms']:.2f}"
        keys = ("backbone", "classes", "pass", "head_name", "image_size", "batch", "dtype")
        before = [r["p50_ms"] for r in rows if r["variant"] == "before" and all(r[k] == row[k] for k in keys)]
        factor = f"{before[0] / row['p50_ms']:.2f}" if before and before[0] else ""
        peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        lines.append(f"{start} {row['p50_ms']:9.2f} {own:>9} {share:>8} {factor:>11} {peak:>8}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status: 1 where anything is wrong or failed."""
    cli = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--quick", action="store_true", help="one backbone unless --backbone names others, few repeats")
    add("--backbone", nargs="+", help=f"names of timm; default: {', '.join(BACKBONES)}")
    add("--head", nargs="+", choices=list(HEADS), default=list(HEADS))
    add("--classes", type=int, nargs="+", default=list(CLASSES))
    add("--image-size", type=int, help=f"default: {RESOLUTION}; on a CPU 128, with --quick 96")
    add("--batch", type=int, help="default: 64; on a CPU 4, with --quick 1")
    add("--dtype", choices=("fp32", "bf16"), help="bf16 is autocast; default: fp32 on a CPU, bf16 on a GPU")
    add("--seconds-each", type=float, help="time for each variant and pass; default: 4, with --quick 1")
    add("--minutes", type=float, help="begin no further backbone after this time")
    add("--out", type=Path, help="results file; default: benchmarks/results/<device>/<commit>.jsonl")
    options = cli.parse_args(arguments)
    device, began = options.device, time.monotonic()
    image_size, batch = SIZES[device, options.quick]
    options.image_size, options.batch = options.image_size or image_size, options.batch or batch
    options.dtype = options.dtype or ("fp32" if device == "cpu" else "bf16")
    options.seconds_each = options.seconds_each or (1.0 if options.quick else 4.0)
    path = options.out or machine.results_file(device)
    print(machine.banner(device))
    print(f"images of {options.image_size}, batch {options.batch}, {options.dtype}; rows go to {path}", flush=True)
    rows: list[Row] = []
    unreached = []
    for name in options.backbone or (BACKBONES[:1] if options.quick else BACKBONES):
        for num_classes in options.classes:
            if options.minutes and time.monotonic() - began > 60 * options.minutes:
                unreached.append(f"{name}, {num_classes} classes")
                continue
            print(f"{name}, {num_classes} classes ...", file=sys.stderr, flush=True)
            found = run_group(name, options.head, num_classes, device, options)
            append_rows(path, found)
            rows += found
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    print(table(rows))
    if unreached:
        print("\nNot reached:", *unreached, sep="\n  ")
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
