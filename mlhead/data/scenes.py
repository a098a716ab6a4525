"""Scenes of handwritten numbers: a multi-label task made of real scans, without a download.

scikit-learn ships 1,797 scans of handwritten digits (8x8, 17 grey levels). A scene holds one to four numbers of one to
four digits each on a dark ground; its labels are the numbers that stand in it. A number covers a few positions of the
feature map, so an average over the whole map sees it diluted, and single digits say little: 3 and 7 are in 37, in 73
and in many others.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from mlhead._usage import require, usage_fail
from mlhead.data._random import Draws, stream_key
from mlhead.data.loading import Sample

SPLITS = ("train", "val", "test")
SCAN = 8  # pixels along each side of a scan
# Free pixels between two numbers, at least; wider across than the gap between the digits of one number, so that a scene
# can be read in one way only.
GAP_ACROSS, GAP_DOWN = 3, 1
NUM_CLASSES = (10, 100, 1_000, 10_000)
DEFAULT_SIZE = {10: 24, 100: 40, 1_000: 48, 10_000: 64}
# Of each digit's scans, in file order: the first 70 % for training, the next 10 % for validation, the rest for testing.
_SHARES = {"train": (0.0, 0.7), "val": (0.7, 0.8), "test": (0.8, 1.0)}
# Roughly the mean and deviation of a scene's pixels, in [0, 1].
MEAN, STD = 0.05, 0.165


class Box(NamedTuple):
    """Where a number stands in a scene, in pixels."""

    label: int
    top: int
    left: int
    height: int
    width: int


class ScenePlan(NamedTuple):
    """What stands where in B scenes with room for N numbers of K digits.

    shown (B, N) bool; scans (B, N, K) rows of `scan_table()`; labels (B, N); top, left (B, N) in pixels;
    ink (B, N) in (0, 1].
    """

    shown: NDArray[np.bool_]
    scans: NDArray[np.int64]
    labels: NDArray[np.int64]
    top: NDArray[np.int64]
    left: NDArray[np.int64]
    ink: NDArray[np.float64]


@functools.cache
def scan_table() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All scans (1797, 8, 8), grey levels stretched from 0..16 to 0..255, and the digit of each (1797,)."""
    digits = require("sklearn.datasets", "The scenes dataset").load_digits()
    scans = np.round(digits.images * (255 / 16)).astype(np.uint8)
    return scans, digits.target.astype(np.int64)


@functools.cache
def scans_of_split(split: str) -> tuple[NDArray[np.int64], ...]:
    """For each digit 0..9, the rows of `scan_table()` that belong to the split; no row belongs to two splits."""
    first, last = _SHARES[split]
    _, target = scan_table()
    rows = [np.flatnonzero(target == digit) for digit in range(10)]
    return tuple(r[round(first * len(r)) : round(last * len(r))] for r in rows)


def _long_tail(num_classes: int) -> NDArray[np.float64]:
    """The probability of each number, 1 / (rank + 10) of all; ranks are shuffled by a step coprime to 10."""
    rank = (np.arange(num_classes) * 7919) % num_classes
    share = 1.0 / (rank + 10)
    return share / share.sum()


