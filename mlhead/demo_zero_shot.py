"""`mlhead demo-zsl`: numbers that no training scene shows, found by what they are made of.

The scenes hold numbers of two digits. A number's word vector says which digit stands first and which second, and 20 of
the 100 numbers occur in test scenes only. On the features of one backbone, full decoding, group decoding and the query
augmentations are compared over several seeds, as in Tables 3 and 4 of ML-Decoder.

How the settings were found is in docs/zero_shot.md.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mlhead import building, checkpoints, demo, inference, record_backends, train, visualize
from mlhead._config import TrainConfig
from mlhead._learned_groups import LearnedGroups, mixed_order
from mlhead._progress import Progress, duration
from mlhead._usage import usage_fail
from mlhead.checkpoints import load_checkpoint, write_atomically
from mlhead.data.loading import TrainingBatches
from mlhead.data.scenes import Scenes
from mlhead.data.sources import SceneSource
from mlhead.evaluation import choose_device
from mlhead.heads import QueryAugmentation, ZeroShotMLDecoder
from mlhead.metrics import ZeroShotMetrics
from mlhead.ops import SparseTargets

DIGIT_STEPS, BASE_STEPS, BASE_BATCH = 200, 400, 16
STEPS, BATCH, RATE, SEEDS = 600, 32, 4e-3, (0, 1, 2)
TRAIN_SCENES, TEST_SCENES, POINTING_SCENES, PICTURES = 8_000, 1_000, 200, 3
COMMON: dict[str, Any] = {"val_length": 200, "log_every": 20, "train_length": 10**6}
HEAD = {"embed_dim": 64, "num_heads": 4, "feedforward_dim": 128, "dropout": 0.0}


class Contestant(NamedTuple):
    """A row of the table: its title, its groups (None for full decoding), and its augmentation's arguments."""

    title: str
    groups: int | None = None
    augmentation: dict[str, Any] | None = None


CONTESTANTS = {
    "full": Contestant("full decoding"),
    "noise": Contestant("full, noise", None, {"noise": 0.3}),
    "random": Contestant("full, random queries", None, {"random_queries": 3}),
    "both": Contestant("full, both", None, {"noise": 0.3, "random_queries": 3}),
    "negative": Contestant("full, random queries labelled 0", None, {"random_queries": 3, "target": 0.0}),
    "group": Contestant("40 groups of 2", 40),
}
PICTURED = ("full", "noise", "random", "group")
CHANCE, FEATURES, MODEL = "chance", "features.pt", "model.pt"
MEASURES = ("ZSL_mAP", "ZSL_F1@3", "ZSL_F1@5", "GZSL_mAP", "GZSL_F1@3", "GZSL_F1@5", "seen_mAP")
POINTING = "points at it"


# Table 8: 20 groups of four seen numbers and an unseen one; what makes queries and last layer.
TABLE_8 = {
    "words, learned": ("words", "learned"),
    "words, learned and shared": ("words", "shared"),
    "learned, words": ("learned", "words"),
    "words, words": ("words", "words"),
}
TABLE_8_GROUPS, TABLE_8_MEASURES = 20, ("ZSL_mAP", "GZSL_mAP", "seen_mAP")


class Row(NamedTuple):
    """A contestant's measures, a value for each seed; the seconds of training; what it ran on."""

    title: str
    measures: dict[str, list[float]]
    train_s: float = 0.0
    backends: dict[str, str] = {}  # noqa: RUF012 (never written)


class _Outcome(NamedTuple):
    """What one run gave."""

    name: str
    seed: int
    measures: dict[str, float]
    train_s: float
    backends: dict[str, str]


class _Task(NamedTuple):
    """One run: where everything lies, which contestant with which seed, how many steps."""

    out: Path
    name: str
    seed: int
    steps: int


