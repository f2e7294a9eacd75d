"""Which block type every tensor of a model gets in a mix such as Q4_K_M.

The rules are those of llama.cpp's quantiser without an importance matrix (``llama-quant.cpp``):
tensors that matter more, or in layers that matter more, get more bits; rows that are not whole
blocks fall back to a type of shorter blocks. Names are GGUF's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from loratools.codecs.ggml import GGML_TYPES
from loratools.errors import OptionError


@dataclass(frozen=True, slots=True)
class Mix:
    """A mix: the type of most tensors, and its number in ``general.file_type``."""

    name: str
    default: str
    file_type: int


_ROWS = (
    Mix("F32", "F32", 0),
    Mix("F16", "F16", 1),
    Mix("BF16", "BF16", 32),
    Mix("Q8_0", "Q8_0", 7),
    Mix("Q6_K", "Q6_K", 18),
    Mix("Q5_K_M", "Q5_K", 17),
    Mix("Q5_K_S", "Q5_K", 16),
    Mix("Q5_1", "Q5_1", 9),
    Mix("Q5_0", "Q5_0", 8),
    Mix("Q4_K_M", "Q4_K", 15),
    Mix("Q4_K_S", "Q4_K", 14),
    Mix("IQ4_NL", "IQ4_NL", 25),
    Mix("IQ4_XS", "IQ4_XS", 30),
    Mix("Q4_1", "Q4_1", 3),
    Mix("Q4_0", "Q4_0", 2),
    Mix("MXFP4_MOE", "MXFP4", 38),
    Mix("Q3_K_L", "Q3_K", 13),
    Mix("Q3_K_M", "Q3_K", 12),
    Mix("Q3_K_S", "Q3_K", 11),
    Mix("Q2_K", "Q2_K", 10),
    Mix("TQ2_0", "TQ2_0", 37),
    Mix("TQ1_0", "TQ1_0", 36),
)
MIXES: Mapping[str, Mix] = MappingProxyType({row.name: row for row in _ROWS})
ALIASES: Mapping[str, str] = MappingProxyType(
    {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}
)


def find_mix(name: str) -> Mix:
    """Return the mix called ``name``, in any case; ``OptionError`` if there is none."""
    upper = name.upper()
    found = MIXES.get(ALIASES.get(upper, upper))
    if found is None:
        raise OptionError(f"there is no GGUF mix {name!r}", f"Mixes: {', '.join(MIXES)}.")
    return found


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the rules ask about a model.

    Attributes:
        arch: GGUF's word, ``general.architecture``.
        layers: ``{arch}.block_count``.
        heads: attention heads of the first layer.
        kv_heads: key-value heads of the first layer; 0 where it has none.
        experts: 0 or 1 for a dense model.
    """

    arch: str
    layers: int
    heads: int
    kv_heads: int
    experts: int = 0

    @property
    def sharing(self) -> int:
        """How many heads share one key-value head."""
        return self.heads // self.kv_heads if self.kv_heads else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp calls the model a 70B."""
        shared = self.heads != self.kv_heads or self.arch != "llama"
        return _LAYERS_OF_70B.get(self.arch) == self.layers and shared


_LAYERS_OF_70B = {"llama": 80, "deci": 80, "olmo": 80, "qwen2": 80, "jais2": 68}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands among those of its category: number ``index`` of ``count``."""

    index: int
    count: int
    model: ModelFacts

    @property
    def is_early(self) -> bool:
        """In the first eighth."""
        return self.index < self.count // 8

    @property
    def matters_more(self) -> bool:
        """In the first or last eighth, or every third between."""
        eighth = self.count // 8
        late = self.index >= 7 * self.count // 8
        return self.is_early or late or (self.index - eighth) % 3 == 2

    @property
    def is_falcon(self) -> bool:
        return self.model.arch == "falcon"


Rule = Callable[[Place], "str | None"]
"""A type for a place, or None for the mix's default."""


def _always(name: str) -> Rule:
    return lambda _: name


def _shared(name: str, other: str | None = None) -> Rule:
    return lambda place: name if place.model.sharing >= 4 else other


def _q3_k_m_down(place: Place) -> str | None:
    if place.index < place.count // 16:
        return "Q5_K"
    return "Q4_K" if not place.is_falcon or place.matters_more else None


def _q4_k_m_down(place: Place) -> str | None:
    if not place.is_falcon:
        return "Q6_K" if place.matters_more else None
    if place.index < place.count // 16:
        return "Q6_K"
    return "Q5_K" if place.matters_more else None


