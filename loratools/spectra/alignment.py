"""How the changes that several adapters make to the same modules relate to each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.compute import resolve_compute
from loratools.deltas import AdditiveDelta
from loratools.deltas.spectra import in_threads
from loratools.deltas.spectral import delta_svd, matrix_shape
from loratools.errors import InputError, UnknownArchitectureError
from loratools.keymaps.mlx_naming import concerns_mlx, meeting
from loratools.keymaps.translate import in_one_naming
from loratools.linalg.factored import SVD
from loratools.linalg.spectra import energy_rank
from loratools.spectra.layers import additive_layers

LEADING_ENERGY = 0.95
"""Share of its energy that a change's leading directions hold."""


@dataclass(frozen=True, slots=True)
class PairAlignment:
    """Two changes of one module.

    Attributes:
        module: the layer's path.
        first: position of one adapter.
        second: position of the other.
        inner: ⟨ΔW₁, ΔW₂⟩ (Frobenius).
        cosine: ``inner`` over both norms; None if a change is zero, like all that follows.
        leading: k, how many leading directions are compared: the least number that holds
            ``LEADING_ENERGY`` of the energy of one of the two.
        overlap_out: mean squared cosine of the k principal angles between the leading column
            spaces (left singular vectors): 1 if they are one space.
        overlap_in: the same of the row spaces (right singular vectors).
        chance_out: what two random k-dimensional spaces would have: k / out.
        chance_in: k / (in·k...).
        angle_out: the smallest principal angle between the column spaces, in degrees.
        angle_in: the same of the row spaces.
    """

    module: str
    first: int
    second: int
    inner: float
    cosine: float | None = None
    leading: int | None = None
    overlap_out: float | None = None
    overlap_in: float | None = None
    chance_out: float | None = None
    chance_in: float | None = None
    angle_out: float | None = None
    angle_in: float | None = None


@dataclass(frozen=True, slots=True)
class Alignment:
    """The comparison of several adapters, two by two.

    Attributes:
        naming: of the modules' paths.
        pairs: one for each module and each two adapters that have it.
        norms: ‖ΔW‖ of each adapter, over all modules it has.
        modules: how many modules each adapter has.
        uncovered: module → why it could not be compared.
    """

    naming: str
    pairs: tuple[PairAlignment, ...]
    norms: tuple[float, ...]
    modules: tuple[int, ...]
    uncovered: Mapping[str, str]

    def between(self, first: int, second: int) -> list[PairAlignment]:
        """Return the modules that two adapters share, each compared."""
        wanted = sorted((first, second))
        return [pair for pair in self.pairs if [pair.first, pair.second] == wanted]

    def cosine(self, first: int, second: int) -> float | None:
        """Return the cosine of all changes; a module that one adapter lacks is a zero change."""
        whole = self.norms[first] * self.norms[second]
        return sum(pair.inner for pair in self.between(first, second)) / whole if whole else None

    def mean(
        self, first: int, second: int, number: Callable[[PairAlignment], float | None]
    ) -> float | None:
        """Return the mean of a number over the shared modules that have it."""
        found = [value for p in self.between(first, second) if (value := number(p)) is not None]
        return sum(found) / len(found) if found else None


def align(adapters: Sequence[Adapter], arch: str | None = None) -> Alignment:
    """Compare adapters module by module: cosines of ΔW, principal angles of their spaces.

    Of changes that depend on the base the additive part is compared, as in ``measure_spectrum``.

    Args:
        adapters: at least two, in any namings of one architecture.
        arch: its id, where the adapters do not tell and their namings differ.

    Raises:
        InputError: different architectures, or no module that two of them share.
    """
    alike = _meeting(adapters, arch)
    found = [additive_layers(adapter) for adapter in alike]
    uncovered = {path: why for one in found for path, why in one.uncovered.items()}
    layers = [one.deltas for one in found]
    paths = list(dict.fromkeys(path for one in layers for path in one))
    jobs = [(path, [one.get(path) for one in layers]) for path in paths]
    aligned = list(in_threads(_compare_module, jobs, resolve_compute()))
    squares = [[done.energies[n] for done in aligned] for n in range(len(adapters))]
    for done in aligned:
        uncovered |= done.uncovered
    return Alignment(
        alike[0].naming,
        tuple(pair for done in aligned for pair in done.pairs),
        tuple(math.sqrt(sum(one)) for one in squares),
        tuple(len(one) for one in layers),
        uncovered,
    )


