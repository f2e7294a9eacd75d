"""How fast singular values fall, and how much energy a rank keeps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from loratools.plots.drawing import legible
from loratools.plots.heatmaps import label_plainly
from loratools.spectra.figures import SHARES, Group, common_rank, energy_curve
from loratools.spectra.layers import AdapterSpectrum, LayerSpectrum

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which the colour-blind tell apart."""
_DASHES = ("-", "--")
_LINES = len(_COLOURS) * len(_DASHES)
_BAND = (0.1, 0.9)
_FLOOR = 1e-4
"""Below this share of the largest, singular values are not drawn."""
_INK = "#333333"


def draw_decay(axes: Any, groups: Sequence[Group]) -> None:
    """Draw, for each kind of module, the median of σᵢ/σ₁ and the band of most layers."""
    drawn = sorted(groups, key=lambda group: -sum(layer.energy for layer in group.layers))[:_LINES]
    several = len({group.network for group in groups}) > 1
    for position, group in enumerate(drawn):
        low, middle, high = _quantiles(group.layers)
        if middle is None:
            continue
        colour = _COLOURS[position % len(_COLOURS)]
        dash = _DASHES[position // len(_COLOURS)]
        ranks = range(1, len(middle) + 1)
        word = f"{group.network} {group.module}" if several else group.module
        marker = "o" if len(middle) < 3 else None
        axes.plot(
            ranks,
            middle,
            dash,
            color=colour,
            linewidth=1.3,
            label=legible(word),
            marker=marker,
            ms=3,
        )
        if len(drawn) <= len(_COLOURS):
            axes.fill_between(ranks, low, high, color=colour, alpha=0.13, linewidth=0)
    axes.set(yscale="log", xlabel="i", ylabel="σᵢ / σ₁, median of the layers")
    axes.set_title("How fast the singular values fall")
    _rank_axis(axes, max((len(layer.values) for g in groups for layer in g.layers), default=1))
    label_plainly(axes.yaxis)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.6)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03), title=_legend_title(groups, drawn))


def _legend_title(groups: Sequence[Group], drawn: Sequence[Group]) -> str | None:
    if len(drawn) < len(groups):
        return f"the {len(drawn)} of {len(groups)} kinds with most energy"
    return "band: 80% of the layers" if len(drawn) <= len(_COLOURS) else None


def _quantiles(layers: Sequence[LayerSpectrum]) -> tuple[Any, Any, Any]:
    """Return the lower, middle and upper σᵢ/σ₁ over the layers that are not zero."""
    longest = max(len(layer.values) for layer in layers)
    rows = [_relative(layer.values, longest) for layer in layers if layer.energy]
    if not rows:
        return None, None, None
    stacked = torch.stack(rows).numpy()
    found = np.quantile(stacked, [_BAND[0], 0.5, _BAND[1]], axis=0).clip(min=_FLOOR)
    last = int((stacked >= _FLOOR).any(axis=0).sum())
    low, middle, high = (line[:last].tolist() for line in found)
    return low, middle, high


def _relative(values: Tensor, length: int) -> Tensor:
    padded = torch.zeros(length, dtype=torch.float64)
    padded[: len(values)] = values / values[0]
    return padded


def draw_energy(axes: Any, spectrum: AdapterSpectrum) -> None:
    """Draw the share of the energy that a rank keeps: of the file, and of most layers."""
    whole = energy_curve(spectrum.layers)
    ranks = range(1, len(whole) + 1)
    curves = torch.ones(len(spectrum.layers), len(whole), dtype=torch.float64)
    for row, layer in enumerate(spectrum.layers):
        curves[row, : len(layer.values)] = energy_curve([layer])
    low, high = (100 * np.quantile(curves.numpy(), _BAND, axis=0)).tolist()
    axes.fill_between(
        ranks, low, high, color=_COLOURS[5], alpha=0.3, linewidth=0, label="80% of the layers"
    )
    axes.plot(
        ranks, (100 * whole).tolist(), color=_COLOURS[0], linewidth=1.8, marker="o", ms=2.5,
        label="the whole file,\none rank for all layers",
    )  # fmt: skip
    for share, dash in zip(SHARES, ("--", ":"), strict=True):
        rank = common_rank(spectrum.layers, share)
        axes.axhline(100 * share, color=_INK, linewidth=0.7, linestyle=dash)
        word = f"rank {rank} keeps {share:.0%}"
        axes.axvline(max(rank, 1), color=_INK, linewidth=0.9, linestyle=dash, label=word)
    axes.set(xlabel="rank", ylabel="energy kept, % of Σσ²", ylim=(0, 103))
    axes.set_title("What a smaller rank keeps")
    _rank_axis(axes, len(whole))
    axes.grid(axis="y", color="#eeeeee", linewidth=0.6)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.03))


def _rank_axis(axes: Any, largest: int) -> None:
    """Count ranks in doublings from 8 on, one by one below."""
    from matplotlib.ticker import NullLocator

    if largest > 8:
        axes.set_xscale("log", base=2)
        ticks = [1 << n for n in range(largest.bit_length()) if 1 << n <= largest]
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        ticks = list(range(1, largest + 1))
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xlim(0.94 if largest > 8 else 0.8, largest * 1.06 if largest > 8 else largest + 0.2)
