"""From changes found tensor by tensor to an adapter in the names of its format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch

from loratools.adapter import Adapter, Extra, in_natural_order
from loratools.deltas import ExpertLoRA, FullDelta, LayerDelta, LoRA, Replacement
from loratools.errors import UnsupportedError
from loratools.extraction.changes import Change, Family
from loratools.extraction.factoring import Found
from loratools.extraction.model_pair import ModelPair
from loratools.formats.format import Format
from loratools.formats.peft_config import CONFIG_NAME
from loratools.hub.references import repository_of
from loratools.keymaps.translate import translate
from loratools.keymaps.vocabulary import vocabulary_of
from loratools.planning.base_rows import read_tensor
from loratools.tensorfiles.dtypes import torch_dtype


def assemble(
    found: Sequence[Found],
    changes: Sequence[Change],
    pair: ModelPair,
    family: Family,
    target: Format,
) -> Adapter:
    """Return the adapter that says what was found, named and laid out for the format.

    Args:
        found: the tensors that changed.
        changes: all tensors of both models.
        pair: the models.
        family: whose names they have.
        target: the format to write.

    Raises:
        UnsupportedError: networks that one file of the format cannot hold together.
    """
    weights = {change.module: change for change in changes if change.parameter == "weight"}
    modules: dict[str, dict[str, Found]] = {}
    extras: dict[str, Extra] = {}
    for one in found:
        if one.change.way == "copy":
            extras |= _copies(one.change, weights.get(one.change.module), changes)
        elif one.change.way != "none":
            modules.setdefault(one.change.module, {})[one.change.parameter] = one
    layers: dict[str, LayerDelta] = {}
    notes: list[str] = []
    for module, parts in modules.items():
        weight, bias = parts.get("weight", parts.get("")), parts.get("bias")
        layer = layers[module] = _layer(weight, bias, weights.get(module), target)
        head = weight.change.head if weight is not None else None
        if head is not None and isinstance(layer, LoRA):
            layers[head] = _head(layer)
            notes.append(
                f"{head} shares the table of {module}, and both have the same change: loratools "
                "merges it once, PEFT's merge_and_unload would add it twice"
            )
    metadata = _metadata(pair, family, extras)
    arch = family.arch.id if family.arch else None
    adapter = Adapter(in_natural_order(layers), extras, family.names, arch, metadata, tuple(notes))
    return _named(adapter, family, target, pair)


def without_lone_biases(
    found: Sequence[Found], changes: Sequence[Change], family: Family, target: Format
) -> list[Found]:
    """Leave out, in diffusers' format, the biases of networks of which some layer has none.

    PEFT gives a bias to all layers of a network or to none, and refuses to fuse one into a layer
    that has none.
    """
    if target.naming != "diffusers":
        return list(found)
    biased = {change.module for change in changes if change.parameter == "bias"}
    bare = {
        _network(one.change, family)
        for one in found
        if one.delta is not None and one.change.module not in biased
    }
    return [
        _omitted(one) if one.change.kind == "bias" and _network(one.change, family) in bare else one
        for one in found
    ]


def _omitted(bias: Found) -> Found:
    reason = "diffusers has biases in all layers of a network or in none, and some have none"
    change = replace(bias.change, way="none", reason=reason)
    return replace(bias, change=change, values=None, lost=bias.norm)


def _network(change: Change, family: Family) -> str:
    """Return diffusers' name of a module's network."""
    if family.names == "diffusers" or family.arch is None:
        return change.module.partition(".")[0]
    hit = vocabulary_of(family.arch).resolve([change.module])[change.module]
    return "" if hit is None else hit.component.name


def _layer(
    weight: Found | None, bias: Found | None, owner: Change | None, target: Format
) -> LayerDelta:
    """Return one layer's change: its weight's, its bias's or both."""
    shift = None if bias is None else bias.values
    if weight is not None and weight.delta is not None:
        delta = weight.delta
        return delta if isinstance(delta, ExpertLoRA) else replace(delta, bias=shift)
    if weight is None and owner is not None and "full" not in target.holds:
        return _still(owner, shift)
    known = weight.change if weight is not None else owner
    norm = known is not None and known.kind == "norm"
    return FullDelta(None if weight is None else weight.values, shift, norm_layer=norm)


