"""Scales and zeros without the weight that they belong to."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from loratools.codecs.scheme_records import AGAIN, FLOATS, Scheme, Spec
from loratools.codecs.scheme_rows import SCHEMES
from loratools.codecs.scheme_torchao import header_words, scheme_of, stored_prefix
from loratools.errors import CorruptFileError

CODES = (".weight_packed", ".qweight", ".W_q")
"""Endings that only codes have."""

# Endings that other tensors have too: a norm's scale, a quantity of some model's own.
_COMMON = frozenset({
    ".weight", ".scale", ".scales", ".biases", ".zero", ".shape", ".group_size", ".axis", "_blocks",
    "_scales", "_qdata",
})  # fmt: skip


def _telling_endings() -> dict[str, list[Scheme]]:
    found: dict[str, list[Scheme]] = {}
    for scheme in SCHEMES:
        for ending in (ending for endings in scheme.parts.values() for ending in endings):
            if ending not in _COMMON and ending not in CODES and ending.startswith("."):
                found.setdefault(ending, []).append(scheme)
    return found


_ENDINGS = _telling_endings()


def refuse_orphans(
    tensors: Mapping[str, Spec],
    taken: Collection[str],
    metadata: Mapping[str, str],
    method: str | None = None,
) -> None:
    """Raise CorruptFileError for a part of a scheme whose weight is not there, or in no scheme.

    What a dequantised model still has beside its float weights is left alone.

    Args:
        tensors: name → dtype word and shape, of every stored tensor.
        taken: names of those that make up packed weights.
        metadata: words of the files' headers.
        method: the config's ``quant_method``.
    """
    for name in tensors:
        if name in taken:
            continue
        for ending, schemes in _ENDINGS.items():
            if name.endswith(ending) and _is_orphan(name.removesuffix(ending), ending, tensors):
                raise _fault(name, _names(schemes, method), name.removesuffix(ending))
        _refuse_pairs(name, tensors)
    for name in header_words(metadata) - {"tensor_names"}:
        scheme, codes = scheme_of(metadata, name), f"{stored_prefix(name)}_qdata"
        if scheme and codes not in tensors:
            raise CorruptFileError(
                f"{name}: stored as {scheme}, but there is no {codes}",
                hint=AGAIN,
            )


def schemes_of(name: str, method: str | None) -> str:
    """Return the schemes whose codes have such a name, those of a ``quant_method`` if there are."""
    found = [scheme for scheme in SCHEMES if name.endswith(scheme.marker)]
    return _names(found, method)


def _names(schemes: Sequence[Scheme], method: str | None) -> str:
    """Return the schemes that have such a part, those that the config names if it names one."""
    said = [scheme for scheme in schemes if method in scheme.methods]
    return " or ".join(dict.fromkeys(scheme.name for scheme in said or schemes))


def _is_orphan(module: str, ending: str, tensors: Mapping[str, Spec]) -> bool:
    weight = tensors.get(f"{module}.weight")
    # bitsandbytes may store its bytes as any type, a float one too.
    return weight is None or weight.dtype not in FLOATS or ending.startswith(".weight.")


def _refuse_pairs(name: str, tensors: Mapping[str, Spec]) -> None:
    """Refuse what only together with another tensor tells its scheme."""
    if name.endswith(".biases"):
        module = name.removesuffix(".biases")
        if f"{module}.scales" in tensors and _is_orphan(module, ".biases", tensors):
            raise _fault(name, "mlx affine", module)
    if name.endswith("_scales") and tensors[name].dtype == "U8" and len(tensors[name].shape) > 1:
        module = name.removesuffix("_scales")
        if f"{module}_blocks" not in tensors:
            raise CorruptFileError(
                f"{module}: stored as mxfp4, but there is no {module}_blocks",
                hint=AGAIN,
            )


def _fault(name: str, scheme: str, module: str) -> CorruptFileError:
    return CorruptFileError(
        f"{module}: {name} belongs to a weight stored as {scheme}, and there is none",
        hint=AGAIN,
    )
