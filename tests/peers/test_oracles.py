"""The oracles checked against each other, without loratools.

Where PEFT's merge and PEFT's forward pass agree, PEFT's merge is the oracle; the tests here say
where they do not.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch

from . import oracles
from .builders import (
    HIDDEN,
    LINEARS,
    Attention,
    Base,
    Convs,
    Embedded,
    adapter_tensors,
    custom,
    lora,
)


def peft_forward_gap(base: Base, adapter: Path, inputs: torch.Tensor = oracles.TOKENS) -> float:
    """Return the largest difference between PEFT's adapter model and PEFT's merged model."""
    model = oracles.peft_model(base, adapter)
    before = oracles.output(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    return (oracles.output(merged, inputs) - before).abs().max().item()


def test_peft_merges_linear_layers_with_one_rounding(wide_bf16: Base, tmp_path: Path) -> None:
    """PEFT's default merge is the float64 sum rounded once; its safe merge rounds twice."""
    adapter = lora(wide_bf16, tmp_path / "a", r=8, lora_alpha=16, target_modules="all-linear")
    exact = oracles.plain_lora(wide_bf16, adapter, 2.0)
    once = oracles.rounded(exact, wide_bf16.tensors)
    oracles.assert_close_in_ulps(oracles.peft_merged(wide_bf16, adapter), once)
    safe = oracles.peft_merged(wide_bf16, adapter, safe=True)
    with pytest.raises(AssertionError):
        oracles.assert_close_in_ulps(safe, once)
    twice = {
        name: (base + (exact[name] - base.double()).to(base.dtype))
        for name, base in wide_bf16.tensors.items()
    }
    oracles.assert_close_in_ulps(safe, twice, atol=1e-3)  # one unit of a rounded delta


def test_peft_merge_equals_its_forward(llama: Base, tmp_path: Path) -> None:
    """LoRA and DoRA on linear layers."""
    for name, dora in (("lora", False), ("dora", True)):
        adapter = lora(llama, tmp_path / name, r=4, target_modules=LINEARS, use_dora=dora)
        assert peft_forward_gap(llama, adapter) < 1e-4


def test_peft_merge_equals_its_forward_in_plain_layers(tmp_path: Path) -> None:
    """Convolutions, embeddings and attention, the doubled out_proj included."""
    torch.manual_seed(3)
    cases = (
        (Convs, ["line", "point", "square", "pixel", "oblong", "cube"], torch.randn(2, 1200)),
        (Embedded, ["embed"], torch.arange(12).reshape(2, 6)),
        (Attention, ["mha"], torch.randn(2, 5, HIDDEN)),
    )
    for make, targets, inputs in cases:
        base = custom(tmp_path / make.__name__, make)
        adapter = lora(base, tmp_path / f"{make.__name__}_a", r=4, target_modules=targets)
        assert peft_forward_gap(base, adapter, inputs) < 1e-4, make


def test_peft_applies_the_out_proj_delta_twice(tmp_path: Path) -> None:
    """nn.MultiheadAttention: W + 2·s·B·A in PEFT's merge as in its forward pass."""
    base = custom(tmp_path / "base", Attention)
    adapter = lora(base, tmp_path / "a", r=4, lora_alpha=8, target_modules=["mha"])
    merged = oracles.peft_merged(base, adapter)["mha.out_proj.weight"]
    stored = adapter_tensors(adapter)
    delta = oracles.linear_delta(stored, "mha.base_layer.out_proj", 2.0)
    expected = base.tensors["mha.out_proj.weight"].double() + 2 * delta
    assert (merged.double() - expected).abs().max() < 1e-6


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_peft_corrupts_tied_weights(target: str, llama_tied: Base, tmp_path: Path) -> None:
    """A delta on one of the two tied modules reaches both in PEFT's merge."""
    adapter = lora(llama_tied, tmp_path / "a", r=4, target_modules=[target])
    assert peft_forward_gap(llama_tied, adapter) > 0.1


def test_ulp_distance_counts_representable_numbers() -> None:
    """Across zero, within a binade and over its edge."""
    tiny = 2.0**-133
    left = torch.tensor([0.0, -tiny, 1.0, 2.0, -2.0], dtype=torch.bfloat16)
    right = torch.tensor([-0.0, tiny, 1.0078125, 1.9921875, -1.9921875], dtype=torch.bfloat16)
    assert oracles.ulp_distance(left, right).tolist() == [0, 2, 1, 1, 1]
