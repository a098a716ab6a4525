"""Batches of one size on all processes, whatever could not be read: what collectives need."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from mlhead.data.loading import Batch
from mlhead.ops import SparseTargets


def pad_batch(batch: Batch, size: int, image_shape: tuple[int, ...], fill: float = 0.0) -> tuple[Batch, Tensor | None]:
    """A batch of `size` images and, where some had to be added, which of them are real.

    Args:
        batch: at most `size` images.
        size: B.
        image_shape: (channels, H, W), for a batch without any image.
        fill: dense targets of the images added, which repeat the first one or are zeros; sparse targets have no label.

    Returns:
        The batch; and (B,) fp32, 1 for an image of the batch and 0 for one added, or None where nothing was added.
    """
    here = len(batch.images)
    if here == size:
        return batch, None
    first = batch.images[:1] if here else batch.images.new_zeros(1, *image_shape)
    images = torch.cat([batch.images if here else first[:0], first.expand(size - here, *first.shape[1:])])
    weight = None if batch.weight is None else _more_rows(batch.weight, size, 0.0)
    if isinstance(batch.targets, SparseTargets):
        offsets = batch.targets.offsets
        targets: Tensor | SparseTargets = batch.targets._replace(
            offsets=torch.cat([offsets, offsets[-1:].expand(size - here)])
        )
    else:
        targets = _more_rows(batch.targets, size, fill)
    real = batch.images.new_zeros(size)
    real[:here] = 1.0
    return Batch(images, targets, batch.bad, weight, here), real


def _more_rows(rows: Tensor, size: int, fill: float) -> Tensor:
    return torch.cat([rows, rows.new_full((size - len(rows), rows.shape[1]), fill)])


def padded_batches(
    batches: Iterable[Batch], count: int, size: int, empty: Batch, image_shape: tuple[int, ...]
) -> Iterator[Batch]:
    """`count` batches of `size` images each for metrics, which leave out the images added: their labels are -1, and
    `real` says how many they follow.

    Args:
        batches: at most `count`, of at most `size` images.
        count: of batches.
        size: of each.
        empty: a batch without images, which makes up for missing ones.
        image_shape: (channels, H, W).
    """
    given = 0
    for batch in batches:
        given += 1
        yield pad_batch(batch, size, image_shape, fill=-1.0)[0]
    for _ in range(count - given):
        yield pad_batch(empty, size, image_shape, fill=-1.0)[0]
