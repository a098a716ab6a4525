"""Lists of images with their labels, packed for sets of any size, and what reads, crops and transforms the images."""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from mlhead._usage import UsageError
from mlhead.data import folder
from mlhead.data._random import stream_key
from mlhead.data.loading import BadSample, Sample
from mlhead.data.sources import ImageSpec, backbone_image_spec, training_transform


class Names(Sequence[str]):
    """Many short texts in two arrays, which worker processes share: a list of strings would be copied into each.

    Args:
        data: the UTF-8 bytes of all texts, one after another.
        offsets: (n + 1): text i is data[offsets[i] : offsets[i + 1]].
    """

    def __init__(self, data: NDArray[np.uint8], offsets: NDArray[np.int64]) -> None:
        self.data, self.offsets = data, offsets

    @classmethod
    def collect(cls, texts: Iterable[str]) -> Names:
        """The texts in their order; file names that are not UTF-8 come back as they were."""
        data, offsets = bytearray(), array("q", [0])
        for text in texts:
            data += os.fsencode(text)
            offsets.append(len(data))
        return cls(np.frombuffer(data, np.uint8), np.frombuffer(offsets, np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, number: int) -> str: ...

    @overload
    def __getitem__(self, number: slice) -> list[str]: ...

    def __getitem__(self, number: int | slice) -> str | list[str]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        if not -len(self) <= number < len(self):
            raise IndexError(f"text {number} of {len(self)}")
        number %= len(self)
        return os.fsdecode(self.data[self.offsets[number] : self.offsets[number + 1]].tobytes())

    def select(self, numbers: NDArray[np.int64]) -> Names:
        """Some of the texts."""
        data, offsets = _select(self.offsets, numbers, self.data)
        return Names(data, offsets)


class Entry(NamedTuple):
    """One image of a list.

    name: its path below the root; labels: classes, in any order, each once; values: of each label 1 (positive), 0
    (verified negative) or -1 (unknown), or None where all are positive; box: the part of the image that is the sample,
    (left, top, right, bottom) in pixels, or None for all of it.
    """

    name: str
    labels: Sequence[int]
    values: Sequence[int] | None = None
    box: tuple[int, int, int, int] | None = None


@dataclass
class ImageList:
    """The images of one split and their labels; a subclass may keep them elsewhere and override `read`.

    Attributes:
        root: the folder that the names are relative to.
        names: n paths of images.
        indices: (N,) classes, those of an image one after another in ascending order.
        offsets: (n + 1,): image i's classes are indices[offsets[i] : offsets[i + 1]].
        values: (N,) 1 for a positive, 0 for a verified negative, -1 for a label that is unknown; or None where every
            listed class is a positive.
        boxes: (n, 4) left, top, right, bottom of the part of the image that is the sample, in pixels; or None.
        untagged: what a class that is not listed is: 0, negative, or -1, unknown.
    """

    root: Path
    names: Names
    indices: NDArray[np.int32]
    offsets: NDArray[np.int64]
    values: NDArray[np.int8] | None = None
    boxes: NDArray[np.int32] | None = None
    untagged: int = 0

    @classmethod
    def collect(cls, root: Path, entries: Iterable[Entry]) -> ImageList:
        """The list of some entries, in their order; entries are read one at a time.

        Values are kept if any label of the list is not a positive; boxes, if the entries have them, which is all or
        none.
        """
        offsets = array("q", [0])
        indices, values, boxes = array("i"), array("b"), array("i")

        def names() -> Iterator[str]:
            for entry in entries:
                given = [1] * len(entry.labels) if entry.values is None else entry.values
                for label, value in sorted(zip(entry.labels, given, strict=True)):
                    indices.append(label)
                    values.append(value)
                offsets.append(len(indices))
                boxes.extend(entry.box or ())
                yield entry.name

        packed = Names.collect(names())
        kept = np.frombuffer(values, np.int8)
        return cls(
            root,
            packed,
            np.frombuffer(indices, np.int32),
            np.frombuffer(offsets, np.int64),
            None if (kept == 1).all() else kept,
            np.frombuffer(boxes, np.int32).reshape(-1, 4) if boxes else None,
        )

    def __len__(self) -> int:
        return len(self.names)

    def labels(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.float32] | None]:
        """The classes listed for an image, and their values unless all are positive."""
        own = slice(self.offsets[number], self.offsets[number + 1])
        values = None if self.values is None else self.values[own].astype(np.float32)
        return self.indices[own].astype(np.int64), values

    def read(self, number: int, mode: str) -> Any:
        """A whole PIL image, decoded, or a `BadSample` with the reason."""
        return folder.open_image(self.root / self.names[number], mode)

    def open(self, number: int, mode: str) -> Any:
        """The PIL image that is the sample, or a `BadSample`: unreadable, or a box without a pixel of the image.

        Of a box that reaches over the edge the part inside counts.
        """
        image = self.read(number, mode)
        if self.boxes is None or isinstance(image, BadSample):
            return image
        left, top, right, bottom = self.boxes[number].tolist()
        inside = (max(left, 0), max(top, 0), min(right, image.width), min(bottom, image.height))
        if inside[0] >= inside[2] or inside[1] >= inside[3]:
            where = f"{self.root / self.names[number]}, box {left},{top},{right},{bottom}"
            return BadSample(where, f"the box is outside the image of {image.width}x{image.height} pixels")
        return image.crop(inside)

    def is_single_label(self) -> bool:
        """Whether every image has exactly one label, a positive."""
        return self.values is None and self.untagged == 0 and bool((np.diff(self.offsets) == 1).all())

    def has_unknown(self) -> bool:
        """Whether a label of an image is unknown."""
        return self.untagged < 0 or (self.values is not None and bool((self.values < 0).any()))

    def positives(self, num_classes: int) -> NDArray[np.int64]:
        """How many images have each class (C,)."""
        chosen = self.indices if self.values is None else self.indices[self.values > 0]
        return np.bincount(chosen, minlength=num_classes)

    def frequencies(self, num_classes: int) -> Tensor:
        """For each class (C,) its share of the images, counted as if there were one more with half of each."""
        return (torch.from_numpy(self.positives(num_classes)).float() + 0.5) / (len(self) + 1)

    def select(self, numbers: NDArray[np.int64]) -> ImageList:
        """Some of the images, as a list of their own."""
        indices, offsets = _select(self.offsets, numbers, self.indices)
        values = None if self.values is None else _select(self.offsets, numbers, self.values)[0]
        boxes = None if self.boxes is None else self.boxes[numbers]
        return ImageList(self.root, self.names.select(numbers), indices, offsets, values, boxes, self.untagged)

    def split(self, fraction: float) -> tuple[ImageList, ImageList]:
        """A list for training and one for validation, chosen by a hash of the names as for a folder with a CSV."""
        held_out = np.fromiter((folder.is_held_out(name, fraction) for name in self.names), bool, len(self))
        return self.select(np.flatnonzero(~held_out)), self.select(np.flatnonzero(held_out))


