"""LoRA on a stack of experts: one product for each, one scale for all.

PEFT's ParamWrapper (``target_parameters``) on fused mixture-of-experts weights, (experts, out, in)
or (experts, in, out) as the base stores them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from loratools.deltas.base import AdditiveDelta, RowFold, accumulate
from loratools.deltas.lora import LoRA
from loratools.linalg.gram import product_norm


@dataclass(frozen=True, slots=True, eq=False)
class ExpertLoRA(AdditiveDelta):
    """Stacked low-rank products.

    Attributes:
        down: (experts, r, in).
        up: (experts, out, r).
        alpha: with ``scale`` = alpha / rank.
        flipped_if_square: when shapes do not tell, whether the base stores (experts, in, out).
    """

    kind: ClassVar[str] = "expert_lora"

    down: Tensor
    up: Tensor
    alpha: float
    flipped_if_square: bool = False

    @property
    def rank(self) -> int:
        """Rank of each expert's product."""
        return self.down.shape[1]

    @property
    def scale(self) -> float:
        """The factor on every up @ down."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(experts, out, in)."""
        return (self.up.shape[0], self.up.shape[1], self.down.shape[2])

    def expert(self, index: int) -> LoRA:
        """Return one expert's LoRA, in (out, in)."""
        return LoRA(self.down[index], self.up[index], self.alpha)

    def materialize(self) -> Tensor:
        product: Tensor = self.up.to(torch.float32) @ self.down.to(torch.float32)
        return product.mul_(self.scale)

    def scaled(self, factor: float) -> ExpertLoRA:
        return replace(self, alpha=self.alpha * factor)

    def norm(self) -> float:
        pairs = zip(self.up, self.down, strict=True)
        return abs(self.scale) * math.hypot(*(product_norm(up, down) for up, down in pairs))

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        up = self.up.to(device, torch.float32)
        down = self.down.to(device, torch.float32)
        if transposed:
            up, down = down.mT.contiguous(), up.mT.contiguous()
        return _StackFold(up * (self.scale * strength), down)


class _StackFold(RowFold):
    """Adds rows of stacked products; rows are counted through the stack, expert by expert."""

    leading = 2

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left = left
        self.right = right

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        each = self.left.shape[1]
        done = 0
        while done < len(change):
            expert, row = divmod(start + done, each)
            count = min(each - row, len(change) - done)
            product = self.left[expert, row : row + count] @ self.right[expert]
            accumulate(change[done : done + count], product, first=first)
            done += count