def _still(owner: Change, shift: torch.Tensor | None) -> LoRA:
    """Return a LoRA that changes the bias alone."""
    shape = owner.pair.shape[::-1] if owner.transposed else owner.pair.shape
    out, *rest = shape
    down = torch.zeros(1, *rest)
    return LoRA(down, torch.zeros(out, 1, *[1] * (len(rest) - 1)), 1.0, bias=shift)


def _head(table: LayerDelta) -> LoRA:
    """Return the change of an output head that shares an embedding's table, (tokens, dim)."""
    assert isinstance(table, LoRA)
    return LoRA(table.up.T.contiguous(), table.down.T.contiguous(), table.alpha)


def _copies(change: Change, owner: Change | None, changes: Sequence[Change]) -> dict[str, Extra]:
    """Return the tuned tensors that say a change: all of a module's, or the bias alone."""
    if change.parameter == "bias" and (owner is None or owner.way != "copy"):
        return {_name(change): Replacement(_tuned(change), "bias")}
    return {
        _name(other): Replacement(_tuned(other), "module", expected=True)
        for other in changes
        if other.module == change.module
    }


def _name(change: Change) -> str:
    return f"{change.module}.{change.parameter}".rstrip(".")


def _tuned(change: Change) -> torch.Tensor:
    tuned = change.pair.tuned
    return read_tensor(tuned).to(torch_dtype(tuned.dtype))


def _metadata(pair: ModelPair, family: Family, extras: Mapping[str, Extra]) -> Mapping[str, str]:
    """Return PEFT's words about the base."""
    base = pair.base.get("")
    words: dict[str, str] = {}
    if any(isinstance(extra, Replacement) and extra.origin == "bias" for extra in extras.values()):
        words["bias"] = "all"
    if family.names == "transformers" and base is not None:
        words["base_model_name_or_path"] = repository_of(base.path) or str(base.path)
        if any(str(word).endswith(_CAUSAL) for word in base.config_word("architectures") or []):
            words["task_type"] = "CAUSAL_LM"
    return {CONFIG_NAME: json.dumps(words)} if words else MappingProxyType({})


_CAUSAL = ("ForCausalLM", "LMHeadModel")


# ── names ────────────────────────────────────────────────────────────────────────────────────


def _named(adapter: Adapter, family: Family, target: Format, pair: ModelPair) -> Adapter:
    if family.names == target.naming:
        return adapter
    if target.naming == "transformers":
        if family.names != "diffusers":
            adapter = _translated(adapter, family, "diffusers", pair)
        return _of_one_network(adapter, target)
    return _translated(adapter, family, target.naming, pair)


def _translated(adapter: Adapter, family: Family, naming: str, pair: ModelPair) -> Adapter:
    assert family.arch is not None
    shapes = {family.path(name): shape for name, shape in pair.shapes.items()}
    return translate(adapter, family.arch, naming, shapes=shapes)  # type: ignore[arg-type]


def _of_one_network(adapter: Adapter, target: Format) -> Adapter:
    """Return the adapter without its network's name on the paths."""
    names = dict.fromkeys(path.partition(".")[0] for path in (*adapter.layers, *adapter.extras))
    if len(names) > 1:
        raise UnsupportedError(
            f"a {target.name} adapter is of one network, and {', '.join(names)} changed",
            hint="--to diffusers holds all of them in one file, or choose one with --include",
        )

    layers = {path.partition(".")[2]: delta for path, delta in adapter.layers.items()}
    extras = {name.partition(".")[2]: extra for name, extra in adapter.extras.items()}
    return replace(adapter, layers=layers, extras=extras, naming="transformers")
