"""The op group_fc: the group fully-connected layer of ML-Decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _check
from .._backend import Implementation
from ..reference import group_fc as reference
from ._fused import FusedOp, autocast, is_autocasting

_HALF = (torch.float16, torch.bfloat16)


def _load_triton() -> Any:
    from ..kernels import group_fc

    return group_fc


class _Extension:
    """The launchers of the C++/CUDA extension, in the argument order of this op."""

    @staticmethod
    def group_fc(h: Tensor, weight: Tensor, bias: Tensor | None, num_classes: int) -> Tensor:
        return torch.ops.mlhead_C.group_fc.default(h, weight, bias, num_classes)

    @staticmethod
    def group_fc_backward(
        dlogits: Tensor, h: Tensor, weight: Tensor, bias: Tensor | None, num_classes: int, needs: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.mlhead_C.group_fc_backward.default(dlogits, h, weight, num_classes, *needs)


def _fake(h: Tensor, weight: Tensor, bias: Tensor | None, num_classes: int, backend: str) -> Tensor:
    return h.new_empty(h.shape[0], num_classes)


_group_fc = FusedOp(
    "group_fc",
    "Tensor h, Tensor weight, Tensor? bias, SymInt num_classes",
    outputs=1,
    differentiable=(0, 1, 2),
    reference=reference.group_fc,
    reference_grad=reference.group_fc_grad,
    fake=_fake,
    implementations={
        "triton": Implementation(("cuda",), (torch.float32, *_HALF), _load_triton),
        "cpp": Implementation(("cpu",), (torch.float32, torch.float64, *_HALF), lambda: _Extension),
        "cuda": Implementation(("cuda",), (torch.float32, torch.float64, *_HALF), lambda: _Extension),
    },
)


def group_fc(
    h: Tensor, weight: Tensor, bias: Tensor | None = None, num_classes: int | None = None, *, backend: str | None = None
) -> Tensor:
    """Group fully-connected layer: each of G group embeddings makes the logits of its own J classes.

    logits[b, c] = sum_e h[b, g, e] * weight[g, e, j] + bias[c]    with g = c div J, j = c mod J, c < C

    Nothing is transposed, padded or copied: h and weight are read where they lie, whatever their strides, and the
    (B, C) logits are written once. Classes past C in the last groups do not exist, and their weight has gradient 0.

    Args:
        h: Group embeddings (B, G, E), floating.
        weight: (G, E, J) with J = ceil(C / G), of the dtype of h; or (E, 1), shared by all queries (then C = G).
        bias: (C), or (1) with a shared weight, or None.
        num_classes: C. By default the length of `bias`, else G * J.
        backend: "auto", "reference", "triton", "cpp", "cuda"; None takes the surrounding `backend(...)`.

    Returns:
        Logits (B, C), contiguous, of the dtype of h; under autocast all inputs are cast to autocast's dtype first.

    Raises:
        ValueError: A shape or device does not fit; the message names the argument.
        TypeError: An argument is no floating tensor, or the dtypes differ.
        BackendError: An explicitly chosen backend cannot run this call.

    Numerics:
        16-bit inputs are accumulated in fp32 and rounded once. fp32 on CUDA follows
        `torch.backends.cuda.matmul.allow_tf32`. Every backend is deterministic: the same call gives the same bits.

    Source:
        ML-Decoder, Eq. 3, Fig. 4, App. L; the shared weight: section 2.3.3.
    """
    device_type = h.device.type if isinstance(h, Tensor) else "cpu"
    if is_autocasting(device_type):
        h, weight, bias = autocast(device_type, h, weight, bias)  # type: ignore[assignment]
    h, weight, bias, C = check_group_fc("group_fc", h, weight, bias, num_classes)
    if weight.ndim == 2:
        # One weight for all queries is one group of one class over B * G rows.
        B, G, E = h.shape
        return _group_fc(h.reshape(B * G, 1, E), weight.unsqueeze(0), bias, 1, backend=backend).view(B, G)
    return _group_fc(h, weight, bias, C, backend=backend)


def check_group_fc(
    where: str, h: Tensor, weight: Tensor, bias: Tensor | None, num_classes: int | None
) -> tuple[Tensor, Tensor, Tensor | None, int]:
    """h, weight and bias with C, after a check of their shapes, dtypes and devices."""
    for name, value in (("h", h), ("weight", weight)):
        _check.check_tensor(where, name, value)
    _check.check_ndim(where, "h", h, "(B, G, E)")
    _check.check_like(where, "weight", weight, "h", h)
    if bias is not None:
        _check.check_tensor(where, "bias", bias)
        _check.check_like(where, "bias", bias, "h", h)
    G, E = h.shape[1:]
    if weight.ndim == 2:
        _check.check_shape(where, "weight", weight, "(E, 1)", (E, 1))
        if bias is not None:
            _check.check_shape(where, "bias", bias, "(1,)", (1,))
        if num_classes is not None and num_classes != G:
            _check.fail(where, "num_classes", f"G = {G} with a shared weight (E, 1)", num_classes)
        return h, weight, bias, G
    _check.check_ndim(where, "weight", weight, "(G, E, J)")
    C = num_classes
    if C is None:
        C = G * weight.shape[2] if bias is None else bias.numel()
    J = weight.shape[2]
    expected_J = -(-C // G) if G > 0 else 0
    # Some groups of a larger layer have its J, and fill all groups but the last.
    if tuple(weight.shape[:2]) != (G, E) or not (J == expected_J or (G - 1) * J < C) or C > G * J:
        _check.fail(where, "weight", f"(G, E, ceil(C / G)) = {(G, E, expected_J)} for C = {C}", tuple(weight.shape))
    if bias is not None:
        _check.check_shape(where, "bias", bias, "(C,)", (C,))
    return h, weight, bias, C
