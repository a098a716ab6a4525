"""docs/performance.md is what the rows give: the newest count, losses are listed, what is not measured is named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import performance, plot, records
from benchmarks.machine import ROOT
from benchmarks.pages import rows as page_rows

VERSIONS = {"python": "3.12.1", "torch": "2.11.0", "triton": "3.6.0"}
CPU = {"device": "Some CPU", "threads": 2, "versions": VERSIONS, "commit": "c1c1c1c1c1c1", "dirty": False}
GPU = {
    "device": "NVIDIA H100 80GB HBM3",
    "driver": "580.1",
    "versions": {**VERSIONS, "cuda": "13.0"},
    "commit": "a0a0a0a0a0a0",
    "dirty": True,
}
ERRORS = {"out": {"error": 1e-7, "budget": 4e-7, "torch": 1e-7}, "h": {"error": 3e-7, "budget": 5e-7, "torch": 3e-7}}


def op_rows(provider: str, ms: float | None, where: dict[str, Any], day: int = 1, **more: Any) -> list[records.Row]:
    """The rows of one provider of group_fc, as benchmarks.run makes them."""
    dims = more.pop("dims", {"B": 64, "G": 80, "E": 768, "C": 80})
    workload, scale = more.pop("workload", "coco"), more.pop("scale", {})
    rows = []
    for factor, key in ((1, "forward"), (2, "backward"), (3, "both")):
        row = {
            "time": f"2026-01-{day:02}T10:00:00+00:00", "op": "group_fc", "workload": workload, "dims": dims,
            "scale": scale, "title": f"group_fc {workload} fp32  {dims}{scale}", "dtype": "fp32", "provider": provider,
            "kind": "mlhead" if provider.startswith("mlhead") else "baseline", "auto": provider == "mlhead: cpp",
            "pass": key, "status": "ok" if ms else "failed", "message": "" if ms else "no | such shape\nmore",
            "p50_ms": ms and factor * ms, "limit_ms": factor * 0.5, "limit_by": "flops",
            "fraction": ms and 0.5 / ms, "copy_gbps": 20.0, "gemm_tflops": 0.2,
            "peak_mib": None if "threads" in where else 12.5, "errors": ERRORS, "verified_at": dims, **where, **more,
        }  # fmt: skip
        rows.append(row)
    return rows


def other_rows() -> list[records.Row]:
    """A whole head, Table 9 and memory, on the CPU."""
    stamp = {"time": "2026-01-02T10:00:00+00:00", **CPU}
    dims = {"B": 2, "L": 49, "D": 512, "C": 20, "G": 20}
    head = [
        {**stamp, "head": "ml_decoder", "workload": "small", "dims": dims, "dtype": "fp32", "provider": provider,
         "pass": key, "errors": {"logits": 1e-7}, "status": "ok", "p20_ms": ms, "p50_ms": ms, "p80_ms": ms,
         "fraction": 0.5, "gemm_tflops": 0.2}
        for key in ("training", "inference") for provider, ms in (("mlhead", 7.25), ("papers", 9.5))
    ]  # fmt: skip
    table = [
        {**stamp, "table": "ML-Decoder, Table 9", "backbone": "tresnet_m", "head": name, "classes": 100,
         "multiply_adds_e9": 6.3, "paper_multiply_adds_e9": 6.3, "training": speed, "inference": 2 * speed, "batch": 4}
        for name, speed in (("gap", 4.0), ("ml_decoder", 3.0))
    ]  # fmt: skip
    # Of FLOPs alone, and newer: it has no speeds to put in place of those.
    flops = {key: value for key, value in table[1].items() if key not in ("training", "inference", "batch")}
    table.append({**flops, "time": "2026-01-03T10:00:00+00:00"})
    sizes = {"classes": 1_000_000, "width": 256, "batch": 32, "groups": 100}
    memory = [
        {**stamp, "memory": "group_fc_loss", "dims": sizes, "loss": "bce", "provider": provider, "peak_mib": mib,
         "seconds": [3.0, 1.0, 2.0]}
        for provider, mib in (("mlhead: cpp", 10.0), ("torch: bmm", 490.0))
    ]  # fmt: skip
    return [*head, *table, *memory]


def overhead_row(provider: str, key: str, us: float | None, where: dict[str, Any], **more: Any) -> records.Row:
    """A row as benchmarks.overhead makes them; on a GPU a call returns in half the time."""
    times = {"wall_us": us, "host_us": us and us / (1 if "threads" in where else 2), "thread_us": us and us / 4}
    quantiles = {clock: t and {"p20": 0.9 * t, "p50": t, "p80": 1.1 * t} for clock, t in times.items()}
    return {
        "time": "2026-01-04T10:00:00+00:00", "kind": "overhead", "subject": "gap", "subject_is": "head",
        "workload": "small", "dims": {"B": 2, "C": 20}, "dtype": "fp32", "provider": provider, "mode": "eager",
        "backend": None, "pass": key, "status": "ok" if us else "failed", "message": "" if us else "no\nway",
        "includes_work": "threads" in where, "errors": {}, **quantiles, **where, **more,
    }  # fmt: skip


def model_row(variant: str, key: str, ms: float | None, alone: float | None = 100.0, **more: Any) -> records.Row:
    """A row as benchmarks.end_to_end makes them, of CSRA on ResNet-50 on the CPU."""
    alone, head = ms if variant == "backbone alone" else alone, None if variant == "backbone alone" else "csra"
    both = bool(head and ms and alone)
    return {
        "time": "2026-01-04T11:00:00+00:00", "kind": "end_to_end", "backbone": "resnet50", "backbone_from": "timm 1.0",
        "classes": 9605, "image_size": 96, "batch": 1, "reduced": {"image_size": "96 in place of 224"},
        "dtype": "fp32", "head_name": head, "head_options": head and "in_features=8, num_classes=9605, lam=0.1",
        "variant": variant, "pass": key, "status": "ok" if ms else "wrong", "message": "" if ms else "differs",
        "p20_ms": ms and ms - 5, "p50_ms": ms, "p80_ms": ms and ms + 5, "backbone_ms": alone,
        "share": 1 - alone / ms if both else None, "resolved": ms > 110 if both else None, "peak_mib": None,
        **CPU, **more,
    }  # fmt: skip


def tune_row(written: str, ms: float | None, day: int = 2, **more: Any) -> records.Row:
    """A row as benchmarks.tune makes them, 5 % around its median."""
    times = {name: ms and part * ms for name, part in (("p20_ms", 0.95), ("p50_ms", 1.0), ("p80_ms", 1.05))}
    return {
        "time": f"2026-01-{day:02}T10:00:00+00:00", "kind": "tune", "site": "group_fc.forward_tile", "workload": "coco",
        "dims": {"B": 64, "C": 80}, "dtype": "bf16", "pass": "forward", "written": written, "shipped": False,
        "status": "ok" if ms else "wrong", "message": "" if ms else "result 0 differs", "modelled_ms": 0.4321,
        **times, **GPU, **more,
    }  # fmt: skip


def call_rows() -> list[records.Row]:
    """Overhead on both devices, a whole model, and configurations of a kernel, the oldest first."""
    ours, plain = "mlhead: auto", "torch: rewritten"
    calls = [overhead_row(name, "forward", us, CPU) for name, us in ((ours, 40.0), (plain, 60.0))]
    calls += [overhead_row(name, "both", us, CPU, mode="compiled") for name, us in ((ours, 90.0), (plain, 70.0))]
    calls += [overhead_row(name, "both", us, GPU) for name, us in ((ours, 30.0), (plain, 24.0))]
    calls += [overhead_row(name, "both", us, GPU, mode="CUDA graph") for name, us in ((ours, None), (plain, 8.0))]
    in_head = "after, loss in the head"
    model = [model_row("backbone alone", "training", 100.0), model_row("backbone alone", "inference", 50.0)]
    model += [model_row(name, "training", ms) for name, ms in (("before", 200.0), ("after", 105.0), (in_head, None))]
    model += [model_row(name, "inference", ms, 50.0) for name, ms in (("before", 60.0), ("after", 66.0))]
    tuned = [tune_row("Tile(64)", 0.1, day=1), tune_row("Tile(16)", 0.3, shipped=True)]
    tuned += [tune_row("Tile(32)", 0.24), tune_row("Tile(8)", None), tune_row("Tile(4)", 0.29)]
    noisy = [tune_row("Tile(16)", 0.3, shipped=True, dtype="fp16"), tune_row("Tile(32)", 0.29, dtype="fp16")]
    return sorted([*calls, *model, *tuned, *noisy], key=lambda row: row["time"])


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two devices, three commits, a failing provider, a newer run, a kind that the page does not know."""
    folder = tmp_path / "results"
    part = {"workload": "million", "dims": {"B": 64, "G": 100, "E": 768, "C": 40000}, "scale": {"C": 25, "B": 4}}
    later = {**CPU, "commit": "c2c2c2c2c2c2"}
    cpu = folder / "cpu"
    records.append_rows(cpu / "a.jsonl", op_rows("mlhead: cpp", 1.0, CPU, day=1) + op_rows("torch: bmm", 7.77, CPU))
    records.append_rows(
        cpu / "a.jsonl", op_rows("mlhead: cpp", 50.0, CPU, **part) + op_rows("torch: bmm", 40, CPU, **part)
    )
    # The newer file comes first by its name; what it measures anew is slower and loses.
    records.append_rows(cpu / "0.jsonl", op_rows("mlhead: cpp", 9.99, later, day=5) + other_rows())
    records.append_rows(folder / "gpu" / "b.jsonl", op_rows("mlhead: triton", 0.03, GPU, auto=True))
    records.append_rows(folder / "gpu" / "b.jsonl", [*op_rows("compile: bmm", None, GPU), {"kind": "dream", **GPU}])
    with (folder / "gpu" / "b.jsonl").open("a") as file:
        file.write(json.dumps(op_rows("torch: cut", 0.001, GPU)[0])[:-9])
    return folder


