"""Public ML-Decoder and CSRA checkpoints: into a head, strictly and with a report, and back to the public form."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import _check
from ._public_files import choose, dotted, kind_of, listing, open_source, refuse
from ._public_fit import compare, sizes_text, targets
from ._public_keys import DECODER_KEYS, Found
from .heads import CSRAHead, Head, MLDecoder, TransformerDecoder
from .heads._decoder import Queries

FORMS = ("decoder", "flat")
KINDS: dict[type[Head], str] = {
    MLDecoder: "ml_decoder",
    TransformerDecoder: "transformer_decoder",
    CSRAHead: "csra",
}
_FORM_TEXT = {
    "decoder": "`decoder.` before all keys",
    "flat": "`decoder.` before the layers only",
    "mixed": "`decoder.` before some keys",
    "own": "mlhead's own keys",
    "multi_head": "`multi_head.<i>.head`",
    "csra_heads": "`csra_heads.<i>.head`, as OpenMMLab writes it",
}


@dataclass
class LoadReport:
    """What a load did; as a string, a table.

    Attributes:
        kind: "ml_decoder", "transformer_decoder" or "csra".
        form: How the file writes the keys: "decoder", "flat", "multi_head", "csra_heads", "own", or "mixed".
        source: The file, or "a state dict".
        prefix: What precedes the public keys in the file, with the dictionaries around them.
        mapped: Of every tensor its key in the file, mlhead's own, and its shape in the file.
        ignored: How many keys beside the head begin with which component.
        casts: Of every tensor whose dtype has changed its key in the file, that dtype and the head's.
        assumed: What decides about the logits but is in no checkpoint, as it is in the head.
    """

    kind: str
    form: str
    source: str
    prefix: str
    mapped: list[tuple[str, str, tuple[int, ...]]]
    ignored: dict[str, int]
    casts: list[tuple[str, torch.dtype, torch.dtype]]
    assumed: dict[str, Any]

    def __str__(self) -> str:
        width, own = (max(len(row[i]) for row in self.mapped) for i in (0, 1))
        ignored = ", ".join(f"{name} {count}" for name, count in self.ignored.items())
        dtypes = ", ".join(sorted({f"{old} to {new}" for _, old, new in self.casts}))
        assumed = ", ".join(f"{name} = {value}" for name, value in self.assumed.items())
        beside = sum(self.ignored.values())
        lines = [
            f"{self.kind} from {self.source}: {len(self.mapped)} tensors loaded",
            f"  form     {self.form} ({_FORM_TEXT[self.form]})",
            f"  prefix   {self.prefix!r}",
            *(f"    {public:{width}} -> {name:{own}} {shape}" for public, name, shape in self.mapped),
            f"  ignored  {f'beside the head {beside}: {ignored}' if beside else 'nothing'}",
            f"  cast     {f'{len(self.casts)} tensors, {dtypes}' if dtypes else 'nothing'}",
            f"  not in the file, so check: {assumed}",
        ]
        return "\n".join(lines)


def load_public(
    head: Head,
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    prefix: str | None = None,
    verbose: bool = True,
) -> LoadReport:
    """Loads a public checkpoint, or one of mlhead's own, into a head: every key must fit, or nothing changes.

    Args:
        head: An MLDecoder, TransformerDecoder or CSRAHead of the checkpoint's sizes.
        source: A file of torch.save or .safetensors, read without running code from it; or a state dict. Dictionaries
            around the state dict ("state_dict", "model", ...) and prefixes ("module.", "head.", ...) are found.
        prefix: What precedes the public keys, for a file with several heads. By default the only head in the file.
        verbose: Whether the report is printed.

    Returns:
        What was mapped, left out and cast. Values take the dtype and device of the head's parameters.

    Raises:
        CheckpointError: The file cannot be read, or does not fit; the message lists every missing, unexpected and
            wrongly shaped key, and says what the file looks like. It is a ValueError.
        TypeError: The head or the source is none of the above.

    Known limits:
        * The number of attention heads, and CSRA's lam, temperatures and normalisation, are in no checkpoint. The
          report shows the head's own.
        * Heads with `wordvec_proj` (zero-shot) are recognised and refused.

    Source:
        ML-Decoder, section 2.3.2; CSRA, section 3.4. Only the names of the keys are those of their public code.
    """
    where = "load_public"
    _check_head(where, head)
    state, name = open_source(where, source)
    family = "csra" if isinstance(head, CSRAHead) else "decoder"
    found = choose(where, state, name, prefix, family, f"a checkpoint of {sizes_text(head)}")
    return _load(where, head, found, name, verbose)


def head_from_public(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    prefix: str | None = None,
    num_heads: int = 8,
    dropout: float = 0.1,
    queries: Queries = "fixed",
    lam: float | Sequence[float] = 0.1,
    temperatures: Sequence[float] | None = None,
    normalize: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    verbose: bool = True,
) -> Head:
    """Builds the head that a checkpoint is of, in the sizes that its shapes tell, and loads it.

    Args:
        source: As of `load_public`.
        prefix: As of `load_public`.
        num_heads: Attention heads of a decoder, 8 in public ones; a checkpoint does not say it.
        dropout: Of a decoder, in training.
        queries: "fixed" or "learnable": whether the queries, which come from the file, are trained further.
        lam: Of a CSRA head; a checkpoint does not say it, the file's name may (`..._lam0.5_...`).
        temperatures: Of a CSRA head; by default the paper's for its number of heads, see `CSRAHead`.
        normalize: Of a CSRA head; by default as published.
        device: Of the head; by default where the tensors are, the CPU for a file.
        dtype: Of the head; by default that of the file's group weight or first classifier.
        verbose: Whether the report is printed.

    Returns:
        An MLDecoder; a TransformerDecoder, if there is self-attention; or a CSRAHead. In training
        mode, as any new head.

    Raises:
        CheckpointError: As of `load_public`, or if a key that tells a size is missing.
    """
    where = "head_from_public"
    if not isinstance(queries, str):
        _check.fail(where, "queries", "'fixed' or 'learnable': the queries come from the file", type(queries).__name__)
    state, name = open_source(where, source)
    found = choose(where, state, name, prefix, None, "a checkpoint with a head of ML-Decoder or CSRA")
    has = found.sizes()
    needed = "CGED" + "F" if found.family == "decoder" else "HCD"
    if not set(needed) <= has.keys():
        own = DECODER_KEYS if found.family == "decoder" else ("weight" if found.form == "own" else "weight[0]",)
        missing = [found.public_name(key) for key in own if key not in found.names.values()]
        odd = [
            f"{key}: {kind_of(found.state[key])}"
            for key, mapped in found.names.items()
            if mapped in own and not missing
        ]
        problems = [listing("missing", missing), listing("of a shape that does not tell the size", odd)]
        refuse(where, name, "a checkpoint with all keys of its head", found.describe(), problems)
    like = next(
        value
        for key, value in found.state.items()
        if found.names.get(key) in ("duplicate_pooling", "weight", "weight[0]") and isinstance(value, Tensor)
    )
    dtype = like.dtype if dtype is None and like.is_floating_point() else dtype
    C, D = has["C"], has["D"]
    # Built without memory, so that nothing is drawn at random only to be overwritten.
    head: Head
    if found.family == "csra":
        bias = any(mapped and mapped.startswith("bias") for mapped in found.names.values())
        options = {"num_heads": has["H"], "temperatures": temperatures, "lam": lam, "normalize": normalize}
        head = CSRAHead(D, C, **options, bias=bias, device="meta", dtype=dtype)  # type: ignore[arg-type]
    else:
        decoder: dict[str, Any] = {"embed_dim": has["E"], "num_heads": num_heads, "feedforward_dim": has["F"]}
        decoder |= {"dropout": dropout, "queries": queries, "device": "meta", "dtype": dtype}
        if found.self_attention:
            head = TransformerDecoder(D, C, **decoder)
        else:
            head = MLDecoder(D, C, groups=has["G"], **decoder)
    compare(where, head, found, name)
    head.to_empty(device=like.device if device is None else device)
    _load(where, head, found, name, verbose)
    return head


def public_state_dict(head: Head, form: str = "decoder", prefix: str = "") -> dict[str, Tensor]:
    """A head's parameters under the keys of public checkpoints.

    Args:
        head: An MLDecoder, TransformerDecoder or CSRAHead.
        form: Of a decoder: "decoder" puts `decoder.` before all keys, "flat" before those of the layers only. CSRA has
            one form, `classifier.multi_head.<i>.head.weight` (C, D, 1, 1).
        prefix: Before every key, for example "head.".

    Returns:
        Keys and tensors, which share the memory of the parameters as those of `head.state_dict()` do.

    Raises:
        TypeError: Another head.
        ValueError: Another form.
    """
    where = "public_state_dict"
    _check_head(where, head)
    _check.check_choice(where, "form", form, FORMS)
    prefix = dotted(prefix)
    if isinstance(head, CSRAHead):
        found = Found("csra", "", prefix, {}, "multi_head", classifier="classifier.")
    else:
        found = Found("decoder", "", prefix, {}, form)
    return {found.public_name(own): tensor for own, tensor in targets(head, found).items()}


def _check_head(where: str, head: object) -> None:
    if isinstance(head, tuple(KINDS)):
        return
    got = type(head).__name__
    if isinstance(head, nn.Module) and isinstance(getattr(head, "head", None), Head):
        got += "; its head is its attribute `head`"
    _check.fail(where, "head", "an MLDecoder, TransformerDecoder or CSRAHead", got, TypeError)


def _load(where: str, head: Head, found: Found, name: str, verbose: bool) -> LoadReport:
    if any(parameter.is_meta for parameter in head.parameters()):
        _check.fail(where, "head", "on a device with memory (head.to_empty(device=...))", "on the meta device")
    keys = compare(where, head, found, name)
    into = targets(head, found)
    with torch.no_grad():
        for own, key in keys.items():
            into[own].copy_(found.state[key])
    values = {own: found.state[key] for own, key in keys.items()}
    names = ("temperatures", "lam", "normalize", "pooling") if isinstance(head, CSRAHead) else ("num_heads",)
    holder: Any = head if isinstance(head, CSRAHead) else head.layers[0].multihead_attn  # type: ignore[index, union-attr]
    report = LoadReport(
        kind=next(kind for cls, kind in KINDS.items() if isinstance(head, cls)),
        form=found.form,
        source=name,
        prefix=found.path,
        mapped=[(keys[own], own, tuple(values[own].shape)) for own in into],
        ignored=dict(found.beside.most_common()),
        casts=[(keys[own], values[own].dtype, t.dtype) for own, t in into.items() if values[own].dtype != t.dtype],
        assumed={name: getattr(holder, name) for name in names},
    )
    if verbose:
        print(report)
    return report
