"""Writing a checkpoint anew: what changes goes through small blocks, the rest is copied as bytes.

Each touched tensor is one job of a thread: read a block of rows, fold in float32, round once,
write. Jobs run side by side, so that reading, folding and writing overlap; kernels inside them
run on one thread, so that the bytes written do not depend on how many cores there are.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from loratools.compute import Compute, one_thread_kernels
from loratools.errors import CorruptFileError
from loratools.streaming.blocks import Blocks, Buffers
from loratools.streaming.layouts import CHANGED, FileWork, layout_of
from loratools.streaming.packed_blocks import PackedBlocks, write_patch
from loratools.streaming.packing import PackingBlocks
from loratools.streaming.works import TensorResult, TensorWork
from loratools.tensorfiles.copying import copy_range, open_source, start_writeback, write_at

Progress = Callable[[int, int], None]
"""Called with the bytes just written and the bytes of the whole job, from several threads."""


def rewrite(
    files: Sequence[tuple[FileWork, Path]], compute: Compute, progress: Progress | None = None
) -> dict[str, TensorResult]:
    """Write each file to its path; returns what happened to every folded tensor.

    Raises:
        NonFiniteError: a result that is NaN or infinite, or beyond the output dtype.
        CorruptFileError: a source that ends early.
    """
    total = sum(work.nbytes for file, _ in files for work in file.tensors)
    runner = _Runner(compute, lambda count: progress(count, total) if progress else None)
    with one_thread_kernels():
        return runner.run(files)


class _Runner:
    """A pool of threads, each with its own reused buffers."""

    def __init__(self, compute: Compute, progress: Callable[[int], None]) -> None:
        self.compute = compute
        self.progress = progress
        self.stop = threading.Event()
        self.local = threading.local()
        self.results: dict[str, TensorResult] = {}
        self.syncing: ThreadPoolExecutor
        self.synced: list[Future[None]] = []

    def run(self, files: Sequence[tuple[FileWork, Path]]) -> dict[str, TensorResult]:
        # Syncing waits for the disk, so it has a thread of its own: the others keep folding.
        with ThreadPoolExecutor(1) as syncing, ThreadPoolExecutor(self.compute.workers) as pool:
            self.syncing, self.synced = syncing, []
            try:
                futures = self._submit(pool, files)
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in (*done, *self.synced):
                    future.result()
            except BaseException:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                raise
        names = (_whole(work).name for file, _ in files for work in file.tensors)
        return {name: self.results[name] for name in names if name in self.results}

    def _submit(
        self, pool: ThreadPoolExecutor, files: Sequence[tuple[FileWork, Path]]
    ) -> list[Future[None]]:
        tasks: list[_Task] = []
        parts: dict[str, _Recode] = {}
        for file, path in files:
            layout = layout_of(file)
            path.write_bytes(layout.header)
            os.truncate(path, layout.size)
            tasks += _tasks(path, file.tensors, layout.offsets)
            _gather_parts(parts, path, file.tensors, layout.offsets)
        # They take longest, so they go first.
        tasks = [*parts.values(), *tasks]
        touched = Counter(path for task in tasks for path in task.paths)
        pending = {path: _Countdown(count) for path, count in touched.items()}
        return [pool.submit(self._guarded, task, pending) for task in tasks]

    def _guarded(self, task: _Task, pending: Mapping[Path, _Countdown]) -> None:
        if self.stop.is_set():
            return
        try:
            if isinstance(task, _Copy):
                self._copy(task)
            elif isinstance(task, _Fold):
                self._fold(task)
            else:
                self._recode(task)
            done = [path for path in task.paths if pending[path].is_last()]
            self.synced += [self.syncing.submit(_sync, path) for path in done]
        except BaseException:
            self.stop.set()
            raise

    def _copy(self, task: _Copy) -> None:
        with (
            os.fdopen(open_source(task.source), "rb", buffering=0) as source,
            task.path.open("r+b", buffering=0) as target,
        ):
            try:
                copy_range(source.fileno(), task.start, target.fileno(), task.to, task.count)
            except CorruptFileError as error:
                raise CorruptFileError(f"{task.source}: {error.message}", CHANGED) from error
            start_writeback(target.fileno(), task.to, task.count)
        self.progress(task.count)

    def _fold(self, task: _Fold) -> None:
        work = task.work
        folds = list(work.folds(self.compute.device)) if work.folds else []
        blocks = Blocks(work, folds, self._buffers(), self.compute.device)
        with blocks, task.path.open("r+b", buffering=0) as target:
            blocks.measure()
            for data, offset in blocks.folded():
                if self.stop.is_set():
                    return
                write_at(target.fileno(), data, task.to + offset)
                self.progress(len(data))
            start_writeback(target.fileno(), task.to, work.nbytes)
        if folds:
            self.results[work.name] = blocks.result()

    def _recode(self, task: _Recode) -> None:
        work = task.work
        folds = list(work.folds(self.compute.device)) if work.folds else []
        kind = PackingBlocks if work.packer else PackedBlocks
        places = {place.work.role: place for place in task.places}
        if work.packer is None:
            self._copy_parts(task)
        blocks = kind(work, folds, self._buffers(), self.compute.device)
        with blocks, ExitStack() as stack:
            opened = {
                path: stack.enter_context(path.open("r+b", buffering=0)) for path in task.paths
            }
            blocks.measure()
            for patch in blocks.patches():
                if self.stop.is_set():
                    return
                place = places[patch.part]
                write_patch(opened[place.path].fileno(), place.to, place.work.shape, patch)
                if work.packer:
                    self.progress(patch.values.nbytes)
        if folds:
            self.results[work.name] = blocks.result()

    def _copy_parts(self, task: _Recode) -> None:
        for place in task.places:
            part, source = place.work, place.work.source
            if source.start is None:
                self._fold(_Fold(place.path, replace(part, whole=None), place.to))
            else:
                self._copy(_Copy(place.path, source.file, source.start, place.to, part.nbytes))

    def _buffers(self) -> Buffers:
        if not hasattr(self.local, "buffers"):
            self.local.buffers = Buffers()
        buffers: Buffers = self.local.buffers
        return buffers


@dataclass(frozen=True, slots=True)
class _Copy:
    """``count`` bytes that stay as they are."""

    path: Path
    source: Path
    start: int
    to: int
    count: int

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.path,)


@dataclass(frozen=True, slots=True)
class _Fold:
    """A tensor that is computed, and its byte offset in the output."""

    path: Path
    work: TensorWork
    to: int

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.path,)


@dataclass(frozen=True, slots=True)
class _Recode:
    """A packed weight that is folded in its own scheme, and where its stored parts go."""

    work: TensorWork
    places: list[_Fold] = field(default_factory=list)

    @property
    def paths(self) -> tuple[Path, ...]:
        return tuple(dict.fromkeys(place.path for place in self.places))


_Task = _Copy | _Fold | _Recode


class _Countdown:
    """Tells when a file's last task is done."""

    def __init__(self, count: int) -> None:
        self.left = count
        self.lock = threading.Lock()

    def is_last(self) -> bool:
        """Count one task as done; returns whether it was the last."""
        with self.lock:
            self.left -= 1
            return self.left == 0


