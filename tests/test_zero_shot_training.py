"""Zero-shot runs from end to end: what training may not see, checkpoints with banks, evaluation, the demo."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch

from mlhead import SparseTargets, demo_zero_shot, train
from mlhead._config import TrainConfig
from mlhead._learned_groups import LearnedGroups, mixed_order
from mlhead._usage import UsageError
from mlhead.checkpoints import load_checkpoint
from mlhead.cli import main
from mlhead.data.reporting import BadDataLog
from mlhead.data.scenes import Scenes
from mlhead.data.sources import open_source, seen_then_unseen
from mlhead.inference import evaluate_checkpoint, load_model, predict_files, predict_tensor
from mlhead.metrics import ZeroShotMetrics

for package in ("timm", "torchmetrics", "sklearn", "yaml", "matplotlib"):
    pytest.importorskip(package)
Image = pytest.importorskip("PIL.Image")
HEAD = {"embed_dim": 32, "num_heads": 4, "feedforward_dim": 32}


def config(out, **options):
    defaults = {"steps": 4, "batch_size": 8, "val_length": 64, "log_every": 2, "device": "cpu", "head_opt": HEAD}
    return TrainConfig(**{**defaults, "out": str(out), "task": "zero-shot", **options})


def run(out, **options):
    return train.train(config(out, **options), stream=io.StringIO())


class TestScenes:
    def test_unseen_numbers_are_in_test_scenes_only(self):
        source = open_source(config("unused"), BadDataLog("error", print))
        assert (len(source.class_names), source.num_seen) == (100, 80)
        assert sorted(source.class_names) == [f"{n:02d}" for n in range(100)]
        found = {}
        for split in ("train", "val", "test"):
            scenes = source.dataset(split, source.image_spec(None))
            found[split] = np.concatenate([sample.labels for sample in scenes.__getitems__(range(600))])
        assert max(found["train"].max(), found["val"].max()) == 79
        assert found["test"].max() == 99
        share = (found["test"] >= 80).mean()
        assert 0.15 < share < 0.25
        # What stands in the picture is the number of the class's name.
        scenes = source.dataset("test", source.image_spec(None))
        plain = Scenes("test", num_classes=100, seed=0)
        plan = scenes.plan(range(50))
        assert scenes.class_names == source.class_names
        digits = (scenes.numbers[plan.labels][..., None] // np.array([10, 1])) % 10
        from mlhead.data.scenes import scan_table

        assert np.array_equal(scan_table()[1][plan.scans], digits)
        assert plain.class_names == sorted(plain.class_names)

    def test_word_vectors_are_made_of_the_digits(self):
        source = open_source(config("unused"), BadDataLog("error", print))
        vectors = source.word_vectors
        assert vectors.shape == (100, 20)
        at = source.class_names.index("37")
        assert vectors[at].nonzero()[:, 0].tolist() == [3, 17]
        seen = vectors[: source.num_seen]
        assert (seen.sum(0) >= 1).all(), "every digit occurs at both places among the seen numbers"

    def test_the_division_is_no_matter_of_the_seed(self):
        numbers, known = seen_then_unseen(1000, 0.1)
        assert known == 900
        assert np.array_equal(numbers, seen_then_unseen(1000, 0.1)[0])
        assert set(seen_then_unseen(100, 0.2)[0][80:]) <= set(seen_then_unseen(100, 0.4)[0][60:])
        for share in (0.0, 0.001, 1.0):
            with pytest.raises(UsageError, match="--unseen must be a share that leaves 1 to 99 of 100 numbers unseen"):
                seen_then_unseen(100, share)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"numbers": [0, 1, 2]}, "numbers must be a permutation of 0 to 99"),
            ({"numbers": [0] * 100}, "numbers must be a permutation of 0 to 99"),
            ({"known": 0}, r"known must be in \[1, 100\], got 0"),
            ({"known": 50, "long_tail": True}, "--long-tail must be off where some numbers do not occur"),
        ],
    )
    def test_errors(self, options, message):
        with pytest.raises(UsageError, match=message):
            Scenes("train", **options)


@pytest.mark.parametrize("groups", [None, 20])
def test_train_evaluate_and_predict(tmp_path, groups):
    options = {"head_opt": {**HEAD, "groups": groups}, "query_noise": 0.1, "random_queries": 5, "ema": 0.9}
    summary = run(tmp_path / "run", **options)
    assert 0 <= summary.metrics["mAP"] <= 1
    state = load_checkpoint(tmp_path / "run/last.pt")
    assert state["num_seen"] == 80
    assert len(state["class_names"]) == 100
    assert {k: tuple(v.shape) for k, v in state["model"].items() if "banks" in k} == {
        "head.banks.train": (80, 20),
        "head.banks.test": (20, 20),
        "head.banks.union": (100, 20),
    }
    for weights in ("model", "ema"):
        found = evaluate_checkpoint(tmp_path / "run/last.pt", weights=weights, stream=io.StringIO())
        assert {"ZSL_mAP", "GZSL_mAP", "ZSL_F1@3", "GZSL_F1@5", "seen_mAP"} <= found.keys()
    seen = evaluate_checkpoint(tmp_path / "run/last.pt", split="val", weights="ema", stream=io.StringIO())
    assert seen["mAP"] == pytest.approx(summary.metrics["mAP"], abs=1e-6)
    loaded = load_model(tmp_path / "run/last.pt")
    assert loaded.model.num_classes == 100
    scenes = Scenes("test", num_classes=100, numbers=[int(name) for name in loaded.class_names])
    prediction = predict_tensor(loaded, scenes[0].image, top=4, threshold=0.0)
    assert len(set(prediction.names)) == 4
    assert prediction.heats.shape == (4, 40, 40)
    Image.fromarray(scenes.to_picture(scenes[0].image)).save(tmp_path / "scene.png")
    (from_file,) = predict_files(loaded, [tmp_path / "scene.png"], top=4, threshold=0.0)
    assert from_file.names == prediction.names


def test_evaluation_is_that_of_the_logits(tmp_path):
    run(tmp_path / "run")
    found = evaluate_checkpoint(tmp_path / "run/last.pt", stream=io.StringIO())
    loaded = load_model(tmp_path / "run/last.pt")
    scenes = Scenes("test", num_classes=100, numbers=[int(name) for name in loaded.class_names])
    samples = scenes.__getitems__(range(64))
    targets = torch.zeros(64, 100)
    for b, sample in enumerate(samples):
        targets[b, torch.from_numpy(sample.labels)] = 1
    metrics = ZeroShotMetrics(80, 100)
    with torch.no_grad():
        metrics.update(loaded.model(torch.stack([s.image for s in samples])), targets)
    assert found == pytest.approx(metrics.compute(), abs=1e-6)


def test_resumes_exactly_with_augmentation(tmp_path):
    options = {"query_noise": 0.2, "random_queries": 7, "steps": 6, "eval_every": 6}
    run(tmp_path / "whole", **options)
    trainer = train.Trainer(config(tmp_path / "part", checkpoint_every=3, **options), stream=io.StringIO())
    trainer.total_steps = 3
    trainer.fit()
    train.resume(tmp_path / "part", stream=io.StringIO())
    a, b = (load_checkpoint(tmp_path / name / "last.pt")["model"] for name in ("whole", "part"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    plain = run(tmp_path / "plain", **{**options, "query_noise": 0.0})
    assert not torch.equal(load_checkpoint(plain.out / "last.pt")["model"]["head.wordvec_proj.weight"],
                           a["head.wordvec_proj.weight"])  # fmt: skip


def test_word_vectors_from_a_file(tmp_path):
    lines = [f"{n:02d} " + " ".join(f"{np.sin(n * k):.6f}" for k in range(1, 8)) for n in range(100)]
    (tmp_path / "glove.txt").write_text("\n".join(lines))
    run(tmp_path / "run", word_vectors=str(tmp_path / "glove.txt"))
    state = load_checkpoint(tmp_path / "run/last.pt")
    assert state["model"]["head.wordvec_proj.weight"].shape == (32, 7)
    at = state["class_names"].index("07")
    expected = torch.tensor([np.sin(7 * k) for k in range(1, 8)], dtype=torch.float32)
    torch.testing.assert_close(state["model"]["head.banks.union"][at], expected, atol=1e-6, rtol=0)
    (tmp_path / "few.txt").write_text("\n".join(lines[:97]))
    with pytest.raises(UsageError, match="3 of 100: '97', '98', '99'"):
        run(tmp_path / "few", word_vectors=str(tmp_path / "few.txt"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": "csra"}, "--head must be 'zero_shot', or absent, for --task zero-shot"),
        ({"task": "classification", "head": "zero_shot"}, "--task must be 'zero-shot' for --head zero_shot"),
        ({"task": "few-shot"}, "--task must be one of classification, zero-shot"),
        ({"data": "."}, "--data must be 'scenes' or a folder in the layout of NUS-WIDE"),
        ({"unseen": 0.0}, "--unseen must be a share"),
        ({"query_noise": -1.0}, "--query-noise must be at least 0"),
        ({"head_opt": {"grups": 3}}, "--head-opt must be an option of head zero_shot"),
        ({"loss": "softmax", "steps": 1, "random_queries": 3, "lr": 1e-3}, None),
    ],
)
def test_mistakes_are_named(tmp_path, options, message):
    if message is None:  # several labels share softmax's mass: allowed
        run(tmp_path / "run", **options)
        return
    with pytest.raises(UsageError, match=message):
        run(tmp_path / "run", **options)


def test_the_demo_leaves_a_table_and_pictures(tmp_path, capsys, monkeypatch):
    for name, value in {"TRAIN_SCENES": 200, "TEST_SCENES": 200, "POINTING_SCENES": 20}.items():
        monkeypatch.setattr(demo_zero_shot, name, value)
    rows = demo_zero_shot.run(tmp_path, steps=2, seeds=2, jobs=1, stream=io.StringIO())
    printed = capsys.readouterr().out
    assert (tmp_path / "table.txt").read_text() == printed
    for text in (
        "chance",
        "full decoding",
        "40 groups of 2",
        "ZSL mAP",
        "Table 3: noise above none",
        "points at it",
        "Table 8: word",
    ):
        assert text in printed
    assert len(rows) == 1 + len(demo_zero_shot.CONTESTANTS)
    assert all(len(values) == 2 for row in rows for values in row.measures.values())
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 2
    for name in ("scores.png", *(f"attention-{i}.png" for i in range(1, demo_zero_shot.PICTURES + 1))):
        with Image.open(tmp_path / name) as picture:
            picture.load()


def test_orderings_say_what_the_seeds_show():
    def row(name, values):
        return demo_zero_shot.Row(demo_zero_shot.CONTESTANTS[name].title, {"ZSL_mAP": values})

    rows = [row("full", [0.3, 0.32]), row("noise", [0.4, 0.5]), row("random", [0.31, 0.5]), row("both", [0.1, 0.2]),
            row("group", [0.25, 0.29])]  # fmt: skip
    lines = demo_zero_shot.orderings(rows)
    assert lines[0] == "Table 3: noise above none: reproduced (+0.140 ZSL mAP)"
    assert "random queries above none: within the spread of the seeds" in lines[1]
    assert "both above none: the other way round (-0.160" in lines[2]
    assert lines[5] == "Table 4: full above group decoding: reproduced (+0.040 ZSL mAP)"


def test_runs_side_by_side(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_zero_shot, "CONTESTANTS", {k: demo_zero_shot.CONTESTANTS[k] for k in ("full", "group")})
    monkeypatch.setattr(demo_zero_shot, "TABLE_8", {"words, words": ("words", "words")})
    monkeypatch.setattr(demo_zero_shot, "_report", lambda *arguments: None)
    monkeypatch.setattr(demo_zero_shot, "TRAIN_SCENES", 100)
    monkeypatch.setattr(demo_zero_shot, "TEST_SCENES", 300)
    rows = demo_zero_shot.run(tmp_path, steps=1, seeds=1, jobs=2, stream=io.StringIO())
    assert [row.title for row in rows] == ["chance", "full decoding", "40 groups of 2"]
    assert all(row.backends["group_fc_loss"] for row in rows[1:])


def test_the_command_prints_both_settings(tmp_path, capsys):
    options = ["--task", "zero-shot", "--steps", "2", "--batch-size", "8", "--val-length", "64", "--device", "cpu"]
    heads = [part for name, value in HEAD.items() for part in ("--head-opt", f"{name}={value}")]
    assert main(["train", "--out", str(tmp_path), *options, *heads, "--query-noise", "0.1"]) == 0
    printed = capsys.readouterr().out.splitlines()
    found = evaluate_checkpoint(tmp_path / "best.pt", stream=io.StringIO())
    assert (
        printed[-2] == f"  ZSL   mAP {found['ZSL_mAP']:.4f}  F1@3 {found['ZSL_F1@3']:.4f}  F1@5 {found['ZSL_F1@5']:.4f}"
    )
    assert printed[-1].startswith(f"  GZSL  mAP {found['GZSL_mAP']:.4f}")
    assert main(["eval", str(tmp_path / "best.pt")]) == 0
    assert f"ZSL_mAP   {found['ZSL_mAP']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize("queries", ["words", "learned"])
@pytest.mark.parametrize("last", ["words", "learned", "shared"])
def test_learned_groups(queries, last):
    """What is learned stands in the formula of group decoding; without labels a class's weight has no gradient."""
    order = mixed_order(8, 12, 4)
    assert order.reshape(4, 3).tolist() == [[0, 1, 8], [2, 3, 9], [4, 5, 10], [6, 7, 11]]
    with pytest.raises(ValueError, match="groups must be a divisor of 8 and 4, got 3"):
        mixed_order(8, 12, 3)
    options = {"embed_dim": 16, "num_heads": 2, "feedforward_dim": 24, "dropout": 0.0}
    head = LearnedGroups(6, torch.randn(12, 5), 4, queries=queries, last=last, **options)
    x = torch.randn(2, 7, 6)
    h = head(x, pre_logits=True)
    if last == "words":
        weight = torch.einsum("we,gjw->gej", head.class_proj.weight, head.bank().view(4, 3, 5))
    else:
        weight = head.learned_weight.expand(4, -1, -1)
    expected = torch.einsum("bge,gej->bgj", h, weight).flatten(1) + head.duplicate_pooling_bias
    torch.testing.assert_close(head(x), expected)
    before = head._queries(head.bank(), 3)
    head.set_bank("train", torch.randn(12, 5))
    assert torch.equal(head._queries(head.bank(), 3), before) == (queries == "learned")
    unseen = [2, 5, 8, 11]
    targets = SparseTargets.from_lists([[0, 4], [10]], 12, ignore=[unseen, unseen])
    head(x, targets).backward()
    if last == "learned":
        assert not head.learned_weight.grad[:, :, 2].any()
        assert head.learned_weight.grad[:, :, 1].any()
