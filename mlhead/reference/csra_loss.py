"""The loss of csra_pool's logits: CSRA, Eq. 2-8 and 13, with the losses of class_loss.py on top.

Both functions go through the classes a range at a time, so that neither the scores nor the logits exist whole. (Where
torch's autograd goes through the forward, under torch.func, it keeps them.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import class_loss
from .class_loss import LossArguments
from .csra_pool import csra_pool, csra_pool_grad


def _ranges(x: Tensor, weight: Tensor) -> list[slice]:
    """The classes in ranges with few enough scores each."""
    (B, L, _), (H, C, _) = x.shape, weight.shape
    if not class_loss.may_chunk(B, L, C) or C == 0:
        return [slice(0, C)]
    step = max(1, class_loss.CHUNK // max(1, B * L * H))
    return [slice(c, min(c + step, C)) for c in range(0, C, step)]


def _inputs(classes: slice, x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    return x, weight[:, classes], None if bias is None else bias[:, classes]


def csra_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperatures: Sequence[float],
    lam: Sequence[float],
    normalize: bool,
    average: float,
    *arguments: Any,
) -> Tensor:
    """The loss of logits = csra_pool(x, weight, bias, ...), a scalar in fp32 (fp64 for fp64).

    x (B, L, D), weight (H, C, D), bias (H, C) or None; `arguments` are those of `LossArguments`.
    """
    a = LossArguments(*arguments)
    wide = class_loss.accumulation(x.dtype)

    def logits(classes: slice) -> Tensor:
        return csra_pool(*_inputs(classes, x, weight, bias), temperatures, lam, normalize, average).to(wide)

    return class_loss.reduced(logits, _ranges(x, weight), x.shape[0], a)


def csra_loss_grad(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    temperatures: Sequence[float],
    lam: Sequence[float],
    normalize: bool,
    average: float,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients (dx, dweight, dbias): those of csra_pool for dlogits = dz, range by range."""
    a = LossArguments(*arguments)
    wide = class_loss.accumulation(x.dtype)
    options: tuple[Any, ...] = temperatures, lam, normalize, average

    def logits(classes: slice) -> Tensor:
        return csra_pool(*_inputs(classes, x, weight, bias), *options).to(wide)

    ranges = _ranges(x, weight)
    if len(ranges) == 1:
        ((_, dz),) = class_loss.logit_gradients(dout, logits, ranges, x.shape[0], a)
        return csra_pool_grad(dz.to(x.dtype), x, weight, bias, *options)
    dx = torch.zeros(x.shape, dtype=wide, device=x.device)
    dweight = torch.zeros_like(weight)
    dbias = None if bias is None else torch.zeros(bias.shape, dtype=bias.dtype, device=bias.device)
    for classes, dz in class_loss.logit_gradients(dout, logits, ranges, x.shape[0], a):
        dx_part, dweight_part, dbias_part = csra_pool_grad(dz.to(x.dtype), *_inputs(classes, x, weight, bias), *options)
        dx += dx_part
        dweight[:, classes] = dweight_part
        if dbias is not None and dbias_part is not None:
            dbias[:, classes] = dbias_part
    return dx.to(x.dtype), dweight, dbias