def from_rows(root: Path, rows: Iterable[folder.Row], class_names: Sequence[str]) -> ImageList:
    """The list of some rows of a table, whose labels are all among `class_names`."""
    index = {name: number for number, name in enumerate(class_names)}
    return ImageList.collect(root, (Entry(row.image, [index[label] for label in row.labels]) for row in rows))


def _select(offsets: NDArray[np.int64], rows: NDArray[np.int64], flat: NDArray[Any]) -> tuple[Any, NDArray[np.int64]]:
    """The parts of a flat array that belong to some rows, and their offsets."""
    lengths = np.diff(offsets)[rows]
    chosen = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(lengths, out=chosen[1:])
    return flat[np.repeat(offsets[rows] - chosen[:-1], lengths) + np.arange(chosen[-1])], chosen


class ListImages(Dataset[Sample]):
    """The samples of a list.

    Serial number s stands for image s mod length in epoch s div length. The transform runs under random states seeded
    by (seed, s) alone, so that augmentation repeats exactly after a resume, whatever the number of workers.

    Args:
        listing: images and labels.
        class_names: C names; labels are their indices.
        transform: from a PIL image to a tensor (channels, H, W).
        mode: PIL mode that images are converted to, "RGB" or "L".
        seed: any whole number.
    """

    def __init__(
        self,
        listing: ImageList,
        class_names: Sequence[str],
        transform: Callable[[Any], Tensor],
        *,
        mode: str = "RGB",
        seed: int = 0,
    ) -> None:
        self.listing, self.transform, self.mode, self.seed = listing, transform, mode, seed
        self.num_classes, self.class_names = len(class_names), list(class_names)

    @property
    def images(self) -> Names:
        """The names of the images."""
        return self.listing.names

    def __len__(self) -> int:
        return len(self.listing)

    def __getitem__(self, serial: int) -> Sample | BadSample:  # type: ignore[override]
        """The sample, or which image could not be read and why."""
        number = serial % len(self.listing)
        image = self.listing.open(number, self.mode)
        if isinstance(image, BadSample):
            return image
        labels, values = self.listing.labels(number)
        if self.listing.untagged < 0:
            every = np.full(self.num_classes, -1, np.float32)
            every[labels] = 1 if values is None else values
            labels, values = np.arange(self.num_classes), every
        with folder.seeded(stream_key(self.seed, serial)):
            return Sample(self.transform(image), labels, values)


