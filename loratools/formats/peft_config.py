"""PEFT's ``adapter_config.json``: what its fields mean for the weights, and a minimal one.

Source: peft 0.21 ``tuners/lora/config.py`` and ``utils/other.py`` (pattern matching).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loratools.errors import MalformedAdapterError, UnsupportedError

CONFIG_NAME = "adapter_config.json"
LARGEST_ALPHA = 3.4028234663852886e38
"""Of float32, in which changes are folded."""

_DEFAULT_RANK = 8
_DEFAULT_ALPHA = 8

NOT_WEIGHTS = frozenset(
    {
        "PROMPT_TUNING",
        "MULTITASK_PROMPT_TUNING",
        "P_TUNING",
        "PREFIX_TUNING",
        "ADAPTION_PROMPT",
        "CPT",
        "CARTRIDGE",
        "SHADOW",
    }
)
INPUT_DEPENDENT = frozenset({"XLORA", "POLY", "LILY"})
PARAMETER_ORDER = ("gate_up_proj", "up_proj", "down_proj")
"""Parameters of transformers' expert modules, in the order in which they are registered."""

READABLE_TYPES = ("LORA", "TRAINABLE_TOKENS")

_REFUSED_FIELDS: Mapping[str, tuple[str, str]] = {
    "arrow_config": (
        "Arrow routes between adapters at run time, so no fixed weight equals it",
        "merge one of its adapters by itself",
    ),
    "layer_replication": (
        "the adapter counts replicated layers that the base checkpoint does not store",
        "write the expanded base with transformers first, then merge into that",
    ),
}

