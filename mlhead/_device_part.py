"""What one device of a run keeps of its model, and what it takes besides: sizes, found on the meta device.

The layout is that of mlhead/_spread.py; how many classes a device has, and what comes to it, is for
`mlhead.parallel.step_traffic` to say. Of devices that differ it is the one that has most.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Shard

from mlhead._spread import Spread, _stages
from mlhead.backbones import HeadedModel
from mlhead.heads import ZeroShotMLDecoder
from mlhead.parallel import step_traffic
from mlhead.parallel._traffic import _blocks, _numbers_of_a_class


def classes_of_a_device(head: Any, devices: int) -> int:
    """How many classes a device has, with the empty places of the last group."""
    blocks, step = _blocks(head)
    return -(-blocks // devices) * step


def keep_part(model: HeadedModel, spread: Spread) -> None:
    """Leaves of the parameters and word vectors of a model on the meta device what one device has, in place."""
    head, own = model.head, _class_parameters(model, spread)
    for name, numbers in own.items():
        size = classes_of_a_device(head, spread.classes)
        _put(model, name, (size, numbers) if numbers > 1 else (size,))
    if spread.classes > 1 and isinstance(head, ZeroShotMLDecoder):
        for name in tuple(head.banks.sizes):
            head.use(name)
            head.set_bank(name, head.bank(name)[: classes_of_a_device(head, spread.classes)])
    if spread.kind == "fsdp":
        for name, parameter in tuple(model.named_parameters()):
            if name not in own and parameter.ndim:
                _put(model, name, (-(-len(parameter) // spread.processes.world), *parameter.shape[1:]))


def exchanged_features(model: HeadedModel, spread: Spread, batch: int, positions: int, dtype: torch.dtype) -> int:
    """Bytes of the features that a device has of the images of all that share its classes, and of their gradient.

    Args:
        model: whole, on the meta device.
        spread: where it will lie.
        batch: the images of one device.
        positions: of the features.
        dtype: of the features.
    """
    if spread.classes == 1:
        return 0
    traffic = step_traffic(model.head, spread.classes, batch, positions=positions, input_layouts=Shard(0), dtype=dtype)
    # The gradients that leave a device are those of what has come to it.
    come = sum(move.payload for move in traffic.moves if move.purpose == "feature_gradients")
    # A zero-shot head makes keys and values of the features that come.
    return 2 * come * (3 if isinstance(model.head, ZeroShotMLDecoder) else 1)


def copies(model: HeadedModel, spread: Spread) -> dict[str, int]:
    """Bytes of what DDP or FSDP2 has besides weights and gradients, by what it is.

    DDP averages the gradients in buckets, copies of them. FSDP2 has the weights and gradients of two blocks whole at a
    time, for one of them travels while the other computes, and those of all that is in no block from forward to the end
    of backward.

    Args:
        model: whole, on the meta device.
        spread: where it will lie.
    """
    own = _class_parameters(model, spread)
    outside = [p for name, p in model.named_parameters() if name not in own]
    if spread.kind == "ddp":
        return {"buckets of ddp": sum(_bytes(p) for p in outside if p.requires_grad)}
    if spread.kind == "fsdp":
        blocks = [sum(map(_bytes, block.parameters())) for block in _stages(model.backbone)]
        return {"gathered by fsdp": 2 * (sum(map(_bytes, outside)) - sum(blocks) + 2 * max(blocks, default=0))}
    return {}


def _class_parameters(model: HeadedModel, spread: Spread) -> dict[str, int]:
    """The parameters that are sharded by classes, by name, and how many numbers of each belong to a class."""
    if spread.classes == 1 or isinstance(model.head, ZeroShotMLDecoder):
        return {}
    numbers = {f"head.{name}": _numbers_of_a_class(model.head, name) for name, _ in model.head.named_parameters()}
    return {name: number for name, number in numbers.items() if number}


def _bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.itemsize


def _put(model: HeadedModel, name: str, shape: tuple[int, ...]) -> None:
    owner, _, last = name.rpartition(".")
    parameter = model.get_parameter(name)
    setattr(model.get_submodule(owner), last, nn.Parameter(parameter.new_empty(shape), parameter.requires_grad))
