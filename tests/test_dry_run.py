"""What a dry run says of runs on several devices, against what their first process has."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import spread_sizes as sizes

from mlhead import building, cli, distributed, dry_run
from mlhead._config import TrainConfig
from mlhead._resident import peak

pytest.importorskip("timm")
pytest.importorskip("yaml")


RUNS = {**sizes.COUNTED, **sizes.MEASURED}


def plan(options, processes=sizes.WORLD):
    config = TrainConfig(data="none", **options)
    return dry_run.plan(config, given_classes=True, given_data=False, processes=processes)


@functools.cache
def said_of(name):
    """Bytes of a run, by what holds them."""
    return plan(RUNS[name]).bytes


@pytest.fixture(scope="module")
def found():
    """What a process that shards models has counted and measured."""
    # What is freed goes back to the system at once, so that what is resident is alive.
    quick_return = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    tests = Path(__file__).resolve().parent
    environment = {**os.environ, **quick_return, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tests.parent)}
    command = [sys.executable, str(tests / "spread_sizes.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", sizes.COUNTED)
def test_weights_gradients_and_state_are_those_of_the_first_process(name, found):
    said, counted = said_of(name), found["counted"][name]
    assert said["weights"] == said["moving average"] == counted["weights"] + counted["buffers"]
    assert said["gradients"] == counted["gradients"]
    assert said["state of adamw"] == counted["state"]


@pytest.mark.parametrize("head", sizes.HEADS)
def test_what_comes_from_other_devices_is_kept_for_backward(head, found):
    one, four = (f"{head} ddp {classes}" for classes in (1, 4))
    said = said_of(four)["exchanged features"]
    kept = said / 2  # the rest is its gradient
    more = found["counted"][four]["saved"] - found["counted"][one]["saved"]
    # What this device gave may be alive beside what came for it; of a decoder, whose groups do not come in
    # fours, that is not a quarter.
    own = 4 * sizes.IMAGES * 10 * 64 if head == "decoder" else kept / 4
    # A class in fp32 that fills the last shard, in both heads of CSRA, for all images; of words, their queries.
    slack = 4 * 80 * 64 if "word" in head else 4 * 2 * sizes.WORLD * sizes.IMAGES
    assert kept - own - slack <= more <= kept + slack


@pytest.mark.skipif(not peak(), reason="needs the peak of Linux's /proc")
@pytest.mark.parametrize("kind", sizes.MEASURED)
def test_the_sum_is_what_a_step_takes(kind, found):
    predicted, measured = sum(said_of(kind).values()), found["measured"][kind]
    # FSDP does not have all of two blocks at once: at least one, and the estimate says two.
    one_block = 2 * 4 * (12 * 384**2 + 13 * 384) if kind == "fsdp" else 0
    assert predicted - one_block - 0.05 * measured <= measured <= predicted + 0.05 * measured


def test_classes_divide_the_head_whoever_counts():
    """By hand: 1003 classes on four devices are 251 on the first, of 96 features and a bias in fp32."""
    options = sizes.COUNTED["gap ddp 4"]
    shared, whole = plan(options), plan({**options, "class_parallel": 1})
    assert (shared.devices, shared.images, shared.here) == (4, 8, 251)
    assert (whole.devices, whole.images, whole.here) == (4, 8, 1003)
    width = whole.head // 1003 - 1
    for name in ("weights", "gradients"):
        assert whole.bytes[name] - shared.bytes[name] == 4 * (width + 1) * (1003 - 251)
    # Logits of 8 images in all classes, of 32 in those that are here.
    assert shared.bytes["logits and loss"] == 8 * 1003 * 12 + 2 * 4 * 32 * 251
    alone = plan({**options, "class_parallel": 1, "parallel": None}, processes=1)
    assert (alone.devices, alone.images, alone.here) == (1, 32, 1003)
    assert not {"buckets of ddp", "gathered by fsdp", "exchanged features"} & alone.bytes.keys()


def test_the_report_says_for_how_many_devices(capsys, monkeypatch):
    arguments = ["train", "--dry-run", "--data", "none", "--num-classes", "100", "--backbone", "test_resnet"]
    arguments += ["--head", "gap", "--image-size", "40", "--batch-size", "48"]

    def said():
        assert cli.main(arguments) == 0
        return capsys.readouterr().out

    assert "memory of a step of 48 images on one device, an estimate without temporaries of the optimizer" in said()
    arguments += ["--class-parallel", "3"]
    text = said()
    assert "memory of a step of 48 images on one of 3 devices, 16 on each, an estimate" in text
    assert re.search(r"\n  classes here +34\n", text)  # of 100
    monkeypatch.setattr(distributed, "launched", lambda: contextlib.nullcontext(distributed.Processes(world=6)))
    text = said()
    assert "memory of a step of 48 images on one of 6 devices, 8 on each, an estimate" in text
    assert re.search(r"\n  classes here +34\n", text)
    arguments[-1] = "4"
    assert cli.main(arguments) == 2
    assert "--class-parallel must be a divisor of 6, the number of processes, got 4" in capsys.readouterr().err


def test_a_weight_that_is_updated_inside_backward_has_no_gradient():
    """Its states stay, and blocks take scratch."""
    options = {"head": "gap", "num_classes": 50_000, "fused_loss": True, "device": "cpu"}
    apart, inside = (plan({**options, "fused_update": on}, processes=1) for on in (False, True))
    weight = 4 * (apart.head - 50_000)
    assert apart.bytes["gradients"] - inside.bytes["gradients"] == weight
    assert apart.bytes["state of adamw"] == inside.bytes["state of adamw"] + 4 > 2 * weight  # a counter of steps
    assert 0 < inside.bytes["logits and loss"] - apart.bytes["logits and loss"] < 0.25 * weight + 2**23


@pytest.mark.parametrize("fused_update", [False, True])
@pytest.mark.parametrize("head", ["gap", "ml_decoder"])
def test_the_loss_in_the_head_has_copies_in_the_dtype_of_amp(head, fused_update):
    """Of the classes' weight, bias and features, in 2 bytes a number; CSRA's are not counted."""
    options = {"head": head, "num_classes": 50_000, "fused_loss": True, "fused_update": fused_update, "device": "cpu"}
    plain, half = (plan({**options, "amp": amp}, processes=1) for amp in ("none", "bf16"))
    model = building.build_model(TrainConfig(data="none", **options), 50_000, 3)
    weight = model.head.class_parameter
    features = 64 * weight.shape[1] * (weight.shape[0] if weight.ndim == 3 else 1)
    more = half.bytes["logits and loss"] - plain.bytes["logits and loss"]
    assert more == 2 * (weight.numel() + 50_000 + features)
    eager = {**options, "fused_loss": False, "fused_update": False}
    plain, half = (plan({**eager, "amp": amp}, processes=1) for amp in ("none", "bf16"))
    assert plain.bytes["logits and loss"] == half.bytes["logits and loss"]
