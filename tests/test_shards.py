"""Sharded tar archives: labels, random access, the kept index, and shards that are damaged or cut short."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import torch

from mlhead import train
from mlhead._config import TrainConfig
from mlhead._usage import UsageError
from mlhead.data import _shard_index
from mlhead.data._shard_index import open_index, scan
from mlhead.data.folder import is_held_out
from mlhead.data.loading import BadSample, training_loader
from mlhead.data.reporting import BadDataLog
from mlhead.data.shards import ShardSample, find_shards, is_tar, write_shards
from mlhead.data.sources import open_source
from mlhead.inference import evaluate_checkpoint

for package in ("timm", "torchmetrics", "yaml"):
    pytest.importorskip(package)
Image = pytest.importorskip("PIL.Image")


def png(shade):
    """A picture of one colour; a file of its own length for most shades."""
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8 + shade % 5, 3), shade, np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def tar(path, *members):
    """An archive of (name, content) in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            content = content if isinstance(content, bytes) else content.encode()
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def samples(count, start=0):
    names = [["cat"], ["dog", "cat"], [], ["emu"]]
    return [ShardSample(f"s/{i:03d}.png", png(i), names[i % 4]) for i in range(start, start + count)]


def opened(root, said=None, policy="skip", class_names=None, **options):
    """The source of a folder, and in `said` every line about bad data."""
    log = BadDataLog(policy, (said if said is not None else []).append)
    return open_source(TrainConfig(data=str(root), **{"out": str(root / "run"), **options}), log, class_names)


def labels_of(index):
    """The labels of every image of a shard, by its name."""
    rows = zip(index.label_offsets[:-1], index.label_offsets[1:], strict=True)
    labels = [[index.vocabulary[place] for place in index.labels[start:stop]] for start, stop in rows]
    return dict(zip(index.names, labels, strict=True))


def test_written_shards_come_back(tmp_path):
    written = write_shards(tmp_path / "train", "", samples(10), per_shard=4)
    write_shards(tmp_path / "val", "", samples(3, 20))
    assert [path.name for path in written] == ["000000.tar", "000001.tar", "000002.tar"]
    said = []
    source = opened(tmp_path, said)
    assert said == []
    assert source.class_names == ["cat", "dog", "emu"]
    listing = source.splits["train"]
    assert list(listing.names) == [sample.name for sample in samples(10)]
    for number, (_, image, names) in enumerate(samples(10)):
        assert [source.class_names[label] for label in listing.labels(number)[0]] == sorted(names)
        want = np.asarray(Image.open(io.BytesIO(image)))
        assert np.array_equal(np.asarray(listing.open(number, "RGB")), want)
    assert source.splits["test"] is source.splits["val"]
    assert source.frequencies().tolist() == pytest.approx([6.5 / 11, 3.5 / 11, 2.5 / 11])


def test_every_form_of_labels(tmp_path):
    image = png(0)
    index = scan(
        tar(
            tmp_path / "x.tar",
            *(("a.jpg", image), ("a.json", '{"labels": ["cat", "dog", "cat"], "caption": "x"}')),
            *(("b.json", '{"label": "cat;dog"}'), ("b.PNG", image)),
            *(("c.jpg", image), ("c.json", '{"label": 3}'), ("c.txt", "not these")),
            *(("d.jpg", image), ("d.cls", " 7\n")),
            *(("e.jpg", image), ("e.txt", "cat; dog ;;cat")),
            *(("f.jpg", image), ("f.txt", "")),
            *(("dir/g.v2.jpg", image), ("dir/g.jpg", image), ("dir/g.json", '{"caption": "x"}'), ("dir/g.cls", "0")),
            ("._hidden.jpg", image),
        )
    )
    assert labels_of(index) == {
        "a.jpg": ["cat", "dog"],
        "b.PNG": ["cat;dog"],
        "c.jpg": [3],
        "d.jpg": [7],
        "e.jpg": ["cat", "dog"],
        "f.jpg": [],
        "dir/g.jpg": [0],
    }
    assert index.bad == []
    assert labels_of(scan(tmp_path / "x.tar", "dog"))["e.jpg"] == ["cat;", ";;cat"]


