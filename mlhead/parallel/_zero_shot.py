"""Banks of word vectors over several devices: each decodes the queries of its own classes, for all images."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .. import _check
from ..heads import ZeroShotMLDecoder
from ._moves import SumGradients, all_rows
from ._shards import ClassShards


class BankShards:
    """How banks of any size lie on a mesh: groups of classes in whole."""

    def __init__(self, mesh: DeviceMesh, own_images: bool) -> None:
        self.mesh, self.own_images = mesh, own_images
        self._group = ClassShards(mesh, own_images, 1, 1, 1).group
        self._known: dict[tuple[int, int], ClassShards] = {}

    def __deepcopy__(self, memo: Any) -> BankShards:
        return self

    def of(self, num_classes: int, group_size: int) -> ClassShards:
        """Where so many classes in groups of that size are."""
        key = num_classes, group_size
        if key not in self._known:
            groups = -(-num_classes // group_size)
            made = ClassShards(self.mesh, self.own_images, num_classes, groups, group_size)
            if made.blocks_each * (made.devices - 1) >= groups:
                must = f"of so many groups that each of {made.devices} devices has one"
                _check.fail("parallelize_head", "word_vectors", must, f"{groups} groups")
            self._known[key] = made
        return self._known[key]

    def summed(self, head: ZeroShotMLDecoder) -> dict[str, Tensor]:
        """By name, what decodes the queries: each device does so for its classes, and the gradient is all devices'."""
        return {
            name: self.sum_gradients(parameter)
            for name, parameter in head.named_parameters()
            if not name.startswith("embed_standart.")  # it makes the memory, before
        }

    def sum_gradients(self, x: Tensor) -> Tensor:
        """A tensor that all devices have, and whose gradient is the sum of theirs."""
        return SumGradients.apply(x, self._group)

    def whole(self, rows: Tensor, num_classes: int, group_size: int) -> Tensor:
        """A bank (C, W) of the parts that the devices have."""
        shard = self.of(num_classes, group_size)
        padded = rows.new_zeros(shard.size, rows.shape[1])
        padded[: len(rows)] = rows
        return all_rows(padded, shard.group)[:num_classes]


def shard_zero_shot(head: ZeroShotMLDecoder, mesh: DeviceMesh, own_images: bool) -> None:
    """Cuts the banks."""
    shards, banks = BankShards(mesh, own_images), head.banks
    whole = {name: banks.whole(name) for name in banks.sizes}
    for vectors in whole.values():
        shards.of(len(vectors), banks.group_size_of(len(vectors)))  # raises before anything has changed
    banks.shards = head._shards = shards
    for name, vectors in whole.items():
        banks.put(name, vectors)
