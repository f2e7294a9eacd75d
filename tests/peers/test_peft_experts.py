"""Mixture-of-experts: cases 22 to 26 of LoRA on fused expert parameters and on single experts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from . import builders, oracles
from .builders import HIDDEN, VOCAB, Base, Tensors
from .conftest import Merge

SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "num_local_experts": 4,
    "initializer_range": 0.2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {}),
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 24, "num_experts": 4, "head_dim": 8}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"moe_intermediate_size": 24, "num_experts": 4, "shared_expert_intermediate_size": 40},
    ),
    "gpt_oss": ("GptOss", {"num_experts_per_tok": 2, "head_dim": 8}),
}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUTERS = {"gpt_oss": "mlp.router.weight"}


def moe(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Base:
    """Build a two-layer model with four experts, as transformers saves it."""
    import transformers

    prefix, more = MODELS[name]
    torch.manual_seed(5)
    config = getattr(transformers, f"{prefix}Config")(**(SIZES | more))
    getattr(transformers, f"{prefix}ForCausalLM")(config).to(dtype).save_pretrained(folder)
    return Base(folder, builders.auto_class(f"{prefix}ForCausalLM"))


def peft_on_disk(base: Base, adapter: Path, folder: Path) -> Tensors:
    """Return PEFT's merge as transformers saves it: experts one by one again."""
    oracles.peft_model(base, adapter).merge_and_unload().save_pretrained(folder)
    return dict(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[1:], ["router"]], ids=["all", "down", "gate"])
@pytest.mark.parametrize("name", MODELS)
def test_fused_parameters(name: str, targets: list[str], tmp_path: Path, merge: Merge) -> None:
    """Cases 22 and 23: nested wrappers, the router, and gpt_oss, which stores (in, out)."""
    base = moe(tmp_path / "base", name)
    parameters = [ROUTERS.get(name, "mlp.gate.weight") if t == "router" else t for t in targets]
    adapter = builders.lora(
        base,
        tmp_path / "a",
        r=3,
        lora_alpha=6,
        target_modules=["q_proj"],
        target_parameters=parameters,
    )
    merged = merge(base, adapter)
    expected = peft_on_disk(base, adapter, tmp_path / "peft")
    oracles.assert_close(merged.tensors, expected, 1e-6)
    assert len(oracles.changed(merged.tensors, base)) > 2


def test_bf16_rounds_once(tmp_path: Path, merge: Merge) -> None:
    """Case 22: PEFT rounds the delta and then the sum; one rounding is closer to the exact sum."""
    base = moe(tmp_path / "base", "mixtral", torch.bfloat16)
    adapter = builders.lora(base, tmp_path / "a", r=3, target_parameters=EXPERTS, target_modules=[])
    wide = dataclasses.replace(base, build=lambda folder: base.build(folder).float())
    exact = peft_on_disk(wide, adapter, tmp_path / "exact")
    once = {name: tensor.to(torch.bfloat16) for name, tensor in exact.items()}
    oracles.assert_close_in_ulps(merge(base, adapter).tensors, once)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe"])
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
def test_one_by_one(name: str, rslora: bool, tmp_path: Path, merge: Merge) -> None:
    """Cases 24 and 25: adapters that name every expert (transformers 4) fit the disk as they are.

    PEFT 0.21 drops them for qwen2_moe without a word, and scales fused rsLoRA pairs by √2 too
    much; the oracle is the formula.
    """
    base = moe(tmp_path / "base", name)
    seed = builders.lora(base, tmp_path / "a", r=4, lora_alpha=8, target_modules=["q_proj"])
    stored = base.tensors
    modules = [n.removesuffix(".weight") for n in stored if "expert" in n and n.endswith("weight")]
    modules = [module for module in modules if stored[f"{module}.weight"].dim() == 2]
    torch.manual_seed(3)
    factors = {}
    for module in modules:
        rows, columns = stored[f"{module}.weight"].shape
        factors[f"{builders.PREFIX}{module}.lora_A.weight"] = torch.randn(4, columns)
        factors[f"{builders.PREFIX}{module}.lora_B.weight"] = torch.randn(rows, 4)
    adapter = builders.edited(
        seed, tmp_path / "b", tensors=lambda t: t | factors, config={"use_rslora": rslora}
    )
    expected = oracles.plain_lora(base, adapter, 8 / (2 if rslora else 4))
    merged = merge(base, adapter)
    oracles.assert_close(merged.tensors, {n: t.float() for n, t in expected.items()}, 1e-5)
    assert set(modules) <= {
        n.removesuffix(".weight") for n in oracles.changed(merged.tensors, base)
    }


