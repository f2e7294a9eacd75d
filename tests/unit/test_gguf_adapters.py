"""GGUF adapters: what a file says, what is folded, what is refused, and the way there and back."""

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
from torch import Tensor

import loratools
from loratools import cli
from loratools.adapter import Adapter, in_natural_order
from loratools.adapter_io import load_adapter, open_adapter, save_adapter
from loratools.deltas import DoRA, ExpertLoRA, LayerDelta, LoRA, Replacement
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
from tests.strategies import make_tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "gguf"
HIDDEN, HEADS, KEYS, FF, VOCABULARY = 16, 4, 2, 24, 20
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "num_attention_heads": HEADS, "num_key_value_heads": KEYS, "num_hidden_layers": 1,
    "intermediate_size": FF, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
}  # fmt: skip
Q, K, V = (f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
DOWN = "model.layers.0.mlp.down_proj"
EXPERT = "model.layers.0.mlp.experts.{}.{}_proj"


def lora(out: int, inner: int, rank: int = 2, alpha: float = 4.0, seed: int = 1) -> LoRA:
    return LoRA(make_tensor(seed, rank, inner), make_tensor(seed + 1, out, rank), alpha)


def plain() -> Adapter:
    """Return an adapter of one alpha: nothing needs folding."""
    return Adapter(
        in_natural_order({
            Q: lora(HIDDEN, HIDDEN), K: lora(HIDDEN // 2, HIDDEN, seed=3),
            V: lora(HIDDEN // 2, HIDDEN, seed=5), DOWN: lora(HIDDEN, FF, seed=7),
        })
    )  # fmt: skip


def write_config(folder: Path, **words: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    file = folder / "config.json"
    file.write_text(json.dumps({**CONFIG, **words}))
    return file


def write_model(path: Path, *, arch: str = "llama", left_out: str = "", **shapes: Any) -> Path:
    """Write a GGUF model with the gguf package, of one block."""
    rows = HIDDEN // HEADS * KEYS
    tensors = {
        "token_embd": (VOCABULARY, HIDDEN), "output": (VOCABULARY, HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_k": (rows, HIDDEN),
        "blk.0.attn_v": (rows, HIDDEN), "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (FF, HIDDEN), "blk.0.ffn_up": (FF, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FF),
        **{name.replace("_0_", ".0."): shape for name, shape in shapes.items()},
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_embedding_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    for name, shape in tensors.items():
        if shape is not None and name not in left_out.split():
            writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(adapter: Adapter, folder: Path, base: Path | None, **words: Any) -> Path:
    """Save an adapter as PEFT does and convert it; returns the GGUF file."""
    save_adapter(adapter, folder / "peft", overwrite=True)
    out = folder / "adapter.gguf"
    loratools.convert_adapter(folder / "peft", out, to="gguf", base=base, overwrite=True, **words)
    return out


def dense(layers: Mapping[str, LayerDelta]) -> dict[str, Tensor]:
    return {path: delta.materialize() for path, delta in layers.items()}  # type: ignore[attr-defined]


def assert_same_change(one: Adapter, other: Adapter) -> None:
    assert list(in_natural_order(one.layers)) == list(in_natural_order(other.layers))
    for path, change in dense(one.layers).items():
        torch.testing.assert_close(dense(other.layers)[path], change, msg=path)


# ── there and back ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["folder", "config.json", "model", "none"])
def test_plain_factors_come_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    """Whatever tells the layout; without a base, the file that loratools wrote does."""
    config = write_config(tmp_path / "base")
    model = write_model(tmp_path / "base.gguf")
    there = {"folder": config.parent, "config.json": config, "model": model}.get(kind, model)
    out = convert(plain(), tmp_path, there)
    back = None if kind == "none" else there
    loratools.convert_adapter(out, tmp_path / "back", to="peft", base=back)
    for (name, tensor), (other, value) in zip(
        plain().named_tensors(), load_adapter(tmp_path / "back").named_tensors(), strict=True
    ):
        assert name == other
        assert torch.equal(tensor, value), name
    assert {d.alpha for d in load_adapter(tmp_path / "back").layers.values()} == {4.0}  # type: ignore[attr-defined]


def test_rotary_rows_by_hand(tmp_path: Path) -> None:
    """Row p·d/2 + i of a head becomes row 2·i + p, and columns stay."""
    out = convert(plain(), tmp_path, write_config(tmp_path / "base"))
    for path, name, heads in ((Q, "attn_q", HEADS), (K, "attn_k", KEYS)):
        before, after = plain().layers[path], load_adapter(out).layers[f"blk.0.{name}"]
        size = HIDDEN // HEADS
        for head in range(heads):
            for half in range(2):
                for i in range(size // 2):
                    old = before.up[head * size + half * size // 2 + i]  # type: ignore[attr-defined]
                    assert torch.equal(after.up[head * size + 2 * i + half], old)  # type: ignore[attr-defined]
        assert torch.equal(after.down, before.down)  # type: ignore[attr-defined]


@pytest.mark.parametrize("case", ["llama", "llama-q8_0", "qwen3moe-bf16"])
def test_golden_files_are_matched(case: str, tmp_path: Path) -> None:
    """Tensor for tensor what llama.cpp's converter wrote, in its own types."""
    source = GOLDEN / "sources" / case
    dtype = {"llama-q8_0": "q8_0", "qwen3moe-bf16": "bf16"}.get(case, "keep")
    out = tmp_path / "ours.gguf"
    loratools.convert_adapter(source, out, to="gguf", base=source, dtype=dtype)
    ours, theirs = gguf.GGUFReader(out), gguf.GGUFReader(GOLDEN / f"{case}.gguf")
    wanted = {tensor.name: tensor for tensor in theirs.tensors}
    assert {tensor.name for tensor in ours.tensors} == set(wanted)
    for tensor in ours.tensors:
        assert tensor.tensor_type == wanted[tensor.name].tensor_type, tensor.name
        assert tensor.data.tobytes() == wanted[tensor.name].data.tobytes(), tensor.name
    for key in ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha"):
        assert ours.get_field(key).contents() == theirs.get_field(key).contents()


def test_metadata_names_the_base_and_comes_back(tmp_path: Path) -> None:
    source = GOLDEN / "sources" / "llama"
    loratools.convert_adapter(source, tmp_path / "a.gguf", to="gguf", base=source)
    words = {f.name: f.contents() for f in gguf.GGUFReader(tmp_path / "a.gguf").fields.values()}
    assert words["general.base_model.count"] == 1
    assert words["general.base_model.0.name"] == "base"
    assert words["general.base_model.0.organization"] == "tiny"
    assert words["general.base_model.0.repo_url"] == "https://huggingface.co/tiny/base"
    loratools.convert_adapter(tmp_path / "a.gguf", tmp_path / "back", to="peft")
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["task_type"]) == ("tiny/base", "CAUSAL_LM")
    theirs = GOLDEN / "llama.gguf"
    loratools.convert_adapter(theirs, tmp_path / "foreign", to="peft", base=source)
    assert loratools.compare_adapters(source, tmp_path / "foreign").facts["same"]


def test_files_of_others_without_a_base_ask_for_it(tmp_path: Path) -> None:
    """Head counts stand in no adapter that llama.cpp's converter wrote."""
    with pytest.raises(InputError, match="num_attention_heads") as caught:
        loratools.convert_adapter(GOLDEN / "llama.gguf", tmp_path / "a", to="peft")
    assert "--base" in (caught.value.hint or "")
    assert not (tmp_path / "a").exists()


# ── scales ───────────────────────────────────────────────────────────────────────────────────


def test_one_alpha_is_right_for_all(tmp_path: Path) -> None:
    """rsLoRA, alpha_pattern, rank_pattern: what llama.cpp computes is ΔW."""
    layers = dict(plain().layers)
    layers[K] = lora(HIDDEN // 2, HIDDEN, rank=3, alpha=3**0.5 * 7, seed=9)
    layers[V] = lora(HIDDEN // 2, HIDDEN, alpha=-1.0, seed=11)
    adapter = Adapter(layers)
    save_adapter(adapter, tmp_path / "peft")
    out = tmp_path / "a.gguf"
    base = write_config(tmp_path / "base", architectures=["Qwen3ForCausalLM"])
    report = loratools.convert_adapter(tmp_path / "peft", out, to="gguf", base=base)
    assert any("2 layers is folded" in note.message for note in report.notes)
    reader = gguf.GGUFReader(out)
    alpha = reader.get_field("adapter.lora.alpha").contents()
    assert alpha == 4.0
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    names = {Q: "attn_q", K: "attn_k", V: "attn_v", DOWN: "ffn_down"}
    for path, change in dense(layers).items():
        a, b = (tensors[f"blk.0.{names[path]}.weight.lora_{x}"] for x in "ab")
        torch.testing.assert_close(alpha / len(a) * b.float() @ a.float(), change)


def test_powers_of_two_keep_the_dtype(tmp_path: Path) -> None:
    """A fold that rounds nothing needs no wider type; one that would, gets it."""
    half = {path: d.map_tensors(Tensor.half) for path, d in plain().layers.items()}
    half[K] = replace(half[K], alpha=8.0)  # type: ignore[type-var]
    half[V] = replace(half[V], alpha=5.0)  # type: ignore[type-var]
    out = convert(Adapter(half), tmp_path, write_config(tmp_path / "base"))
    stored = {t.name: t.tensor_type.name for t in gguf.GGUFReader(out).tensors}
    assert stored["blk.0.attn_k.weight.lora_b"] == "F16"
    assert stored["blk.0.attn_v.weight.lora_b"] == "F32"


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_alpha_the_scale_is_one(alpha: float | None, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "qwen3")
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.ones((3, 4), np.float32))
    writer.add_tensor("blk.0.attn_q.weight.lora_b", np.ones((5, 3), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (delta,) = load_adapter(tmp_path / "a.gguf").layers.values()
    assert torch.equal(dense({"x": delta})["x"], torch.full((5, 4), 3.0))


# ── experts, embeddings, fused bases ─────────────────────────────────────────────────────────

MOE = {"architectures": ["Qwen3MoeForCausalLM"], "num_experts": 3, "moe_intermediate_size": FF}


def test_experts_that_are_missing_are_zeros(tmp_path: Path) -> None:
    layers = {
        EXPERT.format(0, "down"): lora(HIDDEN, FF, rank=1),
        EXPERT.format(2, "down"): lora(HIDDEN, FF, rank=3, alpha=2.0, seed=5),
    }
    out = convert(Adapter(layers), tmp_path, write_config(tmp_path / "base", **MOE))
    (stack,) = load_adapter(out).layers.values()
    assert isinstance(stack, ExpertLoRA)
    wanted = dense(layers)
    change = stack.materialize()
    torch.testing.assert_close(change[0], wanted[EXPERT.format(0, "down")])
    assert not change[1].any()
    torch.testing.assert_close(change[2], wanted[EXPERT.format(2, "down")])
    loratools.convert_adapter(out, tmp_path / "back", to="peft")
    assert_same_change(load_adapter(tmp_path / "back"), Adapter(layers))


def test_fused_parameters_come_back_fused(tmp_path: Path) -> None:
    """Gates and ups are one parameter in memory and two tensors in GGUF."""
    fused = ExpertLoRA(make_tensor(1, 3, 2, HIDDEN), make_tensor(2, 3, 2 * FF, 2), 4.0)
    path = "model.layers.0.mlp.experts.gate_up_proj"
    out = convert(Adapter({path: fused}), tmp_path, write_config(tmp_path / "base", **MOE))
    stacks = load_adapter(out).layers
    assert list(stacks) == ["blk.0.ffn_gate_exps", "blk.0.ffn_up_exps"]
    whole = fused.materialize()
    assert torch.equal(dense(stacks)["blk.0.ffn_gate_exps"], whole[:, :FF])
    assert torch.equal(dense(stacks)["blk.0.ffn_up_exps"], whole[:, FF:])
    loratools.convert_adapter(out, tmp_path / "back", to="peft")
    (back,) = load_adapter(tmp_path / "back").layers.items()
    assert back[0] == path
    assert torch.equal(back[1].down, fused.down)  # type: ignore[attr-defined]
    assert torch.equal(back[1].up, fused.up)  # type: ignore[attr-defined]


def test_embeddings_are_stored_turned_over(tmp_path: Path) -> None:
    table = LoRA(make_tensor(1, 2, VOCABULARY), make_tensor(2, HIDDEN, 2), 4.0, role="embedding")
    adapter = Adapter({"model.embed_tokens": table, "lm_head": lora(VOCABULARY, HIDDEN)})
    out = convert(adapter, tmp_path, write_model(tmp_path / "base.gguf"))
    tensors = {t.name: t.data for t in gguf.GGUFReader(out).tensors}
    assert np.array_equal(tensors["token_embd.weight.lora_a"], table.down.T.numpy())
    assert np.array_equal(tensors["token_embd.weight.lora_b"], table.up.numpy())
    loratools.convert_adapter(out, tmp_path / "back", to="peft", base=write_config(tmp_path / "b"))
    assert_same_change(load_adapter(tmp_path / "back"), adapter)


def test_a_copy_of_the_table_is_no_change(tmp_path: Path) -> None:
    """PEFT stores it beside an embedding's factors; a table that grew is another matter."""
    table = LoRA(make_tensor(1, 2, VOCABULARY), make_tensor(2, HIDDEN, 2), 4.0, role="embedding")
    for rows, kept in ((VOCABULARY, False), (VOCABULARY + 3, True)):
        copy = Replacement(make_tensor(3, rows, HIDDEN), "base_copy")
        adapter = Adapter({"model.embed_tokens": table}, {"model.embed_tokens.weight": copy})
        if kept:
            with pytest.raises(UnsupportedError, match="embed_tokens"):
                convert(adapter, tmp_path, write_config(tmp_path / "base"))
        else:
            convert(adapter, tmp_path, write_config(tmp_path / "base"))


def test_the_base_decides_what_is_fused(tmp_path: Path) -> None:
    """A base with one attn_qkv gets one tensor: rows of zeros where nothing was trained."""
    rows = HIDDEN // HEADS * (HEADS + 2 * KEYS)
    model = write_model(
        tmp_path / "fused.gguf",
        left_out="blk.0.attn_q blk.0.attn_k blk.0.attn_v",
        blk_0_attn_qkv=(rows, HIDDEN),
    )
    adapter = Adapter({path: d for path, d in plain().layers.items() if path != K})
    out = convert(adapter, tmp_path, model)
    layers = load_adapter(out).layers
    assert list(layers) == ["blk.0.attn_qkv", "blk.0.ffn_down"]
    apart = convert(adapter, tmp_path, write_config(tmp_path / "base"))
    q, v = (dense(load_adapter(apart).layers)[f"blk.0.attn_{x}"] for x in "qv")
    expected = torch.cat([q, torch.zeros(HIDDEN // 2, HIDDEN), v])
    out = convert(adapter, tmp_path, model)
    torch.testing.assert_close(dense(layers)["blk.0.attn_qkv"], expected)
    loratools.convert_adapter(out, tmp_path / "back", to="peft", base=model)
    back = load_adapter(tmp_path / "back")
    assert_same_change(back, adapter)
    assert {delta.rank for delta in back.layers.values()} == {2}  # type: ignore[attr-defined]


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
    convert(replace(plain(), metadata=words), tmp_path, None)


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


# ── activated LoRA ───────────────────────────────────────────────────────────────────────────


def test_invocation_tokens_survive_both_ways(tmp_path: Path) -> None:
    words = {"adapter_config.json": json.dumps({"alora_invocation_tokens": [7, 300, 2]})}
    save_adapter(replace(plain(), metadata=words), tmp_path / "peft")
    base = write_config(tmp_path / "base")
    loratools.convert_adapter(tmp_path / "peft", tmp_path / "a.gguf", to="gguf", base=base)
    field = gguf.GGUFReader(tmp_path / "a.gguf").get_field("adapter.alora.invocation_tokens")
    assert field.contents() == [7, 300, 2]
    assert [kind.name for kind in field.types] == ["ARRAY", "UINT32"]
    loratools.convert_adapter(tmp_path / "a.gguf", tmp_path / "back", to="peft")
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == [7, 300, 2]
    for path in ("peft", "a.gguf", "back"):
        with pytest.raises(UnsupportedError, match="invocation tokens") as caught:
            open_adapter(tmp_path / path)
        assert caught.value.hint


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
        "lora_a is mis",
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


# ── commands ─────────────────────────────────────────────────────────────────────────────────


def test_inspect_and_diff(tmp_path: Path) -> None:
    out = convert(plain(), tmp_path, write_config(tmp_path / "base"))
    report = loratools.summarize(out)
    assert (report.facts["format"], report.facts["architecture"]) == ("gguf", "llama")
    assert report.facts["layers"] == 4
    assert cli.run(["diff", str(tmp_path / "peft"), str(out)]) == 0
    changed = dict(plain().layers)
    changed[Q] = replace(changed[Q], alpha=5.0)  # type: ignore[type-var]
    save_adapter(Adapter(changed), tmp_path / "other")
    assert cli.run(["diff", str(tmp_path / "other"), str(out)]) == 1
    theirs, source = str(GOLDEN / "llama.gguf"), str(GOLDEN / "sources" / "llama")
    assert cli.run(["diff", source, theirs, "--base", source]) == 0


def test_gguf_to_gguf_takes_a_base_s_own_layout(tmp_path: Path) -> None:
    """An adapter for separate projections, rewritten for a base that has them fused."""
    apart = convert(plain(), tmp_path, write_config(tmp_path / "base"))
    rows = HIDDEN // HEADS * (HEADS + 2 * KEYS)
    model = write_model(
        tmp_path / "fused.gguf",
        left_out="blk.0.attn_q blk.0.attn_k blk.0.attn_v",
        blk_0_attn_qkv=(rows, HIDDEN),
    )
    loratools.convert_adapter(apart, tmp_path / "fused-a.gguf", to="gguf", base=model)
    assert list(load_adapter(tmp_path / "fused-a.gguf").layers) == [
        "blk.0.attn_qkv", "blk.0.ffn_down"
    ]  # fmt: skip
    loratools.convert_adapter(apart, tmp_path / "same.gguf", to="gguf")
    assert_same_change(load_adapter(tmp_path / "same.gguf"), load_adapter(apart))
