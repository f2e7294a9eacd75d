"""PEFT's tensor names: from any spelling in circulation to one classified key.

Spellings: PEFT's own files; raw training state dicts (``lora_A.default.weight``,
``modules_to_save.default``); FSDP, DDP and torch.compile wrappers; files without a prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from loratools.errors import MalformedAdapterError

KeyKind = Literal[
    "factor", "tokens", "token_base", "base_copy", "bias_copy", "module", "ignored", "training"
]

_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
_PREFIX = re.compile(r"^(?:module\.)?(?:base_model\.(?:model\.)?)?")
_FACTORS = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_embedding_A": "down",
    "lora_embedding_B": "up",
    "lora_magnitude_vector": "magnitude",
    "lora_diag": "diagonal",
}
_TRAINING_ONLY = ("lora_velora_embed", "lora_monteclora_sampler", "lora_dropout")
_MARKER = re.compile(
    r"^(?:(?P<module>.*?)\.)?(?P<marker>"
    + "|".join((*_FACTORS, *_TRAINING_ONLY))
    + r")(?:\.(?P<rest>.+))?$"
)
_SAVED = re.compile(r"^(?P<head>.+)\.modules_to_save\.(?P<adapter>[^.]+)\.(?P<tail>.+)$")
_TOKENS = re.compile(
    r"^(?P<module>.+?)(?:\.token_adapter)?\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?$"
)
_FOREIGN = re.compile(
    r"(?:^|\.)(?:lora_|hada_|lokr_|oft_|boft_|ia3_|vera_|fourierft_|hra_|vblora_|miss_|bone_|randlora_"
    r"|shira_|c3a_|delora_|road_|waveft_|gralora_|hira_|glora_|adamss_|psoft_|tinylora_)\w*(?:\.|$)"
)


@dataclass(frozen=True, slots=True)
class Key:
    """One tensor name, understood.

    Attributes:
        raw: the name in the file.
        kind: what the tensor is.
        target: module path (factors, tokens) or tensor name (the rest), as the model calls it.
        field: for factors, ``down``, ``up``, ``magnitude``, ``diagonal`` or ``bias``.
        marker: PEFT's own word (``lora_A`` ...), for factors.
        adapter: the adapter's name, where the spelling includes it.
    """

    raw: str
    kind: KeyKind
    target: str
    field: str = ""
    marker: str = ""
    adapter: str | None = None


def classify_keys(names: Iterable[str], source: str) -> list[Key]:
    """Classify every name; raises MalformedAdapterError where several adapters are mixed."""
    keys = [_classify(name) for name in names]
    adapters = sorted({key.adapter for key in keys if key.adapter})
    if len(adapters) > 1:
        raise MalformedAdapterError(
            f"{source}: holds several adapters ({', '.join(adapters)})",
            hint="save each with PEFT's save_pretrained(selected_adapters=[...]) and name one",
        )
    return keys


def looks_like_tuner(name: str) -> bool:
    """Return whether a name carries the marker of some adapter method."""
    return _FOREIGN.search(name) is not None


def strip_prefix(name: str) -> str:
    """Return the name as the model calls it: wrappers and PEFT's prefix removed."""
    return _PREFIX.sub("", _WRAPPERS.sub("", name), count=1)


def _classify(raw: str) -> Key:
    name = strip_prefix(raw)
    if ".original_module." in name:
        return Key(raw, "ignored", name)
    if match := _TOKENS.match(name):
        return Key(raw, "tokens", match["module"], adapter=match["adapter"])
    if match := _SAVED.match(name):
        return Key(raw, "module", f"{match['head']}.{match['tail']}", adapter=match["adapter"])
    if match := _MARKER.match(name):
        return _factor(raw, match)
    return _plain(raw, name)


def _factor(raw: str, match: re.Match[str]) -> Key:
    marker, rest = match["marker"], match["rest"]
    if marker in _TRAINING_ONLY:
        return Key(raw, "training", match["module"] or "", marker=marker)
    parts = rest.split(".") if rest else []
    is_bias = bool(parts) and parts[-1] == "bias"
    if parts and parts[-1] in ("weight", "bias"):
        parts.pop()
    adapter = ".".join(parts) or None
    field = "bias" if is_bias else _FACTORS[marker]
    return Key(raw, "factor", match["module"] or "", field, marker, adapter)


_COPIES: tuple[tuple[str, str, KeyKind], ...] = (
    (".token_adapter.base_layer.weight", ".weight", "token_base"),
    (".base_layer.weight", ".weight", "base_copy"),
    (".base_layer.bias", ".bias", "bias_copy"),
)


def _plain(raw: str, name: str) -> Key:
    for ending, tensor, kind in _COPIES:
        if name.endswith(ending):
            return Key(raw, kind, name[: -len(ending)] + tensor)
    return Key(raw, "module", name)
