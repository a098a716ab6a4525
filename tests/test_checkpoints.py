"""Checkpoints: whole or absent, every damaged byte found, random states exact."""

from __future__ import annotations

import errno
import io
import os
import random
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from mlhead.checkpoints import (
    CheckpointError,
    load_checkpoint,
    random_state,
    remove_leftovers,
    save_checkpoint,
    set_random_state,
    write_atomically,
)

ROOT = Path(__file__).resolve().parent.parent


def test_round_trip(tmp_path):
    state = {
        "step": 7,
        "model": {"w": torch.randn(3, 4), "half": torch.randn(5).bfloat16()},
        "config": {"lr": 0.1, "n": None},
    }
    save_checkpoint(tmp_path / "deep/er/last.pt", state)
    got = load_checkpoint(tmp_path / "deep/er/last.pt")
    assert torch.equal(got["model"]["w"], state["model"]["w"])
    assert torch.equal(got["model"]["half"], state["model"]["half"])
    assert got["config"] == state["config"]
    assert [p.name for p in (tmp_path / "deep/er").iterdir()] == ["last.pt"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1})

    def fail_halfway(file):
        file.write(b"half of a checkpoint")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_atomically(path, fail_halfway)
    assert load_checkpoint(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("inside", [False, True])
def test_a_full_disk_is_named_and_leaves_the_old_checkpoint(tmp_path, monkeypatch, inside):
    """Whether the system refuses a write or, at last, the flush to the disk."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1, "w": torch.zeros(10)})

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Full(io.FileIO):
        def write(self, data):
            return super().write(data) if self.tell() < 4096 else full()

    if inside:
        monkeypatch.setattr(Path, "open", lambda self, mode: Full(self, mode))
    else:
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        CheckpointError, match=r"last\.pt could not be written: .*No space left on device; the one before"
    ):
        save_checkpoint(path, {"step": 2, "w": torch.zeros(100_000)})
    monkeypatch.undo()
    assert load_checkpoint(path)["step"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_kill_during_writing_leaves_a_whole_checkpoint(tmp_path):
    path = tmp_path / "last.pt"
    program = (
        "import torch, sys\nfrom pathlib import Path\nfrom mlhead.checkpoints import save_checkpoint\n"
        "for step in range(10**6):\n"
        "    save_checkpoint(Path(sys.argv[1]), {'step': step, 'w': torch.full((300_000,), float(step))})"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    state = load_checkpoint(path)
    assert (state["w"] == float(state["step"])).all()
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_every_flipped_byte_is_found(tmp_path):
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1, "w": torch.arange(4000.0)})
    good = path.read_bytes()
    at = good.index(torch.arange(4000.0).numpy().tobytes()[:4000])
    for position in (at, at + 7777, at + 15_999):
        damaged = bytearray(good)
        damaged[position] ^= 0x10
        path.write_bytes(bytes(damaged))
        assert not torch.equal(
            torch.load(path, weights_only=True)["w"], torch.arange(4000.0)
        )  # torch alone says nothing
        with pytest.raises(
            CheckpointError, match=r"last\.pt is damaged or cut short \(checksum of .* restore it from a copy"
        ):
            load_checkpoint(path)


def test_a_flipped_bit_outside_of_the_tensors_is_found_or_changes_nothing(tmp_path):
    """Names, sizes, attributes and places of the records, which no checksum covers."""
    path, w = tmp_path / "last.pt", torch.arange(64.0)
    save_checkpoint(path, {"step": 1, "w": w})
    good = path.read_bytes()
    at = good.index(w.numpy().tobytes())
    bits = random.Random(0)
    refused = 0
    for position in [*range(at), *range(at + w.nbytes, len(good))]:
        damaged = bytearray(good)
        damaged[position] ^= 1 << bits.randrange(8)
        path.write_bytes(damaged)
        try:
            state = load_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:
            assert state["step"] == 1
            assert torch.equal(state["w"], w)
    assert refused > 500


@pytest.mark.parametrize("attribute", range(8))
def test_a_record_marked_as_a_folder_is_refused(tmp_path, attribute):
    """Torch would not read it and give whatever is in memory."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"w": torch.arange(64.0)})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    record = content.index(b"data/0", directory)
    place = content.rindex(b"PK\x01\x02", directory, record) + 38  # of the external attributes
    content[place] ^= 1 << attribute
    path.write_bytes(content)
    if attribute == 4:
        with pytest.raises(CheckpointError, match=r"data/0 is not stored as it was written\); nothing was loaded"):
            load_checkpoint(path)
    else:
        assert torch.equal(load_checkpoint(path)["w"], torch.arange(64.0))


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_cut_file_is_refused_and_the_other_one_named(tmp_path, keep):
    save_checkpoint(tmp_path / "best.pt", {"step": 1})
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 2, "w": torch.randn(1000)})
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(CheckpointError, match=r"last\.pt is damaged.*nothing was loaded; try .*best\.pt instead"):
        load_checkpoint(path)


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="must be an existing file, got"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"got the folder .* did you mean .*best\.pt"):
        load_checkpoint(tmp_path)
    torch.save({"w": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"written by mlhead train, got .*weights\.pt"):
        load_checkpoint(tmp_path / "weights.pt")
    torch.save(random.Random(0), tmp_path / "object.pt")  # unpickling an arbitrary object would run its code
    with pytest.raises(CheckpointError, match="nothing was loaded"):
        load_checkpoint(tmp_path / "object.pt")
    save_checkpoint(tmp_path / "new.pt", {"format": 99})
    with pytest.raises(CheckpointError, match="update mlhead"):
        load_checkpoint(tmp_path / "new.pt")


def test_random_states_survive_a_checkpoint(tmp_path):
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    np.random.randn()  # leaves a cached second normal number, part of the state
    random.gauss(0, 1)
    save_checkpoint(tmp_path / "r.pt", {"random": random_state()})
    want = random.gauss(0, 1), random.random(), np.random.randn(), np.random.randn(), torch.randn(5)
    set_random_state(load_checkpoint(tmp_path / "r.pt")["random"])
    got = random.gauss(0, 1), random.random(), np.random.randn(), np.random.randn(), torch.randn(5)
    assert want[:4] == got[:4]
    assert torch.equal(want[4], got[4])
