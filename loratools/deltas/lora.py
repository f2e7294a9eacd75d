"""LoRA: ΔW = alpha/rank · up @ down (Hu et al., arXiv:2106.09685).

Shapes: ``down`` (r, in[, k...]) is PEFT's A; ``up`` (out, r[, 1...]) is PEFT's B. For an
embedding, in = number of tokens and out = dimension, and the base stores (in, out).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loratools.deltas import rows
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

    @property
    def is_zero(self) -> bool:
        still = self.bias is None or rows.is_zero(self.bias)
        return still and (self.alpha == 0 or rows.is_zero(self.up, self.down))

    def factors(self, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """Return float32 (out, r) and (r, in·k...) whose product is ΔW / scale."""
        up = self.up.to(device, torch.float32).flatten(1)
        return up, self.down.to(device, torch.float32).flatten(1)

    def leading(self, rank: int) -> LoRA:
        """Return the adapter that DyLoRA (arXiv:2210.07558) trained at a smaller rank b.

        Training at rank b multiplied by (alpha/r)·√(r/b), so alpha becomes alpha·√(b/r). Raises
        UnsupportedError if there is no such rank.
        """
        if not 1 <= rank <= self.rank:
            raise self.refusal(
                f"cut to rank {rank}", f"it has rank {self.rank}", "choose a rank within its own"
            )
        alpha = self.alpha * math.sqrt(rank / self.rank)
        return replace(self, down=self.down[:rank], up=self.up[:, :rank], alpha=alpha)

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

    def reshaped(self, weight_shape: Sequence[int]) -> LoRA:
        if not self.is_same_matrix(weight_shape):
            raise self.misfit(weight_shape)
        out, *rest = weight_shape
        up = self.up.reshape(out, self.rank, *([1] * (len(rest) - 1)))
        return replace(self, down=self.down.reshape(self.rank, *rest), up=up)

    def row_blocks(self, sizes: Sequence[int]) -> list[LoRA]:
        """Share ``down``; where ``up`` is block-diagonal, give each block its own part of it."""
        ups = self.up.split(list(sizes))
        biases = [None] * len(sizes) if self.bias is None else self.bias.split(list(sizes))
        groups = rows.column_groups(self.up, sizes)
        if groups is None:
            return [replace(self, up=up, bias=b) for up, b in zip(ups, biases, strict=True)]
        # A block without columns of its own keeps one, which is zero there.
        own = [group or [0] for group in groups]
        return [
            replace(
                self,
                down=rows.take(self.down, group),
                up=rows.take(up, group, axis=1),
                alpha=self.scale * len(group),
                bias=bias,
            )
            for group, up, bias in zip(own, ups, biases, strict=True)
        ]

    def rows_in_order(self, order: Tensor) -> LoRA:
        bias = None if self.bias is None else rows.take(self.bias, order)
        return replace(self, up=rows.take(self.up, order), bias=bias)

    @classmethod
    def fused(cls, parts: Sequence[LoRA | None], sizes: Sequence[int]) -> LoRA:
        """Share what is one ``down``, stand the others side by side; scales that differ are folded.

        Rows of ``up`` then are float32, and alpha is the rank.
        """
        alike = _with_shared_downs(parts)
        owners = rows.shared_groups(rows.each(alike, _down))
        heads = [part for j, part in enumerate(alike) if part is not None and owners[j] == j]
        scale = rows.common_scale([part.scale for part in alike if part is not None])
        widths = [head.rank for head in heads]
        ups = rows.each(alike, lambda part: rows.times(part.up, part.scale / scale))
        biases = [
            None if p is None or p.bias is None else rows.times(p.bias, p.scale / scale)
            for p in alike
        ]
        return cls(
            rows.join([head.down for head in heads]),
            rows.spread_columns(ups, sizes, rows.places(owners), widths),
            scale * sum(widths),
            None if all(bias is None for bias in biases) else rows.stack_rows(biases, sizes),
            heads[0].role,
        )


def _down(lora: LoRA) -> tuple[Tensor]:
    return (lora.down,)


def _with_scaled_down(lora: LoRA) -> LoRA:
    return replace(lora, down=rows.times(lora.down, lora.scale), alpha=float(lora.rank))


def _with_shared_downs(parts: Sequence[LoRA | None]) -> Sequence[LoRA | None]:
    """Fold scales into ``down`` where that shows more of them to be one and the same."""
    if any(part is not None and part.bias is not None for part in parts):
        return parts
    folded = rows.each(parts, _with_scaled_down)
    stored, scaled = (
        len(set(rows.shared_groups(rows.each(choice, _down)))) for choice in (parts, folded)
    )
    return folded if scaled < stored else parts


class ProductFold(RowFold):
    """Adds rows of left @ right; (m, r) and (r, n), float32, scale and strength included."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self.left = left
        self.right = right

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        part = self.left[start : start + change.shape[0]]
        torch.addmm(change, part, self.right, beta=0.0 if first else 1.0, out=change)
