"""A checkpoint of several processes: a folder by torch.distributed.checkpoint, whole or absent like the file of one.

    last.dcp/__0_0.distcp, __1_0.distcp, ...   the tensors, by the process that wrote them; .metadata: what is where
    last.dcp/run.pt                            all else, and the size and checksum of every other file

Once all processes have flushed their files to the disk, the first one writes run.pt, which makes the folder complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pickle
import warnings
import zlib
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.tensor import DTensor, distribute_tensor

from mlhead import checkpoints
from mlhead._whole_folder import MARK, beside, complete, put_in_place, remove, sync_folder
from mlhead.checkpoints import CheckpointError
from mlhead.distributed import ALONE, Processes

T = TypeVar("T")

_SLOT = "tensor in the shards"


def save(
    path: Path,
    state: dict[str, Any],
    own: dict[str, Any],
    processes: Processes,
    shapes: dict[str, tuple[int, ...]] | None = None,
) -> None:
    """Saves a checkpoint; every process of the run calls it.

    Args:
        path: of the folder.
        state: nested dictionaries and lists of tensors and plain values, the same on every process but for the parts of
            DTensors.
        own: plain values and small tensors that each process keeps for itself.
        processes: of the run.
        shapes: of parameters that lie on the processes with zeros at the end: by name, their shape without.

    Raises:
        CheckpointError: any of them could not write; all raise it, and what was there before is as it was.
    """
    folder = beside(path)
    plain, tensors = split(state, "")
    try:
        _together(path, processes, lambda: _empty(folder) if processes.is_main else None)
        with _quiet():
            dcp.save(tensors, storage_writer=_Writer(path, processes), process_group=processes.group)
        written = _together(path, processes, lambda: _flushed(folder, processes))
        files = {name: facts for part in written for name, facts in part.items()}
        everything = {**plain, "files": files, "own": processes.gather(own), "shapes": _shapes(tensors, shapes or {})}
        _together(path, processes, lambda: _finish(path, everything) if processes.is_main else None)
    except (CheckpointError, CheckpointException) as error:
        if processes.is_main:
            remove(folder)
        if isinstance(error, CheckpointError):
            raise
        rank, (reason, _) = min(error.failures.items())
        known = isinstance(reason, CheckpointError)
        raise CheckpointError(str(reason) if known else _not_written(path, rank, reason)) from error


def _shapes(tensors: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, tensor in tensors.items():
        for parameter, shape in shapes.items():
            if parameter in name.split("/") and tensor.ndim > 0:
                found[name] = shape
    return found


def _empty(folder: Path) -> None:
    remove(folder)
    folder.mkdir(parents=True)


def _flushed(folder: Path, processes: Processes) -> dict[str, tuple[int, int]]:
    """Size and checksum of the files that this process wrote, once they are on the disk."""
    names = [*folder.glob(f"__{processes.rank}_*"), *([folder / ".metadata"] if processes.is_main else [])]
    found = {}
    for name in names:
        with name.open("rb+") as file:
            found[name.name] = (name.stat().st_size, _checksum(file))
            os.fsync(file.fileno())
    return found


def _checksum(file: Any) -> int:
    value = 0
    while piece := file.read(1 << 22):
        value = zlib.crc32(piece, value)
    return value


def _finish(path: Path, everything: dict[str, Any]) -> None:
    folder = beside(path)
    sync_folder(folder)
    checkpoints.save_checkpoint(folder / MARK, everything)
    put_in_place(path)


def _together(path: Path, processes: Processes, work: Callable[[], T]) -> list[T]:
    """What `work` gives on each process; where it fails on any, all raise the same error."""
    result: Any = None
    failure = None
    try:
        result = work()
    except CheckpointError as error:
        failure = str(error)
    except (OSError, RuntimeError) as error:
        failure = _not_written(path, processes.rank, error)
    outcomes = processes.gather((result, failure))
    for _, failed in outcomes:
        if failed is not None:
            raise CheckpointError(failed)
    return [value for value, _ in outcomes]


def _not_written(path: Path, rank: int, reason: BaseException) -> str:
    return checkpoints.not_written(path, reason) + f" (process {rank})"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's warnings that there is a single process, and others for those who work on torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def split(tree: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    """A tree with names in the place of its tensors, and the tensors by name."""
    if isinstance(tree, Tensor):
        return {_SLOT: name}, {name: tree}
    if not isinstance(tree, dict | list | tuple):
        return tree, {}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    parts = {key: split(value, f"{name}/{key}" if name else str(key)) for key, value in items}
    tensors = {inner: tensor for _, found in parts.values() for inner, tensor in found.items()}
    plain = {key: value for key, (value, _) in parts.items()}
    return (plain if isinstance(tree, dict) else type(tree)(plain.values())), tensors


def joined(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree of which `split` made these."""
    if isinstance(tree, dict):
        if set(tree) == {_SLOT}:
            return tensors[tree[_SLOT]]
        return {key: joined(value, tensors) for key, value in tree.items()}
    return type(tree)(joined(value, tensors) for value in tree) if isinstance(tree, list | tuple) else tree


def read_plain(path: Path) -> dict[str, Any]:
    """A checkpoint without its tensors: names stand in their place, see `joined`.

    Raises:
        CheckpointError: there is no complete checkpoint, or it is damaged.
    """
    folder = complete(path)
    if folder is None:
        raise CheckpointError(f"checkpoint must be a folder that holds {MARK}, got {path}")
    return checkpoints.load_checkpoint(folder / MARK)


