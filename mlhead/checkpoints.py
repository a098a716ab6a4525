"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a silent loss.

A file is written beside its target, flushed to the disk and then renamed over it, so the name always holds a whole
checkpoint, the old or the new. Reading checks every byte against the archive's checksums, which `torch.load` does not.
Several processes write a folder in place of a file, `mlhead._dcp`; whatever reads checkpoints reads both.
"""

from __future__ import annotations

import contextlib
import os
import random
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mlhead import _whole_folder
from mlhead._usage import UsageError

FORMAT = 1
NAMES = ("last", "best")
_KIND = "mlhead checkpoint"
_FOLDER = 0x10  # of the attributes of a record


class CheckpointError(UsageError):
    """A checkpoint that is missing, damaged, or of another kind; the message names the file and what to do."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that `path` holds either what it held before or all of the new content, never a part of it."""

    def write_file(temporary: Path) -> None:
        with temporary.open("wb") as file:
            write(file)

    replace_atomically(path, write_file)


def replace_atomically(path: Path, write_file: Callable[[Path], object]) -> None:
    """As `write_atomically`, for what is written by the name of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    os.close(handle)
    try:
        write_file(Path(name))
        with open(name, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's 0o600 would keep colleagues from reading a shared run
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _whole_folder.sync_folder(path.parent)


def remove_leftovers(folder: Path) -> list[Path]:
    """Deletes the unfinished files that a killed run left in a folder; returns what was deleted."""
    own = (*(f"{name}.pt" for name in NAMES), "log.jsonl", "log.csv")
    leftovers = sorted(path for name in own for path in folder.glob(f".{name}.*.part"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    for name in NAMES:
        _whole_folder.settle(folder / f"{name}.dcp")
    return leftovers


def find(folder: Path, name: str) -> Path | None:
    """The newest complete checkpoint of a name in the folder of a run, a file or a folder; None without one."""
    file, shards = folder / f"{name}.pt", folder / f"{name}.dcp"
    found = {file: file} if file.is_file() else {}
    if (complete := _whole_folder.complete(shards)) is not None:
        found[shards] = complete / _whole_folder.MARK
    return max(found, key=lambda path: found[path].stat().st_mtime_ns, default=None)


def remove(path: Path) -> None:
    """Deletes a checkpoint, if it is there."""
    if path.suffix == ".dcp":
        _whole_folder.remove(path)
    else:
        path.unlink(missing_ok=True)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Saves a state of tensors and plain Python values, atomically.

    Raises:
        CheckpointError: it could not be written, for example because the disk is full; what was there before still is.
    """
    try:
        write_atomically(path, lambda file: torch.save({"kind": _KIND, "format": FORMAT, **state}, file))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(not_written(path, error)) from error


def not_written(path: Path, reason: BaseException) -> str:
    """What to say where a checkpoint could not be written."""
    # A write to a full disk inside torch.save ends in torch's own error; the system's is the one that says why.
    cause: BaseException | None = reason
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    words = cause or reason
    why = str(words).strip().splitlines()[0] if str(words).strip() else type(words).__name__
    return f"checkpoint {path} could not be written: {why}; the one before it, if there was one, is as it was"


def load_checkpoint(path: Path, *, map_location: str | torch.device = "cpu", mmap: bool = False) -> dict[str, Any]:
    """Reads a checkpoint, every byte checked, without running code from the file.

    Args:
        path: of a file, or of a folder that several processes wrote.
        map_location: as of `torch.load`.
        mmap: whether a file's tensors stay in the file until they are used: for whoever needs a part of them.

    Raises:
        CheckpointError: no such file; damaged or cut short; not a checkpoint of mlhead; of a newer format.
    """
    if path.suffix == ".dcp":
        from mlhead import _dcp

        return _dcp.read(path)
    if path.is_dir():
        meant = find(path, "best") or path / "best.pt"
        raise CheckpointError(f"checkpoint must be a file, got the folder {path}; did you mean {meant}?")
    if not path.is_file():
        raise CheckpointError(f"checkpoint must be an existing file, got {path}")
    try:
        _check_records(path)
        state = torch.load(path, map_location=map_location, weights_only=True, mmap=mmap)
    except CheckpointError:
        raise
    except Exception as error:  # damage may end in any error of zipfile, pickle, codecs and torch
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise CheckpointError(damaged(path, f"{type(error).__name__}: {reason}")) from error
    if not isinstance(state, dict) or state.get("kind") != _KIND:
        raise CheckpointError(f"checkpoint must be written by mlhead train, got {path}, which holds something else")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint must be of format {FORMAT} or older, got {state['format']} in {path}: update mlhead"
        )
    return state


def _check_records(path: Path) -> None:
    """Reads every record of the archive, whose checksums zipfile compares, and what the archive says of the records."""
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            # torch stores records as they are; one that is marked otherwise it would take for empty, or leave unread.
            plain = record.compress_type == zipfile.ZIP_STORED and record.file_size == record.compress_size
            if not plain or record.is_dir() or record.external_attr & _FOLDER:
                raise CheckpointError(damaged(path, f"{record.filename} is not stored as it was written"))
            try:
                with archive.open(record) as file:
                    while file.read(1 << 20):
                        pass
            except zipfile.BadZipFile as error:
                reason = f"checksum of {record.filename} does not match" if "CRC" in str(error) else str(error)
                raise CheckpointError(damaged(path, reason)) from error


def damaged(path: Path, reason: str) -> str:
    """What to say of a checkpoint that does not hold what was written."""
    path = path.parent if path.name == _whole_folder.MARK else path
    others = [other for name in NAMES if (other := find(path.parent, name)) not in (None, path)]
    advice = f"try {others[0]} instead" if others else "restore it from a copy"
    return f"checkpoint {path} is damaged or cut short ({reason}); nothing was loaded; {advice}, or train again"


def seed_everything(seed: int) -> None:
    """Seeds every generator of which `random_state` keeps the state."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def random_state() -> dict[str, Any]:
    """The state of every global random generator that training may draw from, as tensors and plain values."""
    version, internal, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": {"version": version, "internal": list(internal), "gauss": gauss},
        "numpy": {
            "keys": torch.from_numpy(np.asarray(numpy_state[1]).astype(np.int64)),
            "rest": [int(numpy_state[2]), int(numpy_state[3]), float(numpy_state[4])],
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Puts back what `random_state` returned. CUDA generators are put back where as many devices are there."""
    python = state["python"]
    random.setstate((python["version"], tuple(python["internal"]), python["gauss"]))
    position, has_gauss, cached = state["numpy"]["rest"]
    np.random.set_state(("MT19937", state["numpy"]["keys"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda"]])
