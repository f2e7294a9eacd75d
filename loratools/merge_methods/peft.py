"""The formulas of PEFT's ``add_weighted_adapter``, for results made with it before.

Source: peft 0.21 ``tuners/lora/model.py`` and ``utils/merge_utils.py``. Except for ``cat`` and
``svd`` they are not merges of ΔW: ``linear`` and the methods on factors multiply a sum of ups
with a sum of downs, cross terms included, and depend on how each ΔW is split into factors. TIES
elects signs before it weighs, and divides by the number of contributors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loratools.merge_methods.method import Factors, Settings
from loratools.merge_methods.pruning import keep_at_random, keep_largest

_Merge = Callable[[Tensor, Tensor, Settings], Tensor]


def cat(parts: Sequence[Factors], weights: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return up = [B₁ ... B_T] and down = [w₁s₁A₁; ...; w_Ts_TA_T]: exactly Σ wᵢΔWᵢ."""
    downs = [w * part.scale * part.down for w, part in zip(weights.tolist(), parts, strict=True)]
    return torch.cat([part.up for part in parts], dim=1), torch.cat(downs)


def linear(parts: Sequence[Factors], weights: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Return up = Σ cᵢBᵢ, down = Σ sgn(wᵢsᵢ)·cᵢAᵢ with cᵢ = √|wᵢsᵢ|."""
    return _on_factors(parts, weights, settings, weighted_sum)


def magnitude_prune(
    parts: Sequence[Factors], weights: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Keep the largest elements of every factor, then as ``linear``."""
    return _on_factors(parts, weights, settings, magnitude_prune_svd)


def dare_linear(
    parts: Sequence[Factors], weights: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Drop elements of every factor at random, divide by the density, then as ``linear``."""
    return _on_factors(parts, weights, settings, dare_linear_svd)


def ties(parts: Sequence[Factors], weights: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Apply ``ties_svd`` to the ups and to the downs, weighted as ``linear``."""
    return _on_factors(parts, weights, settings, ties_svd)


def dare_ties(
    parts: Sequence[Factors], weights: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Apply ``dare_ties_svd`` to the ups and to the downs, weighted as ``linear``."""
    return _on_factors(parts, weights, settings, dare_ties_svd)


def _on_factors(
    parts: Sequence[Factors], weights: Tensor, settings: Settings, merge: _Merge
) -> tuple[Tensor, Tensor]:
    """Merge downs, then ups (the order in which PEFT draws its masks), with √|w·s| on both."""
    scaled = weights * torch.tensor([part.scale for part in parts], dtype=weights.dtype)
    root = scaled.abs().sqrt()
    down = merge(torch.stack([part.down for part in parts]), scaled.sign() * root, settings)
    up = merge(torch.stack([part.up for part in parts]), root, settings)
    return up, down


def weighted_sum(tensors: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Return Σ wᵢτᵢ."""
    return torch.einsum("t,tmn->mn", weights.to(tensors.dtype), tensors)


def magnitude_prune_svd(tensors: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Return Σ wᵢ·top(τᵢ)."""
    return weighted_sum(_largest(tensors, settings), weights, settings)


def dare_linear_svd(tensors: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Return Σ wᵢ·mᵢ∘τᵢ/density with random masks mᵢ."""
    return weighted_sum(_at_random(tensors, settings), weights, settings)


def ties_svd(tensors: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Return Σ wᵢτᵢ/count over the pruned τᵢ that have the sign of their unweighted sum."""
    return _elected(_largest(tensors, settings), weights)


def dare_ties_svd(tensors: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Return what ``ties_svd`` does, with random masks in place of trimming."""
    return _elected(_at_random(tensors, settings), weights)


def _largest(tensors: Tensor, settings: Settings) -> Tensor:
    return torch.stack([keep_largest(tensor, settings.density) for tensor in tensors])


def _at_random(tensors: Tensor, settings: Settings) -> Tensor:
    kept = [keep_at_random(tensor, settings.density, settings.generator) for tensor in tensors]
    return torch.stack(kept)


def _elected(pruned: Tensor, weights: Tensor) -> Tensor:
    # A sum of exactly zero counts as positive.
    majority = torch.where(pruned.sum(dim=0) >= 0, 1.0, -1.0)
    agreeing = pruned.sign() == majority
    kept = torch.where(agreeing, pruned, 0) * weights.to(pruned.dtype)[:, None, None]
    return kept.sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)
