"""What a GGUF adapter cannot hold, bases that do not fit, files that contradict themselves."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import loratools
from loratools import cli
from loratools.adapter import Adapter
from loratools.adapter_io import load_adapter, save_adapter
from loratools.deltas import DoRA, LayerDelta, LoRA, Replacement
from loratools.errors import (
    InputError,
    LoratoolsError,
    MalformedAdapterError,
    MatchError,
    OptionError,
    UnknownArchitectureError,
    UnsupportedError,
)
from loratools.tensorfiles.gguf import read_gguf_header
from loratools.tensorfiles.safetensors import save_tensors
from tests.gguf_bases import (
    DOWN,
    FF,
    GOLDEN,
    HIDDEN,
    KEYS,
    VOCABULARY,
    Q,
    assert_same_change,
    convert,
    lora,
    plain,
    write_config,
    write_model,
)
from tests.strategies import make_tensor

# ── refusals: a reason, a remedy, and nothing written ────────────────────────────────────────


def with_bias(adapter: Adapter) -> Adapter:
    layers = dict(adapter.layers)
    layers[Q] = replace(layers[Q], bias=make_tensor(1, HIDDEN))  # type: ignore[type-var]
    return replace(adapter, layers=layers)


def with_dora(adapter: Adapter) -> Adapter:
    return Adapter(
        {p: DoRA(d, make_tensor(1, d.weight_shape[0])) for p, d in adapter.layers.items()}
    )  # type: ignore[arg-type]


def with_module(name: str, *shape: int) -> Any:
    return lambda a: replace(a, extras={name: Replacement(make_tensor(1, *shape), expected=True)})


def with_layer(path: str, delta: LayerDelta) -> Any:
    return lambda a: replace(a, layers={**a.layers, path: delta})


TABLE = LoRA(make_tensor(1, 2, VOCABULARY), make_tensor(2, HIDDEN, 2), 4.0, role="embedding")
REFUSED: dict[str, tuple[Any, dict[str, Any], type[LoratoolsError], str]] = {
    "DoRA": (with_dora, {}, UnsupportedError, "dora"),
    "bias": (with_bias, {}, UnsupportedError, "bias"),
    "norm": (with_module("model.norm.weight", HIDDEN), {}, UnsupportedError, "model.norm"),
    "head": (with_module("lm_head.weight", 4, 4), {}, UnsupportedError, "lm_head.weight"),
    "tied table": (with_layer("model.embed_tokens", TABLE), {"tie_word_embeddings": True},
                   UnsupportedError, "one tensor"),
    "tied head": (with_layer("lm_head", lora(VOCABULARY, HIDDEN)), {"tie_word_embeddings": True},
                  UnsupportedError, "one tensor"),
    "vision": (with_layer("model.vision_tower.layers.0.q_proj", lora(4, 4)), {}, MatchError,
               "vision_tower"),
    "stranger": (with_layer("model.layers.0.mlp.sideways", lora(4, 4)), {}, MatchError, "sideways"),
    "odd rows": (with_layer(Q, lora(HIDDEN + 1, HIDDEN)), {}, MatchError, "17 rows"),
    "unknown class": (lambda a: a, {"architectures": ["LlamaForCausalML"]},
                      UnknownArchitectureError, "LlamaForCausalML"),
    "BitNet": (lambda a: a, {"architectures": ["BitNetForCausalLM"]}, UnsupportedError, "three"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_remedy(case: str, tmp_path: Path) -> None:
    change, words, error, match = REFUSED[case]
    with pytest.raises(error, match=match) as caught:
        convert(change(plain()), tmp_path, write_config(tmp_path / "base", **words))
    assert caught.value.hint
    assert not (tmp_path / "adapter.gguf").exists()


@pytest.mark.parametrize("name", ["model.embed_tokens", "lm_head"])
def test_a_model_without_a_head_is_tied(name: str, tmp_path: Path) -> None:
    """A GGUF base says so by its tensors alone."""
    model = write_model(tmp_path / "base.gguf", left_out="output")
    layers = {**plain().layers, name: TABLE if "embed" in name else lora(VOCABULARY, HIDDEN)}
    with pytest.raises(UnsupportedError, match="one tensor"):
        convert(Adapter(layers), tmp_path, model)


def test_losses_are_left_out_when_asked(tmp_path: Path) -> None:
    adapter = with_module("model.norm.weight", HIDDEN)(plain())
    save_adapter(adapter, tmp_path / "peft")
    report = loratools.convert_adapter(
        tmp_path / "peft", tmp_path / "a.gguf", to="gguf", base=write_config(tmp_path / "base"),
        allow_loss=True,
    )  # fmt: skip
    assert list(report.facts["lost"]) == ["model.norm.weight"]
    assert len(load_adapter(tmp_path / "a.gguf").layers) == 4


BASES: dict[str, tuple[dict[str, Any], str]] = {
    "a missing tensor": ({"left_out": "blk.0.ffn_down"}, "blk.0.ffn_down.weight"),
    "another shape": ({"blk_0_ffn_down": (HIDDEN, FF + 2)}, r"blk.0.ffn_down.weight: \(16, 26\)"),
    "another model": ({"arch": "bloom"}, "no place in a GGUF model of bloom"),
    "an unknown model": ({"arch": "llamma"}, "llamma"),
}


@pytest.mark.parametrize("case", BASES)
def test_bases_that_do_not_fit_exit_1(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command names what is wrong and writes nothing."""
    shapes, message = BASES[case]
    model = write_model(tmp_path / "base.gguf", **shapes)
    save_adapter(plain(), tmp_path / "peft")
    out = tmp_path / "a.gguf"
    words = ["convert", tmp_path / "peft", "-o", out, "--to", "gguf", "--base", model]
    assert cli.run(list(map(str, words))) == 1
    said = capsys.readouterr().err
    assert re.search(message, said), said
    assert "Hint:" in said
    assert not out.exists()


