"""Every option of a training run: the one place that the command line, the saved config and the checkpoints read.

Each field carries its help text, so that `mlhead train --help` and this file cannot disagree.
"""

# ruff: noqa: RUF009 (_option makes a dataclass field)

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlhead._usage import UsageError, closest, require, usage_fail

# Options that the task "classification" would not use.
ZERO_SHOT_ONLY = ("unseen", "word_vectors", "query_noise", "random_queries")

# Options of images in files: what their labels are, and for training how they are augmented; and of the scenes.
FOLDER_LABELS = (
    "layout",
    "labels",
    "val_labels",
    "image_column",
    "label_column",
    "label_delimiter",
    "classes",
    "val_fraction",
    "voc_difficult",
)
FOLDER_ONLY = (
    *FOLDER_LABELS,
    "crop_scale",
    "hflip",
    "auto_augment",
    "color_jitter",
    "random_erasing",
    "cutout",
    "normalize",
    "crop_pct",
)
SCENES_ONLY = ("num_classes", "train_length", "val_length", "long_tail", "unseen")

# What --fused-update can do inside backward.
FUSED_OPTIMIZERS = ("adamw", "sgd", "momentum")

# inf is not a Python literal, but temperatures need it; 1e999 is one, and is infinite.
_INF = re.compile(r"\binf\b")


