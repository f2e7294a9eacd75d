"""Pushed, pulled and merged through the command line: byte for byte what is here."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from loratools.convert import convert_adapter
from tests.gguf_demo import write_demo_gguf
from tests.hub_server import HubServer

from .conftest import Run, tree

LLAMA, SDXL = "meta/llama", "stability/sdxl"
WEIGHTS = (".safetensors", ".gguf", ".bin")


@pytest.fixture(autouse=True)
def bases(hub: HubServer) -> HubServer:
    """The Hub with the cards of base models."""
    llama = b"---\nlicense: llama3.1\npipeline_tag: text-generation\n---\n"
    sdxl = b"---\nlicense: openrail++\npipeline_tag: text-to-image\n---\n"
    hub.add(LLAMA, {"README.md": llama})
    hub.add(SDXL, {"README.md": sdxl})
    hub.add("free/model", {"README.md": b"---\nlicense: mit\n---\n"})
    return hub


def written(hub: HubServer) -> list[str]:
    """Return the requests that would change anything."""
    harmless = ("/api/validate-yaml", "/paths-info/")
    return [
        f"{one.method} {one.path}"
        for one in hub.seen
        if one.method not in ("GET", "HEAD") and not any(part in one.path for part in harmless)
    ]


# ---------------------------------------------------------------------------- push and pull


def peft(here: Path) -> str:
    config = json.loads((here / "adapter" / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": LLAMA, "task_type": "CAUSAL_LM"}
    (here / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    return "adapter"


def kohya(here: Path) -> str:
    return "ink.safetensors"


def diffusers(here: Path) -> str:
    (here / "inks").mkdir()
    target = here / "inks" / "pytorch_lora_weights.safetensors"
    convert_adapter(here / "ink.safetensors", target, to="diffusers")
    return "inks"


def gguf_adapter(here: Path) -> str:
    convert_adapter(here / "adapter", here / "a.gguf", to="gguf", base=here / "base")
    return "a.gguf"


def gguf_model(here: Path) -> str:
    return write_demo_gguf(here / "base", here / "model-f16.gguf").name


def merged(here: Path) -> str:
    shard(here / "base")
    return "base"


def shard(folder: Path) -> None:
    """Split a model's weights in three files; layer 1 is alone in the second."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: 2 if "layers.1." in name else 1 if "layers.0." in name else 3
              for name in tensors}  # fmt: skip
    files = {name: f"model-0000{place}-of-00003.safetensors" for name, place in places.items()}
    for file in set(files.values()):
        part = {name: tensors[name] for name in tensors if files[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


MAKERS = [
    (peft, LLAMA, "adapter", "peft"),
    (kohya, SDXL, "adapter", "diffusers"),
    (diffusers, SDXL, "adapter", "diffusers"),
    (gguf_adapter, LLAMA, "adapter", "gguf"),
    (gguf_model, LLAMA, "quantized", "gguf"),
    (merged, LLAMA, "merge", "transformers"),
]


@pytest.mark.parametrize(("make", "base", "relation", "library"), MAKERS)
def test_what_is_pushed_comes_back_byte_for_byte(
    hub: HubServer, here: Path, run: Run,
    make: Callable[[Path], str], base: str, relation: str, library: str,
) -> None:  # fmt: skip
    path = Path(make(here))
    done = run("push", path, "me/mine", "--base-model", base, "--relation", relation, "--json")
    assert done.code == 0, done.out
    assert run("pull", "me/mine", "-o", "back").code == 0
    local = tree(path) if path.is_dir() else {path.name: path.read_bytes()}
    back = tree(here / "back")
    card = ModelCard.load("me/mine")
    assert back.pop("README.md").decode() == str(card)
    assert back == local
    count = len(hub.cards)
    card.validate()
    assert len(hub.cards) == count + 1, "the Hub itself was asked"
    assert (card.data.base_model, card.data.base_model_relation) == (base, relation)
    assert card.data.library_name == library
    assert card.data.license == {LLAMA: "llama3.1", SDXL: "openrail++"}[base]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((), "base model is not known"),
        (("--base-model", "meta/nothing"), "not on the Hub"),
        (("--base-model", LLAMA, "--license", "apache-2.0"), "conflicts with llama3.1"),
        (("--base-model", LLAMA, "--base-model", SDXL), "licences differ"),
        (("--base-model", "free/model", "--license", "my-own"), "refuses the card"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_uploaded(
    hub: HubServer, here: Path, run: Run, options: tuple[str, ...], words: str
) -> None:
    done = run("push", "ink.safetensors", "me/mine", *options)
    assert done.code == 1
    assert words in done.err
    assert written(hub) == []
    assert "me/mine" not in hub.repos
    assert run("push", "ink.safetensors", "me/mine", "--base-model", SDXL).code == 0
    assert any("/commit/" in one for one in written(hub))


# ---------------------------------------------------------------------------- merge


def fetched(hub: HubServer, repo: str) -> set[str]:
    """Return the names of the files of a repository whose content was asked for."""
    start = f"/{repo}/resolve/"
    asked = [one.path for one in hub.asked("GET", start) + hub.asked("HEAD", start)]
    return {path[len(start) :].partition("/")[2] for path in asked}


def narrow(folder: Path) -> None:
    """Leave of an adapter what changes layer 1."""
    file = folder / "adapter_model.safetensors"
    tensors = {name: one for name, one in load_file(file).items() if "layers.1." in name}
    assert tensors
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_merge_into_one_shard_of_several(hub: HubServer, here: Path, run: Run) -> None:
    shard(here / "base")
    narrow(here / "adapter")
    model = tree(here / "base")
    more = {
        "tokenizer.json": b"{}", "chat_template.jinja": b"x", "pytorch_model.bin": b"old" * 99,
        "onnx/model.onnx": b"o" * 99, "original/params.json": b"{}",
        "model.fp16.safetensors": b"f" * 99,
    }  # fmt: skip
    hub.add("me/base", {**model, **more})
    hub.add("me/adapter", {**tree(here / "adapter"), "optimizer.pt": b"s", "README.md": b"#"})
    for name, data in more.items():
        (here / "base" / name).parent.mkdir(exist_ok=True)
        (here / "base" / name).write_bytes(data)
    assert run("merge", "base", "adapter:0.8", "-o", "local").code == 0
    assert run("merge", "hf://me/base", "hf://me/adapter:0.8", "-o", "out").code == 0
    assert tree(here / "out") == tree(here / "local")
    plain = tree(here / "base")
    changed = {name for name, data in tree(here / "out").items() if data != plain[name]}
    assert changed - {"model.safetensors.index.json"} == {"model-00002-of-00003.safetensors"}
    side = {"tokenizer.json", "chat_template.jinja", "original/params.json"}
    assert fetched(hub, "me/base") == {*model, *side}
    assert fetched(hub, "me/adapter") == set(tree(here / "adapter"))


def test_a_merge_into_one_file_at_a_revision_and_a_path(
    hub: HubServer, here: Path, run: Run
) -> None:
    model = (here / "base" / "model.safetensors").read_bytes()
    repo = hub.add("me/all", {"nets/model.safetensors": b"not yet", "a/b.txt": b""})
    adapter = {f"loras/v2/{name}": data for name, data in tree(here / "adapter").items()}
    first = repo.commit("main", {"nets/model.safetensors": model, **adapter}, "whole")
    repo.commit("dev/next", {"nets/model.safetensors": b"broken"}, "later")
    repo.branches["main"] = repo.branches["dev/next"]
    repo.tags["v1"] = first
    assert run("merge", "base/model.safetensors", "adapter:0.8", "-o", "l.safetensors").code == 0
    expected = (here / "l.safetensors").read_bytes()
    for number, at in enumerate(("v1", first)):
        base, lora = f"hf://me/all@{at}/nets/model.safetensors", f"hf://me/all@{at}/loras/v2:0.8"
        done = run("merge", base, lora, "-o", f"{number}.safetensors")
        assert done.code == 0, done.err
        assert (here / f"{number}.safetensors").read_bytes() == expected
    file = "hf://me/all@v1/loras/v2/adapter_model.safetensors:0.8"
    assert run("merge", "hf://me/all@v1/nets", file, "-o", "folder").code == 0
    assert (here / "folder" / "model.safetensors").read_bytes() == expected
    broken = run("merge", "hf://me/all@dev%2Fnext/nets/model.safetensors", lora, "-o", "x")
    assert broken.code == 1
    assert "hf://me/all@dev%2Fnext/nets/model.safetensors" in broken.err


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_a_merge_into_a_gguf_model(hub: HubServer, here: Path, run: Run, kind: str) -> None:
    file = write_demo_gguf(here / "base", here / "model.gguf", kind)
    hub.add("me/ggufs", {"sub/model.gguf": file.read_bytes(), "sub/other.gguf": b"GGUF"})
    hub.add("me/adapter", tree(here / "adapter"))
    assert run("merge", "model.gguf", "adapter:0.8", "-o", "local.gguf").code == 0
    shutil.rmtree(here / "base")
    done = run("merge", "hf://me/ggufs/sub/model.gguf", "hf://me/adapter:0.8", "-o", "out.gguf")
    assert done.code == 0, done.err
    assert (here / "out.gguf").read_bytes() == (here / "local.gguf").read_bytes()
    assert fetched(hub, "me/ggufs") == {"sub/model.gguf"}


# ---------------------------------------------------------------------------- inspect


def test_inspecting_a_large_file_costs_its_header(hub: HubServer, here: Path, run: Run) -> None:
    weights = {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(1024, 1024) for i in range(9)}
    save_file(weights, here / "model.safetensors")
    data = (here / "model.safetensors").read_bytes()
    hub.add("me/big", {"model.safetensors": data, "config.json": b'{"model_type": "llama"}'})
    done = run("inspect", "hf://me/big", "--json")
    assert done.document["facts"]["parameters"] == 9 * 1024 * 1024
    assert hub.sent("/cdn/") == 256 * 1024
    assert len(data) > 100 * 256 * 1024
