"""Each parameterisation's ΔW beside LyCORIS: its functional code, and what its modules compute."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

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
    TuckerLoRA,
)
from tests.strategies import make_tensor as make

for needed in ("einops", "toml", "lycoris"):
    pytest.importorskip(needed)
pytestmark = pytest.mark.peers

SHAPES = {"linear": (6, 4), "conv1d": (6, 4, 3), "conv2d": (6, 4, 3, 2), "conv3d": (6, 4, 2, 1, 3)}
CONVS = {name: shape for name, shape in SHAPES.items() if len(shape) > 2}
ALPHA, RANK = 1.5, 3
SCALE = ALPHA / RANK

shapes = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
convs = pytest.mark.parametrize("shape", CONVS.values(), ids=CONVS)


def assert_agrees(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs.reshape(ours.shape), rtol=1e-5, atol=1e-5)


def assert_moves(delta: LayerDelta, weight: Tensor, theirs: Tensor) -> None:
    """``theirs`` is W' − W."""
    assert_agrees(delta.apply(weight) - weight, theirs)


def ones(shape: tuple[int, ...]) -> list[int]:
    return [1] * (len(shape) - 2)


# ── LoRA ─────────────────────────────────────────────────────────────────────────────────────


@shapes
def test_lora(shape: tuple[int, ...]) -> None:
    from lycoris.functional.locon import diff_weight

    down, up = make(1, RANK, *shape[1:]), make(2, shape[0], RANK, *ones(shape))
    theirs = diff_weight(down, up, None, gamma=SCALE)
    assert_agrees(LoRA(down, up, ALPHA).materialize(), theirs)


@convs
def test_tucker_lora(shape: tuple[int, ...]) -> None:
    from lycoris.functional.locon import diff_weight

    down, up = make(1, RANK, shape[1], *ones(shape)), make(2, shape[0], RANK, *ones(shape))
    mid = make(3, RANK, RANK, *shape[2:])
    theirs = diff_weight(down, up, mid, gamma=SCALE)
    delta = TuckerLoRA(down, mid, up, ALPHA)
    assert_agrees(delta.materialize(), theirs)
    assert_agrees(delta.low_rank().materialize(), theirs)


# ── LoHa ─────────────────────────────────────────────────────────────────────────────────────


@shapes
def test_loha(shape: tuple[int, ...]) -> None:
    from lycoris.functional.loha import diff_weight

    flat = math.prod(shape[1:])
    b = [make(n, RANK, flat) for n in (1, 2)]
    a = [make(n, shape[0], RANK) for n in (3, 4)]
    theirs = diff_weight(b[0], a[0], b[1], a[1], None, None, gamma=SCALE)
    delta = LoHa(a[0], b[0], a[1], b[1], ALPHA)
    assert delta.weight_shape == (shape[0], flat)
    assert_agrees(delta.reshaped(shape).materialize(), theirs)
    assert_agrees(delta.low_rank().materialize(), theirs)


@convs
def test_loha_with_cores(shape: tuple[int, ...]) -> None:
    from lycoris.functional.loha import diff_weight

    a = [make(n, RANK, shape[0]) for n in (1, 2)]
    b = [make(n, RANK, shape[1]) for n in (3, 4)]
    t = [make(n, RANK, RANK, *shape[2:]) for n in (5, 6)]
    theirs = diff_weight(b[0], a[0], b[1], a[1], t[0], t[1], gamma=SCALE)
    delta = LoHa(a[0], b[0], a[1], b[1], ALPHA, t[0], t[1])
    assert delta.weight_shape == shape
    assert_agrees(delta.materialize(), theirs)
    assert_agrees(delta.low_rank().materialize(), theirs)


def trained(module_class: type, layer: nn.Module, **options: Any) -> Any:
    """Return a LyCORIS module on a layer, with random weights in place of its start."""
    module = module_class("m", layer, 1.0, RANK, ALPHA, **options)
    with torch.no_grad():
        for n, parameter in enumerate(module.parameters()):
            parameter.copy_(make(n, *parameter.shape))
    return module.eval()


