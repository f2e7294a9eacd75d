"""LoRA on linear layers: reference cases 1 to 7 and 13, against PEFT's merge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from loratools.errors import LoratoolsError

from . import builders, oracles
from .builders import LINEARS, Base, Tensors, lora
from .conftest import Merge

FP32 = 1e-6


def cast(dtype: torch.dtype) -> Callable[[Tensors], Tensors]:
    """Return an edit which stores every adapter tensor in another dtype."""
    return lambda tensors: {name: tensor.to(dtype) for name, tensor in tensors.items()}


def test_fp32(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """Case 1: within 1e-6 of PEFT, in the weights and in the logits of the model as reloaded."""
    adapter = lora(llama, tmp_path / "a", r=8, lora_alpha=16, target_modules="all-linear")
    merged = merge(llama, adapter)
    oracles.assert_agrees(merged.tensors, oracles.peft_merged(llama, adapter), llama, atol=FP32)
    expected = oracles.output(oracles.peft_model(llama, adapter))
    actual = oracles.output(llama.load(merged.folder))
    assert (actual - expected).abs().max() < 1e-4
    assert (actual - oracles.output(llama.load())).abs().max() > 0.1


@pytest.mark.parametrize("alpha", [32, 11.3])
def test_bf16_is_one_rounding_as_peft_does(
    wide_bf16: Base, tmp_path: Path, merge: Merge, alpha: float
) -> None:
    """Case 2: bits equal to PEFT's default merge, and to the float64 sum rounded once."""
    adapter = lora(wide_bf16, tmp_path / "a", r=16, lora_alpha=alpha, target_modules="all-linear")
    merged = merge(wide_bf16, adapter).tensors
    oracles.assert_agrees(merged, oracles.peft_merged(wide_bf16, adapter), wide_bf16)
    exact = oracles.plain_lora(wide_bf16, adapter, alpha / 16)
    oracles.assert_close_in_ulps(merged, oracles.rounded(exact, wide_bf16.tensors))


def test_bf16_shards_keep_their_names(llama_bf16: Base, tmp_path: Path, merge: Merge) -> None:
    """Case 2 on a sharded base: the same files hold the same tensors; the index is right."""
    adapter = lora(llama_bf16, tmp_path / "a", r=4, target_modules=LINEARS)
    merged = merge(llama_bf16, adapter)
    expected = oracles.peft_merged(llama_bf16, adapter)
    oracles.assert_agrees(merged.tensors, expected, llama_bf16)
    before, after = (contents(folder) for folder in (llama_bf16.folder, merged.folder))
    assert before == after
    assert len(after) > 2
    index = json.loads((merged.folder / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: file for file, names in after.items() for name in names}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in merged.tensors.values())
    assert (oracles.output(llama_bf16.load(merged.folder))).isfinite().all()


def contents(folder: Path) -> dict[str, list[str]]:
    """Return the tensor names in each safetensors file of a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found[path.name] = sorted(file.keys())
            assert file.metadata() == {"format": "pt"}
    return found


def test_safe_merge_rounds_twice(wide_bf16: Base, tmp_path: Path, merge: Merge) -> None:
    """Case 3: PEFT's safe merge differs in some elements and is further from the exact sum."""
    adapter = lora(wide_bf16, tmp_path / "a", r=8, target_modules="all-linear")
    merged = merge(wide_bf16, adapter).tensors
    safe = oracles.peft_merged(wide_bf16, adapter, safe=True)
    exact = oracles.plain_lora(wide_bf16, adapter, 1.0)
    assert not oracles.same_bits(merged["first.weight"], safe["first.weight"])
    assert oracles.error(merged, exact) < oracles.error(safe, exact)


def test_bf16_factors_on_an_fp16_base(llama_fp16: Base, tmp_path: Path, merge: Merge) -> None:
    """Case 4: stored bf16 factors are multiplied in float32.

    A unit in the last place of fp16 is 8 times finer than one of bf16: 0.1 % may differ by one.
    """
    original = lora(llama_fp16, tmp_path / "a", r=8, target_modules=LINEARS)
    adapter = builders.edited(original, tmp_path / "b", tensors=cast(torch.bfloat16))
    merged = merge(llama_fp16, adapter).tensors
    expected = oracles.peft_merged(llama_fp16, adapter)
    assert oracles.changed(merged, llama_fp16) == oracles.changed(expected, llama_fp16)
    oracles.assert_close_in_ulps(merged, expected, share=1e-3)


PATTERNS = {
    "rank_pattern": {
        "layers.1.self_attn.q_proj": 2,
        "q_proj": 6,
        r"^model\.layers\.0\.mlp\..*": 3,
        "k_proj|v_proj": 5,
    },
    "alpha_pattern": {"q_proj": 12, "layers.1.self_attn.q_proj": 1, "gate_proj": 7.5, "proj": 99},
}


