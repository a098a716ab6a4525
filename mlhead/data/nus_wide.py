"""NUS-WIDE for zero-shot learning, in the folder layout that ML-Decoder's public training reads.

FOLDER/data.csv                  filepath,label,split_name: `images/1.jpg,"[sky, water]",train`
FOLDER/benchmark_81_v0.json      {"test class": [...]}: the unseen classes, perhaps {"train class": [...]}: the seen
FOLDER/wordvec_array.pth         (W, number of labels): a column for each label of data.csv, sorted by name
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from mlhead._usage import UsageError, closest, usage_fail
from mlhead.data import folder
from mlhead.data._files import FolderFiles
from mlhead.data._tables import whole_rows
from mlhead.data._word_files import is_array_file, orient, read_array
from mlhead.data.listing import ListImages, from_rows
from mlhead.data.loading import BadSample, Sample
from mlhead.data.reporting import BadDataLog
from mlhead.data.sources import ImageSpec, backbone_image_spec, training_transform
from mlhead.data.word_vectors import load_word_vectors

TABLE, CLASSES, VECTORS = "data.csv", "benchmark_81_v0.json", "wordvec_array.pth"
SPLITS = ("train", "val", "test", "zsl")
_COLUMNS = "image, labels, split, found by position"


def is_nus_wide(path: str | Path) -> bool:
    """Whether a folder has the table and the classes of this layout."""
    return all((Path(path) / name).is_file() for name in (TABLE, CLASSES))


class NUSWide:
    """Seen classes to train on and unseen ones to test on, with a word vector for each.

    The columns of data.csv are found by their position, as public code does, whatever the header calls them: the path
    of the image below the folder; its labels, `[a, b, c]`, with or without quotes; train or val. A further column is
    not looked at. Without "train class", every label that is not a test class is seen; with it, labels of neither list
    are left out.

    The rows of data.csv that say train, with at least one seen label, are for training, by their seen labels alone; a
    share of them, chosen by a hash of the path as for any folder, is held out for validation. The rows that say val
    are the test images: all with any label for generalised zero-shot learning ("test"), those with an unseen label for
    zero-shot learning ("zsl"). Which labels there are, and so the order of the classes, depends on the text of
    data.csv alone, also on the rows whose image is missing.

    Args:
        config: the options of a run; `data`, `val_fraction`, `image_size`, `crop_scale`, `hflip`, `auto_augment`,
            `seed` and `word_vectors` (a file for `load_word_vectors` in place of wordvec_array.pth, or None) are used.
            An array in that file has its rows or columns in the order of wordvec_array.pth.
        bad_data: gets every unusable row.
        word_vectors: (C, W) in the order of `class_names`, in place of any file.

    Attributes:
        channels: 3.
        class_names: C names: the seen classes, sorted, then the unseen ones, sorted.
        num_seen: how many of them are seen.
        word_vectors: (C, W) fp32.
        left_out: how many usable rows of "train" and "val" in data.csv have no label that counts for them.

    Raises:
        UsageError: a missing or unreadable file, a class of the JSON file that no row has, vectors that do not fit, or
            no usable row.

    Source: ML-Decoder, section 4.2 and appendix F; the layout is that of its public train_zsl_nus.py.
    """

    channels = 3
    single_label = False

    def __init__(self, config: Any, bad_data: BadDataLog, *, word_vectors: Tensor | None = None) -> None:
        self._config = config
        self._root = Path(config.data)
        for name in (TABLE, CLASSES):
            if not (self._root / name).is_file():
                usage_fail("--data", f"a folder with {TABLE} and {CLASSES}", f"{self._root} without {name}")
        table, labels = _read_table(self._root / TABLE, self._root)
        seen, unseen = _read_classes(self._root / CLASSES, labels)
        self.class_names, self.num_seen = seen + unseen, len(seen)
        self.word_vectors: Tensor | None = self._vectors(labels, word_vectors)
        bad_data.add(table.bad)

        training = _with_labels((row for row in table.rows if row.split == "train"), seen)
        test = _with_labels((row for row in table.rows if row.split == "val"), self.class_names)
        counts = {split: sum(row.split == split for row in table.rows) for split in ("train", "val")}
        self.left_out = {"train": counts["train"] - len(training), "val": counts["val"] - len(test)}
        if not training and not test:
            usage_fail("--data", "a folder with at least one usable image", f"none in {self._root / TABLE}")
        halves = folder.split_rows([row._replace(split=None) for row in training], config.val_fraction)
        zsl = [row for row in test if not set(unseen).isdisjoint(row.labels)]
        splits = {"train": halves["train"], "val": halves["val"], "test": test, "zsl": zsl}
        # The seen classes come first, so a number means the same class in the splits that have only these.
        self._splits = {split: from_rows(self._root, rows, self.class_names) for split, rows in splits.items()}

    def _vectors(self, labels: Sequence[str], given: Tensor | None) -> Tensor:
        """(C, W) in the order of `class_names`, from whichever source was named."""
        C = len(self.class_names)
        if given is not None:
            if given.ndim != 2 or len(given) != C or given.shape[1] == 0 or not given.is_floating_point():
                usage_fail("word_vectors", f"({C}, W) of a floating dtype", f"{tuple(given.shape)} {given.dtype}")
            if not given.isfinite().all():
                usage_fail("word_vectors", "finite", "NaN or infinity")
            return given.detach().to("cpu", torch.float32)
        named = self._config.word_vectors
        path = self._root / VECTORS if named is None else Path(named)
        if named is None and not path.is_file():
            usage_fail("--data", f"a folder with {VECTORS} (or give --word-vectors)", f"{self._root} without it")
        if named is not None and not is_array_file(path):
            return load_word_vectors(path, self.class_names).vectors
        array = read_array(path)
        if named is None and array.shape[1] != len(labels):
            must = f"(W, {len(labels)}), a column for each label of {TABLE}"
            usage_fail(str(path), must, tuple(array.shape))
        rows = orient(array, len(labels), path, columns=True)
        index = {label: number for number, label in enumerate(labels)}
        return rows[[index[name] for name in self.class_names]]

    def image_spec(self, backbone: nn.Module) -> ImageSpec:
        """The size that the backbone was made for, or --image-size; the pixels' mean and std are the backbone's."""
        return backbone_image_spec(self._config, backbone)

    def dataset(self, split: str, spec: ImageSpec, *, augment: bool = True) -> Dataset[Sample]:
        """The images of a split.

        Args:
            split: "train", augmented, and "val", with the seen classes alone (`num_seen` of them); "test" (every test
                image) and "zsl" (those with an unseen label), with all classes.
            spec: what images look like to the model.
            augment: whether "train" is for training.

        Raises:
            UsageError: there is no such split, or no image in it.
        """
        if split not in SPLITS:
            usage_fail("split", f"one of {', '.join(map(repr, SPLITS))}", repr(split))
        listing = self._splits[split]
        if len(listing) == 0:
            needs = {
                "train": "--data must leave at least one usable image with a seen label for the train split",
                "val": "--val-fraction must leave at least one image for the val split",
                "test": "--data must have at least one usable image with a label for the test split (val in data.csv)",
                "zsl": "--data must have at least one usable image with an unseen label (val in data.csv)",
            }
            raise UsageError(f"{needs[split]}, got none")
        transform = training_transform(self._config, spec) if split == "train" and augment else spec.transform()
        names = self.class_names[: self.num_seen] if split in ("train", "val") else self.class_names
        return ListImages(listing, names, transform, mode=spec.mode, seed=self._config.seed)

    def frequencies(self) -> Tensor:
        """For each seen class (num_seen,) its share of the training images, as if there were one with half of each."""
        return self._splits["train"].frequencies(self.num_seen)


def parse_labels(cell: str) -> tuple[str, ...]:
    """The labels in `[a, b, c]`: brackets go, ", " separates, quotes around a label go."""
    labels = []
    for part in cell.replace("[", "").replace("]", "").split(", "):
        label = part.strip()
        if len(label) > 1 and label[0] == label[-1] and label[0] in "'\"":
            label = label[1:-1].strip()
        labels.append(label)
    return tuple(dict.fromkeys(label for label in labels if label))


def _with_labels(rows: Any, names: Sequence[str]) -> list[folder.Row]:
    """Rows with those of their labels that are among `names`, if there are any."""
    known = set(names)
    kept = (row._replace(labels=tuple(label for label in row.labels if label in known)) for row in rows)
    return [row for row in kept if row.labels]


def _read_table(path: Path, root: Path) -> tuple[folder.Table, list[str]]:
    """The rows of data.csv, those that cannot be used, and all labels that occur, sorted."""
    rows: list[folder.Row] = []
    bad: list[BadSample] = []
    lines: dict[str, int] = {}
    labels_seen: set[str] = set()
    files = FolderFiles(root)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [cell.strip() for cell in next(reader, [])]
            if len(header) < 3 or header[2] in ("train", "val"):
                got = f"the first line {','.join(header)!r}" if header else "an empty file"
                usage_fail(str(path), f"a CSV with a header of at least three columns ({_COLUMNS})", got)
            for cells in whole_rows(reader):
                if not cells:
                    continue  # an empty line holds nothing that could be lost
                where = f"{path}, line {reader.line_num}"
                if len(cells) != len(header):
                    hint = ": labels with commas need quotes around them" if len(cells) > len(header) else ""
                    bad.append(BadSample(where, f"{len(cells)} cells where the header has {len(header)}{hint}"))
                    continue
                image, labels, split = cells[0].strip(), parse_labels(cells[1]), cells[2].strip()
                image = os.path.normpath(image) if image else image  # ./0.jpg is 0.jpg
                labels_seen.update(labels)
                if not image:
                    bad.append(BadSample(where, "no image is named"))
                elif image in lines:
                    bad.append(BadSample(f"{where}: {image}", f"the same image as in line {lines[image]}"))
                elif split not in ("train", "val"):
                    bad.append(BadSample(f"{where}: {image}", f"split must be train or val, got {split!r}"))
                elif not labels:
                    bad.append(BadSample(f"{where}: {image}", "no labels"))
                elif image not in files:
                    bad.append(BadSample(f"{where}: {image}", f"no such file in {root}"))
                else:
                    lines[image] = reader.line_num
                    rows.append(folder.Row(image, labels, split))
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} must be UTF-8 text ({error})") from error
    except csv.Error as error:
        raise UsageError(f"{path} must be a CSV file (line {reader.line_num}: {error})") from error
    if not labels_seen:
        usage_fail(str(path), f"a CSV with labels ({_COLUMNS})", "none in any row")
    return folder.Table(rows, bad), sorted(labels_seen)


def _read_classes(path: Path, labels: Sequence[str]) -> tuple[list[str], list[str]]:
    """The seen and the unseen classes, each sorted, from the JSON file and all labels of the table."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UsageError(f"{path} must be a JSON file ({error})") from error
    if not isinstance(content, Mapping):
        usage_fail(str(path), 'a JSON object with "test class"', f"a {type(content).__name__}")
    unseen = _class_list(path, content, "test class", labels)
    if "train class" in content:
        seen = _class_list(path, content, "train class", labels)
        both = sorted(set(seen) & set(unseen))
        if both:
            usage_fail(str(path), "two lists without a common class", f"{both[0]!r} in both")
    else:
        seen = sorted(set(labels) - set(unseen))
        if not seen:
            usage_fail(str(path), f"without some label of {TABLE}, which are the seen classes", 'all in "test class"')
    return seen, unseen


def _class_list(path: Path, content: Mapping[str, Any], key: str, labels: Sequence[str]) -> list[str]:
    names = content.get(key)
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        got = "none" if names is None else repr(names)[:80]
        usage_fail(str(path), f'a JSON object whose "{key}" is a list of class names', got)
    known = set(labels)
    unknown = [name for name in names if name not in known]
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        got = f"{unknown[0]!r}{more}{closest(unknown[0], labels)}"
        usage_fail(str(path), f'made of labels of {TABLE} in "{key}"', got)
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        usage_fail(str(path), f'without repetition in "{key}"', f"{twice!r} twice")
    return sorted(names)