def _sync(path: Path) -> None:
    with path.open("r+b", buffering=0) as file:
        os.fsync(file.fileno())


def _tasks(
    path: Path, tensors: Sequence[TensorWork], offsets: Sequence[int]
) -> Iterator[_Copy | _Fold]:
    """Yield the file's tasks in order, neighbouring copies as one."""
    waiting: _Copy | None = None
    for work, offset in zip(tensors, offsets, strict=True):
        start = work.source.start
        if _is_recoded(work):
            continue
        if not work.is_copy or start is None:
            yield _Fold(path, work, offset)
        elif waiting and _continues(waiting, work.source.file, start, offset):
            waiting = replace(waiting, count=waiting.count + work.nbytes)
        else:
            if waiting:
                yield waiting
            waiting = _Copy(path, work.source.file, start, offset, work.nbytes)
    if waiting:
        yield waiting


def _continues(copy: _Copy, source: Path, start: int, to: int) -> bool:
    return (copy.source, copy.start + copy.count, copy.to + copy.count) == (source, start, to)


def _gather_parts(
    found: dict[str, _Recode], path: Path, tensors: Sequence[TensorWork], offsets: Sequence[int]
) -> None:
    """Add to every packed weight that is folded where this file holds its parts."""
    for work, offset in zip(tensors, offsets, strict=True):
        if _is_recoded(work):
            whole = _whole(work)
            found.setdefault(whole.name, _Recode(whole)).places.append(_Fold(path, work, offset))


def _is_recoded(work: TensorWork) -> bool:
    whole = work.whole
    return whole is not None and (whole.folds is not None or whole.packer is not None)


def _whole(work: TensorWork) -> TensorWork:
    return work.whole or work
