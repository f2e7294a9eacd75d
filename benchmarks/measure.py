"""Run a whole process and record its wall time and its peak memory, children included."""

from __future__ import annotations

import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SAMPLE_SECONDS = 0.05
PROC = Path("/proc")


@dataclass(frozen=True)
class Measurement:
    """One run of one command.

    Attributes:
        seconds: wall time from start to exit.
        peak_anonymous: bytes; largest sampled sum of ``RssAnon`` over the process tree. Pages of
            memory-mapped files and of the page cache are not in it. ``None`` without ``/proc``.
        peak_resident: bytes; sum over the tree of each process's ``VmHWM``, which the kernel keeps
            itself and which does count mapped file pages. ``None`` without ``/proc``.
        stdout: what the command printed.
    """

    seconds: float
    peak_anonymous: int | None
    peak_resident: int | None
    stdout: str


def run_measured(command: Sequence[str]) -> Measurement:
    """Run ``command`` to its end; ``RuntimeError`` with its own words if it fails."""
    with tempfile.TemporaryFile() as stdout, tempfile.TemporaryFile() as stderr:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr)
        with _Sampler(process.pid) as sampler:
            code = process.wait()
            seconds = time.perf_counter() - started
        stdout.seek(0)
        stderr.seek(0)
        if code != 0:
            tail = stderr.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(command)} ended with {code}:\n{tail}")
        text = stdout.read().decode(errors="replace")
    return Measurement(seconds, sampler.peak_anonymous, sampler.peak_resident, text)


@dataclass
class _Sampler:
    """Reads the memory of a process tree every 10 ms from a thread of its own."""

    root: int
    anonymous: int = 0
    resident: dict[int, int] = field(default_factory=dict)
    done: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None

    def __enter__(self) -> _Sampler:
        if PROC.is_dir():
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.done.set()
        if self.thread is not None:
            self.thread.join()

    @property
    def peak_anonymous(self) -> int | None:
        return self.anonymous or None

    @property
    def peak_resident(self) -> int | None:
        return sum(self.resident.values()) or None

    def _watch(self) -> None:
        while not self.done.wait(SAMPLE_SECONDS):
            self._sample()

    def _sample(self) -> None:
        anonymous = 0
        for pid in _tree(self.root):
            status = _status(pid)
            anonymous += status.get("RssAnon", 0)
            self.resident[pid] = max(self.resident.get(pid, 0), status.get("VmHWM", 0))
        self.anonymous = max(self.anonymous, anonymous)


def _tree(pid: int) -> Iterator[int]:
    """Yield ``pid`` and every process below it that still lives."""
    yield pid
    for children in PROC.glob(f"{pid}/task/*/children"):
        for child in _read(children).split():
            yield from _tree(int(child))


def _status(pid: int) -> dict[str, int]:
    """Return the memory lines of ``/proc/PID/status`` in bytes; empty once the process is gone."""
    lines = (line.split() for line in _read(PROC / str(pid) / "status").splitlines())
    return {
        words[0].rstrip(":"): int(words[1]) * 1024
        for words in lines
        if len(words) == 3 and words[2] == "kB"
    }


def _read(path: Path) -> str:
    """Return the text, or nothing when the process ended meanwhile."""
    try:
        return path.read_text()
    except OSError:
        return ""
