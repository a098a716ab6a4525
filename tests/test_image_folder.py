"""Images in a folder for each class, and tables of labels in parquet."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from layout_folders import labels_of, picture

from mlhead import train
from mlhead._config import TrainConfig
from mlhead._usage import UsageError
from mlhead.data._tables import Columns, Record, parquet_records
from mlhead.data.folder import is_held_out, read_table
from mlhead.data.image_folder import is_image_folder
from mlhead.data.loading import BadSample
from mlhead.data.reporting import BadDataLog
from mlhead.data.sources import ImageSpec, open_source
from mlhead.inference import evaluate_checkpoint

for package in ("timm", "torchmetrics", "yaml", "PIL"):
    pytest.importorskip(package)


def opened(root, said=None, policy="skip", class_names=None, **options):
    """The source of a folder, and in `said` every line about bad data."""
    log = BadDataLog(policy, (said if said is not None else []).append)
    return open_source(TrainConfig(data=str(root), **options), log, class_names)


def make(root, *names):
    for shade, name in enumerate(names):
        picture(root / name, shade=shade)
    return root


def test_a_folder_for_each_class(tmp_path):
    make(tmp_path, "train/n02/b.JPEG", "train/n01/a.JPEG", "train/n01/more/c.png", "val/n02/v.webp")
    (tmp_path / "train/n01/.hidden.png").write_text("no image")
    (tmp_path / "LICENSE").write_text("in no class")
    (tmp_path / "img_train.tar").touch()  # what it was unpacked from
    said = []
    source = opened(tmp_path, said)
    assert said == []
    assert source.class_names == ["n01", "n02"]
    assert labels_of(source, "train") == {
        "train/n01/a.JPEG": {"n01": 1},
        "train/n01/more/c.png": {"n01": 1},
        "train/n02/b.JPEG": {"n02": 1},
    }
    assert labels_of(source, "val") == {"val/n02/v.webp": {"n02": 1}}
    assert source.splits["test"] is source.splits["val"]
    assert source.frequencies().tolist() == [2.5 / 4, 1.5 / 4]


def test_the_test_folder_and_other_names_of_val(tmp_path):
    make(tmp_path, "train/x/a.png", "validation/x/b.png", "test/x/c.png")
    source = opened(tmp_path)
    assert [list(source.splits[split].names) for split in ("val", "test")] == [["validation/x/b.png"], ["test/x/c.png"]]


def test_one_level_and_sets_without_val_are_split_by_hash(tmp_path):
    names = [f"{label}/{i}.png" for label in ("cat", "dog") for i in range(30)]
    for prefix, top in (("", "one"), ("train/", "two")):
        make(tmp_path / top, *(prefix + name for name in names))
        picture(tmp_path / "two/test/cat/t.png")
        source = opened(tmp_path / top, val_fraction=0.3)
        held_out = {prefix + name for name in names if is_held_out(prefix + name, 0.3)}
        assert set(source.splits["val"].names) == held_out
        assert set(source.splits["train"].names) == {prefix + name for name in names} - held_out
        assert 0 < len(held_out) < 40
    assert list(source.splits["test"].names) == ["test/cat/t.png"]
    with pytest.raises(UsageError, match="one usable image for the test split, got none"):
        opened(tmp_path / "one").dataset("test", ImageSpec(3, 8, 8, [0.5] * 3, [0.5] * 3))


def test_what_is_wrong_is_named_and_counted(tmp_path):
    make(tmp_path, "train/cat/a.png", "train/dog/b.png", "train/stray.png", "val/dgo/c.png", "val/dgo/d.png")
    picture(tmp_path / "val/cat/e.png")
    (tmp_path / "train/cat/notes.txt").write_text("notes")
    (tmp_path / "train/emu").mkdir()
    said = []
    source = opened(tmp_path, said)
    assert source.class_names == ["cat", "dog", "emu"]
    assert [len(source.splits[split]) for split in ("train", "val")] == [2, 1]
    assert said == [
        f"bad data: {tmp_path}/train/stray.png: in no folder of a class",
        f"bad data: {tmp_path}/train/cat/notes.txt: not an image by its name",
        f"bad data: {tmp_path}/train/emu: a class without an image",
        f"bad data: {tmp_path}/val/dgo/c.png: unknown class 'dgo' (did you mean 'dog'?)",
        f"bad data: {tmp_path}/val/dgo/d.png: unknown class 'dgo' (did you mean 'dog'?)",
    ]
    with pytest.raises(UsageError, match=r"--on-bad-data is error: .*stray.png: in no folder of a class and 2 more"):
        opened(tmp_path, policy="error")


def test_classes_in_an_order_of_their_own(tmp_path):
    make(tmp_path, "train/cat/a.png", "train/dog/b.png", "train/emu/c.png", "val/dog/d.png")
    (tmp_path / "classes.txt").write_text("dog\nox\ncat\n")
    said = []
    source = opened(tmp_path, said, classes=str(tmp_path / "classes.txt"))
    assert source.class_names == ["dog", "ox", "cat"]
    assert source.splits["train"].indices.tolist() == [2, 0]
    assert said == [f"bad data: {tmp_path}/train/emu/c.png: unknown class 'emu'"]
    assert opened(tmp_path, class_names=["emu", "dog", "cat"]).splits["train"].indices.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("files", "reader"),
    [
        (["cifar-100-python/meta", "cifar-100-python/train"], "CIFAR100"),
        (["meta", "train", "test"], "CIFAR100"),
        (["batches.meta", "data_batch_1"], "CIFAR10"),
        (["devkit/cars_train_annos.mat", "cars_train/00001.jpg"], "StanfordCars"),
        (["stanford_cars/devkit/cars_train_annos.mat"], "StanfordCars"),
    ],
)
def test_published_files_are_the_job_of_torchvision(tmp_path, files, reader):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match=rf"got the files that torchvision.datasets.{reader} reads in .*: save its"):
        opened(tmp_path)


def test_folders_without_classes(tmp_path):
    make(tmp_path, "a/images/1.png", "b/train/cat/1.png", "b/val/2.png", "b/val/3.png")
    (tmp_path / "c/train/cat").mkdir(parents=True)
    assert not is_image_folder(tmp_path / "a")  # one folder is no choice of classes
    assert not is_image_folder(tmp_path / "c")
    with pytest.raises(UsageError, match=r"a folder where .*val has a folder for each class, got 2 images in"):
        opened(tmp_path / "b")
    with pytest.raises(UsageError, match="--data must be a folder with images in a folder for each class"):
        opened(tmp_path / "c", layout="image-folder")


@pytest.mark.parametrize("loss", ["bce", "softmax"])
def test_training_and_evaluation(tmp_path, loss):
    names = [f"{split}/{label}/{i}.png" for split in ("train", "val") for label in ("cat", "dog") for i in range(6)]
    make(tmp_path / "set", *names)
    broken = tmp_path / "set/val/dog/3.png"
    broken.write_bytes(broken.read_bytes()[:40])
    options = {"steps": 2, "batch_size": 4, "image_size": 32, "head": "gap", "device": "cpu", "loss": loss}
    config = TrainConfig(out=str(tmp_path / "run"), data=str(tmp_path / "set"), **options)
    summary = train.train(config, stream=io.StringIO())
    assert summary.steps == 2
    assert (tmp_path / "run/bad_data.txt").read_text().startswith(f"{broken}\tcannot be decoded")
    found = evaluate_checkpoint(tmp_path / "run/last.pt", device="cpu")
    assert found["mAP"] == pytest.approx(summary.metrics["mAP"])  # val is the test split too
    assert found["top1"] == summary.best["top1"] == summary.metrics["top1"]


# Parquet

COLUMNS = Columns("image", "labels", ";")


def test_rows_of_parquet():
    values = {
        "image": ["a.png", " b.png ", "c.png", None, 7, "d.png", "e.png", "f.png"],
        "labels": ["cat; dog;cat", ["dog ", "dog", "emu"], [], "cat", "cat", None, 3, ["cat", None]],
        "split": ["train", "val", None, None, None, None, None, None],
    }
    assert list(parquet_records(Path("x.parquet"), COLUMNS, values, 100)) == [
        Record("row 100", "a.png", ("cat", "dog"), "train"),
        Record("row 101", "b.png", ("dog", "emu"), "val"),
        Record("row 102", "c.png", (), None),
        Record("row 103", "", ("cat",), None),
        BadSample("x.parquet, row 104", "the path of an image must be text, got 7"),
        BadSample("x.parquet, row 105: d.png", "no labels: null; an image without any has an empty text or list"),
        BadSample("x.parquet, row 106: e.png", "labels must be text or a list of texts, got 3"),
        BadSample("x.parquet, row 107: f.png", "labels must be text or a list of texts, got ['cat', None]"),
    ]


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "x.parquet").touch()
    with pytest.raises(UsageError, match=r"--labels .*x.parquet needs pyarrow, which is not installed: pip install py"):
        read_table(tmp_path / "x.parquet", tmp_path)


@pytest.mark.parametrize("as_list", [False, True])
def test_parquet(tmp_path, as_list):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    make(tmp_path, "a.png", "b.png")
    labels = [["cat", "dog"], [], ["cat"]] if as_list else ["cat;dog", "", "cat"]
    images = ["a.png", "b.png", "gone.png"]
    table = pyarrow.table({"image": images, "more": np.arange(3), "labels": labels, "split": ["train", "val", "train"]})
    parquet.write_table(table, tmp_path / "x.parquet")
    said = []
    source = opened(tmp_path, said, labels=str(tmp_path / "x.parquet"))
    assert labels_of(source, "train") == {"a.png": {"cat": 1, "dog": 1}}
    assert labels_of(source, "val") == {"b.png": {}}
    assert said == [f"bad data: {tmp_path}/x.parquet, row 2: gone.png: no such file in {tmp_path}"]
    with pytest.raises(UsageError, match=r"label-column must be one of the columns of .*: image, more, labels, split"):
        read_table(tmp_path / "x.parquet", tmp_path, label_column="tags")
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    with pytest.raises(UsageError, match="--labels must be a parquet file"):
        read_table(tmp_path / "x.parquet", tmp_path)
