"""Pascal VOC 2007 and 2012: the classes of the objects in each image.

VOCdevkit/VOC2007/ImageSets/Main/{trainval,test,train,val}.txt    a number such as 000005 in a line
VOCdevkit/VOC2007/Annotations/000005.xml, JPEGImages/000005.jpg
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from mlhead._usage import UsageError, closest, usage_fail
from mlhead.data._files import FolderFiles
from mlhead.data.listing import Entry, ImageList, ListSource
from mlhead.data.loading import BadSample
from mlhead.data.reporting import BadDataLog

CLASSES = [
    "aeroplane",
    "bicycle",
    "bird",
    "boat",
    "bottle",
    "bus",
    "car",
    "cat",
    "chair",
    "cow",
    "diningtable",
    "dog",
    "horse",
    "motorbike",
    "person",
    "pottedplant",
    "sheep",
    "sofa",
    "train",
    "tvmonitor",
]
_INDEX = {name: label for label, name in enumerate(CLASSES)}


def _years(root: Path) -> list[Path]:
    """The folders of a year: `root`, or those in it or in its VOCdevkit."""
    inside = [base / year for base in (root, root / "VOCdevkit") for year in ("VOC2007", "VOC2012")]
    return [path for path in (root, *inside) if all((path / n).is_dir() for n in ("ImageSets/Main", "Annotations"))]


def is_voc(root: Path) -> bool:
    """Whether a folder has a year of this layout."""
    return bool(_years(root))


def open_voc(config: Any, bad_data: BadDataLog, class_names: list[str] | None = None) -> ListSource:
    """Pascal VOC: "train" has the images of trainval and "val" and "test" those of test, where both have annotations.

    Otherwise, as with what is public of 2012, "train" has those of train and "val" and "test" those of val.

    An image has a class if any object of it does. Where all of them are marked as difficult, --voc-difficult says what
    that means: "ignore", as in CSRA's public code, a negative in training and unknown in the others, as in VOC's own
    evaluation; "positive" and "negative" everywhere.

    Args:
        config: the options of a run.
        bad_data: gets every unusable image.
        class_names: not used; there are 20.

    Raises:
        UsageError: no such folder, or one of both years, or lists of images that are missing or cannot be read.
    """
    root = Path(config.data)
    years = _years(root)
    if len(years) != 1:
        got = f"one with {' and '.join(str(path.relative_to(root)) for path in years)}" if years else root
        usage_fail("--data", "a folder VOC2007 or VOC2012 with ImageSets/Main and Annotations, or one above it", got)
    (year,) = years
    sets = {path.stem: path for path in (year / "ImageSets/Main").iterdir() if path.suffix == ".txt"}
    public = {"trainval", "test"} <= sets.keys() and _are_annotated(year, _numbers(sets["test"]))
    chosen = {"train": "trainval", "val": "test"} if public else {"train": "train", "val": "val"}
    splits = {}
    for split, name in chosen.items():
        if name in sets:
            difficult = None if config.voc_difficult == "negative" else 1
            if config.voc_difficult == "ignore":
                difficult = None if split == "train" else -1
            splits[split] = _read(year, sets[name], difficult, bad_data)
    if not splits:
        usage_fail("--data", "a folder with ImageSets/Main/trainval.txt and test.txt, or train.txt and val.txt", year)
    if "val" in splits:
        splits["test"] = splits["val"]
    return ListSource(config, CLASSES, splits)


def _numbers(path: Path) -> list[str]:
    """The images that a file lists, one a line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} must be UTF-8 text ({error})") from error
    return [line.split()[0] for line in lines if line.strip()]


def _are_annotated(year: Path, numbers: Sequence[str]) -> bool:
    """Whether most of some images have annotations; of the test images of 2012 few do, and those name no objects."""
    files = FolderFiles(year / "Annotations")
    return 2 * sum(f"{number}.xml" in files for number in numbers) > len(numbers)


def _read(year: Path, listed: Path, difficult: int | None, bad_data: BadDataLog) -> ImageList:
    """The images that a file lists.

    `difficult` is the value of a label all of whose objects are difficult; None drops it.
    """
    bad: list[BadSample] = []

    def entries() -> Iterator[Entry]:
        images, annotations = FolderFiles(year / "JPEGImages"), FolderFiles(year / "Annotations")
        seen: set[str] = set()
        for n, number in enumerate(_numbers(listed), 1):
            where = f"{listed}, entry {n}: {number}"
            if number in seen:
                bad.append(BadSample(where, "the same image as an entry before it"))
            elif f"{number}.jpg" not in images:
                bad.append(BadSample(where, f"no such file in {year / 'JPEGImages'}"))
            elif f"{number}.xml" not in annotations:
                bad.append(BadSample(where, f"no annotation in {year / 'Annotations'}"))
            else:
                labels = _labels(year / "Annotations" / f"{number}.xml", difficult)
                if isinstance(labels, BadSample):
                    bad.append(labels)
                else:
                    yield Entry(f"{number}.jpg", list(labels), list(labels.values()))
            seen.add(number)

    listing = ImageList.collect(year / "JPEGImages", entries())
    bad_data.add(bad)
    return listing


def _labels(path: Path, difficult: int | None) -> dict[int, int] | BadSample:
    """The labels of one image and their values, or what is wrong with its annotation."""
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
    except (ElementTree.ParseError, OSError, ValueError, LookupError) as error:  # the last: an unknown encoding
        return BadSample(str(path), f"cannot be parsed: {error}")
    if not objects:
        return BadSample(str(path), "an annotation without objects")
    values: dict[int, int] = {}
    for item in objects:
        name = (item.findtext("name") or "").strip()
        flag = (item.findtext("difficult") or "0").strip()
        if name not in _INDEX:
            return BadSample(str(path), f"unknown class {name!r}{closest(name, CLASSES)}")
        if flag not in ("0", "1"):
            return BadSample(str(path), f"difficult must be 0 or 1, got {flag!r}")
        value = 1 if flag == "0" else difficult
        if value is not None:
            values[_INDEX[name]] = max(value, values.get(_INDEX[name], -1))
    return values
