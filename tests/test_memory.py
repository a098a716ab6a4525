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
name, backend = sys.argv[1], sys.argv[2]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
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
        linear_loss(x, linear.weight, linear.bias, targets, backend=backend, update=update).backward()
        optimizer.step()
    return peak() - before
train(500, 64, 4)
print(train(1_500_000, 64, 8))
"""


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw", "fused sgd", "fused adamw", "fused kahan"])
def test_formula_is_within_5_percent_of_measurement(optimizer: str) -> None:
    backend = "reference" if _backend.unavailable("cpp") else "cpp"
    measured = printed_by(MEASURE, optimizer, backend)
    fused, kind = optimizer.startswith("fused"), optimizer.removeprefix("fused ")
    options: dict[str, Any] = {"optimizer": kind}
    if kind == "kahan":
        options = {"optimizer": "sgd", "dtype": torch.bfloat16, "rounding": "kahan"}
    predicted = head_memory(1_500_000, 64, 8, fused_update=fused, **options).total
    assert abs(measured - predicted) <= 0.05 * measured, (measured / 2**20, predicted / 2**20)


def test_eager_counts_its_logits() -> None:
    fused, eager = (head_memory(1_000_000, 256, 32, loss_in_head=flag) for flag in (True, False))
    assert fused.logits == 0
    assert eager.logits >= 500_000_000
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
