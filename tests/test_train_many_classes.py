"""Training for very many classes: the loss in the head, updates inside backward, the best classes alone."""

from __future__ import annotations

import io

import pytest
import torch
from states import assert_same
from training_runs import HEADS, SMOOTH, config, run

from mlhead import building, train
from mlhead._runlog import read_log
from mlhead._usage import UsageError
from mlhead.checkpoints import load_checkpoint
from mlhead.inference import evaluate_checkpoint

for package in ("timm", "yaml", "PIL"):
    pytest.importorskip(package)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("loss", ["bce", "asl", "softmax"])
@pytest.mark.parametrize("head", HEADS)
def test_the_loss_in_the_head_trains_the_same_weights(tmp_path, head, loss):
    """Six steps of SGD in fp32 from one seed, with dense targets and with sparse ones."""
    rate = 0.01 if loss == "softmax" else 0.1  # its sum over the labels of an image makes for larger gradients
    options = {
        **SMOOTH,
        **HEADS[head],
        "loss": loss,
        "steps": 6,
        "optimizer": "sgd",
        "lr": rate,
        "accumulate": 2,
        "log_every": 1,
    }
    run(tmp_path / "dense", **options)
    run(tmp_path / "fused", **options, fused_loss=True)
    before = building.build_model(config("unused", **options), 100, 1).state_dict()
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("dense", "fused"))
    assert a["model"].keys() == b["model"].keys()
    moved = 0.0
    for name, weight in a["model"].items():
        # The sums of a step are rounded in another order; no weight is off by more than 1e-5 of the largest beside it.
        torch.testing.assert_close(b["model"][name], weight, rtol=1e-5, atol=1e-5 * weight.abs().max().item() + 1e-7)
        moved = max(moved, (weight.float() - before[name].float()).abs().max().item())
    assert moved > 0.01
    losses = [
        [r["loss"] for r in read_log(tmp_path / n / "log.jsonl") if r["kind"] == "train"] for n in ("dense", "fused")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert b["metrics"]["mAP"] == pytest.approx(a["metrics"]["mAP"], abs=1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_the_sum_as_the_loss_trains_as_the_mean_at_a_larger_rate(tmp_path, fused):
    options = {
        **SMOOTH,
        "head": "gap",
        "num_classes": 10,
        "steps": 4,
        "weight_decay": 0.0,
        "optimizer": "sgd",
        "accumulate": 2,
        "log_every": 1,
    }
    options["fused_loss"] = fused
    terms = 2 * config("unused", **options).batch_size * 10  # of a step: images times classes
    run(tmp_path / "mean", **options, lr=0.1)
    run(tmp_path / "sum", **options, lr=0.1 / terms, loss_opt={"reduction": "sum"})
    mean, summed = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("mean", "sum"))
    for name, weight in mean.items():
        torch.testing.assert_close(summed[name], weight, rtol=1e-5, atol=1e-5 * weight.abs().max().item() + 1e-7)
    means, sums = (
        [r["loss"] for r in read_log(tmp_path / n / "log.jsonl") if r["kind"] == "train"] for n in ("mean", "sum")
    )
    assert sums == pytest.approx([terms * loss for loss in means], rel=1e-4)


def test_the_loss_in_the_head_resumes_and_takes_other_options(tmp_path):
    options = {"head": "csra", "fused_loss": True, "amp": "bf16", "ema": 0.9, "steps": 8, "eval_every": 8}
    run(tmp_path / "whole", **options)
    trainer = train.Trainer(config(tmp_path / "part", checkpoint_every=5, **options), stream=io.StringIO())
    trainer.total_steps = 5
    trainer.fit()
    train.resume(tmp_path / "part", {"workers": 1}, stream=io.StringIO())
    a, b = load_checkpoint(tmp_path / "whole/last.pt"), load_checkpoint(tmp_path / "part/last.pt")
    assert_same(a["model"], b["model"])
    assert_same(a["ema"], b["ema"])


@pytest.mark.parametrize("head", ["gap", "ml_decoder"])
@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adamw"])
@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_an_update_inside_backward_trains_the_same_weights(tmp_path, head, optimizer, schedule):
    """Four steps with a schedule, weight decay and a rate of the head's own; the checkpoints go on with each other."""
    options = {**SMOOTH, **HEADS[head], "fused_loss": True, "steps": 4, "optimizer": optimizer, "log_every": 1}
    # An eps at which the sign of a gradient that is only rounding makes no step.
    options |= {"schedule": schedule, "head_lr_mult": 2.0, "weight_decay": 0.1}
    options |= {"lr": 0.01, "optimizer_opt": {"eps": 1e-3}} if optimizer == "adamw" else {"lr": 0.1}
    run(tmp_path / "separate", **options)
    run(tmp_path / "inside", **options, fused_update=True)
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("separate", "inside"))
    for name, weight in a["model"].items():
        torch.testing.assert_close(b["model"][name], weight, rtol=1e-5, atol=1e-5 * weight.abs().max().item() + 1e-7)
    rates = [
        [(r["lr"], r["lr_head"]) for r in read_log(tmp_path / n / "log.jsonl") if r["kind"] == "train"]
        for n in ("separate", "inside")
    ]
    assert rates[0] == rates[1]
    assert rates[0][0][1] == pytest.approx(2 * rates[0][0][0])


