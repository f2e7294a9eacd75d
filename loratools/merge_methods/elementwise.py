"""Methods on the elements of ΔW: changes (T, m, n) and weights (T,) → (m, n).

They depend on the axes, so that there is no exact low-rank form: either one dense layer at a time,
or on the R×R cores of Core Space (Panariello et al., arXiv:2509.17786), which is another, cheaper
method with the same formula. Thresholds and ranks are those of one layer. Weights scale the
changes before signs are elected, so that a negative weight turns a change round.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loratools.merge_methods.method import Settings
from loratools.merge_methods.pruning import (
    keep_at_random,
    keep_by_rank,
    keep_largest,
    keep_middle,
)

DELLA_WINDOW = 0.1
BREADCRUMBS_OUTLIERS = 0.01


def magnitude_prune(deltas: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Return Σ wᵢ·top(ΔWᵢ): the largest elements of each change (Han et al., arXiv:1506.02626)."""
    return _sum(_pruned(deltas, lambda delta: keep_largest(delta, settings.density)), weights)


def ties(deltas: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Trim, elect and merge (Yadav et al., arXiv:2306.01708).

    δᵢ = wᵢ·top(ΔWᵢ), the largest ``density`` share of elements; γ = sgn Σ δᵢ; each element is the
    mean of the δᵢ with sgn δᵢ = γ. λ of the paper is a common factor of the weights.
    """
    return merge_agreeing(
        _pruned(deltas, lambda delta: keep_largest(delta, settings.density)), weights
    )


def dare_linear(deltas: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Drop and rescale, then sum (Yu et al., arXiv:2311.03099): Σ wᵢ·mᵢ∘ΔWᵢ/density.

    mᵢ is 1 with probability ``density``, else 0; the expectation is the plain sum.
    """
    return _sum(_dropped(deltas, settings), weights)


def dare_ties(deltas: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Drop and rescale (arXiv:2311.03099), then elect and merge as TIES (arXiv:2306.01708)."""
    return merge_agreeing(_dropped(deltas, settings), weights)


def della(deltas: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """MagPrune, elect, fuse (Deep et al., arXiv:2406.11617); see ``keep_by_rank``, ε = 0.1.

    δᵢ = wᵢ·MagPrune(ΔWᵢ); each element is the mean of the δᵢ whose sign is that of Σ δᵢ.
    """
    return merge_agreeing(_by_rank(deltas, settings), weights)


def della_linear(deltas: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Return Σ wᵢ·MagPrune(ΔWᵢ): DELLA (arXiv:2406.11617) without election."""
    return _sum(_by_rank(deltas, settings), weights)


def breadcrumbs(deltas: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Mask both tails of each change, then sum (Davari & Belilovsky, arXiv:2312.06795).

    Σ wᵢ·mᵢ∘ΔWᵢ, where mᵢ takes away the largest 1 % of the elements and keeps the ``density``
    share that comes next.
    """

    def middle(delta: Tensor) -> Tensor:
        return keep_middle(delta, settings.density, BREADCRUMBS_OUTLIERS)

    kept = deltas if settings.density >= 1 else _pruned(deltas, middle)
    return _sum(kept, weights)


def sce(deltas: Tensor, weights: Tensor, settings: Settings) -> Tensor:
    """Select, calculate, erase (Wan et al., arXiv:2408.07990).

    With δᵢ = wᵢΔWᵢ: select the ``density`` share of elements whose variance over i is largest;
    calculate ηᵢ = Σδᵢ²/Σⱼ Σδⱼ² over them; erase elements whose sign is not that of Σ δᵢ; each
    element is Σ ηᵢδᵢ/Σ ηᵢ over what is left, as the authors' program normalises it.
    """
    scaled = deltas * _column(weights, deltas)
    if settings.density < 1:
        chosen = keep_largest(scaled.var(dim=0, correction=0), settings.density) > 0
        scaled = scaled * chosen
    energy = scaled.square().sum(dim=(1, 2), dtype=torch.float64)
    shares = (energy / energy.sum().clamp(min=torch.finfo(torch.float64).tiny)).to(scaled.dtype)
    majority = torch.where(scaled.sum(dim=0) >= 0, 1.0, -1.0)
    left = _column(shares, scaled) * (scaled.sign() == majority)
    total = left.sum(dim=0)
    return (left * scaled).sum(dim=0) / torch.where(total == 0, 1, total)


def merge_agreeing(pruned: Tensor, weights: Tensor) -> Tensor:
    """Return the mean of those wᵢδᵢ, element by element, that have the sign of their sum."""
    scaled = pruned * _column(weights, pruned)
    agreeing = (scaled.sign() == scaled.sum(dim=0).sign()) & (scaled != 0)
    return torch.where(agreeing, scaled, 0).sum(dim=0) / agreeing.sum(dim=0).clamp(min=1)


def _pruned(deltas: Tensor, prune: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([prune(delta) for delta in deltas])


def _dropped(deltas: Tensor, settings: Settings) -> Tensor:
    return _pruned(
        deltas, lambda delta: keep_at_random(delta, settings.density, settings.generator)
    )


def _by_rank(deltas: Tensor, settings: Settings) -> Tensor:
    return _pruned(
        deltas,
        lambda delta: keep_by_rank(delta, settings.density, DELLA_WINDOW, settings.generator),
    )


def _column(weights: Tensor, like: Tensor) -> Tensor:
    return weights.to(like.dtype)[:, None, None]


def _sum(deltas: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("t,tmn->mn", weights.to(deltas.dtype), deltas)
