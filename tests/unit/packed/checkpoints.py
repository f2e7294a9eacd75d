"""Checkpoints of two quantised weights and a plain one, in every scheme, and adapters for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.codecs.packed import PackedWeight

from .loops import CASES, Case

TOUCHED, OTHER = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"


@dataclass(frozen=True)
class Entry:
    """A case of loops.py, what its parts are called, and what the config says."""

    case: str
    names: Mapping[str, str]
    config: Mapping[str, Any]
    subclass: str = ""
    """torchao's word for it, in the file's header."""


def _same(*parts: str) -> dict[str, str]:
    return {part: f".{part}" for part in parts}


_GPTQ = _same("qweight", "qzeros", "scales", "g_idx")
_BNB = {
    part: ".weight" if part == "weight" else f".weight.{part}"
    for part in ("weight", "absmax", "quant_map", "nested_absmax", "nested_quant_map")
}
_PACKED = _same("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx")
_FP8 = {"weight": ".weight", "scale": ".weight_scale_inv"}
_HQQ = _same("W_q", "scale", "zero")
_MLX = _same("weight", "scales", "biases")
_PLAIN = {"weight": ".weight", "scale": ".weight_scale", "zero_point": ".weight_zero_point"}
_BLOCKS = {"blocks": ".weight_packed", "scales": ".weight_scale"}
_TORCHAO = {
    "weight": "._weight_qdata", "scale": "._weight_scale", "zero_point": "._weight_zero_point",
}  # fmt: skip


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """compressed-tensors' words for one group of weights."""
    group = {"weights": weights, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group},
    }  # fmt: skip


ENTRIES = {
    "nf4": Entry("nf4-64", _BNB, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "nf4 nested": Entry("nf4-nested-50", _BNB, {"quant_method": "bitsandbytes"}),
    "nf4 odd": Entry("nf4-33", _BNB, {"quant_method": "bitsandbytes"}),
    "fp4": Entry("fp4-64", _BNB, {"quant_method": "bitsandbytes"}),
    "int8": Entry("int8", {"weight": ".weight", "SCB": ".SCB"}, {"quant_method": "bitsandbytes"}),
    "gptq": Entry("gptq-4-v1", _GPTQ, {"quant_method": "gptq", "bits": 4}),
    "gptq act-order": Entry(
        "gptq-3-v2-act-order",
        _GPTQ,
        {"quant_method": "gptq", "bits": 3, "checkpoint_format": "gptq_v2"},
    ),
    "awq": Entry("awq", _same("qweight", "qzeros", "scales"), {"quant_method": "awq", "bits": 4}),
    "fp8 rows": Entry(
        "fp8-row", {"weight": ".weight", "scale": ".weight_scale"}, {"quant_method": "fp8"}
    ),
    "fp8 blocks": Entry("fp8-block-192-rows", _FP8, {"quant_method": "fp8"}),
    "fp8 exponents": Entry(
        "fp8-exponents", _FP8, {"quant_method": "fp8", "weight_block_size": [128, 32]}
    ),
    "pack-quantized": Entry("pack-quantized-4", _PACKED, {"quant_method": "compressed-tensors"}),
    "pack-quantized 3": Entry(
        "pack-quantized-3",
        _PACKED,
        {
            "config_groups": {"group_0": {"weights": {"num_bits": 3}}},
            "quant_method": "compressed-tensors",
        },
    ),
    "nvfp4": Entry(
        "nvfp4-modelopt",
        {"weight": ".weight", "scale": ".weight_scale", "scale_2": ".weight_scale_2"},
        {"quant_method": "modelopt"},
    ),
    "nvfp4 divided": Entry(
        "nvfp4-compressed-tensors",
        {
            "weight": ".weight_packed",
            "scale": ".weight_scale",
            "global_scale": ".weight_global_scale",
        },
        {"quant_method": "compressed-tensors"},
    ),
    "hqq": Entry("hqq-4-axis1", _HQQ, {"quant_method": "hqq"}),
    "hqq across": Entry("hqq-3-axis0", _HQQ, {"quant_method": "hqq"}),
    "int rows": Entry("int-rows", _PLAIN, compressed("int-quantized", num_bits=8, symmetric=False)),
    "int groups of 4 bits": Entry(
        "int-4-groups",
        _PLAIN,
        compressed("naive-quantized", num_bits=4, group_size=16, strategy="group"),
    ),
    "int blocks": Entry(
        "int-blocks",
        _PLAIN,
        compressed("int-quantized", num_bits=8, strategy="block", block_structure=[16, 32]),
    ),
    "int whole": Entry("int-whole", _PLAIN, compressed("int-quantized", num_bits=8)),
    "float groups": Entry(
        "fp8-groups",
        _PLAIN,
        compressed("float-quantized", num_bits=8, type="float", group_size=16),
    ),
    "mxfp8": Entry(
        "fp8-exponents-32",
        _PLAIN,
        compressed("mxfp8-quantized", num_bits=8, type="float", group_size=32),
    ),
    "mxfp6": Entry("mxfp6", _BLOCKS, compressed("mxfp6-pack-quantized", num_bits=6, type="float")),
    "mxfp4": Entry(
        "mxfp4-rows", _BLOCKS, compressed("mxfp4-pack-quantized", num_bits=4, type="float")
    ),
    "int8 with scales": Entry(
        "int-whole", {"weight": ".weight", "scale": ".weight_scale"}, {"quant_method": "modelopt"}
    ),
    "torchao int8": Entry("int-rows", _TORCHAO, {"quant_method": "torchao"}, "Int8Tensor"),
    "torchao intx": Entry(
        "int-4-groups", _TORCHAO, {"quant_method": "torchao"}, "IntxUnpackedToInt8Tensor"
    ),
    "torchao float8": Entry("fp8-row", _TORCHAO, {"quant_method": "torchao"}, "Float8Tensor"),
    "torchao int4": Entry("int4-pairs", _TORCHAO, {"quant_method": "torchao"}, "Int4Tensor"),
    "torchao mxfp8": Entry("fp8-exponents-32", _TORCHAO, {"quant_method": "torchao"}, "MXTensor"),
    "torchao nvfp4": Entry(
        "nvfp4-modelopt",
        {**_TORCHAO, "scale_2": "._weight_per_tensor_scale"},
        {"quant_method": "torchao"},
        "NVFP4Tensor",
    ),
    "mlx": Entry("mlx-4", _MLX, {"bits": 4, "group_size": 32}),
    "mlx 5": Entry("mlx-5", _MLX, {"bits": 5, "group_size": 32}),
}


def described(case: Case, module: str) -> dict[str, Tensor]:
    """What a checkpoint says beside the parts: bitsandbytes' state, shapes and HQQ's numbers."""
    weight: Any = case.weight
    kind = type(weight).__name__
    if kind == "BnB4Weight":
        words = {
            "quant_type": "nf4", "blocksize": weight.blocksize, "dtype": "bfloat16",
            "shape": list(weight.shape),
        }  # fmt: skip
        if weight.nested:
            words |= {"nested_blocksize": weight.nested, "nested_offset": weight.nested_offset}
        text = torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8)
        return {f"{module}.weight.quant_state.bitsandbytes__nf4": text}
    if kind == "PackQuantizedWeight":
        return {f"{module}.weight_shape": torch.tensor(weight.shape)}
    if kind == "HQQWeight":
        numbers = {
            "shape": list(weight.shape), "nbits": weight.bits, "group_size": weight.group_size,
            "axis": weight.axis,
        }  # fmt: skip
        return {f"{module}.{name}": torch.tensor(value) for name, value in numbers.items()}
    return {}


