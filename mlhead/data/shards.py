"""Sharded tar archives in the WebDataset convention, for sets too large for single files; read at random, not in order.

ROOT/train/000000.tar, ROOT/val/000000.tar, or ROOT/train-000000.tar, ROOT/set-val-000000.tar, or ROOT/*.tar, of which
--val-fraction is held out. In a shard `dogs/17.jpg` is an image and the file of the same name up to the first dot has
its labels: `dogs/17.json` with {"labels": ["dog", "grass"]} or {"label": 3}, `dogs/17.cls` with the number of a class,
or `dogs/17.txt` with names. Number i is the class i of --classes; without --classes it is the class called "i".
"""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import tarfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlhead._usage import UsageError, usage_fail
from mlhead.checkpoints import write_atomically
from mlhead.data import folder
from mlhead.data._shard_index import IMAGE_TYPES, ShardIndex, key_and_kind, open_index
from mlhead.data.listing import ImageList, ListSource, Names
from mlhead.data.loading import BadSample
from mlhead.data.reporting import BadDataLog

MOST_CLASSES = 100_000_000  # numbered ones, each of which gets a name
SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_SPLIT_WORD = re.compile(r"(?:^|[-_.])(train|val|valid|validation|test)(?=[-_.])")
_NUMBERED = re.compile(r"(.*?)(\d+)\.tar")


@dataclass(kw_only=True)
class TarImages(ImageList):
    """The images of one split, in shards; `names` are those in the archives.

    Attributes:
        shards: paths below the root.
        shard: (n,) which of them has the image.
        start: (n,) where in it the image begins, in bytes.
        size: (n,) of the image, in bytes.
    """

    shards: Names
    shard: NDArray[np.int32]
    start: NDArray[np.int64]
    size: NDArray[np.int64]

    def read(self, number: int, mode: str) -> Any:
        """A whole PIL image, decoded, or a `BadSample` with the reason."""
        path = self.root / self.shards[int(self.shard[number])]
        where = f"{path}: {self.names[number]}"
        size, start = int(self.size[number]), int(self.start[number])
        try:
            with path.open("rb", buffering=0) as file:
                content = os.pread(file.fileno(), size, start)
        except OSError as error:
            return BadSample(where, f"cannot be read: {error.strerror}")
        if len(content) < size:
            return BadSample(where, f"cut short: {len(content)} of {size} bytes")
        return folder.open_image(where, mode, io.BytesIO(content))

    def select(self, numbers: NDArray[np.int64]) -> TarImages:
        """Some of the images, as a list of their own."""
        part = super().select(numbers)
        return TarImages(
            root=part.root,
            names=part.names,
            indices=part.indices,
            offsets=part.offsets,
            shards=self.shards,
            shard=self.shard[numbers],
            start=self.start[numbers],
            size=self.size[numbers],
        )


def is_tar(root: Path) -> bool:
    """Whether a folder has shards."""
    return any(find_shards(root)[0].values())


def find_shards(root: Path) -> tuple[dict[str, list[Path]], list[BadSample]]:
    """The shards of each split, in the order of their names, and those that are missing or belong to no split.

    Shards of one folder whose names say no split are all of "train".
    """
    shards: dict[str, list[Path]] = {"train": [], "val": [], "test": []}
    for name, split in SPLIT_FOLDERS.items():
        shards[split] += sorted((root / name).glob("*.tar"))
    plain: list[Path] = []
    for path in sorted(root.glob("*.tar")):
        word = _SPLIT_WORD.search(path.name)
        (shards[SPLIT_FOLDERS[word[1]]] if word else plain).append(path)
    if plain and not any(shards.values()):
        shards["train"], plain = plain, []
    bad = [BadSample(str(path), "its name says neither train, val nor test, as others do") for path in plain]
    return shards, bad + _missing(list(itertools.chain(*shards.values())))


