"""Heads of another size and buffers of whole numbers: what a saved module brings beside weights."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from . import builders, oracles
from .builders import Base, edited, lora
from .conftest import Merge, Merged


def classifier(folder: Path, labels: int | None) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    options = {} if labels is None else {"num_labels": labels, "ignore_mismatched_sizes": True}
    model: nn.Module = transformers.BertForSequenceClassification.from_pretrained(
        folder, dtype="auto", **options
    )
    return model


def building(base: Base, labels: int | None) -> Base:
    return dataclasses.replace(base, build=lambda folder: classifier(folder, labels))


@pytest.fixture
def topics(bert: Base, tmp_path: Path) -> Base:
    """A BERT classifier of three named topics."""
    model = classifier(bert.folder, 3)
    model.config.id2label = {0: "art", 1: "law", 2: "sea"}
    model.config.label2id = {"art": 0, "law": 1, "sea": 2}
    model.save_pretrained(tmp_path / "topics")
    return building(dataclasses.replace(bert, folder=tmp_path / "topics"), None)


def config_of(merged: Merged) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((merged.folder / "config.json").read_text())
    return found


def adapted(base: Base, folder: Path) -> Path:
    return lora(base, folder, r=2, target_modules=["query"], task_type="SEQ_CLS")


def test_resized_head(topics: Base, tmp_path: Path, merge: Merge) -> None:
    """Three topics become five: the config says so, and the model loads as it is."""
    five = building(topics, 5)
    adapter = adapted(five, tmp_path / "a")
    merged = merge(topics, adapter)
    assert config_of(merged)["id2label"] == {str(i): f"LABEL_{i}" for i in range(5)}
    assert config_of(merged)["label2id"] == {f"LABEL_{i}": i for i in range(5)}
    assert merged.notes_on("config.json", "id2label")
    logits = oracles.output(oracles.peft_model(five, adapter))
    reloaded = topics.load(merged.folder)
    assert (oracles.output(reloaded) - logits).abs().max() < 1e-4

    from loratools.merge import unmerge_from_base

    unmerge_from_base(merged.folder, adapter, tmp_path / "back", base=topics.folder)
    restored = json.loads((tmp_path / "back" / "config.json").read_text())
    assert restored == json.loads((topics.folder / "config.json").read_text())


def test_added_head(bert: Base, tmp_path: Path, merge: Merge) -> None:
    """A language model gains a head of four classes."""
    four = building(bert, 4)
    adapter = adapted(four, tmp_path / "a")
    merged = merge(bert, adapter)
    assert len(config_of(merged)["id2label"]) == 4
    logits = oracles.output(oracles.peft_model(four, adapter))
    assert (oracles.output(four.load(merged.folder)) - logits).abs().max() < 1e-4


def test_added_head_of_two(bert: Base, tmp_path: Path, merge: Merge) -> None:
    """Two classes are what a config without a word means."""
    merged = merge(bert, adapted(building(bert, None), tmp_path / "a"))
    assert "classifier.weight" in merged.tensors
    old, new = (folder / "config.json" for folder in (bert.folder, merged.folder))
    assert old.read_bytes() == new.read_bytes()


def test_same_number_of_classes(topics: Base, tmp_path: Path, merge: Merge) -> None:
    """A head retrained for the same classes keeps their names and the config's bytes."""
    merged = merge(topics, adapted(topics, tmp_path / "a"))
    old, new = (folder / "config.json" for folder in (topics.folder, merged.folder))
    assert old.read_bytes() == new.read_bytes()


BUFFER = "embeddings.position_ids"


def with_buffer(value: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, f"base_model.model.bert.{BUFFER}": value}


def with_base_buffer(base: Base, folder: Path, value: Tensor | None) -> Base:
    """Return a copy of a BERT base, as transformers of 2021 stored it, with its position ids."""
    import shutil

    shutil.copytree(base.folder, folder)
    file = folder / "model.safetensors"
    tensors = load_file(file) | ({} if value is None else {f"bert.{BUFFER}": value})
    save_file(tensors, file, {"format": "pt"})
    return dataclasses.replace(base, folder=folder)


# 2**24 + 1 has no float32 of its own.
ODD = torch.tensor([[0, 1, 2**24 + 1]])


@pytest.mark.parametrize("stored", [None, ODD - 1, ODD.to(torch.int32) - 1])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_whole_numbers(
    bert: Base, tmp_path: Path, merge: Merge, stored: Tensor | None, strength: float
) -> None:
    """modules_to_save takes a module's buffers along; they replace the base's, or are added."""
    base = with_base_buffer(bert, tmp_path / "base", stored)
    plain = lora(
        bert, tmp_path / "a", r=2, target_modules=["query"], modules_to_save=["embeddings"]
    )
    adapter = edited(plain, tmp_path / "b", tensors=with_buffer(ODD))
    merged = merge(base, (adapter, strength))
    buffer = merged.tensors[f"bert.{BUFFER}"]
    assert buffer.dtype == (torch.int64 if stored is None else stored.dtype)
    assert torch.equal(buffer.to(torch.int64), ODD)
    assert bool(merged.notes_on(BUFFER, "nothing to act on")) == (strength != 1.0)
    for name, tensor in base.tensors.items():
        if name == "bert.embeddings.word_embeddings.weight":
            saved = builders.adapter_tensors(adapter)[name]
            exact = tensor + strength * (saved - tensor)
            assert torch.allclose(merged.tensors[name], exact, atol=1e-6)
