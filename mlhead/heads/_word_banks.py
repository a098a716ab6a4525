"""Named sets of word vectors in a head, kept in its state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .. import _check

_ROWS = "_rows_"  # before a bank's name in that of its buffer: every module has an attribute `train`


class WordBanks(nn.Module):
    """Word vectors (C, W) by name, for example of the classes for training, of others, and of all.

    They are buffers `<name>` (C, W) of the state dict; loading one brings all its banks, whatever their sizes. In
    memory a bank ends in zero rows that fill the last group. Where `mlhead.parallel` has set `shards`, a device keeps
    the rows of its own groups, and making a state dict brings them together.

    Args:
        width: W.
        group_size: The most classes of one query.
        like: Gives dtype and device.
    """

    def __init__(self, width: int, group_size: int, like: Tensor) -> None:
        super().__init__()
        self.width, self.group_size = width, group_size
        self.sizes: dict[str, int] = {}
        self.shards: Any = None
        self.register_buffer("_like", like.new_empty(0), persistent=False)

    def put(self, name: str, vectors: Tensor) -> None:
        """Adds a bank, or replaces the one of that name."""
        where = "ZeroShotMLDecoder"
        if not isinstance(name, str) or not name.isidentifier():
            _check.fail(where, "name", "an identifier that names a bank, as 'train'", repr(name))
        self.check(where, vectors)
        assert isinstance(self._like, Tensor)
        given = vectors.detach()
        padded = self.padded(given.to(self._like.device, self._like.dtype))
        rows = self.own(padded, len(given))
        # Neither the caller's memory nor, for a part of the rows, that of all.
        rows = rows.clone() if padded is given or rows is not padded else rows
        self.register_buffer(_ROWS + name, rows, persistent=False)
        self.sizes[name] = len(vectors)

    def check(self, where: str, vectors: Any) -> None:
        """Raises unless these are word vectors (C, W), C > 0."""
        _check.check_tensor(where, "word_vectors", vectors)
        if vectors.ndim != 2 or vectors.shape[1] != self.width or len(vectors) == 0:
            _check.fail(where, "word_vectors", f"(C, W) with W = {self.width} and C > 0", tuple(vectors.shape))

    def group_size_of(self, num_classes: int) -> int:
        """J of C classes: as few groups as there can be, and none much smaller than another."""
        groups = -(-num_classes // self.group_size)
        return -(-num_classes // groups)

    def padded(self, vectors: Tensor, group_size: int | None = None) -> Tensor:
        """Vectors (C, W) with zero rows up to a whole number of groups, by default those of C classes."""
        missing = -len(vectors) % (self.group_size_of(len(vectors)) if group_size is None else group_size)
        return F.pad(vectors, (0, 0, 0, missing)) if missing else vectors

    def own(self, rows: Tensor, num_classes: int) -> Tensor:
        """Of the padded rows of all classes those of this device."""
        if self.shards is None:
            return rows
        shard = self.shards.of(num_classes, self.group_size_of(num_classes))
        return rows[shard.first : shard.first + shard.own_blocks * self.group_size_of(num_classes)]

    def rows(self, name: str) -> Tensor:
        """A bank, or this device's part of it, with the zero rows that fill its last group."""
        if name not in self.sizes:
            known = ", ".join(map(repr, self.sizes)) or "none yet: give word_vectors, or set_bank"
            _check.fail("ZeroShotMLDecoder", "name", f"the name of a bank ({known})", repr(name))
        rows = getattr(self, _ROWS + name)
        assert isinstance(rows, Tensor)
        return rows

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.sizes:
            destination[prefix + name] = self.whole(name)

    def whole(self, name: str) -> Tensor:
        """A bank (C, W); of a sharded one every device has to ask."""
        rows, size = self.rows(name), self.sizes[name]
        return rows[:size] if self.shards is None else self.shards.whole(rows, size, self.group_size_of(size))

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, metadata: Any, strict: bool,
        missing: list[str], unexpected: list[str], errors: list[str],
    ) -> None:  # fmt: skip
        found = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
        for name, vectors in found.items():
            try:
                if metadata.get("assign_to_params_buffers") and isinstance(vectors, Tensor):
                    self._like = vectors.detach().new_empty(0)  # parameters take these tensors' device and dtype too
                self.put(name, vectors)
            except (TypeError, ValueError) as error:
                errors.append(f"bank {name!r}: {error}")
        if strict:
            missing += [prefix + name for name in self.sizes if name not in found]

    def extra_repr(self) -> str:
        """What the printed module shows."""
        return ", ".join(f"{name}: ({size}, {self.width})" for name, size in self.sizes.items())
