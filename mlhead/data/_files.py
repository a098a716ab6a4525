"""What is in the folder of a data set: which files there are, and JSON that may be damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlhead._usage import UsageError


def files_in(folder: Path) -> Iterator[str]:
    """The names of the files in a folder, from one listing of it; none if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in entries if entry.is_file())
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a name that no file can have
        return
    except OSError as error:
        raise UsageError(f"{folder} must be a readable folder ({error})") from error


class FolderFiles:
    """Which files are below a folder, by one listing of each sub-folder in place of a look at every file."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._listed: dict[str, frozenset[str]] = {}

    def __contains__(self, name: str) -> bool:
        folder, file = os.path.split(name)
        if folder not in self._listed:
            self._listed[folder] = frozenset(files_in(self._root / folder))
        return file in self._listed[folder]


def read_json(path: Path, keep: frozenset[str] | None = None) -> dict[str, Any]:
    """The content of a file with a JSON object.

    Args:
        path: the file.
        keep: names of the members that are kept of every object in it, so that the others take no memory; or None.

    Raises:
        UsageError: it is not such a file.
    """

    def kept(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {name: value for name, value in pairs if keep is None or name in keep}

    try:
        with path.open(encoding="utf-8-sig") as file:
            content = json.load(file, object_pairs_hook=kept)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} must be a JSON file ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} must be a JSON object, got a {type(content).__name__}")
    return content


def json_list(path: Path, content: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The list of objects that a JSON object has under a name; what is no object in it is an empty one.

    Raises:
        UsageError: there is no such list.
    """
    items = content.get(name)
    if not isinstance(items, list):
        got = "none" if items is None else f"a {type(items).__name__}"
        raise UsageError(f'{path} must be a JSON object with a list of "{name}", got {got}')
    return [item if isinstance(item, dict) else {} for item in items]
