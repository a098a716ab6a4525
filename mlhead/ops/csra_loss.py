"""The op csra_loss: the loss of csra_pool's logits, in three matrix products with its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._backend import Implementation
from ..reference import csra_loss as reference
from ._csra_kernels import ExtensionPooling, TritonPooling
from ._csra_loss import CsraLoss
from ._loss_kernels import ExtensionKernels, TritonKernels
from ._loss_op import LossOp, make_flags
from ._loss_options import LossOptions, Targets, loss_arguments, refuse_update
from .csra_pool import check_csra_pool

if TYPE_CHECKING:
    from typing_extensions import Unpack

_HALF = (torch.float16, torch.bfloat16)


def _load_triton() -> CsraLoss:
    from ..kernels import class_loss, csra_pool

    return CsraLoss(TritonPooling(csra_pool), TritonKernels(class_loss))


def _load_extension() -> CsraLoss:
    return CsraLoss(ExtensionPooling(), ExtensionKernels())


_csra_loss = LossOp(
    "csra_loss",
    "Tensor x, Tensor weight, Tensor? bias, float[] temperatures, float[] lam, bool normalize, float average",
    reference=reference.csra_loss,
    reference_grad=reference.csra_loss_grad,
    implementations={
        "triton": Implementation(("cuda",), (torch.float32, *_HALF), _load_triton),
        "cpp": Implementation(("cpu",), (torch.float32, torch.float64, *_HALF), _load_extension),
        "cuda": Implementation(("cuda",), (torch.float32, torch.float64, *_HALF), _load_extension),
    },
)


def csra_loss(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets,
    *,
    temperatures: Sequence[float],
    lam: float | Sequence[float],
    normalize: bool = False,
    average: float = 1.0,
    **options: Unpack[LossOptions],
) -> Tensor:
    """The loss of `csra_pool(x, weight, bias, ...)` and its gradients, without scores or logits, in three products.

    Args:
        x: Tokens (B, L, D) or a map (B, D, height, width), floating, L >= 1.
        weight: Classifiers (H, C, D), of the dtype of x.
        bias: (H, C) or None.
        targets: As for `group_fc_loss`: y (B, C), `SparseTargets`, (indices, offsets), sparse CSR, or for softmax (B,).
        temperatures: As for `csra_pool`, like lam, normalize and average.
        lam: One number, or one per head.
        normalize: Whether every classifier is divided by its norm.
        average: The weight of the mean.
        options: See `LossOptions`: loss="bce" | "asl" | "softmax", reduction, weights, ignore, backend and so on.

    Returns:
        A scalar, fp32 (fp64 for fp64 inputs). Under autocast x, weight and bias are cast to autocast's dtype first.

    Raises:
        ValueError: A shape, device or option does not fit, or on the CPU a target's value; the message names it.
        TypeError: An argument is of a wrong type or dtype, or an option is unknown.
        BackendError: An explicitly chosen backend cannot run this call.

    Numerics:
        As `csra_pool`, but for the logits, which stay in fp32. Softmax makes the scores twice where they do not fit
        the scratch. Deterministic.

    Memory:
        Beyond inputs and gradients the scratch of `csra_pool` (8 MiB on a CPU, up to 128 MiB on a GPU), a copy of a
        chunk's classifiers where H > 1, and in 16 bits the fp32 sum of the gradient that is added up over chunks.

    Source:
        CSRA, Eq. 2-8, 13 and section 3.4; the gradients are made in the forward pass, see docs/loss.md.
    """
    where = "csra_loss"
    x, weight, bias, T, lams, average = check_csra_pool(where, x, weight, bias, temperatures, lam, average)
    settings: dict[str, Any] = dict(options)
    backend = settings.pop("backend", None)
    refuse_update(where, settings)
    make = make_flags(x, weight, bias)
    arguments = loss_arguments(where, x, targets, weight.shape[1], settings, make)
    return _csra_loss.loss(x, weight, bias, T, lams, normalize, average, *arguments, backend=backend)
