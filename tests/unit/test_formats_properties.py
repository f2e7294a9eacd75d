"""Any delta of any shape goes through every format that holds it with its tensors as they were."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas import (
    BOFT,
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
)
from loratools.formats import get_format
from tests.strategies import alphas, loras, make_tensor, ranks, tensors

SIDE = st.integers(1, 6)
KERNEL = st.sampled_from(((), (3, 3), (1, 1), (3, 1, 2)))


@st.composite
def tuckers(draw: st.DrawFn) -> LayerDelta:
    rank, out, inner = draw(ranks), draw(SIDE), draw(SIDE)
    kernel = draw(KERNEL.filter(bool))
    ones = [1] * len(kernel)
    down, mid = draw(tensors(rank, inner, *ones)), draw(tensors(rank, rank, *kernel))
    return TuckerLoRA(down, mid, draw(tensors(out, rank, *ones)), draw(alphas))


@st.composite
def lohas(draw: st.DrawFn) -> LayerDelta:
    rank, out, inner = draw(ranks), draw(SIDE), draw(SIDE)
    if draw(st.booleans()):
        core = [draw(tensors(rank, rank, 3, 3)) for _ in range(2)]
        sides = [draw(tensors(rank, n)) for n in (out, inner, out, inner)]
        return LoHa(*sides, draw(alphas), *core)
    sides = [draw(tensors(*shape)) for shape in ((out, rank), (rank, inner)) * 2]
    return LoHa(*sides, draw(alphas))


@st.composite
def lokrs(draw: st.DrawFn) -> LayerDelta:
    rank, kernel = draw(ranks), draw(KERNEL)
    words: dict[str, Tensor] = {}
    for name, ends in (("w1", ()), ("w2", kernel)):
        out, inner = draw(SIDE), draw(SIDE)
        if draw(st.booleans()):
            words[name] = draw(tensors(out, inner, *ends))
        elif ends and draw(st.booleans()):
            words |= {
                f"{name}_a": draw(tensors(rank, out)),
                f"{name}_b": draw(tensors(rank, inner)),
            }
            words["t2"] = draw(tensors(rank, rank, *ends))
        else:
            words |= {
                f"{name}_a": draw(tensors(out, rank)),
                f"{name}_b": draw(tensors(rank, inner)),
            }
    return LoKr(draw(alphas), **words)


@st.composite
def gloras(draw: st.DrawFn) -> LayerDelta:
    rank, out, inner = draw(ranks), draw(st.integers(7, 9)), draw(st.integers(6, 9))
    shapes = ((inner, rank), (rank, inner), (out, rank), (rank, inner))
    return GLoRA(*(draw(tensors(*shape)) for shape in shapes), draw(alphas))


@st.composite
def rotations(draw: st.DrawFn) -> LayerDelta:
    size, count, constraint = (
        2 * draw(st.integers(1, 2)),
        draw(st.sampled_from((1, 2, 4))),
        draw(st.sampled_from((0.0, 0.5, 3.0))),
    )
    rescale = draw(st.none() | tensors(size * count, 1))
    if draw(st.booleans()):
        return OFT(draw(tensors(count, size, size)), constraint, rescale)
    return BOFT(draw(tensors(1, count, size, size)), constraint, rescale)


@st.composite
def changes(draw: st.DrawFn) -> LayerDelta:
    out, norm = draw(SIDE), draw(st.booleans())
    weight = draw(tensors(out) if norm else tensors(out, draw(SIDE), *draw(KERNEL)))
    bias = draw(st.none() | tensors(out))
    return FullDelta(weight if bias is None or draw(st.booleans()) else None, bias, norm)


@st.composite
def doras(draw: st.DrawFn) -> LayerDelta:
    inner = draw(st.one_of(loras(), tuckers(), lohas()))
    axis = draw(st.sampled_from(("out", "in")))
    # One by one, both axes look alike.
    size = (
        inner.weight_shape[1]
        if axis == "in" and inner.weight_shape[0] > 1
        else inner.weight_shape[0]
    )
    return DoRA(inner, draw(tensors(size)), axis if inner.weight_shape[0] > 1 else "out")


@st.composite
def sums(draw: st.DrawFn) -> LayerDelta:
    lora = draw(loras(shape=(draw(SIDE), draw(SIDE))))
    # A file holds alpha in float32, and the residual's scale is computed of that.
    lora = replace(lora, alpha=float(torch.tensor(lora.alpha)))
    out, inner = lora.weight_shape
    if draw(st.booleans()):
        return SumDelta((lora, FullDelta(None, draw(tensors(out)))))
    indices = torch.tensor([[0, out - 1], [inner - 1, 0]])
    return SumDelta((lora, SparseResidual(indices, draw(tensors(2)), (out, inner), lora.scale)))


@st.composite
def factors(draw: st.DrawFn) -> LayerDelta:
    on_input = draw(st.booleans())
    size = draw(SIDE)
    return IA3(draw(tensors(size)), on_input)


DELTAS = st.one_of(
    loras(),
    tuckers(),
    lohas(),
    lokrs(),
    gloras(),
    rotations(),
    changes(),
    doras(),
    sums(),
    factors(),
)


def described(delta: LayerDelta) -> dict[str, object]:
    """Return every number of a delta: tensors as bits, the others rounded as an alpha in a file."""
    found: dict[str, object] = {"kind": delta.kind}
    for name in delta.__slots__ or ():
        value = getattr(delta, name)
        if isinstance(value, Tensor):
            found[name] = (value.dtype, tuple(value.shape), value.flatten().tolist())
        elif isinstance(value, LayerDelta):
            found[name] = described(value)
        elif isinstance(value, tuple) and value and isinstance(value[0], LayerDelta):
            found[name] = [described(part) for part in value]
        elif isinstance(value, float):
            found[name] = float(torch.tensor(value))
        else:
            found[name] = value
    return found


def through(name: str, adapter: Adapter) -> Adapter:
    return get_format(name).read(get_format(name).write(adapter))


def same(name: str, layers: dict[str, LayerDelta], naming: str) -> None:
    again = through(name, Adapter(layers, naming=naming))
    assert {p: described(d) for p, d in again.layers.items()} == {
        p: described(d) for p, d in layers.items()
    }


@given(deltas=st.lists(DELTAS, min_size=1, max_size=4))
def test_kohya_keeps_every_delta(deltas: list[LayerDelta]) -> None:
    same("kohya", {f"lora_unet_block_{i}_conv": delta for i, delta in enumerate(deltas)}, "kohya")


@given(deltas=st.lists(DELTAS, min_size=1, max_size=4))
def test_comfyui_keeps_what_it_holds(deltas: list[LayerDelta]) -> None:
    layers = {f"diffusion_model.block.{i}.conv": delta for i, delta in enumerate(deltas)}
    losses = get_format("comfyui").losses(Adapter(layers, naming="original"))
    kept = {path: delta for path, delta in layers.items() if path not in losses}
    assert all(not isinstance(d, (LoRA, LoHa, LoKr, TuckerLoRA)) for d in map(layers.get, losses))
    if kept:
        same("comfyui", kept, "original")


@given(deltas=st.lists(loras(biases=True), min_size=1, max_size=5), decomposed=st.booleans())
def test_diffusers_keeps_loras(deltas: list[LoRA], decomposed: bool) -> None:
    """Ranks and alphas of every module come back through the patterns, bits through the tensors."""
    layers: dict[str, LayerDelta] = {}
    for number, lora in enumerate(deltas):
        delta = DoRA(lora, make_tensor(7, lora.weight_shape[0])) if decomposed else lora
        layers[f"transformer.{'blocks.' * (number % 3)}to_q.{number // 3}"] = delta
    again = through("diffusers", Adapter(layers, naming="diffusers")).layers
    for path, delta in layers.items():
        ours, theirs = (getattr(d, "inner", d) for d in (again[path], delta))
        assert abs(ours.alpha - theirs.alpha) <= 1e-11 * abs(theirs.alpha)
        for name, tensor in delta.tensors().items():
            assert torch.equal(again[path].tensors()[name], tensor)
