"""Several adapters in one pass, with strengths: reference case 33."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from loratools.errors import MatchError

from . import builders, oracles
from .builders import LINEARS, Base, Tensors, lora
from .conftest import Merge


def combined(base: Base, adapters: dict[Path, float]) -> Tensors:
    """Return W + Σ strength·ΔW in float64; every adapter has the scale 1."""
    exact = {name: tensor.double() for name, tensor in base.tensors.items()}
    for adapter, strength in adapters.items():
        moved = oracles.plain_lora(base, adapter, 1.0)
        for name, tensor in base.tensors.items():
            exact[name] += strength * (moved[name] - tensor.double())
    return exact


@pytest.fixture(scope="module")
def three(wide_bf16: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Adapters of ranks 4, 8 and 8; the last leaves one layer alone."""
    folder = tmp_path_factory.mktemp("three")
    every, some = ["first", "second"], ["second"]
    return [
        lora(wide_bf16, folder / str(seed), seed=seed, r=r, lora_alpha=r, target_modules=targets)
        for seed, r, targets in ((1, 4, every), (2, 8, every), (3, 8, some))
    ]


def test_one_rounding(wide_bf16: Base, three: list[Path], merge: Merge) -> None:
    """The float64 sum rounded once, where PEFT rounds after each adapter."""
    strengths = dict(zip(three, (1.0, 0.7, -0.35), strict=True))
    merged = merge(wide_bf16, list(strengths.items())).tensors
    exact = combined(wide_bf16, strengths)
    oracles.assert_close_in_ulps(merged, oracles.rounded(exact, wide_bf16.tensors))
    peft = oracles.peft_merged_in_turn(wide_bf16, strengths)
    assert oracles.changed(merged, wide_bf16) == oracles.changed(peft, wide_bf16)
    assert oracles.error(merged, exact) < 0.9 * oracles.error(peft, exact)


def test_fp32_as_peft(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """In float32 PEFT's sequence of merges is the same sum."""
    strengths = {
        lora(llama, tmp_path / "a", seed=1, r=4, lora_alpha=4, target_modules=LINEARS): 0.5,
        lora(llama, tmp_path / "b", seed=2, r=2, lora_alpha=2, target_modules=["q_proj"]): 2.0,
    }
    merged = merge(llama, list(strengths.items())).tensors
    peft = oracles.peft_merged_in_turn(llama, strengths)
    oracles.assert_agrees(merged, peft, llama, atol=1e-6)
    oracles.assert_close(merged, oracles.rounded(combined(llama, strengths), llama.tensors))


def test_order_and_spelling(wide_bf16: Base, three: list[Path], merge: Merge) -> None:
    """Paths without a strength count once; the order matters no more than float32 does."""
    plain = merge(wide_bf16, three, name="plain").tensors
    pairs = [(path, 1.0) for path in reversed(three)]
    oracles.assert_close_in_ulps(merge(wide_bf16, pairs, name="pairs").tensors, plain)


def test_the_same_bytes_each_time(wide_bf16: Base, three: list[Path], merge: Merge) -> None:
    """Two runs on one machine write the same file."""
    files = [
        merge(wide_bf16, three, name=name).folder / "model.safetensors" for name in ("one", "two")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_opposite_strengths_cancel(wide_bf16: Base, three: list[Path], merge: Merge) -> None:
    """A sum rounded once gives the base back, bit for bit; the merge says that nothing moved."""
    pairs = [(three[2], 1.0), (three[2], -1.0), (three[1], 1.0)]
    merged = merge(wide_bf16, pairs, name="three").tensors
    oracles.assert_close_in_ulps(merged, merge(wide_bf16, three[1], name="one").tensors)


def test_strength_of_dora(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """Strength on DoRA means W + strength·(W' - W)."""
    adapter = lora(llama, tmp_path / "a", r=4, target_modules=LINEARS, use_dora=True)
    merged = merge(llama, [(adapter, 0.25)]).tensors
    full, base = oracles.peft_merged(llama, adapter), llama.tensors
    expected = {name: tensor + 0.25 * (full[name] - tensor) for name, tensor in base.items()}
    oracles.assert_agrees(merged, expected, llama, atol=1e-6)


def test_lora_and_replacement(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """One adapter brings deltas, another deltas and a saved module."""
    first = lora(llama, tmp_path / "a", r=4, lora_alpha=4, target_modules=["q_proj"])
    second = lora(
        llama,
        tmp_path / "b",
        seed=2,
        r=4,
        lora_alpha=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["lm_head"],
    )
    merged = merge(llama, [first, second]).tensors
    saved = builders.adapter_tensors(second)["lm_head.weight"]
    expected = combined(llama, {first: 1.0, second: 1.0}) | {"lm_head.weight": saved}
    oracles.assert_agrees(merged, oracles.rounded(expected, llama.tensors), llama, atol=1e-6)
    assert torch.equal(merged["lm_head.weight"], saved)


def test_two_replacements(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """One tensor cannot hold two different copies; the same copy twice is no contradiction."""
    first, second = (
        lora(
            llama,
            tmp_path / str(seed),
            seed=seed,
            r=4,
            target_modules=["q_proj"],
            modules_to_save=["lm_head"],
        )
        for seed in (1, 2)
    )
    with pytest.raises(MatchError, match="lm_head"):
        merge(llama, [first, second])
    assert not (tmp_path / "merged").exists()
    merged = merge(llama, [first, first]).tensors
    saved = builders.adapter_tensors(first)["lm_head.weight"]
    assert torch.equal(merged["lm_head.weight"], saved)


def test_overlapping_rows(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """Nor can one token's row hold two different vectors; rows apart from each other can meet."""
    first, second, apart = (
        lora(
            llama,
            tmp_path / str(seed),
            seed=seed,
            r=4,
            target_modules=["q_proj"],
            trainable_token_indices=rows,
        )
        for seed, rows in ((1, [5, 3]), (2, [9, 3]), (3, [40]))
    )
    with pytest.raises(MatchError, match="embed_tokens"):
        merge(llama, [first, second])
    merged = merge(llama, [first, apart]).tensors["model.embed_tokens.weight"]
    delta = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert torch.equal(merged[[5, 3]], builders.adapter_tensors(first)[delta])
    assert torch.equal(merged[[40]], builders.adapter_tensors(apart)[delta])


def test_equal_rows(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """The same rows twice: no contradiction at strength 1, but no sum at others."""
    adapter = lora(
        llama, tmp_path / "a", r=4, target_modules=["q_proj"], trainable_token_indices=[5, 3]
    )
    merged = merge(llama, [adapter, adapter]).tensors["model.embed_tokens.weight"]
    delta = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    rows = builders.adapter_tensors(adapter)[delta]
    assert torch.equal(merged[[5, 3]], rows)
    with pytest.raises(MatchError, match="row 5, at strengths other than 1"):
        merge(llama, [(adapter, 0.5), (adapter, 0.25)], name="sum")
    half = merge(llama, (adapter, 0.5), name="half").tensors["model.embed_tokens.weight"]
    before = llama.tensors["model.embed_tokens.weight"][[5, 3]]
    assert torch.allclose(half[[5, 3]], (before + rows) / 2, atol=1e-6)
