"""The Hub from the command line, in processes of their own that HF_ENDPOINT points at a server."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loratools.demo import make_adapter, make_base
from loratools.merge import merge_into_base
from tests.cli.conftest import Run
from tests.hub_client import loratools, settings
from tests.hub_server import HubServer


@pytest.fixture
def server() -> Iterator[HubServer]:
    with HubServer() as found:
        yield found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_push_pull_and_merge_through_the_environment(server: HubServer, tmp_path: Path) -> None:
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter")
    server.add("me/base", contents(tmp_path / "base"))
    own = settings(server, tmp_path)
    pushed = loratools(
        "push", tmp_path / "adapter", "me/adapter", "--base-model", "me/base", "--license", "mit",
        "--json", **own,
    )  # fmt: skip
    assert pushed.returncode == 0, pushed.stderr
    assert json.loads(pushed.stdout)["facts"]["base_model"] == ["me/base"]
    assert pushed.stderr == ""
    pulled = loratools("pull", "me/adapter", "-o", tmp_path / "back", **own)
    assert pulled.returncode == 0, pulled.stderr
    weights = "adapter_model.safetensors"
    assert contents(tmp_path / "back")[weights] == contents(tmp_path / "adapter")[weights]
    merged = loratools(
        "merge", "hf://me/base", "hf://me/adapter:0.8", "-o", tmp_path / "out", **own
    )
    assert merged.returncode == 0, merged.stderr
    assert merged.stderr == ""
    merge_into_base(tmp_path / "base", [(tmp_path / "adapter", 0.8)], tmp_path / "local")
    assert contents(tmp_path / "out") == contents(tmp_path / "local")
    assert (tmp_path / "home" / "hub" / "models--me--base").is_dir()
    assert server.leaks == []


def test_no_token(server: HubServer, tmp_path: Path) -> None:
    make_adapter(tmp_path / "adapter")
    server.add("me/base", {})
    own = settings(server, tmp_path, token=None)
    found = loratools("push", tmp_path / "adapter", "me/x", "--base-model", "me/base", **own)
    assert (found.returncode, found.stdout) == (1, "")
    assert "nobody is logged in" in found.stderr
    assert "hf auth login" in found.stderr
    assert "Traceback" not in found.stderr


def test_help_does_not_import_the_client() -> None:
    code = (
        "import sys; from loratools.cli import run\n"
        "for name in ('push', 'pull', 'merge', 'inspect'): run([name, '--help'])\n"
        "print(sorted({'huggingface_hub', 'torch'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stderr.strip() == "[]"


def test_a_reference_carries_a_strength_after_its_last_colon(
    hub: HubServer, run: Run, here: Path
) -> None:
    # A folder called hf is no part of a reference.
    (here / "hf").mkdir()
    hub.add("me/adapter", contents(here / "adapter"))
    strengths = {"hf://me/adapter:0.5": 0.5, "hf://me/adapter": 1, "hf://me/adapter@main:-2": -2}
    for text, strength in strengths.items():
        done = run("merge", "base", text, "-o", "out", "--dry-run", "--json")
        assert done.code == 0, done.out
        assert done.document["facts"]["adapters"][0]["strength"] == strength
    assert run("merge", "base", "hf://me/adapter:0", "-o", "out").code == 2


def test_an_extracted_adapter_names_the_base_on_the_hub(
    hub: HubServer, run: Run, here: Path
) -> None:
    """That commands take references wherever they take paths is in ``test_hub_everywhere``."""
    assert run("merge", "base", "adapter", "-o", "merged").code == 0
    hub.add("me/base", contents(here / "base"))
    hub.add("me/merged", contents(here / "merged"))
    line = ("extract", "hf://me/base", "hf://me/merged", "--rank", "4", "-o", "extracted")
    assert run(*line).code == 0
    config = json.loads((here / "extracted" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "me/base"


def test_a_file_that_cannot_be_fetched_is_one_of_several(
    hub: HubServer, run: Run, here: Path
) -> None:
    done = run("inspect", "adapter", "hf://me/nothing", "--json")
    assert done.code == 1
    first, second = done.document["facts"]["reports"]
    assert first["facts"]["what"] == "adapter"
    assert second["facts"]["error"] == "HubError"
    assert "no such repository" in second["facts"]["message"]
