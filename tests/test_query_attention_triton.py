"""The Triton kernels of query_attention beyond the conformance suite: many queries, wide heads, runs of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from mlhead import _backend, query_attention
from mlhead.testing import CASES, check, oracle, plain_torch

pytest.importorskip("triton")

from mlhead.kernels import query_attention as kernels
from mlhead.kernels import query_attention_backward as backward
from mlhead.kernels._device import H100, Device
from mlhead.kernels._query_attention import head_parts, vectorised
from mlhead.kernels.query_attention_keys_backward import keys_tile

CASE = CASES["query_attention"]
A100 = Device(capability=80, multiprocessors=108, shared_bytes=166_912)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []  # then part of what gpu-check runs
REFUSAL = _backend._refusal(
    "query_attention", _backend.implementations("query_attention"), "triton", DEVICE, torch.float32
)
needs_triton = pytest.mark.skipif(REFUSAL is not None, reason=f"{REFUSAL}")


def compare(dims: Mapping[str, Any], dtype: torch.dtype) -> None:
    sample = CASE.make(dims, dtype, DEVICE, 0)
    exact, plain = oracle(sample), plain_torch(sample)
    for name, result in sample.run("triton").items():
        check(f"{dict(dims)}: {name}", result, exact[name], plain[name])


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "dims",
    [
        {"B": 2, "L": 13, "E": 64, "heads": 2},
        {"B": 2, "L": 70, "E": 48, "heads": 1, "dropout": 0.3, "masked": True},
        {"B": 2, "L": 70, "E": 48, "heads": 1, "per_image": True},
    ],
    ids=["one tile of positions", "several", "per image"],
)
def test_more_queries_than_a_tile(dims: Mapping[str, Any], dtype: torch.dtype) -> None:
    compare({**dims, "G": 150 if dtype == torch.float16 else 35}, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "dims",
    [
        {"B": 2, "L": 20, "E": 256, "G": 5, "heads": 1},
        {"B": 2, "L": 70, "E": 150, "G": 70, "heads": 1, "dropout": 0.3, "masked": True},
        {"B": 1, "L": 30, "E": 300, "G": 20, "heads": 2, "per_image": True},
    ],
    ids=["whole slices", "ragged slices", "per image"],
)
def test_wide_heads(dims: Mapping[str, Any], dtype: torch.dtype) -> None:
    compare(dims, dtype)


@needs_triton
@pytest.mark.parametrize("images", [1, 2, 3, 7])
def test_runs_of_images(images: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The queries' gradient is the same sum however many images a program takes; the last run may be short."""
    monkeypatch.setattr(backward, "images_per_program", lambda B, G, H: images)
    for dims in (
        {"B": 7, "L": 9, "E": 16, "G": 5, "heads": 2, "dropout": 0.3},
        {"B": 7, "L": 70, "E": 16, "G": 5, "heads": 1, "masked": True},
    ):
        compare(dims, torch.float16)


@needs_triton
@pytest.mark.parametrize("G", [5, 150])
def test_every_subset_of_the_gradients(G: int) -> None:
    """What is not needed is empty, and the rest is the same bits, also from one run to the next."""
    B, L, E, H = 3, 20, 32, 2
    q, k, v, dout = (torch.randn(*shape, device=DEVICE).half() for shape in ((G, E), (B, L, E), (B, L, E), (B, G, E)))
    seed = torch.tensor(5, device=DEVICE)
    out, lse = kernels.query_attention(q, k, v, None, seed, H, 0.2)
    everything = kernels.query_attention_backward(dout, q, k, v, None, seed, H, 0.2, out, lse, [True] * 3)
    for number in range(8):
        needs = [bool(number >> i & 1) for i in range(3)]
        grads = kernels.query_attention_backward(dout, q, k, v, None, seed, H, 0.2, out, lse, needs)
        for need, grad, want in zip(needs, grads, everything, strict=True):
            assert torch.equal(grad, want) if need else grad.shape == (0,)


