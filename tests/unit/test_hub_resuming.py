"""Large files of runs that broke off: taken up where they broke, and never taken on trust."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from loratools.demo import make_adapter, make_base
from loratools.errors import CorruptFileError, HubError, OutputError
from loratools.hub import parts, resuming
from loratools.hub.fetching import fetch_files
from loratools.hub.listing import list_files
from loratools.hub.references import parse_reference
from loratools.merge import merge_into_base
from loratools.pull import pull_from_hub
from tests.hub_client import settings
from tests.hub_server import HubServer

PART = 10_000
DATA = bytes(torch.randint(256, (12 * PART + 345,), dtype=torch.uint8).tolist())
SHA256 = hashlib.sha256(DATA).hexdigest()
NAME = "model.safetensors"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(parts, "PART", PART)
    monkeypatch.setattr(resuming, "LARGE", 2 * PART)


@pytest.fixture
def big(hub: HubServer) -> HubServer:
    hub.add("me/big", {NAME: DATA, "config.json": b"{}"})
    return hub


def fetch(text: str = "hf://me/big") -> bytes:
    listing = list_files(parse_reference(text))
    return (fetch_files(listing, listing.below) / NAME).read_bytes()


def blobs() -> Path:
    return Path(constants.HF_HUB_CACHE) / "models--me--big" / "blobs"


def partial(data: bytes) -> Path:
    """Leave what a killed run would have left."""
    blobs().mkdir(parents=True)
    file = blobs() / f"{SHA256}.loratools.incomplete"
    file.write_bytes(data)
    return file


def test_a_large_file_comes_in_parts_and_lies_where_the_library_looks(big: HubServer) -> None:
    from huggingface_hub import hf_hub_download

    assert fetch() == DATA
    assert big.sent("/cdn/") == len(DATA)
    assert len(big.asked("GET", "/cdn/")) == 13
    assert {file.name for file in blobs().iterdir()} >= {SHA256}
    assert not list(blobs().glob("*incomplete*"))
    assert Path(hf_hub_download("me/big", NAME)).resolve() == (blobs() / SHA256).resolve()
    assert fetch() == DATA
    assert big.sent("/cdn/") == len(DATA)
    assert big.leaks == []


@pytest.mark.parametrize("have", [1, PART, 5 * PART + 77, len(DATA) - 1, len(DATA)])
def test_what_is_there_is_not_fetched_again(big: HubServer, have: int) -> None:
    partial(DATA[:have])
    assert fetch() == DATA
    assert big.sent("/cdn/") == len(DATA) - have


@pytest.mark.parametrize(
    "damaged",
    [
        DATA[:500] + b"?" + DATA[501 : 7 * PART],
        bytes(3 * PART),
        DATA[:-1] + b"?",
        DATA + b"longer than it may be",
    ],
    ids=["one byte", "a hole", "the last byte", "too long"],
)
def test_a_damaged_part_is_found_out_and_all_is_fetched(big: HubServer, damaged: bytes) -> None:
    file = partial(damaged)
    assert fetch() == DATA
    assert not file.exists()
    missing = max(0, len(DATA) - len(damaged))
    assert big.sent("/cdn/") == missing + len(DATA)


def test_bytes_that_are_not_those_of_the_hash_are_refused(
    big: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = big.blob
    monkeypatch.setattr(big, "blob", lambda oid: real(oid)[:-1] + b"!")
    with pytest.raises(CorruptFileError, match=r"hf://me/big/model\.safetensors") as caught:
        fetch()
    assert "try again" in str(caught.value.hint)
    with pytest.raises(CorruptFileError):
        pull_from_hub("me/big", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not [file for file in blobs().rglob("*") if file.is_file()]
    monkeypatch.setattr(big, "blob", real)
    assert fetch() == DATA


def test_a_connection_that_breaks_costs_the_rest_of_one_part(big: HubServer) -> None:
    big.drop("/cdn/", after=400, times=3, skip=2)
    assert fetch() == DATA
    assert big.sent("/cdn/") == len(DATA) + 3 * 400
    assert all(one.range for one in big.asked("GET", "/cdn/"))


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(big: HubServer, status: int) -> None:
    big.fail("GET", "/cdn/", status, times=4, Retry_After="0")
    assert fetch() == DATA
    assert len(big.asked("GET", "/cdn/")) == 13 + 4


def test_an_address_that_has_expired_is_asked_for_again(big: HubServer) -> None:
    big.fail("GET", "/cdn/", 403)
    before = len(big.asked("HEAD", "/resolve/"))
    assert fetch() == DATA
    assert len(big.asked("HEAD", f"/{NAME}")) - before >= 2


def test_a_run_that_fails_keeps_what_it_has(big: HubServer) -> None:
    big.drop("/cdn/", after=10, times=10**6, skip=8)
    with pytest.raises(HubError, match="no answer"):
        fetch()
    file = blobs() / f"{SHA256}.loratools.incomplete"
    have = file.stat().st_size
    assert have >= 2 * PART
    assert have % PART == 0
    big.faults.clear()
    before = big.sent("/cdn/")
    assert fetch() == DATA
    assert big.sent("/cdn/") - before == len(DATA) - have


def test_a_mirror_that_gives_no_parts_is_left_to_the_library(
    big: HubServer, tmp_path: Path
) -> None:
    big.ranges = False
    assert fetch() == DATA
    assert not list(blobs().glob("*.incomplete"))
    pull_from_hub("me/big@main", tmp_path / "out")
    assert (tmp_path / "out" / NAME).read_bytes() == DATA


def test_two_at_once_fetch_it_once(big: HubServer) -> None:
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda _: fetch(), range(2)))
    assert found == [DATA, DATA]
    assert big.sent("/cdn/") == len(DATA)


def test_without_links_the_file_itself_lies_in_the_snapshot(
    big: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    assert fetch() == DATA
    assert not (blobs() / SHA256).exists()
    assert fetch() == DATA
    assert big.sent("/cdn/") == len(DATA)


# ---------------------------------------------------------------------------- pull


def test_a_pull_goes_on_in_the_middle_of_a_file(big: HubServer, tmp_path: Path) -> None:
    big.repos["me/big"].commit(
        "main", {NAME: DATA, "copy.safetensors": DATA, "config.json": b"{}", "x.bin": b"x"}
    )
    big.drop("/cdn/", after=10, times=10**6, skip=8)
    with pytest.raises(HubError):
        pull_from_hub("me/big", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    big.faults.clear()
    (left,) = tmp_path.rglob("*.incomplete")
    missing = len(DATA) - left.stat().st_size
    assert missing < len(DATA)
    before = big.sent("/cdn/")
    pull_from_hub("me/big", tmp_path / "out")
    found = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert found == {NAME: DATA, "copy.safetensors": DATA, "config.json": b"{}", "x.bin": b"x"}
    assert big.sent("/cdn/") - before == missing + 1
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_a_pull_takes_what_the_cache_has_and_leaves_it_there(
    big: HubServer, tmp_path: Path
) -> None:
    listing = list_files(parse_reference("hf://me/big"))
    fetch_files(listing, [NAME])
    before = big.sent("/cdn/")
    pull_from_hub("me/big", tmp_path / "out")
    assert (tmp_path / "out" / NAME).read_bytes() == DATA
    assert big.sent("/cdn/") == before
    assert (blobs() / SHA256).read_bytes() == DATA


def test_two_pulls_to_one_place(big: HubServer, tmp_path: Path) -> None:
    from filelock import FileLock

    (tmp_path / ".out.loratools-pull").mkdir()
    with FileLock(tmp_path / ".out.loratools-pull" / ".lock"):
        with pytest.raises(OutputError, match="another pull") as caught:
            pull_from_hub("me/big", tmp_path / "out")
        assert "another OUT" in str(caught.value.hint)
    pull_from_hub("me/big", tmp_path / "out")
    assert (tmp_path / "out" / NAME).read_bytes() == DATA


# ---------------------------------------------------------------------------- a killed process


def killed(server: HubServer, folder: Path, *words: object) -> None:
    """Start a command line, and kill it when the server has answered seven requests for parts."""
    hold = server.hold("/cdn/", after=10, skip=7)
    command = [sys.executable, "-m", "loratools", *map(str, words)]
    with subprocess.Popen(command, env=settings(server, folder), cwd=folder) as process:
        assert hold.reached.wait(60)
        process.send_signal(signal.SIGKILL)
    server.faults.clear()
    hold.over.set()


@pytest.fixture(scope="module")
def large_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a base of a size that is large by the numbers that hold outside of tests."""
    folder = tmp_path_factory.mktemp("large") / "base"
    make_base(folder)
    tensors = load_file(folder / NAME)
    tensors["model.table"] = torch.randn(18_000, 1024)
    save_file(tensors, folder / NAME, metadata={"format": "pt"})
    return folder


