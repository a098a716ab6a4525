"""The training loop: it learns, it resumes exactly after kill -9, and it says what is wrong in one line."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from states import assert_same
from training_runs import SMALL_DECODER, config, run

from mlhead import _trainer, building, train
from mlhead._config import TrainConfig, load_config, parse_pairs
from mlhead._progress import Progress, duration
from mlhead._runlog import RunLog, read_log
from mlhead._usage import UsageError
from mlhead.checkpoints import CheckpointError, load_checkpoint
from mlhead.data.scenes import Scenes
from mlhead.inference import evaluate_checkpoint, load_model, predict_files

for package in ("timm", "torchmetrics", "sklearn", "yaml", "PIL"):
    pytest.importorskip(package)

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).resolve().parent.parent

# Resuming

EXACT = {
    "head": "ml_decoder",
    "head_opt": SMALL_DECODER,
    "steps": 40,
    "accumulate": 2,
    "ema": 0.99,
    "clip_grad": 1.0,
    "checkpoint_every": 7,
    "eval_every": 25,
    "head_lr_mult": 3.0,
    "train_length": 500,  # the run crosses the end of an epoch
}


def test_resume_after_kill_9_is_exact(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, **EXACT)

    config_file = tmp_path / "options.yaml"
    config(broken, **EXACT).save(config_file)
    command = [sys.executable, "-m", "mlhead", "train", "--config", str(config_file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 120
        while not any(record["step"] >= 20 for record in read_log(broken / "log.jsonl")):
            assert process.poll() is None, process.stderr.read().decode()
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
    assert process.returncode == -signal.SIGKILL
    assert 14 <= load_checkpoint(broken / "last.pt")["step"] < 40

    train.resume(broken, stream=io.StringIO())
    a, b = load_checkpoint(whole / "last.pt"), load_checkpoint(broken / "last.pt")
    for part in ("model", "ema", "optimizer", "schedule", "scaler", "random", "step", "loss_sum", "best", "metrics"):
        assert_same(a[part], b[part], part)
    assert_same(load_checkpoint(whole / "best.pt")["model"], load_checkpoint(broken / "best.pt")["model"])

    def history(folder):
        drop = ("time_s", "images_per_s", "data_wait")
        return [{k: v for k, v in record.items() if k not in drop} for record in read_log(folder / "log.jsonl")]

    assert history(whole) == history(broken)
    assert [r["step"] for r in history(whole) if r["kind"] == "train"] == list(range(5, 41, 5))
    table = list(csv.DictReader((broken / "log.csv").read_text().splitlines()))
    assert [float(r["loss"]) for r in table if r["loss"]] == [r["loss"] for r in history(whole) if r["kind"] == "train"]


@pytest.mark.parametrize("options", [{"schedule": "cosine", "warmup": 0.2}, {"amp": "bf16"}, {"amp": "fp16"}])
def test_resume_from_the_middle_is_exact(tmp_path, options):
    options = {"head": "csra", "steps": 8, "eval_every": 8, "checkpoint_every": 5, **options}
    run(tmp_path / "whole", **options)

    trainer = train.Trainer(config(tmp_path / "part", **options), stream=io.StringIO())
    trainer.total_steps = 5  # ends early, with a checkpoint that a longer run would have written there
    trainer.fit()
    train.resume(tmp_path / "part", stream=io.StringIO())
    a, b = load_checkpoint(tmp_path / "whole/last.pt"), load_checkpoint(tmp_path / "part/last.pt")
    for part in ("model", "optimizer", "schedule", "scaler"):
        assert_same(a[part], b[part], part)


def test_a_process_that_torchrun_restarts_goes_on_by_itself(tmp_path, monkeypatch):
    options = {"head": "csra", "steps": 8, "eval_every": 8, "checkpoint_every": 5}
    run(tmp_path / "whole", **options)
    trainer = train.Trainer(config(tmp_path / "part", **options), stream=io.StringIO())
    trainer.total_steps = 5
    trainer.fit()
    with pytest.raises(UsageError, match="--out must be a folder without a run"):
        run(tmp_path / "part", **options)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    with pytest.raises(UsageError, match="--out must be a folder without a run"):
        run(tmp_path / "part", **options, lr=0.5)
    assert run(tmp_path / "part", **options, log_every=2).steps == 8
    a, b = (load_checkpoint(tmp_path / name / "last.pt") for name in ("whole", "part"))
    assert_same(a["model"], b["model"])
    run(tmp_path / "new", **options)  # nothing was saved before the failure
    assert_same(a["model"], load_checkpoint(tmp_path / "new/last.pt")["model"])


def test_resume_refuses_changes_and_damaged_files(tmp_path):
    run(tmp_path, steps=2, head="gap")
    with pytest.raises(UsageError, match="--lr must be left as it is on --resume"):
        train.resume(tmp_path, {"lr": 0.1})
    path = tmp_path / "last.pt"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged.*try .*best\.pt instead"):
        train.resume(tmp_path)
    with pytest.raises(CheckpointError, match="must be an existing file"):
        train.resume(tmp_path / "nothing")


# Learning


def test_loss_falls_and_files_are_written(tmp_path):
    summary = run(tmp_path, head="gap", num_classes=10, image_size=20, steps=80, batch_size=32, lr=4e-3, eval_every=40)
    records = read_log(tmp_path / "log.jsonl")
    losses = [r["loss"] for r in records if r["kind"] == "train"]
    assert losses[-1] < 0.85 * losses[0]
    assert summary.metrics["mAP"] > 0.45  # chance is about 0.23
    assert [r["step"] for r in records if r["kind"] == "val"] == [40, 80]
    assert load_checkpoint(tmp_path / "best.pt")["metrics"]["mAP"] == summary.best["mAP"]
    assert load_config(tmp_path / "config.yaml")["num_classes"] == 10
    assert len((tmp_path / "log.csv").read_text().splitlines()) == len(records) + 1
    metrics = evaluate_checkpoint(tmp_path / "last.pt", split="val", stream=io.StringIO())
    assert metrics["mAP"] == pytest.approx(summary.metrics["mAP"], abs=1e-6)
    assert evaluate_checkpoint(tmp_path / "best.pt", stream=io.StringIO())["mAP"] != metrics["mAP"]


def test_accumulated_batches_give_the_gradient_of_one_large_batch(tmp_path):
    options = {
        "head": "gap",
        "steps": 1,
        "optimizer": "sgd",
        "lr": 0.1,
        "weight_decay": 0.0,
        "eval_every": 1,
        "seed": 3,
    }
    options |= {"train_length": 16, "backbone": "test_vit", "image_size": 160, "channels_last": False}
    run(tmp_path / "one", batch_size=16, **options)
    run(tmp_path / "four", batch_size=4, accumulate=4, **options)
    a, b = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("one", "four"))
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


def test_groups_have_their_rates_and_decay():
    options = config("unused", head="csra", head_lr_mult=10.0, lr=1e-3, weight_decay=0.1)
    model = building.build_model(options, 100, 1)
    optimizer = building.build_optimizer(options, model)
    named = {id(p): name for name, p in model.named_parameters()}
    seen = set()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = named[id(parameter)]
            seen.add(name)
            assert (group["part"] == "head") == name.startswith("head.")
            assert group["lr"] == pytest.approx(1e-2 if name.startswith("head.") else 1e-3)
            assert group["weight_decay"] == (0.1 if parameter.ndim > 1 else 0.0)
    assert seen == {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
def test_schedules_rise_and_fall_with_the_ratio_kept(tmp_path, schedule):
    options = {"head": "gap", "steps": 20, "schedule": schedule, "warmup": 0.25, "lr": 1e-3, "head_lr_mult": 10.0}
    run(tmp_path, log_every=1, eval_every=20, **options)
    records = [r for r in read_log(tmp_path / "log.jsonl") if r["kind"] == "train"]
    rates = [r["lr"] for r in records]
    peak = int(np.argmax(rates))
    assert 3 <= peak <= 6
    assert rates[peak] == pytest.approx(1e-3, rel=0.02)
    assert rates[0] < 0.5 * rates[peak]
    assert rates[-1] < 0.05 * rates[peak]
    assert records[peak]["lr_head"] == pytest.approx(1e-2, rel=0.02)


@pytest.mark.parametrize("loss", ["asl", "softmax"])
def test_other_losses_train(tmp_path, loss):
    summary = run(tmp_path, head="csra", head_opt={"num_heads": 2, "bias": True}, loss=loss, steps=3)
    assert 0 <= summary.metrics["mAP"] <= 1
    assert summary.steps == 3


def test_elements_weigh_what_the_batch_says(tmp_path, monkeypatch):
    """Classes that weigh nothing in any batch keep the weights they began with."""
    real = _trainer.training_loader

    def weighted(*arguments, **options):
        for batch in real(*arguments, **options):
            weight = torch.ones_like(batch.targets)
            weight[:, ::2] = 0.0
            yield batch._replace(weight=weight)

    monkeypatch.setattr(_trainer, "training_loader", weighted)
    options = {"head": "gap", "steps": 2, "weight_decay": 0.0, "optimizer": "sgd", "lr": 0.5, "eval_every": 2}
    trainer = train.Trainer(config(tmp_path, **options), stream=io.StringIO())
    before = trainer.model.head.fc.weight.detach().clone()
    trainer.fit()
    moved = (trainer.model.head.fc.weight.detach() - before).abs().sum(dim=1)
    assert (moved[::2] == 0).all()
    assert (moved[1::2] > 0).all()


def test_mixed_batches_train_other_weights(tmp_path):
    options = {"head": "gap", "steps": 2, "eval_every": 2}
    run(tmp_path / "plain", **options)
    run(tmp_path / "mixed", **options, mixup=0.8, cutmix=1.0)
    a, b = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("plain", "mixed"))
    assert not torch.equal(a["head.fc.weight"], b["head.fc.weight"])
    assert all(r["loss"] < 2 for r in read_log(tmp_path / "mixed/log.jsonl") if r["kind"] == "train")


def test_the_share_of_time_that_waits_for_data(tmp_path, monkeypatch):
    options = {"head": "gap", "num_classes": 10, "image_size": 20, "steps": 6, "eval_every": 6, "log_every": 3}
    quick = run(tmp_path / "quick", **options)
    real = Scenes.__getitems__

    def slow(self, serials):
        if self.split == "train":
            time.sleep(0.2)
        return real(self, serials)

    monkeypatch.setattr(Scenes, "__getitems__", slow)
    late = run(tmp_path / "slow", **options)
    assert 0 < quick.data_wait < late.data_wait < 1
    logged = [r["data_wait"] for r in read_log(tmp_path / "slow/log.jsonl") if r["kind"] == "train"]
    assert late.data_wait == pytest.approx(sum(logged) / 2, abs=0.3)
    assert len(logged) == 2
    table = list(csv.DictReader((tmp_path / "slow/log.csv").read_text().splitlines()))
    assert [float(r["data_wait"]) for r in table if r["kind"] == "train"] == logged


def test_the_prior_sets_the_first_probabilities():
    source_share = 0.025
    for head, options in (("gap", {}), ("ml_decoder", SMALL_DECODER), ("csra", {"bias": True})):
        model = building.build_model(
            config("unused", head=head, head_opt=options), 100, 1, torch.full((100,), source_share)
        ).eval()
        mean = model(torch.zeros(2, 1, 40, 40)).sigmoid().mean().item()
        assert 0.01 < mean < 0.06, head


def test_what_cannot_be_trained_costs_nothing(tmp_path):
    """An earlier run stays whole where --overwrite comes with a mistake, and no folder is made for a new one."""
    out, tiny = tmp_path / "run", {"head": "gap", "num_classes": 10, "image_size": 20, "steps": 1}
    run(out, **tiny)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for mistake in ({"backbone": "resnet_of_nobody"}, {"batch_size": 10**6}, {"data": str(tmp_path / "nowhere")}):
        for folder in (out, tmp_path / "new"):
            with pytest.raises(UsageError):
                train.train(config(folder, **{**tiny, **mistake}), overwrite=True, stream=io.StringIO())
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert not (tmp_path / "new").exists()


def test_one_process_says_that_it_shares_nothing(tmp_path):
    said = io.StringIO()
    train.Trainer(config(tmp_path, head="gap", class_parallel=2), stream=said)
    assert "--class-parallel are for several processes (torchrun -m mlhead train); this is one" in said.getvalue()


def test_a_diverged_run_stops_and_keeps_the_last_good_state(tmp_path):
    trainer = train.Trainer(config(tmp_path, head="gap", steps=6, eval_every=2, log_every=1), stream=io.StringIO())
    forward = trainer.loss.forward
    trainer.loss.forward = lambda z, y: forward(z, y) * (float("nan") if trainer.step >= 3 else 1.0)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 4.*lower --lr"):
        trainer.fit()
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["step"] == 2
    assert all(t.isfinite().all() for t in state["model"].values())


def test_a_backbone_can_start_from_another_run(tmp_path):
    run(tmp_path / "first", head="gap", num_classes=10, image_size=24, steps=2)
    options = {"init_backbone": str(tmp_path / "first/last.pt"), "head": "csra", "lr": 0.0, "steps": 1}
    run(tmp_path / "second", **options, eval_every=1)
    a, b = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("first", "second"))
    for name in a:
        if name.startswith("backbone") and "running" not in name and "num_batches" not in name:
            assert torch.equal(a[name], b[name]), name
    (tmp_path / "first/last.pt").unlink()  # what it started from is not needed again
    assert load_model(tmp_path / "second/last.pt", device="cpu").step == 1
    with pytest.raises(UsageError, match="--init-backbone: checkpoint must be an existing file"):
        run(tmp_path / "third", **options)
    options["init_backbone"] = str(tmp_path / "second/last.pt")
    with pytest.raises(UsageError, match="--init-backbone must be a run with the same backbone"):
        run(tmp_path / "fourth", **{**options, "backbone": "test_vit", "image_size": 160})


# Image folders


@pytest.fixture(scope="module")
def scene_folder(tmp_path_factory):
    from mlhead.data.export import write_scenes

    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(folder, 60, num_classes=10, size=24)
    return folder


def folder_options(folder, **options):
    defaults = {"data": str(folder / "images"), "labels": str(folder / "labels.csv"), "image_size": 32, "head": "gap"}
    return {**defaults, "val_fraction": 0.2, "steps": 3, "hflip": 0.0, **options}


def test_training_on_a_folder_names_every_bad_item(tmp_path, scene_folder):
    import shutil

    folder = tmp_path / "data"
    shutil.copytree(scene_folder, folder)
    (folder / "images/00007.png").write_bytes(b"not an image")
    with (folder / "labels.csv").open("a") as file:
        file.write("missing.png,3\n00001.png,4\nonly-one-cell\n")
    stream = io.StringIO()
    options = folder_options(folder, steps=30, eval_every=10)
    train.train(config(tmp_path / "run", **options), stream=stream)
    listed = (tmp_path / "run/bad_data.txt").read_text()
    for name in ("missing.png", "00001.png", "line 64", "00007.png"):
        assert name in listed
        assert name in stream.getvalue()
    assert "bad data: 4 rows or images were left out" in stream.getvalue()
    with pytest.raises(UsageError, match=r"bad data, and --on-bad-data is error: .*missing\.png: no such file"):
        train.train(config(tmp_path / "strict", **options, on_bad_data="error"), stream=stream)

    checkpoint = tmp_path / "run/last.pt"
    loaded = load_model(checkpoint, device="cpu")
    good, bad = predict_files(loaded, [folder / "images/00002.png", folder / "images/00007.png"])
    assert good.heats.shape[1:] == good.picture.shape[:2] == (32, 32)
    assert "cannot be decoded" in bad.reason
    changes = {"labels": str(scene_folder / "labels.csv"), "data": str(scene_folder / "images")}
    assert evaluate_checkpoint(checkpoint, split="val", changes=changes, stream=io.StringIO())["mAP"] > 0


def test_resume_on_a_folder_repeats_the_augmentation(tmp_path, scene_folder):
    options = folder_options(scene_folder, steps=8, checkpoint_every=5, eval_every=8, hflip=0.5, auto_augment="rand-m5")
    run(tmp_path / "whole", **options)
    trainer = train.Trainer(config(tmp_path / "part", **options), stream=io.StringIO())
    trainer.total_steps = 5
    trainer.fit()
    train.resume(tmp_path / "part", {"workers": 2}, stream=io.StringIO())
    a, b = load_checkpoint(tmp_path / "whole/last.pt"), load_checkpoint(tmp_path / "part/last.pt")
    assert_same(a["model"], b["model"])


def test_other_validation_files_and_class_lists(tmp_path, scene_folder):
    rows = (scene_folder / "labels.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text("\n".join(rows[:41]))
    (tmp_path / "val.csv").write_text("\n".join([rows[0], *rows[41:], "00003.png,seven"]))
    (tmp_path / "classes.txt").write_text("\n".join("9876543210"))
    options = folder_options(scene_folder, classes=str(tmp_path / "classes.txt"))
    options |= {"labels": str(tmp_path / "train.csv"), "val_labels": str(tmp_path / "val.csv")}
    run(tmp_path / "run", **options)
    assert load_checkpoint(tmp_path / "run/last.pt")["class_names"] == list("9876543210")
    assert "unknown label 'seven'" in (tmp_path / "run/bad_data.txt").read_text()


# Mistakes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"backbone": "resnet5O"},
            r"--backbone must be 'small' or a timm architecture.* got 'resnet5O' \(did you mean",
        ),
        ({"head": "csar"}, r"--head must be one of gap, csra, .* got 'csar' \(did you mean 'csra'"),
        (
            {"head": "csra", "head_opt": {"lamda": 1}},
            r"--head-opt must be an option of head csra: .*got 'lamda' \(did you",
        ),
        ({"head": "ml_decoder", "head_opt": {"embed_dim": 30}}, r"--head ml_decoder on --backbone small: .*num_heads"),
        ({"loss_opt": {"gamma": 2}, "loss": "asl"}, r"--loss-opt must be an option of loss asl: gamma_neg"),
        ({"optimizer": "adamx2"}, r"--optimizer must be one of timm's .* got 'adamx2'"),
        ({"device": "cuda:9"}, r"--device must be one of the \d+ CUDA devices"),
        ({"device": "gpu"}, r"--device must be 'auto', 'cpu'"),
        ({"batch_size": 600, "train_length": 100}, r"--batch-size must be at most 100, the number of training images"),
        (
            {"data": "/no/such/folder"},
            r"--data must be 'scenes' or an existing folder of images, got '/no/such/folder'",
        ),
        ({"num_classes": 123}, r"--num-classes must be 10, 100, 1000 or 10000"),
        ({"pretrained": True}, r"--pretrained must be off for the small backbone"),
        ({"ema": 1.0}, r"--ema must be below 1"),
        ({"lr": "fast"}, r"--lr must be a number, got 'fast'"),
        ({"batch_size": 0}, r"--batch-size must be at least 1, got 0"),
    ],
)
def test_mistakes_name_the_argument(tmp_path, options, words):
    with pytest.raises(UsageError, match=words) as caught:
        run(tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_weights_that_cannot_be_downloaded(tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr("timm.create_model", no_network)
    with pytest.raises(
        UsageError, match=r"--pretrained must be off where .* of resnet18 cannot be had .* no route to host"
    ):
        run(tmp_path, backbone="resnet18", pretrained=True)


def test_a_run_is_not_overwritten_by_accident(tmp_path):
    run(tmp_path, steps=1, head="gap")
    with pytest.raises(UsageError, match="--out must be a folder without a run"):
        run(tmp_path, steps=1, head="gap")
    train.train(config(tmp_path, steps=2, head="gap"), overwrite=True, stream=io.StringIO())
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 2
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--out must be a folder, got the file"):
        run(tmp_path / "file")


# Parts


def test_config_files(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("lr: 1e-3\nhead_opt: {groups: 5}\n")
    assert TrainConfig(**load_config(path)).lr == 1e-3  # YAML itself reads 1e-3 as text
    path.write_text(json.dumps({"steps": 5}))
    assert load_config(path) == {"steps": 5}
    saved = config("x", head_opt={"temperatures": [1.0, float("inf")]})
    saved.save(path)
    assert TrainConfig(**load_config(path)) == saved
    path.write_text("learning_rate: 1\n")
    with pytest.raises(UsageError, match="made of known options, got 'learning_rate'"):
        load_config(path)
    path.write_text("- 1\n")
    with pytest.raises(UsageError, match="a mapping of options, got list"):
        load_config(path)
    path.write_text("a: [1\n")
    with pytest.raises(UsageError, match="must be a YAML or JSON file"):
        load_config(path)
    with pytest.raises(UsageError, match="must be an existing YAML or JSON file"):
        load_config(tmp_path / "none.yaml")


def test_pairs_are_parsed():
    pairs = parse_pairs(
        "--head-opt", ["groups=50", "lam=0.5", "temperatures=[1, inf]", "queries=learnable", "bias=True"]
    )
    assert pairs == {"groups": 50, "lam": 0.5, "temperatures": [1, float("inf")], "queries": "learnable", "bias": True}
    with pytest.raises(UsageError, match="--head-opt must be name=value, got 'groups'"):
        parse_pairs("--head-opt", ["groups"])


def test_a_cut_log_line_is_left_out_and_a_bad_one_is_not(tmp_path):
    log = RunLog(tmp_path)
    for step in (5, 10, 15):
        log.add("train", step, loss=1.0 / step)
    with log.json_path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [r["step"] for r in read_log(log.json_path)] == [5, 10, 15]
    RunLog(tmp_path, resume_step=10)
    assert [r["step"] for r in read_log(log.json_path)] == [5, 10]
    assert len(log.csv_path.read_text().splitlines()) == 3
    log.json_path.write_text("nonsense\n" + log.json_path.read_text())
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        read_log(log.json_path)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_is_lines_or_a_bar():
    pytest.importorskip("tqdm")
    plain = io.StringIO()
    progress = Progress(4, "training", unit_size=8, stream=plain, every_s=0.0)
    progress.advance(1, "loss 0.5")
    assert plain.getvalue().startswith("training 1/4  loss 0.5  ")
    assert plain.getvalue().rstrip().endswith("left")
    assert "images/s" in plain.getvalue()
    assert "\r" not in plain.getvalue()
    terminal = Terminal()
    bar = Progress(4, "training", stream=terminal)
    bar.advance(2, "loss 0.5")
    bar.say("a line")
    bar.advance(2)
    bar.close()
    assert "\r" in terminal.getvalue()
    assert "loss 0.5" in terminal.getvalue()
    assert "a line\n" in terminal.getvalue()
    assert [duration(s) for s in (7, 754, 3723)] == ["0:07", "12:34", "1:02:03"]
