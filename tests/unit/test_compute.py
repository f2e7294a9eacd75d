"""Devices by name."""

from __future__ import annotations

import pytest

from loratools.compute import resolve_compute
from loratools.errors import OptionError


@pytest.mark.parametrize("word", ["cpu", "cpu:0"])
def test_the_one_processor(word: str) -> None:
    """torch's own spelling of the first processor means the processor."""
    assert resolve_compute(word).device == "cpu"


@pytest.mark.parametrize("word", ["cpu:1", "cpu:", "mps:1", "cuda:x", "gpu"])
def test_unknown(word: str) -> None:
    with pytest.raises(OptionError):
        resolve_compute(word)
