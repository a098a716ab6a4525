"""query_attention on a CPU where one block is not enough: many queries, long images, all at once; NaN, memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peak import printed_by

from mlhead import _backend, _extension, query_attention
from mlhead.reference._dropout import keep_mask
from mlhead.testing import CASES, check, oracle, plain_torch

ROOT = Path(__file__).resolve().parent.parent
CASE = CASES["query_attention"]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
needs_library = pytest.mark.skipif(_extension.load_cpu() is not None, reason="the CPU extension is not built")
ALL = {"masked": True, "dropout": 0.2}


def compare(dims: dict[str, Any], backend: str, dtype: torch.dtype) -> None:
    sample = CASE.make(dims, dtype, "cpu", 1)
    exact, plain = oracle(sample), plain_torch(sample)
    for name, result in sample.run(backend).items():
        check(name, result, exact[name], plain[name])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_image", [False, True])
def test_many_blocks(dtype: torch.dtype, per_image: bool) -> None:
    """Several blocks of queries and of positions, forward and backward, with every option."""
    compare({"B": 2, "L": 530, "E": 24, "G": 131, "heads": 2, "per_image": per_image, **ALL}, "cpp", dtype)
    compare({"B": 3, "L": 70, "E": 34, "G": 300, "heads": 1, "per_image": per_image, **ALL}, "cpp", dtype)


@needs_library
@pytest.mark.parametrize("dims", [(1, 4096, 16, 30, 2), (20, 1, 12, 200, 4), (13, 5, 40, 3, 8)], ids=str)
def test_extremes(dims: tuple[int, ...]) -> None:
    compare(dict(zip(("B", "L", "E", "G", "heads"), dims, strict=True)), "cpp", torch.float32)


@needs_library
@pytest.mark.parametrize("limit", ["default", "avx2"])
def test_every_instruction_set(limit: str) -> None:
    """ATEN_CPU_CAPABILITY lowers what runs; each is held to the same bound."""
    code = "from test_query_attention import *\nfor d in DTYPES: test_many_blocks(d, False)"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    variables = {**os.environ, "ATEN_CPU_CAPABILITY": limit, "PYTHONPATH": path}
    called = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert called.returncode == 0, called.stderr


@needs_library
def test_the_bits_do_not_depend_on_the_threads() -> None:
    sample = CASE.make({"B": 11, "L": 30, "E": 32, "G": 40, "heads": 4, **ALL}, torch.float32, "cpu", 2)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(sample.run("cpp"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], other[name]) for name in other)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_library)])
def test_nan_stays_with_its_queries_and_images(backend: str) -> None:
    q, k, v = torch.randn(5, 8), torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    q[2, 1] = float("nan")
    out = query_attention(q, k, v, 2, backend=backend)
    assert out[:, 2, :4].isnan().all()  # the head of the NaN
    assert out[:, 2, 4:].isfinite().all()
    assert out[:, [0, 1, 3, 4]].isfinite().all()
    k[1, 3] = float("inf")
    mask = torch.ones(3, 4, dtype=torch.bool)
    assert query_attention(q.nan_to_num(), k, v, 2, backend=backend)[1].isnan().any()
    mask[1, 3] = False
    assert query_attention(q.nan_to_num(), k, v, 2, key_mask=mask, backend=backend).isfinite().all()


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=needs_library)])
def test_dropout_is_the_mask_of_its_definition(backend: str) -> None:
    """Uniform weights and one-hot values show which weights were dropped."""
    B, H, G, L, p = 2, 2, 3, 6, 0.4
    v = torch.eye(L).repeat(B, 1, H)
    out = query_attention(torch.zeros(G, H * L), torch.randn(B, L, H * L), v, H, dropout_p=p, seed=-5, backend=backend)
    kept = keep_mask(torch.tensor(-5), p, B, H, G, L)
    expected = kept.float() / L / (1 - p)
    torch.testing.assert_close(out.view(B, G, H, L).transpose(1, 2), expected)


PEAK = """
import sys, torch
from mlhead._resident import peak
from mlhead import query_attention
torch.set_num_threads(1)
G, B, L, E = int(sys.argv[1]), 4, 1024, 16
q, k, v = torch.randn(G, E, requires_grad=True), torch.randn(B, L, E, requires_grad=True), torch.randn(B, L, E)
def step(q):
    out = query_attention(q, k, v, 2, dropout_p=0.1, seed=1, backend="cpp")
    return torch.autograd.grad(out, (q, k), torch.ones_like(out))
step(q[:100])
before = peak()
step(q)
print(peak() - before)
"""


@needs_library
def test_memory_does_not_grow_with_the_map() -> None:
    """Peak resident memory of a step while G grows 16-fold; the map of 16,000 queries would take 524 MB."""
    few, many = (printed_by(PEAK, G) for G in (1_000, 16_000))
    # q, its gradient and the sums of up to 4 runs of images; out, its gradient, and two numbers per head and query.
    allowed = (16_000 - 1_000) * (6 * 16 * 4 + 2 * 4 * 16 * 4 + 4 * 2 * 2 * 4)
    assert 0 < many - few < allowed + 10_000_000, (few, many, allowed)


def test_auto_takes_the_extension_on_a_cpu() -> None:
    name = _backend.resolve("query_attention", "auto", torch.device("cpu"), torch.float32)
    assert name == ("cpp" if _extension.load_cpu() is None else "reference")
