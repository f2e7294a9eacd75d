"""Taking adapters out of GGUF models again, whole tensors that adapters bring, folded tensors."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.codecs.ggml import GGML_TYPES
from loratools.errors import LoratoolsError, MatchError, UnsupportedError
from loratools.merge import merge_into_base, unmerge_from_base
from loratools.summary import summarize
from loratools.tensorfiles.gguf import read_gguf_header
from loratools.tensorfiles.gguf_reading import Value
from loratools.tensorfiles.gguf_tensors import block_entry, map_tensors
from loratools.tensorfiles.gguf_types import ValueType
from loratools.tensorfiles.gguf_writing import save_gguf

from ..gguf_models import FF, HIDDEN, KEYS, PER_HEAD, VOCABULARY, write_adapter, write_model

MIX = {"attn": "Q4_K", "attn_v": "Q6_K", "ffn": "Q5_K", "ffn_down": "Q8_0", "token_embd": "Q4_0"}
PREFIX = "base_model.model."


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("quant", ["keep", "q8_0", "dequantize"])
def test_a_base_gives_every_byte_back(tmp_path: Path, quant: str) -> None:
    base = write_model(tmp_path / "base.gguf", MIX)
    adapter = write_adapter(tmp_path / "adapter")
    merge_into_base(base, [(adapter, 0.5)], tmp_path / "merged.gguf", quant=quant)
    unmerge_from_base(tmp_path / "merged.gguf", [(adapter, 0.5)], tmp_path / "back.gguf", base=base)
    assert (tmp_path / "back.gguf").read_bytes() == base.read_bytes()
    unmerge_from_base(tmp_path / "merged.gguf", [], tmp_path / "all.gguf", base=base)
    assert (tmp_path / "all.gguf").read_bytes() == base.read_bytes()
    with pytest.raises(MatchError, match="is not what these adapters make"):
        unmerge_from_base(
            tmp_path / "merged.gguf", [(adapter, 1.5)], tmp_path / "other.gguf", base=base
        )


@pytest.mark.parametrize("size", [0.02, 1e-4])
def test_adapter_aware_codes_are_given_back_too(tmp_path: Path, size: float) -> None:
    base = write_model(tmp_path / "base.gguf", MIX)
    adapter, merged = write_adapter(tmp_path / "adapter", size=size), tmp_path / "merged.gguf"
    merge_into_base(base, adapter, merged, rounding="adapter-aware", rounding_strength=30)
    sizes = [
        [(t.name, t.type, t.stop - t.start) for t in read_gguf_header(path).tensors.values()]
        for path in (base, merged)
    ]
    assert sizes[0] == sizes[1]
    unmerge_from_base(merged, adapter, tmp_path / "back.gguf", base=base)
    assert (tmp_path / "back.gguf").read_bytes() == base.read_bytes() != merged.read_bytes()
    with pytest.raises(MatchError, match="is not what these adapters make"):
        unmerge_from_base(merged, [(adapter, -1.0)], tmp_path / "other.gguf", base=base)


def test_parts_are_restored_part_by_part(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", MIX, parts=3)
    adapter = write_adapter(tmp_path / "adapter")
    merge_into_base(base, adapter, tmp_path / "merged")
    unmerge_from_base(tmp_path / "merged" / base.name, adapter, tmp_path / "back", base=base)
    for part in (tmp_path / "back").iterdir():
        assert part.read_bytes() == (tmp_path / part.name).read_bytes()


def test_subtraction_from_few_bits_is_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", MIX)
    adapter = write_adapter(tmp_path / "adapter")
    merge_into_base(base, adapter, tmp_path / "merged.gguf")
    with pytest.raises(UnsupportedError, match=r"blk\.0\.\w+\.weight and 13 more") as caught:
        unmerge_from_base(tmp_path / "merged.gguf", adapter, tmp_path / "back.gguf")
    assert "--base" in (caught.value.hint or "")
    assert not (tmp_path / "back.gguf").exists()


def test_plain_numbers_are_subtracted_within_the_bound(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", {"attn": "F16", "ffn": "F32"})
    adapter = write_adapter(tmp_path / "adapter")
    merge_into_base(base, adapter, tmp_path / "merged.gguf")
    report = unmerge_from_base(tmp_path / "merged.gguf", adapter, tmp_path / "back.gguf")
    before, after = (map_tensors(read_gguf_header(p)) for p in (base, tmp_path / "back.gguf"))
    error = sum(float((after[n].double() - before[n].double()).square().sum()) for n in before)
    assert 0 < error**0.5 <= report.facts["error_bound"] < 0.1
    assert read_gguf_header(tmp_path / "back.gguf").word("loratools.merged.count") is None


def test_merges_are_counted_on(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", {"attn": "F16", "ffn": "F32"})
    one, two = write_adapter(tmp_path / "one"), write_adapter(tmp_path / "two")
    merge_into_base(base, [(one, 0.5)], tmp_path / "a.gguf")
    merge_into_base(tmp_path / "a.gguf", [(two, -0.25)], tmp_path / "b.gguf")
    assert summarize(tmp_path / "b.gguf").facts["merged_adapters"] == ["one at 0.5", "two at -0.25"]
    unmerge_from_base(tmp_path / "b.gguf", [(one, 0.5)], tmp_path / "c.gguf")
    assert summarize(tmp_path / "c.gguf").facts["merged_adapters"] == ["two at -0.25"]


# ── whole tensors ────────────────────────────────────────────────────────────────────────────


def bring(folder: Path, name: str, value: Tensor, **words: object) -> Path:
    """Write an adapter of one LoRA layer and one whole tensor."""
    folder.mkdir()
    module = f"{PREFIX}model.layers.0.mlp.up_proj"
    tensors = {
        f"{module}.lora_A.weight": torch.randn(4, HIDDEN),
        f"{module}.lora_B.weight": torch.randn(FF, 4),
        f"{PREFIX}{name}": value,
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    leaf = name.split(".")[-2]
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["up_proj"]}
    config |= words or {"modules_to_save": [leaf]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("name", "target", "shape"),
    [
        ("lm_head.weight", "output.weight", (VOCABULARY, HIDDEN)),
        ("model.embed_tokens.weight", "token_embd.weight", (VOCABULARY, HIDDEN)),
        ("model.layers.1.input_layernorm.weight", "blk.1.attn_norm.weight", (HIDDEN,)),
        (
            "model.layers.1.self_attn.v_proj.weight",
            "blk.1.attn_v.weight",
            (KEYS * PER_HEAD, HIDDEN),
        ),
    ],
)
def test_tensors_without_a_layout_are_replaced(
    tmp_path: Path, name: str, target: str, shape: tuple[int, ...]
) -> None:
    base = write_model(tmp_path / "base.gguf", {"token_embd": "Q8_0"})
    value = torch.randn(shape)
    merge_into_base(base, bring(tmp_path / "adapter", name, value), tmp_path / "out.gguf")
    before, after = (read_gguf_header(p) for p in (base, tmp_path / "out.gguf"))
    kind = before.tensors[target].type.name
    found, codec = map_tensors(after), GGML_TYPES[kind].codec
    wanted = codec.encode(value).view(torch.uint8).flatten()
    assert torch.equal(found[target].view(torch.uint8).flatten(), wanted)
    old = map_tensors(before)
    changed = {n for n in found if not torch.equal(found[n], old[n])}
    assert changed == {target, "blk.0.ffn_up.weight"}


def test_norms_are_shifted_as_the_architecture_stores_them(tmp_path: Path) -> None:
    gemma = {"general.architecture": Value(ValueType.STRING, "gemma")}
    base = write_model(tmp_path / "base.gguf", {}, head=False, **gemma)
    value = torch.rand(HIDDEN)
    adapter = bring(tmp_path / "adapter", "model.layers.1.input_layernorm.weight", value)
    merge_into_base(base, adapter, tmp_path / "out.gguf")
    found = map_tensors(read_gguf_header(tmp_path / "out.gguf"))
    assert torch.equal(found["blk.1.attn_norm.weight"], value + 1)


@pytest.mark.parametrize(
    ("name", "shape", "word"),
    [
        ("model.layers.1.self_attn.q_proj.weight", (HIDDEN, HIDDEN), "q_proj"),
        ("lm_head.weight", (VOCABULARY + 2, HIDDEN), "lm_head"),
        ("model.layers.1.oddity.weight", (HIDDEN, HIDDEN), "oddity"),
    ],
)
def test_what_has_no_place_is_named(
    tmp_path: Path, name: str, shape: tuple[int, ...], word: str
) -> None:
    base = write_model(tmp_path / "base.gguf", {})
    adapter = bring(tmp_path / "adapter", name, torch.randn(shape))
    with pytest.raises(LoratoolsError, match=word) as caught:
        merge_into_base(base, adapter, tmp_path / "out.gguf")
    assert "convert_hf_to_gguf" in (caught.value.hint or "")
    assert not (tmp_path / "out.gguf").exists()


def test_dora_goes_where_rows_stay(tmp_path: Path) -> None:
    """W' = magnitude · V / ‖V‖ by rows, V = W + ΔW (Liu et al. 2024)."""
    base = write_model(tmp_path / "base.gguf", {"ffn": "F32"})
    magnitude = torch.rand(FF)
    name = "model.layers.0.mlp.up_proj.lora_magnitude_vector"
    adapter = bring(tmp_path / "adapter", name, magnitude, use_dora=True)
    merge_into_base(base, adapter, tmp_path / "out.gguf")
    factors = load_file(adapter / "adapter_model.safetensors")
    module = f"{PREFIX}model.layers.0.mlp.up_proj"
    down, up = (factors[f"{module}.lora_{x}.weight"].double() for x in "AB")
    before, after = (map_tensors(read_gguf_header(p)) for p in (base, tmp_path / "out.gguf"))
    moved = before["blk.0.ffn_up.weight"].double() + 2 * up @ down
    wanted = magnitude.double()[:, None] * moved / moved.norm(dim=1, keepdim=True)
    torch.testing.assert_close(after["blk.0.ffn_up.weight"].double(), wanted, rtol=1e-5, atol=1e-6)


