"""The difference of two checkpoints, tensor by tensor, several at a time in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from loratools.basemodel import BaseTensor, elements
from loratools.compute import Compute, one_thread_kernels
from loratools.errors import CorruptFileError, NonFiniteError
from loratools.streaming.gate import Gate
from loratools.tensorfiles.copying import read_at
from loratools.tensorfiles.dtypes import torch_dtype
from loratools.tensorfiles.inputs import open_input

_BLOCK = 1 << 20

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class Difference:
    """One tensor minus another.

    Attributes:
        values: in float32, shaped as stored.
        norm: ‖values‖ (Frobenius).
        base_norm: norm of what was subtracted.
    """

    values: Tensor
    norm: float
    base_norm: float


def read_difference(tuned: BaseTensor, base: BaseTensor) -> Difference:
    """Return ``tuned`` − ``base``, subtracted in float32 (or float64, where one is that).

    Raises:
        NonFiniteError: NaN or infinity in the difference, naming the tensor.
        CorruptFileError: a file ends before its tensor does.
    """
    count = elements(tuned.shape)
    values = torch.empty(count, dtype=torch.float32)
    squares = [0.0, 0.0]
    with _Reader(tuned) as ours, _Reader(base) as theirs:
        for start in range(0, count, _BLOCK):
            stop = min(start + _BLOCK, count)
            one, other = ours.read(start, stop), theirs.read(start, stop)
            part = values[start:stop]
            part.copy_(one - other)
            for place, block in enumerate((part, other)):
                squares[place] += float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2
            if not math.isfinite(squares[0]):
                raise _non_finite(tuned, one, other)
    norm, base_norm = (math.sqrt(square) for square in squares)
    return Difference(values.reshape(tuned.shape), norm, base_norm)


class _Reader:
    """Reads elements of one tensor in the precision of the subtraction, one block at a time."""

    def __init__(self, tensor: BaseTensor) -> None:
        self.tensor = tensor
        self.dtype = torch_dtype(tensor.dtype)
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32

    def __enter__(self) -> _Reader:
        self.file = None if self.tensor.values is not None else open_input(self.tensor.file)
        self.buffer = torch.empty(
            min(_BLOCK, max(elements(self.tensor.shape), 1)), dtype=self.dtype
        )
        return self

    def __exit__(self, *exception: object) -> None:
        if self.file is not None:
            self.file.close()

    def read(self, start: int, stop: int) -> Tensor:
        tensor = self.tensor
        if tensor.values is not None:
            return tensor.values.reshape(-1)[start:stop].to(self.wide)
        assert self.file is not None
        assert tensor.start is not None
        part = self.buffer[: stop - start]
        view = part.view(torch.uint8).numpy().data
        if read_at(self.file.fileno(), view, tensor.start + start * self.dtype.itemsize) < len(
            view
        ):
            raise CorruptFileError(
                f"{tensor.file}: ends inside {tensor.name}", hint="was it changed meanwhile?"
            )
        return part.to(self.wide)


def _non_finite(tuned: BaseTensor, one: Tensor, other: Tensor) -> NonFiniteError:
    whose = [word for word, t in (("tuned", one), ("base", other)) if not bool(t.isfinite().all())]
    where = f"in the {' and the '.join(whose)} weights" if whose else "in the difference"
    return NonFiniteError(
        f"{tuned.name}: NaN or infinity {where}",
        hint="the training diverged or the file is damaged; --exclude leaves the module out",
    )


# ── several at a time ────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Job(Generic[Item]):
    """Something to compute and the number of elements it holds in memory meanwhile."""

    item: Item
    elements: int


def in_threads(
    jobs: Sequence[Job[Item]],
    work: Callable[[Item], Result],
    compute: Compute,
    done: Callable[[Job[Item]], None] | None = None,
) -> Iterator[Result]:
    """Yield ``work`` of every item, in their order, while threads compute ahead.

    Kernels run on one thread each, so that results do not depend on the number of cores. What is
    in memory at a time is at most two of the largest items, or as many small ones as come to that.
    """
    gate = Gate(2 * max((job.elements for job in jobs), default=0))

    def run(job: Job[Item]) -> Result:
        with gate.holding(job.elements):
            result = work(job.item)
        if done is not None:
            done(job)
        return result

    with one_thread_kernels(), ThreadPoolExecutor(compute.workers) as pool:
        futures: list[Future[Result]] = [pool.submit(run, job) for job in jobs]
        try:
            for future in futures:
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
