"""What a checkpoint is for: measuring it on data, naming the classes of images, and showing where each class looks."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from mlhead import building, visualize
from mlhead._config import TrainConfig
from mlhead._progress import Progress
from mlhead._usage import UsageError, closest, require, usage_fail
from mlhead.backbones import HeadedModel
from mlhead.checkpoints import CheckpointError, damaged, load_checkpoint, not_written, replace_atomically
from mlhead.data.folder import open_image
from mlhead.data.loading import BadSample, Sample, evaluation_loader
from mlhead.data.reporting import BadDataLog
from mlhead.data.sources import ImageSpec, Source, open_source
from mlhead.evaluation import choose_device, evaluate, new_metrics
from mlhead.metrics import MultiLabelMetrics, TopKMetrics, ZeroShotMetrics


class Loaded(NamedTuple):
    """A trained model in evaluation mode, and what it was trained with."""

    model: HeadedModel
    config: TrainConfig
    image_spec: ImageSpec
    class_names: list[str]
    step: int
    device: torch.device
    num_seen: int  # the classes before this one were trained


class Prediction(NamedTuple):
    """The classes of one image, best first, and where each of them looks: heat (H, W) in [0, 1]."""

    picture: NDArray[np.uint8]
    names: list[str]
    scores: list[float]
    heats: NDArray[np.float32]


def load_model(path: Path, *, device: str = "auto", weights: str = "auto") -> Loaded:
    """The model of a checkpoint.

    Args:
        path: of a checkpoint, or of what `export_model` wrote.
        device: as `--device`.
        weights: "ema" for the moving average, "model" for the weights themselves, "auto" for the first that is there.

    Raises:
        CheckpointError: the file is missing or damaged.
        UsageError: the moving average is asked for and the run had none.
    """
    state, chosen = _weights(path, weights)
    config = TrainConfig(**state["config"])
    spec = ImageSpec(**state["image_spec"])
    num_seen = state.get("num_seen") or len(state["class_names"])
    model = building.build_model(config, num_seen, spec.channels, load_weights=False)
    try:
        model.load_state_dict(chosen)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UsageError(f"checkpoint {path} does not fit the model that its options describe: {reason}") from error
    if config.task == "zero-shot":
        model.head.use("union")  # type: ignore[operator]
    chosen_device = choose_device(device)
    model = model.to(chosen_device).eval()
    return Loaded(model, config, spec, state["class_names"], state["step"], chosen_device, num_seen)


def _weights(path: Path, weights: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What a checkpoint, or a file of `export_model`, says of its model, and the weights that are asked for."""
    if path.suffix == ".safetensors":
        return _exported(path, weights)
    state = load_checkpoint(path, mmap=True)  # the optimizer's tensors are not wanted
    if weights == "ema" and state["ema"] is None:
        usage_fail("--weights", "'model' for a run without --ema", "'ema'")
    return state, state["ema"] if weights != "model" and state["ema"] is not None else state["model"]


