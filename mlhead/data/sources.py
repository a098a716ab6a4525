"""From the options of a run to datasets: the embedded scenes, or a folder of images with a CSV of labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from mlhead._usage import UsageError, require, usage_fail
from mlhead.data import folder
from mlhead.data.loading import Sample
from mlhead.data.reporting import BadDataLog
from mlhead.data.scenes import MEAN, STD, Scenes
from mlhead.data.word_vectors import load_word_vectors

SMALL_BACKBONE_SIZE = 64


@dataclass
class ImageSpec:
    """What images look like to the model; stored in checkpoints, so that `predict` needs no dataset.

    channels: 1 or 3; height, width: in pixels; mean, std: one number per channel, of pixels in [0, 1].
    """

    channels: int
    height: int
    width: int
    mean: list[float]
    std: list[float]
    interpolation: str = "bicubic"

    def transform(self) -> Callable[[Any], Tensor]:
        """From a PIL image to what the model takes; the whole image is squeezed into the model's shape."""
        timm_data = require("timm.data", "Preparing images")
        return timm_data.create_transform(
            input_size=(self.channels, self.height, self.width),
            interpolation=self.interpolation,
            mean=tuple(self.mean),
            std=tuple(self.std),
            crop_pct=1.0,
            crop_mode="squash",
        )

    @property
    def mode(self) -> str:
        """PIL's name for the channels."""
        return "L" if self.channels == 1 else "RGB"

    def to_picture(self, image: Tensor) -> NDArray[np.uint8]:
        """Undoes the normalisation: (channels, H, W) -> (H, W, 3) uint8."""
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        pixels = (image.float().cpu() * std + mean).clamp(0, 1).mul(255).round().byte()
        return pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def _word_vectors(config: Any, class_names: list[str], own: Tensor | None) -> Tensor | None:
    """Word vectors (C, W) of a zero-shot run: those of --word-vectors, or else the data's own."""
    if config.task != "zero-shot":
        return None
    return own if config.word_vectors is None else load_word_vectors(config.word_vectors, class_names).vectors


def seen_then_unseen(num_classes: int, share: float) -> tuple[NDArray[np.int64], int]:
    """All numbers, those that no training scene shows at the end, and how many are before them.

    Which ones they are depends on the arguments alone, not on a run's seed.
    """
    unseen = round(share * num_classes)
    if not 1 <= unseen < num_classes:
        usage_fail("--unseen", f"a share that leaves 1 to {num_classes - 1} of {num_classes} numbers unseen", share)
    order = np.random.default_rng(num_classes).permutation(num_classes)
    return np.concatenate([np.sort(order[unseen:]), np.sort(order[:unseen])]), num_classes - unseen


class SceneSource:
    """The embedded scenes.

    With `--task zero-shot` the unseen numbers are the last classes; only test scenes show them.

    Args:
        config: the options of a run; `task`, `num_classes`, `unseen`, `image_size`, the lengths and the seed are used.
    """

    channels = 1

    def __init__(self, config: Any) -> None:
        self._config = config
        self._numbers: NDArray[np.int64] | None = None
        self.num_seen: int = config.num_classes
        if config.task == "zero-shot":
            self._numbers, self.num_seen = seen_then_unseen(config.num_classes, config.unseen)
        scenes = self._scenes("train", config.image_size)
        self.class_names = scenes.class_names
        self.word_vectors = _word_vectors(config, self.class_names, torch.from_numpy(scenes.digit_vectors()))
        self._size, self._max_numbers, self._frequency = scenes.size, scenes.max_numbers, scenes.frequency

    def _scenes(self, split: str, size: int | None) -> Scenes:
        config = self._config
        return Scenes(
            split,
            num_classes=config.num_classes,
            size=size,
            length=config.train_length if split == "train" else config.val_length,
            numbers=self._numbers,
            known=None if split == "test" else self.num_seen,
            long_tail=config.long_tail,
            seed=config.seed,
        )

    def image_spec(self, backbone: nn.Module) -> ImageSpec:
        """What the scenes look like; whatever the backbone was trained on."""
        return ImageSpec(1, self._size, self._size, [MEAN], [STD])

    def dataset(self, split: str, spec: ImageSpec) -> Scenes:
        """The scenes of a split; a test epoch is as long as a validation epoch."""
        return self._scenes(split, self._size)

    def frequencies(self) -> Tensor:
        """For each class (C,) that training knows the probability that a scene shows it."""
        C = self.num_seen
        absent = 1 - (np.full(C, 1 / C) if self._frequency is None else self._frequency)
        share = np.mean([1 - absent**count for count in range(1, self._max_numbers + 1)], axis=0)
        return torch.from_numpy(share).float()


def backbone_image_spec(config: Any, backbone: nn.Module) -> ImageSpec:
    """The size that a backbone was made for, or --image-size; the pixels' mean and std are the backbone's."""
    timm_data = require("timm.data", "Preparing images")
    size = config.image_size
    args = {} if size is None else {"input_size": (3, size, size)}
    facts = timm_data.resolve_data_config(args, model=backbone)
    if size is None and not getattr(backbone, "pretrained_cfg", None):
        facts["input_size"] = (3, SMALL_BACKBONE_SIZE, SMALL_BACKBONE_SIZE)
    _, height, width = facts["input_size"]
    return ImageSpec(3, height, width, list(facts["mean"]), list(facts["std"]), facts["interpolation"])