class Scenes(Dataset[Sample]):
    """Scenes with several multi-digit numbers each, drawn on demand.

    Scene i of a split is a pure function of (seed, split, i, num_classes, size, max_numbers), whatever the order, batch
    or worker. Scenes never run out: `length` only says what an epoch is, and training takes new ones in every epoch.

    Args:
        split: "train", "val" or "test"; two splits never share a scan.
        num_classes: 10, 100, 1,000 or 10,000: numbers of one to four digits.
        length: scenes in an epoch.
        size: height and width in pixels; by default 24, 40, 48 or 64 by the number of classes.
        max_numbers: a scene holds 1 to `max_numbers` numbers, each count as likely as another.
        numbers: the number that each class stands for, a permutation of 0 to num_classes - 1; by default in order.
        known: only the first so many classes occur; by default all.
        long_tail: whether numbers are as unlike in frequency as the labels of large sets: the one of rank r comes up in
            proportion to 1 / (r + 10). Ranks are shuffled, the same way for all splits and seeds.
        seed: any whole number.

    Raises:
        UsageError: an argument is out of its range, or the size has no room for that many numbers.
    """

    channels = 1

    def __init__(
        self,
        split: str = "train",
        *,
        num_classes: int = 100,
        length: int = 20_000,
        size: int | None = None,
        max_numbers: int = 4,
        numbers: Sequence[int] | NDArray[np.int64] | None = None,
        known: int | None = None,
        long_tail: bool = False,
        seed: int = 0,
    ) -> None:
        if split not in SPLITS:
            usage_fail("split", "one of 'train', 'val', 'test'", repr(split))
        if num_classes not in NUM_CLASSES:
            usage_fail("--num-classes", "10, 100, 1000 or 10000 for the scenes", num_classes)
        if length < 1:
            usage_fail("length", "at least 1", length)
        self.split, self.num_classes, self.length, self.seed = split, num_classes, length, seed
        self.size = DEFAULT_SIZE[num_classes] if size is None else size
        self.num_digits = len(str(num_classes)) - 1
        self.max_numbers = max_numbers
        self.number_width = SCAN * self.num_digits
        # Every number has a cell of its own, so that no two can touch.
        self._rows = self.size // (SCAN + GAP_DOWN)
        self._columns = (self.size + GAP_ACROSS) // (self.number_width + GAP_ACROSS)
        if not 1 <= max_numbers <= self._rows * self._columns:
            room = f"between 1 and {self._rows * self._columns}, the room in {self.size}x{self.size} pixels"
            usage_fail("max_numbers", f"{room} for numbers of {self.num_digits} digits", max_numbers)
        self.numbers = np.arange(num_classes) if numbers is None else np.asarray(numbers, np.int64)
        if not np.array_equal(np.sort(self.numbers), np.arange(num_classes)):
            usage_fail("numbers", f"a permutation of 0 to {num_classes - 1}", f"{len(self.numbers)} others")
        self.known = num_classes if known is None else known
        if not 1 <= self.known <= num_classes:
            usage_fail("known", f"in [1, {num_classes}]", known)
        self.frequency = _long_tail(num_classes) if long_tail else None
        if self.frequency is not None and self.known < num_classes:
            usage_fail("--long-tail", "off where some numbers do not occur", True)
        self.class_names = [f"{number:0{self.num_digits}d}" for number in self.numbers]
        self._key = stream_key(seed, SPLITS.index(split), num_classes, self.size, max_numbers)
        self._pools = scans_of_split(split)

    def __len__(self) -> int:
        return self.length

    def plan(self, serials: Sequence[int]) -> ScenePlan:
        """What stands where in the scenes with these serial numbers (each at least 0)."""
        draws = Draws(self._key, np.asarray(serials, np.int64))
        N, K = self.max_numbers, self.num_digits
        shown = np.arange(N)[None, :] <= draws.integers(N, 1)
        if self.frequency is None:
            labels = draws.integers(self.known, N)
        else:
            labels = np.searchsorted(np.cumsum(self.frequency), draws.uniform(N), side="right")
            labels = np.minimum(labels, self.num_classes - 1)
        digits = (self.numbers[labels][..., None] // 10 ** np.arange(K - 1, -1, -1)) % 10
        sizes = np.array([len(pool) for pool in self._pools])
        offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        scans = np.concatenate(self._pools)[offsets[digits] + draws.integers(sizes[digits], N, K)]
        # A random choice of N distinct cells: the first N of a shuffle.
        cells = np.argsort(draws.bits(self._rows * self._columns), axis=1)[:, :N]
        row, column = cells // self._columns, cells % self._columns
        cell_height, cell_width = self.size // self._rows, (self.size + GAP_ACROSS) // self._columns
        top = row * cell_height + draws.integers(cell_height - SCAN - GAP_DOWN + 1, N)
        left = column * cell_width + draws.integers(cell_width - self.number_width - GAP_ACROSS + 1, N)
        # A number that has its row to itself may stand anywhere in it.
        alone = ((row[:, :, None] == row[:, None, :]) & shown[:, None, :]).sum(axis=2) == 1
        left = np.where(alone, draws.integers(self.size - self.number_width + 1, N), left)
        return ScenePlan(shown, scans, labels, top, left, ink=0.6 + 0.4 * draws.uniform(N))

    def draw(self, plan: ScenePlan) -> NDArray[np.uint8]:
        """The pixels (B, size, size) of planned scenes."""
        B, N = plan.shown.shape
        scans, _ = scan_table()
        numbers = scans[plan.scans].transpose(0, 1, 3, 2, 4).reshape(B, N, SCAN, self.number_width)
        inked = (numbers * plan.ink[..., None, None]).astype(np.uint8)
        scene = np.arange(B)[:, None, None, None] * self.size
        rows = scene + plan.top[..., None, None] + np.arange(SCAN)[:, None]
        pixels = rows * self.size + plan.left[..., None, None] + np.arange(self.number_width)
        canvas = np.zeros(B * self.size * self.size, np.uint8)
        canvas[pixels[plan.shown]] = inked[plan.shown]
        return canvas.reshape(B, self.size, self.size)

    def digit_vectors(self) -> NDArray[np.float32]:
        """What each class's number is made of (C, 10 K): for each of its K digits ten places, a 1 at the digit."""
        K = self.num_digits
        digits = (self.numbers[:, None] // 10 ** np.arange(K - 1, -1, -1)) % 10
        return np.eye(10, dtype=np.float32)[digits].reshape(self.num_classes, 10 * K)

    def boxes(self, serial: int) -> list[Box]:
        """Where each number of a scene stands; the truth against which attention can be checked."""
        plan = self.plan([serial])
        place = zip(plan.labels[0], plan.top[0], plan.left[0], plan.shown[0], strict=True)
        return [Box(int(c), int(t), int(s), SCAN, self.number_width) for c, t, s, shown in place if shown]

    def __getitems__(self, serials: Sequence[int]) -> list[Sample]:
        """Many scenes at once, which is far faster than one at a time; torch's DataLoader calls this."""
        plan = self.plan(serials)
        images = torch.from_numpy(self.draw(plan)).unsqueeze(1).float().div_(255).sub_(MEAN).div_(STD)
        positives = [np.unique(labels[shown]) for labels, shown in zip(plan.labels, plan.shown, strict=True)]
        return [Sample(image, labels) for image, labels in zip(images, positives, strict=True)]

    def __getitem__(self, serial: int) -> Sample:
        return self.__getitems__([serial])[0]

    def to_picture(self, image: torch.Tensor) -> NDArray[np.uint8]:
        """Undoes the normalisation: (1, H, W) -> (H, W, 3) uint8."""
        grey = (image[0] * STD + MEAN).clamp(0, 1).mul(255).round().byte().cpu().numpy()
        return np.repeat(grey[..., None], 3, axis=2)