def _when(condition: Callable[[Place], bool], name: str, other: str | None = None) -> Rule:
    return lambda place: name if condition(place) else other


_VALUE: Mapping[str, Rule] = {
    "Q2_K": _shared("Q4_K", "Q3_K"),
    "Q3_K_M": _when(lambda place: place.index < 2, "Q5_K", "Q4_K"),
    "Q3_K_L": _always("Q5_K"),
    "IQ4_NL": _shared("Q5_K"),
    "IQ4_XS": _shared("Q5_K"),
    "Q4_K_S": _when(lambda place: place.index < 4, "Q5_K"),
    "Q4_K_M": _when(lambda place: place.matters_more, "Q6_K"),
    "Q5_K_M": _when(lambda place: place.matters_more, "Q6_K"),
}
_DOWN: Mapping[str, Rule] = {
    "Q2_K": _always("Q3_K"),
    "Q3_K_M": _q3_k_m_down,
    "Q3_K_L": _when(lambda place: place.is_falcon, "Q4_K", "Q5_K"),
    "IQ4_NL": _when(lambda place: place.is_early, "Q5_K"),
    "IQ4_XS": _when(lambda place: place.is_early, "Q5_K"),
    "Q4_K_S": _when(lambda place: place.is_early and not place.is_falcon, "Q5_K"),
    "Q4_K_M": _q4_k_m_down,
    "Q5_K_M": _when(lambda place: place.matters_more, "Q6_K"),
}
_ATTENTION_OUTPUT = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}
_ATTENTION_OUTPUT_OF_8_EXPERTS = frozenset(
    {"Q2_K", "Q3_K_S", "Q3_K_M", "IQ4_NL", "IQ4_XS", "Q4_K_S", "Q4_K_M"}
)

_FALLBACKS = {
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "TQ1_0": "Q4_0",
    "TQ2_0": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""For rows that are no multiple of 256; those no multiple of 32 become F16."""

_CATEGORIES = (
    ("output", r"^output\.weight$"),
    ("embedding", r"^(per_layer_)?token_embd\.weight$"),
    ("value", r"attn_(qkv|kv_b|v)\.weight"),
    ("key", r"attn_k\.weight"),
    ("query", r"attn_q\.weight"),
    ("attention output", r"attn_output\.weight"),
    ("up", r"ffn_up"),
    ("gate", r"ffn_gate"),
    ("down", r"ffn_down"),
)
"""The first that is found in a name is the tensor's category."""

_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj"
    r"|^position_embd\.weight$|^token_types\.weight$|ssm_conv1d|shortconv\.conv\.weight"
    r"|indexer\.[kq]_proj\.weight|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)"
    r"\.weight|attn_rel_b\.weight|\.position_embd|sam\.(pos_embd|neck\.|net_)|\.rel_pos"
    r"|\.patch_(embd|merger)|a\.rvq\.codebook|mm\.a\.code_embd"
)
"""Matrices that are small or delicate: never quantised."""

_KEPT_BY_ARCH = {
    "glm5-next": re.compile(
        r"hc_|indexer\.(attn_q_b|attn_k|proj)|indexer_compressor_(gate|ape)"
        r"|ssm_(f_a|f_b|g_a|g_b|beta)\.weight|attn_(kv_a_mqa|k_b|v_b)\.weight"
    )
}
_AT_LEAST_Q8_0 = {"glm5-next": re.compile(r"attn_q_[ab]|nextn\.eh_proj")}


def choose_types(
    mix: Mix, tensors: Mapping[str, Sequence[int]], model: ModelFacts
) -> dict[str, str | None]:
    """Return the type of every tensor, or None for one that keeps what it has.

    Args:
        mix: a row of ``MIXES``.
        tensors: shapes, rows last but one and weights of a row last, by GGUF name; all of a model,
            since rules count tensors.
        model: the facts from its metadata.
    """
    tied = "output.weight" not in tensors
    values = sum(find_category(name) == "value" for name in tensors)
    seen = {"value": 0, "down": 0}
    chosen: dict[str, str | None] = {}
    for name in sorted(tensors, key=_by_layer):
        category = find_category(name)
        index = seen.get(category, 0)
        count = values if category == "value" else model.layers
        if not is_quantised(name, tensors[name], model.arch):
            chosen[name] = None
            continue
        if category == "down" and model.experts > 1:
            index = _layer(name)
        chosen[name] = choose_type(mix, name, tensors[name], Place(index, count, model), tied=tied)
        if category in seen:
            seen[category] += 1
    return chosen


