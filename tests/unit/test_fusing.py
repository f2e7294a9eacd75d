"""Layout steps in terms of W': fused and split projections, reordered rows, other shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas import (
    BOFT,
    IA3,
    OFT,
    AdditiveDelta,
    DoRA,
    FullDelta,
    GLoRA,
    LayerDelta,
    LoHa,
    LoKr,
    LoRA,
    MovedBase,
    Replacement,
    SparseResidual,
    SumDelta,
    TuckerLoRA,
    fuse_rows,
)
from loratools.errors import UnsupportedError
from tests.strategies import alphas, make_tensor

Heights = Sequence[int]
TOLERANCE = 1e-6


# ── making deltas of given rows, float32 ─────────────────────────────────────────────────────


def lora(seed: int, out: int, rank: int = 2, alpha: float = 1.0, inner: int = 5) -> LoRA:
    return LoRA(make_tensor(seed, rank, inner), make_tensor(seed + 1, out, rank), alpha)


def biased(seed: int, out: int, rank: int, alpha: float) -> LoRA:
    return replace(lora(seed, out, rank, alpha), bias=make_tensor(seed + 2, out))


def loha(seed: int, out: int, rank: int = 2, alpha: float = 1.0) -> LoHa:
    one, two = lora(seed, out, rank), lora(seed + 9, out, rank)
    return LoHa(one.up, one.down, two.up, two.down, alpha)


def cored_loha(seed: int, out: int, rank: int = 2, alpha: float = 1.0) -> LoHa:
    cores = [make_tensor(seed + 5 + n, rank, rank, 3) for n in range(2)]
    plain = loha(seed, out, rank, alpha)
    return replace(plain, w1_a=plain.w1_a.T, w2_a=plain.w2_a.T, t1=cores[0], t2=cores[1])


def tucker(seed: int, out: int, rank: int = 2, alpha: float = 1.0) -> TuckerLoRA:
    core, up = make_tensor(seed + 1, rank + 1, rank, 3), make_tensor(seed + 2, out, rank + 1, 1)
    return TuckerLoRA(make_tensor(seed, rank, 5, 1), core, up, alpha)


def full(seed: int, out: int, rank: int = 2, alpha: float = 1.0) -> FullDelta:
    return FullDelta(make_tensor(seed, out, 5), make_tensor(seed + 1, out) if seed % 2 else None)


def sparse(seed: int, out: int, rank: int = 2, alpha: float = 1.0) -> SparseResidual:
    places = torch.tensor([[seed % out, 2], [seed // 3 % out, 4], [0, 1]], dtype=torch.int16).T
    return SparseResidual(places, make_tensor(seed, 3), (out, 5), 0.5 + seed % 2)


def total(seed: int, out: int, rank: int = 2, alpha: float = 1.0) -> SumDelta:
    return SumDelta((lora(seed, out, rank, alpha), full(seed + 2, out), sparse(seed, out)))


def output_ia3(seed: int, out: int, rank: int = 2, alpha: float = 1.0) -> IA3:
    return IA3(make_tensor(seed, out), on_input=False)


def oft(seed: int, out: int, rank: int = 2, alpha: float = 1.0) -> OFT:
    rescale = make_tensor(seed + 1, out, 1) if seed % 2 else None
    blocks = make_tensor(seed, out // 2, 2, 2)
    return OFT(blocks, (0.0, 0.01, 5.0)[seed % 3], rescale, "lycoris")


def dora(seed: int, out: int, rank: int = 2, alpha: float = 1.0) -> DoRA:
    return DoRA(lora(seed, out, rank, alpha), make_tensor(seed + 2, out))


def glora(seed: int, out: int, rank: int = 2, alpha: float = 1.0) -> GLoRA:
    left, right = make_tensor(seed + 2, 5, rank), make_tensor(seed + 3, rank, 5)
    pair = lora(seed, out, rank)
    return GLoRA(left, right, pair.up, pair.down, alpha)


def column_dora(seed: int, out: int, rank: int = 2, alpha: float = 1.0) -> DoRA:
    return DoRA(loha(seed, out, rank, alpha), make_tensor(seed + 2, 5), "in")


Maker = Callable[[int, int, int, float], LayerDelta]
ADDITIVE: tuple[Maker, ...] = (lora, biased, loha, cored_loha, tucker, full, sparse, total)
SPLITTABLE: tuple[Maker, ...] = (*ADDITIVE, output_ia3, oft, dora, glora)
FUSABLE_WITH_GAPS: tuple[Maker, ...] = (*ADDITIVE, output_ia3, oft)


def width(delta: LayerDelta) -> int:
    return 15 if len(delta.weight_shape) > 2 else 5


def changed(delta: LayerDelta | None, weight: Tensor) -> Tensor:
    """Return W' − W in the weight's shape, by the delta's own formula (tested elsewhere)."""
    if delta is None:
        return torch.zeros_like(weight)
    shape = (len(weight), 5, 3) if weight.shape[1] == 15 else tuple(weight.shape)
    fitted = delta.reshaped(shape)
    return (fitted.apply(weight.reshape(shape)).double() - weight.reshape(shape)).reshape(
        weight.shape
    )


