"""How much memory the training of a head takes, as a formula, which a test holds to measurement (docs/loss.md)."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from . import _check
from .optim import BYTES_OF_A_NUMBER, ROUNDINGS, block_numbers

# How many numbers of state an optimizer keeps for each weight.
STATES = {"none": 0, "sgd": 0, "momentum": 1, "adamw": 2, "adafactor": 0}


@dataclass(frozen=True)
class HeadMemory:
    """Bytes that a training step of a linear or group_fc head takes, by what they hold.

    Args:
        weights: The class weights and the bias, those of one device.
        gradients: Theirs; only the bias's where the update is fused.
        optimizer: The state of the optimizer.
        features: h and its gradient; of a head over several devices also those of what is here.
        logits: Logits, their gradient, a dense target in fp32 and the loss's own; 0 with the loss in the head.
        scratch: The most that the blocks of the loss in the head take.
        casts: Under autocast what is for a moment in its dtype: the copies of weights and h, or their gradients.
    """

    weights: int
    gradients: int
    optimizer: int
    features: int
    logits: int
    scratch: int
    casts: int = 0

    @property
    def total(self) -> int:
        """The sum."""
        return sum(int(getattr(self, field.name)) for field in fields(self))


def head_memory(
    num_classes: int,
    width: int,
    batch: int,
    *,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    optimizer: str = "adamw",
    loss_in_head: bool = True,
    fused_update: bool = False,
    rounding: str = "nearest",
    device: str = "cpu",
    threads: int = 1,
    devices: int = 1,
    own_images: bool = False,
    autocast: torch.dtype | None = None,
) -> HeadMemory:
    """The memory of one training step of the last layer.

    With s bytes a number, J = ceil(C / G):

    weights   s (G E J + C)                          gradients  the same, or s C with a fused update
    optimizer k (G E J + C) numbers                  features   2 s B G E
    logits    0; without the loss in the head, for eager BCE of dense fp32 targets (ASL takes more), in fp32 12 B C
              beside the gradients, or if that is more the 16 B C that the loss itself takes before there are any;
              in 16 bits 2 B C more
    casts     under autocast with s_a bytes a number s_a (G E J + C + B G E), if s_a differs from s

    Temporaries of an optimizer of torch.optim are not counted: `torch.optim.AdamW` on a CPU takes two more tensors of
    the weight's size as it steps, with fused=True none, and so does SGD. The blocks of mlhead.optim are in the scratch.

    After `mlhead.parallel.parallelize_head` over N devices, the one that has most: of the classes, g = ceil(G / N)
    groups of J, or ceil(C / N) classes of a linear head, in the place of G and C in weights, gradients and optimizer;
    to the features comes what is here of those of B' images, 2 s B' g E, with B' = N B where each device has its own
    images, and without the loss in the head to the logits 2 s B' for each class that is here.

    Args:
        num_classes: C.
        width: E of a group_fc head, D of a linear one.
        batch: B; with `devices` the images that each device gives to the head.
        groups: G; 1 for a linear head.
        dtype: Of weights and features.
        optimizer: "none", "sgd", "momentum", "adamw" or "adafactor". Its state is in the dtype of the weights
            (torch.optim), with `fused_update` in fp32 (mlhead.optim).
        loss_in_head: Whether the loss is `linear_loss` / `group_fc_loss`; else eager BCE of dense targets.
        fused_update: Whether a `mlhead.optim` optimizer updates the weights in backward.
        rounding: Of such an optimizer, "nearest", "stochastic" or "kahan", which keeps as many numbers again as a
            16-bit weight has.
        device: "cpu" or "cuda".
        threads: Threads of the CPU.
        devices: N, the devices that share the classes.
        own_images: Whether each of them has its own images (`input_layouts=Shard(0)`), or all the same.
        autocast: The dtype of autocast around the loss in the head, or None. The weight and h then have copies in it in
            forward; without `fused_update` their gradients come in it and exist beside those in `dtype`.

    Returns:
        `HeadMemory` of one device, in bytes.

    Raises:
        ValueError: A number is not positive, a choice is unknown, a fused update or autocast is asked for without the
            loss in the head, or a fused update with several devices: the optimizers of `mlhead.optim` do not take the
            parameters of such a head.
        TypeError: A number is no integer, or a dtype no floating one.
    """
    where = "head_memory"
    numbers = {"num_classes": num_classes, "width": width, "batch": batch, "groups": groups}
    for name, value in {**numbers, "threads": threads, "devices": devices}.items():
        _check.check_positive(where, name, value)
    _check.check_choice(where, "optimizer", optimizer, tuple(STATES))
    _check.check_choice(where, "device", device, ("cpu", "cuda"))
    _check.check_choice(where, "rounding", rounding, ROUNDINGS)
    _check_dtype(where, "dtype", dtype)
    if autocast is not None:
        _check_dtype(where, "autocast", autocast)
    if fused_update and not loss_in_head:
        _check.fail(where, "fused_update", "False with loss_in_head=False", fused_update)
    if autocast is not None and not loss_in_head:
        _check.fail(where, "autocast", "None with loss_in_head=False", autocast)
    if rounding != "nearest" and not fused_update:
        _check.fail(where, "rounding", "'nearest' without a fused update", repr(rounding))
    if fused_update and devices > 1:
        _check.fail(where, "fused_update", "False with several devices", fused_update)
    s, J = dtype.itemsize, -(-num_classes // groups)
    features, elements = 2 * s * batch * groups * width, 0 if loss_in_head else batch * num_classes
    images = batch * devices if own_images else batch
    if devices > 1:
        if groups > 1:
            groups = -(-groups // devices)
            num_classes = groups * J
        else:
            num_classes = J = -(-num_classes // devices)
        features += 2 * s * images * groups * width
    matrix = groups * width * J
    state_bytes = max(4, s) if fused_update else s
    state = STATES[optimizer] * (matrix + num_classes) * state_bytes
    if optimizer == "adafactor":
        state = 4 * num_classes  # a number a class; the columns' are few
    if rounding == "kahan" and s == 2:
        state += s * matrix
    scratch = 0
    if loss_in_head:
        scratch = (48 << 20) if device == "cuda" else (threads * (2 << 20) + min(16 << 20, 128 * images * width * 4))
    if fused_update:
        scratch += BYTES_OF_A_NUMBER * block_numbers(matrix, device)
    gradients = num_classes if fused_update else matrix + num_classes
    # Arithmetic in fp32 or wider: logits, target and gradient; one more while the loss is made, before the weight has a
    # gradient. 16-bit logits are there beside their copy.
    wide = max(s, 4)
    given = s if s < wide else 0
    logits = max(elements * (3 * wide + given), elements * (4 * wide + given) - s * gradients)
    if devices > 1 and not loss_in_head:
        logits += 2 * s * images * num_classes
    casts = 0
    if autocast is not None and autocast != dtype and dtype != torch.float64:  # which autocast leaves alone
        casts = autocast.itemsize * (matrix + num_classes + features // (2 * s))
    return HeadMemory(s * (matrix + num_classes), s * gradients, state, features, logits, scratch, casts)


def _check_dtype(where: str, name: str, value: Any) -> None:
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        _check.fail(where, name, "a floating torch.dtype", value, TypeError)
