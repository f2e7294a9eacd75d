"""Alpha from the five places where it hides: one value per module, or a refusal.

In order of trust: a tensor beside the factors; diffusers' ``lora_adapter_metadata``; loose words
in the metadata (``lora_alpha``, ``network_alpha``, ``alpha``); ``adapter_config.json`` beside the
file; nowhere, which means the rank. Places that contradict each other are an error, because every
tool picks another one. kohya's ``ss_network_alpha`` is a note for people and counts for nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from loratools.errors import MalformedAdapterError
from loratools.formats.format import Bundle
from loratools.formats.peft_config import CONFIG_NAME, LARGEST_ALPHA, PeftConfig

ADAPTER_WORDS = "lora_adapter_metadata"
"""Key of diffusers' JSON of LoraConfig fields, each under its component's name."""

COMPONENTS = (
    "transformer",
    "transformer_2",
    "unet",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
    "connectors",
    "text_conditioner",
)
_FLAT = ("lora_alpha", "network_alpha", "alpha")
_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class AlphaSources:
    """What a file says of alpha outside its tensors.

    Attributes:
        configs: LoraConfig fields by component; the empty name for the whole file.
        flat: loose (alpha, rank or None) by component; the empty name for the whole file.
        sidecar: adapter_config.json, if it lies beside the file.
    """

    configs: Mapping[str, PeftConfig] = field(default_factory=lambda: MappingProxyType({}))
    flat: Mapping[str, tuple[float, float | None]] = field(
        default_factory=lambda: MappingProxyType({})
    )
    sidecar: PeftConfig | None = None

    def stated(self, path: str, rank: int) -> list[tuple[str, float]]:
        """Return (place, alpha) for every place that speaks of the module at ``path``."""
        found: list[tuple[str, float]] = []
        component, inner = _split_component(path)
        name, config = _pick(self.configs, component)
        if config is not None:
            shown = f"{ADAPTER_WORDS}{f' of {name}' if name else ''}"
            found.append((shown, _configured(config, inner, rank)))
        name, loose = _pick(self.flat, component)
        if loose is not None:
            alpha, stated_rank = loose
            found.append(("metadata", alpha * rank / (stated_rank or rank)))
        if self.sidecar is not None:
            found.append((CONFIG_NAME, _configured(self.sidecar, inner, rank)))
        return found

    def resolve(self, path: str, rank: int, stored: Tensor | None) -> float:
        """Return the module's alpha.

        Raises:
            MalformedAdapterError: two places disagree, or the tensor is no finite number.
        """
        places = self.stated(path, rank)
        if stored is not None:
            places = [("the alpha tensor", read_scalar(stored)), *places]
        if not places:
            return float(rank)
        (trusted, alpha), *others = places
        for place, other in others:
            if not _agree(alpha, other, stored):
                raise MalformedAdapterError(
                    f"{path}: {trusted} says alpha {alpha:g}, {place} says {other:g} (rank {rank})"
                )
        return alpha


def find_alpha_sources(bundle: Bundle) -> AlphaSources:
    """Collect what metadata and side files say; raises MalformedAdapterError for broken words."""
    metadata, source = bundle.metadata, bundle.source
    configs = _adapter_configs(metadata.get(ADAPTER_WORDS), source)
    flat = {}
    for component in ("", *COMPONENTS):
        prefix = f"{component}." if component else ""
        words = [prefix + word for word in _FLAT if prefix + word in metadata]
        values = {_number(metadata[word], word, source) for word in words}
        if len(values) > 1:
            raise MalformedAdapterError(f"{source}: metadata words {', '.join(words)} disagree")
        if values:
            rank = metadata.get(f"{prefix}r")
            stated = None if rank is None else _number(rank, f"{prefix}r", source)
            flat[component] = (values.pop(), stated or None)
    text = bundle.sidecars.get(CONFIG_NAME)
    sidecar = None if text is None else _config(_parsed(text, CONFIG_NAME, source), source)
    return AlphaSources(configs, flat, sidecar)


def drop_alpha_words(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata without any word on alpha: a writer states alpha once, in its own way."""
    prefixes = ("", *(f"{component}." for component in COMPONENTS))
    spoken = {prefix + word for prefix in prefixes for word in (*_FLAT, "r")}
    spoken |= {ADAPTER_WORDS, CONFIG_NAME}
    return {key: value for key, value in metadata.items() if key not in spoken}


def read_scalar(tensor: Tensor) -> float:
    """Return the one number of a tensor of any dtype; raises MalformedAdapterError."""
    if tensor.numel() != 1:
        raise MalformedAdapterError(f"alpha of shape {tuple(tensor.shape)} is not one number")
    value = float(tensor.to(torch.float64).item())
    if not abs(value) <= LARGEST_ALPHA:
        raise MalformedAdapterError(f"alpha is {value}")
    return value


def _agree(alpha: float, other: float, stored: Tensor | None) -> bool:
    if math.isclose(alpha, other, rel_tol=_TOLERANCE):
        return True
    # A tensor of few bits cannot say every number: 257 is 256 in bfloat16.
    return (
        stored is not None
        and stored.is_floating_point()
        and float(torch.tensor(other).to(stored.dtype).item()) == alpha
    )


def _split_component(path: str) -> tuple[str, str]:
    head, _, rest = path.partition(".")
    if head == "diffusion_model":
        return "transformer", rest
    return (head, rest) if head in COMPONENTS and rest else ("", path)


def _pick(table: Mapping[str, Any], component: str) -> tuple[str, Any]:
    """Return the entry for a component, else for the whole file, else an only denoiser's."""
    denoisers = [name for name in table if not name.startswith("text_encoder")]
    if component in table:
        return component, table[component]
    if "" in table:
        return "", table[""]
    if component in ("", "transformer") and len(denoisers) == 1:
        return denoisers[0], table[denoisers[0]]
    return "", None


def _configured(config: PeftConfig, module: str, rank: int) -> float:
    # Twelve digits: alpha / r · r is not alpha for every r.
    return float(f"{config.scale(module) * rank:.12g}")


def _adapter_configs(text: str | None, source: str) -> dict[str, PeftConfig]:
    if text is None:
        return {}
    words = _parsed(text, ADAPTER_WORDS, source)
    fields: dict[str, dict[str, Any]] = {}
    for key, value in words.items():
        component, name = _split_component(key)
        fields.setdefault(component, {})[name] = value
    return {component: _config(found, source) for component, found in fields.items()}


def _config(fields: Mapping[str, Any], source: str) -> PeftConfig:
    # PEFT's LoHa and LoKr call it alpha.
    if "alpha" in fields and "lora_alpha" not in fields:
        fields = {**fields, "lora_alpha": fields["alpha"]}
    return PeftConfig(fields, source)


def _parsed(text: str, name: str, source: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise MalformedAdapterError(f"{source}: {name} is not JSON ({error})") from error
    if not isinstance(fields, dict):
        raise MalformedAdapterError(f"{source}: {name} is not a JSON object")
    return fields


def _number(text: str, word: str, source: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= LARGEST_ALPHA:
        raise MalformedAdapterError(f"{source}: metadata {word} is {text!r}, not a number")
    return value
