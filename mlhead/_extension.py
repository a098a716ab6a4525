"""Loads the optional C++/CUDA libraries, on demand, and says why one is not there.

The libraries register the private ops `torch.ops.mlhead_C.*`: `_mlhead_cpu` the schemas and the CPU form,
`_mlhead_cuda` the CUDA form. They have no Python entry point and use the stable ABI of LibTorch, so one file serves
every Python from 3.10 and every torch from 2.11. Nothing is loaded when this module is imported.
"""

from __future__ import annotations

import ctypes
import functools
import json
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).parent
_BUILD = "MLHEAD_BUILD={part} pip install --no-build-isolation . (or python setup.py build_ext --inplace) builds it"


def _path(part: str) -> Path:
    return _FOLDER / f"_mlhead_{part}.abi3.so"


def _load(part: str) -> str | None:
    path = _path(part)
    if not path.is_file():
        return f"mlhead/{path.name} is not there: built without the {part} extension; {_BUILD.format(part=part)}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        cause = error.__cause__ or error  # torch wraps what the dynamic linker said
        first_line = (str(cause).strip() or type(cause).__name__).splitlines()[0]
        return f"mlhead/{path.name} does not load with torch {torch.__version__}: {first_line}"
    return None


@functools.cache
def load_cpu() -> str | None:
    """Loads the CPU library.

    Returns:
        None when `torch.ops.mlhead_C` has its CPU form, otherwise the reason why not, in plain words.
    """
    if hasattr(torch.ops.mlhead_C, "group_fc"):  # loaded from elsewhere; a schema may be defined only once
        return None
    return _load("cpu")


@functools.cache
def load_cuda() -> str | None:
    """Loads the CUDA library, and the CPU library before it, which holds the schemas.

    Returns:
        None when `torch.ops.mlhead_C` has its CUDA form, otherwise the reason why not, in plain words.
    """
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    return load_cpu() or _load("cuda")


def _exported(part: str, function: str) -> str | None:
    """What a C function of a library returns; None where the library does not load."""
    try:
        call = ctypes.CDLL(str(_path(part)))[function]
    except (OSError, AttributeError):
        return None
    call.restype = ctypes.c_char_p
    return call().decode()


def build_info() -> dict[str, Any]:
    """How the libraries were built, and which instruction set the CPU library uses here.

    Returns:
        {"cpu": {...} or None, "cuda": {...} or None, "instruction_set": name or None}; the inner dicts hold compiler,
        flags, torch (the version it was built with), stable_abi, instruction_sets, and for cuda also cuda (the
        toolkit), torch_cuda and architectures.
    """
    loaded = {"cpu": load_cpu() is None, "cuda": load_cuda() is None}
    text = {part: _exported(part, "mlhead_build_info") if loaded[part] else None for part in loaded}
    info: dict[str, Any] = {part: json.loads(found) if found else None for part, found in text.items()}
    info["instruction_set"] = _exported("cpu", "mlhead_instruction_set") if loaded["cpu"] else None
    return info