def training_transform(config: Any, spec: ImageSpec) -> Callable[[Any], Tensor]:
    """From a PIL image to an augmented tensor, by --crop-scale, --hflip and --auto-augment."""
    return require("timm.data", "Augmentation").create_transform(
        input_size=(spec.channels, spec.height, spec.width),
        is_training=True,
        scale=(config.crop_scale, 1.0),
        hflip=config.hflip,
        auto_augment=config.auto_augment,
        interpolation=spec.interpolation,
        mean=tuple(spec.mean),
        std=tuple(spec.std),
    )


def label_frequencies(rows: Sequence[folder.Row], class_names: Sequence[str]) -> Tensor:
    """For each class (C,) its share of the rows, counted as if there were one more with half of each."""
    index = {name: number for number, name in enumerate(class_names)}
    counts = torch.zeros(len(class_names))
    for row in rows:
        for label in row.labels:
            counts[index[label]] += 1
    return (counts + 0.5) / (len(rows) + 1)


class FolderSource:
    """A folder of images with a CSV of labels.

    Args:
        config: the options of a run.
        bad_data: gets every unusable row.
        class_names: of a model that is already trained, or None to find them in the training rows.

    Raises:
        UsageError: a missing folder or table, or no usable training image.
    """

    channels = 3

    def __init__(self, config: Any, bad_data: BadDataLog, class_names: list[str] | None = None) -> None:
        self._config = config
        self._root = Path(config.data)
        if not self._root.is_dir():
            usage_fail("--data", "'scenes' or an existing folder of images", repr(config.data))
        if config.labels is None:
            usage_fail("--labels", "given for a folder of images", None)
        table = self._read(config.labels)
        given = folder.read_classes(Path(config.classes)) if config.classes and class_names is None else class_names
        if given is not None:
            table = folder.keep_known(table, given)
        bad_data.add(table.bad)
        fraction = 0.0 if config.val_labels else config.val_fraction
        self._splits = folder.split_rows(table.rows, fraction)
        self.class_names = given or folder.classes_of(self._splits["train"])
        if config.val_labels:
            held_out = self._read(config.val_labels)
            bad_data.add(held_out.bad)
            self._splits["val"] = held_out.rows
        # A label that only occurs outside the training rows has no output in the model: such rows are bad.
        for split, rows in self._splits.items():
            known = folder.keep_known(folder.Table(rows, []), self.class_names)
            bad_data.add(known.bad)
            self._splits[split] = known.rows
        if not table.rows:
            raise UsageError(f"--labels must name at least one usable image, got none in {config.labels}")
        if not self.class_names:
            raise UsageError(f"--labels must have at least one label, got none in {config.labels}")
        self.num_seen = len(self.class_names)
        self.word_vectors: Tensor | None = None

    def _read(self, path: str) -> folder.Table:
        c = self._config
        columns = {"image_column": c.image_column, "label_column": c.label_column, "delimiter": c.label_delimiter}
        return folder.read_table(Path(path), self._root, **columns)

    def image_spec(self, backbone: nn.Module) -> ImageSpec:
        """The size that the backbone was made for, or --image-size; the pixels' mean and std are the backbone's."""
        return backbone_image_spec(self._config, backbone)

    def dataset(self, split: str, spec: ImageSpec) -> Dataset[Sample]:
        """The images of a split; only "train" is augmented."""
        rows = self._splits[split]
        if not rows:
            means = {"train": "--labels", "val": "--val-labels or --val-fraction", "test": "--labels (column split)"}
            raise UsageError(f"{means[split]} must leave at least one usable image for the {split} split, got none")
        transform = training_transform(self._config, spec) if split == "train" else spec.transform()
        return folder.FolderImages(
            self._root, rows, self.class_names, transform, mode=spec.mode, seed=self._config.seed
        )

    def frequencies(self) -> Tensor:
        """For each class (C,) its share of the training images, counted as if there were one more with half of each."""
        return label_frequencies(self._splits["train"], self.class_names)


class Source(Protocol):
    """Where a run's images come from.

    Attributes:
        channels: of the images.
        class_names: C names; those that training knows come first.
        num_seen: how many these are.
        word_vectors: (C, W) for zero-shot runs, else None.
    """

    channels: int
    class_names: list[str]
    num_seen: int
    word_vectors: Tensor | None

    def image_spec(self, backbone: nn.Module) -> ImageSpec:
        """What images look like to the model."""

    def dataset(self, split: str, spec: ImageSpec) -> Dataset[Sample]:
        """The images of "train", "val" or "test"; only those of "test" have labels that are not seen."""

    def frequencies(self) -> Tensor:
        """For each seen class (num_seen,) how often an image has it."""


def open_source(config: Any, bad_data: BadDataLog, class_names: list[str] | None = None) -> Source:
    """The data that the options of a run name.

    Args:
        config: the options of a run.
        bad_data: gets every unusable row.
        class_names: of a model that is already trained, or None.

    Raises:
        UsageError: the data is not there or cannot be used, or is not that of the class names.
    """
    source: Source
    if config.data == "scenes":
        source = SceneSource(config)
    elif config.task == "classification":
        return FolderSource(config, bad_data, class_names)
    else:
        from mlhead.data.nus_wide import NUSWide, is_nus_wide

        if not is_nus_wide(config.data):
            usage_fail("--data", "'scenes' or a folder in the layout of NUS-WIDE, for --task zero-shot", config.data)
        source = NUSWide(config, bad_data)
    if class_names is not None and source.class_names != class_names:
        usage_fail("--data", f"that of the checkpoint, with its {len(class_names)} classes in its order", config.data)
    return source
