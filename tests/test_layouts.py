"""Data sets in their public layouts: the labels are those of the files, and whatever is wrong is named and counted."""

from __future__ import annotations

import dataclasses
import json
import os

import pytest
import torch
from layout_folders import (
    coco_table,
    labels_of,
    make_coco,
    make_open_images,
    make_voc,
    make_wider,
    picture,
    source_of,
)

from mlhead._config import TrainConfig
from mlhead._usage import UsageError
from mlhead.data._files import FolderFiles
from mlhead.data.layouts import LAYOUTS

pytest.importorskip("PIL")


def test_the_options_name_every_layout():
    (field,) = (item for item in dataclasses.fields(TrainConfig) if item.name == "layout")
    assert set(field.metadata["choices"]) == {"auto", *LAYOUTS}


def test_layouts_are_found_by_their_files(tmp_path):
    made = {
        "coco": make_coco(tmp_path / "a"),
        "voc": make_voc(tmp_path / "b/VOCdevkit", {"train": {"1": [("dog", 0)]}}).parent.parent,
        "open-images": make_open_images(tmp_path / "c"),
        "wider": make_wider(tmp_path / "d"),
    }
    for name, root in made.items():
        assert next(other for other, layout in LAYOUTS.items() if layout.detect(root)) == name
        assert labels_of(source_of(root), "train") == labels_of(source_of(root, layout=name), "train")
        with pytest.raises(UsageError, match=f"--labels must be absent for --layout {name}"):
            source_of(root, layout=name, labels="x.csv")
        with pytest.raises(UsageError, match="--data must be a folder"):
            source_of(tmp_path / "b", layout=name) if name != "voc" else source_of(tmp_path / "a", layout=name)
    (tmp_path / "e").mkdir()
    with pytest.raises(UsageError, match=r"none of the known layouts \(.*coco: annotations/.*; voc: .*got none, .*e$"):
        source_of(tmp_path / "e")
    with pytest.raises(UsageError, match="existing folder of images"):
        source_of(tmp_path / "none")
    with pytest.raises(UsageError, match="--task must be 'classification' for data in the layout coco"):
        source_of(made["coco"], layout="coco", task="zero-shot")
    with pytest.raises(UsageError, match="a folder in the layout of NUS-WIDE, for --task zero-shot"):
        source_of(made["coco"], task="zero-shot")
    (tmp_path / "e/data.csv").touch()
    (tmp_path / "e/benchmark_81_v0.json").touch()
    with pytest.raises(UsageError, match="--task must be 'zero-shot' for data in the layout nus-wide"):
        source_of(tmp_path / "e")


def test_files_are_found_by_one_listing_of_each_folder(tmp_path, monkeypatch):
    for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "a/sub/3.jpg"):
        picture(tmp_path / name)
    (tmp_path / "a/link.jpg").symlink_to("1.jpg")
    (tmp_path / "a/dangling.jpg").symlink_to("none.jpg")
    listed = []

    def scandir(path):
        listed.append(str(path.relative_to(tmp_path)))
        if path.name == "locked":
            raise PermissionError(13, "Permission denied")
        return os_scandir(path)

    os_scandir = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    files = FolderFiles(tmp_path)
    for _ in range(2):
        assert all(
            name in files for name in ("a/1.jpg", "a/2.jpg", "b/1.jpg", "a/link.jpg", "a/sub/3.jpg", "./a/1.jpg")
        )
        for name in ("a/3.jpg", "c/1.jpg", "a/sub", "a/dangling.jpg", "a/1.jpg/x", "1.jpg", "", "a/", "\0/x.jpg"):
            assert name not in files
    assert len(listed) == len(set(listed)) + 1  # a, which is ./a once more
    with pytest.raises(UsageError, match=r"locked must be a readable folder .*Permission denied"):
        assert "locked/x.jpg" in files


# MS-COCO


