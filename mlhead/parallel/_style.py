"""`parallelize_head`: the classes of a head over several devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from .. import _check
from ..heads import CSRAHead, GAPHead, ZeroShotMLDecoder
from ..heads._base import Head
from ..heads._decoder import DecoderHead
from ._shards import ClassShards, placements

WHERE = "parallelize_head"


def parallelize_head(head: Any, mesh: DeviceMesh, *, input_layouts: Placement | None = None) -> Any:
    """Shards the classes of a head over the devices of a mesh, in place.

    Each device keeps the weight of its classes and computes their part of the logits or of the loss. Parameters of
    classes become DTensors, so that torch's optimizers, `torch.distributed.checkpoint` and FSDP2 treat them as what
    they are; all other parameters stay as they are. Any number of classes fits any number of devices.

        mesh = init_device_mesh("cuda", (8,), mesh_dim_names=("classes",))
        parallelize_head(model.head, mesh, input_layouts=Shard(0))
        loss = model(images, targets)            # every device with its own images, as in data-parallel training

    Args:
        head: A `GAPHead`, `CSRAHead`, `MLDecoder`, `TransformerDecoder` or `ZeroShotMLDecoder`, on the device of the
            mesh or on the meta device. Its parameters are taken from the mesh's first device.
        mesh: Of one axis: the devices that share the classes. Or of two named ones: over the first axis the head is
            replicated, and its gradients are averaged; over the second the classes are sharded.
        input_layouts: `Replicate()`, the default: the devices of a class group have the same features and targets, and
            the same state of the random generator. Only the loss and the gradient of the features are communicated, and
            of logits these. `Shard(0)`: each device has its own images, as many as the others; features and targets are
            exchanged too (of ML-Decoder only the decoded queries).

    Returns:
        The head. `head(features, targets)` is the loss over all classes and all images of the class group, the same
        number on each of its devices; `head(features)` the logits (B, C) of the images that were given, `head.topk` the
        best of all classes.

        Gradients of the classes' parameters are those of that loss. Of the features they are too with `Replicate()`.
        With `Shard(0)` they come multiplied by the number of devices of the class group, so that what made the features
        gets the right gradient when it is averaged over the devices, as DDP and FSDP do; DDP must leave out the
        parameters of classes (`class_parameters`).

    Raises:
        TypeError: The head, the mesh or the layout is of another kind.
        ValueError: The mesh has more than two axes, or two without names; or the head is sharded already, or has a bank
            of which a device would get no group of word vectors.

    Numerics:
        Those of the head, but for the order in which the gradient of the features and the loss are summed; under
        autocast each device rounds its part of that gradient to 16 bits.
    """
    if not isinstance(head, (GAPHead, CSRAHead, DecoderHead, ZeroShotMLDecoder)):
        _check.fail(WHERE, "head", "a head of mlhead.heads", type(head).__name__, TypeError)
    if not isinstance(mesh, DeviceMesh):
        _check.fail(WHERE, "mesh", "a DeviceMesh", type(mesh).__name__, TypeError)
    if mesh.ndim > 2 or (mesh.ndim == 2 and not mesh.mesh_dim_names):
        got = f"{mesh.ndim} axes{'' if mesh.mesh_dim_names else ' without names'}"
        _check.fail(WHERE, "mesh", "of one axis, or of two with names", got)
    layout = Replicate() if input_layouts is None else input_layouts
    if layout not in (Replicate(), Shard(0)):
        _check.fail(WHERE, "input_layouts", "Replicate() or Shard(0)", layout, TypeError)
    if head._shards is not None:
        _check.fail(WHERE, "head", "one that is not sharded yet", f"a {type(head).__name__} that is")
    own_images = isinstance(layout, Shard)
    C = head.num_classes
    if isinstance(head, ZeroShotMLDecoder):
        from ._zero_shot import shard_zero_shot

        shard_zero_shot(head, mesh, own_images)
    elif isinstance(head, DecoderHead):
        G, _, J = head.duplicate_pooling.shape
        head._shards = ClassShards(mesh, own_images, C, G, J)
        # In the form of the weight's groups, so that both are cut at the same places.
        bias = head.duplicate_pooling_bias.detach()
        rows = torch.cat([bias, bias.new_zeros(G * J - C)]).view(G, J)
        head.duplicate_pooling_bias = nn.Parameter(rows, head.duplicate_pooling_bias.requires_grad)
        _distribute(head, ("duplicate_pooling", "duplicate_pooling_bias"), mesh, 0)
    else:
        head._shards = ClassShards(mesh, own_images, C, C, 1)
        prefix, dim = ("fc.", 0) if isinstance(head, GAPHead) else ("", 1)
        names = [prefix + name for name in ("weight", "bias")]
        _distribute(head, [name for name, _ in head.named_parameters() if name in names], mesh, dim)
    return head


def _distribute(head: Head, names: Sequence[str], mesh: DeviceMesh, dim: int) -> None:
    """Replaces parameters by such that are sharded over axis `dim`."""
    head._class_parameters = tuple(names)
    for name in names:
        parameter = head.get_parameter(name)
        whole = distribute_tensor(parameter.detach(), mesh, placements(mesh, dim))
        owner, _, own_name = name.rpartition(".")
        setattr(head.get_submodule(owner), own_name, nn.Parameter(whole, parameter.requires_grad))


def class_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all sharded heads in a module of which each device has its classes, by their names in it.

    DDP has to leave them out: `DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model,
    class_parameters(model))`; so has FSDP2: `fully_shard(model, ignored_params=set(class_parameters(model).values()))`.
    """
    found = {}
    for prefix, head in module.named_modules():
        if isinstance(head, Head) and head._shards is not None:
            for name in head._class_parameters:
                found[f"{prefix}.{name}".removeprefix(".")] = head.get_parameter(name)
    return found
