"""The demo from end to end, in miniature, and the measure of where heads look."""

from __future__ import annotations

import io
import json

import pytest
import torch

from mlhead import demo, inference
from mlhead.data.scenes import Scenes
from mlhead.data.sources import ImageSpec

for package in ("timm", "torchmetrics", "sklearn", "yaml", "matplotlib"):
    pytest.importorskip(package)
Image = pytest.importorskip("PIL.Image")


def test_the_demo_leaves_a_table_and_pictures(tmp_path, capsys, monkeypatch):
    for name, value in {"TEST_SCENES": 40, "VAL_SCENES": 40, "POINTING_SCENES": 20}.items():
        monkeypatch.setattr(demo, name, value)
    stream = io.StringIO()
    results = demo.run(tmp_path, steps=2, stream=stream)
    printed = capsys.readouterr().out
    assert (tmp_path / "table.txt").read_text() == printed
    for title in ("GAP", "CSRA", "ML-Decoder", "head parameters", "wins with mAP"):
        assert title in printed
    assert "csra_pool: " in printed
    assert "group_fc: " in printed
    assert "query_attention: " in printed
    assert "10,000 classes (numbers of four digits, some of them rare), another task: GAP, loss in the head" in printed
    assert "group_fc_loss: " in printed
    many = json.loads((tmp_path / "results.json").read_text())["many"]
    assert 0 <= many["precision"] <= 1
    assert 0.02 < many["constant_recall"] < 0.2
    assert inference.load_model(tmp_path / "many/last.pt").config.fused_loss
    assert [r.head for r in results] == ["gap", "csra", "ml_decoder"]
    assert all(0 <= r.pointing <= 1 and r.images_per_s > 0 for r in results)
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 3
    for name in ("curves.png", *(f"attention-{i}.png" for i in range(1, demo.PICTURES + 1))):
        with Image.open(tmp_path / name) as picture:
            picture.load()
    # One backbone for all: apart from two steps of training, they start from the same weights.
    starts = [inference.load_model(tmp_path / head / "last.pt").config.init_backbone for head in demo.CONTESTANTS]
    assert len(set(starts)) == 1


class Looker(torch.nn.Module):
    """Attends to a chosen place for every class."""

    def __init__(self, place):
        super().__init__()
        self.place = place

    def forward_features(self, images):
        return torch.zeros(len(images), 1, 10, 10)

    @property
    def head(self):
        return self

    def attention_maps(self, features, classes):
        maps = torch.zeros(1, len(classes), 100)
        for number, label in enumerate(classes):
            maps[0, number, self.place(label)] = 1.0
        return maps


class Knower(torch.nn.Module):
    """Gives the right numbers, or only the first of them, the largest logits."""

    def __init__(self, only_first):
        super().__init__()
        self.data, self.only_first, self.at = Scenes("test", num_classes=10_000, size=40), only_first, 0

    def forward(self, images):
        logits = torch.zeros(len(images), 10_000) - torch.arange(10_000) / 1e5
        for row, sample in zip(logits, self.data.__getitems__(range(self.at, self.at + len(images))), strict=True):
            row[sample.labels[:1] if self.only_first else sample.labels] = 1.0
        self.at += len(images)
        return logits


@pytest.mark.parametrize("only_first", [False, True])
def test_best_of_many_counts_the_numbers(only_first):
    names = Scenes("test", num_classes=10_000, size=40).class_names
    spec = ImageSpec(1, 40, 40, [0.0], [1.0])
    loaded = inference.Loaded(Knower(only_first), demo.TrainConfig(), spec, names, 0, torch.device("cpu"), len(names))
    precision, recall, constant, constant_recall = demo.best_of_many(loaded, 70)
    assert precision == 1.0
    assert (recall == 1.0) != only_first
    # Without a long tail no class is frequent: one guess for all is chance.
    assert constant < 0.05
    assert constant_recall < 0.02


def test_pointing_accuracy_counts_what_lies_on_the_number():
    scenes = Scenes("test", num_classes=100)
    names = scenes.class_names
    config = demo.TrainConfig()

    def measure(place):
        loaded = inference.Loaded(Looker(place), config, None, names, 0, torch.device("cpu"), len(names))
        return demo.pointing_accuracy(loaded, 1)

    (first, *rest) = scenes.boxes(0)
    inside = (first.top + 4) // 4 * 10 + (first.left + 8) // 4
    assert measure(lambda label: inside) == pytest.approx(1 / len({first.label, *(b.label for b in rest)}))
    everywhere = {b.label: (b.top + 4) // 4 * 10 + (b.left + 8) // 4 for b in (first, *rest)}
    assert measure(lambda label: everywhere[label]) == 1.0
    covered = {(y, x) for b in (first, *rest) for y in range(10) for x in range(10)
               if b.top - 4 <= 4 * y <= b.top + b.height and b.left - 4 <= 4 * x <= b.left + b.width}  # fmt: skip
    empty = next(y * 10 + x for y in range(10) for x in range(10) if (y, x) not in covered)
    assert measure(lambda label: empty) == 0.0