@needs_triton
def test_lse_is_natural_and_free_of_dropout() -> None:
    B, L, E, G, H = 2, 9, 8, 5, 2
    q, k, v = (torch.randn(*shape, device=DEVICE) for shape in ((G, E), (B, L, E), (B, L, E)))
    mask = torch.ones(B, L, dtype=torch.bool, device=DEVICE)
    mask[0, 2:5] = False
    mask[1] = False
    _, lse = kernels.query_attention(q, k, v, mask, torch.tensor(3, device=DEVICE), H, 0.5)
    heads = q.view(G, H, -1).transpose(0, 1), k.view(B, L, H, -1).transpose(1, 2)
    scores = (heads[0] @ heads[1].transpose(-1, -2)) / (E / H) ** 0.5
    expected = scores.masked_fill(~mask[:, None, None, :], float("-inf")).logsumexp(-1)
    assert lse.dtype == torch.float32
    torch.testing.assert_close(lse, expected)
    assert (lse[1] == float("-inf")).all()


@needs_triton
@pytest.mark.parametrize("dropout_p", [2.0**-40, 1e-3, 0.5, 0.75, 1 - 2.0**-40])
@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345, -(2**63)])
def test_the_mask_is_the_reference_s(dropout_p: float, seed: int) -> None:
    """With values that are unit vectors, the output shows which weights survived."""
    B, L, G = 3, 16, 7
    q, k = torch.zeros(G, 16, device=DEVICE), torch.zeros(B, L, 16, device=DEVICE)
    v = torch.eye(L, device=DEVICE).expand(B, L, L)
    outs = [query_attention(q, k, v, 1, dropout_p=dropout_p, seed=seed, backend=b) for b in ("triton", "reference")]
    assert torch.equal(outs[0] != 0, outs[1] != 0)


def test_heads_are_cut_in_two_powers_of_two() -> None:
    found = {width: head_parts(width) for width in (1, 16, 17, 64, 80, 96, 100, 128)}
    assert found == {
        1: (16, 0),
        16: (16, 0),
        17: (16, 16),
        64: (64, 0),
        80: (64, 16),
        96: (64, 32),
        100: (64, 64),
        128: (128, 0),
    }
    for width in range(1, 129):
        first, second = head_parts(width)
        assert width <= first + second < 2 * width + 32


@pytest.mark.parametrize("device", [H100, A100], ids=["sm_90", "sm_80"])
def test_tiles_fit_every_shape(device: Device) -> None:
    for tile_of in (kernels.forward_tile, backward.backward_tile, keys_tile):
        for G in (1, 20, 80, 100, 128, 129, 5000):
            for L in (1, 49, 784):
                for width in (1, 32, 96, 128, 129, 768, 4096):
                    for element_bytes in (2, 4):
                        for vector in (True, False):
                            tile = tile_of(G, L, width, element_bytes, vector, device)
                            blocks = (tile.BLOCK_G, tile.BLOCK_L, tile.D0)
                            assert all(block >= 16 and block & (block - 1) == 0 for block in blocks)
                            # A program holds at most 128 features of a head; a wider head is cut into slices.
                            assert tile.D0 + tile.D1 <= 128
                            assert tile.slices(width) == (1 if width <= 128 else -(-width // 128))
                            assert tile.DEPTH > 0 or tile.slices(width) == 1


def test_keys_and_values_are_read_once() -> None:
    """In 16 bits on an H100 all queries of the workloads share a program, forward and backward."""
    for dims in CASE.workloads.values():
        shape = (dims["G"], dims["L"], dims["E"] // 8, 2, True, H100)
        assert kernels.forward_tile(*shape).BLOCK_G >= dims["G"]
        assert backward.backward_tile(*shape).BLOCK_G >= dims["G"]


def test_the_programs_of_the_backward_kernel() -> None:
    """About two for each multiprocessor of an H100 where there are images enough."""
    for dims in CASE.workloads.values():
        images = backward.images_per_program(dims["B"], dims["G"], 8)
        programs = -(-dims["B"] // images) * 8
        assert programs >= 256 or images == 1
        assert programs <= 2 * 264
    assert backward.images_per_program(1, 1, 1) == 1


def test_when_rows_are_vectors() -> None:
    x = torch.empty(4, 32, 64)
    assert vectorised(32, x, x[0])
    assert not vectorised(8, x)
    assert not vectorised(32, x.transpose(1, 2))
    assert not vectorised(32, x[..., 1:33])
