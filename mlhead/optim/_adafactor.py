"""Adafactor of each block of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import _check
from ..ops._loss_chunks import Block
from ..ops._loss_update import grouped
from ._blocks import BlockPass, wide_dtype
from ._optimizer import ClassOptimizer, Rounding


class ClassAdafactor(ClassOptimizer):
    """`torch.optim.Adafactor` of each block of classes, inside backward; see `ClassOptimizer` for what that costs.

    Each block (n, D) of the weight, rows classes and columns features, is updated as if it were a parameter of its own:
    it has its own mean square per feature, its own relative step and its own clipping. All that is kept between steps
    is one number per class and D per block.

    The gradients of a mean over B * C elements shrink with C, and below `eps[0]` Adafactor no longer normalises: for
    many classes take a smaller one (down to 1e-18, its square being a number of fp32 too), or reduction="sum".

    Args:
        params: Parameters (G, E, J) or (C, D) of heads, or groups of them.
        lr: The largest relative step; it is min(lr, 1 / sqrt(step)) times the root mean square of the block.
        beta2_decay: The mean squares decay by 1 - step ** beta2_decay.
        eps: The least root mean square of a gradient, None for 1.2e-7 (fp64: 2.2e-16); and the least one of a weight.
        d: The largest root mean square of an update, before the step.
        weight_decay: Decoupled.
        rounding, state_dtype, seed, block_numbers: As for `ClassOptimizer`; its states are wide whatever `state_dtype`.

    Raises:
        ValueError: An option or the shape of a parameter does not fit; the message names it.
        TypeError: A parameter is no floating tensor, `block_numbers` or `seed` no integer, or another option no number,
            or `eps` no pair of them.

    Source:
        Shazeer and Stern, Adafactor (2018), without momentum, as `torch.optim.Adafactor`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        rounding: Rounding = "nearest",
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
        block_numbers: int | None = None,
    ) -> None:
        defaults = {"lr": lr, "beta2_decay": beta2_decay, "eps": eps, "d": d, "weight_decay": weight_decay}
        super().__init__(
            params, defaults, rounding=rounding, state_dtype=state_dtype, seed=seed, block_numbers=block_numbers
        )

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        where = type(self).__name__
        _check.check_pair(where, "eps", group["eps"])
        eps1, eps2 = group["eps"]
        for eps in (eps2,) if eps1 is None else (eps1, eps2):
            _check.check_number(where, "eps", eps)
        if not ((eps1 is None or eps1 >= 0) and eps2 >= 0):
            self._fail("eps", "two numbers of at least 0, the first perhaps None", group["eps"])
        for name in ("beta2_decay", "d"):
            _check.check_number(where, name, group[name])
        if not group["beta2_decay"] <= 0:
            self._fail("beta2_decay", "at most 0", group["beta2_decay"])
        if not group["d"] >= 1:
            self._fail("d", "at least 1", group["d"])

    def new_states(self, group: dict[str, Any], parameter: Tensor, blocks: int) -> dict[str, Callable[[], Tensor]]:
        """The mean square of each class and, for each block, of each feature."""
        (G, E, J), wide = grouped(parameter).shape, wide_dtype(parameter.dtype)
        return {
            "row_var": lambda: parameter.new_zeros(G, J, dtype=wide),
            "col_var": lambda: parameter.new_zeros(blocks, E, dtype=wide),
        }

    def update_block(self, run: BlockPass, block: Block, weight: Tensor, gradient: Tensor) -> None:
        """One step of Adafactor on the block alone; no number goes to the host."""
        group, lr = run.group, float(run.group["lr"])
        eps1, eps2 = group["eps"]
        eps1 = torch.finfo(run.wide).eps if eps1 is None else eps1
        size = weight.numel() ** 0.5
        forget = float(run.step) ** group["beta2_decay"]
        norm = torch.linalg.vector_norm
        alpha = (norm(weight) / size).clamp_(min=eps2).mul_(min(lr, 1 / run.step**0.5))
        if group["weight_decay"] != 0:
            weight.mul_(1 - lr * group["weight_decay"])

        g, E, n = gradient.shape
        rows, columns = run.state["row_var"][block.groups, block.columns], run.state["col_var"][run.order(block)]
        rows.lerp_(norm(gradient, dim=1).square_().div_(E), forget)
        columns.lerp_(norm(gradient, dim=(0, 2)).square_().div_(g * n), forget)
        update = torch.mul(rows.unsqueeze(1), columns.view(1, E, 1), out=run.spare("update", block))
        update.div_(rows.mean().clamp_(min=eps1))
        update.clamp_(min=eps1 * eps1).rsqrt_().mul_(gradient)
        denominator = (norm(update) / (size * group["d"])).clamp_(min=1.0)
        weight.addcmul_(update, alpha.div_(denominator), value=-1)
