"""Rows of a table of image paths and labels, from CSV or parquet, before anything is checked."""

from __future__ import annotations

import csv
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlhead._usage import UsageError, usage_fail
from mlhead.data.loading import BadSample


class Columns(NamedTuple):
    """Which columns a table has its images and labels in, and what stands between two labels of a text.

    argument: the option that names the table, for errors.
    """

    image: str
    labels: str
    delimiter: str
    argument: str = "--labels"


class Record(NamedTuple):
    """One row: its place, such as "line 3"; the image; its labels, each once; its split, if there is such a column."""

    place: str
    image: str
    labels: tuple[str, ...]
    split: str | None


def read_records(path: Path, columns: Columns) -> Iterator[Record | BadSample]:
    """The rows of a table, of parquet if its name ends so and else of CSV, and those that have no such form.

    Raises:
        UsageError: the file is not what its name says, or lacks a column; pyarrow is not there for parquet.
    """
    return _parquet(path, columns) if path.suffix.lower() == ".parquet" else _csv(path, columns)


def _check_columns(path: Path, columns: Columns, header: Sequence[str]) -> None:
    for argument, column in (("--image-column", columns.image), ("--label-column", columns.labels)):
        if column not in header:
            usage_fail(argument, f"one of the columns of {path}: {', '.join(header) or 'none'}", repr(column))


def _csv(path: Path, columns: Columns) -> Iterator[Record | BadSample]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [cell.strip() for cell in next(reader, [])]
            _check_columns(path, columns, header)
            at_image, at_labels = header.index(columns.image), header.index(columns.labels)
            at_split = header.index("split") if "split" in header else None
            for cells in whole_rows(reader):
                if not cells:
                    continue  # an empty line holds nothing that could be lost
                place = f"line {reader.line_num}"
                if len(cells) != len(header):
                    yield BadSample(f"{path}, {place}", f"{len(cells)} cells where the header has {len(header)}")
                    continue
                split = cells[at_split].strip() if at_split is not None else None
                yield Record(place, cells[at_image].strip(), _parts(cells[at_labels], columns.delimiter), split)
    except UnicodeDecodeError as error:
        raise UsageError(f"{columns.argument} must be UTF-8 text, got {path} ({error})") from error
    except csv.Error as error:
        raise UsageError(
            f"{columns.argument} must be a CSV file, got {path} (line {reader.line_num}: {error})"
        ) from error


def whole_rows(reader: Any) -> Iterator[list[str]]:
    """The rows of a CSV reader, each of which has to be one line.

    Raises:
        csv.Error: a row has several, as after a quote that is not closed: rows would be lost in a cell.
    """
    line = reader.line_num
    for cells in reader:
        if reader.line_num > line + 1:
            raise csv.Error(f"the row that begins in line {line + 1} has several lines: is a quote not closed?")
        line = reader.line_num
        yield cells


def _parts(text: str, delimiter: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(delimiter) if part.strip()))


def _parquet(path: Path, columns: Columns) -> Iterator[Record | BadSample]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{columns.argument} {path} needs pyarrow, which is not installed: pip install pyarrow, or give a CSV file"
        ) from error
    row = 0
    try:
        with parquet.ParquetFile(path) as file:
            header = file.schema_arrow.names
            _check_columns(path, columns, header)
            wanted = dict.fromkeys([columns.image, columns.labels, *(["split"] if "split" in header else [])])
            for batch in file.iter_batches(columns=list(wanted)):
                yield from parquet_records(path, columns, batch.to_pydict(), row)
                row += batch.num_rows
    except UsageError:
        raise
    except (ValueError, OSError) as error:  # pyarrow's own errors are such
        raise UsageError(
            f"{columns.argument} must be a parquet file, got {path} ({str(error).splitlines()[0]})"
        ) from error


def parquet_records(
    path: Path, columns: Columns, values: Mapping[str, Sequence[Any]], first: int = 0
) -> Iterator[Record | BadSample]:
    """Rows of parquet from lists of Python values.

    Args:
        path: of the table.
        columns: which of the lists are images and labels.
        values: the list of each column. Labels are texts, with the delimiter between two labels, or lists of texts.
        first: number of the first row; rows count from 0.
    """
    splits = values.get("split") or [None] * len(values[columns.image])
    rows = zip(values[columns.image], values[columns.labels], splits, strict=True)
    for row, (image, labels, split) in enumerate(rows, first):
        place = f"row {row}"
        where = f"{path}, {place}: {image}"
        if image is not None and not isinstance(image, str):
            yield BadSample(f"{path}, {place}", f"the path of an image must be text, got {image!r}")
        elif isinstance(labels, str):
            yield Record(place, (image or "").strip(), _parts(labels, columns.delimiter), split)
        elif isinstance(labels, list) and all(isinstance(label, str) and label.strip() for label in labels):
            names = tuple(dict.fromkeys(label.strip() for label in labels))
            yield Record(place, (image or "").strip(), names, split)
        elif labels is None:
            yield BadSample(where, "no labels: null; an image without any has an empty text or list")
        else:
            yield BadSample(where, f"labels must be text or a list of texts, got {repr(labels)[:40]}")
