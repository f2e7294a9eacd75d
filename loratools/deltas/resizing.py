"""The best change of another rank from a layer's spectrum, and how far it is from the old one.

Truncating the SVD is optimal at every rank (Eckart & Young 1936). The scale alpha / rank is kept,
so alpha follows the rank; a rank beyond the stored one is padded with zeros, which changes nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from loratools.deltas.base import AdditiveDelta
from loratools.deltas.experts import ExpertLoRA
from loratools.deltas.lora import LoRA, Role
from loratools.deltas.spectra import FactoredSpectrum, LayerSpectrum, wide_factors
from loratools.deltas.spectral import lora_from_svd
from loratools.deltas.sums import SumDelta
from loratools.linalg.factored import SVD
from loratools.linalg.finite import joint_dtype

Plain = LoRA | ExpertLoRA


def resized_delta(
    spectrum: LayerSpectrum, rank: int, *, dtype: torch.dtype | None = None, balanced: bool = True
) -> Plain:
    """Return the change of rank ``rank`` nearest to the layer's own.

    A stored LoRA that already has this rank keeps its factors; one that has less gets zeros.

    Args:
        spectrum: of the layer.
        rank: at least 1.
        dtype: of the factors; None for that of the layer's own tensors.
        balanced: √S on both sides; else all of S in up.
    """
    old = spectrum.delta
    stored = dtype or main_dtype(old)
    if isinstance(old, ExpertLoRA):
        return _resized_stack(old, spectrum, rank, stored, balanced)
    if isinstance(old, LoRA) and (rank >= old.rank or old.scale == 0):
        kept = padded(old, rank) if rank >= old.rank else _cut(old, rank)
        return kept.map_tensors(lambda tensor: tensor.to(dtype or tensor.dtype))
    found = spectrum.leading(min(rank, len(spectrum.values)))
    scale = spectrum.scale or 1.0
    new = lora_from_svd(
        found, old.weight_shape, scale=scale, dtype=stored, balanced=balanced, role=_role(old)
    )
    return padded(replace(new, bias=_bias(old, scale, dtype)), rank)


def _bias(old: AdditiveDelta, scale: float, dtype: torch.dtype | None) -> Tensor | None:
    if isinstance(old, LoRA):
        return old.bias if old.bias is None else old.bias.to(dtype or old.bias.dtype)
    change = old.bias_change
    return None if change is None else change / scale


def _role(delta: AdditiveDelta) -> Role:
    parts = delta.parts if isinstance(delta, SumDelta) else (delta,)
    return next((part.role for part in parts if isinstance(part, LoRA)), "linear")


def main_dtype(delta: AdditiveDelta) -> torch.dtype:
    """Return the dtype of most elements of the stored float tensors; float32 if there are none."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in delta.tensors().values():
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def _cut(old: LoRA, rank: int) -> LoRA:
    return replace(old, up=old.up[:, :rank], down=old.down[:rank], alpha=old.scale * rank)


def padded(lora: LoRA, rank: int) -> LoRA:
    """Return the same product with zero columns and rows up to ``rank``; alpha follows."""
    missing = rank - lora.rank
    if missing <= 0:
        return lora
    up, down = _zeros(lora.up, 1, missing), _zeros(lora.down, 0, missing)
    return replace(lora, up=up, down=down, alpha=lora.scale * rank)


def _zeros(tensor: Tensor, axis: int, count: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = count
    return torch.cat([tensor, tensor.new_zeros(shape)], axis)


def _resized_stack(
    old: ExpertLoRA, spectrum: LayerSpectrum, rank: int, dtype: torch.dtype, balanced: bool
) -> ExpertLoRA:
    if rank == old.rank:
        return old.map_tensors(lambda tensor: tensor.to(dtype))
    if rank > old.rank or old.scale == 0:
        singles = [old.expert(index) for index in range(len(old.up))]
        pieces = [padded(one, rank) if rank > old.rank else _cut(one, rank) for one in singles]
    else:
        found = spectrum.leading(min(rank, spectrum.values.shape[-1]))
        pieces = [
            padded(
                lora_from_svd(
                    SVD(left, values, right),
                    old.weight_shape[1:],
                    scale=old.scale,
                    dtype=dtype,
                    balanced=balanced,
                ),
                rank,
            )
            for left, values, right in zip(found.left, found.values, found.right, strict=True)
        ]
    down = torch.stack([piece.down for piece in pieces]).to(dtype)
    up = torch.stack([piece.up for piece in pieces]).to(dtype)
    return replace(old, down=down, up=up, alpha=old.scale * rank)


def squared_error(spectrum: LayerSpectrum, new: Plain) -> float:
    """Return ‖ΔW − ΔW′‖² of what is stored, rounding included.

    From Gram matrices of the factors in float64, where cancellation limits it to about
    1e-16·‖ΔW‖²; row by row in float32 where the change has no factors.
    """
    old = spectrum.delta
    if _keeps_factors(old, new):
        return 0.0
    if not isinstance(spectrum, FactoredSpectrum):
        return SumDelta((_weight_only(old), _weight_only(new.scaled(-1.0)))).norm() ** 2
    up, down, scale = wide_factors(old, spectrum.device)
    new_up, new_down, new_scale = wide_factors(new, spectrum.device)
    crossed = _inner(up, down, new_up, new_down) * scale * new_scale
    itself = _inner(new_up, new_down, new_up, new_down) * new_scale**2
    whole = float(spectrum.values.square().sum())
    return max(whole - 2 * crossed + itself, 0.0)


def _keeps_factors(old: AdditiveDelta, new: Plain) -> bool:
    """Return whether nothing was cut or rounded: at most zeros were added."""
    if not isinstance(old, (LoRA, ExpertLoRA)) or new.rank < old.rank:
        return False
    pairs = ((old.up, new.up), (old.down, new.down))
    return all(joint_dtype(one.dtype, two.dtype) == two.dtype for one, two in pairs)


def _weight_only(delta: AdditiveDelta) -> AdditiveDelta:
    return replace(delta, bias=None) if isinstance(delta, LoRA) else delta


def _inner(up: Tensor, down: Tensor, new_up: Tensor, new_down: Tensor) -> float:
    """Return ⟨up·down, new_up·new_down⟩ over the whole batch."""
    return float(((up.mT @ new_up) * (down @ new_down.mT)).sum())


def relative_error(squared: float, energy: float) -> float:
    """Return √(squared / energy); 0 where there was no change to begin with and none now."""
    if energy == 0:
        return 0.0 if squared == 0 else math.inf
    return math.sqrt(squared / energy)
