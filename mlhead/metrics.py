"""Metrics of the papers: multi-label as in CSRA and ML-Decoder, the accuracy of single-label classification."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mlhead._average_precision import RankedScores, summed
from mlhead._check import check_number, check_positive, fail
from mlhead._metric_batches import check_batch, positive, unknown
from mlhead._sparse_metrics import TopKMetrics, propensities
from mlhead._zero_shot_metrics import ZeroShotMetrics
from mlhead.ops import SparseTargets
from mlhead.ops.topk import _first_largest

__all__ = [
    "ACCURACY",
    "NAMES",
    "TOP_K",
    "TOP_KS",
    "MultiLabelMetrics",
    "SingleLabelMetrics",
    "TopKAccuracy",
    "TopKMetrics",
    "ZeroShotMetrics",
    "main_measure",
    "propensities",
]

# The order in which tables and logs show them.
_AT_THRESHOLD = ("CP", "CR", "CF1", "OP", "OR", "OF1")
NAMES = ("mAP", *_AT_THRESHOLD, *(f"{name}_top3" for name in _AT_THRESHOLD), "classes")
ACCURACY = ("top1", "top5")
TOP_KS = (1, 3, 5)
TOP_K = tuple(f"{name}@{k}" for name in ("P", "nDCG", "PSP", "PSnDCG") for k in TOP_KS)


def main_measure(found: Mapping[str, float]) -> str:
    """The name of the metric that decides which weights are best: accuracy where images have one label, else mAP.

    Args:
        found: what `compute` of `MultiLabelMetrics`, `SingleLabelMetrics` or `TopKMetrics` gave.

    Returns:
        "top1", "mAP" or "P@1".
    """
    return next(name for name in ("top1", "mAP", "P@1") if name in found)


class MultiLabelMetrics:
    r"""mAP and the precision, recall and F1 of multi-label classification, over batches.

    With TP_c, FP_c, FN_c the counts of class c, and the means taken over the classes that have a positive:

        CP = mean_c TP_c / (TP_c + FP_c)    CR = mean_c TP_c / (TP_c + FN_c)    CF1 = 2 CP CR / (CP + CR)
        OP = sum_c TP_c / sum_c (TP_c + FP_c)    OR = sum_c TP_c / sum_c (TP_c + FN_c)    OF1 = 2 OP OR / (OP + OR)
        mAP = mean_c AP_c

    CF1 is made of the means, as in the papers; it is not the mean of the classes' F1. A class without any prediction
    has precision 0. In the "_top3" versions an image keeps at most its 3 highest scores of those at or above
    the threshold; of equal scores the lower class.

    An element whose target is -1, a label that is unknown, is as if it were not there: its class is computed without
    this image, and the 3 highest scores of the image are those of its other classes.

    Args:
        num_classes: C.
        threshold: in [0, 1]; a class is predicted where its probability is at least this.
        device: where the counts and the scores live.

    Raises:
        ValueError: num_classes is below 1, or threshold is not in [0, 1].
        TypeError: num_classes is no integer, or threshold no number.

    Numerics: scores are compared in fp32; for mAP these are the logits, where no sigmoid makes high scores equal. They
        are kept: 4 C + 8 m bytes for an image with m positives.

    Source: CSRA, section 4 and Table 4 (mAP, CP to OF1, "Top 3") and section 4.2 (unspecified labels); ML-Decoder,
        section 4 (macro mAP).
    """

    def __init__(self, num_classes: int, *, threshold: float = 0.5, device: torch.device | str = "cpu") -> None:
        where = "MultiLabelMetrics"
        check_positive(where, "num_classes", num_classes)
        check_number(where, "threshold", threshold)
        if not 0.0 <= threshold <= 1.0:
            fail(where, "threshold", "in [0, 1]", threshold)
        self.num_classes, self.threshold = num_classes, threshold
        self.images = 0
        self._ranked = RankedScores(num_classes, device)
        # Positives; then predictions and right predictions, of all and of the 3 highest.
        self._counts = torch.zeros(5, num_classes, dtype=torch.int64, device=device)

    def update(self, logits: Tensor, targets: Tensor | SparseTargets) -> None:
        """Takes a batch.

        Args:
            logits: (B, C) of any float dtype.
            targets: (B, C), or `SparseTargets`. Any value above 0 is a whole positive, -1 is an unknown label.

        Raises:
            ValueError: the shapes do not fit, a logit is not finite, or on the CPU a target is out of range, which on
                CUDA ends in an asynchronous device assertion.
            TypeError: logits is no floating tensor, or targets is neither a tensor nor `SparseTargets`.
        """
        check_batch("MultiLabelMetrics", logits, targets, self.num_classes)
        if len(logits) == 0:
            return
        self.images += len(logits)
        device = self._counts.device
        scores = logits.detach().to(device, torch.float32)
        truth, absent = positive(targets).to(device), unknown(targets)
        predicted = scores.sigmoid() >= self.threshold
        if absent is not None:
            scores = scores.masked_fill(absent.to(device), -torch.inf)
            predicted.masked_fill_(absent.to(device), False)
        self._ranked.add(scores, truth)
        top = _first_largest(scores, min(3, self.num_classes))
        chosen = torch.zeros_like(predicted).scatter_(1, top, predicted.gather(1, top))
        found = torch.stack((truth, predicted, predicted & truth, chosen, chosen & truth))
        self._counts += found.sum(1)

    def compute(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Every metric of `NAMES` in [0, 1], and "classes", how many classes had a positive and so entered the means.

        Args:
            group: the processes that have seen the other images, all of which call this, such as
                `torch.distributed.group.WORLD`; None where this one has seen all. The result is the same on each, and
                that of one process. No process gets the scores of everything: each has those of its share of the
                classes, a few classes at a time.

        Raises:
            ValueError: no image was seen, or no class had a positive: there is nothing to average.
        """
        images = int(summed(torch.tensor(self.images, device=self._counts.device), group))
        if images == 0:
            fail("MultiLabelMetrics", "the data", "at least one image", "none")
        positives, *counts = summed(self._counts, group)
        occurring = positives > 0
        if not occurring.any():
            fail("MultiLabelMetrics", "the targets", "positive somewhere", f"{images} images without a label")
        result = {"mAP": self._ranked.average_precisions(group)[occurring].mean().item()}
        for suffix, predicted, right in (("", *counts[:2]), ("_top3", *counts[2:])):
            result |= _precision_recall(positives, predicted, right, suffix)
        return result | {"classes": int(occurring.sum())}


