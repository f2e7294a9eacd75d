"""Byte ranges: the kernel's way and both ways by hand copy the same bytes."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loratools.errors import CorruptFileError
from loratools.tensorfiles import copying
from loratools.tensorfiles.copying import copy_range

DATA = bytes(range(256)) * 1200
WAYS = {
    "kernel": [],
    "offsets": ["_copy_file_range"],
    "position": ["_copy_file_range", "_preadv", "_pwrite"],
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    for name in WAYS[request.param]:
        monkeypatch.setattr(copying, name, None)
    return str(request.param)


@pytest.fixture
def descriptors(tmp_path: Path) -> Iterator[tuple[int, int]]:
    (tmp_path / "source").write_bytes(DATA)
    with (tmp_path / "source").open("rb") as source, (tmp_path / "target").open("w+b") as target:
        yield source.fileno(), target.fileno()


def content(descriptor: int) -> bytes:
    return os.pread(descriptor, 2 * len(DATA), 0)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("chunk", [1 << 30, 100_003])
@pytest.mark.parametrize(
    ("start", "to", "count"),
    [(0, 0, len(DATA)), (1000, 7, 200_001), (len(DATA), 0, 0), (5, 90_000, 1)],
)
def test_ranges(
    descriptors: tuple[int, int],
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    start: int,
    to: int,
    count: int,
) -> None:
    monkeypatch.setattr(copying, "_CALL_BYTES", chunk)
    monkeypatch.setattr(copying, "_BUFFER_BYTES", min(chunk, 8 << 20))
    source, target = descriptors
    copy_range(source, start, target, to, count)
    assert content(target) == (bytes(to) if count else b"") + DATA[start : start + count]


@pytest.mark.usefixtures("way")
def test_what_lies_around_is_kept(descriptors: tuple[int, int]) -> None:
    source, target = descriptors
    os.write(target, b"x" * 100)
    copy_range(source, 0, target, 10, 20)
    assert content(target) == b"x" * 10 + DATA[:20] + b"x" * 70


@pytest.mark.usefixtures("way")
def test_a_short_source(descriptors: tuple[int, int]) -> None:
    source, target = descriptors
    with pytest.raises(CorruptFileError, match="ends 15 bytes before") as refusal:
        copy_range(source, len(DATA) - 5, target, 0, 20)
    assert refusal.value.hint
    assert content(target) == DATA[-5:]


@pytest.mark.usefixtures("way")
def test_threads_share_the_files(
    descriptors: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "_CALL_BYTES", 1000)
    monkeypatch.setattr(copying, "_BUFFER_BYTES", 10_000)
    seek = os.lseek

    def seek_and_yield(*arguments: int) -> int:
        position = seek(*arguments)
        time.sleep(1e-4)
        return position

    monkeypatch.setattr(os, "lseek", seek_and_yield)
    source, target = descriptors
    step = len(DATA) // 16
    with ThreadPoolExecutor(8) as pool:
        starts = range(0, len(DATA), step)
        list(pool.map(lambda start: copy_range(source, start, target, start, step), starts))
    assert content(target) == DATA


@pytest.mark.parametrize("code", ["EXDEV", "EINVAL", "ENOSYS", "EOPNOTSUPP", "EPERM"])
@pytest.mark.parametrize("before", [0, 1000])
def test_the_kernel_may_give_up_at_any_point(
    descriptors: tuple[int, int], monkeypatch: pytest.MonkeyPatch, code: str, before: int
) -> None:
    source, target = descriptors

    def some_then_refuse(src: int, dst: int, count: int, start: int, to: int) -> int:
        if start >= before:
            raise OSError(getattr(errno, code), "no")
        os.pwrite(dst, os.pread(src, min(count, 500), start), to)
        return min(count, 500)

    monkeypatch.setattr(copying, "_copy_file_range", some_then_refuse)
    copy_range(source, 0, target, 0, len(DATA))
    assert content(target) == DATA


def test_a_kernel_that_moves_nothing(
    descriptors: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = descriptors
    monkeypatch.setattr(copying, "_copy_file_range", lambda *_: 0)
    copy_range(source, 0, target, 0, len(DATA))
    assert content(target) == DATA


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_true_failures_are_not_hidden(
    descriptors: tuple[int, int], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(code, "no")

    monkeypatch.setattr(copying, "_copy_file_range", refuse)
    with pytest.raises(OSError, match="no") as refusal:
        copy_range(*descriptors[:1], 0, descriptors[1], 0, 10)
    assert refusal.value.errno == code


def test_short_writes_go_on(descriptors: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = descriptors
    monkeypatch.setattr(copying, "_copy_file_range", None)
    monkeypatch.setattr(
        copying, "_pwrite", lambda fd, data, offset: os.pwrite(fd, data[:777], offset)
    )
    copy_range(source, 3, target, 4, 5000)
    assert content(target) == bytes(4) + DATA[3:5003]
