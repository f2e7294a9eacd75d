"""Which tool folds which kind otherwise than the formula, and how.

Every function takes a delta and returns it as the tool sees it: the delta itself where nothing
differs, another one, or one with the tool's own fold (``AsTool``). Its docstring names the source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from loratools.deltas.base import AdditiveDelta, LayerDelta, RowFold
from loratools.deltas.boft import BOFT
from loratools.deltas.compat.as_tool import AsTool
from loratools.deltas.compat.folds import BaseLengthFold, BothFold, LengthenedFold
from loratools.deltas.dora import DoRA
from loratools.deltas.full_change import FullDelta
from loratools.deltas.oft import OFT
from loratools.deltas.rotation import RotationFold
from loratools.deltas.sparse import SparseResidual
from loratools.deltas.sums import SumDelta

TOOLS = ("comfyui", "lycoris", "sd-scripts", "a1111")

Device = str | torch.device


@dataclass(frozen=True, slots=True)
class Rule:
    """One difference.

    Attributes:
        view: from a delta to what the tool makes of it.
        says: the difference in words, for the report.
    """

    view: Callable[[Any], LayerDelta]
    says: str


def read_as_tool(tool: str, delta: LayerDelta) -> LayerDelta:
    """Return the delta whose fold gives what ``tool`` gives; the delta itself if that is the same.

    ``tool`` is one of ``TOOLS``.
    """
    rule = RULES.get((tool, delta.kind))
    return delta if rule is None else rule.view(delta)


# ── alpha and scale ──────────────────────────────────────────────────────────────────────────


def _zero_alpha_is_rank(delta: Any) -> Any:
    """Take alpha 0 for the rank, as sd-scripts lora.py and LyCORIS' modules do on construction."""
    unset = delta.alpha == 0 and delta.rank is not None
    return replace(delta, alpha=float(delta.rank)) if unset else delta


def _scaled_twice(delta: Any) -> AdditiveDelta:
    """Scale by (alpha/rank)²: LyCORIS 4.1.3 loha.py and lokr.py, get_weight + get_diff_weight."""
    known: Any = _zero_alpha_is_rank(delta)
    scaled: AdditiveDelta = known if known.scale == 1 else known.scaled(known.scale)
    return scaled


# ── several changes of one module ────────────────────────────────────────────────────────────


def _makes_patch(part: AdditiveDelta) -> bool:
    return part.changes_weight and not isinstance(part, SparseResidual)


def _last_wins(delta: SumDelta) -> AdditiveDelta:
    """Keep the last change of the weight and every one of the bias: ComfyUI lora.py, load_lora.

    Each kind it finds overwrites the patch of the one before; ``diff`` comes last. It does not
    read sparse residuals. Patches of the bias have keys of their own.
    """
    patches = [part for part in delta.parts if _makes_patch(part)]
    # ``w_norm`` is read before ``diff``, the other way round than here.
    ordered = sorted(patches, key=lambda part: isinstance(part, FullDelta) and not part.norm_layer)
    kept = [*ordered[-1:], *(part for part in delta.parts if not part.changes_weight)]
    return _sum_or_same(delta, kept)


def _first_wins(delta: SumDelta, *, residual: bool) -> AdditiveDelta:
    patches = [part for part in delta.parts if _makes_patch(part)]
    rest = [part for part in delta.parts if residual and isinstance(part, SparseResidual)]
    return _sum_or_same(delta, [*patches[:1], *rest]) if patches else delta


def _sum_or_same(delta: SumDelta, kept: list[AdditiveDelta]) -> AdditiveDelta:
    if len(kept) == 1:
        return kept[0]
    return SumDelta(tuple(kept)) if 0 < len(kept) < len(delta.parts) else delta


def _lycoris_first(delta: SumDelta) -> LayerDelta:
    """Keep the first change: LyCORIS 4.1.3 modules/__init__.py, get_module takes one algorithm."""
    first = _first_wins(delta, residual=False)
    return first if isinstance(first, SumDelta) else read_as_tool("lycoris", first)


def _a1111_first(delta: SumDelta) -> AdditiveDelta:
    """Keep the first change and its residual: A1111 networks.py, the first of ``module_types``."""
    return _first_wins(delta, residual=True)


