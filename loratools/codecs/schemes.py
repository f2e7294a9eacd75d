"""Recognising quantised weights among a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from loratools.codecs.scheme_records import Found, Packing, Scheme, Spec
from loratools.codecs.scheme_rows import SCHEMES
from loratools.errors import UnsupportedError


def find_packed(
    tensors: Mapping[str, Spec], config: Mapping[str, Any], read: Callable[[str], Tensor]
) -> tuple[Packing, ...]:
    """Return the packed weights among a checkpoint's tensors, in their order.

    Args:
        tensors: name → dtype word and shape, of every stored tensor.
        config: ``quantization_config`` of ``config.json``; empty if there is none.
        read: returns a stored tensor; only asked for small ones that describe others.

    Raises:
        CorruptFileError: a part is missing, or shapes disagree.
        UnsupportedError: a scheme that cannot be read, with the reason.
    """
    _refuse_tiles(tensors)
    found = [packing for name in tensors for packing in _of_tensor(name, tensors, config, read)]
    _refuse_unknown(tensors, config, found)
    return tuple(found)


def _of_tensor(
    name: str,
    tensors: Mapping[str, Spec],
    config: Mapping[str, Any],
    read: Callable[[str], Tensor],
) -> Iterator[Packing]:
    for scheme in SCHEMES:
        if not name.endswith(scheme.marker):
            continue
        module = name.removesuffix(scheme.marker)
        names = _part_names(scheme, module, tensors)
        specs = {part: tensors[stored] for part, stored in names.items()}
        found = Found(module, names, specs, config, read)
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
    needed = [part for part in scheme.parts if part not in scheme.optional]
    missing = [part for part in needed if part not in found.names]
    if missing:
        endings = [" or ".join(scheme.parts[part]) for part in missing]
        raise found.fault(scheme.name, f"there is no {', no '.join(endings)}")
    shape, build, dtype = scheme.understand(found)
    return Packing(scheme.name, found.module + scheme.weight, shape, found.names, build, dtype)


def _refuse_tiles(tensors: Collection[str]) -> None:
    for name in tensors:
        if name.endswith((".wscales", ".smooth_factor", ".smooth_factor_orig")):
            raise UnsupportedError(
                f"{name}: SVDQuant (nunchaku) stores 4-bit tiles in the order of one GPU's "
                "instructions, with a low-rank branch that they were fitted to",
                hint="merge into the 16-bit original; nunchaku applies adapters at run time",
            )


# Methods whose tensors the table below knows, by the config's word.
_METHODS = frozenset(
    {"bitsandbytes", "gptq", "awq", "fp8", "fbgemm_fp8", "compressed-tensors", "mxfp4", "hqq",
     "modelopt", "mlx"}
)  # fmt: skip


def _refuse_unknown(
    tensors: Mapping[str, Spec], config: Mapping[str, Any], found: Collection[Packing]
) -> None:
    method = str(config.get("quant_method", "")) if config else ""
    if method and method not in _METHODS and not found:
        raise UnsupportedError(
            f"the base is quantised by {method!r}, a scheme that loratools does not know",
            hint="merge into the 16-bit original of this base",
        )
    taken = {name for packing in found for name in packing.names.values()}
    for name, spec in tensors.items():
        if name.endswith(("weight_packed", "qweight", ".W_q")) and name not in taken:
            raise UnsupportedError(
                f"{name}: {spec.dtype} {tuple(spec.shape)} is in no scheme that loratools knows",
                hint="merge into the 16-bit original of this base",
            )
