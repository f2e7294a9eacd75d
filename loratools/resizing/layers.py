"""What a change of rank means for each layer: what is decomposed, and what is put back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.compute import Compute
from loratools.deltas import (
    AdditiveDelta,
    DoRA,
    ExpertLoRA,
    LayerDelta,
    LoHa,
    LoKr,
    LoRA,
    MovedBase,
    SumDelta,
    TuckerLoRA,
)
from loratools.deltas.dora_resizing import (
    GainedChange,
    adapted_error,
    gained_change,
    resized_dora,
)
from loratools.deltas.resizing import main_dtype, relative_error, resized_delta, squared_error
from loratools.deltas.spectra import LayerSpectrum, in_threads, spectra_of_layers
from loratools.deltas.spectral import matrix_shape
from loratools.errors import NonFiniteError, UnsupportedError
from loratools.linalg.finite import is_finite
from loratools.linalg.spectra import retained_energy
from loratools.planning.base_rows import BaseRows
from loratools.resizing.ranks import Candidate

_PRODUCTS = (LoRA, TuckerLoRA, LoHa, LoKr, ExpertLoRA)
_SHOWN = 8


@dataclass(frozen=True, slots=True, eq=False)
class ResizeLayer:
    """A layer that can have another rank.

    Attributes:
        path: of the module.
        old: its delta.
        change: the part of it that is decomposed: a DoRA's G·ΔW, a sum's only product.
        spectrum: of ``change``.
        gained: for a DoRA.
    """

    path: str
    old: LayerDelta
    change: AdditiveDelta
    spectrum: LayerSpectrum
    gained: GainedChange | None = None

    @property
    def energy(self) -> float:
        """‖ΔW‖², or ‖W′ − W‖² of a DoRA."""
        if self.gained is not None:
            return self.gained.energy
        return float(self.spectrum.values.square().sum())

    @property
    def rank(self) -> int | None:
        """The stored rank, where there is one word for it."""
        rank: int | None = getattr(_inner(self.old), "rank", None)
        return rank if not isinstance(self.old, SumDelta) else getattr(self.change, "rank", None)


@dataclass(frozen=True, slots=True, eq=False)
class Resized:
    """A layer at its new rank, and what that cost.

    Attributes:
        layer: as it was.
        delta: as it is now.
        rank: the new one.
        retained: share of Σσ² kept.
        squared_error: ‖ΔW − ΔW′‖² of what is stored, or that of the adapted weights for DoRA.
    """

    layer: ResizeLayer
    delta: LayerDelta
    rank: int
    retained: float
    squared_error: float

    @property
    def relative_error(self) -> float:
        """‖ΔW − ΔW′‖ / ‖ΔW‖."""
        return relative_error(self.squared_error, self.layer.energy)


def find_resizable(adapter: Adapter) -> tuple[list[str], dict[str, list[str]]]:
    """Return the paths whose rank can change, and the others by kind.

    Raises UnsupportedError, naming the modules, if none can, or if one's rank has a meaning that
    another rank would not have.
    """
    found: list[str] = []
    others: dict[str, list[str]] = {}
    for path, delta in adapter.layers.items():
        if _product(_inner(delta)) is not None:
            found.append(path)
        else:
            others.setdefault(delta.kind, []).append(path)
    if moved := others.get(MovedBase.kind):
        raise UnsupportedError(
            f"{_listed(moved)}: their initialisation took as many components out of the base as "
            "they have ranks, so another rank would belong to another base",
            hint="convert them with PEFT's path_initial_model_for_weight_conversion first",
        )
    if not found:
        words = "; ".join(f"{kind} in {_listed(paths)}" for kind, paths in others.items())
        raise UnsupportedError(
            f"no layer has a rank to change: {words or 'the adapter has no layers'}",
            hint="merge it into its base, and extract a LoRA from the difference",
        )
    return found, others


def _listed(paths: Sequence[str]) -> str:
    more = f" and {len(paths) - _SHOWN} more" if len(paths) > _SHOWN else ""
    return ", ".join(paths[:_SHOWN]) + more


def _inner(delta: LayerDelta) -> LayerDelta:
    return delta.inner if isinstance(delta, DoRA) else delta


def _product(delta: LayerDelta) -> AdditiveDelta | None:
    """Return what is decomposed: the delta, or the one part of a sum that changes the weight."""
    if isinstance(delta, SumDelta):
        parts = [part for part in delta.parts if part.changes_weight]
        if not parts or not all(isinstance(part, _PRODUCTS) for part in parts):
            return None
        return parts[0] if len(parts) == 1 else delta
    return delta if isinstance(delta, _PRODUCTS) else None


def decompose(
    adapter: Adapter, paths: Sequence[str], compute: Compute, rows: BaseRows | None
) -> list[ResizeLayer]:
    """Return the layers at ``paths`` with their spectra.

    Args:
        adapter: the whole.
        paths: from ``find_resizable``.
        compute: device and threads.
        rows: where the base keeps their weights; DoRA needs it.

    Raises:
        UnsupportedError: DoRA without a base.
        NonFiniteError: naming the layers.
    """
    decomposed = [path for path in paths if isinstance(adapter.layers[path], DoRA)]
    if decomposed and rows is None:
        raise UnsupportedError(
            f"{_listed(decomposed)}: what a DoRA layer loses depends on the base weight",
            hint="give the model it was trained on with --base",
        )
    gained: dict[str, GainedChange] = {}
    changes: dict[str, AdditiveDelta] = {}
    for path in paths:
        delta = adapter.layers[path]
        if isinstance(delta, DoRA) and rows is not None:
            gained[path] = gained_change(delta, rows.weight(path))
            changes[path] = gained[path].change
        else:
            change = _product(delta)
            assert change is not None
            changes[path] = change
    spectra = spectra_of_layers(changes, compute)
    return [
        ResizeLayer(path, adapter.layers[path], changes[path], spectra[path], gained.get(path))
        for path in paths
    ]


def candidate(
    layer: ResizeLayer, dtype: torch.dtype | None, norms: Mapping[str, float]
) -> Candidate:
    """Return what rank rules may know of a layer; ``norms`` are those of base weights."""
    stacked = isinstance(layer.change, ExpertLoRA)
    shape = layer.old.weight_shape
    sides = (shape[1], shape[2]) if stacked else matrix_shape(layer.change)
    kernel = () if stacked else shape[2:]
    stored = dtype or main_dtype(_stored(layer))
    return Candidate(
        layer.spectrum.values,
        sides,
        is_convolution=any(size > 1 for size in kernel),
        has_kernel=bool(kernel),
        scale=layer.spectrum.scale,
        cost=float(sum(sides) * stored.itemsize * (shape[0] if stacked else 1)),
        weight=norms.get(layer.path, 1.0),
        together=_attention(layer),
    )


def _stored(layer: ResizeLayer) -> AdditiveDelta:
    return layer.old.inner if isinstance(layer.old, DoRA) else layer.change


def _attention(layer: ResizeLayer) -> str | None:
    """Return the attention whose two layers PEFT configures as one."""
    role = getattr(_inner(layer.old), "role", None)
    if role not in ("attention_in", "attention_out"):
        return None
    return layer.path.removesuffix(".out_proj") if role == "attention_out" else layer.path


def resize_layers(
    layers: Sequence[ResizeLayer],
    ranks: Sequence[int],
    compute: Compute,
    *,
    rows: BaseRows | None = None,
    dtype: torch.dtype | None = None,
    balanced: bool = True,
) -> list[Resized]:
    """Return every layer at its rank, in order.

    Raises NonFiniteError or UnsupportedError for values that the dtype cannot hold.
    """

    def one(pair: tuple[ResizeLayer, int]) -> Resized:
        layer, rank = pair
        if isinstance(layer.old, DoRA):
            return _resized_dora(layer, rank, rows, dtype, balanced)
        new = resized_delta(layer.spectrum, rank, dtype=dtype, balanced=balanced)
        _check_values(layer, new)
        error = squared_error(layer.spectrum, new)
        return Resized(layer, _put_back(layer, new), rank, _retained(layer, rank), error)

    return list(in_threads(one, zip(layers, ranks, strict=True), compute))


def _resized_dora(
    layer: ResizeLayer, rank: int, rows: BaseRows | None, dtype: torch.dtype | None, balanced: bool
) -> Resized:
    assert isinstance(layer.old, DoRA)
    assert layer.gained is not None
    assert rows is not None
    weight = rows.weight(layer.path)
    new = resized_dora(
        layer.old, layer.gained, layer.spectrum, weight, rank, dtype=dtype, balanced=balanced
    )
    _check_values(layer, new)
    error = adapted_error(layer.old, new, weight)
    return Resized(layer, new, rank, _retained(layer, rank), error)


def _retained(layer: ResizeLayer, rank: int) -> float:
    return retained_energy(layer.spectrum.values, rank)


def _put_back(layer: ResizeLayer, new: AdditiveDelta) -> LayerDelta:
    if not isinstance(layer.old, SumDelta) or layer.change is layer.old:
        return new
    parts = tuple(new if part is layer.change else part for part in layer.old.parts)
    return replace(layer.old, parts=parts)


def _check_values(layer: ResizeLayer, new: LayerDelta) -> None:
    """Raise NonFiniteError or UnsupportedError for values that the dtype cannot hold."""
    for tensor in new.tensors().values():
        if not is_finite(tensor):
            raise NonFiniteError(
                f"{layer.path}: a value of the resized layer is beyond {tensor.dtype}",
                hint="use --dtype bf16 or fp32",
            )
    if new.is_zero and layer.energy > 0:
        raise UnsupportedError(
            f"{layer.path}: the values of the resized layer are all 0 in the float type of the "
            "output",
            hint="use --dtype bf16 or fp32",
        )


def blank_layer(layer: ResizeLayer, rank: int, dtype: torch.dtype | None) -> LayerDelta:
    """Return zeros of the shape, alpha and dtype that the layer will have at a rank."""
    stored = dtype or main_dtype(_stored(layer))
    inner = _blank_product(layer, rank, stored)
    if isinstance(layer.old, DoRA):
        return replace(layer.old, inner=inner)
    return _put_back(layer, inner)


def _blank_product(layer: ResizeLayer, rank: int, dtype: torch.dtype) -> AdditiveDelta:
    zeros: Callable[..., Tensor] = torch.zeros
    alpha = (layer.spectrum.scale or 1.0) * rank
    if isinstance(layer.change, ExpertLoRA):
        count, out, inner = layer.change.weight_shape
        down, up = zeros(count, rank, inner, dtype=dtype), zeros(count, out, rank, dtype=dtype)
        return replace(layer.change, down=down, up=up, alpha=alpha)
    out, *rest = layer.old.weight_shape
    old = _inner(layer.old)
    bias, role = (old.bias, old.role) if isinstance(old, LoRA) else (None, "linear")
    if not isinstance(old, LoRA) and layer.change is old and old.bias_change is not None:
        bias = zeros(out)
    down = zeros(rank, *rest, dtype=dtype)
    return LoRA(down, zeros(out, rank, *[1] * (len(rest) - 1), dtype=dtype), alpha, bias, role)
