"""GGUF layouts against index loops, and back again, for every row of every model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas import ExpertLoRA, LoRA
from loratools.errors import InputError, MatchError
from loratools.keymaps import gguf_layouts as lay
from loratools.keymaps.gguf_base import base_from_config
from loratools.keymaps.gguf_config import BaseConfig
from loratools.keymaps.gguf_from import from_gguf
from loratools.keymaps.gguf_model import GGUFModel, Layout
from loratools.keymaps.gguf_models import MODELS
from loratools.keymaps.gguf_ops import Parts, Stack
from loratools.keymaps.gguf_to import to_gguf
from tests.gguf_cases import (
    CONFIG,
    EXPERTS,
    FF,
    HEADS,
    HIDDEN,
    KEYS,
    SIZE,
    adapter_for,
    config_of,
    random,
    step_sets,
)

HALF = SIZE // 2
PER = HEADS // KEYS  # query heads for each key head
GROUPS, EACH, KEY, VALUE = 2, 3, 4, 3  # linear attention: key heads, values for each, lengths


# ── the formulas, one row or column at a time ────────────────────────────────────────────────


def rotary(heads: int) -> list[int]:
    """Row 2·i + p of a head is the checkpoint's row p·d/2 + i."""
    order = [0] * (heads * SIZE)
    for h in range(heads):
        for p in range(2):
            for i in range(HALF):
                order[h * SIZE + 2 * i + p] = h * SIZE + p * HALF + i
    return order


def grouped() -> tuple[list[int], list[int], list[int]]:
    """InternLM2 and Falcon: (group, queries + key + value, d) → queries, keys, values."""
    q, k, v = [], [], []
    for g in range(KEYS):
        start = g * (PER + 2) * SIZE
        q += [start + n for n in range(PER * SIZE)]
        k += [start + PER * SIZE + n for n in range(SIZE)]
        v += [start + (PER + 1) * SIZE + n for n in range(SIZE)]
    return q, k, v


def of(order: list[int], within: list[int]) -> list[int]:
    return [order[n] for n in within]


def heads_of_three() -> list[int]:
    """Bloom, GPT-NeoX: (head, q k v, d) → q, k, v."""
    return [h * 3 * SIZE + part * SIZE + d
            for part in range(3) for h in range(HEADS) for d in range(SIZE)]  # fmt: skip


def separated() -> list[int]:
    """GLM-4V: in the first half of a head, even rows and then odd ones."""
    order = []
    for h in range(HEADS):
        turning = range(HALF)
        order += [h * SIZE + n for n in turning if n % 2 == 0]
        order += [h * SIZE + n for n in turning if n % 2 == 1]
        order += [h * SIZE + n for n in range(HALF, SIZE)]
    return order


def dealt(length: int, start: int = 0) -> list[int]:
    """Value heads grouped by key head → dealt out over them."""
    return list(range(start)) + [start + (g * EACH + e) * length + n
            for e in range(EACH) for g in range(GROUPS) for n in range(length)]  # fmt: skip


def qkvz() -> tuple[list[int], list[int]]:
    """Qwen3-Next: (key head, q k v·n z·n) → q k v, and z."""
    q, k, v, z = [], [], [], []
    size = 2 * KEY + 2 * EACH * VALUE
    for g in range(GROUPS):
        start = g * size
        q += [start + n for n in range(KEY)]
        k += [start + KEY + n for n in range(KEY)]
        v += [start + 2 * KEY + n for n in range(EACH * VALUE)]
        z += [start + 2 * KEY + EACH * VALUE + n for n in range(EACH * VALUE)]
    return q + k + v, z


def blocks(*sizes: int) -> list[list[int]]:
    found, start = [], 0
    for size in sizes:
        found.append(list(range(start, start + size)))
        start += size
    return found


