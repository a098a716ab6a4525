"""Targets of the losses in the head: dense, or the positives of each image."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _check


def may_read_values(*tensors: Tensor | None) -> bool:
    """Whether values are at hand: no tracing, no torch.func transform, no tensor mode such as FakeTensorMode."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None:
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and all(
        t is None or (type(t) is Tensor and t.device.type in ("cpu", "cuda")) for t in tensors
    )


class SparseTargets(NamedTuple):
    """The labels of a batch as lists of classes: what a million classes need instead of a dense (B, C) tensor.

    Make one with `from_lists`, `from_dense` or `from_csr`, which sort and check; DataLoader pins its tensors. What is
    put together otherwise is checked where it is used, by `check`.

    Args:
        indices: Classes (N), int64, those of an image one after another in ascending order, each once.
        offsets: (B + 1), int64: image b's classes are indices[offsets[b] : offsets[b + 1]].
        values: None where every listed class is a positive; or (N) floating: y in [0, 1], or -1 for a class whose
            label is unknown, which has no loss.
        num_classes: C.
    """

    indices: Tensor
    offsets: Tensor
    values: Tensor | None
    num_classes: int

    @classmethod
    def from_lists(
        cls,
        positives: Sequence[Iterable[int] | Tensor],
        num_classes: int,
        *,
        ignore: Sequence[Iterable[int] | Tensor] | None = None,
    ) -> SparseTargets:
        """Targets of one list of positive classes per image.

        Args:
            positives: B lists of classes in [0, C), in any order.
            num_classes: C.
            ignore: B lists of classes whose label is unknown, or None.

        Raises:
            ValueError: A class is out of range, or is listed twice for an image; the message names the row. Or `ignore`
                has another number of lists than `positives`.
        """
        if ignore is not None and len(ignore) != len(positives):
            _check.fail("SparseTargets", "ignore", f"{len(positives)} lists like positives", len(ignore))
        rows, values = [], []
        for b, listed in enumerate(positives):
            unknown = [] if ignore is None else [int(c) for c in ignore[b]]
            row = [(int(c), 1.0) for c in listed] + [(c, -1.0) for c in unknown]
            rows.append([c for c, _ in sorted(row)])
            values += [y for _, y in sorted(row)]
        lengths = torch.tensor([0, *map(len, rows)], dtype=torch.int64)
        flat = torch.tensor([c for row in rows for c in row], dtype=torch.int64)
        made = cls(flat, lengths.cumsum(0), None if ignore is None else torch.tensor(values), num_classes)
        made.check("SparseTargets", "positives")
        return made

    @classmethod
    def from_dense(cls, targets: Tensor, *, ignore: Tensor | None = None) -> SparseTargets:
        """Targets of a dense y (B, C).

        Args:
            targets: y (B, C) in [0, 1], or -1 for an unknown label; bool, integer or floating.
            ignore: (B, C) bool, True for an unknown label, or None.

        Raises:
            ValueError: y does not have two axes, the mask does not fit y, or on the CPU a value of y is wrong. On CUDA
                wrong values end in an asynchronous device assertion.
            TypeError: y is no dense real tensor, or the mask is not bool.
        """
        where = "SparseTargets"
        _check.check_real(where, "targets", targets)
        if targets.layout != torch.strided:
            _check.fail(where, "targets", "dense", targets.layout, TypeError)
        _check.check_ndim(where, "targets", targets, "(B, C)")
        y = targets if targets.is_floating_point() else targets.to(torch.float32)
        if ignore is not None:
            check_mask(where, ignore, y)
            y = y.masked_fill(ignore, -1.0)
        rows, indices = y.nonzero(as_tuple=True)
        values = y[rows, indices]
        counts = torch.bincount(rows, minlength=y.shape[0])
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        made = cls(indices, offsets, None if bool((values == 1).all()) else values, y.shape[1])
        made.check(where, "targets")
        return made

    @classmethod
    def from_csr(cls, targets: Tensor) -> SparseTargets:
        """Targets of a torch sparse CSR tensor (B, C), whose values are y: bool, integer or floating.

        Raises:
            ValueError: The tensor does not have two axes, or on the CPU a value or a class is wrong. On CUDA wrong
                values end in an asynchronous device assertion.
            TypeError: It is no sparse CSR tensor, or complex.
        """
        where = "SparseTargets"
        if not isinstance(targets, Tensor) or targets.layout != torch.sparse_csr:
            found = targets.layout if isinstance(targets, Tensor) else type(targets).__name__
            _check.fail(where, "targets", "a torch.sparse_csr tensor (B, C)", found, TypeError)
        made = _from_csr(where, targets)
        made.check(where, "targets")
        return made

    @property
    def batch(self) -> int:
        """B."""
        return self.offsets.shape[0] - 1

    def rows(self) -> Tensor:
        """The image in [0, B) that each entry belongs to, (N) int64."""
        entries = torch.arange(self.indices.shape[0], device=self.indices.device)
        return torch.searchsorted(self.offsets, entries, right=True) - 1

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SparseTargets:
        """The targets on another device."""
        indices, offsets, values = (
            None if t is None else t.to(device, non_blocking=non_blocking)
            for t in (self.indices, self.offsets, self.values)
        )
        return SparseTargets(indices, offsets, values, self.num_classes)  # type: ignore[arg-type]

    def to_dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dense y (B, C), -1 where the label is unknown.

        Args:
            dtype: Of y. A bool or unsigned one cannot hold the -1, which on CUDA becomes another value, True of a bool;
                an integer one cannot hold a y between 0 and 1.

        Raises:
            ValueError: On the CPU a label is unknown, and `dtype` is bool or unsigned.
            IndexError: On the CPU a class is out of range, which `check` would have said.
        """
        given = None if dtype.is_signed else self.values
        if given is not None and given.device.type == "cpu" and may_read_values(given) and bool((given < 0).any()):
            _check.fail("SparseTargets", "dtype", "one that holds the -1 of an unknown label", dtype)
        y = torch.zeros(self.batch, self.num_classes, dtype=dtype, device=self.indices.device)
        values = torch.ones((), dtype=dtype, device=y.device) if self.values is None else self.values.to(dtype)
        return y.index_put_((self.rows(), self.indices), values)

    def _sorted(self) -> SparseTargets:
        order = torch.argsort(self.rows() * self.num_classes + self.indices, stable=True)
        values = None if self.values is None else self.values[order]
        return self._replace(indices=self.indices[order], values=values)

    def _check_form(self, where: str, argument: str) -> None:
        """Types, dtypes and shapes alone."""
        indices, offsets, values, _ = self
        for name, tensor in (("indices", indices), ("offsets", offsets)):
            if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64 or tensor.ndim != 1:
                found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
                _check.fail(where, f"{argument}.{name}", "int64 of one axis", found, TypeError)
        if values is not None:
            _check.check_tensor(where, f"{argument}.values", values)
            _check.check_shape(where, f"{argument}.values", values, "(N,)", indices.shape)
        if offsets.shape[0] < 1:
            _check.fail(where, f"{argument}.offsets", "(B + 1,)", tuple(offsets.shape))

    def check(self, where: str, argument: str) -> None:
        """That indices and offsets are what `SparseTargets` says, on a CPU with the row of what is wrong.

        On a GPU an asynchronous assertion does, without the row; while something traces the numbers are not checked.

        Args:
            where: What takes the targets, for the message.
            argument: What they are called there.

        Raises:
            TypeError: Indices or offsets are no int64 tensor of one axis, or the values no floating tensor.
            ValueError: The values are not (N), or on the CPU a number does not fit.
        """
        self._check_form(where, argument)
        indices, offsets, values, C = self
        if not may_read_values(indices, offsets, values):
            return
        steps, N = offsets.diff(), indices.shape[0]
        rows = self.rows()
        rising = (indices.diff() > 0) | (rows.diff() > 0)
        inside = (indices >= 0) & (indices < C)
        sound = torch.ones_like(inside) if values is None else ((values >= 0) & (values <= 1)) | (values == -1)
        fits = (offsets[0] == 0) & (offsets[-1] == N) & (steps >= 0).all()
        if indices.device.type == "cuda":
            message = f"{where}: {argument} must list classes in [0, {C}) once each, in ascending order in every row"
            torch._assert_async(fits & rising.all() & inside.all() & sound.all(), message)
            return
        if not fits:
            _check.fail(where, f"{argument}.offsets", f"rising from 0 to N = {N}", offsets.tolist()[:8])
        if not inside.all():
            i = int(torch.nonzero(~inside)[0])
            _check.fail(where, argument, f"classes in [0, {C})", f"{int(indices[i])} in row {int(rows[i])}")
        if not rising.all():
            i = int(torch.nonzero(~rising)[0])
            row, c, after = int(rows[i]), int(indices[i]), int(indices[i + 1])
            if c == after:
                _check.fail(where, argument, "each class at most once in a row", f"class {c} twice in row {row}")
            _check.fail(where, argument, "in ascending order in every row", f"{c}, {after} in row {row}")
        if not sound.all():
            i = int(torch.nonzero(~sound)[0])
            _check.fail(where, f"{argument}.values", "in [0, 1], or -1", f"{float(values[i])} in row {int(rows[i])}")  # type: ignore[index]


def _from_csr(where: str, targets: Tensor) -> SparseTargets:
    _check.check_ndim(where, "targets", targets, "(B, C)")
    indices, offsets = targets.col_indices().long(), targets.crow_indices().long()
    values = targets.values()
    if not values.is_floating_point() and not values.is_complex():
        values = values.float()
    return SparseTargets(indices, offsets, values, targets.shape[1])._sorted()


def _from_pair(where: str, indices: Any, offsets: Any, C: int) -> SparseTargets:
    """Targets of plain (indices, offsets), in any order within a row."""
    given = SparseTargets(indices, offsets, None, C)
    if isinstance(indices, Tensor) and isinstance(offsets, Tensor) and indices.ndim == offsets.ndim == 1:
        if indices.device != offsets.device:
            _check.fail(where, "targets", f"offsets on {indices.device} like the indices", offsets.device)
        if not (indices.is_floating_point() or offsets.is_floating_point()):
            given = given._replace(indices=indices.long(), offsets=offsets.long())
            if given.batch >= 0:
                given = given._sorted()
    return given


def as_sparse(where: str, targets: Any, C: int) -> Tensor | SparseTargets:
    """`SparseTargets`, whose numbers are not checked here, of any sparse form; a dense tensor as it is."""
    if isinstance(targets, SparseTargets):
        return targets
    if isinstance(targets, tuple) and len(targets) == 2:
        return _from_pair(where, *targets, C)
    found = targets.layout if isinstance(targets, Tensor) else type(targets).__name__
    if found == torch.sparse_csr:
        return _from_csr(where, targets)
    if found != torch.strided:
        must = "a tensor (B, C), SparseTargets, (indices, offsets) or a sparse CSR tensor"
        _check.fail(where, "targets", must, found, TypeError)
    return targets


def merge_ignore(where: str, targets: SparseTargets, ignore: Any) -> SparseTargets:
    """Targets with the classes of `ignore` as unknown ones; `check` finds those that are listed in both."""
    if not isinstance(ignore, SparseTargets):
        _check.fail(where, "ignore", "SparseTargets like targets", type(ignore).__name__, TypeError)
    targets._check_form(where, "targets")
    ignore._check_form(where, "ignore")
    if ignore.num_classes != targets.num_classes or ignore.offsets.shape != targets.offsets.shape:
        must = f"of {targets.batch} rows and {targets.num_classes} classes like targets"
        _check.fail(where, "ignore", must, f"{ignore.batch} rows and {ignore.num_classes} classes")
    values = (
        torch.ones(targets.indices.shape, device=targets.indices.device) if targets.values is None else targets.values
    )
    key = torch.cat([t.rows() * t.num_classes + t.indices for t in (targets, ignore)])
    key, order = torch.sort(key, stable=True)
    unknown = torch.full(ignore.indices.shape, -1.0, dtype=values.dtype, device=values.device)
    offsets = targets.offsets + ignore.offsets
    indices = torch.cat([targets.indices, ignore.indices])[order]
    return SparseTargets(indices, offsets, torch.cat([values, unknown])[order], targets.num_classes)


def prepare(
    where: str, targets: Any, ignore: Any, loss: str, B: int, C: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Checked (targets, offsets, values) of `LossArguments`, from any form that the public functions take.

    `dtype` is the accumulation dtype.
    """
    if ignore is not None and loss == "softmax":
        _check.fail(where, "ignore", "None for loss='softmax', whose classes share one sum", type(ignore).__name__)
    targets = as_sparse(where, targets, C)
    if isinstance(targets, Tensor) and loss == "softmax" and targets.ndim == 1 and not targets.is_floating_point():
        if targets.dtype == torch.bool:
            _check.fail(where, "targets", "class indices (B,) of an integer dtype", targets.dtype, TypeError)
        _check.check_shape(where, "targets", targets, "class indices (B,)", (B,))
        targets = SparseTargets(targets.long(), torch.arange(B + 1, device=targets.device), None, C)
    if isinstance(targets, SparseTargets):
        if ignore is not None:
            targets = merge_ignore(where, targets, ignore)
        return _sparse(where, targets, loss, B, C, device, dtype)
    return _dense(where, targets, ignore, B, C, device), None, None


