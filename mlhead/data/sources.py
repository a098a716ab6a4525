"""From the options of a run to datasets: the embedded scenes, or files in one of the layouts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from mlhead._usage import require, usage_fail
from mlhead.data.loading import Sample
from mlhead.data.reporting import BadDataLog
from mlhead.data.scenes import MEAN, STD, Scenes
from mlhead.data.word_vectors import load_word_vectors

SMALL_BACKBONE_SIZE = 64


@dataclass
class ImageSpec:
    """What images look like to the model; stored in checkpoints, so that `predict` needs no dataset.

    channels: 1 or 3; height, width: in pixels; mean, std: one number per channel, of pixels in [0, 1]; crop_pct: share
    of an image's shorter side that is seen, or None where the whole image is.
    """

    channels: int
    height: int
    width: int
    mean: list[float]
    std: list[float]
    interpolation: str = "bicubic"
    crop_pct: float | None = None

    def transform(self) -> Callable[[Any], Tensor]:
        """From a PIL image to what the model takes: its middle, or all of it squeezed into the model's shape."""
        timm_data = require("timm.data", "Preparing images")
        return timm_data.create_transform(
            input_size=(self.channels, self.height, self.width),
            interpolation=self.interpolation,
            mean=tuple(self.mean),
            std=tuple(self.std),
            crop_pct=self.crop_pct or 1.0,
            crop_mode="squash" if self.crop_pct is None else "center",
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
    single_label = False

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

    def dataset(self, split: str, spec: ImageSpec, *, augment: bool = True) -> Scenes:
        """The scenes of a split, which are not augmented; a test epoch is as long as a validation epoch."""
        return self._scenes(split, self._size)

    def frequencies(self) -> Tensor:
        """For each class (C,) that training knows the probability that a scene shows it."""
        C = self.num_seen
        absent = 1 - (np.full(C, 1 / C) if self._frequency is None else self._frequency)
        share = np.mean([1 - absent**count for count in range(1, self._max_numbers + 1)], axis=0)
        return torch.from_numpy(share).float()


def backbone_image_spec(config: Any, backbone: nn.Module) -> ImageSpec:
    """What images look like by --image-size, --normalize and --crop-pct; by default as the backbone was made for."""
    timm_data = require("timm.data", "Preparing images")
    size = config.image_size
    args: dict[str, Any] = {} if size is None else {"input_size": (3, size, size)}
    if config.normalize == "unit":
        args |= {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    facts = timm_data.resolve_data_config(args, model=backbone)
    if size is None and not getattr(backbone, "pretrained_cfg", None):
        facts["input_size"] = (3, SMALL_BACKBONE_SIZE, SMALL_BACKBONE_SIZE)
    _, height, width = facts["input_size"]
    mean, std = list(facts["mean"]), list(facts["std"])
    return ImageSpec(3, height, width, mean, std, facts["interpolation"], config.crop_pct)


def training_transform(config: Any, spec: ImageSpec) -> Callable[[Any], Tensor]:
    """From a PIL image to an augmented tensor, by --crop-scale and the options after it."""
    timm_data = require("timm.data", "Augmentation")
    try:
        transform = timm_data.create_transform(
            input_size=(spec.channels, spec.height, spec.width),
            is_training=True,
            scale=(config.crop_scale, 1.0),
            hflip=config.hflip,
            color_jitter=config.color_jitter or None,
            auto_augment=config.auto_augment,
            interpolation=spec.interpolation,
            mean=tuple(spec.mean),
            std=tuple(spec.std),
            re_prob=config.random_erasing,
            re_mode="pixel",
        )
        if config.crop_scale == 1.0:
            # Random proportions would still cut away a part of every image that is not square.
            size, mode = (spec.height, spec.width), timm_data.str_to_interp_mode(spec.interpolation)
            transform.transforms[0] = require("torchvision.transforms", "--crop-scale 1").Resize(size, mode)
    except (AssertionError, ValueError) as error:
        if config.auto_augment is None:
            raise
        usage_fail("--auto-augment", f"a name that timm knows ({error})", repr(config.auto_augment))
    if config.cutout:
        # The paper's share is that of a side, torchvision's that of the area; the square lies inside the image.
        area = config.cutout**2
        erase = require("torchvision.transforms", "--cutout").RandomErasing(1.0, scale=(area, area), ratio=(1.0, 1.0))
        transform.transforms.append(erase)
    return transform


class Source(Protocol):
    """Where a run's images come from.

    Attributes:
        channels: of the images.
        class_names: C names; those that training knows come first.
        num_seen: how many these are.
        word_vectors: (C, W) for zero-shot runs, else None.
        single_label: whether every image has exactly one label.
    """

    channels: int
    class_names: list[str]
    num_seen: int
    word_vectors: Tensor | None

    @property
    def single_label(self) -> bool:
        """See above."""

    def image_spec(self, backbone: nn.Module) -> ImageSpec:
        """What images look like to the model."""

    def dataset(self, split: str, spec: ImageSpec, *, augment: bool = True) -> Dataset[Sample]:
        """The images of "train", "val" or "test"; only those of "test" have labels that are not seen.

        Those of "train" are augmented, unless it is not to train on them.
        """

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
    from mlhead.data.layouts import open_layout

    source: Source = SceneSource(config) if config.data == "scenes" else open_layout(config, bad_data, class_names)
    if class_names is not None and source.class_names != class_names:
        usage_fail("--data", f"that of the checkpoint, with its {len(class_names)} classes in its order", config.data)
    return source
