"""Top-k without the logits against a stable sort of all of them, and the logits of chosen classes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peak import printed_by
from torch import Tensor

import mlhead
from mlhead import _backend, group_fc, group_fc_select, group_fc_topk, linear_select, linear_topk
from mlhead.ops import _loss_chunks
from mlhead.ops.topk import _first_largest

BACKENDS = [name for name in ("reference", "cpp") if _backend.unavailable(name) is None]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# B, G, E, C: C = G J, ragged last groups, fewer classes than groups have room for, groups without any, one group
SHAPES = [(3, 5, 8, 35), (4, 6, 16, 33), (2, 7, 4, 9), (3, 6, 8, 7), (5, 1, 8, 40), (1, 4, 3, 4), (2, 3, 8, 500)]


def whole_numbers(*shape: int, dtype: torch.dtype, most: int = 2) -> Tensor:
    """Numbers whose sums of products are exact in every dtype, so that there are many ties and one right answer."""
    return torch.randint(-most, most + 1, shape).to(dtype)


def make_head(B: int, G: int, E: int, C: int, dtype: torch.dtype, numbers: Any = whole_numbers) -> tuple[Tensor, ...]:
    return numbers(B, G, E, dtype=dtype), numbers(G, E, -(-C // G), dtype=dtype), numbers(C, dtype=dtype)


def expected(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    ordered = torch.sort(logits, dim=1, descending=True, stable=True)
    return ordered.values[:, :k], ordered.indices[:, :k]


def expect_same(found: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert found[0].dtype == want[0].dtype
    assert found[1].dtype == torch.int64
    torch.testing.assert_close(found[0], want[0], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[1], want[1])


@pytest.fixture(params=["one block", "some blocks", "many blocks"])
def sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blocks larger than the head, of a few groups, and of a part of a group."""
    if request.param != "one block":
        few = _loss_chunks.Sizes(1 << 20, 2048) if request.param == "some blocks" else _loss_chunks.Sizes(256, 128)
        monkeypatch.setitem(_loss_chunks.SIZES, "cpu", few)
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_exactly_the_stable_sort_of_all_logits(
    backend: str, shape: tuple[int, ...], dtype: torch.dtype, sizes: str
) -> None:
    h, weight, bias = make_head(*shape, dtype)
    C = shape[-1]
    for b in (bias, None):
        logits = group_fc(h, weight, b, C, backend="reference")
        for k in {1, min(5, C), min(20, C), C}:  # also more than the classes of a group, and all
            expect_same(group_fc_topk(h, weight, b, k, C, backend=backend), expected(logits, k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_linear(backend: str, dtype: torch.dtype, sizes: str) -> None:
    x, weight, bias = (whole_numbers(*shape, dtype=dtype) for shape in ((4, 9), (300, 9), (300,)))
    for b in (bias, None):
        for k in (1, 7, 300):
            expect_same(linear_topk(x, weight, b, k, backend=backend), expected(F.linear(x, weight, b), k))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_heads(dtype: torch.dtype, sizes: str) -> None:
    """Scores are within rounding of torch.topk's, and are the logits of their classes."""
    h, weight, bias = make_head(6, 7, 32, 201, dtype, numbers=torch.randn)
    logits = group_fc(h, weight, bias)
    scores, classes = group_fc_topk(h, weight, bias, 9)
    torch.testing.assert_close(scores, logits.topk(9).values)
    torch.testing.assert_close(scores, logits.gather(1, classes))
    assert all(len(set(row)) == 9 for row in classes.tolist())
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((6, 32), (201, 32), (201,)))
    scores, classes = linear_topk(x, weight, bias, 9)
    torch.testing.assert_close(scores, F.linear(x, weight, bias).topk(9).values)
    torch.testing.assert_close(scores, F.linear(x, weight, bias).gather(1, classes))


def test_the_sizes_make_the_blocks_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight, _ = make_head(2, 3, 8, 500, torch.float32)
    assert len(_loss_chunks.blocks_of(h, weight, 500)) == 2  # two whole groups, and the ragged one
    monkeypatch.setitem(_loss_chunks.SIZES, "cpu", _loss_chunks.Sizes(256, 128))
    assert len(_loss_chunks.blocks_of(h, weight, 500)) > 30


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_order_of_equal_and_strange_scores(dtype: torch.dtype, sizes: str) -> None:
    """Ties give the lower class; NaN of either sign is above infinity; 0 and -0 are equal."""
    nan, inf, tiny = float("nan"), float("inf"), torch.finfo(dtype).smallest_normal
    values = torch.tensor([1, -0.0, 0, -inf, -1, inf, nan, 1, 0, -tiny, tiny, -nan, 3, 3, inf, -inf, -nan, nan, 1, 3.0])
    bias = values.repeat(5).to(dtype)
    x, weight = torch.zeros(2, 3, dtype=dtype), torch.zeros(100, 3, dtype=dtype)
    for k in (1, 12, 45, 100):
        scores, classes = linear_topk(x, weight, bias, k, backend="reference")
        expect_same((scores, classes), expected(bias.expand(2, 100), k))
        torch.testing.assert_close(scores, bias.expand(2, 100).topk(k).values, rtol=0, atol=0, equal_nan=True)
    assert classes[0, :3].tolist() == [6, 11, 16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ordering_of_every_kind_of_number(dtype: torch.dtype) -> None:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    limits = torch.iinfo(bits)
    scores = torch.randint(limits.min, limits.max, (3, 4000), dtype=bits).view(dtype)
    scores[:, ::9], scores[:, 1::7] = 0.0, -0.0
    before = scores.clone()
    # The stable sort that is compared with knows of no sign of 0 or NaN either.
    assert torch.equal(_first_largest(scores, 4000), expected(scores, 4000)[1])
    assert torch.equal(scores.view(bits), before.view(bits))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["reference", "triton", "cuda"])
def test_on_a_gpu(backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_loss_chunks.SIZES, "cuda", _loss_chunks.Sizes(1 << 14, 1 << 12))
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton has no torch.float64")
    h, weight, bias = (t.cuda() for t in make_head(4, 6, 16, 3001, dtype))
    logits = group_fc(h, weight, bias, backend="reference")
    for k in (1, 5, 600):
        scores, classes = group_fc_topk(h, weight, bias, k, backend=backend)
        expect_same((scores.cpu(), classes.cpu()), expected(logits.cpu(), k))
        assert torch.equal(group_fc_select(h, weight, bias, classes), scores)


def test_a_shared_weight(sizes: str) -> None:
    h, weight, bias = (whole_numbers(*shape, dtype=torch.float32) for shape in ((3, 50, 8), (8, 1), (1,)))
    for b in (bias, None):
        logits = group_fc(h, weight, b)
        expect_same(group_fc_topk(h, weight, b, 7), expected(logits, 7))
        for classes in (torch.tensor([49, 0, 3, 3]), torch.randint(50, (3, 6))):
            want = logits[:, classes] if classes.ndim == 1 else logits.gather(1, classes)
            assert torch.equal(group_fc_select(h, weight, b, classes), want)


def test_strides_and_empty_batches(sizes: str) -> None:
    h, weight, bias = make_head(4, 6, 16, 33, torch.float32)
    strided = h.permute(2, 1, 0).contiguous().permute(2, 1, 0), weight.transpose(1, 2).contiguous().transpose(1, 2)
    expect_same(group_fc_topk(*strided, bias.repeat_interleave(2)[::2], 5), group_fc_topk(h, weight, bias, 5))
    scores, classes = group_fc_topk(h[:0], weight, bias, 5)
    assert scores.shape == classes.shape == (0, 5)
    assert linear_topk(h[:0, 0], weight[0].t(), None, 2)[1].shape == (0, 2)
    for chosen in (torch.tensor([1, 32]), torch.zeros(0, 2, dtype=torch.int64)):
        assert group_fc_select(h[:0], weight, bias, chosen).shape == (0, 2)
        assert linear_select(h[:0, 0], weight[0].t(), None, chosen % 6).shape == (0, 2)
    assert group_fc_select(h, weight, bias, torch.zeros(0, dtype=torch.int64)).shape == (4, 0)
    assert group_fc_select(h, weight, bias, torch.zeros(4, 0, dtype=torch.int64)).shape == (4, 0)
    zero = h[:, :, :0], weight[:, :0], bias
    expect_same(group_fc_topk(*zero, 5), expected(bias.expand(4, 33), 5))


def test_the_backend_and_autocast_reach_the_products() -> None:
    h, weight, bias = make_head(4, 6, 16, 33, torch.float32, numbers=torch.randn)
    for name in BACKENDS:
        with mlhead.record_backends() as record, mlhead.backend(name):
            group_fc_topk(h, weight, bias, 3)
        assert record == {"group_fc": name}
    with pytest.raises(mlhead.BackendError, match="cuda"):
        linear_topk(h[:, 0], weight[0].t(), None, 3, backend="cuda")
    with torch.autocast("cpu", torch.bfloat16):
        scores, classes = group_fc_topk(h, weight, bias, 3)
        chosen = group_fc_select(h, weight, bias, classes)
        linear = linear_topk(h[:, 0], weight[0].t(), None, 3)[0]
    half = [t.bfloat16() for t in (h, weight, bias)]
    assert scores.dtype == chosen.dtype == linear.dtype == torch.bfloat16
    expect_same((scores, classes), group_fc_topk(*half, 3))
    torch.testing.assert_close(chosen, scores)


def test_no_gradient_from_topk_and_the_same_from_select() -> None:
    h, weight, bias = (t.requires_grad_() for t in make_head(4, 6, 16, 33, torch.float64, numbers=torch.randn))
    scores, classes = group_fc_topk(h, weight, bias, 3)
    assert not scores.requires_grad
    torch.testing.assert_close(group_fc_select(h, weight, bias, classes), scores)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_select_is_the_gather_of_all_logits(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B, _, _, C = shape
    h, weight, bias = (t.requires_grad_() for t in make_head(*shape, dtype))
    for b in (bias, None):
        inputs = [t for t in (h, weight, b) if t is not None]
        for classes in (torch.randint(C, (9,)), torch.randint(C, (B, 6)), torch.randint(C, (B, 6), dtype=torch.int32)):
            logits = group_fc(h, weight, b, C, backend="reference")
            index = classes.long().expand(B, -1)
            want, found = logits.gather(1, index), group_fc_select(h, weight, b, classes, C)
            assert torch.equal(found, want)
            upstream = whole_numbers(*found.shape, dtype=dtype, most=1)
            for grad, right in zip(
                torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(want, inputs, upstream), strict=True
            ):
                assert torch.equal(grad, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_select(dtype: torch.dtype) -> None:
    x, weight, bias = (whole_numbers(*s, dtype=dtype).requires_grad_() for s in ((4, 9), (30, 9), (30,)))
    for b in (bias, None):
        inputs = [t for t in (x, weight, b) if t is not None]
        for classes in (torch.randint(30, (7,)), torch.randint(30, (4, 5))):
            want = F.linear(x, weight, b).gather(1, classes.expand(4, -1))
            found = linear_select(x, weight, b, classes)
            assert torch.equal(found, want)
            upstream = whole_numbers(*found.shape, dtype=dtype, most=1)
            for grad, right in zip(
                torch.autograd.grad(found, inputs, upstream), torch.autograd.grad(want, inputs, upstream), strict=True
            ):
                assert torch.equal(grad, right)


def test_gradients_of_select_are_right() -> None:
    h, weight, bias = (t.requires_grad_() for t in make_head(2, 3, 4, 8, torch.float64, numbers=torch.randn))
    for classes in (torch.tensor([7, 0, 0]), torch.tensor([[7, 1], [3, 3]])):
        assert torch.autograd.gradcheck(lambda *t, c=classes: group_fc_select(*t, c), (h, weight, bias))
        assert torch.autograd.gradgradcheck(lambda *t, c=classes: group_fc_select(*t, c), (h, weight, bias))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_is_one_graph(dynamic: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_loss_chunks.SIZES, "cpu", _loss_chunks.Sizes(256, 128))
    torch._dynamo.reset()
    h, weight, bias = make_head(4, 6, 16, 33, torch.float32)
    weight.requires_grad_()

    def function(h: Tensor) -> tuple[Tensor, ...]:
        scores, classes = group_fc_topk(h, weight, bias, 5)
        linear = linear_topk(h[:, 0], weight[0].t(), None, 2)
        return scores, classes, *linear, group_fc_select(h, weight, bias, classes)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for part in (h, h[:3]):
        for found, want in zip(compiled(part), function(part), strict=True):
            assert torch.equal(found, want)
            assert found.requires_grad == want.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_export_and_decompose(dtype: torch.dtype) -> None:
    """Exported with a node for each call, then lowered to plain torch; ties and NaN keep their order."""
    h, weight, bias = make_head(4, 6, 16, 33, dtype)
    h[1, 2, 3] = torch.nan

    class TopK(torch.nn.Module):
        def forward(self, h: Tensor) -> tuple[Tensor, ...]:
            return *group_fc_topk(h, weight, bias, 5), *linear_topk(h[:, 0], weight[0].t(), None, 2)

    def targets(program: torch.export.ExportedProgram) -> list[str]:
        parts = [part for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
        return [str(node.target) for part in parts for node in part.graph.nodes]

    batch = torch.export.Dim("batch")
    program = torch.export.export(TopK(), (h,), dynamic_shapes=({0: batch},))
    assert targets(program).count("mlhead.group_fc_topk.default") == 2
    plain = program.run_decompositions(mlhead.decompositions())
    assert not any("mlhead" in target for target in targets(plain))
    for part in (h, h[:3]):
        for got, want in zip(plain.module()(part), TopK()(part), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_the_library_op() -> None:
    h, weight, bias = make_head(4, 6, 16, 33, torch.float32)
    op = torch.ops.mlhead.group_fc_topk.default
    results = torch.library.opcheck(op, (h, weight, bias, 5, 33, "reference"))
    assert set(results.values()) == {"SUCCESS"}
    with torch._subclasses.fake_tensor.FakeTensorMode() as mode:
        scores, classes = group_fc_topk(*(mode.from_tensor(t) for t in (h, weight, bias)), 5)
    assert (scores.shape, scores.dtype, classes.dtype) == ((4, 5), torch.float32, torch.int64)


H, W, X, M = torch.zeros(2, 3, 4), torch.zeros(3, 4, 5), torch.zeros(2, 4), torch.zeros(6, 4)
ONE = torch.tensor([1])
ERRORS: list[tuple[Any, tuple, type[Exception], str]] = [
    (group_fc_topk, (H, W, None, 0), ValueError, "group_fc_topk: k must be at least 1, got 0"),
    (group_fc_topk, (H, W, None, 16), ValueError, r"group_fc_topk: k must be in \[1, C\] = \[1, 15\], got 16"),
    (group_fc_topk, (H, W, None, 14, 13), ValueError, r"k must be in \[1, C\] = \[1, 13\], got 14"),
    (group_fc_topk, (H, W, None, 2.0), TypeError, "group_fc_topk: k must be an integer, got float"),
    (group_fc_topk, (H, W, None, True), TypeError, "k must be an integer, got bool"),
    (group_fc_topk, (H[0], W, None, 1), ValueError, r"group_fc_topk: h must be \(B, G, E\), got \(3, 4\)"),
    (group_fc_topk, ([1], W, None, 1), TypeError, "group_fc_topk: h must be a torch.Tensor, got list"),
    (group_fc_topk, (H[:, :0], W[:0, :, :0], None, 1), ValueError, r"k must be in \[1, C\] = \[1, 0\], got 1"),
    (linear_topk, (X, M, None, 7), ValueError, r"linear_topk: k must be in \[1, C\] = \[1, 6\], got 7"),
    (linear_topk, ([1], M, None, 7), TypeError, "linear_topk: x must be a torch.Tensor, got list"),
    (linear_topk, (X, M[:, :3], None, 1), ValueError, r"weight must be \(C, D\) = \(6, 4\), got \(6, 3\)"),
    (linear_topk, (X, M, M[0], 1), ValueError, r"bias must be \(C,\) = \(6,\), got \(4,\)"),
    (group_fc_select, (H, W, None, [1]), TypeError, "group_fc_select: classes must be a tensor of integers, got list"),
    (group_fc_select, (H, W, None, ONE.float()), TypeError, "classes must be a tensor of integers, got torch.float32"),
    (group_fc_select, (H, W, None, ONE.bool()), TypeError, "classes must be a tensor of integers, got torch.bool"),
    (group_fc_select, (H, W, None, ONE * 15), ValueError, r"classes must be in \[0, C\) = \[0, 15\), got 15"),
    (group_fc_select, (H, W, None, ONE * 13, 13), ValueError, r"classes must be in \[0, C\) = \[0, 13\), got 13"),
    (group_fc_select, (H, W, None, -ONE), ValueError, r"classes must be in \[0, C\) = \[0, 15\), got -1"),
    (group_fc_select, (H, W, None, ONE[None]), ValueError, r"\(K,\) or \(B, K\) with B = 2, got \(1, 1\)"),
    (group_fc_select, (H, W, None, ONE.to("meta")), ValueError, "classes must be on cpu like the features, got meta"),
    (linear_select, (X, M, None, ONE * 6), ValueError, r"linear_select: classes must be in \[0, C\) = \[0, 6\), got 6"),
    (linear_select, (X[0], M, None, ONE), ValueError, r"linear_select: x must be \(B, D\), got \(4,\)"),
]


@pytest.mark.parametrize(("function", "arguments", "error", "message"), ERRORS)
def test_errors(function: Any, arguments: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        function(*arguments)


PEAK = """
import sys, torch
from mlhead._resident import peak
from mlhead import group_fc_topk, linear_topk
torch.set_num_threads(1)
C, name, dtype = int(sys.argv[1]), sys.argv[2], getattr(torch, sys.argv[3])
B, E, G = 64, 8, 100
if name == "linear":
    x, weight = torch.randn(B, E, dtype=dtype), torch.randn(C, E, dtype=dtype)
    step = lambda parts: linear_topk(x, weight[: C * parts // G], None, 5)
else:
    h, weight = torch.randn(B, G, E, dtype=dtype), torch.randn(G, E, C // G, dtype=dtype)
    step = lambda parts: group_fc_topk(h[:, :parts], weight[:parts], None, 5)
step(2)
before = peak()
step(G)
print(peak() - before)
"""


@pytest.mark.parametrize(("name", "dtype"), [("linear", "float32"), ("group_fc", "bfloat16"), ("linear", "float64")])
def test_memory_does_not_grow_with_the_classes(name: str, dtype: str) -> None:
    """Peak resident memory while C grows 16-fold; the logits of 320,000 classes would take 41 to 164 MB."""
    few, many = (printed_by(PEAK, C, name, dtype) for C in (20_000, 320_000))
    assert 0 < max(few, many) < 30_000_000, (few, many)
    assert many - few < 10_000_000, (few, many)
