"""The op group_fc_loss: the loss of group_fc's logits, which never exist."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import _check
from .._backend import Implementation
from ..reference import group_fc_loss as reference
from ._fused import autocast, is_autocasting
from ._loss_chunks import Chunked, CppPass
from ._loss_kernels import ExtensionKernels, TritonKernels
from ._loss_op import LossOp, make_flags
from ._loss_options import LossOptions, Targets, loss_arguments
from ._loss_update import loss_with_update
from .group_fc import check_group_fc

if TYPE_CHECKING:
    from typing_extensions import Unpack

_HALF = (torch.float16, torch.bfloat16)


def _load_triton() -> Chunked:
    from ..kernels import class_loss

    return Chunked(TritonKernels(class_loss))


def _load_cpp() -> CppPass:
    return CppPass(ExtensionKernels())


def _load_cuda() -> Chunked:
    return Chunked(ExtensionKernels())


_group_fc_loss = LossOp(
    "group_fc_loss",
    "Tensor h, Tensor weight, Tensor? bias",
    reference=reference.group_fc_loss,
    reference_grad=reference.group_fc_loss_grad,
    implementations={
        "triton": Implementation(("cuda",), (torch.float32, *_HALF), _load_triton),
        "cpp": Implementation(("cpu",), (torch.float32, torch.float64, *_HALF), _load_cpp),
        "cuda": Implementation(("cuda",), (torch.float32, torch.float64, *_HALF), _load_cuda),
    },
)


def group_fc_loss(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Targets,
    num_classes: int | None = None,
    **options: Unpack[LossOptions],
) -> Tensor:
    """The loss of `group_fc(h, weight, bias)` and its gradients, without the logits.

    loss = reduction_{b, c} l(logits[b, c], y[b, c]) * class_weight[c] * sample_weight[b]

    Args:
        h: Group embeddings (B, G, E), floating.
        weight: (G, E, J) with J = ceil(C / G), of the dtype of h; or (E, 1), shared by all queries (then C = G).
        bias: (C), or (1) with a shared weight, or None.
        targets: y (B, C) in [0, 1] of any real dtype; or sparse: `SparseTargets`, a pair of indices (N) and offsets
            (B + 1), a torch sparse CSR tensor (B, C); or for softmax class indices (B,).
        num_classes: C. By default the length of `bias`, else G * J.
        options: See `LossOptions`: loss="bce" | "asl" | "softmax", reduction, weights, ignore, backend and so on.

    Returns:
        A scalar, fp32 (fp64 for fp64 inputs); 0 for the mean over an empty batch. Under autocast h, weight and bias are
        cast to autocast's dtype first.

    Raises:
        ValueError: A shape, device or option does not fit, or on the CPU a target's value; the message names it. On
            CUDA wrong values end in an asynchronous device assertion.
        TypeError: An argument is of a wrong type or dtype, or an option is unknown.
        BackendError: An explicitly chosen backend cannot run this call.

    Numerics:
        Products in the dtype of h with fp32 sums, logits rounded to that dtype (the C++ pass keeps them in fp32),
        the loss in fp32. Deterministic.

    Memory:
        Beyond inputs and gradients a constant (on a CPU 2 MiB a thread and at most 16 MiB, on a GPU 48 MiB; the
        reference a few times that) and B numbers; where a group's classes are not all in one block, an fp32 sum of
        dh's size. Under torch.func and for gradients of gradients the reference keeps all logits.

    Source:
        ML-Decoder, Eq. 3 and section 2.3; ASL, Eq. 7. The gradients are made in the forward pass, see docs/loss.md.
    """
    where, parameter = "group_fc_loss", weight
    _check.check_tensor(where, "h", h)
    if is_autocasting(h.device.type):
        h, weight, bias = autocast(h.device.type, h, weight, bias)  # type: ignore[assignment]
    h, weight, bias, C = check_group_fc(where, h, weight, bias, num_classes)
    settings: dict[str, Any] = dict(options)
    backend, update = settings.pop("backend", None), settings.pop("update", None)
    if weight.ndim == 2:  # one weight for all queries: G groups of one class each
        if update is not None:
            _check.fail(where, "update", "None for a weight (E, 1) that all queries share", "an optimizer")
        G, E = h.shape[1:]
        weight = weight.expand(G, E, 1)
        bias = None if bias is None else bias.expand(G)
    arguments = loss_arguments(where, h, targets, C, settings, make_flags(h, weight, bias))
    if update is not None:
        return loss_with_update(where, _group_fc_loss, update, parameter, h, weight, bias, arguments, backend)
    return _group_fc_loss.loss(h, weight, bias, *arguments, backend=backend)
