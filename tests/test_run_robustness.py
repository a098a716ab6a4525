"""What a run must survive or refuse: changed data, weights that are not finite, odd lengths, options without use."""

from __future__ import annotations

import io
import json
import math
import shutil

import pytest
import torch
from training_runs import config, run

from mlhead import _trainer, building, cli, train
from mlhead._config import TrainConfig
from mlhead._run_steps import Steps, are_finite
from mlhead._runlog import read_log
from mlhead._usage import UsageError
from mlhead.checkpoints import load_checkpoint
from mlhead.data.folder import HINTS, Row, Table, keep_known
from mlhead.data.reporting import BadDataLog
from mlhead.data.scenes import Scenes
from mlhead.data.sources import ImageSpec, open_source, training_transform
from mlhead.inference import evaluate_checkpoint, load_model, predict_tensor
from mlhead.metrics import SingleLabelMetrics, propensities

for package in ("timm", "torchmetrics", "sklearn", "yaml", "PIL"):
    pytest.importorskip(package)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A folder of images with a table of labels without a column of splits."""
    folder = tmp_path_factory.mktemp("images")
    from PIL import Image

    rows = ["image,labels"]
    for number in range(60):
        Image.new("RGB", (24, 16), (number * 4, 255 - number * 4, 0)).save(folder / f"{number}.png")
        rows.append(f"{number}.png,{'cat' if number % 2 else 'cat;dog'}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    return folder


def on(folder, **options):
    """Options of a small run on the folder."""
    own = {"data": str(folder), "labels": str(folder / "labels.csv"), "image_size": 16, "head": "gap"}
    return {**own, "steps": 4, "batch_size": 4, "eval_every": 2, **options}


# Softmax: scores however sure the model is


def test_scores_of_the_softmax_loss_are_log_odds():
    z = torch.tensor([[0.0, 1, 2, 3, 4, 5, 6, 7, 10, 50], [3.0, 3, 1, 0, 0, 0, 0, 0, 0, 0]])
    odds = building.scores_as_logits(TrainConfig(loss="softmax"), z)
    p = z.double().softmax(1)
    others = torch.stack([torch.cat([p[:, :i], p[:, i + 1 :]], 1).sum(1) for i in range(10)], 1)
    want = p.log() - others.log()
    torch.testing.assert_close(odds.double(), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(odds[0].argsort(), torch.arange(10))
    assert building.scores_as_logits(TrainConfig(loss="softmax"), torch.zeros(2, 1)).isfinite().all()
    assert building.scores_as_logits(TrainConfig(loss="softmax"), torch.full((1, 3), torch.nan)).isnan().all()
    metrics = SingleLabelMetrics(10)
    metrics.update(odds[:1], torch.nn.functional.one_hot(torch.tensor([8]), 10))
    assert metrics.compute()["top5"] == 1


@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_predictions_are_ranked_by_logits(tmp_path, loss):
    run(tmp_path, loss=loss, steps=1, head="gap", num_classes=10)
    loaded = load_model(tmp_path / "last.pt", device="cpu")
    with torch.no_grad():
        loaded.model.head.fc.weight.zero_()
        loaded.model.head.fc.bias.copy_(torch.tensor([18.0, 80, 60, 50, -3, 0, 0, 0, 0, 0]))
    scene = Scenes("test", num_classes=10, size=40, length=1)[0].image
    found = predict_tensor(loaded, scene, top=4, threshold=0.0)
    assert found.names == [loaded.class_names[c] for c in (1, 2, 3, 0)]


def test_predictions_of_chosen_classes(tmp_path, capsys):
    from PIL import Image

    run(tmp_path, steps=1, head="gap", num_classes=10)
    Image.new("L", (40, 40), 90).save(tmp_path / "a.png")
    shown = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    command = ["predict", str(tmp_path / "last.pt"), str(tmp_path / "a.png"), *shown]
    assert cli.main([*command, "--label", "7", "--label", "2", "--top", "1"]) == 0
    assert [part.split()[0] for part in capsys.readouterr().out.split(": ")[1].split(", ")] == ["7", "2"]
    assert (tmp_path / "out/a.png").is_file()
    assert cli.main([*command, "--label", "77"]) == 2
    assert "--label must be a class of the model, got '77'" in capsys.readouterr().err


# What an earlier run has left


def test_a_folder_with_the_best_alone_is_a_run(tmp_path):
    run(tmp_path, head="gap", steps=2)
    (tmp_path / "last.pt").unlink()
    before = (tmp_path / "best.pt").read_bytes()
    with pytest.raises(UsageError, match="--out must be a folder without a run"):
        run(tmp_path, head="gap", steps=2)
    assert (tmp_path / "best.pt").read_bytes() == before


def test_only_a_runs_own_leftovers_are_deleted(tmp_path):
    run(tmp_path, head="gap", steps=2)
    (tmp_path / ".other.part").touch()
    (tmp_path / ".last.pt.abc.part").touch()
    train.resume(tmp_path, {}, stream=io.StringIO())
    assert (tmp_path / ".other.part").exists()
    assert not (tmp_path / ".last.pt.abc.part").exists()


def test_resume_finds_the_checkpoint_in_the_form_that_another_number_of_processes_wrote(tmp_path):
    whole = run(tmp_path, head="gap", steps=2)
    assert train.resume(tmp_path / "last.dcp", {}, stream=io.StringIO()).steps == whole.steps
    with pytest.raises(UsageError, match=r"none\.pt"):
        train.resume(tmp_path / "none.pt", {}, stream=io.StringIO())


def test_resume_refuses_other_data(tmp_path, scenes):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    run(tmp_path / "run", **on(data))
    state = load_checkpoint(tmp_path / "run/last.pt")
    assert set(state["images"]) == {"train", "val"}
    lines = (data / "labels.csv").read_text().splitlines()
    (data / "labels.csv").write_text("\n".join(lines[:50]) + "\n")
    with pytest.raises(UsageError, match=r"--data must be as it was when the run began, with .* usable .* images"):
        train.resume(tmp_path / "run", {}, stream=io.StringIO())


def test_bad_data_that_is_an_error_is_one_after_a_resume_too(tmp_path, scenes):
    data = tmp_path / "data"
    shutil.copytree(scenes, data)
    run(tmp_path / "run", **on(data, on_bad_data="error", steps=2))
    options = on(data, on_bad_data="error", steps=40, checkpoint_every=2)
    for image in list(data.glob("*.png"))[:30]:
        image.write_bytes(b"broken")
    for _ in range(2):
        with pytest.raises(UsageError, match="--on-bad-data is error"):
            train.train(config(tmp_path / "other", **options), overwrite=True, stream=io.StringIO())
    if (tmp_path / "other/last.pt").exists():
        with pytest.raises(UsageError, match="--on-bad-data is error"):
            train.resume(tmp_path / "other", {}, stream=io.StringIO())
    listed = (tmp_path / "other/bad_data.txt").read_text().splitlines()
    assert len(listed) == len(set(listed)) > 0


# Numbers that are not finite


def test_weights_that_are_not_finite_do_not_replace_good_ones(tmp_path, monkeypatch):
    """The loss of a step is from before its update."""
    before = Steps.apply

    def apply(self, done):
        norm = before(self, done)
        if done == 3:
            with torch.no_grad():
                self.model.head.fc.weight[0, 0] = torch.nan
        return norm

    monkeypatch.setattr(Steps, "apply", apply)
    with pytest.raises(FloatingPointError, match=r"a weight is not finite at step 3.*last good state is in .*last\.pt"):
        run(tmp_path, head="gap", steps=5, checkpoint_every=1, eval_every=1)
    state = load_checkpoint(tmp_path / "last.pt")
    assert state["step"] == 2
    assert all(value.isfinite().all() for value in state["model"].values())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_finite_numbers(dtype):
    good = torch.full((5,), torch.finfo(dtype).max, dtype=dtype)
    assert are_finite([good, torch.zeros(0, dtype=dtype)])
    for wrong in (torch.nan, torch.inf, -torch.inf):
        assert not are_finite([good, torch.tensor([0.0, wrong], dtype=dtype)])


def test_the_log_is_json_whatever_the_numbers(tmp_path):
    run(tmp_path, head="gap", steps=2)
    log = _trainer.RunLog(tmp_path, 2)
    log.add("train", 3, loss=1.0, grad_norm=math.nan)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(lines[-1], parse_constant=pytest.fail)["grad_norm"] is None


# Lengths


@pytest.mark.parametrize("schedule", ["onecycle", "cosine"])
@pytest.mark.parametrize(
    ("steps", "warmup"), [(9, 0.1), (4, 0.2), (3, 0.25), (19, 0.05), (2, 0.8), (1, 0.9), (1, 0.0), (99, 0.01)]
)
def test_schedules_of_any_length(schedule, steps, warmup):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    options = TrainConfig(schedule=schedule, warmup=warmup, steps=steps)
    _, advance = building.build_schedule(options, optimizer, steps)
    rates = []
    for done in range(1, steps + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        advance(done)
    assert all(0 <= rate <= 0.5 for rate in rates)
    assert max(rates) > 0.25 or steps == 1


@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_epochs_are_those_of_the_data(tmp_path, accumulate):
    run(tmp_path, head="gap", steps=None, epochs=3, train_length=20, batch_size=4, accumulate=accumulate, log_every=1)
    records = read_log(tmp_path / "log.jsonl")
    last = records[-1]
    assert last["epoch"] == pytest.approx(last["step"] * accumulate / 5, abs=1e-3)
    assert abs(last["epoch"] - 3) <= accumulate / 5
    assert next(r["step"] for r in records if r["kind"] == "val") == max(1, round(5 / accumulate))


# What is measured


def test_evaluation_of_training_images_does_not_augment_them(tmp_path, scenes):
    options = config(tmp_path, **on(scenes, crop_scale=0.1, hflip=0.5))
    source = open_source(options, BadDataLog("skip", lambda line: None))
    spec = ImageSpec(3, 16, 16, [0.5] * 3, [0.5] * 3)
    plain, augmented = (source.dataset("train", spec, augment=augment) for augment in (False, True))
    assert torch.equal(plain[0].image, spec.transform()(plain.listing.open(0, "RGB")))
    assert any(not torch.equal(plain[i].image, augmented[i].image) for i in range(5))


def test_the_best_classes_are_scored_by_propensity_where_training_images_are_listed(tmp_path, scenes):
    run(tmp_path / "run", **on(scenes, metrics="topk", fused_loss=True))
    found = evaluate_checkpoint(tmp_path / "run/last.pt", split="val", device="cpu", stream=io.StringIO())
    assert {"P@1", "nDCG@1", "PSP@1", "PSnDCG@1"} <= found.keys()
    last = read_log(tmp_path / "run/log.jsonl")[-1]
    assert last["PSP@1"] == pytest.approx(found["PSP@1"])
    # cat is on every training image and dog on half of them: a dog that is found counts more
    source = open_source(config(tmp_path, **on(scenes)), BadDataLog("skip", lambda line: None))
    listing = source.splits["train"]
    p = propensities(torch.from_numpy(listing.positives(2)), len(listing))
    assert p[0] > p[1]
    loaded = load_model(tmp_path / "run/last.pt", device="cpu")
    val = source.splits["val"]
    hits = best = 0.0
    for number in range(len(val)):
        image = loaded.image_spec.transform()(val.open(number, "RGB"))
        with torch.no_grad():
            (first,) = loaded.model(image[None]).argmax(1).tolist()
        labels = val.labels(number)[0].tolist()
        hits += (first in labels) / p[first].item()
        best += max(1 / p[label].item() for label in labels)
    assert found["PSP@1"] == pytest.approx(hits / best)


def test_data_without_test_images_is_measured_on_validation(tmp_path, scenes):
    run(tmp_path / "run", **on(scenes))
    said = io.StringIO()
    found = evaluate_checkpoint(tmp_path / "run/last.pt", device="cpu", stream=said)
    assert "no images for the test split: this is the val split" in said.getvalue()
    assert found == evaluate_checkpoint(tmp_path / "run/last.pt", split="val", device="cpu", stream=io.StringIO())
    with pytest.raises(UsageError, match="at least one usable image for the test split"):
        evaluate_checkpoint(tmp_path / "run/last.pt", split="test", device="cpu", stream=io.StringIO())


def test_validation_images_need_a_label_before_anything_is_trained(tmp_path, scenes):
    (tmp_path / "val.csv").write_text("image,labels\n0.png,\n1.png,\n")
    with pytest.raises(UsageError, match="--data must be such that a validation image has a label, got none in 2"):
        run(tmp_path / "run", **on(scenes, val_labels=str(tmp_path / "val.csv")))
    assert not (tmp_path / "run").exists()


def test_a_missing_table_is_named_by_its_option(tmp_path, scenes):
    with pytest.raises(UsageError, match="--val-labels must be an existing CSV file"):
        run(tmp_path / "run", **on(scenes, val_labels=str(tmp_path / "none.csv")))


@pytest.mark.parametrize("size", [(64, 42), (36, 64), (40, 40)])
def test_crops_of_scale_1_keep_the_whole_image(size):
    from PIL import Image

    image = Image.new("RGB", size)
    for x, y in ((0, 0), (size[0] - 1, size[1] - 1)):
        image.paste("white", (x - 4, y - 4, x + 5, y + 5))
    spec = ImageSpec(3, 32, 32, [0.0] * 3, [1.0] * 3)
    options = TrainConfig(crop_scale=1.0, hflip=0.0, color_jitter=0.0)
    for _ in range(3):
        assert torch.equal(training_transform(options, spec)(image), spec.transform()(image))


# Options


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--labels", "x.csv"], "--labels must be absent without --data FOLDER"),
        (["--auto-augment", "rand-m9"], "--auto-augment must be absent without --data FOLDER"),
        (["--crop-pct", "0.9"], "--crop-pct must be absent without"),
        (["--data", ".", "--train-length", "9"], "--train-length must be absent with --data FOLDER"),
        (["--data", ".", "--long-tail"], "--long-tail must be absent with --data FOLDER"),
        (["--steps", "2", "--epochs", "3"], "--epochs must be absent with --steps"),
        (["--clip-grad", "0"], "--clip-grad must be above 0"),
        (["--resume", "x", "--overwrite"], "--overwrite must be absent on --resume"),
    ],
)
def test_options_without_use_are_refused(tmp_path, capsys, flags, words):
    assert cli.main(["train", "--out", str(tmp_path / "run"), *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_hints_are_looked_for_no_more_often_than_they_are_shown(monkeypatch):
    from mlhead.data import folder

    calls = []
    monkeypatch.setattr(folder, "closest", lambda word, known: calls.append(word) or " (hint)")
    rows = [Row(f"{i}.png", (f"dgo{i % 50}",), None) for i in range(500)]
    table = keep_known(Table(rows, []), ["dog"])
    assert len(table.bad) == 500
    assert len(calls) == HINTS
    assert table.bad[0].reason == "unknown label 'dgo0' (hint)"


def test_the_softmax_loss_takes_no_unknown_labels(tmp_path, scenes, monkeypatch):
    from mlhead.data.listing import ImageList

    monkeypatch.setattr(ImageList, "has_unknown", lambda self: True)
    with pytest.raises(UsageError, match="--loss must be 'bce' or 'asl' for training images with unknown labels"):
        run(tmp_path / "run", **on(scenes, loss="softmax"))
    assert not (tmp_path / "run").exists()
