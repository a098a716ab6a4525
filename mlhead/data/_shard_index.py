"""What is in one shard: where each image lies in the archive, and its labels as they are written beside it.

A shard is a plain tar archive in the WebDataset convention. Files of one key are one sample: `dogs/17.jpg` beside
`dogs/17.json`, `dogs/17.cls` or `dogs/17.txt`. Scanning reads every header once; the result is kept in a small file.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mlhead.checkpoints import write_atomically
from mlhead.data.listing import Names
from mlhead.data.loading import BadSample

IMAGE_TYPES = ("jpg", "jpeg", "png", "webp", "bmp", "ppm", "pgm", "tif", "tiff")
_FORMAT, _BLOCK = 1, 512


class ShardIndex(NamedTuple):
    """The N usable images of a shard.

    Args:
        names: N names of images in the archive.
        offsets: (N), int64: where each image begins, in bytes.
        sizes: (N), int64, in bytes.
        labels: all labels, those of an image one after another, as places in `vocabulary`.
        label_offsets: (N + 1): image n has labels[label_offsets[n] : label_offsets[n + 1]].
        vocabulary: each label that occurs once: a name, or the number of a class.
        bad: what cannot be used, by its name or place in the archive; no name stands for all of it.
    """

    names: Names
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    labels: NDArray[np.int32]
    label_offsets: NDArray[np.int64]
    vocabulary: list[str | int]
    bad: list[BadSample]


def open_index(shard: Path, caches: list[Path], delimiter: str) -> ShardIndex:
    """The index of a shard: the one that was kept, if the shard has not changed since, or else a new one.

    Args:
        shard: a tar archive.
        caches: files where the index may lie; a new one goes into the first that can be written.
        delimiter: what stands between two names in a .txt file.
    """
    try:
        status = shard.stat()
    except OSError as error:
        return _join([], [BadSample("", f"cannot be read: {error.strerror}")])
    facts = {"format": _FORMAT, "size": status.st_size, "mtime_ns": status.st_mtime_ns, "delimiter": delimiter}
    for cache in caches:
        index = _load(cache, facts)
        if index is not None:
            return index
    index = scan(shard, delimiter)
    for cache in caches:
        try:
            _save(cache, facts, index)
            break
        except OSError:
            continue  # a folder that cannot be written; the next one may be, and without any the index is made again
    return index


def scan(shard: Path, delimiter: str = ";") -> ShardIndex:
    """Reads every header of a shard, and the labels.

    Returns:
        The index. Its `bad` names the places where the archive is damaged or cut short, every key with an image but no
        readable labels or with labels but no image, and files that come twice.
    """
    try:
        with shard.open("rb") as file:
            members, bad = _members(file)
            samples: dict[str, dict[str, tuple[str, int, int]]] = {}
            for name, offset, size in members:
                key, kind = key_and_kind(name)
                if not key.rpartition("/")[2]:
                    continue  # a hidden file
                if kind in samples.setdefault(key, {}):
                    bad.append(BadSample(name, "the same name as a file before it"))
                else:
                    samples[key][kind] = (name, offset, size)
            good = []
            for key, files in samples.items():
                images = [kind for kind in files if kind in IMAGE_TYPES]
                if not images:
                    bad.append(BadSample(key, f"no image beside .{', .'.join(files)}"))
                    continue
                name, offset, size = files[images[0]]
                bad += [BadSample(files[kind][0], "a second image of its key") for kind in images[1:]]
                try:
                    good.append((name, offset, size, _labels(file, files, delimiter)))
                except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
                    bad.append(BadSample(name, f"labels cannot be parsed: {error}"))
                except ValueError as error:
                    bad.append(BadSample(name, str(error)))
    except OSError as error:
        return _join([], [BadSample("", f"cannot be read: {error.strerror or error}")])
    return _join(good, bad)


def _members(file: BinaryIO) -> tuple[list[tuple[str, int, int]], list[BadSample]]:
    """Name, offset and size of every whole file, and what is wrong with the rest of the archive."""
    members: list[tuple[str, int, int]] = []
    bad: list[BadSample] = []
    size, end = os.fstat(file.fileno()).st_size, 0
    if os.pread(file.fileno(), 2, 0) == b"\x1f\x8b":
        return [], [BadSample("", "compressed with gzip; a shard must be a plain tar archive")]
    try:
        # ignore_zeros makes tarfile look for the next header behind a damaged one.
        with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as archive:
            while (member := archive.next()) is not None:
                if _any_byte(file, end, member.offset):
                    bad.append(BadSample(f"byte {end}", f"damaged up to byte {member.offset}"))
                end = archive.offset
                if member.isreg() and member.offset_data + member.size > size:
                    bad.append(BadSample(member.name, f"cut short, after {len(members)} whole files"))
                    return members, bad
                if member.isreg() and not member.issparse():
                    members.append((member.name, member.offset_data, member.size))
                elif not member.isdir():
                    bad.append(BadSample(member.name, "a link or another special file"))
    # Behind TarError: sizes in a header that no file can have.
    except (tarfile.TarError, ValueError, OverflowError, MemoryError) as error:
        bad.append(BadSample(f"byte {end}", f"damaged up to the end ({error})"))
        return members, bad
    if size - end < _BLOCK:
        bad.append(BadSample(f"byte {end}", f"cut short after {len(members)} files: an archive ends with zeros"))
    elif _any_byte(file, end, size):
        bad.append(BadSample(f"byte {end}", "damaged up to the end"))
    return members, bad


def _any_byte(file: BinaryIO, start: int, stop: int) -> bool:
    """Whether a byte in a part of a file is not zero."""
    step = 1 << 20
    return any(any(os.pread(file.fileno(), min(step, stop - at), at)) for at in range(start, stop, step))


def key_and_kind(name: str) -> tuple[str, str]:
    """`dogs/17.seg.png` -> `dogs/17`, `seg.png`."""
    folder, slash, base = name.rpartition("/")
    stem, _, kind = base.partition(".")
    return folder + slash + stem, kind.lower()


def _labels(file: BinaryIO, files: dict[str, tuple[str, int, int]], delimiter: str) -> list[str | int]:
    """The labels of a sample; ValueError with the reason where there are none or they make no sense."""

    def text(kind: str) -> str:
        _, offset, size = files[kind]
        return os.pread(file.fileno(), size, offset).decode("utf-8-sig")

    if "json" in files:
        content = json.loads(text("json"))
        if not isinstance(content, dict):
            raise ValueError(f"its .json must be an object, got a {type(content).__name__}")
        for key in ("labels", "label"):
            if key in content:
                values = content[key] if isinstance(content[key], list) else [content[key]]
                return list(dict.fromkeys(_label(key, value) for value in values))
    if "cls" in files:
        try:
            return [_label("cls", int(text("cls")))]
        except ValueError:
            raise ValueError(f".cls must be the number of a class, got {text('cls')[:40]!r}") from None
    if "txt" in files:
        return list(dict.fromkeys(part.strip() for part in text("txt").split(delimiter) if part.strip()))
    raise ValueError('no labels: neither a .json with "labels" or "label", nor .cls, nor .txt')


def _label(key: str, value: Any) -> str | int:
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31:
        return value
    raise ValueError(f"{key} must be names or numbers of classes, got {repr(value)[:40]}")


def _join(good: list[tuple[str, int, int, list[str | int]]], bad: list[BadSample]) -> ShardIndex:
    # 1 and "1" are different keys, as they must be.
    vocabulary = {label: number for number, label in enumerate(dict.fromkeys(x for *_, row in good for x in row))}
    return ShardIndex(
        Names.collect(name for name, *_ in good),
        np.array([offset for _, offset, _, _ in good], np.int64),
        np.array([size for _, _, size, _ in good], np.int64),
        np.array([vocabulary[label] for *_, row in good for label in row], np.int32),
        np.cumsum([0, *(len(row) for *_, row in good)], dtype=np.int64),
        list(vocabulary),
        bad,
    )


def _save(path: Path, facts: dict[str, Any], index: ShardIndex) -> None:
    header = {**facts, "vocabulary": index.vocabulary, "bad": index.bad}
    buffer = io.BytesIO()
    np.savez(
        buffer,
        header=np.frombuffer(json.dumps(header).encode(), np.uint8),
        names=index.names.data,
        name_offsets=index.names.offsets,
        offsets=index.offsets,
        sizes=index.sizes,
        labels=index.labels,
        label_offsets=index.label_offsets,
    )
    write_atomically(path, lambda file: file.write(buffer.getvalue()))


def _load(path: Path, facts: dict[str, Any]) -> ShardIndex | None:
    """The index in a file, or None if there is none, it is damaged, or it is that of another state of the shard."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            header = json.loads(arrays["header"].tobytes())
            if any(header[name] != value for name, value in facts.items()):
                return None
            return ShardIndex(
                Names(arrays["names"], arrays["name_offsets"]),
                arrays["offsets"],
                arrays["sizes"],
                arrays["labels"],
                arrays["label_offsets"],
                header["vocabulary"],
                [BadSample(*item) for item in header["bad"]],
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
