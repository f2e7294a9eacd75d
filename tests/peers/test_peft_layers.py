"""Convolutions, embeddings, attention and DoRA: reference cases 8 to 12."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loratools.errors import LoratoolsError

from . import builders, oracles
from .builders import HIDDEN, LINEARS, Attention, Base, Convs, Embedded, custom, lora
from .conftest import Merge

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
KERNELS = ["line", "point", "square", "pixel", "oblong", "cube"]


def assert_forward(
    base: Base, adapter: Path, merged: Path, inputs: torch.Tensor, atol: float = 1e-4
) -> None:
    """Assert that the merged folder computes what the adapter model does, and the base does not."""
    expected = oracles.output(oracles.peft_model(base, adapter), inputs)
    assert (oracles.output(base.load(merged), inputs) - expected).abs().max() < atol
    assert (oracles.output(base.load(), inputs) - expected).abs().max() > 10 * atol


def noise(*shape: int) -> torch.Tensor:
    """Return the same normal numbers each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


@DTYPES
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_convolutions(tmp_path: Path, merge: Merge, dtype: torch.dtype, dora: bool) -> None:
    """Cases 9 and 11: Conv1d, Conv2d and Conv3d of several kernels, with biases."""
    base = custom(tmp_path / "base", Convs, dtype)
    adapter = lora(base, tmp_path / "a", r=4, target_modules=KERNELS, use_dora=dora)
    merged = merge(base, adapter)
    atol = 1e-6 if dtype == torch.float32 else None
    oracles.assert_agrees(merged.tensors, oracles.peft_merged(base, adapter), base, atol=atol)
    if dtype == torch.float32:
        assert_forward(base, adapter, merged.folder, noise(2, 1200))


def test_thin_conv3d(tmp_path: Path, merge: Merge) -> None:
    """Case 11: a Conv3d kernel of (1, 1, 3).

    PEFT is wrong: it takes such a kernel for a 1 x 1 convolution and its merge raises. The
    oracles are the formula and the adapter's own forward pass.
    """
    base = custom(tmp_path / "base", builders.ThinCube)
    adapter = lora(base, tmp_path / "a", r=2, lora_alpha=6, target_modules=["cube"])
    with pytest.raises(RuntimeError):
        oracles.peft_merged(base, adapter)
    merged = merge(base, adapter)
    weight = base.tensors["cube.weight"]
    delta = oracles.linear_delta(builders.adapter_tensors(adapter), "cube", 3.0)
    expected = weight.double() + delta.reshape(weight.shape)
    assert (merged.tensors["cube.weight"].double() - expected).abs().max() < 1e-6
    assert_forward(base, adapter, merged.folder, noise(2, 1200))


def test_grouped_convolution_is_refused(tmp_path: Path, merge: Merge) -> None:
    """§2.4: the product of PEFT's factors is dense, which a grouped weight cannot hold."""
    base = custom(tmp_path / "base", builders.Grouped)
    adapter = lora(base, tmp_path / "a", r=4, target_modules=["conv"])
    with pytest.raises(NotImplementedError):
        oracles.peft_merged(base, adapter)
    with pytest.raises(LoratoolsError, match="conv"):
        merge(base, adapter)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("make", [Embedded, builders.SquareEmbedded])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_embedding(
    tmp_path: Path, merge: Merge, dora: bool, make: Callable[[], torch.nn.Module]
) -> None:
    """Cases 9 and 10: ΔW = s·(B·A)ᵀ; DoRA takes its norm over the vocabulary."""
    base = custom(tmp_path / "base", make)
    adapter = lora(base, tmp_path / "a", r=4, lora_alpha=8, target_modules=["embed"], use_dora=dora)
    merged = merge(base, adapter)
    oracles.assert_agrees(merged.tensors, oracles.peft_merged(base, adapter), base, atol=1e-6)
    assert_forward(base, adapter, merged.folder, torch.arange(12).reshape(2, 6))


def test_embedding_bf16_is_closer_than_peft(tmp_path: Path, merge: Merge) -> None:
    """Case 10: PEFT rounds the delta of an embedding before it adds it; one rounding is closer."""
    base = custom(tmp_path / "base", Embedded, torch.bfloat16)
    adapter = lora(base, tmp_path / "a", r=4, lora_alpha=8, target_modules=["embed"])
    merged = merge(base, adapter).tensors
    exact = {name: tensor.double() for name, tensor in base.tensors.items()}
    stored = builders.adapter_tensors(adapter)
    exact["embed.weight"] += oracles.embedding_delta(stored, "embed", 2.0)
    oracles.assert_close_in_ulps(merged, oracles.rounded(exact, base.tensors))
    assert oracles.error(merged, exact) < oracles.error(oracles.peft_merged(base, adapter), exact)


