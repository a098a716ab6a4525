"""Open Images: verified labels of both kinds, what is not verified, and rows that cannot be used."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layout_folders import HEADER, IDS, labels_of, make_open_images, source_of

from mlhead._usage import UsageError
from mlhead.data import open_images
from mlhead.data.listing import ListImages
from mlhead.data.loading import evaluation_loader, training_loader

pytest.importorskip("PIL")

# In the order of the descriptions; the two that are called the same are told apart.
NAMES = ["Fish, dried", "Cat (/m/0)", "Dog", "Cat (/m/3)"]
A, B, C, D = (f"{image}.jpg" for image in IDS)
TRAIN = {
    A: {"Cat (/m/0)": 1, "Cat (/m/3)": 1},
    B: {"Fish, dried": 1, "Cat (/m/0)": 0, "Dog": 1},
}


def table_of(root, text):
    path = root / "oidv6-train-annotations-human-imagelabels.csv"
    path.write_text(HEADER + text)
    return path


@pytest.mark.parametrize("chunk", [1, 2, 2**20])
def test_verified_labels(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(open_images, "_CHUNK", chunk)
    said = []
    source = source_of(make_open_images(tmp_path), said)
    assert said == []
    assert source.class_names == NAMES
    assert labels_of(source, "train") == TRAIN
    assert list(source.splits["train"].names) == [A, B]
    assert labels_of(source, "val") == {C: {"Fish, dried": 0, "Dog": 1}}
    assert labels_of(source, "test") == {D: {"Cat (/m/0)": 1}}
    assert torch.allclose(source.frequencies(), torch.full((4,), 1.5 / 3))
    assert [source.splits[split].untagged for split in ("train", "val", "test")] == [0, -1, -1]


def test_the_trainable_classes_alone(tmp_path):
    said = []
    source = source_of(make_open_images(tmp_path, trainable=True), said)
    assert said == []
    assert source.class_names == ["Dog", "Fish, dried"]
    # The other labels of an image do not count, and an image with no label that counts is no part of the set.
    assert labels_of(source, "train") == {B: {"Dog": 1, "Fish, dried": 1}}
    assert len(source.splits["test"]) == 0
    (tmp_path / "oidv6-classes-trainable.txt").write_text("/m/1\n/m/9\n")
    with pytest.raises(UsageError, match=r"trainable\.txt must be made of labels of .*descriptions\.csv, got '/m/9'"):
        source_of(tmp_path)


def test_what_is_not_verified_weighs_less_in_training_and_nothing_in_a_test(tmp_path):
    source = source_of(make_open_images(tmp_path))
    data = {
        split: ListImages(source.splits[split], NAMES, lambda image: torch.zeros(3, 2, 2)) for split in ("train", "val")
    }
    (batch,) = training_loader(data["train"], 4, 2, seed=0, first=0, last=1, untagged_weight=0.25)
    order = torch.argsort(batch.targets[:, 0])  # image A has no fish
    assert batch.targets[order].tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    assert batch.weight[order].tolist() == [[0.25, 1, 0.25, 1], [1, 1, 1, 0.25]]
    (batch,) = training_loader(data["train"], 4, 2, seed=0, first=0, last=1)
    assert batch.weight is None
    (batch,) = training_loader(data["train"], 4, 2, seed=0, first=0, last=1, sparse=True)
    assert batch.weight is None
    order = torch.argsort(batch.targets.to_dense()[:, 0])
    assert batch.targets.to_dense()[order].tolist() == [[0, 1, 0, 1], [1, 0, 1, 0]]
    (batch,) = evaluation_loader(data["val"], 4, 2)
    assert batch.targets.tolist() == [[0, -1, 1, -1]]
    assert batch.weight is None


def test_broken_rows_are_named_and_the_rest_counts(tmp_path):
    make_open_images(tmp_path)
    rows = [
        f"{A[:-4]},verification,/m/0,1",
        f"{A[:-4]},crowdsource-verification,/m/0,1",  # the same once more, which is nothing new
        f"{B[:-4]},verification,/m/2,1",
        f"{B[:-4]},verification,/m/1,0",
        f"{B[:-4]},verification,/m/1,1",
        f"{B[:-4]},verification,/m/404,1",
        f"{A[:-4]},verification,/m/404,1",
        f"{B[:-4]},verification,,1",
        f"{B[:-4]},verification,/m/0",
        f"{B[:-4]},verification,/m/0,0.7",
        "ab,verification,/m/0,1",
        f"{A[:-5]}X,verification,/m/0,1",
        "0000000000000001,verification,/m/0,1",
        "0000000000000001,verification,/m/1,1",
        "ffffffffffffffff,verification,/m/1,1",
        "",
    ]
    path = table_of(tmp_path, "\n".join(rows))
    said = []
    source = source_of(tmp_path, said)
    assert labels_of(source, "train") == {A: {"Cat (/m/0)": 1}, B: {"Fish, dried": 1, "Dog": -1}}
    prefix = f"bad data: {path}"
    assert said == [
        f"{prefix}, line 10: 3 cells where the header has 4",
        f"{prefix}, line 11: Confidence must be 0 or 1, got '0.7'",
        f"{prefix}, line 12: ImageID must be 16 hexadecimal digits, got 'ab'",
        f"{prefix}, line 13: ImageID must be 16 hexadecimal digits, got '{A[:-5]}X'",
        f"{prefix}: '/m/404': unknown label, in 2 rows",
        f"{prefix}: '': unknown label, in 1 rows",
        f"{prefix}: 0000000000000001: no such file in {tmp_path / 'train'}",
        f"{prefix}: ffffffffffffffff: no such file in {tmp_path / 'train'}",
        f"{prefix}: {B[:-4]}, class 2: verified as positive and as negative; counted as unknown",
    ]
    with pytest.raises(UsageError, match=r"--on-bad-data is error: .*line 10.* and 8 more"):
        source_of(tmp_path, policy="error")
    table_of(tmp_path, "")
    assert len(source_of(tmp_path).splits["train"]) == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "columns ImageID, LabelName, Confidence, got columns none"),
        (b"ImageID,LabelName\n", "got columns ImageID, LabelName"),
        (HEADER.encode() + b"\xff,x,/m/0,1\n", "must be UTF-8 text"),
        (HEADER.encode() + b"x" * 200_000 + b",x,/m/0,1\n", r"must be a CSV file \(line 2"),
    ],
)
def test_tables_of_another_kind(tmp_path, content, words):
    make_open_images(tmp_path)
    path = tmp_path / "oidv6-train-annotations-human-imagelabels.csv"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=words) as error:
        source_of(tmp_path)
    assert path.name in str(error.value)


def test_descriptions(tmp_path):
    make_open_images(tmp_path)
    path = tmp_path / "oidv6-class-descriptions.csv"
    boxable = tmp_path / "class-descriptions-boxable.csv"
    boxable.write_text("/m/1,Dog\n/m/2,Fish\n/m/1,Puppy\n/m/5\n,x\n")  # it has no header
    path.unlink()
    said = []
    source = source_of(tmp_path, said)
    assert source.class_names == ["Dog", "Fish"]
    assert labels_of(source, "train") == {B: {"Dog": 1, "Fish": 1}}
    assert [line.partition("boxable.csv")[2] for line in said[:3]] == [
        f", line {n}: no label and name of its own" for n in (3, 4, 5)
    ]
    boxable.write_text("LabelName,DisplayName\n")
    with pytest.raises(UsageError, match="a file with at least one label, got none"):
        source_of(tmp_path)
    boxable.unlink()
    with pytest.raises(UsageError, match=r"a folder with oidv6-class-descriptions\.csv or class-descriptions-boxable"):
        source_of(tmp_path)


def test_tables_are_held_as_numbers(tmp_path, monkeypatch):
    import tracemalloc

    chunk, images, classes, rows = 2**10, 200, 200, 20_000
    monkeypatch.setattr(open_images, "_CHUNK", chunk)
    make_open_images(tmp_path)
    for image in range(images):
        (tmp_path / f"train/{image:016x}.jpg").touch()
    pairs = np.random.default_rng(0).permutation(images * classes)[:rows]
    labels = "".join(f"/l/{label},label {label}\n" for label in range(classes))
    (tmp_path / "oidv6-class-descriptions.csv").write_text(labels + "/m/0,a\n/m/1,b\n/m/2,c\n")
    text = (f"{pair // classes:016x},v,/l/{pair % classes},{pair % 2}\n" for pair in pairs.tolist())
    table_of(tmp_path, "".join(text))
    tracemalloc.start()
    listing = source_of(tmp_path).splits["train"]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    found = np.repeat(np.arange(images), np.diff(listing.offsets)) * classes + listing.indices
    assert np.array_equal(found, np.sort(pairs))
    assert np.array_equal(listing.values, np.sort(pairs) % 2)
    # 24 bytes a row; a chunk in Python's arrays, numpy's and what is computed of them; a few texts for each name.
    assert peak < 24 * rows + 128 * chunk + 500 * (images + classes)
