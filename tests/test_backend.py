"""Choosing a backend: explicit choices never fall back, "auto" does, and both say what ran."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
import torch

import mlhead
from mlhead import _backend


def _inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, 4, dtype=dtype), torch.randn(3, 4, 5, dtype=dtype)


def test_context_argument_and_record() -> None:
    h, weight = _inputs()
    with mlhead.record_backends() as used:
        mlhead.group_fc(h, weight, backend="reference")
    assert used == {"group_fc": "reference"}
    with mlhead.backend("reference"), mlhead.record_backends() as used:
        mlhead.group_fc(h, weight)
        with mlhead.backend("auto"):
            mlhead.group_fc(h, weight)
    assert used == {"group_fc": _backend.resolve("group_fc", "auto", torch.device("cpu"), torch.float32)}


def test_records_nest() -> None:
    with mlhead.record_backends() as outer:
        with mlhead.record_backends() as inner:
            mlhead.group_fc(*_inputs(), backend="reference")
        x = torch.randn(1, 2, 3)
        mlhead.csra_pool(x, torch.randn(1, 2, 3), temperatures=(1.0,), lam=0.1, backend="reference")
    assert inner == {"group_fc": "reference"}
    assert outer == {"group_fc": "reference", "csra_pool": "reference"}
    assert not _backend._recorders


def test_overlapping_threads_leave_the_choice_of_compiled_code_as_it_was() -> None:
    first, second = mlhead.backend("reference"), mlhead.backend("cpp")
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with second:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with first:
        thread.start()
        entered.wait()
    leave.set()
    thread.join()
    assert _backend._mirror.choice == _backend._default


def test_explicit_choice_under_torch_func_is_an_error() -> None:
    h, weight = _inputs()
    with pytest.raises(mlhead.BackendError, match="must be 'auto' or 'reference' under torch"):
        torch.func.grad(lambda h: mlhead.group_fc(h, weight, backend="cpp").sum())(h)


def test_explicit_choice_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight = _inputs()
    with pytest.raises(
        mlhead.BackendError, match=r"group_fc: backend must be one .*got 'cuda': it runs on cuda, not on cpu"
    ):
        mlhead.group_fc(h, weight, backend="cuda")
    _backend._resolve.cache_clear()  # another test may have asked before
    monkeypatch.delitem(_backend.implementations("query_attention"), "cpp")
    with mlhead.backend("cpp"), pytest.raises(mlhead.BackendError, match="got 'cpp': it has no query_attention"):
        mlhead.query_attention(torch.randn(2, 4), torch.randn(1, 3, 4), torch.randn(1, 3, 4), num_heads=1)
    _backend._resolve.cache_clear()
    if _backend.interpreting():
        with pytest.raises(mlhead.BackendError, match=r"got 'triton': it has no torch.float64"):
            mlhead.group_fc(*_inputs(torch.float64), backend="triton")


@pytest.mark.parametrize(
    "call", [lambda: mlhead.backend("fast").__enter__(), lambda: mlhead.group_fc(*_inputs(), backend="fast")]
)
def test_unknown_name(call) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="backend: name must be one of auto, reference, triton, cpp, cuda, got 'fast'"):
        call()


def test_choice_is_local_to_a_thread() -> None:
    seen = []
    with mlhead.backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(_backend.requested()))
        thread.start()
        thread.join()
        assert _backend.requested() == "reference"
    assert seen == [_backend._default]


def test_backward_keeps_the_backend_of_its_forward() -> None:
    h, weight = _inputs()
    h.requires_grad_()
    with mlhead.backend("reference"):
        out = mlhead.group_fc(h, weight)
    with mlhead.record_backends() as used:
        out.sum().backward()
    assert used == {"group_fc": "reference"}


def test_environment_variable() -> None:
    script = "import mlhead; from mlhead import _backend; print(_backend.requested())"
    good = subprocess.run(
        [sys.executable, "-c", script], env=_environment("reference"), capture_output=True, text=True, check=True
    )
    assert good.stdout.strip() == "reference"
    bad = subprocess.run([sys.executable, "-c", script], env=_environment("quick"), capture_output=True, text=True)
    assert bad.returncode != 0
    assert "MLHEAD_BACKEND: value must be one of auto, reference, triton, cpp, cuda, got 'quick'" in bad.stderr


def _environment(backend: str) -> dict[str, str]:
    import os

    return {**os.environ, "MLHEAD_BACKEND": backend}


@pytest.mark.parametrize("name", _backend.BACKENDS)
def test_every_backend_says_why_it_is_missing(name: str) -> None:
    reason = _backend.unavailable(name)
    assert reason is None or (isinstance(reason, str) and len(reason) > 10)
    assert _backend.unavailable("reference") is None
