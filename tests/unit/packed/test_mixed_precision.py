"""compressed-tensors' groups of modules, each in a format of its own, beside ignored ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.codecs.scheme_groups import group_of
from loratools.codecs.scheme_records import Found
from loratools.errors import CorruptFileError
from loratools.quantize import dequantize_base
from loratools.summary.files import summarize

from .loops import CASES, Case

GROUPS = {
    "group_0": {
        "targets": ["re:.*self_attn.*"], "format": "float-quantized",
        "weights": {"num_bits": 8, "type": "float", "strategy": "group", "group_size": 16},
    },
    "group_1": {
        "targets": ["Linear"], "format": "pack-quantized",
        "weights": {"num_bits": 3, "type": "int", "strategy": "group", "group_size": 32},
    },
    "group_2": {
        "targets": ["model.layers.0.mlp.down_proj"], "format": "int-quantized",
        "weights": {"num_bits": 8, "type": "int", "symmetric": False},
    },
}  # fmt: skip
CONFIG = {
    "quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": GROUPS,
    "ignore": ["lm_head", "re:.*router$"],
}  # fmt: skip
STORED = {
    "model.layers.0.self_attn.q_proj": (
        "fp8-groups",
        {"weight": "weight", "scale": "weight_scale"},
    ),
    "model.layers.0.mlp.up_proj": ("pack-quantized-3", {}),
    "model.layers.0.mlp.down_proj": (
        "int-rows",
        {"weight": "weight", "scale": "weight_scale", "zero_point": "weight_zero_point"},
    ),
}  # fmt: skip


def write(folder: Path, config: dict[str, Any]) -> dict[str, Case]:
    torch.manual_seed(0)
    cases = {module: CASES[name]() for module, (name, _) in STORED.items()}
    tensors: dict[str, Tensor] = {
        "lm_head.weight": torch.randn(4, 8).bfloat16(),
        "model.layers.0.mlp.router.weight": torch.randn(4, 8).bfloat16(),
    }
    for module, case in cases.items():
        names = STORED[module][1]
        tensors |= {f"{module}.{names.get(p, p)}": t for p, t in case.weight.parts.items()}
        if "weight_packed" in case.weight.parts:
            tensors[f"{module}.weight_shape"] = torch.tensor(case.weight.shape)
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = {"model_type": "llama", "torch_dtype": "float32", "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(words))
    return cases


def test_every_group_is_read_in_its_own_format(tmp_path: Path) -> None:
    cases = write(tmp_path / "base", CONFIG)
    dequantize_base(tmp_path / "base", tmp_path / "out", dtype="fp32")
    found = load_file(tmp_path / "out" / "model.safetensors")
    before = load_file(tmp_path / "base" / "model.safetensors")
    for module, case in cases.items():
        weight = found[f"{module}.weight"]
        for row, column in ((0, 0), (1, 5), (5, 19), (3, 17)):
            expected = pytest.approx(case.element(row, column), rel=1e-5, abs=1e-6)
            assert float(weight[row, column]) == expected
    for name in ("lm_head.weight", "model.layers.0.mlp.router.weight"):
        assert torch.equal(found[name], before[name].float())
    facts = summarize(tmp_path / "base").facts
    assert set(facts["parameters_by_dtype"]) == {
        "BF16", "compressed-tensors float-quantized", "compressed-tensors pack-quantized",
        "compressed-tensors int-quantized",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("module", "group"),
    [
        ("model.layers.0.self_attn.q_proj", "group_0"),
        ("model.layers.7.mlp.up_proj", "group_1"),
        ("model.layers.0.mlp.down_proj", "group_2"),
        ("model.layers.1.mlp.down_proj", "group_1"),
    ],
)
def test_a_name_counts_before_a_pattern_and_that_before_a_class(module: str, group: str) -> None:
    def read(name: str) -> Tensor:
        raise KeyError(name)

    found = Found(module, {}, {}, CONFIG, read)
    assert group_of(found) is GROUPS[group]


def test_a_group_that_the_tensors_contradict_is_an_error(tmp_path: Path) -> None:
    groups = {**GROUPS, "group_2": {**GROUPS["group_2"], "format": "pack-quantized"}}
    write(tmp_path / "base", {**CONFIG, "config_groups": groups})
    with pytest.raises(CorruptFileError, match=r"down_proj: .*int-quantized.*says pack-quantized"):
        summarize(tmp_path / "base")
