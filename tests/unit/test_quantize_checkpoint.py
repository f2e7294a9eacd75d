"""Whole models between GGUF and a checkpoint: layouts, names, and what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.basetensors import BaseTensor
from loratools.codecs.ggml import GGML_TYPES
from loratools.deltas import ExpertLoRA, LoRA
from loratools.errors import MatchError, OutputError, UnsupportedError
from loratools.keymaps.gguf_base import base_from_config
from loratools.keymaps.gguf_model import GGUFModel, Step
from loratools.keymaps.gguf_models import MODELS
from loratools.keymaps.gguf_ops import Parts
from loratools.keymaps.gguf_to import ops_of
from loratools.keymaps.gguf_vectors import VECTORS
from loratools.keymaps.gguf_weights import gather_weights
from loratools.quantize import dequantize_base, quantize_base
from loratools.streaming.gathering import gathered
from loratools.tensorfiles.gguf import read_gguf_header
from loratools.tensorfiles.gguf_reading import Value
from loratools.tensorfiles.gguf_tensors import block_entry, map_tensors
from loratools.tensorfiles.gguf_types import ValueType
from loratools.tensorfiles.gguf_writing import save_gguf

from ..gguf_cases import adapter_for, config_of, step_sets
from ..gguf_models import (
    BLOCKS,
    HEADS,
    HIDDEN,
    HUGGING_FACE,
    KEYS,
    PER_HEAD,
    SHAPES,
    VOCABULARY,
    words,
)

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "num_attention_heads": HEADS, "num_key_value_heads": KEYS, "num_hidden_layers": BLOCKS,
    "vocab_size": VOCABULARY, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
UNDONE_ONLY_IN_FACTORS = {
    "latent_kv", "latent_heads", "qkv_fusing", "expert_rows_turned", "experts_gate_up_turned",
    "experts_gate_up_woven",
}  # fmt: skip
"""Layouts that are undone by joining matrices of different columns."""
NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}


def checkpoint() -> dict[str, Tensor]:
    """A tiny Llama in Hugging Face's names and layout."""
    made = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN),
        "model.norm.weight": torch.rand(HIDDEN),
        "lm_head.weight": torch.randn(VOCABULARY, HIDDEN),
    }
    for block in range(BLOCKS):
        for name, shape in SHAPES.items():
            made[f"model.layers.{block}.{HUGGING_FACE[name]}.weight"] = torch.randn(shape)
        for name in NORMS.values():
            made[f"model.layers.{block}.{name}.weight"] = torch.rand(HIDDEN)
    return made


