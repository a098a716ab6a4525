"""The benchmarks of host overhead and of whole models: they verify before they time, and their rows are complete."""

from __future__ import annotations

import argparse
import itertools
import sys

import pytest
import torch
from torch import nn

from benchmarks import baselines, end_to_end, machine, overhead, overhead_heads, papers_heads, plain_backbones, records
from mlhead.testing import CASES


class TinyBackbone(nn.Module):
    """Maps (B, 8, 4, 4) of images of any size."""

    num_features = 8

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)

    def forward_features(self, x):
        return nn.functional.adaptive_avg_pool2d(self.conv(x), 4)


@pytest.fixture
def _tiny(monkeypatch):
    monkeypatch.setattr(end_to_end, "backbone", lambda name, image_size: (TinyBackbone(), "a test"))


def small(out, *more):
    return ["--device", "cpu", "--rounds", "2", "--compile", "none", "--out", str(out), *more]


def whole(out, *more):
    return ["--device", "cpu", "--backbone", "tiny", "--image-size", "8", "--batch", "2", "--classes", "5",
            "--seconds-each", "0.001", "--out", str(out), *more]  # fmt: skip


def assert_says_where(row):
    for key in ("device", "commit", "dirty", "threads", "time"):
        assert key in row
    assert row["versions"]["torch"] == torch.__version__
    assert row["run"] == machine.RUN


