"""What each tensor of a model is, and how an adapter of a given format can say its change."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from loratools.basemodel import BaseModel, elements
from loratools.errors import OptionError, UnknownArchitectureError
from loratools.extraction.model_pair import ModelPair, TensorPair
from loratools.formats.format import Format
from loratools.keymaps.architecture import Architecture
from loratools.keymaps.base_names import BaseNames
from loratools.keymaps.expert_rows import TRANSPOSED_TYPES
from loratools.keymaps.transformers_rows import (
    CONV1D_LEAVES,
    CONV1D_TYPES,
    HEADS,
    TIED,
    TIED_TABLES,
    TRANSPOSED_PARAMETERS,
)
from loratools.keymaps.translate import detect_base, find_architecture
from loratools.keymaps.vocabulary import vocabulary_of
from loratools.planning.tied_embeddings import Tie, find_tie

Kind = Literal["linear", "conv", "embedding", "experts", "norm", "bias", "other"]
"""What a tensor is to its layer. ``other``: a parameter without a low-rank form, a grouped
convolution, a vector that is no norm's."""

Way = Literal["factors", "whole", "copy", "none"]
"""How its change is said: as a low-rank product; as it is; by the tuned tensor itself; not."""

Names = Literal["transformers", "diffusers", "checkpoint"]

_TABLES = frozenset(
    {
        *(table.rpartition(".")[2] for _, table in TIED),
        *(copy.rpartition(".")[2] for _, copies in TIED_TABLES for copy in copies),
        "wpe", "position_embeddings", "token_type_embeddings", "embed_positions",
        "positions_embed", "token_embedding", "position_embedding", "relative_attention_bias",
    }
) - {"w"}  # fmt: skip
"""Last parts of the module names that are embeddings."""

_IN_PROJECTION = {"in_proj_weight": "weight", "in_proj_bias": "bias"}
_STACKED = ("input_linear.weight", "output_linear.weight")
_EXPERTS = ("gate_up_proj", "down_proj", "up_proj")


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """One tensor and how its change will be said.

    Attributes:
        pair: the tensor in both models.
        module: path of its layer, in the names of ``Family``.
        parameter: the tensor's name within the layer; empty where the path is the tensor's own.
        kind: what it is.
        transposed: whether it is stored (in, out).
        way: how the format says it.
        reason: why it does not, where ``way`` is ``none``.
        head: the tied output head that shares this table, or None.
    """

    pair: TensorPair
    module: str
    parameter: str
    kind: Kind
    transposed: bool
    way: Way
    reason: str = ""
    head: str | None = None

    @property
    def side(self) -> int:
        """The largest rank that the factors can have."""
        shape = self.pair.shape[1:] if self.kind == "experts" else self.pair.shape
        return min(shape[0], elements(shape[1:]))


@dataclass(frozen=True, slots=True, eq=False)
class Family:
    """Whose names a model's tensors have.

    Attributes:
        names: of transformers' modules; of diffusers' with their network in front; or a
            single-file checkpoint's own.
        arch: the diffusion architecture, if rows know it.
        format: what an adapter of it is written in unless the user says otherwise.
        path: full tensor name → the name the model has in memory.
    """

    names: Names
    arch: Architecture | None
    format: str
    path: Callable[[str], str]


def find_family(pair: ModelPair, arch: str | None = None) -> Family:
    """Tell whose names the models have: by the folder, the config, or the names themselves.

    Raises UnknownArchitectureError for an ``arch`` that does not exist, OptionError for one beside
    a language model's config.
    """
    said = find_architecture(arch) if arch else None
    if "" not in pair.base:
        return Family("diffusers", said or _detected(pair), "diffusers", str)
    base = pair.base[""]
    component = _component(base)
    if component:
        found = said or _detected(pair)
        return Family("diffusers", found, "diffusers", lambda name: f"{component}.{name}")
    if base.config is None and (found := said or _detected(pair)):
        return Family("checkpoint", found, "kohya", str)
    if said is not None:
        raise OptionError(
            f"--arch says {said.title}, and {base.path} is a folder of transformers",
            hint="leave --arch out",
        )
    return Family("transformers", None, "peft", _in_memory(base))


def _detected(pair: ModelPair) -> Architecture | None:
    try:
        return detect_base(pair.shapes)
    except UnknownArchitectureError:
        return None


