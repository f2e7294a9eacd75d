"""Alignment of adapters against dense float64 matrices and principal angles by definition."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from loratools.adapter import Adapter
from loratools.deltas import IA3, DoRA, FullDelta, LayerDelta, LoRA
from loratools.errors import InputError
from loratools.spectra.alignment import PairAlignment, align
from loratools.spectra.alignment_figures import describe_alignment
from tests.strategies import make_tensor


def lora(seed: int, out: int = 8, width: int = 7, rank: int = 3, alpha: float = 2.0) -> LoRA:
    return LoRA(make_tensor(seed, rank, width), make_tensor(seed + 1, out, rank), alpha)


def dense(delta: LoRA) -> np.ndarray:
    return (delta.alpha / len(delta.down) * delta.up.double() @ delta.down.double()).numpy()


def leading_bases(change: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    left, _, right = np.linalg.svd(change)
    return left[:, :count], right[:count].T


def needed(change: np.ndarray) -> int:
    squares = np.linalg.svd(change, compute_uv=False) ** 2
    return int(np.searchsorted(np.cumsum(squares) / squares.sum(), 0.95)) + 1


def smallest_angle(one: np.ndarray, other: np.ndarray) -> float:
    """The angle between two spaces from the distance of their projections, not from a cosine.

    For the closest pair of unit vectors the part of one outside the other space has the length of
    the angle's sine: the smallest singular value of (1 − PPᵀ)Q.
    """
    outside = one - other @ (other.T @ one)
    return math.degrees(math.asin(min(1.0, np.linalg.svd(outside, compute_uv=False)[-1])))


def assert_is_by_definition(pair: PairAlignment, one: np.ndarray, other: np.ndarray) -> None:
    inner = float((one * other).sum())
    assert pair.inner == pytest.approx(inner, rel=1e-5, abs=1e-6)
    norms = np.linalg.norm(one) * np.linalg.norm(other)
    assert pair.cosine == pytest.approx(inner / norms, abs=1e-6)
    count = min(needed(one), needed(other))
    assert pair.leading == count
    sides = zip(leading_bases(one, count), leading_bases(other, count), strict=True)
    for (first, second), side in zip(sides, ("out", "in"), strict=True):
        overlap = np.linalg.norm(first.T @ second) ** 2 / count
        assert getattr(pair, f"overlap_{side}") == pytest.approx(overlap, abs=1e-5)
        assert getattr(pair, f"chance_{side}") == pytest.approx(count / len(first))
        # An angle of nearly 0 is known to the root of the rounding.
        angle = smallest_angle(first, second)
        assert getattr(pair, f"angle_{side}") == pytest.approx(angle, abs=0.05)


@pytest.mark.parametrize("seed", range(6))
def test_pairs_are_by_definition(seed: int) -> None:
    """Unequal ranks, alphas and a partly shared space."""
    one = lora(seed, rank=2 + seed % 3, alpha=3.0)
    other = lora(seed + 50, rank=4, alpha=-1.5)
    if seed % 2:
        other.down[: one.rank] = one.down
    (pair,) = align([Adapter({"h.0.q": one}), Adapter({"h.0.q": other})]).pairs
    assert_is_by_definition(pair, dense(one), dense(other))


def test_dense_changes_and_convolutions() -> None:
    full = FullDelta(make_tensor(1, 5, 4, 3, 3))
    conv = LoRA(make_tensor(2, 2, 4, 3, 3), make_tensor(3, 5, 2, 1, 1), 2.0)
    (pair,) = align([Adapter({"c": full}), Adapter({"c": conv})]).pairs
    flat = LoRA(conv.down.flatten(1), conv.up.flatten(1), 2.0)
    assert_is_by_definition(pair, full.weight.double().flatten(1).numpy(), dense(flat))


def test_an_adapter_and_itself_and_its_opposite() -> None:
    one = {"h.0.q": lora(1), "h.1.q": lora(3)}
    opposite = {path: delta.scaled(-0.5) for path, delta in one.items()}
    found = align([Adapter(one), Adapter(dict(one)), Adapter(opposite)])
    assert found.cosine(0, 1) == pytest.approx(1, abs=1e-6)
    assert found.cosine(0, 2) == pytest.approx(-1, abs=1e-6)
    for pair in found.pairs:
        assert (pair.overlap_out, pair.overlap_in) == pytest.approx((1, 1), abs=1e-5)
        assert (pair.angle_out, pair.angle_in) == pytest.approx((0, 0), abs=0.05)


def test_modules_that_one_lacks_count_as_zero_changes() -> None:
    first = {"h.0.q": lora(1), "h.1.q": lora(3)}
    second = {"h.1.q": lora(5), "h.2.q": lora(7)}
    found = align([Adapter(first), Adapter(second)])
    zero = np.zeros((8, 7))
    paths = ("h.0.q", "h.1.q", "h.2.q")
    rows = [
        np.concatenate([dense(layers[path]) if path in layers else zero for path in paths])
        for layers in (first, second)
    ]
    wanted = (rows[0] * rows[1]).sum() / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1])
    assert found.cosine(0, 1) == pytest.approx(wanted, abs=1e-6)
    assert found.norms == pytest.approx([np.linalg.norm(row) for row in rows], rel=1e-6)
    assert (len(found.pairs), found.modules) == (1, (2, 2))


def test_adapters_of_two_namings_meet() -> None:
    kohya = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    diffusers = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    delta = lora(1, out=640, width=640)
    one = Adapter({kohya: delta}, naming="kohya", arch="sdxl")
    other = Adapter({diffusers: delta.scaled(2)}, naming="diffusers", arch="sdxl")
    found = align([one, other])
    assert [pair.module for pair in found.pairs] == [diffusers]
    assert found.cosine(0, 1) == pytest.approx(1, abs=1e-6)


def test_two_spellings_of_one_naming_meet() -> None:
    """Trainers name SDXL's modules after the original checkpoint, or after diffusers."""
    spellings = (
        "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
    )
    adapters = [
        Adapter({path: lora(1, out=640, width=640)}, naming="kohya", arch="sdxl")
        for path in spellings
    ]
    assert align(adapters).cosine(0, 1) == pytest.approx(1, abs=1e-6)