def choose_type(mix: Mix, name: str, shape: Sequence[int], place: Place, *, tied: bool) -> str:
    """Return the type of one tensor that is quantised.

    Args:
        mix: a row of ``MIXES``.
        name: in GGUF.
        shape: rows last but one, weights of a row last.
        place: its number among the tensors of its category, in the order of layers.
        tied: whether the model has no output matrix of its own.
    """
    if mix.default in {"F32", "F16", "BF16"}:
        return mix.default
    special = _AT_LEAST_Q8_0.get(place.model.arch)
    wanted = (
        "Q8_0" if special and special.search(name) else _by_category(mix, name, shape, place, tied)
    )
    return _fitting(wanted or mix.default, shape[-1])


def _by_category(mix: Mix, name: str, shape: Sequence[int], place: Place, tied: bool) -> str | None:
    category = find_category(name)
    if category == "output" or (tied and category == "embedding"):
        return _output(mix, shape[-1], place.model.arch)
    if mix.name == "MXFP4_MOE":
        return _expert(category, shape, place.model.arch)
    rule = _BY_CATEGORY.get(category)
    return rule(mix, place) if rule else None


def _output(mix: Mix, columns: int, arch: str) -> str:
    whole = columns % GGML_TYPES[mix.default].codec.elements == 0
    plain = mix.name == "MXFP4_MOE" or mix.default == "Q8_0" or arch == "falcon" or not whole
    return "Q8_0" if plain else "Q6_K"


def _expert(category: str, shape: Sequence[int], arch: str) -> str:
    stacked = len(shape) > 2 and shape[-3] > 1
    return "MXFP4" if stacked and (arch != "bailingmoe3" or category in _FFN) else "Q8_0"


_FFN = frozenset({"up", "gate", "down"})


def _embedding(mix: Mix, _: Place) -> str | None:
    return "Q4_K" if mix.name in {"TQ1_0", "TQ2_0"} else None


def _value(mix: Mix, place: Place) -> str | None:
    if place.model.experts == 8:
        return "Q8_0"
    rule = _VALUE.get(mix.name)
    wanted = (rule and rule(place)) or mix.default
    return "Q5_K" if place.model.is_70b and wanted in {"Q3_K", "Q4_K"} else wanted


def _key(_: Mix, place: Place) -> str | None:
    return "Q8_0" if place.model.experts == 8 else None


def _down(mix: Mix, place: Place) -> str | None:
    rule = _DOWN.get(mix.name)
    return rule(place) if rule else None


def _attention_output(mix: Mix, place: Place) -> str | None:
    if place.is_falcon:
        return "Q4_K" if mix.name == "Q3_K_L" else None
    if place.model.experts == 8:
        return "Q5_K" if mix.name in _ATTENTION_OUTPUT_OF_8_EXPERTS else None
    return _ATTENTION_OUTPUT.get(mix.name)


_BY_CATEGORY: Mapping[str, Callable[[Mix, Place], str | None]] = {
    "embedding": _embedding,
    "value": _value,
    "key": _key,
    "down": _down,
    "attention output": _attention_output,
}


def _fitting(wanted: str, columns: int) -> str:
    """Return ``wanted``, or its fallback for rows that are not whole blocks."""
    for name in (wanted, _FALLBACKS.get(wanted, wanted)):
        if columns % GGML_TYPES[name].codec.elements == 0:
            return name
    return "F16"


def is_quantised(name: str, shape: Iterable[int], arch: str) -> bool:
    """Return whether llama.cpp quantises the tensor at all."""
    dimensions = list(shape)
    while dimensions and dimensions[0] == 1:
        del dimensions[0]
    own = _KEPT_BY_ARCH.get(arch)
    kept = _KEPT.search(name) or (own and own.search(name))
    return len(dimensions) > 1 and name.endswith("weight") and not kept


def find_category(name: str) -> str:
    """Return what part of a model a tensor is, in the mixes' words; "other" for the rest."""
    found = (category for category, pattern in _CATEGORIES if re.search(pattern, name))
    return next(found, "other")


def _layer(name: str) -> int:
    found = re.match(r"blk\.(\d+)\.", name)
    return int(found[1]) if found else -1


def _by_layer(name: str) -> tuple[int, str]:
    return _layer(name), name
