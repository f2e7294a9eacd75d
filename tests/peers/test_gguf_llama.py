"""Adapters that loratools converts to GGUF, run by llama.cpp, against PEFT's forward pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loratools
from loratools.adapter_io import load_adapter, save_adapter
from loratools.errors import UnsupportedError

from . import llama
from .llama_run import TOKENS

pytestmark = pytest.mark.slow

TOLERANCE = 1e-3
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 64,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
         "tie_word_embeddings": False, "initializer_range": 0.12}  # fmt: skip
OLD = {"n_embd": 64, "hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 64}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
       "moe_intermediate_size": 64, "intermediate_size": 64}  # fmt: skip
# llama.cpp looks GELU up in a table of half precision: smaller numbers, smaller errors.
GELU = {"initializer_range": 0.07}
# What older versions of transformers wrote into config.json, and llama.cpp's converter reads.
OLD_WORDS = {"GPT2": {"n_ctx": 64}, "GPTNeoX": {"rotary_pct": 0.25}}
MODELS: dict[str, dict[str, Any]] = {
    "Llama": SMALL,
    "Qwen3": {**SMALL, "head_dim": 16},
    "Gemma3Text": {**SMALL, **GELU, "head_dim": 16, "query_pre_attn_scalar": 16,
                   "tie_word_embeddings": True, "sliding_window": 16},
    "Phi3": {**SMALL, "pad_token_id": 0},
    "GPT2": {**OLD, **GELU, "n_positions": 64},
    "Bloom": {**OLD, **GELU},
    "Falcon": {**OLD, **GELU, "num_hidden_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2,
               "new_decoder_architecture": True, "alibi": False},
    "GPTNeoX": {**SMALL, **GELU, "use_parallel_residual": True},
    "Qwen3Moe": {**SMALL, **MOE, "head_dim": 16, "decoder_sparse_step": 1, "norm_topk_prob": True},
    "Mixtral": {**SMALL, **MOE},
    "Granite": SMALL,
    "Olmo2": SMALL,
    "Starcoder2": {**SMALL, **GELU},
}  # fmt: skip
CLASSES = {"GPT2": "GPT2LMHeadModel"}
TARGETS: dict[str, Any] = {
    "GPT2": ["c_attn", "c_proj", "c_fc"],
    "Qwen3Moe": ["q_proj", "v_proj", "o_proj", "gate"],
    "Mixtral": ["q_proj", "k_proj", "o_proj"],
}
FLAVOURS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {r".*\.0\..*": 6}, "alpha_pattern": {r".*\.1\..*": 3},
    },
}  # fmt: skip


def make_base(name: str, folder: Path) -> Path:
    """Build a tiny random model of a family, in float32."""
    import transformers

    torch.manual_seed(3)
    config = getattr(transformers, f"{name}Config")(**MODELS[name])
    chosen = getattr(transformers, CLASSES.get(name) or f"{name.removesuffix('Text')}ForCausalLM")
    with torch.no_grad():
        model = chosen(config).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:  # norms and biases of their own, not ones and zeros
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder)
    config_file = folder / "config.json"
    words = json.loads(config_file.read_text())
    config_file.write_text(json.dumps({**words, **OLD_WORDS.get(name, {})}))
    vocabulary = {str(number): number for number in range(words["vocab_size"])}
    tokenizer = {"model": {"vocab": vocabulary}, "added_tokens": []}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def make_adapter(base: Path, folder: Path, **words: Any) -> Path:
    """Train nothing: random factors of a size that is seen in the logits."""
    import peft
    import transformers

    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", init_lora_weights=False, **{"r": 4, "lora_alpha": 8, **words}
    )
    peft.get_peft_model(model, config).save_pretrained(folder)
    return folder


@torch.no_grad()
def expected(base: Path, adapter: Path | None = None) -> np.ndarray:
    """Return the logits of transformers, with PEFT's adapter on top."""
    import peft
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, attn_implementation="eager"
    )
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    return model.eval()(torch.tensor([TOKENS])).logits[0].numpy()


def check(base: Path, model: Path, adapter: Path, converted: Path) -> None:
    """Assert that llama.cpp's logits with the converted adapter are PEFT's."""
    alone, changed = llama.logits(model, converted)
    plain, wanted = expected(base), expected(base, adapter)
    assert np.abs(alone - plain).max() < TOLERANCE, "the base itself"
    assert np.abs(plain - wanted).max() > 50 * TOLERANCE, "an adapter that does nothing"
    assert np.abs(changed - wanted).max() < TOLERANCE


