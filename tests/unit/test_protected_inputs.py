"""The input directions that adapter-aware rounding protects, where adapters share some of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools.deltas import LoRA
from loratools.merge import merge_into_base
from loratools.planning.placement import Placement
from loratools.planning.subspaces import input_bases

from .packed.checkpoints import TOUCHED, write_base


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def placed(down: Tensor) -> Placement:
    return Placement("w", "m", LoRA(down, torch.randn(16, len(down)), 4.0), 1.0, 0)


def projector(rows: Tensor) -> Tensor:
    """Onto the span of the rows, in float64."""
    wide = rows.double()
    return torch.linalg.pinv(wide, rtol=1e-5) @ wide


DEPENDENT = {
    "the same twice": lambda a, b: [a, a, b],
    "multiples": lambda a, b: [a, -3.0 * a, b],
    "zeros first": lambda a, b: [torch.zeros(6, 64), b],
    "zeros between": lambda a, b: [torch.cat([a[:2], torch.zeros(2, 64), b])],
    "all but the same": lambda a, b: [a, a + 1e-9, b],
    "sums": lambda a, b: [a, a[:3] + a[3:], b],
}


@pytest.mark.parametrize("name", list(DEPENDENT))
def test_dependent_rows_lose_no_direction_of_the_others(name: str) -> None:
    downs = DEPENDENT[name](torch.randn(6, 64), torch.randn(4, 64))
    (basis,) = input_bases([placed(down) for down in downs], "cpu")
    wanted = projector(torch.cat(downs))
    assert basis.shape[1] == round(float(wanted.trace()))
    torch.testing.assert_close((basis @ basis.T).double(), wanted, rtol=0, atol=1e-5)


def test_directions_are_counted_and_not_rows() -> None:
    shared = torch.randn(4, 64)
    assert len(input_bases([placed(shared)] * 10, "cpu")) == 1
    assert input_bases([placed(torch.randn(4, 64)) for _ in range(10)], "cpu") == []


def test_a_change_of_nothing_but_zeros_is_rounded_like_any() -> None:
    (basis,) = input_bases([placed(torch.zeros(4, 64))], "cpu")
    assert basis.shape == (64, 0)


def write_lora(folder: Path, down: Tensor, up: Tensor) -> Path:
    names = {f"base_model.model.{TOUCHED}.lora_{x}.weight": t for x, t in (("A", down), ("B", up))}
    folder.mkdir()
    save_file(names, folder / "adapter_model.safetensors")
    rank = len(down)
    words = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(words))
    return folder


def test_an_adapter_in_two_halves_protects_what_it_does_whole(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "fp8 blocks")
    weight = base.cases[TOUCHED].weight
    size = (weight.rows, weight.columns)
    down = [torch.randn(8, size[1]) for _ in range(2)]
    up = [1e-4 * torch.randn(size[0], 8) for _ in range(2)]
    one, other = (write_lora(tmp_path / f"{i}", down[i], up[i]) for i in range(2))
    whole, halves = [(one, 1.0), (other, 1.0)], [(one, 0.5), (one, 0.5), (other, 1.0)]
    found = []
    for name, adapters in (("whole", whole), ("halves", halves)):
        merge_into_base(base.path, adapters, tmp_path / name, rounding="adapter-aware")
        made = base.stored(tmp_path / name, TOUCHED).decode(0, weight.rows).double()
        change = sum(u.double() @ d.double() for u, d in zip(up, down, strict=True))
        error = made - base.dense(TOUCHED) - change
        inside = error @ projector(down[1])
        found.append(float(inside.norm() / (change @ projector(down[1])).norm()))
    assert found[1] == pytest.approx(found[0], rel=0.1)
