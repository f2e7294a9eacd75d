"""Which layer lands on which tensor, which way round, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.basemodel import BaseModel, BaseTensor, Shard
from loratools.deltas import (
    DoRA,
    ExpertLoRA,
    LayerDelta,
    LoRA,
    MovedBase,
    Replacement,
    RowReplacement,
)
from loratools.errors import MatchError, UnsupportedError
from loratools.planning.placement import Placed, Placement, place_adapters

Shape = tuple[int, ...]


def make_base(shapes: Mapping[str, Shape], **config: Any) -> BaseModel:
    """Return a base as its headers would describe it; no file is there."""
    path = Path("base.safetensors")
    tensors = tuple(BaseTensor(name, "F32", shape, path, 0) for name, shape in shapes.items())
    return BaseModel(Path("base"), (Shard(path, tensors, {}),), config=config or None)


def lora(out: int, inner: int, *kernel: int, **words: Any) -> LoRA:
    up = torch.ones(out, 2, *([1] * len(kernel)))
    return LoRA(torch.ones(2, inner, *kernel), up, 2.0, **words)


def place(base: BaseModel, layers: Mapping[str, LayerDelta], **options: Any) -> Placed:
    return place_adapters(base, [(Adapter(dict(layers)), 1.0)], **options)


def only(placed: Placed) -> Placement:
    ((placement,),) = placed.by_tensor.values()
    return placement


def refusal(base: BaseModel, layers: Mapping[str, LayerDelta], **extras: Any) -> MatchError:
    with pytest.raises(MatchError) as caught:
        place_adapters(base, [(Adapter(dict(layers), extras.get("extras", {})), 1.0)])
    assert caught.value.hint
    return caught.value


# ── names ────────────────────────────────────────────────────────────────────────────────────

NAMES: dict[str, tuple[str, str, bool]] = {
    # adapter's path, base's tensor, whether a note says that they differ
    "same": ("model.layers.0.q", "model.layers.0.q.weight", False),
    "base has a prefix": ("h.0.fc", "transformer.h.0.fc.weight", True),
    "adapter has a prefix": ("transformer.h.0.fc", "h.0.fc.weight", True),
    "disk name of a vision model": (
        "model.language_model.layers.0.q",
        "language_model.model.layers.0.q.weight",
        True,
    ),
    "bare parameter": ("blocks.0.gate", "blocks.0.gate", False),
}


@pytest.mark.parametrize(("path", "tensor", "noted"), NAMES.values(), ids=NAMES)
def test_names(path: str, tensor: str, noted: bool) -> None:
    placed = place(make_base({tensor: (4, 3), "other.weight": (4, 3)}), {path: lora(4, 3)})
    placement = only(placed)
    assert (placement.tensor, placement.module, placement.transposed) == (tensor, path, False)
    assert bool(placed.notes) == noted


def test_weight_before_bare_parameter() -> None:
    base = make_base({"fc.weight": (4, 3), "fc": (4, 3)})
    assert only(place(base, {"fc": lora(4, 3)})).tensor == "fc.weight"


def test_attention_has_its_own_parameter() -> None:
    base = make_base({"mha.in_proj_weight": (12, 4), "mha.weight": (12, 4)})
    delta = lora(12, 4, role="attention_in")
    assert only(place(base, {"mha": delta})).tensor == "mha.in_proj_weight"


# ── orientation ──────────────────────────────────────────────────────────────────────────────

ORIENTATION: dict[str, tuple[Shape, LayerDelta, dict[str, Any], bool]] = {
    "straight": ((4, 3), lora(4, 3), {}, False),
    "not flipped": ((4, 3), lora(4, 3), {"model_type": "gpt2"}, False),
    "square": ((4, 4), lora(4, 4), {}, False),
    "square embedding": ((4, 4), lora(4, 4, role="embedding"), {}, True),
    "embedding": ((9, 4), lora(4, 9, role="embedding"), {}, True),
    "convolution": ((4, 3, 2, 2), lora(4, 3, 2, 2), {}, False),
    "pointwise on linear": ((4, 3), lora(4, 3, 1, 1), {}, False),
    "linear on pointwise": ((4, 3, 1, 1), lora(4, 3), {}, False),
    "stack": ((2, 4, 3), ExpertLoRA(torch.ones(2, 1, 3), torch.ones(2, 4, 1), 1.0), {}, False),
    "flipped stack": (
        (2, 3, 4),
        ExpertLoRA(torch.ones(2, 1, 3), torch.ones(2, 4, 1), 1.0),
        {},
        True,
    ),
    "square stack": (
        (2, 3, 3),
        ExpertLoRA(torch.ones(2, 1, 3), torch.ones(2, 3, 1), 1.0),
        {},
        False,
    ),
    "square stack of old": (
        (2, 3, 3),
        ExpertLoRA(torch.ones(2, 1, 3), torch.ones(2, 3, 1), 1.0, True),
        {},
        True,
    ),
    "square stack of gpt-oss": (
        (2, 3, 3),
        ExpertLoRA(torch.ones(2, 1, 3), torch.ones(2, 3, 1), 1.0),
        {"model_type": "gpt_oss"},
        True,
    ),
    "square dora": ((4, 4), DoRA(lora(4, 4), torch.ones(4)), {}, False),
}


@pytest.mark.parametrize(
    ("shape", "delta", "config", "transposed"), ORIENTATION.values(), ids=ORIENTATION
)
def test_orientation(
    shape: Shape, delta: LayerDelta, config: dict[str, Any], transposed: bool
) -> None:
    base = make_base({"h.0.experts.x.weight": shape}, **config)
    assert only(place(base, {"h.0.experts.x": delta})).transposed is transposed


@pytest.mark.parametrize(
    ("shapes", "config", "transposed"),
    [
        ({}, {"model_type": "gpt2"}, True),
        ({}, {"model_type": "llama"}, False),
        ({}, {}, False),
        ({"h.0.attn.c_attn.weight": (4, 12)}, {}, True),
        ({"h.0.attn.c_attn.weight": (12, 4)}, {}, False),
        ({"h.0.attn.c_attn.weight": (4, 12)}, {"model_type": "llama"}, False),
    ],
)
def test_square_layers_of_gpt2(
    shapes: dict[str, Shape], config: dict[str, Any], transposed: bool
) -> None:
    """GPT-2 stores (in, out); where shapes do not tell, the model's type or c_attn does."""
    base = make_base(
        {"h.0.attn.c_proj.weight": (4, 4), "h.0.attn.q.weight": (4, 4), **shapes}, **config
    )
    assert only(place(base, {"h.0.attn.c_proj": lora(4, 4)})).transposed is transposed
    assert only(place(base, {"h.0.attn.q": lora(4, 4)})).transposed is False


