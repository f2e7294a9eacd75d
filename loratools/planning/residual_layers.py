"""What rounding left out of a merge's tensors, in the terms of an adapter for the merged model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from loratools.adapter import Adapter
from loratools.basemodel import BaseModel
from loratools.deltas import ExpertLoRA, LoRA
from loratools.deltas.lora import Role
from loratools.deltas.spectral import lora_from_svd
from loratools.keymaps.gguf_base import CONFIG_WORD, open_gguf_base
from loratools.keymaps.translate import detect_base, find_architecture, translate
from loratools.planning.merge_plan import MergePlan
from loratools.planning.tied_embeddings import find_tie
from loratools.streaming.residuals import Residual


def residual_layers(
    plan: MergePlan, found: Mapping[str, Residual], *, straight: bool
) -> dict[str, LoRA | ExpertLoRA]:
    """Return module path → the change that is lacking, oriented as the merge's adapters are.

    Args:
        plan: of the merge.
        found: tensor name → what rounding left out, in the order in which it is stored.
        straight: lay stacks out as the file has them, whatever the adapters do.
    """
    base, works = plan.checkpoint.base, plan.checkpoint.works
    tie = find_tie(base)
    tables = (tie.input, *tie.copies) if tie else ()
    layers: dict[str, LoRA | ExpertLoRA] = {}
    for name, residual in found.items():
        placements, shape = plan.placements[name], works[name].shape
        stack = next((p.delta for p in placements if isinstance(p.delta, ExpertLoRA)), None)
        table = name in tables or any(p.delta.stored_transposed for p in placements)
        turned = table or placements[0].transposed != _is_turned(base, name)
        layers[name.removesuffix(".weight")] = (
            _matrix(residual, shape, turned=turned, role="embedding" if table else "linear")
            if stack is None
            else _stack(residual, shape, stack, turned=turned and not straight)
        )
    return layers


def _matrix(residual: Residual, shape: tuple[int, ...], *, turned: bool, role: Role) -> LoRA:
    (svd,) = residual.svds
    if turned:
        return lora_from_svd(svd.transposed, shape[::-1], role=role)
    return lora_from_svd(svd, shape, role=role)


def _stack(
    residual: Residual, shape: tuple[int, ...], like: ExpertLoRA, *, turned: bool
) -> ExpertLoRA:
    own = shape[:0:-1] if turned else shape[1:]
    svds = [svd.transposed if turned else svd for svd in residual.svds]
    loras = [lora_from_svd(svd, own) for svd in svds]
    return ExpertLoRA(
        torch.stack([lora.down for lora in loras]),
        torch.stack([lora.up for lora in loras]),
        float(loras[0].rank),
        flipped_if_square=like.flipped_if_square,
    )


def _is_turned(base: BaseModel, name: str) -> bool:
    """Return whether the stored codes have the last two axes the other way round."""
    tensor = base.tensors.get(name)
    return tensor is not None and tensor.packed is not None and tensor.packed.turned


def in_names_of_comfyui(adapter: Adapter, base: BaseModel, arch: str | None) -> Adapter:
    """Return an adapter in a single-file base's own names as ComfyUI's files have them.

    Raises UnknownArchitectureError, MatchError: see ``translate``.
    """
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    known = find_architecture(arch) if arch else detect_base(shapes)
    return translate(adapter, known, "comfyui", shapes=shapes)


def in_words_of_gguf(adapter: Adapter, base: BaseModel, path: Path) -> Adapter:
    """Return an adapter in GGUF's names with what llama.cpp asks for, and the way back needs."""
    known = open_gguf_base(base.path)
    words = {
        "general.name": path.stem,
        "general.base_model.count": "1",
        "general.base_model.0.name": path.stem.removesuffix("-residual"),
        CONFIG_WORD: json.dumps(known.config.fields, sort_keys=True),
    }
    return replace(adapter, naming="gguf", arch=known.models[0].arch, metadata=words)
