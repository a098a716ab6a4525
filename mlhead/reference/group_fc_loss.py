"""The loss of group_fc's logits: ML-Decoder, Eq. 3, with the losses of class_loss.py on top.

Both functions go through the classes a range at a time, so that the (B, C) logits do not exist. (Where torch's autograd
goes through the forward, under torch.func, it keeps them.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import class_loss
from .class_loss import LossArguments
from .group_fc import group_fc, group_fc_grad


def _ranges(h: Tensor, weight: Tensor, C: int) -> list[slice]:
    """The classes in ranges of whole groups, or of parts of one group, with few enough logits each."""
    B, J = h.shape[0], weight.shape[2]
    if not class_loss.may_chunk(B, J, C) or C == 0:
        return [slice(0, C)]
    most = max(1, class_loss.CHUNK // max(B, 1))
    if J <= most:
        step = most // J * J
        return [slice(c, min(c + step, C)) for c in range(0, C, step)]
    return [slice(c, min(c + most, g + J, C)) for g in range(0, C, J) for c in range(g, min(g + J, C), most)]


def _place(classes: slice, weight: Tensor, C: int) -> tuple[slice, slice]:
    """The groups of a range of classes, and the columns of their weight."""
    G, _, J = weight.shape
    if (classes.start, classes.stop) == (0, C):
        return slice(0, G), slice(0, J)
    first, last = classes.start // J, -(-classes.stop // J)
    if last - first > 1 or classes.stop - classes.start == J:
        return slice(first, last), slice(0, J)
    return slice(first, last), slice(classes.start - first * J, classes.stop - first * J)


def _inputs(classes: slice, h: Tensor, weight: Tensor, bias: Tensor | None, C: int) -> tuple[Any, ...]:
    groups, columns = _place(classes, weight, C)
    part = None if bias is None else bias[classes]
    return h[:, groups], weight[groups, :, columns], part, classes.stop - classes.start


def group_fc_loss(h: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
    """The loss of logits = group_fc(h, weight, bias), a scalar in fp32 (fp64 for fp64).

    h (B, G, E), weight (G, E, J), bias (C) or None; `arguments` are those of `LossArguments`.
    """
    a = LossArguments(*arguments)
    wide = class_loss.accumulation(h.dtype)

    def logits(classes: slice) -> Tensor:
        return group_fc(*_inputs(classes, h, weight, bias, a.num_classes)).to(wide)

    return class_loss.reduced(logits, _ranges(h, weight, a.num_classes), h.shape[0], a)


def group_fc_loss_grad(
    dout: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients (dh, dweight, dbias): those of group_fc for dlogits = dz, range by range."""
    a = LossArguments(*arguments)
    C, wide = a.num_classes, class_loss.accumulation(h.dtype)

    def logits(classes: slice) -> Tensor:
        return group_fc(*_inputs(classes, h, weight, bias, C)).to(wide)

    ranges = _ranges(h, weight, C)
    if len(ranges) == 1:
        ((_, dz),) = class_loss.logit_gradients(dout, logits, ranges, h.shape[0], a)
        return group_fc_grad(dz.to(h.dtype), h, weight, bias, C)
    dh = torch.zeros(h.shape, dtype=wide, device=h.device)
    dweight = torch.zeros_like(weight)  # with the strides of weight
    dbias = None if bias is None else torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    for classes, dz in class_loss.logit_gradients(dout, logits, ranges, h.shape[0], a):
        inputs = _inputs(classes, h, weight, bias, C)
        dh_part, dweight_part, dbias_part = group_fc_grad(dz.to(h.dtype), *inputs)
        groups, columns = _place(classes, weight, C)
        dh[:, groups] += dh_part
        dweight[groups, :, columns] = dweight_part
        if dbias is not None:
            dbias[classes] = dbias_part  # type: ignore[assignment]
    return dh.to(h.dtype), dweight, dbias
