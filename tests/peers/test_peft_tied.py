"""Tied embeddings (reference cases 17-20, §2.7): one tensor on disk, two modules in the model.

PEFT is wrong wherever its merge adds a delta to the shared tensor: that moves both modules. The
oracle is the adapter's forward pass on the base, whose two modules PEFT keeps apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from . import builders, oracles
from .builders import Base, adapter_tensors, lora
from .conftest import Merge, Merged

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def assert_logits(base: Base, adapter: Path, merged: Merged) -> None:
    """Assert that the merged folder, loaded afresh, computes what the adapter model does."""
    expected = oracles.output(oracles.peft_model(base, adapter))
    assert (oracles.output(base.load(merged.folder)) - expected).abs().max() < 1e-4


def tie_flag(merged: Merged) -> bool:
    """Return the tie_word_embeddings of config.json."""
    settings: dict[str, Any] = json.loads((merged.folder / "config.json").read_text())
    return bool(settings["tie_word_embeddings"])


def deltas(adapter: Path) -> dict[str, torch.Tensor]:
    """Return ΔW of embedding and head, in float64, for an adapter whose scale is 2."""
    stored = adapter_tensors(adapter)
    found = {}
    if "model.embed_tokens.lora_embedding_A" in stored:
        found[EMBED] = oracles.embedding_delta(stored, "model.embed_tokens", 2.0)
    if "lm_head.lora_A.weight" in stored:
        found[HEAD] = oracles.linear_delta(stored, "lm_head", 2.0)
    return found


@pytest.mark.parametrize(
    "targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids="+".join
)
def test_lora_unties(llama_tied: Base, tmp_path: Path, merge: Merge, targets: list[str]) -> None:
    """Cases 17 and 18: each module gets its own delta, in a tensor of its own."""
    adapter = lora(llama_tied, tmp_path / "a", r=4, lora_alpha=8, target_modules=targets)
    merged = merge(llama_tied, adapter)
    shared = llama_tied.tensors[EMBED].double()
    for name in (EMBED, HEAD):
        expected = shared + deltas(adapter).get(name, 0)
        assert (merged.tensors[name].double() - expected).abs().max() < 1e-6
    assert set(merged.tensors) == set(llama_tied.tensors) | {HEAD}
    assert tie_flag(merged) is False
    assert merged.notes_on("tie")
    assert_logits(llama_tied, adapter, merged)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_kept_tied(llama_tied: Base, tmp_path: Path, merge: Merge, target: str) -> None:
    """Case 19: ensure_weight_tying stores one delta twice; the shared tensor gets it once."""
    adapter = lora(
        llama_tied,
        tmp_path / "a",
        r=4,
        lora_alpha=8,
        target_modules=[target],
        ensure_weight_tying=True,
    )
    both = deltas(adapter)
    assert (both[EMBED] - both[HEAD]).abs().max() < 1e-9
    merged = merge(llama_tied, adapter)
    expected = llama_tied.tensors[EMBED].double() + both[EMBED]
    assert (merged.tensors[EMBED].double() - expected).abs().max() < 1e-6
    assert_logits(llama_tied, adapter, merged)
    if HEAD in merged.tensors:
        assert not tie_flag(merged)
    else:
        assert set(merged.tensors) == set(llama_tied.tensors)
        assert tie_flag(merged)


def test_token_rows_of_the_shared_tensor(llama_tied: Base, tmp_path: Path, merge: Merge) -> None:
    """Case 20: rows of the input embedding are rows of the head as well; the tie holds."""
    adapter = lora(
        llama_tied, tmp_path / "a", r=4, target_modules=["q_proj"], trainable_token_indices=[9, 3]
    )
    merged = merge(llama_tied, adapter)
    expected = oracles.peft_merged(llama_tied, adapter)
    oracles.assert_agrees(merged.tensors, expected, llama_tied, atol=1e-6)
    assert tie_flag(merged) is True
    assert_logits(llama_tied, adapter, merged)


def test_token_rows_of_the_head_alone(llama_tied: Base, tmp_path: Path, merge: Merge) -> None:
    """§2.7: rows of the head alone untie it; PEFT's merge replaces them in the embedding too."""
    adapter = lora(
        llama_tied,
        tmp_path / "a",
        r=4,
        target_modules=["q_proj"],
        trainable_token_indices={"lm_head": [9, 3]},
    )
    merged = merge(llama_tied, adapter)
    assert tie_flag(merged) is False
    assert oracles.same_bits(merged.tensors[EMBED], llama_tied.tensors[EMBED])
    assert_logits(llama_tied, adapter, merged)


