"""What `mlhead info` prints: versions, devices, and each backend with the reason why it is or is not available."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

from . import _backend, _extension
from ._backend import BACKENDS

_PACKAGES = ("torch", "triton", "timm", "torchvision", "torchmetrics", "scikit-learn", "matplotlib", "numpy")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "run from a checkout" if package == "mlhead" else "not installed"


def _devices() -> list[str]:
    lines = [f"cpu: {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"]
    if not torch.cuda.is_available():
        why = "torch was built without CUDA" if torch.version.cuda is None else "no CUDA device is visible"
        return [*lines, f"cuda: none ({why})"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(
            f"cuda:{index}: {properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB, {properties.multi_processor_count} multiprocessors"
        )
    return lines


def _op_lines() -> list[str]:
    lines = []
    for name in sorted(_backend._implementations):
        implementations = _backend.implementations(name)
        chosen = {
            device: _backend.resolve(name, "auto", torch.device(device), torch.float32)
            for device in ("cpu", "cuda")
            if device == "cpu" or torch.cuda.is_available()
        }
        has = ", ".join(["reference", *(b for b in BACKENDS if b in implementations)])
        lines.append(f"{name}: has {has}; auto takes " + ", ".join(f"{b} on {d}" for d, b in chosen.items()))
    return lines


def report() -> str:
    """The whole report as text, one fact a line."""
    sections = {
        "versions": [
            f"mlhead: {_version('mlhead')}",
            f"python: {platform.python_version()} on {platform.platform()}",
            *(f"{package}: {_version(package)}" for package in _PACKAGES),
            f"CUDA of torch: {torch.version.cuda or 'none'}",
        ],
        "devices": _devices(),
        "backends": [
            f"{name}: {'available' if reason is None else 'not available: ' + reason}"
            for name, reason in ((name, _backend.unavailable(name)) for name in BACKENDS)
        ],
        "ops": _op_lines(),
        "extension": [f"{key}: {value}" for key, value in _extension.build_info().items()] or ["not built"],
    }
    return "\n".join(f"{title}\n" + "\n".join(f"  {line}" for line in lines) for title, lines in sections.items())
