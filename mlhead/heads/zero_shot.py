"""The zero-shot ML-Decoder head: queries made of word vectors, so that classes come and go without training."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from .. import _check
from ..ops import SparseTargets, group_fc, group_fc_loss, group_fc_topk
from ..ops._loss_options import Targets
from ..ops._loss_update import Update
from ..ops.topk import merge_topk
from ._augmentation import QueryAugmentation
from ._decoder import AttentionHead
from ._word_banks import WordBanks

# Without gradients, queries are decoded so many at a time that the widest activation of a step has this many elements.
STEP_ELEMENTS = 1 << 25


class _Classes(NamedTuple):
    """What a call decodes: rows (G J, W) for the queries, rows for the last layer, how many are real, and J."""

    queries: Tensor
    vectors: Tensor
    num_classes: int
    group_size: int


class _Call(nn.Module):
    """A function of a head's, as a module whose parameters are the head's."""

    def __init__(self, head: nn.Module, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.head, self.run = head, run

    def forward(self, rows: Tensor) -> Tensor:
        return self.run(rows)


class ZeroShotMLDecoder(AttentionHead):
    """ML-Decoder for classes that are described by word vectors n_c of W numbers, seen in training or not.

    With h the decoder layer's output for the queries q, as in `MLDecoder`:

        full decoding   q_c = relu(W_p n_c + b_p)                     logits[b, c] = h[b, c] . w + bias
        group decoding  q_k = concat_{c in group k} W_a n_c           logits[b, c] = (W_b^T h[b, c div J]) . n_c + bias

    Group k is the classes k J to k J + J - 1. A call of other classes has as many groups as it takes for J to be at
    most what it is at construction; a group that is not full ends in zeros. In group decoding the word vectors
    themselves are the weight of `group_fc`: no (G, E, J) weight is made.

    Word vectors are given per call, or once as banks, between which `use` switches:

        head = ZeroShotMLDecoder(2048, 925, word_vectors={"train": seen, "test": unseen, "union": both})
        loss = head(features, targets)      # the bank "train", the first
        head.use("union")
        logits = head(features)             # (B, 1006)
        logits = head(features, word_vectors=others)

    Args:
        in_features: D, the width of the features.
        num_classes: C of the first bank, or of the calls; with `groups` it gives J = ceil(C / groups).
        word_vectors: None; (C, W), the bank "train"; or banks by name, of which the first is in use. See `set_bank`.
        word_dim: W, where no word vectors are given. 300 by default.
        groups: None for full decoding, one query per class, whose logit then does not depend on what other classes
            there are, or in what order. Or how many queries the C classes share.
        embed_dim: E; at least J.
        num_heads: Heads of the attention, a divisor of E.
        feedforward_dim: Width of the feed-forward layer.
        dropout: Rate in [0, 1) of all dropouts, that on the attention weights included.
        augmentation: None, or a `QueryAugmentation` for training. It may be assigned at any time.
        query_step: How many queries are decoded at a time. By default all of them in training, and without gradients as
            many as give activations of at most 32 Mi elements. With gradients a step smaller than all makes backward
            compute each step again, and keeps what one of them needs.
        prior: Probability of every class at the start, see `Head`.
        loss: What `head(features, targets)` computes, see `Head`; binary cross-entropy by default.
        shared_query_dropout: See `MLDecoder`.
        device: Of the parameters.
        dtype: Of the parameters.

    State dict: `layers.0.*`, `embed_standart.*` as in `MLDecoder`, `duplicate_pooling_bias` (1), `banks.<name>` (C, W);
    full decoding, as public checkpoints have it: `wordvec_proj.{weight (E, W), bias (E)}`, `duplicate_pooling` (E, 1);
    group decoding: `query_proj.weight` W_a (E div J, W), `class_proj.weight` W_b^T (W, E). Loading a state dict brings
    its banks, of any size and name.

    Raises:
        ValueError: A width, number, rate or prior does not fit, J is above E, word vectors are not (C, W) with C > 0, a
            bank's name is no identifier, or the loss has the reduction "none"; the message names it.
        TypeError: A width or number is no integer, word vectors are no floating tensor, or `loss` is no module with
            `options()`.

    Numerics:
        A group's query ends in zeros where it is not full, and where J does not divide E. The bias, one number for all
        classes, is not in the paper's formula of group decoding; it starts at 0 or at the prior.

    Source:
        ML-Decoder, section 2.3.3, Appendix B (Eq. 5 and 6, Fig. 7) and M.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        word_vectors: Tensor | Mapping[str, Tensor] | None = None,
        word_dim: int | None = None,
        groups: int | None = None,
        embed_dim: int = 768,
        num_heads: int = 8,
        feedforward_dim: int = 2048,
        dropout: float = 0.1,
        augmentation: QueryAugmentation | None = None,
        query_step: int | None = None,
        prior: float | None = None,
        loss: nn.Module | None = None,
        shared_query_dropout: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            num_classes,
            embed_dim=embed_dim,
            num_heads=num_heads,
            feedforward_dim=feedforward_dim,
            dropout=dropout,
            prior=prior,
            loss=loss,
            self_attention=False,
            shared_query_dropout=shared_query_dropout,
            device=device,
            dtype=dtype,
        )
        where, E = "ZeroShotMLDecoder", embed_dim
        banks = _named(where, word_vectors, num_classes)
        W = _word_dim(where, banks, word_dim)
        self.full = groups is None
        if groups is not None:
            _check.check_positive(where, "groups", groups)
        J = 1 if groups is None else -(-num_classes // groups)
        if J > E:
            must = f"at least {-(-num_classes // E)}, for at most embed_dim = {E} classes each"
            _check.fail(where, "groups", must, groups)
        self.group_size, self.word_dim = J, W
        self.query_step, self.augmentation = query_step, augmentation
        if query_step is not None:
            _check.check_positive(where, "query_step", query_step)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        if self.full:
            self.wordvec_proj = nn.Linear(W, E, **options)
            self.duplicate_pooling = nn.Parameter(torch.empty(E, 1, **options))
        else:
            self.query_proj = nn.Linear(W, E // J, bias=False, **options)
            self.class_proj = nn.Linear(E, W, bias=False, **options)
        self.duplicate_pooling_bias = nn.Parameter(torch.empty(1, **options))
        self._used: str | None = None
        self._in_call = False  # whether the parameters are those that a sharded call puts in their place
        self.banks = WordBanks(W, J, self.duplicate_pooling_bias)
        for name, vectors in banks.items():
            self.set_bank(name, vectors)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew; the banks stay."""
        super().reset_parameters()
        if self.full:
            self.wordvec_proj.reset_parameters()
            nn.init.xavier_normal_(self.duplicate_pooling)
        else:
            self.query_proj.reset_parameters()
            nn.init.xavier_normal_(self.class_proj.weight)
        self._start_bias()

    def reset(self, num_classes: int, *, word_vectors: Tensor | Mapping[str, Tensor] | None = None) -> None:
        """Makes the head one of other classes; nothing but the banks changes.

        Args:
            num_classes: The new C.
            word_vectors: Banks in the place of all that there are, as at construction. Without any, word vectors must
                be given per call, or set.

        Raises:
            ValueError: The number is below 1, or word vectors or a bank's name do not fit, as at construction.
            TypeError: The number is no integer, or word vectors are no floating tensor.
            RuntimeError: The head is sharded.
        """
        where = "ZeroShotMLDecoder"
        self._refuse_shards("reset")
        _check.check_positive(where, "num_classes", num_classes)
        given = _named(where, word_vectors, num_classes)
        _word_dim(where, given, self.word_dim)
        banks = WordBanks(self.word_dim, self.group_size, self.duplicate_pooling_bias)
        for name, vectors in given.items():
            banks.put(name, vectors)
        self.banks, self._used, self.num_classes = banks, None, num_classes

    @property
    def num_classes(self) -> int:
        """C of the bank in use; without banks as given."""
        name = self.used
        return self._nominal if name is None else self.banks.sizes[name]

    @num_classes.setter
    def num_classes(self, value: int) -> None:
        self._nominal = value

    @property
    def used(self) -> str | None:
        """The name of the bank in use: the one chosen last, else the first; None without banks."""
        sizes = self.banks.sizes
        return self._used if self._used in sizes else next(iter(sizes), None)

    def set_bank(self, name: str, word_vectors: Tensor) -> None:
        """Adds a bank of word vectors (C, W), or replaces the one of that name. It is copied, and gets no gradient.

        Raises:
            ValueError: The name is no identifier, the shape is not (C, W) with C > 0, or the head is sharded and a
                device would have no class.
            TypeError: The word vectors are no floating tensor.
        """
        self.banks.put(name, word_vectors)

    def bank(self, name: str | None = None) -> Tensor:
        """The word vectors (C, W) of a bank, by default of the one in use; of a sharded head every device has to ask.

        Raises:
            ValueError: There is no bank of that name, or none at all.
        """
        return self.banks.whole(self._rows(name)[1])

    def use(self, name: str) -> None:
        """Takes the bank of that name from now on. No parameter changes.

        Raises:
            ValueError: There is no bank of that name.
        """
        self.banks.rows(name)
        self._used = name

    def _rows(self, name: str | None) -> tuple[Tensor, str]:
        chosen = self.used if name is None else name
        if chosen is None:
            must = "given, or set as a bank by set_bank"
            _check.fail("ZeroShotMLDecoder", "word_vectors", must, None)
        return self.banks.rows(chosen), chosen

    def _bias_and_gain(self) -> tuple[Tensor | None, float]:
        return self.duplicate_pooling_bias, 1.0

    def set_prior(self, prior: float | Tensor) -> None:
        """As `Head.set_prior`; of a probability for each class the mean is taken, for the bias is one number.

        Raises:
            ValueError: The shape is not (C,), or a value is NaN or outside [0, 1], as of `Head.set_prior`.
            RuntimeError: The head is sharded.
        """
        super().set_prior(self._prior(prior).mean())

    def _classes(self, word_vectors: Tensor | None, *, augment: bool = False) -> _Classes:
        """The classes of a call, in rows that fill their groups."""
        if word_vectors is None:
            rows, name = self._rows(None)
            C = self.banks.sizes[name]
        else:
            self.banks.check("ZeroShotMLDecoder", word_vectors)
            C = len(word_vectors)
            rows = self.banks.own(self.banks.padded(word_vectors), C)
        J, shard = self.banks.group_size_of(C), self._shard(C)
        own = C if shard is None else shard.own
        if augment and self.augmentation is not None and self.training:
            queries, vectors = self.augmentation(rows[:own])
            if len(vectors) > own:
                if shard is not None:
                    must = "without random queries for a head that is sharded"
                    _check.fail("ZeroShotMLDecoder", "augmentation", must, f"{len(vectors) - own} of them")
                own, J = len(vectors), self.banks.group_size_of(len(vectors))
            alike, vectors = queries is vectors, self.banks.padded(vectors, J)
            queries = vectors if alike else self.banks.padded(queries, J)
            return _Classes(queries, vectors, own, J)
        return _Classes(rows, rows, own, J)

    def _shard(self, num_classes: int) -> Any:
        """How so many classes are sharded, or None."""
        return None if self._shards is None else self._shards.of(num_classes, self.banks.group_size_of(num_classes))

    def _call_shard(self, word_vectors: Tensor | None) -> Any:
        """How the classes of a call are sharded, or None."""
        return self._shard(self.num_classes if word_vectors is None else len(word_vectors))

    def _queries(self, rows: Tensor, group_size: int) -> Tensor:
        """Queries (G, E) of rows (G J, W)."""
        if self.full:
            return F.relu(self.wordvec_proj(rows))
        q = self.query_proj(rows).unflatten(0, (-1, group_size)).flatten(1)
        return F.pad(q, (0, self.embed_dim - q.shape[1])) if q.shape[1] < self.embed_dim else q

    def _steps(self, classes: _Classes, B: int) -> list[_Classes]:
        """The classes of a call, so many queries at a time."""
        J, G = classes.group_size, len(classes.queries) // classes.group_size
        step = self.query_step
        if step is None:
            widest = max(self._layer.linear1.out_features, 3 * self.embed_dim)
            step = G if torch.is_grad_enabled() else max(64, STEP_ELEMENTS // max(1, B * widest))
        steps = []
        for first in range(0, G, step):
            part = slice(first * J, min(G, first + step) * J)
            C = min(part.stop, classes.num_classes) - part.start
            steps.append(_Classes(classes.queries[part], classes.vectors[part], C, J))
        return steps

    def _decode(
        self,
        steps: Sequence[_Classes],
        memory: Tensor,
        key_mask: Tensor | None,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """What the decoder makes of the queries, after `finish`, all steps side by side: (B, G, ...)."""

        def run(rows: Tensor) -> Tensor:
            h = self._layer(self._queries(rows, steps[0].group_size), memory, key_mask)
            return h if finish is None else finish(h)

        if len(steps) == 1:
            return run(steps[0].queries)
        again = run
        if torch.is_grad_enabled():
            again = functools.partial(checkpoint, self._with_these_parameters(run), use_reentrant=False)
        return torch.cat([again(step.queries) for step in steps], dim=1)

    def _with_these_parameters(self, run: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """`run` with the parameters of now, also in backward, when a `functional_call` has put back the head's own."""
        tensors: dict[str, Tensor] = dict(self.named_parameters())
        if all(type(tensor) is nn.Parameter for tensor in tensors.values()):
            return run
        call, given = _Call(self, run), {f"head.{name}": tensor for name, tensor in tensors.items()}
        return lambda rows: functional_call(call, given, (rows,))

    def _last(
        self, classes: _Classes, memory: Tensor, key_mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, int]:
        """What `group_fc` and its kin take: h, weight, bias and C."""
        C, bias, steps = classes.num_classes, self.duplicate_pooling_bias, self._steps(classes, memory.shape[0])
        if not self.full:
            weight = classes.vectors.unflatten(0, (-1, classes.group_size)).transpose(1, 2)
            return self._decode(steps, memory, key_mask, self.class_proj), weight, bias.expand(C), C
        weight = self.duplicate_pooling
        if len(steps) == 1:
            return self._decode(steps, memory, key_mask), weight, bias, C

        # Decoded queries of many steps would fill the memory; their logits are E times fewer.
        def logits(h: Tensor) -> Tensor:
            return group_fc(h, weight, bias).unsqueeze(-1)

        z = self._decode(steps, memory, key_mask, logits)
        return z, z.new_ones(1, 1), None, C

    def forward(
        self,
        features: Tensor,
        targets: Targets | None = None,
        *,
        word_vectors: Tensor | None = None,
        pre_logits: bool = False,
        sample_weight: Tensor | None = None,
        ignore: Tensor | SparseTargets | None = None,
        update: Update | None = None,
        key_mask: Tensor | None = None,
    ) -> Tensor:
        """Logits (B, C), with targets the loss by `group_fc_loss`; the decoded queries (B, G, E) if `pre_logits`.

        The arguments are those of every `Head`, and

        Args:
            features: (B, D, H, W) or (B, L, D).
            targets: Of the C classes of the call; those of random queries are appended here.
            word_vectors: (C, W) in the place of the bank in use; they get a gradient if they require one.
            pre_logits: See `Head`.
            sample_weight: See `Head`.
            ignore: See `Head`.
            update: None; there is no weight of the classes to update.
            key_mask: (B, L) bool, True where a position may be attended, or None for all.

        Returns:
            (B, C); in training with random queries (B, C + R), unless there are targets.

        Raises:
            ValueError: As of every `Head`, or word vectors or key_mask do not fit, there is no bank, or random queries
                meet class indices (B,) or a sharded head.
            TypeError: As of every `Head`, or word vectors are no floating tensor, or key_mask is not bool.
            RuntimeError: The head is sharded, for `pre_logits`.
            BackendError: An explicitly chosen backend cannot run this call.
        """
        if self._shards is not None and not self._in_call:
            given: dict[str, Any] = {"pre_logits": pre_logits, "sample_weight": sample_weight, "ignore": ignore}
            given |= {"update": update, "key_mask": key_mask}
            if word_vectors is not None:
                given["word_vectors"] = self._shards.sum_gradients(word_vectors)
            self._in_call = True
            try:
                return functional_call(self, self._shards.summed(self), (features, targets), given)
            finally:
                self._in_call = False
        options = self._options(targets, pre_logits, sample_weight, ignore, update)
        memory = self._memory(features)
        classes, shard = self._classes(word_vectors, augment=True), self._call_shard(word_vectors)
        if shard is not None:
            memory, key_mask = shard.enter(memory), shard.enter_mask(key_mask)
        if pre_logits:
            self._refuse_shards("forward with pre_logits")
            return self._decode(self._steps(classes, memory.shape[0]), memory, key_mask)
        h, weight, bias, C = self._last(classes, memory, key_mask)
        if shard is not None or targets is None:
            return self._finish((h, weight, bias), group_fc, group_fc_loss, targets, options, shard)
        if self.training and self.augmentation is not None and self.augmentation.extra:
            targets = self.augmentation.extend(targets, C - self.augmentation.extra)
            options = self.augmentation.extend_options(options)
        return group_fc_loss(h, weight, bias, targets, C, **options)

    @torch.no_grad()
    def topk(  # type: ignore[override]
        self, features: Tensor, k: int, *, word_vectors: Tensor | None = None, key_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The k best classes of each image, without the logits and without all decoded queries at once.

        Args:
            features: (B, D, H, W) or (B, L, D).
            k: How many, in [1, C].
            word_vectors: (C, W) in the place of the bank in use, for example an open vocabulary.
            key_mask: (B, L) bool, True where a position may be attended, or None for all.

        Returns:
            Scores (B, k), largest first, and classes (B, k) int64; of equal scores the lower class comes first. They
            carry no gradient.

        Raises:
            ValueError: k is not in [1, C], a shape does not fit, or there is no bank.
            TypeError: k is no integer, the features are of a wrong type, as for `forward`, word vectors are no floating
                tensor, or key_mask is not bool.
            BackendError: An explicitly chosen backend cannot run this call.
        """
        memory, classes = self._memory(features), self._classes(word_vectors)
        shard, all_classes = self._call_shard(word_vectors), self.num_classes
        if word_vectors is not None:
            all_classes = len(word_vectors)
        _check.check_positive("ZeroShotMLDecoder", "k", k)
        if k > all_classes:
            _check.fail("ZeroShotMLDecoder", "k", f"in [1, C] = [1, {all_classes}]", k)
        if shard is not None:
            memory, key_mask = shard.enter(memory), shard.enter_mask(key_mask)
        best, first = None, 0
        # The last layer of a group is far smaller than what is decoded for it; in full decoding it is all the same.
        for step in self._steps(classes, memory.shape[0]) if self.full else [classes]:
            h, weight, bias, C = self._last(step, memory, key_mask)
            scores, found = group_fc_topk(h, weight, bias, min(k, C), C)
            best = merge_topk(best, (scores, found + first), k)
            first += C
        assert best is not None
        return best if shard is None else shard.topk(k, best)

    def attention_maps(
        self,
        features: Tensor,
        classes: Tensor | Sequence[int],
        key_mask: Tensor | None = None,
        *,
        word_vectors: Tensor | None = None,
    ) -> Tensor:
        """The attention of each chosen class's query, the mean over the heads, without dropout.

        Args:
            features: (B, D, H, W) or (B, L, D).
            classes: Class indices, (K,) for all images or (B, K) for each its own. Classes of one group share a map.
            key_mask: (B, L) bool, True where a position may be attended, or None for all.
            word_vectors: (C, W) in the place of the bank in use.

        Returns:
            (B, K, L), at least 0, each row of sum 1; of 0 for an image whose every position is masked.

        Raises:
            ValueError: A shape does not fit, a class is out of range, or there is no bank.
            TypeError: The features are of a wrong type, as for `forward`, the classes are no integers, word vectors are
                no floating tensor, or key_mask is not bool.
            RuntimeError: The head is sharded.
            BackendError: An explicitly chosen backend cannot run this call.
        """
        self._refuse_shards("attention_maps")
        memory, found = self._memory(features), self._classes(word_vectors)
        indices = self._check_classes(classes, features, found.num_classes)
        J = found.group_size
        groups, chosen = torch.unique(indices // J, return_inverse=True)
        rows = found.queries.unflatten(0, (-1, J))[groups].flatten(0, 1)
        return self._layer.attention_weights(self._queries(rows, J), memory, chosen, key_mask)

    def extra_repr(self) -> str:
        """What the printed module shows."""
        decoding = "full" if self.full else f"up to {self.group_size} classes a query"
        return (
            f"in_features={self.in_features}, num_classes={self.num_classes}, decoding={decoding}, "
            f"embed_dim={self.embed_dim}, word_dim={self.word_dim}, bank={self.used!r}"
        )


def _named(where: str, word_vectors: Tensor | Mapping[str, Tensor] | None, num_classes: int) -> dict[str, Tensor]:
    """Banks by name; the first must have `num_classes` rows."""
    if word_vectors is None:
        return {}
    banks = dict(word_vectors) if isinstance(word_vectors, Mapping) else {"train": word_vectors}
    for name, vectors in banks.items():
        _check.check_tensor(where, "word_vectors", vectors)
        _check.check_ndim(where, f"word_vectors[{name!r}]", vectors, "(C, W)")
    first = next(iter(banks.values()), None)
    if first is not None and len(first) != num_classes:
        _check.fail(where, "word_vectors", f"(C, W) with C = {num_classes} in the first bank", tuple(first.shape))
    return banks


def _word_dim(where: str, banks: Mapping[str, Tensor], word_dim: int | None) -> int:
    """W."""
    if word_dim is not None:
        _check.check_positive(where, "word_dim", word_dim)
    widths = {vectors.shape[1] for vectors in banks.values()}
    if len(widths) > 1:
        _check.fail(where, "word_vectors", "of one width W in all banks", sorted(widths))
    if not widths:
        return 300 if word_dim is None else word_dim
    (width,) = widths
    if word_dim not in (None, width):
        _check.fail(where, "word_vectors", f"(C, W) with W = word_dim = {word_dim}", f"W = {width}")
    return width
