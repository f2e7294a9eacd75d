"""GGUF block codecs against llama.cpp's own library, byte by byte.

The library comes with pywhispercpp, a wheel that carries libggml-base: the reference quantiser,
compiled without fused multiply-adds. (A build that fuses them, -march=native or aarch64, differs
from it in about one Q4_K block of a hundred.)
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from importlib import metadata

import numpy as np
import pytest
import torch

from loratools.codecs.ggml import GGML_TYPES
from tests.ggml_blocks import ROW, Rows, edge_cases, random_rows

WRITTEN = [name for name, row in GGML_TYPES.items() if row.codec.can_encode and name != "F32"]
SEARCHED = ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]
IQ = [name for name in GGML_TYPES if name.startswith("IQ")]
Encode = Callable[[str, Rows], Rows]


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    try:
        files = metadata.files("pywhispercpp") or []
    except metadata.PackageNotFoundError:
        pytest.skip("pywhispercpp, which carries libggml-base, is not installed")
    found = [file for file in files if "libs/libggml-base" in str(file)]
    if not found:
        pytest.skip("this wheel of pywhispercpp carries no libggml-base")
    return ctypes.CDLL(str(found[0].locate()))


@pytest.fixture(scope="module")
def reference(ggml: ctypes.CDLL) -> Encode:
    """Return the reference quantiser: (type, rows) → bytes, without an importance matrix."""
    quantise = ggml.ggml_quantize_chunk
    quantise.restype = ctypes.c_size_t
    number, address = ctypes.c_int64, ctypes.c_void_p
    quantise.argtypes = [ctypes.c_int, address, address, number, number, number, address]

    def run(name: str, rows: Rows) -> Rows:
        row = GGML_TYPES[name]
        size = rows.shape[1] // row.codec.elements * row.codec.bytes
        raw = np.zeros((len(rows), size), dtype=np.uint8)
        pointers = rows.ctypes.data, raw.ctypes.data
        written = quantise(row.id, *pointers, 0, *rows.shape, None)
        assert written == raw.nbytes
        return raw

    return run


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def encode(name: str, rows: Rows) -> Rows:
    return GGML_TYPES[name].codec.encode(torch.from_numpy(rows)).numpy()


@pytest.mark.parametrize("name", SEARCHED)
def test_k_quants_are_the_reference_s_on_16k_blocks(name: str, reference: Encode) -> None:
    rows = random_rows(16384 * 256 // ROW, seed=7)
    assert np.array_equal(encode(name, rows), reference(name, rows))


@pytest.mark.parametrize("name", [name for name in WRITTEN if name not in SEARCHED])
def test_other_types_are_the_reference_s(name: str, reference: Encode) -> None:
    rows = random_rows(256, seed=8)
    assert np.array_equal(encode(name, rows), reference(name, rows))


@pytest.mark.parametrize("case", edge_cases())
@pytest.mark.parametrize("name", WRITTEN)
def test_edge_cases_are_the_reference_s(name: str, case: str, reference: Encode) -> None:
    rows = edge_cases()[case]
    assert np.array_equal(encode(name, rows), reference(name, rows))


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "Q4_0"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounded_weights_are_encoded_as_by_the_reference(
    name: str, dtype: torch.dtype, reference: Encode
) -> None:
    """Weights with few significant bits have many ties."""
    rows = torch.from_numpy(random_rows(512, seed=9)).to(dtype).float().numpy()
    assert np.array_equal(encode(name, rows), reference(name, rows))


@pytest.mark.parametrize("name", IQ)
def test_iq_types_are_decoded_as_by_the_reference(name: str, ggml: ctypes.CDLL) -> None:
    row = GGML_TYPES[name]
    shape = (8, ROW // row.codec.elements * row.codec.bytes)
    raw = np.random.default_rng(4).integers(0, 256, shape, dtype=np.uint8)
    expected = np.empty((8, ROW), dtype=np.float32)
    decode = getattr(ggml, f"dequantize_row_{name.lower()}")
    decode(
        ctypes.c_void_p(raw.ctypes.data),
        ctypes.c_void_p(expected.ctypes.data),
        ctypes.c_int64(expected.size),
    )
    decoded = row.codec.decode(torch.from_numpy(raw)).numpy()
    assert np.array_equal(decoded, expected, equal_nan=True)
