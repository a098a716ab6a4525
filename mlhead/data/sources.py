"""From the options of a run to datasets: the embedded scenes, or a folder of images with a CSV of labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


class SceneSource:
    """The embedded scenes.

    Args:
        config: the options of a run; `num_classes`, `image_size`, the lengths and the seed are used.
    """

    channels = 1

    def __init__(self, config: Any) -> None:
        self._config = config
        scenes = Scenes(
            "train",
            num_classes=config.num_classes,
            size=config.image_size,
            long_tail=config.long_tail,
            seed=config.seed,
        )
        self.class_names = scenes.class_names
        self._size, self._max_numbers, self._frequency = scenes.size, scenes.max_numbers, scenes.frequency

    def image_spec(self, backbone: nn.Module) -> ImageSpec:
        """What the scenes look like; whatever the backbone was trained on."""
        return ImageSpec(1, self._size, self._size, [MEAN], [STD])

    def dataset(self, split: str, spec: ImageSpec) -> Scenes:
        """The scenes of a split; a test epoch is as long as a validation epoch."""
        length = self._config.train_length if split == "train" else self._config.val_length
        config = self._config
        return Scenes(
            split,
            num_classes=config.num_classes,
            size=self._size,
            length=length,
            long_tail=config.long_tail,
            seed=config.seed,
        )

    def frequencies(self) -> Tensor:
        """For each class (C,) the probability that a scene shows it."""
        C = len(self.class_names)
        absent = 1 - (np.full(C, 1 / C) if self._frequency is None else self._frequency)
        share = np.mean([1 - absent**count for count in range(1, self._max_numbers + 1)], axis=0)
        return torch.from_numpy(share).float()


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

    def _read(self, path: str) -> folder.Table:
        c = self._config
        columns = {"image_column": c.image_column, "label_column": c.label_column, "delimiter": c.label_delimiter}
        return folder.read_table(Path(path), self._root, **columns)

    def image_spec(self, backbone: nn.Module) -> ImageSpec:
        """The size that the backbone was made for, or --image-size; the pixels' mean and std are the backbone's."""
        timm_data = require("timm.data", "Preparing images")
        size = self._config.image_size
        args = {} if size is None else {"input_size": (3, size, size)}
        facts = timm_data.resolve_data_config(args, model=backbone)
        if size is None and not getattr(backbone, "pretrained_cfg", None):
            facts["input_size"] = (3, SMALL_BACKBONE_SIZE, SMALL_BACKBONE_SIZE)
        _, height, width = facts["input_size"]
        return ImageSpec(3, height, width, list(facts["mean"]), list(facts["std"]), facts["interpolation"])

    def dataset(self, split: str, spec: ImageSpec) -> Dataset[Sample]:
        """The images of a split; only "train" is augmented."""
        c = self._config
        rows = self._splits[split]
        if not rows:
            means = {"train": "--labels", "val": "--val-labels or --val-fraction", "test": "--labels (column split)"}
            raise UsageError(f"{means[split]} must leave at least one usable image for the {split} split, got none")
        transform = spec.transform()
        if split == "train":
            transform = require("timm.data", "Augmentation").create_transform(
                input_size=(spec.channels, spec.height, spec.width),
                is_training=True,
                scale=(c.crop_scale, 1.0),
                hflip=c.hflip,
                auto_augment=c.auto_augment,
                interpolation=spec.interpolation,
                mean=tuple(spec.mean),
                std=tuple(spec.std),
            )
        return folder.FolderImages(self._root, rows, self.class_names, transform, mode=spec.mode, seed=c.seed)

    def frequencies(self) -> Tensor:
        """For each class (C,) its share of the training images, counted as if there were one more with half of each."""
        rows = self._splits["train"]
        index = {name: number for number, name in enumerate(self.class_names)}
        counts = torch.zeros(len(self.class_names))
        for row in rows:
            for label in row.labels:
                counts[index[label]] += 1
        return (counts + 0.5) / (len(rows) + 1)


Source = SceneSource | FolderSource


def open_source(config: Any, bad_data: BadDataLog, class_names: list[str] | None = None) -> Source:
    """The data that the options of a run name."""
    return SceneSource(config) if config.data == "scenes" else FolderSource(config, bad_data, class_names)
