"""The cost model's arithmetic, its candidates, how it is held against rows, and what benchmarks.tune proposes."""

from __future__ import annotations

import ast
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mlhead.kernels._group_fc import Tile
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks import model, records, tune
from benchmarks.cost import candidates, devices, eager, launches, products, proposal, sites
from benchmarks.cost.devices import ASSUMED, DEVICES, Resources, Work, total
from benchmarks.cost.products import Problem
from mlhead.ops import _csra_plan
from mlhead.testing import CASES, offline

H100 = DEVICES["sm_90"]
ROOT = Path(model.__file__).resolve().parent.parent
SMALL = Resources(32, 0)


def work(**changes) -> Work:
    given = {
        "kernel": "k", "site": "", "programs": 132, "warps": 4, "resources": SMALL, "dram": 0.0, "cache": 0.0,
    }  # fmt: skip
    return Work(**{**given, **changes})


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "expected"),
    [
        (32, 0, 4, 16),  # by warps
        (32, 0, 1, 32),  # by programs
        (128, 0, 8, 2),  # 65536 / (256 * 128)
        (129, 0, 8, 1),  # in eights
        (32, 100_000, 4, 2),  # 233472 / 101024
        (256, 0, 4, 0),
        (32, 232_449, 4, 0),
    ],
)
def test_occupancy(registers, shared, warps, expected):
    assert devices.occupancy(Resources(registers, shared), warps, H100) == expected


def test_a_wave_by_hand():
    first = (ASSUMED.start_cycles + ASSUMED.latency_cycles) / H100.clock
    # One program on each multiprocessor, alone: nothing but latency, once waited for and once not hidden.
    assert devices.seconds(work(), H100).seconds == pytest.approx(ASSUMED.launch_s + 2 * first)
    # Bytes of all, by 16 programs to a multiprocessor: the waves share them.
    moved = work(programs=132 * 32, dram=1e9)
    found = devices.seconds(moved, H100)
    memory = 1e9 / (H100.bandwidth * ASSUMED.bandwidth_share)
    assert (found.bound, found.resident, found.waves) == ("memory", 16, 2)
    assert found.seconds == pytest.approx(ASSUMED.launch_s + memory + 2 * first / 16)
    # A product: the peak of one multiprocessor, twice for two programs on it.
    flops = 1e9
    peak = H100.tensor / H100.multiprocessors
    step = ASSUMED.step_cycles / H100.clock
    one = devices.wave(work(matrix=flops), 132, 1, H100)
    two = devices.wave(work(matrix=flops), 264, 2, H100)
    assert one == (pytest.approx(flops / peak + step + first), "matrices")
    assert two == (pytest.approx(2 * flops / peak + step / 2 + first / 2), "matrices")
    assert devices.seconds(work(resources=Resources(256, 0)), H100).seconds == math.inf


@pytest.mark.parametrize("field", ["dram", "cache", "matrix", "lanes", "accesses", "shared", "rounds", "programs"])
def test_more_work_never_takes_less(field):
    before = 0.0
    for amount in (1, 10, 1000, 10**5, 10**7):
        now = devices.seconds(work(**{"dram": 1e6, field: amount}), H100).seconds
        assert now >= before
        before = now
    assert before > devices.seconds(work(dram=1e6), H100).seconds


def test_group_fc_forward_by_hand():
    p = Problem({"B": 100, "G": 3, "E": 200, "C": 290}, 2, H100)
    found = products.group_fc_forward(p, Tile(64, 64, 32, 4, 3), vector=False)
    assert found.programs == 3 * 2 * 4  # groups, tiles of 100 images, tiles of 97 classes
    assert found.rounds == 4  # 200 features
    assert found.matrix == pytest.approx(4 * 2 * 64 * 64 * 32 / ASSUMED.triton_share)  # padded
    assert found.dram == 2 * (100 * 3 * 200 + 200 * 290 + 290 + 100 * 290)  # not padded
    assert found.cache == 2 * ((64 + 32) * 200 + 64 * 32)
    assert found.accesses == 4 * 96 * 64 + 64 * 32
    # 32 rows cannot have the instruction of sm_90.
    narrow = products.group_fc_forward(p, Tile(32, 64, 32, 4, 3), vector=False)
    assert narrow.matrix == pytest.approx(4 * 2 * 32 * 64 * 32 / ASSUMED.triton_share / ASSUMED.older_share)