def load(path: Path, plain: dict[str, Any], targets: dict[str, Tensor], processes: Processes) -> set[str]:
    """Fills tensors, whole ones or DTensors, from a checkpoint; every process of the run calls it.

    Args:
        path: of the folder.
        plain: what `read_plain` gave.
        targets: by their names in the checkpoint; names that it does not have are left out.
        processes: of the run.

    Returns:
        The names of the tensors that were filled.

    Raises:
        CheckpointError: a file is missing or damaged, as any of the processes sees it; or a tensor has another shape.
    """
    folder = complete(path) or path
    _together(path, processes, lambda: _check_files(folder, plain["files"], processes))
    reader = _Reader(folder)
    stored = {name: meta for name, meta in _stored(path, reader).items() if name in targets}
    chosen = {}
    for name, meta in stored.items():
        same = meta.size == targets[name].shape
        chosen[name] = targets[name] if same else torch.empty(meta.size, dtype=targets[name].dtype)
        if meta.size != targets[name].shape and len(meta.size) == targets[name].ndim:
            got = f"{tuple(meta.size)} in {path}"
            raise CheckpointError(f"checkpoint must have {name} of shape {tuple(targets[name].shape)}, got {got}")
    if not chosen:
        return set()
    try:
        with _quiet():
            dcp.load(chosen, storage_reader=reader, process_group=processes.group, no_dist=processes.world == 1)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(checkpoints.damaged(path, _first_line(error))) from error
    for name, tensor in chosen.items():
        if tensor is not targets[name]:
            fill(targets[name], tensor)
    return set(chosen)


def fill(target: Tensor, whole: Tensor) -> None:
    """Puts a whole tensor into one of its shape or, of one axis, into one with zeros at the end; maybe a DTensor."""
    if whole.shape != target.shape:
        flat = whole.flatten()[: target.numel()]
        whole = torch.cat([flat, flat.new_zeros(target.numel() - len(flat))]).view(target.shape)
    if isinstance(target, DTensor):
        parts = distribute_tensor(whole.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        target, whole = target.to_local(), parts.to_local()
    target.copy_(whole)


def read(path: Path) -> dict[str, Any]:
    """A whole checkpoint in one process, which need not be one of a group."""
    plain, folder = read_plain(path), complete(path) or path
    _check_files(folder, {name: facts for name, facts in plain["files"].items() if name == ".metadata"}, ALONE)
    stored = _stored(path, _Reader(folder))
    tensors = {name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in stored.items()}
    load(path, plain, tensors, ALONE)
    for name, shape in plain["shapes"].items():
        tensors[name] = tensors[name].flatten()[: math.prod(shape)].view(shape)
    return joined(plain, tensors)


def _stored(path: Path, reader: _Reader) -> dict[str, TensorStorageMetadata]:
    try:
        metadata = reader.read_metadata().state_dict_metadata
    except (pickle.UnpicklingError, OSError, EOFError, AttributeError, ImportError, TypeError, ValueError) as error:
        raise CheckpointError(checkpoints.damaged(path, _first_line(error))) from error
    return {name: meta for name, meta in metadata.items() if isinstance(meta, TensorStorageMetadata)}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"


def _check_files(folder: Path, files: dict[str, tuple[int, int]], processes: Processes) -> None:
    """That this process's share of the files is as it was written."""
    for name in sorted(files)[processes.rank :: processes.world]:
        size, checksum = files[name]
        path = folder / name
        try:
            with path.open("rb") as file:
                whole = path.stat().st_size == size and _checksum(file) == checksum
        except OSError as error:
            raise CheckpointError(checkpoints.damaged(folder, str(error))) from error
        if not whole:
            raise CheckpointError(checkpoints.damaged(folder, f"checksum of {name} does not match"))


class _Writer(dcp.FileSystemWriter):
    """Torch's writer, whose error says why: what caused it is lost on its way to the other processes."""

    def __init__(self, path: Path, processes: Processes) -> None:
        super().__init__(beside(path))
        self._target, self._processes = path, processes

    def write_data(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().write_data(*args, **kwargs)
        except (OSError, RuntimeError) as error:
            raise CheckpointError(_not_written(self._target, self._processes.rank, error)) from error


class _Unpickler(pickle.Unpickler):
    """Makes what torch's metadata consist of, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11 before 3.11.4 writes members of enumerations
            return _member
        if "." not in name:
            found = super().find_class(module, name)
            if (module, name) in _PLAIN or isinstance(found, torch.dtype):
                return found
            data = isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, Enum))
            if data and module.startswith("torch.distributed.checkpoint.") and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")


def _member(kind: Any, name: str) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, Enum)) or name not in kind.__members__:
        raise pickle.UnpicklingError(f"{name!r} of {kind!r} has no place in a checkpoint")
    return kind[name]


_PATHS = ("PosixPath", "WindowsPath")
_PLAIN = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    *(("pathlib", name) for name in _PATHS),
    *(("pathlib._local", name) for name in _PATHS),
}


class _Reader(dcp.FileSystemReader):
    """Torch's reader, but for metadata that hold code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (Path(self.path) / ".metadata").open("rb") as file:
            return _Unpickler(file).load()
