"""Tensors that replace the base's: biases, saved modules, token rows, vocabularies (14-16, 21)."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch

from . import builders, oracles
from .builders import VOCAB, Base, Tensors, adapter_tensors, lora
from .conftest import Merge


@pytest.mark.parametrize("kind", ["all", "lora_only"])
def test_saved_biases(llama_biased: Base, tmp_path: Path, merge: Merge, kind: str) -> None:
    """Case 14: saved biases are the trained values, not deltas."""
    adapter = lora(llama_biased, tmp_path / "a", r=4, target_modules=["q_proj"], bias=kind)
    merged = merge(llama_biased, adapter).tensors
    expected = oracles.peft_merged(llama_biased, adapter)
    oracles.assert_agrees(merged, expected, llama_biased, atol=1e-6)
    for key, bias in adapter_tensors(adapter).items():
        if key.endswith(".bias"):
            assert torch.equal(merged[key.replace(".base_layer", "")], bias)


@pytest.mark.parametrize("architecture", ["llama", "bert"])
def test_new_head(
    request: pytest.FixtureRequest, tmp_path: Path, merge: Merge, architecture: str
) -> None:
    """Case 15: a classification head which the base lacks is added; the rest of the base stays."""
    language_model: Base = request.getfixturevalue(architecture)
    name, head, targets = {
        "llama": ("LlamaForSequenceClassification", {"score.weight"}, ["q_proj", "v_proj"]),
        "bert": (
            "BertForSequenceClassification",
            {"classifier.weight", "classifier.bias"},
            ["query", "value"],
        ),
    }[architecture]
    base = dataclasses.replace(language_model, build=builders.auto_class(name))
    adapter = lora(base, tmp_path / "a", r=4, target_modules=targets, task_type="SEQ_CLS")
    merged = merge(base, adapter)
    peft = oracles.peft_merged(base, adapter)
    known = base.tensors
    expected = known | {key: peft[key] for key in peft if key in known or key in head}
    oracles.assert_agrees(merged.tensors, expected, base, atol=1e-6)
    assert set(merged.tensors) - set(known) == head
    logits = oracles.output(oracles.peft_model(base, adapter), oracles.TOKENS[:1])
    reloaded = oracles.output(base.load(merged.folder), oracles.TOKENS[:1])
    assert (reloaded - logits).abs().max() < 1e-4


def test_new_head_in_a_sharded_base(llama_bf16: Base, tmp_path: Path, merge: Merge) -> None:
    """Case 15: the index names the new tensor, and total_size counts it."""
    build = builders.auto_class("LlamaForSequenceClassification")
    base = dataclasses.replace(llama_bf16, build=build)
    adapter = lora(base, tmp_path / "a", r=4, target_modules=["q_proj"], task_type="SEQ_CLS")
    merged = merge(base, adapter)
    index = json.loads((merged.folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(base.tensors) | {"score.weight"}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.tensors.values())
    home = merged.folder / index["weight_map"]["score.weight"]
    assert "score.weight" in builders.load_tensors(home)


def test_modules_to_save_matches_by_the_end_of_a_name(
    llama: Base, tmp_path: Path, merge: Merge
) -> None:
    """Case 16: "norm" captured every *norm; the file says which."""
    adapter = lora(llama, tmp_path / "a", r=4, target_modules=["q_proj"], modules_to_save=["norm"])
    merged = merge(llama, adapter).tensors
    oracles.assert_agrees(merged, oracles.peft_merged(llama, adapter), llama, atol=1e-6)
    norms = {name for name in merged if name.endswith("norm.weight")}
    assert len(norms) == 5
    assert norms <= oracles.changed(merged, llama)


def test_whole_blocks_saved(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """§1.6: an entry of modules_to_save may be a container."""
    adapter = lora(llama, tmp_path / "a", r=4, target_modules=["q_proj"], modules_to_save=["mlp"])
    merged = merge(llama, adapter).tensors
    oracles.assert_agrees(merged, oracles.peft_merged(llama, adapter), llama, atol=1e-6)


def test_replacements_take_the_dtype_of_the_base(
    llama_bf16: Base, tmp_path: Path, merge: Merge
) -> None:
    """§1.6: a float32 copy saved for a bf16 tensor is rounded to bf16, and the report says so."""
    original = lora(
        llama_bf16, tmp_path / "a", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    adapter = builders.edited(
        original,
        tmp_path / "b",
        tensors=lambda t: {
            key: value.float() + 1e-4 if "lm_head" in key else value for key, value in t.items()
        },
    )
    merged = merge(llama_bf16, adapter)
    oracles.assert_agrees(merged.tensors, oracles.peft_merged(llama_bf16, adapter), llama_bf16)
    assert merged.notes_on("lm_head")


def test_token_rows(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """§1.7: rows in the order of the config's list, on the embedding and on the head."""
    rows = {"embed_tokens": [9, 3, 5], "lm_head": [1, 2]}
    adapter = lora(
        llama, tmp_path / "a", r=4, target_modules=["q_proj"], trainable_token_indices=rows
    )
    merged = merge(llama, adapter).tensors
    oracles.assert_agrees(merged, oracles.peft_merged(llama, adapter), llama, atol=1e-6)
    embedding = merged["model.embed_tokens.weight"]
    delta = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert torch.equal(embedding[[9, 3, 5]], adapter_tensors(adapter)[delta])
    kept = [row for row in range(VOCAB) if row not in (9, 3, 5)]
    assert torch.equal(embedding[kept], llama.tensors["model.embed_tokens.weight"][kept])