def test_merged_loha_of_lycoris_is_scaled_twice() -> None:
    """Its forward pass scales by alpha/r, as the formula says; its merge by (alpha/r)²."""
    from lycoris.modules.loha import LohaModule

    layer = nn.Linear(4, 6, bias=False)
    module = trained(LohaModule, layer)
    state = module.state_dict()
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    delta = LoHa(*(state[name] for name in names), float(state["alpha"]))
    assert float(state["alpha"]) == ALPHA
    with torch.no_grad():
        forward = module.bypass_forward_diff(torch.eye(4)).T
        merged = module.get_merged_weight()[0] - layer.weight
    assert_agrees(delta.materialize(), forward)
    assert_agrees(delta.materialize() * SCALE, merged)


# ── LoKr ─────────────────────────────────────────────────────────────────────────────────────


def sides(first: str, second: str, kernel: tuple[int, ...]) -> dict[str, Tensor]:
    """Return the factors of a (2·3, 2·2, k...) Kronecker product."""
    found: dict[str, Tensor] = {}
    if first == "full":
        found["w1"] = make(1, 2, 2)
    else:
        found |= {"w1_a": make(1, 2, RANK), "w1_b": make(2, RANK, 2)}
    if second == "full":
        found["w2"] = make(3, 3, 2, *kernel)
    elif second == "low":
        found |= {"w2_a": make(3, 3, RANK), "w2_b": make(4, RANK, 2, *kernel)}
    else:
        found |= {
            "w2_a": make(3, RANK, 3),
            "w2_b": make(4, RANK, 2),
            "t2": make(5, RANK, RANK, *kernel),
        }
    return found


@pytest.mark.parametrize("kernel", [(), (3,), (3, 2), (1, 1)], ids=str)
@pytest.mark.parametrize("second", ["full", "low", "core"])
@pytest.mark.parametrize("first", ["full", "low"])
def test_lokr(first: str, second: str, kernel: tuple[int, ...]) -> None:
    from lycoris.functional.lokr import kron_weight

    if second == "core" and not kernel:
        pytest.skip("a core holds a kernel")
    factors = sides(first, second, kernel)
    words = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")
    scale = 1.0 if (first, second) == ("full", "full") else SCALE
    theirs = kron_weight(*(factors.get(word) for word in words), scale=scale)
    delta = LoKr(ALPHA, **factors)
    assert delta.weight_shape == (6, 4, *kernel)
    assert_agrees(delta.materialize(), theirs)
    assert_agrees(delta.low_rank().materialize(), theirs)


