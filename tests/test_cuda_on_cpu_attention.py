"""The CUDA kernels of query_attention on a CPU: csrc/query_attention.cu with the stand-in for CUDA of cuda_on_cpu/.

Indexing, masks, dropout, merging and barriers are those of the GPU; timing, memory spaces and the hardware's
arithmetic are not.
"""

from __future__ import annotations

import ctypes
import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from op_matrix import CASES, LAYOUTS
from torch import Tensor

from mlhead.reference import query_attention as reference
from mlhead.reference._dropout import keep_mask
from mlhead.testing import Sample, check, oracle, plain_torch

HERE = Path(__file__).parent / "cuda_on_cpu"
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CXX = os.environ.get("CXX", "c++")
pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason=f"no C++ compiler ({CXX})")
INT, DOUBLE, POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
GRADIENTS = {"q": "attention_dq", "k": "attention_dk", "v": "attention_dv"}


class Operand(ctypes.Structure):
    """As in csrc/query_attention.h."""

    _fields_ = [("data", POINTER), ("b", INT), ("n", INT), ("e", INT)]


class AttentionCall(ctypes.Structure):
    """As in csrc/query_attention.h."""

    _fields_ = [
        ("dtype", ctypes.c_int), ("shared", ctypes.c_bool),
        ("B", INT), ("G", INT), ("L", INT), ("H", INT), ("d", INT),
        ("q", Operand), ("k", Operand), ("v", Operand), ("dout", Operand), ("out", Operand),
        ("key_mask", POINTER), ("mask_b", INT), ("mask_l", INT),
        ("seed", POINTER), ("dropout_p", DOUBLE), ("scale", DOUBLE),
        ("kept", POINTER), ("delta", POINTER), ("result", POINTER),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("cuda_on_cpu") / "query_attention.so"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-Wno-unknown-pragmas", f"-I{HERE}"]
    # A vector load off its alignment, which a GPU refuses and a CPU does not, ends the process.
    flags += ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    subprocess.run([CXX, *flags, str(HERE / "query_attention.cpp"), "-o", str(path)], check=True)
    found = ctypes.CDLL(str(path))
    for name in ("out", "delta", "dq", "dk", "dv"):
        getattr(found, f"attention_{name}").restype = ctypes.c_char_p
    found.attention_dq_chunks.restype = found.attention_dq_workspace.restype = INT
    return found


def _sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _operand(tensor: Tensor) -> Operand:
    return Operand(tensor.data_ptr(), *((0,) * (3 - tensor.ndim)), *tensor.stride())


def _inputs(sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (sample.tensors[name] for name in "qkv")
    assert q is not None
    assert k is not None
    assert v is not None
    return q, k, v


def _call(sample: Sample) -> AttentionCall:
    q, k, v = _inputs(sample)
    B, L, E = k.shape
    H = sample.options["num_heads"]
    return AttentionCall(
        dtype=DTYPES.index(q.dtype), shared=q.ndim == 2, B=B, G=q.shape[-2], L=L, H=H, d=E // H,
        q=_operand(q), k=_operand(k), v=_operand(v), dout=_operand(sample.dout),
        dropout_p=sample.options["dropout_p"], scale=1 / math.sqrt(E // H),
    )  # fmt: skip


def run_like_the_op(
    library: ctypes.CDLL, sample: Sample, needs: str = "qkv", chunks: int | None = None
) -> dict[str, Tensor]:
    """What query_attention_cuda.cpp does: forward, and the gradients of `needs`; dq in so many chunks of images."""

    def launch(name: str, *more: Any) -> None:
        problem = getattr(library, name)(ctypes.byref(p), *more)
        assert problem is None, problem

    def poisoned(*shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, math.nan, dtype=dtype or sample.dout.dtype)

    p = _call(sample)
    seed, mask = torch.tensor(sample.options["seed"]), sample.options.get("key_mask")
    if sample.options["dropout_p"] > 0:
        p.seed = seed.data_ptr()
    if mask is not None:
        p.key_mask, (p.mask_b, p.mask_l) = mask.data_ptr(), mask.stride()
    wide = _sum_dtype(sample.dout.dtype)
    out, kept, delta = poisoned(p.B, p.G, p.H * p.d), poisoned(p.B, p.H, 2, p.G, dtype=wide), poisoned(0)
    p.kept, p.result = kept.data_ptr(), out.data_ptr()
    launch("attention_out")
    p.out = _operand(out)
    if needs != "v":
        delta = poisoned(p.B, p.H, p.G, dtype=wide)
        p.delta = delta.data_ptr()
        launch("attention_delta")
    results = {"out": out, "kept": kept}
    for name in needs:
        result = results[name] = poisoned(*_inputs(sample)["qkv".index(name)].shape)
        p.result = result.data_ptr()
        if name == "q":
            parts = library.attention_dq_chunks(ctypes.byref(p)) if chunks is None else chunks
            elements = library.attention_dq_workspace(ctypes.byref(p), INT(parts))
            assert elements == (parts * result.numel() if parts > 1 and p.shared else 0)
            workspace = poisoned(elements, dtype=wide)
            launch("attention_dq", INT(parts), POINTER(workspace.data_ptr() if elements else None))
        else:
            launch(GRADIENTS[name])
    return results


def check_kept(kept: Tensor, sample: Sample) -> None:
    """The largest score and 1 / sum of the exponentials, against fp64; 0 and 0 where no key is attended."""
    q, k = (reference._heads(t.double(), sample.options["num_heads"]) for t in _inputs(sample)[:2])
    scale, unit = 1 / math.sqrt(q.shape[-1]), torch.finfo(kept.dtype).eps
    scores, mask = torch.matmul(q, k.mT), sample.options.get("key_mask")
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None], -math.inf)
    empty = (scores == -math.inf).all(-1)
    most, inverse = kept.double().unbind(2)
    assert bool((most[empty] == 0).all() and (inverse[empty] == 0).all())
    torch.testing.assert_close(most[~empty], scores.amax(-1)[~empty], rtol=4 * unit, atol=64 * unit)
    lse = most[~empty] * scale - inverse[~empty].log()
    torch.testing.assert_close(lse, (scores * scale).logsumexp(-1)[~empty], rtol=4 * unit, atol=64 * unit)


def compare(library: ctypes.CDLL, sample: Sample, needs: str = "qkv", chunks: int | None = None) -> None:
    results = run_like_the_op(library, sample, needs, chunks)
    exact, plain = oracle(sample), plain_torch(sample)
    check_kept(results.pop("kept"), sample)
    for name, result in results.items():
        check(name, result, exact[name], plain[name].to(result.dtype))


def make(dtype: torch.dtype, B: int, L: int, G: int, d: int, heads: int = 1, seed: int = 0, **options: Any) -> Sample:
    dims = {"B": B, "L": L, "G": G, "E": heads * d, "heads": heads, **options}
    return CASES["query_attention"].make(dims, dtype, "cpu", seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 5, 17, 96, 130])
