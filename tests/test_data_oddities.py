"""Files as people have them: photos on their side, 16-bit scans, quotes left open, folders in circles, dollars."""

from __future__ import annotations

import io

import numpy as np
import pytest
from training_runs import config, run

from mlhead import cli
from mlhead._usage import UsageError
from mlhead.data import nus_wide, open_images
from mlhead.data.folder import open_image, read_table
from mlhead.data.image_folder import open_image_folder
from mlhead.data.loading import BadSample
from mlhead.data.reporting import BadDataLog
from mlhead.data.voc import _labels
from mlhead.inference import evaluate_checkpoint

Image = pytest.importorskip("PIL.Image")
pytestmark = pytest.mark.usefixtures("one_thread")


def picture(path, colour="red", size=(24, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def opened(root, **options):
    log = BadDataLog("skip", lambda line: None)
    return open_image_folder(config("unused", data=str(root), **options), log), log


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_upright(tmp_path, orientation):
    pixels = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    turned = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(pixels),
    }[orientation]
    image = Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x112] = orientation
    image.save(tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(open_image(tmp_path / "a.png", "RGB")), turned)


def test_images_of_16_bits_keep_their_greys(tmp_path):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    for mode in ("RGB", "L"):
        found = np.asarray(open_image(tmp_path / "a.png", mode))
        grey = found if mode == "L" else found[..., 0]
        assert np.array_equal(grey, ramp >> 8)
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(tmp_path / "a.tif")
    bad = open_image(tmp_path / "a.tif", "RGB")
    assert isinstance(bad, BadSample)
    assert "floating-point numbers" in bad.reason


def test_a_quote_that_is_not_closed_loses_no_row(tmp_path):
    for number in range(4):
        picture(tmp_path / f"{number}.png")
    table = tmp_path / "labels.csv"
    table.write_text('image,labels\n0.png,cat\n1.png,"dog\n2.png,cat\n3.png,dog\n')
    with pytest.raises(
        UsageError, match=r"--labels must be a CSV file, got .*row that begins in line 3 has several lines"
    ):
        read_table(table, tmp_path)


@pytest.mark.parametrize("reader", ["open-images", "nus-wide"])
def test_a_quote_that_is_not_closed_in_other_tables(tmp_path, reader):
    path = tmp_path / "table.csv"
    path.write_text('a,b,c\n0.png,"[cat],train\n1.png,[dog],train\n')
    with pytest.raises(UsageError, match=r"must be a CSV file \(line 3: the row that begins in line 2 has several"):
        list(open_images._rows(path)) if reader == "open-images" else nus_wide._read_table(path, tmp_path)


def test_folders_beside_those_of_splits_are_reported(tmp_path):
    for name in ("train/cat/a.png", "train/dog/b.png", "Val/cat/c.png", "TEST/dog/d.png", "birds/e.png"):
        picture(tmp_path / name)
    source, log = opened(tmp_path)
    assert {split: list(part.names) for split, part in source.splits.items()} == {
        "train": ["train/cat/a.png", "train/dog/b.png"],
        "val": ["Val/cat/c.png"],
        "test": ["TEST/dog/d.png"],
    }
    assert list(log.names) == [str(tmp_path / "birds")]
    assert "beside train/, and not of a split" in log.names[str(tmp_path / "birds")]


def test_links_in_a_circle_end(tmp_path):
    for name in ("cats/a.png", "dogs/b.png"):
        picture(tmp_path / name)
    (tmp_path / "cats/x").symlink_to(tmp_path / "dogs")
    (tmp_path / "dogs/y").symlink_to(tmp_path / "cats")
    source, _ = opened(tmp_path, val_fraction=0.0)
    assert sorted(source.splits["train"].names) == ["cats/a.png", "cats/x/b.png", "dogs/b.png", "dogs/y/a.png"]


def test_an_unknown_encoding_is_bad_data(tmp_path):
    (tmp_path / "a.xml").write_text('<?xml version="1.0" encoding="foo"?><annotation/>')
    assert "cannot be parsed: unknown encoding" in _labels(tmp_path / "a.xml", None).reason


def test_names_with_dollars_and_other_bytes_are_drawn(tmp_path, capsys):
    root = tmp_path / "dollar $a^$ x"
    for label in ("cost $x^$ y", "$_$"):
        for number in range(6):
            picture(root / label / f"{number} $^$.png", "red" if label == "$_$" else "blue")
    assert cli.main(["data", "check", str(root), "--out", str(tmp_path / "check")]) == 0
    run(tmp_path / "run", data=str(root), image_size=16, head="gap", steps=1, batch_size=4, val_fraction=0.3)
    image = next((root / "$_$").iterdir())
    out = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert cli.main(["predict", str(tmp_path / "run/last.pt"), str(image), *out]) == 0
    assert len(list((tmp_path / "out").iterdir())) == 1


