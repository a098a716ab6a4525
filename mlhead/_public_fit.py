"""Whether what was found in a file fits a head, and what to do if it does not."""

from __future__ import annotations

from torch import Tensor

from ._public_files import kind_of, listing, refuse
from ._public_keys import Found
from .heads import CSRAHead, Head, MLDecoder, TransformerDecoder
from .heads._decoder import DecoderHead


def targets(head: Head, found: Found) -> dict[str, Tensor]:
    """The head's parameters, in the shapes that the file's form has them in, by mlhead's names."""
    if isinstance(head, CSRAHead) and found.form != "own":
        heads = {f"weight[{i}]": w.detach()[:, :, None, None] for i, w in enumerate(head.weight)}
        if head.bias is not None:
            heads |= {f"bias[{i}]": b.detach() for i, b in enumerate(head.bias)}
        return heads
    return {own: tensor.detach() for own, tensor in head.state_dict().items()}


def sizes_text(head: Head) -> str:
    """A head's class and sizes."""
    text = ", ".join(f"{letter} = {size}" for letter, size in sizes(head).items())
    return f"{type(head).__name__} with {text.replace('F = ', 'feed-forward width ')}"


def sizes(head: Head) -> dict[str, int]:
    """A head's dimensions, in the letters of `Found.sizes`."""
    if isinstance(head, CSRAHead):
        return {"H": head.num_heads, "C": head.num_classes, "D": head.in_features}
    assert isinstance(head, DecoderHead)
    G, E, J = head.duplicate_pooling.shape
    width = head.layers[0].linear1.out_features  # type: ignore[union-attr]
    return {"C": head.num_classes, "G": G, "J": J, "E": E, "D": head.in_features, "F": width}  # type: ignore[dict-item]


def compare(where: str, head: Head, found: Found, name: str) -> dict[str, str]:
    """The key in the file of each of the head's tensors; raises if any key is missing, left over or does not fit."""
    wanted = targets(head, found)
    keys: dict[str, str] = {}
    unexpected = []
    for key, own in found.names.items():
        if own is None or own not in wanted or own in keys:
            unexpected.append(f"{key}: {kind_of(found.state[key])}")
        else:
            keys[own] = key
    missing = [f"{found.public_name(own)}: {tuple(t.shape)}" for own, t in wanted.items() if own not in keys]
    wrong = []
    for own, key in keys.items():
        value, shape = found.state[key], tuple(wanted[own].shape)
        usable = isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta
        if not usable or value.shape != shape:
            wrong.append(f"{key}: wanted {shape}, found {kind_of(value)}")
    if missing or unexpected or wrong:
        lists = [listing("missing", missing), listing("unexpected", unexpected), listing("wrong shape", wrong)]
        got = f"which looks like {found.describe()}"
        refuse(where, name, f"a checkpoint of {sizes_text(head)}", got, [*lists, *_hints(where, head, found)])
    return keys


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
    elif differ and where == "load_public" and not grouped_self_attention:
        groups = f", groups={G}" if isinstance(head, MLDecoder) else ""
        reset = f"head.reset({C}{groups}) first, or " if differ <= {"C", "J"} else ""
        hints.append(f"use {reset}head_from_public(source), which builds a head of the file's sizes")
    if decoder and isinstance(head, TransformerDecoder) and not found.self_attention:
        hints.append("no self-attention, as in ML-Decoder: load it into an MLDecoder")
    if grouped_self_attention:
        hints.append("self-attention and fewer groups than classes: no head of mlhead has both")
    elif isinstance(head, MLDecoder) and found.self_attention:
        hints.append("self-attention, which ML-Decoder does not have: load it into a TransformerDecoder")
    if decoder and found.layers > 1:
        hints.append(f"{found.layers} decoder layers, where the heads of mlhead have one")
    return hints
