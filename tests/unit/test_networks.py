"""One network of an adapter alone, and Wan 2.2's two transformers in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.convert import convert_adapter
from loratools.errors import OptionError, UnsupportedError
from tests.image_adapters import write_kohya_sdxl
from tests.strategies import make_tensor

D = 5120
HIGH = "transformer.blocks.0.attn1.to_q"
LOW = "transformer_2.blocks.0.attn1.to_q"
OURS = {
    "comfyui": "diffusion_model.blocks.0.self_attn.q",
    "kohya": "lora_unet_blocks_0_self_attn_q",
}


def pair(name: str, seed: int) -> dict[str, Tensor]:
    return {
        f"{name}.lora_A.weight": make_tensor(seed, 2, D),
        f"{name}.lora_B.weight": make_tensor(seed + 1, 6, 2),
    }


@pytest.fixture
def both(tmp_path: Path) -> Path:
    path = tmp_path / "both.safetensors"
    save_file({**pair(HIGH, 1), **pair(LOW, 7)}, path)
    return path


def converted(source: Path, **options: Any) -> dict[str, Tensor]:
    output = source.with_name("out.safetensors")
    convert_adapter(source, output, overwrite=True, **options)
    return load_file(output)


@pytest.mark.parametrize("to", sorted(OURS))
def test_two_transformers_need_two_files(both: Path, to: str) -> None:
    with pytest.raises(UnsupportedError) as raised:
        converted(both, to=to)
    assert "two transformers" in raised.value.message
    assert "--network transformer_2" in (raised.value.hint or "")
    for network, name in (("transformer", HIGH), ("transformer_2", LOW)):
        made = converted(both, to=to, network=network)
        assert {key.partition(".lora")[0].removesuffix(".alpha") for key in made} == {OURS[to]}
        up = next(tensor for key, tensor in made.items() if "lora_B" in key or "lora_up" in key)
        assert torch.equal(up, load_file(both)[f"{name}.lora_B.weight"])


def test_diffusers_holds_both(both: Path) -> None:
    made = converted(both, to="diffusers")
    given = load_file(both)
    assert made.keys() == given.keys()
    assert all(torch.equal(made[key], given[key]) for key in given)


def test_unknown_names_of_the_second_are_refused(both: Path) -> None:
    save_file({**load_file(both), **pair("transformer_2.blocks.0.attn1.to_qq", 3)}, both)
    with pytest.raises(Exception, match=r"1 module has no name in Wan"):
        converted(both, to="diffusers")


def test_a_file_of_the_second_alone_is_said_to_be(tmp_path: Path) -> None:
    source = tmp_path / "low.safetensors"
    save_file(pair(LOW, 7), source)
    report = convert_adapter(source, tmp_path / "out.safetensors", to="comfyui")
    assert any("low noise" in note.message for note in report.notes)
    assert set(load_file(tmp_path / "out.safetensors")) == {
        f"{OURS['comfyui']}.lora_{side}.weight" for side in "AB"
    }


def test_one_network_of_a_kohya_file(tmp_path: Path) -> None:
    source = tmp_path / "ink.safetensors"
    write_kohya_sdxl(source)
    with pytest.raises(UnsupportedError, match="several: text_encoder"):
        convert_adapter(source, tmp_path / "whole", to="peft")
    report = convert_adapter(source, tmp_path / "unet", to="peft", network="unet")
    made = load_file(tmp_path / "unet" / "adapter_model.safetensors")
    assert len(made) == 6
    assert not any("text_model" in key for key in made)
    notes = [note.message for note in report.notes]
    assert any("left out: text_encoder (1 module)" in note for note in notes)
    with pytest.raises(OptionError) as raised:
        convert_adapter(source, tmp_path / "x", to="peft", network="unte")
    assert "unet" in (raised.value.hint or "")