@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize("swap", [False, True], ids=["as written", "reversed"])
def test_patterns(llama: Base, tmp_path: Path, merge: Merge, rslora: bool, swap: bool) -> None:
    """Cases 5 and 6: the first pattern that matches wins, for rank and for alpha on their own.

    PEFT sorts the patterns when it saves, and then cannot always load what it saved; the file
    here keeps the order which they had in training.
    """
    patterns = {
        name: dict(reversed(rows.items())) if swap else rows for name, rows in PATTERNS.items()
    }
    original = lora(
        llama,
        tmp_path / "a",
        r=4,
        lora_alpha=10,
        target_modules=LINEARS,
        use_rslora=rslora,
        **patterns,
    )
    adapter = builders.edited(original, tmp_path / "b", config=patterns)
    merged = merge(llama, adapter).tensors
    oracles.assert_agrees(merged, oracles.peft_merged(llama, adapter), llama, atol=FP32)


@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_conv1d_of_transformers(
    gpt2: Base, tmp_path: Path, merge: Merge, flag: bool, dora: bool
) -> None:
    """Cases 7 and 9: (in, out) weights, a square one included, whatever fan_in_fan_out says.

    The file's names lack the ``transformer.`` which the adapter's have.
    """
    targets = ["c_attn", "c_proj", "c_fc"]
    original = lora(gpt2, tmp_path / "a", r=4, target_modules=targets, use_dora=dora)
    adapter = builders.edited(original, tmp_path / "b", config={"fan_in_fan_out": flag})
    merged = merge(gpt2, adapter)
    oracles.assert_agrees(merged.tensors, oracles.peft_merged(gpt2, adapter), gpt2, atol=FP32)
    expected = oracles.output(oracles.peft_model(gpt2, adapter))
    assert (oracles.output(gpt2.load(merged.folder)) - expected).abs().max() < 1e-4


def test_lora_bias(llama_biased: Base, tmp_path: Path, merge: Merge) -> None:
    """Case 13: b + s·lora_B.bias."""
    targets = ["q_proj", "down_proj"]
    adapter = lora(
        llama_biased, tmp_path / "a", r=4, lora_alpha=12, target_modules=targets, lora_bias=True
    )
    merged = merge(llama_biased, adapter).tensors
    expected = oracles.peft_merged(llama_biased, adapter)
    oracles.assert_agrees(merged, expected, llama_biased, atol=FP32)


def test_lora_bias_needs_a_bias(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """Case 13: a base without biases is refused, by PEFT as well."""
    adapter = lora(llama, tmp_path / "a", r=4, target_modules=["q_proj"], lora_bias=True)
    with pytest.raises(RuntimeError, match="no bias"):
        oracles.peft_merged(llama, adapter)
    with pytest.raises(LoratoolsError, match="q_proj"):
        merge(llama, adapter)
    assert not (tmp_path / "merged").exists()


def test_fp64_base(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """A float64 base: PEFT adds a float32 delta to it."""
    base = builders.llama(tmp_path / "base", torch.float64)
    adapter = lora(base, tmp_path / "a", r=4, target_modules=LINEARS)
    merged = merge(base, adapter).tensors
    oracles.assert_agrees(merged, oracles.peft_merged(base, adapter), base, atol=FP32)


def test_wider_result(llama_bf16: Base, tmp_path: Path, merge: Merge) -> None:
    """dtype="fp32" on a bf16 base: what PEFT gives on the base loaded as float32."""
    adapter = lora(llama_bf16, tmp_path / "a", r=4, target_modules=LINEARS)
    merged = merge(llama_bf16, adapter, dtype="fp32")
    widened = Base(llama_bf16.folder, lambda folder: llama_bf16.build(folder).float())
    oracles.assert_close(merged.tensors, oracles.peft_merged(widened, adapter), FP32)
    assert next(llama_bf16.load(merged.folder).parameters()).dtype == torch.float32


def test_pickled_base(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """A base in pytorch_model.bin merges into the same safetensors."""
    adapter = lora(llama, tmp_path / "a", r=4, target_modules=LINEARS)
    folder = tmp_path / "bin"
    folder.mkdir()
    torch.save(llama.tensors, folder / "pytorch_model.bin")
    (folder / "config.json").write_bytes((llama.folder / "config.json").read_bytes())
    pickled = merge(Base(folder, llama.build), adapter, name="from_bin").tensors
    assert_same_files(pickled, merge(llama, adapter).tensors)


def assert_same_files(left: Tensors, right: Tensors) -> None:
    """Assert that two sets of tensors are the same, bit for bit."""
    assert sorted(left) == sorted(right)
    assert all(oracles.same_bits(tensor, right[name]) for name, tensor in left.items())


def test_patterns_that_peft_has_sorted(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """PEFT saves its patterns sorted: the tensors' own rank tells which row was meant.

    PEFT 0.21 cannot load such a file again; the oracle is the model that was saved.
    """
    from peft import LoraConfig

    config = LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        rank_pattern={"q_proj": 6, "layers.1.self_attn.q_proj": 2},
        alpha_pattern={"q_proj": 12, "layers.1.self_attn.q_proj": 1},
    )
    model = builders.train(llama, config)
    adapter = builders.save(model, tmp_path / "a")
    expected = oracles.output(model.eval())
    merged = merge(llama, adapter)
    assert (oracles.output(llama.load(merged.folder)) - expected).abs().max() < 1e-4
    assert merged.notes_on("layers.1.self_attn.q_proj")
