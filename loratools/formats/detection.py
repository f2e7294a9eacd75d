"""Which syntax a file is in: one decision, so that no two formats can claim the same file."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from loratools.formats.alphas import ADAPTER_WORDS
from loratools.formats.format import Listing
from loratools.formats.mlx_config import is_mlx_config
from loratools.formats.parameters import is_carried, split_dotted, split_flattened
from loratools.formats.peft_config import CONFIG_NAME

FLATTENED = re.compile(r"lora_(?:unet|te\d?|prior_unet|prior_te|transformer)_|lycoris_|oft_unet_")
"""How flattened module names begin."""

CONTROL_MARKER = "lora_controlnet"
"""The tensor by which Stability's Control-LoRAs are known."""

PEFT_PREFIX = re.compile(r"(?:^|\.)base_model\.model\.")
DENOISER = re.compile(
    r"(?:^|[._])(?:transformer_blocks|single_transformer_blocks|double_blocks|single_blocks"
    r"|joint_blocks|down_blocks|up_blocks|mid_block|input_blocks|middle_block|output_blocks"
    r"|double_layers|single_layers|noise_refiner|context_refiner|to_q|to_k|to_v|to_out|attn1|attn2"
    r"|cross_attn|adaLN_modulation|text_fusion|txtfusion|blocks)(?:[._]|$)"
)
"""Words in module names that only image and video models have (and MPT's blocks)."""

_CLONEOFSIMO = re.compile(r"^(?:unet|text_encoder):\d+:(?:up|down)$")
_GGUF = re.compile(r"\.weight\.lora_[ab]$")
_MLX = re.compile(r"\.lora_[ab]$")
_PROCESSOR = re.compile(r"(?:^|\.)processor\.")
_XLABS = re.compile(r"^(?:diffusion_model\.)?(?:double|single)_blocks\.\d+\.processor\.")
_OLD = re.compile(r"(?:_lora|\.lora|\.lora_linear_layer)\.(?:down|up)\.weight$")
_BFL_NORM = re.compile(r"^(?:double|single)_blocks\.\d+\..*_norm\.scale$")
_ORIGINAL = re.compile(r"^(?:diffusion_model|text_encoders)\.")
_DIFFUSERS = re.compile(
    r"^(?:transformer(?:_2)?|unet|text_encoder(?:_[23])?|connectors|text_conditioner)\."
)
_SURE_DIFFUSERS = re.compile(r"^(?:unet\.|transformer\.(?:single_)?transformer_blocks\.)")
_VAGUE = frozenset({"ia3_weight", "scale", "dyn_dim", "alpha", "magnitude", "rescale"})
"""Fields whose suffix a base model's tensor may have too."""

_ALPHA_WORDS = (ADAPTER_WORDS, "lora_alpha", "network_alpha", "alpha")
_Rule = Callable[[list[str], Listing], bool]


def dialect_of(listing: Listing) -> str | None:
    """Return the name of the format that a file is in, or None if it is in none.

    The first rule that holds decides; diffusion.md §1.6 is their order.
    """
    names = [name for name in listing.shapes if not is_carried(name)]
    found = next((name for name, rule in _RULES if rule(names, listing)), None)
    return found if names else None


def matcher(name: str) -> Callable[[Listing], bool]:
    """Return the predicate of the format ``name``."""
    return partial(_matches, name)


def _matches(name: str, listing: Listing) -> bool:
    return dialect_of(listing) == name


def is_old_spelling(name: str) -> bool:
    """Return whether a key is spelled as diffusers did in 2023."""
    return _OLD.search(name) is not None or _PROCESSOR.search(name) is not None


def _some(pattern: re.Pattern[str]) -> _Rule:
    return lambda names, listing: any(pattern.search(name) for name in names)


def _is_flattened(names: list[str], listing: Listing) -> bool:
    return any(FLATTENED.match(name) and _speaks(split_flattened(name), name) for name in names)


def _speaks(split: tuple[str, str] | None, name: str) -> bool:
    """Return whether a key says by itself that it belongs to an adapter."""
    if split is None or split[1] in _VAGUE:
        return False
    return split[1] not in ("down", "up") or "lora" in name


def _is_dotted(names: list[str]) -> bool:
    return any(_speaks(split_dotted(name), name) for name in names)


def _is_dump(names: list[str], listing: Listing) -> bool:
    """A PEFT state dict without its config, of a model for which alpha = rank is the custom."""
    if CONFIG_NAME in listing.sidecars or not _is_dotted(names):
        return False
    states_alpha = any(word in listing.metadata for word in _ALPHA_WORDS)
    wrapped = any(PEFT_PREFIX.search(name) or ".default." in name for name in names)
    prefixed = any(_ORIGINAL.match(name) or _DIFFUSERS.match(name) for name in names)
    known = states_alpha or any(DENOISER.search(name) for name in names)
    return known and (wrapped or not (prefixed or any(map(is_old_spelling, names))))


def _is_peft(names: list[str], listing: Listing) -> bool:
    wrapped = all(name.startswith("base_model.model.") for name in names)
    if CONFIG_NAME not in listing.sidecars:
        return wrapped
    return any(map(PEFT_PREFIX.search, names)) or not any(
        pattern.match(name) for name in names for pattern in (_ORIGINAL, _SURE_DIFFUSERS, _XLABS)
    )


def _is_bfl_control(names: list[str], listing: Listing) -> bool:
    return any(map(_BFL_NORM.match, names)) and _is_dotted(names)


def _is_old(names: list[str], listing: Listing) -> bool:
    return any(map(is_old_spelling, names)) and not any(map(_ORIGINAL.match, names))


def _is_original(names: list[str], listing: Listing) -> bool:
    return any(map(_ORIGINAL.match, names)) and _is_dotted(names)


def _is_diffusers(names: list[str], listing: Listing) -> bool:
    return any(map(_DIFFUSERS.match, names)) and _is_dotted(names)


def _is_gguf(names: list[str], listing: Listing) -> bool:
    return listing.metadata.get("general.type") == "adapter" and any(map(_GGUF.search, names))


def _is_mlx(names: list[str], listing: Listing) -> bool:
    """mlx-lm's factors, or whole tensors that its config announces."""
    factors = any(map(_MLX.search, names)) and not any(map(_GGUF.search, names))
    return factors or is_mlx_config(listing.sidecars.get(CONFIG_NAME))


def _is_control_lora(names: list[str], listing: Listing) -> bool:
    return CONTROL_MARKER in names


_RULES: tuple[tuple[str, _Rule], ...] = (
    ("gguf", _is_gguf),
    ("mlx", _is_mlx),
    ("cloneofsimo", _some(_CLONEOFSIMO)),
    ("comfyui", _is_control_lora),
    ("kohya", _is_flattened),
    ("xlabs", _some(_XLABS)),
    ("bfl-control", _is_bfl_control),
    ("peft-dump", _is_dump),
    ("peft", _is_peft),
    ("diffusers-old", _is_old),
    ("comfyui", _is_original),
    ("diffusers", _is_diffusers),
)
