"""Losses on logits (B, C): binary cross-entropy, the asymmetric loss, softmax cross-entropy.

All compute in fp32 (fp64 for fp64 logits), whatever the dtype of the logits and under autocast, and return that dtype.
Targets are dense. Their values are checked without waiting for a GPU: on the CPU by an error that names them; on CUDA
by an asynchronous device assertion; not at all while something traces.

The modules are also what a head's `loss` is: `options()` tells the ops that make no logits (`mlhead.group_fc_loss` and
its kin) which loss that is.
"""

from __future__ import annotations

from .functional import REDUCTIONS, asymmetric_loss, binary_cross_entropy, softmax_cross_entropy
from .modules import AsymmetricLoss, BinaryCrossEntropy, SoftmaxCrossEntropy

__all__ = [
    "REDUCTIONS",
    "AsymmetricLoss",
    "BinaryCrossEntropy",
    "SoftmaxCrossEntropy",
    "asymmetric_loss",
    "binary_cross_entropy",
    "softmax_cross_entropy",
]
