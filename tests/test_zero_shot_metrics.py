"""Zero-shot metrics by hand, against scikit-learn, and in parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mlhead import SparseTargets
from mlhead._zero_shot_metrics import NAMES
from mlhead.metrics import MultiLabelMetrics, ZeroShotMetrics

pytest.importorskip("torchmetrics")
sklearn_metrics = pytest.importorskip("sklearn.metrics")


def measured(logits, targets, num_seen, ks=(3, 5), parts=1):
    logits, targets = torch.as_tensor(logits), torch.as_tensor(targets)
    metrics = ZeroShotMetrics(num_seen, logits.shape[1], ks=ks)
    for some in torch.arange(len(logits)).tensor_split(parts):
        metrics.update(logits[some], targets[some])
    return metrics.compute()


def drawn(images, classes, seed=0, share=0.2):
    """Logits that know something of the truth, every class with a positive, and the first image without any label."""
    rng = np.random.default_rng(seed)
    truth = rng.random((images, classes)) < share
    truth[rng.integers(1, images, classes), np.arange(classes)] = True
    truth[0] = False
    return (rng.normal(size=truth.shape) + 1.5 * truth).astype(np.float32), truth


def test_by_hand():
    # Classes 0, 1, 2 are seen; 3, 4 are not.
    logits = torch.tensor(
        [
            [5.0, 1.0, 4.0, 3.0, 2.0],  # order 0 2 3 4 1, labels 0 3
            [1.0, 2.0, 3.0, 4.0, 5.0],  # order 4 3 2 1 0, labels 1 3
            [3.0, 5.0, 1.0, 2.0, 4.0],  # order 1 4 0 3 2, label 2: no unseen one
            [2.0, 0.0, 5.0, 1.0, 3.0],  # order 2 4 0 3 1, labels 0 4
        ]
    )
    targets = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 1, 0], [0, 0, 1, 0, 0], [1, 0, 0, 0, 1]])
    metrics = ZeroShotMetrics(3, 5, ks=(1, 2))
    metrics.update(logits, targets)
    want = {
        # Unseen columns: images 0, 1 and 3 have a label there, 3 labels in all.
        #   k = 1: predicted 3, 4, 4; right in images 0 and 3: P = 2 / 3, R = 2 / 3
        #   k = 2: both classes predicted in 3 images: P = 3 / 6, R = 3 / 3, F1 = 2 (1 / 2) 1 / (3 / 2) = 2 / 3
        "ZSL_P@1": 2 / 3,
        "ZSL_R@1": 2 / 3,
        "ZSL_F1@1": 2 / 3,
        "ZSL_P@2": 1 / 2,
        "ZSL_R@2": 1,
        "ZSL_F1@2": 2 / 3,
        # Over all four images. Class 3: images by score 1 0 2 3, positives 0 1: (1 / 1 + 2 / 2) / 2 = 1.
        # Class 4: images by score 1 2 3 0, positive 3: 1 / 3.
        "ZSL_mAP": (1 + 1 / 3) / 2,
        # All columns: every image has a label, 7 labels in all.
        #   k = 1: predicted 0, 4, 1, 2; right in image 0: P = 1 / 4, R = 1 / 7, F1 = 2 (1 / 28) / (11 / 28) = 2 / 11
        #   k = 2: 0 2, 4 3, 1 4, 2 4; right 1 + 1 + 0 + 1: P = 3 / 8, R = 3 / 7, F1 = 2 (9 / 56) / (45 / 56) = 2 / 5
        "GZSL_P@1": 1 / 4,
        "GZSL_R@1": 1 / 7,
        "GZSL_F1@1": 2 / 11,
        "GZSL_P@2": 3 / 8,
        "GZSL_R@2": 3 / 7,
        "GZSL_F1@2": 2 / 5,
        # Class 0: images by score 0 2 3 1, positives 0 3: (1 / 1 + 2 / 3) / 2 = 5 / 6.
        # Class 1: images by score 2 1 0 3, positive 1: 1 / 2. Class 2: 3 0 1 2, positive 2: 1 / 4.
        "GZSL_mAP": (5 / 6 + 1 / 2 + 1 / 4 + 1 + 1 / 3) / 5,
        # Seen columns: every image has a label there, 4 labels in all.
        #   k = 1: predicted 0, 2, 1, 2; right in image 0: P = R = 1 / 4
        #   k = 2: 0 2, 2 1, 1 0, 2 0; right 1 + 1 + 0 + 1: P = 3 / 8, R = 3 / 4, F1 = 2 (9 / 32) / (36 / 32) = 1 / 2
        "seen_P@1": 1 / 4,
        "seen_R@1": 1 / 4,
        "seen_F1@1": 1 / 4,
        "seen_P@2": 3 / 8,
        "seen_R@2": 3 / 4,
        "seen_F1@2": 1 / 2,
        "seen_mAP": (5 / 6 + 1 / 2 + 1 / 4) / 3,
    }
    got = metrics.compute()
    assert got == pytest.approx(want, abs=1e-6)
    assert (metrics.images, metrics.labelled) == (4, {"ZSL": 3, "GZSL": 4, "seen": 4})
    assert tuple(got) == metrics.names
    assert metrics.names[:7] == ("ZSL_mAP", "ZSL_F1@1", "ZSL_F1@2", "ZSL_P@1", "ZSL_R@1", "ZSL_P@2", "ZSL_R@2")


@pytest.mark.parametrize(("images", "classes", "num_seen"), [(60, 12, 5), (200, 150, 100), (40, 9, 8), (40, 9, 1)])
def test_against_scikit_learn(images, classes, num_seen):
    logits, truth = drawn(images, classes, seed=classes)
    got = measured(logits, truth, num_seen, parts=3)
    assert tuple(got) == NAMES
    for which, columns in {"ZSL": np.s_[num_seen:], "GZSL": np.s_[:], "seen": np.s_[:num_seen]}.items():
        z, y = logits[:, columns], truth[:, columns]
        want = np.mean([sklearn_metrics.average_precision_score(y[:, c], z[:, c]) for c in range(y.shape[1])])
        assert got[f"{which}_mAP"] == pytest.approx(want, abs=1e-6)
        has = y.any(1)
        for k in (3, 5):
            chosen = np.zeros_like(y)
            np.put_along_axis(chosen, np.argsort(-z, axis=1, kind="stable")[:, :k], True, axis=1)
            p, r, f1, _ = sklearn_metrics.precision_recall_fscore_support(
                y[has].ravel(), chosen[has].ravel(), average="binary"
            )
            assert [got[f"{which}_{name}@{k}"] for name in ("P", "R", "F1")] == pytest.approx([p, r, f1], abs=1e-9)


def test_gzsl_map_is_that_of_all_classes():
    logits, truth = drawn(80, 20)
    plain = MultiLabelMetrics(20)
    plain.update(torch.from_numpy(logits), torch.from_numpy(truth).float())
    assert measured(logits, truth, 12)["GZSL_mAP"] == pytest.approx(plain.compute()["mAP"], abs=1e-6)


def test_of_equal_scores_the_lower_class_is_predicted():
    # All equal: predicted are the first k columns of a set. Image 0 has 0 and 2, image 1 has 1 and 3; 2 and 3 unseen.
    targets = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]])
    for equal in (torch.zeros(2, 4), torch.tensor([[0.0, -0.0, -0.0, 0.0], [-0.0, 0.0, 0.0, -0.0]])):
        got = measured(equal, targets, 2, ks=(1, 3))
        assert got["ZSL_P@1"] == got["seen_P@1"] == 1 / 2  # class 2, right in image 0; class 0, right in image 0
        assert got["GZSL_P@1"] == 1 / 2  # class 0
        assert got["GZSL_R@3"] == 3 / 4  # classes 0, 1, 2: both labels of image 0, one of image 1
        # AP of equal scores is the share of positives, whatever the order of the images.
        assert got["GZSL_mAP"] == pytest.approx(1 / 2)
        assert measured(equal.flip(0), targets.flip(0), 2, ks=(1, 3)) == got


def test_of_many_equal_scores_the_lower_classes_are_predicted():
    # torch.topk takes others here. Scores are 0 or 1; image i has the label i only.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 2, (400, 400), generator=generator).float()
    order = np.argsort(-logits.numpy(), axis=1, kind="stable")
    got = measured(logits, torch.eye(400), 150, ks=(5, 40))
    for k in (5, 40):
        assert got[f"GZSL_R@{k}"] == (order[:, :k] == np.arange(400)[:, None]).sum() / 400


def test_ties_in_average_precision_are_as_in_scikit_learn():
    logits, truth = drawn(100, 10, seed=3)
    logits = np.round(logits)
    want = np.mean([sklearn_metrics.average_precision_score(truth[:, c], logits[:, c]) for c in range(6, 10)])
    assert measured(logits, truth, 6)["ZSL_mAP"] == pytest.approx(want, abs=1e-6)


def test_high_scores_keep_their_order():
    """The sigmoid of 20 and of 30 is 1 in fp32, and that of -200 is 0."""
    for shift, scale in ((40.0, 1.0), (-300.0, 1.0), (0.0, 1e30), (0.0, 1e-30)):
        logits, truth = drawn(50, 6, seed=4)
        want = measured(logits, truth, 3)
        # Shifted in steps that fp32 has at 300 too, so that no scores become equal that were not.
        steps = np.argsort(np.argsort(logits, axis=None)).reshape(logits.shape).astype(np.float32) / 16
        assert measured(steps * scale + shift, truth, 3) == want


def test_images_without_an_unseen_label_are_negatives_in_map_only():
    logits, truth = drawn(60, 8, seed=5)
    truth[:20, 5:] = False  # no unseen label
    truth[:20, 0] = True
    got, without = measured(logits, truth, 5, ks=(1, 2)), measured(logits[20:], truth[20:], 5, ks=(1, 2))
    for name in ("P@1", "R@1", "F1@1", "P@2", "R@2", "F1@2"):
        assert got[f"ZSL_{name}"] == without[f"ZSL_{name}"]
    assert got["ZSL_mAP"] < without["ZSL_mAP"]
    assert got["GZSL_P@1"] != without["GZSL_P@1"]


def test_images_without_any_label():
    # Image 1 has no label: predictions of one image count. k = 1: class 1 of 2 unseen ones is right: P = R = 1.
    metrics = ZeroShotMetrics(1, 3, ks=(1,))
    metrics.update(torch.tensor([[0.0, 2.0, 1.0], [0.0, 5.0, 1.0]]), torch.tensor([[1, 1, 0], [0, 0, 0]]))
    got = metrics.compute()
    assert (got["ZSL_P@1"], got["ZSL_R@1"], got["ZSL_F1@1"]) == (1, 1, 1)
    # For mAP image 1 stands above image 0 in class 1: 1 / 2. Class 2 has no positive and does not enter.
    assert got["ZSL_mAP"] == pytest.approx(1 / 2)
    # Class 0: both images have the same score: 1 / 2.
    assert got["GZSL_mAP"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert metrics.labelled == {"ZSL": 1, "GZSL": 1, "seen": 1}


def test_sparse_is_dense():
    logits, truth = drawn(70, 15, seed=6)
    lists = SparseTargets.from_lists([np.flatnonzero(row).tolist() for row in truth], 15)
    metrics = ZeroShotMetrics(9, 15)
    metrics.update(torch.from_numpy(logits), lists)
    assert metrics.compute() == measured(logits, truth, 9)
    for dtype in (torch.float32, torch.bfloat16, torch.int8, torch.int64):
        assert measured(logits, torch.from_numpy(truth).to(dtype), 9) == metrics.compute()


def test_unknown_labels_are_no_positives():
    logits, truth = drawn(30, 6, seed=7)
    unknown = (np.random.default_rng(8).random(truth.shape) < 0.3) & ~truth
    dense = torch.from_numpy(truth).float().masked_fill(torch.from_numpy(unknown), -1)
    rows = [[np.flatnonzero(row).tolist() for row in table] for table in (truth, unknown)]
    metrics = ZeroShotMetrics(4, 6)
    metrics.update(torch.from_numpy(logits), SparseTargets.from_lists(rows[0], 6, ignore=rows[1]))
    assert metrics.compute() == measured(logits, dense, 4) == measured(logits, truth, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_compared_in_fp32(dtype):
    logits, truth = drawn(50, 12, seed=9)
    given = torch.from_numpy(logits).to(dtype)
    assert measured(given, truth, 7) == measured(given.float(), truth, 7)


def test_batches_are_one_batch():
    logits, truth = drawn(64, 11, seed=10)
    want = measured(logits, truth, 6)
    assert measured(logits, truth, 6, parts=64) == measured(logits, truth, 6, parts=5) == want
    metrics, logits = ZeroShotMetrics(6, 11), torch.from_numpy(logits)
    metrics.update(torch.zeros(0, 11), torch.zeros(0, 11))
    metrics.update(torch.zeros(0, 11), SparseTargets.from_lists([], 11))
    buffer = torch.empty(32, 11, requires_grad=True)
    for half in (np.s_[:32], np.s_[32:]):
        with torch.no_grad():
            buffer.copy_(logits[half])  # as a model in a CUDA graph does
        metrics.update(buffer, torch.from_numpy(truth[half]))
    assert metrics.compute() == metrics.compute() == want


def test_k_is_clamped_to_the_columns():
    # Two unseen classes, k = 3: both are predicted in each image, so P = 2 / 4 and R = 1.
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0, -1.0], [0.0, 1.0, 2.0, 3.0, 4.0]])
    targets = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]])
    got = measured(logits, targets, 3, ks=(3, 1, 9))
    assert (got["ZSL_P@3"], got["ZSL_R@3"]) == (got["ZSL_P@9"], got["ZSL_R@9"]) == (1 / 2, 1)
    assert got["seen_R@3"] == got["GZSL_R@9"] == 1
    assert got["GZSL_P@9"] == 4 / 10
    assert [name for name in got if name.startswith("ZSL_F1")] == ["ZSL_F1@3", "ZSL_F1@1", "ZSL_F1@9"]


def test_nothing_right_is_zero():
    got = measured(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), torch.tensor([[0, 1, 0, 1]]), 2, ks=(1,))
    assert [got[f"{which}_{name}@1"] for which in ("ZSL", "GZSL", "seen") for name in ("P", "R", "F1")] == [0] * 9


def test_what_cannot_be_measured_is_said():
    for num_seen, C in ((0, 3), (3, 3), (4, 3), (1, 1)):
        with pytest.raises(ValueError, match="num_seen must be"):
            ZeroShotMetrics(num_seen, C)
    with pytest.raises(ValueError, match="ks must be at least one number, each once, got \\(3, 3\\)"):
        ZeroShotMetrics(1, 3, ks=(3, 3))
    with pytest.raises(ValueError, match="ks must be at least one number"):
        ZeroShotMetrics(1, 3, ks=())
    with pytest.raises(ValueError, match="ks must be at least 1, got 0"):
        ZeroShotMetrics(1, 3, ks=(0,))
    metrics = ZeroShotMetrics(2, 3)
    with pytest.raises(ValueError, match="the data must be at least one image"):
        metrics.compute()
    with pytest.raises(ValueError, match=r"both \(B, C\) = \(B, 3\), got \(2, 3\) and \(2, 4\)"):
        metrics.update(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"both \(B, C\) = \(B, 3\), got \(2, 4\) and \(2, 4\)"):
        metrics.update(torch.zeros(2, 4), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"both \(B, C\) = \(B, 3\), got \(3,\) and \(3,\)"):
        metrics.update(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match=r"both \(B, C\) = \(B, 3\), got \(2, 3\) and \(1, 3\)"):
        metrics.update(torch.zeros(2, 3), SparseTargets.from_lists([[0]], 3))
    with pytest.raises(ValueError, match="each class at most once"):
        metrics.update(torch.zeros(1, 3), SparseTargets(torch.tensor([1, 1]), torch.tensor([0, 2]), None, 3))
    for bad in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="logits must be finite"):
            metrics.update(torch.tensor([[0.0, bad, 0.0]]), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"targets must be in \[0, 1\] or -1 and not NaN, got NaN"):
        metrics.update(torch.zeros(1, 3), torch.tensor([[0.0, float("nan"), 1.0]]))
    with pytest.raises(ValueError, match=r"targets must be in \[0, 1\] or -1"):
        metrics.update(torch.zeros(1, 3), torch.tensor([[0, 2, 1]]))
    with pytest.raises(TypeError, match="logits must be of a floating dtype"):
        metrics.update(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3))
    with pytest.raises(TypeError, match=r"targets must be a tensor \(B, C\) or SparseTargets, got list"):
        metrics.update(torch.zeros(1, 3), [[0, 1, 0]])
    assert metrics.images == 0
    metrics.update(torch.zeros(2, 3), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="positive somewhere, got 2 images without such a label"):
        metrics.compute()
    metrics.update(torch.zeros(1, 3), torch.tensor([[0, 1, 0]]))
    with pytest.raises(ValueError, match="positive somewhere among the unseen classes, got 3 images"):
        metrics.compute()
    metrics = ZeroShotMetrics(2, 3)
    metrics.update(torch.zeros(1, 3), torch.tensor([[0, 0, 1]]))
    with pytest.raises(ValueError, match="positive somewhere among the seen classes, got 1 images"):
        metrics.compute()
