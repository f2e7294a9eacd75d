"""What a merge must give: PEFT's own merge, formulas in float64, and the adapter's forward pass."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .builders import VOCAB, Base, Tensors

TOKENS = torch.arange(2, 34).reshape(2, 16) % VOCAB


# ── PEFT ─────────────────────────────────────────────────────────────────────────────────────


def peft_model(base: Base, adapter: Path, **options: Any) -> Any:
    """Return PEFT's model with the adapter loaded, in evaluation mode."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(base.load(), adapter, **options).eval()


def state(model: nn.Module) -> Tensors:
    """Return a copy of the module's state dict."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def peft_merged(base: Base, adapter: Path, *, safe: bool = False) -> Tensors:
    """Return the weights of PEFT's merge, under the names which the base has on disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = peft_model(base, adapter).merge_and_unload(safe_merge=safe)
    return base.to_disk(state(merged))


def peft_merged_in_turn(base: Base, adapters: Mapping[Path, float]) -> Tensors:
    """Return the weights after PEFT merges several adapters at their strengths, one by one."""
    from peft.tuners.lora import LoraLayer

    names = {f"adapter_{index}": path for index, path in enumerate(adapters)}
    model = peft_model(base, next(iter(adapters)), adapter_name="adapter_0")
    for name, path in list(names.items())[1:]:
        model.load_adapter(path, name)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name, path in names.items():
                if name in layer.scaling:
                    layer.set_scale(name, adapters[path])
    model.base_model.set_adapter(list(names))
    return base.to_disk(state(model.merge_and_unload(adapter_names=list(names))))


@torch.no_grad()
def output(model: Any, inputs: Tensor = TOKENS) -> Tensor:
    """Return the logits of a transformers model, or the output of a plain module, as float32."""
    result = model(inputs)
    return (result if isinstance(result, Tensor) else result.logits).float()


# ── formulas ─────────────────────────────────────────────────────────────────────────────────


def linear_delta(tensors: Tensors, module: str, scale: float) -> Tensor:
    """Return s·B·A in float64, for any layer with ``lora_A.weight`` and ``lora_B.weight``.

    Convolutions come out as (out, in · kernel), which the caller reshapes.
    """
    down, up = (tensors[f"{module}.lora_{side}.weight"].double().flatten(1) for side in "AB")
    return scale * (up @ down)


def embedding_delta(tensors: Tensors, module: str, scale: float) -> Tensor:
    """Return s·(B·A)ᵀ in float64, (rows, dim)."""
    down, up = (tensors[f"{module}.lora_embedding_{side}"].double() for side in "AB")
    return scale * (up @ down).T


def dora(weight: Tensor, delta: Tensor, magnitude: Tensor, dims: Sequence[int]) -> Tensor:
    """Return m·V/‖V‖ in float64 for V = W + Δ, the norm taken over ``dims``; 0 where ‖V‖ is."""
    moved = weight.double() + delta
    norm = moved.pow(2).sum(dim=tuple(dims), keepdim=True).sqrt()
    ratio = magnitude.double().reshape(norm.shape) / norm
    return torch.where(norm > 0, ratio * moved, 0.0)


def plain_lora(base: Base, adapter: Path, scale: float) -> Tensors:
    """Return base + ΔW in float64 for an adapter of linear layers alone, one scale for all."""
    from .builders import adapter_tensors

    stored = adapter_tensors(adapter)
    merged = {name: tensor.double() for name, tensor in base.tensors.items()}
    for key in stored:
        if key.endswith(".lora_A.weight"):
            module = key.removesuffix(".lora_A.weight")
            merged[f"{module}.weight"] += linear_delta(stored, module, scale)
    return merged


# ── comparisons ──────────────────────────────────────────────────────────────────────────────


def ulp_distance(left: Tensor, right: Tensor) -> Tensor:
    """Return how many representable numbers lie between each pair (equal numbers: 0)."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]

    def ordered(tensor: Tensor) -> Tensor:
        bits = tensor.contiguous().view(integers).long()
        lowest = torch.iinfo(integers).min
        return torch.where(bits < 0, lowest - bits, bits)

    return (ordered(left) - ordered(right)).abs()


def assert_close_in_ulps(
    actual: Tensors, expected: Tensors, *, ulps: int = 1, share: float = 1e-4, atol: float = 1e-7
) -> None:
    """Assert equal names, shapes and dtypes, and equal bits up to ``ulps`` on a ``share`` of all.

    The share counts over all tensors together; one element is always allowed, since
    ``share`` of a tiny model is less than one. Where a weight and its delta cancel, what is left
    is the float32 error of the delta, many of the result's own units: there ``atol`` bounds it.
    """
    _assert_same_layout(actual, expected)
    different, total = [], 0
    for name, tensor in actual.items():
        other = expected[name]
        distance = ulp_distance(tensor, other)
        far = (distance > ulps) & ((tensor.double() - other.double()).abs() > atol)
        assert not far.any(), f"{name}: {int(distance[far].max())} ulps"
        total += tensor.numel()
        different += [name] * int((distance > 0).sum())
    allowed = max(1, math.ceil(share * total)) if share else 0
    assert len(different) <= allowed, f"{len(different)} of {total} differ, in {set(different)}"


def assert_close(actual: Tensors, expected: Tensors, atol: float = 1e-6) -> None:
    """Assert equal names, shapes and dtypes, and every element within ``atol``."""
    _assert_same_layout(actual, expected)
    for name, tensor in actual.items():
        gap = (tensor.double() - expected[name].double()).abs().max().item()
        assert gap <= atol, f"{name}: {gap:.3g}"


def _assert_same_layout(actual: Tensors, expected: Tensors) -> None:
    assert sorted(actual) == sorted(expected)
    for name, tensor in actual.items():
        assert (tensor.dtype, tensor.shape) == (expected[name].dtype, expected[name].shape), name


def changed(tensors: Tensors, base: Base) -> set[str]:
    """Return the names whose bits are not those of the base, absent ones included."""
    before = base.tensors
    return {
        name
        for name, tensor in tensors.items()
        if name not in before or not same_bits(tensor, before[name])
    }


def assert_agrees(
    actual: Tensors, expected: Tensors, base: Base, *, atol: float | None = None
) -> None:
    """Assert that the same tensors changed, all others bit for bit the base's.

    The changed ones agree within ``atol``, or up to one ulp on 0.01 % where it is not given.
    """
    assert changed(actual, base) == changed(expected, base)
    assert changed(actual, base), "nothing changed"
    if atol is None:
        assert_close_in_ulps(actual, expected)
    else:
        assert_close(actual, expected, atol)


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Say whether shape, dtype and every bit agree (NaN equals itself, 0 is not -0)."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.contiguous().view(torch.uint8), right.contiguous().view(torch.uint8))


def rounded(tensors: Tensors, like: Tensors) -> Tensors:
    """Round each float64 tensor once, to the dtype which its namesake has."""
    return {name: tensor.to(like[name].dtype) for name, tensor in tensors.items()}


def error(actual: Tensors, exact: Tensors) -> float:
    """Return the root of the sum of squared differences to the exact tensors."""
    squares = (
        (tensor.double() - exact[name].double()).pow(2).sum() for name, tensor in actual.items()
    )
    return math.sqrt(sum(float(square) for square in squares))
