"""Whether tensor names are an adapter's or a model's, where the wrong one of them was given."""

from __future__ import annotations

import re
from collections.abc import Collection

_ADAPTER = re.compile(
    r"(?:^|[._])(?:lora_(?:A|B|a|b|up|down|mid|embedding_A|embedding_B|linear_layer)"
    r"|lora\.(?:up|down)|hada_[wt]\d|lokr_[wt]\d|b?oft_(?:blocks|diag|R)|dora_scale|alpha|diff)"
    r"(?:[._]|$)"
)
_MODEL = re.compile(r"\.(?:weight|bias)$")
_MOST = 0.5
"""Share of the names that decides: models too have an ``alpha`` here and there."""


def looks_like_adapter(names: Collection[str]) -> bool:
    """Return whether most of the names are of an adapter's factors."""
    return _share(names, _ADAPTER) > _MOST


def looks_like_model(names: Collection[str]) -> bool:
    """Return whether most of the names are weights and biases, and none an adapter's factor."""
    return _share(names, _MODEL) > _MOST and not _share(names, _ADAPTER)


def _share(names: Collection[str], words: re.Pattern[str]) -> float:
    return sum(bool(words.search(name)) for name in names) / len(names) if names else 0.0
