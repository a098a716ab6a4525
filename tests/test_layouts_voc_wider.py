"""Pascal VOC and WIDER-Attribute: labels that are difficult or unspecified, people cut out, broken annotations."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from layout_folders import ATTRIBUTES, labels_of, make_voc, make_wider, picture, source_of, voc_xml

from mlhead._usage import UsageError
from mlhead.data.listing import ListImages
from mlhead.data.voc import CLASSES

pytest.importorskip("PIL")


# Pascal VOC

TRAINVAL = {
    "000001": [("dog", 0), ("dog", 1), ("person", 1)],
    "000003": [("tvmonitor", 1), ("aeroplane", 0), ("tvmonitor", 1)],
}
TEST = {"000002": [("cat", 1), ("sofa", 0)]}


@pytest.mark.parametrize(
    ("difficult", "in_training", "in_test"), [("ignore", None, -1), ("positive", 1, 1), ("negative", None, None)]
)
def test_voc(tmp_path, difficult, in_training, in_test):
    make_voc(tmp_path / "VOCdevkit", {"trainval": TRAINVAL, "train": {"000001": None}, "test": TEST})
    (tmp_path / "VOCdevkit/VOC2007/Annotations/000001.xml").write_text(voc_xml(*TRAINVAL["000001"]))
    said = []
    source = source_of(tmp_path, said, voc_difficult=difficult)
    assert said == []
    assert source.class_names == CLASSES == sorted(CLASSES)
    assert len(CLASSES) == 20
    extra = {} if in_training is None else {"person": in_training}
    more = {} if in_training is None else {"tvmonitor": in_training}
    assert labels_of(source, "train") == {"000001.jpg": {"dog": 1, **extra}, "000003.jpg": {"aeroplane": 1, **more}}
    extra = {} if in_test is None else {"cat": in_test}
    assert labels_of(source, "test") == labels_of(source, "val") == {"000002.jpg": {"sofa": 1, **extra}}
    for folder in ("VOCdevkit", "VOCdevkit/VOC2007"):
        assert labels_of(source_of(tmp_path / folder, voc_difficult=difficult), "test") == labels_of(source, "test")


def test_voc_whose_test_labels_are_not_public(tmp_path):
    sets = {"train": TRAINVAL, "val": TEST, "trainval": TRAINVAL | TEST, "test": {"000007": None, "000008": None}}
    make_voc(tmp_path, sets, "VOC2012")
    source = source_of(tmp_path)
    assert labels_of(source, "train").keys() == {"000001.jpg", "000003.jpg"}
    assert labels_of(source, "val").keys() == labels_of(source, "test").keys() == {"000002.jpg"}
    make_voc(tmp_path, {"train": TRAINVAL})
    with pytest.raises(UsageError, match="one above it, got one with VOC2007 and VOC2012"):
        source_of(tmp_path)
    make_voc(tmp_path / "other", {"all": TRAINVAL})
    with pytest.raises(UsageError, match=r"a folder with ImageSets/Main/trainval\.txt and test\.txt, or train"):
        source_of(tmp_path / "other")


def test_broken_voc(tmp_path):
    names = [f"00000{n}" for n in range(1, 9)]
    base = make_voc(tmp_path, {"train": {name: [("dog", 0)] for name in names}, "val": {"9": [("dog", 0)]}})
    listed = base / "ImageSets/Main/train.txt"
    listed.write_text(listed.read_text() + "\n000001\n")
    (base / "JPEGImages/000002.jpg").unlink()
    (base / "Annotations/000003.xml").unlink()
    (base / "Annotations/000004.xml").write_text("<annotation><object>")
    (base / "Annotations/000005.xml").write_text("")
    (base / "Annotations/000006.xml").write_text(voc_xml())
    (base / "Annotations/000007.xml").write_text(voc_xml(("dog", 0), ("dgo", 0)))
    (base / "Annotations/000008.xml").write_text(voc_xml(("dog", "maybe")))
    said = []
    assert labels_of(source_of(tmp_path, said), "train") == {"000001.jpg": {"dog": 1}}
    for line, words in zip(
        said,
        [
            "train.txt, entry 2: 000002: no such file in",
            "train.txt, entry 3: 000003: no annotation in",
            "000004.xml: cannot be parsed: ",
            "000005.xml: cannot be parsed: no element found",
            "000006.xml: an annotation without objects",
            "000007.xml: unknown class 'dgo' (did you mean 'dog'?)",
            "000008.xml: difficult must be 0 or 1, got 'maybe'",
            "train.txt, entry 9: 000001: the same image as an entry before it",
        ],
        strict=True,
    ):
        assert words in line
    listed.write_bytes(b"\xff\n")
    with pytest.raises(UsageError, match=r"train\.txt must be UTF-8 text"):
        source_of(tmp_path)


# WIDER-Attribute


@pytest.mark.parametrize("inside", ["", "Annotations"])
def test_wider(tmp_path, inside):
    said = []
    source = source_of(make_wider(tmp_path, inside), said)
    assert said == []
    assert source.class_names == ATTRIBUTES
    assert labels_of(source, "train") == {
        ("train/0--Parade/a.jpg", 1, 2, 4, 6): {"Male": 1},
        ("train/0--Parade/a.jpg", 5, 1, 16, 10): {},
        ("val/1--Meeting/b.jpg", 0, 0, 30, 30): {"Male": 1, "LongHair": 1, "Hat": 1},
    }
    test = {
        ("test/0--Parade/c.jpg", 2, 2, 7, 7): {"Male": -1, "LongHair": 1},
        ("test/0--Parade/c.jpg", -4, 3, 4, 7): {"LongHair": -1, "Hat": -1},
    }
    assert labels_of(source, "test") == labels_of(source, "val") == test


def test_a_person_is_cut_out_of_the_image(tmp_path):
    from PIL import Image

    source = source_of(make_wider(tmp_path))
    pixels = np.arange(200, dtype=np.uint8).reshape(10, 20)
    Image.fromarray(pixels).save(tmp_path / "Image/test/0--Parade/c.png")
    listing = source.splits["test"]
    listing.names = type(listing.names).collect(["test/0--Parade/c.png"] * 2)
    data = ListImages(listing, ATTRIBUTES, lambda image: torch.tensor(np.array(image))[None], mode="L")
    assert torch.equal(data[0].image[0], torch.tensor(pixels[2:7, 2:7]))
    assert torch.equal(data[3].image[0], torch.tensor(pixels[3:7, 0:4]))  # what is inside the image
    assert data[0].labels.tolist() == [0, 1]
    assert data[0].values.tolist() == [-1, 1]
    listing.boxes = np.array([[20, 0, 25, 5], [0, -9, 5, 0]], np.int32)
    assert [data[n].reason for n in (0, 1)] == ["the box is outside the image of 20x10 pixels"] * 2
    assert data[0].name.endswith("c.png, box 20,0,25,5")
    assert data[0].name != data[1].name


def test_broken_wider(tmp_path):
    make_wider(tmp_path)
    path = tmp_path / "wider_attribute_trainval.json"
    table = json.loads(path.read_text())
    good = table["images"][0]["targets"][0]
    table["images"][0]["targets"] = [
        good,
        "nobody",
        {**good, "attribute": [1, 2, 0]},
        {**good, "attribute": [1, 0]},
        {**good, "attribute": []},
        {"attribute": [1, 1, 1]},
        {**good, "bbox": [1, 2, 3]},
        {**good, "bbox": [1, 2, 0, 4]},
        {**good, "bbox": [1, 2, 3, -4]},
        {**good, "bbox": [1, 2, "3", 4]},
        {**good, "bbox": [1, 2, float("inf"), 4]},
        {**good, "bbox": [1, 2, 10**12, 4]},
    ]
    table["images"] += [table["images"][1], {"file_name": "train/gone.jpg", "targets": [good]}, {"targets": [good]}]
    table["images"] += [{"file_name": "train/e.jpg", "targets": []}]
    picture(tmp_path / "Image/train/e.jpg")
    path.write_text(json.dumps(table))
    said = []
    source = source_of(tmp_path, said)
    assert list(labels_of(source, "train").values()) == [{"Male": 1}, {"Male": 1, "LongHair": 1, "Hat": 1}]
    reasons = [line.partition("person ")[2] for line in said[:11]]
    for number, (reason, words) in enumerate(
        zip(reasons, ["no bbox", *["attribute must be 3 of"] * 3, *["bbox must"] * 7], strict=True), 1
    ):
        assert reason.startswith(f"{number}: {words}")
    assert "image 2: val/1--Meeting/b.jpg: the same file" in said[11]
    assert "train/gone.jpg: no such file" in said[12]
    assert "image 4: no file_name" in said[13]
    assert "train/e.jpg: no person in targets" in said[14]
    assert len(said) == 15
    for content, words in [
        ({"images": []}, '"attribute_id_map", got none'),
        ({"images": [], "attribute_id_map": {"1": "x"}}, "attribute_id_map"),
        ({"attribute_id_map": {"0": "x"}}, 'a list of "images", got none'),
        ({"images": [], "attribute_id_map": {"0": "x"}}, "with the 1 attributes of the training images"),
    ]:
        path.write_text(json.dumps(content))
        with pytest.raises(UsageError, match=words):
            source_of(tmp_path)
