"""`mlhead demo-million`: a head of a million classes, trained on a CPU with the loss in the head.

The task is made up, so that it needs no data. Every class has a prototype, a random vector of signs; an image is the
sum of the prototypes of its few classes, with noise. Classes are as unequal as those of large catalogues: class c
occurs about as often as 1 / (c + 100). What a linear head can learn in a minute are the classes that it has seen.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mlhead import record_backends
from mlhead._progress import Progress, duration
from mlhead._resident import resident
from mlhead._usage import usage_fail
from mlhead.checkpoints import write_atomically
from mlhead.heads import GAPHead
from mlhead.losses import BinaryCrossEntropy
from mlhead.metrics import TopKMetrics
from mlhead.ops import SparseTargets, linear_loss
from mlhead.ops.topk import linear_topk

CLASSES, WIDTH, BATCH = 1_000_000, 64, 512
STEPS, STEPS_REFERENCE = 40, 8  # with a compiled backend, and with plain torch alone
LABELS = 2  # in an image, at most
RATE = 0.1  # of SGD, for the sum of the loss over the images of a batch
NOISE = 0.25
HEAD_START = 100  # class c occurs about as often as 1 / (c + HEAD_START)
TEST_IMAGES, MEASUREMENTS = 512, 4


class Planted:
    """Images (B, 1, width) and labels from an endless stream.

    Args:
        num_classes: C.
        width: of the images.
        seed: of prototypes and images.
    """

    def __init__(self, num_classes: int, width: int, seed: int = 0) -> None:
        self.num_classes, self.width = num_classes, width
        self._generator = torch.Generator().manual_seed(seed)
        # A prototype is the product of two rows: C of them would take as much memory as the head itself.
        self._side = math.isqrt(num_classes - 1) + 1
        self._signs = torch.randint(0, 2, (2, self._side, width), generator=self._generator).float() * 2 - 1

    def prototypes(self, classes: Tensor) -> Tensor:
        """The signs (..., width) of classes (...)."""
        return self._signs[0][classes // self._side] * self._signs[1][classes % self._side]

    def frequency(self, c: int) -> float:
        """The probability that one draw is class c."""
        return math.log1p(1 / (c + HEAD_START)) / math.log1p(self.num_classes / HEAD_START)

    def batch(self, images: int) -> tuple[Tensor, SparseTargets]:
        """The next images (B, 1, width) and their labels."""
        u = torch.rand(images, LABELS, dtype=torch.float64, generator=self._generator)
        drawn = HEAD_START * torch.expm1(u * math.log1p(self.num_classes / HEAD_START))
        classes = drawn.long().clamp(max=self.num_classes - 1)
        noise = torch.randn(images, self.width, generator=self._generator)
        features = self.prototypes(classes).sum(1) / math.sqrt(LABELS) + NOISE * noise
        targets = SparseTargets.from_lists([set(row) for row in classes.tolist()], self.num_classes)
        return features.unsqueeze(1), targets


class Measurement(NamedTuple):
    """After `step` steps: loss per image over the last of them (nan before the first), P@1 on fresh images."""

    step: int
    loss: float
    precision: float


class Memory(NamedTuple):
    """In bytes: resident before the head was made, and at the most; the head's own, computed; what dense would add."""

    start: int
    peak: int
    head: int
    dense: int


class Result(NamedTuple):
    """What the run found."""

    measurements: list[Measurement]
    memory: Memory
    backend: str
    seconds: float


