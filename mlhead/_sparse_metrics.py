"""Metrics at many classes, from the best few classes of each image and sparse targets: no tensor has C columns."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from mlhead._average_precision import summed
from mlhead._check import check_ndim, check_positive, check_real, check_shape, check_tensor, fail
from mlhead.ops._targets import SparseTargets, may_read_values


def propensities(counts: Tensor, num_images: int, a: float = 0.55, b: float = 1.5) -> Tensor:
    """How likely a positive of each class is to be labelled, (C) in fp64.

    p_c = 1 / (1 + A exp(-a log(n_c + b)))    with A = (log N - 1) (b + 1)^a

    Args:
        counts: n_c (C), in how many training images class c is a positive.
        num_images: N, how many training images there are, at least 3.
        a: 0.55; the paper has 0.5 for Wikipedia and 0.6 for Amazon.
        b: 1.5; the paper has 0.4 for Wikipedia and 2.6 for Amazon.

    Raises:
        ValueError: num_images is below 3, b is not positive, counts is not (C,), or a count is negative.
        TypeError: num_images is no integer, or counts is no real tensor.

    Source:
        Jain, Prabhu and Varma, Extreme Multi-label Loss Functions for Recommendation, Tagging, Ranking & Other Missing
        Label Applications, KDD 2016, section 4.
    """
    check_positive("propensities", "num_images", num_images)
    if num_images < 3:
        fail("propensities", "num_images", "at least 3, so that log N > 1", num_images)
    check_real("propensities", "counts", counts)
    check_ndim("propensities", "counts", counts, "(C,)")
    if not b > 0:
        fail("propensities", "b", "positive", b)
    if counts.numel() and may_read_values(counts) and not bool((counts >= 0).all()):
        fail("propensities", "counts", "at least 0", counts.min().item())
    factor = (math.log(num_images) - 1) * (b + 1) ** a
    return 1 / (1 + factor * (counts.double() + b) ** -a)


def _describe(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


class TopKMetrics:
    r"""Precision, nDCG and their propensity-scored forms at k, over batches.

    With y_i = 1 where the i-th best class of an image is a positive of it, p_i that class's propensity, m the number of
    the image's positives, and q_1 <= q_2 <= ... the propensities of these:

        P@k      = mean over all images of sum_{i <= k} y_i / k
        nDCG@k   = mean over images with m > 0 of sum_{i <= k} y_i / log2(i + 1) / I_k
        PSP@k    = sum over images of sum_{i <= k} y_i / p_i  /  sum over images of sum_{i <= min(k, m)} 1 / q_i
        PSnDCG@k = sum over images with m > 0 of sum_{i <= k} y_i / (p_i log2(i + 1)) / I_k
                   /  sum over these of sum_{i <= min(k, m)} 1 / (q_i log2(i + 1)) / I_k
        I_k      = sum_{i <= min(k, m)} 1 / log2(i + 1)

    so the propensity-scored ones are divided by the best attainable over all images. An image without a positive counts
    0 in P@k and does not enter the others; pyxclib counts it as 0 in nDCG@k too. A class whose label is unknown (a
    value of -1) is no positive, and takes up a place where it is among the best; so does one with the value 0. Any
    value above 0 is a whole positive.

    Args:
        ks: The k, in any order.
        propensities: p (C), in (0, 1], as of `propensities`; None leaves PSP and PSnDCG out.
        device: Where the sums live, and where batches are counted.

    Attributes:
        sums: All that was counted, fp64, plain sums.

    Raises:
        ValueError: There is no k, a k is below 1 or there twice, or the propensities are not (C,) in (0, 1].
        TypeError: A k is no integer, or the propensities are no floating tensor.

    Source:
        Bhatia et al., The Extreme Classification Repository, and its pyxclib (xc_metrics.py), which computes
        these ratios; Jain, Prabhu and Varma, KDD 2016.
    """

    # The rows of `sums`, one column for each k; the first two are the same in every column.
    _ROWS = ("images", "with_positives", "P", "nDCG", "PSP", "PSP_best", "PSnDCG", "PSnDCG_best")

    def __init__(
        self, ks: Sequence[int] = (1, 3, 5), propensities: Tensor | None = None, *, device: torch.device | str = "cpu"
    ) -> None:
        where = "TopKMetrics"
        for k in ks:
            check_positive(where, "ks", k)
        if not ks or len(set(ks)) != len(ks):
            fail(where, "ks", "at least one number, each once", tuple(ks))
        self.ks = tuple(ks)
        self._inverse: Tensor | None = None
        if propensities is not None:
            check_tensor(where, "propensities", propensities)
            check_shape(where, "propensities", propensities, "(C,)", (propensities.numel(),))
            if not bool(((propensities > 0) & (propensities <= 1)).all()):
                fail(where, "propensities", "in (0, 1]", "others among them")
            self._inverse = 1 / propensities.detach().double().to(device)
        self.sums = torch.zeros(len(self._ROWS), len(self.ks), dtype=torch.float64, device=device)

    def reset(self) -> None:
        """Forgets all images."""
        self.sums.zero_()

    def update(self, classes: Tensor, targets: SparseTargets) -> None:
        """Takes a batch.

        Args:
            classes: (B, K) with K >= max(ks), the best classes of each image, best first and each once, as of
                `group_fc_topk` and `linear_topk`.
            targets: The labels of these images, on the device of `classes`.

        Raises:
            ValueError: A shape, a device or C does not fit, or on the CPU a class or target is out of range, which on
                CUDA ends in an asynchronous device assertion.
            TypeError: classes is no tensor of int32 or int64, or targets is no `SparseTargets`.
        """
        self._check(classes, targets)
        if targets.batch == 0:
            return
        device, most = self.sums.device, max(self.ks)
        targets, classes = targets.to(device), classes[:, :most].to(device).long()
        B, C = targets.batch, targets.num_classes
        rows, labels = targets.rows(), targets.indices
        if targets.values is not None:
            positive = targets.values > 0
            rows, labels = rows[positive], labels[positive]
        count = torch.bincount(rows, minlength=B)

        hits = self._is_listed(torch.arange(B, device=device)[:, None] * C + classes, rows * C + labels).double()
        places = torch.arange(most, device=device)
        discount = 1 / (places + 2).double().log2()
        ideal_hits = (places < count[:, None]).double()
        ideal = (ideal_hits * discount).cumsum(1)

        at = torch.tensor(self.ks, device=device) - 1
        new = torch.zeros_like(self.sums)
        new[0], new[1] = B, (count > 0).sum()
        new[2] = hits.cumsum(1).sum(0)[at] / (at + 1)
        new[3] = self._discounted(hits, discount, ideal)[at]
        if self._inverse is not None:
            scored = hits * self._inverse[classes]
            best = self._best(rows, self._inverse[labels], count, most)
            new[4], new[5] = scored.cumsum(1).sum(0)[at], best.cumsum(1).sum(0)[at]
            new[6], new[7] = self._discounted(scored, discount, ideal)[at], self._discounted(best, discount, ideal)[at]
        self.sums += new

    def compute(self, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """{"P@1": ..., "nDCG@1": ..., "PSP@1": ..., ...}, each in [0, 1].

        Args:
            group: The processes whose images count together, all of which call this; None for this one's alone.

        Raises:
            ValueError: No image was seen, or none had a positive: there is nothing to average.
        """
        sums = dict(zip(self._ROWS, summed(self.sums, group).tolist(), strict=True))
        if not sums["images"][0]:
            fail("TopKMetrics", "the data", "at least one image", "none")
        if not sums["with_positives"][0]:
            fail("TopKMetrics", "the targets", "positive somewhere", f"{sums['images'][0]:.0f} images without a label")
        pairs = {"P": "images", "nDCG": "with_positives"}
        if self._inverse is not None:
            pairs |= {"PSP": "PSP_best", "PSnDCG": "PSnDCG_best"}
        return {
            f"{name}@{k}": sums[name][i] / sums[total][i]
            for name, total in pairs.items()
            for i, k in enumerate(self.ks)
        }

    def _check(self, classes: Tensor, targets: SparseTargets) -> None:
        where = "TopKMetrics"
        if not isinstance(targets, SparseTargets):
            fail(where, "targets", "SparseTargets", type(targets).__name__, TypeError)
        if not isinstance(classes, Tensor) or classes.dtype not in (torch.int64, torch.int32):
            fail(where, "classes", "an integer tensor (B, K)", _describe(classes), TypeError)
        targets.check(where, "targets")
        B, C, most = targets.batch, targets.num_classes, max(self.ks)
        if classes.ndim != 2 or classes.shape[0] != B or classes.shape[1] < most:
            fail(where, "classes", f"(B, K) with B = {B} like targets and K >= {most}", tuple(classes.shape))
        if classes.device != targets.indices.device:
            fail(where, "classes", f"on {targets.indices.device} like targets", classes.device)
        if self._inverse is not None and self._inverse.shape[0] != C:
            fail(where, "targets", f"of C = {self._inverse.shape[0]} classes like propensities", C)
        inside = ((classes >= 0) & (classes < C)).all()
        if classes.device.type == "cuda":
            torch._assert_async(inside, f"{where}: classes must be in [0, {C})")
        elif not inside:
            fail(where, "classes", f"in [0, C) = [0, {C})", f"{classes.min()} to {classes.max()}")

    @staticmethod
    def _is_listed(keys: Tensor, listed: Tensor) -> Tensor:
        """Whether each key is among `listed`, which is sorted."""
        if listed.numel() == 0:
            return torch.zeros_like(keys, dtype=torch.bool)
        found = torch.searchsorted(listed, keys).clamp(max=listed.numel() - 1)
        return listed[found] == keys

    @staticmethod
    def _discounted(gains: Tensor, discount: Tensor, ideal: Tensor) -> Tensor:
        """For each k the sum over the images of DCG@k / I_k, where I_k > 0."""
        return torch.where(ideal > 0, (gains * discount).cumsum(1) / ideal, 0.0).sum(0)

    @staticmethod
    def _best(rows: Tensor, gains: Tensor, count: Tensor, most: int) -> Tensor:
        """The largest gains of each image's positives, (B, most) in descending order, 0 where it has fewer."""
        order = gains.argsort(descending=True, stable=True)
        order = order[rows[order].argsort(stable=True)]
        place = torch.arange(len(rows), device=rows.device) - (count.cumsum(0) - count)[rows]
        best = gains.new_zeros(len(count), most + 1)  # what comes after the first goes into a last column
        best[rows, place.clamp(max=most)] = gains[order]
        return best[:, :most]