def test_token_rows_alone(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """§1.5: the adapter type TRAINABLE_TOKENS."""
    from peft import TrainableTokensConfig

    config = TrainableTokensConfig(token_indices=[7, 0, 40])
    adapter = builders.save(builders.train(llama, config), tmp_path / "a")
    merged = merge(llama, adapter).tensors
    oracles.assert_agrees(merged, oracles.peft_merged(llama, adapter), llama, atol=0)
    assert oracles.changed(merged, llama) == {"model.embed_tokens.weight"}


def test_token_rows_over_a_saved_embedding(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """§1.7: first the whole saved matrix, then the rows.

    PEFT is wrong: the model it loads such an adapter into cannot run, and its merge leaves the
    wrappers in place. What they hold is the formula.
    """
    original = lora(
        llama,
        tmp_path / "a",
        r=4,
        target_modules=["q_proj"],
        trainable_token_indices=[5, 3],
        modules_to_save=["embed_tokens"],
    )
    saved = "model.embed_tokens.token_adapter.base_layer.weight"

    def move(tensors: Tensors) -> Tensors:
        key = builders.PREFIX + saved
        return tensors | {key: tensors[key] + 0.5}

    adapter = builders.edited(original, tmp_path / "b", tensors=move)
    stored = adapter_tensors(adapter)
    expected = stored[saved].clone()
    expected[[5, 3]] = stored["model.embed_tokens.token_adapter.trainable_tokens_delta"]
    peft = oracles.peft_merged(llama, adapter)
    assert torch.equal(peft["model.embed_tokens.modules_to_save.default.weight"], expected)
    with pytest.raises(ValueError, match="unknown layer type"):
        oracles.output(oracles.peft_model(llama, adapter))
    assert torch.equal(merge(llama, adapter).tensors["model.embed_tokens.weight"], expected)


def grown(base: Base, rows: int) -> Base:
    """Return the base with ``rows`` more words, as a trainer resizes it after loading."""

    def build(folder: Path) -> torch.nn.Module:
        model = base.build(folder)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.resize_token_embeddings(VOCAB + rows)
        return model

    return dataclasses.replace(base, build=build)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "embed_tokens", "lm_head"]])
def test_grown_vocabulary(llama: Base, tmp_path: Path, merge: Merge, targets: list[str]) -> None:
    """Case 21: the adapter's larger embedding and head are the weights; vocab_size follows."""
    larger = grown(llama, 4)
    adapter = lora(larger, tmp_path / "a", r=4, target_modules=targets)
    merged = merge(llama, adapter)
    expected = oracles.peft_merged(larger, adapter)
    oracles.assert_agrees(merged.tensors, expected, llama, atol=1e-6)
    assert json.loads((merged.folder / "config.json").read_text())["vocab_size"] == VOCAB + 4
    tokens = torch.arange(VOCAB - 8, VOCAB + 4).reshape(1, 12)
    logits = oracles.output(oracles.peft_model(larger, adapter), tokens)
    assert (oracles.output(llama.load(merged.folder), tokens) - logits).abs().max() < 1e-4


def test_saved_embeddings(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """§1.5: save_embedding_layers=True stores embedding and head though nothing targets them."""
    from peft import LoraConfig

    model = builders.train(llama, LoraConfig(r=4, target_modules=["q_proj"]))
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(0.5)
    adapter = builders.save(model, tmp_path / "a", save_embedding_layers=True)
    merged = merge(llama, adapter).tensors
    oracles.assert_agrees(merged, oracles.peft_merged(llama, adapter), llama, atol=1e-6)
    assert "model.embed_tokens.weight" in oracles.changed(merged, llama)