def export_model(path: Path, out: Path, *, weights: str = "auto") -> None:
    """Writes the model of a checkpoint as one safetensors file, atomically; `load_model` takes it like a checkpoint.

    Args:
        path: of a checkpoint.
        out: of the file. Its tensors have the names of the model's state dict; its metadata say what model it is.
        weights: as of `load_model`.

    Raises:
        CheckpointError: the checkpoint is missing or damaged, or the file could not be written.
        UsageError: safetensors is not installed.
    """
    safetensors = require("safetensors.torch", "mlhead export")
    if out.suffix != ".safetensors":
        usage_fail("OUT", "a name that ends in .safetensors", out)
    state, chosen = _weights(path, weights)
    facts = {name: state.get(name) for name in _FACTS} | {"weights": "model" if chosen is state.get("model") else "ema"}
    tensors, metadata = _apart(chosen), {"format": "pt", "mlhead": json.dumps(facts)}
    try:
        replace_atomically(out, lambda name: safetensors.save_file(tensors, name, metadata))
    except (OSError, require("safetensors", "mlhead export").SafetensorError) as error:
        raise CheckpointError(not_written(out, error)) from error


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor contiguous and in memory of its own, as the format asks for."""
    apart, taken = {}, set()
    for name, tensor in tensors.items():
        memory = tensor.untyped_storage()
        own = tensor.is_contiguous() and memory.nbytes() == tensor.nbytes and memory.data_ptr() not in taken
        taken.add(memory.data_ptr())
        apart[name] = tensor if own else tensor.clone(memory_format=torch.contiguous_format)
    return apart


# What a model needs besides its weights.
_FACTS = ("config", "image_spec", "class_names", "num_seen", "step")


def _exported(path: Path, weights: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    safetensors = require("safetensors", "Reading a safetensors file")
    if not path.is_file():
        raise CheckpointError(f"checkpoint must be an existing file, got {path}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            facts = (file.metadata() or {}).get("mlhead")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dictionary)
    except safetensors.SafetensorError as error:
        raise CheckpointError(damaged(path, str(error))) from error
    if facts is None:
        raise CheckpointError(f"checkpoint must be written by mlhead export, got {path}, which has no such metadata")
    state = json.loads(facts)
    if weights not in ("auto", state["weights"]):
        usage_fail("--weights", f"'{state['weights']}', the weights that {path} has", repr(weights))
    return state, tensors


def evaluate_checkpoint(
    path: Path,
    *,
    split: str | None = None,
    changes: dict[str, Any] | None = None,
    device: str = "auto",
    weights: str = "auto",
    stream: Any = None,
) -> dict[str, float]:
    """The metrics of a checkpoint on a split of its own data, or of other data given by `changes` to its options.

    Args:
        path: of a checkpoint, or of what `export_model` wrote.
        split: "train", "val" or "test"; None for "test", or for "val" where the data has no images for "test".
        changes: options of the run to change, by name.
        device: as `load_model`.
        weights: as `load_model`.
        stream: where progress goes, by default stderr.

    Raises:
        CheckpointError: as of `load_model`.
        UsageError: as of `load_model`, or the data cannot be used or has no image of the split.
    """
    loaded = load_model(path, device=device, weights=weights)
    changes = dict(changes or {})
    if changes.keys() & {"data", "labels"}:
        # What names the run's own labels says nothing of other images; another table may have the same columns.
        names = ["layout", "val_labels", "voc_difficult"]
        if "labels" not in changes:
            names += ["labels", "image_column", "label_column"]
        defaults = {item.name: item.default for item in dataclasses.fields(TrainConfig)}
        changes = {**{name: defaults[name] for name in names}, **changes}
    config = TrainConfig(**{**vars(loaded.config), **changes})
    say = Progress(0, "", stream=stream).say
    bad_data = BadDataLog(config.on_bad_data, say)
    source = open_source(config, bad_data, loaded.class_names)
    split, dataset = _images(source, split, loaded.image_spec, say)
    say(f"{len(dataset)} images of the {split} split")  # type: ignore[arg-type]
    scores: MultiLabelMetrics | ZeroShotMetrics | TopKMetrics
    if config.task == "zero-shot" and split == "test":  # the other splits know no unseen class
        scores = ZeroShotMetrics(loaded.num_seen, len(loaded.class_names), device=loaded.device)
    else:
        scores = new_metrics(config, loaded.num_seen, loaded.device, source)
        if config.task == "zero-shot":
            loaded.model.head.use("train")  # type: ignore[operator]
    classes = len(loaded.class_names) if isinstance(scores, ZeroShotMetrics) else loaded.num_seen
    sparse = isinstance(scores, TopKMetrics)
    loader = evaluation_loader(dataset, classes, config.batch_size, workers=config.workers, sparse=sparse)
    progress = Progress(len(loader), f"evaluating {split}", unit_size=config.batch_size, stream=stream)
    metrics = evaluate(loaded.model, loader, config, scores, loaded.device, bad_data, progress)
    progress.close()
    if summary := bad_data.summary():
        say(summary)
    return metrics


def _images(
    source: Source, split: str | None, spec: ImageSpec, say: Callable[[str], None]
) -> tuple[str, Dataset[Sample]]:
    """The images to measure on, and of which split they are."""
    if split is not None:
        return split, source.dataset(split, spec, augment=False)
    try:
        return "test", source.dataset("test", spec)
    except UsageError:
        found = source.dataset("val", spec)
    say("the data has no images for the test split: this is the val split")
    return "val", found


@torch.no_grad()
def predict_tensor(
    loaded: Loaded, image: Tensor, *, top: int = 5, threshold: float = 0.5, names: Sequence[str] | None = None
) -> Prediction:
    """The classes of one normalised image: those at or above the threshold, at most `top`, and at least the best one.

    Args:
        loaded: the model.
        image: (channels, H, W).
        top: most classes.
        threshold: lowest probability.
        names: the classes to show in the place of these, in this order.

    Raises:
        UsageError: the model has no class of that name.
    """
    if names is not None:
        chosen = torch.tensor(_classes(loaded, names), device=loaded.device)
    images = image.unsqueeze(0).to(loaded.device)
    features = loaded.model.forward_features(images)
    logits = building.scores_as_logits(loaded.config, loaded.model.head(features).float())
    if names is None:
        best, classes = logits[0].topk(min(top, len(loaded.class_names)))  # sigmoids of high logits are all 1
        count = max(1, int((best.sigmoid() >= threshold).sum()))
        best, classes = best[:count], classes[:count]
    else:
        best, classes = logits[0, chosen], chosen
    scores = best.sigmoid()
    attention = loaded.model.head.attention_maps(features, classes)[0]  # type: ignore[operator]
    picture = loaded.image_spec.to_picture(image)
    heats = visualize.heat_maps(attention, features, *picture.shape[:2])
    return Prediction(picture, [loaded.class_names[c] for c in classes.tolist()], scores.tolist(), heats)


def _classes(loaded: Loaded, names: Sequence[str]) -> list[int]:
    """The numbers of the classes of some names."""
    number_of = {name: number for number, name in enumerate(loaded.class_names)}
    for name in names:
        if name not in number_of:
            usage_fail("--label", "a class of the model", repr(name) + closest(name, loaded.class_names))
    return [number_of[name] for name in names]


def predict_files(
    loaded: Loaded,
    paths: Sequence[Path],
    *,
    top: int = 5,
    threshold: float = 0.5,
    names: Sequence[str] | None = None,
) -> list[Prediction | BadSample]:
    """Predictions for image files, in order; a file that cannot be read gives a `BadSample` with the reason.

    Arguments and errors are those of `predict_tensor`.
    """
    if names is not None:
        _classes(loaded, names)
    transform = loaded.image_spec.transform()
    results: list[Prediction | BadSample] = []
    for path in paths:
        image = open_image(path, loaded.image_spec.mode)
        if isinstance(image, BadSample):
            results.append(image)
        else:
            results.append(predict_tensor(loaded, transform(image), top=top, threshold=threshold, names=names))
    return results


def save_prediction(prediction: Prediction, path: Path, title: str = "") -> None:
    """A picture of the image and, for each class, of where it looks."""
    row = [visualize.Panel(prediction.picture, "image")]
    for name, score, heat in zip(prediction.names, prediction.scores, prediction.heats, strict=True):
        row.append(visualize.Panel(prediction.picture, f"{name}  {score:.2f}", heat))
    visualize.panel_grid([row], path, title=title)
