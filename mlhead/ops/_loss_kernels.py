"""The two kernels that a loss in the head is made of, and each backend's form of them.

Both go over a block of raw logits z (g, b, n): image b's logits of n neighbouring classes in each of g groups. The
class of z[i, b, j] is `first + i * group_classes + j`; one at `num_classes` or beyond does not exist: no loss, dz 0.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..reference import class_loss
from ..reference.class_loss import LossArguments


class Place(NamedTuple):
    """Which classes a block of logits belongs to."""

    first: int
    group_classes: int
    num_classes: int


class LossKernels(Protocol):
    """The kernels of a backend.

    z has unit stride along n and any others, in the dtype of the head's inputs or wider; bias (C) is None or of the
    dtype of the head's inputs, with any stride, and is added to z. row_loss (b) and statistics (b, 4) are contiguous in
    the accumulation dtype. `a` holds the targets and weights of the block's images and all classes.
    """

    def gradient(
        self,
        z: Tensor,
        bias: Tensor | None,
        place: Place,
        a: LossArguments,
        factor: float,
        dout: Tensor | None,
        row_loss: Tensor | None,
        statistics: Tensor | None,
        need_dz: bool,
    ) -> None:
        """Makes z dz = factor * dout * d(loss)/dz in place where `need_dz`.

        For BCE and ASL row_loss[b] += the weighted loss of the row's elements, without `factor`; for softmax, which
        needs finished `statistics`, row_loss is None. dout is None for 1, or a scalar in the accumulation dtype.
        """

    def softmax_statistics(
        self, z: Tensor, bias: Tensor | None, place: Place, a: LossArguments, statistics: Tensor
    ) -> None:
        """Takes the block into statistics[b] = (max z, sum exp(z - max), sum v z, sum v), v as in class_loss.py."""

    def scale(self, tensor: Tensor, factor: Tensor) -> None:
        """Multiplies a tensor in place by a scalar in the accumulation dtype; where that is 1, nothing is written."""


def _exists(z: Tensor, place: Place, group: int) -> int:
    """How many classes of a group of the block exist."""
    return max(0, min(z.shape[2], place.num_classes - place.first - group * place.group_classes))


def _given(z: Tensor, classes: slice) -> Tensor:
    return z


class PlainKernels:
    """The kernels in plain torch, group by group."""

    @staticmethod
    def _groups(z: Tensor, bias: Tensor | None, place: Place) -> Any:
        for i in range(z.shape[0]):
            first, n = place.first + i * place.group_classes, _exists(z, place, i)
            part = z[i, :, :n].to(class_loss.accumulation(z.dtype))
            classes = slice(first, first + n)
            yield z[i], classes, part if bias is None else part + bias[classes].to(part.dtype)

    def gradient(
        self,
        z: Tensor,
        bias: Tensor | None,
        place: Place,
        a: LossArguments,
        factor: float,
        dout: Tensor | None,
        row_loss: Tensor | None,
        statistics: Tensor | None,
        need_dz: bool,
    ) -> None:
        """As `LossKernels.gradient`."""
        for raw, classes, part in self._groups(z, bias, place):
            if row_loss is not None:
                row_loss += class_loss.element_loss(part, classes, a).sum(1)
            if not need_dz:
                continue
            if statistics is None:
                dz = class_loss.element_gradient(part, classes, a)
            else:
                lse = statistics[:, 0] + statistics[:, 1].log()
                rows = class_loss.SoftmaxRows(lse, statistics[:, 3], statistics[:, 2])
                dz = class_loss.softmax_gradient(part, classes, rows, a)
            raw[:, : part.shape[1]] = (dz * factor if dout is None else dz * (dout * factor)).to(z.dtype)
            raw[:, part.shape[1] :] = 0

    def softmax_statistics(
        self, z: Tensor, bias: Tensor | None, place: Place, a: LossArguments, statistics: Tensor
    ) -> None:
        """As `LossKernels.softmax_statistics`."""
        for _, classes, part in self._groups(z, bias, place):
            if part.shape[1] == 0:
                continue
            rows = class_loss.softmax_rows(partial(_given, part), [classes], part.shape[0], a)
            before, largest = statistics[:, 0].clone(), part.amax(1)
            top = torch.maximum(before, largest)
            shift = torch.where(top.isinf(), 0.0, top)  # no NaN before the first block, whose maximum is -inf
            statistics[:, 1] = statistics[:, 1] * torch.exp(before - shift) + torch.exp(part - shift[:, None]).sum(1)
            statistics[:, 0] = top
            statistics[:, 2] += rows.score
            statistics[:, 3] += rows.total

    def scale(self, tensor: Tensor, factor: Tensor) -> None:
        """As `LossKernels.scale`; on a CPU the factor is read."""
        if tensor.device.type != "cpu" or float(factor) != 1.0:
            tensor.mul_(factor)


class TritonKernels:
    """The kernels of kernels/class_loss.py, which is given as a module."""

    def __init__(self, kernels: Any) -> None:
        self.kernels = kernels
        self.scale = kernels.scale

    def gradient(self, z: Tensor, bias: Tensor | None, place: Place, a: LossArguments, *rest: Any) -> None:
        """As `LossKernels.gradient`."""
        options = (a.loss, a.gamma_neg, a.gamma_pos, a.margin, a.eps, a.detach_focal, a.label_smoothing)
        self.kernels.gradient(z, bias, *place, *a[:6], *options, *rest)

    def softmax_statistics(
        self, z: Tensor, bias: Tensor | None, place: Place, a: LossArguments, statistics: Tensor
    ) -> None:
        """As `LossKernels.softmax_statistics`."""
        self.kernels.softmax_statistics(z, bias, *place, *a[:4], a.label_smoothing, statistics)


class ExtensionKernels:
    """The kernels of the C++/CUDA extension."""

    @staticmethod
    def options(a: LossArguments) -> tuple[Any, ...]:
        """The loss and its options as the extension's ops take them."""
        loss = ("bce", "asl", "softmax").index(a.loss)
        return loss, a.gamma_neg, a.gamma_pos, a.margin, a.eps, a.detach_focal, a.label_smoothing

    def gradient(self, z: Tensor, bias: Tensor | None, place: Place, a: LossArguments, *rest: Any) -> None:
        """As `LossKernels.gradient`."""
        ops: Any = torch.ops.mlhead_C
        ops.class_loss_gradient.default(z, bias, *place, *a[:6], *self.options(a), *rest)

    @staticmethod
    def softmax_statistics(z: Tensor, bias: Tensor | None, place: Place, a: LossArguments, statistics: Tensor) -> None:
        """As `LossKernels.softmax_statistics`."""
        ops: Any = torch.ops.mlhead_C
        ops.class_loss_statistics.default(z, bias, *place, *a[:4], a.label_smoothing, statistics)

    @staticmethod
    def scale(tensor: Tensor, factor: Tensor) -> None:
        """As `LossKernels.scale`."""
        torch.ops.mlhead_C.scale_by.default(tensor, factor)