def test_embedding_of_a_language_model(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """Case 10: PEFT saves a copy of the base embedding beside the factors, which adds nothing."""
    adapter = lora(llama, tmp_path / "a", r=4, target_modules=["embed_tokens", "q_proj"])
    assert "model.embed_tokens.base_layer.weight" in builders.adapter_tensors(adapter)
    merged = merge(llama, adapter)
    oracles.assert_agrees(merged.tensors, oracles.peft_merged(llama, adapter), llama, atol=1e-6)
    assert_forward(llama, adapter, merged.folder, oracles.TOKENS)


def test_saved_embedding_is_the_weight_to_fold_into(
    llama: Base, tmp_path: Path, merge: Merge
) -> None:
    """§1.5: where the saved copy differs from the base's, PEFT loads it over the base's."""
    original = lora(llama, tmp_path / "a", r=4, target_modules=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    adapter = builders.edited(
        original, tmp_path / "b", tensors=lambda t: t | {key: t[key] + 0.25 * noise(64, 32)}
    )
    merged = merge(llama, adapter)
    expected = oracles.peft_merged(llama, adapter)
    oracles.assert_agrees(merged.tensors, expected, llama, atol=1e-6)
    assert merged.notes_on("embed_tokens")


@DTYPES
def test_attention(tmp_path: Path, merge: Merge, dtype: torch.dtype) -> None:
    """Case 12: in_proj as PEFT merges it; out_proj with its delta twice.

    PEFT is wrong, but alike in its merge and in its forward pass (huggingface/peft#3774): what
    was trained is W + 2·s·B·A, and that is what the merged weight must be. PEFT rounds both
    deltas first, so that in bf16 the formula is the oracle.
    """
    base = custom(tmp_path / "base", Attention, dtype)
    adapter = lora(base, tmp_path / "a", r=4, lora_alpha=8, target_modules=["mha"])
    merged = merge(base, adapter)
    stored = builders.adapter_tensors(adapter)
    exact = {name: tensor.double() for name, tensor in base.tensors.items()}
    exact["mha.in_proj_weight"] += oracles.linear_delta(stored, "mha", 2.0)
    exact["mha.out_proj.weight"] += 2 * oracles.linear_delta(stored, "mha.base_layer.out_proj", 2.0)
    peft = oracles.peft_merged(base, adapter)
    assert oracles.changed(merged.tensors, base) == oracles.changed(peft, base)
    if dtype == torch.float32:
        oracles.assert_close(merged.tensors, peft)
        assert_forward(base, adapter, merged.folder, noise(2, 5, HIDDEN))
    else:
        oracles.assert_close_in_ulps(merged.tensors, oracles.rounded(exact, base.tensors))
        assert oracles.error(merged.tensors, exact) <= oracles.error(peft, exact)


def test_attention_says_that_it_doubles(tmp_path: Path, merge: Merge) -> None:
    """Case 12: the factor two is a decision, and the report tells it."""
    base = custom(tmp_path / "base", Attention)
    adapter = lora(base, tmp_path / "a", r=4, target_modules=["mha"])
    assert merge(base, adapter).notes_on("out_proj")


def test_dora_fp32(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """Case 8: m·V/‖V‖ row by row."""
    adapter = lora(llama, tmp_path / "a", r=4, lora_alpha=8, target_modules=LINEARS, use_dora=True)
    merged = merge(llama, adapter)
    oracles.assert_agrees(merged.tensors, oracles.peft_merged(llama, adapter), llama, atol=2e-6)
    assert_forward(llama, adapter, merged.folder, oracles.TOKENS)


def test_dora_bf16(wide_bf16: Base, tmp_path: Path, merge: Merge) -> None:
    """Case 8: float32 all the way and one rounding, in PEFT as here.

    A norm is a long sum, whose order moves every element of its row: up to 0.1 % may differ.
    """
    adapter = lora(wide_bf16, tmp_path / "a", r=8, target_modules="all-linear", use_dora=True)
    merged = merge(wide_bf16, adapter).tensors
    expected = oracles.peft_merged(wide_bf16, adapter)
    assert oracles.changed(merged, wide_bf16) == oracles.changed(expected, wide_bf16)
    oracles.assert_close_in_ulps(merged, expected, share=1e-3)


def test_dora_rslora_patterns(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """Case 8 with every way to set the scale."""
    adapter = lora(
        llama,
        tmp_path / "a",
        r=4,
        target_modules=LINEARS,
        use_dora=True,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"layers.1.mlp.up_proj": 3},
    )
    merged = merge(llama, adapter).tensors
    oracles.assert_agrees(merged, oracles.peft_merged(llama, adapter), llama, atol=2e-6)


def test_dora_on_rows_of_zeros(tmp_path: Path, merge: Merge) -> None:
    """§2.6: rows whose norm is zero stay zero.

    PEFT is wrong: it divides by zero, and its merged weight holds NaN there.
    """
    base = custom(tmp_path / "base", Embedded)
    rows = [1, 5]
    adapter = zero_rows(base, tmp_path, rows)
    peft = oracles.peft_merged(base, adapter)["head.weight"]
    merged = merge(base, adapter).tensors["head.weight"]
    assert peft[rows].isnan().all()
    assert (merged[rows] == 0).all()
    others = [row for row in range(8) if row not in rows]
    assert (merged[others] - peft[others]).abs().max() < 1e-6


def zero_rows(base: Base, tmp_path: Path, rows: list[int]) -> Path:
    """Zero rows of the base's head on disk, and return a DoRA adapter which leaves them zero."""
    original = lora(base, tmp_path / "a", r=2, target_modules=["head"], use_dora=True)
    tensors = base.tensors
    tensors["head.weight"][rows] = 0
    builders.save_file(tensors, base.folder / "model.safetensors", metadata={"format": "pt"})

    def zero(stored: builders.Tensors) -> builders.Tensors:
        stored["base_model.model.head.lora_B.weight"][rows] = 0
        stored["base_model.model.head.lora_magnitude_vector"][rows] = 0
        return stored

    return builders.edited(original, tmp_path / "zeros", tensors=zero)
