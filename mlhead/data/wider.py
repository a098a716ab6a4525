"""WIDER-Attribute: attributes of the people in images; a sample is one person, cut out of the image.

FOLDER/wider_attribute_trainval.json, wider_attribute_test.json (or both in FOLDER/Annotations/)
FOLDER/Image/train/0--Parade/..., val/..., test/...
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlhead._usage import UsageError, usage_fail
from mlhead.data._files import FolderFiles, json_list, read_json
from mlhead.data.listing import Entry, ImageList, ListSource
from mlhead.data.loading import BadSample
from mlhead.data.reporting import BadDataLog

_IN = ("", "Annotations/")
_FARTHEST = 2**30  # no pixel of an image is beyond it


def _tables(root: Path) -> dict[str, Path]:
    """The JSON files, by "trainval" and "test"."""
    paths = [(part, root / f"{folder}wider_attribute_{part}.json") for part in ("trainval", "test") for folder in _IN]
    return {part: path for part, path in reversed(paths) if path.is_file()}


def is_wider(root: Path) -> bool:
    """Whether a folder has the annotations of this layout."""
    return bool(_tables(root))


def open_wider(config: Any, bad_data: BadDataLog, class_names: list[str] | None = None) -> ListSource:
    """WIDER-Attribute: "train" has the people of trainval, "val" and "test" those of test.

    An attribute is positive (1), negative (-1) or unspecified (0). What is unspecified is negative in training and
    unknown in the test, which ignores it (CSRA, section 4.2). The classes are the attributes in the order of their ids.

    Args:
        config: the options of a run.
        bad_data: gets every unusable image and person.
        class_names: not used; the files say which attributes there are.

    Raises:
        UsageError: no such files, or files that are not of this kind.
    """
    root = Path(config.data)
    tables = _tables(root)
    if not tables:
        must = "a folder with wider_attribute_trainval.json or wider_attribute_test.json, or Annotations with these"
        usage_fail("--data", must, root)
    images = root / "Image" if (root / "Image").is_dir() else root
    names: list[str] = []
    splits = {}
    for part, path in sorted(tables.items(), reverse=True):  # trainval comes first
        content = read_json(path)
        own = _attributes(path, content)
        if names and own != names:
            usage_fail(str(path), f"with the {len(names)} attributes of the training images", "other ones")
        names = own
        splits["train" if part == "trainval" else "test"] = _read(path, content, images, len(names), bad_data)
    if "test" in splits:
        splits["val"] = splits["test"]
    return ListSource(config, names, splits)


def _attributes(path: Path, content: dict[str, Any]) -> list[str]:
    """The names of the attributes in the order of their ids."""
    found = content.get("attribute_id_map")
    if not isinstance(found, dict) or not found or set(found) != {str(n) for n in range(len(found))}:
        got = "none" if found is None else str(found)[:80]
        raise UsageError(f'{path} must be a JSON object with names for "0", "1", ... in "attribute_id_map", got {got}')
    return [str(found[str(n)]) for n in range(len(found))]


def _read(path: Path, content: dict[str, Any], folder: Path, num_classes: int, bad_data: BadDataLog) -> ImageList:
    """The people of one file; of those that are to be trained on, what is unspecified is left out, a negative."""
    training = "trainval" in path.name
    bad: list[BadSample] = []

    def entries() -> Iterator[Entry]:
        files = FolderFiles(folder)
        seen: set[str] = set()
        for n, item in enumerate(json_list(path, content, "images")):
            name, people = item.get("file_name"), item.get("targets")
            if not isinstance(name, str):
                bad.append(BadSample(f"{path}, image {n}", "no file_name"))
            elif name in seen:
                bad.append(BadSample(f"{path}, image {n}: {name}", "the same file as an image before it"))
            elif name not in files:
                bad.append(BadSample(f"{path}: {name}", f"no such file in {folder}"))
            elif not isinstance(people, list) or not people:
                bad.append(BadSample(f"{path}: {name}", "no person in targets"))
            else:
                for k, person in enumerate(people):
                    box, values = _person(person, num_classes)
                    if isinstance(values, str):
                        bad.append(BadSample(f"{path}: {name}, person {k}", values))
                        continue
                    # In the file -1 is negative and 0 unspecified; in a list what is not there is negative.
                    listed = {
                        c: 1 if v == 1 else -1 for c, v in enumerate(values) if v == 1 or (v == 0 and not training)
                    }
                    yield Entry(name, list(listed), list(listed.values()), box)
            seen.add(str(name))

    listing = ImageList.collect(folder, entries())
    bad_data.add(bad)
    return listing


def _person(person: Any, num_classes: int) -> tuple[tuple[int, int, int, int], list[int] | str]:
    """The box (left, top, right, bottom) of a person and the attributes as in the file, or what is wrong."""
    none = (0, 0, 0, 0)
    if not isinstance(person, dict):
        return none, "no bbox and no attribute"
    values, bbox = person.get("attribute"), person.get("bbox")
    if not isinstance(values, list) or len(values) != num_classes or any(v not in (-1, 0, 1) for v in values):
        return none, f"attribute must be {num_classes} of -1, 0 and 1, got {str(values)[:80]}"
    if not isinstance(bbox, list) or len(bbox) != 4 or not all(_is_coordinate(v) for v in bbox):
        return none, f"bbox must be left, top, width and height, got {str(bbox)[:80]}"
    left, top, width, height = bbox
    box = (round(left), round(top), round(left + width), round(top + height))
    if box[0] >= box[2] or box[1] >= box[3]:
        return none, f"bbox must have an area, got {bbox}"
    return box, values


def _is_coordinate(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < _FARTHEST