def _component(base: BaseModel) -> str:
    """Return what diffusers calls the network of a component folder."""
    word = str(base.config_word("_class_name") or "")
    if word.endswith("UNet2DConditionModel"):
        return "unet"
    return "transformer" if "Transformer" in word else ""


def _in_memory(base: BaseModel) -> Callable[[str], str]:
    """Return how a checkpoint's names become those of the model with its head.

    The Hub's GPT-2 is stored without the prefix that its LMHeadModel has.
    """
    prefix, tie = _missing_prefix(base)
    if not prefix or tie is None:
        return str
    head = tie.head.rpartition(".")[0]

    def path(name: str) -> str:
        return name if name.startswith((prefix, f"{head}.")) else prefix + name

    return path


def _missing_prefix(base: BaseModel) -> tuple[str, Tie | None]:
    tie = find_tie(base)
    words = base.config_word("architectures") or []
    if tie is None or not any(str(word).endswith(HEADS) for word in words):
        return "", tie
    stored, head = (name.removesuffix(".weight") for name in (tie.input, tie.head))
    rows = [table for row_head, table in TIED if row_head == head]
    if any(f".{stored}".endswith(f".{table}") for table in rows):
        return "", tie
    longer = (table for table in rows if table.endswith(f".{stored}"))
    return next(longer, stored).removesuffix(stored), tie


# ── what a tensor is ─────────────────────────────────────────────────────────────────────────


def plan_changes(
    pair: ModelPair, family: Family, target: Format, full: Sequence[str] = ()
) -> list[Change]:
    """Decide for every tensor how its change would be said in the target format.

    Args:
        pair: the models.
        family: whose names they have.
        target: the format to write.
        full: regular expressions for modules whose change is not factored.
    """
    known = _nameable(pair, family, target)
    wholes = compiled(full)
    ties = {name: _tied_head(model) for name, model in pair.base.items()}
    changes = []
    for one in pair.pairs:
        base = pair.base[one.component]
        module, parameter = _split(family.path(one.full_name))
        kind, transposed = _kind(one, base, parameter, family)
        way, reason = _way(kind, target)
        if way == "factors" and matches(wholes, module):
            way, reason = _whole(target)
        # PEFT sees a table, stored (tokens, dim), as a weight (dim, tokens).
        transposed |= kind == "embedding" and target.naming == "transformers"
        if module not in known:
            way, reason = "none", "its module has no name in this format"
        table, head = ties[one.component]
        shared = head if one.name == table and family.names == "transformers" else None
        changes.append(Change(one, module, parameter, kind, transposed, way, reason, shared))
    # PEFT keeps the biases themselves, whatever becomes of their weights.
    return changes if target.naming == "transformers" else _with_biases(changes)


def _with_biases(changes: Sequence[Change]) -> list[Change]:
    """Return the changes, every bias said in the way that goes with its weight's."""
    weights = {change.module: change for change in changes if change.parameter == "weight"}
    return [
        replace(change, way=_BESIDE[owner.way], reason=owner.reason)
        if change.kind == "bias" and (owner := weights.get(change.module)) is not None
        else change
        for change in changes
    ]


_BESIDE: Mapping[Way, Way] = {
    "factors": "whole",
    "whole": "whole",
    "copy": "copy",
    "none": "none",
}


def _split(name: str) -> tuple[str, str]:
    """Return a tensor's module and its name there; nn.MultiheadAttention's projection is one."""
    module, _, leaf = name.rpartition(".")
    if leaf in _IN_PROJECTION:
        return f"{module}.in_proj_weight", _IN_PROJECTION[leaf]
    return (module, leaf) if module and leaf in ("weight", "bias") else (name, "")


def _tied_head(base: BaseModel) -> tuple[str, str | None]:
    """Return the input table and the module of the head that shares it without being stored."""
    tie = find_tie(base)
    if tie is None or not tie.tied or tie.stored:
        return "", None
    return tie.input, tie.head.removesuffix(".weight")


def _kind(one: TensorPair, base: BaseModel, parameter: str, family: Family) -> tuple[Kind, bool]:
    shape, module = one.shape, _split(one.name)[0]
    leaf = module.rpartition(".")[2]
    if parameter == "bias":
        return "bias", False
    if parameter == "":
        return _bare_kind(leaf, shape, base, family)
    if len(shape) == 2:
        return _matrix_kind(leaf, base, family)
    if len(shape) == 1:
        return "norm", False
    grouped = len(shape) > 2 and shape[1] == 1 and shape[0] > 1
    plain = len(shape) > 2 and not grouped and not one.name.endswith(_STACKED)
    return ("conv" if plain else "other"), False


