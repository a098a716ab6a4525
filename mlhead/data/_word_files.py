"""Files of word vectors: GloVe and word2vec, streamed, and arrays."""

from __future__ import annotations

import contextlib
import gzip
import io
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mlhead._usage import UsageError, require, usage_fail

ARGUMENT = "--word-vectors"

_ARRAYS = ("npy", "torch", "safetensors")
_FORMATS = "GloVe or word2vec (text or binary), .npy, .pth, .pt or .safetensors, or .gz of one of these"
_HEAD = 2**20  # bytes that a format is found from; a line of text vectors is shorter
_CHUNK = 2**22  # bytes of a binary file that are read at a time
_SAMPLE = 200  # lines that the width of a file without a header is found from
_LONGEST_WORD, _WIDEST = 2**16, 2**20  # beyond these a binary file is damaged

_HEADER = re.compile(rb"(?:\xef\xbb\xbf)?\s*(\d{1,12})\s+(\d{1,12})\s*")
_NUMBER = re.compile(rb"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|inf|infinity)", re.IGNORECASE)
_FRACTION = re.compile(rb"[-+]?(?:\d*\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)|")  # or nothing, between two spaces

Vector = NDArray[np.float32]


def plain_array(value: Any, where: str) -> Tensor:
    """A real array of whatever type as an fp32 tensor on the CPU."""
    try:
        if isinstance(value, Tensor):
            if value.is_complex():
                raise TypeError("complex numbers")
            return value.detach().to("cpu", torch.float32).contiguous()
        array = np.asarray(value)
        if array.dtype.kind not in "fiu":
            raise TypeError(f"dtype {array.dtype}")
        with np.errstate(over="ignore"):  # what overflows is infinite, and found by the caller
            return torch.from_numpy(np.array(array, np.float32, order="C"))
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise UsageError(
            f"{ARGUMENT} must be an array of numbers, got {type(value).__name__} {where} ({error})"
        ) from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked where it is gzip."""
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
            raw.seek(0)
            with gzip.open(raw) if packed else contextlib.nullcontext(raw) as file:
                yield cast(BinaryIO, file)
    except (EOFError, OSError, zlib.error) as error:
        _damaged(path, "a readable file", f"damaged or cut short ({type(error).__name__}: {error})", error)


def _damaged(path: Path, must: str, state: str, cause: Exception | None = None) -> NoReturn:
    raise UsageError(f"{ARGUMENT} must be {must}, got {path}, {state}") from cause


def _head_and_kind(path: Path) -> tuple[bytes, str]:
    """The beginning of a file, and "npy", "torch", "safetensors", "glove", "word2vec" or "binary"."""
    if not path.is_file():
        usage_fail(ARGUMENT, "an existing file", f"the folder {path}" if path.is_dir() else path)
    with _opened(path) as file:
        head = file.read(_HEAD)
    if not head.strip():
        _damaged(path, f"a file of word vectors: {_FORMATS}", "which is empty")
    if head.startswith(b"\x93NUMPY"):
        return head, "npy"
    if head.startswith((b"PK\x03\x04", b"\x80")):  # torch.save's archive, and its older pickle
        return head, "torch"
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
        return head, "safetensors"
    first, _, rest = head.partition(b"\n")
    header = _HEADER.fullmatch(first)
    if header:
        return head, "word2vec" if _is_text(rest, int(header[2])) else "binary"
    if b"\0" in head or _common_width(head) == 0:
        _damaged(path, f"a file of word vectors: {_FORMATS}", f"which begins with {head[:40]!r}")
    return head, "glove"


def _is_text(records: bytes, width: int) -> bool:
    """Whether what follows a word2vec header is text: its first line ends in numbers, or nothing in it is binary."""
    fields = records.partition(b"\n")[0].rstrip().replace(b"\t", b" ").split(b" ")[1:]
    if len(fields) >= width > 0 and all(_NUMBER.fullmatch(field) for field in fields[-width:]):
        return True
    return _is_utf8_text(records)


def _is_utf8_text(data: bytes) -> bool:
    """Whether bytes, whose end may be cut off, are UTF-8 without control characters."""
    text = data.decode("utf-8", "replace")
    return "\ufffd" not in text[:-1] and not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text)


def _common_width(head: bytes) -> int:
    """How many numbers most of the first lines end in; 0 if they end in none."""
    lines = head.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    widths = []
    for line in (lines[:-1] if len(head) == _HEAD and len(lines) > 1 else lines)[:_SAMPLE]:
        fields = _stripped(line).split(b" ")
        if fields != [b""]:
            numbers = next((n for n, field in enumerate(reversed(fields)) if not _NUMBER.fullmatch(field)), len(fields))
            widths.append(min(numbers, len(fields) - 1))  # the first field is the word, also when it is a number
    return Counter(widths).most_common(1)[0][0] if widths else 0


def _stripped(line: bytes) -> bytes:
    return line.rstrip(b" \t\r\n").replace(b"\t", b" ")


def is_array_file(path: Path) -> bool:
    """Whether a file of word vectors holds an array, aligned with names, rather than words.

    Raises:
        UsageError: no such file, or of no known format.
    """
    return _head_and_kind(path)[1] in _ARRAYS


def read_words(path: Path, forms: Iterable[str]) -> dict[str, Vector]:
    """The vectors of those words that a file holds; the first one of each."""
    wanted = {form.encode("utf-8", "surrogateescape"): form for form in forms}
    head, kind = _head_and_kind(path)
    first = head.partition(b"\n")[0]
    header = None if kind == "glove" else cast("re.Match[bytes]", _HEADER.fullmatch(first))
    count, width = (int(header[1]), int(header[2])) if header else (None, _common_width(head))
    if count == 0 or not 0 < width <= _WIDEST:
        must = f"at least one word and 1 to {_WIDEST} numbers each in the first line"
        _damaged(path, must, f"whose first line is {first.strip().decode(errors='replace')!r}")
    with _opened(path) as file:
        if kind == "binary":
            file.readline()
            return _read_binary(path, file, wanted, cast(int, count), width)
        return _read_text(path, file, wanted, count, width)


def _read_text(
    path: Path, file: BinaryIO, wanted: Mapping[bytes, str], count: int | None, width: int
) -> dict[str, Vector]:
    """Lines of a word, which may hold spaces, and `width` numbers; after a first line that is skipped, if `count`."""
    found: dict[str, Vector] = {}
    lines = 0
    must = f"text with a word and {width} numbers in every line"
    for number, line in enumerate(file, 1):
        if number == 1:
            line = b"" if count is not None else line.removeprefix(b"\xef\xbb\xbf")
        line = _stripped(line)
        if not line:
            continue  # an empty line holds nothing that could be lost
        lines += 1
        spaces = line.count(b" ")
        word = line.partition(b" ")[0]
        if spaces < width:
            _damaged(path, must, f"whose line {number} ({_shown(word)}) has {spaces}")
        if spaces > width:
            # The word holds spaces, or there is a number too many: fractions are no part of words.
            *parts, last = line.split(b" ")[:-width]
            if _FRACTION.fullmatch(last):
                _damaged(path, must, f"whose line {number} ({_shown(word)}) has {spaces} fields after the word")
            word = b" ".join([*parts, last])
        name = wanted.get(word)
        if name is not None and name not in found:
            fields = line[len(word) + 1 :].split(b" ")
            wrong = next((field for field in fields if not _NUMBER.fullmatch(field)), None)
            if wrong is not None:
                _damaged(path, must, f"whose line {number} ({_shown(word)}) has {_shown(wrong)} among its numbers")
            found[name] = _finite(path, np.array([float(field) for field in fields]), f"line {number} ({_shown(word)})")
    if count is not None and lines != count:
        _damaged(path, f"text with {count} words, as its first line says", f"which has {lines}: cut short or damaged")
    return found


def _read_binary(path: Path, file: BinaryIO, wanted: Mapping[bytes, str], count: int, width: int) -> dict[str, Vector]:
    """`count` times a word, a space, `width` fp32 and perhaps a new line."""
    found: dict[str, Vector] = {}
    size = 4 * width
    must = f"binary word2vec with {count} words of {width} fp32 numbers, as its first line says"
    buffer, at, word, kept = b"", 0, b"", b""
    for number in range(1, count + 1):
        while (space := buffer.find(b" ", at)) < 0 or len(buffer) <= space + size:
            before = f", the one after {_shown(word)}" if word else ""
            if space < 0 and len(buffer) - at > _LONGEST_WORD:
                _damaged(path, must, f"whose word {number}{before} has no end")
            more = file.read(_CHUNK)
            if not more:
                _damaged(path, must, f"which is cut short in word {number}{before}")
            buffer, at = buffer[at:] + more, 0
        word = buffer[at:space].lstrip(b"\n")
        if not word or b"\n" in word or len(word) > _LONGEST_WORD:
            _damaged(path, must, f"whose word {number} is {_shown(word)}: damaged, or of another width")
        if kept and not _is_utf8_text(word):
            # Here alone: files that are whole have a few words in other encodings.
            after = f"whose word {number}, after {_shown(kept)}, is {_shown(word)}"
            _damaged(path, must, f"{after}: damaged, or with spaces in words, which this format cannot hold")
        name, kept = wanted.get(word), b""
        if name is not None and name not in found:
            numbers = np.frombuffer(buffer, "<f4", width, space + 1)
            found[name], kept = _finite(path, numbers, f"word {number} ({_shown(word)})"), word
        at = space + 1 + size
    if (buffer[at:] + file.read(_CHUNK)).strip():
        _damaged(path, must, f"which goes on after them, after {_shown(word)}: damaged, or of another width")
    return found


def _finite(path: Path, numbers: NDArray[Any], where: str) -> Vector:
    with np.errstate(over="ignore"):
        vector = np.array(numbers, np.float32)  # a copy, which does not keep the buffer
    if not np.isfinite(vector).all():
        _damaged(path, "made of finite vectors", f"whose {where} holds NaN or infinity")
    return vector


def _shown(word: bytes) -> str:
    return repr(word[:60].decode("utf-8", "replace"))


# Arrays


def read_array(path: Path) -> Tensor:
    """The one array (rows, columns), fp32, of an .npy, .pth, .pt or .safetensors file.

    Raises:
        UsageError: the file is missing or damaged, or holds something else.
    """
    kind = _head_and_kind(path)[1]
    if kind not in _ARRAYS:
        usage_fail(ARGUMENT, "an array (.npy, .pth, .pt or .safetensors)", f"{path}, which holds words")
    with _opened(path) as file:
        data = file.read()
    try:
        content = _decoded(kind, data)
    except UsageError:
        raise
    # Damaged pickles, archives and headers raise whatever their readers run into.
    except Exception as error:
        first = (str(error).splitlines() or [""])[0][:160]
        _damaged(
            path, f"a readable {kind} array", f"damaged or of another kind ({type(error).__name__}: {first})", error
        )
    if isinstance(content, dict):
        arrays = [value for value in content.values() if isinstance(value, Tensor)]
        if kind != "safetensors" or len(arrays) != 1:
            keys = ", ".join(sorted(map(repr, content))[:6]) or "nothing"
            _damaged(path, "one array (or a mapping given as such)", f"which holds a dictionary of {keys}")
        content = arrays[0]
    if not isinstance(content, (Tensor, np.ndarray)):
        _damaged(path, "one array", f"which holds a {type(content).__name__}")
    array = plain_array(content, f"in {path}")
    if array.ndim != 2 or array.numel() == 0:
        _damaged(path, "an array of two dimensions", f"which has {tuple(array.shape)}")
    bad = (~array.isfinite()).nonzero()
    if len(bad):
        _damaged(path, "made of finite vectors", f"which holds NaN or infinity at {tuple(bad[0].tolist())}")
    return array


def _decoded(kind: str, data: bytes) -> Any:
    if kind == "npy":
        return np.load(io.BytesIO(data), allow_pickle=False)
    if kind == "safetensors":
        return require("safetensors.torch", "Reading .safetensors").load(data)
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if (damaged := archive.testzip()) is not None:  # torch.load does not look at checksums
                raise ValueError(f"the checksum of {damaged} does not match")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def orient(array: Tensor, count: int, path: Path, *, columns: bool = False) -> Tensor:
    """An array as (count, W), whichever of its sides has the length `count`.

    Args:
        array: (count, W) or (W, count).
        count: how many names there are.
        path: where it comes from, for messages.
        columns: Whether an array (count, count) has its names in its columns, which is then taken without a warning.

    Raises:
        UsageError: neither side fits.
    """
    fits = [side == count for side in array.shape]
    if not any(fits):
        must = f"an array ({count}, W) or (W, {count}) for {count} names"
        usage_fail(ARGUMENT, must, f"{tuple(array.shape)} in {path}")
    if all(fits) and not columns:
        text = f"{ARGUMENT}: {path} is ({count}, {count}) for {count} names; its rows are taken as the names' vectors"
        warnings.warn(text, stacklevel=3)
    return (array if fits[0] and not (fits[1] and columns) else array.T).contiguous()
