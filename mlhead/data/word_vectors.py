"""Word vectors for class names: GloVe, word2vec, arrays, mappings and text encoders, streamed and checked."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import re
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlhead import _check
from mlhead._usage import UsageError, require, usage_fail

ARGUMENT = "--word-vectors"
MISSING = ("error", "zero", "skip")
POOLING = ("mean", "first", "pooler")

_ARRAYS = ("npy", "torch", "safetensors")
_FORMATS = "GloVe or word2vec (text or binary), .npy, .pth, .pt or .safetensors, or .gz of one of these"
_SHOWN = 20  # names in an error message
_HEAD = 2**20  # bytes that a format is found from; a line of text vectors is shorter
_CHUNK = 2**22  # bytes of a binary file that are read at a time
_SAMPLE = 200  # lines that the width of a file without a header is found from
_LONGEST_WORD, _WIDEST = 2**16, 2**20  # beyond these a binary file is damaged

_HEADER = re.compile(rb"(?:\xef\xbb\xbf)?\s*(\d{1,12})\s+(\d{1,12})\s*")
_NUMBER = re.compile(rb"[-+]?(?:(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?|nan|inf|infinity)", re.IGNORECASE)
_FRACTION = re.compile(rb"[-+]?(?:\d*\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+)|")  # or nothing, between two spaces

Vector = NDArray[np.float32]


class WordVectors(NamedTuple):
    """names, in the order asked for; vectors (C, W) fp32, a row for each of them; the names without a vector."""

    names: list[str]
    vectors: Tensor
    missing: list[str]


def load_word_vectors(
    source: str | os.PathLike[str] | Mapping[str, Any] | Callable[[list[str]], Any],
    names: Sequence[str],
    *,
    missing: str = "error",
    normalize: bool = False,
) -> WordVectors:
    """A vector for each class name.

    A file's format is found from its content, not from its extension, and only the vectors of wanted words are kept:

    * GloVe text, `word v1 .. vW` a line. Words may hold spaces (as in glove.840B): a line's last W fields are its
      vector. W is what most of the first lines have.
    * word2vec text and binary: a first line `count W`, then as GloVe, or the word, a space and W little-endian fp32.
    * .npy, .pth, .pt and .safetensors arrays aligned with `names`: (C, W), or (W, C) as the public wordvec_array.pth of
      NUS-WIDE, whichever fits. Where both fit (W = C) it is read as (C, W), with a warning.
    * .gz of any of these.

    A name is looked up whole, then with its spaces, _ and - exchanged for one another, then so in lower case. If none
    of these is there, it gets the mean of the vectors of its words (each as it is, or else in lower case), if all of
    them are there. Of a word that a file holds twice, the first vector counts.

    The number of fields is checked in every line, numbers only in the lines of wanted words. GloVe text does not say
    how many words it has: one that is cut short at the end of a line cannot be told from a whole one.

    Args:
        source: a path; or a mapping from name to vector; or a callable from a list of n names to an array (n, W), which
            gets the names as they are, e.g. a `text_encoder`.
        names: the class names.
        missing: what happens to names without a vector: "error"; "zero" gives them a vector of zeros; "skip" leaves
            them out of names and vectors.
        normalize: Whether rows are scaled to length 1; rows of zeros stay.

    Returns:
        `WordVectors`.

    Raises:
        UsageError: no such file, an unknown format, a damaged file, an array that does not fit, vectors that are not
            finite, or names without a vector where `missing` is "error".
    """
    asked = _checked_names(names)
    if missing not in MISSING:
        usage_fail("missing", f"one of {', '.join(map(repr, MISSING))}", repr(missing))
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if is_array_file(path):
            found: list[Vector | None] = list(orient(read_array(path), len(asked), path).numpy())
        else:
            vectors = _read_words(path, {form for name in asked for form in _all_forms(name)})
            found = [_look_up(name, vectors.get) for name in asked]
        where = str(path)
    elif isinstance(source, Mapping):
        found, where = _from_mapping(source, asked), "a mapping"
    elif callable(source):
        found, where = list(_from_callable(source, asked)), "a callable"
    else:
        _check.fail("load_word_vectors", "source", "a path, a mapping or a callable", type(source).__name__, TypeError)

    lost = [name for name, vector in zip(asked, found, strict=True) if vector is None]
    if lost and missing == "error":
        more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
        got = f"{where}, which has none for {len(lost)} of {len(asked)}: {', '.join(map(repr, lost[:_SHOWN]))}{more}"
        usage_fail(ARGUMENT, "vectors for all names (or missing='zero' or 'skip')", got)
    width = next((len(vector) for vector in found if vector is not None), None)
    if width is None:
        usage_fail(ARGUMENT, "a vector for at least one name", f"{where}, which has none for {_listed(asked)}")
    zero = np.zeros(width, np.float32)
    kept = [
        (n, zero if v is None else v) for n, v in zip(asked, found, strict=True) if v is not None or missing != "skip"
    ]
    rows = torch.from_numpy(np.stack([vector for _, vector in kept]))
    return WordVectors([name for name, _ in kept], _normalized(rows) if normalize else rows, lost)


def text_encoder(
    model: nn.Module,
    tokenizer: Callable[..., Any],
    *,
    template: str = "{}",
    pooling: str = "mean",
    batch_size: int = 256,
) -> Callable[[list[str]], Tensor]:
    """A source for `load_word_vectors` from a Hugging Face text model and its tokenizer.

    Args:
        model: returns an object with `last_hidden_state` (n, T, W), and for "pooler" `pooler_output` or `text_embeds`
            (n, W). It runs where its parameters are, in eval mode.
        tokenizer: `tokenizer(texts, padding=True, truncation=True, return_tensors="pt")` gives the model's keyword
            arguments.
        template: the text for a name, which takes the place of `{}`, e.g. "a photo of a {}".
        pooling: "mean" of the tokens that the attention mask shows; "first", the first of them (BERT's [CLS]); or
            "pooler".
        batch_size: texts at a time.

    Returns:
        A callable from n names to (n, W) fp32 on the CPU.
    """
    if "{}" not in template:
        usage_fail("template", "a text with {} in the place of the name", repr(template))
    if pooling not in POOLING:
        usage_fail("pooling", f"one of {', '.join(map(repr, POOLING))}", repr(pooling))
    _check.check_positive("text_encoder", "batch_size", batch_size)

    @torch.no_grad()
    def encode(names: list[str]) -> Tensor:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        training = model.training
        model.eval()
        try:
            parts = []
            for first in range(0, len(names), batch_size):
                texts = [template.replace("{}", name) for name in names[first : first + batch_size]]
                tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
                inputs = {key: value.to(device) for key, value in tokens.items()}
                parts.append(_pooled(model(**inputs), inputs.get("attention_mask"), pooling).float().cpu())
            return torch.cat(parts)
        finally:
            model.train(training)

    return encode


def _pooled(output: Any, mask: Tensor | None, pooling: str) -> Tensor:
    if pooling == "pooler":
        for name in ("pooler_output", "text_embeds"):
            if getattr(output, name, None) is not None:
                return getattr(output, name)
        usage_fail("pooling", "'mean' or 'first' for a model without pooler_output and text_embeds", "'pooler'")
    states = getattr(output, "last_hidden_state", None)
    if states is None:
        usage_fail("pooling", "'pooler' for a model without last_hidden_state", repr(pooling))
    shown = torch.ones(states.shape[:2], device=states.device) if mask is None else mask.to(states.device).float()
    if pooling == "first":  # the padding may stand on the left
        return states[torch.arange(len(states), device=states.device), shown.argmax(dim=1)]
    return (states.float() * shown[..., None]).sum(dim=1) / shown.sum(dim=1, keepdim=True).clamp(min=1)


# Names


def _checked_names(names: Sequence[str]) -> list[str]:
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        _check.fail("load_word_vectors", "names", "a list of texts", type(names).__name__, TypeError)
    if not names or not all(name.strip() for name in names):
        usage_fail("names", "at least one name, none of them blank", list(names)[:_SHOWN])
    return list(names)


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\s_-]+", name) if word]


def _whole_forms(name: str) -> list[str]:
    """What a name may be called in a file, best first."""
    words = _words(name)
    forms = [name, *(separator.join(words) for separator in " _-" if words)]
    return list(dict.fromkeys([*forms, *(form.lower() for form in forms)]))


def _all_forms(name: str) -> list[str]:
    words = _words(name)
    return [*_whole_forms(name), *words, *(word.lower() for word in words)]


def _look_up(name: str, get: Callable[[str], Vector | None]) -> Vector | None:
    """The vector of a name, or the mean of those of its words, or None."""
    vectors = [_first(_whole_forms(name), get)]
    if vectors[0] is None:
        vectors = [_first([word, word.lower()], get) for word in _words(name)]
    there = [vector for vector in vectors if vector is not None]
    if not there or len(there) < len(vectors):
        return None
    return np.stack(there).mean(axis=0, dtype=np.float64).astype(np.float32)


def _first(forms: Iterable[str], get: Callable[[str], Vector | None]) -> Vector | None:
    return next((vector for form in forms if (vector := get(form)) is not None), None)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(repr, names[:_SHOWN])) + more


# Vectors in memory


def _from_mapping(source: Mapping[str, Any], names: Sequence[str]) -> list[Vector | None]:
    width: int | None = None

    def get(form: str) -> Vector | None:
        nonlocal width
        if form not in source:
            return None
        vector = _plain(source[form], f"for {form!r} in a mapping").numpy()
        if vector.ndim != 1 or vector.size == 0 or vector.size != (width or vector.size):
            must = f"({width},) as the others" if width else "(W,)"
            usage_fail(ARGUMENT, f"vectors {must}", f"{vector.shape} for {form!r} in a mapping")
        if not np.isfinite(vector).all():
            usage_fail(ARGUMENT, "finite", f"NaN or infinity for {form!r} in a mapping")
        width = vector.size
        return vector

    return [_look_up(name, get) for name in names]


def _from_callable(source: Callable[[list[str]], Any], names: list[str]) -> NDArray[np.float32]:
    rows = _plain(source(list(names)), "from a callable")
    if rows.ndim != 2 or len(rows) != len(names) or rows.shape[1] == 0:
        usage_fail(ARGUMENT, f"({len(names)}, W) for {len(names)} names", f"{tuple(rows.shape)} from a callable")
    bad = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        usage_fail(ARGUMENT, "finite", f"NaN or infinity for {_listed([names[i] for i in bad])} from a callable")
    return rows.numpy()


def _plain(value: Any, where: str) -> Tensor:
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


def _normalized(rows: Tensor) -> Tensor:
    wide = rows.double()
    length = wide.norm(dim=1, keepdim=True)
    return torch.where(length > 0, wide / length, wide).float()


# Files


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


def _read_words(path: Path, forms: Iterable[str]) -> dict[str, Vector]:
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
    array = _plain(content, f"in {path}")
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
