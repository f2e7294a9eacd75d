"""How two merged models differ: element by element, in units in the last place."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

ALLOWED_ULP = 1
ALLOWED_SHARE = 1e-4
"""Two orders of summation may round an element to either neighbour, on at most 0.01 % of them."""


@dataclass(frozen=True)
class Agreement:
    """Differences over the tensors that the adapter touches, and names held by one side only.

    ``by_ulp`` counts differing elements by distance in units in the last place; the key 99 stands
    for 99 and more. ``untouched_differ`` counts tensors without a delta that differ at all.
    """

    elements: int
    differing: int
    by_ulp: dict[int, int]
    untouched_differ: int
    only_in_one: list[str]
    dtypes_differ: list[str]

    @property
    def holds(self) -> bool:
        """True if the two models are the same up to one unit on at most 0.01 % of elements."""
        return (
            not (self.only_in_one or self.dtypes_differ or self.untouched_differ)
            and max(self.by_ulp, default=0) <= ALLOWED_ULP
            and self.differing <= ALLOWED_SHARE * self.elements
        )

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return {**asdict(self), "holds": self.holds}

    def __str__(self) -> str:
        histogram = ", ".join(f"{count} by {ulp}" for ulp, count in sorted(self.by_ulp.items()))
        share = self.differing / max(self.elements, 1)
        return (
            f"{self.differing} of {self.elements} elements differ ({share:.2e})"
            f"{'; units in the last place: ' + histogram if histogram else ''}"
            f"; untouched tensors that differ: {self.untouched_differ}"
            f"; names in one only: {len(self.only_in_one)}"
        )


def compare_models(left: Path, right: Path, base: Path) -> Agreement:
    """Compare two bfloat16 model folders; a tensor is touched if ``left`` differs from ``base``."""
    import torch

    mine, theirs, original = _files(left), _files(right), _files(base)
    elements = untouched_differ = 0
    by_ulp: Counter[int] = Counter()
    dtypes_differ: list[str] = []
    for name in sorted(mine.keys() & theirs.keys()):
        a, b = _load(mine[name], name), _load(theirs[name], name)
        if a.dtype != b.dtype or a.shape != b.shape:
            dtypes_differ.append(name)
        elif name in original and torch.equal(a, _load(original[name], name)):
            untouched_differ += not torch.equal(a, b)
        else:
            elements += a.numel()
            by_ulp.update(_distances(a, b))
    return Agreement(
        elements=elements,
        differing=sum(by_ulp.values()),
        by_ulp=dict(by_ulp),
        untouched_differ=untouched_differ,
        only_in_one=sorted(mine.keys() ^ theirs.keys()),
        dtypes_differ=dtypes_differ,
    )


def _distances(a: torch.Tensor, b: torch.Tensor) -> Counter[int]:
    """Count the differing elements of two bfloat16 tensors by their distance, 99 at most."""
    import torch

    bits = [tensor.flatten().view(torch.int16) for tensor in (a, b)]
    unequal = bits[0] != bits[1]
    left, right = (_ordered(tensor[unequal]) for tensor in bits)
    distances = (left - right).abs().clamp_(max=99)
    values, counts = distances.unique(return_counts=True)
    pairs = zip(values.tolist(), counts.tolist(), strict=True)
    return Counter({value: count for value, count in pairs if value})


def _ordered(bits: torch.Tensor) -> torch.Tensor:
    """Map sign-and-magnitude bit patterns to integers in the order of the numbers they spell."""
    wide = bits.int()
    return wide.where(wide >= 0, -(wide & 0x7FFF))


def _files(folder: Path) -> dict[str, Path]:
    """Return where each tensor of a model folder lies."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        return {name: folder / file for name, file in weight_map.items()}
    from safetensors import safe_open

    path = folder / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        return dict.fromkeys(file.keys(), path)


def _load(path: Path, name: str) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)
