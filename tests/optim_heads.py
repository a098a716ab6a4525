"""Heads, cases and steps for the tests of mlhead.optim."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mlhead
from mlhead import _backend
from mlhead.ops._loss_update import grouped
from mlhead.optim import ClassAdafactor, ClassAdamW, ClassOptimizer, ClassSGD

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def backends(dtype: torch.dtype) -> list[str]:
    implementations = _backend.implementations("group_fc_loss")
    return [
        name
        for name in _backend.BACKENDS
        if _backend._refusal("group_fc_loss", implementations, name, DEVICE, dtype) is None
    ]


B, G, E, C = 6, 5, 12, 98
J = 20  # two classes of the last group do not exist
BLOCKS = E * 8  # 16 classes at a time, after alignment
LOSSES = {
    "bce": {"reduction": "sum"},
    "asl": {"loss": "asl", "reduction": "sum", "gamma_pos": 1.0},
    "softmax": {"loss": "softmax"},
}
Case = tuple[type[ClassOptimizer], type[torch.optim.Optimizer], dict[str, Any]]
CASES: dict[str, Case] = {
    "sgd": (ClassSGD, torch.optim.SGD, {"lr": 0.1}),
    "sgd decay": (ClassSGD, torch.optim.SGD, {"lr": 0.1, "weight_decay": 0.1}),
    "momentum": (ClassSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.1}),
    "nesterov": (ClassSGD, torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adamw": (ClassAdamW, torch.optim.AdamW, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    "adafactor": (ClassAdafactor, torch.optim.Adafactor, {"lr": 0.3, "weight_decay": 0.1, "d": 1.5}),
}
every_case = pytest.mark.parametrize("case", CASES)


class Head:
    """A head, grouped or linear, with as many blocks as the optimizer has."""

    def __init__(self, form: str, dtype: torch.dtype = torch.float64, scale: float = 0.3) -> None:
        self.form = form
        shape = (G, E, J) if form == "group" else (C, E)
        self.weight = nn.Parameter((torch.randn(shape, dtype=torch.float64) * scale).to(DEVICE, dtype))
        self.bias = nn.Parameter((torch.randn(C, dtype=torch.float64) * scale).to(DEVICE, dtype))

    def inputs(self, step: int, kind: str = "bce") -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(step)
        shape = (B, G, E) if self.form == "group" else (B, E)
        h = torch.randn(shape, dtype=torch.float64, generator=random).to(DEVICE, self.weight.dtype)
        if kind == "softmax":
            return h, torch.randint(C, (B,), generator=random).to(DEVICE)
        return h, (torch.rand(B, C, generator=random) < 0.2).to(DEVICE)

    def loss(self, h: Tensor, y: Tensor, **options: Any) -> Tensor:
        function = mlhead.group_fc_loss if self.form == "group" else mlhead.linear_loss
        return function(h, self.weight, self.bias, y, **options)

    def rows(self, weight: Tensor | None = None) -> Tensor:
        """The weight of the classes that exist, (C, E)."""
        weight = (self.weight if weight is None else weight).detach()
        return weight if self.form == "linear" else weight.transpose(1, 2).reshape(-1, E)[:C]

    def step(self, update: ClassOptimizer, step: int, kind: str = "bce", **options: Any) -> Tensor:
        h, y = self.inputs(step, kind)
        loss = self.loss(h, y, update=update, **{**LOSSES[kind], **options})
        loss.backward()
        update.step()
        return loss.detach()


def block_ranges(form: str) -> list[slice]:
    if form == "linear":
        return [slice(c, min(c + 16, C)) for c in range(0, C, 16)]
    return [slice(c, min(c + n, C)) for g in range(G) for c, n in ((g * J, 16), (g * J + 16, 4))]


class ByTorch:
    """torch.optim on the ordinary gradient; each block is a parameter of its own."""

    def __init__(self, head: Head, case: str) -> None:
        _, kind, options = CASES[case]
        self.head = head
        self.parts = [nn.Parameter(head.rows()[block].clone()) for block in block_ranges(head.form)]
        self.optimizer = kind(self.parts, foreach=False, **options)  # type: ignore[call-arg]

    def step(self, gradient: Tensor) -> Tensor:
        """The weight (C, E) after the step."""
        for part, block in zip(self.parts, block_ranges(self.head.form), strict=True):
            part.grad = self.head.rows(gradient)[block].clone()
        self.optimizer.step()
        return torch.cat([part.detach() for part in self.parts])

    def write(self, rows: Tensor) -> None:
        with torch.no_grad():
            if self.head.form == "linear":
                self.head.weight.copy_(rows)
                return
            padded = torch.cat([rows, self.head.weight.transpose(1, 2).reshape(-1, E)[C:]])
            self.head.weight.copy_(padded.view(G, J, E).transpose(1, 2))


def make(case: str, head: Head, **options: Any) -> ClassOptimizer:
    cls, _, own = CASES[case]
    return cls([head.weight], **{"block_numbers": BLOCKS, **own, **options})  # type: ignore[call-arg]


def drive(update: ClassOptimizer, weight: nn.Parameter, gradient: Tensor) -> None:
    """A step with a given gradient of a weight (C, D)."""
    run = update.begin_update(weight, weight.shape[0], gradient.dtype)
    for block in run.blocks:
        run.place(block).copy_(grouped(gradient)[block.groups, :, block.columns])
        run.done(block, run.place(block))
    update.step()
