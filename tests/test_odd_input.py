"""Odd files and options that users have: named in an error or in the list of bad data, never a traceback."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest
from layout_folders import make_coco, picture, source_of

from mlhead._config import TrainConfig
from mlhead._usage import UsageError
from mlhead.building import build_loss
from mlhead.data import image_folder
from mlhead.data._shard_index import scan
from mlhead.data.folder import read_classes
from mlhead.data.loading import BadSample
from mlhead.data.reporting import BadDataLog
from mlhead.data.sources import ImageSpec, training_transform
from mlhead.train import train

for package in ("timm", "yaml"):
    pytest.importorskip(package)


def test_training_without_training_images(tmp_path: Path) -> None:
    (make_coco(tmp_path / "set") / "annotations/instances_train2014.json").unlink()
    with pytest.raises(UsageError, match="usable image for the train split"):
        source_of(tmp_path / "set").frequencies()
    options = {"backbone": "small", "device": "cpu", "steps": 1, "batch_size": 1, "out": str(tmp_path / "run")}
    with pytest.raises(UsageError, match="usable image for the train split"):
        train(TrainConfig(data=str(tmp_path / "set"), **options))


@pytest.mark.parametrize("name", ["caf\udce9.jpg", "x\ud800.jpg", "caf\u00e9.jpg"])
def test_names_that_are_no_text_are_listed_once(tmp_path: Path, name: str) -> None:
    said: list[str] = []
    for _ in range(2):  # the second is that of a resumed run
        log = BadDataLog("skip", said.append, tmp_path / "bad_data.txt")
        log.begin()
        log.add([BadSample(name, "damaged")])
    lines = (tmp_path / "bad_data.txt").read_bytes().splitlines()
    assert all(line.endswith(b"\tdamaged") for line in lines)
    if name != "x\ud800.jpg":  # no file can have this name, so it does not come back
        assert lines == [os.fsencode(name) + b"\tdamaged"]
        assert len(said) == 1


def test_a_link_to_a_folder_above_is_not_followed(tmp_path: Path) -> None:
    for name in ("cat/1.jpg", "dog/2.jpg", "dog/more/3.jpg", "../else/4.jpg"):
        picture(tmp_path / "set" / name)
    (tmp_path / "set/dog/all").symlink_to(tmp_path / "set")
    (tmp_path / "set/dog/linked").symlink_to(tmp_path / "else")
    source = source_of(tmp_path / "set", classes=None, val_fraction=0.0)
    assert list(source.splits["train"].names) == ["cat/1.jpg", "dog/2.jpg", "dog/linked/4.jpg", "dog/more/3.jpg"]


def test_the_time_of_a_class_is_linear_in_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(40):
        (tmp_path / "cat").mkdir(exist_ok=True)
        (tmp_path / "cat" / f"{number}.jpg").touch()
    asked: list[str] = []

    class Name(str):
        """Counts how often it is hashed."""

        def __hash__(self) -> int:
            asked.append(self)
            return super().__hash__()

    monkeypatch.setattr(image_folder, "_files", lambda path: [Name(name) for name in sorted(os.listdir(path))])
    entries = list(image_folder._entries(tmp_path, [tmp_path], ["cat"], []))
    assert len(entries) == 40
    assert len(asked) <= 40


def test_classes_in_a_file_of_windows_and_in_no_text(tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_bytes(b"\xef\xbb\xbfcat\r\ndog\r\n")
    assert read_classes(tmp_path / "classes.txt") == ["cat", "dog"]
    (tmp_path / "classes.txt").write_bytes(b"\xff\xfe\x00c")
    with pytest.raises(UsageError, match="--classes must be UTF-8 text"):
        read_classes(tmp_path / "classes.txt")


@pytest.mark.parametrize("kind", [b"0", b"L", b"x"])
def test_a_size_in_a_shard_that_no_file_has(tmp_path: Path, kind: bytes) -> None:
    header = bytearray(tarfile.TarInfo("1.png").tobuf())
    header[124:136] = b"\x80" + b"\x7f" * 11
    header[156:157] = kind
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "1.tar").write_bytes(bytes(header) + bytes(1024))
    index = scan(tmp_path / "1.tar")
    assert len(index.names) == 0
    assert index.bad


def test_an_augmentation_that_timm_does_not_have() -> None:
    spec = ImageSpec(3, 8, 8, [0.5] * 3, [0.5] * 3)
    with pytest.raises(UsageError, match=r"--auto-augment .*'foo'"):
        training_transform(TrainConfig(auto_augment="foo"), spec)


@pytest.mark.parametrize(
    "options",
    [
        {"seed": -1},
        {"seed": 2**63},
        {"label_delimiter": ""},
        {"hflip": 1.5},
        {"crop_scale": 0.0},
        {"crop_scale": 1.5},
    ],
    ids=str,
)
def test_options_that_could_not_run(options: dict[str, object]) -> None:
    (name,) = options
    with pytest.raises(UsageError, match="--" + name.replace("_", "-")):
        TrainConfig(**options)  # type: ignore[arg-type]


def test_loss_options_that_are_no_numbers() -> None:
    for options in ({"gamma_neg": "x"}, {"gamma_neg": "nan"}, {"margin": [0.1]}):
        with pytest.raises(UsageError, match="--loss-opt of asl"):
            build_loss(TrainConfig(loss="asl", loss_opt=options))
    build_loss(TrainConfig(loss="asl", loss_opt={"gamma_neg": 2, "margin": 0.1, "reduction": "sum"}))
    for reduction in ("none", 3, ["sum"]):
        with pytest.raises(UsageError, match="--loss-opt reduction must be mean or sum, got"):
            build_loss(TrainConfig(loss="asl", loss_opt={"reduction": reduction}))


def test_training_images_that_cannot_be_read_at_all(tmp_path: Path) -> None:
    folder = make_coco(tmp_path / "set")
    for path in (folder / "train2014").iterdir():
        path.write_bytes(b"no image")
    options = {"backbone": "small", "device": "cpu", "steps": 40, "batch_size": 2, "out": str(tmp_path / "run")}
    with pytest.raises(UsageError, match=r"that can be read, but of the last \d+ none could"):
        train(TrainConfig(data=str(folder), **options))