# ── what a placement folds ───────────────────────────────────────────────────────────────────


def folded(placement: Placement, stored: Tensor) -> Tensor:
    """Return the stored matrix with the placement folded in, as a single block."""
    change = torch.empty_like(stored)
    placement.fold("cpu").add_change(change, stored, 0, first=True)
    return stored + change


def test_bias_and_weight_of_one_layer() -> None:
    """lora_bias lands on the bias, scaled like the weight; both carry the strength."""
    delta = lora(4, 3, bias=torch.arange(4.0))
    base = make_base({"fc.weight": (4, 3), "fc.bias": (4,)})
    placed = place_adapters(base, [(Adapter({"fc": delta}), 0.5)])
    assert {name: p[0].part for name, p in placed.by_tensor.items()} == {
        "fc.weight": "weight",
        "fc.bias": "bias",
    }
    # alpha / rank = 1, up @ down = 2 everywhere
    weight = folded(placed.by_tensor["fc.weight"][0], torch.zeros(4, 3))
    assert torch.equal(weight, torch.full((4, 3), 1.0))
    bias = folded(placed.by_tensor["fc.bias"][0], torch.zeros(4, 1))
    assert bias.flatten().tolist() == [0.0, 0.5, 1.0, 1.5]


def test_several_adapters_keep_their_order_and_strengths() -> None:
    base = make_base({"fc.weight": (4, 3), "fd.weight": (4, 3)})
    first, second = Adapter({"fc": lora(4, 3)}), Adapter({"fd": lora(4, 3), "fc": lora(4, 3)})
    placed = place_adapters(base, [(first, 2.0), (second, -0.5)])
    assert [(p.adapter, p.strength) for p in placed.by_tensor["fc.weight"]] == [(0, 2.0), (1, -0.5)]
    assert [(p.adapter, p.strength) for p in placed.by_tensor["fd.weight"]] == [(1, -0.5)]


