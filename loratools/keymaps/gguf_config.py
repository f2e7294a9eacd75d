"""A base model's hyper-parameters by the words of its ``config.json``, or of its GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loratools.errors import InputError

_ALIASES: Mapping[str, tuple[str, ...]] = {
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("n_kv_heads", "num_kv_heads", "n_head_kv"),
    "hidden_size": ("n_embd", "d_model", "n_embed"),
    "num_hidden_layers": ("n_layers", "n_layer", "num_layers"),
    "intermediate_size": ("ffn_hidden_size", "n_inner"),
    "num_experts": (
        "num_local_experts", "n_routed_experts", "moe_num_experts", "moe_num_primary_experts",
    ),
}  # fmt: skip
"""Word → what other models call the same number."""

_FROM_GGUF: Mapping[str, str] = {
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "head_dim": "attention.key_length",
    "intermediate_size": "feed_forward_length",
    "moe_intermediate_size": "expert_feed_forward_length",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "kv_lora_rank": "attention.kv_lora_rank",
    "vocab_size": "vocab_size",
    "linear_key_head_dim": "ssm.state_size",
    "linear_num_key_heads": "ssm.group_count",
    "linear_num_value_heads": "ssm.time_step_rank",
    "ssm_inner_size": "ssm.inner_size",
    "indexer_n_heads": "attention.indexer.head_count",
    "indexer_head_dim": "attention.indexer.key_length",
    "v_head_dim": "attention.value_length_mla",
    "key_length_mla": "attention.key_length_mla",
    "qk_rope_head_dim": "rope.dimension_count",
    "rope_sections": "rope.dimension_sections",
    "rope_dimensions": "rope.dimension_count",
}
"""config.json's word → the key behind the architecture's name in a GGUF file."""


@dataclass(frozen=True)
class BaseConfig:
    """Hyper-parameters of a base.

    Attributes:
        fields: word → value, from the top level and the text model's section.
        source: how errors call the file.
        used: what was asked for so far, which suffices to read the adapter back.
    """

    fields: Mapping[str, Any]
    source: str
    used: dict[str, Any] = field(default_factory=dict)

    def get(self, word: str, block: int | None = None) -> Any:
        """Return a value under any of its names, that of one block where it is a list."""
        for name in (word, *_ALIASES.get(word, ())):
            value = self.fields.get(name)
            if value is not None:
                self.used[word] = value
                return value[block] if isinstance(value, list) and block is not None else value
        return None

    def number(self, word: str, block: int | None = None) -> int:
        """Return a whole number above 0; raises InputError where the base does not say it."""
        value = self.get(word, block)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(
                f"{self.source}: {word} is {value!r}, and the layout depends on it",
                hint="give the base model's folder or its config.json with --base",
            )
        return value

    def factor(self, word: str, place: int | None = None) -> float:
        """Return a number that is not 0; raises InputError where the base does not say it."""
        value = self.get(word)
        value = value[place] if isinstance(value, list) and place is not None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value:
            raise InputError(
                f"{self.source}: {word} is {value!r}, and the converted weights depend on it",
                hint="give the base model's folder or its config.json with --base",
            )
        return float(value)

    def heads(self, block: int | None) -> int:
        """Return the number of query heads."""
        return self.number("num_attention_heads", block)

    def kv_heads(self, block: int | None) -> int:
        """Return the number of key heads, which is that of queries where nothing is said."""
        if self.get("num_key_value_heads", block) is None:
            return self.heads(block)
        return self.number("num_key_value_heads", block)

    def head_size(self, block: int | None) -> int:
        """Return the length of a head."""
        if self.get("head_dim") is not None:
            return self.number("head_dim")
        return self.number("hidden_size") // self.heads(block)


def flat_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the text model's section laid over the top level."""
    merged = dict(config)
    for section in ("text_config", "llm_config", "language_config", "thinker_config"):
        part = config.get(section)
        if isinstance(part, Mapping):
            merged |= flat_config(part)
    # The text model's own class is a detail: the whole model's says how it is named.
    if config.get("architectures"):
        merged["architectures"] = config["architectures"]
    kinds = merged.get("layer_types") or merged.get("layers_block_type") or ()
    merged["mamba_layers"] = any("mamba" in str(kind) for kind in kinds)
    return merged


def config_from_gguf(arch: str, word: Any) -> dict[str, Any]:
    """Return what a GGUF file says, in config.json's words.

    Args:
        arch: its ``general.architecture``.
        word: function of a metadata key, which returns its value or ``None``.
    """
    found = {name: word(f"{arch}.{key}") for name, key in _FROM_GGUF.items()}
    config = {name: value for name, value in found.items() if value is not None}
    config["mamba_layers"] = "linear_key_head_dim" in config
    values = config.get("linear_num_value_heads")
    if values and config.get("ssm_inner_size"):
        config["linear_value_head_dim"] = config["ssm_inner_size"] // values
    if "key_length_mla" in config and "qk_rope_head_dim" in config:
        config["qk_nope_head_dim"] = config["key_length_mla"] - config["qk_rope_head_dim"]
        config["num_key_value_heads"] = config["num_attention_heads"]
    return config
