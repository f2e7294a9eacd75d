"""Killed processes, full disks, failing renames: the destination is old or new, never between."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loratools.errors import OutputError
from loratools.tensorfiles import atomic, swapping
from loratools.tensorfiles.atomic import staged_output
from loratools.tensorfiles.copying import copy_range

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and devices")

# Each point is where the child halts for good: None for the middle of the body, else the call
# that never returns, and how many calls before it do.
CHILD = """
import shutil, sys, time
from pathlib import Path
from loratools.tensorfiles import atomic, swapping

target, folder, overwrite, point, passes, portable = eval(sys.argv[1])

def halt(*_, **__):
    print("halted", flush=True)
    time.sleep(60)

def halting(call, passes):
    def wrapped(*args, **kwargs):
        nonlocal passes
        if passes == 0:
            halt()
        passes -= 1
        return call(*args, **kwargs)
    return wrapped

if portable:
    swapping._libc_renameat2 = lambda: None
if point:
    owner, name = {
        "sync": (atomic, "sync_tree"),
        "settle": (atomic, "sync_folder"),
        "rename": (Path, "rename"),
        "remove": (shutil, "rmtree"),
    }[point]
    setattr(owner, name, halting(getattr(owner, name), passes))

with atomic.staged_output(Path(target), folder=folder, overwrite=overwrite) as temporary:
    for name in ("config.json", "model.safetensors"):
        place = temporary / name if folder else temporary
        place.write_text("new")
        if point is None:
            halt()
"""


def killed_at(point: str | None, target: Path, *, folder: bool, **how: Any) -> None:
    """Run a job that makes ``target`` and kill it where it halts."""
    job = (str(target), folder, how.get("overwrite", False), point, how.get("passes", 0))
    arguments = repr((*job, how.get("portable", False)))
    command = [sys.executable, "-c", CHILD, arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "halted\n"
        child.kill()
    assert child.returncode == -signal.SIGKILL


def state(target: Path) -> str:
    """Return ``absent``, ``old`` or ``new``; anything between fails."""
    if not os.path.lexists(target):
        return "absent"
    if target.is_file():
        return target.read_text()
    content = {path.name: path.read_text() for path in target.iterdir()}
    words = set(content.values())
    assert content.keys() == {"config.json", "model.safetensors"}
    assert len(words) == 1
    return words.pop()


def prepare(target: Path, *, folder: bool, word: str = "old", overwrite: bool = False) -> None:
    with staged_output(target, folder=folder, overwrite=overwrite) as temporary:
        for name in ("config.json", "model.safetensors"):
            (temporary / name if folder else temporary).write_text(word)


@posix
@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize(
    ("point", "expected"), [(None, "absent"), ("sync", "absent"), ("settle", "new")]
)
def test_killed_while_making(
    tmp_path: Path, folder: bool, point: str | None, expected: str
) -> None:
    target = tmp_path / "out"
    killed_at(point, target, folder=folder)
    assert state(target) == expected
    prepare(target, folder=folder, word="later", overwrite=True)
    assert state(target) == "later"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@posix
@pytest.mark.parametrize(
    ("folder", "portable", "point", "passes", "expected"),
    [
        (False, False, None, 0, "old"),
        (False, False, "sync", 0, "old"),
        (False, False, "settle", 0, "new"),
        (True, False, None, 0, "old"),
        (True, False, "sync", 0, "old"),
        (True, False, "settle", 0, "new"),
        (True, False, "remove", 0, "new"),
        (True, True, "rename", 0, "old"),
        (True, True, "rename", 1, "absent"),
        (True, True, "rename", 2, "new"),
        (True, True, "remove", 0, "new"),
    ],
)
def test_killed_while_overwriting(
    tmp_path: Path, folder: bool, portable: bool, point: str | None, passes: int, expected: str
) -> None:
    target = tmp_path / "out"
    prepare(target, folder=folder)
    killed_at(point, target, folder=folder, overwrite=True, passes=passes, portable=portable)
    assert state(target) == expected
    # The next run sees the old content again where it was set aside, and clears the rest away.
    with pytest.raises(OutputError, match="already exists"):
        prepare(target, folder=folder)
    assert state(target) == ("old" if expected == "absent" else expected)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def full(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT"])
def test_the_disk_fills_while_writing(
    tmp_path: Path, folder: bool, exists: bool, code: str
) -> None:
    def write() -> None:
        with staged_output(target, folder=folder, overwrite=exists) as temporary:
            (temporary / "part" if folder else temporary).write_text("half")
            raise OSError(getattr(errno, code), "out of room")

    target = tmp_path / "deep" / "out"
    if exists:
        prepare(target, folder=folder)
    with pytest.raises(OutputError, match="out of room") as refusal:
        write()
    assert "space" in (refusal.value.hint or "")
    assert state(target) == ("old" if exists else "absent")
    assert [path.name for path in tmp_path.rglob("*partial")] == []
    assert (tmp_path / "deep").exists() == exists


def test_other_errors_of_the_body_pass_unchanged(tmp_path: Path) -> None:
    def fail() -> None:
        with staged_output(tmp_path / "out", folder=True, overwrite=False):
            raise PermissionError(errno.EACCES, "an input, perhaps")

    with pytest.raises(PermissionError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_delayed_full_disk_shows_in_fsync(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tmp_path / "out", folder=True)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left") as refusal:
        prepare(tmp_path / "out", folder=True, word="new", overwrite=True)
    assert "space" in (refusal.value.hint or "")
    assert state(tmp_path / "out") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_no_room_for_the_first_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, made = Path.mkdir, []

    def once(path: Path, **options: Any) -> None:
        if made:
            full()
        made.append(path)
        make(path, **options)

    monkeypatch.setattr(Path, "mkdir", once)
    with pytest.raises(OutputError, match="No space left"):
        prepare(tmp_path / "new" / "out", folder=True)
    assert made == [tmp_path / "new"]
    assert list(tmp_path.iterdir()) == []


@posix
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_writers_report_a_full_device(tmp_path: Path) -> None:
    import torch

    from loratools.tensorfiles.safetensors import save_tensors

    with pytest.raises(OutputError, match="No space left"):
        save_tensors(Path("/dev/full"), {"a": torch.zeros(1 << 16)}, {})
    (tmp_path / "source").write_bytes(bytes(100))
    with (
        (tmp_path / "source").open("rb") as source,
        Path("/dev/full").open("wb") as target,
        pytest.raises(OSError, match="No space left"),
    ):
        copy_range(source.fileno(), 0, target.fileno(), 0, 100)


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_a_failing_rename_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, error: BaseException
) -> None:
    prepare(tmp_path / "out", folder=True)
    rename: Callable[..., Any] = Path.rename
    calls: list[Path] = []

    def sometimes(path: Path, target: Path) -> Any:
        calls.append(path)
        if len(calls) == failing + 1:
            raise error
        return rename(path, target)

    monkeypatch.setattr(swapping, "_libc_renameat2", lambda: None)
    monkeypatch.setattr(Path, "rename", sometimes)
    with pytest.raises(OutputError if isinstance(error, OSError) else KeyboardInterrupt):
        prepare(tmp_path / "out", folder=True, word="new", overwrite=True)
    assert state(tmp_path / "out") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_interrupted_after_the_exchange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(_: Path) -> None:
        raise KeyboardInterrupt

    prepare(tmp_path / "out", folder=True)
    monkeypatch.setattr(atomic, "sync_folder", interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "out", folder=True, word="new", overwrite=True)
    assert state(tmp_path / "out") == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