def _option(default: Any, text: str, *, choices: tuple[str, ...] | None = None, least: float | None = None) -> Any:
    metadata = {"help": text, "choices": choices, "least": least}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class TrainConfig:
    """The options of one run."""

    out: str = _option("runs/train", "folder for checkpoints, logs and the config")
    task: str = _option(
        "classification",
        "'zero-shot' trains a head of word vectors on seen classes and tests it on unseen ones too",
        choices=("classification", "zero-shot"),
    )
    # Data
    data: str = _option(
        "scenes", "'scenes', which needs no download, or a folder: images with --labels, or a public layout"
    )
    num_classes: int = _option(100, "classes of the scenes: 10, 100, 1000 or 10000", least=1)
    layout: str = _option(
        "auto",
        "layout of the folder; auto: csv with --labels, else the one whose files are there",
        choices=("auto", "csv", "coco", "voc", "open-images", "wider", "image-folder", "tar", "nus-wide"),
    )
    labels: str | None = _option(None, "CSV or parquet file with a column of image paths and a column of labels")
    val_labels: str | None = _option(
        None, "the same for the validation images; without it --val-fraction of --labels is held out"
    )
    image_column: str = _option("image", "column of the image paths")
    label_column: str = _option("labels", "column of the labels")
    label_delimiter: str = _option(";", "what separates two labels in a cell")
    classes: str | None = _option(
        None, "text file of class names, one a line; by default the labels that occur, sorted"
    )
    val_fraction: float = _option(0.1, "share of the images held out for validation", least=0)
    voc_difficult: str = _option(
        "ignore",
        "voc: a class whose objects in an image are all difficult: 'ignore' is negative in training, not counted in "
        "tests",
        choices=("ignore", "positive", "negative"),
    )
    untagged_weight: float = _option(
        1.0, "weight in the loss of the labels that an image does not list, for sets with partial labels", least=0
    )
    on_bad_data: str = _option(
        "skip", "bad rows and unreadable images: report and skip, or stop", choices=("skip", "error")
    )
    image_size: int | None = _option(
        None, "height and width that the model sees; by default the backbone's or the scenes'", least=1
    )
    train_length: int = _option(20_000, "scenes in an epoch; each epoch has new ones", least=1)
    val_length: int = _option(2_000, "validation scenes", least=1)
    long_tail: bool = _option(False, "scenes: numbers as unlike in frequency as the labels of large sets")
    unseen: float = _option(0.2, "zero-shot, scenes: share of the numbers that no training scene shows", least=0)
    word_vectors: str | None = _option(
        None, "zero-shot: word vectors in place of the data's own: GloVe or word2vec file, or an array of all classes"
    )
    crop_scale: float = _option(
        0.5,
        "folder: smallest share of an image's area that a training crop keeps; 1 keeps all of it, squeezed",
        least=0,
    )
    hflip: float = _option(0.5, "folder: probability of mirroring a training image", least=0)
    auto_augment: str | None = _option(None, "folder: timm's name of an augmentation, e.g. rand-m9-mstd0.5-inc1")
    color_jitter: float = _option(
        0.4, "folder: strength of random brightness, contrast and saturation, without --auto-augment", least=0
    )
    random_erasing: float = _option(
        0.0, "folder: probability of filling a rectangle of a training image with noise", least=0
    )
    cutout: float = _option(
        0.0, "folder: side of the square cut out of training images, as a share of the image's; 0 for none", least=0
    )
    normalize: str = _option(
        "backbone",
        "folder: pixels' mean and std as the backbone was trained, or 'unit' for pixels from 0 to 1",
        choices=("backbone", "unit"),
    )
    crop_pct: float | None = _option(
        None, "folder: share of an image's shorter side seen at test time; by default all of it, squeezed", least=0
    )
    mixup: float = _option(0.0, "mixup of training batches: parameter of its beta distribution; 0 for none", least=0)
    cutmix: float = _option(0.0, "CutMix of training batches, as --mixup; with both, one of them is drawn", least=0)
    mix_threshold: float | None = _option(
        None, "labels of mixed images above it become 1, the others 0; by default they stay fractions", least=0
    )
    workers: int = _option(0, "processes that load data; 0 loads in the training process", least=0)
    # Model
    backbone: str = _option("small", "'small' (for the scenes), or any timm architecture")
    pretrained: bool = _option(False, "start the backbone from timm's published weights (downloads them)")
    init_backbone: str | None = _option(
        None, "checkpoint of a run with the same backbone, whose weights it starts from"
    )
    backbone_opt: dict[str, Any] = _option({}, "option of the backbone as name=value; may be repeated")
    head: str = _option(
        "ml_decoder",
        "classification head; 'zero_shot', the one for --task zero-shot, is chosen by it",
        choices=("gap", "csra", "ml_decoder", "transformer_decoder", "zero_shot"),
    )
    head_opt: dict[str, Any] = _option({}, "option of the head as name=value, e.g. groups=50; may be repeated")
    query_noise: float = _option(
        0.0,
        "zero-shot: noise on the queries in training, as a multiple of the word vectors' root mean square",
        least=0,
    )
    random_queries: int = _option(0, "zero-shot: random queries beside the classes in training", least=0)
    prior: bool = _option(True, "start the head's bias, where it has one, at the classes' share of the training labels")
    loss: str = _option("bce", "loss", choices=("bce", "asl", "softmax"))
    loss_opt: dict[str, Any] = _option({}, "option of the loss as name=value: gamma_neg=7, reduction=sum; repeatable")
    fused_loss: bool = _option(
        False,
        "train with the loss in the head, on sparse labels, without logits and dense targets; zero-shot always does",
    )
    fused_update: bool = _option(
        False,
        "with --fused-loss: backward updates the classes' weight block by block, whose gradient never exists; for "
        "--optimizer adamw, sgd or momentum",
    )
    # Optimisation
    epochs: float = _option(10.0, "length of the run", least=0)
    steps: int | None = _option(None, "length of the run in optimizer steps, in place of --epochs", least=1)
    batch_size: int = _option(64, "images in a batch, over all processes", least=1)
    accumulate: int = _option(1, "batches whose gradients are added up for one optimizer step", least=1)
    optimizer: str = _option("adamw", "any of timm's optimizers")
    optimizer_opt: dict[str, Any] = _option({}, "option of the optimizer as name=value, e.g. momentum=0.9")
    lr: float = _option(1e-3, "highest learning rate of the backbone", least=0)
    head_lr_mult: float = _option(1.0, "learning rate of the head, as a multiple of --lr", least=0)
    weight_decay: float = _option(0.02, "weight decay; biases and norms have none", least=0)
    schedule: str = _option("onecycle", "learning rate schedule", choices=("onecycle", "cosine"))
    warmup: float = _option(0.3, "share of the run in which the learning rate rises", least=0)
    clip_grad: float | None = _option(None, "largest norm of the gradient", least=0)
    ema: float = _option(0.0, "decay of the moving average of the weights, e.g. 0.999; 0 for none", least=0)
    ema_warmup: bool = _option(
        True, "the average follows faster at first: after step t with the decay 1 - (1 + t)^(-2/3), at most --ema"
    )
    amp: str = _option("none", "automatic mixed precision", choices=("none", "bf16", "fp16"))
    channels_last: bool = _option(True, "keep images and convolutions in channels-last order")
    # Running
    device: str = _option("auto", "'auto' (cuda if it is there), 'cpu', 'cuda', 'cuda:1', ...")
    seed: int = _option(0, "seed of the weights, the data and everything else that is random", least=0)
    eval_every: int | None = _option(None, "steps between evaluations; by default an epoch", least=1)
    checkpoint_every: int | None = _option(None, "steps between checkpoints; by default as --eval-every", least=1)
    metrics: str = _option(
        "all",
        "mAP, F1 and others, of scores that are all kept; or, for very many classes, P@k and nDCG@k of the best five, "
        "and for data in files these scored by propensity",
        choices=("all", "topk"),
    )
    log_every: int = _option(10, "steps between lines of the log", least=1)
    parallel: str | None = _option(
        None,
        "several processes under torchrun: 'ddp' (the default), a copy of the model for each, or 'fsdp', a part of it",
        choices=("none", "ddp", "fsdp"),
    )
    class_parallel: int = _option(0, "processes that share the classes of the head; 0 or 1: none does", least=0)
    sync_batch_norm: bool = _option(False, "batch norms see the images of all processes; on CUDA devices")

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            setattr(self, item.name, _checked(item, getattr(self, item.name)))
        for name in ("val_fraction", "warmup", "ema", "cutout"):
            if getattr(self, name) >= 1:
                usage_fail(flag(name), "below 1", getattr(self, name))
        for name in ("random_erasing", "hflip"):
            if getattr(self, name) > 1:
                usage_fail(flag(name), "a probability", getattr(self, name))
        if self.clip_grad == 0:
            usage_fail("--clip-grad", "above 0, or absent", self.clip_grad)
        if not 0 < self.crop_scale <= 1:
            usage_fail("--crop-scale", "above 0 and at most 1", self.crop_scale)
        if self.seed >= 2**63:
            usage_fail("--seed", "below 2^63", self.seed)
        if not self.label_delimiter:
            usage_fail("--label-delimiter", "at least one character", repr(self.label_delimiter))
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            usage_fail("--crop-pct", "above 0 and at most 1", self.crop_pct)
        self._check_mixing()
        if self.task == "zero-shot":
            if self.head not in ("ml_decoder", "zero_shot"):
                usage_fail("--head", "'zero_shot', or absent, for --task zero-shot", repr(self.head))
            self.head, self.fused_loss = "zero_shot", True
            if self.metrics != "all":
                usage_fail("--metrics", "'all' for --task zero-shot", repr(self.metrics))
        elif self.head == "zero_shot":
            usage_fail("--task", "'zero-shot' for --head zero_shot", repr(self.task))
        else:
            for item in dataclasses.fields(self):
                value = getattr(self, item.name)
                if item.name in ZERO_SHOT_ONLY and value != item.default:
                    usage_fail(flag(item.name), "absent without --task zero-shot", value)
        if self.untagged_weight > 1:
            usage_fail("--untagged-weight", "at most 1", self.untagged_weight)
        if self.untagged_weight < 1 and (self.fused_loss or self.loss == "softmax"):
            why = "--fused-loss, which has no logits to weigh" if self.fused_loss else "--loss softmax"
            usage_fail("--untagged-weight", f"1 with {why}", self.untagged_weight)
        if self.steps is None and self.epochs == 0:
            usage_fail("--epochs", "above 0", self.epochs)
        if self.fused_update:
            self._check_fused_update()

    def _check_fused_update(self) -> None:
        without: dict[str, tuple[bool, str]] = {
            "fused_loss": (self.fused_loss, "on"),
            "head": (self.head in ("gap", "ml_decoder", "transformer_decoder"), "gap or a decoder, no zero-shot one,"),
            "optimizer": (self.optimizer.lower() in FUSED_OPTIMIZERS, f"one of {', '.join(FUSED_OPTIMIZERS)}"),
            "clip_grad": (self.clip_grad is None, "absent"),
            "accumulate": (self.accumulate == 1, "1"),
            "amp": (self.amp != "fp16", "none or bf16"),
            "class_parallel": (self.class_parallel <= 1, "0"),
        }
        for name, (fits, must) in without.items():
            if not fits:
                usage_fail(flag(name), f"{must} with --fused-update", getattr(self, name))

    def _check_mixing(self) -> None:
        mixed = next((name for name in ("mixup", "cutmix") if getattr(self, name)), None)
        if mixed and (self.fused_loss or self.task == "zero-shot"):
            usage_fail(flag(mixed), "0 with the loss in the head, whose labels are not dense", getattr(self, mixed))
        if self.mix_threshold is not None and not mixed:
            usage_fail("--mix-threshold", "absent without --mixup or --cutmix", self.mix_threshold)

    def save(self, path: Path) -> None:
        """Writes every option as YAML, which `--config` reads."""
        yaml = require("yaml", "Saving the config")
        path.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False), encoding="utf-8")