@pytest.mark.parametrize("square", [False, True], ids=["wide", "square"])
def test_axes_of_peft_0_18(square: bool, tmp_path: Path, merge: Merge) -> None:
    """Case 26: up to 0.18 lora_A ran over the first axis of a stored expert, (E, out, in)."""
    size = HIDDEN // 2 if square else 24
    torch.manual_seed(1)
    config = {"moe_intermediate_size": size, "num_experts": 2, "head_dim": 8}
    import transformers

    settings = SIZES | config
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**settings))
    model.save_pretrained(tmp_path / "base")
    base = Base(tmp_path / "base", builders.auto_class("Qwen3MoeForCausalLM"))
    new = builders.lora(
        base, tmp_path / "a", r=2, lora_alpha=4, target_modules=[], target_parameters=EXPERTS[:1]
    )
    factors = {}
    exact = {name: tensor.double() for name, tensor in base.tensors.items()}
    for layer in range(2):
        owner = f"model.layers.{layer}.mlp.experts"
        a, b = torch.randn(2 * 2, 2 * size), torch.randn(HIDDEN, 2 * 2)
        factors[f"{builders.PREFIX}{owner}.lora_A.weight"] = a
        factors[f"{builders.PREFIX}{owner}.lora_B.weight"] = b
        for expert in range(2):
            # A over the first stored axis, B over the second: Δ[o, i] = s Σ_j B[i, j] A[j, o].
            a_e, b_e = a[2 * expert : 2 * expert + 2], b[:, expert::2]
            delta = 2.0 * (b_e.double() @ a_e.double()).T
            exact[f"{owner}.{expert}.gate_proj.weight"] += delta[:size]
            exact[f"{owner}.{expert}.up_proj.weight"] += delta[size:]
    old = builders.edited(
        new, tmp_path / "b", tensors=lambda _: factors, config={"peft_version": "0.18.1"}
    )
    merged = merge(base, old).tensors
    oracles.assert_close(merged, {n: t.float() for n, t in exact.items()}, 1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_round_trip(name: str, tmp_path: Path, merge: Merge) -> None:
    """What is read and written again merges the same weights, here and in PEFT."""
    from loratools.adapter_io import load_adapter, save_adapter

    base = moe(tmp_path / "base", name)
    router = ROUTERS.get(name, "mlp.gate.weight")
    adapter = builders.lora(
        base, tmp_path / "a", r=3, target_modules=["q_proj"], target_parameters=[*EXPERTS, router]
    )
    save_adapter(load_adapter(adapter), tmp_path / "b")
    assert set(builders.adapter_tensors(tmp_path / "b")) == set(builders.adapter_tensors(adapter))
    again = peft_on_disk(base, tmp_path / "b", tmp_path / "peft")
    oracles.assert_close(merge(base, adapter).tensors, again, 1e-6)


def test_another_number_of_experts(tmp_path: Path, merge: Merge) -> None:
    """Fewer experts in the base than in the adapter: refused, naming the parameter."""
    from loratools.errors import MatchError

    base = moe(tmp_path / "base", "mixtral")
    adapter = builders.lora(base, tmp_path / "a", r=2, target_modules=[], target_parameters=EXPERTS)
    # Half the configured rank makes twice as many experts of the same tensors.
    other = builders.edited(adapter, tmp_path / "b", config={"r": 1})
    with pytest.raises(MatchError, match=r"mlp\.experts\.gate_up_proj"):
        merge(base, other)
