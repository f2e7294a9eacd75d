"""Taking an adapter out again: reference case 34, §2.12."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import LoratoolsError, MatchError, UnsupportedError
from loratools.merge import unmerge_from_base

from . import builders, oracles
from .builders import LINEARS, Base, Tensors, lora
from .conftest import Merge
from .test_peft_layers import noise


def unmerged(merged: Path, adapters: Any, output: Path, **options: Any) -> Tensors:
    """Unmerge with loratools and return every tensor."""
    unmerge_from_base(merged, adapters, output, **options)
    return builders.load_tensors(output)


def peft_round_trip(base: Base, adapter: Path) -> Tensors:
    """Return the weights after PEFT merges and unmerges in memory."""
    model = oracles.peft_model(base, adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
        model.unmerge_adapter()
        return base.to_disk(oracles.state(model.unload()))


def test_subtracted(wide_bf16: Base, tmp_path: Path, merge: Merge) -> None:
    """Without the base: PEFT's subtraction at worst, and no further off than a rounding or two."""
    adapter = lora(wide_bf16, tmp_path / "a", r=8, target_modules="all-linear")
    merged = merge(wide_bf16, adapter)
    back = unmerged(merged.folder, adapter, tmp_path / "back")
    base = wide_bf16.tensors
    peft = peft_round_trip(wide_bf16, adapter)
    assert oracles.error(back, base) <= oracles.error(peft, base)
    assert oracles.error(back, base) < 0.1 * oracles.error(merged.tensors, base)


def test_subtracted_fp32(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """Without the base, in float32: within 1e-6 of the original."""
    adapter = lora(llama, tmp_path / "a", r=8, target_modules="all-linear")
    merged = merge(llama, adapter).folder
    oracles.assert_close(unmerged(merged, adapter, tmp_path / "back"), llama.tensors)


def test_deviation_is_reported(wide_bf16: Base, tmp_path: Path, merge: Merge) -> None:
    """The report bounds how far the result lies from the original, in the Frobenius norm."""
    adapter = lora(wide_bf16, tmp_path / "a", r=8, target_modules="all-linear")
    merged = merge(wide_bf16, adapter).folder
    report = unmerge_from_base(merged, adapter, tmp_path / "back")
    actual = oracles.error(builders.load_tensors(tmp_path / "back"), wide_bf16.tensors)
    assert 0 < actual <= report.facts["error_bound"] < 20 * actual


def test_copied_back(llama_bf16: Base, tmp_path: Path, merge: Merge) -> None:
    """With the base at hand: the original's bits, whatever the adapter was."""
    adapter = lora(
        llama_bf16,
        tmp_path / "a",
        r=4,
        target_modules=LINEARS,
        use_dora=True,
        modules_to_save=["norm", "lm_head"],
        trainable_token_indices=[3, 1],
    )
    merged = merge(llama_bf16, adapter).folder
    back = unmerged(merged, adapter, tmp_path / "back", base=llama_bf16.folder)
    assert oracles.changed(back, llama_bf16) == set()
    assert sorted(back) == sorted(llama_bf16.tensors)


def test_several_with_strengths(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """What was merged at strengths is taken out at the same strengths."""
    adapters = [
        (lora(llama, tmp_path / "a", seed=1, r=4, target_modules=LINEARS), 0.5),
        (lora(llama, tmp_path / "b", seed=2, r=4, target_modules=LINEARS), -1.5),
    ]
    merged = merge(llama, adapters).folder
    oracles.assert_close(unmerged(merged, adapters, tmp_path / "back"), llama.tensors)


def test_layers_of_other_kinds(tmp_path: Path, merge: Merge) -> None:
    """Convolutions subtract as linear layers do."""
    base = builders.custom(tmp_path / "base", builders.Convs)
    adapter = lora(base, tmp_path / "a", r=4, target_modules=["line", "square", "cube"])
    merged = merge(base, adapter).folder
    unmerged(merged, adapter, tmp_path / "back")
    gap = oracles.output(base.load(tmp_path / "back"), noise(2, 1200)) - oracles.output(
        base.load(), noise(2, 1200)
    )
    assert gap.abs().max() < 1e-4


IRREVERSIBLE: dict[str, dict[str, Any]] = {
    "DoRA": {"use_dora": True},
    "saved module": {"modules_to_save": ["lm_head"]},
    "token rows": {"trainable_token_indices": [1, 2]},
    "PiSSA": {"init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("kind", IRREVERSIBLE)
def test_irreversible(llama: Base, tmp_path: Path, merge: Merge, kind: str) -> None:
    """§2.12: what the merged files do not determine is refused, and the base would settle it."""
    adapter = lora(llama, tmp_path / "a", r=4, target_modules=["q_proj"], **IRREVERSIBLE[kind])
    merged = merge(llama, adapter).folder
    with pytest.raises(UnsupportedError) as refusal:
        unmerge_from_base(merged, adapter, tmp_path / "back")
    assert "base" in f"{refusal.value.message} {refusal.value.hint}"
    assert not (tmp_path / "back").exists()
    back = unmerged(merged, adapter, tmp_path / "back", base=llama.folder)
    assert oracles.changed(back, llama) == set()


def test_added_and_untied_tensors_go(llama_tied: Base, tmp_path: Path, merge: Merge) -> None:
    """With the base: the head that untying added is gone, and the config ties again."""
    adapter = lora(llama_tied, tmp_path / "a", r=4, target_modules=["lm_head"])
    merged = merge(llama_tied, adapter)
    assert "lm_head.weight" in merged.tensors
    back = unmerged(merged.folder, adapter, tmp_path / "back", base=llama_tied.folder)
    assert sorted(back) == sorted(llama_tied.tensors)
    assert oracles.changed(back, llama_tied) == set()
    logits = oracles.output(llama_tied.load(tmp_path / "back"))
    assert (logits - oracles.output(llama_tied.load())).abs().max() == 0


def test_another_adapter(llama: Base, gpt2: Base, tmp_path: Path, merge: Merge) -> None:
    """An adapter of another model has nothing to take out."""
    adapter = lora(gpt2, tmp_path / "a", r=4, target_modules=["c_attn"])
    with pytest.raises(LoratoolsError):
        unmerge_from_base(llama.folder, adapter, tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_what_was_not_merged(tmp_path: Path, merge: Merge, dtype: torch.dtype) -> None:
    """Another base, another adapter or another strength is noticed before anything is copied."""

    base = builders.llama(tmp_path / "base", dtype)
    other = builders.llama(tmp_path / "other", dtype, initializer_range=0.1)
    adapter = lora(base, tmp_path / "a", r=4, target_modules=["q_proj", "down_proj"])
    stranger = lora(base, tmp_path / "b", r=4, target_modules=["q_proj"], seed=99)
    folder = merge(base, adapter).folder
    wrong = [(other.folder, [adapter]), (base.folder, [stranger]), (base.folder, [(adapter, 0.5)])]
    for number, (given, adapters) in enumerate(wrong):
        with pytest.raises(MatchError, match=r"(q|down)_proj"):
            unmerge_from_base(folder, adapters, tmp_path / f"out{number}", base=given)
        assert not (tmp_path / f"out{number}").exists()
    unmerge_from_base(folder, [adapter], tmp_path / "out", base=base.folder)
    assert oracles.changed(builders.load_tensors(tmp_path / "out"), base) == set()