def test_merged_lokr_of_lycoris_is_scaled_twice() -> None:
    """Where a side is low-rank: alpha/r in its forward pass, (alpha/r)² in its merge."""
    from lycoris.modules.lokr import LokrModule

    layer = nn.Linear(16, 32, bias=False)
    module = trained(LokrModule, layer, factor=2)
    state = module.state_dict()
    factors = {n.removeprefix("lokr_"): t for n, t in state.items() if n.startswith("lokr_")}
    assert factors.keys() == {"w1", "w2_a", "w2_b"}
    delta = LoKr(float(state["alpha"]), **factors)
    with torch.no_grad():
        forward = module.bypass_forward_diff(torch.eye(16)).T
        merged = module.get_merged_weight()[0] - layer.weight
    torch.testing.assert_close(delta.materialize(), forward, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(delta.materialize() * SCALE, merged, rtol=1e-4, atol=1e-4)


# ── rotations ────────────────────────────────────────────────────────────────────────────────


@shapes
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("constraint", [0.0, 0.05, 10.0])
def test_oft(shape: tuple[int, ...], constraint: float, rescaled: bool) -> None:
    from lycoris.functional.diag_oft import diff_weight

    blocks, weight = make(1, 2, 3, 3), make(2, *shape)
    rescale = make(3, 6, *[1] * (len(shape) - 1)) if rescaled else None
    theirs = diff_weight(weight, blocks, rescale, constraint=constraint * shape[0])
    assert_moves(OFT(blocks, constraint, rescale).reshaped(shape), weight, theirs)


@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("constraint", [0.0, 0.05])
def test_boft(stages: int, constraint: float, rescaled: bool) -> None:
    from lycoris.functional.boft import diff_weight

    blocks, weight = make(1, stages, 4, 4, 4), make(2, 16, 3, 2)
    rescale = make(3, 16, 1, 1) if rescaled else None
    theirs = diff_weight(weight, blocks, rescale, constraint=constraint * 16)
    assert_moves(BOFT(blocks, constraint, rescale).reshaped((16, 3, 2)), weight, theirs)


# ── DoRA ─────────────────────────────────────────────────────────────────────────────────────


def inners(shape: tuple[int, ...]) -> list[AdditiveDelta]:
    flat = math.prod(shape[1:])
    loha = LoHa(make(1, 6, RANK), make(2, RANK, flat), make(3, 6, RANK), make(4, RANK, flat), ALPHA)
    return [
        LoRA(make(1, RANK, *shape[1:]), make(2, 6, RANK, *ones(shape)), ALPHA),
        loha.reshaped(shape),
        FullDelta(make(5, *shape)),
    ]


@shapes
@pytest.mark.parametrize("axis", ["out", "in"])
def test_dora(shape: tuple[int, ...], axis: str) -> None:
    from lycoris.functional.general import weight_decompose

    weight = make(7, *shape)
    lengths = (6, 1, *ones(shape)) if axis == "out" else (1, 4, *ones(shape))
    magnitude = make(8, *lengths)
    for inner in inners(shape):
        merged = weight + inner.materialize()
        theirs = weight_decompose(merged, magnitude, wd_on_out=axis == "out")
        assert_moves(DoRA(inner, magnitude.flatten(), axis), weight, theirs - weight)


def test_dora_of_lycoris_at_strength_zero_is_not_the_base() -> None:
    """It interpolates between W + ΔW and W'; ours, as ComfyUI's and OneTrainer's, from W."""
    from lycoris.functional.general import weight_decompose

    weight, magnitude = make(7, 6, 4), make(8, 6, 1)
    inner = inners((6, 4))[0]
    theirs = weight_decompose(weight + inner.materialize(), magnitude, 0.0)
    assert_agrees(weight + inner.materialize(), theirs)
    assert torch.equal(DoRA(inner, magnitude.flatten()).apply(weight, 0.0), weight)


# ── GLoRA, (IA)³ ─────────────────────────────────────────────────────────────────────────────


@shapes
@pytest.mark.parametrize("cored", [False, True])
def test_glora(shape: tuple[int, ...], cored: bool) -> None:
    from lycoris.modules.glora import _glora_weight

    if cored and len(shape) == 2:
        pytest.skip("a core holds a kernel")
    weight, single = make(1, *shape), ones(shape)
    a1, a2 = make(2, 4, RANK, *single), make(3, RANK, 4, *single)
    b1, b2 = make(4, 6, RANK, *single), make(5, RANK, 4, *(single if cored else shape[2:]))
    core = make(6, RANK, RANK, *shape[2:]) if cored else None
    theirs = _glora_weight(weight, a1, a2, b1, b2, core, SCALE)
    assert_moves(GLoRA(a1, a2, b1, b2, ALPHA, core), weight, theirs)


@shapes
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_ia3(shape: tuple[int, ...], on_input: bool, strength: float) -> None:
    from lycoris.modules.ia3 import _ia3_weight

    count = shape[1] if on_input else shape[0]
    stored = make(1, 1, count, *ones(shape)) if len(shape) > 2 else make(1, count)
    weight = make(2, *shape)
    theirs = _ia3_weight(weight, stored, on_input, strength, False)
    delta = IA3(stored, on_input).reshaped(shape)
    assert_agrees(delta.apply(weight, strength), theirs)
