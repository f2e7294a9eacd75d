"""``--compat lycoris`` beside LyCORIS' own merge, from one file's tensors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loratools.deltas import LayerDelta
from loratools.deltas.compat import read_as_tool
from loratools.formats.alphas import AlphaSources
from loratools.formats.module_fields import build_delta
from loratools.formats.module_tensors import Context, Module
from tests.strategies import make_tensor as make

for needed in ("einops", "toml", "lycoris"):
    pytest.importorskip(needed)

OUT, INNER, RANK = 16, 12, 2
LAYERS = {"linear": nn.Linear(INNER, OUT), "conv": nn.Conv2d(INNER, OUT, 3)}
for number, base in enumerate(LAYERS.values()):
    base.weight.data.copy_(make(number + 20, *base.weight.shape))
Stored = dict[str, Tensor]


def alpha(value: float) -> Stored:
    return {"alpha": torch.tensor(value)}


def lora(kernel: tuple[int, ...], value: float = 0.7) -> Stored:
    up = make(2, OUT, RANK, *[1] * len(kernel))
    return {"lora_up.weight": up, "lora_down.weight": make(1, RANK, INNER, *kernel), **alpha(value)}


def loha(kernel: tuple[int, ...], value: float = 0.7) -> Stored:
    flat = INNER * torch.Size(kernel).numel()
    sides = {f"hada_w{n}_a": make(n, OUT, RANK) for n in (1, 2)}
    return sides | {f"hada_w{n}_b": make(n + 2, RANK, flat) for n in (1, 2)} | alpha(value)


def lokr(kernel: tuple[int, ...], value: float = 0.7) -> Stored:
    flat = 6 * torch.Size(kernel).numel()
    low = {"lokr_w2_a": make(2, 8, RANK), "lokr_w2_b": make(3, RANK, flat)}
    return {"lokr_w1": make(1, 2, 2), **low, **alpha(value)}


def full_lokr(kernel: tuple[int, ...]) -> Stored:
    return {"lokr_w1": make(1, 2, 2), "lokr_w2": make(2, 8, 6, *kernel), **alpha(0.7)}


def oft(kernel: tuple[int, ...]) -> Stored:
    return {"oft_blocks": make(1, 4, 4, 4), **alpha(0.05)}


def boft(kernel: tuple[int, ...]) -> Stored:
    return {"oft_blocks": make(1, 3, 4, 4, 4), **alpha(0.05)}


def rescaled(stored: Stored, kernel: tuple[int, ...]) -> Stored:
    return {**stored, "rescale": make(8, OUT, 1, *[1] * len(kernel)).abs() + 0.5}


def with_lengths(stored: Stored, kernel: tuple[int, ...]) -> Stored:
    return {**stored, "dora_scale": make(8, OUT, 1, *[1] * len(kernel)).abs() + 0.5}


CASES = {
    "lora": lora,
    "lora, alpha 0": lambda k: lora(k, 0.0),
    "loha": loha,
    "loha, alpha 0": lambda k: loha(k, 0.0),
    "lokr": lokr,
    "full lokr": full_lokr,
    "oft": oft,
    "oft, rescaled": lambda k: rescaled(oft(k), k),
    "boft": boft,
    "boft, rescaled": lambda k: rescaled(boft(k), k),
    "dora": lambda k: with_lengths(lora(k), k),
    "doha": lambda k: with_lengths(loha(k), k),
    "dokr": lambda k: with_lengths(lokr(k), k),
    "lora and diff": lambda k: {**lora(k), "diff": make(9, OUT, INNER, *k)},
}

FIELDS = {"lora_up.weight": "up", "lora_down.weight": "down", "dora_scale": "magnitude"}


def ours(stored: Stored) -> LayerDelta:
    """Read the module's tensors as the kohya format does."""
    fields = {FIELDS.get(name, name): tensor for name, tensor in stored.items()}
    module = Module("m", fields, {name: name for name in fields})
    delta = build_delta(module, Context(AlphaSources()))
    assert delta is not None
    return delta


def theirs(stored: Stored, layer: Any, strength: float) -> Any:
    """Return W' as LyCORIS' merge has it."""
    from lycoris.modules import get_module, make_module

    shape = layer.weight.shape
    with torch.no_grad():
        kind, values = get_module({f"m.{name}": t for name, t in stored.items()}, "m")
        return make_module(kind, values, "m", layer).get_merged_weight(strength, shape)[0]


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("case", CASES)
def test_merged_weight(case: str, layer: str, strength: float) -> None:
    weight = LAYERS[layer].weight.detach()
    stored = CASES[case](tuple(weight.shape[2:]))
    delta = read_as_tool("lycoris", ours(stored).reshaped(weight.shape))
    expected = theirs(stored, LAYERS[layer], strength).reshape(weight.shape)
    torch.testing.assert_close(delta.apply(weight, strength), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "case", ["loha", "lokr", "oft, rescaled", "boft", "dora", "lora and diff", "lora, alpha 0"]
)
def test_the_formula_is_another(case: str) -> None:
    """What LyCORIS' merge gives at half strength is not W + m·(W′ − W)."""
    layer = LAYERS["linear"]
    stored = CASES[case](())
    plain = ours(stored).reshaped(layer.weight.shape).apply(layer.weight.detach(), 0.5)
    assert not torch.allclose(plain, theirs(stored, layer, 0.5), rtol=1e-2, atol=1e-2)
