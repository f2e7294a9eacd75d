"""Decoding by table: two 4-bit codes to two floats in one look-up per byte."""

from __future__ import annotations

import torch
from torch import Tensor


def look_up_pairs(packed: Tensor, table: Tensor, *, high_first: bool) -> Tensor:
    """Return the values (2n,) float32 of the nibbles of ``packed``, byte by byte.

    Args:
        packed: (n,) uint8, contiguous.
        table: (16,) float32.
        high_first: whether the high nibble comes first.
    """
    byte = torch.arange(256, device=table.device)
    nibbles = [byte >> 4, byte & 15] if high_first else [byte & 15, byte >> 4]
    pairs = torch.stack([table[nibble] for nibble in nibbles], dim=1)
    # A pair of floats moves as one 64-bit word.
    words = pairs.contiguous().view(torch.int64).flatten()
    return take(words, packed).view(torch.float32)


def take(words: Tensor, index: Tensor) -> Tensor:
    """Return ``words[index]`` for a (256,) table of 64-bit words and (n,) uint8 indices."""
    if index.device.type != "cpu":
        return words.to(index.device)[index.long()]
    found = torch.empty(len(index), dtype=words.dtype)
    # numpy's take is several times faster than torch's indexing for narrow indices.
    words.numpy().take(index.numpy(), out=found.numpy(), mode="clip")
    return found
