"""Projections that one GGUF file has fused and another apart, settled by a base's tensor list.

llama.cpp's converter can fuse query, key and value, and gates and ups of experts, of any model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratools.deltas import ExpertLoRA, LoRA
from loratools.errors import MatchError
from loratools.keymaps.gguf_base import GGUFBase, Shapes
from loratools.keymaps.gguf_factors import Parts, join_rows
from loratools.keymaps.gguf_ops import Split

Layers = Mapping[str, LoRA | ExpertLoRA]

FUSED: Mapping[str, tuple[str, ...]] = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
}
"""Last part of a fused tensor's name → those of its parts, in the order of their rows."""

_WHOLE = {part: whole for whole, parts in FUSED.items() for part in parts}
_NAME = re.compile(r"(?P<block>blk\.\d+\.)(?P<leaf>\w+)")


def as_base_has_them(layers: Layers, base: GGUFBase) -> dict[str, LoRA | ExpertLoRA]:
    """Return the layers fused or split as the base's tensors are; the others as they are."""
    if base.tensors is None:
        return dict(layers)
    done: dict[str, LoRA | ExpertLoRA] = {}
    groups: dict[str, dict[str, LoRA | ExpertLoRA]] = {}
    for name, layer in layers.items():
        block, leaf = split_name(name)
        whole = f"{block}{_WHOLE.get(leaf, '')}"
        if f"{name}.weight" in base.tensors:
            done[name] = layer
        elif f"{whole}.weight" in base.tensors:
            groups.setdefault(whole, {})[name] = layer
        else:
            done |= _split_as(name, layer, base.tensors)
    for whole, parts in groups.items():
        done[whole] = fuse_parts(whole, parts, base)
    return done


def split_name(name: str) -> tuple[str, str]:
    """Return a tensor's block (``blk.3.``) and the rest of its name."""
    match = _NAME.fullmatch(name)
    return (match["block"], match["leaf"]) if match else ("", name)


def part_names(whole: str) -> tuple[str, ...]:
    """Return the names of a fused tensor's parts; none if it is not one."""
    block, leaf = split_name(whole)
    return tuple(block + part for part in FUSED.get(leaf, ()))


def fuse_parts(whole: str, parts: Layers, base: GGUFBase) -> LoRA | ExpertLoRA:
    """Return the change of a fused tensor; parts that are missing are rows of zeros."""
    names = part_names(whole)
    present: Parts = [parts.get(name) for name in names]
    shape = (base.tensors or {}).get(f"{whole}.weight")
    sizes = part_sizes(whole, base, shape[-2] if shape else None, present)
    return join_rows(present, sizes)


def split_parts(
    whole: str, layer: LoRA | ExpertLoRA, base: GGUFBase
) -> dict[str, LoRA | ExpertLoRA]:
    """Return the changes of a fused tensor's parts, without those that do not change."""
    sizes = part_sizes(whole, base, layer.weight_shape[-2], [])
    blocks = Split(sizes).do([layer])
    named = zip(part_names(whole), blocks, strict=True)
    return {name: block for name, block in named if block is not None}


def part_sizes(whole: str, base: GGUFBase, rows: int | None, present: Parts) -> tuple[int, ...]:
    """Return how many rows each part of a fused tensor has.

    Raises MatchError where they do not add up to ``rows``.
    """
    block, leaf = split_name(whole)
    if present and all(part is not None for part in present):
        sizes = tuple(part.weight_shape[-2] for part in present if part is not None)
    elif leaf != "attn_qkv":
        size = next((part.weight_shape[-2] for part in present if part is not None), None)
        sizes = (size or (rows or 0) // 2,) * 2
    else:
        number = int(block.split(".")[1])
        size, keys = base.config.head_size(number), base.config.kv_heads(number)
        sizes = (base.config.heads(number) * size, keys * size, keys * size)
    if rows is not None and sum(sizes) != rows:
        raise MatchError(f"{whole}: {rows} rows do not divide into {sizes}")
    return sizes


def _split_as(name: str, layer: LoRA | ExpertLoRA, tensors: Shapes) -> dict[str, LoRA | ExpertLoRA]:
    parts = part_names(name)
    shapes = [tensors.get(f"{part}.weight") for part in parts]
    if not parts or any(shape is None for shape in shapes):
        return {name: layer}
    sizes = tuple(shape[-2] for shape in shapes if shape is not None)
    blocks = Split(sizes).do([layer])
    return {part: block for part, block in zip(parts, blocks, strict=True) if block is not None}
