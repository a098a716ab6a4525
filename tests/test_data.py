"""Scenes, image folders, batches: determinism, separation of splits, and bad data that is named and counted."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from mlhead._usage import UsageError
from mlhead.data.folder import classes_of, keep_known, open_image, read_classes, read_table, split_rows
from mlhead.data.listing import ListImages, from_rows
from mlhead.data.loading import BadSample, Collate, Sample, TrainingBatches, evaluation_loader, training_loader
from mlhead.data.reporting import BadDataLog
from mlhead.data.scenes import GAP_ACROSS, NUM_CLASSES, SPLITS, Scenes, scan_table, scans_of_split

pytest.importorskip("sklearn")
Image = pytest.importorskip("PIL.Image")


# Scenes


def test_no_scan_is_in_two_splits():
    sets = {split: set(np.concatenate(scans_of_split(split)).tolist()) for split in SPLITS}
    assert sum(len(s) for s in sets.values()) == len(set.union(*sets.values())) == 1797
    for split in SPLITS:
        assert all(len(pool) >= 15 for pool in scans_of_split(split))


@pytest.mark.parametrize("num_classes", NUM_CLASSES)
def test_pixels_come_from_the_scans_of_the_split(num_classes):
    for split in SPLITS:
        scenes = Scenes(split, num_classes=num_classes)
        plan = scenes.plan(range(200))
        allowed = set(np.concatenate(scans_of_split(split)).tolist())
        assert set(plan.scans.ravel().tolist()) <= allowed
        _, digit = scan_table()
        written = (digit[plan.scans] * 10 ** np.arange(scenes.num_digits - 1, -1, -1)).sum(axis=2)
        assert (written == plan.labels).all()


@pytest.mark.parametrize("num_classes", NUM_CLASSES)
def test_numbers_never_touch_and_are_drawn_whole(num_classes):
    scenes = Scenes("train", num_classes=num_classes, seed=3)
    plan = scenes.plan(range(500))
    pictures = scenes.draw(plan)
    scans, _ = scan_table()
    width = scenes.number_width
    for number in range(500):
        shown = np.flatnonzero(plan.shown[number])
        cover = np.zeros((scenes.size, scenes.size), int)
        for n in shown:
            top, left = plan.top[number, n], plan.left[number, n]
            assert 0 <= top <= scenes.size - 8
            assert 0 <= left <= scenes.size - width
            # The free pixels to the right belong to the number too, so that neighbours cannot read as one number.
            assert (cover[top : top + 8, max(0, left - GAP_ACROSS) : left + width + GAP_ACROSS] == 0).all()
            cover[top : top + 8, left : left + width] += 1
            ink = plan.ink[number, n]
            want = np.concatenate([(scans[s] * ink).astype(np.uint8) for s in plan.scans[number, n]], axis=1)
            assert (pictures[number, top : top + 8, left : left + width] == want).all()
        assert (pictures[number][cover == 0] == 0).all()


def test_a_scene_depends_on_its_serial_alone():
    a, b = Scenes("train", seed=5), Scenes("train", seed=5)
    forward = a.__getitems__(list(range(64)))
    shuffled = list(range(63, -1, -1))
    backward = b.__getitems__(shuffled)
    for serial, sample in zip(shuffled, backward, strict=True):
        assert torch.equal(sample.image, forward[serial].image)
        assert (sample.labels == forward[serial].labels).all()
    assert torch.equal(b[17].image, forward[17].image)


def test_scenes_differ_by_seed_split_and_serial():
    images = [
        Scenes(split, seed=seed)[serial].image for split in SPLITS for seed in (0, 1) for serial in (0, 1, 10**12)
    ]
    for i, image in enumerate(images):
        assert not any(torch.equal(image, other) for other in images[:i])


def test_counts_and_classes_are_spread_evenly():
    scenes = Scenes("train", seed=1)
    plan = scenes.plan(range(40_000))
    per_count = np.bincount(plan.shown.sum(axis=1), minlength=5)[1:] / 40_000
    assert np.abs(per_count - 0.25).max() < 0.01
    per_class = np.bincount(plan.labels.ravel(), minlength=100) / plan.labels.size
    assert np.abs(per_class - 0.01).max() < 0.0015
    # The free place of a number: every position that fits is taken.
    assert set(plan.left[plan.shown].tolist()) == set(range(40 - 16 + 1))


def test_labels_and_boxes_agree_with_the_plan():
    scenes = Scenes("test", seed=2)
    for serial in range(50):
        assert sorted({box.label for box in scenes.boxes(serial)}) == scenes[serial].labels.tolist()
        assert scenes.class_names[scenes.boxes(serial)[0].label] == f"{scenes.boxes(serial)[0].label:02d}"


def test_workers_give_the_same_batches():
    scenes = Scenes("train", length=200, seed=4)
    alone = list(training_loader(scenes, 100, 16, seed=1, first=3, last=9))
    with_workers = list(training_loader(scenes, 100, 16, seed=1, first=3, last=9, workers=2))
    assert len(alone) == len(with_workers) == 6
    for a, b in zip(alone, with_workers, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.targets, b.targets)


def test_pixels_are_roughly_normalised():
    images = torch.stack([s.image for s in Scenes("train").__getitems__(list(range(500)))])
    assert abs(images.mean()) < 0.1
    assert abs(images.std() - 1) < 0.1
    picture = Scenes("train").to_picture(images[0])
    assert (picture[..., 0] == Scenes("train").draw(Scenes("train").plan([0]))[0]).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "dev"}, "split must be one of"),
        ({"num_classes": 50}, "--num-classes must be 10, 100, 1000 or 10000"),
        ({"length": 0}, "length must be at least 1"),
        ({"size": 20}, "max_numbers must be between 1 and 2"),
        ({"max_numbers": 9}, "max_numbers must be between 1 and 8"),
    ],
)
def test_scene_arguments_are_checked(options, words):
    with pytest.raises(UsageError, match=words):
        Scenes(**options)


# Batches


def test_training_batches_cover_each_epoch_once_and_start_anywhere():
    every = list(TrainingBatches(50, 8, seed=0, first=0, last=18))
    for epoch in range(3):
        serials = [s for batch in every[6 * epoch : 6 * epoch + 6] for s in batch]
        assert len(set(serials)) == 48
        assert all(50 * epoch <= s < 50 * (epoch + 1) for s in serials)
    assert [s % 50 for s in every[0]] != [s % 50 for s in every[6]]
    assert list(TrainingBatches(50, 8, seed=0, first=7, last=18)) == every[7:]
    assert list(TrainingBatches(50, 8, seed=1, first=0, last=1)) != every[:1]


def test_evaluation_sees_every_sample_once_in_order():
    batches = list(evaluation_loader(Scenes("val", length=21), 100, 8))
    assert [len(b.images) for b in batches] == [8, 8, 5]
    assert torch.equal(batches[2].images[4], Scenes("val")[20].image)


def test_collate_makes_dense_targets_and_carries_bad_samples():
    image = torch.zeros(1, 4, 4)
    batch = Collate(5)(
        [Sample(image, np.array([1, 4])), BadSample("x.png", "broken"), Sample(image, np.array([], int))]
    )
    assert batch.targets.tolist() == [[0, 1, 0, 0, 1], [0, 0, 0, 0, 0]]
    assert len(batch.images) == 2
    assert batch.bad == [BadSample("x.png", "broken")]
    assert len(Collate(5)([BadSample("x.png", "broken")]).images) == 0


def test_collate_makes_sparse_targets():
    image = torch.zeros(1, 4, 4)
    samples = [Sample(image, np.array([1, 4])), BadSample("x.png", "broken"), Sample(image, np.array([], int))]
    targets = Collate(5, sparse=True)(samples).targets
    assert targets.indices.tolist() == [1, 4]
    assert targets.offsets.tolist() == [0, 2, 2]
    assert targets.num_classes == 5
    assert torch.equal(targets.to_dense(), Collate(5)(samples).targets)
    assert Collate(5, sparse=True)([BadSample("x.png", "broken")]).targets.batch == 0
    loader = training_loader(Scenes("train"), 100, 4, seed=0, first=0, last=2, workers=1, sparse=True)
    assert [batch.targets.batch for batch in loader] == [4, 4]


def test_loaders_leave_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    next(iter(training_loader(Scenes("train"), 100, 4, seed=0, first=0, last=2)))
    next(iter(evaluation_loader(Scenes("val"), 100, 4)))
    assert torch.equal(torch.get_rng_state(), before)


# Image folders


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png", "sub/c.png", "d.jpg"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (12, 10, 3), dtype=np.uint8)).save(path)
    return tmp_path


def write(folder, text):
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_good_rows_are_read(folder):
    path = write(folder, "image,labels\na.png,cat;dog\nb.png,\nsub/c.png, dog ; dog;emu\n\n")
    table = read_table(path, folder / "images")
    assert table.bad == []
    assert [(r.image, r.labels) for r in table.rows] == [
        ("a.png", ("cat", "dog")),
        ("b.png", ()),
        ("sub/c.png", ("dog", "emu")),
    ]
    assert classes_of(table.rows) == ["cat", "dog", "emu"]


def test_columns_and_delimiter_can_be_named(folder):
    path = write(folder, "id,tags,file\n1,x|y,a.png\n")
    table = read_table(path, folder / "images", image_column="file", label_column="tags", delimiter="|")
    assert table.rows[0].labels == ("x", "y")


def test_every_bad_row_is_named_and_none_vanishes(folder):
    lines = ["a.png,cat", "b.png,cat,extra", "nothere.png,dog", ",dog", "a.png,dog", "d.jpg,dog", "sub/c.png"]
    table = read_table(write(folder, "\n".join(["image,labels", *lines])), folder / "images")
    assert len(table.rows) + len(table.bad) == len(lines)
    text = {bad.name.rpartition("line ")[2]: bad.reason for bad in table.bad}
    assert text["3"] == "3 cells where the header has 2"
    assert "no such file" in text["4: nothere.png"]
    assert text["5"] == "no image is named"
    assert text["6: a.png"] == "the same image as in line 2"
    assert text["8"] == "1 cells where the header has 2"


def test_two_names_of_one_file_are_one_image(folder):
    table = read_table(write(folder, "image,labels\na.png,cat\n./a.png,dog\nsub//c.png,cat\n"), folder / "images")
    assert [row.image for row in table.rows] == ["a.png", "sub/c.png"]
    assert [bad.reason for bad in table.bad] == ["the same image as in line 2"]


def test_unknown_labels_and_splits_are_bad(folder):
    path = write(folder, "image,labels,split\na.png,cat,train\nb.png,cta,val\nd.jpg,cat,dev\n")
    table = keep_known(read_table(path, folder / "images"), ["cat", "dog"])
    assert [r.image for r in table.rows] == ["a.png"]
    reasons = [bad.reason for bad in table.bad]
    assert "split must be train, val or test, got 'dev'" in reasons
    assert "unknown label 'cta' (did you mean 'cat'?)" in reasons


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "--labels must be an existing CSV file"),
        (b"img,labels\n", "--image-column must be one of the columns of .*: img, labels"),
        (b"image,tags\n", "--label-column must be one of the columns"),
        (b"", "--image-column must be one of the columns of .*: none"),
        (b"image,labels\n\xff\xfe,x\n", "--labels must be UTF-8 text"),
    ],
)
def test_unreadable_tables(folder, content, words):
    path = folder / "labels.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=words):
        read_table(path, folder / "images")


def test_splits_by_column_or_by_hash(folder):
    path = write(folder, "image,labels,split\na.png,x,train\nb.png,x,test\nd.jpg,x,val\n")
    splits = split_rows(read_table(path, folder / "images").rows, 0.5)
    assert {k: [r.image for r in v] for k, v in splits.items()} == {
        "train": ["a.png"],
        "val": ["d.jpg"],
        "test": ["b.png"],
    }

    rows = [r._replace(image=f"{i}.png", split=None) for i, r in enumerate([*splits["train"]] * 2000)]
    hashed = split_rows(rows, 0.1)
    assert 150 < len(hashed["val"]) < 250
    assert len(hashed["train"]) + len(hashed["val"]) == 2000
    backwards = split_rows(rows[::-1], 0.1)
    assert sorted(r.image for r in backwards["val"]) == sorted(r.image for r in hashed["val"])


def test_class_files(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("dog\ncat\n\n")
    assert read_classes(path) == ["dog", "cat"]
    path.write_text("dog\ncat\ndog\n")
    with pytest.raises(UsageError, match="--classes must be a list without repetition, got 'dog' twice"):
        read_classes(path)
    path.write_text("\n")
    with pytest.raises(UsageError, match="at least one class"):
        read_classes(path)
    with pytest.raises(UsageError, match="existing text file"):
        read_classes(tmp_path / "none.txt")


def corrupt_images(folder):
    good = (folder / "images/d.jpg").read_bytes()
    (folder / "images/cut.jpg").write_bytes(good[: len(good) // 2])
    (folder / "images/empty.png").write_bytes(b"")
    (folder / "images/text.png").write_bytes(b"this is no picture")
    png = bytearray((folder / "images/a.png").read_bytes())
    png[60] ^= 0xFF
    (folder / "images/flipped.png").write_bytes(bytes(png))
    return ["cut.jpg", "empty.png", "text.png", "flipped.png"]


def test_corrupt_images_are_named_and_the_rest_goes_on(folder):
    broken = corrupt_images(folder)
    path = write(folder, "image,labels\n" + "".join(f"{n},x\n" for n in ["a.png", *broken, "b.png"]))
    rows = read_table(path, folder / "images").rows
    data = ListImages(from_rows(folder / "images", rows, ["x"]), ["x"], lambda image: torch.zeros(3, 4, 4))
    (batch,) = evaluation_loader(data, 1, 10)
    assert len(batch.images) == 2
    assert [bad.name.rpartition("/")[2] for bad in batch.bad] == broken
    assert all("cannot be decoded" in bad.reason for bad in batch.bad)
    assert open_image(folder / "images/gone.png", "RGB").reason == "no such file"


def test_augmentation_depends_on_the_serial_alone(folder):
    rows = read_table(write(folder, "image,labels\na.png,x\nb.png,x\n"), folder / "images").rows

    def transform(image):
        return torch.tensor([[[random.random(), np.random.rand(), torch.rand(()).item()]]])

    data = ListImages(from_rows(folder / "images", rows, ["x"]), ["x"], transform, seed=7)
    states = random.getstate(), torch.get_rng_state()
    first = [data[i].image for i in range(6)]
    assert states[0] == random.getstate()
    assert torch.equal(states[1], torch.get_rng_state())
    assert all(torch.equal(data[i].image, first[i]) for i in (5, 0, 3))
    assert len({tuple(image.flatten().tolist()) for image in first}) == 6


def test_bad_data_log_names_counts_and_stops(tmp_path):
    said = []
    log = BadDataLog("skip", said.append, tmp_path / "bad.txt", shown=2)
    log.add([BadSample(f"{i}.png", "broken") for i in range(5)])
    log.add([BadSample("0.png", "broken")])
    assert said[:2] == ["bad data: 0.png: broken", "bad data: 1.png: broken"]
    assert len(said) == 3
    assert not (tmp_path / "bad.txt").exists()  # an earlier run's would still be whole
    log.begin()
    log.add([BadSample("5.png", "broken")])
    assert len((tmp_path / "bad.txt").read_text().splitlines()) == 6
    assert log.summary().startswith("bad data: 6 rows or images were left out")
    with pytest.raises(UsageError, match=r"--on-bad-data is error: 0.png: broken and 1 more"):
        BadDataLog("error", said.append).add([BadSample("0.png", "broken"), BadSample("1.png", "broken")])
    assert BadDataLog("skip", said.append).summary() == ""


def test_long_tail_of_the_scenes():
    scenes = Scenes("train", num_classes=10_000, size=40, long_tail=True)
    assert scenes.frequency.sum() == pytest.approx(1)
    assert scenes.frequency.max() / scenes.frequency.min() == pytest.approx(10_009 / 10)
    assert len(np.unique(scenes.frequency)) == 10_000  # the ranks are a permutation
    labels = np.concatenate([s.labels for s in scenes.__getitems__(range(2000))])
    top = np.argsort(-scenes.frequency)[:100]
    assert np.isin(labels, top).mean() == pytest.approx(scenes.frequency[top].sum(), abs=0.03)
    assert labels.max() < 10_000
