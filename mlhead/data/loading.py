"""From datasets to batches: labels sparse until the collate, batches addressed by number, bad samples carried along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mlhead import _check
from mlhead.ops import SparseTargets


class Sample(NamedTuple):
    """One image (channels, H, W), normalised, and its labels.

    labels: sorted indices of classes; values: for each of them 1 (positive), 0 (verified negative) or -1 (unknown), or
    None where all are positive. Classes that are not listed are negative.
    """

    image: Tensor
    labels: NDArray[np.int64]
    values: NDArray[np.float32] | None = None


class BadSample(NamedTuple):
    """An image that could not be read: which one, and why."""

    name: str
    reason: str


class Batch(NamedTuple):
    """images (B, channels, H, W) fp32; targets, sparse or (B, C) fp32 of zeros and ones; the samples left out.

    weight: (B, C) fp32, what each element of a dense target counts in the loss, or None where all count 1.
    real: how many images, the first ones, come from the data, or None for all; others make up the batch's size.
    """

    images: Tensor
    targets: Tensor | SparseTargets
    bad: list[BadSample]
    weight: Tensor | None = None
    real: int | None = None


class Collate:
    """Stacks images and makes targets of labels; the only place where a dense (B, C) target is made.

    Args:
        num_classes: C.
        sparse: Whether targets are `SparseTargets` in place of (B, C), with -1 for what is unknown.
        keep_unknown: Whether unknown labels are -1 in dense targets, for metrics, in place of 0 with weight 0.
        untagged_weight: weight in [0, 1] of the classes that a sample does not list; only for dense targets.
    """

    def __init__(
        self, num_classes: int, *, sparse: bool = False, keep_unknown: bool = False, untagged_weight: float = 1.0
    ) -> None:
        if sparse and untagged_weight != 1:
            _check.fail("Collate", "untagged_weight", "1 for sparse targets, which have no weights", untagged_weight)
        self.num_classes, self.sparse = num_classes, sparse
        self.keep_unknown, self.untagged_weight = keep_unknown, untagged_weight

    def __call__(self, samples: Sequence[Sample | BadSample]) -> Batch:
        """A batch of the readable samples; it may be empty, with images (0, 1, 1, 1)."""
        good = [s for s in samples if isinstance(s, Sample)]
        bad = [s for s in samples if isinstance(s, BadSample)]
        images = torch.stack([s.image for s in good]) if good else torch.zeros(0, 1, 1, 1)
        targets = self._listed(good)
        if self.sparse:
            targets.check("Collate", "labels")
            return Batch(images, targets, bad)
        dense = targets.to_dense()
        if self.keep_unknown:
            return Batch(images, dense, bad)
        return Batch(images, dense.clamp(min=0), bad, self._weight(targets))

    def _listed(self, samples: Sequence[Sample]) -> SparseTargets:
        """The labels of some samples; values None where all of them are positive."""
        lengths = torch.tensor([0, *(len(s.labels) for s in samples)])
        indices = torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *(s.labels for s in samples)]))
        values = None
        if any(s.values is not None for s in samples):
            parts = [np.ones(len(s.labels), np.float32) if s.values is None else s.values for s in samples]
            values = torch.from_numpy(np.concatenate(parts))
        return SparseTargets(indices, lengths.cumsum(0), values, self.num_classes)

    def _weight(self, targets: SparseTargets) -> Tensor | None:
        """(B, C): 0 for an unknown label, 1 for any other that is listed, `untagged_weight` for the rest."""
        unknown = targets.values is not None and bool((targets.values < 0).any())
        if self.untagged_weight == 1 and not unknown:
            return None
        weight = torch.full((targets.batch, self.num_classes), self.untagged_weight)
        listed = torch.ones(()) if targets.values is None else (targets.values >= 0).float()
        return weight.index_put_((targets.rows(), targets.indices), listed)


class Share(NamedTuple):
    """Which of several equal parts of a batch a process takes, in order."""

    rank: int = 0
    parts: int = 1

    def of(self, batch: Any) -> Any:
        """Its part; the last parts of a batch that does not divide are shorter or empty."""
        size = -(-len(batch) // self.parts)
        return batch[self.rank * size : (self.rank + 1) * size]


WHOLE = Share()


class TrainingBatches(Sampler[list[int]]):
    """Batches first, first+1, ..., last-1 of an endless shuffled stream, so that a run can begin in its middle.

    Serial number s stands for sample s mod length in epoch s div length. Each epoch is a fresh shuffle by (seed, epoch)
    and leaves out the samples that do not fill a batch. Of several processes each takes its share of every batch.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int, first: int, last: int, share: Share = WHOLE) -> None:
        self.length, self.batch_size, self.seed, self.first, self.last = length, batch_size, seed, first, last
        self.per_epoch, self.share = length // batch_size, share

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[int]]:
        order, shuffled = None, -1
        for number in range(self.first, self.last):
            epoch, position = divmod(number, self.per_epoch)
            if epoch != shuffled:
                order, shuffled = np.random.default_rng([self.seed, epoch]).permutation(self.length), epoch
            assert order is not None
            chosen = self.share.of(order[position * self.batch_size : (position + 1) * self.batch_size])
            yield (chosen + epoch * self.length).tolist()


def _single_thread(worker: int) -> None:
    torch.set_num_threads(1)


def training_loader(
    dataset: Dataset[Sample],
    num_classes: int,
    batch_size: int,
    *,
    seed: int,
    first: int,
    last: int,
    workers: int = 0,
    pin_memory: bool = False,
    sparse: bool = False,
    untagged_weight: float = 1.0,
    share: Share = WHOLE,
) -> DataLoader[Batch]:
    """A loader of training batches first..last-1; it draws nothing from torch's global random state."""
    length = len(dataset)  # type: ignore[arg-type]
    batches = TrainingBatches(length, batch_size, seed=seed, first=first, last=last, share=share)
    collate = Collate(num_classes, sparse=sparse, untagged_weight=untagged_weight)
    return _loader(dataset, collate, batches, workers, pin_memory)


def evaluation_loader(
    dataset: Dataset[Sample],
    num_classes: int,
    batch_size: int,
    *,
    workers: int = 0,
    pin_memory: bool = False,
    sparse: bool = False,
    share: Share = WHOLE,
) -> DataLoader[Batch]:
    """A loader of every sample once, in order; labels that are unknown are -1 in its targets, sparse or dense.

    A share that gets nothing of the last batch has one batch less.
    """
    length = len(dataset)  # type: ignore[arg-type]
    starts = range(0, length, batch_size)
    shares = (share.of(list(range(start, min(start + batch_size, length)))) for start in starts)
    batches = [serials for serials in shares if serials]
    return _loader(dataset, Collate(num_classes, sparse=sparse, keep_unknown=True), batches, workers, pin_memory)


def _loader(
    dataset: Dataset[Sample], collate: Collate, batches: Sampler[list[int]] | list[list[int]], workers: int, pin: bool
) -> DataLoader[Batch]:
    return DataLoader(
        cast(Any, dataset),  # the collate makes a Batch of Samples, which DataLoader's types cannot say
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        worker_init_fn=_single_thread if workers else None,
        # A generator of its own: the loader's seed would otherwise be drawn from the state that a resumed run restores.
        generator=torch.Generator(),
    )
