"""Measuring a model on batches: dense and sparse targets, where the time goes, and the benchmark of it."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from torch import nn

from mlhead import SparseTargets
from mlhead._config import TrainConfig
from mlhead.data.loading import BadSample, Batch
from mlhead.data.padding import padded_batches
from mlhead.data.reporting import BadDataLog
from mlhead.evaluation import evaluate
from mlhead.metrics import MultiLabelMetrics, TopKAccuracy, TopKMetrics

C = 6
NOTHING = SparseTargets.from_lists([], C)


class Model(nn.Module):
    """Logits of the pixels' mean; a forward takes at least `seconds`."""

    def __init__(self, seconds=0.0):
        super().__init__()
        self.layer, self.seconds = nn.Linear(3, C), seconds

    def forward(self, images):
        time.sleep(self.seconds)
        return self.layer(images.mean((2, 3)))

    def topk(self, images, k):
        return self(images).topk(k)


def batches(sparse, one_label=False):
    """Three batches, of which one has no image that can be read."""
    generator = torch.Generator().manual_seed(0)
    for size in (5, 0, 4):
        images = torch.randn(size, 3, 4, 4, generator=generator)
        truth = (torch.rand(size, C, generator=generator) < 0.4).float()
        if one_label:
            truth = nn.functional.one_hot(truth.argmax(1), C).float()
        elif size:
            truth[0, 0] = -1
        bad = [] if size else [BadSample("broken.png", "cut short")]
        yield Batch(images, SparseTargets.from_dense(truth) if sparse else truth, bad)


def run(model, data, metrics, config=None, **options):
    log = BadDataLog("skip", lambda line: None)
    model.train()
    found = evaluate(model, data, config or TrainConfig(), metrics, torch.device("cpu"), log, **options)
    assert model.training
    return found, log


@torch.no_grad()
def test_targets_are_dense_or_sparse():
    model = Model()
    direct = MultiLabelMetrics(C)
    for batch in batches(sparse=False):
        direct.update(model(batch.images) if len(batch.images) else torch.zeros(0, C), batch.targets)
    for sparse in (False, True):
        found, log = run(model, batches(sparse), MultiLabelMetrics(C))
        assert found == direct.compute()
        assert list(log.names) == ["broken.png"]


def test_accuracy_sees_the_logits():
    """What the softmax loss hands to the other metrics is cut off at 1e-12, below which its classes are equal."""
    model = Model()
    with torch.no_grad():
        model.layer.weight.zero_()
        model.layer.bias.copy_(torch.tensor([100.0, 3.0, 4.0, 2.0, 5.0, 1.0]))
    data = list(batches(True, one_label=True))
    labels = np.concatenate([batch.targets.indices for batch in data])
    found, _ = run(model, data, TopKAccuracy(C, (1, 2)), TrainConfig(loss="softmax"))
    assert found == {"top1": np.mean(labels == 0), "top2": np.mean(np.isin(labels, (0, 4)))}


def test_where_the_time_goes():
    def slow():
        for batch in batches(sparse=True):
            time.sleep(0.02)
            yield batch

    times = {"data": 1.0}
    began = time.perf_counter()
    run(Model(0.05), slow(), MultiLabelMetrics(C), times=times)
    wall = time.perf_counter() - began
    assert set(times) == {"data", "model", "metrics"}
    assert times["data"] >= 1.06  # added to what was there
    assert times["model"] >= 0.1
    assert times["metrics"] > 0
    assert sum(times.values()) - 1 <= wall


def test_the_benchmark(tmp_path, capsys):
    pytest.importorskip("timm")
    from benchmarks import evaluation

    path = tmp_path / "rows.jsonl"
    sizes = ["--images", "4", "--of", "100", "--batch", "2", "--image-size", "32", "--out", str(path)]
    assert evaluation.main(["--device", "cpu", "--backbone", "resnet18", *sizes]) == 0
    assert "share" in capsys.readouterr().out
    (row,) = map(json.loads, path.read_text().splitlines())
    assert (row["kind"], row["backbone"], row["images"], row["classes"]) == ("evaluation", "resnet18", 100, 80)
    assert row["reduced"] == {"images": "the model ran on 4 of 100"}
    assert row["share"] == pytest.approx(row["metrics_s"] / (row["metrics_s"] + row["model_s"]))


@torch.no_grad()
def test_the_best_classes_alone():
    """P@k and nDCG@k by the model's `topk`; images that fill a batch do not count."""
    model, ks = Model(), (1, 3)
    direct = TopKMetrics(ks)
    for batch in batches(sparse=True):
        if len(batch.images):
            direct.update(model(batch.images).topk(3)[1], batch.targets)
    found, _ = run(model, batches(sparse=True), TopKMetrics(ks))
    assert found == direct.compute()
    filled = list(padded_batches(batches(sparse=True), 4, 5, Batch(torch.zeros(0, 3, 4, 4), NOTHING, []), (3, 4, 4)))
    assert [len(batch.images) for batch in filled] == [5, 5, 5, 5]
    assert [batch.real for batch in filled] == [None, 0, 4, 0]
    assert run(model, filled, TopKMetrics(ks))[0] == found
