"""MS-COCO, 2014 or 2017: the object categories of each image.

FOLDER/annotations/instances_train2014.json, instances_val2014.json
FOLDER/train2014/, FOLDER/val2014/ (or both in FOLDER/images/)
"""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

from mlhead._usage import UsageError, usage_fail
from mlhead.data._files import FolderFiles, json_list, read_json
from mlhead.data.listing import Entry, ImageList, ListSource
from mlhead.data.loading import BadSample
from mlhead.data.reporting import BadDataLog

YEARS = ("2014", "2017")
# Outlines of objects are most of such a file, and are not read.
_KEPT = frozenset(("images", "annotations", "categories", "id", "name", "file_name", "image_id", "category_id"))


def _tables(root: Path, year: str) -> dict[str, Path]:
    """The JSON files of a year, by split."""
    paths = {split: root / "annotations" / f"instances_{split}{year}.json" for split in ("train", "val")}
    return {split: path for split, path in paths.items() if path.is_file()}


def is_coco(root: Path) -> bool:
    """Whether a folder has the object annotations of this layout."""
    return any(_tables(root, year) for year in YEARS)


def open_coco(config: Any, bad_data: BadDataLog, class_names: list[str] | None = None) -> ListSource:
    """MS-COCO: training images for "train", validation images for "val" and "test", as in both papers.

    The classes are the categories in the order of their ids. An image has a class if any object of it is annotated,
    whatever its size, and also as a crowd. Images without annotations stay, as images without labels; an image with an
    annotation that cannot be used is left out, since its labels are not known.

    Args:
        config: the options of a run.
        bad_data: gets every unusable image and annotation.
        class_names: not used; the files say which classes there are.

    Raises:
        UsageError: no such files, files of both years, or files that are not of this kind.
    """
    root = Path(config.data)
    years = [year for year in YEARS if _tables(root, year)]
    if len(years) != 1:
        got = f"those of {' and '.join(years)}" if years else f"none in {root}"
        usage_fail("--data", "a folder with annotations/instances_train2014.json or val, of one year", got)
    (year,) = years
    names: list[str] = []
    splits = {}
    for split, path in _tables(root, year).items():
        content = read_json(path, _KEPT)
        categories = _categories(path, content)
        if names and list(categories.values()) != names:
            usage_fail(str(path), f"with the {len(names)} categories of the training images", "other ones")
        names = list(categories.values())
        folder = f"{split}{year}"
        images = root / "images" / folder if (root / "images" / folder).is_dir() else root / folder
        splits[split] = _read(path, content, images, list(categories), bad_data)
    if "val" in splits:
        splits["test"] = splits["val"]
    return ListSource(config, names, splits)


def _categories(path: Path, content: dict[str, Any]) -> dict[int, str]:
    """The names of the categories by id, in the order of the ids."""
    found: dict[int, str] = {}
    for item in json_list(path, content, "categories"):
        number, name = item.get("id"), item.get("name")
        if not isinstance(number, int) or not isinstance(name, str) or number in found or name in found.values():
            raise UsageError(f"{path} must be a file whose categories have an id and a name of their own, got {item}")
        found[number] = name
    if not found:
        usage_fail(str(path), "a file with at least one category", "none")
    return dict(sorted(found.items()))


def _read(path: Path, content: dict[str, Any], folder: Path, categories: list[int], bad_data: BadDataLog) -> ImageList:
    """The images of one file, which are in `folder`; a label is the position of its category."""
    images, bad = _images(path, content, folder)
    index = {number: label for label, number in enumerate(categories)}
    labels: dict[Hashable, set[int]] = {number: set() for number in images}
    broken: dict[str, str] = {}
    seen: set[Hashable] = set()
    for n, item in enumerate(json_list(path, content, "annotations")):
        number, image, category = (item.get(key) for key in ("id", "image_id", "category_id"))
        where = f"annotation {n} (id {number})"
        if isinstance(image, float) and image.is_integer():
            image = int(image)
        if not isinstance(image, int) or image not in images:
            bad.append(BadSample(f"{path}, {where}", f"no such image, id {image}"))
        elif images[image] is None:
            pass  # of an image that is named already
        elif isinstance(number, int) and number in seen:
            broken.setdefault(str(images[image]), f"{where} has the same id as an annotation before it")
        elif not isinstance(category, int) or category not in index:
            broken.setdefault(str(images[image]), f"unknown category id {category} in {where}")
        else:
            labels[image].add(index[category])
        seen.add(number if isinstance(number, int) else None)
    bad += (BadSample(f"{path}: {name}", reason) for name, reason in broken.items())
    bad_data.add(bad)
    usable = ((name, labels[number]) for number, name in images.items() if name is not None and name not in broken)
    return ImageList.collect(folder, (Entry(name, list(own)) for name, own in usable))


def _images(path: Path, content: dict[str, Any], folder: Path) -> tuple[dict[int, str | None], list[BadSample]]:
    """The file name of each image by its id, None where it cannot be used, and what is wrong with these."""
    files = FolderFiles(folder)
    images: dict[int, str | None] = {}
    names: set[str] = set()
    bad = []
    for n, item in enumerate(json_list(path, content, "images")):
        number, name = item.get("id"), item.get("file_name")
        if not isinstance(number, int) or not isinstance(name, str):
            bad.append(BadSample(f"{path}, image {n} (id {number})", "no id or no file_name"))
        elif number in images or name in names:
            twice = f"the same {'id' if number in images else 'file'} as an image before it"
            bad.append(BadSample(f"{path}, image {n} (id {number}): {name}", twice))
            images.setdefault(number, None)
        elif name not in files:
            bad.append(BadSample(f"{path}: {name}", f"no such file in {folder}"))
            images[number] = None
        else:
            images[number] = name
            names.add(name)
    return images, bad