Q, K, V = grouped()
QS, KS, VS = blocks(HEADS * SIZE, KEYS * SIZE, KEYS * SIZE)
ROWS: dict[str, tuple[Layout, int, list[list[int]]]] = {
    "rotary q": (lay.rotary_q, HEADS * SIZE, [rotary(HEADS)]),
    "rotary k": (lay.rotary_k, KEYS * SIZE, [rotary(KEYS)]),
    "qkv": (lay.qkv, len(Q + K + V), [QS, KS, VS]),
    "qkv turning": (lay.qkv_rotary, len(Q + K + V), [
        of(QS, rotary(HEADS)), of(KS, rotary(KEYS)), VS,
    ]),
    "InternLM2": (lay.qkv_grouped, len(Q + K + V), [of(Q, rotary(HEADS)), of(K, rotary(KEYS)), V]),
    "Falcon": (lay.falcon_groups, len(Q + K + V), [Q + K + V]),
    "Bloom": (lay.heads_of_three, 3 * HEADS * SIZE, [heads_of_three()]),
    "GLM-4V": (lay.mrope_q, HEADS * SIZE, [separated()]),
    "halves": (lay.halves, 10, blocks(5, 5)),
    "quarters": (lay.quarters, 12, blocks(3, 3, 3, 3)),
    "Qwen3-Next": (lay.qkvz, len(qkvz()[0] + qkvz()[1]), list(qkvz())),
    "values": (lay.value_heads, 6 * VALUE, [dealt(VALUE)]),
    "values below keys": (lay.value_heads_after_keys, 16 + 6 * VALUE, [dealt(VALUE, 16)]),
    "values, one row each": (lay.value_heads, 6, [dealt(1)]),
    "indexer": (lay.indexer_qk, 12, blocks(8, 4)),
}  # fmt: skip
"""Layout, rows of the checkpoint's weight, and which of them make each GGUF tensor."""


def config(**words: object) -> BaseConfig:
    rope = {"mrope_section": [1, 1], "partial_rotary_factor": 0.5}
    return BaseConfig({**CONFIG, "rope_parameters": rope, **words}, "test")


def lora(rows: int, columns: int = 6, seed: int = 1) -> LoRA:
    return LoRA(random(seed, 2, columns), random(seed + 1, rows, 2), 4.0)


def do(layout: Layout, parts: Parts, where: BaseConfig | None = None, block: int = 1) -> Parts:
    for op in layout(where or config(), block):
        parts = op.do(parts)
    return parts


def undo(layout: Layout, parts: Parts, where: BaseConfig | None = None, block: int = 1) -> Parts:
    for op in reversed(layout(where or config(), block)):
        parts = op.undo(parts)
    return parts


def same_bits(one: LoRA | ExpertLoRA | None, other: LoRA | ExpertLoRA | None) -> None:
    assert one is not None
    assert other is not None
    assert (one.alpha, one.weight_shape) == (other.alpha, other.weight_shape)
    assert torch.equal(one.down, other.down)
    assert torch.equal(one.up, other.up)


@pytest.mark.parametrize("case", ROWS)
def test_rows_are_where_the_formula_puts_them(case: str) -> None:
    layout, rows, wanted = ROWS[case]
    delta = lora(rows)
    dense = delta.materialize()
    parts = do(layout, [delta])
    assert len(parts) == len(wanted)
    for part, order in zip(parts, wanted, strict=True):
        assert part is not None
        # Rows are moved, not computed anew: the very same sums of products.
        assert torch.equal(part.materialize(), torch.stack([dense[n] for n in order]))
    same_bits(undo(layout, parts)[0], delta)


