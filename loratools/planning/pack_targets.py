"""The packed schemes that checkpoints are written in: their settings, and the config's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from loratools.codecs.packers import BnB4Packer, FP8Packer, Int8Packer, MLXPacker, Packer

Config = Callable[[list[str], str], dict[str, Any]]
"""(modules left as they are, float type's name) → fields of ``config.json``."""


@dataclass(frozen=True, slots=True)
class Target:
    """One way to pack the layers of a checkpoint.

    Attributes:
        packer: the scheme.
        config: what ``config.json`` then says.
        tables: whether the tool quantises embeddings and heads too.
        metadata: the ``format`` that the files state.
        skip: the modules that stay as they are; None for those that the tool leaves by itself.
        own: module → its own settings, or None where it stays as it is.
        experts: whether experts that are stored one by one are packed.
    """

    packer: Packer
    config: Config
    tables: bool = False
    metadata: str = "pt"
    skip: tuple[str, ...] | None = None
    own: Mapping[str, Packer | None] = field(default_factory=lambda: MappingProxyType({}))
    experts: bool = False


def _bitsandbytes(packer: Packer) -> Config:
    def config(left: list[str], dtype: str) -> dict[str, Any]:
        four = packer if isinstance(packer, BnB4Packer) else None
        words = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": four is not None,
            "load_in_8bit": four is None,
            "_load_in_4bit": four is not None,
            "_load_in_8bit": four is None,
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": left,
            "llm_int8_threshold": 6.0,
            "bnb_4bit_compute_dtype": dtype,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_quant_type": four.kind if four else "fp4",
            "bnb_4bit_use_double_quant": four.nested if four else False,
        }
        return {"quantization_config": words}

    return config


def _fp8(left: list[str], dtype: str) -> dict[str, Any]:
    words = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic",
        "weight_block_size": [128, 128], "modules_to_not_convert": left,
    }  # fmt: skip
    return {"quantization_config": words}


def _mlx(packer: MLXPacker) -> Config:
    words = {"group_size": packer.group, "bits": packer.bits}
    return lambda left, dtype: {"quantization": words, "quantization_config": words}


_BNB = {
    "nf4": BnB4Packer("nf4"), "nf4-double": BnB4Packer("nf4", nested=True),
    "fp4": BnB4Packer("fp4"), "fp4-double": BnB4Packer("fp4", nested=True), "int8": Int8Packer(),
}  # fmt: skip
_MLX = {f"mlx-{bits}": MLXPacker(bits) for bits in (2, 3, 4, 5, 6, 8)}

PACKED_TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        **{name: Target(packer, _bitsandbytes(packer)) for name, packer in _BNB.items()},
        "fp8": Target(FP8Packer(), _fp8),
        **{name: Target(packer, _mlx(packer), True, "mlx") for name, packer in _MLX.items()},
    }
)
"""The words of ``--to`` for checkpoints: bitsandbytes, DeepSeek's FP8 blocks, MLX."""