def flag(name: str) -> str:
    """The command-line name of a field."""
    return "--" + name.replace("_", "-")


@functools.cache
def _hints() -> dict[str, Any]:
    return typing.get_type_hints(TrainConfig)


def field_type(item: dataclasses.Field[Any]) -> tuple[type, bool]:
    """The plain type of a field and whether None is allowed."""
    hint = _hints()[item.name]
    if isinstance(hint, types.UnionType):
        (plain,) = (part for part in typing.get_args(hint) if part is not type(None))
        return plain, True
    return (typing.get_origin(hint) or hint), False


def _checked(item: dataclasses.Field[Any], value: Any) -> Any:
    kind, optional = field_type(item)
    argument, least, choices = flag(item.name), item.metadata["least"], item.metadata["choices"]
    if value is None and optional:
        return None
    # YAML reads 1e-3, without a point, as text.
    if kind in (int, float) and isinstance(value, str):
        value = parse_number(argument, kind, value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        usage_fail(argument, _words(kind), repr(value))
    if least is not None and not value >= least:
        usage_fail(argument, f"at least {least:g}", value)
    if choices is not None and value not in choices:
        usage_fail(argument, f"one of {', '.join(choices)}", repr(value) + closest(str(value), choices))
    return value


def _words(kind: type) -> str:
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "name=value pairs"}[
        kind
    ]


