"""Rows about mixture-of-experts models: fused parameters in memory, one tensor an expert on disk.

Source: transformers 5.23 ``conversion_mapping.py``. ``{e}`` is the expert's number; the row blocks
of a fused weight are the templates' tensors in order.
"""

from __future__ import annotations

EXPERTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (
        ".mlp.experts.gate_up_proj",
        (".mlp.experts.{e}.gate_proj.weight", ".mlp.experts.{e}.up_proj.weight"),
    ),
    (".mlp.experts.down_proj", (".mlp.experts.{e}.down_proj.weight",)),
    (".mlp.experts.up_proj", (".mlp.experts.{e}.up_proj.weight",)),
    (
        ".mlp.experts.gate_up_proj",
        (".block_sparse_moe.experts.{e}.w1.weight", ".block_sparse_moe.experts.{e}.w3.weight"),
    ),
    (".mlp.experts.down_proj", (".block_sparse_moe.experts.{e}.w2.weight",)),
    (
        ".feed_forward.experts.gate_up_proj",
        (
            ".feed_forward.experts.{e}.gate_proj.weight",
            ".feed_forward.experts.{e}.up_proj.weight",
        ),
    ),
    (".feed_forward.experts.down_proj", (".feed_forward.experts.{e}.down_proj.weight",)),
    (
        ".feed_forward.experts.gate_up_proj",
        (".feed_forward.experts.{e}.w1.weight", ".feed_forward.experts.{e}.w3.weight"),
    ),
    (".feed_forward.experts.down_proj", (".feed_forward.experts.{e}.w2.weight",)),
    (".mixer.experts.up_proj", (".mixer.experts.{e}.up_proj.weight",)),
    (".mixer.experts.down_proj", (".mixer.experts.{e}.down_proj.weight",)),
    # fused on disk too, under another name
    (".block_sparse_moe.experts.gate_up_proj", (".block_sparse_moe.input_linear.weight",)),
    (".block_sparse_moe.experts.down_proj", (".block_sparse_moe.output_linear.weight",)),
)
"""(parameter in memory, its tensors on disk)."""

INFIXES: tuple[tuple[str, str], ...] = (
    (".mlp.gate.", ".block_sparse_moe.gate."),
    (".mlp.router.", ".block_sparse_moe.gate."),
    (".block_sparse_moe.router.", ".block_sparse_moe.router.layer."),
)
"""Pairs of inner path parts under which the same router goes, in either direction."""

TRANSPOSED_TYPES: frozenset[str] = frozenset({"gpt_oss", "aria_text", "openai_privacy_filter"})
"""Model types whose fused experts are stored (experts, in, out)."""
