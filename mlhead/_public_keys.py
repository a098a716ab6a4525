"""Finding a head in a state dict by the names of public code, and what the shapes in it say.

Decoders: `layers.0.*` (one level down in `decoder.` in public files), `embed_standart.*`, `query_embed.weight`,
`duplicate_pooling` and `duplicate_pooling_bias`, these with `decoder.` before them or without. Zero-shot decoders:
`wordvec_proj.*`, never with `decoder.`, in the place of `query_embed.weight`. CSRA:
`classifier.multi_head.<i>.head.weight`, or `csra_heads.<i>.head.weight` in OpenMMLab's files.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

# The names of a module that holds a whole model: what stands beside the head in it is the backbone's.
WRAPPERS = {"module", "model", "net", "network", "_orig_mod", "ema", "ema_model", "model_ema", "state_dict"}

_ATTENTION = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
_LAYER = ("norm1", "norm2", "norm3", "linear1", "linear2")
# Every key of an ML-Decoder, under mlhead's names.
DECODER_KEYS = (
    *(f"layers.0.multihead_attn.{name}" for name in _ATTENTION),
    *(f"layers.0.{module}.{name}" for module in _LAYER for name in ("weight", "bias")),
    *("embed_standart.weight", "embed_standart.bias", "query_embed.weight"),
    *("duplicate_pooling", "duplicate_pooling_bias"),
)
# The same of one with word vectors as queries; without `wordvec_proj` if they are as wide as the queries.
ZERO_SHOT_KEYS = (
    *(key for key in DECODER_KEYS if key != "query_embed.weight"),
    *("wordvec_proj.weight", "wordvec_proj.bias"),
)

# No other model is known to use these names; `layers.0.multihead_attn` and `query_embed` are also DETR's, and
# `wordvec_proj` is also RAM's.
_DECODER = re.compile(r"((?:.*\.)?)(?:embed_standart\.(?:weight|bias)|duplicate_pooling(?:_bias)?)")
_CSRA = re.compile(r"((?:.*\.)?)(multi_head|csra_heads)\.(\d+)\.head\.(weight|bias)")
_OUTER = {"embed_standart", "query_embed", "duplicate_pooling", "duplicate_pooling_bias"}
# Of zero-shot heads, never below `decoder.`; all but the first are mlhead's own.
_WORDS = {"wordvec_proj", "query_proj", "class_proj", "banks"}


@dataclass
class Found:
    """A head in a state dict.

    Attributes:
        family: "decoder" or "csra".
        container: The dictionaries of the file that the state dict lies in, for example "state_dict."; or "".
        prefix: What precedes the public keys in it, for example "head."; for CSRA what precedes `classifier.`.
        form: "decoder", "flat", "mixed" or "own"; for CSRA "multi_head", "csra_heads" or "own".
        names: Of every key that belongs to the head mlhead's name, or None if it has none.
        beside: How many other keys of the state dict begin with which component.
    """

    family: str
    container: str
    prefix: str
    state: Mapping[str, Any]
    form: str = "own"
    names: dict[str, str | None] = field(default_factory=dict)
    beside: Counter[str] = field(default_factory=Counter)
    classifier: str = ""  # "classifier." where it stands before multi_head

    @property
    def path(self) -> str:
        """The prefix with the dictionaries around it."""
        return self.container + self.prefix

    def answers_to(self, prefix: str) -> bool:
        """Whether a caller's prefix means this head, with or without the dictionaries and the public `decoder.`."""
        inner = "decoder." if self.family == "decoder" else self.classifier
        return prefix in {start + end for start in (self.path, self.prefix) for end in ("", inner)}

    def public_name(self, own: str) -> str:
        """The key that `own` would have in this file."""
        if self.form == "own":
            return self.prefix + own
        if self.family == "csra":
            name, index = own.rstrip("]").split("[")
            return f"{self.prefix}{self.classifier}{self.form}.{index}.head.{name}"
        inside = own.startswith("layers.") or (self.form == "decoder" and own.partition(".")[0] not in _WORDS)
        return self.prefix + ("decoder." if inside else "") + own

    def has(self, *starts: str) -> bool:
        """Whether mlhead's name of any key begins with one of these."""
        return any(name and name.startswith(starts) for name in self.names.values())

    def shape(self, own: str, ndim: int) -> tuple[int, ...] | None:
        """The shape of a value, if it is there and has so many axes."""
        for key, name in self.names.items():
            value = self.state[key]
            if name == own and isinstance(value, Tensor) and value.ndim == ndim:
                return tuple(value.shape)
        return None

    def sizes(self) -> dict[str, int]:
        """The dimensions that the shapes tell, by the letters of the papers.

        F is the feed-forward's width, W that of word vectors.
        """
        found: dict[str, int] = {}

        def add(own: str, letters: str) -> None:
            shape = self.shape(own, len(letters))
            found.update({a: n for a, n in zip(letters, shape or (), strict=False) if a != "_"})

        if self.family == "decoder":
            if self.zero_shot:
                add("duplicate_pooling", "E_")
                if "E" in found and self.without_projection:
                    found["W"] = found["E"]
                add("wordvec_proj.weight", "EW")
                add("class_proj.weight", "WE")
            else:
                add("query_embed.weight", "GE")
                add("duplicate_pooling", "GEJ")
                add("duplicate_pooling_bias", "C")
            add("embed_standart.weight", "ED")
            add("layers.0.linear1.weight", "F_")
        elif self.form == "own":
            add("weight", "HCD")
        else:
            found["H"] = len({name for name in self.names.values() if name and name.startswith("weight[")})
            for own in sorted({name for name in self.names.values() if name and name.startswith("weight[")}):
                add(own, "CD__")
        return found

    @property
    def zero_shot(self) -> bool:
        """A head with word vectors as queries, in public files with one pooling vector (E, 1) for all classes."""
        return self.has("wordvec_proj.") or self.group_words or self.shape("duplicate_pooling", 2) is not None

    @property
    def group_words(self) -> bool:
        """A zero-shot head of group decoding, which only mlhead has."""
        return self.has("query_proj.", "class_proj.")

    @property
    def without_projection(self) -> bool:
        """Of a zero-shot file: that its word vectors are as wide as its queries, and not projected."""
        return bool(self.names) and self.form != "own" and not self.has("wordvec_proj.") and not self.group_words

    @property
    def self_attention(self) -> bool:
        """Whether there are keys of a self-attention."""
        return any(name and ".self_attn." in name for name in self.names.values())

    @property
    def layers(self) -> int:
        """How many decoder layers there are keys of."""
        found = [re.match(r"layers\.(\d+)\.", name) for name in self.names.values() if name]
        return len({match[1] for match in found if match})

    def describe(self) -> str:
        """What the file looks like it is, for example "a CSRA checkpoint of 1 head, 80 classes, D = 2048"."""
        sizes = self.sizes()
        C = f"{sizes['C']} classes" if "C" in sizes else "an unknown number of classes"
        if self.family == "csra":
            parts = [f"{sizes.get('H', '?')} head{'s' * (sizes.get('H') != 1)}", C]
        else:
            parts = [C]
        parts += [f"{a} = {sizes[a]}" for a in "GJEWD" if a in sizes]
        parts += [f"feed-forward width {sizes['F']}"] if "F" in sizes else []
        kind = "a CSRA"
        if self.family == "decoder":
            kind = "an ML-Decoder" if not self.self_attention else "a transformer-decoder"
        if self.zero_shot:
            kind, parts = "a zero-shot ML-Decoder", parts[1:]
        return f"{kind} checkpoint of {', '.join(parts)}"


