"""Average precision of many classes over many images: exact, from scores that are kept once."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

# So many scores are brought into the order of classes at a time, 16 MiB of them.
_BLOCK = 2**22
# So many numbers are kept in one piece, 64 MiB of them.
_PIECE = 2**24


class _Rows:
    """Rows of `width` numbers that batches are appended to, in few large pieces.

    Pieces of a batch's size would lie in the heap among what a batch needs for a while, with holes between them; at
    9,605 classes these take as much memory as the scores.
    """

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        self.width, self.dtype, self.device = width, dtype, device
        self.count = 0
        self._pieces: list[Tensor] = []
        self._room = 0  # rows of the last piece that are not used yet

    def add(self, rows: Tensor) -> None:
        """Copies rows (n, width)."""
        while len(rows):
            if not self._room:  # as many as so far, so that a small set needs no large piece
                self._room = max(len(rows), min(self.count, _PIECE // self.width))
                self._pieces.append(torch.empty(self._room, self.width, dtype=self.dtype, device=self.device))
            begin, size = len(self._pieces[-1]) - self._room, min(len(rows), self._room)
            self._pieces[-1][begin : begin + size] = rows[:size]
            rows, self._room, self.count = rows[size:], self._room - size, self.count + size

    def columns(self, first: int, last: int) -> Tensor:
        """Some columns of all rows, (last - first, n)."""
        columns = torch.empty(last - first, self.count, dtype=self.dtype, device=self.device)
        start = 0
        for piece in self._pieces:
            size = min(len(piece), self.count - start)  # the last may have room left
            columns[:, start : start + size] = piece[:size, first:last].T
            start += size
        return columns


class RankedScores:
    r"""The scores of all images and those of the positives once more, from which the average precision of a class is

        AP_c = mean over the positives i of c of TP_c(s_i) / N_c(s_i)

    where N_c(s) counts the images with a score of at least s, and TP_c(s) the positives among them. Equal scores are
    one threshold, as in scikit-learn. An image with the score -inf stands behind every positive: it is as if it were
    not there.

    Args:
        num_classes: C.
        device: where the scores are kept and compared.

    Numerics: counts are exact, their ratios in fp64. 4 C + 8 m bytes are kept for an image with m positives;
        `average_precisions` needs 16 MiB beside them, four times that among processes, and 32 bytes a positive.
    """

    def __init__(self, num_classes: int, device: torch.device | str) -> None:
        self.num_classes, self.device = num_classes, torch.device(device)
        self._scores = _Rows(num_classes, torch.float32, self.device)
        self._positives = _Rows(1, torch.float32, self.device)
        self._classes = _Rows(1, torch.int32, self.device)  # of the positives

    def add(self, scores: Tensor, truth: Tensor) -> None:
        """Takes a batch: fp32 scores (B, C), which are copied, and truth (B, C), bool."""
        self._scores.add(scores)
        rows, classes = truth.nonzero(as_tuple=True)
        self._positives.add(scores[rows, classes, None])
        self._classes.add(classes[:, None])

    def average_precisions(self, group: dist.ProcessGroup | None = None) -> Tensor:
        """AP (C) in fp64, 0 where a class has no positive; of the images of all processes of `group`, on each of them.

        Every process gets an equal share of the classes, and of these the scores of all images, block by block.
        """
        rank, world = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        shares = [self.num_classes * r // world for r in range(world + 1)]
        images = _gathered(self._scores.count, group, self.device)
        classes, positives = self._positives_of(shares, rank, group)
        counts = torch.bincount(classes - shares[rank], minlength=shares[rank + 1] - shares[rank])
        of_class = positives.split(counts.tolist())
        found = torch.zeros(self.num_classes, dtype=torch.float64, device=self.device)
        width = max(1, _BLOCK // max(1, world * max(images)))
        for start in range(0, max(b - a for a, b in pairwise(shares)), width):
            spans = [(min(a + start, b), min(a + start + width, b)) for a, b in pairwise(shares)]
            first, last = spans[rank]
            own = of_class[first - shares[rank] : last - shares[rank]]
            found[first:last] = _average_precisions(self._block(spans, rank, images, group), own)
        return summed(found, group)

    def _block(
        self, spans: list[tuple[int, int]], rank: int, images: list[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        """The scores (c, N) of the classes in the own one of `spans`, which are those of all ranks, over all images."""
        mine = [self._scores.columns(first, last) for first, last in spans]
        if group is None:
            return mine[0]
        wide = spans[rank][1] - spans[rank][0]
        pieces = _exchanged([piece.flatten() for piece in mine], [wide * n for n in images], group)
        return torch.cat([piece.view(wide, n) for piece, n in zip(pieces, images, strict=True)], dim=1)

    def _positives_of(self, shares: list[int], rank: int, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
        """Class and score of every positive of the own share of classes, in the order of classes."""
        (classes,), (scores,) = self._classes.columns(0, 1), self._positives.columns(0, 1)
        if group is not None:
            classes, order = classes.sort()
            ends = torch.searchsorted(classes, torch.tensor(shares, dtype=torch.int32, device=self.device)).tolist()
            sizes = [b - a for a, b in pairwise(ends)]
            ones = [torch.tensor([size], device=self.device) for size in sizes]
            from_each = [int(size) for size in _exchanged(ones, [1] * len(sizes), group)]
            classes = torch.cat(_exchanged(classes.split(sizes), from_each, group))
            scores = torch.cat(_exchanged(scores[order].split(sizes), from_each, group))
        classes, order = classes.sort()
        return classes, scores[order]


def _average_precisions(block: Tensor, positives: Sequence[Tensor]) -> Tensor:
    """AP (c) of classes from the scores (c, n) of all images and those of the positives of each."""
    found = torch.zeros(len(block), dtype=torch.float64, device=block.device)
    for c, (scores, own) in enumerate(zip(block, positives, strict=True)):
        if len(own):
            found[c] = _average_precision(scores, own.sort().values)
    return found


def _average_precision(scores: Tensor, positives: Tensor) -> Tensor:
    """AP of one class from the scores (n) of all images and those (P) of its positives in ascending order."""
    # In which gap between positives a score lies; those in gap j and above are at or above positive j.
    gaps = torch.searchsorted(positives, scores, right=True, out_int32=True)
    counts = torch.bincount(gaps, minlength=len(positives) + 1)
    above = counts.flip(0).cumsum(0).flip(0)[1:]
    right = len(positives) - torch.searchsorted(positives, positives)
    return (right.double() / above).mean()


def summed(tensor: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum over the processes of `group`, on each of them; the tensor itself without a group."""
    if group is None:
        return tensor
    total = tensor.clone()
    dist.all_reduce(total, group=group)
    return total


def _gathered(number: int, group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    """The numbers of all processes of `group`."""
    if group is None:
        return [number]
    rank, world = dist.get_rank(group), dist.get_world_size(group)
    numbers = torch.zeros(world, dtype=torch.int64, device=device)
    numbers[rank] = number
    return summed(numbers, group).tolist()


def _exchanged(parts: Sequence[Tensor], sizes: list[int], group: dist.ProcessGroup) -> list[Tensor]:
    """Sends part r, of one axis, to process r, and returns what each of them sent here, of these sizes."""
    sent = torch.cat(list(parts))
    got = sent.new_empty(sum(sizes))
    dist.all_to_all_single(got, sent, sizes, [len(part) for part in parts], group=group)
    return list(got.split(sizes))
