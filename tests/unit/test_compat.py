"""What other tools make of a delta: their formulas, written out in float64, are the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools._cli.merge import COMPAT
from loratools.adapter import Adapter
from loratools.deltas import (
    BOFT,
    DELTAS,
    IA3,
    OFT,
    DoRA,
    FullDelta,
    GLoRA,
    LayerDelta,
    LoHa,
    LoKr,
    LoRA,
    SparseResidual,
    SumDelta,
    TuckerLoRA,
    fuse_rows,
)
from loratools.deltas.compat import RULES, TOOLS, read_as_tool
from loratools.errors import OptionError, UnsupportedError
from loratools.merge import merge_into_base
from loratools.planning.compat import read_all_as_tool
from loratools.planning.merge_plan import LoadedAdapter
from tests.strategies import make_tensor as make

Formula = Callable[[Tensor, float], Tensor]
"""From W and the strength, both in float64, to the tool's merged weight."""

OUT, INNER, RANK, ALPHA = 8, 6, 3, 1.2
SCALE = ALPHA / RANK

strengths = pytest.mark.parametrize("strength", [0.0, 0.5, 1.0, -0.7])
shapes = pytest.mark.parametrize(
    "shape", [(OUT, INNER), (OUT, INNER, 3, 2)], ids=["linear", "conv"]
)


def assert_folds(delta: LayerDelta, formula: Formula, shape: tuple[int, ...], m: float) -> None:
    """Whole, in blocks of rows, and transposed (a matrix), the fold gives what the tool gives."""
    weight = make(99, *shape)
    expected = formula(weight.double(), m).reshape(shape).float()
    torch.testing.assert_close(delta.apply(weight, m), expected, rtol=1e-5, atol=1e-5)
    flat, wanted = weight.reshape(shape[0], -1), expected.reshape(shape[0], -1)
    assert_blocks(delta, flat, wanted, m, transposed=False)
    if len(shape) == 2:
        assert_blocks(delta, flat.T, wanted.T, m, transposed=True)


def assert_blocks(
    delta: LayerDelta, stored: Tensor, wanted: Tensor, m: float, *, transposed: bool
) -> None:
    fold = delta.row_fold(m, transposed=transposed)
    step = len(stored) if fold.reach == "whole" else 3
    starts = range(0, len(stored), step)
    if fold.reach == "two-pass":
        for start in starts:
            fold.measure(stored[start : start + step], start)
    changes = []
    for start in starts:
        block = stored[start : start + step].contiguous()
        change = torch.ones_like(block)
        fold.add_change(change, block, start, first=start == 0)
        changes.append(change if start == 0 else change - 1)
    torch.testing.assert_close(stored + torch.cat(changes), wanted, rtol=1e-5, atol=1e-5)


def lora(shape: tuple[int, ...], alpha: float = ALPHA) -> LoRA:
    return LoRA(make(1, RANK, *shape[1:]), make(2, OUT, RANK, *[1] * (len(shape) - 2)), alpha)


def lora_product(delta: LoRA) -> Tensor:
    """Return up @ down, without scale."""
    product = delta.up.double().flatten(1) @ delta.down.double().flatten(1)
    return product.reshape(OUT, *delta.down.shape[1:])


# ── scale ────────────────────────────────────────────────────────────────────────────────────


def loha(shape: tuple[int, ...], alpha: float = ALPHA) -> LoHa:
    flat = torch.Size(shape[1:]).numel()
    a, b = (make(n, OUT, RANK) for n in (1, 2)), [make(n, RANK, flat) for n in (3, 4)]
    first, second = a
    return LoHa(first, b[0], second, b[1], alpha).reshaped(shape)


def loha_product(delta: LoHa) -> Tensor:
    first = delta.w1_a.double() @ delta.w1_b.double()
    return first * (delta.w2_a.double() @ delta.w2_b.double())


@strengths
@shapes
def test_lycoris_loha(shape: tuple[int, ...], strength: float) -> None:
    delta = loha(shape)
    moved = SCALE * SCALE * loha_product(delta).reshape(shape)
    assert_folds(read_as_tool("lycoris", delta), lambda w, m: w + m * moved, shape, strength)