def _meeting(adapters: Sequence[Adapter], arch: str | None) -> Sequence[Adapter]:
    """Return the adapters in one naming in which at least two share a module."""
    if concerns_mlx(*{adapter.naming for adapter in adapters}):
        adapters = meeting(adapters)
    alike, _ = in_one_naming(adapters, arch)
    if not _share(alike) and alike[0].naming != "transformers":
        # Two spellings of one naming: kohya's SDXL files have original or diffusers' names.
        with suppress(UnknownArchitectureError):
            alike, _ = in_one_naming(adapters, arch, naming="diffusers")
    if not _share(alike):
        raise InputError(
            "no two of the adapters share a module",
            hint="`loratools inspect` of each shows its architecture and targets",
        )
    return alike


def _share(adapters: Sequence[Adapter]) -> bool:
    return any(one.layers.keys() & other.layers.keys() for one, other in combinations(adapters, 2))


@dataclass(frozen=True, slots=True)
class _Module:
    """One module's part of an alignment; ``energies`` are ‖ΔW‖² by adapter, 0 where it has none."""

    pairs: tuple[PairAlignment, ...]
    energies: tuple[float, ...]
    uncovered: Mapping[str, str]


def _compare_module(job: tuple[str, Sequence[AdditiveDelta | None]]) -> _Module:
    path, deltas = job
    shapes = {matrix_shape(delta) for delta in deltas if delta is not None}
    found = [None if delta is None else delta_svd(delta) for delta in deltas]
    energies = tuple(0.0 if one is None else _energy(one) for one in found)
    if len(shapes) > 1:
        words = " and ".join(f"{out}x{width}" for out, width in sorted(shapes))
        return _Module((), energies, {path: f"the adapters are for weights of {words}"})
    present = [(n, one) for n, one in enumerate(found) if one is not None]
    pairs = tuple(
        _compare(path, first, second, one, other)
        for (first, one), (second, other) in combinations(present, 2)
    )
    return _Module(pairs, energies, {})


def _energy(found: SVD) -> float:
    return float(found.values.to(torch.float64).square().sum())


def _compare(path: str, first: int, second: int, one: SVD, other: SVD) -> PairAlignment:
    left = _products(one.left.mT, other.left)
    right = _products(one.right, other.right.mT)
    weights = torch.outer(one.values.to(torch.float64), other.values.to(torch.float64))
    inner = float((weights * left * right).sum())
    norms = math.sqrt(_energy(one) * _energy(other))
    if not norms:
        return PairAlignment(path, first, second, 0.0)
    k = min(energy_rank(svd.values, LEADING_ENERGY) for svd in (one, other))
    cosines_out, cosines_in = (torch.linalg.svdvals(both[:k, :k]) for both in (left, right))
    return PairAlignment(
        path,
        first,
        second,
        inner,
        cosine=inner / norms,
        leading=k,
        overlap_out=float(cosines_out.square().mean()),
        overlap_in=float(cosines_in.square().mean()),
        chance_out=k / one.left.shape[0],
        chance_in=k / one.right.shape[1],
        angle_out=_degrees(float(cosines_out[0])),
        angle_in=_degrees(float(cosines_in[0])),
    )


def _products(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.to(torch.float64) @ columns.to(torch.float64)


def _degrees(cosine: float) -> float:
    # Rounding may push a cosine above 1, or below it by 1e-7, which acos would call 0.03 degrees.
    return math.degrees(math.acos(min(cosine, 1.0)))