def test_split_loops_count_their_parts():
    p = Problem({"B": 16, "G": 1, "E": 64, "C": 8192}, 2, H100)
    kernel, *rest = products.group_fc_dh(p, Tile(16, 64, 64, 4, 3), vector=True)
    assert kernel.programs == 32  # 128 steps, at least 4 in each of at most 32 parts
    assert kernel.rounds == 4
    assert [w.kernel for w in rest] == ["sum of parts", "round"]
    assert rest[0].dram == 4 * 33 * 16 * 64


def test_plain_torch_is_counted_op_by_op():
    """The product, then the passes over its (B, C) result: the slice is a view, the bias a kernel."""
    p = Problem({"B": 256, "G": 100, "E": 768, "C": 1000}, 2, H100)
    found = eager.eager("group_fc", "torch: bmm", p)
    assert [work.kernel for work in found["forward"]] == ["product", "clone", "add"]
    assert [work.kernel for work in found["both"]].count("product") == 3
    product, _, add = found["forward"]
    assert product.dram == 2 * 100 * (256 * 768 + 768 * 10 + 256 * 10)
    assert add.programs * add.cache == 2 * (2 * 256 * 1000 + 1000)
    assert add.dram == 0  # L2 has it still

    p = Problem({"B": 64, "L": 196, "D": 2048, "H": 6, "C": 80}, 2, H100)
    found = eager.eager("csra_pool", "papers: conv", p)
    assert [work.kernel for work in found["forward"]].count("product") == 6  # one for each head
    assert [work.kernel for work in found["both"]].count("product") == 18
    least = eager.least_with_a_map(p)
    assert [work.kernel for work in least["both"]].count("product") == 3
    for key in ("forward", "both"):
        assert total(least[key], H100) < total(eager.eager("csra_pool", "torch: matmul", p)[key], H100)


def test_what_is_beside_the_op_is_printed(capsys):
    assert model.main(["--eager", "--op", "csra_pool", "--workload", "coco"]) == 0
    assert "csra_pool coco both: mlhead" in capsys.readouterr().out
    assert model.main(["--eager", "--op", "csra_pool", "--dims", "B=2,L=9,D=8,H=2,C=5"]) == 0
    assert "csra_pool custom both: mlhead" in capsys.readouterr().out
    for arguments in (["--eager", "--op", "relu_dropout"], ["--dims", "B=2"]):
        with pytest.raises(SystemExit):
            model.main(arguments)


