"""Block types as codes on grids: the same weights as the decoder's, scales left alone."""

from __future__ import annotations

import pytest
import torch

from loratools.codecs.ggml import GGML_TYPES
from loratools.codecs.ggml_grids import GGML_GRIDS
from loratools.codecs.rounding import nearest_codes


@pytest.mark.parametrize("name", list(GGML_GRIDS))
def test_codes_on_the_grid_are_the_decoded_weights(name: str) -> None:
    torch.manual_seed(0)
    codec = GGML_TYPES[name].codec
    raw = codec.encode(torch.randn(6, 512) * torch.rand(6, 1))
    codes, grid = GGML_GRIDS[name].read(raw)
    torch.testing.assert_close(grid.values(codes), codec.decode(raw), rtol=1e-6, atol=1e-9)
    assert torch.equal(GGML_GRIDS[name].write(raw, codes), raw)


@pytest.mark.parametrize("name", list(GGML_GRIDS))
def test_other_codes_are_stored_beside_the_same_scales(name: str) -> None:
    torch.manual_seed(0)
    codec = GGML_TYPES[name].codec
    raw = codec.encode(torch.randn(6, 512))
    _, grid = GGML_GRIDS[name].read(raw)
    codes = torch.randint(0, len(grid.levels), (6, 512), dtype=torch.uint8)
    written = GGML_GRIDS[name].write(raw, codes)
    found, same = GGML_GRIDS[name].read(written)
    assert torch.equal(found, codes)
    assert torch.equal(same.scale, grid.scale)
    torch.testing.assert_close(codec.decode(written), grid.values(codes), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", list(GGML_GRIDS))
def test_what_is_on_the_grid_stays(name: str) -> None:
    torch.manual_seed(0)
    codec = GGML_TYPES[name].codec
    raw = codec.encode(torch.randn(6, 512))
    codes, grid = GGML_GRIDS[name].read(raw)
    again = nearest_codes(codec.decode(raw), grid)
    values = grid.values(again)
    torch.testing.assert_close(values, codec.decode(raw), rtol=1e-5, atol=1e-8)
    if float(grid.scale.abs().min()) > 0:
        assert torch.equal(again, codes)
