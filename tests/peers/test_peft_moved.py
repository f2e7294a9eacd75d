"""Initialisations that move the base: reference cases 29 and 30, §2.9."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import UnsupportedError

from . import builders, oracles
from .builders import LINEARS, Base, lora
from .conftest import Merge

MOVING = pytest.mark.parametrize("init", ["pissa", "olora"])
SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": list(LINEARS)}


@MOVING
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_recomputed(llama: Base, tmp_path: Path, merge: Merge, init: str, rslora: bool) -> None:
    """Case 29: on the original base, the part taken out of it is computed again, with a note."""
    adapter = lora(llama, tmp_path / "a", init_lora_weights=init, use_rslora=rslora, **SETTINGS)
    merged = merge(llama, adapter)
    oracles.assert_agrees(merged.tensors, oracles.peft_merged(llama, adapter), llama, atol=1e-5)
    expected = oracles.output(oracles.peft_model(llama, adapter))
    assert (oracles.output(llama.load(merged.folder)) - expected).abs().max() < 1e-4
    assert merged.notes_on(init) or merged.notes_on({"pissa": "PiSSA", "olora": "OLoRA"}[init])


@MOVING
def test_residual_base(llama: Base, tmp_path: Path, merge: Merge, init: str) -> None:
    """Case 29: on the base that PEFT trained on, the deltas are plain."""
    from peft import LoraConfig

    model = builders.train(llama, LoraConfig(init_lora_weights=init, **SETTINGS))
    adapter = builders.save(model, tmp_path / "a")
    trained = oracles.output(model.eval())
    model.unload().save_pretrained(tmp_path / "residual")
    residual = Base(tmp_path / "residual", llama.build)
    assert len(oracles.changed(residual.tensors, llama)) == 14
    merged = merge(residual, adapter, residual_base=True)
    expected = oracles.rounded(oracles.plain_lora(residual, adapter, 2.0), residual.tensors)
    oracles.assert_agrees(merged.tensors, expected, residual, atol=1e-6)
    assert (oracles.output(llama.load(merged.folder)) - trained).abs().max() < 1e-4
    oracles.assert_close(merged.tensors, oracles.peft_merged(llama, adapter), 1e-5)


@MOVING
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_converted(llama: Base, tmp_path: Path, merge: Merge, init: str, rslora: bool) -> None:
    """Case 30: PEFT's own conversion, [A; A0] and [B, -B0] of twice the rank, is plain LoRA."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(init_lora_weights=init, use_rslora=rslora, **SETTINGS)
    model = get_peft_model(llama.load(), config)
    torch.manual_seed(1)
    model.peft_config["default"].init_lora_weights = True
    builders.save(model, tmp_path / "init")
    model.peft_config["default"].init_lora_weights = init
    builders.perturb(model)
    trained = oracles.output(model.eval())
    start = str(tmp_path / "init")
    adapter = builders.save(model, tmp_path / "a", path_initial_model_for_weight_conversion=start)
    rows = builders.adapter_tensors(adapter)["model.layers.0.mlp.up_proj.lora_A.weight"].shape[0]
    assert rows == 8
    merged = merge(llama, adapter)
    oracles.assert_agrees(merged.tensors, oracles.peft_merged(llama, adapter), llama, atol=1e-5)
    assert (oracles.output(llama.load(merged.folder)) - trained).abs().max() < 1e-4


@pytest.mark.parametrize("init", ["corda", "lora_ga", "loftq", "pissa_niter_4"])
def test_not_reproducible(llama: Base, tmp_path: Path, merge: Merge, init: str) -> None:
    """§2.9: what cannot be computed again is refused, unless the base given is the moved one."""
    original = lora(llama, tmp_path / "a", **SETTINGS)
    adapter = builders.edited(original, tmp_path / "b", config={"init_lora_weights": init})
    with pytest.raises(UnsupportedError, match=init) as refusal:
        merge(llama, adapter)
    assert refusal.value.hint
    assert "residual" in refusal.value.hint
    assert not (tmp_path / "merged").exists()
    merged = merge(llama, adapter, residual_base=True)
    expected = oracles.peft_merged(llama, original)
    oracles.assert_agrees(merged.tensors, expected, llama, atol=1e-6)


@pytest.mark.parametrize("init", ["gaussian", "orthogonal"])
def test_harmless(llama: Base, tmp_path: Path, merge: Merge, init: str) -> None:
    """§2.9: other initialisations leave the base where it was."""
    adapter = lora(llama, tmp_path / "a", init_lora_weights=init, **SETTINGS)
    merged = merge(llama, adapter).tensors
    oracles.assert_agrees(merged, oracles.peft_merged(llama, adapter), llama, atol=1e-6)
