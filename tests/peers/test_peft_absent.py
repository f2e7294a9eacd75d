"""Files that lost layers which their config announces: PEFT loads them with a word, or none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from .builders import LINEARS, Base, Tensors, edited, lora
from .conftest import Merge

SAID = "for which the file has nothing"


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    """Return an edit that drops the tensors whose names hold one of the parts."""
    return lambda tensors: {n: t for n, t in tensors.items() if not any(p in n for p in parts)}


LOST: dict[str, tuple[dict[str, Any], tuple[str, ...], list[str]]] = {
    # the adapter's words, what its file loses, what the warning names
    "one layer": (
        {"target_modules": LINEARS},
        ("layers.1.mlp.up_proj",),
        ["model.layers.1.mlp.up_proj"],
    ),
    "all layers of a kind": (
        {"target_modules": ["q_proj", "v_proj"]},
        ("v_proj",),
        ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.v_proj"],
    ),
    "a whole block": (
        {"target_modules": ["q_proj", "down_proj"]},
        ("layers.0.",),
        ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"],
    ),
    "table and head": (
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
        ("embed", "lm_head"),
        ["model.embed_tokens", "lm_head"],
    ),
    "expression": (
        {"target_modules": r".*\.(q|k)_proj"},
        ("layers.1.self_attn.k_proj",),
        ["model.layers.1.self_attn.k_proj"],
    ),
    "everything": (
        {"target_modules": "all-linear"},
        ("layers.0.mlp.gate_proj",),
        ["model.layers.0.mlp.gate_proj"],
    ),
}


@pytest.mark.parametrize(("words", "lost", "named"), LOST.values(), ids=LOST)
def test_lost_layers(
    words: Mapping[str, Any],
    lost: tuple[str, ...],
    named: list[str],
    llama: Base,
    tmp_path: Path,
    merge: Merge,
) -> None:
    folder = edited(
        lora(llama, tmp_path / "a", r=2, **words), tmp_path / "b", tensors=without(*lost)
    )
    merged = merge(llama, folder)
    (note,) = merged.notes_on(SAID)
    assert f"names {len(named)} modules" in note
    assert all(name in note for name in named)
    assert [n.level for n in merged.report.notes if SAID in n.message] == ["warning"]
    assert merge(llama, tmp_path / "a", name="whole").notes_on(SAID) == []


NARROWED: dict[str, dict[str, Any]] = {
    "some layers": {"target_modules": LINEARS, "layers_to_transform": [1]},
    "one layer": {"target_modules": LINEARS, "layers_to_transform": 0, "layers_pattern": "layers"},
    "excluded": {
        "target_modules": LINEARS,
        "exclude_modules": ["up_proj", "layers.0.mlp.down_proj"],
    },
    "excluded by expression": {"target_modules": LINEARS, "exclude_modules": r".*layers\.0\..*"},
    "saved as a whole": {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["lm_head"]},
    "expression": {"target_modules": r".*layers\.0\..*_proj"},
    "everything": {"target_modules": "all-linear"},
}


@pytest.mark.parametrize("words", NARROWED.values(), ids=NARROWED)
def test_no_false_alarm(
    words: Mapping[str, Any], llama: Base, tmp_path: Path, merge: Merge
) -> None:
    """What the config itself leaves out is not missed."""
    merged = merge(llama, lora(llama, tmp_path / "a", r=2, **words))
    assert merged.notes_on(SAID) == []


def test_block_strengths_leave_out_on_purpose(llama: Base, tmp_path: Path, merge: Merge) -> None:
    folder = lora(llama, tmp_path / "a", r=2, target_modules=LINEARS)
    merged = merge(llama, folder, block_strengths=r"layers\.0\.=0")
    assert merged.notes_on(SAID) == []
