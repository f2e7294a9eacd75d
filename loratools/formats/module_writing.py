"""From a delta to the fields of its module, and to tensors under a format's spelling."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loratools.adapter import Adapter, Extra
from loratools.deltas import (
    BOFT,
    IA3,
    OFT,
    DoRA,
    FullDelta,
    GLoRA,
    LayerDelta,
    LoHa,
    LoKr,
    LoRA,
    Replacement,
    SparseResidual,
    SumDelta,
    TuckerLoRA,
)
from loratools.errors import UnsupportedError
from loratools.formats.module_reading import RESHAPE
from loratools.formats.parameters import is_carried

Fields = dict[str, Tensor]

_EXACT_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
_LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")


def module_fields(delta: LayerDelta) -> Fields:
    """Return the delta's tensors by field (see ``parameters``), alpha included.

    Raises:
        UnsupportedError: a parameterisation, role or sum that no module of these formats has.
    """
    build = _BY_KIND.get(delta.kind)
    if build is None:
        raise UnsupportedError(f"a {delta.kind} delta", hint="merge it, or keep its own format")
    return {name: tensor for name, tensor in build(delta).items() if tensor is not None}


def write_module(path: str, delta: LayerDelta, names: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors of one module by key, spelled by ``names`` (field → suffix)."""
    fields = module_fields(delta)
    if "bias" in fields and "bias" not in names:
        fields = _with_plain_bias(fields, delta)
    return {f"{path}.{names[name]}": tensor.contiguous() for name, tensor in fields.items()}


def _with_plain_bias(fields: Fields, delta: LayerDelta) -> Fields:
    """Return the fields with all that the layer's bias gains in ``diff_b``."""
    whole = delta.bias_change
    kept = {name: tensor for name, tensor in fields.items() if name != "bias"}
    if whole is None:
        return kept
    dtype = fields["bias"].dtype
    exact = torch.equal(whole.to(dtype).to(torch.float32), whole)
    return {**kept, "diff_b": whole.to(dtype) if exact else whole}


def alpha_tensor(alpha: float, like: Tensor) -> Tensor:
    """Return a scalar in the dtype of ``like`` if that can say alpha exactly, else in float32."""
    dtype = like.dtype if like.dtype in _EXACT_FLOATS else torch.float32
    scalar = torch.tensor(alpha, dtype=torch.float64).to(dtype)
    return scalar if float(scalar) == alpha else torch.tensor(alpha, dtype=torch.float32)


ALSO_CALLED: Mapping[str, tuple[str, ...]] = {"original": ("original", "comfyui")}
"""Namings that a format takes besides its own: ComfyUI's bases differ from the original in a few
names, and its loader looks for its own."""


def find_losses(
    adapter: Adapter, naming: str, holds: frozenset[str], extra_reason: Callable[[str, Extra], str]
) -> dict[str, str]:
    """Return what a format of these rules cannot hold: module path or extra → reason.

    Args:
        adapter: what is to be written.
        naming: the names that the format uses.
        holds: the kinds of deltas that it can express.
        extra_reason: returns why an extra cannot be written, or the empty text.

    Raises:
        UnsupportedError: the adapter is in another naming, which is no loss but a mistake.
    """
    if adapter.naming not in ALSO_CALLED.get(naming, (naming,)):
        raise UnsupportedError(
            f"module names are {adapter.naming} names, this format needs {naming} names",
            hint="translate them first: `loratools convert` does, with --arch if it must",
        )
    losses = {}
    for path, delta in adapter.layers.items():
        if reason := _delta_loss(delta, holds):
            losses[path] = reason
    for name, extra in adapter.extras.items():
        if reason := extra_reason(name, extra):
            losses[name] = reason
    return losses


def refuse_losses(losses: Mapping[str, str], title: str) -> None:
    """Raise UnsupportedError naming everything that would be lost, if anything would."""
    if losses:
        lines = [f"{name}: {reason}" for name, reason in losses.items()]
        shown = lines[0] if len(lines) == 1 else "".join(f"\n  {line}" for line in lines)
        raise UnsupportedError(f"{title} cannot hold {shown}", hint=REMEDY)


REMEDY = (
    "write a format that holds it (kohya holds most), resize it to a plain LoRA, "
    "merge it into the base, or leave it out with --allow-loss"
)


def _delta_loss(delta: LayerDelta, holds: frozenset[str]) -> str:
    kinds = _kinds(delta)
    foreign = sorted(kinds - holds)
    if foreign:
        return f"{', '.join(foreign)} is a parameterisation that it has no names for"
    try:
        module_fields(delta)
    except UnsupportedError as error:
        return error.message
    return ""


def _kinds(delta: LayerDelta) -> set[str]:
    if isinstance(delta, SumDelta):
        return {delta.kind}.union(*(_kinds(part) for part in delta.parts))
    if isinstance(delta, DoRA):
        return {delta.kind, *_kinds(delta.inner)}
    return {delta.kind}


# ── one function for each parameterisation ───────────────────────────────────────────────────


def _lora(delta: LoRA) -> dict[str, Any]:
    if delta.role != "linear":
        raise UnsupportedError(f"a LoRA of an {delta.role} layer", hint=REMEDY)
    factors = {"down": delta.down, "up": delta.up, "bias": delta.bias}
    return {**factors, "alpha": alpha_tensor(delta.alpha, delta.down)}