def test_an_adapter_for_another_architecture(tmp_path: Path) -> None:
    out = convert(plain(), tmp_path, write_config(tmp_path / "base"))
    other = write_config(tmp_path / "other", architectures=["GPT2LMHeadModel"])
    with pytest.raises(MatchError, match=r"for llama, and .* is gpt2"):
        loratools.convert_adapter(out, tmp_path / "back", to="peft", base=other)
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("fault", ["absent", "another shape"])
def test_a_folder_with_weights_is_asked_too(fault: str, tmp_path: Path) -> None:
    """A checkpoint's own parameters say what is there, whatever wraps them."""
    folder = write_config(tmp_path / "base").parent
    there = {path: delta.weight_shape for path, delta in plain().layers.items()}
    tensors = {
        f"{path.replace('model.', 'model.language_model.', 1)}.weight": torch.zeros(shape)
        for path, shape in there.items()
    }
    save_tensors(folder / "model.safetensors", tensors, {})
    convert(plain(), tmp_path, folder)
    (tmp_path / "adapter.gguf").unlink()
    name = f"{DOWN.replace('model.', 'model.language_model.', 1)}.weight"
    if fault == "absent":
        del tensors[name]
    else:
        tensors[name] = torch.zeros(HIDDEN, FF + 1)
    save_tensors(folder / "model.safetensors", tensors, {})
    with pytest.raises(MatchError, match=re.escape(DOWN)):
        convert(plain(), tmp_path, folder)
    assert not (tmp_path / "adapter.gguf").exists()


def test_a_base_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="base model") as caught:
        convert(plain(), tmp_path, None)
    assert "--base" in (caught.value.hint or "")


def test_the_folder_that_the_adapter_names_is_its_base(tmp_path: Path) -> None:
    base = write_config(tmp_path / "base").parent
    words = {"adapter_config.json": json.dumps({"base_model_name_or_path": str(base)})}
    made = convert(replace(plain(), metadata=words), tmp_path, None)
    told = convert(plain(), tmp_path / "told", base)
    assert_same_change(loratools.load_adapter(made), loratools.load_adapter(told))


def test_an_adapter_is_no_base(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="an adapter, not a base"):
        convert(plain(), tmp_path, GOLDEN / "llama.gguf")


