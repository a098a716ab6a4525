"""Heads over several devices, by torch.distributed: `parallelize_head` and what goes with it."""

from ._clip import clip_grad_norm_
from ._style import class_parameters, parallelize_head
from ._traffic import Move, StepTraffic, step_traffic

__all__ = ["Move", "StepTraffic", "class_parameters", "clip_grad_norm_", "parallelize_head", "step_traffic"]
