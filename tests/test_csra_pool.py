"""csra_pool's chunks and designs: the same results whatever their size, and memory that does not grow with the map."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from peak import printed_by
from torch import Tensor

from mlhead import _backend, csra_pool
from mlhead.ops._csra_kernels import forward_design
from mlhead.ops._csra_plan import MACHINES, plan_chunks
from mlhead.testing import CASES, check, oracle, plain_torch

CASE = CASES["csra_pool"]
BACKENDS = [
    name
    for name in ("cpp", "triton")
    if _backend._refusal("csra_pool", _backend.implementations("csra_pool"), name, "cpu", torch.float32) is None
]


def compare(dims: dict[str, Any], backend: str, dtype: torch.dtype = torch.float32) -> None:
    sample = CASE.make(dims, dtype, "cpu", 0)
    exact, plain = oracle(sample), plain_torch(sample)
    for name, result in sample.run(backend).items():
        check(name, result, exact[name], plain[name])


def compare_inference(dims: dict[str, Any], dtype: torch.dtype, design: str) -> None:
    """As `compare`, without gradients: those would keep the scores, and no design of the forward be taken."""
    sample = CASE.make(dims, dtype, "cpu", 0)
    with forward_design(design):
        check("out", sample.call("triton"), oracle(sample)["out"], plain_torch(sample)["out"])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scratch_bytes", [4, 400, 4000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_results_do_not_depend_on_the_chunks(
    backend: str, scratch_bytes: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = dataclasses.replace(MACHINES["cpu"], scratch_bytes=scratch_bytes, kept_bytes=scratch_bytes)
    monkeypatch.setitem(MACHINES, "cpu", small)
    for dims in (
        {"B": 3, "L": 7, "D": 16, "H": 2, "C": 5, "bias": True},
        {"B": 3, "L": 6, "D": 16, "H": 2, "C": 5, "map": True, "normalize": False},
    ):
        with forward_design("chunked"):
            compare(dims, backend, dtype)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("design", ["fused", "chunked"])
def test_both_designs(design: str, dtype: torch.dtype) -> None:
    for dims in (
        {"B": 7, "L": 49, "D": 20, "H": 2, "C": 37, "bias": True},  # images that begin and end inside tiles
        {"B": 2, "L": 196, "D": 16, "H": 1, "C": 70, "normalize": False, "average": 0.5},
        {"B": 3, "L": 64, "D": 33, "H": 6, "C": 15, "map": True},
        {"B": 1, "L": 300, "D": 8, "H": 2, "C": 3, "temperatures": (99.0, 0.5), "lam": (0.2, 1.0)},
    ):
        compare_inference(dims, dtype, design)
        with forward_design(design):
            compare(dims, "triton", dtype)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton's interpreter")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("T", [(math.inf, 2.0), (99.0,)], ids=str)
def test_images_anywhere_in_fused_tiles(T: tuple[float, ...], dtype: torch.dtype) -> None:
    """Borders at any position of a run, images of exactly a run (32 in 16 bits, 16 in fp32), a single image."""
    run = 32 if dtype == torch.float16 else 16
    for B, L in ((3, 49), (4, 33), (3, 37), (4, 36), (5, run), (1, run)):
        dims = {"B": B, "L": L, "D": 9, "H": len(T), "C": 5, "temperatures": T, "lam": (0.5,) * len(T)}
        compare_inference(dims, dtype, "fused")


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton's interpreter")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("L", [36, 49])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan], ids=str)
def test_an_infinite_image_stays_alone_in_fused_tiles(bad: float, L: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(7, L, 8), torch.randn(2, 5, 8)

    def fused() -> Tensor:
        with forward_design("fused"):
            return csra_pool(x, weight, temperatures=(math.inf, 3.0), lam=0.5, backend="triton")

    others = [0, 1, 2, 4, 5, 6]
    before = fused()
    x[3] = bad
    after = fused()
    assert torch.equal(after[others], before[others])
    assert not after[3].isfinite().any()


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton's interpreter")
def test_images_shorter_than_a_run_are_not_fused() -> None:
    with forward_design("fused"), pytest.raises(ValueError, match="needs L >= 16, got L = 15"):
        csra_pool(torch.randn(2, 15, 4), torch.randn(1, 3, 4), temperatures=(1.0,), lam=0.1, backend="triton")


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_ties_and_zero_classifiers(backend: str) -> None:
    x = torch.ones(2, 5, 4).requires_grad_()
    weight = torch.stack([torch.ones(3, 4), torch.zeros(3, 4)]).requires_grad_()
    logits = csra_pool(x, weight, temperatures=(math.inf, 1.0), lam=0.5, normalize=True, backend=backend)
    torch.testing.assert_close(logits, torch.full((2, 3), 1.5 * 2.0))
    dx, dweight = torch.autograd.grad(logits.sum(), (x, weight))
    # The first of the equal positions takes all of the maximum's gradient.
    even = 3 * 0.5 / 5
    expected = torch.full((2, 5, 4), even)
    expected[:, 0] += 3 * 0.5 * 0.5
    torch.testing.assert_close(dx, expected)
    assert dweight.isfinite().all()


def test_chunks_fit_the_scratch() -> None:
    machine = MACHINES["cpu"]
    for B, L, D, N in (
        (64, 196, 2048, 480),
        (4, 49, 2048, 9605),
        (64, 784, 1024, 640),
        (1, 1, 1, 1),
        (2, 49, 64, 10**6),
    ):
        plan = plan_chunks(B, L, D, N, 4, B, machine)
        assert 1 <= plan.images <= B
        assert 1 <= plan.columns <= N
        assert plan.images * L * plan.columns * 4 <= machine.scratch_bytes
    # The larger of x and the weight is read once.
    assert plan_chunks(64, 784, 1024, 640, 4, 64, machine).columns == 640
    assert plan_chunks(4, 49, 2048, 10**6, 4, 4, machine).images == 4
    # A single position of a single class may be all that fits.
    assert plan_chunks(3, 10**7, 8, 5, 4, 3, machine) == (1, 1)


def test_chunks_of_a_gpu_are_larger_where_gradients_are_added_up() -> None:
    machine = MACHINES["cuda"]
    B, L, D, N = 128, 196, 2048, 9605
    pools, adds = (plan_chunks(B, L, D, N, 2, B, m) for m in (machine.for_pooling(), machine))
    assert pools.images * L * pools.columns * 2 <= machine.cache_bytes
    assert machine.cache_bytes < adds.images * L * adds.columns * 2 <= machine.scratch_bytes
    # Few columns and many images of few features: nothing is gained by leaving the cache.
    assert plan_chunks(4096, 49, 64, 80, 2, 4096, machine) == plan_chunks(
        4096, 49, 64, 80, 2, 4096, machine.for_pooling()
    )


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
def test_tiles_waste_little_and_count_their_images() -> None:
    from mlhead.kernels import csra_pool_fused as kernels

    for B, L in ((64, 196), (128, 49), (256, 49), (64, 784)):
        assert kernels.wasted(B, L, 128) < 0.01
    for L in (1, 2, 7, 49, 63, 64, 65, 128, 196, 256, 784):
        for rows in (64, 128):
            starts = range(0, 5 * L * rows, rows)
            touched = max(min(s + rows - 1, 5 * L * rows) // L - s // L + 1 for s in starts)
            assert kernels.segments(L, rows) == touched
            spans = [((b + 1) * L - 1) // rows - b * L // rows + 1 for b in range(5 * rows)]
            assert kernels.parts(L, rows) == max(spans)


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs Triton")
def test_the_shape_decides_the_design() -> None:
    from mlhead.kernels import csra_pool_fused as kernels

    assert kernels.forward_design(2, 49, 512, 20, 2, 1) == "fused"
    for L, rows in ((31, 2), (15, 4)):  # shorter than a run
        assert kernels.forward_design(1, L, 512, 20, rows, 99) == "chunked"
        assert kernels.forward_design(1, L + 1, 512, 20, rows, 99) == "fused"
    # Coco: 98 by 4 tiles, at most 3 on one of 132 multiprocessors, 32 steps; 32768 bytes of a step come from L2.
    coco = (64, 196, 2048, 480, 2)
    cycles = 3 * 32 * 32768 / (5120 / 132) + 7000
    assert kernels.fused_seconds(*coco) == pytest.approx(cycles / 1.83e9)
    # Imagenet: 6 programs one after the other, since L is odd.
    cycles = 6 * (32 * 32768 / (5120 / 132) + 7000)
    assert kernels.fused_seconds(256, 49, 2048, 1000, 2) == pytest.approx(cycles / 1.83e9)
    product = 2 * 64 * 196 * 2048 * 480 / 700e12
    assert kernels.chunked_seconds(*coco, 2) == pytest.approx(product + 64 * 196 * 480 * 4 / 4e12 + 24e-6)
    # Where L2 is fast, the products bound it, at the library's rate.
    fast = dataclasses.replace(kernels.COSTS, cache_bytes=1e9, edge_cycles=0.0)
    most = 3 * 2 * 128 * 128 * 2048 * 132 / 700e12
    assert kernels.fused_seconds(*coco, fast) == pytest.approx(most)
    slow = dataclasses.replace(kernels.COSTS, cache_bytes=512.0)
    openimages = (128, 49, 2048, 9605, 2)
    assert kernels.forward_design(*openimages, 5, slow) == "chunked"
    assert kernels.forward_design(*openimages, 5, fast) == "fused"


PEAK = """
import sys, torch
from mlhead._resident import peak
from mlhead import csra_pool
torch.set_num_threads(1)
C, backend, B, L, D = int(sys.argv[1]), sys.argv[2], 2, 784, 16
x, weight = torch.randn(B, L, D, requires_grad=True), torch.randn(1, C, D, requires_grad=True)
def step(weight):
    logits = csra_pool(x, weight, temperatures=(1.0,), lam=0.1, normalize=True, backend=backend)
    return torch.autograd.grad(logits, (x, weight), torch.ones_like(logits))