def test_rows_of_overhead_are_complete(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert overhead.main(small(out, "--subject", "group_fc", "--subject", "gap")) == 0
    rows = records.read_rows(out)
    assert {(r["subject"], r["subject_is"], r["pass"], r["provider"]) for r in rows} == {
        (*subject, key, provider)
        for subject, plain in ((("group_fc", "op"), "torch: bmm"), (("gap", "head"), "torch: rewritten"))
        for key in ("forward", "both")
        for provider in ("mlhead: auto", plain)
    }
    for row in rows:
        assert_says_where(row)
        assert row["kind"] == "overhead"
        assert row["includes_work"]
        assert (row["status"], row["mode"], row["samples"]) == ("ok", "eager", 2)
        for clock in ("wall", "host", "thread"):
            t = row[f"{clock}_us"]
            assert 0 < t["p20"] <= t["p50"] <= t["p80"]
        assert all(e["error"] <= e["budget"] for e in row["errors"].values())
    # `make bench` and the GPU check read the rows of ops only.
    assert records.op_rows(out) == []
    text = capsys.readouterr().out
    assert "thread us" in text
    assert "On a CPU a call's work is in its time." in text


def test_every_op_and_every_head_is_there(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(overhead, "run_subject", lambda name, *rest: asked.append((name, *rest)) or [])
    assert overhead.main(["--device", "cpu", "--quick", "--out", str(tmp_path / "rows.jsonl")]) == 0
    heads = ("gap", "csra", "ml_decoder", "zero_shot_ml_decoder", "transformer_decoder")
    assert asked == [(name, "cpu", "fp32", (), 7) for name in (*CASES, *heads)]
    asked.clear()
    assert overhead.main(["--device", "cpu", "--minutes", "1e-9", "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert asked == []


def test_what_is_wrong_or_refused_is_a_row(tmp_path, monkeypatch, capsys):
    def wrong(h, weight, bias, *, num_classes):
        return baselines.group_fc_bmm(h, weight, bias, num_classes=num_classes) * 1.01

    def refuses(**arguments):
        raise RuntimeError("no such shape\nmore words")

    for call, status in ((wrong, "wrong"), (refuses, "failed")):
        monkeypatch.setitem(baselines.BASELINES, "group_fc", {"torch: bmm": call})
        out = tmp_path / f"{status}.jsonl"
        assert overhead.main(small(out, "--subject", "group_fc")) == 0
        found = {(row["provider"], row["status"], row["wall_us"] is None) for row in records.read_rows(out)}
        assert found == {("mlhead: auto", "ok", False), ("torch: bmm", status, True)}
    assert (
        "torch: bmm                                    failed: RuntimeError: no such shape" in capsys.readouterr().out
    )


def test_a_wrong_head_of_ours_fails_the_run(tmp_path, monkeypatch):
    def planted(device, dtype):
        ours, plain = overhead_heads.HEADS["gap"](device, dtype)
        ours.register_forward_hook(lambda module, inputs, out: out * 1.01)
        return ours, plain

    monkeypatch.setattr(overhead, "HEADS", {"gap": planted})
    out = tmp_path / "rows.jsonl"
    assert overhead.main(small(out, "--subject", "gap")) == 1
    assert {(r["provider"], r["status"]) for r in records.read_rows(out)} == {
        ("mlhead: auto", "wrong"),
        ("torch: rewritten", "ok"),
    }


def test_what_breaks_altogether_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(overhead, "HEADS", {"gap": lambda device, dtype: 1 / 0})
    assert overhead.main(small(tmp_path / "rows.jsonl", "--subject", "gap")) == 1
    assert "Not reached:\n  gap fp32: failed: ZeroDivisionError" in capsys.readouterr().out


def test_compiled_providers_have_rows_of_their_own(tmp_path, monkeypatch):
    asked = []

    def pretend(function, **options):
        asked.append(options)
        return function

    monkeypatch.setattr(torch, "compile", pretend)
    out = tmp_path / "rows.jsonl"
    modes = ["--compile", "default", "--compile", "reduce-overhead"]
    assert overhead.main([*small(out)[:4], *modes, "--out", str(out), "--subject", "group_fc"]) == 0
    rows = records.read_rows(out)
    assert {row["mode"] for row in rows} == {"eager", "compiled", "compiled reduce-overhead"}
    assert len(rows) == 2 * 2 * 3
    assert [options["mode"] for options in asked] == [None, "reduce-overhead"] * 2


def test_functions_are_timed_in_turns():
    order = []
    found = overhead.measure({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, "cpu", 5)
    assert found["a"]["samples"] == 5
    assert found["a"]["calls"] == 100  # short ones are called often
    timed = order[12:]  # after the warm-up
    changes = sum(x != y for x, y in itertools.pairwise(timed))
    assert 5 <= changes < 10


@pytest.mark.parametrize("name", list(overhead_heads.HEADS))
def test_plain_heads_are_those_of_mlhead(name):
    ours, plain = overhead_heads.HEADS[name]("cpu", torch.float64)
    x = torch.randn(2, overhead_heads.D, 7, 7, dtype=torch.float64, requires_grad=True)
    parameters = [x, *(p for p in ours.parameters() if p.requires_grad)]
    dlogits = torch.randn(2, overhead_heads.C, dtype=torch.float64)
    results = []
    for module in (ours, plain):
        logits = module.eval()(x)
        results.append([logits.detach(), *torch.autograd.grad(logits, parameters, dlogits)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", list(papers_heads.HEADS))
@pytest.mark.parametrize(("width", "num_classes"), [(16, 80), (1040, 13), (16, 1003)])
def test_papers_heads_are_those_of_mlhead(name, width, num_classes):
    ours, papers = papers_heads.HEADS[name](width, num_classes)
    ours, papers = ours.double().eval(), papers.double().eval()
    if name == "csra":
        assert ours.num_heads == {(16, 80): 8, (1040, 13): 6, (16, 1003): 1}[width, num_classes]
    for shape in ((2, width, 3, 4), (2, 12, width)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(papers(x), ours(x), rtol=1e-9, atol=1e-11)


@pytest.mark.usefixtures("_tiny")
def test_rows_of_whole_models_are_complete(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert end_to_end.main(whole(out)) == 0
    rows = records.read_rows(out)
    heads = ("gap", "csra", "ml_decoder")
    expected = {(None, "backbone alone", key) for key in ("training", "inference")}
    expected |= {(h, v, key) for h in heads for v in ("before", "after") for key in ("training", "inference")}
    expected |= {(h, "after, loss in the head", "training") for h in heads}
    assert {(r["head_name"], r["variant"], r["pass"]) for r in rows} == expected
    assert len(rows) == len(expected)
    for row in rows:
        assert_says_where(row)
        assert (row["kind"], row["status"], row["message"]) == ("end_to_end", "ok", "")
        assert (row["backbone"], row["backbone_from"]) == ("tiny", "a test")
        assert row["reduced"] == {"image_size": "8 in place of 224"}
        assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"]
        if row["head_name"] is None:
            assert row["share"] is None
            continue
        assert row["share"] == pytest.approx(1 - row["backbone_ms"] / row["p50_ms"])
        assert row["head_ms"] == pytest.approx(row["p50_ms"] - row["backbone_ms"])
        assert row["resolved"] in (True, False)
        assert set(row["errors"]) == {"loss", "dx"}
        assert f"num_classes={row['classes']}" in row["head_options"]
    assert records.op_rows(out) == []
    assert "after, loss in the head" in capsys.readouterr().out


@pytest.mark.usefixtures("_tiny")
def test_wrong_and_failing_heads_are_rows(tmp_path, monkeypatch):
    def planted(in_features, num_classes):
        ours, papers = papers_heads.HEADS["gap"](in_features, num_classes)
        papers.register_forward_hook(lambda module, inputs, out: out * 1.01)
        return ours, papers

    def refuses(in_features, num_classes):
        ours, papers = papers_heads.HEADS["gap"](in_features, num_classes)

        def fail(module, inputs, keywords):
            if len(inputs) > 1:
                raise RuntimeError("no loss today")

        ours.register_forward_pre_hook(fail, with_kwargs=True)
        return ours, papers

    monkeypatch.setattr(end_to_end, "HEADS", {"gap": planted, "csra": refuses})
    out = tmp_path / "rows.jsonl"
    assert end_to_end.main(whole(out, "--head", "gap", "csra")) == 1
    training = {(r["head_name"], r["variant"]): r for r in records.read_rows(out) if r["pass"] == "training"}
    statuses = {which: row["status"] for which, row in training.items()}
    assert statuses == {
        (None, "backbone alone"): "ok",
        ("gap", "before"): "ok",
        ("gap", "after"): "wrong",
        ("gap", "after, loss in the head"): "wrong",
        ("csra", "before"): "ok",
        ("csra", "after"): "ok",
        ("csra", "after, loss in the head"): "failed",
    }
    assert all((row["p50_ms"] is None) == (row["status"] != "ok") for row in training.values())
    assert "no loss today" in training["csra", "after, loss in the head"]["message"]


def test_a_backbone_that_fails_is_rows(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)  # as where it is not installed
    out = tmp_path / "rows.jsonl"
    assert end_to_end.main(whole(out, "--backbone", "tresnet_m", "--head", "gap")) == 1
    rows = records.read_rows(out)
    assert len(rows) == 2 + 3 + 2
    assert {row["status"] for row in rows} == {"failed"}
    assert {row["message"] for row in rows} == {"RuntimeError: tresnet_m needs timm, which cannot be imported here"}
    assert "tresnet_m needs timm" in capsys.readouterr().out


@pytest.mark.usefixtures("_tiny")
def test_a_timed_step_that_fails_is_rows(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise torch.OutOfMemoryError("too much\nand more")

    monkeypatch.setattr(end_to_end.limits, "measure", fail)
    out = tmp_path / "rows.jsonl"
    assert end_to_end.main(whole(out, "--head", "gap")) == 1
    assert {(r["status"], r["message"]) for r in records.read_rows(out)} == {("out of memory", "too much")}


@pytest.mark.usefixtures("_tiny")
def test_a_training_step_trains_backbone_and_head():
    options = argparse.Namespace(image_size=8, batch=2, dtype="bf16")
    setup = end_to_end.make("tiny", ["gap", "csra"], 5, "cpu", options)
    end_to_end.check(setup)
    steps = end_to_end.functions(setup, "training")
    assert {verdict.status for verdict in setup.verdicts.values()} == {"ok"}
    conv, weight = setup.body.backbone.conv.weight, setup.models["gap", "after"].head.fc.weight
    other = setup.models["csra", "after"].head.weight
    for key, step in steps.items():
        before = [p.detach().clone() for p in (conv, weight, other)]
        step()
        moved = [not torch.equal(p, q) for p, q in zip((conv, weight, other), before, strict=True)]
        assert moved == [True, key[0] == "gap", key[0] == "csra"], key


def test_plain_backbones_are_those_of_timm():
    timm = pytest.importorskip("timm", reason="needs timm to compare with")
    with torch.device("meta"):
        for name, plain in (
            ("resnet50", plain_backbones.ResNet50()),
            ("vit_base_patch16_224", plain_backbones.ViTBase()),
        ):
            shapes = [
                {k: t.shape for k, t in m.state_dict().items()} for m in (timm.create_model(name, num_classes=0), plain)
            ]
            assert shapes[0] == shapes[1]
        models = (plain_backbones.ResNet50(), plain_backbones.ViTBase(32, depth=2))
    vit = timm.create_model("vit_base_patch16_224", num_classes=0, img_size=32, depth=2)
    for theirs, plain in zip((timm.create_model("resnet50", num_classes=0), vit), models, strict=True):
        plain.load_state_dict(theirs.state_dict(), assign=True)
        x = torch.randn(1, 3, 32, 32)
        with torch.no_grad():
            expected, found = theirs.eval().forward_features(x), plain.eval().forward_features(x)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_backbones_without_timm(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with torch.device("meta"):
        found = {name: end_to_end.backbone(name, 96) for name in ("resnet50", "vit_base_patch16_224")}
    assert {source for _, source in found.values()} == {"plain torch"}
    assert found["vit_base_patch16_224"][0].pos_embed.shape == (1, 37, 768)


@pytest.mark.gpu
def test_on_a_gpu_graphs_have_rows(tmp_path):
    out = tmp_path / "rows.jsonl"
    options = ["--device", "cuda", "--quick", "--rounds", "2", "--out", str(out)]
    assert overhead.main([*options, "--subject", "group_fc", "--subject", "ml_decoder"]) == 0
    rows = records.read_rows(out)
    assert {(row["mode"], row["status"]) for row in rows} == {("eager", "ok"), ("CUDA graph", "ok")}
    assert not any(row["includes_work"] for row in rows)
