"""docs/static_audit.md is of the present sources, and its tables are what the rows of compiled kernels give."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks import audit, audit_page


def triton_row(**changes: Any) -> dict[str, Any]:
    good = {
        "op": "group_fc", "kernel": "group_fc_forward_kernel", "target": "sm_90", "dtype": "bf16", "at": ["coco"],
        "config": {"HAS_BIAS": True, "BLOCK_B": 64, "BLOCK_E": 32, "D0": 64, "LOSS": "asl", "WIDTH": 96},
        "warps": 4, "stages": 3, "registers": 128, "stack": 0, "local": 0, "shared": 40_000, "tensor_memory": 0,
        "matrix": {"FFMA": 2, "HGMMA": 16}, "loads": {"16": 6, "4": 8}, "problems": [],
    }  # fmt: skip
    return {**good, **changes}


def cuda_row(**changes: Any) -> dict[str, Any]:
    good = {
        "op": "group_fc", "kernel": "grouped_product", "target": "sm_80", "dtype": "fp16", "instance": "dh 8",
        "warps": 4, "registers": 100, "stack": 0, "local": 0, "shared": 20_480, "matrix": {"HMMA": 32},
        "loads": {"16": 8}, "problems": [],
    }  # fmt: skip
    return {**good, **changes}


@pytest.mark.parametrize(
    ("changes", "programs"),
    [
        ({}, 4),  # 65536 / (4 * 32 * 128) = 4, 233472 / 41024 = 5.7
        ({"registers": 129}, 3),  # counted as 136: 65536 / (4 * 32 * 136) = 3.8
        ({"shared": 100_000}, 2),  # 233472 / 101024 = 2.3
        ({"target": "sm_80", "shared": 100_000}, 1),  # 167936 / 101024 = 1.7
        ({"shared": 232_448}, 1),  # with the 1 KB of the system, all there is
        ({"shared": 232_449}, 0),
        ({"registers": 16, "shared": 0}, 16),  # 64 warps of 4
        ({"registers": 16, "shared": 0, "warps": 1}, 32),  # 32 programs
        # A quarter of the registers holds 16384 / (32 * 120) = 4.3 warps; 65536 / (32 * 120) would be 17.
        ({"registers": 120, "shared": 0, "warps": 1}, 16),
        # Shared memory comes in 128 bytes: 167936 / (4992 + 1024) = 27.9; 167936 / (4936 + 1024) would be 28.
        ({"target": "sm_80", "registers": 16, "shared": 4_936, "warps": 1}, 27),
        ({"registers": 256}, 0),
        ({"target": "sm_100", "tensor_memory": 256}, 2),  # of 512 columns
        ({"target": "sm_100", "tensor_memory": 64}, 4),
    ],
)
def test_occupancy(changes, programs):
    assert audit_page.resident(triton_row(**changes)) == programs


def test_forms_of_a_configuration_are_one_line_with_the_worst_of_them():
    rows = [
        triton_row(),
        triton_row(
            at=["coco offset", "B=1,C=7", "openimages"], config={**triton_row()["config"], "HAS_BIAS": False},
            registers=168, shared=50_000, stack=8, matrix={"HGMMA": 8}, loads={"2": 64, "bulk": 1},
        ),
        triton_row(warps=8),
        triton_row(dtype="fp32", matrix={"FFMA": 512}),
        triton_row(kernel="scale_kernel", config={"BLOCK_M": 1024}, matrix={"FFMA": 4}, loads={}),
        triton_row(target="sm_100", tensor_memory=256, matrix={"UTCHMMA": 4}, loads={"32": 1, "16": 1, "8": 2}),
    ]  # fmt: skip
    head, _, first, other_warps, full_precision, no_product = audit_page.triton_table(rows, "sm_90")
    assert head.startswith("| kernel | dtype | configuration | warps x stages | registers | stack | shared | occupancy")
    assert first == (
        "| `group_fc_forward_kernel` | bf16 | B=64 E=32 D0=64 asl | 4 x 3 | 168 | 8 | 50,000 | 12/64 "
        "| HGMMA 8 to 16 | 16 B, 0 to 75 %, bulk | coco, other shapes, openimages |"
    )
    assert "| 8 x 3 | 128 | 0 | 40,000 | 16/64 |" in other_warps
    assert "| fp32 |" in full_precision
    assert "| FFMA 512 |" in full_precision
    assert no_product.endswith("| - | - | coco |")  # FFMA of a kernel without products is no matrix instruction
    assert audit_page.triton_table(rows, "sm_100")[2].endswith("| 8/64 | 256 | UTCHMMA 4 | 32 B, 75 % | coco |")


def test_the_page_names_problems_and_sources():
    triton = [triton_row(), triton_row(target="sm_80", matrix={"FFMA": 9}, problems=["no HMMA"])]
    text = audit_page.page(triton, [cuda_row()], {"Triton": "1.2.3", "nvcc": "13.0"}, {"kernels/f.py": "0" * 16})
    assert "By Triton 1.2.3, nvcc 13.0." in text
    assert "2 compilations of Triton kernels and 1 of .cu kernels, 1 with a problem." in text
    assert "* group_fc_forward_kernel sm_80 bf16 coco: no HMMA" in text
    assert "| group_fc | `grouped_product` | fp16 | dh 8 | 128 | 100 | 0 | 20,480 | 16/64 | HMMA 32 |" in text
    # Targets in their order, and a target without a row.
    assert "| `grouped_product` | 1 | 100 / - / - | 0 / - / - | 20,480 / - / - | 16 / - / - | HMMA / - / - |" in text
    assert set(audit.out_of_date(text)) == {"kernels/f.py", *audit.fingerprints()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stack": 8}, "stack 8 B"),
        ({"local": 4}, "local 4 B"),
        ({"shared": 49_153}, "shared memory"),
        ({"matrix": {"FFMA": 32}}, "no HMMA"),
        ({"matrix": {"FFMA": 32}, "dtype": "fp32"}, None),
    ],
)
def test_a_bad_cuda_kernel_is_reported(changes, message):
    assert audit.cuda_problems(cuda_row()) == []
    found = audit.cuda_problems(cuda_row(**changes))
    assert found == [] if message is None else message in "".join(found)


# Cubins of sm_90 and later count the system's 1 KB.
@pytest.mark.parametrize(("target", "counted", "shared"), [("sm_80", 512, 512), ("sm_90", 1536, 512), ("sm_100", 0, 0)])
def test_a_cubin_is_read(target, counted, shared, monkeypatch, tmp_path):
    mangled = "_ZN6mlhead1_GLOBAL__N__9attentionI6__halfLNS_15AttentionResultE1ELi8EEEvv"
    plain = (
        "void mlhead::(anonymous namespace)::attention<__half, (mlhead::AttentionResult)1, 8>(mlhead::AttentionCall)"
    )
    other = ".nv.info._Z1gv\n\tAttribute:\tEIATTR_REGCOUNT\n"
    outputs = {
        "--dump-resource-usage": f" Function {mangled}:\n  REG:40 STACK:0 SHARED:{counted} LOCAL:0 CONSTANT[0]:616\n",
        "-elf": f"{other}.nv.info.{mangled}\n\t<0x1>\n\tAttribute:\tEIATTR_CRS_STACK_SIZE\n"
        "\tFormat:\tEIFMT_SVAL\n\tValue:\t0x0\n\tAttribute:\tEIATTR_MAX_THREADS\n\tFormat:\tEIFMT_SVAL\n"
        "\tValue:\t0x80 0x2 0x1 \n",
        "--dump-sass": f"""\t\tFunction : {mangled}
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;       /* 0x01 */
        /*0010*/              @!P0 HMMA.16816.F32 R4, R8, R2, R4 ;        /* 0x01 */
        /*0020*/                   LDG.E.U16 R4, desc[UR4][R2.64] ;       /* 0x01 */
        """,
    }
    monkeypatch.setattr(audit.sass, "_tool", lambda option, path: outputs[option])
    monkeypatch.setattr(audit, "demangled", lambda names: [plain for _ in names])
    (row,) = audit.cuda_rows(tmp_path / "k.cubin", "query_attention", target)
    assert row == cuda_row(
        op="query_attention", kernel="attention", instance="dq 8", target=target, warps=8, registers=40,
        shared=shared, matrix={"HMMA": 1}, loads={"16": 1, "2": 1},
    )  # fmt: skip


def test_template_arguments():
    enums = {"Loss": ["bce", "asl", "softmax"]}
    assert audit.instance("void a::(anonymous namespace)::pool<float, 2>(a::P)", enums) == ("pool", "fp32", "2")
    name = "void n::(anonymous namespace)::class_loss_gradient<double, (n::Loss)2>(n::LossBlock)"
    assert audit.instance(name, enums) == ("class_loss_gradient", "fp64", "softmax")
    name = "void n::(anonymous namespace)::sum_parts<float, __nv_bfloat16>(n::Parts<float>, long)"
    assert audit.instance(name, enums) == ("sum_parts", "fp32", "bf16")
    name = "void n::(anonymous namespace)::add_parts<__half>(n::GroupedProduct)"
    assert audit.instance(name, enums) == ("add_parts", "fp16", "-")


def test_the_sources_that_count():
    names = audit.fingerprints().keys()
    assert {"kernels/group_fc.py", "kernels/_device.py", "csrc/group_fc.cu", "csrc/cuda_tiles.h"} <= names
    assert not {"csrc/gemm.h", "csrc/cuda_device.h"} & names  # no .cu includes them


def test_comments_alone_do_not_count(tmp_path):
    for name, comment in (("k.py", "# why"), ("k.cu", "// why")):
        path = tmp_path / name
        path.write_text("#pragma once\nx = 1\n" if name == "k.cu" else "x = 1\n")
        before = audit.relevant(path)
        path.write_text(f"  {comment}\n\n{path.read_text()}")
        assert audit.relevant(path) == before
        path.write_text(path.read_text().replace("1", "2"))
        assert audit.relevant(path) != before
    assert b"#pragma" in audit.relevant(tmp_path / "k.cu")


@pytest.mark.parametrize("wrong", [[], ["no HMMA"]])
def test_the_command_writes_the_page(wrong, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(audit, "compile_triton", lambda jobs: [triton_row()])
    monkeypatch.setattr(audit, "compile_cuda", lambda jobs: [cuda_row(problems=wrong)])
    monkeypatch.setattr(audit, "compiler_versions", lambda: {"Triton": "1.2.3"})
    monkeypatch.setattr(audit.shutil, "which", lambda name: name)
    path = tmp_path / "page.md"
    assert audit.main(["--out", str(path)]) == len(wrong)
    assert audit.out_of_date(path.read_text()) == []
    assert f"2 compilations, {len(wrong)} with a problem" in capsys.readouterr().out
    # Nothing is written of sources that changed meanwhile.
    monkeypatch.setattr(audit, "fingerprints", iter(({"a": "1"}, {"a": "2"})).__next__)
    assert audit.main(["--out", str(tmp_path / "other.md")]) == 1
    assert not (tmp_path / "other.md").exists()


def test_the_page_is_of_the_present_sources(tmp_path, capsys):
    page = audit.PAGE.read_text()
    stale = audit.out_of_date(page)
    assert stale == [], f"docs/static_audit.md is out of date; run `{audit.COMMAND}`, which compiles every kernel"
    assert ", 0 with a problem." in page
    assert audit.main(["--check"]) == 0
    assert audit.main(["--check", "--out", str(tmp_path / "none.md")]) == 1
    assert f"run: {audit.COMMAND}" in capsys.readouterr().err
