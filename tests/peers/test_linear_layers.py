"""Which layers are coded: transformers decides on modules, we on the names of tensors alone."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from loratools.keymaps.linear_layers import LinearLayers
from loratools.quantize import dequantize_base, quantize_base

IDS = torch.arange(1, 25)[None]

# ── every class that transformers has, without weights ──

AUTO = (
    "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "IMAGE_TEXT_TO_TEXT",
)  # fmt: skip
DEPTHS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers",
    "num_encoder_layers", "num_decoder_layers", "depth", "num_local_experts", "num_experts",
    "n_routed_experts",
)  # fmt: skip
UNNAMED = {"NemotronH_Omni_Reasoning_V3"}
"""Classes whose last layer stays float only because no parameter comes after it."""


def shallow(config: Any, depth: int = 0) -> Any:
    """Make a model's default config small, where it says how deep it is."""
    for name in DEPTHS:
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, min(getattr(config, name), 4 if "expert" in name else 8))
    for part in list(vars(config).values()):
        if hasattr(part, "model_type") and depth < 3:
            shallow(part, depth + 1)
    return config


def on_meta(config_class: Any, model_class: Any) -> Any | None:
    """Build a model without weights, or return None for one whose defaults do not build."""
    for make in (lambda: shallow(config_class()), config_class):
        with suppress(Exception), torch.device("meta"):
            return model_class(make())
    return None


def built(auto: str) -> Iterator[Any]:
    """Yield a model of every class that one of transformers' tables has."""
    tables = pytest.importorskip("transformers.models.auto.modeling_auto")
    table = getattr(tables, f"MODEL_FOR_{auto}_MAPPING")
    for config_class in list(table.keys()):
        try:
            classes = table[config_class]
        except ValueError:
            continue
        model = on_meta(config_class, classes[0] if isinstance(classes, tuple) else classes)
        if model is not None:
            yield model


def differing(model: Any) -> set[str]:
    """Return the layers that transformers codes and we do not, or the other way about."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.base import HfQuantizer
    from transformers.quantizers.quantizers_utils import should_convert_module

    skip = HfQuantizer.get_modules_to_not_convert(model, None, model._keep_in_fp32_modules)
    theirs = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if (isinstance(module, Conv1D) or type(module) is nn.Linear)
        and should_convert_module(name, skip)
    }
    names = [name for name, _ in model.named_parameters()]
    matrices = [n for n, p in model.named_parameters() if p.dim() == 2 and n.endswith(".weight")]
    layers = LinearLayers([model.config.model_type], names)
    ours = {name for name in matrices if layers.is_coded(name)}
    turned = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, Conv1D)}
    wrong = {name for name in matrices if layers.is_turned(name) != (name in turned)}
    # A tied head is no parameter of its own.
    return (ours ^ (theirs & set(matrices))) | wrong


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("auto", AUTO)
def test_the_layers_of_every_class_are_those_of_transformers(auto: str) -> None:
    wrong, seen = {}, 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for model in built(auto):
            seen += 1
            if differing(model) and type(model).__name__ not in UNNAMED:
                wrong[type(model).__name__] = sorted(differing(model))[:4]
    assert wrong == {}
    assert seen > 10


# ── small models of some classes, whole ──

SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 96,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SIZES, "num_key_value_heads": 2}
T5 = {
    "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "vocab_size": 96,
    "decoder_start_token_id": 0,
}  # fmt: skip
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
          "num_attention_heads": 4, "image_size": 16, "patch_size": 8}  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tied": ("LlamaForCausalLM", "LlamaConfig", {**GROUPED, "tie_word_embeddings": True}),
    "classifier without a bias": (
        "LlamaForSequenceClassification", "LlamaConfig", {**GROUPED, "pad_token_id": 0}
    ),
    "experts": (
        "Qwen3MoeForCausalLM", "Qwen3MoeConfig",
        {**GROUPED, "moe_intermediate_size": 64, "num_experts": 4, "num_experts_per_tok": 2,
         "head_dim": 16},
    ),
    "shared expert": (
        "Qwen2MoeForCausalLM", "Qwen2MoeConfig",
        {**GROUPED, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
         "num_experts": 4},
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**GROUPED, "num_local_experts": 4}),
    "transposed": (
        "GPT2LMHeadModel", "GPT2Config",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96, "n_positions": 64},
    ),
    "opt": (
        "OPTForCausalLM", "OPTConfig", {**SIZES, "ffn_dim": 128, "word_embed_proj_dim": 64}
    ),
    "bloom": (
        "BloomForCausalLM", "BloomConfig",
        {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 96},
    ),
    "another name for the head": ("GPTNeoXForCausalLM", "GPTNeoXConfig", SIZES),
    "kept in float32": ("T5ForConditionalGeneration", "T5Config", T5),
    "gated": (
        "T5ForConditionalGeneration", "T5Config",
        {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    "masked words": ("BertForMaskedLM", "BertConfig", SIZES),
    "classifier with a bias": ("BertForSequenceClassification", "BertConfig", SIZES),
}  # fmt: skip
ROWS_APART = {"shared expert", "classifier with a bias"}
"""A layer of one or two rows, with which bitsandbytes' 4-bit CPU kernel cannot compute."""


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("bitsandbytes")
    return pytest.importorskip("transformers")


