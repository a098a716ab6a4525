"""NUS-WIDE in the public layout: seen and unseen classes, splits, word vectors in order, and what can be wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from mlhead._config import TrainConfig
from mlhead._usage import UsageError
from mlhead.data.listing import ImageList
from mlhead.data.loading import evaluation_loader
from mlhead.data.nus_wide import SPLITS, NUSWide, is_nus_wide, parse_labels
from mlhead.data.reporting import BadDataLog

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("timm")

# sorted: bird, boat, city lights, sky, water, zebra
ROWS = [
    ("t0.png", "[sky, water]", "train"),
    ("t1.png", "[boat, zebra]", "train"),
    ("sub/t2.png", "[city lights]", "train"),
    ("t3.png", "[zebra, bird]", "train"),  # unseen labels alone
    ("v0.png", "[zebra, sky]", "val"),
    ("v1.png", "[water]", "val"),
    ("v2.png", "[bird]", "val"),
]
LABELS = ["bird", "boat", "city lights", "sky", "water", "zebra"]
UNSEEN = ["zebra", "bird"]
SEEN = ["boat", "city lights", "sky", "water"]


def table(rows, header="filepath,label,split_name"):
    return "\n".join([header, *(f'{image},"{labels}",{split}' for image, labels, split in rows)]) + "\n"


def column(label, width=5):
    """The word vector of a label: its own numbers, in fp16 as in fp32."""
    return [float(LABELS.index(label) * 10 + place) for place in range(width)]


def save_vectors(folder, labels=LABELS):
    torch.save(torch.tensor([column(label) for label in labels]).T.contiguous(), folder / "wordvec_array.pth")


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "nus"
    for number, (name, _, _) in enumerate(ROWS):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((9, 11, 3), 20 * number, np.uint8)).save(path)
    (root / "data.csv").write_text(table(ROWS))
    (root / "benchmark_81_v0.json").write_text(json.dumps({"test class": UNSEEN}))
    save_vectors(root)
    return root


def config(folder, **options):
    defaults = {"val_fraction": 0.0, "image_size": 8, "crop_scale": 0.5, "hflip": 0.0, "auto_augment": None, "seed": 0}
    return TrainConfig(**{"data": str(folder), "task": "zero-shot", **defaults, **options})


def load(folder, said=None, vectors=None, **options):
    log = BadDataLog("skip", (said if said is not None else []).append)
    return NUSWide(config(folder, **options), log, word_vectors=vectors)


def shown(source, split):
    """Images and label names of a split."""
    data = source.dataset(split, source.image_spec(torch.nn.Identity()))
    return {data.images[i]: [data.class_names[label] for label in data[i].labels] for i in range(len(data))}


def test_classes_splits_and_vectors(folder):
    said = []
    source = load(folder, said)
    assert is_nus_wide(folder)
    assert not is_nus_wide(folder / "sub")
    assert said == []
    assert source.channels == 3
    assert source.num_seen == 4
    assert source.class_names == [*SEEN, "bird", "zebra"]
    assert source.word_vectors.tolist() == [column(name) for name in source.class_names]
    assert source.word_vectors.dtype == torch.float32
    assert shown(source, "train") == {"t0.png": ["sky", "water"], "t1.png": ["boat"], "sub/t2.png": ["city lights"]}
    assert shown(source, "test") == {"v0.png": ["sky", "zebra"], "v1.png": ["water"], "v2.png": ["bird"]}
    assert shown(source, "zsl") == {"v0.png": ["sky", "zebra"], "v2.png": ["bird"]}
    assert source.left_out == {"train": 1, "val": 0}
    assert torch.allclose(source.frequencies(), torch.full((4,), 1.5 / 4))


def test_lists_are_packed_once(folder, monkeypatch):
    """Each split when the folder is opened, and never again for the answers made of it."""
    packed, collect = [], ImageList.collect

    def recorded(*arguments):
        packed.append(collect(*arguments))
        return packed[-1]

    monkeypatch.setattr(ImageList, "collect", recorded)
    source = load(folder, val_fraction=0.5)
    assert len(packed) == len(SPLITS)
    spec = source.image_spec(torch.nn.Identity())
    for _ in range(2):
        source.frequencies()
        for split, own in zip(SPLITS, packed, strict=True):
            if len(own):
                assert source.dataset(split, spec).listing is own
    assert len(packed) == len(SPLITS)


def test_batches_of_a_split(folder):
    source = load(folder)
    spec = source.image_spec(torch.nn.Identity())
    assert (spec.channels, spec.height, spec.width) == (3, 8, 8)
    data = source.dataset("test", spec)
    (batch,) = evaluation_loader(data, len(source.class_names), 8)
    assert batch.images.shape == (3, 3, 8, 8)
    assert batch.targets.tolist() == [[0, 0, 1, 0, 0, 1], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 1, 0]]
    assert [round(image.mean().item(), 4) for image in batch.images] == sorted(
        round(image.mean().item(), 4) for image in batch.images
    )
    training = source.dataset("train", spec)
    assert training.num_classes == source.num_seen
    assert torch.equal(training[4].image, source.dataset("train", spec)[4].image)
    with pytest.raises(UsageError, match=r"split must be one of 'train', 'val', 'test', 'zsl', got 'dev'"):
        source.dataset("dev", spec)
    with pytest.raises(UsageError, match="--val-fraction must leave at least one image for the val split"):
        source.dataset("val", spec)


def test_a_share_of_the_training_images_is_held_out(folder):
    rows = [(f"{i}.png", "[sky, zebra]" if i % 2 else "[water]", "train") for i in range(60)]
    rows += [(f"{i}.png", "[zebra, bird, boat, city lights]", "val") for i in range(60, 64)]
    for name, _, _ in rows:
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / name)
    (folder / "data.csv").write_text(table(rows))
    source = load(folder, val_fraction=0.3)
    train, val = shown(source, "train"), shown(source, "val")
    assert 8 <= len(val) <= 28
    assert sorted([*train, *val]) == sorted(name for name, _, split in rows if split == "train")
    assert all(set(labels) <= {"sky", "water"} for labels in [*train.values(), *val.values()])
    spec = source.image_spec(torch.nn.Identity())
    assert [source.dataset(split, spec).num_classes for split in ("train", "val", "test", "zsl")] == [4, 4, 6, 6]
    share = sum(labels == ["sky"] for labels in train.values())
    assert source.frequencies()[2].item() == pytest.approx((share + 0.5) / (len(train) + 1))
    (folder / "data.csv").write_text(table(rows[::-1]))
    assert shown(load(folder, val_fraction=0.3), "val").keys() == val.keys()


def test_a_list_of_seen_classes_leaves_other_labels_out(folder):
    (folder / "benchmark_81_v0.json").write_text(json.dumps({"train class": ["water", "boat"], "test class": UNSEEN}))
    source = load(folder)
    assert source.class_names == ["boat", "water", "bird", "zebra"]
    assert source.num_seen == 2
    assert source.word_vectors.tolist() == [column(name) for name in source.class_names]
    assert shown(source, "train") == {"t0.png": ["water"], "t1.png": ["boat"]}
    assert shown(source, "test") == {"v0.png": ["zebra"], "v1.png": ["water"], "v2.png": ["bird"]}
    assert source.left_out == {"train": 2, "val": 0}


@pytest.mark.parametrize(
    ("cell", "labels"),
    [
        ("[a, b c]", ("a", "b c")),
        ("['a', 'b c']", ("a", "b c")),
        ('["it\'s", b]', ("it's", "b")),
        ("a", ("a",)),
        ("[a,  b, a, ]", ("a", "b")),
        ("[]", ()),
        ("", ()),
        ("['']", ()),
    ],
)
def test_lists_of_labels(cell, labels):
    assert parse_labels(cell) == labels


def test_columns_are_found_by_position(folder):
    (folder / "data.csv").write_text(table(ROWS, "a,b,c"), encoding="utf-8-sig")
    assert load(folder).class_names == [*SEEN, "bird", "zebra"]
    lines = [f'{image},"{labels}",{split},more' for image, labels, split in ROWS]
    (folder / "data.csv").write_text("\n".join(["split_name,filepath,label,other", *lines]))
    assert len(shown(load(folder), "train")) == 3


def test_bad_rows_are_named_and_their_labels_still_count(folder):
    rows = [
        *ROWS,
        ("gone.png", "[aster]", "train"),  # its label has a column of the array all the same
        ("t0.png", "[sky]", "val"),
        ("v1.png", "[sky]", "test"),
        ("v1.png", "[]", "val"),
        ("", "[sky]", "val"),
    ]
    text = table(rows) + "v1.png,[sky, water],val\n\n"
    (folder / "data.csv").write_text(text)
    save_vectors(folder, ["bird", *LABELS])  # "aster" comes first
    said = []
    source = load(folder, said)
    assert source.class_names == ["aster", *SEEN, "bird", "zebra"]
    assert source.word_vectors[1:].tolist() == [column(name) for name in source.class_names[1:]]
    assert len(said) == 6
    for line, words in zip(
        said,
        [
            "line 9: gone.png: no such file in",
            "line 10: t0.png: the same image as in line 2",
            "line 11: v1.png: the same image as in line 7",
            "line 12: v1.png: the same image as in line 7",
            "line 13: no image is named",
            "line 14: 4 cells where the header has 3: labels with commas need quotes",
        ],
        strict=True,
    ):
        assert words in line
    (folder / "data.csv").write_text(table([*ROWS[:-1], ("v2.png", "[]", "val"), ("t9.png", "[sky]", "dev")]))
    save_vectors(folder)
    said.clear()
    assert len(shown(load(folder, said), "test")) == 2
    assert "v2.png: no labels" in said[0]
    assert "t9.png: split must be train or val, got 'dev'" in said[1]
    with pytest.raises(UsageError, match=r"--on-bad-data is error: .*v2\.png: no labels and 1 more"):
        NUSWide(config(folder), BadDataLog("error", said.append))


def test_an_unreadable_image_is_reported_by_the_loader(folder):
    (folder / "v0.png").write_bytes(b"no picture")
    source = load(folder)
    (batch,) = evaluation_loader(source.dataset("test", source.image_spec(torch.nn.Identity())), 6, 8)
    assert len(batch.images) == 2
    assert batch.bad[0].name.endswith("v0.png")


# Other word vectors


def test_word_vectors_from_elsewhere(folder, tmp_path):
    given = torch.randn(6, 7, dtype=torch.float64)
    assert torch.equal(load(folder, vectors=given).word_vectors, given.float())

    words = tmp_path / "glove.txt"
    words.write_text("".join(f"{label.replace(' ', '_')} {i} {i}.5\n" for i, label in enumerate(LABELS)))
    (folder / "wordvec_array.pth").unlink()
    source = load(folder, word_vectors=str(words))
    assert source.word_vectors[:, 0].tolist() == [LABELS.index(name) for name in source.class_names]
    with pytest.raises(UsageError, match=r"a folder with wordvec_array.pth \(or give --word-vectors\), got .*nus with"):
        load(folder)
    words.write_text("sky 1 2\n")
    with pytest.raises(UsageError, match=r"for all names .*none for 5 of 6: 'boat'"):
        load(folder, word_vectors=str(words))

    # An array has the order of wordvec_array.pth, whichever way it is turned.
    rows = np.array([column(label) for label in LABELS])
    for array in (rows, rows.T):
        np.save(tmp_path / "array.npy", array)
        source = load(folder, word_vectors=str(tmp_path / "array.npy"))
        assert source.word_vectors.tolist() == [column(name) for name in source.class_names]
    np.save(tmp_path / "array.npy", rows[:5])
    with pytest.raises(UsageError, match=r"an array \(6, W\) or \(W, 6\) for 6 names, got \(5, 5\)"):
        load(folder, word_vectors=str(tmp_path / "array.npy"))


def test_the_public_array_has_its_labels_in_columns_also_when_it_is_square(folder):
    square = torch.tensor([column(label, 6) for label in LABELS]).T.contiguous()
    torch.save(square.half(), folder / "wordvec_array.pth")
    source = load(folder)
    assert source.word_vectors.tolist() == [column(name, 6) for name in source.class_names]
    np.save(folder / "square.npy", square.numpy())
    assert torch.equal(load(folder, word_vectors=str(folder / "square.npy")).word_vectors, source.word_vectors)


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (torch.zeros(5, 6, 1), "two dimensions"),
        (torch.zeros(6, 5), r"wordvec_array.pth must be \(W, 6\), a column for each label of data.csv, got \(6, 5\)"),
        (torch.zeros(5, 7), r"must be \(W, 6\), .*got \(5, 7\)"),
        (torch.full((5, 6), float("inf")), "finite vectors, got .*wordvec_array.pth"),
        ({"a": torch.zeros(5, 6)}, "one array"),
    ],
)
def test_arrays_that_do_not_fit(folder, vectors, words):
    torch.save(vectors, folder / "wordvec_array.pth")
    with pytest.raises(UsageError, match=words):
        load(folder)


@pytest.mark.parametrize(
    ("vectors", "words"),
    [
        (torch.zeros(5, 7), r"word_vectors must be \(6, W\) of a floating dtype, got \(5, 7\)"),
        (torch.zeros(6, 7, dtype=torch.int64), "torch.int64"),
        (torch.full((6, 7), float("nan")), "word_vectors must be finite"),
    ],
)
def test_given_vectors_that_do_not_fit(folder, vectors, words):
    with pytest.raises(UsageError, match=words):
        load(folder, vectors=vectors)


# Broken files


def test_missing_files(folder, tmp_path):
    with pytest.raises(UsageError, match=r"--data must be a folder with data.csv and benchmark_81_v0.json, got .*none"):
        load(tmp_path / "none")
    (folder / "benchmark_81_v0.json").unlink()
    assert not is_nus_wide(folder)
    with pytest.raises(UsageError, match=r"without benchmark_81_v0\.json"):
        load(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "must be a JSON file"),
        ("[1]", 'a JSON object with "test class", got a list'),
        ("{}", '"test class" is a list of class names, got none'),
        ('{"test class": []}', r'"test class" is a list of class names, got \[\]'),
        ('{"test class": [1]}', r"list of class names, got \[1\]"),
        ('{"test class": ["zebro", "x"]}', r"labels of data.csv .*got 'zebro' and 1 more \(did you mean 'zebra'\?\)"),
        ('{"test class": ["zebra", "zebra"]}', "without repetition .*'zebra' twice"),
        ('{"test class": ["zebra"], "train class": ["sky", "zebra"]}', "without a common class, got 'zebra' in both"),
        ('{"test class": ["zebra"], "train class": []}', '"train class" is a list'),
        (json.dumps({"test class": LABELS}), "which are the seen classes"),
        (b"\xff\xfe", "must be a JSON file"),
    ],
)
def test_broken_classes(folder, content, words):
    (folder / "benchmark_81_v0.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=words) as error:
        load(folder)
    assert "benchmark_81_v0.json" in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "a CSV with a header of at least three columns .*got an empty file"),
        (b"filepath,label\n", "at least three columns .*got the first line 'filepath,label'"),
        (table(ROWS).partition("\n")[2].encode(), "found by position.*got the first line 't0.png"),
        (b"a,b,c\n", "a CSV with labels .*got none in any row"),
        (b"a,b,c\n\xff,[x],train\n", "must be UTF-8 text"),
        (b"a,b,c\nx.png,[" + b"x" * 200_000 + b"],train\n", "must be a CSV file .*line 2"),
    ],
)
def test_broken_tables(folder, content, words):
    (folder / "data.csv").write_bytes(content)
    with pytest.raises(UsageError, match=words) as error:
        load(folder)
    assert "data.csv" in str(error.value)


def test_no_usable_image(folder):
    for name, _, _ in ROWS:
        (folder / name).unlink()
    with pytest.raises(UsageError, match="at least one usable image, got none in"):
        load(folder)


def test_no_training_image(folder):
    for name in ("t0.png", "t1.png", "sub/t2.png"):
        (folder / name).unlink()
    source = load(folder)
    assert source.class_names == [*SEEN, "bird", "zebra"]
    with pytest.raises(UsageError, match="--data must leave at least one usable image with a seen label"):
        shown(source, "train")
