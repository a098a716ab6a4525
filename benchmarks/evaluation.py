"""What metrics cost: their share of the time of an evaluation, and their memory at the size of Open Images.

    python -m benchmarks.evaluation --images 64            40,000 images of 80 classes, the model timed on 64
    python -m benchmarks.evaluation --memory               125,000 images of 9,605 classes: 5 to 6 GB

The share: `mlhead.evaluation.evaluate` runs a model over random images that lie in memory, so that no time goes into
reading them, and the seconds in the model are taken times 40,000 / images. The metrics are measured over all 40,000
images, of random logits. The model is ResNet-50 of timm, or where there is none of plain torch, with the head "gap".

The memory: random logits, in a process of its own, whose peak is that of everything, torch too.

Rows of the kinds "evaluation" and "metrics_memory" go to the results file of the commit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from mlhead import SparseTargets, attach_head
from mlhead._config import TrainConfig
from mlhead._resident import peak
from mlhead.data.loading import Batch
from mlhead.data.reporting import BadDataLog
from mlhead.evaluation import evaluate
from mlhead.metrics import MultiLabelMetrics

from . import machine
from .end_to_end import backbone
from .records import Row, append_rows

LABELS = 3  # of an image, as in MS-COCO
GIB = 2**30


def targets(batch: int, classes: int, generator: torch.Generator) -> SparseTargets:
    """Labels of a batch, as many in every image."""
    spread = torch.rand(batch, classes, generator=generator).topk(LABELS).indices.sort().values
    return SparseTargets(spread.flatten(), torch.arange(batch + 1) * LABELS, None, classes)


def metrics_seconds(images: int, classes: int, batch: int, device: str) -> tuple[float, float]:
    """Seconds in all updates and in the last computation, of random logits on the device."""
    generator, metrics = torch.Generator().manual_seed(0), MultiLabelMetrics(classes, device=device)
    spent = 0.0
    for start in range(0, images, batch):
        size = min(batch, images - start)
        labels = targets(size, classes, generator).to(device)
        logits = torch.randn(size, classes, generator=generator).to(device)
        _wait(device)
        began = time.perf_counter()
        metrics.update(logits, labels)
        _wait(device)
        spent += time.perf_counter() - began
    began = time.perf_counter()
    metrics.compute()
    return spent, time.perf_counter() - began


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def model_seconds(name: str, images: int, options: argparse.Namespace) -> tuple[dict[str, float], str]:
    """Seconds of an evaluation of so many images, by what they went into, and where the backbone is from."""
    torch.manual_seed(0)
    body, source = backbone(name, options.image_size)
    device = torch.device(options.device)
    model = attach_head(body, "gap", options.classes).to(device)
    generator = torch.Generator().manual_seed(0)
    config = TrainConfig(amp="none" if options.dtype == "fp32" else options.dtype)

    def batches(count: int) -> Iterator[Batch]:
        for start in range(0, count, options.batch):
            size = min(options.batch, count - start)
            pixels = torch.randn(size, 3, options.image_size, options.image_size, generator=generator)
            yield Batch(pixels, targets(size, options.classes, generator), [])

    times: dict[str, float] = {}
    for count, kept in ((options.batch, {}), (images, times)):  # the first warms up
        metrics = MultiLabelMetrics(options.classes, device=device)
        evaluate(model, batches(count), config, metrics, device, BadDataLog("error", print), times=kept)
    return times, source


def measure_share(options: argparse.Namespace) -> Row:
    """The row of one backbone."""
    times, source = model_seconds(options.backbone, options.images, options)
    model = times["model"] * options.of / options.images
    updates, last = metrics_seconds(options.of, options.classes, options.batch, options.device)
    return {
        "kind": "evaluation",
        "backbone": options.backbone,
        "backbone_from": source,
        "head_name": "gap",
        "image_size": options.image_size,
        "batch": options.batch,
        "dtype": options.dtype,
        "classes": options.classes,
        "images": options.of,
        "reduced": {"images": f"the model ran on {options.images} of {options.of}"},
        "model_s": model,
        "metrics_s": updates + last,
        "update_s": updates,
        "compute_s": last,
        "share": (updates + last) / (updates + last + model),
    }


_MEMORY = """
import json, sys
from benchmarks.evaluation import metrics_seconds
from mlhead._resident import resident
images, classes, batch = map(int, sys.argv[1:])
metrics_seconds(batch, classes, batch, "cpu")
before, _ = resident()
spent = metrics_seconds(images, classes, batch, "cpu")
print(json.dumps([before, resident()[1], *spent]))
"""


def measure_memory(options: argparse.Namespace) -> Row:
    """The row of the metrics alone at many classes and images, on the CPU."""
    sizes = [str(n) for n in (options.of, options.classes, options.batch)]
    run = subprocess.run([sys.executable, "-c", _MEMORY, *sizes], cwd=machine.ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError((run.stderr.strip().splitlines() or [f"ended by signal {-run.returncode}"])[-1])
    before, most, updates, last = json.loads(run.stdout)
    return {
        "kind": "metrics_memory",
        "classes": options.classes,
        "images": options.of,
        "batch": options.batch,
        "labels": LABELS,
        "before_gib": before / GIB,
        "peak_gib": most / GIB,
        "scores_gib": 4 * options.of * options.classes / GIB,
        "update_s": updates,
        "compute_s": last,
    }


def main(arguments: list[str] | None = None) -> int:
    """Measures one row, prints it and writes it down."""
    cli = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("--memory", action="store_true", help="the memory of the metrics, without a model, on the CPU")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--backbone", default="resnet50", help="a name of timm")
    add("--images", type=int, help="on how many images the model is timed; default: 32, on a GPU 4000")
    add("--of", type=int, help="images of the evaluation; default: 40000, with --memory 125000")
    add("--classes", type=int, help="default: 80, with --memory 9605")
    add("--image-size", type=int, default=448)
    add("--batch", type=int, default=64)
    add("--dtype", choices=("fp32", "bf16"), help="bf16 is autocast; default: fp32 on a CPU, bf16 on a GPU")
    add("--out", type=Path, help="results file; default: benchmarks/results/<device>/<commit>.jsonl")
    options = cli.parse_args(arguments)
    if options.memory:
        options.device = "cpu"
        if not peak():
            cli.error("--memory needs the peak of Linux's /proc")
    on_cpu = options.device == "cpu"
    options.of = options.of or (125_000 if options.memory else 40_000)
    options.classes = options.classes or (9605 if options.memory else 80)
    options.images = options.images or (32 if on_cpu else 4000)
    options.dtype = options.dtype or ("fp32" if on_cpu else "bf16")
    print(machine.banner(options.device))
    found = measure_memory(options) if options.memory else measure_share(options)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    row: dict[str, Any] = {"time": now, **found, **machine.facts(options.device)}
    append_rows(options.out or machine.results_file(options.device), [row])
    print(*(f"{name:14} {value}" for name, value in found.items()), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