@strengths
@pytest.mark.parametrize("full", [False, True])
def test_lycoris_lokr(strength: float, full: bool) -> None:
    """Scaled twice where a side is low-rank; where both are full there is no scale."""
    w1, a, b = make(1, 2, 3), make(2, 4, RANK), make(3, RANK, 2)
    w2 = a.double() @ b.double()
    factors = {"w2": w2.float()} if full else {"w2_a": a, "w2_b": b}
    delta = LoKr(ALPHA, w1, **factors)
    moved = (1 if full else SCALE**2) * torch.kron(w1.double(), w2)
    view = read_as_tool("lycoris", delta)
    assert (view is delta) == full
    assert_folds(view, lambda w, m: w + m * moved, (OUT, INNER), strength)


@pytest.mark.parametrize("tool", TOOLS)
def test_alpha_zero(tool: str) -> None:
    """For sd-scripts and LyCORIS it means the rank, for the others nothing."""
    delta = lora((OUT, INNER), 0.0)
    factor = 1 if tool in ("sd-scripts", "lycoris") else 0
    moved = factor * lora_product(delta)
    assert_folds(read_as_tool(tool, delta), lambda w, m: w + m * moved, (OUT, INNER), 0.5)


def test_alpha_zero_of_other_kinds_in_lycoris() -> None:
    pair = (make(1, 6, 2), make(2, 2, 6), make(3, 8, 2), make(4, 2, 6))
    core = TuckerLoRA(make(1, 2, 6, 1, 1), make(2, 2, 2, 3, 3), make(3, 8, 2, 1, 1), 0.0)
    for delta in (loha((OUT, INNER), 0.0), GLoRA(*pair, 0.0), core):
        unit = replace(delta, alpha=float(delta.rank))
        view = read_as_tool("lycoris", delta)
        weight = make(9, *delta.weight_shape)
        assert torch.equal(view.apply(weight, 0.5), unit.apply(weight, 0.5))


# ── DoRA ─────────────────────────────────────────────────────────────────────────────────────


def row_norm(tensor: Tensor) -> Tensor:
    return tensor.flatten(1).norm(dim=1).reshape(-1, *[1] * (tensor.dim() - 1))


def column_norm(tensor: Tensor) -> Tensor:
    return row_norm(tensor.transpose(0, 1)).transpose(0, 1)


def dora(shape: tuple[int, ...], axis: str, alpha: float = ALPHA) -> tuple[DoRA, Tensor]:
    """Return a DoRA, and its magnitude as it is stored: a column or a row."""
    count = OUT if axis == "out" else INNER
    magnitude = make(5, count).abs() + 0.5
    ones = [1] * (len(shape) - 2)
    stored = magnitude.reshape(*((count, 1) if axis == "out" else (1, count)), *ones)
    return DoRA(lora(shape, alpha), magnitude, axis), stored.double()  # type: ignore[arg-type]


@strengths
@shapes
@pytest.mark.parametrize("axis", ["out", "in"])
def test_lycoris_dora(shape: tuple[int, ...], axis: str, strength: float) -> None:
    delta, magnitude = dora(shape, axis)
    moved, norm = SCALE * lora_product(delta.inner), row_norm if axis == "out" else column_norm

    def formula(w: Tensor, m: float) -> Tensor:
        merged = w + moved
        return merged * (m * (magnitude / norm(merged) - 1) + 1)

    assert_folds(read_as_tool("lycoris", delta), formula, shape, strength)


@strengths
def test_lycoris_dora_of_loha(strength: float) -> None:
    """The direction's change is scaled twice, as without lengths."""
    shape = (OUT, INNER)
    plain, magnitude = dora(shape, "out")
    delta = replace(plain, inner=loha(shape))
    moved = SCALE**2 * loha_product(loha(shape))

    def formula(w: Tensor, m: float) -> Tensor:
        merged = w + moved
        return merged * (m * (magnitude / row_norm(merged) - 1) + 1)

    assert_folds(read_as_tool("lycoris", delta), formula, shape, strength)


@strengths
@shapes
@pytest.mark.parametrize("axis", ["out", "in"])
def test_comfyui_dora(shape: tuple[int, ...], axis: str, strength: float) -> None:
    delta, magnitude = dora(shape, axis)
    moved = SCALE * lora_product(delta.inner)

    def formula(w: Tensor, m: float) -> Tensor:
        merged = w + moved
        norm = row_norm(w) if axis == "out" else column_norm(merged)
        return w + m * (merged * (magnitude / norm) - w)

    view = read_as_tool("comfyui", delta)
    assert (view is delta) == (axis == "in")
    assert_folds(view, formula, shape, strength)


