"""Every row of GGUF's keymaps against llama.cpp's own converter, driven with dense weights.

What its model classes do to a weight is linear in it, so what they do to ΔW is what the converted
factors must amount to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas import ExpertLoRA
from loratools.keymaps.gguf_base import base_from_config
from loratools.keymaps.gguf_model import GGUFModel, Step
from loratools.keymaps.gguf_models import MODELS
from loratools.keymaps.gguf_to import to_gguf
from tests import gguf_cases

from . import llama

pytestmark = pytest.mark.slow

Case = tuple[GGUFModel, tuple[Step, ...], Adapter, Any]

IN_MEMORY = ("experts.gate_up_proj", "experts.down_proj", "layers.{i}.mlp.gate")
"""Names that only transformers 5 has in memory; checkpoints, and so the converter, have others."""
BARE = ("experts.mlp.", "time_maa_w", "time_decay_w", *IN_MEMORY[:2])
"""Parameters without a module of their own, whose names lack ``.weight``."""
CONV1D = {"gpt2": ("c_attn", "c_proj", "c_fc"), "jais": ("c_attn", "c_proj", "c_fc", "c_fc2")}
RECURSES = {"baichuan"}
"""Converters that never return from most modules."""
AFTER_EXPERTS = "transformer.decoder_layer.1.router.weight"
"""Grok's converter emits experts when something else follows."""


def cases() -> list[Case]:
    gguf_cases.use_sizes_of_the_converter()
    found: list[Case] = []
    for model in MODELS:
        if model.refused:
            continue
        base = base_from_config(gguf_cases.config_of(model), model.arch)
        found += [
            (model, steps, gguf_cases.adapter_for(steps, base), base)
            for steps in gguf_cases.step_sets(model)
            if steps[0].targets != ("token_embd",) or not base.is_tied(model)
        ]
    return found


def weights(case: Case) -> dict[str, Tensor]:
    """Return ΔW under the checkpoint's names, stored as the checkpoint does."""
    model, _, adapter, _ = case
    found = {}
    for path, delta in adapter.layers.items():
        dense = delta.materialize()  # type: ignore[attr-defined]
        flat = getattr(delta, "role", "") == "embedding"
        flat |= path.rpartition(".")[2] in CONV1D.get(model.arch, ())
        # transformers 5 keeps in memory the transpose of what the checkpoint has.
        if model.arch == "qwen3vlmoe" and path.endswith(IN_MEMORY[:2]):
            dense = dense.mT.contiguous()
        bare = any(word in path for word in BARE)
        found[path if bare else f"{path}.weight"] = dense.mT.contiguous() if flat else dense
    if waits(case):
        found[AFTER_EXPERTS] = torch.ones(2, 2)
    return found


def waits(case: Case) -> bool:
    """Return whether the converter holds experts back until something else follows."""
    return case[0].arch == "grok" and any(step.stacks for step in case[1])


def ours(case: Case) -> dict[str, Tensor]:
    _, _, adapter, base = case
    found = {}
    for name, delta in to_gguf(adapter, base).layers.items():
        dense = delta.materialize()  # type: ignore[attr-defined]
        found[f"{name}.weight"] = dense.mT if name == "token_embd" else dense
    return found


def theirs(case: Case, result: dict[str, Any]) -> dict[str, Tensor]:
    """Return the converter's tensors, without norms that it makes up and the one after experts."""
    extra = "ffn_gate_inp" if waits(case) else "_norm"
    return {name: t for name, t in result["tensors"].items() if extra not in name}


def is_known_gap(case: Case, result: dict[str, Any]) -> bool:
    """Return whether the converter itself cannot do this, for a reason that is known."""
    model, steps, _, _ = case
    if model.arch in RECURSES:
        return "RecursionError" in str(result["errors"])
    in_memory = any(word in name for step in steps for name in step.sources for word in IN_MEMORY)
    return in_memory and ours(case).keys() != theirs(case, result).keys()


def test_every_row_is_what_the_converter_does(tmp_path: Path) -> None:
    every = cases()
    given = [
        {
            "class": case[0].classes[0],
            "config": gguf_cases.converter_config(case[0]),
            "tensors": weights(case),
        }
        for case in every
    ]
    faults, compared = [], 0
    for case, result in zip(every, llama.convert(given, tmp_path), strict=True):
        what = f"{case[0].arch} ({case[0].classes[0]}) {case[1][0].sources}"
        if "error" in result:
            faults.append(f"{what}: {result['error']}")
        elif is_known_gap(case, result):
            continue
        elif result["errors"]:
            faults.append(f"{what}: {result['errors']}")
        else:
            fault = difference(case, result)
            faults += [f"{what}: {fault}"] if fault else []
            compared += 1
    assert not faults, "\n".join(faults)
    assert compared > 1250


def difference(case: Case, result: dict[str, Any]) -> str:
    mine, wanted = ours(case), theirs(case, result)
    if result["arch"] != case[0].arch:
        return f"its architecture is {result['arch']}"
    if mine.keys() != wanted.keys():
        return f"names: {sorted(mine)} and {sorted(wanted)}"
    wrong = [
        name
        for name, tensor in mine.items()
        if tensor.shape != wanted[name].shape
        or not torch.allclose(tensor, wanted[name].float(), rtol=1e-4, atol=1e-4)
    ]
    return f"values of {wrong}" if wrong else ""


def test_fused_parameters_are_the_experts_one_by_one() -> None:
    """What the converter has no name for is what it makes of the experts' own projections."""
    for case in cases():
        _, steps, adapter, _ = case
        fused = next(iter(adapter.layers.values()))
        if not isinstance(fused, ExpertLoRA) or not steps[0].sources[0].endswith(IN_MEMORY[0]):
            continue
        names = [name for name in ours(case) if "exps" in name]
        if len(names) != 2 or fused.weight_shape[2] != gguf_cases.HIDDEN:
            continue
        gate, up = (next(n for n in names if word in n) for word in ("gate", "up_exps"))
        dense = fused.materialize()
        half = dense.shape[1] // 2
        torch.testing.assert_close(ours(case)[gate], dense[:, :half])
        torch.testing.assert_close(ours(case)[up], dense[:, half:])
