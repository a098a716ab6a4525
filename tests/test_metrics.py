"""Metrics against scikit-learn and the papers' formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mlhead.metrics import NAMES, MultiLabelMetrics

pytest.importorskip("torchmetrics")
sklearn_metrics = pytest.importorskip("sklearn.metrics")


def by_hand(scores, truth, chosen):
    """CP to OF1 by loops over the classes that have a positive."""
    precisions, recalls = [], []
    for c in range(truth.shape[1]):
        if truth[:, c].sum() == 0:
            continue
        tp = int((chosen[:, c] & truth[:, c]).sum())
        precisions.append(tp / int(chosen[:, c].sum()) if chosen[:, c].any() else 0.0)
        recalls.append(tp / int(truth[:, c].sum()))
    cp, cr = float(np.mean(precisions)), float(np.mean(recalls))
    tp = int((chosen & truth).sum())
    op, orr = tp / int(chosen.sum()), tp / int(truth.sum())
    return [cp, cr, 2 * cp * cr / (cp + cr), op, orr, 2 * op * orr / (op + orr)]


@pytest.mark.parametrize(("images", "classes"), [(50, 7), (200, 30), (33, 2), (40, 1)])
def test_against_scikit_learn_and_loops(images, classes):
    rng = np.random.default_rng(classes)
    truth = rng.random((images, classes)) < 0.2
    truth[:, -1] = False if classes > 1 else truth[:, -1]  # a class without a positive must not enter the means
    logits = rng.normal(size=(images, classes)) + 2.0 * truth - 0.5
    metrics = MultiLabelMetrics(classes)
    for part in np.array_split(np.arange(images), 3):
        metrics.update(torch.from_numpy(logits[part]).float(), torch.from_numpy(truth[part]).float())
    got = metrics.compute()

    occurring = [c for c in range(classes) if truth[:, c].any()]
    assert got["classes"] == len(occurring)
    want = np.mean([sklearn_metrics.average_precision_score(truth[:, c], logits[:, c]) for c in occurring])
    assert got["mAP"] == pytest.approx(want, abs=1e-6)

    chosen = logits >= 0
    top3 = np.zeros_like(chosen)
    np.put_along_axis(top3, np.argsort(-logits, axis=1)[:, :3], True, axis=1)
    names = ["CP", "CR", "CF1", "OP", "OR", "OF1"]
    assert [got[n] for n in names] == pytest.approx(by_hand(logits, truth, chosen), abs=1e-6)
    assert [got[f"{n}_top3"] for n in names] == pytest.approx(by_hand(logits, truth, chosen & top3), abs=1e-6)
    assert set(NAMES) == set(got)


def test_perfect_and_hopeless_scores():
    truth = (torch.rand(64, 5, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    perfect = MultiLabelMetrics(5)
    perfect.update(truth * 20 - 10, truth)
    assert all(v == pytest.approx(1) for k, v in perfect.compute().items() if "top3" not in k and k != "classes")
    silent = MultiLabelMetrics(5)
    silent.update(torch.full((64, 5), -9.0), truth)
    result = silent.compute()
    assert [result[n] for n in ("CP", "CR", "CF1", "OP", "OR", "OF1")] == [0] * 6
    assert not any(math.isnan(v) for v in result.values())


def test_the_threshold_is_inclusive():
    metrics = MultiLabelMetrics(2)
    metrics.update(torch.tensor([[0.0, -1e-3]]), torch.tensor([[1.0, 1.0]]))
    assert metrics.compute()["OR"] == pytest.approx(0.5)


def test_low_precision_logits_and_an_empty_batch():
    metrics = MultiLabelMetrics(4)
    metrics.update(torch.zeros(0, 4), torch.zeros(0, 4))
    metrics.update(torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).bfloat16(), torch.eye(4).repeat(2, 1))
    assert metrics.images == 8
    assert 0 < metrics.compute()["mAP"] <= 1


def test_what_cannot_be_measured_is_said():
    metrics = MultiLabelMetrics(3)
    with pytest.raises(ValueError, match="the data must be at least one image"):
        metrics.compute()
    with pytest.raises(ValueError, match=r"both \(B, C\) = \(B, 3\), got \(2, 3\) and \(2, 4\)"):
        metrics.update(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="logits must be finite"):
        metrics.update(torch.tensor([[0.0, float("nan"), 0.0]]), torch.zeros(1, 3))
    metrics.update(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="2 images without a label"):
        metrics.compute()
