"""From a checkpoint's names and layout to those of a GGUF model."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from loratools.adapter import Adapter, Extra, in_natural_order
from loratools.deltas import AdditiveDelta, ExpertLoRA, LayerDelta, LoRA, Replacement
from loratools.deltas.one_alpha import usual_alpha, with_alpha
from loratools.errors import LoratoolsError, MatchError
from loratools.keymaps.gguf_base import CONFIG_WORD, GGUFBase
from loratools.keymaps.gguf_checks import (
    MERGE,
    OTHER_BASE,
    Home,
    check_modules,
    fitted_to_base,
    refuse_tied_embeddings,
)
from loratools.keymaps.gguf_factors import Parts
from loratools.keymaps.gguf_fusion import as_base_has_them
from loratools.keymaps.gguf_model import GGUFModel, Step
from loratools.keymaps.gguf_names import Hit, names_of, spell
from loratools.keymaps.gguf_ops import Op, Stack
from loratools.suggest import counted

_SHOWN = 12
_CONFIG = "adapter_config.json"
_TOWERS = ("vision", "visual", "audio", "multi_modal", "mm_projector", "talker", "tower")


@dataclass(slots=True)
class Group:
    """The modules of one row and block, by place or expert."""

    step: Step
    block: int | None
    shifted: bool
    parts: dict[int, LoRA | ExpertLoRA] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)


def to_gguf(adapter: Adapter, base: GGUFBase, *, for_merge: bool = False) -> Adapter:
    """Return the adapter in GGUF's names and layout, every scale folded so that one alpha is right.

    An adapter that is merged into the base keeps its scales, and may change embeddings that
    llama.cpp could not change at run time.

    Layers that are no LoRA and full tensors stay as they are, for the format to refuse by name.

    Raises:
        MatchError: modules that a GGUF model of this kind does not have, all listed; tensors that
            the base lacks or has in another shape.
        UnsupportedError: what llama.cpp could not load; see ``GGUFBase.model_for``.
    """
    lifted, notes = _lifted(adapter.layers)
    loras = {path: d for path, d in lifted.items() if isinstance(d, (LoRA, ExpertLoRA))}
    others = {path: d for path, d in lifted.items() if path not in loras}
    model = base.model_for(list(loras))
    groups = _grouped(loras, model, base)
    check_modules(_homes(groups), model, base)
    layers: dict[str, LoRA | ExpertLoRA] = {}
    for group in groups:
        for name, part in _laid_out(group, base).items():
            if name in layers:
                raise MatchError(f"{', '.join(group.sources)}: {name} is changed by another module")
            layers[name] = part
    fitted = fitted_to_base(as_base_has_them(layers, base), base)
    if not for_merge:
        refuse_tied_embeddings(fitted, model, base)
    folded, more = (fitted, []) if for_merge else _folded(fitted)
    extras, told = _without_copies(adapter.extras, base)
    return replace(
        adapter,
        layers={**in_natural_order(folded), **others},
        extras=extras,
        naming="gguf",
        arch=model.arch,
        metadata=_metadata(adapter, model, base, groups),
        notes=(*adapter.notes, *notes, *more, *told),
    )


def _lifted(layers: Mapping[str, LayerDelta]) -> tuple[dict[str, LayerDelta], list[str]]:
    """Write additive deltas as plain LoRA where that is exact."""
    done, lifted = dict(layers), Counter[str]()
    for path, delta in layers.items():
        if isinstance(delta, AdditiveDelta) and not isinstance(delta, (LoRA, ExpertLoRA)):
            plain = delta.low_rank()
            if plain is not None:
                done[path] = plain
                lifted[delta.kind] += 1
    return done, [
        f"{count} {kind} layers written as LoRA (exact)" for kind, count in lifted.items()
    ]


def _without_copies(
    extras: Mapping[str, Extra], base: GGUFBase
) -> tuple[dict[str, Extra], list[str]]:
    """Leave out the tables that PEFT stores beside an embedding's factors, if nothing grew."""
    size = base.config.get("vocab_size")
    copies = [
        name
        for name, extra in extras.items()
        if isinstance(extra, Replacement)
        and extra.origin == "base_copy"
        and extra.value.shape[0] == size
    ]
    kept = {name: extra for name, extra in extras.items() if name not in copies}
    note = (
        f"{', '.join(copies)}: PEFT's copy of the untrained table is left out: its vocabulary is "
        "the base's"
    )
    return kept, [note] if copies else []


# ── finding the rows ─────────────────────────────────────────────────────────────────────────


def _grouped(
    layers: Mapping[str, LoRA | ExpertLoRA], model: GGUFModel, base: GGUFBase
) -> list[Group]:
    names, unknown = names_of(model), list[str]()
    groups: dict[tuple[Step, int | None, bool], Group] = {}
    for path, delta in layers.items():
        hit = names.source(path)
        if hit is None or not _fits(hit, delta):
            unknown.append(path)
            continue
        key = (hit.step, hit.block, hit.shifted)
        group = groups.setdefault(key, Group(hit.step, hit.block, hit.shifted))
        place = hit.place if hit.expert is None else hit.expert
        if place in group.parts:
            raise MatchError(f"{path}: lands where {group.sources[-1]} is already")
        group.parts[place] = delta
        group.sources.append(path)
    _refuse_unknown(unknown, model, base)
    return list(groups.values())


