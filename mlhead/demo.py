"""`mlhead demo`: three heads on the same backbone, the same data and the same number of steps, compared honestly.

A last row has 10,000 classes and the loss in the head; it is another task, and no part of the comparison.

How the settings were found, and what else was tried, is in docs/demo.md.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mlhead import inference, record_backends, train, visualize
from mlhead._config import TrainConfig
from mlhead._progress import duration
from mlhead._runlog import read_log
from mlhead._usage import usage_fail
from mlhead.checkpoints import write_atomically
from mlhead.data.scenes import Scenes

PRETRAIN_STEPS, STEPS = 200, 800
MOST_NAMES = 5  # above a picture
VAL_SCENES, TEST_SCENES, POINTING_SCENES, PICTURES = 500, 2_000, 500, 3


class Contestant(NamedTuple):
    """A head of the comparison: its name in the table, and its own options of training."""

    title: str
    options: dict[str, Any]


CONTESTANTS = {
    "gap": Contestant("GAP", {"lr": 2e-3, "head_lr_mult": 100.0, "weight_decay": 0.0}),
    "csra": Contestant(
        "CSRA", {"lr": 4e-3, "head_opt": {"num_heads": 2, "lam": 1.0, "normalize": False, "bias": True}}
    ),
    "ml_decoder": Contestant(
        "ML-Decoder",
        {
            "lr": 4e-3,
            "head_opt": {"groups": 100, "embed_dim": 128, "num_heads": 4, "feedforward_dim": 256, "dropout": 0.0},
        },
    ),
}


# The row of 10,000 classes: numbers of four digits, a head trained with the loss inside, from CSRA's backbone.
MANY_CLASSES, MANY_STEPS, MANY_BATCH, MANY_FROM = 10_000, 300, 64, "csra"
MANY = Contestant(
    "GAP, loss in the head",
    {
        "head": "gap",
        "loss": "asl",
        "lr": 2e-3,
        "head_lr_mult": 10.0,
        "weight_decay": 0.0,
        "long_tail": True,
    },
)


class ManyResult(NamedTuple):
    """The row of 10,000 classes: P@1 and recall among the best 10, and both for always the most frequent classes."""

    precision: float
    recall: float
    constant_precision: float
    constant_recall: float
    images_per_s: float
    parameters: int
    backends: dict[str, str]
    train_s: float


class Result(NamedTuple):
    """One row of the table."""

    head: str
    metrics: dict[str, float]
    pointing: float
    images_per_s: float
    parameters: int
    backends: dict[str, str]
    train_s: float


def run(out: Path, *, steps: int | None = None, seed: int = 0, stream: Any = None) -> list[Result]:
    """Trains, measures and draws; prints one table and leaves everything in `out`.

    Args:
        out: folder for the runs, table.txt, results.json, curves.png and the attention pictures.
        steps: for each head, in place of the demo's own number.
        seed: of the weights and the data.
        stream: where progress goes, by default stderr.
    """
    if steps is not None and steps < 1:
        usage_fail("--steps", "at least 1", steps)
    began = time.monotonic()
    stream = sys.stderr if stream is None else stream

    def say(line: str) -> None:
        print(line, file=stream, flush=True)

    common: dict[str, Any] = {
        "batch_size": 32,
        "seed": seed,
        "val_length": VAL_SCENES,
        "log_every": 10,
        "train_length": 10**6,
    }
    say("1 of 5: a backbone learns single digits, so that every head starts from the same features")
    first = TrainConfig(
        out=str(out / "backbone"),
        num_classes=10,
        head="gap",
        lr=4e-3,
        steps=PRETRAIN_STEPS if steps is None else min(steps, PRETRAIN_STEPS),
        **{**common, "batch_size": 64},
    )
    train.train(first, overwrite=True, stream=stream)

    results = []
    for number, (head, contestant) in enumerate(CONTESTANTS.items(), start=2):
        say(f"{number} of 5: {contestant.title} learns numbers of two digits (100 classes)")
        count = STEPS if steps is None else steps
        config = TrainConfig(
            out=str(out / head),
            head=head,
            steps=count,
            eval_every=max(1, count // 8),
            init_backbone=str(out / "backbone/last.pt"),
            **common,
            **contestant.options,
        )
        results.append(_compete(head, config, stream))
    say(f"5 of 5: {MANY.title}, learns numbers of four digits ({MANY_CLASSES:,} classes)")
    many = _many_classes(out, MANY_STEPS if steps is None else min(steps, MANY_STEPS), common, stream)
    _report(out, results, many, stream)
    draw(out, seed)
    say(f"learning curves and attention pictures are in {out}; all of it took {duration(time.monotonic() - began)}")
    return results


def _compete(head: str, config: TrainConfig, stream: Any) -> Result:
    began = time.monotonic()
    with record_backends() as backends:
        summary = train.train(config, overwrite=True, stream=stream)
    train_s = time.monotonic() - began
    checkpoint = summary.out / "last.pt"
    # The weights of the last step for all of them: choosing the best step would favour the unsteady.
    metrics = inference.evaluate_checkpoint(checkpoint, changes={"val_length": TEST_SCENES}, stream=stream)
    loaded = inference.load_model(checkpoint)
    parameters = sum(p.numel() for p in loaded.model.head.parameters() if p.requires_grad)
    pointing = pointing_accuracy(loaded, POINTING_SCENES)
    return Result(head, metrics, pointing, summary.images_per_s, parameters, dict(backends), train_s)


def _many_classes(out: Path, steps: int, common: dict[str, Any], stream: Any) -> ManyResult:
    began = time.monotonic()
    changes = {"num_classes": MANY_CLASSES, "image_size": 40, "batch_size": MANY_BATCH, "val_length": 20}
    config = TrainConfig(
        out=str(out / "many"),
        steps=steps,
        eval_every=steps,
        fused_loss=True,
        init_backbone=str(out / MANY_FROM / "last.pt"),
        **{**common, **changes},
        **MANY.options,
    )
    with record_backends() as backends:
        summary = train.train(config, overwrite=True, stream=stream)
    train_s = time.monotonic() - began
    loaded = inference.load_model(summary.out / "last.pt")
    parameters = sum(p.numel() for p in loaded.model.head.parameters() if p.requires_grad)
    scores = best_of_many(loaded, TEST_SCENES)
    return ManyResult(*scores, summary.images_per_s, parameters, dict(backends), train_s)


@torch.no_grad()
def best_of_many(loaded: inference.Loaded, scenes: int) -> tuple[float, float, float, float]:
    """P@1 and recall among the best 10 on test scenes, then both for always the 10 most frequent classes."""
    C, size = len(loaded.class_names), loaded.image_spec.height
    data = Scenes("test", num_classes=C, size=size, long_tail=loaded.config.long_tail, seed=loaded.config.seed)
    frequent = np.arange(10) if data.frequency is None else np.argsort(-data.frequency)[:10]
    counts = np.zeros(5)  # best right, found among the best 10, both for the most frequent, labels
    for start in range(0, scenes, 50):
        samples = data.__getitems__(range(start, min(start + 50, scenes)))
        best = loaded.model(torch.stack([s.image for s in samples]).to(loaded.device)).topk(10).indices.cpu().numpy()
        for sample, top in zip(samples, best, strict=True):
            for i, guess in enumerate((top, frequent)):
                counts[2 * i] += guess[0] in sample.labels
                counts[2 * i + 1] += np.isin(guess, sample.labels).sum()
            counts[4] += len(sample.labels)
    precision, found, constant_precision, constant_found, labels = counts.tolist()
    return precision / scenes, found / labels, constant_precision / scenes, constant_found / labels


def scenes_of(loaded: inference.Loaded) -> Scenes:
    """Test scenes of a model's classes, in its order of them."""
    numbers = [int(name) for name in loaded.class_names]
    return Scenes("test", num_classes=len(numbers), numbers=numbers, seed=loaded.config.seed)


