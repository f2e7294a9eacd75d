"""From the tensors of a file to layers, with every fault listed before anything is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.adapter import Adapter, Extra, in_natural_order
from loratools.deltas import LayerDelta, LoRA, Replacement
from loratools.errors import MalformedAdapterError, UnsupportedError
from loratools.formats.alphas import find_alpha_sources
from loratools.formats.format import Bundle
from loratools.formats.module_fields import build_delta
from loratools.formats.module_tensors import Context, Module
from loratools.formats.parameters import is_carried
from loratools.linalg.gram import product_norm
from loratools.suggest import counted

Split = Callable[[str], tuple[str, str] | None]
"""From a key to module path and field, or None if the key is unknown."""

RESHAPE = ".reshape_weight"
"""Ending of the extra that says to which shape a base weight is padded with zeros first."""

_PARAMETERS = ("scale", "bias", "weight")
# Fused projections that some files store once more in parts: Z-Image files of Anime-Z.
_REPEATED = (("qkv", ("to_q", "to_k", "to_v")), ("out", ("to_out.0",)))
_SAME = 1e-6


@dataclass(frozen=True, slots=True)
class Parsed:
    """What a reader found."""

    layers: dict[str, LayerDelta]
    extras: dict[str, Extra]
    notes: list[str]

    def adapter(self, naming: str, bundle: Bundle) -> Adapter:
        """Return the adapter, its layers in natural order and the file's words untouched."""
        return Adapter(
            layers=in_natural_order(self.layers),
            extras=self.extras,
            naming=naming,
            metadata=dict(bundle.metadata),
            notes=tuple(self.notes),
        )


def read_modules(bundle: Bundle, split: Split, *, ignore_config: bool = False) -> Parsed:
    """Read all tensors of a bundle.

    Args:
        bundle: the file.
        split: cuts a key into module path and field.
        ignore_config: whether an adapter_config.json beside the file is somebody else's.

    Raises:
        MalformedAdapterError: listing every unknown key and every module whose tensors do not
            belong together.
        UnsupportedError: listing what is recognised and cannot be held.
    """
    if ignore_config:
        bundle = Bundle(bundle.tensors, bundle.metadata, {}, bundle.source)
    context = Context(find_alpha_sources(bundle))
    modules, extras, faults = _grouped(bundle.tensors, split)
    layers: dict[str, LayerDelta] = {}
    refused: list[UnsupportedError] = []
    for module in modules.values():
        built = _built(module, context)
        if isinstance(built, MalformedAdapterError):
            faults.append(built.message)
        elif isinstance(built, UnsupportedError):
            refused.append(built)
        else:
            extras |= _replacements(module)
            layers |= {} if built is None else {module.path: built}
    _raise_faults(faults, refused, bundle.source)
    if not layers and not extras:
        raise MalformedAdapterError(f"{bundle.source}: holds no adapter tensors")
    layers = _without_repeats(layers, context.notes, bundle.source)
    if context.without_alpha:
        context.notes.append(
            f"no alpha is stated for {counted(context.without_alpha, 'module')}: taken as the rank "
            "(scale 1)"
        )
    return Parsed(layers, extras, context.notes)


def _built(
    module: Module, context: Context
) -> LayerDelta | MalformedAdapterError | UnsupportedError | None:
    """Return the delta or its fault, so that one file's faults are told together."""
    try:
        return build_delta(module, context)
    except (MalformedAdapterError, UnsupportedError) as error:
        return error


def _grouped(
    tensors: Mapping[str, Tensor], split: Split
) -> tuple[dict[str, Module], dict[str, Extra], list[str]]:
    modules: dict[str, Module] = {}
    extras: dict[str, Extra] = {}
    faults: list[str] = []
    for key, tensor in tensors.items():
        if is_carried(key):
            extras[key] = Replacement(tensor)
            continue
        found = split(key)
        if found is None:
            faults.append(f"{key}: unknown key")
            continue
        path, field = found
        module = modules.setdefault(path, Module(path))
        if field in module.tensors:
            faults.append(f"{key}: is {module.keys[field]} once more")
            continue
        module.tensors[field] = tensor
        module.keys[field] = key
    return modules, extras, faults


def _replacements(module: Module) -> dict[str, Extra]:
    """Return the full tensors among a module's fields, by tensor name."""
    found: dict[str, Extra] = {}
    if "set_weight" in module.tensors:
        is_parameter = module.path.rpartition(".")[2] in _PARAMETERS
        name = module.path if is_parameter else f"{module.path}.weight"
        found[name] = Replacement(module.tensors["set_weight"])
    if "reshape_weight" in module.tensors:
        found[module.path + RESHAPE] = Replacement(module.tensors["reshape_weight"])
    return found


def _raise_faults(faults: list[str], refused: list[UnsupportedError], source: str) -> None:
    if faults:
        raise MalformedAdapterError(
            f"{source}: {_listed(faults)}",
            hint="was the file cut short, or a key renamed? Nothing of it was used",
        )
    if refused:
        shown = _listed([error.message for error in refused])
        raise UnsupportedError(f"{source}: {shown}", hint=refused[0].hint)


def _listed(lines: list[str]) -> str:
    return lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)


def _without_repeats(
    layers: dict[str, LayerDelta], notes: list[str], source: str
) -> dict[str, LayerDelta]:
    """Drop fused projections that the file also holds in parts, if both mean the same ΔW."""
    kept = dict(layers)
    for path, delta in layers.items():
        parts = _parts_beside(path, layers)
        if not parts or not isinstance(delta, LoRA):
            continue
        if not _same_change(delta, parts):
            raise MalformedAdapterError(
                f"{source}: {path} and its parts are both there and change the weight differently",
                hint="remove one of the two from the file",
            )
        del kept[path]
        notes.append(f"{path}: left out, its parts say the same")
    return kept


def _parts_beside(path: str, layers: Mapping[str, LayerDelta]) -> list[LoRA]:
    for whole, leaves in _REPEATED:
        for separator in "._":
            head = path.removesuffix(separator + whole)
            if head == path:
                continue
            flat = separator == "_"
            names = [leaf.replace(".", "_") if flat else leaf for leaf in leaves]
            found = [layers.get(f"{head}{separator}{name}") for name in names]
            parts = [part for part in found if isinstance(part, LoRA)]
            if len(parts) == len(leaves):
                return parts
    return []


def _same_change(whole: LoRA, parts: list[LoRA]) -> bool:
    up, down = whole.factors()
    rows = [part.up.shape[0] for part in parts]
    widths = {part.factors()[1].shape[1] for part in parts} | {down.shape[1]}
    if sum(rows) != up.shape[0] or len(widths) > 1:
        return False
    size = abs(whole.scale) * product_norm(up, down)
    for block, part in zip(up.split(rows), parts, strict=True):
        other, inner = part.factors()
        left = torch.cat([block * whole.scale, other * -part.scale], dim=1)
        if product_norm(left, torch.cat([down, inner])) > _SAME * size:
            return False
    return True
