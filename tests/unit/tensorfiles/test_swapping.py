"""Renames: the kernel's way and the portable way leave the same state."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import pytest

from loratools.tensorfiles import swapping
from loratools.tensorfiles.swapping import exchange, remove, rename_to_absent, swap


@pytest.fixture(params=["kernel", "portable"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "portable":
        monkeypatch.setattr(swapping, "_libc_renameat2", lambda: None)


def folder(path: Path, word: str) -> Path:
    path.mkdir()
    (path / "word").write_text(word)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is of Linux")
def test_linux_exchanges_in_one_step(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", "A"), folder(tmp_path / "b", "B")
    assert exchange(a, b)
    assert ((a / "word").read_text(), (b / "word").read_text()) == ("B", "A")


@pytest.mark.usefixtures("_way")
def test_swap(tmp_path: Path) -> None:
    a, b = folder(tmp_path / "a", "A"), folder(tmp_path / "b", "B")
    swap(a, b, tmp_path / "aside")
    assert ((a / "word").read_text(), (b / "word").read_text()) == ("B", "A")
    assert not (tmp_path / "aside").exists()


@pytest.mark.usefixtures("_way")
def test_a_failed_swap_changes_nothing(tmp_path: Path) -> None:
    b = folder(tmp_path / "b", "B")
    with pytest.raises(FileNotFoundError):
        swap(tmp_path / "absent", b, tmp_path / "aside")
    assert (b / "word").read_text() == "B"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


@pytest.mark.usefixtures("_way")
def test_rename_to_absent(tmp_path: Path) -> None:
    a = folder(tmp_path / "a", "A")
    (tmp_path / "taken").mkdir()
    with pytest.raises(FileExistsError):
        rename_to_absent(a, tmp_path / "taken")
    rename_to_absent(a, tmp_path / "free")
    assert (tmp_path / "free" / "word").read_text() == "A"


@pytest.mark.parametrize(("code", "able"), [("ENOSYS", False), ("EINVAL", False), ("EACCES", True)])
def test_inability_is_told_from_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, able: bool
) -> None:
    def answer(*_: Any) -> int:
        swapping.ctypes.set_errno(getattr(errno, code))
        return -1

    monkeypatch.setattr(swapping, "_libc_renameat2", lambda: answer)
    if able:
        with pytest.raises(PermissionError):
            exchange(tmp_path, tmp_path)
    else:
        assert not exchange(tmp_path, tmp_path)


def test_remove_spares_what_a_link_points_to(tmp_path: Path) -> None:
    kept = folder(tmp_path / "kept", "K")
    (tmp_path / "link").symlink_to(kept)
    doomed = folder(tmp_path / "doomed", "D")
    (doomed / "link").symlink_to(kept)
    for path in (tmp_path / "link", doomed, tmp_path / "absent"):
        remove(path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "word").read_text() == "K"