def _tucker(delta: TuckerLoRA) -> dict[str, Any]:
    factors = {"down": delta.down, "mid": delta.mid, "up": delta.up}
    return {**factors, "alpha": alpha_tensor(delta.alpha, delta.down)}


def _loha(delta: LoHa) -> dict[str, Any]:
    fields = {name: getattr(delta, name.removeprefix("hada_")) for name in _LOHA}
    return {**fields, "alpha": alpha_tensor(delta.alpha, delta.w1_a)}


def _lokr(delta: LoKr) -> dict[str, Any]:
    fields = {f"lokr_{name}": getattr(delta, name) for name in _LOKR}
    stored = next(tensor for tensor in fields.values() if tensor is not None)
    return {**fields, "alpha": alpha_tensor(delta.alpha, stored)}


def _glora(delta: GLoRA) -> dict[str, Any]:
    return {
        "glora_a1": delta.a_left,
        "glora_a2": delta.a_right,
        "glora_b1": delta.b_up,
        "glora_b2": delta.b_down,
        "glora_bm": delta.mid,
        "alpha": alpha_tensor(delta.alpha, delta.b_up),
    }


def _full(delta: FullDelta) -> dict[str, Any]:
    weight, bias = ("w_norm", "b_norm") if delta.norm_layer else ("diff", "diff_b")
    return {weight: delta.weight, bias: delta.bias}


def _rotation(delta: OFT | BOFT) -> dict[str, Any]:
    alpha = alpha_tensor(delta.constraint, delta.blocks)
    return {"oft_blocks": delta.blocks, "rescale": delta.rescale, "alpha": alpha}


def _ia3(delta: IA3) -> dict[str, Any]:
    return {"ia3_weight": delta.weight, "on_input": torch.tensor(int(delta.on_input))}


def _sparse(delta: SparseResidual) -> dict[str, Any]:
    size = torch.tensor(delta.size, dtype=delta.indices.dtype)
    # 16 bits are what the tools use for indices, and too few for the size of some weights.
    if size.tolist() != list(delta.size):
        size = torch.tensor(delta.size)
    values = delta.values if delta.scale == 1 else delta.values.float() * delta.scale
    return {"bias_indices": delta.indices, "bias_values": values, "bias_size": size}


def _sum(delta: SumDelta) -> dict[str, Any]:
    lora = next((part for part in delta.parts if isinstance(part, (LoRA, TuckerLoRA))), None)
    scale = 1.0 if lora is None else lora.alpha / lora.down.shape[0]
    fields: dict[str, Any] = {}
    for part in delta.parts:
        found = module_fields(_relative(part, scale))
        if clash := sorted(fields.keys() & found.keys()):
            raise UnsupportedError(f"a sum with two sets of {clash[0]}", hint=REMEDY)
        fields |= found
    return fields


def _relative(part: LayerDelta, scale: float) -> LayerDelta:
    """Return a residual without the scale that readers give it with its LoRA."""
    if not isinstance(part, SparseResidual) or part.scale == scale:
        return replace(part, scale=1.0) if isinstance(part, SparseResidual) else part
    if scale == 0:
        raise UnsupportedError("a residual beside a LoRA of alpha 0", hint=REMEDY)
    return replace(part, scale=part.scale / scale)


def _dora(delta: DoRA) -> dict[str, Any]:
    """Return the fields; LyCORIS shapes the magnitude as (out, 1...) or (1, in, 1...)."""
    fields = module_fields(delta.inner)
    if delta.magnitude.dim() > len(delta.weight_shape):
        return {**fields, "magnitude": delta.magnitude}
    ones = [1] * (len(delta.weight_shape) - 2)
    shape = (1, -1, *ones) if delta.axis == "in" else (-1, 1, *ones)
    return {**fields, "magnitude": delta.magnitude.reshape(shape)}


_BY_KIND: Mapping[str, Callable[[Any], dict[str, Any]]] = {
    LoRA.kind: _lora,
    TuckerLoRA.kind: _tucker,
    LoHa.kind: _loha,
    LoKr.kind: _lokr,
    GLoRA.kind: _glora,
    FullDelta.kind: _full,
    OFT.kind: _rotation,
    BOFT.kind: _rotation,
    IA3.kind: _ia3,
    SparseResidual.kind: _sparse,
    SumDelta.kind: _sum,
    DoRA.kind: _dora,
}

KINDS = frozenset(_BY_KIND) | {Replacement.kind}
"""Every kind that has fields."""


# ── extras ───────────────────────────────────────────────────────────────────────────────────


def replacement_loss(name: str, extra: Extra) -> str:
    """Return why kohya's and ComfyUI's syntax cannot say an extra, or the empty text."""
    if isinstance(extra, Replacement):
        return ""
    return "replaced rows of an embedding have no name in it"


def write_extras(extras: Mapping[str, Extra]) -> Iterator[tuple[str, Tensor]]:
    """Yield key and tensor of each extra: as it was carried, or as ``set_weight``."""
    for name, extra in extras.items():
        if not isinstance(extra, Replacement):
            continue
        if is_carried(name) or name.endswith(RESHAPE):
            yield name, extra.value
        else:
            yield f"{name.removesuffix('.weight')}.set_weight", extra.value
