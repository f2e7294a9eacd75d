"""Adapter-aware rounding of GGUF tensors whose blocks run over the ends of rows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools.codecs.ggml import GGML_TYPES
from loratools.codecs.ggml_grids import GGML_GRIDS
from loratools.merge import merge_into_base
from loratools.streaming import blocks
from loratools.tensorfiles.gguf import read_gguf_header

from .test_gguf_unmerge import FOLDED, SDXL, write_sdxl


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "IQ4_NL", "MXFP4"])
def test_a_grid_in_other_rows_stands_for_the_same(kind: str) -> None:
    grids, elements = GGML_GRIDS[kind], GGML_TYPES[kind].codec.elements
    raw = GGML_TYPES[kind].codec.encode(torch.randn(1, 96 * elements))
    codes, grid = grids.read(raw)
    for columns in (48, 96, 3 * elements):
        found = grid.in_rows_of(columns).values(codes.view(-1, columns))
        assert torch.equal(found.flatten(), grid.values(codes).flatten())
    # Any other codes too: the values of each weight by its own scale.
    other = torch.randint(len(grid.levels), codes.shape).to(torch.uint8)
    assert torch.equal(grid.in_rows_of(48).values(other.view(-1, 48)).view(1, -1),
                       grid.values(other))  # fmt: skip


def write_ink(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Write a kohya file for the folded tensors; returns float64 factors (out, 4), (4, in·k·k)."""
    factors, found = {}, {}
    for name in FOLDED:
        out, *inner = SDXL[name]
        module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        up, down = 3e-3 * torch.randn(out, 4, *[1] * (len(inner) - 1)), torch.randn(4, *inner)
        factors |= {f"{module}.lora_up.weight": up, f"{module}.lora_down.weight": down}
        factors[f"{module}.alpha"] = torch.tensor(4.0)
        found[name] = (up.double().flatten(1), down.double().flatten(1))
    save_file(factors, path)
    return found


def raw_of(path: Path, name: str) -> Tensor:
    tensor = read_gguf_header(path).tensors[name]
    data = path.read_bytes()[tensor.start : tensor.stop]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(tensor.rows, -1)


def test_the_error_avoids_what_the_adapter_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The larger weight in two blocks, the second of which ends with the weight.
    monkeypatch.setitem(blocks._SHAPED_BLOCK, "cpu", 1 << 20)
    base, ink = tmp_path / "unet.gguf", tmp_path / "ink.safetensors"
    meant, factors = write_sdxl(base), write_ink(ink)
    codec, grids, inside = GGML_TYPES["Q4_K"].codec, GGML_GRIDS["Q4_K"], {}
    for rounding in ("nearest", "adapter-aware"):
        out = tmp_path / f"{rounding}.gguf"
        report = merge_into_base(base, ink, out, rounding=rounding)
        for item in report.items:
            name = item["tensor"]
            up, down = factors[name]
            change = up @ down
            raw = raw_of(out, name)
            made = codec.decode(raw).double().view(change.shape)
            made -= meant[name].double().view(change.shape)
            basis = torch.linalg.qr(down.T).Q
            found = float(((made - change) @ basis).norm() / (change @ basis).norm())
            assert item["subspace_error"] == pytest.approx(found, rel=1e-2, abs=1e-3)
            share = float((made * change).sum() / change.square().sum())
            assert item["retained"] == pytest.approx(share, abs=2e-3)
            inside[rounding, name] = found
            if rounding == "adapter-aware":
                (_, before), (_, after) = (grids.read(r) for r in (raw_of(base, name), raw))
                assert torch.equal(before.scale, after.scale)
                assert share > 0.97
    for name in factors:
        assert inside["adapter-aware", name] < 0.1 * inside["nearest", name]
