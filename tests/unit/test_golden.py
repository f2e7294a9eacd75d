"""Golden files: loratools merges what PEFT wrote into the weights that PEFT made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from loratools.adapter_io import load_adapter, save_adapter
from loratools.errors import UnsupportedError
from loratools.merge import merge_into_base

GOLDEN = Path(__file__).parents[1] / "golden" / "peft"
REFUSABLE = {"dora_pissa"}
CASES = sorted(
    path.parent.name
    for path in GOLDEN.glob("*/expected.safetensors")
    if path.parent.name not in REFUSABLE
)

# PEFT rounds embeddings' and attention's changes to the base's dtype first; all bases but one are
# float32, where that is nothing. SVD and QR of another build of LAPACK may differ by this much.
ATOL = {"pissa": 2e-5, "olora": 2e-5, "kasa": 2e-5}
BITS = {torch.bfloat16: torch.int16}


def load_case(name: str) -> tuple[Path, dict[str, Tensor]]:
    """Return the base's file and the tensors that PEFT changed or added."""
    expected = GOLDEN / name / "expected.safetensors"
    with safe_open(expected, "pt") as file:
        base = file.metadata()["base"]
    return GOLDEN / "bases" / f"{base}.safetensors", load_file(expected)


def assert_as_peft(merged: Path, base: Path, expected: dict[str, Tensor], atol: float) -> None:
    """Assert that the touched tensors are PEFT's and all others the base's, bit for bit."""
    tensors, before = load_file(merged), load_file(base)
    assert set(tensors) == set(before) | set(expected)
    for name, tensor in tensors.items():
        wanted = expected.get(name, before.get(name))
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape), name
        if name not in expected:
            assert torch.equal(tensor.view(torch.uint8), wanted.view(torch.uint8)), name
        elif tensor.dtype in BITS:
            bits = (tensor.view(BITS[tensor.dtype]), wanted.view(BITS[tensor.dtype]))
            assert int((bits[0].int() - bits[1].int()).abs().max()) <= 1, name
        else:
            assert float((tensor - wanted).abs().max()) <= atol, name


def test_cases_are_there() -> None:
    assert len(CASES) >= 14
    size = sum(path.stat().st_size for path in GOLDEN.rglob("*") if path.is_file())
    assert size < 300_000


def test_versions_are_recorded() -> None:
    versions = json.loads((GOLDEN / "versions.json").read_text())
    assert versions["peft"] == "0.21.2"
    assert {"torch", "transformers", "safetensors"} <= versions.keys()


@pytest.mark.parametrize("case", sorted(REFUSABLE))
def test_refused_or_as_peft(case: str, tmp_path: Path) -> None:
    """A combination that cannot be folded is refused; it is never folded as something else."""
    base, expected = load_case(case)
    merged = tmp_path / "merged.safetensors"
    try:
        merge_into_base(base, GOLDEN / case, merged)
    except UnsupportedError as error:
        assert error.hint  # noqa: PT017 - one of two allowed outcomes
        assert not merged.exists()
    else:
        assert_as_peft(merged, base, expected, 2e-5)


@pytest.mark.parametrize("case", CASES)
def test_merged_as_peft(case: str, tmp_path: Path) -> None:
    base, expected = load_case(case)
    merged = tmp_path / "merged.safetensors"
    merge_into_base(base, GOLDEN / case, merged)
    assert_as_peft(merged, base, expected, ATOL.get(case, 1e-6))


@pytest.mark.parametrize("case", CASES)
def test_rewritten_merges_the_same(case: str, tmp_path: Path) -> None:
    """What loratools writes after reading PEFT's file means the same weights."""
    base, expected = load_case(case)
    save_adapter(load_adapter(GOLDEN / case), tmp_path / "again")
    merged = tmp_path / "merged.safetensors"
    merge_into_base(base, tmp_path / "again", merged)
    assert_as_peft(merged, base, expected, ATOL.get(case, 1e-6))
