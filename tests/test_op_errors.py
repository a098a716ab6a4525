"""Bad input: the message names the op, the argument, what was expected and what came."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mlhead import csra_attention, csra_pool, dropout_add_layer_norm, group_fc, query_attention, relu_dropout

H, W = torch.zeros(2, 3, 4), torch.zeros(3, 4, 5)
X, M = torch.zeros(2, 6, 4), torch.zeros(2, 5, 4)
Q, K = torch.zeros(3, 8), torch.zeros(2, 5, 8)
ONE = {"temperatures": (1.0,), "lam": 0.1}
TWO = {"temperatures": (1.0, math.inf), "lam": 0.1}

CASES: list[tuple[Any, tuple, dict, type[Exception], str]] = [
    (group_fc, (H[0], W), {}, ValueError, r"group_fc: h must be \(B, G, E\), got \(3, 4\)"),
    (group_fc, ([1], W), {}, TypeError, "group_fc: h must be a torch.Tensor, got list"),
    (group_fc, (H.long(), W), {}, TypeError, "group_fc: h must be of a floating dtype, got torch.int64"),
    (
        group_fc,
        (H, W[:2]),
        {},
        ValueError,
        r"group_fc: weight must be .* = \(3, 4, 5\) for C = 15, got \(2, 4, 5\)|C = 10",
    ),
    (
        group_fc,
        (H, W),
        {"num_classes": 9},
        ValueError,
        r"weight must be \(G, E, ceil\(C / G\)\) = \(3, 4, 3\) for C = 9",
    ),
    (group_fc, (H, W, torch.zeros(3, 5)), {}, ValueError, "group_fc: "),
    (group_fc, (H, W, torch.zeros(14)), {"num_classes": 15}, ValueError, r"bias must be \(C,\) = \(15,\), got \(14,\)"),
    (group_fc, (H, W.double()), {}, TypeError, "weight must be torch.float32 like h, got torch.float64"),
    (group_fc, (H, W.to("meta")), {}, ValueError, "weight must be on cpu like h, got meta"),
    (group_fc, (H, torch.zeros(4, 2)), {}, ValueError, r"weight must be \(E, 1\) = \(4, 1\), got \(4, 2\)"),
    (
        group_fc,
        (H, torch.zeros(4, 1)),
        {"num_classes": 7},
        ValueError,
        r"num_classes must be G = 3 with a shared weight",
    ),
    (group_fc, (H, torch.zeros(4)), {}, ValueError, r"weight must be \(G, E, J\), got \(4,\)"),
    (csra_pool, (X[0], M), TWO, ValueError, r"x must be \(B, L, D\) tokens or a \(B, D, H, W\) map, got \(6, 4\)"),
    (csra_pool, (X[:, :0], M), TWO, ValueError, "x must be of at least one position"),
    (csra_pool, (X, M[0]), TWO, ValueError, r"weight must be \(H, C, D\), got \(5, 4\)"),
    (csra_pool, (X, M[..., :3]), TWO, ValueError, r"weight must be \(H, C, D\) = \(2, 5, 4\), got \(2, 5, 3\)"),
    (csra_pool, (X, M), ONE, ValueError, r"temperatures must be one number per head \(H = 2\), got \[1.0\]"),
    (csra_pool, (X, M), {**TWO, "temperatures": (1, 0)}, ValueError, "temperatures must be above 0"),
    (csra_pool, (X, M), {**TWO, "temperatures": (1, math.nan)}, ValueError, "temperatures must be above 0"),
    (csra_pool, (X, M), {**TWO, "lam": (1, 2, 3)}, ValueError, "lam must be one number, or one per head"),
    (csra_pool, (X, M), {**TWO, "lam": math.nan}, ValueError, "lam must be finite"),
    (csra_pool, (X, M, torch.zeros(5)), TWO, ValueError, r"bias must be \(H, C\) = \(2, 5\), got \(5,\)"),
    (
        csra_attention,
        (X, M, [[0]]),
        {"temperatures": (1, 2)},
        ValueError,
        r"classes must be \(K,\) or \(B, K\) with B = 2, got \(1, 1\)",
    ),
    (
        csra_attention,
        (X, M, [5]),
        {"temperatures": (1, 2)},
        ValueError,
        r"classes must be in \[0, C\) = \[0, 5\), got \[5\]",
    ),
    (csra_attention, (X, M, [1.7]), {"temperatures": (1, 2)}, TypeError, "classes must be integers"),
    (group_fc, (H, W, torch.zeros(())), {}, ValueError, "group_fc: "),
    (query_attention, (Q, K, K, 2), {"dropout_p": 0.1, "seed": 2**63}, ValueError, "seed must be a 64-bit integer"),
    (query_attention, (Q[:, :0], K[..., :0], K, 2), {}, ValueError, "k must be of at least one position and feature"),
    (query_attention, (Q, K, K, 3), {}, ValueError, "num_heads must be a divisor of E = 8, got 3"),
    (query_attention, (Q, K, K, 0), {}, ValueError, "num_heads must be at least 1, got 0"),
    (query_attention, (Q, K[:, :0], K, 2), {}, ValueError, "k must be of at least one position and feature"),
    (query_attention, (Q[:, :4], K, K, 2), {}, ValueError, r"q must be \(G, E\) = \(3, 8\), got \(3, 4\)"),
    (
        query_attention,
        (Q.expand(5, 3, 8), K, K, 2),
        {},
        ValueError,
        r"q must be \(B, G, E\) = \(2, 3, 8\), got \(5, 3, 8\)",
    ),
    (query_attention, (Q, K, K[:1], 2), {}, ValueError, r"v must be \(B, L, E\) = \(2, 5, 8\), got \(1, 5, 8\)"),
    (query_attention, (Q, K, K, 2), {"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    (
        query_attention,
        (Q, K, K, 2),
        {"key_mask": K[..., 0]},
        TypeError,
        "key_mask must be a bool tensor, True = attend",
    ),
    (query_attention, (Q, K, K, 2), {"dropout_p": 0.1, "seed": K}, TypeError, "seed must be an int64 scalar tensor"),
    (
        query_attention,
        (Q, K, K, 2),
        {"dropout_p": 0.1, "seed": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        r"seed must be an int64 scalar tensor, got torch.int64 \(2,\)",
    ),
    (query_attention, (Q, K, K, 2), {"dropout_p": "0.1"}, TypeError, "dropout_p must be a number, got str"),
    (dropout_add_layer_norm, (Q, K, Q[0], Q[0]), {}, ValueError, r"x must be \(B, N, E\), got \(3, 8\)"),
    (dropout_add_layer_norm, (K, K[:1], Q[0], Q[0]), {}, ValueError, r"residual must be .* = \(2, 5, 8\), got \(1, 5"),
    (dropout_add_layer_norm, (K, K.half(), Q[0], Q[0]), {}, TypeError, "residual must be torch.float32 like x"),
    (dropout_add_layer_norm, (K, K, Q, Q[0]), {}, ValueError, r"weight must be \(E,\) = \(8,\), got \(3, 8\)"),
    (
        dropout_add_layer_norm,
        (K, K, Q[0].half(), Q[0].half()),
        {},
        TypeError,
        "weight must be torch.float32 like x, or torch.float32, got torch.float16",
    ),
    (dropout_add_layer_norm, (K, K, Q[0], Q[0].double()), {}, TypeError, "bias must be torch.float32 like weight"),
    (dropout_add_layer_norm, (K, K, Q[0], Q[0]), {"eps": -1.0}, ValueError, "eps must be at least 0, got -1.0"),
    (dropout_add_layer_norm, (K, K, Q[0], Q[0]), {"dropout_p": 1.5}, ValueError, "dropout_p must be in"),
    (relu_dropout, (Q,), {}, ValueError, r"x must be \(B, N, F\), got \(3, 8\)"),
    (relu_dropout, (K.long(),), {}, TypeError, "x must be of a floating dtype"),
    (relu_dropout, (K,), {"dropout_p": 0.1, "seed": 0.5}, TypeError, "seed must be an int"),
]


def test_no_class_has_no_attention() -> None:
    assert csra_attention(X, M, [], temperatures=(1, 2)).shape == (2, 2, 0, 6)
    with pytest.raises(TypeError, match=r"classes must be integers, got torch.float32"):
        csra_attention(X, M, torch.empty(0), temperatures=(1, 2))


@pytest.mark.parametrize(("op", "args", "options", "error", "message"), CASES)
def test_message(op: Any, args: tuple, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        op(*args, **options)
