"""`mlhead demo-million` in miniature: what it plants, that it learns, and what it says of memory."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch

from mlhead import backend, cli, million

pytest.importorskip("torchmetrics")


def test_it_learns_and_leaves_a_table(tmp_path, capsys):
    stream = io.StringIO()
    result = million.run(tmp_path, classes=2_000, width=32, batch_size=64, steps=60, stream=stream)
    first, *rest = result.measurements
    assert [m.step for m in rest] == [15, 30, 45, 60]
    assert math.isnan(first.loss)
    assert rest[-1].loss < 0.9 * rest[0].loss
    assert first.precision < 0.05
    assert rest[-1].precision > 0.4
    printed = capsys.readouterr().out
    assert (tmp_path / "table.txt").read_text() == printed
    assert "2,000 classes, width 32, 64 images a step" in printed
    assert f"{rest[-1].precision:.3f}" in printed
    assert "2,000 classes 60/60" in stream.getvalue()
    facts = json.loads((tmp_path / "results.json").read_text())
    assert facts["memory"]["dense"] == 2 * 64 * 2_000 * 4
    assert facts["memory"]["head"] == 2 * (2_000 * 32 + 2_000) * 4
    assert facts["backend"] == result.backend


def test_without_the_extension_it_takes_fewer_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(million, "STEPS_REFERENCE", 3)
    with backend("reference"):
        result = million.run(tmp_path, classes=50, width=8, batch_size=8, stream=io.StringIO())
    assert result.backend == "reference"
    assert [m.step for m in result.measurements] == [0, 1, 2, 3]


def test_images_are_their_classes():
    task = million.Planted(1_000, 256, seed=3)
    features, targets = task.batch(300)
    assert features.shape == (300, 1, 256)
    targets.check("test", "targets")
    for b in range(300):
        own = targets.indices[targets.offsets[b] : targets.offsets[b + 1]]
        scores = task.prototypes(torch.arange(1_000)) @ features[b, 0]
        assert set(scores.topk(len(own)).indices.tolist()) == set(own.tolist())
    assert sum(task.frequency(c) for c in range(1_000)) == pytest.approx(1)
    drawn = torch.bincount(task.batch(20_000)[1].indices, minlength=1_000)[:10].sum() / 40_000
    assert drawn == pytest.approx(sum(task.frequency(c) for c in range(10)), rel=0.1)
    assert torch.equal(million.Planted(1_000, 256, seed=3).batch(300)[0], features)


def test_the_command(tmp_path, capsys):
    options = ["--classes", "60", "--width", "8", "--batch-size", "4", "--steps", "2", "--out", str(tmp_path)]
    assert cli.main(["demo-million", *options]) == 0
    assert "dense logits and targets in fp32 would add" in capsys.readouterr().out
    assert cli.main(["demo-million", "--steps", "0"]) == 2
    assert "--steps must be at least 1, got 0" in capsys.readouterr().err