def test_adapters_that_share_nothing_are_refused() -> None:
    with pytest.raises(InputError, match="share"):
        align([Adapter({"h.0.q": lora(1)}), Adapter({"h.0.k": lora(1)})])


def test_a_change_that_is_zero_has_no_direction() -> None:
    still = LoRA(make_tensor(1, 3, 7), torch.zeros(8, 3), 2.0)
    found = align([Adapter({"h.0.q": lora(1)}), Adapter({"h.0.q": still})])
    (pair,) = found.pairs
    assert dataclasses.astuple(pair)[3:] == (0.0, *[None] * 8)
    assert found.cosine(0, 1) is None


def test_what_cannot_be_compared_is_told() -> None:
    layers: dict[str, LayerDelta] = {
        "h.0.q": DoRA(lora(1), torch.ones(8)),
        "h.0.ia": IA3(make_tensor(1, 7), True, shape=(8, 7)),
        "h.0.wide": lora(3),
    }
    others = {**layers, "h.0.wide": lora(3, width=9)}
    found = align([Adapter(layers), Adapter(others)])
    assert [pair.module for pair in found.pairs] == ["h.0.q"]
    assert "8x7 and 8x9" in found.uncovered["h.0.wide"]
    report = describe_alignment(found, ["a", "b"])
    assert {note.subject for note in report.warnings} == {"h.0.ia", "h.0.wide"}


def test_the_report() -> None:
    adapters = [Adapter({"h.0.q": lora(n), "h.1.q": lora(n + 9)}) for n in (1, 20, 40)]
    found = align(adapters)
    report = describe_alignment(found, ["a", "b", "c"])
    facts = report.facts
    assert facts["compared"] == ["a", "b", "c"]
    assert facts["modules_shared"] == [[2] * 3] * 3
    for name in ("cosine", "overlap_out", "overlap_in"):
        matrix = np.array(facts[name])
        assert (matrix == matrix.T).all()
        assert (matrix.diagonal() == 1).all()
    assert facts["cosine"][0][2] == found.cosine(0, 2)
    means = [pair.overlap_out for pair in found.pairs if (pair.first, pair.second) == (0, 1)]
    assert facts["overlap_out"][0][1] == pytest.approx(sum(means) / 2)
    assert len(report.items) == 6
    assert {(item["first"], item["second"]) for item in report.items} == {
        ("a", "b"), ("a", "c"), ("b", "c")
    }  # fmt: skip
    assert list(report.items[0]) == [
        "module", "first", "second", "inner", "cosine", "leading", "overlap_out", "overlap_in",
        "chance_out", "chance_in", "angle_out", "angle_in",
    ]  # fmt: skip
