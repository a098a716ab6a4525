"""ML-Decoder's Table 9, and beyond it: what a head costs on TResNet-M at 224, from 100 to 1,000,000 classes.

    python -m benchmarks.table9 --flops      FLOPs only, without a forward pass
    python -m benchmarks.table9              also images a second, training and inference, interleaved; on a GPU the
                                             largest training batch too, and speeds at 80 % of it, as in the paper

On a CPU speeds are taken at a small batch, so only their ratios to GAP mean something. A training step is forward,
BCE, backward and SGD; on a GPU under bf16 autocast. Rows go to the results file of the commit.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import mlhead
from mlhead import GAPHead, MLDecoder, TransformerDecoder

from . import limits, machine
from .head_baselines import PapersDecoder
from .records import append_rows

RESOLUTION, FEATURES = 224, 2048
CLASSES = (100, 1000, 5000, 100_000, 1_000_000)
# The paper's FLOPs in units of 1e9 multiply-adds.
PAPER = {
    ("gap", 100): 5.7,
    ("gap", 1000): 5.7,
    ("gap", 5000): 5.8,
    ("transformer_decoder", 100): 6.6,
    ("transformer_decoder", 1000): 14.2,
    ("transformer_decoder", 5000): 61.1,
    ("ml_decoder", 100): 6.3,
    ("ml_decoder", 1000): 6.3,
    ("ml_decoder", 5000): 6.4,
}
# Of the paper's heads the transformer decoder is quadratic in the classes: nobody trains it at 100,000.
MOST_CLASSES = {"transformer_decoder": 5000, "papers: ml_decoder": 5000}


def _papers(num_classes: int) -> nn.Module:
    head = PapersDecoder(MLDecoder(FEATURES, num_classes))
    head.num_classes = num_classes
    return head


HEADS: dict[str, Callable[[int], nn.Module]] = {
    "gap": partial(GAPHead, FEATURES),
    "ml_decoder": partial(MLDecoder, FEATURES),
    "ml_decoder, shared query dropout": partial(MLDecoder, FEATURES, shared_query_dropout=True),
    "papers: ml_decoder": _papers,
    "transformer_decoder": partial(TransformerDecoder, FEATURES),
}


class Model(nn.Module):
    """TResNet-M's features and a head."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, C) of images (B, 3, 224, 224)."""
        return self.head(self.backbone.forward_features(images))


def backbone() -> nn.Module:
    """TResNet-M, whose forward_features gives maps (B, 2048, 7, 7)."""
    return timm.create_model("tresnet_m", pretrained=False, num_classes=0)


def _sdpa_flops(q: list[int], k: list[int], v: list[int], *_: Any, **__: Any) -> int:
    B, H, N, d = q
    return 2 * B * H * N * k[2] * (d + v[3])


def counter() -> FlopCounterMode:
    """The counter with formulas for mlhead's ops, and for SDPA on a CPU, for which torch itself has none."""
    mlhead.register_flop_formulas()
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={on_cpu: _sdpa_flops})


@cache
def backbone_multiply_adds() -> float:
    """Of one image, in 1e9, by torch's counter."""
    with torch.no_grad(), counter() as count:
        backbone().eval().forward_features(torch.randn(1, 3, RESOLUTION, RESOLUTION))
    return count.get_total_flops() / 2e9


