"""The classes of a head on the devices of a mesh: which are here, and the last layer over all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from .. import _check
from ..ops import SparseTargets
from ..ops.topk import first_largest
from . import _targets
from ._moves import (
    AllColumns,
    GatherRows,
    OwnColumns,
    RowsToShards,
    ShardsToRows,
    Sum,
    SumGradients,
    all_rows,
    all_sum,
    own_rows_of_shards,
)


class ClassShards:
    """How the classes of a head lie on a mesh.

    Args:
        mesh: Of one axis, over which the classes are sharded, or of two: over the first the head is replicated.
        own_images: Whether every device has its own images, or those of a class group have the same.
        num_classes: C.
        blocks: What is sharded: G groups, or C classes.
        step: How many classes that is each, J or 1.
    """

    def __init__(self, mesh: DeviceMesh, own_images: bool, num_classes: int, blocks: int, step: int) -> None:
        self.mesh, self.own_images, self.num_classes = mesh, own_images, num_classes
        classes = mesh if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[-1]]  # type: ignore[index]
        self.data = None if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[0]].get_group()  # type: ignore[index]
        self.group = classes.get_group()
        self.devices, self.rank = classes.size(), classes.get_local_rank()
        self.blocks_each = -(-blocks // self.devices)
        self.first_block = min(self.rank * self.blocks_each, blocks)
        self.own_blocks = min(self.blocks_each, blocks - self.first_block)
        self.size = self.blocks_each * step  # the most classes of a device
        self.first = min(self.first_block * step, num_classes)
        self.own = min(self.own_blocks * step, num_classes - self.first)

    def __deepcopy__(self, memo: Any) -> ClassShards:
        return self  # a copy of the head lies where the head does; process groups cannot be copied

    @property
    def stop(self) -> int:
        """The class behind the last one here."""
        return self.first + self.own

    def local(self, parameter: Tensor) -> Tensor:
        """The part of a parameter that is here; its gradient is the mean over the replicas, where there are some."""
        if self.data is None:
            return parameter.to_local()  # type: ignore[attr-defined]
        return _Local.apply(parameter, self.data)

    def _check_batch(self, x: Tensor) -> None:
        """Raises where a device has more images than another; a GPU would have to be waited for to find out."""
        if not self.own_images or x.device.type != "cpu":
            return
        sizes = all_rows(torch.tensor([len(x)]), self.group).tolist()
        if len(set(sizes)) > 1:
            _check.fail("parallelize_head", "features", "of as many images on every device", sizes)

    def enter(self, x: Tensor) -> Tensor:
        """Features of the images of the class group, for use with the classes that are here."""
        self._check_batch(x)
        return GatherRows.apply(x, self.group) if self.own_images else SumGradients.apply(x, self.group)

    def enter_mask(self, mask: Tensor | None) -> Tensor | None:
        """A mask (B, L) of the images of the class group."""
        return mask if mask is None or not self.own_images else all_rows(mask.to(torch.uint8), self.group).bool()

    def enter_groups(self, h: Tensor) -> Tensor:
        """Embeddings (B, G, E) of the images of the class group, of the groups that are here."""
        self._check_batch(h)
        if self.own_images:
            return RowsToShards.apply(h, self.own_blocks, self.blocks_each, self.group)
        return OwnColumns.apply(h, self.first_block, self.own_blocks, self.blocks_each, self.group)

    def logits(self, own: Tensor) -> Tensor:
        """Logits (B, C) of this device's images, of those (., n) of the classes that are here."""
        if self.own_images:
            return ShardsToRows.apply(own, self.size, self.num_classes, self.group)
        return AllColumns.apply(own, self.first, self.size, self.num_classes, self.group)

    def loss(self, run: Callable[..., Tensor], x: Tensor, targets: Any, options: dict[str, Any]) -> Tensor:
        """The loss over all classes and all images of the class group.

        Args:
            run: (targets, **options) -> the loss of the classes that are here.
            x: What goes into the last layer, of all images of the class group.
            targets: As the head was given them.
            options: Of the loss, for all classes and this device's images.
        """
        where, group = "parallelize_head", self.group if self.own_images else None
        options, batch, dtype = dict(options), len(x), torch.promote_types(x.dtype, torch.float32)
        kind, C = options.get("loss", "bce"), self.num_classes
        targets, ignore = _targets.as_dense_or_sparse(where, targets, options.pop("ignore", None), kind, C)
        own_batch = batch if group is None else batch // self.devices
        for name, value in (("targets", targets), ("ignore", ignore)):
            rows = value.batch if isinstance(value, SparseTargets) else None if value is None else len(value)
            if rows not in (None, own_batch):
                _check.fail(where, name, f"of B = {own_batch} rows", rows)
        for name, size in (("sample_weight", own_batch), ("class_weight", C), ("pos_weight", C)):
            if options.get(name) is not None:
                letters = "(B,)" if name == "sample_weight" else "(C,)"
                _check.check_shape(where, name, options[name], letters, (size,))
        own = self.first, self.stop, self.size, dtype, group
        targets, ignore = (_targets.own_classes(t, *own) for t in (targets, ignore))
        mean = options.pop("reduction", "mean") == "mean"
        factor = 1.0 / max(1, batch if kind == "softmax" else batch * C) if mean else 1.0
        weight = options.pop("sample_weight", None)
        if weight is not None and group is not None:
            weight = all_rows(weight.contiguous(), group)
        # The factor goes with the images, so that no gradient has to be multiplied by it afterwards.
        if weight is None:
            weight = torch.full((batch,), factor, dtype=dtype, device=x.device)
        else:
            weight = weight.to(dtype) * factor
        for name in ("class_weight", "pos_weight"):
            if options.get(name) is not None:
                options[name] = options[name][self.first : self.stop]
        smoothing = options.get("label_smoothing", 0.0)
        if kind == "softmax":
            if smoothing:
                targets, options["label_smoothing"] = _smoothed(targets, smoothing, self.own / C, dtype)
            options["class_group"] = self.group.group_name
        loss = run(targets, **options, ignore=ignore, reduction="sum", sample_weight=weight)
        return loss if kind == "softmax" else Sum.apply(loss, self.group)

    def topk(self, k: int, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The k best of the best of every device, for this device's images; `found` has at most k classes."""
        scores, classes = found
        missing = k - scores.shape[1]
        if missing:
            lowest = scores.new_full((len(scores), missing), -torch.inf)
            scores = torch.cat([scores, lowest], 1)
            classes = torch.cat([classes, classes.new_full((len(classes), missing), -1)], 1)
        classes = torch.where(classes < 0, classes, classes + self.first)
        if self.own_images:
            scores, classes = (own_rows_of_shards(t, k, self.devices * k, self.group) for t in (scores, classes))
        else:
            scores, classes = (
                all_rows(t, self.group).unflatten(0, (self.devices, -1)).transpose(0, 1).flatten(1, 2)
                for t in (scores, classes)
            )
        # Where a device has fewer classes, what fills its part goes to the right: a real score may be -inf too.
        order = torch.argsort((classes < 0).to(torch.uint8), dim=1, stable=True)
        scores, classes = scores.gather(1, order), classes.gather(1, order)
        best, columns = first_largest(scores, k)
        return best, classes.gather(1, columns)

    def rows(self, parameter: Tensor, dim: int, indices: Tensor) -> Tensor:
        """Chosen classes of a parameter that is sharded over axis `dim`, on every device and without a gradient."""
        own = parameter.detach().to_local()  # type: ignore[attr-defined]
        here = (indices >= self.first) & (indices < self.stop)
        place = torch.where(here, indices - self.first, 0)
        if self.own == 0:
            chosen = own.new_zeros(*own.shape[:dim], *indices.shape, *own.shape[dim + 1 :])
        else:
            chosen = own.index_select(dim, place.flatten()).unflatten(dim, indices.shape)
            chosen = chosen * here.view(*indices.shape, *(1,) * (own.ndim - 1 - dim))
        return all_sum(chosen, self.group)


class _Local(torch.autograd.Function):
    """The local part of a parameter that is sharded over one axis of a mesh and replicated over another."""

    @staticmethod
    def forward(ctx: Any, parameter: DTensor, data: Any) -> Tensor:
        ctx.like, ctx.data = parameter, data
        return parameter.to_local().detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        p: DTensor = ctx.like
        mean = all_sum(grad, ctx.data) / dist.get_world_size(ctx.data)
        whole = DTensor.from_local(mean, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
        return whole, None


def _smoothed(targets: Any, smoothing: float, share: float, dtype: torch.dtype) -> tuple[Any, float]:
    """Softmax targets y (1 - s) + s / C as those of a shard of n = share * C classes: y' (1 - s') + s' / n."""
    own = smoothing * share
    factor = (1.0 - smoothing) / (1.0 - own)
    if isinstance(targets, SparseTargets):
        values = torch.ones(len(targets.indices), dtype=dtype, device=targets.indices.device)
        values = values if targets.values is None else targets.values.to(dtype)
        return targets._replace(values=values * factor), own
    return targets.to(dtype) * factor, own


def placements(mesh: DeviceMesh, dim: int) -> list[Any]:
    """Sharded over axis `dim` on the last axis of the mesh, replicated on the others."""
    return [*(Replicate() for _ in range(mesh.ndim - 1)), Shard(dim)]
