"""GGUF adapters: what a file says, what is folded, what is refused, and the way there and back."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

import loratools
from loratools import cli
from loratools.adapter import Adapter
from loratools.adapter_io import load_adapter, open_adapter, save_adapter
from loratools.deltas import ExpertLoRA, LoRA, Replacement
from loratools.errors import (
    InputError,
    UnsupportedError,
)
from tests.gguf_bases import (
    DOWN,
    EXPERT,
    FF,
    GOLDEN,
    HEADS,
    HIDDEN,
    KEYS,
    VOCABULARY,
    K,
    Q,
    V,
    assert_same_change,
    convert,
    dense,
    lora,
    plain,
    write_config,
    write_model,
)
from tests.strategies import make_tensor

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


def test_alphas_that_differ_are_folded_on_writing_too(tmp_path: Path) -> None:
    """An adapter in GGUF's names that no conversion has settled: composed, resized."""
    layers = {f"blk.{n}.attn_q": lora(6, 5, alpha=n + 0.5, seed=n) for n in range(3)}
    adapter = Adapter(layers, naming="gguf", arch="qwen3")
    save_adapter(adapter, tmp_path / "a.gguf", format="gguf")
    assert_same_change(load_adapter(tmp_path / "a.gguf"), adapter)


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
