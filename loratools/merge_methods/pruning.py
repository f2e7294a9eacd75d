"""Which elements of a tensor are kept: by size, by chance, or by both."""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-12
"""Share of the largest number below which float64 linear algebra leaves its rounding."""


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """Return the tensor with zeros for all but its ⌊density·N⌋ elements of largest size.

    Elements as large as the smallest that is kept are kept too.
    """
    if density >= 1:
        return tensor
    sizes = tensor.abs()
    return torch.where(sizes >= _threshold(sizes, int(density * tensor.numel())), tensor, 0)


def _threshold(sizes: Tensor, count: int) -> Tensor:
    """Return the size of the ``count``-th largest element; above all of them for none."""
    if count < 1:
        return sizes.max() * 2 + 1
    return sizes.flatten().kthvalue(sizes.numel() - count + 1).values


def without_rounding(tensor: Tensor) -> Tensor:
    """Return the tensor with zeros for what a change of basis leaves of them in float64.

    An election counts every element that has a sign, however small.
    """
    sizes = tensor.abs()
    return torch.where(sizes > ROUNDING * sizes.max(), tensor, 0)


def keep_middle(tensor: Tensor, density: float, outliers: float) -> Tensor:
    """Return the tensor without the largest ``outliers`` share, then the largest ``density`` share.

    Where both do not fit, fewer outliers are taken away.
    """
    count = tensor.numel()
    kept = int(density * count)
    top = min(int(outliers * count), count - kept)
    sizes = tensor.abs()
    below = sizes < _threshold(sizes, top)
    return torch.where(below & (sizes >= _threshold(sizes, top + kept)), tensor, 0)


def keep_at_random(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Return the tensor with each element kept with probability ``density``, divided by it."""
    if density >= 1:
        return tensor
    return tensor * bernoulli(tensor, density, generator) / density


def bernoulli(like: Tensor, probability: float | Tensor, generator: torch.Generator) -> Tensor:
    """Return ones with the probability of each element, else zeros; uniform numbers in float32."""
    chance = torch.rand(like.shape, generator=generator, dtype=torch.float32)
    return (chance < probability).to(like.dtype)


def keep_by_rank(
    tensor: Tensor, density: float, window: float, generator: torch.Generator
) -> Tensor:
    """Return DELLA's MagPrune of a matrix (arXiv:2406.11617).

    In each row the element of rank r (0 for the largest of n) is dropped with probability
    pᵣ = p − ε/2 + r·ε/n, where p = 1 − density, and divided by 1 − pᵣ if it stays. ``window`` is
    ε, cut to what keeps every probability within [0, 1).
    """
    if density >= 1:
        return tensor
    epsilon = min(window, density, 1 - density)
    order = tensor.abs().argsort(dim=-1, descending=True, stable=True)
    ranks = torch.empty_like(order)
    places = torch.arange(tensor.shape[-1]).expand_as(order)
    ranks.scatter_(-1, order, places)
    kept = density + epsilon / 2 - ranks.to(torch.float32) * (epsilon / tensor.shape[-1])
    return tensor * bernoulli(tensor, kept, generator) / kept.to(tensor.dtype)