# Modules that PEFT saves by itself for a task type.
_HEADS: Mapping[str, tuple[str, ...]] = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
_MOVED_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True, slots=True)
class PeftConfig:
    """A parsed adapter_config.json of a kind that can be folded.

    Attributes:
        fields: the JSON object, untouched.
        source: how errors call the file.
    """

    fields: Mapping[str, Any]
    source: str

    def flag(self, name: str) -> bool:
        """Return whether the field is set to something true."""
        return bool(self.fields.get(name))

    @property
    def start(self) -> str | None:
        """The initialisation that moved the base (its full word), or None."""
        word = self.fields.get("init_lora_weights")
        moved = isinstance(word, str) and word.lower().startswith(_MOVED_STARTS)
        return str(word).lower() if moved else None

    def rank(self, module: str) -> int:
        """Return the configured rank of a module, by rank_pattern or the default."""
        value = self._patterned("rank_pattern", module, self.fields.get("r", _DEFAULT_RANK))
        return int(self._number("r", value))

    def scale(self, module: str, stored_rank: int | None = None) -> float:
        """Return alpha/r or alpha/√r (rank-stabilised) of a module, in PEFT's way."""
        alpha, divisor = self._scaling(module, stored_rank)
        return alpha / divisor

    def alpha(self, module: str, stored_rank: int) -> float:
        """Return the alpha that gives the module's scale with the rank of its tensors.

        Where that is the configured alpha, it is returned as it is: alpha / r · r may differ.
        """
        alpha, divisor = self._scaling(module, stored_rank)
        return alpha if divisor == stored_rank else alpha / divisor * stored_rank

    def _scaling(self, module: str, stored_rank: int | None) -> tuple[float, float]:
        """Return alpha and what it is divided by.

        PEFT sorts the patterns when it saves them, so that the first match may be another than
        it was in training. Where ``stored_rank`` contradicts the first match and agrees with a
        later one, that one's row is taken for both rank and alpha.
        """
        default = self.fields.get("lora_alpha", _DEFAULT_ALPHA)
        row = self.resorted_row(module, stored_rank) if stored_rank else None
        if row is not None and row in (self.fields.get("alpha_pattern") or {}):
            value = self.fields["alpha_pattern"][row]
        else:
            value = self._patterned("alpha_pattern", module, default)
        alpha = self._number("lora_alpha", value)
        rank = self.rank(module) if row is None or stored_rank is None else stored_rank
        if rank <= 0:
            raise MalformedAdapterError(f"{self.source}: rank {rank} for {module} in {CONFIG_NAME}")
        return alpha, (rank**0.5 if self.flag("use_rslora") else rank)

    def parameters(self, module: str) -> list[str]:
        """Return which parameters of a module ``target_parameters`` names, inner wrapper first.

        PEFT nests its wrappers in the order in which the module registers its parameters.
        """
        entries = [str(entry) for entry in self.fields.get("target_parameters") or []]
        leaves = {
            entry.rpartition(".")[2]
            for entry in entries
            if f".{module}".endswith("." + entry.rpartition(".")[0])
        }
        known = [name for name in PARAMETER_ORDER if name in leaves]
        return [*known, *sorted(leaves - set(known))]

    def targets(self, module: str) -> bool:
        """Return whether ``target_modules`` selects a module; True where it cannot tell."""
        words = self.fields.get("target_modules")
        told = words and isinstance(words, (str, list)) and not self.fields.get("target_parameters")
        return not told or self._names(module)

    def _names(self, module: str) -> bool:
        """Return whether ``target_modules``, which is set, names a module."""
        words = self.fields["target_modules"]
        if isinstance(words, str):
            return self.targets_everything or _fits(words, module)
        # nn.MultiheadAttention is one target with two projections.
        owner = module.removesuffix(".out_proj")
        return any(f".{m}".endswith(f".{w}") for w in words for m in (module, owner))

    @property
    def targets_everything(self) -> bool:
        """Whether ``target_modules`` says no more than that all linear layers are meant."""
        return str(self.fields.get("target_modules")).lower() == "all-linear"

    def selects(self, module: str) -> bool:
        """Return whether PEFT adapts a module of this name, by every word that narrows it."""
        if not self.fields.get("target_modules") or not self._names(module):
            return False
        excluded = self.fields.get("exclude_modules") or []
        if isinstance(excluded, str):
            left_out = _fits(excluded, module)
        else:
            left_out = any(f".{module}".endswith(f".{name}") for name in excluded)
        saved = [*(self.fields.get("modules_to_save") or []), *self._head_names()]
        left_out |= any(f".{name}." in f".{module}." for name in saved)
        return not left_out and self._transforms(module)

    def _transforms(self, module: str) -> bool:
        """Return whether ``layers_to_transform`` has the module's layer, or is not set."""
        wanted = self.fields.get("layers_to_transform")
        if wanted in (None, []) or isinstance(self.fields.get("target_modules"), str):
            return True
        # The first number after a name counts; experts have later ones.
        patterns = self.fields.get("layers_pattern") or r"[^.]*"
        names = [patterns] if isinstance(patterns, str) else patterns
        hits = (re.match(rf"(?:|.*?\.){name}\.(\d+)\.", module) for name in names)
        hit = next((hit for hit in hits if hit), None)
        return hit is not None and int(hit[1]) in (wanted if isinstance(wanted, list) else [wanted])

    @property
    def swaps_parameter_axes(self) -> bool:
        """Whether lora_A runs over the first axis of a stored expert, as up to PEFT 0.18."""
        match = re.match(r"(\d+)\.(\d+)", str(self.fields.get("peft_version") or ""))
        return match is not None and (int(match[1]), int(match[2])) < (0, 19)

    def resorted_row(self, module: str, stored_rank: int) -> str | None:
        """Return the later rank_pattern that says ``stored_rank`` where the first does not."""
        if self.rank(module) == stored_rank:
            return None
        patterns = self.fields.get("rank_pattern") or {}
        fitting = (
            pattern
            for pattern, value in patterns.items()
            if value == stored_rank and pattern_matches(pattern, module, self.source)
        )
        return next(fitting, None)

    def saves_module(self, name: str) -> bool:
        """Return whether ``modules_to_save`` covers the tensor (PEFT: endswith, without a dot)."""
        entries = [*(self.fields.get("modules_to_save") or []), *self._head_names()]
        parts = name.split(".")
        ancestors = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(a.endswith(str(entry)) for a in ancestors for entry in entries)

    def _head_names(self) -> tuple[str, ...]:
        return _HEADS.get(str(self.fields.get("task_type") or ""), ())

    def _patterned(self, field: str, module: str, default: Any) -> Any:
        patterns = self.fields.get(field) or {}
        if not isinstance(patterns, Mapping):
            raise MalformedAdapterError(f"{self.source}: {field} is not an object")
        for pattern, value in patterns.items():
            if pattern_matches(pattern, module, f"{self.source}: {field}"):
                return value
        # As in PEFT, a name that matches no pattern, not even itself, may still be a key.
        return patterns.get(module, default)

    def _number(self, field: str, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise MalformedAdapterError(f"{self.source}: {field} is {value!r}, not a number")
        if not abs(value) <= LARGEST_ALPHA:
            shown = str(value)[:24]
            raise MalformedAdapterError(
                f"{self.source}: {field} is {shown}, which float32 cannot hold"
            )
        return float(value)


def _fits(pattern: str, module: str) -> bool:
    """Return whether an expression of target_modules or exclude_modules is all of the path."""
    try:
        return re.fullmatch(pattern, module) is not None
    except re.error:
        # PEFT could not have used it, so the file's own layers are all there is to go by.
        return True


def pattern_matches(pattern: str, module: str, where: str) -> bool:
    """Return whether a rank/alpha pattern selects a module, as PEFT's get_pattern_key does."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except re.error as error:
        raise MalformedAdapterError(
            f"{where} has {pattern!r}, which is not a regular expression ({error})",
            hint=f"correct the pattern in {CONFIG_NAME}",
        ) from error


def parse_config(text: str, source: str) -> PeftConfig:
    """Parse adapter_config.json and refuse what cannot be folded, with the reason.

    Raises MalformedAdapterError for broken JSON, UnsupportedError for other PEFT methods.
    """
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise MalformedAdapterError(f"{source}: {CONFIG_NAME} is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise MalformedAdapterError(f"{source}: {CONFIG_NAME} is not a JSON object")
    config = PeftConfig(fields, source)
    _refuse_type(str(fields.get("peft_type", "")).upper(), source)
    for name, (reason, remedy) in _REFUSED_FIELDS.items():
        if fields.get(name):
            raise UnsupportedError(f"{source}: {name} is set: {reason}", hint=remedy)
    return config


def _refuse_type(peft_type: str, source: str) -> None:
    if peft_type in READABLE_TYPES:
        return
    if not peft_type:
        raise MalformedAdapterError(f"{source}: {CONFIG_NAME} has no peft_type")
    if peft_type in NOT_WEIGHTS:
        reason = "it changes the prompt or the activations, not the weights"
    elif peft_type in INPUT_DEPENDENT:
        reason = "its change depends on the input, so no fixed weight equals it"
    else:
        reason = "loratools does not read this method yet"
    raise UnsupportedError(
        f"{source}: PEFT method {peft_type}: {reason}",
        hint="serve it as an adapter with PEFT",
    )
