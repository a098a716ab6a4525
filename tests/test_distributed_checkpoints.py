"""Checkpoints of several processes: whole or absent, for any number of processes, the same run bit for bit."""

from __future__ import annotations

import enum
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import several_processes as several
import torch
from states import assert_same

from mlhead import _dcp, _whole_folder, checkpoints, inference
from mlhead._config import TrainConfig
from mlhead._runlog import read_log
from mlhead.checkpoints import CheckpointError, load_checkpoint
from mlhead.distributed import ALONE

for package in ("timm", "sklearn", "yaml", "safetensors"):
    pytest.importorskip(package)

pytestmark = pytest.mark.usefixtures("one_thread")

EVERYTHING = ("model", "ema", "optimizer", "schedule", "scaler", "own", "step", "loss_count", "best", "metrics")


# Several processes


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Where four processes have begun a run that three and two have ended, and two have run all else."""
    out = tmp_path_factory.mktemp("runs")
    several.run(out / "from_one", several.MOVED, stop=3)
    # Of two processes every order of a sum gives the same bits, of four it does not.
    more = "2 end:on_two end:from_one lively:fsdp full_disk undisturbed"
    several.launch(out, "4 begin:from_four lively:ddp", "3 end:on_three", more)
    return out


@pytest.mark.parametrize("name", several.LIVELIES)
def test_a_resumed_run_is_the_same_bit_for_bit(out, name):
    """With dropout, batch norm, AdamW and a moving average."""
    a, b = (load_checkpoint(out / name / part / "last.dcp") for part in ("whole", "part"))
    for part in EVERYTHING:
        if part != "best":  # the first of the two parts ends with an evaluation
            assert_same(a[part], b[part], part)
    random = [own["random"]["torch"] for own in a["own"]]
    assert not any(torch.equal(random[0], other) for other in random[1:]), "they drop out the same elements"
    logged = [
        [r["loss"] for r in read_log(out / name / part / "log.jsonl") if r["kind"] == "train"]
        for part in ("whole", "part")
    ]
    assert logged[0] == logged[1]
    assert len(logged[0]) == several.LIVELY["steps"]


@pytest.mark.parametrize(
    ("name", "form"), [("on_three", "dcp"), ("on_two", "dcp"), ("on_one", "pt"), ("from_one", "dcp")]
)
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, out, name, form):
    """Begun on four (by shards, with the classes shared out) or on one, ended on three, two or one."""
    from mlhead import train

    if name == "on_one":
        train.resume(out / name)
    several.run(tmp_path / "whole", several.MOVED)
    several.run(tmp_path / "halves", {**several.MOVED, "batch_size": 6, "accumulate": 2})
    a, b = (load_checkpoint(tmp_path / part / "last.pt") for part in ("whole", "halves"))
    c = load_checkpoint(out / name / f"last.{form}")
    assert c["step"] == 5
    for part in ("model", "ema"):
        assert a[part].keys() == c[part].keys()
        rounding = max((a[part][n] - b[part][n]).abs().max().item() for n in a[part])
        allowed = 8 * max(rounding, torch.finfo(torch.float32).eps)  # as in test_distributed_training
        assert max((a[part][n] - c[part][n]).abs().max().item() for n in a[part]) <= allowed
    assert {p.name for p in (out / name).iterdir() if p.name.startswith(("last", ".last"))} == {f"last.{form}"}


def test_one_process_reads_exports_and_measures(out, tmp_path):
    """Without a process group: the model of four processes is that of the checkpoint, from either form."""
    path, exported = out / "from_four/last.dcp", tmp_path / "model.safetensors"
    inference.export_model(path, exported)
    inference.export_model(path, tmp_path / "plain.safetensors", weights="model")
    state = load_checkpoint(path)
    models = [inference.load_model(p, device="cpu").model.state_dict() for p in (path, exported)]
    assert_same(dict(models[0]), dict(models[1]))
    assert_same(state["ema"], dict(models[1]))
    plain = inference.load_model(tmp_path / "plain.safetensors", device="cpu")
    assert_same(state["model"], dict(plain.model.state_dict()))
    assert plain.class_names == state["class_names"]
    assert state["model"]["head.duplicate_pooling_bias"].shape == (10,)
    measured = [inference.evaluate_checkpoint(p, device="cpu") for p in (path, exported)]
    assert measured[0] == measured[1]
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(checkpoints.UsageError, match=r"--weights must be 'model', the weights that .*plain"):
        inference.load_model(tmp_path / "plain.safetensors", weights="ema")
    exported.write_bytes(exported.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut short"):
        inference.load_model(exported)


def test_a_full_disk_on_one_process_is_named_by_all(out):
    for said, intact, names in json.loads((out / "full_disk.json").read_text()):
        assert "last.dcp could not be written: [Errno 27]" in said
        assert "the one before it, if there was one, is as it was (process 1)" in said
        assert intact
        assert names == ["last.dcp"]


def workers(agent: int) -> dict[int, int]:
    """The ids of the processes that torchrun has started, by rank."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == agent:
                words = (entry / "environ").read_bytes().split(b"\0")
                found |= {int(w[5:]): int(entry.name) for w in words if w.startswith(b"RANK=")}
        except OSError:  # it has just ended
            continue
    return found


