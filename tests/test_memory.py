"""The memory formula against measurement."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peak import printed_by

from mlhead import _backend, head_memory

MEASURE = """
import sys, torch
from mlhead import SparseTargets, linear_loss, optim
from mlhead._resident import peak
torch.set_num_threads(1)
name, backend, autocast = sys.argv[1], sys.argv[2], sys.argv[3] == "autocast"
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw by default": lambda p: torch.optim.AdamW(p, lr=0.1),
    "fused sgd": lambda p: optim.ClassSGD(list(p)[:1], lr=0.1),
    "fused adamw": lambda p: optim.ClassAdamW(list(p)[:1], lr=0.1),
    "fused kahan": lambda p: optim.ClassSGD(list(p)[:1], lr=0.1, rounding="kahan"),
}
def train(C, D, B):
    before = peak()
    dtype = torch.bfloat16 if name == "fused kahan" else torch.float32
    x = torch.randn(B, D, requires_grad=True, dtype=dtype)
    linear = torch.nn.Linear(D, C, dtype=dtype)
    optimizer = OPTIMIZERS[name](linear.parameters())
    targets = SparseTargets.from_lists([[b] for b in range(B)], C)
    for _ in range(2):
        optimizer.zero_grad()
        update = optimizer if name.startswith("fused") else None
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = linear_loss(x, linear.weight, linear.bias, targets, backend=backend, update=update)
        loss.backward()
        optimizer.step()
    return peak() - before
train(500, 64, 4)
print(train(1_500_000, 64, 8))
"""


@pytest.mark.parametrize(
    ("optimizer", "autocast"),
    [
        *((name, None) for name in ("sgd", "momentum", "adamw", "fused sgd", "fused adamw", "fused kahan")),
        ("adamw by default", None),
        ("sgd", torch.bfloat16),
        ("fused sgd", torch.bfloat16),
    ],
)
def test_formula_is_within_5_percent_of_measurement(optimizer: str, autocast: torch.dtype | None) -> None:
    backend = "reference" if _backend.unavailable("cpp") else "cpp"
    measured = printed_by(MEASURE, optimizer, backend, "autocast" if autocast else "plain")
    fused, kind = optimizer.startswith("fused"), optimizer.removeprefix("fused ")
    options: dict[str, Any] = {"optimizer": kind, "autocast": autocast}
    if kind == "kahan":
        options = {"optimizer": "sgd", "dtype": torch.bfloat16, "rounding": "kahan"}
    temporaries = 0
    if kind == "adamw by default":  # has two, which the formula leaves out
        options["optimizer"], temporaries = "adamw", 2 * 4 * 64 * 1_500_000
    predicted = head_memory(1_500_000, 64, 8, fused_update=fused, **options).total + temporaries
    assert abs(measured - predicted) <= 0.05 * measured, (measured / 2**20, predicted / 2**20)


EAGER = """
import sys, torch
from mlhead._resident import peak
torch.set_num_threads(1)
C, D, B, dtype = *map(int, sys.argv[1:4]), getattr(torch, sys.argv[4])
def step(C, D, B):
    before = peak()
    x = torch.randn(B, D, requires_grad=True, dtype=dtype)
    linear = torch.nn.Linear(D, C, dtype=dtype)
    targets = torch.zeros(B, C)
    targets[:, ::999] = 1
    logits = linear(x)  # which training loops hold
    torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), targets).backward()
    return peak() - before
step(50, D, B)
print(step(C, D, B))
"""


@pytest.mark.parametrize(
    ("C", "D", "B", "dtype"),
    [(200_000, 16, 64, "float32"), (1_000_000, 64, 32, "float32"), (200_000, 16, 64, "bfloat16")],
)
def test_eager_formula_is_within_5_percent_of_measurement(C: int, D: int, B: int, dtype: str) -> None:
    """Where the loss's own arithmetic decides, and where the gradient of the weight does."""
    measured = printed_by(EAGER, C, D, B, dtype)
    options: dict[str, Any] = {"optimizer": "none", "loss_in_head": False, "dtype": getattr(torch, dtype)}
    predicted = head_memory(C, D, B, **options).total
    assert abs(measured - predicted) <= 0.05 * measured, (measured / 2**20, predicted / 2**20)


def test_eager_counts_its_logits() -> None:
    fused, eager = (head_memory(1_000_000, 256, 32, loss_in_head=flag) for flag in (True, False))
    assert fused.logits == 0
    assert eager.logits == 12 * 32_000_000
    bf16 = head_memory(3_000_000, 768, 128, groups=100, dtype=torch.bfloat16)
    assert bf16.weights == 2 * 769 * 3_000_000
    with pytest.raises(ValueError, match="optimizer must be one of 'none', 'sgd'"):
        head_memory(10, 10, 10, optimizer="lion")
    with pytest.raises(ValueError, match="rounding must be 'nearest' without a fused update, got 'kahan'"):
        head_memory(10, 10, 10, rounding="kahan")
    with pytest.raises(ValueError, match="head_memory: threads must be at least 1, got 0"):
        head_memory(10, 10, 10, threads=0)
    with pytest.raises(TypeError, match="head_memory: threads must be an integer, got float"):
        head_memory(10, 10, 10, threads=1.5)  # type: ignore[arg-type]


def test_autocast_counts_its_copies() -> None:
    """J = 4: 3 groups of 5 features, 2 images, in 2 bytes; none where the dtype is autocast's, or fp64."""
    for fused in (False, True):
        plain, cast = (
            head_memory(10, 5, 2, groups=3, fused_update=fused, autocast=dtype) for dtype in (None, torch.bfloat16)
        )
        assert plain.casts == 0
        assert cast.casts == cast.total - plain.total == 2 * (3 * 5 * 4 + 10 + 2 * 3 * 5)
    for dtype in (torch.bfloat16, torch.float64):
        assert head_memory(10, 5, 2, dtype=dtype, autocast=torch.bfloat16).casts == 0


def test_impossible_heads_are_named() -> None:
    with pytest.raises(ValueError, match="head_memory: fused_update must be False with loss_in_head=False, got True"):
        head_memory(10, 10, 10, fused_update=True, loss_in_head=False)
    with pytest.raises(ValueError, match=r"autocast must be None with loss_in_head=False, got torch\.bfloat16"):
        head_memory(10, 10, 10, autocast=torch.bfloat16, loss_in_head=False)
    for wrong in ("float32", torch.int64, None, 4):
        with pytest.raises(TypeError, match=f"head_memory: dtype must be a floating torch.dtype, got {wrong}"):
            head_memory(10, 10, 10, dtype=wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"head_memory: autocast must be a floating torch.dtype, got torch\.int8"):
        head_memory(10, 10, 10, autocast=torch.int8)