@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, tmp_path: Path) -> None:
    """Every flavour of LoRA that GGUF has no word for comes out as PEFT runs it."""
    base = make_base(name, tmp_path / "base")
    model = llama.base_gguf(base, tmp_path / "base.gguf")
    for flavour, words in FLAVOURS.items():
        targets = TARGETS.get(name, "all-linear")
        adapter = make_adapter(base, tmp_path / flavour, target_modules=targets, **words)
        for source in (base, model):
            converted = tmp_path / f"{flavour}-{source.name}.gguf"
            loratools.convert_adapter(adapter, converted, to="gguf", base=source)
            check(base, model, adapter, converted)


@pytest.mark.parametrize("name", ["Qwen3Moe", "Mixtral"])
def test_experts(name: str, tmp_path: Path) -> None:
    """PEFT's fused expert parameters reach llama.cpp's stacks."""
    base = make_base(name, tmp_path / "base")
    model = llama.base_gguf(base, tmp_path / "base.gguf")
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = make_adapter(
        base, tmp_path / "a", target_modules=["q_proj"], target_parameters=parameters
    )
    converted = tmp_path / "a.gguf"
    loratools.convert_adapter(adapter, converted, to="gguf", base=base)
    check(base, model, adapter, converted)


@pytest.mark.parametrize("name", ["Llama", "Qwen3"])
def test_fused_base(name: str, tmp_path: Path) -> None:
    """The base's own tensor list says that query, key and value are one."""
    base = make_base(name, tmp_path / "base")
    model = llama.base_gguf(base, tmp_path / "base.gguf", fused=True)
    adapter = make_adapter(base, tmp_path / "a", target_modules=["q_proj", "v_proj", "up_proj"])
    converted = tmp_path / "a.gguf"
    loratools.convert_adapter(adapter, converted, to="gguf", base=model)
    assert any("attn_qkv" in name for name in load_adapter(converted).layers)
    check(base, model, adapter, converted)
    back = tmp_path / "back"
    loratools.convert_adapter(converted, back, to="peft", base=base)
    assert loratools.compare_adapters(adapter, back).facts["same"]


def test_embeddings(tmp_path: Path) -> None:
    """Untied tables are changed as PEFT changes them."""
    base = make_base("Llama", tmp_path / "base")
    model = llama.base_gguf(base, tmp_path / "base.gguf")
    targets = ["embed_tokens", "lm_head", "q_proj"]
    adapter = make_adapter(base, tmp_path / "a", target_modules=targets)
    converted = tmp_path / "a.gguf"
    loratools.convert_adapter(adapter, converted, to="gguf", base=model)
    check(base, model, adapter, converted)


def test_tied_embeddings_are_refused(tmp_path: Path) -> None:
    """llama.cpp aborts on such an adapter, so none is written."""
    base = make_base("Gemma3Text", tmp_path / "base")
    model = llama.base_gguf(base, tmp_path / "base.gguf")
    adapter = make_adapter(base, tmp_path / "a", target_modules=["embed_tokens", "q_proj"])
    for source in (base, model):
        with pytest.raises(UnsupportedError, match="one tensor"):
            loratools.convert_adapter(adapter, tmp_path / "a.gguf", to="gguf", base=source)
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16", "q8_0"])
def test_storage_types_load(dtype: str, tmp_path: Path) -> None:
    """Every type that is written is one that llama.cpp multiplies with."""
    base = make_base("Llama", tmp_path / "base")
    model = llama.base_gguf(base, tmp_path / "base.gguf")
    adapter = make_adapter(base, tmp_path / "a", target_modules="all-linear", r=32, lora_alpha=4)
    converted = tmp_path / "a.gguf"
    loratools.convert_adapter(adapter, converted, to="gguf", base=base, dtype=dtype)
    _, changed = llama.logits(model, converted)
    save_adapter(load_adapter(converted), tmp_path / "wide.gguf", format="gguf")
    # The same rounded factors; q8_0 and 16 bits also round the activations.
    _, wanted = llama.logits(model, tmp_path / "wide.gguf")
    scale = np.abs(wanted).max()
    assert np.abs(changed - wanted).max() < 0.02 * scale
    assert np.abs(changed - expected(base, adapter)).max() < 0.05 * scale


def test_same_tensors_as_the_converter(tmp_path: Path) -> None:
    """In the plain case, file and file hold the same numbers under the same names."""
    base = make_base("Llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "a", target_modules="all-linear")
    script = llama.source() / "convert_lora_to_gguf.py"
    llama.run(str(script), adapter, "--base", base, "--outfile", tmp_path / "theirs.gguf")
    loratools.convert_adapter(adapter, tmp_path / "ours.gguf", to="gguf", base=base)
    ours, theirs = (load_adapter(tmp_path / f"{who}.gguf") for who in ("ours", "theirs"))
    assert list(ours.layers) == list(theirs.layers)
    for (name, tensor), (_, other) in zip(
        ours.named_tensors(), theirs.named_tensors(), strict=True
    ):
        assert torch.equal(tensor, other), name