def test_torchrun_recovers_from_kill_9_by_itself(out, tmp_path):
    """At whatever moment: with a checkpoint after every step often while it saves, here the process that ends that."""
    run, config = tmp_path / "run", tmp_path / "config.yaml"
    TrainConfig(**several.KILLED, out=str(run)).save(config)
    command = [*several.torchrun(2, "--max-restarts=3"), "-m", "mlhead", "train", "--config", str(config)]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            command, cwd=several.ROOT, env=several.environment(), stdout=said, stderr=said, start_new_session=True
        )
        try:
            wait_for_step(run, 7, process, tmp_path / "said")
            os.kill(workers(process.pid)[0], signal.SIGKILL)
            assert process.wait(timeout=120) == 0, (tmp_path / "said").read_text()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    assert "resuming" in (tmp_path / "said").read_text()
    a, b = load_checkpoint(out / "undisturbed/last.dcp"), load_checkpoint(run / "last.dcp")
    for part in EVERYTHING:
        assert_same(a[part], b[part], part)
    steps = [r["step"] for r in read_log(run / "log.jsonl") if r["kind"] == "train"]
    assert steps == list(range(1, several.KILLED["steps"] + 1))
    assert not list(run.glob(".*"))


def wait_for_step(run: Path, step: int, process: subprocess.Popen, said: Path) -> None:
    deadline = time.monotonic() + 120
    while not any(record["step"] >= step for record in read_log(run / "log.jsonl")):
        assert process.poll() is None, said.read_text()
        assert time.monotonic() < deadline, said.read_text()
        time.sleep(0.002)


# One process


def state(step):
    """With a tensor of each kind of place, of which everything follows from the step."""
    parts = {"model": {"w": torch.full((300,), float(step)), "half": torch.full((2, 3), float(step)).bfloat16()}}
    groups = [{"params": ["w"], "lr": 0.1, "betas": (0.9, 0.99), "part": "head"}]
    optimizer = {
        "state": {"w": {"step": torch.tensor(float(step)), "exp_avg": torch.ones(300)}},
        "param_groups": groups,
    }
    return {"step": step, **parts, "ema": None, "optimizer": optimizer, "class_names": ["a", "b"]}


def test_a_folder_gives_back_what_was_saved(tmp_path):
    path = tmp_path / "last.dcp"
    _dcp.save(path, state(3), {"loss_sum": 0.5}, ALONE)
    loaded = load_checkpoint(path)
    assert_same({name: loaded[name] for name in state(3)}, state(3))
    assert loaded["own"] == [{"loss_sum": 0.5}]
    plain = _dcp.read_plain(path)
    assert plain["class_names"] == ["a", "b"]
    assert not isinstance(plain["model"]["w"], torch.Tensor)


class Killed(BaseException):
    """Stands for kill -9: nothing that comes after it happens."""