def section(text: str, heading: str) -> str:
    """From a heading to the next of its level."""
    level = heading.split(" ")[0]
    return text.split(heading + "\n", 1)[1].split(f"\n{level} ", 1)[0]


def test_page_of_made_up_rows(results):
    text = performance.page(page_rows.read_all(results))
    cpu, gpu = section(text, "## Some CPU, 2 threads"), section(text, "## NVIDIA H100 80GB HBM3")
    assert "commit `a0a0a0a0a0a0` (dirty)" in gpu
    assert "driver 580.1, Python 3.12.1, torch 2.11.0, Triton 3.6.0, CUDA 13.0" in gpu
    assert (
        "| `coco` | mlhead: triton \\* | **0.0300** | **0.0600** | **0.0900** | 1667 % | 12.5 | 3.0e-07/5.0e-07 |"
        in gpu
    )
    assert "| `coco` | compile: bmm | failed | failed | failed |" in gpu
    assert "`coco`, compile: bmm: failed: `no | such shape`" in gpu
    assert "torch: cut" not in text
    assert "1 rows are of kinds that this page does not show: dream." in text
    assert "**not the whole workload: C divided by 25 and B divided by 4**" in cpu
    assert "peak MiB" not in section(cpu, "### group_fc")
    assert "| `small` fp32 | training | papers | 9.50 |" in cpu
    assert "| 100 | ml_decoder | 6.30 | 6.3 | 3.00 | 25.0 % | 6.00 | 25.0 % | 4 |" in cpu
    assert "| mlhead: cpp | 10.0 | 2.00 | 3 |" in cpu
    for row in text.splitlines():
        assert not row.startswith("| ") or row.endswith(" |"), row


