"""What a user can get wrong: one exception for it, and clear words for an optional package that is missing."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn


class UsageError(ValueError):
    """A mistake in an argument or a file; the command line prints it as one line and exits with code 2."""


def usage_fail(argument: str, must: str, got: Any) -> NoReturn:
    """Raises UsageError: `<argument> must be <what>, got <what>`."""
    raise UsageError(f"{argument} must be {must}, got {got}")


def check_folder(argument: str, path: Path) -> None:
    """That files can be written into a folder, there or not yet, before the work of making them."""
    if path.exists() and not path.is_dir():
        usage_fail(argument, "a folder", f"the file {path}")


def closest(word: str, known: Iterable[str]) -> str:
    """A hint such as " (did you mean 'resnet50'?)", or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


def require(module: str, what_for: str) -> ModuleType:
    """Imports an optional dependency.

    Args:
        module: dotted name, e.g. "timm.optim".
        what_for: the beginning of the error message, e.g. "mlhead train".

    Returns:
        The imported module.

    Raises:
        UsageError: the package is not installed; the message says which command installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise UsageError(f"{what_for} needs {package}, which is not installed: pip install 'mlhead[train]'") from error
