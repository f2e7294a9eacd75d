"""Tied embeddings: which tensors are one, and when they become two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.basemodel import BaseModel, BaseTensor, Shard
from loratools.deltas import LayerDelta, LoRA, Replacement, RowReplacement
from loratools.errors import UnsupportedError
from loratools.planning.placement import Placement
from loratools.planning.tied_embeddings import Tie, find_tie, resolve_tie

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CAUSAL = ["LlamaForCausalLM"]


def make_base(*names: str, **config: Any) -> BaseModel:
    """Return a base of (9, 4) tensors as its headers would describe it."""
    path = Path("base.safetensors")
    tensors = tuple(BaseTensor(name, "F32", (9, 4), path, 0) for name in names)
    return BaseModel(Path("base"), (Shard(path, tensors, {}),), config=config or None)


def tied_base(**config: Any) -> BaseModel:
    return make_base(EMBED, tie_word_embeddings=True, **config)


# ── finding the tie ──────────────────────────────────────────────────────────────────────────

FOUND: dict[str, tuple[tuple[str, ...], dict[str, Any], Tie | None]] = {
    "by word, head not stored": (
        (EMBED,),
        {"tie_word_embeddings": True, "architectures": CAUSAL},
        Tie(EMBED, HEAD, False, True),
    ),
    "by word, head stored": (
        (EMBED, HEAD),
        {"tie_word_embeddings": True, "architectures": CAUSAL},
        Tie(EMBED, HEAD, True, True),
    ),
    "untied by word": (
        (EMBED, HEAD),
        {"tie_word_embeddings": False, "architectures": CAUSAL},
        Tie(EMBED, HEAD, True, False),
    ),
    "untied by word, head missing": (
        (EMBED,),
        {"tie_word_embeddings": False, "architectures": CAUSAL},
        Tie(EMBED, HEAD, False, False),
    ),
    "no word, head not stored": (
        (EMBED,),
        {"architectures": CAUSAL},
        Tie(EMBED, HEAD, False, True),
    ),
    "no word, head stored": (
        (EMBED, HEAD),
        {"architectures": CAUSAL},
        Tie(EMBED, HEAD, True, False),
    ),
    "no config": ((EMBED,), {}, Tie(EMBED, HEAD, False, False)),
    "a model without a head": (
        (EMBED,),
        {"tie_word_embeddings": True, "architectures": ["LlamaModel"]},
        Tie(EMBED, HEAD, False, False),
    ),
    "the word of the text model": (
        ("language_model.model.embed_tokens.weight",),
        {"text_config": {"tie_word_embeddings": True}},
        Tie("language_model.model.embed_tokens.weight", HEAD, False, True),
    ),
    "gpt2 of the Hub": (
        ("wte.weight",),
        {"architectures": ["GPT2LMHeadModel"]},
        Tie("wte.weight", HEAD, False, True),
    ),
    "gpt2 of transformers": (
        ("transformer.wte.weight",),
        {"architectures": ["GPT2LMHeadModel"]},
        Tie("transformer.wte.weight", HEAD, False, True),
    ),
    "bert": (
        ("bert.embeddings.word_embeddings.weight",),
        {"architectures": ["BertForMaskedLM"]},
        Tie(
            "bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight", False, True
        ),
    ),
    "nothing to tie": (("fc.weight",), {"tie_word_embeddings": True}, None),
}


@pytest.mark.parametrize(("names", "config", "tie"), FOUND.values(), ids=FOUND)
def test_find_tie(names: tuple[str, ...], config: dict[str, Any], tie: Tie | None) -> None:
    found = find_tie(make_base(*names, **config))
    if tie is not None and "language_model" in tie.input:
        # Its head goes by either of two names.
        assert found is not None
        assert (found.input, found.stored, found.tied) == (tie.input, False, True)
        return
    assert found == tie


# ── what it means for an adapter ─────────────────────────────────────────────────────────────


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def head_lora(seed: int = 1, alpha: float = 2.0) -> LoRA:
    return LoRA(random(seed, 2, 4), random(seed + 1, 9, 2), alpha)


def input_lora(head: LoRA) -> LoRA:
    """Return the embedding's LoRA with the same ΔW as a head's: (Bᵀ, Aᵀ)."""
    return LoRA(head.up.T.clone(), head.down.T.clone(), head.alpha, role="embedding")


def on(tensor: str, delta: LayerDelta, strength: float = 1.0, adapter: int = 0) -> Placement:
    transposed = isinstance(delta, LoRA) and delta.role == "embedding"
    return Placement(tensor, tensor.removesuffix(".weight"), delta, strength, adapter, transposed)


def resolve(base: BaseModel, *placements: Placement) -> tuple[dict[str, list[Placement]], Any]:
    """Return what lands where afterwards, and the whole answer."""
    by_tensor: dict[str, tuple[Placement, ...]] = {}
    for placement in placements:
        by_tensor[placement.tensor] = (*by_tensor.get(placement.tensor, ()), placement)
    untied = resolve_tie(base, find_tie(base), by_tensor)
    return {name: list(found) for name, found in untied.by_tensor.items()}, untied


ROWS = RowReplacement(random(5, 2, 4), (3, 1))
TABLE = random(6, 9, 4)
LARGER = random(7, 11, 4)


def test_a_change_of_the_head_unties() -> None:
    """The head starts from the shared values; the input keeps them."""
    change = on(HEAD, head_lora())
    found, untied = resolve(tied_base(), change)
    assert found == {EMBED: [], HEAD: [change]}
    assert untied.sources == {HEAD: EMBED}
    assert untied.config == {"tie_word_embeddings": False}
    assert untied.notes


def test_a_change_of_the_input_unties() -> None:
    change = on(EMBED, input_lora(head_lora()))
    found, untied = resolve(tied_base(), change)
    assert found == {EMBED: [change], HEAD: []}
    assert untied.config == {"tie_word_embeddings": False}


def test_equal_changes_keep_the_tie() -> None:
    """ensure_weight_tying: both say the same, so the one tensor is changed once."""
    head = head_lora()
    change = on(EMBED, input_lora(head))
    found, untied = resolve(tied_base(), change, on(HEAD, head))
    assert found == {EMBED: [change]}
    assert untied.config == {}


UNEQUAL: dict[str, tuple[LoRA, float]] = {
    "factors": (head_lora(3), 1.0),
    "alpha": (head_lora(1, 3.0), 1.0),
    "strength": (head_lora(), 0.5),
}


@pytest.mark.parametrize(("head", "strength"), UNEQUAL.values(), ids=UNEQUAL)
def test_changes_that_differ_untie(head: LoRA, strength: float) -> None:
    ours, theirs = on(EMBED, input_lora(head_lora())), on(HEAD, head, strength)
    found, untied = resolve(tied_base(), ours, theirs)
    assert found == {EMBED: [ours], HEAD: [theirs]}
    assert untied.config == {"tie_word_embeddings": False}


SHARED: dict[str, LayerDelta] = {
    "token rows": ROWS,
    "a resized vocabulary": Replacement(LARGER),
    "the base's own copy": Replacement(TABLE, "base_copy"),
}


@pytest.mark.parametrize("delta", SHARED.values(), ids=SHARED)
def test_what_is_shared_keeps_the_tie(delta: LayerDelta) -> None:
    """Said of the input alone, it means the one tensor; said again of the head, it counts once."""
    change = on(EMBED, delta)
    for more in ((), (on(HEAD, delta),)):
        found, untied = resolve(tied_base(), change, *more)
        assert found == {EMBED: [change]}
        assert untied.config == {}


@pytest.mark.parametrize("delta", SHARED.values(), ids=SHARED)
def test_what_is_shared_reaches_an_untied_head_too(delta: LayerDelta) -> None:
    shared, own = on(EMBED, delta), on(HEAD, head_lora())
    found, untied = resolve(tied_base(), shared, own)
    assert found == {EMBED: [shared], HEAD: [shared, own]}
    assert untied.sources == {HEAD: EMBED}


def test_a_saved_input_alone_unties() -> None:
    change = on(EMBED, Replacement(TABLE))
    found, untied = resolve(tied_base(), change)
    assert found == {EMBED: [change], HEAD: []}
    assert untied.config == {"tie_word_embeddings": False}


def test_a_head_that_is_stored_too_follows() -> None:
    """Some tied checkpoints store both copies: both are written, and stay equal."""
    base = make_base(EMBED, HEAD, tie_word_embeddings=True)
    change = on(EMBED, ROWS)
    found, untied = resolve(base, change)
    assert found == {EMBED: [change], HEAD: [change]}
    assert untied.sources == {HEAD: EMBED}


def test_other_layers_do_not_touch_the_tie() -> None:
    change = on("fc.weight", head_lora())
    found, untied = resolve(tied_base(), change)
    assert found == {"fc.weight": [change]}
    assert (untied.config, untied.notes) == ({}, ())


@pytest.mark.parametrize("config", [{"tie_word_embeddings": False}, {}])
def test_untied_models_stay_as_they_are(config: dict[str, Any]) -> None:
    change = on(EMBED, input_lora(head_lora()))
    found, untied = resolve(make_base(EMBED, HEAD, **config), change)
    assert found == {EMBED: [change]}
    assert untied.config == {}


def test_several_adapters_are_compared_one_by_one() -> None:
    """Two adapters, each equal on both sides, keep the tie; one that differs unties."""
    one, two = head_lora(1), head_lora(5)
    ours = [on(EMBED, input_lora(one)), on(EMBED, input_lora(two), 1.0, 1)]
    theirs = [on(HEAD, one), on(HEAD, two, 1.0, 1)]
    assert resolve(tied_base(), *ours, *theirs)[1].config == {}
    assert resolve(tied_base(), *ours, theirs[0])[1].config == {"tie_word_embeddings": False}


def test_models_that_scale_by_the_tie_are_not_untied() -> None:
    """T5 scales the decoder's output exactly when tied, so untying it would change the model."""
    base = make_base("shared.weight", tie_word_embeddings=True, model_type="t5")
    with pytest.raises(UnsupportedError, match="t5") as caught:
        resolve(base, on(HEAD, head_lora()))
    assert caught.value.hint
    found, _ = resolve(base, on("shared.weight", ROWS))
    assert [p.delta for p in found["shared.weight"]] == [ROWS]


