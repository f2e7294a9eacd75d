"""GLoRA: ΔW = alpha/rank · (b_up b_down + W a_left a_right) (arXiv:2306.07967).

Of a convolution, a_left a_right acts on the input channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from loratools.deltas import rows
from loratools.deltas.base import LayerDelta, RowFold
from loratools.deltas.lora import LoRA
from loratools.deltas.tucker import TuckerLoRA


@dataclass(frozen=True, slots=True, eq=False)
class GLoRA(LayerDelta):
    """A low-rank product, and another one that the base weight is multiplied by.

    Attributes:
        a_left: (in, r[, 1...]).
        a_right: (r, in[, 1...]).
        b_up: (out, r[, 1...]).
        b_down: (r, in[, k...]).
        alpha: with ``scale`` = alpha / rank.
        mid: (r, r, k...), a core between b_up and a pointwise b_down, or None.
    """

    kind: ClassVar[str] = "glora"

    a_left: Tensor
    a_right: Tensor
    b_up: Tensor
    b_down: Tensor
    alpha: float
    mid: Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of rows of ``a_right``."""
        return self.a_right.shape[0]

    @property
    def scale(self) -> float:
        """The factor on the change."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.additive_part.weight_shape

    @property
    def additive_part(self) -> LoRA:
        """The b side, which does not depend on W."""
        if self.mid is not None:
            alpha = self.scale * self.b_down.shape[0]
            return TuckerLoRA(self.b_down, self.mid, self.b_up, alpha).low_rank()
        return LoRA(self.b_down, self.b_up, self.scale * self.b_down.shape[0])

    @property
    def is_zero(self) -> bool:
        still = rows.is_zero(self.a_left, self.a_right)
        return self.alpha == 0 or (still and rows.is_zero(self.b_up, self.b_down, self.mid))

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        added = self.additive_part.row_fold(strength, transposed=transposed, device=device)
        left = self.a_left.to(device, torch.float32).flatten(1) * (self.scale * strength)
        right = self.a_right.to(device, torch.float32).flatten(1)
        fold = _StoredInputFold if transposed else _StoredOutputFold
        return fold(added, left, right)

    def reshaped(self, weight_shape: Sequence[int]) -> GLoRA:
        plain = self.additive_part.reshaped(weight_shape)
        if len(weight_shape) < 2 or weight_shape[1] != self.a_left.shape[0]:
            raise self.misfit(weight_shape)
        if plain.weight_shape == self.weight_shape:
            return self
        return replace(self, b_up=plain.up, b_down=plain.down, mid=None)

    def row_blocks(self, sizes: Sequence[int]) -> list[GLoRA]:
        return [replace(self, b_up=up) for up in self.b_up.split(list(sizes))]

    def rows_in_order(self, order: Tensor) -> GLoRA:
        return replace(self, b_up=rows.take(self.b_up, order))

    @classmethod
    def fused(cls, parts: Sequence[GLoRA | None], sizes: Sequence[int]) -> GLoRA:
        """Stack b_up over what is shared; raises UnsupportedError if the a sides differ."""
        present = [part for part in parts if part is not None]
        first = present[0]
        names = ("a_left", "a_right", "b_down", "mid")
        shared = all(
            rows.same(getattr(first, name), getattr(part, name))
            for part in present
            for name in names
        )
        if len(present) < len(parts) or not shared or len({part.scale for part in present}) > 1:
            raise first.refusal(
                "fused with others", "their changes of the input differ, and one weight has one"
            )
        return replace(first, b_up=rows.join([part.b_up for part in present]))


class _StoredOutputFold(RowFold):
    """Output channels are stored rows, and W a needs no other rows."""

    def __init__(self, added: RowFold, left: Tensor, right: Tensor) -> None:
        self.added = added
        self.left = left
        self.right = right

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        self.added.add_change(change, weight, start, first=first)
        kernels = weight.reshape(len(weight), len(self.left), -1)
        reduced = torch.einsum("oik,ir->ork", kernels, self.left)
        change.add_(torch.einsum("ork,rj->ojk", reduced, self.right).reshape(change.shape))


class _StoredInputFold(RowFold):
    """Input channels are stored rows: a_leftᵀ Wᵀ is summed over all of them first."""

    reach = "two-pass"

    def __init__(self, added: RowFold, left: Tensor, right: Tensor) -> None:
        self.added = added
        self.left = left
        self.right = right
        self.reduced: Tensor | None = None

    def measure(self, weight: Tensor, start: int) -> None:
        part = self.left[start : start + len(weight)].T @ weight
        self.reduced = part if self.reduced is None else self.reduced + part

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        assert self.reduced is not None
        self.added.add_change(change, weight, start, first=first)
        change.add_(self.right.T[start : start + len(change)] @ self.reduced)