def run(
    out: Path, *, steps: int | None = None, seeds: int | None = None, jobs: int | None = None, stream: Any = None
) -> list[Row]:
    """Trains, measures and draws; prints one table and leaves everything in `out`.

    Args:
        out: folder for the runs, table.txt, results.json, scores.png and the attention pictures.
        steps: of each run, in place of the demo's own number.
        seeds: how many seeds, in place of the demo's own number.
        jobs: runs at a time, in processes of their own that share the CPU's cores. By default one for each core, at
            most 8, and on a GPU one.
        stream: where progress goes, by default stderr.
    """
    for name, value in (("--steps", steps), ("--seeds", seeds), ("--jobs", jobs)):
        if value is not None and value < 1:
            usage_fail(name, "at least 1", value)
    chosen = SEEDS if seeds is None else tuple(range(seeds))
    count = STEPS if steps is None else steps
    began = time.monotonic()
    stream = sys.stderr if stream is None else stream

    def say(line: str) -> None:
        print(line, file=stream, flush=True)

    say("1 of 4: a backbone learns single digits")
    digits = TrainConfig(
        out=str(out / "digits"), num_classes=10, head="gap", lr=4e-3, batch_size=64,
        steps=DIGIT_STEPS if steps is None else min(steps, DIGIT_STEPS), **COMMON,
    )  # fmt: skip
    train.train(digits, overwrite=True, stream=stream)
    say("2 of 4: then the seen numbers of two digits, by full decoding; from here on it stays as it is")
    base = TrainConfig(
        out=str(out / "base"), task="zero-shot", head_opt=HEAD, lr=4e-3, batch_size=BASE_BATCH,
        steps=BASE_STEPS if steps is None else min(steps, BASE_STEPS),
        init_backbone=str(out / "digits/last.pt"), **COMMON,
    )  # fmt: skip
    train.train(base, overwrite=True, stream=stream)
    say("3 of 4: its features of training and test scenes, which every run reads")
    _save_features(out, stream)
    tasks = [_Task(out, name, seed, count) for seed in chosen for name in (*CONTESTANTS, *TABLE_8)]
    if jobs is None:
        jobs = 1 if torch.cuda.is_available() else min(8, os.cpu_count() or 1, len(tasks))
    say(f"4 of 4: {len(tasks)} heads, {count} steps each, {jobs} at a time")
    outcomes = list(_outcomes(tasks, jobs, Progress(len(tasks), "heads", unit_size=count * BATCH, stream=stream)))
    (out / FEATURES).unlink()
    rows = [chance(chosen), *(_row(name, outcomes) for name in CONTESTANTS)]
    rows_of_8 = [_row(name, outcomes) for name in TABLE_8]
    _report(out, rows, rows_of_8, chosen, count)
    draw(out, rows, chosen[0])
    say(f"scores and attention pictures are in {out}; all of it took {duration(time.monotonic() - began)}")
    return rows


@torch.no_grad()
def _save_features(out: Path, stream: Any) -> None:
    """The backbone's features (N, D, h, w) in fp16 of training and of test scenes, and their labels."""
    loaded = inference.load_model(out / "base/last.pt")
    source = SceneSource(loaded.config)
    content = {}
    sizes = {"train": TRAIN_SCENES, "test": TEST_SCENES}
    progress = Progress(sum(sizes.values()), "scenes", stream=stream)
    for split, size in sizes.items():
        scenes, features, labels = source.dataset(split, loaded.image_spec), [], []
        for start in range(0, size, 50):
            samples = scenes.__getitems__(range(start, min(start + 50, size)))
            images = torch.stack([sample.image for sample in samples]).to(loaded.device)
            features.append(loaded.model.forward_features(images).half().contiguous().cpu())
            labels += [sample.labels.tolist() for sample in samples]
            progress.advance(len(samples))
        content[split] = (torch.cat(features), labels)
    progress.close()
    torch.save(content, out / FEATURES)