@pytest.mark.parametrize(("year", "inside"), [("2014", ""), ("2017", "images")])
def test_coco(tmp_path, year, inside):
    said = []
    source = source_of(make_coco(tmp_path, year, inside), said)
    assert said == []
    assert source.class_names == ["person", "car", "toothbrush"]  # by their ids
    assert labels_of(source, "train") == {
        "a.jpg": {"person": 1, "toothbrush": 1},
        "b.jpg": {"car": 1},
        "c.jpg": {"toothbrush": 1, "car": 1},
        "d.jpg": {},
    }
    assert source.splits["train"].indices.tolist() == [0, 2, 1, 1, 2]  # ascending in every image
    assert source.splits["train"].values is None
    val = {"v.jpg": {"car": 1}, "w.jpg": {"person": 1, "toothbrush": 1}}
    assert labels_of(source, "val") == labels_of(source, "test") == val
    assert torch.allclose(source.frequencies(), torch.tensor([1.5, 2.5, 2.5]) / 5)


def test_broken_coco(tmp_path):
    make_coco(tmp_path)
    path = tmp_path / "annotations/instances_train2014.json"
    table = json.loads(path.read_text())
    table["images"] += [
        {"id": 9, "file_name": "d2.jpg"},
        {"id": 50, "file_name": "a.jpg"},
        {"id": 51, "file_name": "gone.jpg"},
        {"id": 52},
        "no image",
    ]
    table["annotations"] += [
        {"id": 20, "image_id": 2, "category_id": 2},
        {"id": 21, "image_id": 30},
        {"id": 22, "image_id": 777, "category_id": 1},
        {"id": 1, "image_id": 4, "category_id": 1},
        {"id": 23, "image_id": 51, "category_id": 1},
        {},
    ]
    path.write_text(json.dumps(table))
    said = []
    source = source_of(tmp_path, said)
    assert labels_of(source, "train") == {"a.jpg": {"person": 1, "toothbrush": 1}}
    for line, words in zip(
        said,
        [
            "image 4 (id 9): d2.jpg: the same id as an image before it",
            "image 5 (id 50): a.jpg: the same file as an image before it",
            "train2014.json: gone.jpg: no such file in",
            "image 7 (id 52): no id or no file_name",
            "image 8 (id None): no id or no file_name",
            "annotation 8 (id 22): no such image, id 777",
            "annotation 11 (id None): no such image, id None",
            "json: b.jpg: unknown category id 2 in annotation 6 (id 20)",
            "json: c.jpg: unknown category id None in annotation 7 (id 21)",
            "json: d.jpg: annotation 9 (id 1) has the same id as an annotation before it",
        ],
        strict=True,
    ):
        assert words in line
    with pytest.raises(UsageError, match=r"bad data, and --on-bad-data is error: .*the same id .* and 9 more"):
        source_of(tmp_path, policy="error")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "must be a JSON file"),
        (b"\xff\xfe\x00", "must be a JSON file"),
        ("[1]", "must be a JSON object, got a list"),
        ("{}", 'with a list of "categories", got none'),
        (json.dumps(coco_table([], [], [])), "at least one category, got none"),
        (json.dumps(coco_table([], [], [{"id": 1}])), "categories have an id and a name of their own"),
        (json.dumps(coco_table([], [], [{"id": 1, "name": "x"}, {"id": 1, "name": "y"}])), "of their own, got .*y"),
        ('{"categories": [{"id": 1, "name": "x"}], "images": {}}', 'a list of "images", got a dict'),
        (json.dumps(coco_table([], [], [{"id": 1, "name": "x"}])), "with the 1 categories of the training images"),
    ],
)
def test_coco_files_of_another_kind(tmp_path, content, words):
    make_coco(tmp_path)
    path = tmp_path / "annotations/instances_train2014.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=words) as error:
        source_of(tmp_path)
    assert "instances_" in str(error.value)


def test_coco_of_two_years_and_of_one_split(tmp_path):
    make_coco(tmp_path / "a")
    (tmp_path / "a/annotations/instances_val2014.json").unlink()
    source = source_of(tmp_path / "a")
    with pytest.raises(UsageError, match="--data, or --val-fraction of it, must leave at least one usable image"):
        source.dataset("val", None)
    (tmp_path / "a/annotations/instances_val2017.json").touch()
    with pytest.raises(UsageError, match="of one year, got those of 2014 and 2017"):
        source_of(tmp_path / "a")
