"""Blocks of logits, targets and weights for the kernels of the losses, and what plain torch makes of them."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlhead.ops._loss_kernels import Place, PlainKernels
from mlhead.reference.class_loss import LossArguments
from mlhead.testing import check

# The options of a loss, by name.
LOSSES: dict[str, dict[str, Any]] = {
    "bce": {},
    "bce smoothed": {"label_smoothing": 0.1},
    "asl": {"gamma_neg": 4.0, "gamma_pos": 1.0, "margin": 0.05},
    "asl attached": {"gamma_neg": 4.0, "gamma_pos": 1.5, "margin": 0.05, "detach_focal": False},
    "asl fractional": {"gamma_neg": 1.5, "gamma_pos": 0.5, "margin": 0.0, "detach_focal": False},
    "asl without focus": {"gamma_neg": 0.0, "gamma_pos": 0.0, "margin": 0.2, "eps": 1e-3},
    "asl negatives alone": {"gamma_neg": 1.5, "gamma_pos": 0.0, "margin": 0.05, "detach_focal": False},
    "softmax": {},
    "softmax smoothed": {"label_smoothing": 0.1},
}
TARGETS = ("int8", "uint8", "bool", "fp32", "strided", "sparse", "valued")
_DENSE = {"int8": torch.int8, "uint8": torch.uint8, "bool": torch.bool, "fp32": torch.float32, "strided": torch.float32}


@dataclass(frozen=True)
class Block:
    """A block (g, b, n) of logits; without `num_classes`, of a head that has no more classes than it."""

    g: int
    b: int
    n: int
    first: int = 0
    group_classes: int | None = None
    num_classes: int | None = None
    strided: bool = False

    def place(self) -> Place:
        """Where it is among the classes."""
        classes = self.n if self.group_classes is None else self.group_classes
        return Place(self.first, classes, self.g * classes if self.num_classes is None else self.num_classes)

    def __str__(self) -> str:
        return f"{self.g}x{self.b}x{self.n}" + (f" from {self.first}" if self.first else "")


BLOCKS = (
    Block(1, 3, 1),
    Block(1, 2, 2500, num_classes=2400),  # several tiles, the last ones without classes
    Block(1, 2, 1100, first=333, group_classes=1, num_classes=2000),
    Block(5, 2, 40, num_classes=193),  # a ragged end
    Block(5, 2, 40, num_classes=110),  # a group without classes
    Block(5, 2, 16, first=16, group_classes=40, num_classes=190),  # a part of every group
    Block(3, 2, 1030, first=5, group_classes=1300, num_classes=3300, strided=True),
    Block(80, 3, 1),
    Block(7, 2, 1, first=1, group_classes=3, num_classes=20, strided=True),
    Block(70, 1, 33, num_classes=70 * 33 - 2),
)


class Problem:
    """One call of the kernels: a block with its targets and weights; `everything` is optional tensors and dout."""

    def __init__(
        self, block: Block, dtype: torch.dtype, loss: str, targets: str, device: str, everything: bool = False
    ) -> None:
        random = torch.Generator().manual_seed(1)
        self.block, self.place = block, block.place()
        b, C = block.b, self.place.num_classes
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def normal(*shape: int, dtype: torch.dtype = wide) -> Tensor:
            return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype).to(device)

        def weights(n: int) -> Tensor | None:
            return (
                (torch.rand(n, generator=random, dtype=torch.float64) + 0.5).to(wide).to(device) if everything else None
            )

        if block.strided:
            self.z = normal(b, block.g + 1, block.n + 3, dtype=dtype)[:, 1:, 2:-1].transpose(0, 1)
        else:
            self.z = normal(block.g, b, block.n, dtype=dtype)
        self.z *= 3
        self.bias = normal(2 * C, dtype=dtype)[::2] if everything else None
        self.factor = 1e-3 if everything else 1.0
        self.dout = normal() if everything else None
        self.row_loss = normal(b)
        statistics = torch.tensor([-torch.inf, 0, 0, 0], dtype=wide, device=device)
        self.statistics = statistics.repeat(b, 1)
        sample_weight = weights(3 * b)
        kind = loss.split()[0]
        made = {
            "class_weight": weights(C),
            "pos_weight": weights(C),
            "sample_weight": None if sample_weight is None else sample_weight[::3],
        }
        y, offsets, values = self._targets(targets, kind, C, random, wide)
        options = {"gamma_neg": 0.0, "gamma_pos": 0.0, "margin": 0.0, "eps": 1e-8, "detach_focal": True}
        self.arguments = LossArguments(
            targets=y.to(device), offsets=None if offsets is None else offsets.to(device),
            values=None if values is None else values.to(device), num_classes=C, loss=kind,
            label_smoothing=0.0, reduction="sum", class_group="", make=[True],
            **made, **options,
        )._replace(**LOSSES[loss])  # fmt: skip

    def _targets(
        self, kind: str, loss: str, C: int, random: torch.Generator, wide: torch.dtype
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        b = self.block.b
        ignores = loss != "softmax"
        if kind in _DENSE:
            dtype = _DENSE[kind]
            y = (torch.rand(b, C, generator=random) < 0.15).float()
            if dtype == torch.float32:
                y *= torch.rand(b, C, generator=random)
            if ignores and dtype in (torch.float32, torch.int8):
                y[torch.rand(b, C, generator=random) < 0.1] = -1.0
            y = y.to(wide if dtype == torch.float32 else dtype)
            return (y.T.contiguous().T if kind == "strided" else y), None, None
        rows, offsets = [torch.tensor([0, 1, 1])], [3]  # what comes before belongs to other images
        for i in range(b):
            count = 0 if i == b - 1 and b > 2 else min(C, 1 + C // 9)
            rows.append(torch.randperm(C, generator=random)[:count].sort().values)
            offsets.append(offsets[-1] + count)
        classes = torch.cat([*rows, torch.tensor([0, 2])])
        values = None
        if kind == "valued":
            values = torch.rand(len(classes), generator=random).to(wide)
            if ignores:
                values[::4] = -1.0
        return classes, torch.tensor(offsets), values

    def copy(self) -> Problem:
        """With tensors of its own where kernels write."""
        other = copy.copy(self)
        other.z = torch.empty_strided(self.z.shape, self.z.stride(), dtype=self.z.dtype, device=self.z.device)
        if self.block.strided:  # what lies between must stay
            base = torch.zeros(self.block.b, self.block.g + 1, self.block.n + 3, dtype=self.z.dtype)
            other.z = base.to(self.z.device)[:, 1:, 2:-1].transpose(0, 1)
        other.z.copy_(self.z)
        other.row_loss, other.statistics = self.row_loss.clone(), self.statistics.clone()
        return other

    def plain_arguments(self, dtype: torch.dtype | None = None) -> LossArguments:
        """The arguments with nothing but these images' own sparse targets, in another dtype."""
        a = self.arguments
        if a.offsets is not None:
            begin, end = int(a.offsets[0]), int(a.offsets[-1])
            values = None if a.values is None else a.values[begin:end]
            a = a._replace(targets=a.targets[begin:end], offsets=a.offsets - begin, values=values)
        if dtype is None:
            return a
        names = ("values", "class_weight", "pos_weight", "sample_weight")
        wider = {name: getattr(a, name).to(dtype) for name in names if getattr(a, name) is not None}
        return a._replace(**wider, targets=a.targets.to(dtype) if a.targets.is_floating_point() else a.targets)

    def dense(self) -> Tensor:
        """All targets, (b, C)."""
        return self.plain_arguments().dense(slice(0, self.place.num_classes), self.block.b, torch.float64)

    def plain(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """What `PlainKernels` makes of it, in the problem's own dtypes or all in another."""
        p, a, kernels = self.copy(), self.plain_arguments(dtype), PlainKernels()
        bias, dout = self.bias, self.dout
        if dtype is not None:
            p.z, p.row_loss, p.statistics = p.z.to(dtype), p.row_loss.to(dtype), p.statistics.to(dtype)
            bias, dout = (None if t is None else t.to(dtype) for t in (bias, dout))
        if a.loss == "softmax":
            kernels.softmax_statistics(p.z, bias, self.place, a, p.statistics)
            kernels.gradient(p.z, bias, self.place, a, self.factor, dout, None, p.statistics, True)
            return {"dz": p.z, "statistics": p.statistics}
        kernels.gradient(p.z, bias, self.place, a, self.factor, dout, p.row_loss, None, True)
        return {"dz": p.z, "row_loss": p.row_loss}


def _row_values(statistics: Tensor) -> dict[str, Tensor]:
    """What the ops make of the statistics: sums of both signs are within a budget only as a part of the loss."""
    top, total_exp, score, total = statistics.unbind(1)
    lse = top + total_exp.log()
    return {"maximum": top, "lse": lse, "sum of v": total, "loss": total * lse - score}


def expect(problem: Problem, results: dict[str, Tensor]) -> None:
    """Holds results to the error budget."""
    exact, plain = problem.plain(torch.float64), problem.plain()
    if results["dz"].dtype == torch.float64:  # plain torch in fp32, scaled by the ratio of the units
        ratio = 3 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
        narrow = problem.plain(torch.float32)
        plain = {name: exact[name] + ratio * (narrow[name].double() - exact[name]) for name in exact}
    for name, result in results.items():
        if name == "statistics":
            parts = [_row_values(t[name]) for t in (results, exact, plain)]
            for part, values in parts[0].items():
                check(part, values, parts[1][part], parts[2][part])
        else:
            check(name, result, exact[name], plain[name])
    between = results["dz"]
    if problem.block.strided:
        base = between.transpose(0, 1)
        whole = base.as_strided((problem.block.b, problem.block.g + 1, problem.block.n + 3), base.stride(), 0)
        assert not any(bool(part.any()) for part in (whole[:, 0], whole[:, :, :2], whole[:, :, -1]))
