"""`mlhead data check`: statistics by hand, every kind of problem counted, in any layout."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from layout_folders import make_coco, make_open_images, make_voc, make_wider, picture

from mlhead import cli
from mlhead._config import TrainConfig
from mlhead._usage import UsageError
from mlhead.data._label_picture import draw_labels
from mlhead.data.check import check, statistics
from mlhead.data.listing import Entry, ImageList
from mlhead.data.shards import ShardSample, write_shards

for package in ("timm", "matplotlib"):
    pytest.importorskip(package)
Image = pytest.importorskip("PIL.Image")


def checked(root, **options):
    images = options.pop("images", None)
    return check(TrainConfig(data=str(root), **options), images=images, stream=io.StringIO())


def make(root, *names):
    for shade, name in enumerate(names):
        picture(root / name, shade=shade)
    return root


def test_statistics_by_hand(tmp_path):
    entries = [
        Entry("a", [0, 1, 3], [1, 1, 0]),
        Entry("b", [0], [1]),
        Entry("c", [0, 2], [1, -1]),
        Entry("d", [1, 2], [0, -1]),
    ]
    listing = ImageList.collect(tmp_path, entries)
    positives = listing.positives(5)
    assert positives.tolist() == [3, 1, 0, 0, 0]
    assert statistics(listing, positives, np.array([2, 1, 1, 0])) == {
        "images": 4,
        "without_labels": 1,
        "classes_without_images": 3,
        "images_per_class": {"min": 0, "median": 0.0, "max": 3},
        "labels_per_image": {"min": 0, "median": 1.0, "max": 2},
        "mean_labels": 1.0,
        "imbalance": 3.0,
        "share_of_positives": 4 / 20,
        "verified_negatives": 2,
        "unknown": 2,
    }


def test_a_healthy_folder(tmp_path, capsys):
    root = make(tmp_path / "set", *(f"{s}/{c}/{i}.png" for s in ("train", "val") for c in "xyz" for i in range(4)))
    out = tmp_path / "out"
    assert cli.main(["data", "check", str(root), "--out", str(out)]) == 0
    printed = capsys.readouterr()
    assert "layout image-folder, 3 classes, 24 images decoded" in printed.out
    assert printed.out.splitlines()[-2] == "healthy"
    assert "decoding 24/24" in printed.err
    assert (out / "problems.txt").read_text() == ""
    report = json.loads((out / "report.json").read_text())
    assert list(report["splits"]) == ["train", "val, test"]
    assert report["splits"]["train"]["images_per_class"] == {"min": 4, "median": 4.0, "max": 4}
    with Image.open(out / "labels.png") as drawn:
        assert min(drawn.size) > 300

    assert cli.main(["data", "check", str(root), "--out", str(out), "--json", "--images", "3"]) == 0
    assert json.loads(capsys.readouterr().out) == {**report, "decoded": 6}


def test_every_kind_of_problem(tmp_path, capsys):
    root = tmp_path / "set"
    make(root, "a.png", "b.png", "c.png", "d.png", "e.png", "f.png")
    picture(root / "g.png", shade=0)  # as a.png
    (root / "e.png").write_bytes((root / "e.png").read_bytes()[:50])
    (root / "f.png").write_bytes(b"")
    rows = ["a.png,cat,train", "b.png,,train", "c.png,cta,val", "a.png,cat,train", "gone.png,cat,train", "x.png"]
    rows += ["d.png,cat;dog,val", "e.png,cat,val", "f.png,dog,train", "g.png,cat,val"]
    table = tmp_path / "labels.csv"
    table.write_text("\n".join(["image,labels,split", *rows]))
    arguments = ["data", "check", str(root), "--labels", str(table), "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--images", "all", "--workers", "1"]) == 1
    text = capsys.readouterr().out
    assert text.splitlines()[-2].startswith("not healthy")
    assert f"left out: 1 missing\n  {table}, line 6: gone.png: no such file in {root}" in text
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert report["bad"] == {"corrupt": 2, "duplicate": 1, "missing": 1, "other": 1, "unknown category": 1}
    assert report["notes"] == {"same picture": 1, "without labels": 1}
    lines = [line.split("\t") for line in (tmp_path / "out/problems.txt").read_text().splitlines()]
    assert len(lines) == 8
    assert [line[:2] for line in lines if line[0] == "corrupt"] == [
        ["corrupt", f"{root}/f.png"],
        ["corrupt", f"{root}/e.png"],
    ]
    assert lines[-1] == ["same picture", "val: g.png", "the same pixels as train: a.png"]
    assert lines[-2] == ["without labels", "train: b.png", "no positive label"]


def test_only_some_images_are_decoded(tmp_path):
    root = make(tmp_path, *(f"train/{c}/{i}.png" for c in "xy" for i in range(5)), "val/x/0.png")
    (root / "train/x/1.png").write_bytes(b"")
    assert checked(root, images=2).healthy
    assert checked(root, images=0).decoded == 0
    report = checked(root, images=10)
    assert report.decoded == 11
    assert report.counts(left_out=True) == {"corrupt": 1}


def test_any_layout(tmp_path):
    coco = checked(make_coco(tmp_path / "coco"))
    assert (coco.layout, coco.classes, list(coco.splits)) == ("coco", 3, ["train", "val, test"])
    assert coco.positives["train"].tolist() == [1, 2, 2]
    assert coco.labels["train"].tolist() == [2, 1, 2, 0]
    make_voc(tmp_path / "voc", {"train": {"1": [("dog", 0)]}, "val": {"2": [("cat", 0), ("dog", 1)]}})
    assert checked(tmp_path / "voc").layout == "voc"
    wider = checked(make_wider(tmp_path / "wider"))
    assert wider.layout == "wider"
    assert sum(facts["images"] for facts in wider.splits.values()) == 5
    partly = checked(make_open_images(tmp_path / "open-images"))
    assert partly.layout == "open-images"
    assert partly.splits["train"]["verified_negatives"] == 1
    assert partly.labels["train"].tolist() == [2, 2]  # positives alone
    make(tmp_path / "nus", "0.png", "1.png")
    (tmp_path / "nus/data.csv").write_text('file,label,split\n0.png,"[sky, sea]",train\n1.png,"[zebra, sky]",val\n')
    (tmp_path / "nus/benchmark_81_v0.json").write_text('{"test class": ["zebra"]}')
    torch.save(torch.ones(5, 3), tmp_path / "nus/wordvec_array.pth")
    nus = checked(tmp_path / "nus", val_fraction=0.0)
    assert {split: counts.tolist() for split, counts in nus.positives.items()} == {
        "train": [1, 1, 0],
        "test": [0, 1, 1],
    }
    write_shards(tmp_path / "tar/train", "", [ShardSample("a.png", b"none", ["x"])])
    tar = checked(tmp_path / "tar", out=str(tmp_path / "run"), val_fraction=0.0)
    assert tar.counts(left_out=True) == {"corrupt": 1}
    assert not (tmp_path / "run").exists()


def test_mistakes(tmp_path, capsys):
    assert cli.main(["data", "check", str(tmp_path / "none")]) == 2
    assert "existing folder" in capsys.readouterr().err
    assert cli.main(["data", "check", str(tmp_path), "--images", "few"]) == 2
    assert "--images must be a whole number or 'all', got 'few'" in capsys.readouterr().err
    with pytest.raises(UsageError, match="PATH must be a folder, since the scenes are drawn"):
        checked("scenes")


def test_a_picture_of_many_classes_and_of_none(tmp_path):
    rng = np.random.default_rng(0)
    many = {"train": rng.zipf(1.3, 300_000).clip(max=10**6) - 1, "val": np.zeros(300_000, np.int64)}
    labels = {"train": rng.integers(0, 200, 1000), "val": np.zeros(3, np.int64)}
    draw_labels(many, labels, tmp_path / "labels.png", title="many")
    with Image.open(tmp_path / "labels.png") as drawn:
        assert drawn.size[0] > drawn.size[1] > 300
