"""From a GGUF model's names and layout to those of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from loratools.adapter import Adapter, in_natural_order
from loratools.deltas import ExpertLoRA, LayerDelta, LoRA
from loratools.errors import LoratoolsError, MatchError
from loratools.keymaps.gguf_base import GGUFBase
from loratools.keymaps.gguf_factors import Parts
from loratools.keymaps.gguf_fusion import FUSED, fuse_parts, part_names, split_name, split_parts
from loratools.keymaps.gguf_model import Step
from loratools.keymaps.gguf_names import Hit, ModelNames, in_memory, is_there, names_of, spell
from loratools.keymaps.gguf_to import first_stack, ops_of
from loratools.suggest import counted

_SHOWN = 12
_HUB = "https://huggingface.co/"
_CONFIG = "adapter_config.json"
_WHOLE = {part: whole for whole, parts in FUSED.items() for part in parts}


@dataclass(slots=True)
class _Group:
    """The tensors of one row and block."""

    hit: Hit
    parts: dict[int, LoRA | ExpertLoRA] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)


def from_gguf(adapter: Adapter, base: GGUFBase) -> Adapter:
    """Return a GGUF adapter in transformers' names and layout.

    Raises:
        MatchError: tensors that models of this architecture do not have, all listed; an adapter
            for another architecture than the base's.
        InputError: a layout that depends on numbers which neither file nor base tells.
    """
    _check_arch(adapter, base)
    model = base.model_for(list(adapter.layers))
    names = names_of(model)
    loras = {n: d for n, d in adapter.layers.items() if isinstance(d, (LoRA, ExpertLoRA))}
    groups = _grouped(_as_rows_have_them(loras, names, base), names, base)
    layers: dict[str, LayerDelta] = {}
    for group in groups:
        for path, part in _undone(group, base).items():
            layers[in_memory(path, base.class_name)] = part
    return replace(
        adapter,
        layers=in_natural_order(layers),
        naming="transformers",
        arch=None,
        metadata={**adapter.metadata, _CONFIG: _config(adapter.metadata)},
    )


def _check_arch(adapter: Adapter, base: GGUFBase) -> None:
    known = {model.arch for model in base.models}
    if adapter.arch is not None and adapter.arch not in known:
        raise MatchError(
            f"the adapter is for {adapter.arch}, and {base.source} is {' or '.join(sorted(known))}",
            hint="name the base that the adapter was made for",
        )


def _as_rows_have_them(
    layers: Mapping[str, LoRA | ExpertLoRA], names: ModelNames, base: GGUFBase
) -> dict[str, LoRA | ExpertLoRA]:
    """Split what only the GGUF base has fused, and fuse what only it has apart."""
    done: dict[str, LoRA | ExpertLoRA] = {}
    groups: dict[str, dict[str, LoRA | ExpertLoRA]] = {}
    for name, layer in layers.items():
        block, leaf = split_name(name)
        whole = f"{block}{_WHOLE.get(leaf, '')}"
        if names.targets(name):
            done[name] = layer
        elif part_names(name) and all(names.targets(part) for part in part_names(name)):
            done |= split_parts(name, layer, base)
        elif leaf in _WHOLE and names.targets(whole):
            groups.setdefault(whole, {})[name] = layer
        else:
            done[name] = layer
    for whole, parts in groups.items():
        done[whole] = fuse_parts(whole, parts, base)
    return done


def _grouped(
    layers: Mapping[str, LoRA | ExpertLoRA], names: ModelNames, base: GGUFBase
) -> Iterable[_Group]:
    groups: dict[tuple[Step, int | None], _Group] = {}
    unknown = []
    for name, layer in layers.items():
        hit = _chosen(names.targets(name), layer, base)
        if hit is None:
            unknown.append(name)
            continue
        group = groups.setdefault((hit.step, hit.block), _Group(hit))
        group.parts[hit.place] = layer
        group.sources.append(name)
    if unknown:
        shown = "\n".join(f"  {name}" for name in unknown[:_SHOWN])
        raise MatchError(
            f"{base.source}: {counted(len(unknown), 'tensor is', 'tensors are')} none of "
            f"{base.models[0].arch}:\n{shown}",
            hint="is this the base that the adapter was made for?",
        )
    return groups.values()


def _chosen(hits: list[Hit], layer: LoRA | ExpertLoRA, base: GGUFBase) -> Hit | None:
    """Return the row whose checkpoint names the base has; else the first that makes sense."""
    fitting = [hit for found in hits if (hit := _in_own_stack(found, base)) is not None]
    if base.parameters is not None:
        known = frozenset(base.named_parameters)
        there = [hit for hit in fitting if is_there(hit.step, hit.block, known)]
        fitting = there or fitting
    if base.config.fields.get("experts_fused") and isinstance(layer, ExpertLoRA):
        fused = [hit for hit in fitting if not hit.step.stacks]
        fitting = fused or fitting
    return fitting[0] if fitting else None


def _in_own_stack(hit: Hit, base: GGUFBase) -> Hit | None:
    """Return the hit with its block counted in its own stack, or ``None`` if it is in another."""
    if hit.block is None or not any("_module" in name for name in hit.step.sources):
        return hit
    start = base.first_stack
    if hit.shifted:
        return replace(hit, block=hit.block - start) if hit.block >= start else None
    return hit if hit.block < start else None


def _undone(group: _Group, base: GGUFBase) -> dict[str, LoRA | ExpertLoRA]:
    step, block = group.hit.step, group.hit.block
    parts: Parts = [group.parts.get(place) for place in range(len(step.targets))]
    count = parts[0].weight_shape[0] if step.stacks and parts[0] is not None else 0
    try:
        for op in reversed(ops_of(step, base, block, count)):
            parts = op.undo(parts)
    except LoratoolsError as error:
        hint = error.hint or "is this the base that the adapter was made for?"
        raise type(error)(f"{group.sources[0]}: {error.message}", hint=hint) from error
    start = first_stack(step, base)
    if step.stacks:
        paths = [spell(step.sources[0], block, expert, start) for expert in range(count)]
    else:
        paths = [spell(name, block, None, start) for name in step.sources]
    return {path: part for path, part in zip(paths, parts, strict=True) if part is not None}


def _config(words: Mapping[str, str]) -> str:
    """Return what a GGUF file's words say in PEFT's: the base's name, aLoRA's tokens."""
    config: dict[str, object] = {"task_type": "CAUSAL_LM"}
    url = words.get("general.base_model.0.repo_url", "")
    name = url.removeprefix(_HUB) or words.get("general.base_model.0.name")
    if name:
        config["base_model_name_or_path"] = name
    tokens = words.get("adapter.alora.invocation_tokens")
    if tokens:
        config["alora_invocation_tokens"] = json.loads(tokens)
    return json.dumps(config, sort_keys=True)
