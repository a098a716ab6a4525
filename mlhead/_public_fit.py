"""Whether what was found in a file fits a head, and what to do if it does not."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ._public_files import kind_of, listing, refuse
from ._public_keys import Found
from .heads import CSRAHead, Head, MLDecoder, TransformerDecoder, ZeroShotMLDecoder
from .heads._decoder import DecoderHead

_BANKS = "banks."


def targets(head: Head, found: Found) -> dict[str, Tensor]:
    """The head's parameters, in the shapes that the file's form has them in, by mlhead's names."""
    if isinstance(head, CSRAHead) and found.form != "own":
        heads = {f"weight[{i}]": w.detach()[:, :, None, None] for i, w in enumerate(head.weight)}
        if head.bias is not None:
            heads |= {f"bias[{i}]": b.detach() for i, b in enumerate(head.bias)}
        return heads
    left_out: tuple[str, ...] = ()
    if isinstance(head, ZeroShotMLDecoder):  # banks are of any number and size, and in no public file: see `banks`
        left_out = (_BANKS, "wordvec_proj.") if identity_queries(head, found) else (_BANKS,)
    return {own: tensor.detach() for own, tensor in head.state_dict().items() if not own.startswith(left_out)}


def identity_queries(head: Head, found: Found) -> bool:
    """Whether a file has no `wordvec_proj`, and the head's word vectors are as wide as its queries, too."""
    square = isinstance(head, ZeroShotMLDecoder) and head.full and head.embed_dim == head.word_dim
    return square and found.without_projection


def banks(head: Head, keys: Mapping[str, str]) -> dict[str, str]:
    """Of every bank of word vectors its name, and its key among those that `compare` found."""
    if not isinstance(head, ZeroShotMLDecoder):
        return {}
    return {own[len(_BANKS) :]: key for own, key in keys.items() if own.startswith(_BANKS)}


def sizes_text(head: Head) -> str:
    """A head's class and sizes."""
    text = ", ".join(f"{letter} = {size}" for letter, size in sizes(head).items())
    return f"{type(head).__name__} with {text.replace('F = ', 'feed-forward width ')}"


def sizes(head: Head) -> dict[str, int]:
    """A head's dimensions, in the letters of `Found.sizes`."""
    if isinstance(head, CSRAHead):
        return {"H": head.num_heads, "C": head.num_classes, "D": head.in_features}
    if isinstance(head, ZeroShotMLDecoder):
        width = head.layers[0].linear1.out_features  # type: ignore[union-attr]
        return {"E": head.embed_dim, "W": head.word_dim, "D": head.in_features, "F": width}  # type: ignore[dict-item]
    assert isinstance(head, DecoderHead)
    G, E, J = head.duplicate_pooling.shape
    width = head.layers[0].linear1.out_features  # type: ignore[union-attr]
    return {"C": head.num_classes, "G": G, "J": J, "E": E, "D": head.in_features, "F": width}  # type: ignore[dict-item]


def compare(where: str, head: Head, found: Found, name: str) -> dict[str, str]:
    """The key in the file of each of the head's tensors and of each bank in the file, under mlhead's names.

    Raises if any key is missing, left over or does not fit.
    """
    wanted = targets(head, found)
    keys: dict[str, str] = {}
    unexpected = []
    for key, own in found.names.items():
        if own is None or own in keys or not (own in wanted or _is_bank(head, own)):
            unexpected.append(f"{key}: {kind_of(found.state[key])}")
        else:
            keys[own] = key
    missing = [f"{found.public_name(own)}: {tuple(t.shape)}" for own, t in wanted.items() if own not in keys]
    wrong = []
    for own, key in keys.items():
        value = found.state[key]
        usable = isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta
        if isinstance(head, ZeroShotMLDecoder) and own not in wanted:
            shape = f"(C, {head.word_dim})"
            fits = usable and value.ndim == 2 and value.shape[1] == head.word_dim and len(value) > 0
        else:
            shape = str(tuple(wanted[own].shape))
            fits = usable and value.shape == wanted[own].shape
        if not fits:
            wrong.append(f"{key}: wanted {shape}, found {kind_of(value)}")
    if missing or unexpected or wrong:
        lists = [listing("missing", missing), listing("unexpected", unexpected), listing("wrong shape", wrong)]
        got = f"which looks like {found.describe()}"
        refuse(where, name, f"a checkpoint of {sizes_text(head)}", got, [*lists, *_hints(where, head, found)])
    return keys


def _is_bank(head: Head, own: str) -> bool:
    """Whether a key is one that the head can have a bank under."""
    return isinstance(head, ZeroShotMLDecoder) and own.startswith(_BANKS) and own[len(_BANKS) :].isidentifier()


def _hints(where: str, head: Head, found: Found) -> list[str]:
    """What to do about a checkpoint that does not fit."""
    hints: list[str] = []
    has, decoder = found.sizes(), found.family == "decoder"
    differ = {letter for letter, size in sizes(head).items() if has.get(letter, size) != size}
    C, G, J = (has.get(letter, 0) for letter in "CGJ")
    grouped_self_attention = found.self_attention and C != G
    if decoder and C and G and J and J != -(-C // G):
        ceil = f"ceil(C / G) = {-(-C // G)}"
        if J == int(C / G + 0.999):
            lost = f"{C - G * J} of the {C} classes have no weight, and the published forward fails, too"
            hints.append(f"J = {J} is int(C / G + 0.999) as published, not {ceil}: {lost}")
        else:
            lost = "class c is column c mod J of group c div J, so its classes lie elsewhere"
            hints.append(f"J = {J} is neither {ceil} nor the published int(C / G + 0.999): {lost}")
    elif differ and where == "load_public" and not grouped_self_attention and not found.group_words:
        groups = f", groups={G}" if isinstance(head, MLDecoder) else ""
        reset = f"head.reset({C}{groups}) first, or " if differ <= {"C", "J"} else ""
        hints.append(f"use {reset}head_from_public(source), which builds a head of the file's sizes")
    if found.zero_shot and not isinstance(head, ZeroShotMLDecoder):
        groups = " with groups" if found.group_words else ""
        hints.append(f"word vectors as queries: load it into a ZeroShotMLDecoder{groups}")
    elif found.zero_shot and isinstance(head, ZeroShotMLDecoder) and head.full == found.group_words:
        decoding = "group decoding: build it with" if head.full else "full decoding: build it without"
        hints.append(f"{decoding} groups")
    elif decoder and isinstance(head, ZeroShotMLDecoder) and G and not found.self_attention:
        hints.append("queries of its own, no word vectors: load it into an MLDecoder")
    elif decoder and isinstance(head, TransformerDecoder) and not found.self_attention:
        hints.append("no self-attention, as in ML-Decoder: load it into an MLDecoder")
    if grouped_self_attention:
        hints.append("self-attention and fewer groups than classes: no head of mlhead has both")
    elif isinstance(head, (MLDecoder, ZeroShotMLDecoder)) and found.self_attention:
        hints.append("self-attention, which ML-Decoder does not have: load it into a TransformerDecoder")
    if decoder and found.layers > 1:
        hints.append(f"{found.layers} decoder layers, where the heads of mlhead have one")
    return hints