def _sparse(
    where: str, targets: SparseTargets, loss: str, B: int, C: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    if targets.num_classes != C:
        _check.fail(where, "targets", f"of C = {C} classes", targets.num_classes)
    targets.check(where, "targets")
    if targets.batch != B:
        _check.fail(where, "targets", f"of B = {B} rows", targets.batch)
    for tensor in (targets.indices, targets.offsets, targets.values):
        if tensor is not None and tensor.device != device:
            _check.fail(where, "targets", f"on {device} like the features", tensor.device)
    values = None if targets.values is None else targets.values.to(dtype).contiguous()
    readable = values is not None and values.device.type == "cpu" and may_read_values(values)
    if loss == "softmax" and values is not None and readable and bool((values < 0).any()):
        _check.fail(where, "targets", "without unknown labels for loss='softmax'", "a value of -1")
    return targets.indices.contiguous(), targets.offsets.contiguous(), values


def _dense(where: str, targets: Tensor, ignore: Any, B: int, C: int, device: torch.device) -> Tensor:
    _check.check_real(where, "targets", targets)
    _check.check_shape(where, "targets", targets, "(B, C)", (B, C))
    if targets.device != device:
        _check.fail(where, "targets", f"on {device} like the features", targets.device)
    check_range(where, "targets", targets)
    small = targets.dtype in (torch.bool, torch.int8, torch.uint8)
    if not targets.is_floating_point() and not small:
        targets, small = targets.to(torch.int8), True
    if ignore is None:
        return targets
    check_mask(where, ignore, targets)
    return (targets.to(torch.int8) if small else targets).masked_fill(ignore, -1)


def check_mask(where: str, ignore: Any, targets: Tensor) -> None:
    """`ignore` beside dense targets: bool, of their shape and on their device."""
    if not isinstance(ignore, Tensor) or ignore.dtype != torch.bool:
        found = ignore.dtype if isinstance(ignore, Tensor) else type(ignore).__name__
        _check.fail(where, "ignore", "a bool tensor (B, C) beside dense targets", found, TypeError)
    _check.check_shape(where, "ignore", ignore, "(B, C)", targets.shape)
    if ignore.device != targets.device:
        _check.fail(where, "ignore", f"on {targets.device} like targets", ignore.device)


def check_range(
    where: str, argument: str, values: Tensor, low: float = 0, high: float = 1, *, unknown: bool = False
) -> None:
    """All in [low, high], or with `unknown` -1, and none NaN: read on a CPU, asserted asynchronously on a GPU."""
    if values.numel() == 0 or values.dtype == torch.bool or not may_read_values(values):
        return
    values, on_gpu = values.detach(), values.device.type == "cuda"
    smallest, largest = torch.aminmax(values)  # hands NaN on, and NaN fails both comparisons
    if unknown and (on_gpu or smallest == -1):
        smallest = values.masked_fill(values == -1, low).amin()
    must = f"in [{low:g}, {high:g}]{' or -1' if unknown else ''} and not NaN"
    if on_gpu:
        torch._assert_async((smallest >= low) & (largest <= high), f"{where}: {argument} must be {must}")
    elif not (smallest >= low and largest <= high):
        nan = bool(smallest != smallest)
        found = "NaN" if nan else f"values from {smallest.item():g} to {largest.item():g}"
        _check.fail(where, argument, must, found)