def _fits(hit: Hit, delta: LoRA | ExpertLoRA) -> bool:
    """Return whether a row's experts are expected in this form."""
    return not (hit.step.stacks and isinstance(delta, ExpertLoRA))


def _refuse_unknown(unknown: list[str], model: GGUFModel, base: GGUFBase) -> None:
    if not unknown:
        return
    lines = [f"  {path}" for path in unknown[:_SHOWN]]
    more = len(unknown) - len(lines)
    lines += [f"  ... and {more} more"] if more > 0 else []
    tower = any(word in path for path in unknown for word in _TOWERS)
    hint = (
        "llama.cpp keeps vision and audio towers in an mmproj file, which takes no adapter; "
        + MERGE
        if tower
        else f"is {base.source} the model that the adapter was trained on? If it is, {MERGE}"
    )
    raise MatchError(
        f"{counted(len(unknown), 'module has', 'modules have')} no place in a GGUF model of "
        f"{model.arch}:\n" + "\n".join(lines),
        hint=hint,
    )


def _homes(groups: list[Group]) -> list[Home]:
    """Return each module with the row and block that it belongs to."""
    return [
        (path, group.step, group.block, part.weight_shape)
        for group in groups
        for path, part in zip(group.sources, group.parts.values(), strict=True)
    ]


# ── layout ───────────────────────────────────────────────────────────────────────────────────


def _laid_out(group: Group, base: GGUFBase) -> dict[str, LoRA | ExpertLoRA]:
    step = group.step
    try:
        parts = _parts(group, base)
        for op in ops_of(step, base, group.block):
            parts = op.do(parts)
    except LoratoolsError as error:
        hint = error.hint or OTHER_BASE
        raise type(error)(f"{group.sources[0]}: {error.message}", hint=hint) from error
    names = [spell(name, group.block, None, first_stack(step, base)) for name in step.targets]
    return {name: part for name, part in zip(names, parts, strict=True) if part is not None}


def first_stack(step: Step, base: GGUFBase) -> int:
    """Return where a row's second stack of blocks begins; 0 for rows without."""
    return base.first_stack if step.shifts else 0


def _parts(group: Group, base: GGUFBase) -> Parts:
    step = group.step
    count = experts_of(step, base, group.block) if step.stacks else len(step.sources)
    if max(group.parts) >= count:
        raise MatchError(f"expert {max(group.parts)} of {count}")
    return [group.parts.get(place) for place in range(count)]


def experts_of(step: Step, base: GGUFBase, block: int | None) -> int:
    """Return how many experts a row's stack has: as the base's tensor says, or its config."""
    name = spell(step.targets[0], block, None, 0) + ".weight"
    shape = (base.tensors or {}).get(name)
    if shape is not None and len(shape) == 3:
        return shape[0]
    count = base.config.number("num_experts")
    # GroveMoE: half as many of the small experts.
    return count // 2 if "chunk_experts" in step.sources[0] else count


def ops_of(step: Step, base: GGUFBase, block: int | None, count: int = 0) -> tuple[Op, ...]:
    """Return everything that happens to a row's weights in a block.

    ``count``: of experts, where the adapter tells; else the base does.
    """
    stack = (Stack(count or experts_of(step, base, block)),) if step.stacks else ()
    return (*stack, *(step.layout(base.config, block) if step.layout else ()))


# ── scales and words ─────────────────────────────────────────────────────────────────────────


def _folded(
    layers: Mapping[str, LoRA | ExpertLoRA],
) -> tuple[dict[str, LoRA | ExpertLoRA], list[str]]:
    """Fold scales, because a GGUF file has one alpha and divides it by each tensor's rank."""
    alpha = usual_alpha(layers.values())
    folded = {name: with_alpha(layer, alpha) for name, layer in layers.items()}
    changed = sum(folded[name] is not layer for name, layer in layers.items())
    if not changed:
        return folded, []
    note = (
        f"the scale of {counted(changed, 'layer')} is folded into the factors: a GGUF file has one "
        f"alpha ({alpha:g}) for all"
    )
    return folded, [note]


def _metadata(
    adapter: Adapter, model: GGUFModel, base: GGUFBase, groups: list[Group]
) -> dict[str, str]:
    """Return GGUF's words: those of the source that have one, and what the way back needs."""
    config = json.loads(adapter.metadata.get(_CONFIG, "{}"))
    known = {"architectures", "model_type", "tie_word_embeddings", "num_hidden_layers"}
    said = {word: base.config.fields[word] for word in known if word in base.config.fields}
    said |= base.config.used
    if any(isinstance(part, ExpertLoRA) for group in groups for part in group.parts.values()):
        said["experts_fused"] = True
    words = {"general.architecture": model.arch, CONFIG_WORD: json.dumps(said, sort_keys=True)}
    if name := config.get("base_model_name_or_path"):
        words |= _base_words(str(name))
    if tokens := config.get("alora_invocation_tokens"):
        words["adapter.alora.invocation_tokens"] = json.dumps(tokens)
    return words


def _base_words(name: str) -> dict[str, str]:
    """Return the keys that name the base; a Hub name has an organisation."""
    organisation, _, model = name.strip("/").rpartition("/")
    words = {"general.base_model.count": "1", "general.base_model.0.name": model}
    if organisation.count("/") == 0 and organisation and not name.startswith((".", "/")):
        words["general.base_model.0.organization"] = organisation
        words["general.base_model.0.repo_url"] = f"https://huggingface.co/{name}"
    return words
