"""Accuracy of single-label classification: by hand, against scikit-learn and torchmetrics."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlhead import SparseTargets
from mlhead.metrics import MultiLabelMetrics, SingleLabelMetrics, TopKAccuracy, main_measure


def measured(logits, targets, ks=(1, 5)):
    metrics = TopKAccuracy(logits.shape[1], ks)
    metrics.update(logits, targets)
    return metrics.compute()


def test_by_hand():
    logits = torch.tensor([[3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [3.0, 1.0, 2.0], [0.0, 0.0, 0.0]])
    classes = torch.tensor([0, 1, 2, 1])  # at place 1, 3, 2; of equal scores class 1 is the second
    want = {"top1": 1 / 4, "top2": 3 / 4, "top3": 1.0}
    dense = torch.nn.functional.one_hot(classes)
    sparse = SparseTargets.from_lists(classes[:, None].tolist(), 3)
    for targets in (classes, classes.int(), dense, dense.bool(), dense.float(), sparse):
        assert measured(logits, targets, (1, 2, 3)) == want


def test_against_scikit_learn_and_torchmetrics():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(20, (500,), generator=generator)
    classes[:20] = torch.arange(20)
    logits = torch.randn(500, 20, generator=generator) + 2 * torch.nn.functional.one_hot(classes)
    metrics = TopKAccuracy(20)
    for some in torch.arange(500).split(64):
        metrics.update(logits[some], classes[some])
    got = metrics.compute()
    assert metrics.images == 500
    assert list(got) == ["top1", "top5"]
    for k in (1, 5):
        assert got[f"top{k}"] == pytest.approx(
            sklearn_metrics.top_k_accuracy_score(classes.numpy(), logits.numpy(), k=k), abs=1e-12
        )
        theirs = torchmetrics.multiclass_accuracy(logits, classes, 20, average="micro", top_k=k)
        assert got[f"top{k}"] == pytest.approx(theirs.item(), abs=torch.finfo(torch.float32).eps)
    assert got["top1"] == np.mean(logits.argmax(1).numpy() == classes.numpy())


def test_what_cannot_be_measured_is_said():
    for ks in ((), (1, 1), (0,), (1, 5)):
        with pytest.raises(ValueError, match="TopKAccuracy: ks must be at least"):
            TopKAccuracy(4, ks)
    metrics = TopKAccuracy(3, (1,))
    with pytest.raises(ValueError, match="at least one image, got none"):
        metrics.compute()
    with pytest.raises(ValueError, match=r"targets must be of one label an image, got 2 in row 1"):
        metrics.update(torch.zeros(2, 3), torch.tensor([[0, 1, 0], [1, 1, 0]]))
    with pytest.raises(ValueError, match=r"of one label an image, got 0 in row 0"):
        metrics.update(torch.zeros(1, 3), SparseTargets.from_lists([[]], 3))
    with pytest.raises(ValueError, match=r"classes in \[0, 3\), got 3 in row 1"):
        metrics.update(torch.zeros(2, 3), torch.tensor([0, 3]))
    with pytest.raises(TypeError, match="integer dtype where they are classes"):
        metrics.update(torch.zeros(2, 3), torch.zeros(2))
    with pytest.raises(ValueError, match=r"both \(B, C\) = \(B, 3\), got \(2, 3\) and \(1, 3\)"):
        metrics.update(torch.zeros(2, 3), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="logits must be finite"):
        metrics.update(torch.full((1, 3), torch.nan), torch.tensor([0]))
    assert metrics.images == 0
    metrics.update(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="at least one image, got none"):
        metrics.compute()


def test_single_label_metrics_are_both() -> None:
    logits, classes = torch.randn(12, 7, generator=torch.Generator().manual_seed(3)), torch.arange(12) % 7
    targets = torch.nn.functional.one_hot(classes, 7)
    both, many, accuracy = SingleLabelMetrics(7), MultiLabelMetrics(7), TopKAccuracy(7)
    for metrics in (both, many, accuracy):
        metrics.update(logits, targets)
    # An image that stands in for a missing one has unknown labels only.
    both.update(logits[:1], torch.full((1, 7), -1))
    assert both.compute() == {**many.compute(), **accuracy.compute()}
    assert main_measure(both.compute()) == "top1"
    assert main_measure(many.compute()) == "mAP"
    few = SingleLabelMetrics(2)
    few.update(torch.eye(2), torch.eye(2))
    assert few.compute()["top1"] == 1.0
    assert "top5" not in few.compute()


def test_single_label_metrics_take_a_batch_whole_or_not_at_all() -> None:
    metrics = SingleLabelMetrics(3)
    metrics.update(torch.eye(3), torch.eye(3))
    before = metrics.compute()
    wrong = ((torch.eye(3), torch.ones(3, 3)), (torch.eye(3), torch.eye(2)), (torch.eye(3) / 0, torch.eye(3)))
    for logits, targets in wrong:
        with pytest.raises(ValueError, match="must be"):
            metrics.update(logits, targets)
    assert metrics.compute() == before
