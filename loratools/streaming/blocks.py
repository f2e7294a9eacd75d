"""One tensor as blocks of rows: read, folded in float32, rounded once.

Buffers are reused from block to block, so memory does not grow with the tensor.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from loratools.basetensors import elements
from loratools.codecs.ggml_grids import GGML_GRIDS
from loratools.deltas import RowFold
from loratools.deltas.corner import take_corner
from loratools.errors import (
    CorruptFileError,
    LoratoolsError,
    NonFiniteError,
)
from loratools.streaming.packed_source import PackedSource
from loratools.streaming.residuals import Gathering
from loratools.streaming.stored import (
    Storage,
    source_storage,
    target_storage,
)
from loratools.streaming.subspaces import Losses, Subspaces, dot
from loratools.streaming.works import TensorResult, TensorWork
from loratools.tensorfiles.copying import open_source, read_at

# Blocks of 2**19 elements (2 MiB in float32) stay in the caches: measured 3 to 5 times faster
# than whole matrices. A GPU wants more work at a time.
_BLOCK = {"cpu": 1 << 19}
_GPU_BLOCK = 1 << 24
# Rounding column by column starts kernels for one column of a block: the more rows the better.
_SHAPED_BLOCK = {"cpu": 1 << 22}
_SHAPED_GPU_BLOCK = 1 << 26


def sample(work: TensorWork) -> tuple[Tensor, Tensor] | None:
    """Return the first block of a work's source and of its result, (rows, columns) in float32.

    ``None`` for an empty tensor and for folds that need the whole matrix at once.
    """
    folds = list(work.folds("cpu")) if work.folds else []
    if work.elements == 0 or work.is_packed or any(fold.reach == "whole" for fold in folds):
        return None
    with Blocks(work, folds, Buffers(), "cpu") as blocks:
        blocks.measure()
        return blocks.first()


class Buffers:
    """Memory that every block of a thread reuses."""

    def __init__(self) -> None:
        self.memory: dict[str, Tensor] = {}

    def take(self, role: str, dtype: torch.dtype, count: int) -> Tensor:
        """Return ``count`` elements of ``dtype`` with undefined values, valid until next taken."""
        size = count * dtype.itemsize
        held = self.memory.get(role)
        if held is None or held.numel() < size:
            held = self.memory[role] = torch.empty(size, dtype=torch.uint8)
        return held[:size].view(dtype)


class Blocks:
    """One tensor as blocks of rows: read, folded, rounded."""

    def __init__(
        self, work: TensorWork, folds: list[RowFold], buffers: Buffers, device: str
    ) -> None:
        self.work = work
        self.folds = folds
        self.substitutes = any(fold.substitutes for fold in folds)
        self.buffers = buffers
        self.device = device
        leading = max((fold.leading for fold in folds), default=_leading(work))
        self.rows = elements(work.shape[:leading])
        self.columns = elements(work.shape) // self.rows if self.rows else 0
        self.source = source_storage(work.source)
        self.target = target_storage(work.dtype, packed=work.is_packed)
        self.dtype = torch.float32 if self.target.codec else self.target.dtype
        self.packed = PackedSource(work.source) if work.source.packed else None
        # Rows that begin and end with a block: all, but for tensors that are folded in their file.
        elements_each = math.lcm(self.source.elements, self.target.elements, max(self.columns, 1))
        self.unit = elements_each // max(self.columns, 1)
        self.coded = self.target.codec is not None or work.is_packed
        rounding = work.rounding if self.coded and folds else None
        self.subspaces = Subspaces(rounding, *self._matrix(), device)
        self.losses = Losses(self.subspaces)
        wish = work.residual if self.coded and folds else None
        self.left_out = Gathering(wish, work.shape, device) if wish else None
        self.step = self._step()
        self.changed = False
        self.squares = [0.0, 0.0]
        self.file: int | None = None

    def __enter__(self) -> Blocks:
        if self.work.source.start is not None:
            self.file = open_source(self.work.source.file)
        if self.left_out:
            # Last, because it waits for room that only leaving gives back.
            self.left_out.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.left_out:
            self.left_out.__exit__(None, None, None)
        if self.file is not None:
            os.close(self.file)

    def _step(self) -> int:
        if any(fold.reach == "whole" for fold in self.folds):
            return max(self.rows, 1)
        kind, shaped = torch.device(self.device).type, self.subspaces.strength is not None
        block = _BLOCK.get(kind, _GPU_BLOCK)
        if shaped:
            block = _SHAPED_BLOCK.get(kind, _SHAPED_GPU_BLOCK)
        rows = max(1, block // max(self.columns, 1))
        unit = self.packed.unit // max(self.columns, 1) if self.packed else self.unit
        return rows if unit < 2 else -(-rows // unit) * unit

    def _matrix(self) -> tuple[int, int]:
        """Return the rows and columns in which codes are chosen."""
        return self.rows, self.columns

    def measure(self) -> None:
        """Show every block to the folds that need to see all rows first."""
        seeing = [fold for fold in self.folds if fold.reach == "two-pass"]
        if not seeing:
            return
        for start, stop in self._spans():
            weight = self._wide(self._read(start, stop), start).to(torch.float32)
            for fold in seeing:
                fold.measure(weight, start)

    def folded(self) -> Iterator[tuple[memoryview, int]]:
        """Yield the output's bytes block by block, with their offset in the tensor."""
        for start, stop in self._spans():
            raw = self._read(start, stop)
            out = self._fold_block(raw, start) if self.folds else self._cast(raw, start)
            yield _bytes(out), self.target.items(start * self.columns) * self.target.dtype.itemsize

    def first(self) -> tuple[Tensor, Tensor]:
        """Return the first block before and after, in float32."""
        start, stop = next(self._spans())
        raw = self._read(start, stop)
        before = self._decoded(self.source, raw).to(torch.float32)
        after = self._decoded(self.target, self._fold_block(raw, start)) if self.folds else before
        return before, after.to(torch.float32).reshape(before.shape).clone()

    def result(self) -> TensorResult:
        """Return what folding did, after the last block."""
        change, result = (math.sqrt(square) for square in self.squares)
        losses, done = self.losses, TensorResult(self.work.name, self.changed, change, result)
        if not self.coded:
            return done
        added, moved = losses.added_error(result), losses.codes_changed
        return replace(
            done,
            retained=losses.retained,
            subspace_error=losses.subspace_error,
            added_error=added,
            codes_changed=moved,
            residual=self.left_out.result() if self.left_out else None,
        )

    def _spans(self) -> Iterator[tuple[int, int]]:
        for start in range(0, self.rows if self.columns else 0, self.step):
            yield start, min(start + self.step, self.rows)

    def _read(self, start: int, stop: int) -> Tensor:
        """Return the source's rows as stored, on the CPU, padded to the output's shape."""
        shape, stored = self.work.shape, self.work.source.shape
        if shape == stored:
            return self._read_stored(start, stop, self.columns)
        block = torch.zeros(stop - start, *shape[1:], dtype=self.source.dtype)
        kept = (max(0, min(stop, stored[0]) - start), *stored[1:])
        if kept[0]:
            rows = self._read_stored(start, start + kept[0], elements(stored[1:]))
            take_corner(block, kept).copy_(rows.view(kept))
        return block.view(stop - start, self.columns)

    def _read_stored(self, start: int, stop: int, columns: int) -> Tensor:
        source = self.work.source
        if self.packed:
            flat = self.packed.read(start * columns, stop * columns)
            return flat.view(stop - start, columns)
        if source.values is not None:
            return source.values.reshape(-1, columns)[start:stop].contiguous()
        if source.rows is not None:
            return source.rows(start, stop)
        assert self.file is not None
        assert source.start is not None
        items = self.source.items((stop - start) * columns)
        raw = self.buffers.take("raw", self.source.dtype, items)
        at = source.start + self.source.items(start * columns) * self.source.dtype.itemsize
        view = _bytes(raw)
        if read_at(self.file, view, at) < len(view):
            raise CorruptFileError(
                f"{source.file}: ends inside {source.name}", hint="was it changed meanwhile?"
            )
        rows = 1 if self.unit > 1 else stop - start
        return raw.view(rows, items // rows)

    def _decoded(self, storage: Storage, raw: Tensor) -> Tensor:
        """Return rows of numbers."""
        return storage.decode(raw).view(-1, self.columns)

    def _wide(self, raw: Tensor, start: int) -> Tensor:
        """Return the block in the precision of the sum, on the device, substitutions made."""
        wide_dtype = torch.float64 if torch.float64 in (self.source.dtype, self.dtype) else None
        if self.source.codec:
            wide = self._decoded(self.source, raw.to(self.device))
        else:
            wide = self._on_device("wide", raw, wide_dtype or torch.float32)
        for fold in self.folds:
            fold.substitute(wide, start)
        return wide

    def _on_device(self, role: str, raw: Tensor, dtype: torch.dtype) -> Tensor:
        if self.device == "cpu":
            return self.buffers.take(role, dtype, raw.numel()).view(raw.shape).copy_(raw)
        return raw.to(self.device).to(dtype)

    def _summed(self, raw: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the sum, what was added, and what that makes of the stored weight."""
        wide = self._wide(raw, start)
        weight = wide.to(torch.float32)
        if self.device == "cpu":
            change = self.buffers.take("change", torch.float32, wide.numel()).view(wide.shape)
        else:
            change = torch.empty_like(weight)
        for position, fold in enumerate(self.folds):
            fold.add_change(change, weight, start, first=position == 0)
        wide.add_(change)
        made = wide - self._original(raw) if self.substitutes else change
        self.squares[0] += dot(made, made)
        return wide, change, made

    def _fold_block(self, raw: Tensor, start: int) -> Tensor:
        wide, change, made = self._summed(raw, start)
        out = self._rounded(wide, start, raw)
        if self.target.codec:
            error = self._decoded(self.target, out.to(wide.device)).sub_(wide)
            self._count(made, error, start)
        if not self.changed:
            self.changed = self._differs(out, raw, wide, change)
        return out

    def _count(self, made: Tensor, error: Tensor, start: int) -> None:
        """Count what rounding did to the rows from ``start`` on."""
        self.losses.add(made, error, start)
        if self.left_out:
            self.left_out.add(error, start * error.shape[1])

    def _original(self, raw: Tensor) -> Tensor:
        return self._decoded(self.source, raw.to(self.device)).to(torch.float32)

    def _rounded(self, wide: Tensor, start: int, raw: Tensor | None = None) -> Tensor:
        self._check(wide, start)
        return self._stored(wide, start, raw)

    def _check(self, wide: Tensor, start: int) -> None:
        """Count the norm, and refuse what the output cannot hold."""
        square = dot(wide, wide)
        # No element exceeds the norm. A NaN fails every comparison, so it is looked for too.
        if not math.sqrt(square) <= torch.finfo(self.dtype).max:
            self._refuse_non_finite(wide, start)
        self.squares[1] += square

    def _stored(self, wide: Tensor, start: int, raw: Tensor | None) -> Tensor:
        if self.target.codec:
            return self._encoded(wide, start, raw)
        if self.device == "cpu":
            out = self.buffers.take("out", self.dtype, wide.numel())
            return out.view(wide.shape).copy_(wide)
        return wide.to(self.dtype).cpu()

    def _encoded(self, wide: Tensor, start: int, raw: Tensor | None) -> Tensor:
        values = wide.to(torch.float32).view(1 if self.unit > 1 else len(wide), -1)
        frozen = GGML_GRIDS.get(self.target.word) if self.subspaces.strength is not None else None
        try:
            if frozen is None or raw is None:
                return self.target.encode(values).cpu()
            # Another type has no scales yet: those of rounding to nearest are as good as any.
            scales = raw if self.source == self.target else self.target.encode(values).cpu()
        except LoratoolsError as error:
            raise type(error)(f"{self.work.name}: {error.message}", error.hint) from error
        before, grid = frozen.read(scales)
        if self.unit > 1:
            # Blocks run over the ends of rows, and the columns are walked row by row.
            values, grid = values.view(-1, self.columns), grid.in_rows_of(self.columns)
        codes = self.subspaces.codes(values, grid.to(self.device), start).cpu()
        self.losses.count(before.view(codes.shape), codes)
        return frozen.write(scales, codes)

    def _refuse_non_finite(self, wide: Tensor, start: int) -> None:
        out = wide.to(self.dtype)
        lost = ~torch.isfinite(out)
        if self.packed and self.work.shape == self.work.source.shape:
            self.packed.refuse_damaged(wide, start * self.columns)
        if not self.folds:
            # What the base itself stores as infinite (a mask) is converted, not refused.
            lost &= torch.isfinite(wide)
        bad = lost.nonzero()
        if len(bad) == 0:
            return
        row, column = (int(i) for i in bad[0])
        value = float(wide[row, column])
        kind = "NaN" if math.isnan(value) else "infinite"
        raise NonFiniteError(
            f"{self.work.name}: the result is {kind} in {self.work.dtype} "
            f"(row {start + row}, value {value:g} before rounding)",
            hint=_non_finite_hint(value, self.work.dtype),
        )

    def _differs(self, out: Tensor, raw: Tensor, wide: Tensor, change: Tensor) -> bool:
        if self.target == self.source:
            return not torch.equal(out, raw)
        if self.substitutes:
            return not torch.equal(wide, self._original(raw).to(wide.dtype))
        return bool(change.any())

    def _cast(self, raw: Tensor, start: int) -> Tensor:
        """Return the block in the output dtype, its values checked when that could overflow."""
        if self.target == self.source:
            return raw
        if self.source.codec or self.target.codec:
            return self._rounded(self._wide(raw, start), start)
        return self._rounded(
            self._on_device(
                "wide",
                raw,
                torch.promote_types(torch.promote_types(raw.dtype, self.dtype), torch.float32),
            ),
            start,
        )


def _leading(work: TensorWork) -> int:
    """Return how many dimensions count as rows where no fold says it: all but the last."""
    return 1 if work.shape != work.source.shape else max(len(work.shape) - 1, 1)


def _non_finite_hint(value: float, dtype: str) -> str:
    """Return the next step for a value that is none, or that ``dtype`` cannot hold."""
    if not math.isfinite(value):
        return "the base holds such a value, or the strengths make one: check both"
    if dtype == "F16":
        return "fp16 ends at 65504: try --dtype bf16, or lower the strengths"
    return "lower the strengths"


def _bytes(tensor: Tensor) -> memoryview:
    """Return a contiguous CPU tensor's memory."""
    return memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