def state_dicts(source: Mapping[Any, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """A file's dictionaries with names for keys, from outside to inside, and the names that lead to them."""
    if len(path) > 200 or not all(isinstance(key, str) for key in source):
        return
    yield path, source
    for key, value in source.items():
        if isinstance(value, Mapping):
            yield from state_dicts(value, f"{path}{key}.")


def find(source: Mapping[str, Any]) -> list[Found]:
    """All heads in a file, in whatever dictionaries it wraps its state dict."""
    found: list[Found] = []
    plain: list[Found] = []
    seen: set[int] = set()
    for container, state in state_dicts(source):
        if id(state) in seen:  # one state dict under two names is one
            continue
        seen.add(id(state))
        decoders = {match[1] for key in state if (match := _DECODER.fullmatch(key))}
        roots = dict.fromkeys(_above(prefix, "decoder.", state) for prefix in sorted(decoders))
        found += [_decoder(container, prefix, state) for prefix in roots]
        heads = {(match[1], match[2]) for key in state if (match := _CSRA.fullmatch(key))}
        found += [_csra(container, prefix, name, state) for prefix, name in sorted(heads)]
        plain += [_own_csra(container, key[: -len("weight")], state) for key in state if _is_own_csra(key, state)]
    return found or plain  # `weight` alone is a weak sign, so it counts only where there is no other


def _above(prefix: str, inner: str, state: Mapping[str, Any]) -> str:
    """The prefix without a `decoder.` at its end, unless that is the head itself and has a `decoder.` of its own."""
    if not (prefix == inner or prefix.endswith("." + inner)) or any(key.startswith(prefix + inner) for key in state):
        return prefix
    return prefix[: -len(inner)]


def _holds_a_model(prefix: str) -> bool:
    return not prefix or prefix.rstrip(".").rpartition(".")[2] in WRAPPERS


def _decoder(container: str, prefix: str, state: Mapping[str, Any]) -> Found:
    inner = prefix + "decoder."
    nested = any(key.startswith(inner + "layers.") for key in state)
    inside = any(_DECODER.fullmatch(key) for key in state if key.startswith(inner))
    outside = any(key.startswith(prefix) and key[len(prefix) :].partition(".")[0] in _OUTER for key in state)
    form = "decoder" if nested else "own"
    if outside and (nested or inside):
        form = "mixed" if inside else "flat"
    elif inside:
        form = "decoder"
    found = Found("decoder", container, prefix, state, form)
    for key in state:
        rest = key[len(prefix) :] if key.startswith(prefix) else None
        if rest is None:
            _count_beside(found, key)
        elif rest.startswith("decoder.") and (nested or inside):
            found.names[key] = rest[len("decoder.") :]
        elif rest.partition(".")[0] in _OUTER | _WORDS or (rest.startswith("layers.") and not nested):
            found.names[key] = rest
        elif _holds_a_model(prefix):
            _count_beside(found, key)
        else:
            found.names[key] = None
    return found


def _csra(container: str, prefix: str, form: str, state: Mapping[str, Any]) -> Found:
    above = _above(prefix, "classifier.", state) if form == "multi_head" else prefix
    found = Found("csra", container, above, state, form, classifier=prefix[len(above) :])
    for key in state:
        match = _CSRA.fullmatch(key)
        if match and (match[1], match[2]) == (prefix, form):
            found.names[key] = f"{match[4]}[{int(match[3])}]"
        elif key.startswith(prefix if not _holds_a_model(prefix) else f"{prefix}{form}."):
            found.names[key] = None
        else:
            _count_beside(found, key)
    return found


def _is_own_csra(key: str, state: Mapping[str, Any]) -> bool:
    value = state[key]
    return (key == "weight" or key.endswith("head.weight")) and isinstance(value, Tensor) and value.ndim == 3


def _own_csra(container: str, prefix: str, state: Mapping[str, Any]) -> Found:
    found = Found("csra", container, prefix, state)
    for key in state:
        if key in (prefix + "weight", prefix + "bias"):
            found.names[key] = key[len(prefix) :]
        elif key.startswith(prefix) and not _holds_a_model(prefix):
            found.names[key] = None
        else:
            _count_beside(found, key)
    return found


def _count_beside(found: Found, key: str) -> None:
    """Counts a key by its first component, below what it shares with the head's prefix if that holds a whole model."""
    parts = found.prefix.split(".")[:-1]
    while parts and not (parts[-1] in WRAPPERS and key.startswith(".".join(parts) + ".")):
        parts.pop()
    found.beside[key[len(".".join([*parts, ""])) :].partition(".")[0]] += 1
