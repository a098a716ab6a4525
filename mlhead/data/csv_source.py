"""Images in a folder with a CSV of labels, as the source of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlhead._config import flag
from mlhead._usage import UsageError, usage_fail
from mlhead.data import folder
from mlhead.data.listing import ListSource, from_rows
from mlhead.data.reporting import BadDataLog


class FolderSource(ListSource):
    """A folder of images with a CSV of labels.

    Args:
        config: the options of a run.
        bad_data: gets every unusable row.
        class_names: of a model that is already trained, or None to find them in the training rows.

    Raises:
        UsageError: a missing table, or no usable training image.
    """

    def __init__(self, config: Any, bad_data: BadDataLog, class_names: list[str] | None = None) -> None:
        root = Path(config.data)
        if config.labels is None:
            usage_fail("--labels", "given for a folder of images with a CSV", None)
        table = _read(config, "labels")
        given = folder.read_classes(Path(config.classes)) if config.classes and class_names is None else class_names
        if given is not None:
            table = folder.keep_known(table, given)
        bad_data.add(table.bad)
        splits = folder.split_rows(table.rows, 0.0 if config.val_labels else config.val_fraction)
        names = given or folder.classes_of(splits["train"])
        if config.val_labels:
            held_out = _read(config, "val_labels")
            bad_data.add(held_out.bad)
            if splits["val"]:
                usage_fail("--val-labels", f"absent where {config.labels} has rows of the split val", config.val_labels)
            splits["val"] = held_out.rows
        # A label that only occurs outside the training rows has no output in the model: such rows are bad.
        for split, rows in splits.items():
            known = folder.keep_known(folder.Table(rows, []), names)
            bad_data.add(known.bad)
            splits[split] = known.rows
        if not table.rows:
            raise UsageError(f"--labels must name at least one usable image, got none in {config.labels}")
        if not names:
            raise UsageError(f"--labels must have at least one label, got none in {config.labels}")
        needs = {"train": "--labels", "val": "--val-labels or --val-fraction", "test": "--labels (column split)"}
        lists = {split: from_rows(root, rows, names) for split, rows in splits.items()}
        super().__init__(config, names, lists, needs=needs)


def _read(config: Any, option: str) -> folder.Table:
    columns = {"image_column": config.image_column, "label_column": config.label_column}
    path = Path(getattr(config, option))
    options = {**columns, "delimiter": config.label_delimiter, "argument": flag(option)}
    return folder.read_table(path, Path(config.data), **options)
