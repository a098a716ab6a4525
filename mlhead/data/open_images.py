"""Open Images V6 with image-level labels, of which each image has a few that people have verified.

FOLDER/oidv6-class-descriptions.csv (or class-descriptions-boxable.csv)    LabelName,DisplayName
FOLDER/oidv6-classes-trainable.txt                                         /m/011k07; if it is there, no others count
FOLDER/oidv6-train-annotations-human-imagelabels.csv, validation-..., test-...  ImageID,Source,LabelName,Confidence
FOLDER/train/000002b66c9c498e.jpg, validation/..., test/...
"""

from __future__ import annotations

import csv
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlhead._usage import UsageError, usage_fail
from mlhead.data._files import files_in
from mlhead.data._tables import whole_rows
from mlhead.data.listing import ImageList, ListSource, Names
from mlhead.data.loading import BadSample
from mlhead.data.reporting import BadDataLog

SPLITS = {"train": "train", "val": "validation", "test": "test"}
_DESCRIPTIONS = ("oidv6-class-descriptions.csv", "class-descriptions-boxable.csv")
_TRAINABLE = "oidv6-classes-trainable.txt"
_COLUMNS = ("ImageID", "LabelName", "Confidence")
_FILE = re.compile(r"([0-9a-f]{16})\.jpg")
_ID = re.compile(r"[0-9a-f]{16}")
_CHUNK = 2**20  # rows that are held as Python's numbers at a time

Ids = NDArray[np.uint64]


def _tables(root: Path) -> dict[str, Path]:
    """The tables of labels, by split."""
    found = {}
    for split, folder in SPLITS.items():
        plain = f"{folder}-annotations-human-imagelabels"
        paths = (root / f"{name}.csv" for name in (f"oidv6-{plain}", plain, f"{plain}-boxable"))
        path = next((path for path in paths if path.is_file()), None)
        if path is not None:
            found[split] = path
    return found


def is_open_images(root: Path) -> bool:
    """Whether a folder has a table of labels of this layout."""
    return bool(_tables(root))


def open_open_images(config: Any, bad_data: BadDataLog, class_names: list[str] | None = None) -> ListSource:
    """Open Images: an image's labels are those that people have verified, as positive or as negative.

    What is not verified is negative in training, where --untagged-weight reduces its weight (ML-Decoder, appendix H),
    and unknown in validation and test, whose metrics leave it out, as public code for this data set does. A label that
    is verified both ways is unknown. Images without a row are no part of the set.

    A table is read in one pass; at most 24 bytes a row are held at a time, of which 5 become the list.

    Args:
        config: the options of a run.
        bad_data: gets every row and label that cannot be used, and every image that is named and not there.
        class_names: not used; the files say which classes there are.

    Raises:
        UsageError: no such files, or files that are not of this kind.
    """
    root = Path(config.data)
    tables = _tables(root)
    if not tables:
        usage_fail(
            "--data", "a folder with oidv6-train-annotations-human-imagelabels.csv or validation-..., test-...", root
        )
    labels, names = _classes(root, bad_data)
    splits = {}
    for split, path in tables.items():
        splits[split] = _read(path, root / SPLITS[split], labels, len(names), bad_data)
        splits[split].untagged = 0 if split == "train" else -1
    return ListSource(config, names, splits)


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV that are not empty, and the line that each ends at."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            yield from ((reader.line_num, cells) for cells in whole_rows(reader) if cells)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} must be UTF-8 text ({error})") from error
    except csv.Error as error:
        raise UsageError(f"{path} must be a CSV file (line {reader.line_num}: {error})") from error


def _classes(root: Path, bad_data: BadDataLog) -> tuple[dict[str, int], list[str]]:
    """The class of each label such as /m/011k07, -1 where it is none, and the names of the classes."""
    path = next((root / name for name in _DESCRIPTIONS if (root / name).is_file()), None)
    if path is None:
        usage_fail("--data", f"a folder with {' or '.join(_DESCRIPTIONS)}", f"{root} without them")
    described: dict[str, str] = {}
    bad = []
    for line, cells in _rows(path):
        if cells[0] == "LabelName":
            continue
        if len(cells) != 2 or not cells[0] or cells[0] in described:
            bad.append(BadSample(f"{path}, line {line}", "no label and name of its own"))
        else:
            described[cells[0]] = cells[1]
    bad_data.add(bad)
    chosen = list(described)
    if (root / _TRAINABLE).is_file():
        chosen = list(dict.fromkeys(cells[0] for _, cells in _rows(root / _TRAINABLE)))
        unknown = [label for label in chosen if label not in described]
        if unknown:
            usage_fail(str(root / _TRAINABLE), f"made of labels of {path}", repr(unknown[0]))
    if not chosen:
        usage_fail(str(path), "a file with at least one label", "none")
    labels = dict.fromkeys(described, -1) | {label: number for number, label in enumerate(chosen)}
    shown = [described[label] for label in chosen]
    twice = {name for name, count in zip(*np.unique(shown, return_counts=True), strict=True) if count > 1}
    return labels, [f"{described[n]} ({n})" if described[n] in twice else described[n] for n in chosen]