def header(entry: Entry, cases: Mapping[str, Case]) -> dict[str, str]:
    """The words of the file's header: torchao keeps the attributes of its subclasses there."""
    if not entry.subclass:
        return {"format": "pt"}
    said = {}
    for module, case in cases.items():
        weight: Any = case.weight
        sizes = {"Int4Tensor": [1, 16], "MXTensor": 32, "NVFP4Tensor": 16}
        attributes = {
            "block_size": sizes.get(entry.subclass) or list(weight.block or (1, weight.columns)),
            "dtype": {"_type": "torch.dtype", "_data": "bfloat16"},
            "target_dtype": {"_type": "torch.dtype", "_data": f"int{getattr(weight, 'bits', 8)}"},
        }
        listed = [entry.names[part].rpartition("_weight_")[2] for part in weight.parts]
        said[f"{module}.weight"] = json.dumps(
            {"_type": entry.subclass, "_data": attributes, "_tensor_data_names": listed}
        )
    said["model.norm.weight"] = json.dumps({"_type": "Tensor"})
    return {"format": "pt", **said, "tensor_names": json.dumps(list(said))}


@dataclass(frozen=True)
class Base:
    """A written checkpoint, and the weights that went into it."""

    path: Path
    entry: Entry
    cases: Mapping[str, Case]

    def dense(self, module: str) -> Tensor:
        """The weight in float64, by the loops' own reading of the parts."""
        case = self.cases[module]
        rows = [
            [case.element(row, column) for column in range(case.weight.columns)]
            for row in range(case.weight.rows)
        ]
        return torch.tensor(rows, dtype=torch.float64)

    def stored(self, folder: Path, module: str) -> PackedWeight:
        """The weight that another checkpoint of the same scheme holds."""
        tensors, weight = load_file(folder / "model.safetensors"), self.cases[module].weight
        parts = {part: tensors[module + self.entry.names[part]] for part in weight.parts}
        return replace(weight, parts=parts)  # type: ignore[type-var]


def write_base(folder: Path, name: str, **config: Any) -> Base:
    entry = ENTRIES[name]
    cases = {module: CASES[entry.case]() for module in (TOUCHED, OTHER)}
    tensors = {"model.norm.weight": torch.rand(8).bfloat16()}
    for module, case in cases.items():
        tensors |= {module + entry.names[p]: t.clone() for p, t in case.weight.parts.items()}
        tensors |= described(case, module)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", header(entry, cases))
    words = {"model_type": "llama", "torch_dtype": "float16", "quantization_config": entry.config}
    (folder / "config.json").write_text(json.dumps({**words, **config}))
    return Base(folder, entry, cases)


def write_adapter(
    folder: Path, base: Base, size: float = 0.05, rank: int = 2, module: str = TOUCHED
) -> Tensor:
    """Write a LoRA whose change has ``size`` of the weight's norm; returns ΔW in float64."""
    weight = base.dense(module)
    down, up = torch.randn(rank, weight.shape[1]), torch.randn(weight.shape[0], rank)
    up *= size * weight.norm() / (up @ down).norm()
    up = up.float()
    tensors = {
        f"base_model.model.{module}.lora_A.weight": down,
        f"base_model.model.{module}.lora_B.weight": up,
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    leaf = module.rpartition(".")[2]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": [leaf]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return up.double() @ down.double()