def test_bad_samples_are_named_and_the_rest_is_used(tmp_path):
    image = png(0)
    path = tar(
        tmp_path / "x.tar",
        *(("good.jpg", image), ("good.cls", "1")),
        ("none.jpg", image),
        *(("text.jpg", image), ("text.cls", "cat")),
        *(("minus.jpg", image), ("minus.cls", "-1")),
        *(("json.jpg", image), ("json.json", "{")),
        *(("bytes.jpg", image), ("bytes.txt", b"\xff\xfe")),
        *(("list.jpg", image), ("list.json", "[1]")),
        *(("bool.jpg", image), ("bool.json", '{"label": true}')),
        ("alone.cls", "1"),
        *(("two.jpg", image), ("two.png", image), ("two.cls", "2")),
        *(("again.jpg", image), ("again.cls", "2"), ("again.jpg", image)),
    )
    with tarfile.open(path, "a") as archive:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "good.jpg"
        archive.addfile(link)
    index = scan(path)
    assert labels_of(index) == {"good.jpg": [1], "two.jpg": [2], "again.jpg": [2]}
    bad = dict(index.bad)
    assert bad.pop("json.jpg").startswith("labels cannot be parsed: Expecting property name")
    assert bad.pop("bytes.jpg").startswith("labels cannot be parsed: 'utf-8' codec can't decode")
    assert bad == {
        "link.jpg": "a link or another special file",
        "again.jpg": "the same name as a file before it",
        "none.jpg": 'no labels: neither a .json with "labels" or "label", nor .cls, nor .txt',
        "text.jpg": ".cls must be the number of a class, got 'cat'",
        "minus.jpg": ".cls must be the number of a class, got '-1'",
        "list.jpg": "its .json must be an object, got a list",
        "bool.jpg": "label must be names or numbers of classes, got True",
        "alone": "no image beside .cls",
        "two.png": "a second image of its key",
    }


# Damage


def shard_of_five(path):
    """A shard with its index and, for each sample, the byte behind its last file."""
    write_shards(path, "", samples(5))
    path = path / "000000.tar"
    with tarfile.open(path) as archive:
        ends = [m.offset_data + m.size for m in archive.getmembers()]
    return path, scan(path), ends[1::2]


def test_a_shard_cut_short_anywhere(tmp_path):
    path, whole, ends = shard_of_five(tmp_path)
    content = path.read_bytes()
    for length in [*range(0, len(content), 256), ends[2] - 1, ends[2], ends[2] + 1]:
        path.write_bytes(content[:length])
        index = scan(path)
        readable = [name for name, end in zip(whole.names, ends, strict=True) if end <= length]
        assert list(index.names) == readable, length
        assert labels_of(index) == {name: labels_of(whole)[name] for name in readable}
        # A tar archive ends with at least one block of zeros, after the last block of data.
        complete = length >= -(-ends[-1] // 512) * 512 + 512
        assert (index.bad == []) == complete, length


def test_a_damaged_header_costs_its_own_sample_only(tmp_path):
    path, whole, _ = shard_of_five(tmp_path)
    content = bytearray(path.read_bytes())
    start = int(whole.offsets[2]) - 512
    content[start : start + 512] = bytes([7]) * 512
    path.write_bytes(content)
    index = scan(path)
    assert list(index.names) == [name for name in whole.names if name != whole.names[2]]
    assert [name for name, _ in index.bad] == [f"byte {start}", "s/002"]
    assert index.bad[0].reason == f"damaged up to byte {start + 1024}"
    assert index.bad[1].reason == "no image beside .json"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "damaged up to the end (empty file)"),
        (b"this is no archive" * 100, "damaged up to the end"),
        (gzip.compress(b"x", mtime=0), "compressed with gzip; a shard must be a plain tar archive"),
    ],
    ids=["empty", "text", "gzip"],
)
def test_files_that_are_no_archive(tmp_path, content, words):
    (tmp_path / "x.tar").write_bytes(content)
    index = scan(tmp_path / "x.tar")
    assert len(index.names) == 0
    assert [reason for _, reason in index.bad] == [words]
    (gone,) = open_index(tmp_path / "gone.tar", [], ";").bad
    assert gone.reason == "cannot be read: No such file or directory"


def test_a_damaged_shard_in_a_set(tmp_path):
    first, second = write_shards(tmp_path / "train", "", samples(8), per_shard=4)
    write_shards(tmp_path / "val", "", samples(2, 30))
    second.write_bytes(second.read_bytes()[:2048])
    said = []
    assert len(opened(tmp_path, said).splits["train"]) == 5
    assert said == [f"bad data: {second}: byte 2048: cut short after 2 files: an archive ends with zeros"]
    with pytest.raises(UsageError, match=r"--on-bad-data is error: .*000001.tar: byte 2048: cut short"):
        opened(tmp_path, policy="error")
    # Gone or shorter since the index was made.
    listing = opened(tmp_path).splits["train"]
    first.write_bytes(first.read_bytes()[:550])
    second.unlink()
    cut, gone = listing.open(0, "RGB"), listing.open(4, "RGB")
    assert isinstance(cut, BadSample)
    assert cut == BadSample(f"{first}: s/000.png", f"cut short: 38 of {len(png(0))} bytes")
    assert gone == BadSample(f"{second}: s/004.png", "cannot be read: No such file or directory")


