"""The same adapter as trainers of all ages spell it: reference case 40, §1.1, §1.5."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import LoratoolsError

from . import builders, oracles
from .builders import PREFIX, Base, Tensors
from .conftest import Merge


@pytest.fixture(scope="module")
def trained(llama_biased: Base) -> Any:
    """PEFT's model of an adapter with every kind of key: DoRA, embedding, saved module, biases."""
    from peft import LoraConfig

    config = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj", "down_proj", "embed_tokens"],
        use_dora=True,
        modules_to_save=["norm"],
        bias="lora_only",
    )
    return builders.train(llama_biased, config)


@pytest.fixture(scope="module")
def canonical(trained: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapter as PEFT saves it."""
    return builders.save(trained, tmp_path_factory.mktemp("canonical"))


@pytest.fixture(scope="module")
def expected(llama_biased: Base, canonical: Path) -> Tensors:
    """What every spelling merges to."""
    return oracles.peft_merged(llama_biased, canonical)


@pytest.fixture
def assert_same(llama_biased: Base, expected: Tensors, merge: Merge) -> Callable[[Path], None]:
    """Assert that an adapter merges as the canonical one does."""

    def check(adapter: Path) -> None:
        merged = merge(llama_biased, adapter).tensors
        oracles.assert_agrees(merged, expected, llama_biased, atol=2e-6)

    return check


Same = Callable[[Path], None]


def test_canonical(canonical: Path, assert_same: Same) -> None:
    """The spelling which the others are compared to."""
    kinds = ("lora_A.weight", "lora_embedding_A", "lora_magnitude_vector", "norm.weight")
    kinds += ("base_layer.bias", "base_layer.weight")
    stored = builders.adapter_tensors(canonical)
    assert all(any(key.endswith(kind) for key in stored) for kind in kinds)
    assert_same(canonical)


def test_torch_file(canonical: Path, tmp_path: Path, assert_same: Same) -> None:
    """adapter_model.bin, PEFT's default before 0.7."""
    shutil.copy(canonical / "adapter_config.json", tmp_path)
    stored = builders.load_tensors(canonical / "adapter_model.safetensors")
    torch.save(stored, tmp_path / "adapter_model.bin")
    assert_same(tmp_path)


def test_safetensors_before_torch_file(canonical: Path, tmp_path: Path, assert_same: Same) -> None:
    """Where both lie side by side, the safetensors file counts."""
    adapter = builders.edited(canonical, tmp_path / "b")
    stored = builders.load_tensors(canonical / "adapter_model.safetensors")
    halved = {key: tensor / 2 for key, tensor in stored.items()}
    torch.save(halved, adapter / "adapter_model.bin")
    assert_same(adapter)


def is_adapter_key(key: str) -> bool:
    """Say whether a key of PEFT's whole state dict belongs to the adapter's wrappers."""
    words = ("lora_", ".modules_to_save.", ".original_module.")
    saved = ("q_proj.base_layer.bias", "v_proj.base_layer.bias", "down_proj.base_layer.bias")
    return any(word in key for word in words) or key.endswith(saved)


def test_training_state(trained: Any, canonical: Path, tmp_path: Path, assert_same: Same) -> None:
    """A dump of model.state_dict(): ``.default.`` infixes, ``original_module`` beside the copy."""
    dump = {
        key: value.clone() for key, value in trained.state_dict().items() if is_adapter_key(key)
    }
    spelt = (".lora_A.default.weight", ".lora_embedding_A.default", ".original_module.weight")
    spelt += (".lora_magnitude_vector.default.weight", ".modules_to_save.default.weight")
    assert all(any(key.endswith(word) for key in dump) for word in spelt)
    assert_same(builders.edited(canonical, tmp_path / "b", tensors=lambda _: dump))


def _infix(name: str) -> Callable[[str], str]:
    def rename(key: str) -> str:
        for side in ("lora_A", "lora_B"):
            key = key.replace(f".{side}.weight", f".{side}.{name}.weight")
        for side in ("lora_embedding_A", "lora_embedding_B"):
            key = key.replace(f".{side}", f".{side}.{name}")
        return key.replace(".lora_magnitude_vector", f".lora_magnitude_vector.{name}.weight")

    return rename


SPELLINGS: dict[str, Callable[[str], str]] = {
    "no prefix": lambda key: key.removeprefix(PREFIX),
    "prefix cut once too short": lambda key: key.removeprefix("base_model."),
    "default infix": _infix("default"),
    "other infix": _infix("my_style"),
    "DataParallel": lambda key: "module." + key,
    "compiled": lambda key: "_orig_mod." + key,
    "compiled inside": lambda key: key.replace("layers.0.", "layers.0._orig_mod."),
    "FSDP": lambda key: "_fsdp_wrapped_module." + key,
    "FSDP inside": lambda key: key.replace("layers.1.", "layers.1._fsdp_wrapped_module."),
    "FSDP, compiled, infix": lambda key: "_fsdp_wrapped_module._orig_mod." + _infix("default")(key),
    "biases before 0.6": lambda key: key.replace(".base_layer.bias", ".bias"),
    "DoRA before 0.10": lambda key: key.replace(
        ".lora_magnitude_vector", ".lora_magnitude_vector.default"
    ),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_keys(spelling: str, canonical: Path, tmp_path: Path, assert_same: Same) -> None:
    """Prefixes and infixes which dumps of wrapped models carry."""
    rename = builders.renamed(SPELLINGS[spelling])
    adapter = builders.edited(canonical, tmp_path / "b", tensors=rename)
    before, after = (set(builders.adapter_tensors(folder)) for folder in (canonical, adapter))
    assert before != after or spelling == "no prefix"
    assert_same(adapter)


def named_adapter(base: Base, folder: Path, *names: str) -> Path:
    """Save adapters under names of their own: a sub-folder for each, a README at the root."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj"])
    model = get_peft_model(base.load(), config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)
    torch.manual_seed(6)
    builders.perturb(model)
    return builders.save(model, folder)


@pytest.mark.parametrize("inside", [False, True], ids=["root", "sub-folder"])
def test_named_sub_folder(llama: Base, tmp_path: Path, merge: Merge, inside: bool) -> None:
    """An adapter that is not called default lies in a sub-folder; either path will do."""
    root = named_adapter(llama, tmp_path / "a", "style")
    assert not (root / "adapter_config.json").exists()
    merged = merge(llama, root / "style" if inside else root).tensors
    expected = oracles.peft_merged(llama, root / "style")
    oracles.assert_agrees(merged, expected, llama, atol=1e-6)


def test_several_sub_folders(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """With several adapters under one root, the user is asked which."""
    root = named_adapter(llama, tmp_path / "a", "style", "other")
    with pytest.raises(LoratoolsError) as refusal:
        merge(llama, root)
    said = f"{refusal.value.message} {refusal.value.hint}"
    assert "style" in said
    assert "other" in said


def test_unknown_settings(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """A config from a later PEFT: keys nobody knows change nothing."""
    original = builders.lora(llama, tmp_path / "a", r=4, target_modules=["q_proj"])
    adapter = builders.edited(original, tmp_path / "b", config={"use_something_new": None})
    merged = merge(llama, adapter).tensors
    oracles.assert_agrees(merged, oracles.peft_merged(llama, original), llama, atol=1e-6)