@pytest.mark.parametrize("flipped", [False, True])
def test_stacks_split_into_the_tensors_of_each_expert(flipped: bool) -> None:
    """gate and up of every expert by itself: rows of the stack's product, in order."""
    generator = torch.Generator().manual_seed(1)
    down = torch.randn(2, 3, 4, generator=generator)
    up = torch.randn(2, 10, 3, generator=generator)
    stack = ExpertLoRA(up.mT, down.mT, 6.0) if flipped else ExpertLoRA(down, up, 6.0)
    prefix = "model.layers.0.mlp.experts"
    names = [f"{prefix}.{e}.{part}_proj.weight" for e in (0, 1) for part in ("gate", "up")]
    placed = place(make_base(dict.fromkeys(names, (5, 4))), {f"{prefix}.gate_up_proj": stack})
    assert list(placed.by_tensor) == names
    for position, name in enumerate(names):
        expert, half = divmod(position, 2)
        wanted = 2.0 * (up[expert] @ down[expert])[5 * half : 5 * half + 5]
        (placement,) = placed.by_tensor[name]
        torch.testing.assert_close(folded(placement, torch.zeros(5, 4)), wanted)


# ── refusals ─────────────────────────────────────────────────────────────────────────────────


def test_every_problem_is_named_in_one_error() -> None:
    base = make_base({"a.fc.weight": (4, 3), "b.fc.weight": (4, 3), "lone.weight": (5, 5)})
    layers = {"fc": lora(4, 3), "nowhere": lora(4, 3), "lone": lora(4, 3), "a.fc": lora(4, 3)}
    message = refusal(base, layers).message
    assert "3 adapter tensors" in message
    assert "fc: several tensors fit: a.fc.weight, b.fc.weight" in message
    assert "nowhere: no such tensor" in message
    assert "(4, 3)" in message
    assert "(5, 5)" in message


def test_many_problems_are_cut_short() -> None:
    layers = {f"gone.{i}.fc": lora(4, 3) for i in range(30)}
    error = refusal(make_base({"x.weight": (1, 1)}), layers)
    assert "30 adapter tensors" in error.message
    assert "and 18 more" in error.message
    assert "nothing matches" in (error.hint or "")


def test_a_misspelt_name_gets_a_suggestion() -> None:
    base = make_base({"model.layers.0.self_attn.q_proj.weight": (4, 3)})
    message = refusal(base, {"model.layers.0.self_attn.q_prj": lora(4, 3)}).message
    assert "nearest: model.layers.0.self_attn.q_proj.weight" in message


REFUSED: dict[str, tuple[dict[str, Shape], dict[str, LayerDelta], str]] = {
    "another kernel": ({"c.weight": (4, 3, 3, 3)}, {"c": lora(4, 3, 2, 2)}, "c.weight"),
    "grouped convolution": ({"c.weight": (4, 1, 3)}, {"c": lora(4, 3, 3)}, "grouped"),
    "embedding the wrong way round": (
        {"e.weight": (4, 9)},
        {"e": lora(4, 9, role="embedding")},
        "e.weight",
    ),
    "no bias": ({"f.weight": (4, 3)}, {"f": lora(4, 3, bias=torch.ones(4))}, "f.bias"),
    "bias of another size": (
        {"f.weight": (4, 3), "f.bias": (3,)},
        {"f": lora(4, 3, bias=torch.ones(4))},
        "f.bias",
    ),
    "two layers on one tensor": (
        {"h.0.fc.weight": (4, 3)},
        {"h.0.fc": lora(4, 3), "t.h.0.fc": lora(4, 3)},
        "as does",
    ),
}


@pytest.mark.parametrize(("shapes", "layers", "word"), REFUSED.values(), ids=REFUSED)
def test_refused(shapes: dict[str, Shape], layers: dict[str, LayerDelta], word: str) -> None:
    assert word in refusal(make_base(shapes), layers).message