def test_any_head_width(library: ctypes.CDLL, dtype: torch.dtype, d: int) -> None:
    compare(library, make(dtype, 2, 9, 7, d, heads=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("G", "L"), [(67, 5), (13, 70), (66, 131)])
def test_several_tiles(library: ctypes.CDLL, dtype: torch.dtype, G: int, L: int) -> None:
    compare(library, make(dtype, 1, L, G, 16, dropout=0.25))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_image", [False, True])
@pytest.mark.parametrize("L", [9, 70])
def test_masks_and_dropout(library: ctypes.CDLL, dtype: torch.dtype, per_image: bool, L: int) -> None:
    """The last image attends to nothing."""
    sample = make(dtype, 3, L, 5, 4, heads=2, masked=True, dropout=0.3, per_image=per_image)
    results = run_like_the_op(library, sample)
    assert bool((results["out"][-1] == 0).all() and (results["kept"][-1] == 0).all())
    for name in "kv":
        assert bool((results[name][~sample.options["key_mask"]] == 0).all())
    if per_image:
        assert bool((results["q"][-1] == 0).all())
    compare(library, sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masks_of_any_strides_and_tiles_without_a_key(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Tiles of scores that are all -infinity, before and after others."""
    sample = make(dtype, 2, 130, 12, 8)
    mask = torch.zeros(130, 2, dtype=torch.bool)
    mask[80:, 0] = mask[:50, 1] = True
    for key_mask in (mask.t(), mask[:, :1].t().expand(2, 130)):
        compare(library, replace(sample, options={**sample.options, "key_mask": key_mask}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("seed", [11, -1, 2**40 + 3])
def test_dropout_keeps_what_the_reference_keeps(library: ctypes.CDLL, dtype: torch.dtype, seed: int) -> None:
    """Values that are rows of the unit matrix make the output the weights themselves."""
    B, L, G, H, dropout_p = 3, 67, 5, 2, 0.4
    sample = make(dtype, B, L, G, L, heads=H, dropout=dropout_p)
    tensors = {**sample.tensors, "v": torch.eye(L, dtype=dtype).repeat(1, H).expand(B, L, H * L)}
    sample = replace(sample, tensors=tensors, options={**sample.options, "seed": seed})
    weights = run_like_the_op(library, sample, needs="")["out"].view(B, G, H, L).transpose(1, 2)
    assert torch.equal(weights != 0, keep_mask(torch.tensor(seed), dropout_p, B, H, G, L))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
def test_chunks_of_images(library: ctypes.CDLL, dtype: torch.dtype, chunks: int) -> None:
    compare(library, make(dtype, 5, 6, 4, 8), "q", chunks)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layouts(library: ctypes.CDLL, dtype: torch.dtype, layout: str) -> None:
    compare(library, make(dtype, 2, 6, 5, 16, heads=2, per_image=True).map(LAYOUTS[layout]))


@pytest.mark.parametrize("which", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_operand_without_strides_beside_vectorised_ones(
    library: ctypes.CDLL, dtype: torch.dtype, which: str
) -> None:
    """Sizes that vector loads take, and one operand with stride 0: along every axis, as in `out.sum().backward()`."""
    sample = make(dtype, 2, 6, 5, 16, heads=2)
    if which == "dout":
        sample = replace(sample, dout=torch.full((), 0.5, dtype=dtype).expand(sample.dout.shape))
    else:
        # Along the features only: of equal keys or values some gradients are 0, and what is left is rounding.
        tensor = _inputs(sample)["qkv".index(which)]
        sample = replace(sample, tensors={**sample.tensors, which: tensor[..., :1].expand(tensor.shape)})
    compare(library, sample)


@pytest.mark.parametrize("needs", ["q", "k", "v", ""])
def test_each_gradient_alone(library: ctypes.CDLL, needs: str) -> None:
    compare(library, make(torch.float32, 2, 9, 7, 5, dropout=0.3), needs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("L", [1, 70])
def test_an_only_key_has_no_gradient(library: ctypes.CDLL, dtype: torch.dtype, L: int) -> None:
    """Its weight is 1 whatever the score: dq and dk are exactly 0, not the rounding error of a difference."""
    sample = make(dtype, 2, L, 5, 24)
    mask = (torch.arange(L) == L - 1).expand(2, L)
    results = run_like_the_op(library, replace(sample, options={**sample.options, "key_mask": mask}))
    assert torch.equal(results["out"], _inputs(sample)[2][:, -1:].expand(2, 5, 24))
    assert bool((results["q"] == 0).all() and (results["k"] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("position", [0, 69])
def test_nan_reaches_its_own_image_only(library: ctypes.CDLL, dtype: torch.dtype, position: int) -> None:
    sample = make(dtype, 2, 70, 3, 4)
    k = _inputs(sample)[1]
    k[0, position, 1] = math.nan
    results = run_like_the_op(library, sample, "kv")
    for result in results.values():
        assert not bool(result[1].isnan().any())
    assert bool(results["kept"][0, :, 1].isnan().all())
    assert bool(results["out"][0].isnan().all() and results["k"][0].isnan().all() and results["v"][0].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("L", [7, 150])
def test_scores_of_minus_infinity_alone_are_nan(
    library: ctypes.CDLL, dtype: torch.dtype, masked: bool, dropout: float, L: int
) -> None:
    """In one head of the first image; NaN exactly where the reference has it, and 0 where the last has no key."""
    sample = make(dtype, 3, L, 5, 4, heads=2, masked=masked, dropout=dropout, per_image=True)
    q, k, _ = _inputs(sample)
    q.abs_()
    k[0, sample.options["key_mask"][0] if masked else slice(None), 1] = -math.inf
    results = run_like_the_op(library, sample)
    assert bool((results["kept"][0, 0, 1]).isnan().all() and results["kept"][1:].isfinite().all())
    assert bool(results["out"][0, :, :4].isnan().all())
    expected = plain_torch(sample)
    for name in ("out", *"qkv"):
        assert torch.equal(results[name].isnan(), expected[name].isnan()), name
    if masked:
        assert bool((results["out"][2] == 0).all() and (results["kept"][2] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize(("L", "needs"), [(60, "qkv"), (140, "v")])
def test_large_scores(library: ctypes.CDLL, dtype: torch.dtype, dropout: float, L: int, needs: str) -> None:
    """Maxima that grow by hundreds from tile to tile: the sums must be rescaled, and never overflow.

    Scores are exact in fp32, so that the budget does not hang on the order in which plain torch sums them. dq and dk
    of more than one tile take delta from the rounded output: too much where a weight is nearly 1 and ds nearly 0.
    """
    sample = make(dtype, 1, L, 4, 8, dropout=dropout)
    q, k, _ = _inputs(sample)
    for tensor in (q, k):
        tensor.mul_(4).round_().div_(4)
    k *= torch.linspace(1, 200, L).round()[:, None].to(dtype)
    compare(library, sample, needs)


def test_nothing_to_do_and_too_much(library: ctypes.CDLL) -> None:
    for B, G in ((0, 4), (2, 0), (0, 0)):
        for per_image in (False, True):
            for name, result in run_like_the_op(library, make(torch.float32, B, 3, G, 4, per_image=per_image)).items():
                assert not bool(result.any()), name
    p = _call(make(torch.float32, 1, 1, 1, 1))
    p.L = (1 << 30) + 1
    assert b"2^30 images" in library.attention_out(ctypes.byref(p))
    p.L, p.B, p.H = 1, 1 << 20, 1 << 20
    assert b"2^31 - 1 blocks" in library.attention_out(ctypes.byref(p))


def test_chunks_hang_on_the_shape_alone_and_none_is_empty(library: ctypes.CDLL) -> None:
    def chunks_of(B: int, G: int, H: int, d: int, shared: bool = True) -> int:
        return library.attention_dq_chunks(ctypes.byref(AttentionCall(shared=shared, B=B, G=G, L=49, H=H, d=d)))

    shapes: Sequence[tuple[int, ...]] = [(1, 1, 1, 1), (64, 80, 8, 96), (128, 100, 8, 96), (1000, 20, 8, 96)]
    for B, G, H, d in shapes:
        chunks = chunks_of(B, G, H, d)
        images = -(-B // chunks)
        assert 1 <= chunks <= B
        assert (chunks - 1) * images < B <= chunks * images
        assert chunks_of(B, G, H, d, shared=False) == B
    assert chunks_of(0, 100, 8, 96) == chunks_of(5, 0, 8, 96) == 1
