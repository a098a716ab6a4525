"""The layouts of files that data sets come in: how a folder of each is known, and what opens it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from mlhead._config import TrainConfig, flag
from mlhead._usage import usage_fail
from mlhead.data.coco import is_coco, open_coco
from mlhead.data.csv_source import FolderSource
from mlhead.data.image_folder import is_image_folder, open_image_folder
from mlhead.data.nus_wide import NUSWide, is_nus_wide
from mlhead.data.open_images import is_open_images, open_open_images
from mlhead.data.reporting import BadDataLog
from mlhead.data.shards import is_tar, open_tar
from mlhead.data.sources import Source
from mlhead.data.voc import is_voc, open_voc
from mlhead.data.wider import is_wider, open_wider


class Layout(NamedTuple):
    """One layout.

    files: what a folder of this layout has, in words for an error message; detect: whether a folder has it; open: the
    source of a run from its options, the log of bad data and the class names of a model that is already trained.
    """

    files: str
    detect: Callable[[Path], bool]
    open: Callable[[Any, BadDataLog, list[str] | None], Source]


# In the order in which they are looked for. A CSV is known by --labels.
LAYOUTS: dict[str, Layout] = {
    "csv": Layout("images, and --labels", lambda root: False, FolderSource),
    "coco": Layout("annotations/instances_train2014.json (or val, 2017)", is_coco, open_coco),
    "voc": Layout("VOC2007 or VOC2012 with ImageSets/Main and Annotations", is_voc, open_voc),
    "open-images": Layout("*-annotations-human-imagelabels.csv", is_open_images, open_open_images),
    "wider": Layout("wider_attribute_trainval.json (or test)", is_wider, open_wider),
    "nus-wide": Layout(
        "data.csv and benchmark_81_v0.json",
        is_nus_wide,
        lambda config, bad_data, class_names: NUSWide(config, bad_data),
    ),
    "image-folder": Layout(
        "images in a folder for each class, also in train/ and val/", is_image_folder, open_image_folder
    ),
    "tar": Layout("shards *.tar, also in train/ and val/", is_tar, open_tar),
}


# Options that data in other layouts than theirs would not use.
_OWN_OPTIONS = {"val_labels": "csv", "image_column": "csv", "label_column": "csv", "voc_difficult": "voc"}


def layout_of(config: Any) -> str:
    """The name of the layout that --layout names, or else that --data is in.

    Raises:
        UsageError: no such folder, or it is in none of them.
    """
    root = Path(config.data)
    if not root.is_dir():
        usage_fail("--data", "'scenes' or an existing folder of images", repr(config.data))
    if config.labels is not None and config.layout not in ("auto", "csv"):
        usage_fail("--labels", f"absent for --layout {config.layout}, which has labels of its own", config.labels)
    name = _layout_of(config, root)
    for option, layout in _OWN_OPTIONS.items():
        default = next(item.default for item in dataclasses.fields(TrainConfig) if item.name == option)
        value = getattr(config, option, default)
        if name != layout and value != default:
            usage_fail(flag(option), f"absent for data in the layout {name}: it is of {layout}", value)
    return name


def _layout_of(config: Any, root: Path) -> str:
    if config.layout != "auto":
        return config.layout
    if config.labels is not None:
        return "csv"
    found = next((name for name, layout in LAYOUTS.items() if layout.detect(root)), None)
    if found is None:
        known = "; ".join(f"{name}: {layout.files}" for name, layout in LAYOUTS.items())
        usage_fail("--labels", f"given for a folder of images in none of the known layouts ({known})", f"none, {root}")
    return found


def open_layout(config: Any, bad_data: BadDataLog, class_names: list[str] | None) -> Source:
    """The data of a folder in any of the layouts.

    Raises:
        UsageError: no such folder, in no known layout, not one for the task, or without anything that can be used.
    """
    if config.task == "zero-shot" and config.layout == "auto" and not is_nus_wide(config.data):
        usage_fail("--data", "'scenes' or a folder in the layout of NUS-WIDE, for --task zero-shot", config.data)
    name = layout_of(config)
    if (name == "nus-wide") != (config.task == "zero-shot"):
        must = "'zero-shot' for" if name == "nus-wide" else "'classification' for"
        usage_fail("--task", f"{must} data in the layout {name}", repr(config.task))
    return LAYOUTS[name].open(config, bad_data, class_names)
