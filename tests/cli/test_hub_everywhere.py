"""Every command that reads a path reads ``hf://`` there, and makes of it what it makes of files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import click
import pytest

from loratools._cli.verbs import make_verb
from loratools.cli import cli
from loratools.merge import merge_into_base
from tests.gguf_demo import write_demo_gguf
from tests.hub_server import HubServer
from tests.hub_store import sha256

from .conftest import Run, tree

LINES = {
    "merge": "base adapter:0.8 -o OUT",
    "merge, one file": "base/model.safetensors adapter -o OUT.safetensors",
    "merge, GGUF": "ggufs/f16.gguf adapter:0.5 -o OUT.gguf",
    "merge, several": "base adapter:0.8 second:-0.5 -o OUT --dtype bf16",
    "unmerge": "merged adapter:0.8 -o OUT --base base",
    "unmerge, subtracting": "merged adapter:0.8 -o OUT",
    "convert": "adapter -o OUT.gguf --to gguf --base base",
    "convert, kohya": "ink/ink.safetensors -o OUT.safetensors --to diffusers",
    "convert, several": "adapter second -o OUT --to peft --dtype fp16",
    "extract": "base merged -o OUT --rank 4",
    "rebase": "adapter --from base --onto merged --rank 4 -o OUT",
    "resize": "adapter --rank 2 -o OUT",
    "resize, by the base": "adapter --sv-ratio 2 --base base -o OUT",
    "compose": "adapter:0.7 second -o OUT --rank 4",
    "compose, with a base": "adapter:0.7 second -o OUT --base base",
    "quantize": "ggufs/f16.gguf -o OUT.gguf --to q8_0",
    "quantize, a folder": "merged --template ggufs/f16.gguf -o OUT.gguf --to f16",
    "dequantize": "ggufs/q8.gguf -o OUT.gguf",
    "dequantize, a folder": "ggufs/q8.gguf -o OUT --base-config base",
    "quantize, as an adapter saw it": "base --for-adapter adapter -o OUT",
    "dequantize, as an adapter saw it": "base --for-adapter adapter -o OUT",
    "diff": "adapter second --base base",
    "inspect": "base ggufs/q8.gguf",
    "inspect, with a base": "adapter --spectrum --base base",
    "inspect, values": "adapter second --spectrum --alignment",
    "push": "merged me/new --base-model me/base --relation merge --merged adapter:0.8 --dry-run",
    "push, with a card": "adapter me/new --base-model me/base --card ink/card.md --dry-run",
}
OWN = {"pull", "run", "formats", "methods", "demo", "completion"}
"""Commands whose paths are something else."""


@pytest.fixture(scope="module")
def models(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "here"
    shutil.copytree(originals, folder)
    (folder / "ink").mkdir()
    (folder / "ink.safetensors").rename(folder / "ink" / "ink.safetensors")
    (folder / "ink" / "card.md").write_text("---\nlicense: mit\n---\n# Ink\n")
    merge_into_base(folder / "base", [(folder / "adapter", 0.8)], folder / "merged")
    (folder / "ggufs").mkdir()
    for kind in ("F16", "Q8_0"):
        name = kind.lower().replace("_0", "")
        write_demo_gguf(folder / "base", folder / "ggufs" / f"{name}.gguf", kind)
    return folder


@pytest.fixture
def both(
    models: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> HubServer:
    """The same adapters and models here and on the Hub, under ``me/``."""
    shutil.copytree(models, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    for folder in sorted(models.iterdir()):
        hub.add(f"me/{folder.name}", tree(folder))
    return hub


def remote(line: str) -> str:
    names = ("base", "adapter", "second", "merged", "ink", "ggufs")
    words = [f"hf://me/{w}" if w.split(":")[0].split("/")[0] in names else w for w in line.split()]
    return " ".join(words)


def test_no_command_is_forgotten() -> None:
    context = click.Context(cli)
    for name in set(cli.list_commands(context)) - OWN:
        command = cli.get_command(context, name)
        assert command is not None
        lines = [line for key, line in LINES.items() if key.partition(",")[0] == name]
        inputs = [one for one in make_verb(command, None).parameters if one.role == "input"]  # type: ignore[arg-type]
        assert not inputs or lines, name
        for one in inputs:
            assert one.flag is None or any(f"{one.flag} " in line for line in lines), one


@pytest.mark.parametrize("case", LINES)
def test_the_same_bytes_as_from_files(both: HubServer, run: Run, case: str) -> None:
    line = f"{case.partition(',')[0]} {LINES[case]}"
    suffix = next((s for s in (".gguf", ".safetensors") if f"OUT{s}" in line), "")
    here = run(*line.replace("OUT", "here").split(), "--json")
    assert here.code in (0, 1), here.out
    done = run(*remote(line).replace("OUT", "there").split(), "--json")
    assert done.code == here.code, done.out
    assert "snapshots" not in done.out
    assert both.leaks == []
    if "-o " in line and not here.code:
        made = [Path(f"{name}{suffix}") for name in ("here", "there")]
        first, second = (contents(path) for path in made)
        assert first
        assert second == first
    else:
        assert facts(done.document) == facts(here.document)


def contents(path: Path) -> dict[str, bytes]:
    """Return the files of an output; the base's name in a config is that of the input."""
    if path.is_file():
        return {"": path.read_bytes()}
    found = tree(path)
    for name in [name for name in found if name.endswith("adapter_config.json")]:
        words = json.loads(found[name])
        words.pop("base_model_name_or_path", None)
        found[name] = json.dumps(words).encode()
    return found


def facts(document: dict[str, Any]) -> object:
    """Return what a command says, but for the names of its inputs."""
    said = {key: document.get(key) for key in ("facts", "items", "error", "message", "hint")}
    return json.loads(json.dumps(said).replace("hf://me/", ""))


PLANS = {
    case: line for case, line in LINES.items()
    if case.split(",")[0] in ("merge", "quantize", "dequantize")
    and "as an adapter" not in case
}  # fmt: skip


@pytest.mark.parametrize("case", PLANS)
def test_a_dry_run_fetches_no_weights_of_models(both: HubServer, run: Run, case: str) -> None:
    line = f"{case.partition(',')[0]} {PLANS[case]} --dry-run --json"
    here = run(*line.split())
    there = run(*remote(line).split())
    assert there.code == here.code == 0, there.out
    assert facts(there.document) == facts(here.document)
    notes = [note for note in there.document["notes"] if "only headers" in note["message"]]
    assert notes
    assert all(note["subject"].startswith("hf://me/") for note in notes)
    adapters = {sha256(data) for data in both.repos["me/adapter"].files().values()}
    adapters |= {sha256(data) for data in both.repos["me/second"].files().values()}
    models = [one for one in both.asked("GET", "/cdn/") if one.path.split("/")[-1] not in adapters]
    assert all(one.range for one in models)
    assert not list(Path().glob("OUT*"))
