"""Resized PEFT adapters, reloaded and merged by PEFT: the nearest change of each chosen rank.

The oracle is PEFT's own merge of the original: W′ − W, its dense SVD in float64, truncated at the
rank that the report names. For DoRA it is PEFT's merge of both.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.svd_resize import resize_adapter

from . import builders, oracles
from .builders import LINEARS, Base, lora

PATTERNS: dict[str, Any] = {
    "target_modules": list(LINEARS),
    "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 6},
    "alpha_pattern": {"k_proj|v_proj": 3, "mlp.up_proj": 7.5},
}
RULES: dict[str, dict[str, Any]] = {
    "rank": {"rank": 2},
    "growth": {"rank": 9},
    "energy": {"energy": 0.7},
    "global": {"energy": 0.6, "scope": "global"},
    "size": {"max_size": "9kB"},
    "mean": {"mean_rank": 2.5},
}


def changes(base: Base, adapter: Path) -> dict[str, Tensor]:
    """Return W′ − W of every changed tensor as PEFT merges it, (rows, the rest) in float64."""
    merged, before = oracles.peft_merged(base, adapter), base.tensors
    found = {name: merged[name].double() - before[name].double() for name in merged}
    return {name: change.flatten(1) for name, change in found.items() if change.dim() > 1}


def nearest(change: Tensor, rank: int) -> Tensor:
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def assert_nearest(base: Base, original: Path, written: Path, ranks: dict[str, int]) -> None:
    """Compare PEFT's two merges, module by module; keys that PEFT misses are a failure."""
    from peft import PeftConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base.load(), PeftConfig.from_pretrained(written))
        loaded = model.load_adapter(written, "default")
    assert [key for key in loaded.missing_keys if "lora_" in key] == []
    assert loaded.unexpected_keys == []
    before, after = changes(base, original), changes(base, written)
    for name, change in before.items():
        module = next((m for m in ranks if name.startswith(f"{m}.")), None)
        expected = change if module is None else nearest(change, ranks[module])
        assert float((after[name] - expected).abs().max()) <= 2e-6, name


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_llama(rule: str, rslora: bool, llama: Base, tmp_path: Path) -> None:
    adapter = lora(llama, tmp_path / "a", r=4, lora_alpha=12, use_rslora=rslora, **PATTERNS)
    report = resize_adapter(adapter, tmp_path / "b", **RULES[rule])
    ranks = {str(item["module"]): int(item["rank"]) for item in report.items}
    assert_nearest(llama, adapter, tmp_path / "b", ranks)
    config = json.loads((tmp_path / "b/adapter_config.json").read_text("utf-8"))
    assert config["r"] in ranks.values()
    assert not config.get("use_rslora")


def test_embeddings_and_replacements(llama: Base, tmp_path: Path) -> None:
    targets = ["embed_tokens", "q_proj"]
    adapter = lora(llama, tmp_path / "a", r=4, target_modules=targets, modules_to_save=["lm_head"])
    report = resize_adapter(adapter, tmp_path / "b", rank=2)
    assert report.facts["extras"] == 2  # PEFT saves an adapted table whole, too
    assert_nearest(llama, adapter, tmp_path / "b", {str(i["module"]): 2 for i in report.items})


def test_biases_stay(llama_biased: Base, tmp_path: Path) -> None:
    adapter = lora(llama_biased, tmp_path / "a", r=4, target_modules=["q_proj"], lora_bias=True)
    resize_adapter(adapter, tmp_path / "b", rank=1)
    one, two = (oracles.peft_merged(llama_biased, tmp_path / name) for name in "ab")
    for name in one:
        if name.endswith("bias"):
            assert torch.allclose(one[name], two[name], atol=1e-7), name


def test_convolutions(tmp_path: Path) -> None:
    base = builders.custom(tmp_path / "base", builders.Convs)
    targets = ["line", "square", "pixel", "cube"]
    adapter = lora(base, tmp_path / "a", r=4, target_modules=targets)
    report = resize_adapter(adapter, tmp_path / "b", rank=3, conv_rank=2)
    ranks = {str(item["module"]): int(item["rank"]) for item in report.items}
    assert set(ranks.values()) == {2, 3}
    assert_nearest(base, adapter, tmp_path / "b", ranks)


@pytest.mark.parametrize("rule", [{"rank": 2}, {"energy": 0.5}, {"mean_rank": 1.5}])
def test_attention_keeps_one_rank(rule: dict[str, Any], tmp_path: Path) -> None:
    """in_proj and out_proj stand under one rank in PEFT's configuration."""
    base = builders.custom(tmp_path / "base", builders.Attention)
    adapter = lora(base, tmp_path / "a", r=4, target_modules=["mha"])
    report = resize_adapter(adapter, tmp_path / "b", **rule)
    (rank,) = {int(item["rank"]) for item in report.items}
    before, after = changes(base, adapter), changes(base, tmp_path / "b")
    for name, change in before.items():
        expected = nearest(change, rank)
        assert float((after[name] - expected).abs().max()) <= 4e-6, name


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_dora_with_its_base(kind: str, tmp_path: Path) -> None:
    """The reported error is that of PEFT's two merges, and smaller than that of cutting ΔW."""
    base = getattr(builders, kind)(tmp_path / "base")
    targets = list(LINEARS) if kind == "llama" else ["c_attn", "c_proj"]
    adapter = lora(base, tmp_path / "a", r=4, target_modules=targets, use_dora=True)
    whole = resize_adapter(adapter, tmp_path / "same", rank=4, base=base.folder)
    assert whole.facts["relative_error"] <= 1e-6
    report = resize_adapter(adapter, tmp_path / "b", rank=2, base=base.folder)
    before, after = changes(base, adapter), changes(base, tmp_path / "b")
    lost = sum(float((after[n] - before[n]).norm()) ** 2 for n in before)
    all_of_it = sum(float(change.norm()) ** 2 for change in before.values())
    assert report.facts["relative_error"] == pytest.approx((lost / all_of_it) ** 0.5, rel=1e-4)
