"""A folder for each class: ImageNet, Stanford Cars and CIFAR-100 as images, and any set sorted by hand.

ROOT/train/<class>/*.jpg with ROOT/val/<class>/*.jpg or ROOT/test/<class>/*.jpg, or both; or ROOT/<class>/*.jpg. Without
val, --val-fraction of the training images is held out; a val without test is both. Each image has one label.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlhead._usage import UsageError, closest, usage_fail
from mlhead.data import folder
from mlhead.data.listing import Entry, ImageList, ListSource
from mlhead.data.loading import BadSample
from mlhead.data.reporting import BadDataLog
from mlhead.data.shards import SPLIT_FOLDERS

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")
# Sets as they are published: the dataset of torchvision that reads them, the folder it makes, and files in it.
_PUBLISHED = (
    ("CIFAR100", "cifar-100-python", ("meta", "train")),
    ("CIFAR10", "cifar-10-batches-py", ("batches.meta", "data_batch_1")),
    ("StanfordCars", "stanford_cars", ("devkit/cars_train_annos.mat",)),
    ("StanfordCars", "stanford_cars", ("cars_annos.mat",)),
)


def is_image_folder(root: Path) -> bool:
    """Whether a folder has images in a folder for each class, or is a published set that could be brought into one."""
    if _published(root) is not None or any(_has_images(path) for path, _ in _split_folders(root)):
        return True
    return sum(any(_images_in(path)) for path in _folders(root)) > 1


def _published(root: Path) -> str | None:
    """The dataset of torchvision that reads what lies in a folder."""
    for name, inside, files in _PUBLISHED:
        if any(all((top / file).is_file() for file in files) for top in (root, root / inside)):
            return name
    return None


def _split_folders(root: Path) -> list[tuple[Path, str]]:
    """The folders of the splits that are there, and of which split each is."""
    found = {path.name.lower(): path for path in _folders(root)}
    return [(found[name], split) for name, split in SPLIT_FOLDERS.items() if name in found]


def _has_images(path: Path) -> bool:
    return any(any(_images_in(one)) for one in _folders(path))


def _folders(path: Path) -> list[Path]:
    """The folders in a folder, sorted by name; hidden ones are left out."""
    with os.scandir(path) as found:
        return sorted(Path(entry.path) for entry in found if not entry.name.startswith(".") and entry.is_dir())


def _files(path: Path) -> list[str]:
    """All files below a folder, as paths from there, sorted; hidden ones are left out."""
    found, seen = [], {os.path.realpath(path)}
    for parent, folders, files in os.walk(path, followlinks=True):
        folders[:] = [name for name in sorted(folders) if not name.startswith(".") and not _leads_up(parent, name)]
        real = {name: os.path.realpath(os.path.join(parent, name)) for name in folders}
        folders[:] = [name for name in folders if real[name] not in seen]  # links may lead in a circle
        seen.update(real[name] for name in folders)
        found += [os.path.relpath(os.path.join(parent, name), path) for name in files if not name.startswith(".")]
    return sorted(found)


def _leads_up(parent: str, name: str) -> bool:
    """Whether a folder is a link to one that it lies in, which has no end."""
    link = os.path.join(parent, name)
    if not os.path.islink(link):
        return False
    here, there = os.path.realpath(parent), os.path.realpath(link)
    return os.path.commonpath([here, there]) == there


def _images_in(path: Path) -> Iterator[str]:
    """The images directly in a folder, in no order."""
    with os.scandir(path) as found:
        yield from (entry.name for entry in found if _is_image(entry.name))


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_ENDINGS)


def open_image_folder(config: Any, bad_data: BadDataLog, class_names: list[str] | None = None) -> ListSource:
    """The source of images in a folder for each class.

    Args:
        config: the options of a run; `data`, `classes` and `val_fraction` are used, and those of `ListSource`.
        bad_data: gets files that are not images by their names, class folders without any image, images outside of
            class folders, and every image of a class that is not known.
        class_names: of a model that is already trained, or None for those of --classes, or else the names of the
            training folders, sorted.

    Raises:
        UsageError: the folder does not exist, has no such folders, or has the files of a set that torchvision reads.
    """
    root = Path(config.data)
    if not root.is_dir():
        usage_fail("--data", "an existing folder", root)
    if (published := _published(root)) is not None:
        raise UsageError(
            f"--data must be a folder with images in a folder for each class, got the files that torchvision.datasets."
            f"{published} reads in {root}: save its images as train/<class>/<number>.png, and those of its test split "
            f"as test/<class>/<number>.png"
        )
    tops = _split_folders(root) or [(root, "train")]
    if tops[0][0] != root:
        reason = f"beside {tops[0][0].name}/, and not of a split ({', '.join(SPLIT_FOLDERS)})"
        others = [path for path in _folders(root) if path not in {top for top, _ in tops}]
        bad_data.add(BadSample(str(path), reason) for path in others if any(map(_is_image, _files(path))))
    names = class_names or (folder.read_classes(Path(config.classes)) if config.classes else None)
    if names is None:
        naming = [top for top, split in tops if split == "train"] or [top for top, _ in tops]
        names = sorted({path.name for top in naming for path in _folders(top)})
    splits: dict[str, ImageList] = {}
    for split in ("train", "val", "test"):
        folders = [top for top, of in tops if of == split]
        if folders:
            bad: list[BadSample] = []
            splits[split] = ImageList.collect(root, _entries(root, folders, names, bad))
            bad_data.add(bad)
    if not any(len(listing) for listing in splits.values()):
        usage_fail("--data", "a folder with images in a folder for each class, also in train/, val/ and test/", root)
    if "val" not in splits and "train" in splits:
        splits["train"], splits["val"] = splits["train"].split(config.val_fraction)
    elif "test" not in splits:
        splits["test"] = splits["val"]
    return ListSource(config, names, splits)


def _entries(root: Path, tops: Sequence[Path], names: Sequence[str], bad: list[BadSample]) -> Iterator[Entry]:
    """The images of a split in the order of their names; `bad` gets what is wrong."""
    number_of = {name: number for number, name in enumerate(names)}
    for top in tops:
        where = os.path.relpath(top, root)
        prefix = "" if where == "." else f"{where}/"
        classes, stray = _folders(top), sorted(_images_in(top))
        if stray and not classes:
            usage_fail("--data", f"a folder where {top} has a folder for each class", f"{len(stray)} images in {top}")
        bad += [BadSample(str(top / image), "in no folder of a class") for image in stray]
        for path in classes:
            files = _files(path)
            images = [name for name in files if _is_image(name)]
            bad += [BadSample(str(path / name), "not an image by its name") for name in files if not _is_image(name)]
            if path.name not in number_of:
                reason = f"unknown class {path.name!r}{closest(path.name, names)}"
                bad += [BadSample(str(path / name), reason) for name in images]
            elif not images:
                bad.append(BadSample(str(path), "a class without an image"))
            else:
                yield from (Entry(f"{prefix}{path.name}/{name}", (number_of[path.name],)) for name in images)