@torch.no_grad()
def pointing_accuracy(loaded: inference.Loaded, scenes: int, first: int = 0) -> float:
    """The share of numbers in test scenes for which the position that their class attends to most lies on them.

    Args:
        loaded: the model.
        scenes: how many.
        first: the first class that counts.
    """
    data = scenes_of(loaded)
    hits, total = 0, 0
    for start in range(0, scenes, 50):
        serials = range(start, min(start + 50, scenes))
        images = torch.stack([sample.image for sample in data.__getitems__(serials)]).to(loaded.device)
        features = loaded.model.forward_features(images)
        scale = images.shape[-1] // features.shape[-1]
        for number, serial in enumerate(serials):
            boxes = data.boxes(serial)
            labels = sorted({box.label for box in boxes if box.label >= first})
            if not labels:
                continue
            maps = loaded.model.head.attention_maps(features[number : number + 1], labels)[0]  # type: ignore[operator]
            for label, place in zip(labels, maps.argmax(dim=1).tolist(), strict=True):
                # The middle of the position, in pixels.
                y, x = ((at + 0.5) * scale for at in divmod(place, features.shape[-1]))
                own = [b for b in boxes if b.label == label]
                hits += any(b.top <= y <= b.top + b.height and b.left <= x <= b.left + b.width for b in own)
                total += 1
    return hits / total


