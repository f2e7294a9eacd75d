"""LoRA: ΔW = alpha/rank · up @ down (Hu et al., arXiv:2106.09685).

Shapes: ``down`` (r, in[, k...]) is PEFT's A; ``up`` (out, r[, 1...]) is PEFT's B. For an
embedding, in = number of tokens and out = dimension, and the base stores (in, out).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loratools.deltas.base import AdditiveDelta, RowFold
from loratools.linalg.gram import product_norm

Role = Literal["linear", "embedding", "attention_in", "attention_out"]
"""What kind of layer is adapted: a weight of its own, an embedding table, or one of the two
projections of ``nn.MultiheadAttention`` (``in_proj_weight``, ``out_proj``)."""


@dataclass(frozen=True, slots=True, eq=False)
class LoRA(AdditiveDelta):
    """A low-rank product with its scale.

    Attributes:
        down: (r, in[, k...]).
        up: (out, r[, 1...]).
        alpha: with ``scale`` = alpha / rank; rank-stabilised files have it resolved on reading.
        bias: (out,), a change of the layer's bias before scaling (PEFT's ``lora_bias``), or None.
        role: the kind of layer.
    """

    kind: ClassVar[str] = "lora"

    down: Tensor
    up: Tensor
    alpha: float
    bias: Tensor | None = None
    role: Role = "linear"

    @property
    def rank(self) -> int:
        """Number of rows of ``down``."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """The factor on up @ down."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], *self.down.shape[1:])

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return ("in_proj_weight",) if self.role == "attention_in" else ("weight", "")

    @property
    def stored_transposed(self) -> bool | None:
        return True if self.role == "embedding" else None

    @property
    def bias_change(self) -> Tensor | None:
        return None if self.bias is None else self.bias.to(torch.float32) * self.scale

    def tensors(self) -> Mapping[str, Tensor]:
        stored = {"down": self.down, "up": self.up}
        return stored if self.bias is None else {**stored, "bias": self.bias}

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> LoRA:
        bias = None if self.bias is None else function(self.bias)
        return replace(self, down=function(self.down), up=function(self.up), bias=bias)

    def factors(self, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """Return float32 (out, r) and (r, in·k...) whose product is ΔW / scale."""
        up = self.up.to(device, torch.float32).flatten(1)
        return up, self.down.to(device, torch.float32).flatten(1)

    def materialize(self) -> Tensor:
        up, down = self.factors()
        return (up @ down).mul_(self.scale).reshape(self.weight_shape)

    def scaled(self, factor: float) -> LoRA:
        return replace(self, alpha=self.alpha * factor)

    def low_rank(self) -> LoRA:
        return self

    def norm(self) -> float:
        return abs(self.scale) * product_norm(*self.factors())

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        up, down = self.factors(device)
        if transposed:
            up, down = down.T.contiguous(), up.T.contiguous()
        return ProductFold(up * (self.scale * strength), down)


class ProductFold(RowFold):
    """Adds rows of left @ right; (m, r) and (r, n), float32, scale and strength included."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left = left
        self.right = right

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        rows = self.left[start : start + change.shape[0]]
        torch.addmm(change, rows, self.right, beta=0.0 if first else 1.0, out=change)
