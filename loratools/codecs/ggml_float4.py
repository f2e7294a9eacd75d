"""MXFP4 and NVFP4 in GGUF: 4-bit floats (E2M1) with a small scale for every 32 or 16 of them.

Unlike in safetensors (``float4``) element j of a group shares a byte with the element half a group
on, and the table holds twice the values while scales stand for half of theirs.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from loratools.codecs.block import BlockCodec
from loratools.codecs.exact import divide
from loratools.codecs.ggml_bits import join_bits, require_finite, split_bits

DOUBLED = (0, 1, 2, 3, 4, 6, 8, 12)
"""Twice the magnitudes of E2M1; codes from 8 on are the negatives."""

_LARGEST_UE4M3 = 0x7E
"""448, the largest finite E4M3."""


def _levels(raw: Tensor) -> Tensor:
    """Return (n, 2k) float32 table values of (n, k) bytes, all low nibbles first."""
    table = torch.tensor([*DOUBLED, *(-level for level in DOUBLED)], device=raw.device).float()
    return table[split_bits(raw, 4).flatten(-2).int()]


def _nearest(values: Tensor, unit: Tensor) -> Tensor:
    """Return the codes, uint8, of the table values times ``unit`` nearest to ``values``.

    Of two equally near ones the smaller in magnitude. The products with the middles between levels
    are exact, so that the comparisons are.
    """
    size = values.abs().mul_(2)
    middles = [float(low + high) for low, high in pairwise(DOUBLED)]
    codes = sum((size > middle * unit).to(torch.uint8) for middle in middles)
    assert isinstance(codes, Tensor)
    return (codes | ((values < 0) & (codes > 0)).to(torch.uint8) << 3).masked_fill_(unit == 0, 0)


def half_power(exponent: Tensor) -> Tensor:
    """Return 2^(e − 128), float32, of uint8 e (E8M0 halved)."""
    wide = exponent.int()
    return torch.where(wide < 2, 0x200000 << wide, (wide - 1) << 23).view(torch.float32)


def _decode_mxfp4(raw: Tensor) -> Tensor:
    return _levels(raw[:, 1:]).mul_(half_power(raw[:, :1]))


def _encode_mxfp4(values: Tensor) -> Tensor:
    largest = values.abs().amax(-1, keepdim=True)
    require_finite(largest)
    # A float32 logarithm: just below a power of two it rounds up to the next integer.
    exponent = largest.double().log2().float().floor() + 125
    # Below 2⁻¹²⁵ the exponent wraps around, as the reference's conversion to a byte does.
    byte = torch.where(largest > 0, exponent, 0.0).to(torch.int32).bitwise_and_(255).to(torch.uint8)
    codes = _nearest(values, half_power(byte))
    return torch.cat([byte, join_bits(codes.split(16, -1), 4)], -1)


def _half_ue4m3(raw: Tensor) -> Tensor:
    """Return half the values, float32, of unsigned E4M3 bytes; 0x7F counts as 0."""
    exponent, mantissa = (raw >> 3 & 15).int(), (raw & 7).float()
    subnormal = mantissa * 2.0**-10
    normal = torch.ldexp(mantissa / 8 + 1, exponent - 8)
    return torch.where(exponent == 0, subnormal, normal).masked_fill_(raw == 0x7F, 0)


def _to_ue4m3(values: Tensor) -> Tensor:
    """Return the unsigned E4M3 bytes of float32 ≥ 0, half away from zero."""
    values = values.clamp(max=448)
    subnormal = (values * 512 + 0.5).to(torch.uint8).clamp_(max=7)
    # Adding half a unit to the bits of a float32 carries into its exponent where it must.
    bits = (values.contiguous().view(torch.int32) + (1 << 19) >> 20) - (120 << 3)
    # ggml takes every number from 256 on for the largest.
    normal = torch.where(bits >= 15 << 3, _LARGEST_UE4M3, bits).to(torch.uint8)
    return torch.where(values < 2.0**-6, subnormal, normal)


def _decode_nvfp4(raw: Tensor) -> Tensor:
    levels = _levels(raw[:, 4:].reshape(-1, 8)).view(-1, 4, 16)
    return (levels * _half_ue4m3(raw[:, :4]).unsqueeze(-1)).flatten(1)


def _encode_nvfp4(values: Tensor) -> Tensor:
    groups = values.view(-1, 4, 16)
    largest = groups.abs().amax(-1)
    require_finite(largest)
    scales = _to_ue4m3(divide(largest, 6.0))
    codes = _nearest(groups, _half_ue4m3(scales).unsqueeze(-1))
    return torch.cat([scales, join_bits(codes.split(8, -1), 4).flatten(1)], -1)


MXFP4 = BlockCodec("MXFP4", 32, 17, _decode_mxfp4, _encode_mxfp4)
NVFP4 = BlockCodec("NVFP4", 64, 36, _decode_nvfp4, _encode_nvfp4)
