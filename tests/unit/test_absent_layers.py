"""What counts as missing from a PEFT adapter, and what a checkpoint merely has more than a model.

The stories of lost layers against PEFT itself are in ``tests/peers/test_peft_absent.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.adapter import Adapter
from loratools.basemodel import BaseModel, BaseTensor, Shard
from loratools.deltas import LoRA
from loratools.formats.peft_config import CONFIG_NAME
from loratools.planning.absent_layers import find_absent_layers


def make_base(*modules: str, **config: Any) -> BaseModel:
    path = Path("base.safetensors")
    tensors = tuple(BaseTensor(f"{name}.weight", "F32", (4, 4), path, 0) for name in modules)
    return BaseModel(Path("base"), (Shard(path, tensors, {}),), config=config or None)


def make_adapter(*modules: str, **words: Any) -> Adapter:
    lora = LoRA(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    config = {"peft_type": "LORA", "target_modules": ["q_proj"], **words}
    return Adapter(dict.fromkeys(modules, lora), metadata={CONFIG_NAME: json.dumps(config)})


def q(*layers: int, before: str = "model.") -> list[str]:
    return [f"{before}layers.{i}.self_attn.q_proj" for i in layers]


MORE: dict[str, tuple[list[str], dict[str, Any]]] = {
    # what the checkpoint has besides the adapter's layers 0 and 1; its config
    "a layer for speculative decoding": (q(2), {"num_hidden_layers": 2}),
    "such layers apart": (q(0, before="mtp."), {}),
    "an image tower": (q(0, 1, before="vision_tower."), {}),
    "a head's own layer": (["cls.predictions.q_proj"], {}),
    "experts that the model stacks": (["model.layers.0.mlp.experts.3.q_proj"], {}),
    "another layer": (["model.layers.0.mlp.up_proj"], {}),
}


@pytest.mark.parametrize(("modules", "config"), MORE.values(), ids=MORE)
def test_more_than_the_model_has(modules: list[str], config: dict[str, Any]) -> None:
    base = make_base(*q(0, 1), *modules, **config)
    assert find_absent_layers(base, make_adapter(*q(0, 1))) == ()


@pytest.mark.parametrize(
    ("ours", "theirs"), [("model.", ""), ("", "model."), ("model.language_model.", "model.")]
)
def test_under_other_names(ours: str, theirs: str) -> None:
    """The adapter's words are about its own names, the base's tensors have theirs."""
    base = make_base(*q(0, 1, 2, before=theirs), num_hidden_layers=3)
    adapter = make_adapter(*q(0, 2, before=ours), target_modules=q(0, 1, 2, before=ours))
    assert find_absent_layers(base, adapter) == tuple(q(1, before=theirs))


def test_parameters_beside_modules() -> None:
    """target_parameters does not widen target_modules."""
    base = make_base(*q(0, 1), "model.layers.0.mlp.gate", "model.layers.1.mlp.gate")
    adapter = make_adapter(*q(0, 1), target_parameters=["mlp.experts.gate_up_proj"])
    assert find_absent_layers(base, adapter) == ()
    lost = make_adapter(*q(0), target_parameters=["mlp.experts.gate_up_proj"])
    assert find_absent_layers(base, lost) == tuple(q(1))


def test_formats_that_announce_nothing() -> None:
    lora = LoRA(torch.ones(1, 4), torch.ones(4, 1), 1.0)
    assert find_absent_layers(make_base(*q(0, 1)), Adapter({q(0)[0]: lora})) == ()