# ── DoRA ─────────────────────────────────────────────────────────────────────────────────────


def _inner_as(tool: str, delta: DoRA) -> DoRA:
    inner = read_as_tool(tool, delta.inner)
    assert isinstance(inner, AdditiveDelta)
    return delta if inner is delta.inner else replace(delta, inner=inner)


def _lycoris_dora(delta: DoRA) -> LayerDelta:
    """Give V · (m·(d − 1) + 1), d = magnitude/‖V‖: LyCORIS 4.1.3 general.py, weight_decompose.

    A full difference is read without lengths (full.py, weight_list).
    """
    known = _inner_as("lycoris", delta)
    if isinstance(known.inner, FullDelta):
        return known.inner
    return AsTool(known, _decomposed_from_direction)


def _decomposed_from_direction(
    delta: DoRA, strength: float, transposed: bool, device: Device
) -> RowFold:
    # V·(m·(d − 1) + 1) − W = m·(V·d − W) + (1 − m)·(V − W)
    moved = delta.row_fold(strength, transposed=transposed, device=device)
    left = delta.inner.row_fold(1 - strength, transposed=transposed, device=device)
    return BothFold(moved, left)


def _comfyui_dora(delta: DoRA) -> LayerDelta:
    """Divide lengths of rows by ‖W‖, not ‖V‖: ComfyUI weight_adapter/base.py, weight_decompose.

    Lengths of columns are divided by ‖V‖. A full difference counts alone, without lengths
    (lora.py, load_lora).
    """
    known = _inner_as("comfyui", delta)
    if isinstance(known.inner, FullDelta):
        return known.inner
    return known if delta.axis == "in" else AsTool(known, _decomposed_by_base)


def _decomposed_by_base(delta: DoRA, strength: float, transposed: bool, device: Device) -> RowFold:
    product = delta.inner.row_fold(1.0, transposed=transposed, device=device)
    magnitude = delta.magnitude.to(device, torch.float32).flatten()
    return BaseLengthFold(product, magnitude, strength, transposed=transposed)


def _a1111_dora(delta: DoRA) -> LayerDelta:
    """Give W + m·s·(V·magnitude/‖V‖ − W), V = W + ΔW/s: A1111 1.10 network.py, finalize_updown.

    s = alpha/rank. Its norm is that of columns even where the magnitude is of rows.
    """
    known = _inner_as("a1111", delta)
    scale = _scale_of(known.inner)
    if scale == 1 and known.axis == "in":
        return known
    bare = replace(known, inner=known.inner.scaled(1 / scale)) if scale else known
    if known.axis == "in":
        return AsTool(bare, _Late(scale))
    return AsTool(bare, _LateByColumns(scale), by_rows=False)


def _scale_of(inner: AdditiveDelta) -> float:
    main = inner.parts[0] if isinstance(inner, SumDelta) else inner
    scale: float = getattr(main, "scale", 1.0)
    return scale


@dataclass(frozen=True)
class _Late:
    """Folds a DoRA at strength · scale."""

    scale: float

    def __call__(self, delta: DoRA, strength: float, transposed: bool, device: Device) -> RowFold:
        return delta.row_fold(strength * self.scale, transposed=transposed, device=device)


class _LateByColumns(_Late):
    """Likewise, with columns brought to length 1 and rows multiplied by their magnitude."""

    def __call__(self, delta: DoRA, strength: float, transposed: bool, device: Device) -> RowFold:
        ones = torch.ones(delta.weight_shape[1])
        unit = replace(delta, magnitude=ones, axis="in")
        fold = unit.row_fold(1.0, transposed=transposed, device=device)
        lengths = delta.magnitude.to(device, torch.float32).flatten()
        return LengthenedFold(fold, lengths, strength * self.scale, transposed=transposed)


# ── rotations ────────────────────────────────────────────────────────────────────────────────


def _sd_scripts_oft(delta: OFT) -> OFT:
    """Turn nothing where the constraint is 0: sd-scripts oft.py, get_weight clamps ‖Q‖ to it."""
    if delta.bound is not None or delta.is_zero:
        return delta
    return replace(delta, blocks=torch.zeros_like(delta.blocks))


