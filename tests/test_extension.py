"""The compiled CPU ops, called directly: against fp64 einsum, in every dtype and layout; and loading, or why not.

The conformance tests run the same library behind the public op; here are the things that only the library itself has.
"""

from __future__ import annotations

import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mlhead import _extension

ROOT = Path(__file__).parent.parent
REASON = _extension.load_cpu()
needs_library = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# Unit roundoff of the sums and of what is stored.
SUM_EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-24}
STORE_EPS = {**SUM_EPS, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# B, G, E, J, C: sizes 0, 1, primes, 2^n and 2^n +- 1, ragged tails, empty groups, J = 1.
SHAPES = [
    (0, 3, 5, 4, 10),
    (2, 0, 5, 4, 0),
    (2, 3, 0, 4, 10),
    (2, 3, 5, 0, 0),
    (2, 3, 5, 4, 0),
    (1, 1, 1, 1, 1),
    (2, 3, 5, 4, 10),
    (7, 5, 33, 13, 57),
    (64, 3, 128, 97, 250),
    (17, 2, 127, 65, 129),
    (3, 20, 256, 1, 20),
    (3, 20, 255, 1, 17),
    (5, 40, 31, 2, 41),
    (33, 1, 40, 300, 300),
    (129, 2, 64, 10, 20),
    (65, 3, 63, 10, 25),
    (2, 2, 300, 97, 190),
    (16, 2, 16, 16, 32),
]
LAYOUTS = ("contiguous", "transposed", "groups outside", "expanded", "strided")


def _arguments(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, weight, bias, dlogits with the strides of `layout`."""
    B, G, E, J, C = shape
    h, weight, bias, dlogits = torch.randn(B, G, E), torch.randn(G, E, J), torch.randn(C), torch.randn(B, C)
    h, weight, bias, dlogits = (t.to(dtype) for t in (h, weight, bias, dlogits))
    if layout == "transposed":
        h = h.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
        dlogits = dlogits.T.contiguous().T
    elif layout == "groups outside":
        h = h.transpose(0, 1).contiguous().transpose(0, 1)
        weight = weight.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    elif layout == "expanded" and 0 not in shape:
        h, weight, bias = h[:1].expand(B, G, E), weight[:, :, :1].expand(G, E, J), bias[:1].expand(C)
        dlogits = dlogits[:1, :1].expand(B, C)  # the gradient of a sum
    elif layout == "strided":  # every second or third element; NaN between them
        h = torch.stack([h, h * torch.nan], 3).flatten(2)[:, :, ::2]
        weight = torch.stack([weight, weight * torch.nan, weight], 3).flatten(2)[:, :, ::3]
        bias = torch.stack([bias, bias * torch.nan], 1).flatten()[::2]
        dlogits = torch.stack([dlogits, dlogits * torch.nan], 2).flatten(1)[:, ::2]
    return h, weight, bias, dlogits


def _exact(h: Tensor, weight: Tensor, bias: Tensor, dlogits: Tensor, C: int) -> dict[str, tuple[Tensor, int]]:
    """Each result in fp64, and how many products it sums."""
    (B, G, E), J = h.shape, weight.shape[2]
    padded = torch.zeros(B, G * J, dtype=torch.float64)
    padded[:, :C] = dlogits
    d = padded.view(B, G, J)
    logits = torch.einsum("bge,gej->bgj", h, weight).reshape(B, G * J)[:, :C] + bias
    dh, dweight = torch.einsum("bgj,gej->bge", d, weight), torch.einsum("bge,bgj->gej", h, d)
    return {"logits": (logits, E), "dh": (dh, J), "dweight": (dweight, B), "dbias": (dlogits.sum(0), B)}


@needs_library
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype: torch.dtype, layout: str) -> None:
    """|error| <= (n + 2) u sum |products| + half a unit of what is stored: the bound of any order of summation."""
    for shape in SHAPES:
        C = shape[-1]
        arguments = _arguments(shape, dtype, layout)
        h, weight, bias, dlogits = arguments
        before = [t.clone() for t in arguments]
        results = (
            torch.ops.mlhead_C.group_fc(h, weight, bias, C),
            *torch.ops.mlhead_C.group_fc_backward(dlogits, h, weight, C, True, True, True),
        )
        exact = _exact(*(t.double() for t in arguments), C)
        sizes = _exact(*(t.double().abs() for t in arguments), C)
        for (name, (expected, terms)), result in zip(exact.items(), results, strict=True):
            where = (name, shape, layout)
            assert result.shape == expected.shape, where
            assert result.dtype == dtype, where
            assert result.is_contiguous(), where
            limit = (terms + 2) * SUM_EPS[dtype] * sizes[name][0] + STORE_EPS[dtype] * expected.abs()
            limit += 1e-7 * (dtype == torch.float16)  # half the smallest subnormal, rounded up
            assert ((result.double() - expected).abs() <= limit).all(), where
        for tensor, copy in zip(arguments, before, strict=True):
            assert torch.equal(tensor.nan_to_num(), copy.nan_to_num())


@needs_library
def test_missing_classes_have_no_gradient() -> None:
    """Exactly 0 in the tail and in empty groups, also where the weight there is NaN."""
    h, weight, dlogits = torch.randn(3, 5, 7), torch.randn(5, 7, 4), torch.randn(3, 9)
    weight[2, :, 1:], weight[3:] = torch.nan, torch.nan
    assert not torch.ops.mlhead_C.group_fc(h, weight, None, 9).isnan().any()
    dh, dweight, _ = torch.ops.mlhead_C.group_fc_backward(dlogits, h, weight, 9, True, True, False)
    assert not dh.isnan().any()
    assert (dh[:, 3:] == 0).all()
    assert (dweight[2, :, 1:] == 0).all()
    assert (dweight[3:] == 0).all()


@needs_library
def test_only_what_is_needed() -> None:
    h, weight, dlogits = torch.randn(3, 5, 7), torch.randn(5, 7, 4), torch.randn(3, 18)
    full = torch.ops.mlhead_C.group_fc_backward(dlogits, h, weight, 18, True, True, True)
    for needs in ((True, False, False), (False, True, False), (False, False, True), (False, False, False)):
        some = torch.ops.mlhead_C.group_fc_backward(dlogits, h, weight, 18, *needs)
        for need, got, want in zip(needs, some, full, strict=True):
            assert torch.equal(got, want) if need else got.shape == (0,)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeat(dtype: torch.dtype) -> None:
    """From call to call, and for any number of threads."""
    threads = torch.get_num_threads()
    for shape in ((64, 20, 128, 33, 660), (64, 1, 200, 900, 900), (128, 40, 300, 1, 40)):
        h, weight, bias, dlogits = _arguments(shape, dtype, "contiguous")
        runs = []
        try:
            for count in (1, 2, 3, 2):
                torch.set_num_threads(count)
                forward = torch.ops.mlhead_C.group_fc(h, weight, bias, shape[-1])
                backward = torch.ops.mlhead_C.group_fc_backward(dlogits, h, weight, shape[-1], True, True, True)
                runs.append([forward, *backward])
        finally:
            torch.set_num_threads(threads)
        for again in runs[1:]:
            assert all(torch.equal(x, y) for x, y in zip(runs[0], again, strict=True))


@needs_library
def test_offsets_past_32_bits() -> None:
    """Strides that reach past 2^31 elements, in memory that is reserved and mostly never touched."""
    size = 2**31 + 4096
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, size * 2, flags=flags)
    except OSError:
        pytest.skip("4 GiB of address space cannot be reserved")
    base = torch.frombuffer(memory, dtype=torch.bfloat16)
    h = base.as_strided((2, 3, 4), (2**31, 8, 1))
    weight = base[1024:].as_strided((3, 4, 5), (2**30, 5, 1))
    h.copy_(torch.randn(2, 3, 4))
    weight.copy_(torch.randn(3, 4, 5))
    dlogits = base[2048:].as_strided((2, 13), (2**31, 1))
    dlogits.copy_(torch.randn(2, 13))
    near = (h.clone(), weight.clone(), dlogits.clone())
    assert torch.equal(
        torch.ops.mlhead_C.group_fc(h, weight, None, 13), torch.ops.mlhead_C.group_fc(*near[:2], None, 13)
    )
    far = torch.ops.mlhead_C.group_fc_backward(dlogits, h, weight, 13, True, True, True)
    for x, y in zip(far, torch.ops.mlhead_C.group_fc_backward(near[2], *near[:2], 13, True, True, True), strict=True):
        assert torch.equal(x, y)


@needs_library
def test_errors() -> None:
    h, weight, bias = torch.randn(2, 3, 4), torch.randn(3, 4, 5), torch.randn(13)
    op, backward = torch.ops.mlhead_C.group_fc, torch.ops.mlhead_C.group_fc_backward

    def fails(message: str, function: object, *arguments: object) -> None:
        with pytest.raises(ValueError, match=f"^{message}$"):
            function(*arguments)  # type: ignore[operator]

    fails(r"group_fc: h must be \(B, G, E\), got \(2, 3\)", op, h[:, :, 0], weight, bias, 13)
    fails(r"group_fc: weight must be \(G, E, J\), got \(4, 5\)", op, h, weight[0], bias, 13)
    fails(r"group_fc: weight must be \(G, E, J\) = \(3, 4, 5\), got \(3, 3, 5\)", op, h, weight[:, 1:], bias, 13)
    fails("group_fc: weight must be torch.float32 like h, got torch.float64", op, h, weight.double(), bias, 13)
    fails("group_fc: h must be float32, float64, float16 or bfloat16, got .*", op, h.int(), weight.int(), bias, 13)
    fails(r"group_fc: bias must be \(C,\) = \(12,\), got \(13,\)", op, h, weight, bias, 12)
    fails("group_fc: bias must be torch.float32 like h, got torch.float16", op, h, weight, bias.half(), 13)
    fails(r"group_fc: num_classes must be in \[0, G \* J\] = \[0, 15\], got 16", op, h, weight, None, 16)
    fails(r"group_fc: num_classes must be in \[0, G \* J\] = \[0, 15\], got -1", op, h, weight, None, -1)
    wrong = torch.randn(2, 12)
    fails(
        r"group_fc_backward: dlogits must be \(B, C\) = \(2, 13\), got \(2, 12\)",
        *(backward, wrong, h, weight, 13, True, True, True),
    )


@needs_library
def test_instruction_sets_agree() -> None:
    """ATEN_CPU_CAPABILITY lowers what runs, as it does for torch; each is held to the same bound."""
    assert _extension.build_info()["instruction_set"] in ("baseline", "avx2", "avx512")
    for limit, names in (("default", {"baseline"}), ("avx2", {"baseline", "avx2"})):
        code = (
            "from tests import test_extension as t; import torch; torch.manual_seed(0);"
            "[t.test_values(d, 'strided') for d in t.DTYPES]; t.test_bitwise_repeat(torch.float16);"
            "print(t._extension.build_info()['instruction_set'])"
        )
        variables = {**os.environ, "ATEN_CPU_CAPABILITY": limit, "OMP_NUM_THREADS": "2"}
        command = [sys.executable, "-c", code]
        called = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True)
        assert called.returncode == 0, called.stderr
        assert called.stdout.strip() in names


@needs_library
def test_build_info() -> None:
    info = _extension.build_info()
    assert set(info) == {"cpu", "cuda", "instruction_set"}
    assert {"compiler", "flags", "torch", "stable_abi", "instruction_sets"} <= set(info["cpu"])
    assert info["cpu"]["stable_abi"] == "2.11"


def test_a_missing_library_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    reason = _extension._load("cpu")
    assert reason is not None
    assert "_mlhead_cpu.abi3.so is not there" in reason
    assert "MLHEAD_BUILD=cpu" in reason


def test_a_broken_library_has_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a corrupt file nor an undefined symbol is an exception."""
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    library = tmp_path / "_mlhead_cpu.abi3.so"
    library.write_bytes(b"\x7fELF and then nothing of the kind" * 40)
    reason = _extension._load("cpu")
    assert reason is not None
    assert "does not load with torch" in reason
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler for the second half")
    source = tmp_path / "x.cpp"
    source.write_text('extern "C" int from_a_later_torch(); int x = from_a_later_torch();')
    library.unlink()
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    reason = _extension._load("cpu")
    assert reason is not None
    assert "from_a_later_torch" in reason


def test_cuda_has_a_reason_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    reason = _extension.load_cuda()
    assert reason is not None
    assert "CUDA" in reason


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.slow
def test_cuda_library_builds_and_loads_without_a_driver(tmp_path: Path) -> None:
    """For the default architectures; it registers its ops, and says how it was built."""
    if torch.version.cuda is None:
        pytest.skip("this torch is built without CUDA")
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)]
    variables = {**os.environ, "MLHEAD_BUILD": "cuda"}
    variables.pop("TORCH_CUDA_ARCH_LIST", None)
    build = [*command, "--build-temp", str(tmp_path / "temp")]
    built = subprocess.run(build, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    code = (
        "import sys, torch; from pathlib import Path; from mlhead import _extension as e;"
        f"e._FOLDER = Path({str(tmp_path / 'mlhead')!r});"
        "print(e._load('cpu'), e._load('cuda'), e._exported('cuda', 'mlhead_build_info'));"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "print(has('mlhead_C::group_fc', 'CUDA') and has('mlhead_C::group_fc_backward', 'CUDA'))"
    )
    called = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert called.returncode == 0, called.stderr
    first, second = called.stdout.splitlines()
    assert first.startswith("None None {")
    assert '"architectures"' in first
    assert second == "True"
