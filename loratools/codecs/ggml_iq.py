"""IQ1_S … IQ3_S: codes from lattice tables, read with gguf-py's tables and decoders.

Choosing such codes well needs to know how much each weight matters (an importance matrix), which no
checkpoint carries; so these types are read and not written.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import Tensor

from loratools.codecs.block import BlockCodec

_REMEDY = (
    "Encoding {name} needs an importance matrix. Choose a larger type that does not: {larger}."
)


def _decode(raw: Tensor, name: str) -> Tensor:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # a scale may be anything in a damaged file
        values = dequantize(raw.cpu().contiguous().numpy(), GGMLQuantizationType[name])
    return torch.from_numpy(values).to(raw.device)


def _read_only(name: str, size: int, larger: str) -> BlockCodec:
    remedy = _REMEDY.format(name=name, larger=larger)
    return BlockCodec(name, 256, size, partial(_decode, name=name), None, remedy)


IQ1_S = _read_only("IQ1_S", 50, "Q2_K, IQ4_XS or Q4_K")
IQ1_M = _read_only("IQ1_M", 56, "Q2_K, IQ4_XS or Q4_K")
IQ2_XXS = _read_only("IQ2_XXS", 66, "Q2_K, IQ4_XS or Q4_K")
IQ2_XS = _read_only("IQ2_XS", 74, "Q2_K, IQ4_XS or Q4_K")
IQ2_S = _read_only("IQ2_S", 82, "Q3_K, IQ4_XS or Q4_K")
IQ3_XXS = _read_only("IQ3_XXS", 98, "Q3_K, IQ4_XS or Q4_K")
IQ3_S = _read_only("IQ3_S", 110, "IQ4_XS, Q4_K or Q5_K")
