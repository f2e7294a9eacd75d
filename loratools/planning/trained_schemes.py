"""Schemes of quantisation by their words in ``config.json``: what they are, and how to pack so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from loratools.basemodel import BaseModel
from loratools.codecs.bnb4 import STORAGES
from loratools.codecs.bnb4_weight import BnB4Weight
from loratools.codecs.packers import BnB4Packer, FP8Packer, Int8Packer, MLXPacker, Packer
from loratools.planning.pack_targets import PACKED_TARGETS, Target
from loratools.tensorfiles.dtypes import FLOAT_NAMES

Words = Mapping[str, Any]

_FLOATS = {name: word for word, name in FLOAT_NAMES.items()}
_BLOCKSIZE = BnB4Packer("nf4").blocksize
_STORAGE = {**_FLOATS, "uint8": "U8", "int8": "I8"}


@dataclass(frozen=True, slots=True)
class Scheme:
    """One way in which a model is quantised.

    Attributes:
        title: as reports and errors call it.
        identity: what makes two models quantised alike, but for which layers are.
        target: how to pack in it, or None where nothing here can.
        skip: the modules that are left as they are; None for those that its tool leaves by itself.
        compute: safetensors' word of the float type that weights are rounded to when they are
            used, where the config says it.
    """

    title: str
    identity: tuple[Any, ...]
    target: Target | None = None
    skip: tuple[str, ...] | None = None
    compute: str | None = None


def read_scheme(words: Words) -> Scheme:
    """Return the scheme that a config's words of quantisation describe."""
    method = str(words.get("quant_method") or ("mlx" if "group_size" in words else ""))
    return _READERS.get(method, _other)(words)


def is_named(scheme: Scheme, word: str) -> bool:
    """Return whether a word of ``--to`` means a scheme."""
    if word not in PACKED_TARGETS:
        return False
    words = PACKED_TARGETS[word].config([], "bfloat16")["quantization_config"]
    return read_scheme(words).identity == scheme.identity


def measured(scheme: Scheme, base: BaseModel) -> Scheme:
    """Return a scheme with what only the weights tell: how many of them share a scale.

    Args:
        scheme: by the words of the base's config.
        base: whose weights are quantised so.
    """
    if scheme.identity[:2] != ("bitsandbytes", 4):
        return scheme
    opened = (weight.packed.open() for weight in base.packed if weight.packed)
    sizes = sorted({weight.blocksize for weight in opened if isinstance(weight, BnB4Weight)})
    if sizes in ([], [_BLOCKSIZE]):
        return scheme
    target = scheme.target
    if target is not None and isinstance(target.packer, BnB4Packer) and len(sizes) == 1:
        target = replace(target, packer=replace(target.packer, blocksize=sizes[0]))
    elif len(sizes) > 1:
        target = None
    title = f"{scheme.title} in blocks of {' and '.join(map(str, sizes))}"
    return replace(scheme, title=title, identity=(*scheme.identity, *sizes), target=target)


def _flag(words: Words, name: str) -> bool:
    return bool(words.get(name) or words.get(f"_{name}"))


def _skip(words: Words, name: str) -> tuple[str, ...] | None:
    listed = words.get(name)
    return tuple(map(str, listed)) if isinstance(listed, list) else None


def _word(name: Any, known: Mapping[str, str]) -> str | None:
    return known.get(str(name).removeprefix("torch."))


def _recorded(words: Words, name: str) -> Callable[[list[str], str], dict[str, Any]]:
    """Return what writes the words again, with a list of what is left where they have none."""

    def config(left: list[str], dtype: str) -> dict[str, Any]:
        kept = words.get(name)
        return {"quantization_config": {**words, name: left if kept is None else kept}}

    return config


# ── bitsandbytes ──