def test_a_kill_before_any_change_of_the_disk_leaves_a_whole_checkpoint(tmp_path, monkeypatch):
    """Saving is ended before its 1st, 2nd, 3rd ... change of names, with folders half deleted; so is clearing up."""
    left, real = [0], (os.rename, os.replace, shutil.rmtree, Path.unlink)

    def counted(function, halfway=None):
        def call(*arguments, **options):
            left[0] -= 1
            if left[0] < 0:
                if halfway is not None:
                    halfway(*arguments)
                raise Killed
            return function(*arguments, **options)

        return call

    def half_deleted(folder, **options):
        for file in sorted(Path(folder).glob("*"))[::2] if Path(folder).is_dir() else []:
            os.unlink(file)

    path, kills = tmp_path / "last.dcp", 0
    _dcp.save(path, state(1), {}, ALONE)
    for number in range(100):
        with monkeypatch.context() as patched:
            left[0] = number
            patched.setattr(os, "rename", counted(real[0]))
            patched.setattr(os, "replace", counted(real[1]))
            patched.setattr(shutil, "rmtree", counted(real[2], half_deleted))
            patched.setattr(Path, "unlink", counted(real[3]))
            before = kills
            try:
                _dcp.save(path, state(number + 2), {}, ALONE)
                _whole_folder.settle(path)
            except (Killed, _dcp.CheckpointException):
                kills += 1
        found = load_checkpoint(path)  # before anything is cleared up
        assert found["step"] in (number + 1, number + 2)
        assert (found["model"]["w"] == found["step"]).all()
        assert checkpoints.find(tmp_path, "last") == path
        checkpoints.remove_leftovers(tmp_path)
        assert load_checkpoint(path)["step"] == found["step"]
        assert [p.name for p in tmp_path.iterdir()] == ["last.dcp"]
        if kills == before:
            break
        _dcp.save(path, state(number + 2), {}, ALONE)
    assert kills > 8


def test_every_damage_to_a_folder_is_found(tmp_path):
    whole, path = tmp_path / "whole/last.dcp", tmp_path / "run/last.dcp"
    _dcp.save(whole, state(1), {}, ALONE)
    names = sorted(p.name for p in whole.iterdir())
    assert names == [".metadata", "__0_0.distcp", "run.pt"]
    for name in names:
        for damage in ("flip", "cut", "remove"):
            shutil.rmtree(path, ignore_errors=True)
            shutil.copytree(whole, path)
            content = bytearray((path / name).read_bytes())
            if damage == "remove":
                (path / name).unlink()
            else:
                # In a zip archive, not into what fills it up between the parts.
                content[content.index(b"class_names") if name == "run.pt" else len(content) // 2] ^= 1
                (path / name).write_bytes(bytes(content if damage == "flip" else content[:-7]))
            missing = name == "run.pt" and damage == "remove"
            words = r"must be a folder that holds run\.pt" if missing else r"last\.dcp is damaged or cut short"
            with pytest.raises(CheckpointError, match=words):
                load_checkpoint(path)
    checkpoints.save_checkpoint(path.parent / "best.pt", {"step": 0})
    with pytest.raises(CheckpointError, match=r"must be a folder that holds run\.pt, got .*last\.dcp"):
        load_checkpoint(path)


class Colour(enum.Enum):
    """Python 3.11.0 to 3.11.3 pickle a member as getattr(Colour, "RED")."""

    RED = 1


class Code:
    """Unpickling it runs a command."""

    def __reduce__(self):
        return os.system, ("echo run",)


def test_metadata_run_no_code(tmp_path):
    for pickled in (pickle.dumps(Code()), b"ctorch.distributed.checkpoint.filesystem\nos.system\n(S'echo run'\ntR."):
        (tmp_path / ".metadata").write_bytes(pickled)
        with pytest.raises(pickle.UnpicklingError, match=r"system has no place in a checkpoint"):
            _dcp._Reader(tmp_path).read_metadata()
    found = _dcp._Unpickler(io.BytesIO()).find_class("builtins", "getattr")
    assert found(Colour, "RED") is Colour.RED
    for kind, name in ((Colour, "__class__"), (os, "system")):
        with pytest.raises(pickle.UnpicklingError, match="has no place in a checkpoint"):
            found(kind, name)


def test_the_newest_form_is_taken(tmp_path):
    assert checkpoints.find(tmp_path, "last") is None
    checkpoints.save_checkpoint(tmp_path / "last.pt", {"step": 1})
    assert checkpoints.find(tmp_path, "last") == tmp_path / "last.pt"
    _dcp.save(tmp_path / "last.dcp", state(2), {}, ALONE)
    os.utime(tmp_path / "last.pt", (1, 1))
    assert checkpoints.find(tmp_path, "last") == tmp_path / "last.dcp"
    os.utime(tmp_path / "last.dcp/run.pt", (0, 0))
    assert checkpoints.find(tmp_path, "last") == tmp_path / "last.pt"
    checkpoints.remove(tmp_path / "last.pt")
    checkpoints.remove(tmp_path / "last.dcp")
    assert not list(tmp_path.iterdir())
