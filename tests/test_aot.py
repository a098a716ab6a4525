"""Every Triton kernel compiles for every GPU we name, within its registers and shared memory, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from mlhead.testing import CASES, aot, sass

ROOT = Path(__file__).resolve().parent.parent


def survey(folder: Path, *arguments: str) -> list[dict]:
    # The interpreter replaces the kernels when they are defined, so compilation needs a process of its own.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mlhead.testing.aot", "--json", str(folder / "rows.json"), *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-3000:]
    return json.loads((folder / "rows.json").read_text())


def with_products() -> set[str]:
    """The names of the kernels that multiply matrices."""
    sources = [path.read_text() for path in (ROOT / "kernels").glob("*.py")]
    bodies = {body.split("(")[0]: body for source in sources for body in source.split("@triton.jit\ndef ")[1:]}
    names = {"tl.dot"}
    while found := {n for n, body in bodies.items() if n not in names and any(f"{name}(" in body for name in names)}:
        names |= found
    return names & bodies.keys()


def check_rows(rows: list[dict], targets: set[str]) -> None:
    products = with_products()
    attention = {f"query_attention_{name}_kernel" for name in ("forward", "backward", "keys_backward")}
    assert {"group_fc_forward_kernel", "csra_fused_forward_kernel", *attention} <= products
    assert "csra_pool_scores_kernel" not in products
    assert {row["op"] for row in rows} == set(aot.names_with_kernels())
    assert {row["target"] for row in rows} == targets
    for row in rows:
        # The command already judged the rows; these are the promises themselves.
        assert row["problems"] == []
        if row["target"] != "sm_89":
            assert row["stack"] == row["local"] == row["spills"] == 0
        assert 0 < row["registers"] <= 255
        assert row["shared"] <= aot.TARGETS[row["target"]][2]
    expected = {"sm_80": {"HMMA"}, "sm_90": {"HGMMA"}, "sm_100": {"UTCHMMA"}}
    for target, names in ((target, expected[target]) for target in expected.keys() & targets):
        for kernel in {row["kernel"] for row in rows} & products:
            found = {
                name for row in rows if (row["target"], row["kernel"]) == (target, kernel) for name in row["matrix"]
            }
            assert names <= found, f"{kernel} never uses {names} on {target}"
    # One dtype asks for TF32 and one does without; the switch must have reached the kernels.
    assert all(
        set(row["matrix"]) & {"HMMA", "HGMMA", "UTCHMMA"}
        for row in rows
        if row["dtype"] == "tf32" and row["kernel"] in products
    )
    assert all(set(row["matrix"]) <= {"FFMA", "FFMA2"} for row in rows if row["dtype"] == "fp32")
    reached = {place for row in rows for place in row["at"]}
    for name in aot.names_with_kernels():
        assert name == aot.LOSS or set(CASES[name].workloads) <= reached
    losses = [row for row in rows if row["op"] == aot.LOSS and row["at"][0] == "a million"]
    assert losses
    for row in losses:  # logits of aligned rows come 16 bytes at a time, but for those of ASL in 16 bits
        wide = row["kernel"] != "class_loss_merge_kernel" and row["config"].get("LOSS") != "asl"
        assert not wide or row["loads"].get("16", 0) > 0


def test_every_kernel_compiles(tmp_path):
    """For one target; docs/static_audit.md has all of them, and tests/test_audit.py holds it to the sources."""
    check_rows(survey(tmp_path, "--target", "sm_90"), {"sm_90"})


@pytest.mark.slow
def test_every_configuration_compiles(tmp_path):
    check_rows(survey(tmp_path, "--full"), {"sm_80", "sm_89", "sm_90", "sm_100"})


def binary(**changes) -> sass.Binary:
    good = {
        "registers": 96,
        "stack": 0,
        "local": 0,
        "shared": 65536,
        "spills": 0,
        "matrix": {"HGMMA": 4},
        "loads": {"16": 32},
        "stores": {"16": 8},
        "dots": (sass.Dot(128, 128, 64, "bf16", False),),
        "warps": 8,
    }
    return sass.Binary(**{**good, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stack": 8}, "stack 8 B"),
        ({"spills": 2}, "2 spill instructions"),
        ({"shared": 232_449}, "shared memory"),
        ({"matrix": {"HMMA": 64}}, "no HGMMA"),
        ({"matrix": {"FFMA": 512}}, "no HGMMA"),
        ({"loads": {"2": 64, "16": 4}}, "16-byte loads are possible"),
    ],
)
def test_a_bad_kernel_is_reported(changes, message):
    assert aot.problems(binary(), "sm_90", widest=True) == []
    assert message in "".join(aot.problems(binary(**changes), "sm_90", widest=True))


def test_strides_in_32_bits_are_reported() -> None:
    narrow = "%3 = arith.muli %facts_stride, %c3_i32 : i32 loc(#loc1)"
    wide = "%3 = arith.muli %facts_stride_11, %c3_i64 : i64 loc(#loc1)"
    other = "%4 = arith.muli %tile, %c64_i32 : i32"
    assert len(aot.narrow_strides(f"{wide}\n{narrow}\n{other}")) == 1


def test_a_small_tile_may_use_the_older_instruction():
    small = binary(matrix={"HMMA": 4}, dots=(sass.Dot(16, 64, 64, "bf16", False),))
    assert aot.problems(small, "sm_90", widest=True) == []
    full_precision = binary(matrix={"FFMA": 4}, dots=(sass.Dot(64, 64, 32, "f32", False),))
    assert aot.problems(full_precision, "sm_90", widest=True) == []


def test_the_interpreter_is_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        aot.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_the_disassembly_is_read(monkeypatch):
    usage = " Function k:\n  REG:40 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:616 TEXTURE:0\n"
    code = """
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;       /* 0x01 */
        /*0010*/              @!P0 LDG.E.U16.CONSTANT R4, desc[UR4][R2.64] ; /* 0x01 */
        /*0020*/               @P1 LDGSTS.E.BYPASS.LTC128B.128 [R9], desc[UR4][R2.64] ; /* 0x01 */
        /*0030*/             @!UP0 STL [R1], R0 ;                         /* 0x01 */
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ; /* 0x01 */
        /*0050*/                   STG.E desc[UR4][R2.64], R4 ;           /* 0x01 */
    """
    dots = (
        "%a = tt.dot %x, %y, %z, inputPrecision = tf32 : tensor<64x32xf32> * tensor<32x128xf32> -> tensor<64x128xf32>\n"
        "%b = tt.dot %x, %y, %z : tensor<16x32xbf16> * tensor<32x8xbf16> -> tensor<16x8xf32>\n"
    )
    monkeypatch.setattr(sass, "_tool", lambda option, path: usage if "usage" in option else code)
    metadata = SimpleNamespace(name="k", shared=512, num_warps=4)
    kernel = SimpleNamespace(asm={"cubin": b"", "ttir": dots}, metadata=metadata)
    found = sass.read_binary(kernel)
    assert (found.registers, found.stack, found.shared, found.spills) == (40, 8, 512, 1)
    assert found.loads == {"16": 2, "2": 1}
    assert found.stores == {"4": 1}
    assert found.matrix == {"HGMMA": 1}
    assert found.dots == (sass.Dot(64, 128, 32, "f32", True), sass.Dot(16, 8, 32, "bf16", False))