@pytest.mark.parametrize("command", ["check", "predict"])
def test_an_output_folder_that_is_a_file_is_refused_before_the_work(tmp_path, capsys, command):
    picture(tmp_path / "set/cat/a.png")
    picture(tmp_path / "set/dog/b.png")
    (tmp_path / "out").touch()
    head = (
        ["data", "check", str(tmp_path / "set")]
        if command == "check"
        else ["predict", "x.pt", str(tmp_path / "set/cat/a.png")]
    )
    assert cli.main([*head, "--out", str(tmp_path / "out")]) == 2
    assert "--out must be a folder, got the file" in capsys.readouterr().err


def test_a_check_of_nothing_says_why(tmp_path, capsys):
    (tmp_path / "labels.csv").write_text("image,labels\nnone.png,cat\n")
    assert cli.main(["data", "check", str(tmp_path), "--labels", str(tmp_path / "labels.csv")]) == 2
    said = capsys.readouterr().err
    assert "none.png: no such file in" in said
    assert "--labels must name at least one usable image" in said


def table(folder, flip):
    rows = []
    for number in range(24):
        picture(folder / f"{number}.png", "red" if number % 2 else "blue")
        rows.append(f"{number}.png,{'cat' if bool(number % 2) != flip else 'dog'}")
    (folder / "labels.csv").write_text("\n".join(["image,labels", *rows]) + "\n")
    return {"data": str(folder), "labels": str(folder / "labels.csv")}


def test_another_table_has_the_columns_of_the_runs_own(tmp_path):
    options = table(tmp_path / "a", False)
    for name in ("a", "b"):
        text = (tmp_path / "a/labels.csv").read_text().replace("image,labels", "file,tags")
        (tmp_path / f"{name}.csv").write_text(text)
    own = {**options, "labels": str(tmp_path / "a.csv"), "image_column": "file", "label_column": "tags"}
    run(tmp_path / "run", **own, image_size=16, head="gap", steps=1, batch_size=4, val_fraction=0.3)
    changes = {"labels": str(tmp_path / "b.csv")}
    assert evaluate_checkpoint(tmp_path / "run/last.pt", changes=changes, device="cpu", stream=io.StringIO())["mAP"] > 0


def test_other_data_is_not_measured_by_the_labels_of_the_runs_own(tmp_path):
    a = table(tmp_path / "a", False)
    run(tmp_path / "run", **a, image_size=16, head="gap", steps=2, batch_size=4, val_fraction=0.3)
    table(tmp_path / "b", True)
    checkpoint, said = tmp_path / "run/last.pt", io.StringIO()
    with pytest.raises(UsageError, match="--labels must be given for a folder of images"):
        evaluate_checkpoint(checkpoint, changes={"data": str(tmp_path / "b")}, device="cpu", stream=said)
    for name in ("x/cat/0.png", "x/dog/1.png"):
        for number in range(8):
            picture(tmp_path / f"{name}{number}.png")
    found = evaluate_checkpoint(
        checkpoint, split="train", changes={"data": str(tmp_path / "x")}, device="cpu", stream=said
    )
    assert "top1" in found
    assert "images of the train split" in said.getvalue()


def test_labels_of_validation_stand_in_one_place(tmp_path):
    options = table(tmp_path / "a", False)
    lines = (tmp_path / "a/labels.csv").read_text().splitlines()
    split = [f"{line},{'val' if i % 3 == 0 else 'train'}" for i, line in enumerate(lines[1:])]
    (tmp_path / "a/labels.csv").write_text("\n".join([lines[0] + ",split", *split]) + "\n")
    with pytest.raises(UsageError, match=r"--val-labels must be absent where .* has rows of the split val"):
        run(tmp_path / "run", **options, val_labels=options["labels"], image_size=16, head="gap")


def test_options_of_other_layouts_are_refused(tmp_path):
    for name in ("cat/a.png", "dog/b.png"):
        picture(tmp_path / name)
    for options, words in (
        ({"label_column": "zz"}, "--label-column must be absent for data in the layout image-folder: it is of csv"),
        ({"voc_difficult": "negative"}, "--voc-difficult must be absent for data in the layout image-folder"),
    ):
        with pytest.raises(UsageError, match=words):
            run(tmp_path / "run", data=str(tmp_path), image_size=16, head="gap", **options)
