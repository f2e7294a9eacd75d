"""What an adapter has beside LoRA, in the names of a GGUF model: whole tensors, other deltas.

Where llama.cpp's converter only renames a tensor, or adds a known number to a norm, anything can be
folded into it. Where it also moves rows, only low-rank changes follow (``keymaps.gguf_ops``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from loratools.adapter import Adapter, Extra
from loratools.basemodel import BaseModel
from loratools.deltas import ExpertLoRA, LayerDelta, LoRA, Replacement, RowReplacement
from loratools.errors import MatchError, UnsupportedError
from loratools.keymaps.gguf_base import GGUFBase
from loratools.keymaps.gguf_model import GGUFModel
from loratools.keymaps.gguf_names import names_of, spell
from loratools.keymaps.gguf_vectors import is_stored_turned, shift_of, whole_model
from loratools.suggest import counted

_ENDS = (".weight", ".bias")
_TABLES = ("token_embd.weight", "output.weight")
_ELSEWHERE = "merge into the Hugging Face model and convert that (convert_hf_to_gguf.py)"


def in_gguf_names(adapter: Adapter, base: BaseModel, known: GGUFBase) -> Adapter:
    """Return an adapter whose LoRA layers are in GGUF's names with everything else so too.

    Raises:
        UnsupportedError: what has no place in the model, or one whose rows stand in another order.
        MatchError: a tensor of another shape than the base's.
    """
    others = {p: d for p, d in adapter.layers.items() if not isinstance(d, (LoRA, ExpertLoRA))}
    if not others and not adapter.extras:
        return adapter
    model = known.model_for([*others, *(name.rpartition(".")[0] for name in adapter.extras)])
    model = whole_model(model) or model
    layers = {p: d for p, d in adapter.layers.items() if p not in others}
    layers |= _renamed_layers(others, model, base)
    extras = dict(
        _renamed_extra(name, extra, model, base) for name, extra in adapter.extras.items()
    )
    return replace(adapter, layers=layers, extras=extras)


def _renamed_layers(
    layers: Mapping[str, LayerDelta], model: GGUFModel, base: BaseModel
) -> dict[str, LayerDelta]:
    found = {path: _name(path, model, base) for path in layers}
    lost = [path for path, name in found.items() if name is None]
    if lost:
        kinds = ", ".join(sorted({layers[path].kind for path in lost}))
        raise UnsupportedError(
            f"{lost[0]}: {counted(len(lost), 'layer')} of kind {kinds} cannot follow the layout of "
            "a GGUF model, in which rows or columns stand in another order",
            hint=_ELSEWHERE,
        )
    return {name: layers[path] for path, name in found.items() if name is not None}


def _renamed_extra(name: str, extra: Extra, model: GGUFModel, base: BaseModel) -> tuple[str, Extra]:
    end = next((end for end in _ENDS if name.endswith(end)), "")
    path = _name(name.removesuffix(end), model, base)
    if name in base.tensors:
        target = name
    elif path is None or not end:
        raise UnsupportedError(
            f"{name}: the adapter replaces it, and its place in a GGUF model of {model.arch} is "
            "not known, or holds it in another layout",
            hint=_ELSEWHERE,
        )
    else:
        target = path + end
    _check_shape(name, extra, target, base)
    shift = 0.0 if target == name else shift_of(model.arch, target)
    return target, _shifted(extra, shift)


def _name(path: str, model: GGUFModel, base: BaseModel) -> str | None:
    """Return a module's name in GGUF if its tensors are the checkpoint's as they stand."""
    if f"{path}.weight" in base.tensors:
        return path
    hit = names_of(model).source(path)
    if hit is None or hit.step.layout or hit.step.stacks or is_stored_turned(model, path):
        return None
    if len(hit.step.sources) > 1 or len(hit.step.targets) > 1:
        return None
    return spell(hit.step.targets[0], hit.block, None, 0)


def _check_shape(name: str, extra: Extra, target: str, base: BaseModel) -> None:
    there = base.tensors.get(target)
    shape = there.shape if there is not None else None
    if target == _TABLES[1] and there is None and _TABLES[0] in base.tensors:
        shape = base.tensors[_TABLES[0]].shape
    if shape is None:
        raise MatchError(f"{name}: {base.path} has no {target}", hint="is this the adapter's base?")
    ours = extra.weight_shape
    fits = ours[1:] == shape[1:] and ours[0] <= shape[0]
    if ours != shape and not (isinstance(extra, RowReplacement) and fits):
        grown = target in _TABLES and ours[1:] == shape[1:]
        raise MatchError(
            f"{name}: {tuple(ours)}, and {target} in {base.path} is {tuple(shape)}",
            hint="the adapter has another vocabulary, and the tokenizer of the GGUF would have "
            f"to follow: {_ELSEWHERE}"
            if grown
            else "is this the adapter's base?",
        )


def _shifted(extra: Extra, shift: float) -> Extra:
    if not shift or not isinstance(extra, Replacement):
        return extra
    return replace(extra, value=extra.value.to(torch.float32) + shift)
