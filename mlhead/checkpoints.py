"""Checkpoints that a kill, a full disk or a flipped bit cannot turn into a silent loss.

A file is written beside its target, flushed to the disk and then renamed over it, so the name always holds a whole
checkpoint, the old or the new. Reading checks every byte against the archive's checksums, which `torch.load` does not.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import random
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from mlhead._usage import UsageError

FORMAT = 1
_KIND = "mlhead checkpoint"


class CheckpointError(UsageError):
    """A checkpoint that is missing, damaged, or of another kind; the message names the file and what to do."""


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file so that `path` holds either what it held before or all of the new content, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)  # mkstemp's 0o600 would keep colleagues from reading a shared run
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Makes a rename in a folder durable, where the system can (Windows cannot open a folder)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> list[Path]:
    """Deletes the unfinished files that a killed process left in a folder; returns what was deleted."""
    leftovers = sorted(folder.glob(".*.part"))
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Saves a state of tensors and plain Python values, atomically."""
    write_atomically(path, lambda file: torch.save({"kind": _KIND, "format": FORMAT, **state}, file))


def load_checkpoint(path: Path, *, map_location: str | torch.device = "cpu") -> dict[str, Any]:
    """Reads a checkpoint of `save_checkpoint`, every byte checked, without running code from the file.

    Raises:
        CheckpointError: no such file; damaged or cut short; not a checkpoint of mlhead; of a newer format.
    """
    if path.is_dir():
        raise CheckpointError(f"checkpoint must be a file, got the folder {path}; did you mean {path / 'best.pt'}?")
    if not path.is_file():
        raise CheckpointError(f"checkpoint must be an existing file, got {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(_damaged(path, f"checksum of {damaged} does not match"))
        state = torch.load(path, map_location=map_location, weights_only=True)
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, EOFError, RuntimeError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(_damaged(path, f"{type(error).__name__}: {str(error).splitlines()[0]}")) from error
    if not isinstance(state, dict) or state.get("kind") != _KIND:
        raise CheckpointError(f"checkpoint must be written by mlhead train, got {path}, which holds something else")
    if state["format"] > FORMAT:
        raise CheckpointError(
            f"checkpoint must be of format {FORMAT} or older, got {state['format']} in {path}: update mlhead"
        )
    return state


def _damaged(path: Path, reason: str) -> str:
    others = [other for name in ("last.pt", "best.pt") if (other := path.parent / name) != path and other.is_file()]
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