def _missing(paths: Sequence[Path]) -> list[BadSample]:
    """The gaps in the numbers of shards, where most of the numbers are there."""
    numbers: dict[tuple[Path, str, int], set[int]] = {}
    for path in paths:
        if match := _NUMBERED.fullmatch(path.name):
            numbers.setdefault((path.parent, match[1], len(match[2])), set()).add(int(match[2]))
    bad = []
    for (parent, prefix, width), found in numbers.items():
        if max(found) - min(found) + 1 <= 2 * len(found):
            gone = sorted(set(range(min(found), max(found))) - found)
            names = (parent / f"{prefix}{number:0{width}}.tar" for number in gone)
            bad += [BadSample(str(name), "no such file, between shards that are there") for name in names]
    return bad


def open_tar(config: Any, bad_data: BadDataLog, class_names: list[str] | None = None) -> ListSource:
    """The source of a folder of shards.

    Where there are val shards and no test shards, val is both. The index of a shard is kept beside it as
    `<shard>.index.npz`, or in the folder shard_index of the run where that cannot be written.

    Args:
        config: the options of a run; `data`, `classes`, `label_delimiter`, `val_fraction` and `out` are used, and those
            of `ListSource`.
        bad_data: gets what cannot be used.
        class_names: of a model that is already trained, or None for those of --classes, or else the names of all labels
            of the training shards, sorted, or "0", "1", ... up to the largest number.

    Raises:
        UsageError: no shard, no image, or labels of which some are names and some are numbers.
    """
    root = Path(config.data)
    shards, bad = find_shards(root)
    if not any(shards.values()):
        usage_fail("--data", "a folder with uncompressed shards (*.tar), also in train/, val/ and test/", root)
    bad_data.add(bad)
    indexes = {split: _open_all(config, paths, bad_data) for split, paths in shards.items()}
    if class_names is None:
        naming = indexes["train"] or [*indexes["val"], *indexes["test"]]
        class_names = folder.read_classes(Path(config.classes)) if config.classes else _classes(root, naming)
    number_of = {name: number for number, name in enumerate(class_names)}
    splits: dict[str, ImageList] = {}
    for split, paths in shards.items():
        if paths:
            splits[split], unknown = _listing(root, paths, indexes[split], number_of)
            bad_data.add(unknown)
    if "val" not in splits and "train" in splits:
        splits["train"], splits["val"] = splits["train"].split(config.val_fraction)
    elif "test" not in splits:
        splits["test"] = splits["val"]
    return ListSource(config, class_names, splits)


def _open_all(config: Any, shards: Sequence[Path], bad_data: BadDataLog) -> list[ShardIndex]:
    """The index of each shard; what it names as bad is reported."""
    said = time.monotonic()
    indexes = []
    for number, path in enumerate(shards):
        spare = Path(config.out) / "shard_index" / path.relative_to(config.data)
        caches = [other.with_name(f"{path.name}.index.npz") for other in (path, spare)]
        indexes.append(open_index(path, caches, config.label_delimiter))
        bad_data.add(BadSample(f"{path}: {n}" if n else str(path), reason) for n, reason in indexes[-1].bad)
        if time.monotonic() - said > 10:
            said = time.monotonic()
            bad_data.say(f"{number + 1} of {len(shards)} shards in {path.parent} have an index")
    return indexes


def _classes(root: Path, indexes: Iterable[ShardIndex]) -> list[str]:
    labels = {label for index in indexes for label in index.vocabulary}
    numbers = [label for label in labels if isinstance(label, int)]
    names = [label for label in labels if isinstance(label, str)]
    if names and numbers:
        got = f"{min(names)!r} and {min(numbers)} in {root}"
        usage_fail("--data", "shards whose labels are all names or all numbers (or give --classes)", got)
    if not labels:
        raise UsageError(f"--data must be shards with at least one label in training, got none in {root}")
    if not names and max(numbers) >= MOST_CLASSES:
        usage_fail("--data", f"shards whose labels are below {MOST_CLASSES:,} (or give --classes)", max(numbers))
    return sorted(names) or [str(number) for number in range(max(numbers) + 1)]