@pytest.mark.parametrize("case", [name for name, row in ROWS.items() if len(row[2]) > 1])
def test_parts_that_are_missing_are_zeros(case: str) -> None:
    """Each projection alone goes back to its own rows of the fused one."""
    layout, rows, wanted = ROWS[case]
    whole = do(layout, [lora(rows)])
    for place, order in enumerate(wanted):
        alone: Parts = [part if n == place else None for n, part in enumerate(whole)]
        part = alone[place]
        (back,) = undo(layout, alone)
        assert part is not None
        assert back is not None
        expected = torch.zeros(rows, 6)
        for row, source in zip(part.materialize(), order, strict=True):
            expected[source] = row
        torch.testing.assert_close(back.materialize(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("case", [name for name, row in ROWS.items() if len(row[2]) > 1])
def test_parts_with_factors_of_their_own_stand_side_by_side(case: str) -> None:
    """Ranks add up on the way to the fused module, and come apart again."""
    layout, _, wanted = ROWS[case]
    own: Parts = [lora(len(order), seed=7 * n + 1) for n, order in enumerate(wanted)]
    (back,) = undo(layout, own)
    assert back is not None
    assert back.rank == 2 * len(wanted)
    for part, again in zip(own, do(layout, [back]), strict=True):
        same_bits(again, part)


def test_columns_move_on_the_other_factor() -> None:
    delta = lora(5, columns=6 * VALUE)
    (part,) = do(lay.value_heads_in, [delta])
    assert isinstance(part, LoRA)
    dense = delta.materialize()
    order = dealt(VALUE)
    assert torch.equal(part.materialize(), torch.stack([dense[:, n] for n in order], dim=1))
    assert part.up is delta.up
    same_bits(undo(lay.value_heads_in, [part])[0], delta)


def test_talkie_negates_second_halves() -> None:
    delta = lora(HEADS * SIZE)
    (part,) = do(lay.negated_halves, [delta])
    assert part is not None
    for row, (old, new) in enumerate(zip(delta.materialize(), part.materialize(), strict=True)):
        assert torch.equal(new, -old if row % SIZE >= HALF else old)
    same_bits(undo(lay.negated_halves, [part])[0], delta)


SCALED: dict[str, tuple[Layout, int, Callable[[int], float]]] = {
    "multiplied": (lay.multiplied("key_multiplier", "attention_in_multiplier"), 4,
                   lambda row: 0.3 * 1.25),
    "of a list": (lay.multiplied("mlp_multipliers", place=1), 4, lambda row: 1.9),
    "Jais' table": (lay.jais_embedding, 4, lambda row: 9.0),
    "Jais' head": (lay.jais_output, 4, lambda row: 2.0 * 0.125),
    "RWKV 6": (lay.rescaled, 4, lambda row: 0.5),
    "Falcon-H1": (lay.falcon_h1_in, 28, lambda row: 1.5 * (
        [0.5] * 6 + [2.0] * 6 + [3.0] * 6 + [0.25] * 6 + [5.0] * 4)[row]),
}  # fmt: skip


@pytest.mark.parametrize("case", SCALED)
def test_scales(case: str) -> None:
    layout, rows, factor = SCALED[case]
    delta = lora(rows)
    (part,) = do(layout, [delta])
    assert part is not None
    dense = delta.materialize()
    expected = torch.stack([dense[row] * factor(row) for row in range(rows)])
    torch.testing.assert_close(part.materialize(), expected)
    (back,) = undo(layout, [part])
    assert back is not None
    torch.testing.assert_close(back.materialize(), dense)


def test_latent_keys_are_turned_head_by_head() -> None:
    """DeepSeek V2: (head, key + value, rank) → keys (head, rank, key) and values."""
    key, value = 5, 3
    delta = lora(KEYS * (key + value))
    dense = delta.materialize()
    keys, values = do(lay.latent_kv, [delta])
    assert isinstance(keys, ExpertLoRA)
    assert isinstance(values, ExpertLoRA)
    for h in range(KEYS):
        start = h * (key + value)
        assert torch.allclose(keys.materialize()[h], dense[start : start + key].T)
        assert torch.allclose(values.materialize()[h], dense[start + key : start + key + value])
    same_bits(undo(lay.latent_kv, [keys, values])[0], delta)


def test_gpt_oss_experts_take_turns() -> None:
    """(expert, hidden, gate up gate up ...) → gates and ups, (expert, f, hidden)."""
    stored = ExpertLoRA(random(1, EXPERTS, 2, 2 * FF), random(2, EXPERTS, HIDDEN, 2), 4.0)
    dense = stored.materialize()
    gates, ups = do(lay.experts_gate_up_woven, [stored])
    assert gates is not None
    assert ups is not None
    for e in range(EXPERTS):
        for f in range(FF):
            assert torch.allclose(gates.materialize()[e, f], dense[e, :, 2 * f])
            assert torch.allclose(ups.materialize()[e, f], dense[e, :, 2 * f + 1])
    same_bits(undo(lay.experts_gate_up_woven, [gates, ups])[0], stored)


@pytest.mark.parametrize("flipped", [False, True])
def test_squares_go_by_the_file(flipped: bool) -> None:
    """Where shapes do not tell, the version that wrote the file does."""
    square = ExpertLoRA(random(1, 2, 3, HIDDEN), random(2, 2, HIDDEN, 3), 4.0, flipped)
    (part,) = do(lay.experts_down, [square])
    assert part is not None
    dense = square.materialize()
    assert torch.allclose(part.materialize(), dense.mT if flipped else dense)


# ── experts ──────────────────────────────────────────────────────────────────────────────────


def test_experts_of_several_ranks_are_padded() -> None:
    experts: Parts = [LoRA(random(n, n + 1, 6), random(n + 9, 5, n + 1), 3.0) for n in range(3)]
    experts[1] = None
    (stack,) = Stack(3).do(experts)
    assert isinstance(stack, ExpertLoRA)
    assert stack.rank == 3
    dense = stack.materialize()
    for number, expert in enumerate(experts):
        wanted = torch.zeros(5, 6) if expert is None else expert.materialize()
        torch.testing.assert_close(dense[number], wanted)
    back = Stack(3).undo([stack])
    assert back[1] is None
    for expert, again in zip(experts, back, strict=True):
        if expert is not None:
            assert again is not None
            assert again.rank == expert.rank
            torch.testing.assert_close(again.materialize(), expert.materialize())


def test_experts_that_were_not_trained_stay() -> None:
    """An up of zeros is no missing expert: its down comes back as it was."""
    experts: Parts = [LoRA(random(n, 2, 6), torch.zeros(5, 2), 3.0) for n in range(2)]
    for expert, again in zip(experts, Stack(2).undo(Stack(2).do(experts)), strict=True):
        same_bits(again, expert)


# ── every model ──────────────────────────────────────────────────────────────────────────────

ALL = [model for model in MODELS if not model.refused]


def named(model: GGUFModel) -> str:
    return f"{model.arch}-{model.classes[0]}"


def adapters_of(model: GGUFModel, **words: object) -> Iterator[tuple[Adapter, object]]:
    base = base_from_config(config_of(model), named(model))
    for steps in step_sets(model):
        if steps[0].targets != ("token_embd",) or not base.is_tied(model):
            yield adapter_for(steps, base, **words), base  # type: ignore[arg-type]


def by_expert(adapter: Adapter) -> dict[str, Tensor]:
    return {path: delta.materialize() for path, delta in adapter.layers.items()}


@pytest.mark.parametrize("model", ALL, ids=named)
def test_there_and_back(model: GGUFModel) -> None:
    """The same factors to the bit; scales that were multiplied in come back by division."""
    for adapter, base in adapters_of(model):
        there = to_gguf(adapter, base)
        assert there.arch == model.arch
        back = from_gguf(there, base)
        layers = {path.replace("language_model.", ""): d for path, d in back.layers.items()}
        again = to_gguf(back, base)
        assert list(again.layers) == list(there.layers)
        for name, delta in there.layers.items():
            torch.testing.assert_close(again.layers[name].materialize(), delta.materialize())
        if layers.keys() != adapter.layers.keys():
            continue  # another spelling of the same modules: GGUF keeps no record of it
        for path, delta in adapter.layers.items():
            assert layers[path].weight_shape == delta.weight_shape
            torch.testing.assert_close(layers[path].materialize(), delta.materialize())
            if "multiplier" not in str(base.config.used):
                assert torch.equal(layers[path].down, delta.down)
                torch.testing.assert_close(layers[path].up, delta.up, rtol=0, atol=0)


@pytest.mark.parametrize("model", ALL, ids=named)
def test_each_class_has_its_rows(model: GGUFModel) -> None:
    for name in model.classes:
        base = base_from_config({**config_of(model), "architectures": [name]}, name)
        assert model in base.models


def test_no_class_stands_twice_without_a_reason() -> None:
    """Rows of one class differ in what they need of the config."""
    seen: dict[str, list[GGUFModel]] = {}
    for model in MODELS:
        for name in model.classes:
            seen.setdefault(name, []).append(model)
    for models in seen.values():
        assert len(models) == 1 or all(model.needs for model in models)


def test_words_that_are_missing_are_asked_for() -> None:
    where = BaseConfig({"hidden_size": 8}, "config.json")
    with pytest.raises(InputError, match="num_attention_heads"):
        do(lay.rotary_q, [lora(8)], where)
    with pytest.raises(InputError, match="ssm_multipliers"):
        do(lay.falcon_h1_in, [lora(8)], config(ssm_multipliers=None))


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(MatchError, match="9 rows"):
        do(lay.rotary_q, [lora(9)])
    with pytest.raises(MatchError, match="not 2 equal"):
        do(lay.halves, [lora(9)])
