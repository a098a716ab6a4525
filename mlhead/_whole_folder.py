"""A folder that is there whole or not at all: what a rename does for a file, for a folder of several processes.

It is written beside its place, as .NAME.new. `MARK`, written last, makes it complete, and `put_in_place` puts it where
the one before is. Whoever is killed at whatever moment, one of the folders is complete; `complete` finds it, and
`settle` puts it where it belongs.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

MARK = "run.pt"


def beside(path: Path) -> Path:
    """Where the new folder is written."""
    return path.with_name(f".{path.name}.new")


def _before(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def complete(path: Path) -> Path | None:
    """The newest complete folder of this name, or None."""
    return next((folder for folder in (beside(path), path, _before(path)) if (folder / MARK).is_file()), None)


def settle(path: Path) -> None:
    """Ends what a killed process has left half done: the newest complete folder alone remains, at `path`."""
    newest = complete(path)
    if newest == beside(path):
        put_in_place(path)
    elif newest == _before(path):
        remove(path)
        os.rename(newest, path)
    for leftover in (beside(path), _before(path)):
        remove(leftover)


def put_in_place(path: Path) -> None:
    """Puts the new folder, which is complete, in the place of the one before, which is deleted."""
    before = _before(path)
    remove(before)
    if path.exists():
        os.rename(path, before)
    os.rename(beside(path), path)
    sync_folder(path.parent)
    remove(before)


def remove(folder: Path) -> None:
    """Deletes a folder if it is there; from the beginning on it does not count as complete."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        (folder / MARK).unlink()
    shutil.rmtree(folder, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Makes a rename in a folder durable, where the system can (Windows cannot open a folder)."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