def test_the_newest_row_counts(results):
    text = performance.page(page_rows.read_all(results))
    cpu = section(section(text, "## Some CPU, 2 threads"), "### group_fc")
    assert "| `coco` | mlhead: cpp \\* | 9.99 | 20.0 | 30.0 | 5 % | 3.0e-07/5.0e-07 | `c2c2c2c2c2c2` |" in cpu
    assert "| `coco` | torch: bmm | **7.77** | **15.5** | **23.3** | 6 % | 3.0e-07/5.0e-07 | `c1c1c1c1c1c1` |" in cpu
    assert cpu.count("mlhead: cpp") == 2  # coco and million


def test_rows_of_other_sizes_are_not_compared(results):
    # The newest rows of one provider alone at another size: nothing of the other providers is at that size.
    other = op_rows("mlhead: cpp", 0.5, CPU, day=9, dims={"B": 2, "G": 80, "E": 768, "C": 80}, scale={"B": 32})
    rows = page_rows.newest([*page_rows.read_all(results), *other])
    mine = [row for row in rows if page_rows.device_of(row) == "Some CPU, 2 threads"]
    found = performance.contests(mine)
    assert not any(contest.ours and contest.others for contest in found if contest.what == "`group_fc` coco fp32")
    custom = [op_rows("mlhead: cpp", 1.0, CPU, workload="custom", dims={"B": b, "C": 9})[0] for b in (2, 3)]
    assert len(page_rows.newest(custom)) == 2