def _read(path: Path, folder: Path, labels: dict[str, int], num_classes: int, bad_data: BadDataLog) -> ImageList:
    """The images of one table, which are in `folder`."""
    found = (match[1] for match in map(_FILE.fullmatch, files_in(folder)) if match)
    ids = np.sort(np.fromiter((int(stem, 16) for stem in found), np.uint64))
    bad: list[BadSample] = []
    missing: list[Ids] = []
    parts = []
    for images, classes, values in _chunks(path, labels, bad):
        number = np.searchsorted(ids, images)
        there = number < len(ids)
        there[there] = ids[number[there]] == images[there]
        missing.append(np.unique(images[~there]))
        kept = there & (classes >= 0)
        # One number for image, class and value, so that sorting it sorts all three.
        parts.append((number[kept] * num_classes + classes[kept]) * 2 + values[kept])
    gone = np.unique(np.concatenate(missing)) if missing else np.zeros(0, np.uint64)
    bad += (BadSample(f"{path}: {image:016x}", f"no such file in {folder}") for image in gone.tolist())
    keys = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    parts.clear()
    keys.sort()
    listing = _listed(path, folder, ids, keys, num_classes, bad)
    bad_data.add(bad)
    return listing


def _chunks(
    path: Path, labels: dict[str, int], bad: list[BadSample]
) -> Iterator[tuple[Ids, NDArray[np.int64], NDArray[np.int8]]]:
    """Images, classes (-1: none that counts) and values of the rows of a table, many at a time."""
    rows = _rows(path)
    _, header = next(rows, (0, []))
    if any(name not in header for name in _COLUMNS):
        usage_fail(str(path), f"a CSV with columns {', '.join(_COLUMNS)}", f"columns {', '.join(header) or 'none'}")
    at_image, at_label, at_value = (header.index(name) for name in _COLUMNS)
    unknown: dict[str, int] = {}
    images, classes, values = array("Q"), array("q"), array("b")
    for line, cells in rows:
        if len(cells) != len(header):
            bad.append(BadSample(f"{path}, line {line}", f"{len(cells)} cells where the header has {len(header)}"))
            continue
        image, label, value = cells[at_image], cells[at_label], cells[at_value]
        if not _ID.fullmatch(image):
            bad.append(BadSample(f"{path}, line {line}", f"ImageID must be 16 hexadecimal digits, got {image!r}"))
        elif value not in ("0", "1"):
            bad.append(BadSample(f"{path}, line {line}", f"Confidence must be 0 or 1, got {value!r}"))
        elif label not in labels:
            unknown[label] = unknown.get(label, 0) + 1
        else:
            images.append(int(image, 16))
            classes.append(labels[label])
            values.append(value == "1")
            if len(images) == _CHUNK:
                yield np.array(images), np.array(classes), np.array(values)
                images, classes, values = array("Q"), array("q"), array("b")
    bad += (BadSample(f"{path}: {name!r}", f"unknown label, in {count} rows") for name, count in unknown.items())
    yield np.array(images), np.array(classes), np.array(values)


def _listed(
    path: Path, folder: Path, ids: Ids, keys: NDArray[np.int64], num_classes: int, bad: list[BadSample]
) -> ImageList:
    """The list that sorted numbers for image, class and value are; the array of them is used up."""
    values = (keys & 1).astype(np.int8)
    keys >>= 1
    first = np.ones(len(keys), bool)  # of the rows for one image and class
    np.not_equal(keys[1:], keys[:-1], out=first[1:])
    clashes = 1 + np.flatnonzero(~first[1:] & (values[1:] != values[:-1]))
    if len(clashes):
        starts = np.flatnonzero(first)
        values[starts[np.searchsorted(starts, clashes, "right") - 1]] = -1
        for image, label in zip(*np.divmod(keys[clashes], num_classes), strict=True):
            where = f"{path}: {ids[image]:016x}, class {label}"
            bad.append(BadSample(where, "verified as positive and as negative; counted as unknown"))
    keys, values = keys[first], values[first]
    classes = (keys % num_classes).astype(np.int32)
    keys //= num_classes
    counts = np.bincount(keys, minlength=len(ids))
    used = np.flatnonzero(counts)
    offsets = np.zeros(len(used) + 1, np.int64)
    np.cumsum(counts[used], out=offsets[1:])
    names = Names.collect(f"{image:016x}.jpg" for image in ids[used])
    return ImageList(folder, names, classes, offsets, None if (values == 1).all() else values)
