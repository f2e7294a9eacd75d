"""Adapters, bases and destinations that are refused: reference case 41.

Every refusal names the culprit, and leaves base and destination's folder as they were.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import errors
from loratools.errors import (
    InputError,
    LoratoolsError,
    MalformedAdapterError,
    MatchError,
    NonFiniteError,
    OutputError,
    UnsupportedError,
)

from . import builders, oracles
from .builders import LINEARS, PREFIX, Base, Tensors, lora
from .conftest import Merge

MODULE = "model.layers.0.self_attn.q_proj"
DOWN, UP = (f"{PREFIX}{MODULE}.lora_{side}.weight" for side in "AB")


@pytest.fixture(scope="module")
def sound(llama: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of linear layers with nothing wrong in it."""
    folder = tmp_path_factory.mktemp("sound") / "a"
    return lora(llama, folder, r=4, target_modules=LINEARS)


def digest(folder: Path) -> dict[str, str]:
    """Return the hash of every file below a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_refused(
    base: Base,
    adapter: Path,
    folder: Path,
    kind: type[LoratoolsError] | tuple[type[LoratoolsError], ...],
    *words: str,
    **options: Any,
) -> LoratoolsError:
    """Assert that the merge fails with an error that says every word, and writes nothing."""
    from loratools.merge import merge_into_base

    folder.mkdir()
    before = digest(base.folder)
    with pytest.raises(kind) as refusal:
        merge_into_base(base.folder, adapter, folder / "merged", **options)
    said = f"{refusal.value.message} {refusal.value.hint}"
    assert all(word in said for word in words), said
    assert list(folder.iterdir()) == []
    assert digest(base.folder) == before
    return refusal.value


def without(*keys: str) -> Callable[[Tensors], Tensors]:
    """Return an edit that drops keys."""
    return lambda tensors: {key: value for key, value in tensors.items() if key not in keys}


def replaced(key: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return an edit that changes one tensor."""
    return lambda tensors: tensors | {key: change(tensors[key])}


def moved(old: str, new: str) -> Callable[[Tensors], Tensors]:
    """Return an edit that renames keys by replacing text."""
    return builders.renamed(lambda key: key.replace(old, new))


