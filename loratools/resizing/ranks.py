"""Which rank each layer gets: a rule for every layer by itself, or one budget for all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.errors import OptionError
from loratools.linalg.budgets import Ladder, reach_share, spend_budget
from loratools.linalg.spectra import cumulative_rank, energy_rank, fro_rank, ratio_rank

SD_SCRIPTS = "sd-scripts"
# resize_lora.py: a layer whose largest singular value (of up @ down) is below this gets rank 1.
_SD_SCRIPTS_ZERO = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """What a rule may know of one layer.

    Attributes:
        values: (k,), float64, descending: singular values of ΔW.
        shape: (out, in·k...) of the matrix.
        is_convolution: whether its kernel is larger than 1.
        has_kernel: whether it is a convolution at all, 1×1 included.
        scale: alpha / rank.
        cost: bytes that one rank more takes.
        weight: what σ is divided by before layers are compared.
        together: layers of one word here must get the same rank; None if it is free.
    """

    values: Tensor
    shape: tuple[int, int]
    is_convolution: bool = False
    has_kernel: bool = False
    scale: float = 1.0
    cost: float = 1.0
    weight: float = 1.0
    together: str | None = None

    @property
    def most(self) -> int:
        """The largest rank that a matrix of this shape can have."""
        return min(self.shape)


@dataclass(frozen=True, slots=True)
class RankRule:
    """How ranks are chosen: exactly one of the first seven is given.

    Attributes:
        rank: this rank in every layer.
        energy: the least rank that keeps this share of Σσ².
        sv_ratio: singular values above σ₁ by this ratio.
        sv_cumulative: the least rank that keeps this share of Σσ.
        sv_fro: the least rank that keeps this share of the Frobenius norm.
        max_size: the most energy in this many bytes, over all layers.
        mean_rank: the most energy at this mean rank, over all layers.
        conv_rank: with ``rank``: that of kernels larger than 1.
        max_rank: no layer gets more, whatever the rule says.
        everywhere: ``energy`` is a share over all layers, at the least cost.
        compat: count as this tool does.
    """

    rank: int | None = None
    energy: float | None = None
    sv_ratio: float | None = None
    sv_cumulative: float | None = None
    sv_fro: float | None = None
    max_size: int | None = None
    mean_rank: float | None = None
    conv_rank: int | None = None
    max_rank: int | None = None
    everywhere: bool = False
    compat: str | None = None

    @property
    def mode(self) -> str:
        """The name of the one that is given."""
        return next(name for name in MODES if getattr(self, name) is not None)

    @property
    def is_global(self) -> bool:
        """Whether layers compete with each other."""
        return self.mode in ("max_size", "mean_rank") or self.everywhere


MODES = ("rank", "energy", "sv_ratio", "sv_cumulative", "sv_fro", "max_size", "mean_rank")

_SHARES = ("energy", "sv_cumulative", "sv_fro")
_COUNTS: Mapping[str, Callable[[Tensor, float], int]] = {
    "energy": energy_rank,
    "sv_ratio": ratio_rank,
    "sv_cumulative": cumulative_rank,
    "sv_fro": fro_rank,
}


def check_rule(rule: RankRule) -> None:
    """Raise OptionError unless the rule is one rule, with numbers that mean something."""
    given = [name for name in MODES if getattr(rule, name) is not None]
    words = ", ".join(map(_option, MODES))
    if len(given) != 1:
        said = " and ".join(map(_option, given)) or "nothing says which rank to resize to"
        raise OptionError(
            f"{said}: give exactly one" if given else said, hint=f"choose one of {words}"
        )
    for name in ("rank", "conv_rank", "max_rank", "mean_rank"):
        value = getattr(rule, name)
        if value is not None and not value >= 1:
            raise OptionError(
                f"{_option(name)} {value:g} is no rank", hint="give a number of at least 1"
            )
    for name in _SHARES:
        value = getattr(rule, name)
        if value is not None and not 0 < value <= 1:
            raise OptionError(
                f"{_option(name)} {value:g} is no share", hint="give a number above 0, at most 1"
            )
    if rule.sv_ratio is not None and not rule.sv_ratio >= 1:
        raise OptionError(
            f"--sv-ratio {rule.sv_ratio:g}: the largest over the smallest value kept",
            hint="give a number of at least 1",
        )
    _check_company(rule)


def _check_company(rule: RankRule) -> None:
    if rule.conv_rank is not None and rule.rank is None:
        raise OptionError("--conv-rank goes with --rank", hint="--max-rank bounds the other rules")
    if rule.max_rank is not None and rule.rank is not None:
        raise OptionError(
            "--max-rank bounds rules that choose, and --rank says it itself",
            hint="leave out one of them",
        )
    if rule.everywhere and rule.energy is None:
        raise OptionError(
            "--scope global goes with --energy",
            hint="--max-size and --mean-rank are over all layers anyway",
        )
    if rule.compat is not None and rule.compat != SD_SCRIPTS:
        raise OptionError(f"unknown tool {rule.compat!r}", hint=f"known: {SD_SCRIPTS}")
    if rule.compat and rule.is_global:
        raise OptionError(f"{SD_SCRIPTS} has no budget over all layers", hint="leave out --compat")


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def choose_ranks(layers: Sequence[Candidate], rule: RankRule, fixed_bytes: float = 0) -> list[int]:
    """Return the rank of each layer, at least 1.

    Args:
        layers: candidates.
        rule: checked before.
        fixed_bytes: of what the file holds besides factors; only ``max_size`` asks.

    Raises:
        OptionError: a rank above every layer's shape, or a size that rank 1 exceeds.
    """
    if rule.is_global:
        ranks = _compete(layers, rule, fixed_bytes)
        return _in_step(layers, ranks, min)
    if rule.rank is not None:
        _refuse_beyond(layers, rule)
    return _in_step(layers, [_alone(layer, rule) for layer in layers], max)


def _in_step(
    layers: Sequence[Candidate], ranks: list[int], pick: Callable[[list[int]], int]
) -> list[int]:
    """Give layers that must have one rank the same one."""
    groups: dict[str, list[int]] = {}
    for layer, rank in zip(layers, ranks, strict=True):
        if layer.together is not None:
            groups.setdefault(layer.together, []).append(rank)
    return [
        pick(groups[layer.together]) if layer.together is not None else rank
        for layer, rank in zip(layers, ranks, strict=True)
    ]


def _refuse_beyond(layers: Sequence[Candidate], rule: RankRule) -> None:
    convolutions = [layer for layer in layers if _takes_conv_rank(layer, rule)]
    others = [layer for layer in layers if not _takes_conv_rank(layer, rule)]
    for name, wanted, own in (
        ("rank", rule.rank, others),
        ("conv_rank", rule.conv_rank, convolutions),
    ):
        largest = max((layer.most for layer in own), default=wanted)
        if wanted is not None and largest is not None and wanted > largest:
            raise OptionError(
                f"{_option(name)} {wanted} is above the shape of every layer",
                hint=f"the largest of them can use is {largest}",
            )


def _takes_conv_rank(layer: Candidate, rule: RankRule) -> bool:
    # sd-scripts counts 1×1 kernels among them.
    convolution = layer.has_kernel if rule.compat else layer.is_convolution
    return rule.conv_rank is not None and convolution


def _alone(layer: Candidate, rule: RankRule) -> int:
    if rule.rank is not None:
        wanted = rule.conv_rank if _takes_conv_rank(layer, rule) else rule.rank
        return min(wanted or rule.rank, layer.most)
    bound = rule.max_rank or layer.most
    if rule.compat:
        return min(_as_sd_scripts(layer, rule), bound)
    count = _COUNTS[rule.mode](layer.values, getattr(rule, rule.mode))
    return max(1, min(count, bound))


def _as_sd_scripts(layer: Candidate, rule: RankRule) -> int:
    """Return its count: one more than the rule says, of the dense matrix's min(m, n) values."""
    if not layer.scale or float(layer.values[0]) / abs(layer.scale) <= _SD_SCRIPTS_ZERO:
        return 1
    count = _COUNTS[rule.mode](layer.values, getattr(rule, rule.mode))
    return max(1, min(count, layer.most - 1)) + 1


def _compete(layers: Sequence[Candidate], rule: RankRule, fixed_bytes: float) -> list[int]:
    by_rank = rule.mode == "mean_rank"
    ladders = [
        Ladder(_gains(layer, rule.max_rank), 1.0 if by_rank else layer.cost) for layer in layers
    ]
    if rule.energy is not None:
        return reach_share(ladders, rule.energy)
    if rule.mean_rank is not None:
        return spend_budget(ladders, rule.mean_rank * len(layers) + 1e-9)
    least = fixed_bytes + sum(layer.cost for layer in layers)
    if rule.max_size is not None and least > rule.max_size:
        raise OptionError(
            f"--max-size: rank 1 in every layer already takes {least:,.0f} bytes, "
            f"and {rule.max_size:,} are allowed",
            hint="allow more, or write a smaller type with --dtype",
        )
    return spend_budget(ladders, (rule.max_size or 0) - fixed_bytes)


def _gains(layer: Candidate, most: int | None) -> Tensor:
    gains: Tensor = (layer.values.to(torch.float64) / layer.weight).square()[:most]
    return gains
