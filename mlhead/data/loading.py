"""From datasets to batches: labels sparse until the collate, batches addressed by number, bad samples carried along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mlhead.ops import SparseTargets


class Sample(NamedTuple):
    """One image (channels, H, W), normalised, and the sorted indices of its positive classes."""

    image: Tensor
    labels: NDArray[np.int64]


class BadSample(NamedTuple):
    """An image that could not be read: which one, and why."""

    name: str
    reason: str


class Batch(NamedTuple):
    """images (B, channels, H, W) fp32; targets, sparse or (B, C) fp32 of zeros and ones; the samples left out."""

    images: Tensor
    targets: Tensor | SparseTargets
    bad: list[BadSample]


class Collate:
    """Stacks images and makes targets of labels; the only place where a dense (B, C) target is made.

    Args:
        num_classes: C.
        sparse: Whether targets are `SparseTargets` in place of (B, C).
    """

    def __init__(self, num_classes: int, *, sparse: bool = False) -> None:
        self.num_classes, self.sparse = num_classes, sparse

    def __call__(self, samples: Sequence[Sample | BadSample]) -> Batch:
        """A batch of the readable samples; it may be empty, with images (0, 1, 1, 1)."""
        good = [s for s in samples if isinstance(s, Sample)]
        bad = [s for s in samples if isinstance(s, BadSample)]
        images = torch.stack([s.image for s in good]) if good else torch.zeros(0, 1, 1, 1)
        if self.sparse:
            labels = [s.labels.tolist() for s in good]
            return Batch(images, SparseTargets.from_lists(labels, self.num_classes), bad)
        targets = torch.zeros(len(good), self.num_classes)
        if good:
            rows = np.repeat(np.arange(len(good)), [len(s.labels) for s in good])
            targets[torch.from_numpy(rows), torch.from_numpy(np.concatenate([s.labels for s in good]))] = 1.0
        return Batch(images, targets, bad)


class TrainingBatches(Sampler[list[int]]):
    """Batches first, first+1, ..., last-1 of an endless shuffled stream, so that a run can begin in its middle.

    Serial number s stands for sample s mod length in epoch s div length. Each epoch is a fresh shuffle by (seed, epoch)
    and leaves out the samples that do not fill a batch.
    """

    def __init__(self, length: int, batch_size: int, *, seed: int, first: int, last: int) -> None:
        self.length, self.batch_size, self.seed, self.first, self.last = length, batch_size, seed, first, last
        self.per_epoch = length // batch_size

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[int]]:
        order, shuffled = None, -1
        for number in range(self.first, self.last):
            epoch, position = divmod(number, self.per_epoch)
            if epoch != shuffled:
                order, shuffled = np.random.default_rng([self.seed, epoch]).permutation(self.length), epoch
            assert order is not None
            chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
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
) -> DataLoader[Batch]:
    """A loader of training batches first..last-1; it draws nothing from torch's global random state."""
    batches = TrainingBatches(len(dataset), batch_size, seed=seed, first=first, last=last)  # type: ignore[arg-type]
    return _loader(dataset, Collate(num_classes, sparse=sparse), batches, workers, pin_memory)


def evaluation_loader(
    dataset: Dataset[Sample], num_classes: int, batch_size: int, *, workers: int = 0, pin_memory: bool = False
) -> DataLoader[Batch]:
    """A loader of every sample once, in order."""
    length = len(dataset)  # type: ignore[arg-type]
    starts = range(0, length, batch_size)
    batches = [list(range(start, min(start + batch_size, length))) for start in starts]
    return _loader(dataset, Collate(num_classes), batches, workers, pin_memory)


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
