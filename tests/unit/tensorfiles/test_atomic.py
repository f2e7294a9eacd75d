"""Staged outputs: what is refused, what is put in place, and what is left behind."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from loratools.errors import OutputError
from loratools.tensorfiles import atomic, swapping
from loratools.tensorfiles.atomic import require_space, staged_output
from loratools.tensorfiles.destination import check_destination


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def model(path: Path, word: str = "old") -> Path:
    path.mkdir(parents=True)
    (path / "config.json").write_text(word)
    return path


def make(target: Path, *, folder: bool, overwrite: bool = False, word: str = "new") -> None:
    with staged_output(target, folder=folder, overwrite=overwrite) as temporary:
        assert temporary.parent == target.parent
        assert temporary.is_dir() == folder
        (temporary / "config.json" if folder else temporary).write_text(word)


def word_in(target: Path) -> str:
    return (target / "config.json" if target.is_dir() else target).read_text()


@pytest.fixture(params=["one step", "three renames"])
def _way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "three renames":
        monkeypatch.setattr(swapping, "_libc_renameat2", lambda: None)


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("folder", [True, False])
def test_a_new_output(tmp_path: Path, folder: bool) -> None:
    make(tmp_path / "deep" / "er" / "out", folder=folder)
    assert word_in(tmp_path / "deep" / "er" / "out") == "new"
    assert names(tmp_path / "deep" / "er") == ["out"]


@pytest.mark.usefixtures("_way")
@pytest.mark.parametrize("folder", [True, False])
def test_overwriting(tmp_path: Path, folder: bool) -> None:
    target = tmp_path / "out"
    make(target, folder=folder, word="old")
    if folder:
        (target / "only in the old").touch()
    with pytest.raises(OutputError, match="already exists") as refusal:
        make(target, folder=folder)
    assert "--overwrite" in (refusal.value.hint or "")
    assert word_in(target) == "old"
    make(target, folder=folder, overwrite=True)
    assert word_in(target) == "new"
    assert names(tmp_path) == ["out"]
    assert not folder or names(target) == ["config.json"]


@pytest.mark.parametrize("folder", [True, False])
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing(tmp_path: Path, folder: bool, error: type[BaseException]) -> None:
    def fail() -> None:
        with staged_output(tmp_path / "a" / "b" / "out", folder=folder, overwrite=False) as path:
            (path / "x" if folder else path).write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_failure_on_entering_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    make_folder = Path.mkdir

    def interrupted(path: Path, **options: Any) -> None:
        make_folder(path, **options)
        if path.suffix == ".partial":
            raise error

    monkeypatch.setattr(Path, "mkdir", interrupted)
    with pytest.raises(OutputError if error is OSError else error):
        make(tmp_path / "new" / "out", folder=True)
    assert names(tmp_path) == []


def test_a_failure_spares_folders_in_use(tmp_path: Path) -> None:
    def fail() -> None:
        with staged_output(tmp_path / "a" / "b" / "out", folder=True, overwrite=False):
            (tmp_path / "a" / "other").touch()
            raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        fail()
    assert names(tmp_path / "a") == ["other"]


@pytest.mark.parametrize("folder", [True, False])
def test_what_appears_meanwhile_is_kept(tmp_path: Path, folder: bool) -> None:
    def race() -> None:
        with staged_output(tmp_path / "out", folder=folder, overwrite=False) as temporary:
            if not folder:
                temporary.touch()
            model(tmp_path / "out")

    with pytest.raises(OutputError, match="already exists"):
        race()
    assert names(tmp_path) == ["out"]
    assert word_in(tmp_path / "out") == "old"


def test_nothing_written(tmp_path: Path) -> None:
    with (
        pytest.raises(OutputError, match="nothing was written"),
        staged_output(tmp_path / "out", folder=False, overwrite=False),
    ):
        pass
    assert names(tmp_path) == []


def test_relative_paths_mean_the_folder_of_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with staged_output(Path("out"), folder=True, overwrite=False):
        monkeypatch.chdir("elsewhere")
    assert names(tmp_path) == ["elsewhere", "out"]


def test_everything_is_synced_before_the_rename(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[object] = []
    sync, rename = os.fsync, atomic.rename_to_absent

    def record_sync(descriptor: int) -> None:
        events.append(os.fstat(descriptor).st_ino)
        sync(descriptor)

    def record_rename(source: Path, target: Path) -> None:
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(atomic, "rename_to_absent", record_rename)
    with staged_output(tmp_path / "new" / "out", folder=True, overwrite=False) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").touch()
        (temporary / "link").symlink_to("nowhere")
        inside = {path.lstat().st_ino for path in (temporary / "sub", temporary / "sub" / "file")}
        inside.add(temporary.stat().st_ino)
    at = events.index("rename")
    assert set(events[:at]) == inside
    assert set(events[at + 1 :]) == {tmp_path.stat().st_ino, (tmp_path / "new").stat().st_ino}


@pytest.fixture
def place(tmp_path: Path) -> SimpleNamespace:
    base = model(tmp_path / "base")
    (base / "weights.safetensors").touch()
    (tmp_path / "linked").symlink_to(base)
    (tmp_path / "outer").mkdir()
    (tmp_path / "outer" / "link.safetensors").symlink_to(base / "weights.safetensors")
    return SimpleNamespace(root=tmp_path, base=base, file=base / "weights.safetensors")


@pytest.mark.parametrize("overwrite", [True, False])
@pytest.mark.parametrize(
    ("target", "given", "words"),
    [
        ("base", "base", "is the input"),
        ("base/weights.safetensors", "base/weights.safetensors", "is the input"),
        ("outer/link.safetensors", "base/weights.safetensors", "is the input"),
        ("base/weights.safetensors", "outer/link.safetensors", "is the input"),
        ("linked", "base", "is the input"),
        ("base", "linked", "is the input"),
        ("base", "base/weights.safetensors", "contains the input"),
        ("base", "outer/link.safetensors", "contains the input"),
        ("outer", "outer/link.safetensors", "contains the input"),
        ("outer/../base", "base/weights.safetensors", "contains the input"),
        ("base/merged", "base", "lies inside the input"),
        ("base/deep/merged", "base", "lies inside the input"),
        ("linked/merged", "base", "lies inside the input"),
        ("base/merged", "linked", "lies inside the input"),
        ("base/absent/out", "base/absent", "lies inside the input"),
    ],
)
def test_inputs_survive(
    place: SimpleNamespace, overwrite: bool, target: str, given: str, words: str
) -> None:
    inputs = [place.root / "unrelated", place.root / given]
    for folder in (True, False):
        stage = staged_output(
            place.root / target, folder=folder, overwrite=overwrite, inputs=inputs
        )
        with pytest.raises(OutputError, match=words), stage:
            pytest.fail("the body must not run")
    assert names(place.base) == ["config.json", "weights.safetensors"]


def test_outputs_beside_inputs_are_fine(place: SimpleNamespace) -> None:
    check_destination(
        place.root / "base-merged", folder=True, overwrite=False, inputs=[place.base, place.file]
    )
    make(place.root / "base2", folder=True)


Arrange = Callable[[Path], object]

IN_THE_WAY: dict[str, tuple[bool, Arrange, str]] = {
    "a folder of other things": (True, lambda p: model(p / "sub"), "holds no model files"),
    "a git repository": (True, lambda p: (model(p), (p / ".git").mkdir()), "git repository"),
    "a file for a folder": (True, Path.touch, "is not a folder"),
    "a folder for a file": (False, Path.mkdir, "is not a regular file"),
    "a pipe": (False, os.mkfifo, "is not a regular file"),
    "a link": (False, lambda p: p.symlink_to(p.with_name("x")), "symbolic link"),
    "a link to a folder": (True, lambda p: p.symlink_to(model(p.with_name("x"))), "symbolic link"),
}


@pytest.mark.parametrize("case", IN_THE_WAY)
def test_what_overwrite_does_not_cover(tmp_path: Path, case: str) -> None:
    folder, arrange, words = IN_THE_WAY[case]
    target = tmp_path / "out"
    arrange(target)
    before = names(tmp_path)
    with (
        pytest.raises(OutputError, match=words),
        staged_output(target, folder=folder, overwrite=True),
    ):
        pytest.fail("the body must not run")
    assert names(tmp_path) == before


@pytest.mark.parametrize("content", [[], ["x.safetensors", "notes"], ["x.gguf"], ["x.bin"]])
def test_what_overwrite_does_cover(tmp_path: Path, content: list[str]) -> None:
    (tmp_path / "out").mkdir()
    for name in content:
        (tmp_path / "out" / name).touch()
    make(tmp_path / "out", folder=True, overwrite=True)
    assert names(tmp_path / "out") == ["config.json"]


@pytest.mark.parametrize("role", ["home", "working"])
@pytest.mark.parametrize("below", [".", "deeper/still"])
def test_home_and_working_folder_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, below: str
) -> None:
    target = model(tmp_path / "out")
    (target / below).mkdir(parents=True, exist_ok=True)
    if role == "home":
        monkeypatch.setenv("HOME", str(target / below))
        monkeypatch.setenv("USERPROFILE", str(target / below))
    else:
        monkeypatch.chdir(target / below)
    with pytest.raises(OutputError, match="home or working folder"):
        check_destination(target, folder=True, overwrite=True)


@pytest.mark.parametrize("target", ["/", "/.", ".."])
@pytest.mark.parametrize("folder", [True, False])
def test_roots_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, folder: bool
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with (
        pytest.raises(OutputError),
        staged_output(Path(target), folder=folder, overwrite=True),
    ):
        pytest.fail("the body must not run")
    assert names(tmp_path) == ["here"]


def test_a_file_among_the_parents(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file is not a folder"):
        make(tmp_path / "file" / "deep" / "out", folder=True)


def dead_pid() -> int:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        child.wait()
    return child.pid


def leftover(target: Path, pid: int, kind: str = "partial", host: str | None = None) -> Path:
    host = host or socket.gethostname()
    return model(target.parent / f".{target.name}.{host}-{pid}-0123abcd.{kind}", "left")


def test_leftovers_of_the_dead_are_removed(tmp_path: Path) -> None:
    target = tmp_path / "out"
    gone = leftover(target, dead_pid())
    kept = [
        leftover(target, os.getpid()),
        leftover(target, dead_pid(), host="another"),
        leftover(tmp_path / "out2", dead_pid()),
        leftover(tmp_path / "x.out", dead_pid()),
    ]
    stage = staged_output(target, folder=True, overwrite=False)
    with stage:
        assert stage.removed == (gone,)
    assert names(tmp_path) == sorted([path.name for path in kept] + ["out"])


def test_what_was_set_aside_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "out"
    leftover(target, dead_pid(), "replaced")
    with pytest.raises(OutputError, match="already exists"):
        make(target, folder=True)
    assert word_in(target) == "left"
    leftover(target, dead_pid(), "replaced")
    make(target, folder=True, overwrite=True)
    assert word_in(target) == "new"
    assert names(tmp_path) == ["out"]


def test_leftovers_that_cannot_go_are_no_obstacle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = leftover(tmp_path / "out", dead_pid())

    def refuse(path: Path) -> None:
        raise PermissionError(13, "no", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    make(tmp_path / "out", folder=True)
    assert names(tmp_path) == [left.name, "out"]


@pytest.mark.parametrize("parent", ["here", "not/yet/here", "/", "."])
def test_require_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parent: str) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2_500_000))
    require_space(tmp_path / parent, 2_500_000)
    with pytest.raises(OutputError, match=r"3\.0 GB are needed and 2\.5 MB are free") as refusal:
        require_space(tmp_path / parent, 3 * 10**9)
    assert refusal.value.hint


def test_require_space_asks_the_disk(tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free
    require_space(tmp_path / "new", free // 2)
    with pytest.raises(OutputError, match="needed"):
        require_space(tmp_path / "new", free * 2)
