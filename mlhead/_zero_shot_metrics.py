"""Zero-shot metrics: mAP and F1 at k over the unseen, the seen and all classes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mlhead._average_precision import RankedScores, summed
from mlhead._check import check_positive, fail
from mlhead._metric_batches import check_batch, positive
from mlhead.ops import SparseTargets
from mlhead.ops.topk import _first_largest

# The sets of classes, in the order of the tables.
_SETS = {"ZSL": "unseen", "GZSL": "all", "seen": "seen"}


def _names(ks: Sequence[int]) -> tuple[str, ...]:
    """What `compute` returns, in the order in which tables and logs show it."""
    names = ("mAP", *(f"F1@{k}" for k in ks), *(f"{name}@{k}" for k in ks for name in ("P", "R")))
    return tuple(f"{which}_{name}" for which in _SETS for name in names)


NAMES = _names((3, 5))


class ZeroShotMetrics:
    r"""mAP and precision, recall and F1 at k of multi-label zero-shot classification, over batches.

    Classes 0 to num_seen - 1 are seen in training, the others are not. Three sets of columns are measured: "ZSL" ranks
    and counts the unseen classes only, "GZSL" all, "seen" the seen only. With n images that have a label among the
    columns of a set, c columns, and TP_k how many labels are among the k highest scores of their images:

        P@k = TP_k / (n min(k, c))    R@k = TP_k / number of labels    F1@k = 2 P@k R@k / (P@k + R@k)
        mAP = mean of AP over the set's classes that have a positive, each over all images

    An image always has min(k, c) predictions, however low their scores: k above c is clamped to c. Of equal scores the
    lower class is predicted. F1@k is 0 where P@k and R@k are. The AP of a class is the same in every set.

    Which images enter: those without a label among the columns of a set are left out of its P@k and F1@k, as in the
    code of SDL; R@k is the same with and without them. For mAP they stay in as negatives, as in the code of LESA and
    BiAM for NUS-WIDE and in that of ML-Decoder. The literature does not agree: LESA and BiAM for NUS-WIDE keep such
    images in F1@k too, so that their P@k is n / images times the one here; SDL, and BiAM for Open Images, leave them
    out of mAP too, which raises it. `labelled` tells n. The four also count a class without a positive as AP 0, where
    here it does not enter the mean.

    Args:
        num_seen: How many classes are seen, in [1, C).
        num_classes: C, the seen and the unseen.
        ks: The k, in the order in which they are shown.
        device: Where the counts and the scores live.

    Attributes:
        names: The keys of `compute`, in the order in which tables and logs show them; `NAMES` for k = 3 and 5.
        images: How many images this process has seen.
        labelled: n of each set in these, by its name.

    Raises:
        ValueError: num_seen is not in [1, C), there is no k, or a k is below 1 or there twice.
        TypeError: A number is no integer.

    Numerics: scores are compared in fp32, also for mAP, where no sigmoid makes high scores equal. All scores are kept
        for mAP: 4 C + 8 m bytes for an image with m positives.

    Source:
        ML-Decoder, section 4.2 and Table 6; LESA (Huynh and Elhamifar, CVPR 2020), BiAM (Narayan et al., ICCV 2021) and
        SDL (Ben-Cohen et al., ICCV 2021) with the evaluation in their public code.
    """

    def __init__(
        self, num_seen: int, num_classes: int, *, ks: Sequence[int] = (3, 5), device: torch.device | str = "cpu"
    ) -> None:
        where = "ZeroShotMetrics"
        check_positive(where, "num_classes", num_classes)
        check_positive(where, "num_seen", num_seen)
        if num_seen >= num_classes:
            fail(where, "num_seen", f"in [1, C) = [1, {num_classes})", num_seen)
        for k in ks:
            check_positive(where, "ks", k)
        if not ks or len(set(ks)) != len(ks):
            fail(where, "ks", "at least one number, each once", tuple(ks))
        self.num_seen, self.num_classes, self.ks = num_seen, num_classes, tuple(ks)
        self.names = _names(self.ks)
        self.images = 0
        self._columns = {"ZSL": (num_seen, num_classes), "GZSL": (0, num_classes), "seen": (0, num_seen)}
        # Of each set: the images with a label, the labels, and TP_k for each k.
        self._counts = torch.zeros(len(_SETS), 2 + len(self.ks), dtype=torch.int64, device=device)
        self._ranked = RankedScores(num_classes, device)

    def update(self, logits: Tensor, targets: Tensor | SparseTargets) -> None:
        """Takes a batch.

        Args:
            logits: (B, C) of any float dtype.
            targets: (B, C) of zeros and ones, or `SparseTargets`. A label that is unknown, a value of -1, is no
                positive, as in `TopKMetrics`: it counts as a negative. Any value above 0 is a whole positive.

        Raises:
            ValueError: The shapes do not fit, a logit is not finite, or on the CPU a target is out of range, which on
                CUDA ends in an asynchronous device assertion.
            TypeError: logits is no floating tensor, or targets is neither a tensor nor `SparseTargets`.
        """
        check_batch("ZeroShotMetrics", logits, targets, self.num_classes)
        if len(logits) == 0:
            return
        self.images += len(logits)
        device = self._counts.device
        scores = logits.detach().to(device, torch.float32)
        truth = positive(targets).to(device)
        self._ranked.add(scores, truth)
        for row, (first, last) in enumerate(self._columns.values()):
            labels = truth[:, first:last]
            most = min(max(self.ks), last - first)
            hits = labels.gather(1, _first_largest(scores[:, first:last], most)).sum(0).cumsum(0)
            at = torch.tensor([min(k, most) - 1 for k in self.ks], device=device)
            counted = torch.stack([labels.any(1).sum(), labels.sum()])
            self._counts[row] += torch.cat([counted, hits[at]])

    @property
    def labelled(self) -> dict[str, int]:
        """How many images have a label among the columns of each set."""
        return dict(zip(_SETS, self._counts[:, 0].tolist(), strict=True))

    def compute(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Every metric of `names`, in that order, each in [0, 1].

        Args:
            group: As in `MultiLabelMetrics.compute`.

        Raises:
            ValueError: No image was seen, or no unseen or no seen class had a positive: there is nothing to average.
        """
        images = int(summed(torch.tensor(self.images, device=self._counts.device), group))
        if images == 0:
            fail("ZeroShotMetrics", "the data", "at least one image", "none")
        counts = dict(zip(_SETS, summed(self._counts, group).tolist(), strict=True))
        for which, (labelled, *_) in counts.items():
            if not labelled:
                of = "somewhere" if not counts["GZSL"][0] else f"somewhere among the {_SETS[which]} classes"
                fail("ZeroShotMetrics", "the targets", f"positive {of}", f"{images} images without such a label")
        precisions = self._ranked.average_precisions(group)
        occurring = precisions > 0  # of a class with a positive it is at least 1 / images
        result = {}
        for which, (labelled, labels, *hits) in counts.items():
            first, last = self._columns[which]
            result[f"{which}_mAP"] = precisions[first:last][occurring[first:last]].mean().item()
            for k, tp in zip(self.ks, hits, strict=True):
                p, r = tp / (labelled * min(k, last - first)), tp / labels
                result[f"{which}_P@{k}"], result[f"{which}_R@{k}"] = p, r
                result[f"{which}_F1@{k}"] = 2 * p * r / (p + r) if tp else 0.0
        return {name: result[name] for name in self.names}
