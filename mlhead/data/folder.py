"""Images in a folder with a table of labels; whatever is wrong is reported by name, never dropped silently.

The CSV has a header and a row for each image: `image,labels`, `cats/1.jpg,cat;sofa`, `dogs/17.png,dog`, `empty/3.jpg,`.
A parquet file has the same columns.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch

from mlhead._usage import UsageError, closest, require, usage_fail
from mlhead.data._files import FolderFiles
from mlhead.data._tables import Columns, read_records
from mlhead.data.loading import BadSample

_ORIENTATION = 0x112  # in EXIF
HINTS = 20  # as many bad rows as are shown


class Row(NamedTuple):
    """One usable row: image path below the root, label names, and its split if the table has that column."""

    image: str
    labels: tuple[str, ...]
    split: str | None


class Table(NamedTuple):
    """The usable rows of a CSV of labels, and what is wrong with the others."""

    rows: list[Row]
    bad: list[BadSample]


def read_table(
    path: Path,
    root: Path,
    *,
    image_column: str = "image",
    label_column: str = "labels",
    delimiter: str = ";",
    argument: str = "--labels",
) -> Table:
    """Reads a table of labels and checks every row.

    Args:
        path: a CSV with a header, or a parquet file; a column "split" (train, val or test) is used where it exists.
        root: the folder that the image paths are relative to.
        image_column: name of the column with the path of the image.
        label_column: name of the column with the labels. An empty cell is an image without any label, which is allowed.
            In parquet a cell may also be a list of labels.
        delimiter: what stands between two labels of a text.
        argument: that names the table, for errors.

    Returns:
        The usable rows, in file order, and one `BadSample` for each row that is not usable: a wrong number of cells, no
        image, an image seen before, an unknown split, a file that does not exist.

    Raises:
        UsageError: the file is missing, is not of its kind, or lacks a column; or pyarrow is missing.
    """
    if not path.is_file():
        usage_fail(argument, "an existing CSV file or parquet file", path)
    rows: list[Row] = []
    bad: list[BadSample] = []
    seen: dict[str, str] = {}
    files = FolderFiles(root)
    for record in read_records(path, Columns(image_column, label_column, delimiter, argument)):
        if isinstance(record, BadSample):
            bad.append(record)
            continue
        place, image, labels, split = record
        image = os.path.normpath(image) if image else image  # ./0.jpg is 0.jpg
        where = f"{path}, {place}"
        if not image:
            bad.append(BadSample(where, "no image is named"))
        elif image in seen:
            bad.append(BadSample(f"{where}: {image}", f"the same image as in {seen[image]}"))
        elif split not in (None, "train", "val", "test"):
            bad.append(BadSample(f"{where}: {image}", f"split must be train, val or test, got {split!r}"))
        elif image not in files:
            bad.append(BadSample(f"{where}: {image}", f"no such file in {root}"))
        else:
            seen[image] = place
            rows.append(Row(image, labels, split))
    return Table(rows, bad)


def read_classes(path: Path) -> list[str]:
    """The class names in a text file, one a line, in the order of the model's outputs."""
    if not path.is_file():
        usage_fail("--classes", "an existing text file with one class a line", path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"--classes must be UTF-8 text, got {path} ({error})") from error
    names = [line.strip() for line in lines if line.strip()]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        usage_fail("--classes", "a list without repetition", f"{twice!r} twice in {path}")
    if not names:
        usage_fail("--classes", "at least one class", f"none in {path}")
    return names


def classes_of(rows: Sequence[Row]) -> list[str]:
    """All labels of some rows, sorted."""
    return sorted({label for row in rows for label in row.labels})


def keep_known(table: Table, class_names: Sequence[str]) -> Table:
    """Moves the rows with a label outside `class_names` to the bad ones."""
    known = set(class_names)
    rows, bad = [], list(table.bad)
    hints: dict[str, str] = {}  # of the first unknown labels: to look for one takes long where classes are many
    for row in table.rows:
        unknown = next((label for label in row.labels if label not in known), None)
        if unknown is not None:
            if unknown not in hints and len(hints) < HINTS:
                hints[unknown] = closest(unknown, class_names)
            bad.append(BadSample(row.image, f"unknown label {unknown!r}{hints.get(unknown, '')}"))
        else:
            rows.append(row)
    return Table(rows, bad)


def split_rows(rows: Sequence[Row], val_fraction: float) -> dict[str, list[Row]]:
    """Rows by split: by the table's own column, or else by a hash of the path, which no change of order moves."""
    splits: dict[str, list[Row]] = {"train": [], "val": [], "test": []}
    for row in rows:
        split = row.split
        if split is None:
            split = "val" if is_held_out(row.image, val_fraction) else "train"
        splits[split].append(row)
    return splits


def is_held_out(image: str, fraction: float) -> bool:
    """Whether a hash of an image's path puts it into the share that is held out for validation."""
    digest = hashlib.blake2b(os.fsencode(image), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def open_image(path: Path | str, mode: str, file: BinaryIO | None = None) -> Any:
    """A fully decoded PIL image, upright as its EXIF says and in 8 bits, or a BadSample with the reason.

    `file` holds it if it is not the file at `path`.
    """
    pil = require("PIL.Image", "Reading images")
    try:
        with pil.open(path if file is None else file) as image:
            if image.mode == "F":
                return BadSample(str(path), "its pixels are floating-point numbers, whose range no file says")
            image.load()  # where EXIF is read first, damaged pixels are no error any more
            _turn_upright(image)
            # Of 16 bits Pillow would cut off what is above 255.
            sixteen = image.mode == "I" or image.mode.startswith("I;16")
            return (_in_8_bits(image) if sixteen else image).convert(mode)
    except FileNotFoundError:
        return BadSample(str(path), "no such file")
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise  # too many open files: nothing is wrong with the image
        return _undecodable(path, error)
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others of their own on damaged files.
    except Exception as error:
        return _undecodable(path, error)


def _turn_upright(image: Any) -> None:
    """Turns an image as its EXIF says, in place."""
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF is no damage of the pixels
        return
    if orientation in range(2, 9):
        require("PIL.ImageOps", "Reading images").exif_transpose(image, in_place=True)


def _in_8_bits(image: Any) -> Any:
    """A grey image of 16 bits, by the higher 8; what is above 16 bits is white."""
    numbers = np.asarray(image).astype(np.int64).clip(0, 65535)
    return require("PIL.Image", "Reading images").fromarray((numbers >> 8).astype(np.uint8))


def _undecodable(path: Path | str, error: Exception) -> BadSample:
    reason = str(error).replace("\n", " ") or "no reason given"
    return BadSample(str(path), f"cannot be decoded: {type(error).__name__}: {reason}")


@contextlib.contextmanager
def seeded(key: int) -> Iterator[None]:
    """Seeds Python's, numpy's and torch's global random states, and puts them back afterwards."""
    python, numpy, torch_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(key)
        np.random.seed(key % 2**32)
        torch.manual_seed(key % 2**63)
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(torch_cpu)