def _listing(
    root: Path, shards: Sequence[Path], indexes: Sequence[ShardIndex], number_of: Mapping[str, int]
) -> tuple[TarImages, list[BadSample]]:
    """All images of some shards whose labels are known, and the others."""
    bad: list[BadSample] = []
    parts: list[TarImages] = []
    packed = Names.collect(str(path.relative_to(root)) for path in shards)
    for place, (path, index) in enumerate(zip(shards, indexes, strict=True)):
        classes = np.array([_number(label, number_of) for label in index.vocabulary], np.int32)[index.labels]
        rows = np.repeat(np.arange(len(index.names)), np.diff(index.label_offsets))
        for row in np.unique(rows[classes < 0]).tolist():
            own = slice(index.label_offsets[row], index.label_offsets[row + 1])
            first = index.vocabulary[index.labels[own][classes[own] < 0][0]]
            bad.append(BadSample(f"{path}: {index.names[row]}", f"unknown label {first!r}"))
        order = np.lexsort((classes, rows))
        rows, classes = rows[order], classes[order]
        once = np.ones(len(rows), bool)  # a name and its number are the same class
        once[1:] = (np.diff(rows) != 0) | (np.diff(classes) != 0)
        counts = np.bincount(rows[once], minlength=len(index.names))
        whole = TarImages(
            root=root,
            names=index.names,
            indices=classes[once],
            offsets=np.cumsum([0, *counts], dtype=np.int64),
            shards=packed,
            shard=np.full(len(index.names), place, np.int32),
            start=index.offsets,
            size=index.sizes,
        )
        known = np.ones(len(index.names), bool)
        known[rows[classes < 0]] = False
        parts.append(whole.select(np.flatnonzero(known)))
    return _joined(parts), bad


def _number(label: str | int, number_of: Mapping[str, int]) -> int:
    """The class of a label, or -1."""
    if isinstance(label, int):
        return label if label < len(number_of) else -1
    return number_of.get(label, -1)


def _joined(parts: Sequence[TarImages]) -> TarImages:
    def join(arrays: Iterable[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate(list(arrays))

    def offsets(arrays: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
        return np.cumsum(np.concatenate([np.zeros(1, np.int64), *(np.diff(array) for array in arrays)]))

    return TarImages(
        root=parts[0].root,
        names=Names(join(part.names.data for part in parts), offsets(part.names.offsets for part in parts)),
        indices=join(part.indices for part in parts),
        offsets=offsets(part.offsets for part in parts),
        shards=parts[0].shards,
        shard=join(part.shard for part in parts),
        start=join(part.start for part in parts),
        size=join(part.size for part in parts),
    )


class ShardSample(NamedTuple):
    """An image for a shard: its name, such as "dogs/17.jpg"; the bytes of the file; names or the number of a class."""

    name: str
    image: bytes
    labels: Sequence[str] | int


def write_shards(path: Path, prefix: str, samples: Iterable[ShardSample], *, per_shard: int = 10_000) -> list[Path]:
    """Writes images with their labels as <prefix>000000.tar, <prefix>000001.tar, ...; returns these files.

    Args:
        path: the folder.
        prefix: such as "train-", or empty in a folder called train.
        samples: read one shard at a time.
        per_shard: images in a shard; the last may have fewer.
    """
    source = iter(samples)
    written: list[Path] = []
    while chunk := list(itertools.islice(source, per_shard)):
        written.append(path / f"{prefix}{len(written):06d}.tar")
        write_atomically(written[-1], lambda file, chunk=chunk: _write_shard(file, chunk))  # type: ignore[misc]
    return written


def _write_shard(file: BinaryIO, samples: Sequence[ShardSample]) -> None:
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, image, labels in samples:
            stem, kind = key_and_kind(name)
            if kind not in IMAGE_TYPES:
                usage_fail("name", f"that of an image, with one dot before {', '.join(IMAGE_TYPES)}", repr(name))
            key = "label" if isinstance(labels, int) else "labels"
            for member, content in ((name, image), (f"{stem}.json", json.dumps({key: labels}).encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
