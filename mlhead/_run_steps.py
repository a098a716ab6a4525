"""What turns a run's gradients into steps: its optimizers, their schedules and the scaler of fp16."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from mlhead import building
from mlhead._config import TrainConfig
from mlhead._spread import Spread
from mlhead.backbones import HeadedModel

SMALLEST_SCALE = 2.0**-14  # of a loss in fp16; it begins at 2^16 and halves at every overflow


def are_finite(parameters: Iterable[Tensor]) -> bool:
    """Whether all numbers of some parameters are, of sharded ones those that are here; no copy of them is made."""
    found = []
    for parameter in parameters:
        here = parameter.to_local().detach() if isinstance(parameter, DTensor) else parameter.detach()
        if here.numel():
            found.append(torch.stack(torch.aminmax(here)).isfinite().all())
    return not found or bool(torch.stack(found).all())


class Steps:
    """The optimizer of the model, and under --fused-update that of the classes' weight inside backward.

    Args:
        config: the options of the run.
        model: as it lies on the processes.
        total_steps: of the run, for the schedules.
        spread: how the model lies.

    Attributes:
        optimizer: of all parameters but that of `update`.
        update: what the head takes as `update`, or None.
        skipped: steps, since the run began or was resumed, that the scaler of fp16 did not make.
    """

    def __init__(self, config: TrainConfig, model: HeadedModel, total_steps: int, spread: Spread) -> None:
        self.config, self.model, self.spread = config, model, spread
        self.optimizer = building.build_optimizer(config, model)
        self.update = building.build_update(config, model)
        self._optimizers = [self.optimizer] if self.update is None else [self.optimizer, self.update]
        self._schedules = [building.build_schedule(config, each, total_steps) for each in self._optimizers]
        self._scaler = spread.scaler(enabled=config.amp == "fp16")
        self.skipped = 0

    def backward(self, loss: Tensor) -> None:
        """Adds up gradients; under --fused-update makes the step of the classes' weight."""
        self._scaler.scale(loss).backward()

    def apply(self, done: int) -> Tensor | None:
        """Step number `done` of the parameters and the schedules; returns the gradient's norm where it is clipped."""
        norm, scale = None, self._scaler.get_scale()
        if self.config.clip_grad is not None:
            self._scaler.unscale_(self.optimizer)
            norm = self.spread.clip(self.model.parameters(), self.config.clip_grad)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        if self.update is not None:
            self.update.step()
        self.optimizer.zero_grad(set_to_none=True)
        # A step that the scaler skipped for its overflow does not move the schedules; torch would warn about it.
        if self._scaler.get_scale() < scale:
            self.skipped += 1
            if self._scaler.get_scale() < SMALLEST_SCALE:
                raise FloatingPointError(
                    f"the gradients of step {done} overflow in fp16 whatever the loss is multiplied by: training has "
                    f"diverged; try a lower --lr or --amp bf16"
                )
        else:
            for _, advance in self._schedules:
                advance(done)
        return norm

    def rates(self) -> dict[str, float]:
        """The learning rates of the parts "backbone" and "head"."""
        return {group["part"]: group["lr"] for each in self._optimizers for group in each.param_groups}

    def state(self) -> dict[str, Any]:
        """Of everything but the optimizer of the model, whose state may lie on several processes."""
        (schedule, _), *others = self._schedules
        update = None
        if self.update is not None:
            update = {"optimizer": self.update.state_dict(), "schedule": others[0][0].state_dict()}
        return {"schedule": schedule.state_dict(), "update": update, "scaler": self._scaler.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Puts back what `state` gave."""
        (schedule, _), *others = self._schedules
        schedule.load_state_dict(state["schedule"])
        if self.update is not None:
            self.update.load_state_dict(state["update"]["optimizer"])
            others[0][0].load_state_dict(state["update"]["schedule"])
        self._scaler.load_state_dict(state["scaler"])
