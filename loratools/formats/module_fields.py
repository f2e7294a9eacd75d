"""From the fields of one module to its delta: which parameterisations they make, and their sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from loratools.deltas import AdditiveDelta, DoRA, LayerDelta, SumDelta
from loratools.errors import MalformedAdapterError, UnsupportedError
from loratools.formats.module_builders import (
    build_embedding,
    build_full,
    build_glora,
    build_ia3,
    build_loha,
    build_lokr,
    build_lora,
    build_oft,
    build_sparse,
)
from loratools.formats.module_tensors import Context, Module

Builder = Callable[[Module, Context], LayerDelta]


@dataclass(frozen=True, slots=True)
class Family:
    """The fields that make one parameterisation.

    Attributes:
        fields: all that it may have.
        required: those that it must have once it has any.
        build: makes the delta.
    """

    fields: frozenset[str]
    required: frozenset[str]
    build: Builder


def build_delta(module: Module, context: Context) -> LayerDelta | None:
    """Return the module's delta, or None if its tensors make none (replacements only).

    Raises:
        MalformedAdapterError: tensors that do not belong together.
        UnsupportedError: T-LoRA, or a rank that is chosen when prompting.
    """
    _refuse_unsupported(module)
    present = [family for family in FAMILIES if family.fields & module.tensors.keys()]
    for family in present:
        _check_complete(module, family)
    empty = [module.keys[name] for name, tensor in module.tensors.items() if not tensor.numel()]
    if empty:
        raise module.refuse(f"empty tensors: {', '.join(empty)}")
    parts = [family.build(module, context) for family in present]
    if not parts:
        _check_nothing(module)
        return None
    if {"diff", "w_norm"} & module.tensors.keys() and len(present) == 1:
        _note_useless_alpha(module, context)
    return _with_magnitude(module, _joined(module, parts))


def _refuse_unsupported(module: Module) -> None:
    if module.tensors.keys() & {"tlora", "tlora_p", "tlora_lambda"}:
        raise UnsupportedError(
            f"{module.path}: T-LoRA changes with the time step, so no fixed weight equals it",
            hint="use it in the tool that trained it",
        )
    if "dyn_dim" in module.tensors:
        raise UnsupportedError(
            f"{module.path}: dyn_dim asks for a rank that is chosen when prompting",
            hint="cut the adapter to that rank with resize, and remove dyn_dim",
        )


def _check_complete(module: Module, family: Family) -> None:
    missing = sorted(family.required - module.tensors.keys())
    if missing:
        here = ", ".join(key for name, key in module.keys.items() if name in family.fields)
        names = ", ".join(_SHOWN.get(name, name) for name in missing)
        raise MalformedAdapterError(f"{here}: no {names} beside it")


_SHOWN = {"up": "up (lora_up, lora_B)", "down": "down (lora_down, lora_A)"}


def _check_nothing(module: Module) -> None:
    loose = module.tensors.keys() - {"set_weight", "reshape_weight"}
    if loose:
        raise module.refuse("belongs to no factors")


def _note_useless_alpha(module: Module, context: Context) -> None:
    if "alpha" in module.tensors:
        context.notes.append(f"{module.path}: alpha has no meaning beside a full difference")


def _joined(module: Module, parts: list[LayerDelta]) -> LayerDelta:
    if len(parts) == 1:
        return parts[0]
    additive = tuple(part for part in parts if isinstance(part, AdditiveDelta))
    if len(additive) < len(parts):
        kinds = ", ".join(part.kind for part in parts)
        raise module.refuse(f"mixes parameterisations that have no sum ({kinds})")
    return SumDelta(additive)


# ── DoRA ─────────────────────────────────────────────────────────────────────────────────────


def _with_magnitude(module: Module, delta: LayerDelta) -> LayerDelta:
    named = {"magnitude", "peft_magnitude"} & module.tensors.keys()
    if not named:
        return delta
    if len(named) == 2:
        raise module.refuse("two magnitudes (dora_scale and lora_magnitude_vector)")
    if not isinstance(delta, AdditiveDelta):
        raise module.refuse(f"a magnitude beside {delta.kind}")
    (name,) = named
    magnitude = module.tensors[name]
    out, inner = delta.weight_shape[:2]
    # Factors that flatten a kernel do not tell how many axes the magnitude had: it keeps them.
    flattened = magnitude.dim() > len(delta.weight_shape)
    lengths = magnitude if flattened else magnitude.flatten()
    if name == "peft_magnitude" and magnitude.numel() == out:
        return DoRA(delta, magnitude.flatten(), "out")
    if _is_column(magnitude, out):
        return DoRA(delta, lengths, "out")
    if name == "magnitude" and _is_row(magnitude) and inner % magnitude.shape[1] == 0:
        return DoRA(delta, lengths, "in")
    raise MalformedAdapterError(
        f"{module.keys[name]}: shape {tuple(magnitude.shape)} is neither one length for each of "
        f"{out} outputs nor one for each of {inner} inputs"
    )


def _is_column(magnitude: Tensor, out: int) -> bool:
    return magnitude.dim() >= 1 and magnitude.shape[0] == out == magnitude.numel()


def _is_row(magnitude: Tensor) -> bool:
    return magnitude.dim() >= 2 and magnitude.numel() == magnitude.shape[1]


def _family(build: Builder, required: str, optional: str = "") -> Family:
    needed = frozenset(required.split())
    return Family(needed | frozenset(optional.split()), needed, build)


FAMILIES: tuple[Family, ...] = (
    _family(build_lora, "down up", "mid bias"),
    _family(build_embedding, "embedding_down embedding_up"),
    _family(build_loha, "hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "hada_t1 hada_t2"),
    Family(
        frozenset({f"lokr_w{n}{side}" for n in "12" for side in ("", "_a", "_b")} | {"lokr_t2"}),
        frozenset(),
        build_lokr,
    ),
    _family(build_glora, "glora_a1 glora_a2 glora_b1 glora_b2", "glora_bm"),
    _family(build_oft, "oft_blocks", "rescale"),
    _family(build_ia3, "ia3_weight on_input"),
    _family(build_sparse, "bias_indices bias_values bias_size"),
    _family(partial(build_full, names=("diff", "diff_b"), norm=False), "", "diff diff_b"),
    _family(partial(build_full, names=("w_norm", "b_norm"), norm=True), "", "w_norm b_norm"),
)
"""Every parameterisation that tensors can make; a module may have several, which are summed."""
