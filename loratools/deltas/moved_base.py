"""Adapters whose training moved the base: the start they were given is subtracted again.

W' = W − start(W) + ΔW, where start(W) is what the initialisation took out of W:
  * ``pissa``: the rank-r truncated SVD of W (Meng et al., arXiv:2404.02948);
  * ``olora``: scale · Q_r R_r of the QR decomposition (Büyükakyüz, arXiv:2406.01775);
  * ``kasa``: the r smallest singular components (Wang et al., arXiv:2412.06071).
Signs and the sharing of singular values between the two factors cancel in the product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loratools.deltas.base import LayerDelta, RowFold, accumulate
from loratools.deltas.lora import LoRA

_IRRECOVERABLE: Mapping[str, str] = {
    "pissa_niter": "it used a randomised SVD whose random state is not recorded",
    "corda": "it needs the covariance data of the training run",
    "lora_ga": "it needs the gradients of the training run",
    "loftq": "the base was requantised around the adapter",
}


@dataclass(frozen=True, slots=True, eq=False)
class MovedBase(LayerDelta):
    """A LoRA trained on a base from which its initial product had been taken out.

    Attributes:
        lora: the trained factors.
        start: which initialisation, and so which product of W to take out; ``corda``, ``loftq``,
            ``lora_ga`` and ``pissa_niter_N`` are known words whose product cannot be recomputed.
    """

    kind: ClassVar[str] = "moved_base"

    lora: LoRA
    start: str

    @property
    def rank(self) -> int:
        """Rank of the LoRA and of the part of W that was taken out."""
        return self.lora.rank

    @property
    def alpha(self) -> float:
        """Alpha of the LoRA."""
        return self.lora.alpha

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.lora.weight_shape

    @property
    def bias_change(self) -> Tensor | None:
        return self.lora.bias_change

    @property
    def obstacle(self) -> str | None:
        if self.start in _START:
            return None
        known = (text for word, text in _IRRECOVERABLE.items() if self.start.startswith(word))
        reason = next(known, "loratools does not know what it took out")
        return f"the initialisation {self.start!r} moved the base weights, and {reason}"

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        product = self.lora.row_fold(strength, transposed=transposed, device=device)
        return _MovedFold(product, self, strength, transposed)


class _MovedFold(RowFold):
    reach = "whole"

    def __init__(
        self, product: RowFold, delta: MovedBase, strength: float, transposed: bool
    ) -> None:
        self.product = product
        self.delta = delta
        self.strength = strength
        self.transposed = transposed

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        matrix = weight.T if self.transposed else weight
        taken = _START[self.delta.start](matrix, self.delta.lora)
        moved = taken.T if self.transposed else taken
        accumulate(change, moved * -self.strength, first=first)
        self.product.add_change(change, weight, start, first=False)


def _pissa_start(weight: Tensor, lora: LoRA) -> Tensor:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    start: Tensor = (left[:, : lora.rank] * values[: lora.rank]) @ right[: lora.rank]
    return start


def _kasa_start(weight: Tensor, lora: LoRA) -> Tensor:
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    kept = values.shape[0] - lora.rank
    start: Tensor = (left[:, kept:] * values[kept:]) @ right[kept:]
    return start


def _olora_start(weight: Tensor, lora: LoRA) -> Tensor:
    # Q's first r columns depend on W's first r columns alone; R_r = Q_rᵀ W.
    basis, _ = torch.linalg.qr(weight[:, : lora.rank])
    start: Tensor = (basis @ (basis.T @ weight)) * lora.scale
    return start


_START: Mapping[str, Callable[[Tensor, LoRA], Tensor]] = {
    "pissa": _pissa_start,
    "olora": _olora_start,
    "kasa": _kasa_start,
}