def test_losses_are_listed(results):
    wins = section(performance.page(page_rows.read_all(results)), "## Where plain PyTorch wins")
    assert "| `group_fc` coco fp32 | forward, ms | torch: bmm | **7.77** | mlhead: cpp | 9.99 | 1.29 |" in wins
    assert "`c1c1c1c1c1c1`, `c2c2c2c2c2c2`: two runs |" in wins
    assert (
        "| `group_fc` million (C/25 and B/4) fp32 | both, ms | torch: bmm | **120** | mlhead: cpp | 150 | 1.25 |"
        in wins
    )
    assert "In 6 of 10 comparisons." in wins  # the head and the memory are won
    assert "**NVIDIA H100 80GB HBM3.** In 0 of 0 comparisons." in wins
    own = op_rows("mlhead: reference", 5.0, CPU, day=6)
    rows = page_rows.read_all(results) + own
    wins = section(performance.page(rows), "## Where plain PyTorch wins")
    # Another backend of mlhead would win, but it is not the one that is taken.
    assert "| forward, ms | torch: bmm | **7.77** | mlhead: cpp | 9.99 | 1.29 | mlhead: reference 5.00 |" in wins


def test_overhead_whole_models_and_configurations():
    text = performance.page(call_rows())
    cpu, gpu = section(text, "## Some CPU, 2 threads"), section(text, "## NVIDIA H100 80GB HBM3")
    assert "kinds that this page does not show" not in text
    calls = section(cpu, "### Overhead of a call")
    assert "| what | pass | mode | mlhead wall us | mlhead thread us | plain PyTorch | wall us | thread us |" in calls
    spread = "**40.0** (36.0 to 44.0) | 10.0 | torch: rewritten | 60.0 (54.0 to 66.0) | 15.0 | 1.50 |"
    assert f"| head `gap` fp32 | forward | eager | {spread}" in calls
    assert "| head `gap` fp32 | both | compiled | 90.0 (81.0 to 99.0) | 22.5 |" in calls
    calls = section(gpu, "### Overhead of a call")
    assert "| both | eager | 15.0 (13.5 to 16.5) | 30.0 | 7.50 | torch: rewritten | **12.0**" in calls
    assert "| both | CUDA graph | failed | - | - | torch: rewritten | **4.00**" in calls
    assert "* head `gap` fp32, both, mlhead: auto, CUDA graph: failed: `no`" in calls
    assert "driver 580.1" in calls
    assert "commit `a0a0a0a0a0a0` (dirty)" in calls
    model = section(cpu, "### Whole models, end to end")
    assert "**not as in the papers: image size 96 in place of 224**" in model
    assert "`csra(lam=0.1)`" in model
    start = "| `resnet50`, 9,605 classes |"
    times = "200 (195 to 205) | 50.0 % | **105** (100 to 110) | 4.8 % ? | wrong | 1.90 |"
    assert f"{start} training | `csra` | {times}" in model
    assert f"{start} inference | `csra` | **60.0** (55.0 to 65.0) | 16.7 % ? | 66.0" in model
    assert f"{start} training | 100 (95.0 to 105) |" in model
    assert "* `resnet50`, 9,605 classes: training csra after, loss in the head: wrong: `differs`" in model
    tuned = section(gpu, "### Launch configurations")
    assert "| `coco` B=64 C=80 bf16 | forward | 0.300 | `Tile(32)` | 0.240 | 20.0 % | 2 |" in tuned
    assert "| `coco` B=64 C=80 fp16 | forward | 0.300 | `Tile(32)` | 0.290 | 3.3 % ? | 1 |" in tuned
    assert "`Tile(8)`: wrong: `result 0 differs`" in tuned
    assert "Tile(64)" not in text  # of an older run than the shipped one's
    assert "0.432" not in text  # modelled
    for row in text.splitlines():
        assert not row.startswith("| ") or row.endswith(" |"), row


