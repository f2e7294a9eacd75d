"""F32, F16 and BF16 as blocks of one weight."""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.codecs.block import BlockCodec
from loratools.codecs.ggml_bits import require_finite


def _decode(raw: Tensor, dtype: torch.dtype) -> Tensor:
    return raw.contiguous().view(dtype).float()


def _encode(values: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = values.to(dtype)
    require_finite(rounded)
    return rounded.contiguous().view(torch.uint8)


F32 = BlockCodec(
    "F32", 1, 4, lambda raw: _decode(raw, torch.float32), lambda x: _encode(x, torch.float32)
)
F16 = BlockCodec(
    "F16", 1, 2, lambda raw: _decode(raw, torch.float16), lambda x: _encode(x, torch.float16)
)
BF16 = BlockCodec(
    "BF16", 1, 2, lambda raw: _decode(raw, torch.bfloat16), lambda x: _encode(x, torch.bfloat16)
)
