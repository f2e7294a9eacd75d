"""Which GGUF adapter tensors llama.cpp loads and then never applies.

Its graphs multiply with these weights directly instead of through the function that adds LoRA.
Source: llama.cpp ``src/models/*.cpp``, October 2026.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

_MLA = r"attn_(?:q|q_a|q_b|kv_a_mqa|k_b|v_b)|output"
_ALL = r"attn_\w+|ssm_\w+|ffn_\w+|output"

_IGNORED: Mapping[str, str] = {
    **dict.fromkeys(("deepseek2", "mistral4"), _MLA),
    **dict.fromkeys(("deepseek32", "glm-dsa", "dots3note", "hy_v4"), rf"{_MLA}|indexer\.\w+"),
    **dict.fromkeys(("glm5-next", "kimi-linear", "kimi-k3"), _ALL),
    "bailingmoe3": r"attn_\w+",
    "minicpm3": r"attn_(?:q_a|q_b|kv_a_mqa|kv_b)",
    "plm": r"attn_(?:q|kv_a_mqa|kv_b)",
    "deepseek4": r"attn_output_a|output",
    "gemma3n": r"altup_\w+",
    **dict.fromkeys(("nemotron_h", "nemotron_h_moe"), r"ffn_latent_\w+"),
    **dict.fromkeys(
        ("rwkv6", "rwkv7", "rwkv6qwen2", "arwkv7"), r"time_mix_(?:w|a|v|g|decay_w)[12]"
    ),
}
"""Architecture → the last part of the names of its deaf tensors."""

_BLOCK = re.compile(r"blk\.\d+\.")


def ignored_by_llama_cpp(arch: str, names: Iterable[str]) -> list[str]:
    """Return the tensors (without ``.weight``) whose LoRA llama.cpp would ignore."""
    pattern = _IGNORED.get(arch)
    if pattern is None:
        return []
    return [name for name in names if re.fullmatch(pattern, _BLOCK.sub("", name, count=1))]