def test_losses_of_calls_and_whole_models_are_listed():
    wins = section(performance.page(call_rows()), "## Where plain PyTorch wins")
    calls = "a call of head `gap` fp32"
    lost = "torch: rewritten | **70.0** | mlhead: auto | 90.0 | 1.29 | `c1c1c1c1c1c1` |"
    assert f"| {calls}, compiled | both, wall us | {lost}" in wins
    assert f"| {calls}, eager | both, host us | torch: rewritten | **12.0** | mlhead: auto | 15.0 | 1.25 |" in wins
    assert f"| {calls}, eager | both, wall us | torch: rewritten | **24.0** | mlhead: auto | 30.0 | 1.25 |" in wins
    model = "`resnet50` with `csra`, 9,605 classes, images of 96, batch 1, fp32"
    assert f"| {model} | inference, ms | papers | **60.0** | mlhead | 66.0 | 1.10 | `c1c1c1c1c1c1` |" in wins
    assert "**Some CPU, 2 threads.** In 2 of 4 comparisons." in wins
    assert "**NVIDIA H100 80GB HBM3.** In 2 of 2 comparisons." in wins
    # The newer of two runs of one commit: its rows are no answer to the older one's.
    later = model_row("after", "inference", 70.0, 55.0, time="2026-01-05T10:00:00+00:00")
    wins = section(performance.page([*call_rows(), later]), "## Where plain PyTorch wins")
    assert "| papers | **60.0** | mlhead | 70.0 | 1.17 | `c1c1c1c1c1c1`, `c1c1c1c1c1c1`: two runs |" in wins


def test_what_is_not_measured_is_named(results):
    rows = page_rows.read_all(results)
    lacking = page_rows.missing(page_rows.newest(rows))
    by_name = {name: text for text, names in lacking.items() for name in names}
    assert {"NVIDIA H100", "NVIDIA H200", "NVIDIA A100", "Some CPU, 2 threads"} <= set(by_name)
    assert "coco (bf16, fp16)" in by_name["NVIDIA H100"]
    assert "(bf16, fp32, fp16); " not in by_name["NVIDIA A100"]
    assert "`group_fc`" in by_name["NVIDIA A100"]
    assert "memory of the loss in the head" not in by_name["Some CPU, 2 threads"]
    assert "the whole head: openimages-16, voc-16" in by_name["Some CPU, 2 threads"]
    by_name = {name: text for text, names in page_rows.missing(call_rows()).items() for name in names}
    assert "* overhead of a call: all ops and heads" in by_name["NVIDIA A100"]
    assert "head `csra`, head `ml_decoder`" in by_name["NVIDIA H100"]
    assert "head `gap`" not in by_name["NVIDIA H100"]
    assert (
        "end to end: resnet50 (80 classes); tresnet_m, vit_base_patch16_224 (80 and 9,605 classes)"
        in (by_name["Some CPU, 2 threads"])
    )
    text = performance.page([])
    assert "Not yet measured." in text
    assert "![" not in text


def test_the_same_rows_give_the_same_page(results):
    rows = sorted([*page_rows.read_all(results), *call_rows()], key=lambda row: row.get("time", ""))
    assert performance.page(rows) == performance.page(json.loads(json.dumps(rows)))
    shuffled = random.Random(0).sample(page_rows.newest(rows), len(page_rows.newest(rows)))
    shuffled.sort(key=lambda row: row["time"])
    known = [row for row in rows if page_rows.kind_of(row)]
    assert performance.page(shuffled).splitlines() == performance.page(known).splitlines()


