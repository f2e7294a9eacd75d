"""Hypothesis strategies: deltas, adapters and module paths, all tiny."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from hypothesis import strategies as st
from torch import Tensor

from loratools.adapter import Adapter, in_natural_order
from loratools.deltas import (
    DoRA,
    ExpertLoRA,
    LayerDelta,
    LoRA,
    MovedBase,
    Replacement,
    RowReplacement,
)
from loratools.deltas.lora import Role

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STARTS = ("pissa", "olora", "kasa")

_LINEARS = ("q_proj", "k_proj", "o_proj", "up_proj", "down_proj", "to_out.0", "fc1")
_BLOCKS = ("model.layers", "h", "encoder.block", "down_blocks.0.attentions", "transformer_blocks")
_SEEDS = st.integers(0, 2**32 - 1)

ranks = st.integers(1, 5)
sizes = st.integers(1, 9)
dtypes = st.sampled_from(DTYPES)
alphas = st.one_of(
    st.integers(1, 64).map(float),
    st.floats(0.01, 100, allow_nan=False),
    st.floats(-50, -0.01, allow_nan=False),
)
strengths = st.sampled_from((1.0, -1.0, 0.5, 2.0, 0.3, -1.7))


def make_tensor(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the normal numbers that a seed stands for, rounded to ``dtype``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


@st.composite
def tensors(draw: st.DrawFn, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers; a seed is all that is drawn, so shrinking shrinks shapes."""
    return make_tensor(draw(_SEEDS), *shape, dtype=dtype)


@st.composite
def weight_shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """(out, in) of a linear layer, or (out, in, k...) of a convolution in one to three axes."""
    kernel = draw(st.sampled_from(((), (), (3,), (1, 1), (2, 3), (1, 2, 2))))
    return (draw(sizes), draw(sizes), *kernel)


@st.composite
def loras(
    draw: st.DrawFn,
    *,
    shape: tuple[int, ...] | None = None,
    role: Role = "linear",
    biases: bool = False,
) -> LoRA:
    """LoRA on a weight of ``shape``, or on any."""
    out, inner, *kernel = shape or draw(weight_shapes())
    rank, dtype = draw(ranks), draw(dtypes)
    down = draw(tensors(rank, inner, *kernel, dtype=dtype))
    up = draw(tensors(out, rank, *([1] * len(kernel)), dtype=dtype))
    bias = draw(tensors(out, dtype=dtype)) if biases and draw(st.booleans()) else None
    return LoRA(down, up, draw(alphas), bias, role)


@st.composite
def doras(draw: st.DrawFn, *, shape: tuple[int, ...] | None = None, role: Role = "linear") -> DoRA:
    """DoRA on a weight of ``shape``, or on any."""
    lora = draw(loras(shape=shape, role=role))
    return DoRA(lora, draw(tensors(lora.weight_shape[0], dtype=lora.up.dtype)))


@st.composite
def moved_bases(
    draw: st.DrawFn, *, shape: tuple[int, int] | None = None, start: str | None = None
) -> MovedBase:
    """A LoRA of rank below both sides of its matrix, and a start that can be recomputed."""
    out, inner = shape or (draw(st.integers(2, 9)), draw(st.integers(2, 9)))
    rank, dtype = draw(st.integers(1, min(out, inner) - 1)), draw(dtypes)
    down, up = draw(tensors(rank, inner, dtype=dtype)), draw(tensors(out, rank, dtype=dtype))
    lora = LoRA(down, up, draw(alphas))
    return MovedBase(lora, start or draw(st.sampled_from(STARTS)))


@st.composite
def expert_loras(draw: st.DrawFn, *, least: int = 1) -> ExpertLoRA:
    """A stack of up to four products."""
    experts, rank, dtype = draw(st.integers(least, 4)), draw(ranks), draw(dtypes)
    down = draw(tensors(experts, rank, draw(sizes), dtype=dtype))
    up = draw(tensors(experts, draw(sizes), rank, dtype=dtype))
    return ExpertLoRA(down, up, draw(alphas))


@st.composite
def replacements(draw: st.DrawFn, *, shape: tuple[int, ...] | None = None) -> Replacement:
    """A full tensor of one to four axes."""
    wanted = shape or draw(st.one_of(weight_shapes(), st.tuples(sizes)))
    return Replacement(draw(tensors(*wanted, dtype=draw(dtypes))), expected=draw(st.booleans()))


