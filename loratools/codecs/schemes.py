"""Recognising quantised weights among a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from loratools.codecs.scheme_floats import cast_packing
from loratools.codecs.scheme_groups import check_format, refuse_sparse
from loratools.codecs.scheme_orphans import CODES, refuse_orphans, schemes_of
from loratools.codecs.scheme_records import (
    AGAIN,
    FLOATS,
    FLOATS8,
    ORIGINAL,
    Found,
    Packing,
    Scheme,
    Spec,
)
from loratools.codecs.scheme_rows import SCHEMES
from loratools.errors import CorruptFileError, UnsupportedError


def find_packed(
    tensors: Mapping[str, Spec],
    config: Mapping[str, Any],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> tuple[Packing, ...]:
    """Return the packed weights among a checkpoint's tensors, in their order.

    Args:
        tensors: name → dtype word and shape, of every stored tensor.
        config: ``quantization_config`` of ``config.json``; empty if there is none.
        read: returns a stored tensor; only asked for small ones that describe others.
        metadata: words of the files' headers.

    Raises:
        CorruptFileError: a part is missing, or shapes, types or the config disagree.
        UnsupportedError: a scheme that cannot be read, with the reason.
    """
    config, metadata = _in_own_words(config), metadata or {}
    _refuse_tiles(tensors)
    refuse_sparse(tensors, config)
    _refuse_unknown_method(tensors, config)
    found = [p for name in tensors for p in _of_tensor(name, tensors, config, read, metadata)]
    taken = {name for packing in found for name in packing.names.values()}
    _refuse_unknown(tensors, taken, config.get("quant_method"))
    refuse_orphans(tensors, taken, metadata, config.get("quant_method"))
    if not config:
        found += _casts(tensors, taken, scaled=_is_scaled(tensors, metadata, found))
    return tuple(found)


def _of_tensor(
    name: str,
    tensors: Mapping[str, Spec],
    config: Mapping[str, Any],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str],
) -> Iterator[Packing]:
    if name.endswith(".weight") and tensors[name].dtype in FLOATS:
        return
    for scheme in SCHEMES:
        if not name.endswith(scheme.marker):
            continue
        module = name.removesuffix(scheme.marker)
        names = _part_names(scheme, module, tensors)
        specs = {part: tensors[stored] for part, stored in names.items()}
        found = Found(module, names, specs, config, read, metadata)
        if scheme.applies(found):
            yield _packing(scheme, found)
            return


def _part_names(scheme: Scheme, module: str, tensors: Collection[str]) -> dict[str, str]:
    names = {}
    for part, endings in scheme.parts.items():
        present = [module + ending for ending in endings if module + ending in tensors]
        if present:
            names[part] = present[0]
    return names


def _packing(scheme: Scheme, found: Found) -> Packing:
    _check_config(scheme, found)
    needed = [part for part in scheme.parts if part not in scheme.optional]
    missing = [part for part in needed if part not in found.names]
    if missing:
        endings = [" or ".join(scheme.parts[part]) for part in missing]
        raise found.fault(scheme.name, f"there is no {', no '.join(endings)}")
    for part, words in scheme.dtypes.items():
        if part in found.names and found.dtype(part) not in words:
            raise found.fault(scheme.name, f"{found.ending(part)} is {found.dtype(part)}")
    shape, build, dtype = scheme.understand(found)
    return Packing(scheme.name, scheme.weight_name(found.module), shape, found.names, build, dtype)


# ── what the config says ──

_METHODS = frozenset(word for scheme in SCHEMES for word in scheme.methods)
# AutoRound stores what other tools' kernels read, and names the tool.
_AUTO_ROUND = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}


def _in_own_words(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config with ``quant_method`` as the table has it."""
    method = config.get("quant_method")
    if method is not None and not isinstance(method, str):
        return {**config, "quant_method": str(method)}
    if method in ("auto-round", "intel/auto-round"):
        layout = _AUTO_ROUND.get(str(config.get("packing_format")))
        return {**config, "quant_method": layout or f"{method} {config.get('packing_format')}"}
    if method is None and "config_groups" in config:
        return {**config, "quant_method": "compressed-tensors"}
    return config


def _check_config(scheme: Scheme, found: Found) -> None:
    method = found.config.get("quant_method")
    if method and method not in scheme.methods:
        raise found.fault(scheme.name, f"the config says {method}")
    check_format(found, scheme.name)


def _refuse_unknown_method(tensors: Mapping[str, Spec], config: Mapping[str, Any]) -> None:
    method = config.get("quant_method")
    if not method or method in _METHODS:
        return
    narrow = [name for name, spec in tensors.items() if spec.dtype not in FLOATS]
    raise UnsupportedError(
        f"{next(iter([*narrow, *tensors]), 'config.json')}: the base is quantised by {method!r}, "
        "a scheme that loratools does not know",
        hint=ORIGINAL,
    )


# ── what is left ──


def _refuse_tiles(tensors: Collection[str]) -> None:
    for name in tensors:
        if name.endswith((".wscales", ".smooth_factor", ".smooth_factor_orig")):
            raise UnsupportedError(
                f"{name}: SVDQuant (nunchaku) stores 4-bit tiles in the order of one GPU's "
                "instructions, with a low-rank branch that they were fitted to",
                hint="merge into the 16-bit original; nunchaku applies adapters at run time",
            )


def _refuse_unknown(
    tensors: Mapping[str, Spec], taken: Collection[str], method: str | None
) -> None:
    for name, spec in tensors.items():
        if name.endswith(CODES) and name not in taken:
            raise UnsupportedError(
                f"{name}: {spec.dtype} {tuple(spec.shape)} is in no scheme that loratools knows; "
                f"such a name is of {schemes_of(name, method)}",
                hint=ORIGINAL,
            )


_MARKS = ("scaled_fp8", ".scaled_fp8", ".comfy_quant")


def _is_scaled(
    tensors: Collection[str], metadata: Mapping[str, str], found: Collection[Packing]
) -> bool:
    """Return whether float8 weights of the file are meant to have scales."""
    marked = any(name.endswith(_MARKS) for name in tensors)
    return marked or "_quantization_metadata" in metadata or any(p.scheme == "fp8" for p in found)


def _casts(
    tensors: Mapping[str, Spec], taken: Collection[str], *, scaled: bool
) -> Iterator[Packing]:
    """Yield the float8 tensors that were merely cast, where nothing speaks of scales.

    Raises CorruptFileError for a matrix without the scale that others of its file have.
    """
    for name, spec in tensors.items():
        plain = spec.dtype in FLOATS8 and len(spec.shape) > 0 and 0 not in spec.shape
        if not plain or name in taken or name.endswith(_MARKS):
            continue
        if scaled and len(spec.shape) > 1:
            raise CorruptFileError(
                f"{name}: stored as fp8, but there is no scale beside it, as others of the file "
                "have",
                hint=AGAIN,
            )
        yield cast_packing(name, spec)