@strengths
@shapes
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("alpha", [ALPHA, 3.0, 0.0])
def test_a1111_dora(shape: tuple[int, ...], axis: str, alpha: float, strength: float) -> None:
    """Columns are measured whatever the magnitude's axis, and alpha/r comes after it."""
    delta, magnitude = dora(shape, axis, alpha)
    product = lora_product(delta.inner)

    def formula(w: Tensor, m: float) -> Tensor:
        merged = w + product
        return w + (merged * (magnitude / column_norm(merged)) - w) * (alpha / RANK) * m

    view = read_as_tool("a1111", delta)
    assert (view is delta) == (axis == "in" and alpha == RANK)
    assert_folds(view, formula, shape, strength)


# ── rotations ────────────────────────────────────────────────────────────────────────────────


def turns(blocks: Tensor, bound: float | None) -> Tensor:
    """Return (I + Q)(I − Q)⁻¹ of each block."""
    skew = blocks.double() - blocks.double().mT
    if bound is not None and skew.norm() > bound:
        skew = skew * (bound / skew.norm())
    unit = torch.eye(blocks.shape[-1], dtype=torch.float64)
    return (unit + skew) @ torch.linalg.inv(unit - skew)


def turned(w: Tensor, rotation: Tensor) -> Tensor:
    parts = w.reshape(*rotation.shape[:2], -1)
    return torch.einsum("knm,knj->kmj", rotation, parts).reshape(w.shape)


def oft(shape: tuple[int, ...], constraint: float, *, rescaled: bool) -> OFT:
    rescale = make(4, OUT, *[1] * (len(shape) - 1)).abs() + 0.5 if rescaled else None
    return OFT(make(3, 2, 4, 4), constraint, rescale).reshaped(shape)


@strengths
@shapes
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("constraint", [0.0, 0.3, 100.0])
def test_comfyui_oft(
    shape: tuple[int, ...], constraint: float, rescaled: bool, strength: float
) -> None:
    """Strength squared, the bound alpha and not alpha·out, rescale ignored."""
    delta = oft(shape, constraint, rescaled=rescaled)
    rotation = turns(delta.blocks, constraint or None)
    unit = torch.eye(4, dtype=torch.float64)

    def formula(w: Tensor, m: float) -> Tensor:
        return w + m * turned(w, rotation * m - m * unit)

    assert_folds(read_as_tool("comfyui", delta), formula, shape, strength)


@strengths
@shapes
@pytest.mark.parametrize("rescaled", [False, True])
def test_lycoris_oft(shape: tuple[int, ...], rescaled: bool, strength: float) -> None:
    delta = oft(shape, 0.1, rescaled=rescaled)
    rotation = turns(delta.blocks, 0.1 * OUT)
    unit = torch.eye(4, dtype=torch.float64)

    def formula(w: Tensor, m: float) -> Tensor:
        moved = turned(w, rotation * m - m * unit + unit)
        return moved if delta.rescale is None else delta.rescale.double() * moved

    view = read_as_tool("lycoris", delta)
    assert (view is delta) != rescaled
    assert_folds(view, formula, shape, strength)


@strengths
@pytest.mark.parametrize("constraint", [0.0, 0.1])
def test_sd_scripts_oft(constraint: float, strength: float) -> None:
    """‖Q‖ is clamped to alpha·out, 0 included."""
    delta = oft((OUT, INNER), constraint, rescaled=False)
    rotation = turns(delta.blocks, constraint * OUT)
    unit = torch.eye(4, dtype=torch.float64)

    def formula(w: Tensor, m: float) -> Tensor:
        return turned(w, m * (rotation - unit) + unit)

    view = read_as_tool("sd-scripts", delta)
    assert view.is_zero == (constraint == 0)
    assert_folds(view, formula, (OUT, INNER), strength)


