"""GGUF block codecs against gguf-py, and what holds for every codec.

Byte-for-byte agreement with llama.cpp's own library is checked in ``tests/peers/test_ggml_codecs``.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import _type_traits, dequantize, quantize

from loratools.codecs import ggml_k_affine, ggml_search, ggml_signed_search
from loratools.codecs.block import BlockCodec
from loratools.codecs.ggml import GGML_BY_ID, GGML_TYPES, find_ggml_type
from loratools.errors import CorruptFileError, InputError, NonFiniteError, UnsupportedError
from tests.ggml_blocks import ROW, Rows, edge_cases, random_rows

CODECS = {name: row.codec for name, row in GGML_TYPES.items()}
WRITTEN = [name for name, codec in CODECS.items() if codec.can_encode]
READ_ONLY = [name for name in CODECS if name not in WRITTEN]
K_QUANTS = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
# gguf-py quantises these; its rounding of tiny blocks differs from C's, which is the reference.
PEERS = ["BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"]
IDEMPOTENT = ["F32", "F16", "BF16", "Q4_0", "Q5_0", "Q8_0", "MXFP4", "TQ1_0", "TQ2_0"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def encode(codec: BlockCodec, rows: Rows) -> Rows:
    return codec.encode(torch.from_numpy(rows)).numpy()


def decode_by_gguf(name: str, raw: Rows) -> Rows:
    with np.errstate(all="ignore"):
        return dequantize(raw, GGMLQuantizationType[name]).astype(np.float32)


def same(left: Rows, right: Rows) -> bool:
    return np.array_equal(left, right, equal_nan=True)


def test_every_type_of_gguf_py_has_a_codec() -> None:
    known = {GGMLQuantizationType(kind).name for kind in _type_traits} | {"F32", "F16"}
    assert known <= set(CODECS)


@pytest.mark.parametrize("name", CODECS)
def test_sizes_and_numbers_are_gguf_py_s(name: str) -> None:
    row = GGML_TYPES[name]
    kind = GGMLQuantizationType[name]
    assert (row.id, row.codec.elements, row.codec.bytes) == (kind, *GGML_QUANT_SIZES[kind])
    assert GGML_BY_ID[row.id] is row
    assert row.name == name


@pytest.mark.parametrize("name", CODECS)
def test_decodes_any_bytes_as_gguf_py(name: str) -> None:
    codec = CODECS[name]
    shape = (5, ROW // codec.elements * codec.bytes)
    raw = np.random.default_rng(3).integers(0, 256, shape, dtype=np.uint8)
    assert same(codec.decode(torch.from_numpy(raw)).numpy(), decode_by_gguf(name, raw))


@pytest.mark.parametrize("name", PEERS)
def test_encodes_as_gguf_py(name: str) -> None:
    rows = random_rows(16)
    expected = quantize(rows, GGMLQuantizationType[name])
    assert np.array_equal(encode(CODECS[name], rows), expected)


@pytest.mark.parametrize("name", WRITTEN)
def test_rows_are_independent(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(6)
    whole = encode(CODECS[name], rows)
    assert np.array_equal(whole, np.concatenate([encode(CODECS[name], row[None]) for row in rows]))
    assert np.array_equal(whole.reshape(2, 3, -1), encode(CODECS[name], rows.reshape(2, 3, -1)))
    monkeypatch.setattr("loratools.codecs.block.CPU_ELEMENTS", 3 * CODECS[name].elements)
    assert np.array_equal(whole, encode(CODECS[name], rows))


@pytest.mark.parametrize("name", WRITTEN)
def test_input_is_left_alone_and_may_be_strided(name: str) -> None:
    rows = torch.from_numpy(random_rows(4))
    before = rows.clone()
    wide = torch.stack([rows, rows], 1)[:, 1]
    assert not wide.is_contiguous()
    assert torch.equal(CODECS[name].encode(wide), CODECS[name].encode(rows))
    assert torch.equal(rows, before)


@pytest.mark.parametrize("name", CODECS)
def test_no_rows_at_all(name: str) -> None:
    codec = CODECS[name]
    assert codec.decode(torch.empty(0, 2 * codec.bytes, dtype=torch.uint8)).shape == (
        0,
        2 * codec.elements,
    )
    if codec.can_encode:
        raw = codec.encode(torch.empty(3, 0, 2 * codec.elements))
        assert raw.shape == (3, 0, 2 * codec.bytes)


@pytest.mark.parametrize("name", WRITTEN)
def test_error_is_what_the_type_s_bits_allow(name: str) -> None:
    """Relative error of N(0, σ) weights, a little above the figures of a fresh quantisation."""
    allowed = {"F32": 0, "F16": 3e-4, "BF16": 2e-3, "Q8_0": 0.006, "Q6_K": 0.019, "Q5_K": 0.038}
    allowed |= {"Q5_0": 0.046, "Q5_1": 0.041, "Q4_K": 0.075, "Q4_0": 0.09, "Q4_1": 0.082}
    allowed |= {"IQ4_NL": 0.08, "IQ4_XS": 0.081, "NVFP4": 0.107, "MXFP4": 0.118, "Q3_K": 0.158}
    allowed |= {"Q2_K": 0.31, "TQ1_0": 1.0, "TQ2_0": 1.0}
    rows = random_rows(32)
    decoded = CODECS[name].decode(CODECS[name].encode(torch.from_numpy(rows))).numpy()
    assert np.linalg.norm(decoded - rows) / np.linalg.norm(rows) <= allowed[name]


@pytest.mark.parametrize("name", IDEMPOTENT)
def test_encoding_is_idempotent(name: str) -> None:
    """Decoded weights have their own bytes again.

    Not so for Q4_1 and Q5_1, whose minimum and maximum need not both be used and are rounded anew,
    nor for the searched types: K-quants, IQ4 and NVFP4 choose other scales for decoded weights.
    """
    codec = CODECS[name]
    raw = codec.encode(torch.from_numpy(random_rows(64)))
    assert torch.equal(codec.encode(codec.decode(raw)), raw)


@pytest.mark.parametrize("name", K_QUANTS)
def test_encoding_again_moves_little(name: str) -> None:
    codec = CODECS[name]
    first = codec.decode(codec.encode(torch.from_numpy(random_rows(64))))
    again = codec.decode(codec.encode(first))
    original = torch.from_numpy(random_rows(64))
    assert (again - first).norm() < 0.5 * (first - original).norm()


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_refuses_what_is_not_finite(name: str, value: float) -> None:
    rows = torch.from_numpy(random_rows(2))
    rows[1, 300] = value
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        CODECS[name].encode(rows)


@pytest.mark.parametrize("name", ["F16", "Q8_0", "Q4_K", "Q6_K", "TQ2_0", "IQ4_XS"])
def test_refuses_scales_beyond_float16(name: str) -> None:
    with pytest.raises(NonFiniteError, match="too large"):
        CODECS[name].encode(torch.full((1, ROW), 1e9))


@pytest.mark.parametrize("name", [name for name in WRITTEN if CODECS[name].elements > 1])
def test_refuses_rows_that_are_not_whole_blocks(name: str) -> None:
    with pytest.raises(InputError, match=f"{name} takes rows of whole"):
        CODECS[name].encode(torch.zeros(2, CODECS[name].elements + 16))


@pytest.mark.parametrize("name", CODECS)
def test_refuses_bytes_that_are_not_whole_blocks(name: str) -> None:
    with pytest.raises(CorruptFileError, match="not whole"):
        CODECS[name].decode(torch.zeros(2, CODECS[name].bytes + 1, dtype=torch.uint8))


@pytest.mark.parametrize("name", READ_ONLY)
def test_what_is_read_only_names_larger_types(name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        CODECS[name].encode(torch.zeros(1, 256))
    assert "importance matrix" in str(caught.value.hint)
    offered = [other for other in WRITTEN if f" {other}" in str(caught.value.hint)]
    assert len(offered) >= 3
    assert all(
        CODECS[other].bytes * 256 / CODECS[other].elements > CODECS[name].bytes for other in offered
    )


def test_an_unknown_type_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UnsupportedError, match="type 9 cannot") as caught:
        find_ggml_type(9)
    assert "Q4_K" in str(caught.value.hint)
    assert find_ggml_type(12).name == "Q4_K"


@pytest.mark.parametrize("name", WRITTEN)
def test_other_devices_get_the_same_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path without numpy, which an accelerator takes, run on the CPU."""
    rows = np.concatenate([random_rows(2), *edge_cases().values()])
    expected = encode(CODECS[name], rows)
    for module in (ggml_search, ggml_signed_search, ggml_k_affine):
        monkeypatch.setattr(module, "as_column", lambda values: values)
    monkeypatch.setattr("loratools.codecs.columns.as_column", lambda values: values)
    monkeypatch.setattr("loratools.codecs.ggml_iq4.as_column", lambda values: values)
    assert np.array_equal(encode(CODECS[name], rows), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", WRITTEN)
def test_an_accelerator_gives_the_same_bytes(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows = np.concatenate([random_rows(64), *edge_cases().values()])
    raw = CODECS[name].encode(torch.from_numpy(rows).cuda())
    assert np.array_equal(raw.cpu().numpy(), encode(CODECS[name], rows))
    assert torch.equal(CODECS[name].decode(raw).cpu(), CODECS[name].decode(raw.cpu()))
