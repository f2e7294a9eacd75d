"""The settings of the Hub's library, in processes of their own; progress on terminals alone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hub_client import loratools, settings
from tests.hub_server import HubServer

from .conftest import tree


@pytest.fixture
def server(originals: Path) -> Iterator[HubServer]:
    with HubServer() as found:
        found.add("me/adapter", tree(originals / "adapter"))
        found.add("me/hidden", tree(originals / "second"), private=True)
        yield found


def test_the_cache_is_where_it_is_told_and_offline_it_is_enough(
    server: HubServer, originals: Path, tmp_path: Path
) -> None:
    own = {**settings(server, tmp_path), "HF_HUB_CACHE": str(tmp_path / "elsewhere")}
    words = ("merge", originals / "base", "hf://me/adapter", "-q", "-o")
    done = loratools(*words, tmp_path / "first", **own)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "elsewhere" / "models--me--adapter" / "snapshots").is_dir()
    assert not (tmp_path / "home" / "hub").exists()
    before = len(server.seen)
    offline = {**own, "HF_HUB_OFFLINE": "1"}
    done = loratools(*words, tmp_path / "second", **offline)
    assert (done.returncode, done.stderr) == (0, "")
    assert tree(tmp_path / "second") == tree(tmp_path / "first")
    found = loratools("inspect", "hf://me/hidden", **offline)
    assert found.returncode == 1
    assert "hf://me/hidden: not in the cache" in found.stderr
    assert "HF_HUB_OFFLINE" in found.stderr
    assert len(server.seen) == before


@pytest.mark.parametrize(
    ("token", "code", "words"),
    [("hf_writer", 0, ""), (None, 1, "HF_TOKEN"), ("hf_reader", 1, "has no access")],
)
def test_the_token_is_that_of_the_environment(
    server: HubServer, tmp_path: Path, token: str | None, code: int, words: str
) -> None:
    done = loratools(
        "pull", "me/hidden", "-o", tmp_path / "out", **settings(server, tmp_path, token)
    )
    assert done.returncode == code
    assert words in done.stderr
    assert "hf_" not in done.stderr
    assert (tmp_path / "out").exists() == (code == 0)
    assert {one.token for one in server.seen if "/cdn/" not in one.path} == {token}
    assert server.leaks == []


def on_a_terminal(words: list[str], environment: dict[str, str]) -> tuple[str, str]:
    """Return what a command writes to stdout, and to stderr where that is a terminal."""
    import fcntl
    import pty
    import struct
    import termios

    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, "-m", "loratools", *words]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=inner
    ) as process:
        os.close(inner)
        seen = b""
        while True:
            try:
                piece = os.read(outer, 4096)
            except OSError:
                break
            if not piece:
                break
            seen += piece
        os.close(outer)
        assert process.stdout is not None
        out = process.stdout.read().decode()
    assert process.returncode == 0, seen
    return out, seen.decode()


@pytest.mark.skipif(os.name == "nt", reason="no pseudo-terminals")
def test_progress_is_shown_on_a_terminal_unless_it_is_unwanted(
    server: HubServer, tmp_path: Path
) -> None:
    # One file that the library fetches, one that comes in parts.
    server.add("me/files", {"a.safetensors": b"x" * 99_999, "big.bin": bytes(40 * 2**20)})
    own = {**settings(server, tmp_path), "TERM": "xterm"}
    _, seen = on_a_terminal(["pull", "me/files", "-o", str(tmp_path / "out")], own)
    assert "big.bin" in seen
    assert "100%" in seen
    assert "files" in seen.lower()
    for number, word in enumerate(("-q", "--json")):
        out, seen = on_a_terminal(
            ["pull", "me/files", "-o", str(tmp_path / f"{number}"), word], own
        )
        assert seen == ""
        assert bool(out) == (word == "--json")
    done = loratools("pull", "me/files", "-o", tmp_path / "piped", **own)
    assert done.returncode == 0
    assert done.stderr == ""