def as_gguf(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same in GGUF's names, queries and keys turned one row at a time."""
    made = {
        "token_embd.weight": weights["model.embed_tokens.weight"],
        "output_norm.weight": weights["model.norm.weight"],
        "output.weight": weights["lm_head.weight"],
    }
    for block in range(BLOCKS):
        for ours, theirs in {**HUGGING_FACE, **NORMS}.items():
            weight = weights[f"model.layers.{block}.{theirs}.weight"]
            heads = {"attn_q": HEADS, "attn_k": KEYS}.get(ours)
            made[f"blk.{block}.{ours}.weight"] = turned(weight, heads) if heads else weight
    return made


def turned(weight: Tensor, heads: int) -> Tensor:
    rows = torch.empty_like(weight)
    for head in range(heads):
        for place in range(PER_HEAD // 2):
            for half in range(2):
                at = head * PER_HEAD
                rows[at + 2 * place + half] = weight[at + half * PER_HEAD // 2 + place]
    return rows


def write_gguf(path: Path, tensors: dict[str, Tensor], kind: str, **more: Value) -> Path:
    entries = []
    for name, weight in tensors.items():
        own = kind if weight.dim() > 1 else "F32"
        raw = GGML_TYPES[own].codec.encode(weight)
        entries.append(block_entry(name, own, tuple(weight.shape), raw))
    save_gguf(path, words(**more), entries)
    return path


def write_folder(folder: Path, tensors: dict[str, Tensor] | None, **more: object) -> Path:
    folder.mkdir()
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps({**CONFIG, **more}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def test_a_lone_file_has_the_checkpoints_names_and_rows(tmp_path: Path) -> None:
    weights = checkpoint()
    model = write_gguf(tmp_path / "model.gguf", as_gguf(weights), "Q8_0")
    report = dequantize_base(model, tmp_path / "out.safetensors", dtype="fp32")
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == weights.keys()
    codec = GGML_TYPES["Q8_0"].codec
    for name, weight in weights.items():
        wanted = codec.decode(codec.encode(weight)) if weight.dim() > 1 else weight
        assert torch.equal(found[name], wanted), name
    assert any("--base-config" in note.message for note in report.warnings)


@pytest.mark.parametrize("with_weights", [False, True])
def test_a_folder_brings_config_and_tokenizer(tmp_path: Path, with_weights: bool) -> None:
    weights = checkpoint()
    model = write_gguf(tmp_path / "model.gguf", as_gguf(weights), "F16")
    folder = write_folder(
        tmp_path / "base",
        weights if with_weights else None,
        quantization_config={"quant_method": "gguf"} if not with_weights else None,
    )
    dequantize_base(model, tmp_path / "out", base_config=folder)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], weights[name].half()) for name in weights)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["torch_dtype"] == "float16"
    assert not config.get("quantization_config")


def test_a_template_gives_names_order_and_tokenizer(tmp_path: Path) -> None:
    tuned = checkpoint()
    folder = write_folder(tmp_path / "tuned", tuned)
    other = as_gguf(checkpoint())
    freqs = torch.rand(PER_HEAD // 2)
    template = write_gguf(tmp_path / "t.gguf", {**other, "rope_freqs.weight": freqs}, "Q4_K")
    quantize_base(folder, tmp_path / "out.gguf", to="q8_0", template=template)
    header, theirs = read_gguf_header(tmp_path / "out.gguf"), read_gguf_header(template)
    assert list(header.tensors) == list(theirs.tensors)
    assert all(header.word(key) == theirs.word(key) for key in theirs.metadata)
    assert header.word("general.file_type") == 7
    found, codec = map_tensors(header), GGML_TYPES["Q8_0"].codec
    assert torch.equal(found["rope_freqs.weight"], freqs)
    for name, weight in as_gguf(tuned).items():
        wanted = codec.encode(weight) if weight.dim() > 1 else weight
        assert torch.equal(found[name], wanted), name


def test_tied_heads_follow_the_template(tmp_path: Path) -> None:
    tuned = checkpoint()
    del tuned["lm_head.weight"]
    folder = write_folder(tmp_path / "tuned", tuned, tie_word_embeddings=True)
    template = write_gguf(tmp_path / "t.gguf", as_gguf(checkpoint()), "F16")
    quantize_base(folder, tmp_path / "out.gguf", to="f32", template=template)
    found = map_tensors(read_gguf_header(tmp_path / "out.gguf"))
    assert torch.equal(found["output.weight"], tuned["model.embed_tokens.weight"])


def refused(error: type[Exception], word: str, output: Path, run: object) -> None:
    with pytest.raises(error) as caught:
        run()  # type: ignore[operator]
    assert word in str(caught.value)
    assert not output.exists()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    weights = checkpoint()
    good = as_gguf(weights)
    out, folder = tmp_path / "out.gguf", write_folder(tmp_path / "tuned", weights)

    def by(template: Path) -> object:
        return lambda: quantize_base(folder, out, to="q8_0", template=template)

    less = {name: t for name, t in good.items() if name != "blk.1.ffn_up.weight"}
    refused(
        MatchError, "blk.1.ffn_up.weight", out, by(write_gguf(tmp_path / "a.gguf", less, "F16"))
    )
    more = {**good, "blk.2.ffn_up.weight": torch.zeros(8, HIDDEN)}
    refused(
        MatchError, "blk.2.ffn_up.weight", out, by(write_gguf(tmp_path / "b.gguf", more, "F16"))
    )
    wide = {**good, "output.weight": torch.zeros(VOCABULARY + 2, HIDDEN)}
    refused(MatchError, "output.weight", out, by(write_gguf(tmp_path / "c.gguf", wide, "F16")))
    qwen = {"general.architecture": Value(ValueType.STRING, "qwen3")}
    refused(MatchError, "qwen3", out, by(write_gguf(tmp_path / "d.gguf", good, "F16", **qwen)))
    strange = {**good, "blk.0.oddity.weight": torch.zeros(8, HIDDEN)}
    model = write_gguf(tmp_path / "e.gguf", strange, "F16")
    lone = tmp_path / "lone.safetensors"
    refused(UnsupportedError, "blk.0.oddity.weight", lone, lambda: dequantize_base(model, lone))


def test_a_folder_needs_a_config(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "model.gguf", as_gguf(checkpoint()), "Q8_0")
    with pytest.raises(OutputError, match="one file"):
        dequantize_base(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arch", VECTORS)
def test_norms_have_the_names_of_gguf_py(arch: str) -> None:
    """Names that its map lacks for an architecture are of tensors that such models lack."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    known = gguf.get_tensor_name_map(numbers[arch], 2)
    found = 0
    for step in VECTORS[arch]:
        for source, target in zip(step.sources, step.targets, strict=True):
            theirs = known.get_name(source.format(i=1))
            assert theirs in (None, target.format(i=1)), source
            found += theirs is not None
    assert found >= min(len(VECTORS[arch]), 2)


# ── every layout, against what the steps do to low-rank factors ──────────────────────────────


def named(model: GGUFModel) -> str:
    return f"{model.arch}-{model.classes[0]}"


def dense(part: LoRA | ExpertLoRA, *, embedding: bool = False) -> Tensor:
    product = part.up.double() @ part.down.double() * part.scale
    return product.mT if embedding else product


def sources_of(step: Step, base: object) -> list[LoRA | ExpertLoRA]:
    layers = list(adapter_for((step,), base).layers.values())  # type: ignore[arg-type]
    return [part for part in layers if isinstance(part, (LoRA, ExpertLoRA))]


def read(tensor: BaseTensor) -> Tensor:
    assert tensor.rows is not None
    rows = tensor.shape[0] if len(tensor.shape) == 2 else tensor.shape[0] * tensor.shape[1]
    halves = [tensor.rows(0, rows // 3), tensor.rows(rows // 3, rows)]
    return torch.cat(halves).view(tensor.shape)


@pytest.mark.parametrize("model", [m for m in MODELS if not m.refused], ids=named)
def test_dense_weights_go_where_factors_go(model: GGUFModel, tmp_path: Path) -> None:
    base = base_from_config(config_of(model), named(model))
    for step in [step for steps in step_sets(model) for step in steps]:
        if step.targets == ("token_embd",):
            continue
        parts = sources_of(step, base)
        weights = [dense(part).float() for part in parts]
        given = [
            BaseTensor(f"{n}", "F32", tuple(w.shape), tmp_path, values=w)
            for n, w in enumerate(weights)
        ]
        there = [*parts]
        moved: Parts = there  # type: ignore[assignment]
        for op in ops_of(step, base, 1):
            moved = op.do(moved)
        gathers = gather_weights(step, base, 1, [w.shape for w in given])
        stored = []
        for gather, part in zip(gathers, moved, strict=True):
            found = gathered("x", gather, given)
            wanted = dense(part).float()  # type: ignore[arg-type]
            assert found.shape == tuple(wanted.shape)
            torch.testing.assert_close(read(found), wanted, rtol=1e-5, atol=1e-6)
            stored.append(BaseTensor("y", "F32", found.shape, tmp_path, values=read(found)))
        try:
            back = gather_weights(step, base, 1, [s.shape for s in stored], undo=True)
        except UnsupportedError:
            assert step.layout.__name__ in UNDONE_ONLY_IN_FACTORS  # type: ignore[union-attr]
            continue
        for gather, weight in zip(back, weights, strict=True):
            again = read(gathered("z", gather, stored))
            torch.testing.assert_close(again, weight, rtol=1e-5, atol=1e-6)
