"""The parameterisations of image tools: how to draw them, and what they mean in float64.

The formulas are written from the papers and the tools' own forward passes with loops and einsum;
nothing here calls the library's arithmetic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas import (
    BOFT,
    IA3,
    OFT,
    AdditiveDelta,
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
from tests.strategies import (
    alphas,
    dtypes,
    loras,
    ranks,
    sizes,
    tensors,
    weight_shapes,
)

kernels = st.sampled_from(((3,), (1, 1), (2, 3), (1, 2, 2)))
_ONES = (1, 1, 1)


# ── strategies ───────────────────────────────────────────────────────────────────────────────


@st.composite
def tuckers(draw: st.DrawFn, *, shape: tuple[int, ...] | None = None) -> TuckerLoRA:
    """A convolution's LoRA whose core is square, as the tools make it, or not."""
    out, inner, *kernel = shape or (draw(sizes), draw(sizes), *draw(kernels))
    first, second, dtype = draw(ranks), draw(ranks), draw(dtypes)
    ones = _ONES[: len(kernel)]
    return TuckerLoRA(
        draw(tensors(first, inner, *ones, dtype=dtype)),
        draw(tensors(second, first, *kernel, dtype=dtype)),
        draw(tensors(out, second, *ones, dtype=dtype)),
        draw(alphas),
    )


@st.composite
def lohas(draw: st.DrawFn, *, shape: tuple[int, ...] | None = None) -> LoHa:
    """Plain, plain on a convolution (flattened), or with cores."""
    out, inner, *kernel = shape or draw(weight_shapes())
    rank, dtype, alpha = draw(st.integers(1, 3)), draw(dtypes), draw(alphas)
    if kernel and draw(st.booleans()):
        a = [draw(tensors(rank, out, dtype=dtype)) for _ in range(2)]
        b = [draw(tensors(rank, inner, dtype=dtype)) for _ in range(2)]
        t = [draw(tensors(rank, rank, *kernel, dtype=dtype)) for _ in range(2)]
        return LoHa(a[0], b[0], a[1], b[1], alpha, t[0], t[1])
    a = [draw(tensors(out, rank, dtype=dtype)) for _ in range(2)]
    b = [draw(tensors(rank, inner * math.prod(kernel), dtype=dtype)) for _ in range(2)]
    delta = LoHa(a[0], b[0], a[1], b[1], alpha)
    return delta.reshaped((out, inner, *kernel)) if kernel and draw(st.booleans()) else delta


