"""Lists of images and their batches, and whole runs on a tiny set in each public layout."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from layout_folders import make_coco, make_open_images, make_voc, make_wider

from mlhead import train
from mlhead._config import TrainConfig
from mlhead._usage import UsageError
from mlhead.data.listing import Entry, ImageList, Names
from mlhead.data.loading import Collate, Sample
from mlhead.inference import evaluate_checkpoint

for package in ("timm", "torchmetrics", "yaml", "PIL"):
    pytest.importorskip(package)


# Lists


def test_names_are_packed():
    texts = ["a/b.jpg", "", "grün.jpg", os.fsdecode(b"\xff.jpg"), "c"]
    names = Names.collect(iter(texts))
    assert list(names) == texts
    assert (len(names), names[-1], names[1:4:2]) == (5, "c", ["", texts[3]])
    assert list(names.select(np.array([3, 0, 3]))) == [texts[3], "a/b.jpg", texts[3]]
    assert list(Names.collect([])) == []
    for number in (5, -6):
        with pytest.raises(IndexError, match=f"text {number} of 5"):
            names[number]
    many = Names.collect(f"{number:08d}.jpg" for number in range(10_000))
    assert len(pickle.dumps(many)) < 10_000 * (12 + 8) + 1_000


def test_a_list_and_parts_of_it():
    entries = [Entry("a", [3, 1]), Entry("b", []), Entry("c", [2, 0, 4], [-1, 0, 1]), Entry("d", [4])]
    listing = ImageList.collect(Path("root"), iter(entries))
    assert listing.indices.tolist() == [1, 3, 0, 2, 4, 4]
    assert listing.offsets.tolist() == [0, 2, 2, 5, 6]
    assert listing.values.tolist() == [1, 1, 0, -1, 1, 1]
    assert listing.boxes is None
    assert listing.positives(6).tolist() == [0, 1, 0, 1, 2, 0]
    some = listing.select(np.array([2, 1, 0]))
    assert list(some.names) == ["c", "b", "a"]
    assert [some.labels(n)[0].tolist() for n in range(3)] == [[0, 2, 4], [], [1, 3]]
    assert [some.labels(n)[1].tolist() for n in range(3)] == [[0, -1, 1], [], [1, 1]]
    train_part, val_part = ImageList.collect(Path(), (Entry(f"{n}.png", [n % 3]) for n in range(500))).split(0.2)
    assert len(train_part) + len(val_part) == 500
    assert 60 < len(val_part) < 140
    for part in (train_part, val_part):
        assert all(part.labels(n)[0].tolist() == [int(part.names[n][:-4]) % 3] for n in range(len(part)))
        assert part.values is None
    boxes = ImageList.collect(Path(), [Entry("a", [], None, (1, 2, 3, 4)), Entry("a", [1], None, (5, 6, 7, 8))])
    assert boxes.select(np.array([1])).boxes.tolist() == [[5, 6, 7, 8]]
    assert len(ImageList.collect(Path(), [])) == 0


# Batches

IMAGE = torch.zeros(1, 2, 2)
SAMPLES = [
    Sample(IMAGE, np.array([1, 3])),
    Sample(IMAGE, np.array([0, 2, 3]), np.array([0, -1, 1], np.float32)),
    Sample(IMAGE, np.array([], np.int64)),
]


def test_unknown_labels_have_no_weight_in_training_and_stay_unknown_in_tests():
    positives = [[0, 1, 0, 1], [0, 0, 0, 1], [0, 0, 0, 0]]
    batch = Collate(4)(SAMPLES)
    assert batch.targets.tolist() == positives
    assert batch.weight.tolist() == [[1, 1, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]]
    batch = Collate(4, keep_unknown=True)(SAMPLES)
    assert batch.targets.tolist() == [[0, 1, 0, 1], [0, 0, -1, 1], [0, 0, 0, 0]]
    assert batch.weight is None
    batch = Collate(4, untagged_weight=0.5)(SAMPLES)
    assert batch.targets.tolist() == positives
    assert batch.weight.tolist() == [[0.5, 1, 0.5, 1], [1, 0.5, 0, 1], [0.5] * 4]
    batch = Collate(4, sparse=True)(SAMPLES)
    assert batch.targets.values.tolist() == [1, 1, 0, -1, 1]
    assert torch.equal(batch.targets.to_dense(), Collate(4, keep_unknown=True)(SAMPLES).targets)
    assert Collate(4)(SAMPLES[::2]).weight is None
    assert Collate(4, sparse=True)(SAMPLES[::2]).targets.values is None
    with pytest.raises(ValueError, match="untagged_weight must be 1 for sparse targets"):
        Collate(4, sparse=True, untagged_weight=0.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"untagged_weight": 1.5}, "--untagged-weight must be at most 1, got 1.5"),
        ({"untagged_weight": -0.5}, "--untagged-weight must be at least 0"),
        ({"untagged_weight": 0.5, "fused_loss": True}, "--untagged-weight must be 1 with --fused-loss, which has no"),
        ({"untagged_weight": 0.5, "loss": "softmax"}, "--untagged-weight must be 1 with --loss softmax"),
        ({"layout": "coca"}, r"--layout must be one of auto, .*got 'coca' \(did you mean 'coco'"),
        ({"voc_difficult": "skip"}, "--voc-difficult must be one of ignore, positive, negative"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(UsageError, match=words):
        TrainConfig(**options)


# Runs


def run(root, out, **options):
    """The validation metrics of two steps, and those of the checkpoint on the test images."""
    defaults = {"steps": 2, "batch_size": 2, "image_size": 16, "device": "cpu", "head": "gap", "log_every": 1}
    config = TrainConfig(**{**defaults, "data": str(root), "out": str(out), **options})
    train.train(config, stream=io.StringIO())
    lines = (json.loads(line) for line in (out / "log.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    return evaluate_checkpoint(out / "last.pt", split="test", device="cpu", stream=io.StringIO()), losses


VOC = {"trainval": {"1": [("dog", 0), ("cat", 1)], "2": [("cat", 0)]}, "test": {"3": [("dog", 1), ("cat", 0)]}}
MAKERS = {
    "coco": make_coco,
    "voc": lambda root: make_voc(root, VOC),
    "wider": make_wider,
    "open-images": make_open_images,
}
# How many classes have a positive in the test images; unknown ones are none.
CLASSES = {"coco": 3, "voc": 1, "wider": 1, "open-images": 1}


@pytest.mark.parametrize("layout", MAKERS)
def test_a_run_on_each_layout(tmp_path, layout):
    root = MAKERS[layout](tmp_path / "data")
    metrics, losses = run(root, tmp_path / "run", voc_difficult="ignore")
    assert metrics["classes"] == CLASSES[layout]
    assert len(losses) == 2
    assert (tmp_path / "run/bad_data.txt").exists() is False


def test_the_weight_of_untagged_labels_reaches_the_loss(tmp_path):
    root = make_open_images(tmp_path / "data")
    options = {"hflip": 0.0, "crop_scale": 1.0, "steps": 1, "prior": False}
    _, (whole,) = run(root, tmp_path / "a", **options)
    _, (half,) = run(root, tmp_path / "b", **options, untagged_weight=0.5)
    _, (none,) = run(root, tmp_path / "c", **options, untagged_weight=0.0)
    # The same first step on the same two images: the loss is linear in the weight.
    assert whole > half > none > 0
    assert half == pytest.approx((whole + none) / 2, rel=1e-6)


def test_bad_images_are_named_in_a_run(tmp_path):
    root = make_wider(tmp_path / "data")
    (root / "Image/val/1--Meeting/b.jpg").write_bytes(b"no picture")
    (root / "Image/test/0--Parade/c.jpg").write_bytes((root / "Image/train/0--Parade/a.jpg").read_bytes())
    run(root, tmp_path / "run", steps=4)
    listed = (tmp_path / "run/bad_data.txt").read_text().splitlines()
    assert len(listed) == 1
    assert "b.jpg\tcannot be decoded" in listed[0]
