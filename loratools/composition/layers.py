"""One layer: the changes of all adapters → one change, and what its making cost."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.composition.matching import Column
from loratools.deltas import AdditiveDelta, ExpertLoRA, FullDelta, LoRA
from loratools.deltas.lora import Role
from loratools.deltas.one_scale import padded_to
from loratools.errors import InputError, NonFiniteError, UnsupportedError
from loratools.linalg.gram import product_norm
from loratools.merge_methods import load_function
from loratools.merge_methods.combining import Combined, Layer, combine
from loratools.merge_methods.method import Factors, Method, Settings

_CANCELLED = 1e-7


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is done to every layer.

    Attributes:
        method: a row of METHODS.
        density: share of elements to keep.
        seed: settles chance; each layer has its own.
        rank: the largest rank, or ``None`` for the exact result.
    """

    method: Method
    density: float
    seed: int
    rank: int | None


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What became of a layer.

    Attributes:
        delta: the combined change.
        norm: its ‖ΔW‖ (Frobenius).
        error: ‖exact − result‖/‖exact‖.
        gram: (T, T), ⟨ΔWᵢ, ΔWⱼ⟩ of the inputs; zeros where there is no matrix.
    """

    delta: AdditiveDelta
    norm: float
    error: float
    gram: Tensor

    @property
    def is_zero(self) -> bool:
        """Whether nothing is left but what float32 leaves of changes that cancel."""
        largest = math.sqrt(max(float(self.gram.max()), 0.0))
        return self.delta.is_zero or (largest > 0 and self.norm <= _CANCELLED * largest)

    @property
    def missed(self) -> float:
        """‖exact − result‖²."""
        share = self.error**2
        return self.norm**2 * share / (1 - share) if share < 1 else 0.0


def combine_layer(path: str, column: Column, weights: Tensor, recipe: Recipe) -> Outcome:
    """Return the method's result for a layer.

    Biases, and changes of norms, are summed by weight: no method means anything else for them.

    Raises:
        InputError: ranks that differ where the method needs them alike.
        UnsupportedError: a full change where the method works on factors.
    """
    weighty = [d if d is not None and d.changes_weight else None for d in column]
    first = next((delta for delta in weighty if delta is not None), None)
    bias = _summed_bias(column, weights)
    if first is None or len(first.weight_shape) == 1:
        return _vectors(column, weighty, weights, bias)
    if isinstance(first, ExpertLoRA):
        return _experts(path, weighty, weights, recipe)
    kept = _as_it_is(column, weights, recipe)
    return kept or _combined(path, weighty, weights, recipe, bias)


def _summed_bias(column: Column, weights: Tensor) -> Tensor | None:
    changes = [
        (w, delta.bias_change)
        for w, delta in zip(weights.tolist(), column, strict=True)
        if delta is not None and delta.bias_change is not None
    ]
    if not changes:
        return None
    return torch.stack([w * change.double() for w, change in changes]).sum(dim=0).float()


def _vectors(
    column: Column, weighty: Sequence[AdditiveDelta | None], weights: Tensor, bias: Tensor | None
) -> Outcome:
    changes = [
        w * delta.materialize().double()
        for w, delta in zip(weights.tolist(), weighty, strict=True)
        if delta is not None
    ]
    total = torch.stack(changes).sum(dim=0).float() if changes else None
    norms = any(isinstance(delta, FullDelta) and delta.norm_layer for delta in column)
    found = FullDelta(total, bias, norms)
    size = float(total.norm()) if total is not None else 0.0
    return Outcome(found, size, 0.0, torch.zeros(len(column), len(column), dtype=torch.float64))


def _as_it_is(column: Column, weights: Tensor, recipe: Recipe) -> Outcome | None:
    """Return a multiple of the only change there is, in its own parameterisation, if it has one.

    A LoRA beside others is left to ``_combined``, which gives all of them the same scale.
    """
    present = [place for place, delta in enumerate(column) if delta is not None]
    exact = recipe.method.space == "span" and not recipe.method.reduces and recipe.rank is None
    only = column[present[0]]
    assert only is not None
    if not exact or len(present) > 1 or (isinstance(only, LoRA) and len(column) > 1):
        return None
    gram = torch.zeros(len(column), len(column), dtype=torch.float64)
    gram[present[0], present[0]] = only.norm() ** 2
    factor = float(load_function(recipe.method)(gram, weights)[present[0]])
    found = only if factor == 1.0 else only.scaled(factor)
    return Outcome(found, abs(factor) * math.sqrt(gram.max()), 0.0, gram)


def _combined(
    path: str,
    deltas: Sequence[AdditiveDelta | None],
    weights: Tensor,
    recipe: Recipe,
    bias: Tensor | None,
) -> Outcome:
    first = next(delta for delta in deltas if delta is not None)
    out, *rest = first.weight_shape
    views = [None if delta is None else delta.low_rank() for delta in deltas]
    parts = [
        _factors(delta, view, (out, math.prod(rest)))
        for delta, view in zip(deltas, views, strict=True)
    ]
    full = any(d is not None and view is None for d, view in zip(deltas, views, strict=True))
    _check(path, recipe.method, parts, full=full)
    layer = Layer(parts, weights, settings_of(path, recipe), recipe.rank)
    try:
        done = combine(recipe.method, layer)
    except NonFiniteError as error:
        raise NonFiniteError(f"{path}: {error.message}", error.hint) from error
    norm = product_norm(done.up, done.down)
    if full and done.down.shape[0] >= min(out, math.prod(rest)):
        whole = (done.up @ done.down).reshape(first.weight_shape)
        return Outcome(FullDelta(whole, bias), norm, done.error, done.gram)
    role: Role = next((view.role for view in views if view is not None), "linear")
    return Outcome(_lora(done, first.weight_shape, bias, role), norm, done.error, done.gram)


def _factors(delta: AdditiveDelta | None, view: LoRA | None, sides: tuple[int, int]) -> Factors:
    """Return a change as factors; a full one as itself times the identity."""
    out, inner = sides
    wide = torch.float64
    if delta is None:
        return Factors(torch.zeros(out, 0, dtype=wide), torch.zeros(0, inner, dtype=wide))
    if view is not None:
        return Factors(view.up.to(wide).flatten(1), view.down.to(wide).flatten(1), view.scale)
    dense = delta.materialize().to(wide).reshape(out, inner)
    if inner <= out:
        return Factors(dense, torch.eye(inner, dtype=wide))
    return Factors(torch.eye(out, dtype=wide), dense)


def _check(path: str, method: Method, parts: Sequence[Factors], *, full: bool) -> None:
    if not method.equal_ranks:
        return
    if full:
        raise UnsupportedError(
            f"{path}: {method.name} works on factors, and a full change has none",
            hint="use --method svd, or ties, or resize that adapter first",
        )
    ranks = [part.rank for part in parts if part.rank]
    if len(set(ranks)) > 1:
        raise InputError(
            f"{path}: {method.name} needs equal ranks, and these are {', '.join(map(str, ranks))}",
            hint="use --method linear, or `loratools resize` to one rank first",
        )


def settings_of(path: str, recipe: Recipe) -> Settings:
    """Return the layer's settings; its chance depends on nothing but the seed and its name."""
    digest = hashlib.sha256(f"{recipe.seed}:{path}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return Settings(recipe.density, generator)


def _lora(done: Combined, shape: Sequence[int], bias: Tensor | None, role: Role) -> LoRA:
    out, *rest = shape
    rank = done.down.shape[0]
    # PEFT has one alpha for attention's two layers, and applies it to the second twice.
    scale = 2.0 if role == "attention_out" else 1.0
    return LoRA(
        done.down.reshape(rank, *rest).contiguous(),
        (done.up / scale).reshape(out, rank, *[1] * (len(rest) - 1)).contiguous(),
        scale * rank,
        None if bias is None else bias / scale,
        role,
    )


def _experts(
    path: str, deltas: Sequence[AdditiveDelta | None], weights: Tensor, recipe: Recipe
) -> Outcome:
    stacks = [delta if isinstance(delta, ExpertLoRA) else None for delta in deltas]
    some = next(stack for stack in stacks if stack is not None)
    each = [
        _combined(
            f"{path}:{expert}",
            [None if stack is None else stack.expert(expert) for stack in stacks],
            weights,
            recipe,
            None,
        )
        for expert in range(some.weight_shape[0])
    ]
    loras = [one.delta for one in each if isinstance(one.delta, LoRA)]
    rank = max(lora.rank for lora in loras)
    padded = [padded_to(lora, rank) for lora in loras]
    down, up = (torch.stack([getattr(lora, name) for lora in padded]) for name in ("down", "up"))
    found = ExpertLoRA(down, up, float(rank), some.flipped_if_square)
    norm = math.hypot(*(one.norm for one in each))
    missed = sum(one.missed for one in each)
    error = math.sqrt(missed / (missed + norm**2)) if norm else 0.0
    return Outcome(found, norm, error, torch.stack([one.gram for one in each]).sum(dim=0))