def _matrix_kind(leaf: str, base: BaseModel, family: Family) -> tuple[Kind, bool]:
    if leaf == "in_proj_weight":
        return ("linear" if family.names == "checkpoint" else "other"), False
    if leaf in _TABLES:
        return "embedding", False
    return "linear", leaf in CONV1D_LEAVES and _is_conv1d(base)


def _bare_kind(
    leaf: str, shape: tuple[int, ...], base: BaseModel, family: Family
) -> tuple[Kind, bool]:
    """Return what a parameter is that stands alone in its module."""
    if len(shape) == 2 and leaf in TRANSPOSED_PARAMETERS:
        return "linear", True
    if len(shape) == 3 and leaf in _EXPERTS:
        return "experts", not TRANSPOSED_TYPES.isdisjoint(base.config_words("model_type"))
    # The original's word for a norm's weight.
    return ("norm" if leaf == "scale" and len(shape) == 1 else "other"), False


def _is_conv1d(base: BaseModel) -> bool:
    types = base.config_words("model_type")
    if types:
        return not CONV1D_TYPES.isdisjoint(types)
    wide = (t.shape for n, t in base.tensors.items() if n.endswith("c_attn.weight"))
    return any(len(shape) == 2 and shape[1] == 3 * shape[0] for shape in wide)


def _way(kind: Kind, target: Format) -> tuple[Way, str]:
    """Return how the format says a change of this kind, or why it does not."""
    if kind in ("linear", "conv"):
        return "factors", ""
    if kind == "embedding" and target.naming != "diffusers":
        return "factors", ""
    if kind == "experts" and "expert_lora" in target.holds:
        return "factors", ""
    if kind in ("norm", "bias") or "full" in target.holds:
        way, reason = _whole(target)
        return way, reason and f"{target.name} has no words for {_WORDS[kind]}"
    return "none", f"{target.name} has no words for {_WORDS[kind]}"


def _whole(target: Format) -> tuple[Way, str]:
    """Return how the format says a change that is not factored."""
    if "full" in target.holds:
        return "whole", ""
    if target.naming == "transformers":
        return "copy", ""
    return "none", f"{target.name} has no words for a change that is not factored"


_WORDS: Mapping[Kind, str] = {
    "embedding": "an embedding",
    "experts": "a stack of experts",
    "norm": "a norm",
    "bias": "a bias without a weight",
    "other": "a parameter of its own",
}


def _nameable(pair: ModelPair, family: Family, target: Format) -> frozenset[str]:
    """Return the modules that have a name in the format."""
    modules = frozenset(_split(family.path(one.full_name))[0] for one in pair.pairs)
    if family.names in (target.naming, "transformers"):
        return modules
    if family.names == "diffusers" and target.naming == "transformers":
        return modules
    if family.arch is None:
        raise UnknownArchitectureError(
            f"these models are of no known architecture, so {target.name} names are unknown",
            hint="--to diffusers or peft keeps their own, or say which it is with --arch",
        )
    words = vocabulary_of(family.arch)
    own = BaseNames(words, {family.path(name): shape for name, shape in pair.shapes.items()})
    wanted = "diffusers" if target.naming == "transformers" else target.naming

    def is_known(module: str) -> bool:
        hit = words.resolve([module])[module] or own.own_hit(module)
        return hit is not None and (bool(hit.paths) or wanted != "diffusers")

    return frozenset(module for module in modules if is_known(module))


# ── patterns ─────────────────────────────────────────────────────────────────────────────────


def compiled(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    """Return the regular expressions; raises OptionError naming one that is none."""
    return [_compiled(pattern) for pattern in patterns]


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise OptionError(
            f"{pattern!r} is not a regular expression ({error})",
            hint=r"for example 'self_attn' or 'layers\.[0-9]\.'",
        ) from error


def matches(patterns: Sequence[re.Pattern[str]], name: str) -> bool:
    """Return whether any of the patterns is found in the name."""
    return any(pattern.search(name) for pattern in patterns)