def _precision_recall(positives: Tensor, predicted: Tensor, right: Tensor, suffix: str) -> dict[str, float]:
    """From the counts (C) of each."""
    positives, predicted, right = positives.double(), predicted.double(), right.double()
    occurring = positives > 0

    def ratio(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(b > 0, a / b.clamp(min=1e-300), 0.0)

    def f1(p: Tensor, r: Tensor) -> Tensor:
        return ratio(2 * p * r, p + r)

    cp, cr = ratio(right, predicted)[occurring].mean(), ratio(right, positives)[occurring].mean()
    op, orr = ratio(right.sum(), predicted.sum()), ratio(right.sum(), positives.sum())
    values = {"CP": cp, "CR": cr, "CF1": f1(cp, cr), "OP": op, "OR": orr, "OF1": f1(op, orr)}
    return {name + suffix: value.item() for name, value in values.items()}


class TopKAccuracy:
    """The share of images whose one label is among the k highest scores, over batches.

    Of equal scores the lower class comes first.

    Args:
        num_classes: C.
        ks: the k, in the order in which they are shown; all below C + 1.
        device: where the counts live, and where batches are counted.

    Raises:
        ValueError: num_classes is below 1, there is no k, or a k is not in [1, C] or is there twice.
        TypeError: a number is no integer.

    Source: ML-Decoder, section 4.3 (ImageNet, CIFAR-100, Stanford Cars).
    """

    def __init__(self, num_classes: int, ks: Sequence[int] = (1, 5), *, device: torch.device | str = "cpu") -> None:
        where = "TopKAccuracy"
        check_positive(where, "num_classes", num_classes)
        for k in ks:
            check_positive(where, "ks", k)
        if not ks or len(set(ks)) != len(ks) or max(ks) > num_classes:
            fail(where, "ks", f"at least one number up to C = {num_classes}, each once", tuple(ks))
        self.num_classes, self.ks = num_classes, tuple(ks)
        # Images; then right ones for each k.
        self._counts = torch.zeros(1 + len(self.ks), dtype=torch.int64, device=device)

    @property
    def images(self) -> int:
        """How many images were seen."""
        return int(self._counts[0])

    def update(self, logits: Tensor, targets: Tensor | SparseTargets) -> None:
        """Takes a batch.

        Args:
            logits: (B, C) of any float dtype; compared in fp32.
            targets: integer classes (B,), or (B, C) or `SparseTargets` with one positive an image.

        Raises:
            ValueError: the shapes do not fit, a logit is not finite, an image has not exactly one label, or on the CPU
                a class or target is out of range, which on CUDA ends in an asynchronous device assertion.
            TypeError: logits is no floating tensor, or targets none of the above.
        """
        where = "TopKAccuracy"
        if isinstance(targets, Tensor) and targets.ndim == 1:
            targets = self._one_hot(targets)
        check_batch(where, logits, targets, self.num_classes)
        device = self._counts.device
        truth = positive(targets).to(device)
        labels = truth.sum(1)
        if not bool((labels == 1).all()):
            row = int((labels != 1).nonzero()[0])
            fail(where, "targets", "of one label an image", f"{int(labels[row])} in row {row}")
        best = _first_largest(logits.detach().to(device, torch.float32), max(self.ks))
        hits = truth.gather(1, best).sum(0).cumsum(0)
        self._counts += torch.stack([labels.sum(), *(hits[k - 1] for k in self.ks)])

    def compute(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """{"top1": ..., "top5": ...}, each in [0, 1].

        Args:
            group: the processes whose images count together, all of which call this; None for this one's alone.

        Raises:
            ValueError: no image was seen.
        """
        images, *right = summed(self._counts, group).tolist()
        if images == 0:
            fail("TopKAccuracy", "the data", "at least one image", "none")
        return {f"top{k}": count / images for k, count in zip(self.ks, right, strict=True)}

    def _one_hot(self, classes: Tensor) -> SparseTargets:
        if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
            fail("TopKAccuracy", "targets", "of an integer dtype where they are classes (B,)", classes.dtype, TypeError)
        rows = torch.arange(len(classes) + 1, device=classes.device)
        return SparseTargets(classes.long(), rows, None, self.num_classes)


class SingleLabelMetrics(MultiLabelMetrics):
    """`MultiLabelMetrics` with "top1" and, of at least 5 classes, "top5": for data whose images have one label each.

    Args:
        num_classes: C.
        device: where the counts and the scores live.

    Raises:
        ValueError: num_classes is below 1.
        TypeError: num_classes is no integer.
    """

    def __init__(self, num_classes: int, *, device: torch.device | str = "cpu") -> None:
        super().__init__(num_classes, device=device)
        self._accuracy = TopKAccuracy(num_classes, [k for k in (1, 5) if k <= num_classes], device=device)

    def update(self, logits: Tensor, targets: Tensor | SparseTargets) -> None:
        """Takes a batch, as `MultiLabelMetrics` does; images all of whose dense labels are unknown do not count.

        Args:
            logits: (B, C) of any float dtype.
            targets: (B, C), or `SparseTargets`, with one positive an image; of dense ones a row of -1 is left out.

        Raises:
            ValueError: as of `MultiLabelMetrics.update`, or an image has not exactly one label.
            TypeError: as of `MultiLabelMetrics.update`.
        """
        # Both take the batch or neither does.
        check_batch("SingleLabelMetrics", logits, targets, self.num_classes)
        if isinstance(targets, Tensor):
            known = (targets >= 0).any(1)
            self._accuracy.update(logits[known], targets[known])
        else:
            self._accuracy.update(logits, targets)
        super().update(logits, targets)

    def compute(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """All of both, each as in `MultiLabelMetrics.compute` and `TopKAccuracy.compute`.

        Args:
            group: as in `MultiLabelMetrics.compute`.

        Raises:
            ValueError: no image was seen, or no class had a positive: there is nothing to average.
        """
        return {**super().compute(group), **self._accuracy.compute(group)}
