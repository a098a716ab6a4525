"""Tiny data sets in the public layouts, made by hand for the tests of their readers."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest

from mlhead.data.layouts import open_layout
from mlhead.data.reporting import BadDataLog

DEFAULTS = {
    "task": "classification",
    "layout": "auto",
    "labels": None,
    "voc_difficult": "ignore",
    "seed": 0,
}


def picture(path, size=(8, 8), shade=128):
    """An image of one colour, (width, height)."""
    Image = pytest.importorskip("PIL.Image")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), shade, np.uint8)).save(path)


def source_of(root, said=None, policy="skip", **options):
    """The source of a folder, and in `said` every line about bad data."""
    config = SimpleNamespace(**{**DEFAULTS, "data": str(root), **options})
    return open_layout(config, BadDataLog(policy, (said if said is not None else []).append), None)


def labels_of(source, split):
    """For each image its classes by name and value, those that are not listed left out."""
    listing = source.splits[split]
    found = {}
    for number, name in enumerate(listing.names):
        labels, values = listing.labels(number)
        values = [1] * len(labels) if values is None else values.tolist()
        own = {source.class_names[label]: int(value) for label, value in zip(labels, values, strict=True)}
        key = name if listing.boxes is None else (name, *listing.boxes[number].tolist())
        assert key not in found
        found[key] = own
    return found


# MS-COCO

# Not in the order of their ids, which have gaps as in the real files.
CATEGORIES = [{"id": 3, "name": "car"}, {"id": 1, "name": "person"}, {"id": 90, "name": "toothbrush"}]


def coco_table(images, annotations, categories=None):
    """The content of a JSON file: images as (id, file name), annotations as (id, image, category)."""
    return {
        "info": {"year": 2014},
        "images": [{"id": n, "file_name": name, "height": 8, "width": 8} for n, name in images],
        "annotations": [
            {"id": n, "image_id": image, "category_id": c, "iscrowd": n % 2, "segmentation": [[1.0, 2.0]]}
            for n, image, c in annotations
        ],
        "categories": CATEGORIES if categories is None else categories,
    }


def make_coco(root, year="2014", inside=""):
    """Four training images, the last without annotations, and two validation images."""
    tables = {
        "train": coco_table(
            [(9, "a.jpg"), (2, "b.jpg"), (30, "c.jpg"), (4, "d.jpg")],
            [(1, 9, 1), (2, 9, 90), (3, 9, 1), (4, 2, 3), (5, 30, 90), (7, 30, 3)],
        ),
        "val": coco_table([(5, "v.jpg"), (6, "w.jpg")], [(11, 5, 3), (12, 6, 1), (13, 6, 90)]),
    }
    (root / "annotations").mkdir(parents=True)
    for split, table in tables.items():
        (root / f"annotations/instances_{split}{year}.json").write_text(json.dumps(table))
        for image in table["images"]:
            picture(root / inside / f"{split}{year}" / image["file_name"])
    return root


# Pascal VOC


def voc_xml(*objects):
    """An annotation of objects (name, difficult); a part of an object has a name too."""
    items = "".join(
        f"<object><part><name>head</name></part><name>{name}</name><difficult>{flag}</difficult></object>"
        for name, flag in objects
    )
    return f"<annotation><filename>x</filename><size><width>8</width></size>{items}</annotation>"


def make_voc(root, sets, year="VOC2007"):
    """Images by set, each with its objects; a set may name the images of others with None."""
    base = root / year
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (base / folder).mkdir(parents=True)
    for name, images in sets.items():
        (base / f"ImageSets/Main/{name}.txt").write_text("".join(f"{number}\n" for number in images))
        for number, objects in images.items():
            picture(base / f"JPEGImages/{number}.jpg")
            if objects is not None:
                (base / f"Annotations/{number}.xml").write_text(voc_xml(*objects))
    (base / "ImageSets/Main/dog_trainval.txt").write_text("000001 -1\n")
    return base


# WIDER-Attribute

ATTRIBUTES = ["Male", "LongHair", "Hat"]


def make_wider(root, inside=""):
    """Three people to train on and two for the test, in three images of 20x10 pixels."""

    def person(box, *values):
        return {"bbox": box, "attribute": list(values)}

    images = {
        "trainval": [
            ("train/0--Parade/a.jpg", [person([1, 2, 3, 4], 1, 0, -1), person([5.4, 0.6, 10.2, 9.2], -1, -1, 0)]),
            ("val/1--Meeting/b.jpg", [person([0, 0, 30, 30], 1, 1, 1)]),
        ],
        "test": [("test/0--Parade/c.jpg", [person([2, 2, 5, 5], 0, 1, -1), person([-4, 3, 8, 4], -1, 0, 0)])],
    }
    # Not in the order of their ids.
    ids = {str(n): ATTRIBUTES[n] for n in (2, 0, 1)}
    for part, items in images.items():
        content = [{"file_name": name, "targets": people, "scene_id": 0} for name, people in items]
        path = root / inside / f"wider_attribute_{part}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"images": content, "attribute_id_map": ids, "scene_id_map": {"0": "Parade"}}))
        for name, _ in items:
            picture(root / "Image" / name, (20, 10))
    return root


# Open Images

IDS = ["000002b66c9c498e", "ffff05bf6e5c3b7a", "00045d609ca3f4eb", "80000000000000ff"]
HEADER = "ImageID,Source,LabelName,Confidence\n"


def make_open_images(root, trainable=False):
    """Two training images, one for validation and one for the test; labels /m/0 to /m/3."""
    names = ['/m/2,"Fish, dried"', "/m/0,Cat", "/m/1,Dog", "/m/3,Cat"]
    root.mkdir(parents=True, exist_ok=True)
    (root / "oidv6-class-descriptions.csv").write_text("\n".join(["LabelName,DisplayName", *names]))
    if trainable:
        (root / "oidv6-classes-trainable.txt").write_text("/m/1\n/m/2\n")
    rows = {
        "oidv6-train": [(IDS[1], 1, 1), (IDS[0], 0, 1), (IDS[1], 0, 0), (IDS[0], 3, 1), (IDS[1], 2, 1)],
        "validation": [(IDS[2], 2, 0), (IDS[2], 1, 1)],
        "test": [(IDS[3], 0, 1)],
    }
    for name, labels in rows.items():
        text = "".join(f"{image},verification,/m/{label},{value}\n" for image, label, value in labels)
        (root / f"{name}-annotations-human-imagelabels.csv").write_text(HEADER + text)
    for folder, image in (("train", 0), ("train", 1), ("validation", 2), ("test", 3)):
        picture(root / folder / f"{IDS[image]}.jpg")
    return root