def spoilt(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a change that sets one element."""

    def change(tensor: torch.Tensor) -> torch.Tensor:
        copy = tensor.clone()
        copy[1, 1] = value
        return copy

    return change


EDITS: dict[str, tuple[Any, Any, str]] = {
    "renamed in both": (moved("0.self_attn.q_proj", "0.self_attn.q_prij"), MatchError, "q_prij"),
    "renamed in one": (
        builders.renamed(lambda key: key.replace("q_proj", "q_prij") if key == DOWN else key),
        (MatchError, MalformedAdapterError),
        MODULE[:-6],
    ),
    "no such layer": (moved("layers.1.mlp", "layers.7.mlp"), MatchError, "layers.7.mlp"),
    "missing up": (without(UP), MalformedAdapterError, MODULE),
    "missing down": (without(DOWN), MalformedAdapterError, MODULE),
    "too wide": (replaced(DOWN, lambda t: torch.cat([t, t[:, :1]], 1)), InputError, MODULE),
    "too tall": (replaced(UP, lambda t: torch.cat([t, t[:1]])), InputError, MODULE),
    "ranks differ": (replaced(DOWN, lambda t: t[:3]), MalformedAdapterError, MODULE),
    "one dimension": (replaced(DOWN, lambda t: t.flatten()), MalformedAdapterError, MODULE),
    "husk": (replaced(DOWN, lambda t: t.new_zeros(0)), MalformedAdapterError, MODULE),
    "NaN": (replaced(DOWN, spoilt(float("nan"))), NonFiniteError, MODULE),
    "infinity": (replaced(UP, spoilt(float("-inf"))), NonFiniteError, MODULE),
    "unknown part": (
        lambda tensors: tensors | {f"{PREFIX}{MODULE}.lora_C.weight": torch.ones(4, 4)},
        LoratoolsError,
        f"{MODULE}.lora_C",
    ),
    "unknown replacement": (
        lambda tensors: tensors | {f"{PREFIX}model.layers.0.q_norm.weight": torch.ones(32)},
        MatchError,
        "model.layers.0.q_norm",
    ),
    "replacement of another shape": (
        lambda tensors: tensors | {f"{PREFIX}model.norm.weight": torch.ones(33)},
        LoratoolsError,
        "model.norm",
    ),
}
SHAPED = ("too wide", "too tall", "replacement of another shape")


@pytest.mark.parametrize("case", EDITS)
def test_edited(case: str, llama: Base, sound: Path, tmp_path: Path) -> None:
    """One key renamed, missing, mis-shaped or not a number: the error names it."""
    edit, kind, word = EDITS[case]
    kind = (MatchError, MalformedAdapterError) if case in SHAPED else kind
    adapter = builders.edited(sound, tmp_path / "b", tensors=edit)
    assert_refused(llama, adapter, tmp_path / "out", kind, word)


@pytest.mark.parametrize("case", ["renamed in both", "missing up", "too wide", "husk"])
def test_dry_run_refuses_as_the_run_does(
    case: str, llama: Base, sound: Path, tmp_path: Path
) -> None:
    """What headers can tell, --dry-run tells."""
    edit, kind, word = EDITS[case]
    kind = (MatchError, MalformedAdapterError) if case in SHAPED else kind
    adapter = builders.edited(sound, tmp_path / "b", tensors=edit)
    assert_refused(llama, adapter, tmp_path / "out", kind, word, dry_run=True)


def test_matches_nothing(gpt2: Base, sound: Path, tmp_path: Path) -> None:
    """An adapter of a Llama on a GPT-2."""
    assert_refused(gpt2, sound, tmp_path / "out", MatchError, "q_proj")


def test_empty(llama: Base, sound: Path, tmp_path: Path) -> None:
    """A file without tensors."""
    adapter = builders.edited(sound, tmp_path / "b", tensors=lambda _: {})
    assert_refused(llama, adapter, tmp_path / "out", LoratoolsError)


def test_all_husks(llama: Base, sound: Path, tmp_path: Path) -> None:
    """What DeepSpeed ZeRO-3 leaves when parameters are saved without being gathered."""
    adapter = builders.edited(
        sound,
        tmp_path / "b",
        tensors=lambda tensors: {key: value.new_zeros(0) for key, value in tensors.items()},
    )
    refusal = assert_refused(llama, adapter, tmp_path / "out", MalformedAdapterError, "proj")
    assert "ZeRO" in f"{refusal.message} {refusal.hint}"


def test_magnitude_missing(llama: Base, tmp_path: Path) -> None:
    """use_dora without the magnitude of one layer."""
    original = lora(llama, tmp_path / "a", r=4, target_modules=LINEARS, use_dora=True)
    magnitude = f"{PREFIX}{MODULE}.lora_magnitude_vector"
    adapter = builders.edited(original, tmp_path / "b", tensors=without(magnitude))
    assert_refused(llama, adapter, tmp_path / "out", MalformedAdapterError, MODULE)


def test_magnitude_of_another_length(llama: Base, tmp_path: Path) -> None:
    """A magnitude vector that does not fit its weight."""
    original = lora(llama, tmp_path / "a", r=4, target_modules=LINEARS, use_dora=True)
    magnitude = f"{PREFIX}{MODULE}.lora_magnitude_vector"
    adapter = builders.edited(
        original, tmp_path / "b", tensors=replaced(magnitude, lambda t: t[:-1])
    )
    kinds = (MalformedAdapterError, MatchError)
    assert_refused(llama, adapter, tmp_path / "out", kinds, MODULE)


def test_token_rows_beyond_the_vocabulary(llama: Base, tmp_path: Path) -> None:
    """A row number which the embedding does not have."""
    original = lora(
        llama, tmp_path / "a", r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2]
    )
    config = {"trainable_token_indices": [1, 64]}
    adapter = builders.edited(original, tmp_path / "b", config=config)
    kinds = (MalformedAdapterError, MatchError)
    assert_refused(llama, adapter, tmp_path / "out", kinds, "embed_tokens")


def test_token_rows_not_as_many_as_listed(llama: Base, tmp_path: Path) -> None:
    """Two rows for three indices."""
    original = lora(
        llama, tmp_path / "a", r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2]
    )
    config = {"trainable_token_indices": [1, 2, 3]}
    adapter = builders.edited(original, tmp_path / "b", config=config)
    assert_refused(llama, adapter, tmp_path / "out", MalformedAdapterError, "embed_tokens")


def test_no_config(llama: Base, sound: Path, tmp_path: Path) -> None:
    """Without adapter_config.json the scale is unknown."""
    adapter = builders.edited(sound, tmp_path / "b")
    (adapter / "adapter_config.json").unlink()
    assert_refused(llama, adapter, tmp_path / "out", LoratoolsError, "adapter_config.json")


def test_no_such_adapter(llama: Base, tmp_path: Path) -> None:
    """A path to nothing."""
    missing = tmp_path / "missing"
    assert_refused(llama, missing, tmp_path / "out", errors.MissingFileError, "missing")


def test_truncated_file(llama: Base, sound: Path, tmp_path: Path) -> None:
    """A download that ended early."""
    adapter = builders.edited(sound, tmp_path / "b")
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    wanted = errors.CorruptFileError
    assert_refused(llama, adapter, tmp_path / "out", wanted, "adapter_model.safetensors")


def test_overflow_of_the_result(llama_fp16: Base, tmp_path: Path) -> None:
    """A finite adapter whose result is not: 65504 is the largest float16.

    PEFT is wrong: its default merge writes the infinity.
    """
    original = lora(llama_fp16, tmp_path / "a", r=4, target_modules=LINEARS)
    adapter = builders.edited(
        original, tmp_path / "b", tensors=replaced(UP, lambda tensor: tensor * 1e7)
    )
    assert oracles.peft_merged(llama_fp16, adapter)[f"{MODULE}.weight"].isinf().any()
    assert_refused(llama_fp16, adapter, tmp_path / "out", NonFiniteError, MODULE)


def test_nan_in_the_base(llama: Base, sound: Path, tmp_path: Path) -> None:
    """A weight that was not a number before cannot be folded into."""
    base = builders.llama(tmp_path / "base")
    tensors = base.tensors
    tensors[f"{MODULE}.weight"] = spoilt(float("nan"))(tensors[f"{MODULE}.weight"])
    builders.save_file(tensors, base.folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused(base, sound, tmp_path / "out", NonFiniteError, MODULE)


def test_overflow_of_an_untouched_weight(llama: Base, sound: Path, tmp_path: Path) -> None:
    """A narrower dtype which cannot hold what the base holds."""
    base = builders.llama(tmp_path / "base")
    tensors = base.tensors
    tensors["lm_head.weight"] *= 1e6
    builders.save_file(tensors, base.folder / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    assert_refused(base, sound, out, NonFiniteError, "lm_head", dtype="fp16")


def test_nan_in_a_replacement(llama: Base, tmp_path: Path) -> None:
    """Saved modules are checked as factors are."""
    original = lora(
        llama, tmp_path / "a", r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    key = f"{PREFIX}lm_head.weight"
    edit = replaced(key, spoilt(float("nan")))
    adapter = builders.edited(original, tmp_path / "b", tensors=edit)
    assert_refused(llama, adapter, tmp_path / "out", NonFiniteError, "lm_head")


def test_destination_exists(llama: Base, sound: Path, tmp_path: Path, merge: Merge) -> None:
    """An earlier result is kept, unless overwriting is asked for; then it is replaced whole."""
    merged = merge(llama, sound)
    leftover = merged.folder / "model-00001-of-00009.safetensors"
    leftover.write_bytes(b"stale")
    before = digest(tmp_path)
    with pytest.raises(OutputError, match="merged"):
        merge(llama, sound)
    assert digest(tmp_path) == before
    merged = merge(llama, sound, overwrite=True)
    assert not leftover.exists()
    oracles.assert_agrees(merged.tensors, oracles.peft_merged(llama, sound), llama, atol=1e-6)


@pytest.mark.parametrize("overwrite", [False, True])
def test_destination_is_a_stranger(
    llama: Base, sound: Path, tmp_path: Path, merge: Merge, overwrite: bool
) -> None:
    """A folder that holds no model is never replaced."""
    stranger = tmp_path / "merged" / "thesis.txt"
    stranger.parent.mkdir()
    stranger.write_text("kept")
    with pytest.raises(OutputError, match="merged"):
        merge(llama, sound, overwrite=overwrite)
    assert digest(tmp_path).keys() == {str(stranger)}
    assert stranger.read_text() == "kept"


@pytest.mark.parametrize("victim", ["base", "adapter"])
def test_destination_is_an_input(sound: Path, tmp_path: Path, victim: str) -> None:
    """Overwriting never means the base or the adapter."""
    from loratools.merge import merge_into_base

    base = builders.llama(tmp_path / "base")
    adapter = builders.edited(sound, tmp_path / "adapter")
    before = digest(tmp_path)
    with pytest.raises(OutputError):
        merge_into_base(base.folder, adapter, tmp_path / victim, overwrite=True)
    assert digest(tmp_path) == before


UNMERGEABLE: dict[str, dict[str, Any]] = {
    "aLoRA": {"alora_invocation_tokens": [1, 2]},
    "Arrow": {"arrow_config": {"top_k": 1}},
    "X-LoRA": {"peft_type": "XLORA"},
    "prompt tuning": {"peft_type": "PROMPT_TUNING"},
    "prefix tuning": {"peft_type": "PREFIX_TUNING"},
}


@pytest.mark.parametrize("method", UNMERGEABLE)
def test_unmergeable(method: str, llama: Base, sound: Path, tmp_path: Path) -> None:
    """§1.2: methods that act on the run, not on the weights, are refused by name."""
    adapter = builders.edited(sound, tmp_path / "b", config=UNMERGEABLE[method])
    refusal = assert_refused(llama, adapter, tmp_path / "out", UnsupportedError)
    words = (method, method.replace(" ", "_").upper(), method.replace("-", "").upper())
    assert any(word in refusal.message for word in words)


def test_prompt_tuning_as_peft_saves_it(llama: Base, tmp_path: Path) -> None:
    """A file that holds nothing but prompt embeddings."""
    from peft import PromptTuningConfig

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    adapter = builders.save(builders.train(llama, config), tmp_path / "a")
    assert_refused(llama, adapter, tmp_path / "out", UnsupportedError)
