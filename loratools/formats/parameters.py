"""The one table of parameter suffixes of the diffusion formats, and how a key is cut at them.

Sources: sd-scripts ``networks/lora.py``, LyCORIS ``modules/*.py``, ComfyUI
``comfy/weight_adapter``, diffusers ``utils/state_dict_utils.py``, PEFT ``utils/save_and_load.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

SUFFIXES: tuple[tuple[str, str], ...] = (
    # LoRA: every way to say down and up
    ("lora_down.weight", "down"),
    ("lora_up.weight", "up"),
    ("lora_mid.weight", "mid"),
    ("lora_up.bias", "bias"),
    ("lora_A.weight", "down"),
    ("lora_B.weight", "up"),
    ("lora_B.bias", "bias"),
    ("lora_A", "down"),
    ("lora_B", "up"),
    ("lora.down.weight", "down"),
    ("lora.up.weight", "up"),
    ("lora_linear_layer.down.weight", "down"),
    ("lora_linear_layer.up.weight", "up"),
    ("down.weight", "down"),
    ("up.weight", "up"),
    ("lora_embedding_A", "embedding_down"),
    ("lora_embedding_B", "embedding_up"),
    ("alpha", "alpha"),
    ("scale", "scale"),
    ("dyn_dim", "dyn_dim"),
    # DoRA
    ("dora_scale", "magnitude"),
    ("lora_magnitude_vector", "peft_magnitude"),
    ("lora_magnitude_vector.weight", "peft_magnitude"),
    ("magnitude", "peft_magnitude"),
    # LoHa
    ("hada_w1_a", "hada_w1_a"),
    ("hada_w1_b", "hada_w1_b"),
    ("hada_w2_a", "hada_w2_a"),
    ("hada_w2_b", "hada_w2_b"),
    ("hada_t1", "hada_t1"),
    ("hada_t2", "hada_t2"),
    # LoKr
    ("lokr_w1", "lokr_w1"),
    ("lokr_w1_a", "lokr_w1_a"),
    ("lokr_w1_b", "lokr_w1_b"),
    ("lokr_w2", "lokr_w2"),
    ("lokr_w2_a", "lokr_w2_a"),
    ("lokr_w2_b", "lokr_w2_b"),
    ("lokr_t2", "lokr_t2"),
    # full tensors
    ("diff", "diff"),
    ("diff_b", "diff_b"),
    ("w_norm", "w_norm"),
    ("b_norm", "b_norm"),
    ("set_weight", "set_weight"),
    ("reshape_weight", "reshape_weight"),
    # OFT and BOFT
    ("oft_blocks", "oft_blocks"),
    ("oft_diag", "oft_blocks"),
    ("rescale", "rescale"),
    # GLoRA
    ("a1.weight", "glora_a1"),
    ("a2.weight", "glora_a2"),
    ("b1.weight", "glora_b1"),
    ("b2.weight", "glora_b2"),
    ("bm.weight", "glora_bm"),
    # IA3
    ("weight", "ia3_weight"),
    ("on_input", "on_input"),
    # what LyCORIS' extraction leaves beside a LoRA
    ("bias_indices", "bias_indices"),
    ("bias_values", "bias_values"),
    ("bias_size", "bias_size"),
    # T-LoRA
    ("q_layer.weight", "tlora"),
    ("p_layer.weight", "tlora_p"),
    ("lambda_layer", "tlora_lambda"),
)
"""What follows the module's name in a key, and the field it means."""

FIELDS: Mapping[str, str] = dict(SUFFIXES)

_PEFT: Mapping[str, str] = {
    "down": "lora_A.weight",
    "up": "lora_B.weight",
    "bias": "lora_B.bias",
    "peft_magnitude": "lora_magnitude_vector",
    "embedding_down": "lora_embedding_A",
    "embedding_up": "lora_embedding_B",
}


def _first_spellings() -> dict[str, str]:
    first: dict[str, str] = {}
    for suffix, field in SUFFIXES:
        first.setdefault(field, suffix)
    return first


KOHYA_NAMES: Mapping[str, str] = {k: v for k, v in _first_spellings().items() if k != "bias"}
"""How sd-scripts and LyCORIS spell each field. No tool reads a bias of ``lora_up``: the change of
the layer's own bias (``diff_b``) says the same."""

PEFT_NAMES: Mapping[str, str] = {**KOHYA_NAMES, **_PEFT}
"""How PEFT, diffusers and ai-toolkit spell each field."""

# `optimizer` and `__…` are not among these: they are refused as unknown.
_CARRIED = re.compile(r"^bundle_emb\.|(?:^|\.)\w*_aux(?:\.|$)")
_DEFAULT = re.compile(r"\.default(?=\.weight$|\.bias$|$)")
_LONGEST = max(suffix.count(".") + 1 for suffix, _ in SUFFIXES)


def is_carried(name: str) -> bool:
    """Return whether a tensor is no module's: a textual-inversion bundle, slider notes (_aux)."""
    return _CARRIED.search(name) is not None


def strip_default(name: str) -> str:
    """Return the name without PEFT's in-memory adapter name (``lora_A.default.weight``)."""
    return _DEFAULT.sub("", name)


def split_flattened(name: str) -> tuple[str, str] | None:
    """Return module and field of a key whose module name has no dots, or None if unknown."""
    module, _, suffix = strip_default(name).partition(".")
    field = FIELDS.get(suffix)
    return (module, field) if module and field else None


def split_dotted(name: str) -> tuple[str, str] | None:
    """Return module and field of a key with a dotted module name, or None if unknown.

    The longest known suffix counts: ``x.lora.down.weight`` is no ``down.weight`` of ``x.lora``.
    """
    parts = strip_default(name).split(".")
    for length in range(min(_LONGEST, len(parts) - 1), 0, -1):
        field = FIELDS.get(".".join(parts[-length:]))
        # IA3 exists under flattened names only; a dotted `weight` is a base model's.
        if field and field != "ia3_weight":
            return ".".join(parts[:-length]), field
    return None