def test_an_update_inside_backward_resumes(tmp_path):
    options = {**HEADS["ml_decoder"], "fused_loss": True, "fused_update": True, "amp": "bf16", "ema": 0.9}
    options |= {"steps": 6, "eval_every": 6}
    run(tmp_path / "whole", **options)
    trainer = train.Trainer(config(tmp_path / "part", checkpoint_every=4, **options), stream=io.StringIO())
    trainer.total_steps = 4
    assert trainer.model.head.class_parameter.grad is None
    trainer.fit()
    train.resume(tmp_path / "part", stream=io.StringIO())
    a, b = load_checkpoint(tmp_path / "whole/last.pt"), load_checkpoint(tmp_path / "part/last.pt")
    for part in ("model", "ema", "optimizer", "update", "schedule"):
        assert_same(a[part], b[part])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fused_loss": False}, "--fused-loss must be on with --fused-update, got False"),
        ({"head": "csra"}, "--head must be gap or a decoder, no zero-shot one, with --fused-update, got csra"),
        ({"optimizer": "lamb"}, "--optimizer must be one of adamw, sgd, momentum with --fused-update, got lamb"),
        ({"clip_grad": 1.0}, "--clip-grad must be absent with --fused-update, got 1.0"),
        ({"accumulate": 2}, "--accumulate must be 1 with --fused-update, got 2"),
        ({"amp": "fp16"}, "--amp must be none or bf16 with --fused-update, got fp16"),
        ({"class_parallel": 2}, "--class-parallel must be 0 with --fused-update, got 2"),
    ],
)
def test_what_an_update_inside_backward_cannot(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        config(tmp_path, **{"head": "gap", "fused_loss": True, "fused_update": True, **options})


def test_options_of_an_update_inside_backward(tmp_path):
    wrong = config(tmp_path, head="gap", fused_loss=True, fused_update=True, optimizer_opt={"betas": (0.9, 2.0)})
    model = building.build_model(wrong, 10, 1)
    with pytest.raises(UsageError, match="--optimizer adamw with --fused-update: ClassAdamW: betas must be"):
        building.build_update(wrong, model)


def test_the_best_classes_are_measured_without_logits(tmp_path):
    """--metrics topk: P@k and nDCG@k decide and are logged; evaluation measures the same, or all."""
    options = {"head": "gap", "num_classes": 10, "image_size": 24, "steps": 3, "eval_every": 3, "metrics": "topk"}
    summary = run(tmp_path, **options)
    names = [f"{name}@{k}" for name in ("P", "nDCG") for k in (1, 3, 5)]
    assert list(summary.metrics) == [*names, "step"]
    (record,) = (r for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "val")
    assert [record[name] for name in names] == [summary.metrics[name] for name in names]
    said = {"device": "cpu", "stream": io.StringIO()}
    found = evaluate_checkpoint(tmp_path / "best.pt", split="val", **said)
    assert found == {name: summary.metrics[name] for name in names}
    assert found["P@1"] == found["nDCG@1"] > 0
    assert "mAP" in evaluate_checkpoint(tmp_path / "best.pt", split="val", changes={"metrics": "all"}, **said)
    with pytest.raises(UsageError, match="--metrics must be 'all' for --task zero-shot, got 'topk'"):
        config(tmp_path, task="zero-shot", metrics="topk")