def parse_number(argument: str, kind: type, text: str) -> Any:
    """A number from text, or UsageError naming the argument."""
    try:
        return kind(text)
    except ValueError:
        usage_fail(argument, _words(kind), repr(text))


def parse_pairs(argument: str, pairs: list[str]) -> dict[str, Any]:
    """Options from name=value texts: numbers, lists, True, None and inf are read as such, anything else is text."""
    result = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not name:
            usage_fail(argument, "name=value", repr(pair))
        result[name.replace("-", "_")] = _literal(text)
    return result


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(_INF.sub("1e999", text))
    except (ValueError, SyntaxError):
        return text


def load_config(path: Path) -> dict[str, Any]:
    """Options from a YAML or JSON file.

    Raises:
        UsageError: no such file, not a mapping, or an unknown option.
    """
    return check_names(read_mapping("--config", path), f"--config {path}")


def read_mapping(argument: str, path: Path) -> dict[str, Any]:
    """What a YAML or JSON file maps names to.

    Raises:
        UsageError: no such file, or not a mapping; the message begins with the argument.
    """
    yaml = require("yaml", f"Reading {argument}")
    if not path.is_file():
        usage_fail(argument, "an existing YAML or JSON file", path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"{argument} must be a YAML or JSON file, got {path}: {reason}") from error
    if not isinstance(values, Mapping):
        usage_fail(argument, "a mapping of options", f"{type(values).__name__} in {path}")
    return dict(values)


def check_names(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The options, if all of them exist."""
    known = [item.name for item in dataclasses.fields(TrainConfig)]
    for name in map(str, values):
        if name not in known:
            usage_fail(source, "made of known options", repr(name) + closest(name, known))
    return dict(values)
