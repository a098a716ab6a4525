"""FLOPs of the ops for torch's counter, which counts nothing for an op without a formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .ops import _fused  # noqa: F401 - the ops must be registered

Shape = Sequence[int]


def _group_fc(h: Shape, weight: Shape, bias: Any, num_classes: int, backend: str, **_: Any) -> int:
    return 2 * h[0] * h[2] * int(num_classes)


def _group_fc_backward(
    dout: Shape, h: Shape, weight: Shape, bias: Any, num_classes: int, needs: Sequence[bool], backend: str, **_: Any
) -> int:
    return sum(needs[:2]) * _group_fc(h, weight, bias, num_classes, backend)


def _csra_pool(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * x[2] * weight[0] * weight[1]


def _csra_pool_backward(dout: Shape, x: Shape, weight: Shape, *rest: Any, **_: Any) -> int:
    kept, needs = rest[-3], rest[-2]
    recomputed = 0 if kept is not None and kept[0] else 1
    return (sum(needs[:2]) + recomputed) * _csra_pool(x, weight)


def _query_attention(q: Shape, k: Shape, *_: Any, **__: Any) -> int:
    return 4 * k[0] * k[1] * k[2] * q[-2]


def _query_attention_backward(dout: Shape, q: Shape, k: Shape, *rest: Any, **_: Any) -> int:
    # Two products are needed in any case: scores again, and dout v^T.
    return (2 + sum(rest[-2])) * _query_attention(q, k) // 2


def _products_of_loss(loss: str, make: Sequence[bool]) -> int:
    """How often a loss in the head multiplies: logits, again for softmax's gradients, and dh and dweight."""
    return 1 + (1 if loss == "softmax" and any(make) else 0) + sum(make[:2])


def _group_fc_loss(h: Shape, weight: Shape, bias: Any, *rest: Any, **_: Any) -> int:
    num_classes, loss, make = rest[6], rest[7], rest[16]
    return _products_of_loss(loss, make) * _group_fc(h, weight, bias, num_classes, "")


def _group_fc_loss_backward(dout: Shape, h: Shape, weight: Shape, bias: Any, *rest: Any, **_: Any) -> int:
    return _products_of_loss(rest[7], rest[17]) * _group_fc(h, weight, bias, rest[6], "")


def _csra_loss(x: Shape, weight: Shape, bias: Any, *rest: Any, **_: Any) -> int:
    return _products_of_loss(rest[11], rest[20]) * _csra_pool(x, weight)


def _csra_loss_backward(dout: Shape, x: Shape, weight: Shape, bias: Any, *rest: Any, **_: Any) -> int:
    return _products_of_loss(rest[11], rest[21]) * _csra_pool(x, weight)


def _group_fc_topk(h: Shape, weight: Shape, bias: Any, k: int, num_classes: int, *_: Any, **__: Any) -> int:
    return _group_fc(h, weight, bias, num_classes, "")


def formulas() -> dict[Any, Any]:
    """{library op: function of shapes}, the custom_mapping of torch's FlopCounterMode once they are registered."""
    ops = torch.ops.mlhead
    return {
        ops.group_fc: _group_fc,
        ops.group_fc_backward: _group_fc_backward,
        ops.csra_pool: _csra_pool,
        ops.csra_pool_backward: _csra_pool_backward,
        ops.query_attention: _query_attention,
        ops.query_attention_backward: _query_attention_backward,
        ops.group_fc_loss: _group_fc_loss,
        ops.group_fc_loss_backward: _group_fc_loss_backward,
        ops.csra_loss: _csra_loss,
        ops.csra_loss_backward: _csra_loss_backward,
        ops.group_fc_topk: _group_fc_topk,
    }


def register_flop_formulas() -> None:
    """Makes `torch.utils.flop_counter.FlopCounterMode` count mlhead's ops; calling it again does nothing.

    A multiply-add counts as two, as for torch's own ops. Products that backward computes again are counted, those of
    layers that do no matrix product (dropout_add_layer_norm, relu_dropout) are not, as torch does for its own.

    Example:
        >>> import mlhead
        >>> from torch.utils.flop_counter import FlopCounterMode
        >>> mlhead.register_flop_formulas()
        >>> with FlopCounterMode(display=False) as counter:
        ...     logits = mlhead.MLDecoder(2048, 1000)(torch.randn(1, 2048, 7, 7))
        >>> flops = counter.get_total_flops()
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for op, formula in formulas().items():
        if op not in flop_registry:
            register_flop_formula(op)(formula)