def multiply_adds(head: str, num_classes: int) -> float:
    """Of one image in inference, in 1e9, by torch's counter; the head on fake tensors."""
    with FakeTensorMode(), torch.no_grad(), counter() as count:
        HEADS[head](num_classes).eval()(torch.randn(1, FEATURES, RESOLUTION // 32, RESOLUTION // 32))
    return backbone_multiply_adds() + count.get_total_flops() / 2e9


class Steps:
    """A model and its inputs, one training step and one inference of it."""

    def __init__(self, head: str, num_classes: int, batch: int, device: str, shared: nn.Module | None) -> None:
        self.device = device
        self.model = Model(backbone() if shared is None else shared, HEADS[head](num_classes)).to(device)
        if device == "cuda":
            self.model = self.model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD((p for p in self.model.parameters() if p.requires_grad), lr=1e-4)
        self.images = torch.randn(batch, 3, RESOLUTION, RESOLUTION, device=device)
        if device == "cuda":
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.targets = torch.zeros(batch, num_classes, device=device)
        self.targets[:, :3] = 1.0

    def training(self) -> None:
        """Forward, loss, backward, update."""
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            loss = F.binary_cross_entropy_with_logits(self.model(self.images).float(), self.targets)
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def inference(self) -> None:
        """Forward in evaluation."""
        self.model.eval()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            self.model(self.images)


def largest_batch(head: str, num_classes: int, most: int = 4096) -> int:
    """The largest multiple of 8 of which two training steps fit the GPU's memory; 0 if 8 do not."""

    def fits(batch: int) -> bool:
        try:
            steps = Steps(head, num_classes, batch, "cuda", None)
            steps.training()
            steps.training()
            torch.cuda.synchronize()
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            steps = None  # type: ignore[assignment]
            gc.collect()
            torch.cuda.empty_cache()

    low, high = 0, 8
    while high <= most and fits(high):
        low, high = high, 2 * high
    while high - low > max(8, low // 16):
        middle = (low + high) // 16 * 8
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def measure(names: list[str], num_classes: int, device: str, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Images a second of each head, interleaved on a CPU, one after another on a GPU, where each has its own batch."""
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    # On a CPU all heads share one backbone, so that its memory is touched alike.
    shared = backbone() if device == "cpu" else None
    groups = [names] if device == "cpu" else [[name] for name in names]
    for group in groups:
        batches = dict.fromkeys(group, options.batch)
        if device == "cuda":
            for name in group:
                largest = largest_batch(name, num_classes)
                found[name]["largest_batch"] = largest
                batches[name] = max(1, int(0.8 * largest))
        steps = {name: Steps(name, num_classes, batches[name], device, shared) for name in group}
        for key in ("training", "inference"):
            timings = limits.measure({n: getattr(s, key) for n, s in steps.items()}, device, options.seconds_each)
            for name, timing in timings.items():
                found[name][key] = batches[name] / timing.p50_ms * 1e3
                found[name]["batch"] = batches[name]
        del steps
        gc.collect()
    return found


def table(rows: list[dict[str, Any]]) -> str:
    """The rows, with the speed that is lost against GAP at the same number of classes."""

    def cell(row: dict[str, Any], key: str) -> str:
        if row.get(key) is None:
            return f"{'-':>9} {'':>7}"
        gap = next((r[key] for r in rows if r["head"] == "gap" and r["classes"] == row["classes"] and r.get(key)), None)
        lost = f"{100 * (1 - row[key] / gap):6.1f}%" if gap else ""
        return f"{row[key]:9.2f} {lost:>7}"

    lines = [
        f"{'head':34} {'classes':>9} {'G mul-add':>9} {'paper':>6} {'train/s':>9} {'lost':>7} "
        f"{'infer/s':>9} {'lost':>7} {'batch':>6}"
    ]
    for row in rows:
        paper = row["paper_multiply_adds_e9"]
        lines.append(
            f"{row['head']:34} {row['classes']:9} {row['multiply_adds_e9']:9.2f} {paper if paper else '-':>6} "
            f"{cell(row, 'training')} {cell(row, 'inference')} {row.get('largest_batch') or '-':>6}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    cli = argparse.ArgumentParser(prog="python -m benchmarks.table9", description=__doc__.splitlines()[0])
    add = cli.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--flops", action="store_true", help="FLOPs only")
    add("--classes", type=int, nargs="+", default=list(CLASSES))
    add("--head", action="append", choices=list(HEADS), help="default: all")
    add("--batch", type=int, default=4, help="on a CPU")
    add("--seconds-each", type=float, default=10.0, help="time for one head and pass")
    add("--out", type=Path, help="results file; default: benchmarks/results/<device>/<commit>.jsonl")
    options = cli.parse_args(arguments)
    facts = machine.facts(options.device)
    path = options.out or machine.results_file(options.device)
    print(machine.banner(options.device))
    rows: list[dict[str, Any]] = []
    for num_classes in options.classes:
        names = [n for n in options.head or HEADS if num_classes <= MOST_CLASSES.get(n, num_classes)]
        print(f"{num_classes} classes: {', '.join(names)} ...", file=sys.stderr, flush=True)
        speeds = {} if options.flops else measure(names, num_classes, options.device, options)
        found = [
            {
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "table": "ML-Decoder, Table 9",
                "backbone": "tresnet_m",
                "resolution": RESOLUTION,
                "head": name,
                "classes": num_classes,
                "multiply_adds_e9": multiply_adds(name, num_classes),
                "paper_multiply_adds_e9": PAPER.get((name.removeprefix("papers: ").split(",")[0], num_classes)),
                **speeds.get(name, {}),
                **facts,
            }
            for name in names
        ]
        append_rows(path, found)
        rows += found
    print(table(rows))
    print(f"rows are in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
