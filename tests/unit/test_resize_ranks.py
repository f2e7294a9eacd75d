"""Rules for ranks: sd-scripts' counts, caps, layers in step, and refusals."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.errors import OptionError
from loratools.resizing.ranks import Candidate, RankRule, check_rule, choose_ranks
from loratools.svd_resize import parse_size
from tests.strategies import make_tensor


def candidate(values: list[float], shape: tuple[int, int] = (8, 8), **more: object) -> Candidate:
    return Candidate(torch.tensor(values, dtype=torch.float64), shape, **more)  # type: ignore[arg-type]


# ── sd-scripts ───────────────────────────────────────────────────────────────────────────────


def sd_ratio(values: list[float], given: float) -> int:
    count = sum(value > values[0] / given for value in values)
    return max(1, min(count, len(values) - 1)) + 1


def sd_cumulative(values: list[float], given: float) -> int:
    return _first_reaching(values, given)


def sd_fro(values: list[float], given: float) -> int:
    return _first_reaching([value**2 for value in values], given**2)


def _first_reaching(weights: list[float], share: float) -> int:
    """searchsorted of the normalised running sum, one more, clamped, and one more again."""
    sums = [math.fsum(weights[: n + 1]) / math.fsum(weights) for n in range(len(weights))]
    index = sum(value < share for value in sums) + 1
    return max(1, min(index, len(weights) - 1)) + 1


TOOLS: dict[str, Callable[[list[float], float], int]] = {
    "sv_ratio": sd_ratio,
    "sv_cumulative": sd_cumulative,
    "sv_fro": sd_fro,
}


@pytest.mark.parametrize("mode", TOOLS)
@given(seed=st.integers(0, 2**31), part=st.floats(0.05, 0.999), most=st.integers(1, 9))
@settings(max_examples=40)
def test_counts_of_sd_scripts(mode: str, seed: int, part: float, most: int) -> None:
    """Of the dense matrix, zeros beyond the stored rank included."""
    up, down = make_tensor(seed, 9, 5).double(), make_tensor(seed + 1, 5, 7).double()
    dense = torch.linalg.svdvals(up @ down)
    given_ = 1 / part if mode == "sv_ratio" else part
    expected = min(TOOLS[mode](dense.tolist(), given_), most)
    layer = candidate(dense[:5].tolist(), (9, 7))
    rule = RankRule(compat="sd-scripts", max_rank=most, **{mode: given_})  # type: ignore[arg-type]
    assert choose_ranks([layer], rule) == [expected]
    plain = RankRule(max_rank=most, **{mode: given_})  # type: ignore[arg-type]
    assert choose_ranks([layer], plain)[0] <= expected


def test_sd_scripts_takes_small_changes_for_zero() -> None:
    rule = RankRule(sv_fro=0.9, compat="sd-scripts")
    tiny = candidate([4e-7, 3e-7, 2e-7])
    assert choose_ranks([tiny], rule) == [1]
    # It looks at up @ down, before alpha / rank.
    scaled = candidate([4e-7, 3e-7, 2e-7], scale=1e-3)
    assert choose_ranks([scaled], rule) == [3]


def test_sd_scripts_counts_pointwise_convolutions_as_such() -> None:
    layers = [
        candidate([1.0] * 8),
        candidate([1.0] * 8, has_kernel=True),
        candidate([1.0] * 8, has_kernel=True, is_convolution=True),
    ]
    assert choose_ranks(layers, RankRule(rank=4, conv_rank=2)) == [4, 4, 2]
    compat = RankRule(rank=4, conv_rank=2, compat="sd-scripts")
    assert choose_ranks(layers, compat) == [4, 2, 2]


# ── choosing ─────────────────────────────────────────────────────────────────────────────────


def test_a_rank_above_some_shapes_is_capped_and_above_all_refused() -> None:
    layers = [candidate([1.0], (8, 8)), candidate([1.0], (8, 3))]
    assert choose_ranks(layers, RankRule(rank=5)) == [5, 3]
    with pytest.raises(OptionError, match="above the shape") as failure:
        choose_ranks(layers, RankRule(rank=9))
    assert "8" in (failure.value.hint or "")


def test_layers_that_must_agree_do() -> None:
    values = ([4.0, 3, 0.1], [4.0, 0.1, 0.1])
    layers = [candidate(list(one), together="attention", cost=10) for one in values]
    assert choose_ranks(layers, RankRule(energy=0.9)) == [2, 2]
    # A budget is kept: the smaller of the two.
    assert choose_ranks(layers, RankRule(max_size=31)) == [1, 1]


def test_a_most_rank_binds_every_rule() -> None:
    layers = [candidate([3.0, 2.0, 1.0]) for _ in range(2)]
    for rule in (
        RankRule(energy=1.0, max_rank=2),
        RankRule(energy=1.0, max_rank=2, everywhere=True),
        RankRule(mean_rank=3, max_rank=2),
    ):
        assert choose_ranks(layers, rule) == [2, 2]


def test_a_size_that_rank_one_exceeds_is_refused() -> None:
    layers = [candidate([1.0, 1.0], cost=100)]
    with pytest.raises(OptionError, match="150 bytes"):
        choose_ranks(layers, RankRule(max_size=149), fixed_bytes=50)
    assert choose_ranks(layers, RankRule(max_size=150), fixed_bytes=50) == [1]
    assert choose_ranks(layers, RankRule(max_size=250), fixed_bytes=50) == [2]


# ── refusals ─────────────────────────────────────────────────────────────────────────────────

WRONG = [
    RankRule(),
    RankRule(rank=4, energy=0.5),
    RankRule(rank=0),
    RankRule(rank=4, conv_rank=0),
    RankRule(energy=0.0),
    RankRule(energy=1.01),
    RankRule(energy=math.nan),
    RankRule(sv_cumulative=-0.5),
    RankRule(sv_fro=2.0),
    RankRule(sv_ratio=0.5),
    RankRule(mean_rank=0.5),
    RankRule(energy=0.5, max_rank=0),
    RankRule(energy=0.5, conv_rank=3),
    RankRule(rank=4, max_rank=3),
    RankRule(rank=4, everywhere=True),
    RankRule(rank=4, compat="a1111"),
    RankRule(mean_rank=4, compat="sd-scripts"),
]


@pytest.mark.parametrize("rule", WRONG, ids=str)
def test_meaningless_rules_are_refused(rule: RankRule) -> None:
    with pytest.raises(OptionError):
        check_rule(rule)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64MiB", 64 * 1024**2),
        ("64 MB", 64_000_000),
        ("1.5GB", 1_500_000_000),
        ("10k", 10_000),
        ("3KiB", 3072),
        ("4096", 4096),
        (77, 77),
    ],
)
def test_sizes(text: str | int, expected: int) -> None:
    assert parse_size(text) == expected


@pytest.mark.parametrize("text", ["", "64 parsecs", "-3MB", "MB", "1e3"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(OptionError, match="no size"):
        parse_size(text)