# ── image models ─────────────────────────────────────────────────────────────────────────────

SDXL = {
    "input_blocks.0.0.weight": (320, 4, 3, 3),
    "input_blocks.4.0.in_layers.2.weight": (640, 320, 3, 3),
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": (640, 640),
    "middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 2048),
    "middle_block.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
    "label_emb.0.0.weight": (64, 2816),
    "out.2.weight": (4, 320, 3, 3),
}
FOLDED = {
    "input_blocks.4.0.in_layers.2.weight": (7200, 256),
    "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": (1600, 256),
}
"""Rows that are no whole blocks stand in rows of 256, as ComfyUI-GGUF writes them."""


def write_sdxl(path: Path) -> dict[str, Tensor]:
    """Write a part of a U-Net in its authors' names; returns what each tensor stands for."""
    words = {"general.architecture": Value(ValueType.STRING, "sdxl")}
    entries, meant = [], {}
    for name, shape in SDXL.items():
        weight = 0.02 * torch.randn(shape)
        kind = "Q4_K" if name in FOLDED or ".to_k" in name else "F16"
        held = FOLDED.get(name, shape)
        if name in FOLDED:
            said = Value(ValueType.ARRAY, shape, ValueType.INT32)
            words[f"comfy.gguf.orig_shape.{name}"] = said
        codec = GGML_TYPES[kind].codec
        raw = codec.encode(weight.view(held))
        entries.append(block_entry(name, kind, held, raw))
        meant[name] = codec.decode(raw).view(shape)
    save_gguf(path, words, entries)
    return meant


