"""Word vectors for class names: GloVe, word2vec, arrays, mappings and text encoders, streamed and checked."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mlhead import _check
from mlhead._usage import usage_fail
from mlhead.data._word_files import ARGUMENT, Vector, is_array_file, orient, plain_array, read_array, read_words

MISSING = ("error", "zero", "skip")
POOLING = ("mean", "first", "pooler")
_SHOWN = 20  # names in an error message


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
            vectors = read_words(path, {form for name in asked for form in _all_forms(name)})
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
        got = f"{where}, which has none for {len(lost)} of {len(asked)}: {_listed(lost)}"
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
        vector = plain_array(source[form], f"for {form!r} in a mapping").numpy()
        if vector.ndim != 1 or vector.size == 0 or vector.size != (width or vector.size):
            must = f"({width},) as the others" if width else "(W,)"
            usage_fail(ARGUMENT, f"vectors {must}", f"{vector.shape} for {form!r} in a mapping")
        if not np.isfinite(vector).all():
            usage_fail(ARGUMENT, "finite", f"NaN or infinity for {form!r} in a mapping")
        width = vector.size
        return vector

    return [_look_up(name, get) for name in names]


def _from_callable(source: Callable[[list[str]], Any], names: list[str]) -> NDArray[np.float32]:
    rows = plain_array(source(list(names)), "from a callable")
    if rows.ndim != 2 or len(rows) != len(names) or rows.shape[1] == 0:
        usage_fail(ARGUMENT, f"({len(names)}, W) for {len(names)} names", f"{tuple(rows.shape)} from a callable")
    bad = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        usage_fail(ARGUMENT, "finite", f"NaN or infinity for {_listed([names[i] for i in bad])} from a callable")
    return rows.numpy()


def _normalized(rows: Tensor) -> Tensor:
    wide = rows.double()
    length = wide.norm(dim=1, keepdim=True)
    return torch.where(length > 0, wide / length, wide).float()
