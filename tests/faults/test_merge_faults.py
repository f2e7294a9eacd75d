"""A merge that is killed, runs out of disk or loses its inputs: the output is all or nothing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from loratools import cli, merge_into_base
from loratools.demo import make_adapter, make_base
from loratools.errors import CorruptFileError, LoratoolsError, OutputError
from loratools.streaming import checkpoint, rewriting
from loratools.tensorfiles.sharded import encode_index

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and limits")

# Each point is where the child halts for good: a function that never returns, and how many calls
# of it go by before. The child says so and waits to be killed.
CHILD = """
import json, os, sys, time
from loratools import cli
from loratools.streaming import checkpoint, rewriting
from loratools.tensorfiles import atomic, swapping

point, passes, arguments = json.loads(sys.argv[1])

def halting(call, passes):
    def wrapped(*args, **kwargs):
        nonlocal passes
        if passes == 0:
            os.write(1, b"halted\\n")  # at once: several threads may come here
            time.sleep(60)
        passes -= 1
        return call(*args, **kwargs)
    return wrapped

owner, name = {
    "first block": (rewriting, "write_at"),
    "copy": (rewriting, "copy_range"),
    "side files": (checkpoint.shutil, "copy"),
    "sync": (atomic, "sync_tree"),
    "new name": (atomic, "rename_to_absent"),
    "swap": (atomic, "swap"),
    "last sync": (atomic, "sync_folder"),
}[point]
setattr(owner, name, halting(getattr(owner, name), passes))
sys.exit(cli.run(arguments))
"""


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base in two shards, an adapter, and their merge."""
    folder = tmp_path_factory.mktemp("originals")
    make_base(folder / "base")
    make_adapter(folder / "adapter")
    tensors = load_file(folder / "base/model.safetensors")
    (folder / "base/model.safetensors").unlink()
    (folder / "base/tokenizer.json").write_text("{}")
    names = sorted(tensors)
    shards = {
        f"model-0000{number}-of-00002.safetensors": part
        for number, part in ((1, names[:15]), (2, names[15:]))
    }
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / "base" / file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    places = {name: file for file, part in shards.items() for name in part}
    text = encode_index(places, size, {})
    (folder / "base/model.safetensors.index.json").write_text(text)
    merge_into_base(folder / "base", folder / "adapter", folder / "complete")
    return folder