@st.composite
def lokrs(
    draw: st.DrawFn, *, outs: tuple[int, int] | None = None, inners: tuple[int, int] | None = None
) -> LoKr:
    """Every form: full or low-rank on either side, linear, convolution, core."""
    (out1, out2) = outs or (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    (in1, in2) = inners or (draw(st.integers(1, 4)), draw(st.integers(1, 4)))
    kernel = () if inners else draw(st.sampled_from(((), (), (2, 3), (2,))))
    rank, dtype, fields = draw(st.integers(1, 3)), draw(dtypes), {}
    if draw(st.booleans()):
        fields["w1"] = draw(tensors(out1, in1, dtype=dtype))
    else:
        fields["w1_a"] = draw(tensors(out1, rank, dtype=dtype))
        fields["w1_b"] = draw(tensors(rank, in1, dtype=dtype))
    form = draw(st.sampled_from(("full", "low", "flat", "core") if kernel else ("full", "low")))
    if form == "full":
        fields["w2"] = draw(tensors(out2, in2, *kernel, dtype=dtype))
    elif form == "core":
        fields["w2_a"] = draw(tensors(rank, out2, dtype=dtype))
        fields["w2_b"] = draw(tensors(rank, in2, dtype=dtype))
        fields["t2"] = draw(tensors(rank, rank, *kernel, dtype=dtype))
    else:
        fields["w2_a"] = draw(tensors(out2, rank, dtype=dtype))
        wide = (in2, *kernel) if form == "low" else (in2 * math.prod(kernel),)
        fields["w2_b"] = draw(tensors(rank, *wide, dtype=dtype))
    return LoKr(draw(alphas), **fields)


@st.composite
def fulls(draw: st.DrawFn, *, shape: tuple[int, ...] | None = None) -> FullDelta:
    """A layer's or a norm's."""
    wanted = shape or draw(st.one_of(weight_shapes(), st.tuples(sizes)))
    dtype = draw(dtypes)
    bias = draw(tensors(wanted[0], dtype=dtype)) if draw(st.booleans()) else None
    return FullDelta(draw(tensors(*wanted, dtype=dtype)), bias, len(wanted) == 1)


@st.composite
def sparses(draw: st.DrawFn, *, shape: tuple[int, ...] | None = None) -> SparseResidual:
    """Some elements, now and then one twice."""
    size = shape or draw(weight_shapes())
    count = draw(st.integers(0, 6))
    places = [[draw(st.integers(0, n - 1)) for n in size] for _ in range(count)]
    indices = torch.tensor(places, dtype=torch.int16).reshape(count, len(size)).T
    values = draw(tensors(count, dtype=draw(dtypes)))
    return SparseResidual(indices, values, size, draw(st.sampled_from((1.0, 0.5))))


@st.composite
def sums(draw: st.DrawFn, *, shape: tuple[int, ...] | None = None) -> SumDelta:
    """A LoRA and one or two additive deltas beside it."""
    wanted = shape or draw(weight_shapes())
    makers = st.sampled_from((loras, fulls, sparses, lohas))
    others = [draw(draw(makers)(shape=wanted)) for _ in range(draw(st.integers(1, 2)))]
    fitted = [other.reshaped(wanted) for other in others]
    return SumDelta((draw(loras(shape=wanted, biases=True)), *fitted))


def _fitting(delta: LayerDelta, draw: st.DrawFn, out: int) -> Any:
    _, *rest = draw(weight_shapes())
    return delta.reshaped((out, *rest))


@st.composite
def ofts(draw: st.DrawFn) -> OFT:
    """With and without bound and lengths."""
    count, width, dtype = draw(st.integers(1, 4)), draw(st.integers(1, 4)), draw(dtypes)
    rescale = draw(tensors(count * width, 1, dtype=dtype)) if draw(st.booleans()) else None
    blocks = draw(tensors(count, width, width, dtype=dtype))
    constraint = draw(st.sampled_from((0.0, 0.01, 0.2, 100.0)))
    dialect = draw(st.sampled_from(("lycoris", "sd-scripts")))
    return _fitting(OFT(blocks, constraint, rescale, dialect), draw, count * width)


@st.composite
def bofts(draw: st.DrawFn) -> BOFT:
    """As many stages as the number of blocks allows, or fewer."""
    power, width, dtype = draw(st.integers(0, 2)), draw(st.sampled_from((2, 4))), draw(dtypes)
    count, stages = 2**power, draw(st.integers(1, power + 1))
    rescale = draw(tensors(count * width, 1, dtype=dtype)) if draw(st.booleans()) else None
    blocks = draw(tensors(stages, count, width, width, dtype=dtype))
    return _fitting(BOFT(blocks, draw(st.sampled_from((0.0, 0.05))), rescale), draw, count * width)


@st.composite
def gloras(draw: st.DrawFn) -> GLoRA:
    """Linear, convolution, convolution with a core."""
    out, inner, *kernel = draw(weight_shapes())
    rank, dtype, ones = draw(ranks), draw(dtypes), _ONES[: len(kernel)]
    core = (
        draw(tensors(rank, rank, *kernel, dtype=dtype)) if kernel and draw(st.booleans()) else None
    )
    return GLoRA(
        draw(tensors(inner, rank, *ones, dtype=dtype)),
        draw(tensors(rank, inner, *ones, dtype=dtype)),
        draw(tensors(out, rank, *ones, dtype=dtype)),
        draw(tensors(rank, inner, *(kernel if core is None else ones), dtype=dtype)),
        draw(alphas),
        core,
    )


@st.composite
def ia3s(draw: st.DrawFn) -> IA3:
    """On either axis."""
    shape, on_input = draw(weight_shapes()), draw(st.booleans())
    weight = draw(tensors(shape[1] if on_input else shape[0], dtype=draw(dtypes)))
    return IA3(weight, on_input).reshaped(shape)


diffusion_kinds: Mapping[str, st.SearchStrategy[Any]] = {
    TuckerLoRA.kind: tuckers(),
    LoHa.kind: lohas(),
    LoKr.kind: lokrs(),
    FullDelta.kind: fulls(),
    SparseResidual.kind: sparses(),
    SumDelta.kind: sums(),
    OFT.kind: ofts(),
    BOFT.kind: bofts(),
    GLoRA.kind: gloras(),
    IA3.kind: ia3s(),
}


# ── formulas ─────────────────────────────────────────────────────────────────────────────────


def wide(tensor: Tensor) -> Tensor:
    return tensor.double()


def matrix(tensor: Tensor) -> Tensor:
    return tensor.double().reshape(tensor.shape[0], -1)


def lora_change(delta: LoRA, weight: Tensor) -> Tensor:
    return (
        delta.alpha
        / len(delta.down)
        * torch.einsum("or,ri->oi", matrix(delta.up), matrix(delta.down))
    )


def tucker_change(delta: TuckerLoRA, weight: Tensor) -> Tensor:
    product = torch.einsum(
        "on,nm...,mi->oi...", matrix(delta.up), wide(delta.mid), matrix(delta.down)
    )
    return delta.alpha / len(delta.down) * product


def loha_change(delta: LoHa, weight: Tensor) -> Tensor:
    halves = ((delta.w1_a, delta.w1_b, delta.t1), (delta.w2_a, delta.w2_b, delta.t2))
    products = [
        matrix(a) @ matrix(b)
        if t is None
        else torch.einsum("ij...,jq,ip->pq...", wide(t), wide(b), wide(a))
        for a, b, t in halves
    ]
    return delta.alpha / delta.w1_b.shape[0] * products[0] * products[1]


def lokr_change(delta: LoKr, weight: Tensor) -> Tensor:
    first = matrix(delta.w1) if delta.w1 is not None else wide(delta.w1_a) @ wide(delta.w1_b)
    if delta.w2 is not None:
        second = matrix(delta.w2)
    elif delta.t2 is not None:
        core = torch.einsum("ij...,jq,ip->pq...", *map(wide, (delta.t2, delta.w2_b, delta.w2_a)))
        second = matrix(core)
    else:
        second = matrix(delta.w2_a) @ matrix(delta.w2_b)
    low = delta.w2_b if delta.w2_b is not None else delta.w1_b
    scale = 1.0 if low is None else delta.alpha / low.shape[0]
    rows = [
        torch.cat([scale * factor * row for factor in line]) for line in first for row in second
    ]
    return torch.stack(rows)


def full_change(delta: FullDelta, weight: Tensor) -> Tensor:
    return wide(delta.weight)


def sparse_change(delta: SparseResidual, weight: Tensor) -> Tensor:
    change = torch.zeros(delta.size, dtype=torch.float64)
    for place, value in zip(delta.indices.T.tolist(), delta.values.double(), strict=True):
        change[tuple(place)] += delta.scale * value
    return change


def sum_change(delta: SumDelta, weight: Tensor) -> Tensor:
    return sum(change_of(part, weight).reshape(weight.shape) for part in delta.parts)


def cayley(skew: Tensor) -> Tensor:
    unit = torch.eye(len(skew), dtype=torch.float64)
    return (unit + skew) @ torch.linalg.inv(unit - skew)


def turned(blocks: Tensor, bound: float) -> list[Tensor]:
    """Return the rotation of each block, ‖Q‖ over all of them shrunk to the bound."""
    skews = [block - block.T for block in blocks.double().flatten(0, -3)]
    norm = math.sqrt(sum(float((skew * skew).sum()) for skew in skews))
    shrink = bound / norm if 0 < bound < norm else 1.0
    return [cayley(shrink * skew) for skew in skews]


def lengthened(delta: OFT | BOFT, moved: Tensor, weight: Tensor) -> Tensor:
    if delta.rescale is not None:
        moved = moved * wide(delta.rescale).reshape(-1, 1)
    return moved - matrix(weight)


def oft_change(delta: OFT, weight: Tensor) -> Tensor:
    rotations = turned(delta.blocks, delta.constraint * weight.shape[0])
    return lengthened(delta, torch.block_diag(*rotations).T @ matrix(weight), weight)


def boft_change(delta: BOFT, weight: Tensor) -> Tensor:
    """Each stage pairs row j of a group of 2k with row j + k, k = 2^stage · b/2."""
    stages, count, width, _ = delta.blocks.shape
    rotations = turned(delta.blocks, delta.constraint * weight.shape[0])
    moved = matrix(weight)
    for stage in range(stages):
        reach = 2**stage * width // 2
        order = [
            group + half * reach + j
            for group in range(0, count * width, 2 * reach)
            for j in range(reach)
            for half in (0, 1)
        ]
        whole = torch.block_diag(*rotations[stage * count : (stage + 1) * count])
        result = torch.empty_like(moved)
        result[order] = whole @ moved[order]
        moved = result
    return lengthened(delta, moved, weight)


def glora_change(delta: GLoRA, weight: Tensor) -> Tensor:
    scale = delta.alpha / delta.a_right.shape[0]
    mixing = matrix(delta.a_left) @ matrix(delta.a_right)
    moved = torch.einsum("oi...,ij->oj...", weight.double(), mixing)
    if delta.mid is None:
        added = (matrix(delta.b_up) @ matrix(delta.b_down)).reshape(weight.shape)
    else:
        added = torch.einsum(
            "on,nm...,mi->oi...", matrix(delta.b_up), wide(delta.mid), matrix(delta.b_down)
        )
    return scale * (added + moved)


def ia3_change(delta: IA3, weight: Tensor) -> Tensor:
    letters = "oi...,i->oi..." if delta.on_input else "oi...,o->oi..."
    return torch.einsum(letters, weight.double(), wide(delta.weight).flatten())


CHANGES: Mapping[type[LayerDelta], Callable[[Any, Tensor], Tensor]] = {
    LoRA: lora_change,
    TuckerLoRA: tucker_change,
    LoHa: loha_change,
    LoKr: lokr_change,
    FullDelta: full_change,
    SparseResidual: sparse_change,
    SumDelta: sum_change,
    OFT: oft_change,
    BOFT: boft_change,
    GLoRA: glora_change,
    IA3: ia3_change,
}


def change_of(delta: LayerDelta, weight: Tensor) -> Tensor:
    """Return W' − W in float64 by the formula of the delta's kind."""
    return CHANGES[type(delta)](delta, weight)


def formula(delta: LayerDelta, weight: Tensor) -> list[list[float]]:
    """Return W' as rows."""
    return (matrix(weight) + change_of(delta, weight).reshape(len(weight), -1)).tolist()


def absolute(delta: AdditiveDelta) -> AdditiveDelta:
    """Return the delta of absolute values: its ΔW bounds the terms of every sum in ΔW."""
    positive = delta.map_tensors(torch.abs)
    if isinstance(positive, SumDelta):
        return SumDelta(tuple(absolute(part) for part in positive.parts))
    if hasattr(positive, "alpha"):
        return dataclasses.replace(positive, alpha=abs(positive.alpha))
    return positive


def _lokr_shape(delta: LoKr) -> tuple[int, ...]:
    out1 = (delta.w1 if delta.w1 is not None else delta.w1_a).shape[0]
    in1 = (delta.w1 if delta.w1 is not None else delta.w1_b).shape[1]
    if delta.t2 is not None:
        return (
            out1 * delta.w2_a.shape[1],
            in1 * delta.w2_b.shape[1],
            *delta.t2.shape[2:],
        )
    down = delta.w2 if delta.w2 is not None else delta.w2_b
    out2 = (delta.w2 if delta.w2 is not None else delta.w2_a).shape[0]
    return (out1 * out2, in1 * down.shape[1], *down.shape[2:])


SHAPES: Mapping[type[LayerDelta], Callable[[Any], tuple[int, ...]]] = {
    TuckerLoRA: lambda d: (d.up.shape[0], d.down.shape[1], *d.mid.shape[2:]),
    LoHa: lambda d: (
        d.shape
        or (
            (d.w1_a.shape[0], d.w1_b.shape[1])
            if d.t1 is None
            else (d.w1_a.shape[1], d.w1_b.shape[1], *d.t1.shape[2:])
        )
    ),
    FullDelta: lambda d: tuple(d.weight.shape),
    SparseResidual: lambda d: d.size,
    SumDelta: lambda d: (d.parts[0].up.shape[0], *d.parts[0].down.shape[1:]),
    LoKr: _lokr_shape,
    OFT: lambda d: d.shape,
    BOFT: lambda d: d.shape,
    IA3: lambda d: d.shape,
    GLoRA: lambda d: (
        d.b_up.shape[0],
        d.b_down.shape[1],
        *(d.b_down if d.mid is None else d.mid).shape[2:],
    ),
}
"""The weight's shape, from the stored tensors."""