@strengths
@pytest.mark.parametrize("tool", ["lycoris", "comfyui"])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("stages", [1, 2])
def test_boft(tool: str, stages: int, rescaled: bool, strength: float) -> None:
    """Each stage is moved by the strength; ComfyUI multiplies the change by it once more."""
    rescale = make(4, OUT, 1).abs() + 0.5 if rescaled else None
    delta = BOFT(make(3, stages, 2, 4, 4), 0.2, rescale).reshaped((OUT, INNER))
    rotation = turns(delta.blocks, 0.2 if tool == "comfyui" else 0.2 * OUT)
    unit = torch.eye(4, dtype=torch.float64)

    def formula(w: Tensor, m: float) -> Tensor:
        moved = w
        for stage in range(stages):
            reach = 2**stage * 2
            part = rotation[stage] * m + (1 - m) * unit
            paired = moved.unflatten(0, (-1, 2, reach)).transpose(1, 2).flatten(0, 2)
            paired = torch.einsum("bij,bjk->bik", part, paired.unflatten(0, (-1, 4)))
            moved = paired.flatten(0, 1).unflatten(0, (-1, reach, 2)).transpose(1, 2).flatten(0, 2)
        moved = moved if rescale is None else moved * rescale.double()
        return w + m * (moved - w) if tool == "comfyui" else moved

    view = read_as_tool(tool, delta)
    assert (view is delta) == (tool == "lycoris" and stages == 1 and not rescaled)
    assert_folds(view, formula, (OUT, INNER), strength)


# ── several changes of one module ────────────────────────────────────────────────────────────


def test_several_changes() -> None:
    shape = (OUT, INNER)
    plain, diff, bias = lora(shape), FullDelta(make(1, *shape)), FullDelta(bias=make(2, OUT))
    sparse = SparseResidual(torch.tensor([[0], [1]]), torch.ones(1), shape, SCALE)
    both, biased, residual = (SumDelta((plain, other)) for other in (diff, bias, sparse))
    assert read_as_tool("comfyui", both) is diff
    assert read_as_tool("comfyui", biased) is biased
    assert read_as_tool("comfyui", residual) is plain
    assert [read_as_tool(tool, both) for tool in ("lycoris", "a1111")] == [plain, plain]
    assert [read_as_tool(tool, biased) for tool in ("lycoris", "a1111")] == [plain, plain]
    assert read_as_tool("lycoris", residual) is plain
    assert read_as_tool("a1111", residual) is residual
    assert read_as_tool("sd-scripts", both) is both


def test_comfyui_keeps_the_bias_beside_the_last() -> None:
    shape = (OUT, INNER)
    diff, bias = FullDelta(make(1, *shape)), FullDelta(bias=make(2, OUT))
    view = read_as_tool("comfyui", SumDelta((lora(shape), diff, bias)))
    assert isinstance(view, SumDelta)
    assert view.parts == (diff, bias)


def test_what_remains_of_several_follows_its_own_rule() -> None:
    delta = loha((OUT, INNER))
    view = read_as_tool("lycoris", SumDelta((delta, FullDelta(make(1, OUT, INNER)))))
    torch.testing.assert_close(view.materialize(), delta.materialize() * SCALE)  # type: ignore[attr-defined]


@pytest.mark.parametrize("tool", ["comfyui", "lycoris"])
def test_a_full_difference_has_no_lengths(tool: str) -> None:
    diff = FullDelta(make(1, OUT, INNER))
    assert read_as_tool(tool, DoRA(diff, torch.ones(OUT))) is diff


def test_a1111_decomposes_a_residual_with_its_lora() -> None:
    shape = (OUT, INNER)
    sparse = SparseResidual(torch.tensor([[3], [1]]), torch.full((1,), 2.0), shape, SCALE)
    plain, magnitude = dora(shape, "in")
    delta = replace(plain, inner=SumDelta((plain.inner, sparse)))  # type: ignore[arg-type]
    product = lora_product(plain.inner)  # type: ignore[arg-type]
    product[3, 1] += 2

    def formula(w: Tensor, m: float) -> Tensor:
        merged = w + product
        return w + (merged * (magnitude / column_norm(merged)) - w) * SCALE * m

    assert_folds(read_as_tool("a1111", delta), formula, shape, 0.5)


# ── layout steps ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("tool", "delta"),
    [
        ("comfyui", dora((OUT, INNER), "out")[0]),
        ("lycoris", dora((OUT, INNER), "out")[0]),
        ("comfyui", oft((OUT, INNER), 0.3, rescaled=True)),
        ("lycoris", oft((OUT, INNER), 0.3, rescaled=True)),
    ],
)
def test_rows_apart_and_together(tool: str, delta: LayerDelta) -> None:
    view, weight = read_as_tool(tool, delta), make(9, OUT, INNER)
    expected = view.apply(weight, 0.5)
    parts = view.split_rows([4, 4])
    assert None not in parts
    halves = [part.apply(w, 0.5) for part, w in zip(parts, weight.split(4), strict=True) if part]
    torch.testing.assert_close(torch.cat(halves), expected)
    torch.testing.assert_close(fuse_rows(parts, [4, 4]).apply(weight, 0.5), expected)
    order = [1, 0, 3, 2, 5, 4, 7, 6]
    torch.testing.assert_close(
        view.permute_rows(order).apply(weight[order], 0.5), expected[order], rtol=1e-5, atol=1e-5
    )


