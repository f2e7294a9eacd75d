"""The dtype table against what the safetensors library and torch say."""

from __future__ import annotations

import json
import re
import struct

import pytest
import torch
from safetensors import SafetensorError, deserialize
from safetensors.torch import save

from loratools.errors import UnsupportedError
from loratools.tensorfiles.dtypes import DTYPES, FLOAT_WORDS, dtype_word, torch_dtype

WITHOUT_TORCH = {"F6_E2M3", "F6_E3M2"}


def one_tensor(dtype: str, nbytes: int) -> bytes:
    entry = {"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, nbytes]}}
    raw = json.dumps(entry).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(nbytes)


def test_words_are_those_of_the_library_in_its_order() -> None:
    with pytest.raises(SafetensorError) as refusal:
        deserialize(one_tensor("XX", 1))
    listed = str(refusal.value).partition("expected one of")[2]
    assert re.findall(r"`(\w+)`", listed) == list(DTYPES)


@pytest.mark.parametrize(("word", "bits"), DTYPES.items())
def test_width_is_that_of_the_library(word: str, bits: int) -> None:
    assert deserialize(one_tensor(word, bits))[0][1]["dtype"] == word
    with pytest.raises(SafetensorError):
        deserialize(one_tensor(word, bits + 1))


@pytest.mark.parametrize("word", sorted(DTYPES.keys() - WITHOUT_TORCH))
def test_torch_dtype_is_that_of_the_library(word: str) -> None:
    dtype = torch_dtype(word)
    assert dtype_word(dtype) == word
    tensor = torch.zeros(8 * dtype.itemsize, dtype=torch.uint8).view(dtype)
    assert deserialize(save({"a": tensor}))[0][1]["dtype"] == word


@pytest.mark.parametrize("word", sorted(WITHOUT_TORCH | {"nonsense", ""}))
def test_words_without_torch_dtype_are_refused(word: str) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(repr(word))):
        torch_dtype(word)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.quint8])
def test_torch_dtypes_without_word_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedError, match=re.escape(str(dtype))):
        dtype_word(dtype)


def test_float_words_are_torch_floats_of_two_bytes_and_more() -> None:
    floats = {
        word
        for word in DTYPES.keys() - WITHOUT_TORCH
        if torch_dtype(word).is_floating_point and torch_dtype(word).itemsize > 1
    }
    assert floats == FLOAT_WORDS
