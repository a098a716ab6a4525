"""Targets of the losses in the head: every form of sparse ones, and every mistake in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from loss_heads import TEMPERATURES, B, C, E, make_head, make_labels
from torch import Tensor

from mlhead import SparseTargets, csra_loss, group_fc, group_fc_loss, linear_loss, losses


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_every_form_of_sparse_targets() -> None:
    y = make_labels()
    rows, columns = y.nonzero(as_tuple=True)
    lists = [row.nonzero().flatten().tolist() for row in y]
    sparse = SparseTargets.from_lists([row[::-1] for row in lists], C)
    assert torch.equal(sparse.to_dense().bool(), y)
    assert torch.equal(SparseTargets.from_dense(y).indices, sparse.indices)
    csr = SparseTargets.from_csr(y.float().to_sparse_csr())
    for dtype in (torch.bool, torch.int64):
        assert torch.equal(SparseTargets.from_csr(y.to(dtype).to_sparse_csr()).to_dense(), csr.to_dense())
    assert torch.equal(csr.to_dense().bool(), y)
    assert torch.equal(sparse.rows(), rows)
    leaves = make_head()
    want = group_fc_loss(*leaves, sparse, C)
    shuffled = torch.cat([columns[rows == b].flip(0) for b in range(B)])
    for form in ((shuffled, sparse.offsets), y.double().to_sparse_csr(), csr):
        torch.testing.assert_close(group_fc_loss(*leaves, form, C), want)
    soft = torch.rand(B, C) * make_labels()
    torch.testing.assert_close(
        group_fc_loss(*leaves, SparseTargets.from_dense(soft), C), group_fc_loss(*leaves, soft, C)
    )
    classes = torch.randint(C, (B,))
    want = losses.softmax_cross_entropy(group_fc(*leaves, C), classes)
    torch.testing.assert_close(group_fc_loss(*leaves, classes, C, loss="softmax"), want)


def _targets(rows: list[list[int]], **keywords: Any) -> SparseTargets:
    return SparseTargets.from_lists(rows, C, **keywords)


def _dense(y: list[Any], **keywords: Any) -> SparseTargets:
    return SparseTargets.from_dense(torch.tensor(y), **keywords)


def _csr(y: Tensor) -> SparseTargets:
    return SparseTargets.from_csr(y.to_sparse_csr())


ROWS = [[1], [2], [], [4], [5]]
WRONG: list[tuple[Callable[[], Any], type[Exception], str]] = [
    (lambda: _targets([[1], [2, C]]), ValueError, rf"classes in \[0, {C}\), got {C} in row 1"),
    (lambda: _targets([[1], [2], [-1]]), ValueError, r"got -1 in row 2"),
    (lambda: _targets([[1], [2], [7, 3, 7]]), ValueError, "at most once in a row, got class 7 twice in row 2"),
    (lambda: _targets([[1], [3]], ignore=[[], [3]]), ValueError, "class 3 twice in row 1"),
    (lambda: _targets([[1]], ignore=[[], []]), ValueError, "ignore must be 1 lists like positives, got 2"),
    (
        lambda: _dense([[2.0]]),
        ValueError,
        r"SparseTargets: targets.values must be in \[0, 1\], or -1, got 2.0 in row 0",
    ),
    (lambda: _dense([[0.0], [-0.5]]), ValueError, "got -0.5 in row 1"),
    (lambda: _dense([[math.nan]]), ValueError, "got nan in row 0"),
    (lambda: _dense([1.0]), ValueError, r"targets must be \(B, C\), got \(1,\)"),
    (lambda: _dense([[1j]]), TypeError, "targets must be real, got torch.complex64"),
    (lambda: SparseTargets.from_dense([[1]]), TypeError, "targets must be a torch.Tensor, got list"),
    (lambda: SparseTargets.from_dense(torch.eye(2).to_sparse()), TypeError, "must be dense, got torch.sparse_coo"),
    (lambda: _dense([[1.0]], ignore=torch.ones(1, 1)), TypeError, "ignore must be a bool tensor .*got torch.float32"),
    (lambda: _dense([[1.0]], ignore=[[True]]), TypeError, "ignore must be a bool tensor .*got list"),
    (lambda: _dense([[1.0]], ignore=torch.ones(1, 2) > 0), ValueError, r"ignore must be .* = \(1, 1\), got \(1, 2\)"),
    (lambda: _csr(torch.tensor([[2.0]])), ValueError, "SparseTargets: targets.values must be .*got 2.0 in row 0"),
    (lambda: _csr(torch.ones(2, 1, 1)), ValueError, r"targets must be \(B, C\), got \(2, 1, 1\)"),
    (lambda: _csr(torch.tensor([[2]])), ValueError, "SparseTargets: targets.values must be .*got 2.0 in row 0"),
    (lambda: SparseTargets.from_csr(torch.eye(2)), TypeError, "a torch.sparse_csr tensor .*, got torch.strided"),
    (lambda: SparseTargets.from_csr([[1]]), TypeError, "a torch.sparse_csr tensor .*, got list"),
]
PAIR = torch.tensor([1, 2, 2]), torch.tensor([0, 1, 3, 3, 3, 3])
CALLS: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
    (
        PAIR,
        {},
        ValueError,
        "group_fc_loss: targets must be each class at most once in a row, got class 2 twice in row 1",
    ),
    ((torch.tensor([C]), torch.tensor([0, 0, 0, 0, 0, 1])), {}, ValueError, f"got {C} in row 4"),
    ((torch.tensor([1]), torch.tensor([0, 1, 1])), {}, ValueError, "targets must be of B = 5 rows, got 2"),
    ((torch.tensor([1.0]), torch.tensor([0, 1])), {}, TypeError, "targets.indices must be int64"),
    (_targets(ROWS)._replace(num_classes=7), {}, ValueError, f"targets must be of C = {C} classes, got 7"),
    (_targets(ROWS)._replace(offsets=torch.tensor([0, 1, 1, 1, 1, 9])), {}, ValueError, "rising from 0 to N = 4"),
    (
        _targets(ROWS)._replace(values=torch.tensor([1.0, 1.0, math.nan, 1.0])),
        {},
        ValueError,
        r"targets.values must be in \[0, 1\], or -1, got nan in row 3",
    ),
    (
        _targets(ROWS)._replace(values=torch.ones(4).long()),
        {},
        TypeError,
        "targets.values must be of a floating dtype, got torch.int64",
    ),
    (_targets(ROWS)._replace(values=[1.0] * 4), {}, TypeError, "targets.values must be a torch.Tensor, got list"),
    (_targets(ROWS)._replace(values=torch.ones(3)), {}, ValueError, r"values must be \(N,\) = \(4,\), got \(3,\)"),
    (
        _targets(ROWS)._replace(values=[1.0] * 4),
        {"ignore": _targets([[]] * B)},
        TypeError,
        "targets.values must be a torch.Tensor, got list",
    ),
    (
        _targets(ROWS),
        {"ignore": _targets([[]] * B)._replace(indices=[])},
        TypeError,
        "ignore.indices must be int64 of one axis, got list",
    ),
    (_targets(ROWS), {"ignore": _targets([[], [2], [], [], []])}, ValueError, "got class 2 twice in row 1"),
    (make_labels().float().to_sparse(), {}, TypeError, "targets must be a tensor .*, got torch.sparse_coo"),
    (torch.zeros(B, C + 1), {}, ValueError, r"targets must be \(B, C\) = \(5, 29\), got \(5, 30\)"),
    (torch.full((B, C), 2.0), {}, ValueError, r"targets must be in \[0, 1\] and not NaN, got values from 2 to 2"),
    (torch.full((B, C), math.nan), {}, ValueError, "got NaN"),
    ([1], {}, TypeError, "targets must be a tensor"),
    (make_labels(), {"loss": "hinge"}, ValueError, "loss must be one of 'bce', 'asl', 'softmax', got 'hinge'"),
    (make_labels(), {"reduction": "none"}, ValueError, "reduction must be one of 'mean', 'sum'"),
    (make_labels(), {"gamma_neg": 3}, ValueError, "gamma_neg must be left out but for loss='asl'"),
    (make_labels(), {"loss": "asl", "gamma_neg": -1}, ValueError, "gamma_neg must be finite and at least 0, got -1"),
    (make_labels(), {"loss": "asl", "label_smoothing": 0.1}, ValueError, "label_smoothing must be 0 for loss='asl'"),
    (make_labels(), {"loss": "asl", "pos_weight": torch.ones(C)}, ValueError, "pos_weight must be None for loss='asl'"),
    (
        make_labels(),
        {"class_weight": torch.ones(C - 1)},
        ValueError,
        r"class_weight must be \(C,\) = \(29,\), got \(28,\)",
    ),
    (make_labels(), {"sample_weight": torch.ones(B).requires_grad_()}, ValueError, "requires no gradient"),
    (make_labels(), {"ignore": torch.zeros(B, C)}, TypeError, "ignore must be a bool tensor"),
    (make_labels(), {"gama": 1}, TypeError, "options must be among loss, .*, got gama"),
    (
        torch.zeros(B).long(),
        {"loss": "softmax", "ignore": make_labels()},
        ValueError,
        "ignore must be None for loss='soft",
    ),
    (torch.zeros(B + 1).long(), {"loss": "softmax"}, ValueError, r"class indices \(B,\)"),
    (torch.full((B,), C), {"loss": "softmax"}, ValueError, f"got {C} in row 0"),
]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize(("make", "error", "message"), WRONG)
def test_wrong_lists(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(("targets", "options", "error", "message"), CALLS)
def test_wrong_arguments(targets: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        group_fc_loss(*make_head(torch.float32), targets, C, **options)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("wrong", [0, 1, 2], ids=["features", "weight", "bias"])
def test_arguments_that_are_no_tensors(wrong: int, autocast: bool) -> None:
    temperatures = partial(csra_loss, **TEMPERATURES)
    x, weight = torch.zeros(B, E), torch.zeros(2, C, E)
    for op, inputs, names in (
        (group_fc_loss, make_head(torch.float32), "h weight bias"),
        (linear_loss, [x, weight[0], torch.zeros(C)], "x weight bias"),
        (temperatures, [x.unsqueeze(1), weight, torch.zeros(2, C)], "x weight bias"),
    ):
        given: list[Any] = list(inputs)
        given[wrong] = given[wrong].tolist()
        message = f"_loss: {names.split()[wrong]} must be a torch.Tensor, got list"
        with torch.autocast("cpu", enabled=autocast), pytest.raises(TypeError, match=message):
            op(*given, make_labels())  # type: ignore[operator]


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_unknown_labels_need_a_dtype_that_holds_them(dtype: torch.dtype) -> None:
    targets = _targets([[1], [3]], ignore=[[2], []])
    with pytest.raises(ValueError, match=f"dtype must be one that holds the -1 of an unknown label, got {dtype}"):
        targets.to_dense(dtype)
    known = _targets([[1], [3]])
    for sparse in (known, known._replace(values=torch.ones(2))):
        assert torch.equal(sparse.to_dense(dtype), known.to_dense().to(dtype))
    assert targets.to_dense(torch.int8).sum() == 1