def test_check_sees_what_differs(results, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    options = ["--results", str(results), "--out", str(tmp_path / "docs")]
    assert performance.main([*options, "--check"]) == 1
    assert performance.main(options) == 0
    assert performance.main([*options, "--check"]) == 0
    pictures = sorted(path.name for path in (tmp_path / "docs" / "performance").iterdir())
    assert pictures == [
        "nvidia-h100-80gb-hbm3-limit-group-fc.png",
        "some-cpu-2-threads-classes.png",
        "some-cpu-2-threads-limit-group-fc.png",
        "some-cpu-2-threads-memory.png",
        "some-cpu-2-threads-table-9.png",
    ]
    page = (tmp_path / "docs" / "performance.md").read_text()
    assert all(f"(performance/{name})" in page for name in pictures)
    (tmp_path / "docs" / "performance" / pictures[0]).rename(tmp_path / "docs" / "performance" / "old.png")
    assert performance.main([*options, "--check"]) == 1
    assert f"{pictures[0]} is missing\nold.png is of no row\n" in capsys.readouterr().err
    assert performance.main(options) == 0
    records.append_rows(results / "cpu" / "c.jsonl", op_rows("mlhead: cpp", 9.0, CPU, day=9))
    assert performance.main([*options, "--check"]) == 1
    assert "performance.md is not what the rows give" in capsys.readouterr().err


def test_steps_with_the_loss_in_the_head_are_drawn_against_the_classes():
    few = [row for row in other_rows() if "memory" in row]
    more = [
        {**row, "dims": {**row["dims"], "classes": 1000}, "peak_mib": 2.0, "seconds": [0.032], "scale": {"width": 3}}
        for row in few
    ]
    title = "group_fc_loss, fp32, a training step, bce, B=32, G=100, E=256"

    def panels(rows):
        made, lacking = performance.pictures("a CPU", page_rows.newest(rows))
        return {file: draw.args[0] for file, _, draw in made}, "; ".join(lacking)

    found, lacking = panels(few)
    assert found["a-cpu-memory.png"] == {
        f"{title}, beyond weight and gradient": ("MiB", {"C=1,000,000": {"mlhead: cpp": 10.0, "torch: bmm": 490.0}})
    }
    assert "a-cpu-classes.png" not in found
    assert "`group_fc_loss`, `csra_loss`: time against two or more numbers of classes" in lacking
    assert "memory of the loss in the head at a second number of classes" in lacking
    found, lacking = panels(few + more)
    (panel,) = found["a-cpu-classes.png"].values()
    assert panel == {
        "C=1,000": {"mlhead: cpp": pytest.approx(1.0), "torch: bmm": pytest.approx(1.0)},
        "C=1,000,000": {"mlhead: cpp": pytest.approx(62.5), "torch: bmm": pytest.approx(62.5)},
    }
    ((_, memory),) = found["a-cpu-memory.png"].values()
    assert list(memory) == ["C=1,000", "C=1,000,000"]
    assert "group_fc_loss`, `csra_loss`: time against two" not in lacking
    assert "at a second number of classes" not in lacking
    assert "Of the sizes of `million` divided: width by 3." in performance.page(few + more)


def test_a_run_is_told_from_another():
    rows = [overhead_row("mlhead: auto", "forward", 40.0, CPU), overhead_row("torch: rewritten", "forward", 30.0, CPU)]
    one = "`c1c1c1c1c1c1` |"
    two = "`c1c1c1c1c1c1`, `c1c1c1c1c1c1`: two runs |"
    for ids, expected in (((), one), (("a", "a"), one), (("a", "b"), two)):
        named = [{**row, "run": name} for row, name in zip(rows, ids, strict=True)] if ids else rows
        wins = section(performance.page(named), "## Where plain PyTorch wins")
        assert f"| 1.33 | {expected}" in wins


def test_workloads_on_one_line_differ_in_classes_only():
    def rows(name, **dims):
        return op_rows("torch: bmm", 1.0, CPU, workload=name, dims=dims)[2:]

    mine = [*rows("a", B=2, E=8, C=20), *rows("b", B=4, E=8, C=90), *rows("c", B=4, E=9, C=50)]
    assert [row["workload"] for row in plot.class_rows(mine[::-1])] == ["a", "b"]
    assert plot.class_panel(mine[:1], "p50_ms", True) == {"C=20\na\nB=2": {"torch: bmm": 1.5}}
    assert plot.class_rows(mine[1:]) == []


def test_the_page_in_docs_is_what_the_rows_give():
    if not any((ROOT / "benchmarks" / "results").rglob("*.jsonl")):
        pytest.skip("no result files: not a checkout")
    assert performance.problems(page_rows.read_all(ROOT / "benchmarks" / "results"), ROOT / "docs") == []
    assert performance.main(["--check"]) == 0
