"""Names that users give to types of few bits, for completion, which answers without torch.

The tables that decide (``codecs.ggml_mixes``, ``planning.pack_targets``, ``planning.quantising``)
import torch; a test compares.
"""

from __future__ import annotations

GGUF_MIXES = (
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s",
    "iq4_nl", "iq4_xs", "q4_1", "q4_0", "mxfp4_moe", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "tq2_0",
    "tq1_0",
)  # fmt: skip
"""What ``quantize --to`` makes of a GGUF model."""

FOLDER_TYPES = (
    "nf4", "nf4-double", "fp4", "fp4-double", "int8", "fp8",
    "mlx-2", "mlx-3", "mlx-4", "mlx-5", "mlx-6", "mlx-8",
)  # fmt: skip
"""What it makes of a Hugging Face folder."""

BLOCK_TYPES = (
    "f32", "f16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k",
    "iq4_nl", "iq4_xs", "bf16", "tq1_0", "tq2_0", "mxfp4", "nvfp4",
)  # fmt: skip
"""The types in which ``merge --quant`` writes the touched tensors of a GGUF model."""
