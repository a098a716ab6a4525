"""Reading public checkpoints without running code from them, and the one message for those that do not fit."""

from __future__ import annotations

import os
import re
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from . import _check
from ._public_keys import Found, find, state_dicts
from ._usage import UsageError, closest, require
from .checkpoints import CheckpointError

# What a download that went wrong most often is.
_BEGINNINGS = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"RIFF": "a WebP image or other RIFF file",
    b"<!DOC": "a web page",
    b"<!doc": "a web page",
    b"<html": "a web page",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "a gzip archive, to be unpacked first",
    b"version https://git-lfs": "a Git LFS pointer, in place of the file itself",
}
MOST = 24  # keys of a kind in an error message


def refuse(
    where: str, source: str, must: str, got: str, details: Sequence[str], cause: Exception | None = None
) -> NoReturn:
    """Raises CheckpointError: source must be <must>, got <source>, <got>; nothing was loaded; and details."""
    text = f"{where}: source must be {must}, got {source}, {got}; nothing was loaded"
    raise CheckpointError("\n  ".join([text, *filter(None, details)])) from cause


def listing(what: str, items: Sequence[str]) -> str:
    """What is wrong with how many keys, each on its line, the first ones of many; nothing if there is none."""
    more = [f"... and {len(items) - MOST} more"] if len(items) > MOST else []
    return "\n    ".join([f"{what} ({len(items)}):", *items[:MOST], *more]) if items else ""


def open_source(where: str, source: object) -> tuple[Mapping[str, Any], str]:
    """The content of a source, a dictionary, and what messages call the source."""
    if isinstance(source, Mapping):
        return source, "a state dict"
    if not isinstance(source, (str, os.PathLike)):
        got = type(source).__name__ + ("; give its state_dict()" if isinstance(source, nn.Module) else "")
        _check.fail(where, "source", "a path or a state dict", got, TypeError)
    path = Path(source)
    content = _read(where, path)
    if not isinstance(content, Mapping):
        refuse(where, str(path), "a checkpoint, a dictionary of tensors", f"a {type(content).__name__}", [])
    return content, str(path)


def _read(where: str, path: Path) -> Any:
    must = "a checkpoint of torch.save or .safetensors"
    if path.is_dir():
        _check.fail(where, "source", "a file", f"the folder {path}", CheckpointError)
    if not path.is_file():
        siblings = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        _check.fail(where, "source", "an existing file", f"{path}{closest(path.name, siblings)}", CheckpointError)
    if path.stat().st_size == 0:
        refuse(where, str(path), must, "an empty file", [])
    with path.open("rb") as file:
        beginning = file.read(64)
    for magic, kind in _BEGINNINGS.items():
        if beginning.startswith(magic):
            refuse(where, str(path), must, kind, [])
    try:
        if path.suffix == ".safetensors":
            return require("safetensors.torch", f"{where} of a .safetensors file").load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                damaged = archive.testzip()  # torch.load does not look at checksums
            if damaged is not None:
                refuse(where, str(path), must, f"a damaged one: the checksum of {damaged} does not match", [])
        return torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            advice = "allow it by torch.serialization.safe_globals, or give the state dict itself"
            got = f"a file that also holds {refused[1]}, which is not run; if you trust it, {advice}"
        else:
            first = (str(error).splitlines() or [""])[0]
            got = f"a damaged or cut one, or another kind of file ({type(error).__name__}: {first[:160]})"
        refuse(where, str(path), must, got, [], error)


def choose(
    where: str, state: Mapping[str, Any], name: str, prefix: str | None, family: str | None, wanted: str
) -> Found:
    """The one head in a file that is meant: of a family ("decoder", "csra", None for both), under a prefix if given."""
    every = find(state)
    fitting = [found for found in every if family in (None, found.family)]
    if prefix is not None:
        start = dotted(prefix)
        exact = [found for found in fitting if found.path == start]
        fitting = exact or [found for found in fitting if found.answers_to(start)]
    listed = [f"{found.path!r}: {found.describe()}" for found in every]
    if len(fitting) > 1:
        refuse(where, name, "one with a single head, or prefix one of those below", "with several", listed)
    if not fitting and prefix is not None and listed:
        refuse(where, name, f"{wanted} under the prefix {prefix!r}", "which has other heads", listed)
    if not fitting and every:
        refuse(where, name, wanted, f"which looks like {' and '.join(found.describe() for found in every)}", [])
    if not fitting:
        refuse(where, name, wanted, _without_head(state), [])
    return fitting[0]


def dotted(prefix: str) -> str:
    """A prefix with a dot at its end, unless it is empty."""
    return prefix if not prefix or prefix.endswith(".") else prefix + "."


def _without_head(state: Mapping[str, Any]) -> str:
    """What a file without a known head holds."""
    keys = {key: value for _, inner in state_dicts(state) for key, value in inner.items() if isinstance(value, Tensor)}
    if not keys:
        shown = ", ".join(map(repr, list(state)[:6])) or "nothing"
        return f"which holds no named tensors, but {shown}"
    counts = Counter(key.partition(".")[0] for key in keys)
    text = f"a state dict without a known head ({', '.join(f'{k} {n}' for k, n in counts.most_common(8))})"
    if any(key.endswith("head1.weight") for key in keys):
        text += "; with head1.weight, ... it looks like a CSRA ViT under older names, which CSRA's own code refuses too"
    single = [key for key, value in keys.items() if key.endswith("classifier.head.weight") and value.ndim == 4]
    if single:
        new = single[0].replace("classifier.head.", "classifier.multi_head.0.head.")
        text += f"; if {single[0]} is the classifier of a CSRA of one head, rename it to {new}"
    return text


def kind_of(value: Any) -> str:
    """The shape of a value, and what else keeps it from being loaded."""
    if not isinstance(value, Tensor):
        return type(value).__name__
    shape = str(tuple(value.shape))
    if value.is_meta:
        return f"{shape} without values (on the meta device)"
    return shape if value.is_floating_point() else f"{shape} {value.dtype}"