@pytest.mark.parametrize("module", ["lm_head", "embed_tokens"])
def test_saved_module_unties(llama_tied: Base, tmp_path: Path, merge: Merge, module: str) -> None:
    """§2.7: a saved copy of one module leaves the other as it was, in PEFT as here."""
    adapter = lora(
        llama_tied, tmp_path / "a", r=4, target_modules=["q_proj"], modules_to_save=[module]
    )
    merged = merge(llama_tied, adapter)
    saved, other = (HEAD, EMBED) if module == "lm_head" else (EMBED, HEAD)
    stored = {key.removeprefix("model."): value for key, value in adapter_tensors(adapter).items()}
    assert torch.equal(merged.tensors[saved], stored[saved.removeprefix("model.")])
    assert oracles.same_bits(merged.tensors[other], llama_tied.tensors[EMBED])
    assert tie_flag(merged) is False
    assert_logits(llama_tied, adapter, merged)


def test_saved_modules_kept_tied(llama_tied: Base, tmp_path: Path, merge: Merge) -> None:
    """§2.7: with ensure_weight_tying both copies in the file are the same."""
    adapter = lora(
        llama_tied,
        tmp_path / "a",
        r=4,
        target_modules=["q_proj"],
        modules_to_save=["embed_tokens"],
        ensure_weight_tying=True,
    )
    merged = merge(llama_tied, adapter)
    assert torch.equal(merged.tensors[EMBED], adapter_tensors(adapter)[EMBED])
    assert tie_flag(merged) is (HEAD not in merged.tensors)
    assert_logits(llama_tied, adapter, merged)


def test_other_layers_leave_the_tie(llama_tied: Base, tmp_path: Path, merge: Merge) -> None:
    """A tied base whose adapter touches neither module stays as it is."""
    adapter = lora(llama_tied, tmp_path / "a", r=4, target_modules=["q_proj", "down_proj"])
    merged = merge(llama_tied, adapter)
    expected = oracles.peft_merged(llama_tied, adapter)
    oracles.assert_agrees(merged.tensors, expected, llama_tied, atol=1e-6)
    assert tie_flag(merged) is True


@pytest.mark.parametrize(
    ("architecture", "target"),
    [("gpt2", "lm_head"), ("gpt2", "wte"), ("bert", "decoder"), ("bert", "word_embeddings")],
)
def test_other_names(
    request: pytest.FixtureRequest, tmp_path: Path, merge: Merge, architecture: str, target: str
) -> None:
    """Cases 17 and 18 where the two modules have other names, and a bias is tied as well."""
    base: Base = request.getfixturevalue(architecture)
    adapter = lora(base, tmp_path / "a", r=4, lora_alpha=8, target_modules=[target])
    merged = merge(base, adapter)
    assert tie_flag(merged) is False
    assert_logits(base, adapter, merged)
    assert (oracles.output(base.load(merged.folder)) - oracles.output(base.load())).abs().max() > 1


@pytest.mark.parametrize("said", [True, False], ids=["said", "by default"])
def test_tied_by_default(tmp_path: Path, merge: Merge, said: bool) -> None:
    """GPT-2 ties its head whether its config.json says so, or (on the Hub) not a word."""
    base = builders.gpt2(tmp_path / "base")
    settings = json.loads((base.folder / "config.json").read_text())
    settings.pop("tie_word_embeddings")
    settings |= {"tie_word_embeddings": True} if said else {}
    (base.folder / "config.json").write_text(json.dumps(settings))
    adapter = lora(base, tmp_path / "a", r=4, target_modules=["lm_head"])
    merged = merge(base, adapter)
    assert tie_flag(merged) is False
    assert_logits(base, adapter, merged)
