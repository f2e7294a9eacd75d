"""Metadata of written files: hashes of the bytes that are written, and words that stay true."""

from __future__ import annotations

import datetime
import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from loratools.adapter import Adapter
from loratools.adapter_io import load_adapter, save_adapter
from loratools.deltas import LoHa, LoRA
from loratools.formats import get_format
from loratools.formats.kohya_metadata import (
    legacy_hash,
    model_hash,
    model_words,
    network_arguments,
    training_words,
    with_comment,
    with_hashes,
)
from tests.strategies import make_tensor

GOLDEN = Path(__file__).parents[1] / "golden"
MODULE = "lora_unet_x"


def data_region(raw: bytes) -> bytes:
    return raw[8 + int.from_bytes(raw[:8], "little") :]


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def sd_scripts_hashes(tensors: dict[str, Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    """Return both hashes as sd-scripts defines them, from the safetensors library's own bytes."""
    raw = safetensors.torch.save(
        tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")}
    )
    legacy = hashlib.sha256(raw[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    return hashlib.sha256(data_region(raw)).hexdigest(), legacy


def mixed(size: int) -> dict[str, Tensor]:
    """Return tensors of several dtypes, which the library does not write in the order of names."""
    return {
        "a": make_tensor(1, size, dtype=torch.float16),
        "b": make_tensor(2, size),
        "c": torch.tensor(3),
        "d": make_tensor(3, 3, size // 3).T,
        "e": torch.tensor(True),
        "f": torch.empty(0, 4),
        "g": make_tensor(4, size, dtype=torch.bfloat16),
    }


@pytest.mark.parametrize("size", [30, 120_000, 150_000, 300_000])
def test_hashes_are_sd_scripts(size: int) -> None:
    """Sizes below, across and beyond the window of the legacy hash, which starts at a mebibyte."""
    tensors, metadata = mixed(size), {"ss_v2": "True", "ss_x": "é" * 50, "author": "me"}
    dense = {name: tensor.contiguous() for name, tensor in tensors.items()}
    wanted = sd_scripts_hashes(dense, metadata)
    assert (model_hash(tensors), legacy_hash(tensors, metadata)) == wanted
    assert (wanted[1] == "e3b0c442") == (size == 30)


def test_the_written_file_has_its_own_hashes(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    save_adapter(load_adapter(GOLDEN / "kohya/sd15.safetensors"), path, format="kohya")
    words = metadata_of(path)
    digest = hashlib.sha256(data_region(path.read_bytes())).hexdigest()
    assert words["sshs_model_hash"] == digest
    assert words["modelspec.hash_sha256"] == f"0x{digest}"
    assert words["sshs_legacy_hash"] == "e3b0c442"
    assert words["ss_output_name"] == "golden"
    assert words["ss_base_model_version"] == "sd_v1"


@pytest.mark.parametrize("name", ["kohya", "comfyui", "diffusers"])
def test_stale_hashes_do_not_survive(name: str, tmp_path: Path) -> None:
    """A file that keeps the hash of another one is taken for that one."""
    path = {"kohya": MODULE, "comfyui": "diffusion_model.x", "diffusers": "transformer.x"}[name]
    naming = {"comfyui": "original"}.get(name, name)
    stale = {
        "sshs_model_hash": "0" * 64,
        "sshs_legacy_hash": "0" * 8,
        "modelspec.hash_sha256": "0x00",
    }
    lora = LoRA(make_tensor(1, 2, 4), make_tensor(2, 6, 2), 1.0)
    adapter = Adapter({path: lora}, naming=naming, metadata={**stale, "name": "mine"})
    assert not set(stale.values()) & set(get_format(name).write(adapter).metadata.values())
    save_adapter(adapter, tmp_path / "x.safetensors", format=name)
    words = metadata_of(tmp_path / "x.safetensors")
    assert words["name"] == "mine"
    assert not set(stale.values()) & set(words.values())
    assert ("sshs_model_hash" in words) == (name == "kohya")


def test_files_without_words_get_no_hash() -> None:
    assert with_hashes({"format": "pt"}, mixed(30)) == {"format": "pt"}


@pytest.mark.parametrize(
    ("rank", "alpha", "said", "wanted"),
    [
        (4, 2.0, {}, ("4", "2")),
        (4, 2.5, {"ss_network_dim": "4", "ss_network_alpha": "2.5"}, ("4", "2.5")),
        # Resized since: what the words say is no longer true of any module.
        (4, 2.0, {"ss_network_dim": "64", "ss_network_alpha": "32"}, ("4", "2")),
        (4, 2.0, {"ss_network_dim": "Dynamic", "ss_network_alpha": "None"}, ("4", "2")),
    ],
)
def test_training_words(
    rank: int, alpha: float, said: dict[str, str], wanted: tuple[str, str]
) -> None:
    lora = LoRA(make_tensor(1, rank, 4), make_tensor(2, 6, rank), alpha)
    words = training_words(Adapter({"a": lora, "b": lora}, naming="kohya", metadata=said))
    assert (words["ss_network_dim"], words["ss_network_alpha"]) == wanted
    assert words["ss_network_module"] == "networks.lora"


def test_training_words_of_mixed_files() -> None:
    one, two = (LoRA(make_tensor(1, r, 4), make_tensor(2, 6, r), float(r)) for r in (1, 2))
    assert training_words(Adapter({"a": one, "b": two}))["ss_network_dim"] == "Dynamic"
    said = {"ss_network_dim": "2", "ss_network_module": "networks.lora_flux"}
    kept = training_words(Adapter({"a": one, "b": two}, metadata=said))
    assert (kept["ss_network_dim"], kept["ss_network_module"]) == ("2", "networks.lora_flux")
    loha = LoHa(*(make_tensor(i, *s) for i, s in enumerate(((6, 2), (2, 4), (6, 2), (2, 4)))), 2.0)
    assert training_words(Adapter({"a": loha}))["ss_network_module"] == "lycoris.kohya"
    assert (
        training_words(Adapter({"a": one}, arch="flux1"))["ss_network_module"]
        == "networks.lora_flux"
    )


def test_comment() -> None:
    assert with_comment({}, "resized")["ss_training_comment"] == "resized"
    assert (
        with_comment({"ss_training_comment": "None"}, "resized")["ss_training_comment"] == "resized"
    )
    known = with_comment({"ss_training_comment": "my cat"}, "resized")
    assert known["ss_training_comment"] == "resized; my cat"


def forge_version(words: dict[str, str]) -> str:
    """Return what Forge takes a LoRA for: its rules, in its order."""
    spec = "modelspec.implementation", "modelspec.architecture"
    implementation, architecture = (words.get(key, "") for key in spec)
    if implementation == "https://github.com/black-forest-labs/flux":
        return "flux"
    if architecture == "flux-1-dev/lora":
        return "flux"
    if architecture == "stable-diffusion-xl-v1-base/lora":
        return "sdxl"
    if words.get("ss_base_model_version", "").startswith("sdxl_"):
        return "sdxl"
    if words.get("ss_v2") == "True":
        return "sd2"
    return "sd1" if architecture == "stable-diffusion-v1/lora" else "unknown"


@pytest.mark.parametrize(
    ("architecture", "version", "wanted"),
    [
        ("stable-diffusion-v1", "sd_v1", "sd1"),
        ("stable-diffusion-v2-768-v", "sd_v2_v", "sd2"),
        ("stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "sdxl"),
        ("flux-1-dev", "flux1", "flux"),
    ],
)
def test_model_words_are_what_forge_reads(architecture: str, version: str, wanted: str) -> None:
    date = datetime.datetime(2026, 1, 2, 3, 4, 5, 6)
    words = model_words(architecture, version, "mine", date)
    assert forge_version(words) == wanted
    assert words["modelspec.date"] == "2026-01-02T03:04:05"
    required = ("sai_model_spec", "architecture", "implementation", "title", "date", "resolution")
    assert all(words[f"modelspec.{name}"] for name in required)


def test_network_arguments() -> None:
    assert network_arguments({"ss_network_args": '{"split_qkv": true, "conv_dim": "4"}'}) == {
        "split_qkv": "True", "conv_dim": "4",
    }  # fmt: skip
    assert network_arguments({"ss_network_args": "{"}) == network_arguments({}) == {}


# ── where files go ──


def test_single_files_and_folders(tmp_path: Path) -> None:
    adapter = load_adapter(GOLDEN / "diffusers/flux.safetensors")
    save_adapter(adapter, tmp_path / "folder", format="diffusers")
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["pytorch_lora_weights.safetensors"]
    save_adapter(adapter, tmp_path / "one.safetensors", format="diffusers")
    assert (tmp_path / "one.safetensors").is_file()
    for path in ("folder", "one.safetensors"):
        assert load_adapter(tmp_path / path).layers.keys() == adapter.layers.keys()
    flat = load_adapter(GOLDEN / "kohya/sd15.safetensors")
    save_adapter(flat, tmp_path / "flat.safetensors", format="kohya")
    assert load_adapter(tmp_path / "flat.safetensors").naming == "kohya"


def test_diffusers_words_speak_for_each_component() -> None:
    def lora(rank: int, alpha: float) -> LoRA:
        return LoRA(make_tensor(1, rank, 4), make_tensor(2, 6, rank), alpha)

    layers = {
        "transformer.a.to_q": lora(2, 2.0),
        "transformer.b.to_q": lora(2, 2.0),
        "transformer.to_q": lora(4, 1.0),
        "text_encoder.text_model.encoder.layers.0.fc1": lora(3, 6.0),
        "text_encoder.text_model.encoder.layers.1.fc1": lora(1, 5.0),
        "text_encoder.text_model.encoder.layers.2.fc1": lora(3, 6.0),
    }
    written = get_format("diffusers").write(Adapter(layers, naming="diffusers"))
    words = json.loads(written.metadata["lora_adapter_metadata"])
    assert (words["transformer.r"], words["transformer.lora_alpha"]) == (2, 2)
    assert words["transformer.rank_pattern"] == {"^to_q": 4}
    assert words["transformer.alpha_pattern"] == {"^to_q": 1}
    assert (words["text_encoder.r"], words["text_encoder.lora_alpha"]) == (3, 6)
    assert words["text_encoder.rank_pattern"] == {r"encoder\.layers\.1\.fc1": 1}
    again = get_format("diffusers").read(written)
    assert {p: (d.rank, d.alpha) for p, d in again.layers.items()} == {
        p: (d.rank, d.alpha) for p, d in layers.items()
    }