def _outcomes(tasks: list[_Task], jobs: int, progress: Progress) -> Iterator[_Outcome]:
    """Every run, in the order of their ends."""
    if jobs == 1:
        for task in tasks:
            outcome = _one_run(task)
            progress.advance(1, outcome.name)
            yield outcome
        progress.close()
        return
    threads = max(1, (os.cpu_count() or 1) // jobs)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        futures = [pool.submit(_one_run, task) for task in tasks]
        try:
            for future in as_completed(futures):
                outcome = future.result()
                progress.advance(1, outcome.name)
                yield outcome
        finally:
            pool.shutdown(cancel_futures=True)
            progress.close()


def _one_run(task: _Task) -> _Outcome:
    """Trains and measures one contestant with one seed on the saved features."""
    if task.name in TABLE_8:
        return _one_of_table_8(task)
    out, name, seed, steps = task
    features = torch.load(out / FEATURES, mmap=True)
    state = load_checkpoint(out / "base/last.pt")
    config = TrainConfig(**state["config"])
    config.head_opt = {**config.head_opt, "groups": CONTESTANTS[name].groups}
    source = SceneSource(config)
    checkpoints.seed_everything(seed)
    model = building.build_model(config, source.num_seen, source.channels, source.frequencies(),
                                 word_vectors=source.word_vectors, load_weights=False)  # fmt: skip
    weights = {k: v for k, v in state["model"].items() if not k.startswith("head.")}
    model.load_state_dict(weights, strict=False)
    device = choose_device("auto")
    head = cast(ZeroShotMLDecoder, model.to(device).head)
    options = CONTESTANTS[name].augmentation
    head.augmentation = None if options is None else QueryAugmentation(**options)
    maps, labels = features["train"]
    train_s, backends = _fit(head, maps, labels, steps, seed, device)
    maps, labels = features["test"]
    found = _measure(head.eval(), maps, labels, source.num_seen, len(source.class_names), device)

    folder = out / f"{name}-{seed}"
    folder.mkdir(exist_ok=True)
    kept = {key: state[key] for key in ("class_names", "num_seen", "image_spec")}
    kept |= {"config": dataclasses.asdict(config), "model": model.state_dict(), "ema": None, "step": steps}
    checkpoints.save_checkpoint(folder / MODEL, kept)
    loaded = inference.load_model(folder / MODEL)
    found[POINTING] = demo.pointing_accuracy(loaded, POINTING_SCENES, loaded.num_seen)
    return _Outcome(name, seed, {m: found[m] for m in (*MEASURES, POINTING)}, train_s, backends)


def _one_of_table_8(task: _Task) -> _Outcome:
    """As `_one_run`, with all classes in training, where the labels of the unseen ones are unknown."""
    features = torch.load(task.out / FEATURES, mmap=True)
    source = SceneSource(TrainConfig(**load_checkpoint(task.out / "base/last.pt")["config"]))
    C, num_seen = len(source.class_names), source.num_seen
    order = torch.from_numpy(mixed_order(num_seen, C, TABLE_8_GROUPS))
    place = torch.argsort(order)
    checkpoints.seed_everything(task.seed)
    device = choose_device("auto")
    maps, labels = features["train"]
    queries, last = TABLE_8[task.name]
    head = LearnedGroups(
        maps.shape[1], cast(Tensor, source.word_vectors)[order], TABLE_8_GROUPS, queries=queries, last=last, **HEAD
    )
    head.set_prior(source.frequencies().mean().item())
    unseen, labels = place[num_seen:].tolist(), [place[row].tolist() for row in labels]
    train_s, backends = _fit(head.to(device), maps, labels, task.steps, task.seed, device, unknown=unseen)
    maps, labels = features["test"]
    found = _measure(head.eval(), maps, labels, num_seen, C, device, place)
    return _Outcome(task.name, task.seed, {m: found[m] for m in TABLE_8_MEASURES}, train_s, backends)


def _fit(
    head: ZeroShotMLDecoder,
    features: Tensor,
    labels: list[list[int]],
    steps: int,
    seed: int,
    device: torch.device,
    *,
    unknown: Sequence[int] = (),
) -> tuple[float, dict[str, str]]:
    """Trains a head with its loss inside, every epoch in a new order; classes of unknown label have no loss.

    Returns the seconds that it took, and what ran on which backend.
    """
    optimizer = torch.optim.AdamW(head.train().parameters(), lr=RATE, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, cycle_momentum=False)
    began = time.monotonic()
    with record_backends() as backends:
        for batch in TrainingBatches(len(features), BATCH, seed=seed, first=0, last=steps):
            chosen = [serial % len(features) for serial in batch]
            ignore = [unknown] * len(chosen) if unknown else None
            targets = SparseTargets.from_lists([labels[i] for i in chosen], head.num_classes, ignore=ignore)
            loss = head(features[chosen].to(device).float(), targets.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return time.monotonic() - began, dict(backends)


@torch.no_grad()
def _measure(
    head: ZeroShotMLDecoder,
    features: Tensor,
    labels: list[list[int]],
    num_seen: int,
    C: int,
    device: torch.device,
    place: Tensor | None = None,
) -> dict[str, float]:
    """ZSL, GZSL and seen measures on the test scenes, of the union of all classes.

    `place` is where each class stands among the columns, in order if None.
    """
    if "union" in head.banks.sizes:
        head.use("union")
    metrics = ZeroShotMetrics(num_seen, C, device=device)
    for start in range(0, len(features), 100):
        part = slice(start, start + 100)
        targets = SparseTargets.from_lists(labels[part], C)
        logits = head(features[part].to(device).float())
        metrics.update(logits if place is None else logits[:, place.to(device)], targets.to(device))
    return metrics.compute()


def _row(name: str, outcomes: list[_Outcome]) -> Row:
    mine = sorted((o for o in outcomes if o.name == name), key=lambda o: o.seed)
    measures = {m: [o.measures[m] for o in mine] for m in mine[0].measures}
    title = CONTESTANTS[name].title if name in CONTESTANTS else name
    return Row(title, measures, sum(o.train_s for o in mine), mine[-1].backends)


def chance(seeds: tuple[int, ...]) -> Row:
    """Random scores on the test scenes of each seed; pointing: the share of the map that a number covers."""
    measures: dict[str, list[float]] = {name: [] for name in MEASURES}
    for seed in seeds:
        source = SceneSource(TrainConfig(task="zero-shot", val_length=TEST_SCENES, seed=seed))
        scenes: Scenes = source.dataset("test", source.image_spec(nn.Identity()))
        C = len(source.class_names)
        metrics = ZeroShotMetrics(source.num_seen, C)
        plan = scenes.plan(range(TEST_SCENES))
        targets = torch.zeros(TEST_SCENES, C)
        shown = torch.from_numpy(plan.shown)
        rows = torch.arange(TEST_SCENES)[:, None].expand_as(shown)
        targets[rows[shown], torch.from_numpy(plan.labels)[shown]] = 1.0
        metrics.update(torch.rand(TEST_SCENES, C, generator=torch.Generator().manual_seed(seed)), targets)
        found = metrics.compute()
        for name in MEASURES:
            measures[name].append(found[name])
    share = scenes.number_width * 8 / scenes.size**2
    return Row(CHANCE, {**measures, POINTING: [share] * len(seeds)})


def table(rows: list[Row], corner: str = "") -> str:
    """A line for each row: the mean over the seeds, and from which to which value."""
    text: list[tuple[str, ...]] = [(corner, *(name.replace("_", " ") for name in rows[-1].measures), "")]
    for row in rows:
        cells = []
        for values in row.measures.values():
            mean = sum(values) / len(values)
            cells.append(f"{mean:.3f} ({min(values):.3f}-{max(values):.3f})" if row.title != CHANCE else f"{mean:.3f}")
        text.append((row.title, *cells, ""))
    return visualize.text_table(text)


def orderings(rows: list[Row]) -> list[str]:
    """The orderings of the paper's Tables 3 and 4, and whether these runs show them.

    A difference counts where it is larger than the spread of either row over the seeds, i.e. the rows do not overlap.
    """
    zsl = {row.title: row.measures["ZSL_mAP"] for row in rows}
    titles = {name: contestant.title for name, contestant in CONTESTANTS.items()}
    pairs = [
        ("Table 3: noise above none", "noise", "full"),
        ("Table 3: random queries above none", "random", "full"),
        ("Table 3: both above none", "both", "full"),
        ("Table 3: both above noise alone", "both", "noise"),
        ("Table 3: both above random queries alone", "both", "random"),
        ("Table 4: full above group decoding", "full", "group"),
    ]
    lines = []
    for text, better, worse in pairs:
        a, b = zsl[titles[better]], zsl[titles[worse]]
        difference = sum(a) / len(a) - sum(b) / len(b)
        if min(a) > max(b):
            verdict = "reproduced"
        elif max(a) < min(b):
            verdict = "the other way round"
        else:
            verdict = "within the spread of the seeds"
        lines.append(f"{text}: {verdict} ({difference:+.3f} ZSL mAP)")
    return lines


def order_of_table_8(rows: list[Row]) -> str:
    """Whether words for queries and last layer are best, then words in the last layer alone, then the learned ones."""
    zsl = {row.title: row.measures["ZSL_mAP"] for row in rows}
    both, last = zsl["words, words"], zsl["learned, words"]
    learned = zsl["words, learned"] + zsl["words, learned and shared"]
    found = {
        "word vectors in the last layer above a learned one": min(both + last) > max(learned),
        "queries of word vectors above learned ones": min(both) > max(last),
    }
    words = (f"{text}: {'reproduced' if true else 'not reproduced'}" for text, true in found.items())
    return "Table 8: " + "; ".join(words)


def _report(out: Path, rows: list[Row], rows_of_8: list[Row], seeds: tuple[int, ...], steps: int) -> None:
    source = SceneSource(TrainConfig(task="zero-shot"))
    unseen = source.class_names[source.num_seen :]
    backends = ", ".join(f"{op}: {backend}" for op, backend in sorted(rows[-1].backends.items()))
    text = "\n".join(
        [
            f"{TEST_SCENES} test scenes of 100 numbers; training never shows these {len(unseen)}: {' '.join(unseen)}",
            f"heads on one backbone's features, {steps} steps of {BATCH}, {len(seeds)} seeds: mean (lowest-highest)",
            "ZSL ranks the unseen numbers only, GZSL all; an unseen number's query points at it, or does not",
            "",
            table(rows),
            "",
            *orderings(rows),
            "",
            f"Table 8: {TABLE_8_GROUPS} groups of 5, an unseen number in each; what makes queries, last layer",
            "",
            table(rows_of_8, "queries, last layer"),
            "",
            order_of_table_8(rows_of_8),
            "",
            f"backends: {backends}",
        ]
    )
    print(text, flush=True)
    write_atomically(out / "table.txt", lambda file: file.write((text + "\n").encode()))
    facts = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "seeds": seeds,
        "steps": steps,
        "rows": [{**row._asdict()} for row in rows],
        "table 8": [{**row._asdict()} for row in rows_of_8],
        "contestants": {name: contestant._asdict() for name, contestant in CONTESTANTS.items()},
    }
    write_atomically(out / "results.json", lambda file: file.write(json.dumps(facts, indent=1).encode()))


def draw(out: Path, rows: list[Row], seed: int) -> None:
    """The scores as bars, and where the queries of unseen numbers look in test scenes."""
    shown = ("ZSL_mAP", "GZSL_mAP", POINTING)
    panels = {name.replace("_", " "): {row.title: row.measures[name] for row in rows} for name in shown}
    visualize.bars(panels, out / "scores.png", title="Numbers that no training scene shows: each seed a dot")
    pictured = [name for name in PICTURED if name in CONTESTANTS]
    models = {name: inference.load_model(out / f"{name}-{seed}" / MODEL, device="cpu") for name in pictured}
    any_model = next(iter(models.values()))
    scenes = demo.scenes_of(any_model)
    chosen = [s for s in range(300) if len({b.label for b in scenes.boxes(s) if b.label >= any_model.num_seen}) >= 2]
    for number, serial in enumerate(chosen[:PICTURES], start=1):
        grid = [demo.attention_row(loaded, scenes, serial) for loaded in models.values()]
        names = [CONTESTANTS[name].title for name in models]
        title = f"Test scene {serial}: where each number's query looks, its probability; * no training scene shows it"
        visualize.panel_grid(grid, out / f"attention-{number}.png", title=title, row_names=names)