def test_an_image_that_cannot_be_decoded(tmp_path):
    broken = samples(3)
    broken[1] = broken[1]._replace(image=b"no picture")
    (path,) = write_shards(tmp_path / "train", "", broken)
    bad = opened(tmp_path, val_fraction=0.0).splits["train"].open(1, "RGB")
    assert bad.name == f"{path}: s/001.png"
    assert bad.reason.startswith("cannot be decoded: UnidentifiedImageError")


# Splits and classes


def test_splits_by_folder_by_name_and_by_hash(tmp_path):
    for folder, names in {
        "a": ["train/0.tar", "validation/0.tar", "test/0.tar"],
        "b": ["set-train-000.tar", "set-val-000.tar", "test.0.tar"],
        "c": ["trainee-000.tar", "trainee-001.tar"],
    }.items():
        for name in names:
            tar(tmp_path / folder / name)
    for folder in "ab":
        shards, bad = find_shards(tmp_path / folder)
        assert [len(shards[split]) for split in ("train", "val", "test")] == [1, 1, 1]
        assert bad == []
    assert len(find_shards(tmp_path / "c")[0]["train"]) == 2
    tar(tmp_path / "b/more.tar")
    for number in (1, 2, 4):
        tar(tmp_path / f"b/set-train-00{number}.tar")
    tar(tmp_path / "b/val-2019.tar")
    tar(tmp_path / "b/val-2024.tar")  # a year, no gap
    assert find_shards(tmp_path / "b")[1] == [
        BadSample(f"{tmp_path}/b/more.tar", "its name says neither train, val nor test, as others do"),
        BadSample(f"{tmp_path}/b/set-train-003.tar", "no such file, between shards that are there"),
    ]
    assert not is_tar(tmp_path)
    with pytest.raises(UsageError, match=r"--data must be a folder with uncompressed shards \(\*.tar\)"):
        opened(tmp_path, layout="tar")

    write_shards(tmp_path / "d", "part-", samples(40), per_shard=10)
    source = opened(tmp_path / "d", val_fraction=0.3)
    names = [sample.name for sample in samples(40)]
    assert list(source.splits["val"].names) == [name for name in names if is_held_out(name, 0.3)]
    assert list(source.splits["train"].names) == [name for name in names if not is_held_out(name, 0.3)]
    for split in ("train", "val"):
        listing = source.splits[split]
        for number, name in enumerate(listing.names):
            _, image, labels = samples(40)[names.index(name)]
            want = np.asarray(Image.open(io.BytesIO(image)))
            assert np.array_equal(np.asarray(listing.open(number, "RGB")), want)
            assert [source.class_names[label] for label in listing.labels(number)[0]] == sorted(labels)


def test_numbers_of_classes(tmp_path):
    numbered = [ShardSample(f"{i}.png", png(i), label) for i, label in enumerate([4, 0, 2, 4])]
    write_shards(tmp_path / "train", "", numbered)
    write_shards(tmp_path / "val", "", [ShardSample("v.png", png(9), 5), ShardSample("w.png", png(9), 1)])
    said = []
    source = opened(tmp_path, said)
    assert source.class_names == ["0", "1", "2", "3", "4"]
    assert source.splits["train"].indices.tolist() == [4, 0, 2, 4]
    assert list(source.splits["val"].names) == ["w.png"]
    assert said == [f"bad data: {tmp_path}/val/000000.tar: v.png: unknown label 5"]

    (tmp_path / "classes.txt").write_text("ant\nbee\ncat\ndog\nemu\nfox\n")
    source = opened(tmp_path, classes=str(tmp_path / "classes.txt"))
    assert source.class_names[4] == "emu"
    assert source.splits["val"].indices.tolist() == [5, 1]
    write_shards(tmp_path / "test", "", [ShardSample("t.png", png(9), ["dog", "cow", "ant"])])
    os.rename(tmp_path / "test/000000.tar", tmp_path / "train/000001.tar")
    with pytest.raises(UsageError, match="labels are all names or all numbers"):
        opened(tmp_path)
    source = opened(tmp_path, said, class_names=["ant", "cow", "dog", "dog2", "elk", "fox"])
    assert source.splits["train"].indices.tolist() == [4, 0, 2, 4, 0, 1, 2]
    write_shards(tmp_path / "e", "", [ShardSample("t.png", png(9), [])])
    with pytest.raises(UsageError, match="at least one label in training, got none"):
        opened(tmp_path / "e")
    with pytest.raises(UsageError, match=r"name must be that of an image, with one dot before jpg.*, got 'a.b.png'"):
        write_shards(tmp_path / "f", "", [ShardSample("a.b.png", png(1), [])])
    assert list((tmp_path / "f").iterdir()) == []


