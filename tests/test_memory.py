"""The memory formula against measurement."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from mlhead import _backend, head_memory

MEASURE = """
import resource, sys, torch
from mlhead import SparseTargets, linear_loss
torch.set_num_threads(1)
name, backend = sys.argv[1], sys.argv[2]
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, foreach=False),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=False),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}
def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
def train(C, D, B):
    before = resident()
    x = torch.randn(B, D, requires_grad=True)
    linear = torch.nn.Linear(D, C)
    optimizer = OPTIMIZERS[name](linear.parameters())
    targets = SparseTargets.from_lists([[b] for b in range(B)], C)
    for _ in range(2):
        optimizer.zero_grad()
        linear_loss(x, linear.weight, linear.bias, targets, backend=backend).backward()
        optimizer.step()
    return resident() - before
train(500, 64, 4)
print(train(1_500_000, 64, 8))
"""


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
def test_formula_is_within_5_percent_of_measurement(optimizer: str) -> None:
    backend = "reference" if _backend.unavailable("cpp") else "cpp"
    settings = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, optimizer, backend],
        capture_output=True, text=True, check=True, env={**os.environ, **settings},
    )  # fmt: skip
    measured = int(run.stdout) * 1024
    predicted = head_memory(1_500_000, 64, 8, optimizer=optimizer).total
    assert abs(measured - predicted) <= 0.05 * measured, (measured / 2**20, predicted / 2**20)


def test_eager_counts_its_logits() -> None:
    fused, eager = (head_memory(1_000_000, 256, 32, loss_in_head=flag) for flag in (True, False))
    assert fused.logits == 0
    assert eager.logits >= 500_000_000
    bf16 = head_memory(3_000_000, 768, 128, groups=100, dtype=torch.bfloat16)
    assert bf16.weights == 2 * 769 * 3_000_000
    with pytest.raises(ValueError, match="optimizer must be one of 'none', 'sgd'"):
        head_memory(10, 10, 10, optimizer="lion")