def test_a_killed_merge_goes_on_in_the_middle_of_a_file(
    large_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.hub_client import loratools

    make_adapter(tmp_path / "adapter")
    merge_into_base(large_base, [(tmp_path / "adapter", 0.8)], tmp_path / "local")
    data = (large_base / NAME).read_bytes()
    with HubServer() as server:
        server.add("me/big", {file.name: file.read_bytes() for file in large_base.iterdir()})
        words = ("merge", "hf://me/big", "adapter:0.8", "-o", tmp_path / "out")
        killed(server, tmp_path, *words)
        assert not (tmp_path / "out").exists()
        (left,) = tmp_path.rglob("*.loratools.incomplete")
        missing = len(data) - left.stat().st_size
        assert 0 < missing < len(data)
        before = server.sent("/cdn/")
        own = {**settings(server, tmp_path), "PWD": str(tmp_path)}
        monkeypatch.chdir(tmp_path)
        done = loratools(*words, **own)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        assert server.sent("/cdn/") - before == missing
    for file in (tmp_path / "local").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_a_killed_pull_goes_on_in_the_middle_of_a_file(large_base: Path, tmp_path: Path) -> None:
    from tests.hub_client import loratools

    data = (large_base / NAME).read_bytes()
    with HubServer() as server:
        server.add("me/big", {NAME: data})
        words = ("pull", "me/big", "-o", tmp_path / "out")
        killed(server, tmp_path, *words)
        assert not (tmp_path / "out").exists()
        (left,) = tmp_path.rglob("*.loratools.incomplete")
        missing = len(data) - left.stat().st_size
        before = server.sent("/cdn/")
        done = loratools(*words, **settings(server, tmp_path))
        assert done.returncode == 0, done.stderr
        assert server.sent("/cdn/") - before == missing
    assert (tmp_path / "out" / NAME).read_bytes() == data
    assert not list(tmp_path.rglob("*incomplete*"))