step(weight[:, :2000])
before = peak()
step(weight)
print(peak() - before)
"""


@pytest.mark.parametrize("backend", ["reference", *(name for name in BACKENDS if name == "cpp")])
def test_memory_does_not_grow_with_the_map(backend: str) -> None:
    """Peak resident memory of a step while C grows 16-fold; the map of 64,000 classes would take 400 MB."""
    few, many = (printed_by(PEAK, C, backend) for C in (4_000, 64_000))
    # What the larger one may take more: the weight's gradient, B C logits and statistics, 16 bytes a class and image.
    allowed = (64_000 - 4_000) * (3 * 16 * 4 + 2 * 16 * 4)
    assert 0 < many - few < allowed + 20_000_000, (few, many, allowed)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_memory_does_not_grow_with_the_map_on_a_gpu(backend: str) -> None:
    def peak(C: int) -> int:
        x = torch.randn(8, 784, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(1, C, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

        def step() -> tuple[Tensor, ...]:
            logits = csra_pool(x, weight, temperatures=(1.0,), lam=0.1, normalize=True, backend=backend)
            return torch.autograd.grad(logits, (x, weight), torch.ones_like(logits))

        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    few, many = peak(4_000), peak(64_000)
    # The gradient of the weight with its normalised copy, logits and statistics; the map would be 800 MB.
    allowed = 60_000 * (3 * 64 * 2 + 8 * 64)
    assert many - few < allowed + (64 << 20), (few, many, allowed)
