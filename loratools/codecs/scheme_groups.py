"""What a compressed-tensors config says of a module: its group, format and arguments."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from loratools.codecs.scheme_records import ORIGINAL, Found
from loratools.errors import UnsupportedError

METHOD = "compressed-tensors"
PACKED = f"{METHOD} pack-quantized"
INT = f"{METHOD} int-quantized"
FLOAT = f"{METHOD} float-quantized"
MXFP4, MXFP6, MXFP8 = (f"{METHOD} {kind}" for kind in ("mxfp4", "mxfp6", "mxfp8"))
NVFP4 = f"{METHOD} nvfp4"

_FORMATS = {
    "pack-quantized": {PACKED}, "int-quantized": {INT, FLOAT},
    "naive-quantized": {INT, FLOAT}, "float-quantized": {INT, FLOAT},
    "mxfp4-pack-quantized": {MXFP4}, "mxfp6-pack-quantized": {MXFP6},
    "mxfp8-quantized": {MXFP8}, "nvfp4-pack-quantized": {NVFP4},
}  # fmt: skip
"""Format → schemes: the three that store a weight's own tensor differ by its dtype alone, and
files call them by each other's names."""

_SPARSE = {
    "marlin-24": "holds tiles in the order of one GPU's instructions, every other pair of weights "
    "left out",
    "sparse-24-bitmask": "leaves out two weights of four, and a merge would need them",
    "sparse-bitmask": "leaves out the weights that are zero, and a merge would need them",
}
_SPARSE_PARTS = {".scale_packed": "marlin-24", ".bitmask": "sparse-bitmask"}


def refuse_sparse(tensors: Mapping[str, object], config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for formats that have no room for a merged weight."""
    sections = (config, config.get("sparsity_config"))
    said = [str(part.get("format")) for part in sections if isinstance(part, Mapping)]
    found = [(next(iter(tensors), "config.json"), word) for word in said if word in _SPARSE]
    named = [
        (name, word)
        for name in tensors
        for ending, word in _SPARSE_PARTS.items()
        if name.endswith(ending)
    ]
    for name, word in [*named, *found]:
        raise UnsupportedError(
            f"{name}: stored as {METHOD} {word}, which {_SPARSE[word]}", hint=ORIGINAL
        )


# ── what the config says of a module ──


def group_of(found: Found) -> Mapping[str, Any]:
    """Return the config's group that a module is in; empty if the config names none.

    A name counts before a pattern, and that before a class, of which a checkpoint says nothing:
    ``Linear`` then means every module.
    """
    groups = found.config.get("config_groups")
    known = [g for g in groups.values() if _is_group(g)] if isinstance(groups, Mapping) else []
    ranked = [(rank, group) for group in known if (rank := _rank(found.module, group)) is not None]
    return min(ranked, key=lambda pair: pair[0])[1] if ranked else {}


def _is_group(group: object) -> bool:
    return isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)


def _rank(module: str, group: Mapping[str, Any]) -> int | None:
    said = group.get("targets")
    targets = said if isinstance(said, list) and said else [said or "Linear"]
    return min((rank for t in targets if (rank := _fit(module, str(t))) is not None), default=None)


def _fit(module: str, target: str) -> int | None:
    """Return how closely a target means a module, 0 the closest; None if it does not."""
    if target == module:
        return 0
    if target.startswith("re:"):
        return 1 if _matches(target[3:], module) else None
    table = "embed" in module.rpartition(".")[2]
    if target == ("Embedding" if table else "Linear"):
        return 2
    return 3 if target in ("Embedding", "Linear") else None


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error:
        return False


def check_format(found: Found, scheme: str) -> None:
    """Raise CorruptFileError where the config says another format than the tensors are in."""
    if found.config.get("quant_method", METHOD) != METHOD:
        return
    word = _format(found)
    if word and scheme not in _FORMATS[word]:
        raise found.fault(scheme, f"the config says {word}")


def _format(found: Found) -> str | None:
    """Return the config's word for how a module is stored, if it is one of those above."""
    word = str(group_of(found).get("format") or found.config.get("format"))
    return word if word in _FORMATS else None


def is_said(found: Found, scheme: str, *, likely: bool) -> bool:
    """Whether the config says that a module is so stored, or says nothing and it is likely."""
    word = _format(found)
    return scheme in _FORMATS[word] if word else likely


def arguments_of(found: Found, scheme: str, kind: str) -> Mapping[str, Any]:
    """Return how the group's weights were quantised, after checking that they are of a kind."""
    arguments: Mapping[str, Any] = group_of(found).get("weights") or {}
    said = arguments.get("type") or kind
    if str(said).lower() != kind:
        raise found.fault(scheme, f"the config says that its weights are of type {said}")
    return arguments
