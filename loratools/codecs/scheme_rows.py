"""One row for each way to store a quantised weight: how it is found, and what it is."""

from __future__ import annotations

from loratools.codecs.scheme_bnb import BNB_SCHEMES
from loratools.codecs.scheme_compressed import COMPRESSED_SCHEMES
from loratools.codecs.scheme_floats import FLOAT_SCHEMES
from loratools.codecs.scheme_ints import INT_SCHEMES
from loratools.codecs.scheme_records import Scheme
from loratools.codecs.scheme_torchao import TORCHAO_SCHEMES

SCHEMES: tuple[Scheme, ...] = (
    *BNB_SCHEMES,
    *COMPRESSED_SCHEMES,
    *INT_SCHEMES,
    *FLOAT_SCHEMES,
    *TORCHAO_SCHEMES,
)
"""In order of trial: the first row that a module fits is its scheme."""
