"""The record that describes a method, and the settings of one layer's run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NEGLIGIBLE = 1e-7
"""Singular values below this share of the largest are what float32 leaves of zero."""

Space = Literal["span", "rotation", "core", "dense", "factors"]
"""What a method's function works on, which decides what it costs.

- ``span``: Gram matrix (T, T) and weights → T coefficients; the result is Σ cᵢΔWᵢ, exact.
- ``rotation``: changes (T, m, n) → (m, n), a function that commutes with orthogonal changes of
  both bases; computed exactly on R×R cores.
- ``core``: the same signature, but elementwise, applied to the cores in canonical bases.
- ``dense``: the same signature, elementwise on ΔW itself; needs one dense layer in memory.
- ``factors``: Factors of each → (up, down) of the result.
"""


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """One change as scale · up @ down, float64.

    Attributes:
        up: (m, r).
        down: (r, n).
        scale: alpha / rank; methods on factors see it apart, because they depend on where it is.
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Number of columns of ``up``; 0 for a layer that the adapter lacks."""
        return self.down.shape[0]


@dataclass(frozen=True, slots=True)
class Method:
    """A way of combining adapters.

    Attributes:
        name: the word for ``--method``.
        title: one line for people.
        paper: where it comes from: ``arXiv:``, ``doi:`` or URL.
        space: what ``function`` takes and returns.
        function: ``module:name``.
        density: default share of elements that are kept; ``None`` where there is no such thing.
        seeded: whether chance is involved, which ``--seed`` settles.
        identity: whether one adapter with weight 1 comes out as it went in.
        identity_at_full_density: the same, where density is 1.
        shares: whether only the weights' proportions count.
        inputs: how many adapters it takes, if not any number.
        equal_ranks: whether all factors of a layer must have one rank.
        reduces: whether the exact result is written in its fewest ranks even without ``--rank``.
    """

    name: str
    title: str
    paper: str
    space: Space
    function: str
    density: float | None = None
    seeded: bool = False
    identity: bool = False
    identity_at_full_density: bool = False
    shares: bool = False
    inputs: int | None = None
    equal_ranks: bool = False
    reduces: bool = False

    @property
    def needs_rank(self) -> bool:
        """Whether the exact result has no low rank, so that one must be chosen."""
        return self.space == "dense"


@dataclass(frozen=True, slots=True, eq=False)
class Settings:
    """What a function may want to know beside its inputs.

    Attributes:
        density: share of elements to keep, in (0, 1].
        generator: chance, seeded for this layer.
    """

    density: float
    generator: torch.Generator