def _comfyui_oft(delta: OFT) -> AsTool:
    """Give W + m²·(RᵀW − W), ‖Q‖ ≤ alpha, no rescale: ComfyUI weight_adapter/oft.py."""
    bound = replace(delta, constraint=delta.constraint / delta.out, rescale=None)
    return AsTool(bound, _squared)


def _squared(delta: OFT, strength: float, transposed: bool, device: Device) -> RowFold:
    return delta.row_fold(strength**2, transposed=transposed, device=device)


def _lycoris_oft(delta: OFT) -> LayerDelta:
    """Give rescale ∘ (W + m·(RᵀW − W)): LyCORIS 4.1.3 diag_oft.py, make_weight."""
    return delta if delta.rescale is None else AsTool(delta, _rescaled_at_any_strength)


def _rescaled_at_any_strength(
    delta: OFT, strength: float, transposed: bool, device: Device
) -> RowFold:
    turn = replace(delta, rescale=None).row_fold(strength, transposed=transposed, device=device)
    assert delta.rescale is not None
    lengths = delta.rescale.to(device, torch.float32).flatten()
    return LengthenedFold(turn, lengths, 1.0, transposed=transposed)


def _lycoris_boft(delta: BOFT) -> LayerDelta:
    """Move each stage from I to R by m, and rescale at any m: LyCORIS 4.1.3 functional/boft.py."""
    same = delta.rescale is None and len(delta.blocks) == 1
    return delta if same else AsTool(delta, _turned_in_part)


def _turned_in_part(delta: BOFT, strength: float, transposed: bool, device: Device) -> RowFold:
    rotate, lengths = delta.rotation(device, share=strength), delta.lengths(device)
    return RotationFold(rotate, lengths, 1.0, transposed=transposed)


def _comfyui_boft(delta: BOFT) -> AsTool:
    """Move each stage by m, then the weight by m; ‖Q‖ ≤ alpha: ComfyUI weight_adapter/boft.py."""
    bound = replace(delta, constraint=delta.constraint / delta.out)
    return AsTool(bound, _turned_in_part_twice)


def _turned_in_part_twice(
    delta: BOFT, strength: float, transposed: bool, device: Device
) -> RowFold:
    rotate, lengths = delta.rotation(device, share=strength), delta.lengths(device)
    return RotationFold(rotate, lengths, strength, transposed=transposed)


_ZERO_ALPHA = Rule(_zero_alpha_is_rank, "alpha 0 means the rank")
_TWICE = Rule(_scaled_twice, "scaled by (alpha/rank)²")
_FIRST = "of several changes of a module only the first counts"

RULES: Mapping[tuple[str, str], Rule] = {
    ("comfyui", "dora"): Rule(_comfyui_dora, "lengths of rows are divided by those of the base"),
    ("comfyui", "oft"): Rule(
        _comfyui_oft, "strength squared, the constraint is alpha, rescale is ignored"
    ),
    ("comfyui", "boft"): Rule(
        _comfyui_boft, "strength acts on each stage and on the sum, the constraint is alpha"
    ),
    ("comfyui", "sum"): Rule(_last_wins, "of several changes of a module only the last counts"),
    ("lycoris", "lora"): _ZERO_ALPHA,
    ("lycoris", "tucker"): _ZERO_ALPHA,
    ("lycoris", "glora"): _ZERO_ALPHA,
    ("lycoris", "loha"): _TWICE,
    ("lycoris", "lokr"): _TWICE,
    ("lycoris", "dora"): Rule(_lycoris_dora, "strength acts on the lengths alone"),
    ("lycoris", "oft"): Rule(_lycoris_oft, "rescale acts in full at any strength"),
    ("lycoris", "boft"): Rule(_lycoris_boft, "strength acts on each stage, rescale in full"),
    ("lycoris", "sum"): Rule(_lycoris_first, _FIRST),
    ("sd-scripts", "lora"): _ZERO_ALPHA,
    ("sd-scripts", "oft"): Rule(_sd_scripts_oft, "constraint 0 turns nothing"),
    ("a1111", "dora"): Rule(_a1111_dora, "lengths of columns, alpha/rank after decomposition"),
    ("a1111", "sum"): Rule(_a1111_first, _FIRST),
}
"""(tool, kind) → the rule; everything else follows the formula."""