def table(results: list[Result]) -> str:
    """The comparison, a line for each head."""
    heading = ("head", "mAP", "CF1", "OF1", "points at it", "images/s", "head parameters", "backend of each op")
    rows: list[tuple[str, ...]] = [heading]
    for r in results:
        backends = ", ".join(f"{op}: {backend}" for op, backend in sorted(r.backends.items())) or "(no op of mlhead)"
        scores = [f"{value:.3f}" for value in (r.metrics["mAP"], r.metrics["CF1"], r.metrics["OF1"], r.pointing)]
        rows.append((CONTESTANTS[r.head].title, *scores, f"{r.images_per_s:.0f}", f"{r.parameters:,}", backends))
    return visualize.text_table(rows)


def many_line(many: ManyResult) -> str:
    """The row of 10,000 classes, which is measured in other ways than the table above it."""
    backends = ", ".join(f"{op}: {backend}" for op, backend in sorted(many.backends.items()))
    return (
        f"{MANY_CLASSES:,} classes (numbers of four digits, some of them rare), another task: {MANY.title}\n"
        f"  best class right (P@1) {many.precision:.3f}, the most frequent class {many.constant_precision:.3f};"
        f"  in the best 10 {many.recall:.3f} of the numbers, the 10 most frequent {many.constant_recall:.3f}\n"
        f"  {many.images_per_s:.0f} images/s, {many.train_s:.0f} s, {many.parameters:,} head parameters, {backends}"
    )


def _report(out: Path, results: list[Result], many: ManyResult, stream: Any) -> None:
    winner = max(results, key=lambda r: r.metrics["mAP"])
    steps = max(record["step"] for record in read_log(out / winner.head / "log.jsonl"))
    text = (
        f"{TEST_SCENES} test scenes of 100 classes, none of whose scans was seen in training; {steps} steps each\n\n"
        f"{table(results)}\n\n"
        f"{CONTESTANTS[winner.head].title} wins with mAP {winner.metrics['mAP']:.3f}.\n"
        '"points at it": how often the position that a class attends to most lies on its number.\n\n'
        f"{many_line(many)}"
    )
    stream.flush()
    print(text, flush=True)
    write_atomically(out / "table.txt", lambda file: file.write((text + "\n").encode()))
    records = [{**r._asdict(), "options": CONTESTANTS[r.head].options} for r in results]
    facts = {"torch": torch.__version__, "threads": torch.get_num_threads(), "results": records}
    facts["many"] = {**many._asdict(), "options": MANY.options}
    write_atomically(out / "results.json", lambda file: file.write(json.dumps(facts, indent=1, default=str).encode()))


def draw(out: Path, seed: int = 0) -> None:
    """The learning curves of a finished demo, and where each head looks in the first test scenes with three numbers."""
    logs = {c.title: read_log(out / head / "log.jsonl") for head, c in CONTESTANTS.items()}
    visualize.learning_curves(logs, out / "curves.png", title="Same backbone, same data, same number of steps")
    models = {head: inference.load_model(out / head / "last.pt", device="cpu") for head in CONTESTANTS}
    scenes = Scenes("test", num_classes=100, seed=seed)
    chosen = [s for s in range(200) if len({box.label for box in scenes.boxes(s)}) >= 3][:PICTURES]
    for number, serial in enumerate(chosen, start=1):
        rows = [attention_row(loaded, scenes, serial) for loaded in models.values()]
        names = [c.title for c in CONTESTANTS.values()]
        path = out / f"attention-{number}.png"
        title = f"Test scene {serial}: where each class looks, its probability, and in white where its number stands"
        visualize.panel_grid(rows, path, title=title, row_names=names)


@torch.no_grad()
def attention_row(loaded: inference.Loaded, scenes: Scenes, serial: int) -> list[visualize.Panel | None]:
    """The scene with what the head says is in it, then the attention of each number in it; unseen ones have a star."""
    image = scenes[serial].image
    features = loaded.model.forward_features(image.unsqueeze(0))
    scores = loaded.model.head(features)[0].sigmoid()
    boxes = {box.label: (box.top, box.left, box.height, box.width) for box in scenes.boxes(serial)}
    labels = list(boxes)
    picture = scenes.to_picture(image)
    found = np.flatnonzero(scores.numpy() >= 0.5).tolist()
    shown = [f"{name}{'*' if c >= loaded.num_seen else ''}" for c, name in enumerate(loaded.class_names)]
    names = [shown[label] for label in found[:MOST_NAMES]]
    names += [f"+{len(found) - MOST_NAMES}"] * (len(found) > MOST_NAMES)
    panels: list[visualize.Panel | None] = [
        visualize.Panel(picture, f"says {' '.join(names) or 'nothing'}", good=set(found) == set(labels))
    ]
    maps = loaded.model.head.attention_maps(features, labels)[0]  # type: ignore[operator]
    for label, heat in zip(labels, visualize.heat_maps(maps, features, *picture.shape[:2]), strict=True):
        score = scores[label].item()
        title = f"{shown[label]}  {score:.2f}"
        panels.append(visualize.Panel(picture, title, heat, [boxes[label]], good=score >= 0.5))
    return panels