def run(
    out: Path,
    *,
    classes: int = CLASSES,
    width: int = WIDTH,
    batch_size: int = BATCH,
    steps: int | None = None,
    seed: int = 0,
    stream: Any = None,
) -> Result:
    """Trains, measures, prints a table and leaves it in `out` with results.json.

    Args:
        out: folder for table.txt and results.json.
        classes: C.
        width: of the features.
        batch_size: B.
        steps: in place of the demo's own number, which is lower without a compiled backend.
        seed: of everything that is random.
        stream: where progress goes, by default stderr.
    """
    for name, value in (("--classes", classes), ("--width", width), ("--batch-size", batch_size), ("--steps", steps)):
        if value is not None and value < 1:
            usage_fail(name, "at least 1", value)
    stream = sys.stderr if stream is None else stream
    task = Planted(classes, width, seed)
    backend = _backend_of_the_loss(task)
    if steps is None:
        steps = STEPS if backend != "reference" else STEPS_REFERENCE
    began, (start, _) = time.monotonic(), resident()

    share = min(max(LABELS / classes, 1e-6), 0.5)
    head = GAPHead(width, classes, prior=share, loss=BinaryCrossEntropy(reduction="sum"))
    torch.nn.init.zeros_(head.fc.weight)
    optimizer = torch.optim.SGD(head.parameters(), lr=RATE)
    test = task.batch(min(TEST_IMAGES, 4 * batch_size))
    measurements = [Measurement(0, math.nan, precision(head, *test))]
    progress = Progress(steps, f"{classes:,} classes", unit_size=batch_size, stream=stream)
    due = {math.ceil(steps * (i + 1) / MEASUREMENTS) for i in range(MEASUREMENTS)}
    losses: list[float] = []
    for step in range(1, steps + 1):
        features, targets = task.batch(batch_size)
        optimizer.zero_grad(set_to_none=True)
        loss = head(features, targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item() / batch_size)
        if step in due:
            with progress.pause():
                found = Measurement(step, sum(losses) / len(losses), precision(head, *test))
            measurements.append(found)
            losses = []
        note = f"loss {loss.item() / batch_size:.2f}  P@1 {measurements[-1].precision:.3f}"
        progress.advance(1, f"{note}  {_gigabytes(resident()[1])} at most")
    progress.close()

    own = 2 * sum(p.numel() * p.element_size() for p in head.parameters())
    memory = Memory(start, resident()[1], own, 2 * 4 * batch_size * classes)
    result = Result(measurements, memory, backend, time.monotonic() - began)
    title = f"{classes:,} classes, width {width}, {batch_size} images a step, {torch.get_num_threads()} threads"
    text = table(result, f"{title}, backend {backend}, {duration(result.seconds)}", task)
    stream.flush()
    print(text, flush=True)
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "table.txt", lambda file: file.write((text + "\n").encode()))
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "classes": classes, "width": width}
    facts |= {"batch_size": batch_size, "seed": seed, "backend": backend, "seconds": result.seconds}
    facts |= {"measurements": [m._asdict() for m in measurements], "memory": memory._asdict()}
    write_atomically(out / "results.json", lambda file: file.write(json.dumps(facts, indent=1).encode()))
    return result


def _backend_of_the_loss(task: Planted) -> str:
    features, _ = task.batch(1)
    with record_backends() as backends:
        linear_loss(features[0], torch.zeros(1, task.width), None, torch.zeros(1, 1))
    return backends.get("group_fc_loss", "reference")


@torch.no_grad()
def precision(head: GAPHead, features: Tensor, targets: SparseTargets) -> float:
    """P@1: the share of images whose best class is one of their labels; logits (B, C) are not made for it."""
    metrics = TopKMetrics(ks=(1,))
    for i in range(0, len(features), 128):
        part = slice(i, min(i + 128, len(features)))
        offsets = targets.offsets[part.start : part.stop + 1]
        indices = targets.indices[offsets[0] : offsets[-1]]
        _, best = linear_topk(head(features[part], pre_logits=True), head.fc.weight, head.fc.bias, 1)
        metrics.update(best, SparseTargets(indices, offsets - offsets[0], None, targets.num_classes))
    return metrics.compute()["P@1"]


def table(result: Result, title: str, task: Planted) -> str:
    """What was learned, then the memory."""
    rows = [f"{'step':>6}  {'loss per image':>14}  {'P@1':>6}"]
    for m in result.measurements:
        rows.append(f"{m.step:6d}  {'' if math.isnan(m.loss) else f'{m.loss:.3f}':>14}  {m.precision:6.3f}")
    guess = 1 - (1 - task.frequency(0)) ** LABELS
    memory = result.memory
    lines = [
        ("resident before the head was made", memory.start, "measured"),
        ("weight, bias and their gradients", memory.head, "computed"),
        ("resident at the most", memory.peak, "measured"),
        ("dense logits and targets in fp32 would add", memory.dense, "computed"),
    ]
    read = [f"{name:43} {_gigabytes(size):>9}  {how}" for name, size, how in lines]
    notes = f"P@1 is on fresh images; always naming the most frequent class gives {guess:.3f}."
    return "\n".join([title, "", *rows, "", *read, "", notes])


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size else "unknown"