def test_kohya_adapters_go_into_folded_tensors(tmp_path: Path) -> None:
    meant = write_sdxl(tmp_path / "unet.gguf")
    touched = list(FOLDED)
    factors = {}
    for name in touched:
        out, *inner = SDXL[name]
        module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        ones = [1] * (len(inner) - 1)
        factors[f"{module}.lora_up.weight"] = 0.1 * torch.randn(out, 4, *ones)
        factors[f"{module}.lora_down.weight"] = torch.randn(4, *inner)
        factors[f"{module}.alpha"] = torch.tensor(2.0)
    save_file(factors, tmp_path / "ink.safetensors")
    merge_into_base(tmp_path / "unet.gguf", tmp_path / "ink.safetensors", tmp_path / "out.gguf")
    before, after = (read_gguf_header(tmp_path / f"{n}.gguf") for n in ("unet", "out"))
    assert [(t.name, t.type, t.shape) for t in before.tensors.values()] == [
        (t.name, t.type, t.shape) for t in after.tensors.values()
    ]
    old, found, codec = map_tensors(before), map_tensors(after), GGML_TYPES["Q4_K"].codec
    for name, weight in meant.items():
        if name not in touched:
            assert torch.equal(found[name], old[name])
            continue
        module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        up, down = (factors[f"{module}.lora_{x}.weight"].double() for x in ("up", "down"))
        change = (0.5 * up.flatten(1) @ down.flatten(1)).view(weight.shape)
        wanted = codec.encode((weight.double() + change).float().view(-1, 256))
        assert float((wanted != found[name]).float().mean()) < 0.01
    back = tmp_path / "back.gguf"
    unmerge_from_base(
        tmp_path / "out.gguf", tmp_path / "ink.safetensors", back, base=tmp_path / "unet.gguf"
    )
    assert back.read_bytes() == (tmp_path / "unet.gguf").read_bytes()
