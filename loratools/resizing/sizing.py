"""How large an adapter's file gets at which ranks, and what every choice would keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from loratools.adapter import Adapter
from loratools.conversion import cast_adapter
from loratools.deltas import LayerDelta
from loratools.deltas.resizing import relative_error
from loratools.errors import OptionError
from loratools.formats.format import Format
from loratools.linalg.spectra import energy_rank, retained_energy, truncation_error
from loratools.report import Json
from loratools.resizing.layers import ResizeLayer, blank_layer
from loratools.resizing.ranks import Candidate, RankRule, choose_ranks
from loratools.resizing.words import resized_words
from loratools.streaming.checkpoint import DTYPE_WORDS
from loratools.tensorfiles.dtypes import torch_dtype

CHOICE_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CHOICE_SHARES = (0.5, 0.8, 0.9, 0.95, 0.99)
"""What the what-if table asks."""


def narrow_dtype(word: str) -> torch.dtype | None:
    """Return the float type that ``--dtype`` names, None for ``keep``; raises OptionError."""
    if word == "keep":
        return None
    if word not in DTYPE_WORDS:
        raise OptionError(f"unknown dtype {word!r}", hint=f"use keep, {', '.join(DTYPE_WORDS)}")
    return torch_dtype(DTYPE_WORDS[word])


@dataclass(frozen=True, slots=True, eq=False)
class Sizing:
    """How large the written file gets at which ranks."""

    adapter: Adapter
    target: Format
    layers: Sequence[ResizeLayer]
    candidates: Sequence[Candidate]
    dtype: str

    def filled(self, deltas: Mapping[str, LayerDelta], rule: RankRule | None = None) -> Adapter:
        """Return the adapter with some layers replaced and everything else in the dtype."""
        carried = {path: d for path, d in self.adapter.layers.items() if path not in deltas}
        rest = cast_adapter(replace(self.adapter, layers=carried), self.dtype)
        found = {**rest.layers, **deltas}
        layers = {path: found[path] for path in self.adapter.layers}
        whole = replace(rest, layers=layers)
        return whole if rule is None else resized_words(whole, self.adapter, rule)

    def nbytes(self, ranks: Sequence[int]) -> int:
        """Return the bytes of the file's tensors at these ranks, by writing zeros."""
        blanks = {
            layer.path: blank_layer(layer, rank, narrow_dtype(self.dtype))
            for layer, rank in zip(self.layers, ranks, strict=True)
        }
        tensors = self.target.write(self.filled(blanks)).tensors
        return sum(tensor.nbytes for tensor in tensors.values())

    def choose(self, rule: RankRule) -> list[int]:
        """Return the ranks; a size is measured on what would be written."""
        if rule.max_size is None:
            return choose_ranks(self.candidates, rule)
        fixed = self._fixed()
        while True:
            ranks = choose_ranks(self.candidates, rule, fixed)
            excess = self.nbytes(ranks) - rule.max_size
            if excess <= 0:
                return ranks
            # Alphas that the narrow type cannot say take two bytes more.
            fixed += excess

    def _fixed(self) -> float:
        ones = [1] * len(self.layers)
        return self.nbytes(ones) - sum(layer.cost for layer in self.candidates)

    def choices(self) -> list[dict[str, Json]]:
        """Return what some ranks and shares of energy would cost and keep."""
        most = max(len(layer.values) for layer in self.candidates)
        rows = [
            self._choice(f"rank {rank}", [min(rank, layer.most) for layer in self.candidates])
            for rank in CHOICE_RANKS
            if rank <= most
        ]
        return rows + [
            self._choice(
                f"energy {share:g}", [energy_rank(one.values, share) for one in self.candidates]
            )
            for share in CHOICE_SHARES
        ]

    def _choice(self, name: str, ranks: Sequence[int]) -> dict[str, Json]:
        pairs = list(zip(self.layers, ranks, strict=True))
        spectra = [(layer.spectrum.values, rank) for layer, rank in pairs]
        energies = [float(values.square().sum()) for values, _ in spectra]
        whole = sum(energies)
        kept = sum(e * retained_energy(*s) for e, s in zip(energies, spectra, strict=True))
        lost = sum(e * truncation_error(*s) ** 2 for e, s in zip(energies, spectra, strict=True))
        return {
            "choice": name,
            "mean_rank": sum(ranks) / len(ranks),
            "bytes": round(
                self._fixed()
                + sum(layer.cost * rank for layer, rank in zip(self.candidates, ranks, strict=True))
            ),
            "retained_energy": kept / whole if whole else 1.0,
            "relative_error": relative_error(lost, whole),
        }
