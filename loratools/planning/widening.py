"""Weights that an adapter widens: the base's own, padded with zeros, before any change is added.

FLUX Control LoRAs take twice the channels. ComfyUI's files state the new shape
(``reshape_weight``); diffusers' files have a LoRA of it and leave the rest to the loader.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratools.adapter import Adapter
from loratools.basemodel import BaseModel
from loratools.deltas import LayerDelta
from loratools.formats.module_reading import RESHAPE
from loratools.keymaps.names import NameIndex

Shape = tuple[int, ...]

_INPUTS = ("x_embedder", "img_in")
"""FLUX's input projection, in diffusers' names and in the original's: the one module whose LoRA
may have more inputs than the base without saying so."""

_OUTPUTS = ("proj_out", "final_layer.linear")
_FLUX_BLOCKS = ("single_transformer_blocks.", "single_blocks.")
_CHANNEL_WORDS: Mapping[str, str] = {"x_embedder": "in_channels", "conv_in": "in_channels"}
# diffusers: these have as many output channels as inputs unless their config says otherwise.
_OUT_LIKE_IN = ("FluxTransformer2DModel", "ChromaTransformer2DModel")


@dataclass(frozen=True, slots=True)
class Widening:
    """A base weight that becomes larger.

    Attributes:
        tensor: its name.
        before: its shape in the base.
        after: its shape in the output.
        stated: whether the adapter says so, rather than only having a LoRA of that shape.
    """

    tensor: str
    before: Shape
    after: Shape
    stated: bool


def find_widenings(
    shapes: Mapping[str, Shape], index: NameIndex, adapters: Sequence[Adapter]
) -> tuple[dict[str, Widening], list[tuple[int, str]]]:
    """Return the weights that the adapters widen, and (adapter, reason) for what is impossible."""
    found: dict[str, Widening] = {}
    problems: list[tuple[int, str]] = []
    for position, adapter in enumerate(adapters):
        for name, after, stated in _wishes(adapter, shapes, index):
            home = _home(name, index)
            reason = _reason(name, home, after, shapes)
            if reason:
                problems.append((position, reason))
            elif home and after != shapes[home]:
                found[home] = _larger(found.get(home), Widening(home, shapes[home], after, stated))
    return found, problems


def _home(name: str, index: NameIndex) -> str | None:
    homes = index.find(f"{name}.weight")
    return homes[0] if len(homes) == 1 else None


def _wishes(
    adapter: Adapter, shapes: Mapping[str, Shape], index: NameIndex
) -> list[tuple[str, Shape, bool]]:
    """Return module, shape and whether it is stated, for every weight to be widened."""
    stated = {
        name.removesuffix(RESHAPE): tuple(int(n) for n in extra.tensors()["value"].flatten())
        for name, extra in adapter.extras.items()
        if name.endswith(RESHAPE)
    }
    wishes = [(module, shape, True) for module, shape in stated.items()]
    if any(block in name for name in shapes for block in _FLUX_BLOCKS):
        wishes += [
            (path, delta.weight_shape, False)
            for path, delta in adapter.layers.items()
            if path.rpartition(".")[2] in _INPUTS and path not in stated
            if _has_more_inputs(delta, shapes.get(_home(path, index) or "", ()))
        ]
    return wishes


def _has_more_inputs(delta: LayerDelta, base: Shape) -> bool:
    own = delta.weight_shape
    return len(base) == len(own) == 2 and base[0] == own[0] and base[1] < own[1]


def _reason(name: str, home: str | None, after: Shape, shapes: Mapping[str, Shape]) -> str:
    if home is None:
        return f"{name}: is to be widened to {after}, and the base has no such weight"
    before = shapes[home]
    if len(after) != len(before) or any(map(int.__lt__, after, before)):
        return f"{name}: is to be widened to {after}, but the base's {home} is {before}"
    bias = home.removesuffix("weight") + "bias"
    if after[0] > before[0] and bias in shapes:
        return f"{name}: is to have {after[0]} rows, but the base's {bias} has {before[0]}"
    return ""


def _larger(one: Widening | None, other: Widening) -> Widening:
    if one is None:
        return other
    after = tuple(map(max, one.after, other.after))
    return Widening(one.tensor, one.before, after, one.stated or other.stated)


def widened_config(base: BaseModel, widenings: Mapping[str, Widening]) -> dict[str, Any]:
    """Return the words of a diffusers ``config.json`` that the widened inputs change."""
    config = base.config or {}
    words: dict[str, Any] = {}
    for widening in widenings.values():
        word = _CHANNEL_WORDS.get(widening.tensor.removesuffix(".weight"))
        before, after = widening.before[1], widening.after[1]
        if word is None or before == after or config.get(word) != before:
            continue
        words[word] = after
        if config.get("_class_name") in _OUT_LIKE_IN and config.get("out_channels") is None:
            words["out_channels"] = before
    return words


def find_left_wide(merged: BaseModel, modules: Iterable[str]) -> list[str]:
    """Return the FLUX inputs among ``modules`` that a merge may have widened.

    They take more channels than the model puts out, which Control models do from the start too.
    """
    if not any(block in name for name in merged.tensors for block in _FLUX_BLOCKS):
        return []
    index = NameIndex(merged.tensors)
    last = [home for name in _OUTPUTS if (home := _home(name, index))]
    homes = {_home(path, index) for path in modules if path.rpartition(".")[2] in _INPUTS}
    return [
        home
        for home in homes
        if home and last and merged.tensors[home].shape[1] > merged.tensors[last[0]].shape[0]
    ]


def describe_widening(base: BaseModel, widening: Widening) -> str:
    """Return what a report says of it."""
    text = f"padded with zeros from {widening.before} to {widening.after}"
    if not widening.stated:
        text += ", the shape of the adapter's LoRA"
    if (base.config or {}).get("_class_name") == "FluxTransformer2DModel":
        text += "; a pipeline with it is diffusers' FluxControlPipeline"
    return text