@pytest.fixture
def here(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("base", "adapter"):
        shutil.copytree(originals / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def hidden(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]


def killed_at(point: str, passes: int, *arguments: str) -> None:
    """Run the command line and kill it where it halts."""
    command = [sys.executable, "-c", CHILD, json.dumps([point, passes, arguments])]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as child:
        assert child.stdout is not None
        said = child.stdout.readline()
        child.kill()
    assert said == "halted\n"
    assert child.returncode == -signal.SIGKILL


# ---------------------------------------------------------------------------- killed


@posix
@pytest.mark.parametrize(
    ("point", "passes"),
    [("first block", 0), ("copy", 4), ("side files", 1), ("sync", 0), ("new name", 0)],
)
def test_killed_before_the_end(here: Path, originals: Path, point: str, passes: int) -> None:
    killed_at(point, passes, "merge", "base", "adapter", "-o", "out")
    assert not (here / "out").exists()
    assert len(hidden(here)) == 1
    merge_into_base("base", "adapter", "out")
    assert tree(here / "out") == tree(originals / "complete")
    assert hidden(here) == []


@posix
def test_killed_after_the_end(here: Path, originals: Path) -> None:
    killed_at("last sync", 0, "merge", "base", "adapter", "-o", "out")
    assert tree(here / "out") == tree(originals / "complete")


@posix
@pytest.mark.parametrize(
    ("point", "old"), [("first block", True), ("swap", True), ("last sync", False)]
)
def test_killed_while_overwriting(here: Path, originals: Path, point: str, old: bool) -> None:
    merge_into_base("base", ("adapter", 0.5), "out")
    before = tree(here / "out")
    killed_at(point, 0, "merge", "base", "adapter", "-o", "out", "--overwrite")
    assert tree(here / "out") == (before if old else tree(originals / "complete"))
    merge_into_base("base", "adapter", "out", overwrite=True)
    assert tree(here / "out") == tree(originals / "complete")
    assert hidden(here) == []


@pytest.mark.parametrize("place", ["write_at", "copy_range"])
def test_interrupted(here: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(rewriting, place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge_into_base("base", "adapter", "out")
    assert sorted(path.name for path in here.iterdir()) == ["adapter", "base"]


# ---------------------------------------------------------------------------- disks


@posix
def test_a_limit_on_file_sizes(here: Path) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    command = [sys.executable, "-m", "loratools", "merge", "base", "adapter", "-o", "out", "--json"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    child = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        preexec_fn=limit,
    )
    assert (child.returncode, child.stderr) == (1, "")
    failure = json.loads(child.stdout)
    assert failure["error"] == "OutputError"
    assert "File too large" in failure["message"]
    assert "space" in failure["hint"]
    assert sorted(path.name for path in here.iterdir()) == ["adapter", "base"]


@pytest.mark.parametrize("place", ["write_at", "copy_range"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_disk_fills(
    here: Path, monkeypatch: pytest.MonkeyPatch, place: str, overwrite: bool
) -> None:
    if overwrite:
        merge_into_base("base", ("adapter", 0.5), "out")
    before = tree(here)
    write: Callable[..., Any] = getattr(rewriting, place)
    calls: list[int] = []

    def fill(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*arguments)

    monkeypatch.setattr(rewriting, place, fill)
    with pytest.raises(OutputError, match="No space left") as refusal:
        merge_into_base("base", "adapter", "out", overwrite=overwrite)
    assert "space" in (refusal.value.hint or "")
    assert tree(here) == before


def test_too_little_space_is_seen_before_writing(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def usage(_: Any) -> Any:
        return type("usage", (), {"free": 1000})

    def fail(*_: Any) -> None:
        raise AssertionError("written")

    monkeypatch.setattr(shutil, "disk_usage", usage)
    monkeypatch.setattr(checkpoint, "rewrite", fail)
    with pytest.raises(OutputError, match=r"698\.\d kB are needed and 1\.0 kB are free"):
        merge_into_base("base", "adapter", "out")
    assert sorted(path.name for path in here.iterdir()) == ["adapter", "base"]


def test_a_dry_run_sees_that_there_is_too_little_space(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("usage", (), {"free": 1000}))
    with pytest.raises(OutputError):
        merge_into_base("base", "adapter", "out", dry_run=True)


# ---------------------------------------------------------------------------- inputs

SHARD = "base/model-00002-of-00002.safetensors"


@pytest.mark.parametrize("left", [0, 7, 8, 500, 10_000, -1])
def test_a_shard_cut_short(here: Path, left: int) -> None:
    size = (here / SHARD).stat().st_size
    os.truncate(here / SHARD, left if left >= 0 else size - 1)
    with pytest.raises(CorruptFileError, match="model-00002-of-00002"):
        merge_into_base("base", "adapter", "out")
    assert sorted(path.name for path in here.iterdir()) == ["adapter", "base"]


def test_a_shard_that_shrinks_meanwhile(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan has been made from the whole file when it loses its end."""

    def shrink(*_: Any) -> None:
        os.truncate(here / SHARD, 10_000)

    monkeypatch.setattr(checkpoint, "require_space", shrink)
    with pytest.raises(CorruptFileError, match="model-00002-of-00002"):
        merge_into_base("base", "adapter", "out")
    assert sorted(path.name for path in here.iterdir()) == ["adapter", "base"]


def test_a_shard_of_other_tensors(here: Path) -> None:
    shutil.copy(here / SHARD.replace("00002-of", "00001-of"), here / SHARD)
    with pytest.raises(CorruptFileError):
        merge_into_base("base", "adapter", "out")


WEIGHTS = (SHARD, "adapter/adapter_model.safetensors")
SIDE_FILES = ("base/config.json", "base/tokenizer.json", "adapter/adapter_config.json")


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """Run a merge that must fail for a stated reason, and return what it says."""
    assert cli.run(["merge", "base", "adapter", "-o", "out"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: ")
    assert not Path("out").exists()
    return said


@posix
@pytest.mark.parametrize("name", [*WEIGHTS, *SIDE_FILES])
def test_a_file_without_permission(
    here: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (here / name).chmod(0)
    if os.access(name, os.R_OK):
        pytest.skip("this user may read everything")
    assert Path(name).name in refused(capsys)


@posix
@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file that cannot be read")
@pytest.mark.parametrize("name", [*WEIGHTS, *SIDE_FILES])
def test_a_disk_that_fails(here: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (here / name).unlink()
    (here / name).symlink_to("/proc/self/mem")  # its start is mapped nowhere: EIO
    assert "Input/output error" in refused(capsys)


def test_a_side_file_that_cannot_be_copied(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", "base/tokenizer.json")

    monkeypatch.setattr(checkpoint.shutil, "copy", refuse)
    with pytest.raises((LoratoolsError, PermissionError)):
        merge_into_base("base", "adapter", "out")
    assert sorted(path.name for path in here.iterdir()) == ["adapter", "base"]


def test_the_same_bytes_every_time(here: Path, originals: Path) -> None:
    """What the other tests compare with is what any run gives, whatever the threads do."""
    for number in range(3):
        merge_into_base("base", "adapter", f"out{number}")
        assert tree(here / f"out{number}") == tree(originals / "complete")
