"""Multi-label metrics, counted by torchmetrics and averaged as the papers do."""

from __future__ import annotations

import torch
from torch import Tensor

from mlhead._check import fail
from mlhead._sparse_metrics import TopKMetrics, propensities
from mlhead._usage import require
from mlhead._zero_shot_metrics import ZeroShotMetrics

__all__ = ["NAMES", "MultiLabelMetrics", "TopKMetrics", "ZeroShotMetrics", "propensities"]

# The order in which tables and logs show them.
_AT_THRESHOLD = ("CP", "CR", "CF1", "OP", "OR", "OF1")
NAMES = ("mAP", *_AT_THRESHOLD, *(f"{name}_top3" for name in _AT_THRESHOLD), "classes")


class MultiLabelMetrics:
    r"""mAP and the precision, recall and F1 of multi-label classification, over batches.

    With TP_c, FP_c, FN_c the counts of class c, and the means taken over the classes that have a positive:

        CP = mean_c TP_c / (TP_c + FP_c)    CR = mean_c TP_c / (TP_c + FN_c)    CF1 = 2 CP CR / (CP + CR)
        OP = sum_c TP_c / sum_c (TP_c + FP_c)    OR = sum_c TP_c / sum_c (TP_c + FN_c)    OF1 = 2 OP OR / (OP + OR)
        mAP = mean_c AP_c

    CF1 is made of the means, as in the papers; it is not the mean of the classes' F1. A class without any prediction
    has precision 0. In the "_top3" versions an image keeps at most its 3 highest scores of those at or above
    the threshold.

    Args:
        num_classes: C.
        threshold: a class is predicted where its probability is at least this.
        device: where the counts live.

    Numerics: scores are compared in fp32. All scores are kept for mAP: 5 C bytes an image with the targets.

    Source: CSRA, section 4 and Table 4 (mAP, CP to OF1, "Top 3"); ML-Decoder, section 4 (macro mAP).
    """

    def __init__(self, num_classes: int, *, threshold: float = 0.5, device: torch.device | str = "cpu") -> None:
        classification = require("torchmetrics.classification", "mlhead.metrics")
        if num_classes < 1:
            fail("MultiLabelMetrics", "num_classes", "at least 1", num_classes)
        self.num_classes, self.threshold = num_classes, threshold
        # One class is "multi-label" too; torchmetrics asks for two, so a second that never occurs stands beside it.
        self._columns = max(2, num_classes)
        options = {"num_labels": self._columns, "average": None, "validate_args": False}
        self._all = classification.MultilabelStatScores(threshold=0.5, **options).to(device)
        self._top3 = classification.MultilabelStatScores(threshold=0.5, **options).to(device)
        self._scores: list[Tensor] = []
        self._truth: list[Tensor] = []
        self.images = 0

    def update(self, logits: Tensor, targets: Tensor) -> None:
        """Takes a batch: logits (B, C) of any float dtype; targets (B, C) of zeros and ones."""
        if logits.shape != targets.shape or logits.ndim != 2 or logits.shape[1] != self.num_classes:
            got = f"{tuple(logits.shape)} and {tuple(targets.shape)}"
            fail("MultiLabelMetrics", "logits and targets", f"both (B, C) = (B, {self.num_classes})", got)
        if not logits.isfinite().all():
            fail("MultiLabelMetrics", "logits", "finite", "NaN or infinity: has the training diverged?")
        if len(logits) == 0:
            return
        self.images += len(logits)
        scores, truth = logits.detach().float().sigmoid(), targets.long()
        if self._columns != self.num_classes:
            scores, truth = (torch.nn.functional.pad(t, (0, self._columns - self.num_classes)) for t in (scores, truth))
        self._scores.append(scores)
        self._truth.append(truth.bool())
        # Given as 0 and 1, so that the threshold is inclusive: torchmetrics' own is not.
        predicted = (scores >= self.threshold).long()
        self._all.update(predicted, truth)
        top = scores.topk(min(3, self._columns), dim=1).indices
        self._top3.update(predicted * torch.zeros_like(predicted).scatter_(1, top, 1), truth)

    def compute(self) -> dict[str, float]:
        """Every metric of `NAMES` in [0, 1], and "classes", how many classes had a positive and so entered the means.

        Raises:
            ValueError: no image was seen, or no class had a positive: there is nothing to average.
        """
        if self.images == 0:
            fail("MultiLabelMetrics", "the data", "at least one image", "none")
        counts, counts_top3 = self._all.compute(), self._top3.compute()
        occurring = counts[:, 4] > 0
        if not occurring.any():
            fail("MultiLabelMetrics", "the targets", "positive somewhere", f"{self.images} images without a label")
        result = {"mAP": self._average_precisions(occurring).double().mean().item()}
        result |= _precision_recall(counts, occurring, "") | _precision_recall(counts_top3, occurring, "_top3")
        return result | {"classes": int(occurring.sum())}

    def _average_precisions(self, occurring: Tensor) -> Tensor:
        """AP of the classes that have a positive; torchmetrics warns about any other and gives it a made-up recall."""
        functional = require("torchmetrics.functional.classification", "mlhead.metrics")
        (columns,) = occurring.nonzero(as_tuple=True)
        scores = torch.cat([part[:, columns] for part in self._scores])
        truth = torch.cat([part[:, columns] for part in self._truth])
        return functional.multilabel_average_precision(
            scores, truth.long(), num_labels=len(columns), average=None, validate_args=False
        )


def _precision_recall(counts: Tensor, occurring: Tensor, suffix: str) -> dict[str, float]:
    """From torchmetrics' (C, 5) of TP, FP, TN, FN, support."""
    tp, fp, _, fn, _ = counts.double().unbind(dim=1)

    def ratio(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(b > 0, a / b.clamp(min=1e-300), 0.0)

    def f1(p: Tensor, r: Tensor) -> Tensor:
        return ratio(2 * p * r, p + r)

    cp, cr = ratio(tp, tp + fp)[occurring].mean(), ratio(tp, tp + fn)[occurring].mean()
    op, orr = ratio(tp.sum(), (tp + fp).sum()), ratio(tp.sum(), (tp + fn).sum())
    values = {"CP": cp, "CR": cr, "CF1": f1(cp, cr), "OP": op, "OR": orr, "OF1": f1(op, orr)}
    return {name + suffix: value.item() for name, value in values.items()}
