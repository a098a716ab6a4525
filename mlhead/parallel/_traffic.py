"""The bytes that a training step of a class-parallel head sends, as a formula, which a test holds to counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import Placement, Replicate, Shard

from .. import _check
from ..heads import CSRAHead, GAPHead, ZeroShotMLDecoder
from ..heads._decoder import DecoderHead

WHERE = "step_traffic"

# What moves are for, in the order of a step.
PURPOSES = ("features", "targets", "statistics", "loss", "feature_gradients", "parameter_gradients")


@dataclass(frozen=True)
class Move:
    """One collective of a step.

    Args:
        purpose: One of `PURPOSES`.
        operation: "all_reduce", "all_gather", "reduce_scatter" or "all_to_all".
        payload: S, the bytes of the tensor that each device puts in.
        devices: N.
    """

    purpose: str
    operation: str
    payload: int
    devices: int

    @property
    def sent(self) -> float:
        """Bytes that a device sends, the mean over the devices.

        All-reduce 2 (N - 1) / N S, as reduce-scatter and all-gather in a ring; all-gather (N - 1) S; reduce-scatter and
        all-to-all (N - 1) / N S.
        """
        others = (self.devices - 1) * self.payload
        if self.operation == "all_gather":
            return float(others)
        return (2 if self.operation == "all_reduce" else 1) * others / self.devices


@dataclass(frozen=True)
class StepTraffic:
    """The collectives of one training step."""

    moves: tuple[Move, ...]

    @property
    def sent(self) -> dict[str, float]:
        """Bytes that a device sends, by purpose; purposes without any are 0."""
        return {name: sum(move.sent for move in self.moves if move.purpose == name) for name in PURPOSES}

    @property
    def total(self) -> float:
        """The sum."""
        return sum(move.sent for move in self.moves)


def step_traffic(
    head: Any,
    devices: int,
    batch: int,
    *,
    positions: int = 1,
    input_layouts: Placement | None = None,
    labels: int | None = None,
    target_bytes: int = 1,
    ignore: bool = False,
    sample_weight: bool = False,
    dtype: torch.dtype | None = None,
    replicas: int = 1,
) -> StepTraffic:
    """What each device sends in forward and backward of `head(features, targets)` after `parallelize_head`.

    With N devices of a class group, B images, s bytes a number of features, w bytes of fp32 (of fp64 for fp64), and per
    device n = ceil(C / N) classes, of a decoder the classes of g = ceil(G / N) groups. What each device puts in:

                         Replicate()                     Shard(0)
    features             -                               gather s B F, exchange s N g B E for a decoder;
                                                         gather 8, on a CPU alone, to compare B
    targets              -                               sparse: gather 24 + 8 B + 8 Y, with values 4 Y more
                                                         dense: exchange t N n B, with `ignore` N n B more
                                                         gather 4 B with `sample_weight`
    statistics, softmax  reduce 4 w B                    reduce 4 w N B
    loss, others         reduce w                        reduce w
    gradient of          reduce s B F                    reduce-scatter s N B F
      the features       decoder: gather s g B E         exchange s N g B E
    gradients of         zero-shot: reduce those of all that makes and reads the queries
      parameters         two axes: reduce those of the classes that are here, over the R replicas

    F is D of a GAP head, L D of CSRA, and L E, the memory, of a zero-shot head. `Move.sent` says what a collective
    sends. Uneven shards count as the largest, which the others are padded to. In fp16 the statistics are made twice,
    for backward makes the gradients; so they are where the reference backend runs. Not counted: a `key_mask` of a
    zero-shot head (gather B L bytes), and what DDP or FSDP does with all other parameters.

    Args:
        head: As for `parallelize_head`, before it or after it; on the meta device too. Its `loss` counts.
        devices: N, the devices that share the classes.
        batch: B, the images that are given to the head on each device.
        positions: L of the features; a GAP head and a decoder do not depend on it.
        input_layouts: `Replicate()`, the default, or `Shard(0)`.
        labels: None for dense targets; or Y, the most labels that the images of one device have together.
        target_bytes: t, bytes of a number of dense targets: 1 for bool, 4 for fp32.
        ignore: Whether there are labels that nobody knows; sparse targets then have values.
        sample_weight: Whether there are weights of images, in fp32.
        dtype: Of the features, and of what autocast makes of them; that of the head's parameters by default.
        replicas: R, the size of the mesh's first axis where it has two.

    Returns:
        `StepTraffic`. All of it is for features that need a gradient.

    Raises:
        TypeError: The head or the layout is of another kind, or a number is no integer.
        ValueError: A number is not positive.
    """
    if not isinstance(head, (GAPHead, CSRAHead, DecoderHead, ZeroShotMLDecoder)):
        _check.fail(WHERE, "head", "a head of mlhead.heads", type(head).__name__, TypeError)
    for name, value in (("devices", devices), ("batch", batch), ("positions", positions), ("replicas", replicas)):
        _check.check_positive(WHERE, name, value)
    layout = Replicate() if input_layouts is None else input_layouts
    if layout not in (Replicate(), Shard(0)):
        _check.fail(WHERE, "input_layouts", "Replicate() or Shard(0)", layout, TypeError)
    own_images, N, B = isinstance(layout, Shard), devices, batch
    dtype = next(head.parameters()).dtype if dtype is None else dtype
    s, wide = dtype.itemsize, torch.promote_types(dtype, torch.float32).itemsize
    blocks, step = _blocks(head)
    blocks_each = -(-blocks // N)
    moves: list[Move] = []

    def add(purpose: str, operation: str, payload: int, size: int = N) -> None:
        if payload:
            moves.append(Move(purpose, operation, payload, size))

    if isinstance(head, DecoderHead):
        part = s * B * blocks_each * head.embed_dim
        if own_images:
            add("features", "all_to_all", N * part)
            add("feature_gradients", "all_to_all", N * part)
        else:
            add("feature_gradients", "all_gather", part)
    else:
        width = head.embed_dim if isinstance(head, ZeroShotMLDecoder) else head.in_features
        whole = s * B * width * (1 if isinstance(head, GAPHead) else positions)
        if own_images:
            add("features", "all_gather", whole)
            add("feature_gradients", "reduce_scatter", N * whole)
        else:
            add("feature_gradients", "all_reduce", whole)
    if own_images:
        add("features", "all_gather", 8)
        if labels is None:
            add("targets", "all_to_all", (target_bytes + ignore) * N * blocks_each * step * B)
        else:
            add("targets", "all_gather", 24 + 8 * B + (12 if ignore else 8) * labels)
        add("targets", "all_gather", 4 * B if sample_weight else 0)
    loss: Any = head.loss
    if loss.options()["loss"] == "softmax":
        images, passes = N * B if own_images else B, 2 if dtype == torch.float16 else 1
        add("statistics", "all_reduce", passes * 4 * wide * images)
    else:
        add("loss", "all_reduce", wide)
    for name, parameter in head.named_parameters():
        if not parameter.requires_grad:
            continue
        if isinstance(head, ZeroShotMLDecoder):
            if not name.startswith("embed_standart."):
                add("parameter_gradients", "all_reduce", parameter.numel() * parameter.dtype.itemsize)
        elif replicas > 1 and (numbers := _numbers_of_a_class(head, name)):
            size = blocks_each * step * numbers * parameter.dtype.itemsize
            add("parameter_gradients", "all_reduce", size, replicas)
    return StepTraffic(tuple(moves))


def _blocks(head: Any) -> tuple[int, int]:
    """What is sharded, and how many classes that is each: groups of J classes, or classes."""
    C = head.num_classes
    if isinstance(head, DecoderHead):
        return head.groups, -(-C // head.groups)
    if isinstance(head, ZeroShotMLDecoder):
        J = head.banks.group_size_of(C)
        return -(-C // J), J
    return C, 1


def _numbers_of_a_class(head: Any, name: str) -> int:
    """How many numbers of a parameter belong to one class; 0 for a parameter that is not sharded."""
    if isinstance(head, DecoderHead):
        return {"duplicate_pooling": head.embed_dim, "duplicate_pooling_bias": 1}.get(name, 0)
    heads = head.num_heads if isinstance(head, CSRAHead) else 1
    return {"weight": head.in_features * heads, "bias": heads}[name.removeprefix("fc.")]
