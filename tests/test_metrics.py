"""Multi-label metrics by hand, against scikit-learn, torchmetrics and the papers' formulas written out."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mlhead import SparseTargets
from mlhead.metrics import NAMES, MultiLabelMetrics

torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
sklearn_metrics = pytest.importorskip("sklearn.metrics")


def measured(logits, targets, parts=1):
    """Of dense targets, or of SparseTargets in one part."""
    metrics = MultiLabelMetrics(logits.shape[1])
    if isinstance(targets, SparseTargets):
        metrics.update(torch.as_tensor(logits), targets)
    else:
        for some in np.array_split(np.arange(len(logits)), parts):
            metrics.update(torch.as_tensor(logits[some]), torch.as_tensor(targets[some]))
    return metrics.compute()


def drawn(images, classes, seed=0, share=0.2):
    """Logits that know something of the truth, and truth in which every class occurs."""
    rng = np.random.default_rng(seed)
    truth = rng.random((images, classes)) < share
    truth[rng.integers(0, images, classes), np.arange(classes)] = True
    return (rng.normal(size=truth.shape) + 2.0 * truth - 0.5).astype(np.float32), truth


def three_highest(logits):
    top3 = np.zeros(logits.shape, dtype=bool)
    np.put_along_axis(top3, np.argsort(-logits, axis=1, kind="stable")[:, :3], True, axis=1)
    return top3


BY_HAND = torch.tensor(
    [
        [4.0, 1.0, 3.0, 2.0],  # predicted 0 1 2 3, of which the top 3 are 0 2 3; labels 0 1
        [-1.0, 2.0, -2.0, 1.0],  # predicted 1 3; label 1
        [1.0, -1.0, -3.0, -2.0],  # predicted 0; labels 0 2
        [-3.0, -2.0, 1.0, 3.0],  # predicted 2 3; label 3
    ]
)
LABELS = [[0, 1], [1], [0, 2], [3]]


def test_by_hand():
    got = measured(BY_HAND, SparseTargets.from_lists(LABELS, 4))
    want = {
        # Images by score: class 0: 0 2 1 3, class 1: 1 0 2 3, both begin with their 2 positives; class 2: 0 3 1 2 with
        # its positive 2 at the end; class 3: 3 0 1 2 with its positive 3 at the beginning.
        "mAP": (1 + 1 + 1 / 4 + 1) / 4,
        # Right of predicted: 2 of 2, 2 of 2, 0 of 2, 1 of 3; positives 2, 2, 1, 1.
        "CP": (1 + 1 + 0 + 1 / 3) / 4,
        "CR": (1 + 1 + 0 + 1) / 4,
        "CF1": 21 / 32,  # 2 (7 / 12) (9 / 12) / (16 / 12)
        "OP": 5 / 9,
        "OR": 5 / 6,
        "OF1": 2 / 3,  # 10 / 15
        # Without class 1 in image 0: 2 of 2, 1 of 1, 0 of 2, 1 of 3.
        "CP_top3": (1 + 1 + 0 + 1 / 3) / 4,
        "CR_top3": (1 + 1 / 2 + 0 + 1) / 4,
        "CF1_top3": 35 / 58,  # 2 (14 / 24) (15 / 24) / (29 / 24)
        "OP_top3": 4 / 8,
        "OR_top3": 4 / 6,
        "OF1_top3": 4 / 7,  # 8 / 14
        "classes": 4,
    }
    assert got == pytest.approx(want, abs=1e-12)
    assert tuple(got) == NAMES


def test_unknown_labels_by_hand():
    """Class 0 is unknown in image 0, whose top 3 are then 2 3 1, and class 3 in image 1."""
    want = {
        "mAP": (1 + 1 + 1 / 4 + 1) / 4,
        # Right of predicted: 1 of 1, 2 of 2, 0 of 2, 1 of 2; positives 1, 2, 1, 1.
        "CP": (1 + 1 + 0 + 1 / 2) / 4,
        "CR": (1 + 1 + 0 + 1) / 4,
        "CF1": 15 / 22,  # 2 (5 / 8) (6 / 8) / (11 / 8)
        "OP": 4 / 7,
        "OR": 4 / 5,
        "OF1": 2 / 3,  # 8 / 12
    }
    want |= {f"{name}_top3": value for name, value in want.items() if name != "mAP"} | {"classes": 4}
    targets = SparseTargets.from_lists([[1], [1], [0, 2], [3]], 4, ignore=[[0], [3], [], []])
    assert measured(BY_HAND, targets) == pytest.approx(want, abs=1e-12)
    assert measured(BY_HAND, targets.to_dense(torch.int8)) == measured(BY_HAND, targets)


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
    logits, truth = drawn(images, classes, seed=classes)
    truth[:, -1] &= classes == 1  # a class without a positive must not enter the means
    got = measured(logits, truth, parts=3)

    occurring = [c for c in range(classes) if truth[:, c].any()]
    assert got["classes"] == len(occurring)
    want = np.mean([sklearn_metrics.average_precision_score(truth[:, c], logits[:, c]) for c in occurring])
    assert got["mAP"] == pytest.approx(want, abs=1e-12)
    chosen, top3 = logits >= 0, three_highest(logits)
    names = ["CP", "CR", "CF1", "OP", "OR", "OF1"]
    assert [got[n] for n in names] == pytest.approx(by_hand(logits, truth, chosen), abs=1e-12)
    assert [got[f"{n}_top3"] for n in names] == pytest.approx(by_hand(logits, truth, chosen & top3), abs=1e-12)
    assert set(NAMES) == set(got)

    for suffix, kept in (("", chosen), ("_top3", chosen & top3)):
        for letter, average, columns in (("C", "macro", occurring), ("O", "micro", range(classes))):
            y, z = truth[:, columns], kept[:, columns]
            # One column is the binary problem to scikit-learn, whose macro mean is over 0 and 1.
            average = average if y.shape[1] > 1 else "binary"
            y, z = (y, z) if y.shape[1] > 1 else (y[:, 0], z[:, 0])
            p, r, f1, _ = sklearn_metrics.precision_recall_fscore_support(y, z, average=average, zero_division=0)
            assert [got[f"{letter}{n}{suffix}"] for n in "PR"] == pytest.approx([p, r], abs=1e-12)
            if letter == "O":  # CF1 is not a mean of F1
                assert got[f"OF1{suffix}"] == pytest.approx(f1, abs=1e-12)


def test_against_torchmetrics():
    logits, truth = drawn(300, 25, seed=3)
    got = measured(logits, truth, parts=4)
    scores, truth = torch.from_numpy(logits).sigmoid(), torch.from_numpy(truth).long()
    # torchmetrics counts and divides in fp32: sums of 25 quotients and 300 steps.
    close = {"abs": 300 * torch.finfo(torch.float32).eps}
    assert got["mAP"] == pytest.approx(torchmetrics.multilabel_average_precision(scores, truth, 25).item(), **close)
    top3 = torch.from_numpy(three_highest(logits))
    for suffix, predicted in (("", scores), ("_top3", scores * top3)):
        for letter, average in (("C", "macro"), ("O", "micro")):
            p = torchmetrics.multilabel_precision(predicted, truth, 25, average=average).item()
            r = torchmetrics.multilabel_recall(predicted, truth, 25, average=average).item()
            assert [got[f"{letter}{n}{suffix}"] for n in "PR"] == pytest.approx([p, r], **close)
        f1 = torchmetrics.multilabel_f1_score(predicted, truth, 25, average="micro").item()
        assert got[f"OF1{suffix}"] == pytest.approx(f1, **close)


def test_equal_scores_are_one_threshold():
    logits, truth = drawn(200, 12, seed=4)
    logits = np.round(logits)
    logits[logits == 0] *= np.where(np.arange((logits == 0).sum()) % 2, 1.0, -1.0)  # 0 and -0 are equal
    want = np.mean([sklearn_metrics.average_precision_score(truth[:, c], logits[:, c]) for c in range(12)])
    assert measured(logits, truth)["mAP"] == pytest.approx(want, abs=1e-12)
    # Of five equal scores the three lowest classes are kept: 1 of 3 right.
    assert measured(torch.ones(1, 5), torch.tensor([[0, 1, 0, 1, 0]]))["OP_top3"] == 1 / 3


def test_high_logits_keep_their_order():
    """The sigmoid of 20 and of 30 is 1 in fp32."""
    logits = torch.tensor([[20.0], [30.0], [25.0]])
    assert measured(logits, torch.tensor([[0], [1], [0]]))["mAP"] == 1


def test_unknown_labels_are_as_if_absent():
    logits, truth = drawn(120, 9, seed=5)
    unknown = np.random.default_rng(6).random(truth.shape) < 0.4
    unknown[truth.argmax(0), np.arange(9)] = False  # every class keeps a positive
    unknown[0] = True
    known = ~unknown
    got = measured(logits, np.where(unknown, -1, truth).astype(np.int8), parts=3)
    want = [sklearn_metrics.average_precision_score(truth[known[:, c], c], logits[known[:, c], c]) for c in range(9)]
    assert got["mAP"] == pytest.approx(np.mean(want), abs=1e-12)
    chosen = (logits >= 0) & known
    top3 = three_highest(np.where(known, logits, -np.inf))
    names = ["CP", "CR", "CF1", "OP", "OR", "OF1"]
    truth &= known
    assert [got[n] for n in names] == pytest.approx(by_hand(logits, truth, chosen), abs=1e-12)
    assert [got[f"{n}_top3"] for n in names] == pytest.approx(by_hand(logits, truth, chosen & top3), abs=1e-12)


def test_unknown_labels_are_not_predicted_at_threshold_0():
    metrics = MultiLabelMetrics(2, threshold=0.0)
    metrics.update(torch.zeros(1, 2), torch.tensor([[1, -1]]))
    assert metrics.compute()["OP"] == 1


def test_sparse_is_dense():
    logits, truth = drawn(40, 11, seed=7)
    want = measured(logits, truth)
    lists = [np.flatnonzero(row).tolist() for row in truth]
    assert measured(logits, SparseTargets.from_lists(lists, 11)) == want
    # Verified negatives, and parts of a positive, which is whole.
    everything = SparseTargets.from_lists([range(11)] * 40, 11)
    values = torch.from_numpy(truth).flatten().float()
    assert measured(logits, everything._replace(values=values)) == want
    assert measured(logits, everything._replace(values=values / 2)) == want


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


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ({"num_classes": 1.5}, TypeError, "num_classes must be an integer, got float"),
        ({"threshold": 1.5}, ValueError, r"threshold must be in \[0, 1\], got 1.5"),
        ({"threshold": math.nan}, ValueError, r"threshold must be in \[0, 1\], got nan"),
        ({"threshold": "0.5"}, TypeError, "threshold must be a number, got str"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=f"MultiLabelMetrics: {message}"):
        MultiLabelMetrics(**{"num_classes": 3, **options})


def test_what_cannot_be_measured_is_said():
    metrics = MultiLabelMetrics(3)
    with pytest.raises(ValueError, match="the data must be at least one image"):
        metrics.compute()
    with pytest.raises(ValueError, match=r"both \(B, C\) = \(B, 3\), got \(2, 3\) and \(2, 4\)"):
        metrics.update(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match="logits must be finite"):
        metrics.update(torch.tensor([[0.0, float("nan"), 0.0]]), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="logits must be finite"):
        metrics.update(torch.tensor([[0.0, -1e300, 0.0]], dtype=torch.float64), torch.zeros(1, 3))
    for wrong, found in (
        ([[0, 2, 1]], "values from 0 to 2"),
        ([[0, -2, -1]], "values from -2 to 0"),
        ([[-0.5, 0, 1]], "values from -0.5 to 1"),
        ([[-1, -0.5, 1]], "values from -0.5 to 1"),
        ([[-1, math.nan, 1]], "NaN"),
    ):
        with pytest.raises(ValueError, match=rf"targets must be in \[0, 1\] or -1 and not NaN, got {found}"):
            metrics.update(torch.zeros(1, 3), torch.tensor(wrong))
    with pytest.raises(TypeError, match=r"targets must be a tensor \(B, C\) or SparseTargets, got list"):
        metrics.update(torch.zeros(1, 3), [[0, 1, 0]])
    assert metrics.images == 0
    metrics.update(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="2 images without a label"):
        metrics.compute()
