"""The benchmark runner verifies before it times, its rows are complete, and the GPU check can be rehearsed anywhere."""

from __future__ import annotations

import io
import itertools
import json
import math
import signal
import sys
import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import (
    baselines,
    gpu_check,
    limits,
    machine,
    memory,
    peaks,
    plan,
    plot,
    products,
    records,
    report,
    run,
    touch,
    verify,
)
from mlhead._resident import peak
from mlhead.testing import CASES

TINY = [
    "--device", "cpu", "--op", "group_fc", "--dims", "B=3,G=4,E=8,C=10", "--seconds-each", "0.002", "--least", "2",
    "--no-peaks",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _assumed_limits(monkeypatch):
    # Measuring them takes seconds; how is tested by itself.
    monkeypatch.setattr(limits, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setattr(limits, "gemm_rate", lambda device, dtype: 1e11)


def test_rows_are_complete(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert run.main([*TINY, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    providers = {row["provider"] for row in rows}
    assert {"mlhead: reference", "papers: loop", "torch: bmm", "torch: einsum"} <= providers
    assert len(rows) == 3 * len(providers)
    for row in rows:
        assert row["status"] == "ok", row["message"]
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert row["samples"] >= 2
        assert row["limit_ms"] > 0
        assert math.isclose(row["fraction"], row["limit_ms"] / row["p50_ms"])
        assert set(row["errors"]) == {"out", "h", "weight", "bias"}
        assert all(0 <= e["error"] <= e["budget"] for e in row["errors"].values())
        for key in ("device", "commit", "dirty", "threads", "copy_gbps", "gemm_tflops", "dims", "scale", "verified_at"):
            assert key in row
        assert row["run"] == machine.RUN
        assert row["versions"]["torch"] == torch.__version__
    text = capsys.readouterr().out
    assert "torch: bmm" in text
    assert "lain PyTorch wins" in text


def test_what_is_wrong_is_reported_and_not_timed(tmp_path, monkeypatch, capsys):
    def off_by_a_little(h, weight, bias, *, num_classes):
        return baselines.group_fc_bmm(h, weight, bias, num_classes=num_classes) * (1 + 1e-5)

    def refuses(h, weight, bias, *, num_classes):
        raise RuntimeError("no such shape\nmore words")

    planted = {**baselines.BASELINES["group_fc"], "torch: wrong": off_by_a_little, "torch: refuses": refuses}
    monkeypatch.setitem(baselines.BASELINES, "group_fc", planted)
    out = tmp_path / "rows.jsonl"
    assert run.main([*TINY, "--out", str(out)]) == 0
    rows = records.read_rows(out)
    for provider, status in (("torch: wrong", "wrong"), ("torch: refuses", "failed"), ("torch: bmm", "ok")):
        mine = [row for row in rows if row["provider"] == provider]
        assert len(mine) == 3
        assert {row["status"] for row in mine} == {status}
        assert all((row["p50_ms"] is None) == (status != "ok") for row in mine)
    text = capsys.readouterr().out
    assert "torch: wrong: wrong: out: error" in text
    assert "torch: refuses: failed: RuntimeError: no such shape" in text


def test_a_wrong_backend_fails_the_run(tmp_path, monkeypatch):
    real = run.providers_of

    def with_wrong_reference(*arguments):
        found = real(*arguments)
        correct = found["mlhead: reference"]
        found["mlhead: reference"] = lambda **inputs: correct(**inputs) + 1e-3
        return found

    monkeypatch.setattr(run, "providers_of", with_wrong_reference)
    assert run.main([*TINY, "--out", str(tmp_path / "rows.jsonl")]) == 1


def test_a_wrong_offset_at_full_size_shows():
    sample = CASES["group_fc"].make({"B": 3, "G": 4, "E": 8, "C": 10}, torch.float32, "cpu", 0)

    def shifted(h, weight, bias, *, num_classes):
        return baselines.group_fc_bmm(h, weight, bias, num_classes=num_classes).roll(1, 1)

    providers = {"bmm": baselines.group_fc_bmm, "einsum": baselines.group_fc_einsum, "shifted": shifted}
    problems = verify.agree(sample, providers, "bmm")
    assert list(problems) == ["shifted"]
    assert "differs from bmm" in problems["shifted"]


def test_results_are_appended_and_resumed(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    run.main([*TINY, "--out", str(out)])
    first = out.read_text()
    run.main([*TINY, "--out", str(out), "--resume"])
    assert out.read_text() == first
    out.write_text(first + '{"cut sho')  # killed in the middle of a line
    run.main([*TINY, "--dtype", "fp64", "--out", str(out), "--resume"])
    assert out.read_text().startswith(first)
    assert {row["dtype"] for row in records.read_rows(out)} == {"fp32", "fp64"}
    capsys.readouterr()
    run.main([*TINY, "--dtype", "fp32", "--dtype", "fp16", "--out", str(out), "--resume"])
    assert "[1/1] group_fc custom fp16" in capsys.readouterr().err  # what is there does not enter the time left
    run.main([*TINY, "--minutes", "1e-9", "--out", str(out)])
    assert "Not reached:\n  group_fc custom fp32" in capsys.readouterr().out


def test_quick_is_bounded(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(run, "run_group", lambda group, device, options: asked.append((group, options)) or [])
    quick = ["--device", "cpu", "--quick", "--out", str(tmp_path / "rows.jsonl")]
    assert run.main(quick) == 0
    assert {group.op for group, _ in asked} == set(CASES)
    assert {(o.minutes, o.least, o.seconds_each) for _, o in asked} == {(1.5, 3, 0.25)}
    asked.clear()
    assert run.main([*quick, "--op", "group_fc", "--minutes", "7", "--least", "2"]) == 0
    assert {(o.minutes, o.least) for _, o in asked} == {(7.0, 2)}


def test_an_interrupted_run_says_where_its_rows_are(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_group", interrupted)
    assert run.main([*TINY, "--out", str(tmp_path / "rows.jsonl")]) == 130
    assert "interrupted in group_fc custom fp32" in capsys.readouterr().out


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_says_how_long_it_will_take(monkeypatch, terminal):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)  # no tqdm
    clock = iter([0.0, 61.0])
    monkeypatch.setattr(run.time, "monotonic", lambda: next(clock))
    with run.progress(3) as step:
        for title in ("first", None, "second"):
            step(title)
    assert stream.getvalue() == "[1/3] first\n[2/3, about 2:02 left] second\n"


def test_memory_rows_are_complete(tmp_path, monkeypatch, capsys):
    asked = []

    def measured(settings):
        asked.append((settings["classes"], settings["loss"], settings["provider"]))
        return float(len(asked)), [0.5, 0.25, 1.0]

    monkeypatch.setattr(memory, "measure", measured)
    out = tmp_path / "rows.jsonl"
    assert memory.main(["--classes", "2000", "500", "--turns", "2", "--out", str(out)]) == 0
    turn = list(memory.PROVIDERS)
    sizes = [(classes, loss) for classes in (500, 2000) for loss in ("bce", "asl")]
    assert asked == [(*size, provider) for size in sizes for provider in turn + turn]
    rows = records.read_rows(out)
    assert [(r["dims"]["classes"], r["loss"], r["provider"]) for r in rows] == [(*s, p) for s in sizes for p in turn]
    for i, row in enumerate(rows):
        assert row["peak_mib"] == 6 * (i // 3) + i % 3 + 4  # the larger of two turns
        assert row["seconds"] == [0.25, 0.25, 0.5, 0.5, 1.0, 1.0]
        assert row["scale"] == {"width": 3, "batch": 8}
        assert (row["memory"], row["run"]) == ("group_fc_loss", machine.RUN)
    assert "     2,000 asl  torch: bmm" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        memory.main(["--classes", "150"])


@pytest.mark.skipif(not peak(), reason="needs the peak of Linux's /proc")
def test_memory_of_a_step_is_measured():
    dims = {"width": 256, "batch": 64, "groups": 100, "classes": 100}  # so few that the step before is as large
    most, seconds = memory.measure({**dims, "loss": "bce", "provider": "torch: bmm", "steps": 2, "seconds": 0.0})
    gradient = 64 * 100 * 256 * 4 / 2**20  # of h; the product may need copies of h and of its gradient
    assert gradient <= most < 4 * gradient
    assert len(seconds) == 2


@pytest.mark.skipif(not peak(), reason="needs the peak of Linux's /proc")
def test_peak_memory_of_passes_is_measured():
    """Of 19 MB of scores plain torch holds all and several maps of a head's, the op a scratch of 8."""
    group = plan.Group("csra_pool", "custom", {"B": 4, "L": 196, "D": 64, "H": 4, "C": 1600}, "fp32")
    scores = 4 * 196 * 4 * 1600 * 4 / 2**20
    plain, own = (peaks.in_process(group, provider, 0) for provider in ("torch: matmul", "mlhead: reference"))
    assert plain["forward"] >= 1.4 * scores
    assert plain["both"] == plain["backward"] >= 3.0 * scores
    assert own["forward"] < scores
    assert 0 < own["both"] < 0.7 * plain["both"]
    assert peaks.in_process(group, "compile: conv", 0) == dict.fromkeys(("forward", "both", "backward"))
    with pytest.raises(RuntimeError, match="peak memory of papers: nobody: KeyError"):
        peaks.in_process(group, "papers: nobody", 0)


@pytest.mark.parametrize("op", list(CASES))
def test_baselines_are_right(op):
    case = CASES[op]
    # Published CSRA has no answer for a zero row, and no baseline has dropout, masks or empty tensors.
    dims = next(d for d in case.shapes if min(d.get(n, 2) for n in "BCDEGL") > 1 and len(d) <= 5)
    sample = case.make(dims, torch.float32, "cpu", 1)
    verdicts = verify.verify(sample, baselines.baselines(op, "cpu", ()))
    assert {name: v.message for name, v in verdicts.items() if v.status != "ok"} == {}


def test_products_are_those_of_the_step(monkeypatch, capsys):
    """Two products of B L x H C x D multiply-adds for the scores, one for each gradient; and a line for each size."""
    dims = {"B": 2, "L": 9, "D": 8, "H": 2, "C": 5, "map": True}
    with FlopCounterMode(display=False) as counter:
        products.products(dims, torch.float32, "cpu")()
    assert counter.get_total_flops() == 4 * 2 * (2 * 9) * (2 * 5) * 8
    assert set(products.step(dims, torch.float32, "cpu")()) == {"out", "x", "weight"}
    monkeypatch.setattr(products, "SIZES", {"tiny": dims})
    assert products.main(["--size", "tiny", "--seconds-each", "0.01"]) == 0
    assert "tiny: csra_pool" in capsys.readouterr().out


def test_large_workloads_are_divided_and_say_so():
    case = CASES["group_fc"]
    dims, scale = plan.shrink(case, case.workloads["3-million"], plan.CPU_ELEMENTS, plan.CPU_FLOPS[False])
    assert dims["C"] * scale["C"] == 3_000_000
    assert dims["B"] * scale.get("B", 1) == 128
    assert plan.elements(case, dims) <= plan.CPU_ELEMENTS
    assert plan.total_flops(case, dims) <= plan.CPU_FLOPS[False]
    assert plan.shrink(case, case.workloads["small"], plan.CPU_ELEMENTS) == (dict(case.workloads["small"]), {})
    titles = [group.title() for group in plan.groups("cpu", False, None, None, None, None)]
    assert any("3-million fp32" in title and "C divided by" in title for title in titles)
    assert titles[0].startswith("group_fc openimages-64 fp32  B=64 G=100 E=768 C=9605")


def test_quantiles_and_interleaving():
    assert limits.quantiles([5.0]) == limits.Timing(5.0, 5.0, 5.0, 1)
    timing = limits.quantiles([float(i) for i in range(11)])
    assert (timing.p20_ms, timing.p50_ms, timing.p80_ms, timing.samples) == (2.0, 5.0, 8.0, 11)
    order = []
    work = torch.randn(8, 8)

    def call(name):
        order.append(name)
        return work @ work @ work

    found = limits.measure({"a": lambda: call("a"), "b": lambda: call("b")}, "cpu", 30.0, least=8, most=8)
    assert found["a"].samples == found["b"].samples == 8
    changes = sum(x != y for x, y in itertools.pairwise(order))
    assert changes >= 8


def test_losses_are_reported():
    def row(provider, kind, p50, auto=False):
        return {
            "title": "op w fp32  B=1",
            "provider": provider,
            "kind": kind,
            "auto": auto,
            "pass": "both",
            "p50_ms": p50,
        }

    rows = [
        row("mlhead: cpp", "mlhead", 2.0, True),
        row("torch: bmm", "baseline", 1.0),
        row("papers: x", "baseline", 9.0),
    ]
    text = report.verdicts(rows)
    assert "mlhead: cpp is 0.50x torch: bmm, 4.5x papers: x" in text
    assert "Where plain PyTorch wins:\n  op w fp32, both: torch: bmm by 2.00x" in text
    rows[0]["p50_ms"] = 0.5
    assert "Plain PyTorch wins nowhere." in report.verdicts(rows)


def test_results_can_be_drawn(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    run.main([*TINY, "--out", str(out)])
    assert plot.main([str(out), "--out", str(tmp_path / "pictures")]) == 0
    picture = tmp_path / "pictures" / "rows-group_fc.png"
    assert str(picture) in capsys.readouterr().out
    assert picture.stat().st_size > 10_000
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(SystemExit):
        plot.main([str(tmp_path / "empty.jsonl")])


def test_touch_checks_results(capsys, monkeypatch):
    assert touch.main(["--device", "cuda", "--list"]) == 0
    assert "group_fc triton float16" in capsys.readouterr().out
    # Where the library is not built this fails, and says so, rather than passing over it.
    monkeypatch.setattr(
        touch,
        "touched",
        lambda device: [(CASES["group_fc"], "triton", torch.float32, {"B": 2, "G": 3, "E": 5, "C": 7})],
    )
    monkeypatch.setattr(touch, "grade", lambda *_: verify.grade(torch.ones(1), torch.zeros(1), torch.zeros(1)))
    assert touch.main(["--device", "cpu"]) == 1
    assert "exceeds the budget" in capsys.readouterr().out


def test_gpu_check_can_be_rehearsed(tmp_path, capsys):
    assert gpu_check.main(["--dry-run", "--skip", "build", "--out", str(tmp_path), "--minutes", "4"]) == 0
    text = (tmp_path / "report.txt").read_text()
    assert text in capsys.readouterr().out
    for part in ("machine", "CUDA conformance tests", "calls for the sanitizers", "quick benchmarks", "benchmarks"):
        assert any(line.startswith(part) and " passed " in line for line in text.splitlines()), part
    assert "Fell short:\n  nothing" in text
    assert "tests collected" in (tmp_path / "pytest.log").read_text()
    logs = (tmp_path / "logs.txt").read_text().partition("==== benchmark\n")[2].partition("\n==== ")[0]
    quick, full = logs.split("== ")[1:]
    assert "group_fc_loss million bf16" in quick
    assert "group_fc 3-million" not in quick
    assert "group_fc 3-million fp16" in full
    assert len(list(tmp_path.iterdir())) <= 8


def test_gpu_check_runs_every_file_with_gpu_tests():
    root = machine.ROOT
    marked = {f"tests/{path.name}" for path in (root / "tests").glob("test_*.py") if "mark.gpu" in path.read_text()}
    marked -= {"tests/test_benchmarks.py"}  # which names the mark here
    assert set(gpu_check.GPU_TESTS) == marked | {"tests/test_ops.py"}  # whose marks are made in op_matrix.py


@pytest.mark.parametrize("background", [False, True])
def test_gpu_check_asks_before_it_kills(tmp_path, background):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if background else signal.getsignal(signal.SIGINT)
    program = "import time\ntry: time.sleep(99)\nexcept KeyboardInterrupt: print('3 failed')"
    part = gpu_check.Part("tests", [sys.executable, "-c", program], tmp_path / "a.log", time.monotonic() + 9.0, {})
    try:
        gpu_check.run_together([part])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (part.status, part.note) == ("ran out of time", "3 failed")


def test_the_commit_is_known_without_a_checkout(monkeypatch):
    monkeypatch.setattr(machine, "_output", lambda *_: None)
    find = machine.commit.__wrapped__
    assert find() == {"commit": "unknown", "dirty": None}
    monkeypatch.setenv("MLHEAD_COMMIT", "0123456789abcdef+dirty")
    assert find() == {"commit": "0123456789ab", "dirty": True}


def test_gpu_check_goes_on_past_a_failing_part(tmp_path, monkeypatch):
    soon = time.monotonic() + 60
    command = [sys.executable, "-c"]
    parts = [
        gpu_check.Part("breaks", [*command, "raise SystemExit('no compiler')"], tmp_path / "a.log", soon, {}),
        gpu_check.Part("hangs", [*command, "import time; time.sleep(99)"], tmp_path / "b.log", soon - 54, {}),
        gpu_check.Part("works", [*command, "print('2 passed')"], tmp_path / "c.log", soon, {}),
        gpu_check.Part("stops", [*command, "import time; time.sleep(99)"], tmp_path / "f.log", soon - 54, {}, True),
        gpu_check.Part("stoppable", [*command, "1 / 0"], tmp_path / "g.log", soon, {}, True),
        gpu_check.Part("is late", [*command, "print('no')"], tmp_path / "d.log", 0.0, {}),
        gpu_check.Part("is not there", ["/nowhere/tool"], tmp_path / "e.log", soon, {}),
    ]
    gpu_check.run_together(parts)
    found = {part.name: part.status for part in parts}
    assert found == {
        "breaks": "failed (1)",
        "hangs": "ran out of time",
        "works": "passed",
        "stops": "ran out of time",
        "stoppable": "failed (1)",
        "is late": "not reached",
        "is not there": "failed",
    }
    text = gpu_check.summary(parts, tmp_path)
    assert (
        "Fell short:\n  breaks: failed (1)\n  hangs: ran out of time\n  stoppable: failed (1)\n  is not there: failed"
        in text
    )
    assert "Not reached:\n  is late" in text
    assert "2 passed" in text
    log = "== quick\n\nNot reached:\n  group_fc a\n  group_fc b\n== full\n\nNot reached:\n  group_fc b\n  csra c\nend\n"
    (tmp_path / "benchmark.log").write_text(log)
    assert gpu_check.summary(parts, tmp_path).endswith("  is late: \n  group_fc a\n  group_fc b\n  csra c\n")


def test_gpu_check_needs_a_gpu(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "--dry-run" in capsys.readouterr().err


def test_rows_of_heads_beside_those_of_ops_are_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    records.append_rows(path, [{"head": "ml_decoder", "pass": "training"}, {"op": "group_fc"}, {"table": "Table 9"}])
    assert records.op_rows(path) == [{"op": "group_fc"}]
    assert len(records.read_rows(path)) == 3