# The kept index


def test_the_index_is_made_once(tmp_path, monkeypatch):
    path, whole, _ = shard_of_five(tmp_path)
    kept = [tmp_path / "a.npz", tmp_path / "b.npz"]
    scans = []
    monkeypatch.setattr(_shard_index, "scan", lambda *arguments: scans.append(1) or scan(*arguments))

    def count(delimiter=";"):
        before = len(scans)
        index = open_index(path, kept, delimiter)
        assert labels_of(index) == labels_of(whole)
        for name in ("offsets", "sizes"):
            assert np.array_equal(getattr(index, name), getattr(whole, name))
        return len(scans) - before

    assert [count(), count(), count()] == [1, 0, 0]
    assert [path.exists() for path in kept] == [True, False]
    os.utime(path, ns=(1, 2))
    assert [count(), count()] == [1, 0]
    assert [count("|"), count("|")] == [1, 0]
    content = kept[0].read_bytes()
    for damaged in (content[:100], content[:-200], b"", content.replace(b"\x93NUMPY", b"\x00NUMPY")):
        kept[0].write_bytes(damaged)
        assert [count("|"), count("|")] == [1, 0]
    content = bytearray(content)
    content[content.index(b"s/000.png") + 3] ^= 1  # a name, found by the checksum alone
    kept[0].write_bytes(content)
    assert count("|") == 1

    # Where the first place cannot be written, the second is used.
    kept[0].unlink()
    kept[0].mkdir()
    assert [count(), count()] == [1, 0]
    assert kept[1].is_file()
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob(".*.part"))
    kept = []
    assert [count(), count()] == [1, 1]


def test_what_is_bad_is_kept_with_the_index(tmp_path):
    path = tar(tmp_path / "train/0.tar", ("a.jpg", png(0)), ("b.jpg", png(1)), ("b.cls", "0"))
    said, again = [], []
    opened(tmp_path, said, val_fraction=0.0)
    assert (tmp_path / "train/0.tar.index.npz").is_file()
    opened(tmp_path, again, val_fraction=0.0)
    assert said == again
    assert said[0].startswith(f"bad data: {path}: a.jpg: no labels")
    moved = tmp_path / "moved"
    os.rename(tmp_path / "train", moved)
    opened(moved, again := [], val_fraction=0.0)
    assert again[0].startswith(f"bad data: {moved}/0.tar: a.jpg: no labels")


# Training


def test_batches_repeat_exactly_from_anywhere_and_in_workers(tmp_path):
    write_shards(tmp_path / "train", "", samples(30), per_shard=7)
    source = opened(tmp_path, image_size=16, val_fraction=0.2, auto_augment="rand-m9-mstd0.5")
    data = source.dataset("train", source.image_spec(None))
    options = {"seed": 3, "last": 7, "sparse": True}
    whole = list(training_loader(data, 3, 8, first=0, **options))
    tail = list(training_loader(pickle.loads(pickle.dumps(data)), 3, 8, first=2, workers=2, **options))
    assert len(tail) == 5
    for a, b in zip(whole[2:], tail, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets.indices, b.targets.indices)
    assert not torch.equal(whole[0].images, whole[3].images)


def test_training_and_evaluation(tmp_path):
    write_shards(tmp_path / "set", "train-", samples(12), per_shard=5)
    write_shards(tmp_path / "set", "val-", samples(6, 40))
    options = {"steps": 2, "batch_size": 4, "image_size": 32, "head": "gap", "device": "cpu", "fused_loss": True}
    config = TrainConfig(out=str(tmp_path / "run"), data=str(tmp_path / "set"), **options)
    summary = train.train(config, stream=io.StringIO())
    found = evaluate_checkpoint(tmp_path / "run/last.pt", device="cpu")
    assert found["mAP"] == pytest.approx(summary.metrics["mAP"])
    assert json.dumps(found)