def random_model(transformers: Any, name: str, folder: Path) -> Any:
    """Write a small model with weights that tell; returns its class."""
    model_class, config_class, words = MODELS[name]
    kind = getattr(transformers, model_class)
    torch.manual_seed(0)
    model = kind(getattr(transformers, config_class)(**words)).to(torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=0.05)
    model.save_pretrained(folder)
    return kind


def quantised(transformers: Any, kind: Any, folder: Path, word: str) -> Any:
    four = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": word == "nf4-double",
        "bnb_4bit_compute_dtype": torch.bfloat16,
    }
    words = {"load_in_8bit": True} if word == "int8" else four
    settings = transformers.BitsAndBytesConfig(**words)
    return kind.from_pretrained(folder, quantization_config=settings, dtype=torch.bfloat16)


def logits(model: Any) -> Tensor:
    words = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=IDS, **words).logits
    return found


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def same_bytes(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one, other)))


def check_model(transformers: Any, folder: Path, name: str, word: str) -> None:
    kind = random_model(transformers, name, folder / "plain")
    theirs = quantised(transformers, kind, folder / "plain", word)
    theirs.save_pretrained(folder / "theirs")
    quantize_base(folder / "plain", folder / "ours", to=word)
    found, expected = stored(folder / "ours"), stored(folder / "theirs")
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert "quant_state" in key or same_bytes(tensor, expected[key]), key
    ours = kind.from_pretrained(folder / "ours")
    if word == "int8" or name not in ROWS_APART:
        assert torch.equal(logits(ours), logits(theirs))
    # And back: in the axes of the plain model.
    dequantize_base(folder / "theirs", folder / "again")
    again, plain = stored(folder / "again"), stored(folder / "plain")
    assert {n: t.shape for n, t in again.items()} == {n: t.shape for n, t in plain.items()}
    for key, tensor in again.items():
        wide = plain[key].float()
        assert float((tensor.float() - wide).norm()) <= 0.12 * float(wide.norm()), key


@pytest.mark.parametrize("name", ["experts", "transposed", "kept in float32"])
def test_a_model_is_quantised_as_transformers_does(
    transformers: Any, tmp_path: Path, name: str
) -> None:
    check_model(transformers, tmp_path, name, "nf4")


@pytest.mark.slow
@pytest.mark.parametrize("word", ["nf4", "nf4-double", "int8"])
@pytest.mark.parametrize("name", list(MODELS))
def test_every_model_is_quantised_as_transformers_does(
    transformers: Any, tmp_path: Path, name: str, word: str
) -> None:
    check_model(transformers, tmp_path, name, word)


def test_int8_of_transposed_layers_is_transformers_own(transformers: Any, tmp_path: Path) -> None:
    check_model(transformers, tmp_path, "transposed", "int8")


def test_names_of_older_files_find_their_head(transformers: Any, tmp_path: Path) -> None:
    """LLaVA's files call the head by another name than its module has."""
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**GROUPED),
        image_token_index=95,
        image_seq_length=4,
    )
    torch.manual_seed(0)
    kind = transformers.LlavaForConditionalGeneration
    kind(config).to(torch.bfloat16).save_pretrained(tmp_path / "plain")
    theirs = quantised(transformers, kind, tmp_path / "plain", "nf4")
    quantize_base(tmp_path / "plain", tmp_path / "ours", to="nf4")
    assert torch.equal(logits(kind.from_pretrained(tmp_path / "ours")), logits(theirs))


def test_a_merge_into_a_quantised_transposed_base_is_peft_on_its_own(
    transformers: Any, tmp_path: Path
) -> None:
    """The default: dequantised, then added to, in the axes of Conv1D."""
    peft = pytest.importorskip("peft")
    from loratools.merge import merge_into_base

    kind = random_model(transformers, "transposed", tmp_path / "plain")
    quantize_base(tmp_path / "plain", tmp_path / "base", to="nf4")
    dense = kind.from_pretrained(tmp_path / "base").dequantize()
    lora = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    wrapped = peft.get_peft_model(kind.from_pretrained(tmp_path / "plain"), lora)
    for parameter_name, parameter in wrapped.named_parameters():
        if "lora_" in parameter_name:
            parameter.data.normal_(std=0.1)
    wrapped.save_pretrained(tmp_path / "adapter")
    merge_into_base(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", dtype="fp32")
    found = stored(tmp_path / "out")
    layers = wrapped.base_model.model.transformer.h
    for layer, adapted in zip(dense.transformer.h, layers, strict=True):
        change = adapted.attn.c_attn.get_delta_weight("default")
        # transformers leaves (out, in) in a Linear.
        expected = layer.attn.c_attn.weight.T.float() + change.float()
        number = adapted.attn.layer_idx
        key = next(k for k in found if k.endswith(f"h.{number}.attn.c_attn.weight"))
        torch.testing.assert_close(found[key], expected, rtol=2**-7, atol=2e-3)