def _bitsandbytes(words: Words) -> Scheme:
    skip = _skip(words, "llm_int8_skip_modules")
    config = _recorded(words, "llm_int8_skip_modules")
    if _flag(words, "load_in_8bit"):
        target = Target(Int8Packer(), config, skip=skip)
        return Scheme("bitsandbytes int8", ("bitsandbytes", 8), target, skip)
    kind = str(words.get("bnb_4bit_quant_type") or "fp4")
    nested = bool(words.get("bnb_4bit_use_double_quant"))
    title = f"bitsandbytes {kind}" + (" with double quantisation" if nested else "")
    storage = _word(words.get("bnb_4bit_quant_storage") or "uint8", _STORAGE) or ""
    known = kind in ("nf4", "fp4") and storage in STORAGES
    packer = BnB4Packer(kind, nested, storage=storage)
    four = Target(packer, config, skip=skip) if known else None
    compute = _word(words.get("bnb_4bit_compute_dtype") or "float32", _FLOATS)
    return Scheme(title, ("bitsandbytes", 4, kind, nested), four, skip, compute)


# ── FP8 in blocks ──


def _fp8(words: Words) -> Scheme:
    skip = _skip(words, "modules_to_not_convert")
    size = words.get("weight_block_size")
    block = tuple(map(int, size)) if isinstance(size, list) else ()
    title = f"fp8 in blocks of {'×'.join(map(str, block))}" if block else "fp8"
    plain = str(words.get("scale_fmt") or "float") == "float" and not words.get("expert_dtype")
    target = None
    if len(block) == 2 and plain and words.get("fmt", "e4m3") == "e4m3":
        config = _recorded(words, "modules_to_not_convert")
        packer = FP8Packer((block[0], block[1]))
        target = Target(packer, config, skip=skip, experts=skip is not None)
    return Scheme(title, ("fp8", block), target, skip)


# ── MLX ──


def _mlx(words: Words) -> Scheme:
    packer = _mlx_packer(words)
    own = {name: _mlx_own(found) for name, found in words.items() if _is_own(found)}
    written = dict(words)
    title = f"MLX affine of {words.get('bits')} bits in groups of {words.get('group_size')}"
    if own:
        title += f", {len(own)} layers otherwise"
    known = words.get("mode", "affine") == "affine"
    known &= all(own[name] is not None for name in own if words[name])
    target = None
    if packer is not None and known:
        target = Target(
            packer,
            lambda left, dtype: {"quantization": written, "quantization_config": written},
            tables=True,
            metadata="mlx",
            own=MappingProxyType(own),
        )
    numbers = (words.get("bits"), words.get("group_size"), words.get("mode", "affine"))
    identity = ("mlx", *numbers, tuple(sorted((name, str(words[name])) for name in own)))
    return Scheme(title, identity, target)


def _is_own(found: Any) -> bool:
    return isinstance(found, Mapping) or found is False


def _mlx_own(found: Any) -> Packer | None:
    return _mlx_packer(found) if isinstance(found, Mapping) else None


def _mlx_packer(words: Words) -> MLXPacker | None:
    bits, group = words.get("bits"), words.get("group_size")
    if bits in (2, 3, 4, 5, 6, 8) and group in (32, 64, 128):
        return MLXPacker(int(bits), int(group))
    return None


# ── the others, which are read and not written ──

_NUMBERS = ("format", "bits", "group_size", "checkpoint_format", "version", "quant_algo")


def _other(words: Words) -> Scheme:
    method = str(words.get("quant_method") or words.get("format") or "an unknown scheme")
    said = [(name, words[name]) for name in _NUMBERS if isinstance(words.get(name), int | str)]
    detail = ", ".join(f"{name} {value}" for name, value in said)
    title = f"{method} ({detail})" if detail else method
    return Scheme(title, (method, *said), skip=_skip(words, "modules_to_not_convert"))


_READERS: Mapping[str, Callable[[Words], Scheme]] = {
    "bitsandbytes": _bitsandbytes,
    "fp8": _fp8,
    "mlx": _mlx,
}
