"""Several processes train the weights that one does, each with its part of every batch."""

from __future__ import annotations

import itertools
import json

import pytest
import several_processes as several
import torch

from mlhead._config import TrainConfig
from mlhead._runlog import read_log
from mlhead._spread import Spread
from mlhead._usage import UsageError
from mlhead.checkpoints import load_checkpoint
from mlhead.data.loading import Batch, Share, TrainingBatches
from mlhead.data.padding import pad_batch, padded_batches
from mlhead.distributed import ALONE, Processes, launched, seed_of, was_restarted
from mlhead.ops import SparseTargets

for package in ("timm", "sklearn", "yaml", "PIL"):
    pytest.importorskip(package)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder in which two processes have run every scenario."""
    from mlhead.data.export import write_scenes

    out = tmp_path_factory.mktemp("two")
    write_scenes(out / "data", 60, num_classes=10, size=24)
    for number in range(0, 60, 2):  # so many that a process is left without an image now and then
        (out / f"data/images/{number:05d}.png").write_bytes(b"not an image")
    several.launch(out, f"2 {' '.join(f'same:{name}' for name in several.SAME)} unreadable agreement", "2 mistake")
    return out


def largest_difference(a, b):
    """Over all tensors of two models."""
    assert a.keys() == b.keys()
    assert all(a[name].shape == b[name].shape for name in a)
    return max((a[name].double() - b[name].double()).abs().max().item() for name in a)


def losses(folder):
    return [r["loss"] for r in read_log(folder / "log.jsonl") if r["kind"] == "train"]


def assert_same_run(one, reordered, other, parts=("model", "ema")):
    """Another way to the same weights: off by no more than a few times what another order of sums makes of them.

    `reordered` is the run of one process with each batch in two halves, whose gradients are added up: the same numbers
    are rounded at other places. Several processes round at more places, but not at many times as many.
    """
    a, b, c = (load_checkpoint(path) for path in (one, reordered, other))
    for part in parts:
        allowed = 8 * max(largest_difference(a[part], b[part]), torch.finfo(torch.float32).eps)
        assert largest_difference(a[part], c[part]) <= allowed
        moved = max(value.abs().max().item() for value in a[part].values() if value.is_floating_point())
        assert allowed < 1e-4 * moved
    assert c["metrics"] == pytest.approx(a["metrics"], abs=1e-6)


@pytest.mark.parametrize("name", several.SAME)
def test_two_processes_train_the_weights_of_one(tmp_path, two, name):
    """With accumulation, clipping and a moving average, by copies, shards, shards of classes and of word vectors."""
    options = several.alone(several.SAME[name])
    several.run(tmp_path / "one", options)
    several.run(tmp_path / "halves", {**options, "batch_size": 4, "accumulate": 4})
    folders = tmp_path / "one", tmp_path / "halves", two / name
    assert_same_run(folders[0] / "last.pt", folders[1] / "last.pt", folders[2] / "last.dcp")
    assert losses(two / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-5)
    norms = [[r["grad_norm"] for r in read_log(f / "log.jsonl") if "grad_norm" in r] for f in (folders[0], folders[2])]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert sorted(p.name for p in (two / name).iterdir()) == [
        "best.dcp", "config.yaml", "last.dcp", "log.csv", "log.jsonl"
    ]  # fmt: skip


def test_unreadable_images_weigh_nothing_wherever_they_fall(tmp_path, two):
    options = several.unreadable(two)
    several.run(tmp_path / "one", options)
    several.run(tmp_path / "halves", {**options, "batch_size": 2, "accumulate": 4})
    folders = tmp_path / "one", tmp_path / "halves", two / "unreadable"
    assert_same_run(folders[0] / "last.pt", folders[1] / "last.pt", folders[2] / "last.dcp", parts=("model",))
    assert losses(folders[2]) == pytest.approx(losses(folders[0]), rel=1e-5)
    listed = [set((folder / "bad_data.txt").read_text().splitlines()) for folder in (folders[0], folders[2])]
    assert len(listed[0]) > 10
    assert listed[1] == listed[0]


def test_processes_agree(two):
    first, second = json.loads((two / "agreement.json").read_text())
    assert first == second
    assert (first["sum"], first["largest"], first["main"]) == (2.0, 0.0, 7)
    # The second step overflows on the second process: both leave it out and halve the scale.
    assert first["steps"] == [[[0.0] * 3, 4.0], [[0.0] * 3, 2.0]]


def test_a_mistake_is_named_once(two):
    said = "mlhead train: error: --batch-size must be a multiple of 2, the number of processes, got 7\n"
    assert (two / "mistake.txt").read_text() == said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"parallel": "none"}, "--parallel must be ddp or fsdp for 6 processes, got 'none'"),
        ({"class_parallel": 4}, "--class-parallel must be a divisor of 6, the number of processes, got 4"),
        ({"batch_size": 8}, "--batch-size must be a multiple of 6, the number of processes, got 8"),
        (
            {"head": "gap", "fused_loss": True, "fused_update": True},
            "--fused-update must be off for 6 processes",
        ),
        ({"sync_batch_norm": True}, "--sync-batch-norm must be off but for CUDA devices"),
        (
            {"task": "zero-shot", "class_parallel": 2, "parallel": "fsdp"},
            "--parallel must be ddp for --class-parallel of word vectors",
        ),
    ],
)
def test_options_that_do_not_fit_the_processes(options, words):
    with pytest.raises(UsageError, match=words):
        Spread(TrainConfig(**{"batch_size": 6, **options}), Processes(1, 6, 1), torch.device("cpu"))


def test_shares_of_a_batch():
    options = {"seed": 3, "first": 2, "last": 9}
    whole = list(TrainingBatches(50, 12, **options))
    parts = [list(TrainingBatches(50, 12, **options, share=Share(rank, 4))) for rank in range(4)]
    assert [list(itertools.chain(*shares)) for shares in zip(*parts, strict=True)] == whole
    assert {len(share) for part in parts for share in part} == {3}
    assert [Share(rank, 4).of(list(range(5))) for rank in range(4)] == [[0, 1], [2, 3], [4], []]


def test_padding_adds_what_weighs_nothing():
    images, weight = torch.randn(2, 1, 4, 4), torch.rand(2, 3)
    batch = Batch(images, torch.ones(2, 3), [], weight)
    padded, real = pad_batch(batch, 4, (1, 4, 4))
    assert real.tolist() == [1, 1, 0, 0]
    assert torch.equal(padded.images, images[[0, 1, 0, 0]])
    assert padded.targets.sum() == 6
    assert torch.equal(padded.weight, torch.cat([weight, torch.zeros(2, 3)]))
    assert pad_batch(batch, 2, (1, 4, 4)) == (batch, None)
    sparse = Batch(images, SparseTargets.from_lists([[0, 2], [1]], 3), [])
    assert torch.equal(pad_batch(sparse, 4, (1, 4, 4))[0].targets.to_dense()[:2], sparse.targets.to_dense())
    assert pad_batch(sparse, 4, (1, 4, 4))[0].targets.to_dense()[2:].sum() == 0
    nothing = Batch(torch.zeros(0, 1, 1, 1), torch.zeros(0, 3), [])
    assert pad_batch(nothing, 2, (1, 4, 4))[0].images.shape == (2, 1, 4, 4)
    for given in ([batch], []):
        found = list(padded_batches(given, 2, 3, nothing, (1, 4, 4)))
        assert [b.images.shape for b in found] == [(3, 1, 4, 4)] * 2
        assert sum((b.targets >= 0).all(dim=1).sum() for b in found) == 2 * len(given)


def test_one_process_needs_no_group(monkeypatch):
    with launched() as processes:
        assert processes == ALONE
        assert (processes.total(2.5), processes.gather(3), processes.from_main(lambda: 4)) == (2.5, [3], 4)
        assert processes.group is None
    assert len({seed_of(seed, step, rank) for seed in range(3) for step in range(3) for rank in range(3)}) == 27
    assert not was_restarted()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert was_restarted()