def test_columns_that_run_over_all_rows_are_not_split() -> None:
    delta, _ = dora((OUT, INNER), "out")
    view = read_as_tool("a1111", delta)
    with pytest.raises(UnsupportedError, match="columns"):
        view.split_rows([4, 4])
    with pytest.raises(UnsupportedError, match="columns"):
        fuse_rows([view, view], [OUT, OUT])


def test_different_rules_are_not_fused() -> None:
    delta, _ = dora((OUT, INNER), "out")
    views = [read_as_tool(tool, delta) for tool in ("comfyui", "lycoris")]
    with pytest.raises(UnsupportedError, match="different rules"):
        fuse_rows(views, [OUT, OUT])


def test_stored_tensors_and_facts_stay() -> None:
    delta, _ = dora((OUT, INNER), "out")
    view = read_as_tool("comfyui", delta)
    assert view.tensors().keys() == delta.tensors().keys()
    assert (view.rank, view.alpha) == (RANK, ALPHA)  # type: ignore[attr-defined]
    assert view.parameter_names == delta.parameter_names
    half = view.map_tensors(Tensor.half)
    assert {tensor.dtype for tensor in half.tensors().values()} == {torch.float16}


# ── the table, and the command ───────────────────────────────────────────────────────────────


def test_table() -> None:
    kinds = {delta.kind for delta in DELTAS}
    assert {tool for tool, _ in RULES} == set(TOOLS) == set(COMPAT)
    assert {kind for _, kind in RULES} <= kinds
    assert all(rule.view.__doc__ for rule in RULES.values())


@pytest.mark.parametrize("tool", TOOLS)
def test_what_does_not_differ_is_the_same(tool: str) -> None:
    plain = lora((OUT, INNER))
    for delta in (plain, IA3(make(1, OUT), on_input=False), FullDelta(make(1, OUT, INNER))):
        assert read_as_tool(tool, delta) is delta


def loaded(**layers: LayerDelta) -> list[LoadedAdapter]:
    return [LoadedAdapter("a", 0.5, Adapter(layers, notes=("before",)))]


def test_notes() -> None:
    shape = (OUT, INNER)
    given = loaded(one=loha(shape), two=loha(shape), three=lora(shape), four=loha(shape, RANK))
    (read,) = read_all_as_tool(given, "lycoris")
    assert read.adapter.notes == (
        "before",
        "as lycoris folds it, 2 of kind loha: scaled by (alpha/rank)²",
    )
    assert read.strength == 0.5
    assert read.adapter.layers["three"] is given[0].adapter.layers["three"]
    (same,) = read_all_as_tool(given, "comfyui")
    assert same.adapter.notes[1:] == ("as comfyui folds it: nothing here differs from the formula",)


def test_unknown_tool() -> None:
    with pytest.raises(OptionError, match="forge") as caught:
        read_all_as_tool(loaded(), "forge")
    assert "comfyui" in caught.value.hint


@pytest.mark.parametrize("compat", [None, "lycoris", "comfyui"])
def test_merge(tmp_path: Path, compat: str | None) -> None:
    """The option reaches the file; the formula is the default."""
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    weight = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    base = {weight: make(9, 320, 768)}
    save_file(base, tmp_path / "base.safetensors")
    delta = LoHa(make(1, 320, 2), make(2, 2, 768), make(3, 320, 2), make(4, 2, 768), 1.0)
    stored = {f"hada_{key}": tensor for key, tensor in delta.tensors().items()}
    stored["alpha"] = torch.tensor(1.0)
    save_file({f"{name}.{k}": t for k, t in stored.items()}, tmp_path / "a.safetensors")
    out = tmp_path / "out.safetensors"
    report = merge_into_base(
        tmp_path / "base.safetensors", tmp_path / "a.safetensors", out, arch="sd1", compat=compat
    )
    factor = 0.25 if compat == "lycoris" else 0.5
    expected = base[weight].double() + factor * loha_product(delta)
    torch.testing.assert_close(load_file(out)[weight].double(), expected, rtol=1e-5, atol=1e-5)
    said = [note.message for note in report.notes if f"as {compat} folds" in note.message]
    assert len(said) == (0 if compat is None else 1)