def test_experts_of_two_towers_are_not_guessed() -> None:
    """A stack whose name fits the experts of two modules lands on neither."""
    inner = "layers.0.mlp.experts"
    shapes = {
        f"{tower}.{inner}.{e}.down_proj.weight": (4, 3) for tower in ("one", "two") for e in (0, 1)
    }
    stack = ExpertLoRA(torch.ones(2, 1, 3), torch.ones(2, 4, 1), 1.0)
    assert f"{inner}.down_proj" in refusal(make_base(shapes), {f"{inner}.down_proj": stack}).message


def test_starts_that_moved_the_base() -> None:
    base = make_base({"fc.weight": (4, 3)})
    moved = MovedBase(lora(4, 3), "pissa")
    placed = place(base, {"fc": moved})
    assert only(placed).delta is moved
    assert any("pissa" in note for note in placed.notes)
    assert only(place(base, {"fc": moved}, residual_base=True)).delta is moved.lora
    with pytest.raises(UnsupportedError, match="corda") as caught:
        place(base, {"fc": MovedBase(lora(4, 3), "corda")})
    assert caught.value.hint


# ── full tensors ─────────────────────────────────────────────────────────────────────────────

EXTRAS: dict[str, tuple[str, Replacement | RowReplacement, str | None]] = {
    # name in the adapter, what, tensor it lands on (None: refused)
    "the same shape": ("norm.weight", Replacement(torch.ones(4)), "norm.weight"),
    "under a prefix": ("embed.weight", Replacement(torch.ones(9, 4)), "model.embed.weight"),
    "more rows": ("model.embed.weight", Replacement(torch.ones(11, 4)), "model.embed.weight"),
    "other columns": ("model.embed.weight", Replacement(torch.ones(9, 5)), None),
    "longer vector": ("norm.weight", Replacement(torch.ones(5)), None),
    "absent": ("nowhere.weight", Replacement(torch.ones(4)), None),
    "absent and announced": (
        "nowhere.weight",
        Replacement(torch.ones(4), expected=True),
        "nowhere.weight",
    ),
    "a new head": ("score.weight", Replacement(torch.ones(2, 4)), "score.weight"),
    "rows": (
        "model.embed.weight",
        RowReplacement(torch.ones(2, 4), (8, 0)),
        "model.embed.weight",
    ),
    "rows beyond the end": ("model.embed.weight", RowReplacement(torch.ones(1, 4), (9,)), None),
    "rows of another width": ("model.embed.weight", RowReplacement(torch.ones(1, 3), (0,)), None),
    "rows of nothing": ("nowhere.weight", RowReplacement(torch.ones(1, 4), (0,)), None),
}


@pytest.mark.parametrize(("name", "extra", "home"), EXTRAS.values(), ids=EXTRAS)
def test_extras(name: str, extra: Replacement | RowReplacement, home: str | None) -> None:
    base = make_base({"norm.weight": (4,), "model.embed.weight": (9, 4)})
    adapter = Adapter({}, {name: extra})
    if home is None:
        with pytest.raises(MatchError, match=name):
            place_adapters(base, [(adapter, 1.0)])
        return
    placed = place_adapters(base, [(adapter, 1.0)])
    assert list(placed.by_tensor) == [home]
    assert placed.added == ((home,) if home not in base.tensors else ())


def test_a_layer_fits_the_table_that_its_adapter_brings() -> None:
    """LoRA on a resized embedding is as large as the new table, not as the base's."""
    base = make_base({"embed.weight": (9, 4)})
    table = {"embed.weight": Replacement(torch.ones(11, 4), "base_copy")}
    adapter = Adapter({"embed": lora(4, 11, role="embedding")}, table)
    placed = place_adapters(base, [(adapter, 1.0)])
    assert [type(p.delta) for p in placed.by_tensor["embed.weight"]] == [Replacement, LoRA]


def test_heads_that_the_base_means_without_storing_them() -> None:
    base = make_base({"embed.weight": (9, 4)})
    with pytest.raises(MatchError, match="lm_head"):
        place(base, {"lm_head": lora(9, 4)})
    placed = place(base, {"lm_head": lora(9, 4)}, tied_heads={"lm_head.weight": "embed.weight"})
    assert only(placed).tensor == "lm_head.weight"
