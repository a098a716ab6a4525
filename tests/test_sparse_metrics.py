"""Metrics from the best classes of each image, by hand, against loops, and in parts."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mlhead import SparseTargets, linear_topk
from mlhead.metrics import TopKMetrics, propensities

L2, L3 = 1 / math.log2(3), 1 / math.log2(4)  # what the second and the third place count; the first counts 1


def counted(classes: list[list[int]], targets: SparseTargets, ks: tuple[int, ...], p: Tensor | None = None) -> dict:
    metrics = TopKMetrics(ks, p)
    metrics.update(torch.tensor(classes), targets)
    return metrics.compute()


def test_by_hand() -> None:
    targets = SparseTargets.from_lists([[0, 2], [4], [1, 2, 3]], 5)
    p = torch.tensor([0.5, 0.25, 0.2, 1.0, 0.1], dtype=torch.float64)  # each counts 2, 4, 5, 1, 10
    # hits: - 1 1; 1 - -; 1 - 1
    got = counted([[4, 2, 0], [4, 0, 1], [3, 0, 1]], targets, (1, 2, 3), p)
    want = {
        "P@1": 2 / 3,
        "P@2": (1 / 2 + 1 / 2 + 1 / 2) / 3,
        "P@3": (2 / 3 + 1 / 3 + 2 / 3) / 3,
        "nDCG@1": 2 / 3,
        "nDCG@2": (L2 / (1 + L2) + 1 + 1 / (1 + L2)) / 3,
        "nDCG@3": ((L2 + L3) / (1 + L2) + 1 + (1 + L3) / (1 + L2 + L3)) / 3,
        "PSP@1": (0 + 10 + 1) / (5 + 10 + 5),
        "PSP@2": (5 + 10 + 1) / (7 + 10 + 9),
        "PSP@3": (7 + 10 + 5) / (7 + 10 + 10),
        "PSnDCG@1": (0 + 10 + 1) / (5 + 10 + 5),
        "PSnDCG@2": (5 * L2 / (1 + L2) + 10 + 1 / (1 + L2)) / ((5 + 2 * L2) / (1 + L2) + 10 + (5 + 4 * L2) / (1 + L2)),
        "PSnDCG@3": ((5 * L2 + 2 * L3) / (1 + L2) + 10 + (1 + 4 * L3) / (1 + L2 + L3))
        / ((5 + 2 * L2) / (1 + L2) + 10 + (5 + 4 * L2 + L3) / (1 + L2 + L3)),
    }
    assert got == pytest.approx(want, abs=1e-12)
    unscored = counted([[4, 2, 0], [4, 0, 1], [3, 0, 1]], targets, (1, 2, 3))
    assert unscored == pytest.approx({name: value for name, value in want.items() if "PS" not in name}, abs=1e-12)


def test_images_without_positives_count_zero_in_precision_only() -> None:
    p = torch.tensor([0.5, 0.25, 0.2])
    classes = [[0, 1], [2, 1], [0, 2]]
    got = counted(classes, SparseTargets.from_lists([[0], [], [1]], 3), (1, 2), p)
    assert got["P@1"] == pytest.approx(1 / 3)
    assert got["nDCG@1"] == pytest.approx(1 / 2)
    without = counted([classes[0], classes[2]], SparseTargets.from_lists([[0], [1]], 3), (1, 2), p)
    assert all(got[name] == pytest.approx(without[name]) for name in got if not name.startswith("P@"))


def test_unknown_labels_and_zeros_are_no_positives_and_take_a_place() -> None:
    targets = SparseTargets.from_lists([[1]], 4, ignore=[[0, 3]])
    got = counted([[0, 1, 3]], targets, (1, 3), torch.tensor([0.01, 0.5, 0.5, 0.01]))
    assert got == pytest.approx(
        {"P@1": 0, "P@3": 1 / 3, "nDCG@1": 0, "nDCG@3": L2, "PSP@1": 0, "PSP@3": 1, "PSnDCG@1": 0, "PSnDCG@3": L2}
    )
    offsets = torch.tensor([0, 3])
    valued = SparseTargets(torch.tensor([0, 1, 3]), offsets, torch.tensor([0.0, 0.3, -1.0]), 4)
    assert counted([[0, 1, 3]], valued, (1, 3)) == counted([[0, 1, 3]], targets, (1, 3))


def by_loops(classes: Tensor, dense: Tensor, k: int, p: Tensor) -> dict[str, float]:
    """The formulas of the docstring, image by image."""
    totals = dict.fromkeys(("P", "nDCG", "PSP", "best", "PSnDCG", "ps_best"), 0.0)
    labelled = 0
    for row, y in zip(classes.tolist(), dense.tolist(), strict=True):
        positives = {c for c, value in enumerate(y) if value > 0}
        hits = [(i, c) for i, c in enumerate(row[:k]) if c in positives]
        totals["P"] += len(hits) / k
        if not positives:
            continue
        labelled += 1
        ideal = sum(1 / math.log2(i + 2) for i in range(min(k, len(positives))))
        rare = sorted((1 / float(p[c]) for c in positives), reverse=True)[:k]
        totals["nDCG"] += sum(1 / math.log2(i + 2) for i, _ in hits) / ideal
        totals["PSP"] += sum(1 / float(p[c]) for _, c in hits)
        totals["best"] += sum(rare)
        totals["PSnDCG"] += sum(1 / float(p[c]) / math.log2(i + 2) for i, c in hits) / ideal
        totals["ps_best"] += sum(gain / math.log2(i + 2) for i, gain in enumerate(rare)) / ideal
    return {
        f"P@{k}": totals["P"] / len(classes),
        f"nDCG@{k}": totals["nDCG"] / labelled,
        f"PSP@{k}": totals["PSP"] / totals["best"],
        f"PSnDCG@{k}": totals["PSnDCG"] / totals["ps_best"],
    }


def random_problem(images: int, C: int) -> tuple[Tensor, Tensor, Tensor]:
    dense = (torch.rand(images, C) < torch.linspace(0.3, 0.01, C)).float()
    dense[::7] = 0
    dense[torch.rand(images, C) < 0.05] = -1
    classes = (torch.randn(images, C) + 2 * dense).topk(min(8, C)).indices
    return classes, dense, propensities((dense > 0).sum(0), images)


@pytest.mark.parametrize(("images", "C"), [(60, 40), (33, 8), (25, 300)])
def test_against_loops_in_parts_and_over_processes(images: int, C: int) -> None:
    classes, dense, p = random_problem(images, C)
    targets = SparseTargets.from_dense(dense.clamp(min=0), ignore=dense < 0)
    ks = (5, 1, 8)
    want = {name: value for k in ks for name, value in by_loops(classes, dense, k, p).items()}
    whole, parts, other = (TopKMetrics(ks, p) for _ in range(3))
    whole.update(classes, targets)
    assert whole.compute() == pytest.approx(want, abs=1e-12)
    assert all(0 <= value <= 1 for value in want.values())
    for part, metrics in zip(torch.arange(images).split(9), (parts, other) * images, strict=False):
        metrics.update(classes[part], SparseTargets.from_dense(dense[part].clamp(min=0), ignore=dense[part] < 0))
    parts.sums += other.sums  # as an all-reduce does
    assert parts.compute() == pytest.approx(want, abs=1e-12)
    parts.reset()
    parts.update(classes, targets)
    assert parts.compute() == whole.compute()


def test_perfect_and_hopeless_rankings() -> None:
    p = torch.tensor([0.9, 0.5, 0.1, 0.3])
    targets = SparseTargets.from_lists([[0, 1, 2], [2, 3]], 4)
    perfect = counted([[2, 1, 0], [2, 3, 0]], targets, (1, 2, 3), p)
    assert perfect["P@3"] == pytest.approx(5 / 6)
    assert all(value == pytest.approx(1) for name, value in perfect.items() if name != "P@3")
    hopeless = counted([[3], [0]], targets, (1,), p)
    assert set(hopeless.values()) == {0.0}


def test_a_million_classes() -> None:
    """Nothing here may be of size (B, C): 256 rows of a million would be a gigabyte."""
    C, B = 1_000_000, 256
    labels = torch.randint(C, (B, 3)).sort(1).values + torch.arange(3)
    labels = labels.clamp(max=C - 3) + torch.arange(3)
    targets = SparseTargets.from_lists(labels.tolist(), C)
    classes = torch.stack([labels[:, 1], labels[:, 0] * 0 + C - 1, labels[:, 2]], 1)
    got = TopKMetrics((1, 3), propensities(torch.randint(50, (C,)), 10_000))
    got.update(classes, targets)
    result = got.compute()
    assert result["P@1"] == 1
    assert result["P@3"] == pytest.approx(2 / 3, abs=0.01)


def test_takes_what_topk_gives() -> None:
    weight = torch.eye(6)
    x = torch.tensor([[0.0, 3, 2, 1, 0, 0], [5.0, 0, 0, 0, 0, 4]])
    _, classes = linear_topk(x, weight, None, 3)
    metrics = TopKMetrics((1, 2))
    metrics.update(classes, SparseTargets.from_lists([[2], [0, 5]], 6))
    metrics.update(classes[:0], SparseTargets.from_lists([], 6))
    metrics.update(classes.int()[:1], SparseTargets.from_lists([[1]], 6))
    assert metrics.compute()["P@2"] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3)


def test_propensities() -> None:
    counts = torch.tensor([0, 1, 100])
    factor = (math.log(1000) - 1) * 2.5**0.55
    want = [1 / (1 + factor * math.exp(-0.55 * math.log(n + 1.5))) for n in counts.tolist()]
    assert propensities(counts, 1000).tolist() == pytest.approx(want, abs=1e-14)
    factor = (math.log(50) - 1) * 1.4**0.5
    assert propensities(counts, 50, a=0.5, b=0.4)[2].item() == pytest.approx(1 / (1 + factor / math.sqrt(100.4)))


def test_errors() -> None:
    targets = SparseTargets.from_lists([[0], [1]], 4)
    metrics = TopKMetrics((1, 3), torch.full((4,), 0.5))
    good = torch.tensor([[0, 1, 2], [1, 2, 3]])
    with pytest.raises(ValueError, match="TopKMetrics: the data must be at least one image, got none"):
        metrics.compute()
    with pytest.raises(ValueError, match=r"classes must be \(B, K\) with B = 2 like targets and K >= 3, got \(2, 2\)"):
        metrics.update(good[:, :2], targets)
    with pytest.raises(ValueError, match=r"got \(1, 3\)"):
        metrics.update(good[:1], targets)
    with pytest.raises(TypeError, match=r"classes must be an integer tensor \(B, K\), got torch.float32 \(2, 3\)"):
        metrics.update(good.float(), targets)
    with pytest.raises(TypeError, match="targets must be SparseTargets, got Tensor"):
        metrics.update(good, targets.to_dense())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"classes must be in \[0, C\) = \[0, 4\), got 1 to 4"):
        metrics.update(good + 1, targets)
    with pytest.raises(ValueError, match="targets must be of C = 4 classes like propensities, got 5"):
        metrics.update(good, SparseTargets.from_lists([[0], [1]], 5))
    metrics.update(good, SparseTargets.from_lists([[], []], 4))
    with pytest.raises(ValueError, match="the targets must be positive somewhere, got 2 images without a label"):
        metrics.compute()
    with pytest.raises(ValueError, match="TopKMetrics: ks must be at least 1, got 0"):
        TopKMetrics((0,))
    with pytest.raises(ValueError, match=r"ks must be at least one number, each once, got \(1, 1\)"):
        TopKMetrics((1, 1))
    with pytest.raises(ValueError, match="at least one number, each once"):
        TopKMetrics(())
    for wrong in (torch.tensor([0.5, 0.0]), torch.tensor([0.5, 1.1]), torch.tensor([0.5, math.nan])):
        with pytest.raises(ValueError, match=r"propensities must be in \(0, 1\]"):
            TopKMetrics((1,), wrong)
    with pytest.raises(ValueError, match="num_images must be at least 3"):
        propensities(torch.ones(4), 2)
    with pytest.raises(ValueError, match="counts must be at least 0, got -1"):
        propensities(torch.tensor([1, -1]), 10)
    for counts, error, message in (
        ([1], TypeError, "a torch.Tensor, got list"),
        (torch.ones(4, dtype=torch.complex64), TypeError, "real, got torch.complex64"),
        (torch.ones(2, 2), ValueError, r"\(C,\), got \(2, 2\)"),
        (torch.ones(()), ValueError, r"\(C,\), got \(\)"),
    ):
        with pytest.raises(error, match=f"propensities: counts must be {message}"):
            propensities(counts, 10)  # type: ignore[arg-type]
