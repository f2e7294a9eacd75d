"""Which way round a base stores its weights: as (out, in), or turned over."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from loratools.deltas import ExpertLoRA, LayerDelta
from loratools.keymaps.expert_rows import TRANSPOSED_TYPES
from loratools.keymaps.transformers_rows import (
    CONV1D_LEAVES,
    CONV1D_TYPES,
    TRANSPOSED_PARAMETERS,
)


@dataclass(frozen=True, slots=True, eq=False)
class Orientation:
    """What a checkpoint tells of how its weights lie.

    Attributes:
        shapes: tensor name → shape.
        model_types: ``model_type`` of the config and its sections; empty without a config.
    """

    shapes: Mapping[str, tuple[int, ...]]
    model_types: Collection[str]

    def turned(self, name: str, delta: LayerDelta) -> bool | None:
        """Return whether a tensor is ``delta``'s weight turned over; None if it fits neither way.

        Args:
            name: the base's name of the tensor.
            delta: its change, whose ``weight_shape`` is (..., out, in).
        """
        stored, wanted = _matrix_shape(self.shapes[name]), _matrix_shape(delta.weight_shape)
        stacked = isinstance(delta, ExpertLoRA)
        flippable = stacked or len(wanted) == 2
        flipped = (*wanted[:-2], wanted[-1], wanted[-2]) if flippable else None
        fits_straight, fits_flipped = stored == wanted, stored == flipped
        if delta.stored_transposed is True:
            fits_straight = False
        elif fits_flipped and not stacked and not self._may_flip(name):
            fits_flipped = False
        if fits_straight and fits_flipped:
            return self._is_conv1d(name) if not stacked else self._is_flipped_stack(delta)
        return fits_flipped if fits_straight or fits_flipped else None

    def _may_flip(self, name: str) -> bool:
        """Return whether a layer may store (in, out): Conv1D's, and parameters that stand alone."""
        leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
        return leaf in CONV1D_LEAVES or not name.endswith(".weight")

    def _is_flipped_stack(self, delta: LayerDelta) -> bool:
        old_axes = isinstance(delta, ExpertLoRA) and delta.flipped_if_square
        return old_axes or not TRANSPOSED_TYPES.isdisjoint(self.model_types)

    def _is_conv1d(self, name: str) -> bool:
        leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if leaf in TRANSPOSED_PARAMETERS and not name.endswith(".weight"):
            return True
        if leaf not in CONV1D_LEAVES:
            return False
        fused = self._fused_shapes()
        if not self.model_types:
            # Without a config, GPT-2's fused c_attn, stored (E, 3E), tells the layout.
            return any(columns == 3 * rows for rows, columns in fused)
        # mlx-lm turns it over.
        turned = any(rows == 3 * columns for rows, columns in fused)
        # A composite model (vit-gpt2) names its decoder's type in a section of its own.
        return not CONV1D_TYPES.isdisjoint(self.model_types) and not turned

    def _fused_shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of GPT-2's fused projections."""
        ends = "c_attn.weight"
        return [s for name, s in self.shapes.items() if name.endswith(ends) and len(s) == 2]


def _matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape without the trailing 1s of a pointwise convolution."""
    while len(shape) > 2 and shape[-1] == 1:
        shape = shape[:-1]
    return shape
