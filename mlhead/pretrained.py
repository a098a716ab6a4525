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
from ._public_fit import banks, compare, identity_queries, sizes_text, targets
from ._public_keys import DECODER_KEYS, ZERO_SHOT_KEYS, Found
from .heads import CSRAHead, Head, MLDecoder, TransformerDecoder, ZeroShotMLDecoder
from .heads._decoder import Queries

FORMS = ("decoder", "flat")
KINDS: dict[type[Head], str] = {
    MLDecoder: "ml_decoder",
    TransformerDecoder: "transformer_decoder",
    ZeroShotMLDecoder: "zero_shot",
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
_PUBLIC_WORD_DIM = 300  # at E = 300, too, public code does not project the word vectors


@dataclass
class LoadReport:
    """What a load did; as a string, a table.

    Attributes:
        kind: "ml_decoder", "transformer_decoder", "zero_shot" or "csra".
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
        head: An MLDecoder, TransformerDecoder, ZeroShotMLDecoder or CSRAHead of the checkpoint's sizes.
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
        * Public zero-shot files hold no word vectors: the head keeps its banks. Those of mlhead's own files are set
          beside them, or in the place of one of the same name.
        * A zero-shot file without `wordvec_proj` fits a head with E = W, whose projection becomes the identity.
        * Of group decoding of word vectors, how many classes share a query is in no checkpoint.

    Source:
        ML-Decoder, sections 2.3.2 and 2.3.3; CSRA, section 3.4. Only the names of the keys are those of their public
        code.
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
    word_vectors: Tensor | Mapping[str, Tensor] | None = None,
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
        queries: "fixed" or "learnable": whether the queries, which come from the file, are trained further. Zero-shot
            heads have none.
        word_vectors: Of a zero-shot head, whose public files hold none: (C, W), or banks by name, in the place of those
            of an own file. See `ZeroShotMLDecoder`.
        lam: Of a CSRA head; a checkpoint does not say it, the file's name may (`..._lam0.5_...`).
        temperatures: Of a CSRA head; by default the paper's for its number of heads, see `CSRAHead`.
        normalize: Of a CSRA head; by default as published.
        device: Of the head; by default where the tensors are, the CPU for a file.
        dtype: Of the head; by default that of the file's group weight or first classifier.
        verbose: Whether the report is printed.

    Returns:
        An MLDecoder; a TransformerDecoder, if there is self-attention; a ZeroShotMLDecoder of full decoding, if there
        are no queries but one pooling vector; or a CSRAHead. In training mode, as any new head.

    Raises:
        CheckpointError: As of `load_public`, or if a key that tells a size is missing, or of a zero-shot head of group
            decoding.
        ValueError: Word vectors of another width, or for a head that takes none; or an option does not fit the head.
        TypeError: The source is none of the above, or word vectors are no floating tensor.
    """
    where = "head_from_public"
    if not isinstance(queries, str):
        _check.fail(where, "queries", "'fixed' or 'learnable': the queries come from the file", type(queries).__name__)
    state, name = open_source(where, source)
    found = choose(where, state, name, prefix, None, "a checkpoint with a head of ML-Decoder or CSRA")
    if found.group_words:
        must = "of full decoding; how many classes share a query is in no checkpoint"
        how = "build the ZeroShotMLDecoder with its groups, then load_public(head, source) or head.load_state_dict(...)"
        refuse(where, name, must, f"which looks like {found.describe()}, of group decoding", [how])
    if word_vectors is not None and not found.zero_shot:
        _check.fail(where, "word_vectors", f"None for {found.describe()}", type(word_vectors).__name__)
    classes = _classes_of(where, word_vectors)
    has = found.sizes()
    like = next(
        (
            value
            for key, value in found.state.items()
            if found.names.get(key) in ("duplicate_pooling", "weight", "weight[0]") and isinstance(value, Tensor)
        ),
        None,
    )
    needed = "HCD" if found.family == "csra" else "EWDF" if found.zero_shot else "CGEDF"
    if like is None or not set(needed) <= has.keys():
        if found.family == "csra":
            own: tuple[str, ...] = ("weight" if found.form == "own" else "weight[0]",)
        elif found.zero_shot:
            left_out = "wordvec_proj." if found.without_projection else ()
            own = tuple(key for key in ZERO_SHOT_KEYS if not key.startswith(left_out))
        else:
            own = DECODER_KEYS
        missing = [found.public_name(key) for key in own if key not in found.names.values()]
        odd = [
            f"{key}: {kind_of(found.state[key])}"
            for key, mapped in found.names.items()
            if mapped in own and not missing
        ]
        problems = [listing("missing", missing), listing("of a shape that does not tell the size", odd)]
        refuse(where, name, "a checkpoint with all keys of its head", found.describe(), problems)
    dtype = like.dtype if dtype is None and like.is_floating_point() else dtype
    C, D = has.get("C", 1), has["D"]  # a zero-shot head's C is that of its word vectors
    # Built without memory, so that nothing is drawn at random only to be overwritten.
    head: Head
    if found.family == "csra":
        bias = any(mapped and mapped.startswith("bias") for mapped in found.names.values())
        options = {"num_heads": has["H"], "temperatures": temperatures, "lam": lam, "normalize": normalize}
        head = CSRAHead(D, C, **options, bias=bias, device="meta", dtype=dtype)  # type: ignore[arg-type]
    else:
        decoder: dict[str, Any] = {"embed_dim": has["E"], "num_heads": num_heads, "feedforward_dim": has["F"]}
        decoder |= {"dropout": dropout, "device": "meta", "dtype": dtype}
        if found.zero_shot:
            head = ZeroShotMLDecoder(D, C, word_dim=has["W"], **decoder)
        elif found.self_attention:
            head = TransformerDecoder(D, C, queries=queries, **decoder)
        else:
            head = MLDecoder(D, C, groups=has["G"], queries=queries, **decoder)
    compare(where, head, found, name)
    head.to_empty(device=like.device if device is None else device)
    _load(where, head, found, name, verbose)
    if isinstance(head, ZeroShotMLDecoder) and classes is not None:
        head.reset(classes, word_vectors=word_vectors)
    return head


def _classes_of(where: str, word_vectors: Tensor | Mapping[str, Tensor] | None) -> int | None:
    """C of the first bank, if there is any."""
    first = next(iter(word_vectors.values()), None) if isinstance(word_vectors, Mapping) else word_vectors
    if first is None:
        return None
    _check.check_tensor(where, "word_vectors", first)
    _check.check_ndim(where, "word_vectors", first, "(C, W)")
    return len(first)


def public_state_dict(head: Head, form: str = "decoder", prefix: str = "") -> dict[str, Tensor]:
    """A head's parameters under the keys of public checkpoints.

    Args:
        head: An MLDecoder, TransformerDecoder, CSRAHead, or ZeroShotMLDecoder of full decoding.
        form: Of a decoder: "decoder" puts `decoder.` before all keys but `wordvec_proj.*`, "flat" before those of the
            layers only. CSRA has one form, `classifier.multi_head.<i>.head.weight` (C, D, 1, 1).
        prefix: Before every key, for example "head.".

    Returns:
        Keys and tensors, which share the memory of the parameters as those of `head.state_dict()` do. Banks of word
        vectors are left out; at E = W = 300 so is `wordvec_proj`, which public code does not have there.

    Raises:
        TypeError: Another head.
        ValueError: Another form. A zero-shot head that public code cannot load: one of group decoding, or with E = W =
            300 and another projection of the word vectors than the identity.
    """
    where = "public_state_dict"
    _check_head(where, head)
    _check.check_choice(where, "form", form, FORMS)
    prefix = dotted(prefix)
    if isinstance(head, CSRAHead):
        found = Found("csra", "", prefix, {}, "multi_head", classifier="classifier.")
    else:
        found = Found("decoder", "", prefix, {}, form)
    tensors = targets(head, found)
    if isinstance(head, ZeroShotMLDecoder):
        if not head.full:
            got = f"one with up to {head.group_size} classes a query"
            _check.fail(where, "head", "built without groups: public zero-shot code has no group decoding", got)
        if head.embed_dim == head.word_dim == _PUBLIC_WORD_DIM:
            _check_memory(where, head)
            eye = torch.eye(_PUBLIC_WORD_DIM).to(head.wordvec_proj.weight)
            if not torch.equal(head.wordvec_proj.weight, eye) or head.wordvec_proj.bias.any():
                must = f"one whose wordvec_proj is the identity: at E = W = {_PUBLIC_WORD_DIM} public code has none"
                _check.fail(where, "head", must, "another projection")
            tensors = {own: tensor for own, tensor in tensors.items() if not own.startswith("wordvec_proj.")}
    return {found.public_name(own): tensor for own, tensor in tensors.items()}


def _check_head(where: str, head: object) -> None:
    if isinstance(head, tuple(KINDS)):
        head._refuse_shards(where)  # type: ignore[attr-defined]
        return
    got = type(head).__name__
    if isinstance(head, nn.Module) and isinstance(getattr(head, "head", None), Head):
        got += "; its head is its attribute `head`"
    _check.fail(where, "head", "an MLDecoder, TransformerDecoder, ZeroShotMLDecoder or CSRAHead", got, TypeError)


def _check_memory(where: str, head: Head) -> None:
    if any(parameter.is_meta for parameter in head.parameters()):
        _check.fail(where, "head", "on a device with memory (head.to_empty(device=...))", "on the meta device")


def _load(where: str, head: Head, found: Found, name: str, verbose: bool) -> LoadReport:
    _check_memory(where, head)
    keys = compare(where, head, found, name)
    into = targets(head, found)
    with torch.no_grad():
        for own, tensor in into.items():
            tensor.copy_(found.state[keys[own]])
        if isinstance(head, ZeroShotMLDecoder):
            if identity_queries(head, found):
                head.wordvec_proj.weight.copy_(torch.eye(head.word_dim))
                head.wordvec_proj.bias.zero_()
            for bank, key in banks(head, keys).items():
                head.set_bank(bank, found.state[key])
                into[f"banks.{bank}"] = head.bank(bank)
    values = {own: found.state[key] for own, key in keys.items()}
    names = ("temperatures", "lam", "normalize", "pooling") if isinstance(head, CSRAHead) else ("num_heads",)
    holder: Any = head if isinstance(head, CSRAHead) else head.layers[0].multihead_attn  # type: ignore[index, union-attr]
    assumed = {name: getattr(holder, name) for name in names}
    if isinstance(head, ZeroShotMLDecoder):
        if not head.full:
            assumed["group_size"] = head.group_size
        if identity_queries(head, found):
            assumed["wordvec_proj"] = "identity"
    report = LoadReport(
        kind=next(kind for cls, kind in KINDS.items() if isinstance(head, cls)),
        form=found.form,
        source=name,
        prefix=found.path,
        mapped=[(keys[own], own, tuple(values[own].shape)) for own in into],
        ignored=dict(found.beside.most_common()),
        casts=[(keys[own], values[own].dtype, t.dtype) for own, t in into.items() if values[own].dtype != t.dtype],
        assumed=assumed,
    )
    if verbose:
        print(report)
    return report