def test_image_adapters_are_refused(tmp_path: Path) -> None:
    image = Path(__file__).parents[1] / "golden" / "kohya"
    source = next(iter(sorted(image.glob("*.safetensors"))))
    with pytest.raises(UnsupportedError, match="language models"):
        loratools.convert_adapter(source, tmp_path / "a.gguf", to="gguf")
    with pytest.raises(UnsupportedError, match="language model"):
        loratools.convert_adapter(
            GOLDEN / "llama.gguf", tmp_path / "a", to="kohya", base=GOLDEN / "sources" / "llama"
        )


def test_q8_0_is_of_gguf_alone(tmp_path: Path) -> None:
    save_adapter(plain(), tmp_path / "peft")
    with pytest.raises(OptionError, match="q8_0"):
        loratools.convert_adapter(tmp_path / "peft", tmp_path / "b", to="peft", dtype="q8_0")


DEAF = {
    "architectures": ["DeepseekV2ForCausalLM"], "qk_nope_head_dim": 3, "v_head_dim": 2,
    "n_routed_experts": 2,
}  # fmt: skip


def test_tensors_that_llama_cpp_ignores_are_named(tmp_path: Path) -> None:
    layers = {
        "model.layers.0.self_attn.kv_b_proj": lora(KEYS * 5, HIDDEN),
        "model.layers.0.self_attn.o_proj": lora(HIDDEN, HIDDEN, seed=3),
    }
    save_adapter(Adapter(layers), tmp_path / "peft")
    report = loratools.convert_adapter(
        tmp_path / "peft", tmp_path / "a.gguf", to="gguf", base=write_config(tmp_path / "b", **DEAF)
    )
    (warning,) = report.warnings
    assert "2 of 3 layers" in warning.message
    assert "attn_k_b, blk.0.attn_v_b" in warning.message


# ── files that are not what they should be ───────────────────────────────────────────────────


def write_raw(path: Path, tensors: Mapping[str, tuple[int, ...]], **words: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for key, word in {"general.type": "adapter", "adapter.type": "lora", **words}.items():
        writer.add_string(key, word)
    for name, shape in tensors.items():
        writer.add_tensor(name, np.ones(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


A, B = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"
MALFORMED: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "no partner": ({A: (2, 4)}, "lora_b is missing"),
    "no first": (
        {B: (4, 2), "x.weight.lora_a": (2, 2), "x.weight.lora_b": (2, 2)},
        "lora_a is",
    ),
    "ranks": ({A: (2, 4), B: (4, 3)}, r"\(2, 4\) and lora_b is \(4, 3\)"),
    "dimensions": ({A: (2, 4), B: (3, 4, 2)}, "do not belong"),
    "experts": ({A: (2, 2, 4), B: (3, 4, 2)}, "do not belong"),
    "a stranger": ({A: (2, 4), B: (4, 2), "blk.0.attn_q.weight": (4, 4)}, "no factor"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_adapters_are_named(case: str, tmp_path: Path) -> None:
    tensors, match = MALFORMED[case]
    with pytest.raises(MalformedAdapterError, match=match) as caught:
        load_adapter(write_raw(tmp_path / "a.gguf", tensors))
    assert caught.value.hint


def test_norms_are_said_to_be_left_out(tmp_path: Path) -> None:
    """mergekit writes them, and llama.cpp loads and ignores them."""
    tensors = {A: (2, 4), B: (4, 2), "blk.0.attn_norm.weight": (4,)}
    adapter = load_adapter(write_raw(tmp_path / "a.gguf", tensors))
    assert list(adapter.layers) == ["blk.0.attn_q"]
    assert any("1 norms" in note for note in adapter.notes)


def test_another_kind_of_adapter_is_refused(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "a.gguf", {A: (2, 4), B: (4, 2)}, **{"adapter.type": "lokr"})
    with pytest.raises(UnsupportedError, match="lokr"):
        load_adapter(path)


def test_every_cut_of_an_adapter_is_an_error(tmp_path: Path) -> None:
    whole = (GOLDEN / "qwen3moe-bf16.gguf").read_bytes()
    end = max(t.stop for t in read_gguf_header(GOLDEN / "qwen3moe-bf16.gguf").tensors.values())
    cut = tmp_path / "cut.gguf"
    for length in range(0, end, 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(LoratoolsError, match=r"cut\.gguf"):
            load_adapter(cut)
