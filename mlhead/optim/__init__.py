"""Optimizers of class weights that work block by block inside backward (gradient fusion).

    optimizer = mlhead.optim.ClassAdafactor([head.class_parameter], lr=1e-3, rounding="stochastic")
    loss = head(features, targets, update=optimizer)
    loss.backward()      # updates head.class_parameter, and makes the gradients of all else
    optimizer.step()     # ends the step

The gradient of a weight that is given to a head, to `group_fc_loss` or to `linear_loss` with `update=` is made a block
of classes at a time, used and forgotten: it never exists whole, and the weight's `grad` stays None. See
`ClassOptimizer`.
"""

from __future__ import annotations

from ._adafactor import ClassAdafactor
from ._adamw import ClassAdamW
from ._blocks import BYTES_OF_A_NUMBER, block_numbers
from ._optimizer import ROUNDINGS, ClassOptimizer
from ._sgd import ClassSGD

__all__ = [
    "BYTES_OF_A_NUMBER",
    "ROUNDINGS",
    "ClassAdafactor",
    "ClassAdamW",
    "ClassOptimizer",
    "ClassSGD",
    "block_numbers",
]