def stacked(parts: Sequence[LayerDelta | None], weight: Tensor, heights: Heights) -> Tensor:
    pieces = zip(parts, weight.split(list(heights)), strict=True)
    return torch.cat([changed(part, piece) for part, piece in pieces])


def bias_of(delta: LayerDelta | None, out: int) -> Tensor:
    change = None if delta is None else delta.bias_change
    return torch.zeros(out) if change is None else change


def assert_same(actual: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(
        actual, wanted, rtol=0, atol=TOLERANCE * (4 + float(wanted.abs().max()) * 4)
    )


heights = st.lists(st.integers(1, 4).map(lambda n: 2 * n), min_size=2, max_size=4)
seeds = st.integers(0, 10_000)
ranks = st.integers(1, 3)


# ── properties ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", SPLITTABLE, ids=lambda f: f.__name__)
@given(heights=heights, seed=seeds, rank=ranks, alpha=alphas)
def test_blocks_of_a_split_change_what_the_whole_does(
    make: Maker, heights: list[int], seed: int, rank: int, alpha: float
) -> None:
    delta = make(seed, sum(heights), rank, alpha)
    weight = make_tensor(seed + 50, sum(heights), width(delta))
    parts = delta.split_rows(heights)
    assert_same(stacked(parts, weight, heights), changed(delta, weight))
    biases = torch.cat([bias_of(part, n) for part, n in zip(parts, heights, strict=True)])
    assert_same(biases, bias_of(delta, sum(heights)))


@pytest.mark.parametrize("make", SPLITTABLE, ids=lambda f: f.__name__)
@given(heights=heights, seed=seeds, rank=ranks, alpha=alphas)
def test_fusing_undoes_splitting(
    make: Maker, heights: list[int], seed: int, rank: int, alpha: float
) -> None:
    delta = make(seed, sum(heights), rank, alpha)
    weight = make_tensor(seed + 50, sum(heights), width(delta))
    fused = fuse_rows(delta.split_rows(heights), heights)
    assert fused.kind == delta.kind
    assert getattr(fused, "rank", None) == getattr(delta, "rank", None)
    assert_same(changed(fused, weight), changed(delta, weight))
    assert_same(bias_of(fused, sum(heights)), bias_of(delta, sum(heights)))


@pytest.mark.parametrize("make", FUSABLE_WITH_GAPS, ids=lambda f: f.__name__)
@given(data=st.data(), heights=heights, seed=seeds)
def test_unlike_parts_fuse_exactly_and_split_again(
    make: Maker, data: st.DataObject, heights: list[int], seed: int
) -> None:
    """Own ranks, own alphas, parts missing: fused, the stacked change; split again, the parts'."""
    present = [True, *(data.draw(st.booleans()) for _ in heights[1:])]
    parts = [
        make(seed + 20 * j, n, data.draw(ranks), data.draw(alphas)) if here else None
        for j, (n, here) in enumerate(zip(heights, present, strict=True))
    ]
    weight = make_tensor(seed, sum(heights), width(next(p for p in parts if p)))
    fused = fuse_rows(parts, heights)
    wanted = stacked(parts, weight, heights)
    assert_same(changed(fused, weight), wanted)
    again = fused.split_rows(heights)
    assert_same(stacked(again, weight, heights), wanted)
    if isinstance(fused, AdditiveDelta):
        assert [part is not None for part in again] == present
    if make is lora:
        assert [p and p.rank for p in again] == [p and p.rank for p in parts]


@given(heights=heights, seed=seeds, data=st.data())
def test_additive_parts_of_any_kinds_fuse(
    heights: list[int], seed: int, data: st.DataObject
) -> None:
    makers = st.sampled_from((lora, loha, full, sparse, total))
    parts = [data.draw(makers)(seed + j, n, 2, 3.0) for j, n in enumerate(heights)]
    weight = make_tensor(seed, sum(heights), 5)
    assert_same(changed(fuse_rows(parts, heights), weight), stacked(parts, weight, heights))


@pytest.mark.parametrize(
    "make", [*ADDITIVE, output_ia3, dora, column_dora, glora], ids=lambda f: f.__name__
)
@given(out=st.integers(2, 9), seed=seeds, rank=ranks, alpha=alphas)
def test_reordered_rows(make: Maker, out: int, seed: int, rank: int, alpha: float) -> None:
    """The reordered delta does to W[order] what the delta does to W."""
    delta = make(seed, out, rank, alpha)
    weight = make_tensor(seed + 50, out, width(delta))
    order = torch.randperm(out, generator=torch.Generator().manual_seed(seed))
    moved = delta.permute_rows(order.tolist())
    assert_same(changed(moved, weight[order]), changed(delta, weight)[order])
    assert_same(bias_of(moved, out), bias_of(delta, out)[order])
    assert moved.tensors().keys() == delta.tensors().keys()


@given(out1=st.integers(1, 3), out2=st.integers(1, 3), seed=seeds)
def test_kronecker_and_rotation_rows_reorder_in_blocks(out1: int, out2: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    outer, within = (torch.randperm(n, generator=generator) for n in (out1, out2))
    order = (outer[:, None] * out2 + within).flatten()
    weight = make_tensor(seed, out1 * out2, 4)
    lokr = LoKr(1.0, w1=make_tensor(seed, out1, 2), w2=make_tensor(seed + 1, out2, 2))
    rotation = OFT(make_tensor(seed, out1, out2, out2), 0.1, make_tensor(seed, out1 * out2))
    for delta in (lokr, rotation):
        moved = delta.permute_rows(order)
        assert_same(changed(moved, weight[order]), changed(delta, weight)[order])


# ── fused LoRA ───────────────────────────────────────────────────────────────────────────────


def test_a_dense_fused_projection_splits_with_its_down_shared() -> None:
    """Chunking the rank axis, as one tool's reverse converter does, would give another ΔW."""
    dense = lora(1, 12, rank=6, alpha=3.0)
    parts = dense.split_rows([4, 4, 4])
    assert all(part.down is dense.down and part.alpha == 3.0 for part in parts)
    chunks = zip(dense.up.chunk(3), dense.down.chunk(3), strict=True)
    chunked = torch.cat([u[:, 2 * j : 2 * j + 2] @ d for j, (u, d) in enumerate(chunks)])
    assert (chunked * 0.5 - dense.materialize()).norm() > 0.3 * dense.materialize().norm()


def test_ranks_add_up_and_alpha_with_them() -> None:
    """Three parts of one scale: alpha is three times theirs, factors keep their dtype."""
    parts = [
        lora(10 * j, 4, rank=8, alpha=4.0).map_tensors(lambda t: t.bfloat16()) for j in range(3)
    ]
    fused = fuse_rows(parts, [4, 4, 4])
    assert (fused.rank, fused.alpha) == (24, 12.0)
    assert {t.dtype for t in fused.tensors().values()} == {torch.bfloat16}
    again = fused.split_rows([4, 4, 4])
    assert [(part.rank, part.alpha) for part in again] == [(8, 4.0)] * 3
    for part, old in zip(again, parts, strict=True):
        assert torch.equal(part.down, old.down)
        assert torch.equal(part.up, old.up)


def test_unequal_groups_and_dead_columns_are_found() -> None:
    """Blocks of ranks 8, 16 and 0; a column that never trained stays with its block."""
    up = torch.zeros(9, 24)
    up[:3, :8], up[3:6, 8:] = make_tensor(1, 3, 8), make_tensor(2, 3, 16)
    up[:, 3] = 0
    whole = LoRA(make_tensor(3, 24, 5), up, 12.0)
    first, second, third = whole.split_rows([3, 3, 3])
    assert (first.rank, second.rank, third) == (8, 16, None)
    assert (first.alpha, second.alpha) == (4.0, 8.0)


@pytest.mark.parametrize("scaled", ["same", "alpha", "down"])
def test_a_shared_down_is_found(scaled: str) -> None:
    """Equal as stored, with other alphas, or only once scales are folded in."""
    down = make_tensor(1, 4, 5)
    ups = [make_tensor(2 + j, 3, 4) for j in range(3)]
    factors = [1.0, 2.0, 4.0]
    parts = [
        {
            "same": LoRA(down, up, 4.0),
            "alpha": LoRA(down, up, 4.0 * f),
            "down": LoRA(down * f, up, 4.0 / f),
        }[scaled]
        for up, f in zip(ups, factors, strict=True)
    ]
    fused = fuse_rows(parts, [3, 3, 3])
    assert fused.rank == 4
    wanted = torch.cat([p.alpha / 4 * p.up.double() @ p.down.double() for p in parts])
    assert_same(fused.materialize().double(), wanted)


def test_two_of_three_share() -> None:
    down, other = make_tensor(1, 4, 5), make_tensor(2, 2, 5)
    parts = [LoRA(down, make_tensor(3, 2, 4), 4.0), None, LoRA(other, make_tensor(4, 2, 2), 2.0)]
    parts.append(LoRA(down, make_tensor(5, 2, 4), 4.0))
    fused = fuse_rows(parts, [2, 3, 2, 2])
    assert fused.rank == 6
    assert_same(fused.materialize()[7:], parts[3].materialize())


def test_a_file_that_never_trained_keeps_its_parts() -> None:
    """Where everything is zero, nothing is missing: ΔW is 0, and the keys stay."""
    parts = replace(lora(1, 6), up=torch.zeros(6, 2)).split_rows([2, 4])
    assert [part.weight_shape for part in parts] == [(2, 5), (4, 5)]


def test_eight_bit_factors() -> None:
    """fp8 files: comparing and gathering such tensors is not implemented in torch."""
    whole = lora(1, 6).map_tensors(lambda t: t.to(torch.float8_e4m3fn))
    wanted = whole.materialize()
    parts = whole.split_rows([4, 2])
    fused = fuse_rows(parts, [4, 2])
    assert (fused.rank, fused.up.dtype) == (2, torch.float8_e4m3fn)
    assert torch.equal(fused.materialize(), wanted)
    order = [3, 4, 5, 0, 1, 2]
    assert torch.equal(fused.permute_rows(order).materialize(), wanted[order])
    mixed = fuse_rows([parts[0], lora(7, 2)], [4, 2])
    assert_same(mixed.materialize(), torch.cat([wanted[:4], lora(7, 2).materialize()]))


def test_split_qkv_alpha_of_sd_scripts() -> None:
    """Rank 3r with alpha unchanged means a third of what was trained, whoever reads it."""
    trained = [lora(10 * j, 4, rank=2, alpha=2.0) for j in range(3)]
    saved = replace(fuse_rows(trained, [4, 4, 4]), alpha=2.0)
    wanted = torch.cat([part.materialize() for part in trained])
    assert_same(3 * saved.materialize(), wanted)


# ── other kinds ──────────────────────────────────────────────────────────────────────────────


def test_kronecker_products_split_on_boundaries_bit_for_bit() -> None:
    whole = LoKr(2.0, w1=make_tensor(1, 6, 2), w2_a=make_tensor(2, 4, 3), w2_b=make_tensor(3, 3, 5))
    parts = whole.split_rows([8, 12, 4])
    assert torch.equal(torch.cat([part.materialize() for part in parts]), whole.materialize())
    assert all(part.w2_a is whole.w2_a for part in parts)
    fused = fuse_rows(parts, [8, 12, 4])
    assert isinstance(fused, LoKr)
    assert torch.equal(fused.materialize(), whole.materialize())
    gap = fuse_rows([parts[0], None, parts[2]], [8, 12, 4]).materialize()
    assert not gap[8:20].any()
    assert torch.equal(gap[20:], whole.materialize()[20:])


def test_kronecker_products_of_their_own_fuse_to_a_lora() -> None:
    parts = [
        LoKr(2.0, w1=make_tensor(j, 2, 2), w2_a=make_tensor(j + 5, 4, 1), w2_b=make_tensor(j, 1, 5))
        for j in range(2)
    ]
    fused = fuse_rows(parts, [8, 8])
    assert isinstance(fused, LoRA)
    assert fused.rank == 4
    assert_same(fused.materialize(), torch.cat([part.materialize() for part in parts]))


def test_input_factors_are_copied_and_must_agree() -> None:
    delta = IA3(make_tensor(1, 5), on_input=True)
    parts = delta.split_rows([2, 4])
    assert all(torch.equal(part.weight, delta.weight) for part in parts)
    assert torch.equal(fuse_rows(parts, [2, 4]).weight, delta.weight)
    with pytest.raises(UnsupportedError, match="factors of the input differ"):
        fuse_rows([delta, IA3(make_tensor(2, 5), on_input=True)], [2, 4])


def test_a_bound_that_shrinks_holds_for_the_parts_together() -> None:
    """Split, each part would have a bound of its own: what was shrunk must stay shrunk."""
    whole = OFT(make_tensor(1, 4, 2, 2), 0.01)
    weight = make_tensor(2, 8, 3)
    parts = whole.split_rows([2, 6])
    joined = torch.cat([p.apply(w) for p, w in zip(parts, weight.split([2, 6]), strict=True)])
    assert_same(joined, whole.apply(weight))


def test_replacements_are_stacked() -> None:
    whole = Replacement(make_tensor(1, 6, 2))
    parts = whole.split_rows([2, 4])
    assert torch.equal(fuse_rows(parts, [2, 4]).value, whole.value)
    order = [5, 4, 3, 2, 1, 0]
    assert torch.equal(whole.permute_rows(order).value, whole.value[order])
    with pytest.raises(UnsupportedError, match="missing rows"):
        fuse_rows([parts[0], None], [2, 4])


@pytest.mark.parametrize(
    ("delta", "heights", "reason"),
    [
        (column_dora(1, 6), [2, 4], "lengths of columns"),
        (BOFT(make_tensor(1, 1, 2, 2, 2)), [2, 2], "depend on each other"),
        (OFT(make_tensor(1, 2, 3, 3), 0.0), [2, 4], "blocks of 3 rows"),
        (LoKr(1.0, w1=make_tensor(1, 2, 2), w2=make_tensor(2, 3, 2)), [2, 4], "multiples of the 3"),
        (MovedBase(lora(1, 6), "pissa"), [2, 4], "depend on each other"),
        (lora(1, 6), [2, 3], "another number of rows"),
        (lora(1, 6), [6, 0], "another number of rows"),
    ],
    ids=lambda value: getattr(value, "kind", None),
)
def test_refused_splits_say_why(delta: LayerDelta, heights: list[int], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason) as caught:
        delta.split_rows(heights)
    assert delta.kind in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ([dora(1, 2), None], "lengths that only W knows"),
        ([dora(1, 2), lora(2, 4)], "do not add up: dora, lora"),
        ([glora(1, 2), glora(2, 4)], "changes of the input differ"),
        ([oft(2, 2), OFT(make_tensor(1, 1, 4, 4), 0.0)], "different sizes"),
        ([column_dora(1, 2), column_dora(2, 4)], "lengths of columns"),
        ([lora(1, 2), lora(2, 4, inner=6)], "shapes differ"),
        ([lora(1, 2), lora(2, 5)], "another number of rows"),
    ],
)
def test_refused_fusions_say_why(parts: list[Any], reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        fuse_rows(parts, [2, 4])


def test_refused_orders_say_why() -> None:
    lokr = LoKr(1.0, w1=make_tensor(1, 3, 2), w2=make_tensor(2, 2, 2))
    with pytest.raises(UnsupportedError, match="cuts through the 2 rows"):
        lokr.permute_rows([3, 4, 5, 0, 1, 2])
    with pytest.raises(UnsupportedError, match="blocks of 2 rows"):
        OFT(make_tensor(1, 3, 2, 2), 0.0).permute_rows([3, 4, 5, 0, 1, 2])
    with pytest.raises(UnsupportedError, match="each of its rows once"):
        lora(1, 3).permute_rows([0, 0, 2])


# ── shapes, ranks, DyLoRA ────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", ADDITIVE, ids=lambda f: f.__name__)
def test_reshaped_keeps_every_element(make: Maker) -> None:
    delta = make(3, 4, 2, 3.0)
    if make is tucker:
        delta = delta.low_rank()
    for shape in ((4, width(delta)), (4, width(delta), 1, 1), delta.weight_shape):
        moved = delta.reshaped(shape)
        assert moved.weight_shape == shape
        assert torch.equal(moved.materialize().flatten(), delta.materialize().flatten())
    for wrong in ((2, 2 * width(delta)), (4, 6)):
        with pytest.raises(UnsupportedError, match="shapes differ"):
            delta.reshaped(wrong)


def test_low_rank_views_are_of_least_rank() -> None:
    assert loha(1, 6, 2).low_rank().rank == 4
    thin = torch.outer(torch.arange(1.0, 5.0), torch.tensor([2.0, -1.0, 3.0]))
    lokr = LoKr(1.0, w1=thin, w2_a=make_tensor(3, 4, 3), w2_b=make_tensor(4, 3, 5))
    assert lokr.low_rank().rank == 3
    both = SumDelta((lora(1, 6, 2, 3.0), loha(2, 6, 2, 5.0)))
    assert both.low_rank().rank == 6
    assert_same(both.low_rank().materialize(), both.materialize())
    assert SumDelta((lora(1, 6), full(2, 6))).low_rank() is None


@given(seed=seeds, rank=st.integers(1, 6), alpha=alphas)
def test_leading_part_is_what_dylora_trained(seed: int, rank: int, alpha: float) -> None:
    """Its forward pass at rank b: (alpha/r)·√(r/b) · up[:, :b] · down[:b]."""
    whole = lora(seed, 4, rank=6, alpha=alpha)
    cut = whole.leading(rank)
    wanted = torch.einsum("or,ri->oi", whole.up[:, :rank].double(), whole.down[:rank].double())
    wanted *= alpha / 6 * math.sqrt(6 / rank)
    assert cut.rank == rank
    assert_same(cut.materialize().double() / abs(alpha), wanted / abs(alpha))


def test_leading_part_beyond_the_rank_is_refused() -> None:
    for rank in (0, 7):
        with pytest.raises(UnsupportedError, match=f"rank {rank}"):
            lora(1, 4, rank=6).leading(rank)


def test_a_bias_alone_changes_no_weight() -> None:
    delta = FullDelta(bias=make_tensor(1, 4))
    weight = make_tensor(2, 4, 3)
    assert not delta.changes_weight
    assert torch.equal(delta.apply(weight), weight)
    joined = SumDelta((lora(1, 4), delta))
    assert joined.weight_shape == (4, 5)
    assert torch.equal(joined.bias_change, delta.bias)
    first, second = joined.split_rows([1, 3])
    assert_same(torch.cat([first.bias_change, second.bias_change]), delta.bias)
    whole = fuse_rows([first, None], [1, 3])
    assert torch.equal(whole.bias_change, torch.cat([delta.bias[:1], torch.zeros(3)]))
