"""What a training run would be, without running it: options and where they are from, size, FLOPs and memory.

The model is built on the meta device, so that no weight is made, read or downloaded.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mlhead import _device_part, building
from mlhead._config import TrainConfig
from mlhead._spread import Spread
from mlhead._usage import usage_fail
from mlhead.backbones import HeadedModel
from mlhead.data.reporting import BadDataLog
from mlhead.data.sources import ImageSpec, SceneSource, backbone_image_spec, open_source, seen_then_unseen
from mlhead.distributed import Processes
from mlhead.evaluation import AMP_DTYPES
from mlhead.flops import register_flop_formulas
from mlhead.heads._decoder import DecoderHead
from mlhead.memory import head_memory
from mlhead.recipes import Recipe

META = torch.device("meta")


@dataclass(frozen=True)
class Plan:
    """What is known of a run before it begins.

    Attributes:
        classes: that are trained, and those that are only described by word vectors.
        image: channels, height, width.
        backbone, head: numbers of parameters; the norm between them counts as the backbone's.
        flops: of one image in evaluation, two for a multiply-add.
        devices: that train together.
        images: of a step, on each of them.
        here: classes of one device, with those that only fill its last group; all without --class-parallel.
        bytes: of a training step on one device, by what holds them; None for what could not be found.
    """

    classes: tuple[int, int]
    image: tuple[int, int, int]
    backbone: int
    head: int
    flops: int
    devices: int
    images: int
    here: int
    bytes: dict[str, int | None]


def plan(config: TrainConfig, *, given_classes: bool, given_data: bool, processes: int = 1) -> Plan:
    """Size, FLOPs and memory of a run.

    Args:
        config: the options of a run.
        given_classes: whether `config.num_classes` is to be believed where the data are not scenes.
        given_data: whether `config.data` was asked for; if not, there are images of three channels somewhere.
        processes: that train together, one on each device. Where there is only this one, the run that is meant has as
            many as --class-parallel says.

    Raises:
        UsageError: the classes are not known, the model cannot be built, or the options do not fit the processes.
    """
    world = processes if processes > 1 else max(1, config.class_parallel)
    spread = Spread(config, Processes(world=world), torch.device(_device_type(config)))
    scenes = given_data and config.data == "scenes"
    counts, vectors = _classes(config, scenes, given_classes, given_data)
    channels = 1 if scenes else 3
    with META:
        bank = None if vectors is None else torch.empty(vectors)
        model = building.build_model(config, counts[0], channels, word_vectors=bank, load_weights=False)
    spec = SceneSource(config).image_spec(model) if scenes else backbone_image_spec(config, model.backbone)
    return Plan(
        counts,
        (channels, spec.height, spec.width),
        _count(model.backbone) + _count(model.norm),
        _count(model.head),
        _flops(model, spec),
        world,
        config.batch_size // world,
        _device_part.classes_of_a_device(model.head, spread.classes) if spread.classes > 1 else counts[0],
        _memory(config, model, spec, spread),
    )


def _classes(
    config: TrainConfig, scenes: bool, given_classes: bool, given_data: bool
) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """Trained and other classes, and for a zero-shot run the shape of the word vectors."""
    total = config.num_classes
    if scenes or (given_data and not given_classes and Path(config.data).exists()):
        source = open_source(config, BadDataLog("skip", lambda line: None))
        vectors = source.word_vectors
        counts = (source.num_seen, len(source.class_names) - source.num_seen)
        return counts, None if vectors is None else (len(source.class_names), vectors.shape[1])
    if not given_classes:
        usage_fail("--num-classes", "given for --dry-run where the data is not there", None)
    if config.task != "zero-shot":
        return (total, 0), None
    _, seen = seen_then_unseen(total, config.unseen)
    return (seen, total - seen), (total, config.head_opt.get("word_dim", 300))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _images(spec: ImageSpec, batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(batch, spec.channels, spec.height, spec.width, dtype=dtype, device=META)


def _flops(model: HeadedModel, spec: ImageSpec) -> int:
    register_flop_formulas()
    model.eval()
    with META, torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(_images(spec, 1))
    return counter.get_total_flops()


def _device_type(config: TrainConfig) -> str:
    return "cpu" if config.device == "cpu" else "cuda"


def _memory(config: TrainConfig, model: HeadedModel, spec: ImageSpec, spread: Spread) -> dict[str, int | None]:
    """Bytes of a training step on one device; the model is of no use afterwards."""
    batch, dtype = config.batch_size // spread.processes.world, AMP_DTYPES[config.amp]
    part = copy.deepcopy(model)
    _device_part.keep_part(part, spread)
    weights = sum(p.numel() * p.itemsize for p in part.parameters())
    updated = part.head.class_parameter if config.fused_update else None
    gradients = sum(p.numel() * p.itemsize for p in part.parameters() if p.requires_grad and p is not updated)
    buffers = sum(b.numel() * b.itemsize for b in part.buffers())
    head: Any = model.head
    weight = head.class_parameter
    loss = head_memory(
        model.num_classes,
        model.num_features if weight is None else weight.shape[1],
        batch,
        groups=head.groups if isinstance(head, DecoderHead) else 1,
        loss_in_head=config.fused_loss,
        fused_update=config.fused_update,
        device=_device_type(config),
        devices=spread.classes,
        own_images=spread.classes > 1,
        autocast=dtype if config.amp != "none" and config.fused_loss and weight is not None else None,
    )
    more = _device_part.copies(model, spread)
    if spread.classes > 1:
        with META, torch.no_grad():
            positions = model.forward_features(_images(spec, 1)).numel() // model.num_features
        more["exchanged features"] = _device_part.exchanged_features(model, spread, batch, positions, dtype)
    return {
        "weights": weights + buffers,
        "gradients": gradients,
        f"state of {config.optimizer}": _optimizer_state(config, part),
        "moving average": weights + buffers if config.ema else 0,
        "activations": _activations(model, spec, batch, dtype),
        "logits and loss": loss.logits + loss.scratch + loss.casts,
        **more,
    }


def _optimizer_state(config: TrainConfig, model: HeadedModel) -> int | None:
    """What the optimizer keeps after a step, or None where it cannot step on the meta device."""
    optimizer = building.build_optimizer(config, model)
    for parameter in model.parameters():
        parameter.grad = torch.empty_like(parameter)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError):
        return None
    finally:
        optimizer.zero_grad()
    kept = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    update = building.build_update(config, model)
    if update is not None:
        (group,) = update.param_groups
        kept += [make() for make in update.new_states(group, group["params"][0], 1).values()]
    return sum(value.numel() * value.itemsize for value in kept)


def _activations(model: HeadedModel, spec: ImageSpec, batch: int, dtype: torch.dtype) -> int | None:
    """What forward keeps for backward beside weights, all of it in one dtype; None where forward needs real numbers."""
    model.train().to(dtype)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    try:
        with META, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model(_images(spec, batch, dtype))
    except (RuntimeError, NotImplementedError):
        return None
    return sum(storage.nbytes() for key, storage in kept.items() if key not in own)


def report(config: TrainConfig, origins: Mapping[str, str], recipe: Recipe | None = None, *, processes: int = 1) -> str:
    """Everything that is resolved, as text: each option with where it is from, then the `Plan`.

    Args:
        config: the options of a run.
        origins: for each option that is not at its default, where it is from.
        recipe: the recipe that was asked for, or None.
        processes: as for `plan`.
    """
    given_data = "data" in origins or recipe is None
    lines = [f"recipe {recipe.name}: {recipe.score() or 'of your own'}", recipe.notes] if recipe else []
    lines = [line for line in lines if line] + ["options"]
    for item in dataclasses.fields(config):
        value, origin = getattr(config, item.name), origins.get(item.name, "default")
        default = item.default if item.default_factory is dataclasses.MISSING else item.default_factory()
        if origin == "default" and value != default:
            origin = "--task"  # which chooses head and loss
        shown = "not given" if item.name == "data" and not given_data else str(value)
        lines.append(f"  {item.name:18} {shown:24} {origin}")
    found = plan(config, given_classes="num_classes" in origins, given_data=given_data, processes=processes)
    seen, unseen = found.classes
    where = "one device"
    if found.devices > 1:
        where = f"one of {found.devices} devices, {found.images:,} on each"
    lines += [
        "model",
        f"  {'classes':18} {seen:,}" + (f" trained, {unseen:,} known by word vectors alone" if unseen else ""),
        f"  {'image':18} {' x '.join(map(str, found.image))}",
        f"  {'backbone':18} {found.backbone:,} parameters",
        f"  {'head':18} {found.head:,} parameters",
        f"  {'FLOPs of an image':18} {found.flops / 1e9:.2f} G, two for a multiply-add",
        f"memory of a step of {config.batch_size:,} images on {where}, "
        "an estimate without temporaries of the optimizer",
    ]
    if found.here != seen:
        lines.append(f"  {'classes here':18} {found.here:,}")
    for name, size in found.bytes.items():
        lines.append(f"  {name:18} " + ("not included, needs real numbers" if size is None else f"{size / 1e9:.3f} GB"))
    lines.append(f"  {'sum':18} {sum(size or 0 for size in found.bytes.values()) / 1e9:.3f} GB")
    return "\n".join(lines)
