"""A checkpoint of plain numbers in a packed scheme, as the scheme's own tool would write it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from loratools.basemodel import BaseModel, BaseTensor
from loratools.codecs.packers import BnB4Packer, FP8Packer, Int8Packer, MLXPacker, Packer
from loratools.errors import InputError, UnsupportedError
from loratools.keymaps.transformers_rows import CONV1D_TYPES
from loratools.report import Note
from loratools.streaming.blocks import TensorWork
from loratools.streaming.checkpoint import Checkpoint, plan_checkpoint
from loratools.streaming.layouts import FileWork
from loratools.tensorfiles.dtypes import DTYPES, FLOAT_WORDS

Config = Callable[[list[str], str], dict[str, Any]]
"""(modules left as they are, float type's name) → fields of ``config.json``."""

_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


@dataclass(frozen=True, slots=True)
class Target:
    """One word of ``--to`` that is no GGUF type.

    Attributes:
        packer: the scheme.
        config: what ``config.json`` then says.
        tables: whether the tool quantises embeddings and heads too.
        metadata: the ``format`` that the files state.
    """

    packer: Packer
    config: Config
    tables: bool = False
    metadata: str = "pt"


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
            "llm_int8_skip_modules": left or None,
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
        "weight_block_size": [128, 128], "modules_to_not_convert": left or None,
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

# Matrices that are no linear layer's: tables, whose rows are looked up.
_TABLES = re.compile(
    r"embed|(^|\.)(wte|wpe|shared|relative_attention_bias|position_bias|codebook)\.", re.IGNORECASE
)
# Linear layers that the tools leave: heads, and what decides among experts.
_LEFT = re.compile(r"(^|\.)(lm_head|embed_out|output|score|classifier|qa_outputs)\.weight$")
_ROUTERS = re.compile(r"(^|\.)(gate|router|shared_expert_gate)\.(weight|\w+\.weight)$")
_EXPERTS = re.compile(r"\.experts\.")


def plan_packing(base: BaseModel, word: str) -> tuple[Checkpoint, tuple[Note, ...]]:
    """Plan the linear layers of a checkpoint in a packed scheme.

    Raises:
        UnsupportedError: a base that is quantised already, GGUF, or whose layers lie turned over.
        InputError: no linear layer that the scheme could hold.
    """
    _refuse(base)
    target = PACKED_TARGETS[word]
    packer = target.packer
    chosen = {t.name: t for t in base.tensors.values() if _is_taken(t, target)}
    if not chosen:
        raise InputError(
            f"{base.path}: no matrix that {packer.scheme} could hold", hint="is this a model?"
        )
    works = {
        name: TensorWork(name, packer.scheme, tensor.shape, tensor, packer=packer)
        for name, tensor in chosen.items()
    }
    left = [t.name for t in base.tensors.values() if t.name not in chosen and _is_linear(t)]
    modules = sorted({name.removesuffix(".weight") for name in left})
    config = target.config(modules, _NAMES[base.main_dtype])
    shards = tuple(replace(shard, metadata={"format": target.metadata}) for shard in base.shards)
    checkpoint = plan_checkpoint(replace(base, shards=shards), works, config=config)
    notes = [Note(f"{len(works)} matrices are coded as {packer.scheme} ({word})")]
    if modules:
        shown = ", ".join(modules[:4]) + (f" and {len(modules) - 4} more" if modules[4:] else "")
        notes.append(Note(f"left as they are: {shown}"))
    return replace(checkpoint, files=tuple(_aligned(file) for file in checkpoint.files)), (*notes,)


def _refuse(base: BaseModel) -> None:
    if base.is_gguf or base.packed:
        raise UnsupportedError(
            f"{base.path}: quantised already, or GGUF",
            hint="`loratools dequantize` it first; better, give the 16-bit original",
        )
    if not CONV1D_TYPES.isdisjoint(base.config_words("model_type")):
        raise UnsupportedError(
            f"{base.path}: its layers are stored turned over (Conv1D)",
            hint="let transformers quantise this one",
        )


def _is_linear(tensor: BaseTensor) -> bool:
    if tensor.dtype not in FLOAT_WORDS or len(tensor.shape) != 2:
        return False
    return tensor.name.endswith(".weight") and not _TABLES.search(tensor.name)


def _is_taken(tensor: BaseTensor, target: Target) -> bool:
    name = tensor.name
    if not target.packer.fits(tensor.shape) or tensor.dtype not in _NAMES:
        return False
    if target.tables:
        whole = tensor.dtype in FLOAT_WORDS and name.endswith(".weight")
        return whole and not _ROUTERS.search(name) and "norm" not in name
    return _is_linear(tensor) and not any(p.search(name) for p in (_LEFT, _ROUTERS, _EXPERTS))


def _aligned(file: FileWork) -> FileWork:
    """Return a file with wide types first, so that numbers start at multiples of their size."""
    order = sorted(file.tensors, key=lambda work: (-DTYPES[work.dtype], work.name))
    return replace(file, tensors=tuple(order))
