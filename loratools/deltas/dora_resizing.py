"""DoRA at another rank: what stays nearest to the adapted weight, given the base weight.

W′ = G·(W + ΔW), where G holds each channel's gain magnitude / ‖W + ΔW‖. With the gains kept, the
adapted weight moves by G·(ΔW − ΔW_k) alone. That is smallest where G·ΔW_k is the truncated SVD of
G·ΔW, and keeping the gains takes a new magnitude, G·‖W + ΔW_k‖. Truncating ΔW itself and leaving
the magnitude, as tools do that do not know W, weighs every channel alike and changes its gain.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratools.deltas.base import AdditiveDelta
from loratools.deltas.dora import DoRA, length_gain
from loratools.deltas.full_change import FullDelta
from loratools.deltas.lora import LoRA, Role
from loratools.deltas.resizing import main_dtype, padded, resized_delta
from loratools.deltas.spectra import LayerSpectrum
from loratools.deltas.spectral import factored_view


@dataclass(frozen=True, slots=True, eq=False)
class GainedChange:
    """G·ΔW of a DoRA on its base.

    Attributes:
        change: G·ΔW as a matrix (out, in·k...), of the inner change's rank where it has one.
        gains: (out,) or, with axis ``in``, (in,), float64.
        energy: ‖W′ − W‖².
    """

    change: AdditiveDelta
    gains: Tensor
    energy: float


def gained_change(delta: DoRA, weight: Tensor) -> GainedChange:
    """Return what a smaller rank has to approximate; ``weight`` is W, (out, in[, k...])."""
    direction = weight + delta.inner.materialize()
    gains = length_gain(delta.magnitude.flatten().double(), _lengths(direction, delta))
    moved = direction * _along(gains, delta) - weight
    energy = float(moved.norm(dtype=torch.float64)) ** 2
    plain = factored_view(delta.inner)
    if plain is None:
        change = delta.inner.materialize() * _along(gains, delta)
        return GainedChange(FullDelta(change.float().flatten(1)), gains, energy)
    up, down = plain.up.double().flatten(1), plain.down.double()
    if delta.axis == "out":
        up = up * gains[:, None]
    else:
        down = down * gains.reshape(1, -1, *[1] * (down.dim() - 2))
    return GainedChange(LoRA(down.flatten(1), up, plain.alpha), gains, energy)


def resized_dora(
    delta: DoRA,
    gained: GainedChange,
    spectrum: LayerSpectrum,
    weight: Tensor,
    rank: int,
    *,
    dtype: torch.dtype | None = None,
    balanced: bool = True,
) -> DoRA:
    """Return the DoRA of rank ``rank`` whose adapted weight is nearest, gains kept.

    Args:
        delta: the old one.
        gained: its ``gained_change``.
        spectrum: of ``gained.change``.
        weight: W, (out, in[, k...]).
        rank: at least 1.
        dtype: of the new tensors; None for that of the old ones.
        balanced: see ``resized_delta``.
    """
    stored = dtype or main_dtype(delta.inner)
    magnitude_dtype = dtype or delta.magnitude.dtype
    inner = delta.inner
    if isinstance(inner, LoRA) and rank >= inner.rank:
        same = padded(inner, rank).map_tensors(lambda tensor: tensor.to(stored))
        return replace(delta, inner=same, magnitude=delta.magnitude.to(magnitude_dtype))
    scaled = resized_delta(spectrum, rank, dtype=torch.float64, balanced=balanced)
    assert isinstance(scaled, LoRA)
    plain = _ungained(scaled, gained.gains, delta).map_tensors(lambda t: t.to(stored).contiguous())
    plain = replace(plain, bias=_bias(inner, plain.scale, stored), role=_role(inner))
    lengths = _lengths(weight + plain.materialize(), delta)
    magnitude = (gained.gains * lengths).to(magnitude_dtype).reshape(delta.magnitude.shape)
    return replace(delta, inner=plain, magnitude=magnitude)


def adapted_error(old: DoRA, new: DoRA, weight: Tensor) -> float:
    """Return ‖W′_old − W′_new‖² on the base weight W, rounding included."""
    return float((old.apply(weight) - new.apply(weight)).norm(dtype=torch.float64)) ** 2


def _lengths(direction: Tensor, delta: DoRA) -> Tensor:
    axis = 0 if delta.axis == "out" else 1
    flat = direction.double().movedim(axis, 0).flatten(1)
    lengths: Tensor = flat.norm(dim=1)
    return lengths


def _along(gains: Tensor, delta: DoRA) -> Tensor:
    """Return the gains shaped to multiply a weight."""
    shape = [1] * len(delta.weight_shape)
    shape[0 if delta.axis == "out" else 1] = -1
    return gains.reshape(shape)


def _ungained(scaled: LoRA, gains: Tensor, delta: DoRA) -> LoRA:
    """Take the gains out of the factors again, in the weight's own shape."""
    inverse = torch.where(gains != 0, 1 / gains, torch.zeros_like(gains))
    out, *rest = delta.weight_shape
    up, down = scaled.up, scaled.down.reshape(scaled.rank, *rest)
    if delta.axis == "out":
        up = up * inverse[:, None]
    else:
        down = down * inverse.reshape(1, -1, *[1] * (len(rest) - 1))
    return LoRA(down, up.reshape(out, scaled.rank, *[1] * (len(rest) - 1)), scaled.alpha)


def _bias(inner: AdditiveDelta, scale: float, dtype: torch.dtype) -> Tensor | None:
    change = inner.bias_change
    if change is None:
        return None
    if isinstance(inner, LoRA) and inner.bias is not None:
        return inner.bias
    return (change / scale).to(dtype)


def _role(inner: AdditiveDelta) -> Role:
    return inner.role if isinstance(inner, LoRA) else "linear"