@pytest.mark.parametrize("heads", [1, 6])
@pytest.mark.parametrize("workload", CASES["csra_loss"].workloads)
def test_chunks_of_csra_loss_are_those_of_the_op(workload, heads):
    p = Problem({**CASES["csra_loss"].workloads[workload], "H": heads}, 2, H100)
    B, L, D, H, C = (p[letter] for letter in "BLDHC")
    with FakeTensorMode():
        x, weight = (torch.empty(shape, dtype=torch.bfloat16, device="cuda") for shape in ((B, L, D), (H, C, D)))
        plan = _csra_plan.chunk_plan(x, weight, _csra_plan.fits_the_scratch(x, weight))
    classes = max(1, plan.columns // H)
    expected = sorted(
        (min(plan.images, B - b), min(classes, C - c))
        for b in range(0, B, plan.images) for c in range(0, C, classes)
    )  # fmt: skip
    assert sorted((b, n) for b, n, times in launches.csra_loss_chunks(p) for _ in range(times)) == expected


def test_csra_loss_by_hand(monkeypatch):
    monkeypatch.setitem(_csra_plan.MACHINES, "cuda", _csra_plan.MACHINES["cuda"].for_pooling())

    def counts(works, *kernels):
        return [sum(w.times for w in works if w.kernel == kernel) for kernel in kernels]

    names = ("product", "csra_pool_scores_kernel", "csra_pool_scores_backward_kernel", "class_loss_gradient_kernel")
    names += ("class_loss_statistics_kernel",)
    dims = CASES["csra_loss"].workloads["openimages"]
    found = launches.passes("csra_loss", Problem(dims, 2, H100))  # five chunks
    assert counts(found["forward"], *names) == [5, 5, 0, 5, 0]
    assert counts(found["both"], *names) == [15, 5, 5, 5, 0]
    found = launches.passes("csra_loss", Problem({**dims, "loss": "softmax"}, 2, H100))
    assert counts(found["forward"], *names) == [5, 5, 0, 0, 5]
    assert counts(found["both"], *names) == [20, 10, 5, 5, 5]  # the scores are made twice
    one = {**CASES["csra_loss"].workloads["imagenet"], "C": 20}
    found = launches.passes("csra_loss", Problem(one, 2, H100))
    assert counts(found["both"], *names) == [3, 2, 1, 1, 1]  # but not where one chunk has them all
    # Two of six heads, for some classes at a time, are copied together, and their gradient is copied back.
    many = Problem({**dims, "H": 6}, 2, H100)
    (copy,) = [w for w in launches.passes("csra_loss", many)["forward"] if w.kernel == "copy of classifiers"]
    assert copy.dram == 2 * 2 * 6 * 9605 * 2048
    assert counts(launches.passes("csra_loss", many)["both"], "copy of classifiers") == [2]
    # Logits are fp32: four bytes read and four written of each.
    (kernel,) = [w for w in launches.passes("csra_loss", Problem(dims, 2, H100))["forward"] if w.site == "loss_tile"]
    assert kernel.programs * kernel.cache == pytest.approx(8 * 128 * 1921)


@pytest.mark.parametrize("target", DEVICES)
@pytest.mark.parametrize("op", sites.OPS)
def test_shipped_configurations_are_candidates(op, target):
    for dims in CASES[op].workloads.values():
        for element_bytes in (2, 4) if target == "sm_90" else (2,):
            p = Problem(dims, element_bytes, DEVICES[target])
            picker = sites.Picker()
            found = launches.passes(op, p, picker)
            assert picker.called
            for title, arguments in ((title, a) for title, called in picker.called.items() for a in called):
                site = sites.BY_TITLE[title]
                space = sites.space(site, arguments)
                shipped = site.function()(*arguments)
                assert shipped in space
                assert len(set(space)) == len(space) > 1
                assert shipped not in sites.neighbours(site, arguments)
            for name in found:
                assert 0 < devices.total(found[name], p.device) < 1
                assert all(sites.fits(found[name], sites.BY_TITLE[title], p.device) for title in picker.called)


def test_devices_are_those_that_are_compiled_for():
    for name, device in DEVICES.items():
        assert offline.TARGETS[name] == (device.capability, device.multiprocessors, device.program_bytes)


def test_a_replaced_configuration_reaches_the_pass():
    p = Problem(CASES["query_attention"].workloads["coco"], 2, H100)
    picker = sites.Picker()
    launches.passes("query_attention", p, picker)
    shipped = sites.BY_TITLE["query_attention_backward.backward_tile"].function()(
        *picker.called["query_attention_backward.backward_tile"][0]
    )
    assert "query_attention_keys_backward.keys_tile" not in picker.called
    small = replace(shipped, BLOCK_G=32)
    again = sites.Picker({"query_attention_backward.backward_tile": small})
    kernels = [w.kernel for w in launches.passes("query_attention", p, again)["backward"]]
    assert "query_attention_keys_backward_kernel" in kernels  # the queries do not fit one tile


def test_the_ranking_is_printed(capsys):
    assert model.main(["--op", "relu_dropout", "--workload", "coco", "--top", "2"]) == 0
    text = capsys.readouterr().out
    assert "relu_dropout.flat_tile coco forward: the shipped one is " in text
    assert text.count("shipped\n") == 2
    ranking = model.rankings("relu_dropout", "coco", Problem(CASES["relu_dropout"].workloads["coco"], 2, H100))[0]
    times = [ranked.seconds for ranked in ranking.configs]
    assert times == sorted(times)
    assert 0 <= ranking.gain < 1


def measured(op: str, workload: str, factor: float, **changes) -> dict:
    row = {
        "op": op, "workload": workload, "dims": dict(CASES[op].workloads[workload]), "dtype": "bf16", "pass": "forward",
        "provider": "mlhead: triton", "capability": "sm_90", "device": "NVIDIA H100 80GB HBM3", "multiprocessors": 132,
        "p50_ms": 1.0,
    }  # fmt: skip
    modelled = model.modelled_row(row)
    assert modelled is not None
    return {**row, "p50_ms": 1e3 * factor * modelled, **changes}


def test_against_rows(tmp_path, capsys):
    rows = [measured("group_fc", name, factor) for name, factor in (("coco", 2.0), ("openimages", 2.0), ("voc", 8.0))]
    others = [
        measured("group_fc", "coco", 1.0, provider="torch: bmm"),
        measured("group_fc", "coco", 1.0, capability="sm_75"),
        measured("group_fc", "coco", 1.0, p50_ms=None),
        {"kind": "memory"},
    ]
    path = tmp_path / "rows.jsonl"
    records.append_rows(path, rows + others)
    assert model.main(["--against", str(path)]) == 0
    text = capsys.readouterr().out
    assert "all: 3 rows" in text
    assert "measured / modelled median 2.00" in text
    assert "8.00  group_fc voc bf16 forward on NVIDIA H100" in text.split("The largest misses:")[1].splitlines()[1]
    records.append_rows(tmp_path / "none.jsonl", others)
    assert "nothing to hold it against" in model.against(records.read_rows(tmp_path / "none.jsonl"))


def test_rank_correlation():
    assert model.rank_correlation([1.0, 2.0, 5.0], [10.0, 20.0, 21.0]) == pytest.approx(1.0)
    assert model.rank_correlation([1.0, 2.0, 5.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    # Ties have the mean place: 1, 2.5, 2.5 against 1, 2, 3.
    assert model.rank_correlation([1.0, 2.0, 2.0], [1.0, 2.0, 3.0]) == pytest.approx(1.5 / math.sqrt(1.5 * 2.0))
    assert math.isnan(model.rank_correlation([1.0], [1.0]))


def tiny_trial() -> tuple[candidates.Trial, dict]:
    """A trial of the backward of a small relu_dropout, for the interpreter: the shipped one and two more."""
    dims = {"B": 2, "N": 3, "F": 1024, "dropout": 0.1}
    p = Problem(dims, 4, H100)
    trial = candidates.trials("relu_dropout", "tiny", p, "fp32", ["backward"], 1, 1)[0]
    assert trial.configs[0].shipped
    assert len(trial.configs) >= 2
    return trial, dims


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter, on the CPU")
def test_configurations_are_checked_and_timed(monkeypatch):
    trial, dims = tiny_trial()
    sample = CASES["relu_dropout"].make(dims, torch.float32, "cpu", 0)
    site = trial.ranking.site
    shipped, bad, real, judged = site.function(), trial.configs[-1].config, tune.differs, []

    def differs(found, expected):
        judged.append(found)  # the last one is made wrong
        return real([found[0] + 1.0] if len(judged) == len(trial.configs) else found, expected)

    monkeypatch.setattr(tune, "differs", differs)
    rows = tune.tune(trial, sample, "cpu", 0.001)
    assert site.function() is shipped
    assert [row["shipped"] for row in rows] == [True] + [False] * (len(rows) - 1)
    by_config = {row["written"]: row for row in rows}
    assert by_config[tune.written(bad)]["status"] == "wrong"
    assert by_config[tune.written(bad)]["p50_ms"] is None
    for row in rows[:-1]:
        assert row["status"] == "ok", row["message"]
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        assert (row["kind"], row["site"]) == ("tune", "relu_dropout.flat_tile")
        assert "op" not in row
        assert row["key"] == {"names": ["M", "element_bytes"], "values": [[3072, 4]]}
    json.dumps(rows)


def made_up(site: str, workload: str, key: dict, config, shipped: bool, times: tuple[float, float, float], **changes):
    p20, p50, p80 = times
    return {
        "kind": "tune", "site": site, "case": site.split(".")[0], "workload": workload, "pass": "forward",
        "dtype": "bf16", "status": "ok", "dims": {"B": 128}, "key": key, "config": vars(config),
        "written": tune.written(config), "shipped": shipped,
        "p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "device": "a made-up GPU", "commit": "0123456789ab",
        "dirty": False, "versions": {"torch": "2.11.0", "triton": "3.6.0"}, **changes,
    }  # fmt: skip


FACTS = {
    "names": ["B", "E", "J", "element_bytes", "vector", "device.capability"],
    "values": [[128, 768, 97, 2, False, 90]],
}
SHIPPED, FAST, FASTER = Tile(128, 64, 64, 8, 4), Tile(64, 64, 64, 4, 4), Tile(64, 64, 32, 4, 4)


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_diff_applies(tmp_path):
    title = "group_fc.forward_tile"
    rows = [
        made_up(title, "openimages", FACTS, SHIPPED, True, (0.100, 0.102, 0.104)),
        made_up(title, "openimages", FACTS, FAST, False, (0.090, 0.092, 0.094)),
        made_up(title, "openimages", FACTS, FASTER, False, (0.080, 0.082, 0.084)),
        made_up(title, "openimages", FACTS, Tile(16, 16, 16, 4, 4), False, (0.01, 0.01, 0.01), status="wrong"),
    ]
    relu = sites.BY_TITLE["relu_dropout.flat_tile"].function()
    flat = relu(4096, 2)
    key = {"names": ["M", "element_bytes"], "values": [[4096, 2], [8192, 2]]}
    rows += [
        made_up("relu_dropout.flat_tile", "voc", key, flat, True, (0.5, 0.6, 0.7)),
        made_up("relu_dropout.flat_tile", "voc", key, replace(flat, num_warps=8), False, (0.3, 0.35, 0.4)),
    ]
    found = proposal.proposals(rows)
    assert [(p.site.title, p.config) for p in found] == [
        (title, FASTER),
        ("relu_dropout.flat_tile", replace(flat, num_warps=8)),
    ]
    text = proposal.diff(found)
    assert "-" not in [line[:1] for line in text.splitlines() if not line.startswith("---")]  # only new lines
    assert "82.0 us (80.0 to 84.0) where Tile(128, 64, 64, 8, 4) took 102.0 us (100.0 to 104.0)" in " ".join(
        line.removeprefix("+    # ") for line in text.splitlines()
    )
    copy = tmp_path / "tree"
    shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "new.diff").write_text(text)
    subprocess.run(["git", "init", "-q"], cwd=copy, check=True)
    subprocess.run(["git", "apply", "--check", "new.diff"], cwd=copy, check=True)
    subprocess.run(["git", "apply", "new.diff"], cwd=copy, check=True)
    source = (copy / "kernels" / "group_fc.py").read_text()
    assert max(map(len, source.splitlines())) <= 120
    assert "if (M, element_bytes) in (" in (copy / "kernels" / "relu_dropout.py").read_text()
    ast.parse((copy / "kernels" / "relu_dropout.py").read_text())
    # What is applied answers with the new row, and elsewhere as before.
    function = next(n for n in ast.parse(source).body if getattr(n, "name", "") == "forward_tile")
    names = dict(vars(sites.BY_TITLE[title].kernel_module()))
    exec(compile(ast.Module([function], []), "kernels", "exec"), names)
    device = sites.kernel_device(H100)
    assert names["forward_tile"](128, 768, 97, 2, False, device) == FASTER
    assert names["forward_tile"](64, 768, 97, 2, False, device) == sites.BY_TITLE[title].function()(
        64, 768, 97, 2, False, device
    )
    assert not (ROOT / "kernels" / "new.diff").exists()


def test_noise_and_losses_elsewhere_propose_nothing():
    title = "group_fc.forward_tile"
    shipped = made_up(title, "openimages", FACTS, SHIPPED, True, (0.100, 0.102, 0.104))
    within = made_up(title, "openimages", FACTS, FAST, False, (0.096, 0.098, 0.101))
    assert proposal.proposals([shipped, within]) == []
    clear = made_up(title, "openimages", FACTS, FAST, False, (0.080, 0.082, 0.084))
    assert len(proposal.proposals([shipped, clear])) == 1
    # The same key in another pass, where it is slower, or where it was not measured.
    other = made_up(title, "openimages", FACTS, SHIPPED, True, (0.1, 0.1, 0.1), **{"pass": "both"})
    worse = made_up(title, "openimages", FACTS, FAST, False, (0.2, 0.2, 0.2), **{"pass": "both"})
    assert proposal.proposals([shipped, clear, other, worse]) == []
    assert proposal.proposals([shipped, clear, other]) == []
    # Or in another op that launches by the function: a workload of the same name is another place.
    elsewhere = [{**row, "case": "another op", "pass": "forward"} for row in (other, worse)]
    assert proposal.proposals([*elsewhere, shipped, clear]) == []


@pytest.mark.parametrize(
    ("op", "key", "sites_and_kernels"),
    [
        ("relu_dropout", "backward", {"relu_dropout.flat_tile": ["relu_dropout_backward_kernel"]}),
        (
            "csra_loss", "both",
            {"csra_pool.pool_tile": ["csra_pool_scores_kernel", "csra_pool_scores_backward_kernel"],
             "_class_loss.loss_tile": ["class_loss_gradient_kernel"]},
        ),
    ],
)  # fmt: skip
def test_a_dry_run_compiles(op, key, sites_and_kernels):
    # The interpreter replaces the kernels when they are defined, so compilation needs a process of its own.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    arguments = f"--op {op} --workload small --pass {key} --best 0 --neighbours 1 --dry-run --target sm_80"
    command = [sys.executable, "-m", "benchmarks.tune", *arguments.split()]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    blocks = result.stdout.strip().split("\n\n")
    for block, (site, kernels) in zip(blocks, sites_and_kernels.items(), strict=True):
        lines = block.splitlines()
        assert lines[0].startswith(f"{site} small bf16 {key}")
        assert lines[1].endswith("shipped")
        for kernel in kernels:
            assert f"{kernel}: " in lines[1]
        assert lines[1].count("0 B stack, 0 spills") == len(kernels)
        assert "2 of 2 candidates are left for sm_80" in block


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        tune.main(["--op", "relu_dropout"])  # in the interpreter
    monkeypatch.delenv("TRITON_INTERPRET")
    assert tune.main(["--op", "relu_dropout"]) == 2
    assert "no CUDA device" in capsys.readouterr().err