# ── tables of encoder and decoder ────────────────────────────────────────────────────────────

ENCODER, DECODER, SHARED = (
    f"model.{name}.weight" for name in ("encoder.embed_tokens", "decoder.embed_tokens", "shared")
)


def bart(*more: str, **config: Any) -> BaseModel:
    words = {"tie_word_embeddings": True, "architectures": ["BartForConditionalGeneration"]}
    return make_base(SHARED, *more, **(words | config))


@pytest.mark.parametrize("more", [(), (ENCODER, DECODER)], ids=["shared", "stored thrice"])
def test_a_change_of_one_table_unties_all(more: tuple[str, ...]) -> None:
    change = on(ENCODER, input_lora(head_lora()))
    found, untied = resolve(bart(*more), change)
    apart = {SHARED: [], HEAD: [], ENCODER: [change]}
    assert found == (apart if more else {**apart, DECODER: []})
    assert untied.config == {"tie_word_embeddings": False}
    assert all(name in more or untied.sources[name] == SHARED for name in (ENCODER, DECODER))


@pytest.mark.parametrize(
    "placements",
    [
        [on(ENCODER, ROWS)],
        [on(ENCODER, Replacement(TABLE))],
        [on(ENCODER, input_lora(head_lora())), on(SHARED, input_lora(head_lora(5)))],
    ],
    ids=["rows", "whole", "beside the shared one"],
)
def test_changes_that_may_be_for_all_tables(placements: list[Placement]) -> None:
    with pytest.raises(UnsupportedError, match=ENCODER) as caught:
        resolve(bart(), *placements)
    assert caught.value.hint


def test_tables_of_an_untied_model_are_its_own() -> None:
    base = bart(ENCODER, DECODER, HEAD, tie_word_embeddings=False)
    change = on(ENCODER, ROWS)
    found, untied = resolve(base, change)
    assert (found, untied.config) == ({ENCODER: [change]}, {})


def test_a_table_of_a_model_that_scales_by_the_tie() -> None:
    base = make_base("shared.weight", tie_word_embeddings=True, model_type="t5")
    with pytest.raises(UnsupportedError, match="t5"):
        resolve(base, on("encoder.embed_tokens.weight", input_lora(head_lora())))