@st.composite
def row_replacements(draw: st.DrawFn, *, shape: tuple[int, int] | None = None) -> RowReplacement:
    """Some rows of a table, in any order."""
    count, width = shape or (draw(st.integers(1, 12)), draw(sizes))
    indices = draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4, unique=True))
    return RowReplacement(draw(tensors(len(indices), width, dtype=draw(dtypes))), tuple(indices))


deltas_by_kind: Mapping[str, st.SearchStrategy[LayerDelta]] = {
    LoRA.kind: loras(biases=True),
    DoRA.kind: doras(),
    ExpertLoRA.kind: expert_loras(),
    MovedBase.kind: moved_bases(),
    Replacement.kind: replacements(),
    RowReplacement.kind: row_replacements(),
}
"""One strategy for each parameterisation, by ``LayerDelta.kind``."""


# ── module paths and adapters ────────────────────────────────────────────────────────────────

module_paths = st.builds(
    lambda block, number, part, leaf: f"{block}.{number}.{part}{leaf}",
    st.sampled_from(_BLOCKS),
    st.sampled_from((0, 1, 2, 10, 11, 100)),
    st.sampled_from(("self_attn.", "mlp.", "attn1.", "")),
    st.sampled_from(_LINEARS),
)
"""Paths as PEFT has them, with numbers that sort differently as text."""


@st.composite
def layer_maps(
    draw: st.DrawFn, *, kind: str = LoRA.kind, max_size: int = 6
) -> dict[str, LayerDelta]:
    """Layers of one kind, in any order; embeddings and attention beside linear layers."""
    paths = draw(st.lists(module_paths, min_size=1, max_size=max_size, unique=True))
    if kind == MovedBase.kind:
        start = draw(st.sampled_from(STARTS))
        return {path: draw(moved_bases(start=start)) for path in paths}
    if kind == ExpertLoRA.kind:
        return {f"{path}.experts.down_proj": draw(expert_loras(least=2)) for path in paths}
    layers: dict[str, LayerDelta] = {path: draw(deltas_by_kind[kind]) for path in paths}
    if draw(st.booleans()):
        table = doras if kind == DoRA.kind else loras
        layers["model.embed_tokens"] = draw(table(role="embedding", shape=(4, 7)))
    if kind == LoRA.kind and draw(st.booleans()):
        layers |= draw(attentions())
    return layers


@st.composite
def attentions(draw: st.DrawFn, path: str = "tower.attn") -> dict[str, LayerDelta]:
    """The two layers of an nn.MultiheadAttention, as PEFT scales them: out_proj counts twice."""
    rank, alpha, width = draw(ranks), draw(alphas), draw(sizes)
    down, other = draw(tensors(rank, width)), draw(tensors(rank, width))
    up, back = draw(tensors(3 * width, rank)), draw(tensors(width, rank))
    return {
        path: LoRA(down, up, alpha, role="attention_in"),
        f"{path}.out_proj": LoRA(other, back, 2 * alpha, role="attention_out"),
    }


@st.composite
def extra_maps(draw: st.DrawFn) -> dict[str, Replacement | RowReplacement]:
    """A new head, a replaced norm, a bias and some rows of a table, each or not."""
    extras: dict[str, Replacement | RowReplacement] = {}
    if draw(st.booleans()):
        extras["score.weight"] = draw(replacements(shape=(3, 4)))
    if draw(st.booleans()):
        extras["model.norm.weight"] = draw(replacements(shape=(5,)))
    if draw(st.booleans()):
        extras["h.0.c_attn.bias"] = Replacement(draw(tensors(6)), "bias")
    if draw(st.booleans()):
        extras["model.wte.weight"] = draw(row_replacements())
    return extras


@st.composite
def adapters(draw: st.DrawFn, *, kinds: tuple[str, ...] = (LoRA.kind, DoRA.kind)) -> Adapter:
    """Adapters with layers of one kind, replaced tensors and rows beside."""
    layers = draw(layer_maps(kind=draw(st.sampled_from(kinds))))
    return Adapter(in_natural_order(layers), draw(extra_maps()))


@st.composite
def mixed_adapters(draw: st.DrawFn) -> Adapter:
    """Adapters with layers of any kinds side by side, as an edited or converted one may be."""
    paths = draw(st.lists(module_paths, min_size=1, max_size=5, unique=True))
    kind = st.sampled_from((LoRA.kind, DoRA.kind, MovedBase.kind))
    layers = {path: draw(deltas_by_kind[draw(kind)]) for path in paths}
    return Adapter(in_natural_order(layers), draw(extra_maps()))
