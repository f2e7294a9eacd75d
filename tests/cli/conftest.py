"""A small base and adapters in a working directory of their own, and a way to run a command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from loratools import cli
from loratools.demo import make_adapter, make_base
from tests.image_adapters import write_kohya_sdxl

WEIGHTS = "adapter_model.safetensors"
FACTOR = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@dataclass(frozen=True)
class Outcome:
    """What one command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on stdout; NaN and Infinity are not JSON."""

        def refuse(word: str) -> None:
            raise AssertionError(f"{word} is not JSON")

        document: dict[str, Any] = json.loads(self.out, parse_constant=refuse)
        return document


Run = Callable[..., Outcome]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process."""

    def run_command(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        return Outcome(code, *capsys.readouterr())

    return run_command


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    make_base(folder / "base")
    make_adapter(folder / "adapter")
    make_adapter(folder / "second", seed=2)
    write_kohya_sdxl(folder / "ink.safetensors")
    return folder


@pytest.fixture
def here(originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a working directory that holds ``base``, two adapters and ``ink``."""
    folder = tmp_path / "here"
    shutil.copytree(originals, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def damaged(here: Path) -> Callable[..., None]:
    """Rewrite a weights file after a change to its tensors."""
    from safetensors.torch import load_file, save_file

    def damage(
        change: Callable[[dict[str, Any]], object], file: str = f"adapter/{WEIGHTS}"
    ) -> None:
        tensors = load_file(here / file)
        change(tensors)
        save_file(tensors, here / file, metadata={"format": "pt"})

    return damage


def tree(folder: Path) -> dict[str, bytes]:
    """Return every file below ``folder``, hidden ones included, with its bytes."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
