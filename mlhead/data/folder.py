"""Images in a folder with a CSV of labels; whatever is wrong is reported by name, never dropped silently.

The CSV has a header and a row for each image: `image,labels`, `cats/1.jpg,cat;sofa`, `dogs/17.png,dog`, `empty/3.jpg,`.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mlhead._usage import UsageError, closest, require, usage_fail
from mlhead.data._random import stream_key
from mlhead.data.loading import BadSample, Sample


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
    path: Path, root: Path, *, image_column: str = "image", label_column: str = "labels", delimiter: str = ";"
) -> Table:
    """Reads a CSV of labels and checks every row.

    Args:
        path: a CSV with a header; a column "split" (train, val or test) is used where it exists.
        root: the folder that the image paths are relative to.
        image_column: name of the column with the path of the image.
        label_column: name of the column with the labels. An empty cell is an image without any label, which is allowed.
        delimiter: what stands between two labels.

    Returns:
        The usable rows, in file order, and one `BadSample` for each row that is not usable: a wrong number of cells, no
        image, an image seen before, an unknown split, a file that does not exist.

    Raises:
        UsageError: the file is missing, is not UTF-8 text, or lacks a column.
    """
    if not path.is_file():
        usage_fail("--labels", "an existing CSV file", path)
    rows: list[Row] = []
    bad: list[BadSample] = []
    seen: dict[str, int] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [cell.strip() for cell in next(reader, [])]
            for argument, column in (("--image-column", image_column), ("--label-column", label_column)):
                if column not in header:
                    usage_fail(argument, f"one of the columns of {path}: {', '.join(header) or 'none'}", repr(column))
            at_image, at_labels = header.index(image_column), header.index(label_column)
            at_split = header.index("split") if "split" in header else None
            for cells in reader:
                if not cells:
                    continue  # an empty line holds nothing that could be lost
                where = f"{path}, line {reader.line_num}"
                if len(cells) != len(header):
                    bad.append(BadSample(where, f"{len(cells)} cells where the header has {len(header)}"))
                    continue
                image = cells[at_image].strip()
                split = cells[at_split].strip() if at_split is not None else None
                labels = tuple(
                    dict.fromkeys(part.strip() for part in cells[at_labels].split(delimiter) if part.strip())
                )
                if not image:
                    bad.append(BadSample(where, "no image is named"))
                elif image in seen:
                    bad.append(BadSample(f"{where}: {image}", f"the same image as in line {seen[image]}"))
                elif split not in (None, "train", "val", "test"):
                    bad.append(BadSample(f"{where}: {image}", f"split must be train, val or test, got {split!r}"))
                elif not (root / image).is_file():
                    bad.append(BadSample(f"{where}: {image}", f"no such file in {root}"))
                else:
                    seen[image] = reader.line_num
                    rows.append(Row(image, labels, split))
    except UnicodeDecodeError as error:
        raise UsageError(f"--labels must be UTF-8 text, got {path} ({error})") from error
    except csv.Error as error:
        raise UsageError(f"--labels must be a CSV file, got {path} (line {reader.line_num}: {error})") from error
    return Table(rows, bad)


def read_classes(path: Path) -> list[str]:
    """The class names in a text file, one a line, in the order of the model's outputs."""
    if not path.is_file():
        usage_fail("--classes", "an existing text file with one class a line", path)
    names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
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
    for row in table.rows:
        unknown = [label for label in row.labels if label not in known]
        if unknown:
            bad.append(BadSample(row.image, f"unknown label {unknown[0]!r}{closest(unknown[0], class_names)}"))
        else:
            rows.append(row)
    return Table(rows, bad)


def split_rows(rows: Sequence[Row], val_fraction: float) -> dict[str, list[Row]]:
    """Rows by split: by the table's own column, or else by a hash of the path, which no change of order moves."""
    splits: dict[str, list[Row]] = {"train": [], "val": [], "test": []}
    for row in rows:
        split = row.split
        if split is None:
            digest = hashlib.blake2b(row.image.encode(), digest_size=8).digest()
            split = "val" if int.from_bytes(digest, "big") < val_fraction * 2**64 else "train"
        splits[split].append(row)
    return splits


class FolderImages(Dataset[Sample]):
    """Images of a folder with their labels.

    Serial number s stands for row s mod length in epoch s div length. The transform runs under random states seeded by
    (seed, s) alone, so that augmentation repeats exactly after a resume, whatever the number of workers.

    Args:
        root: the folder that the rows' paths are relative to.
        rows: from `read_table`.
        class_names: every label of the rows is among them.
        transform: from a PIL image to a tensor (channels, H, W).
        mode: PIL mode that images are converted to, "RGB" or "L".
        seed: any whole number.
    """

    def __init__(
        self,
        root: Path,
        rows: Sequence[Row],
        class_names: Sequence[str],
        transform: Callable[[Any], Tensor],
        *,
        mode: str = "RGB",
        seed: int = 0,
    ) -> None:
        index = {name: number for number, name in enumerate(class_names)}
        self.root, self.transform, self.mode, self.seed = root, transform, mode, seed
        self.num_classes, self.class_names = len(class_names), list(class_names)
        self.images = [row.image for row in rows]
        self._labels = [np.array(sorted(index[label] for label in row.labels), np.int64) for row in rows]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, serial: int) -> Sample | BadSample:  # type: ignore[override]
        """The sample, or which image could not be read and why."""
        number = serial % len(self.images)
        image = open_image(self.root / self.images[number], self.mode)
        if isinstance(image, BadSample):
            return image
        with seeded(stream_key(self.seed, serial)):
            return Sample(self.transform(image), self._labels[number])


def open_image(path: Path, mode: str) -> Any:
    """A fully decoded PIL image, or a BadSample with the reason."""
    pil = require("PIL.Image", "Reading images")
    try:
        with pil.open(path) as image:
            return image.convert(mode)
    except FileNotFoundError:
        return BadSample(str(path), "no such file")
    # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others of their own on damaged files.
    except Exception as error:
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