class ListSource:
    """Images in lists: the `Source` of every layout of files.

    Args:
        config: the options of a run; `image_size`, `crop_scale`, `hflip`, `auto_augment` and `seed` are used.
        class_names: C names; the labels of all lists are their indices.
        splits: "train", "val" and "test", as far as there are such.
        needs: for a split what must have an image, for the error where there is none; by default --data.

    Attributes:
        splits: as given.
    """

    channels = 3
    word_vectors: Tensor | None = None

    def __init__(
        self,
        config: Any,
        class_names: Sequence[str],
        splits: Mapping[str, ImageList],
        *,
        needs: Mapping[str, str] | None = None,
    ) -> None:
        self._config, self._needs = config, needs or {}
        self.class_names, self.splits = list(class_names), dict(splits)
        self.num_seen = len(self.class_names)

    @property
    def single_label(self) -> bool:
        """Whether every image has exactly one label."""
        return all(part.is_single_label() for part in self.splits.values())

    def image_spec(self, backbone: nn.Module) -> ImageSpec:
        """The size that the backbone was made for, or --image-size; the pixels' mean and std are the backbone's."""
        return backbone_image_spec(self._config, backbone)

    def dataset(self, split: str, spec: ImageSpec, *, augment: bool = True) -> Dataset[Sample]:
        """The images of a split; only "train" is augmented, for training.

        Raises:
            UsageError: it has none.
        """
        listing = self._filled(split)
        transform = training_transform(self._config, spec) if split == "train" and augment else spec.transform()
        return ListImages(listing, self.class_names, transform, mode=spec.mode, seed=self._config.seed)

    def frequencies(self) -> Tensor:
        """For each class (C,) its share of the training images, counted as if there were one more with half of each.

        Raises:
            UsageError: there are no training images.
        """
        return self._filled("train").frequencies(self.num_seen)

    def _filled(self, split: str) -> ImageList:
        """The list of a split, which has an image."""
        listing = self.splits.get(split)
        if listing is None or len(listing) == 0:
            argument = self._needs.get(split, "--data, or --val-fraction of it," if split == "val" else "--data")
            raise UsageError(f"{argument} must leave at least one usable image for the {split} split, got none")
        return listing
