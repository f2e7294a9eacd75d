"""Mixes of GGUF types: sizes that llama.cpp publishes, and single rules worked out by hand."""

from __future__ import annotations

import math
from collections import Counter

import pytest

from loratools.codecs.ggml import GGML_TYPES
from loratools.codecs.ggml_mixes import (
    MIXES,
    ModelFacts,
    Place,
    choose_type,
    choose_types,
    find_category,
    find_mix,
    is_quantised,
)
from loratools.errors import OptionError

# Tensors of a layer: rows and columns.
LLAMA_3 = {
    "attn_q": (4096, 4096),
    "attn_k": (1024, 4096),
    "attn_v": (1024, 4096),
    "attn_output": (4096, 4096),
    "ffn_gate": (14336, 4096),
    "ffn_up": (14336, 4096),
    "ffn_down": (4096, 14336),
    "attn_norm": (4096,),
    "ffn_norm": (4096,),
}
# GiB of Llama 3 8B in llama-quantize's own table of types.
PUBLISHED = {
    "Q4_0": 4.34, "Q4_1": 4.78, "Q5_0": 5.21, "Q5_1": 5.65, "Q2_K": 2.96, "Q3_K_S": 3.41,
    "Q3_K_M": 3.74, "Q3_K_L": 4.03, "Q4_K_S": 4.37, "Q4_K_M": 4.58, "Q5_K_S": 5.21,
    "Q5_K_M": 5.33, "Q6_K": 6.14,
}  # fmt: skip


def layers(count: int, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {
        f"blk.{layer}.{name}.weight": shape
        for layer in range(count)
        for name, shape in shapes.items()
    }


def llama(count: int = 32, tied: bool = False) -> dict[str, tuple[int, ...]]:
    ends = {"token_embd.weight": (128256, 4096), "output_norm.weight": (4096,)}
    if not tied:
        ends["output.weight"] = (128256, 4096)
    return ends | layers(count, LLAMA_3)


FACTS = ModelFacts("llama", 32, heads=32, kv_heads=8)


@pytest.mark.parametrize(("mix", "gib"), PUBLISHED.items())
def test_a_model_is_as_large_as_llama_cpp_s(mix: str, gib: float) -> None:
    tensors = llama()
    chosen = choose_types(MIXES[mix], tensors, FACTS)
    codecs = {name: GGML_TYPES[kind or "F32"].codec for name, kind in chosen.items()}
    size = sum(
        math.prod(tensors[name]) // codec.elements * codec.bytes for name, codec in codecs.items()
    )
    # The vocabulary takes some 7 MB. Two bits more for one matrix of a feed-forward are 14 MB.
    assert size / 2**30 == pytest.approx(gib - 0.005, abs=0.0075)


def test_q4_k_m_gives_half_of_the_sensitive_matrices_six_bits() -> None:
    chosen = choose_types(find_mix("q4_k_m"), llama(), FACTS)
    more = [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    for part in ("attn_v", "ffn_down"):
        kinds = [chosen[f"blk.{layer}.{part}.weight"] for layer in range(32)]
        assert [layer for layer, kind in enumerate(kinds) if kind == "Q6_K"] == more
        assert Counter(kinds) == {"Q6_K": 16, "Q4_K": 16}
    assert chosen["output.weight"] == "Q6_K"
    assert chosen["token_embd.weight"] == "Q4_K"
    assert chosen["blk.0.attn_q.weight"] == "Q4_K"
    assert chosen["blk.0.attn_norm.weight"] is None


def test_a_tied_embedding_is_the_output_matrix() -> None:
    chosen = choose_types(MIXES["Q4_K_M"], llama(tied=True), FACTS)
    assert chosen["token_embd.weight"] == "Q6_K"
    assert choose_types(MIXES["Q8_0"], llama(tied=True), FACTS)["token_embd.weight"] == "Q8_0"


@pytest.mark.parametrize(
    ("mix", "columns", "expected"),
    [
        ("Q4_K_S", 4096, "Q4_K"),
        ("Q4_K_S", 4128, "Q5_0"),
        ("Q5_K_S", 4128, "Q5_1"),
        ("Q6_K", 4128, "Q8_0"),
        ("Q3_K_S", 4128, "Q4_0"),
        ("Q2_K", 4128, "Q4_0"),
        ("TQ1_0", 4128, "Q4_0"),
        ("IQ4_XS", 4128, "IQ4_NL"),
        ("Q4_K_S", 4100, "F16"),
        ("Q8_0", 4100, "F16"),
        ("F16", 4100, "F16"),
    ],
)
def test_rows_of_broken_blocks_fall_back(mix: str, columns: int, expected: str) -> None:
    place = Place(0, 32, FACTS)
    name = "blk.0.attn_q.weight"
    assert choose_type(MIXES[mix], name, (4096, columns), place, tied=False) == expected


def test_eight_experts_keep_values_and_keys_in_eight_bits() -> None:
    shapes = {name: shape for name, shape in LLAMA_3.items() if "ffn" not in name}
    shapes |= {"ffn_down_exps": (8, 4096, 14336), "ffn_gate_inp": (8, 4096)}
    facts = ModelFacts("llama", 32, heads=32, kv_heads=8, experts=8)
    chosen = choose_types(MIXES["Q4_K_M"], layers(32, shapes), facts)
    assert {chosen[f"blk.{layer}.attn_v.weight"] for layer in range(32)} == {"Q8_0"}
    assert {chosen[f"blk.{layer}.attn_k.weight"] for layer in range(32)} == {"Q8_0"}
    assert {chosen[f"blk.{layer}.attn_output.weight"] for layer in range(32)} == {"Q5_K"}
    assert chosen["blk.6.ffn_down_exps.weight"] == "Q6_K"
    assert chosen["blk.5.ffn_down_exps.weight"] == "Q4_K"
    assert chosen["blk.5.ffn_gate_inp.weight"] is None


def test_attention_in_some_layers_is_counted_not_numbered() -> None:
    """Hybrid models: the third attention layer is number 2 wherever it stands."""
    tensors = {f"blk.{layer}.attn_v.weight": (1024, 4096) for layer in range(3, 32, 4)}
    chosen = choose_types(MIXES["Q3_K_M"], tensors, FACTS)
    assert list(chosen.values())[:3] == ["Q5_K", "Q5_K", "Q4_K"]


def test_experts_go_to_mxfp4_and_the_rest_to_q8_0() -> None:
    tensors = llama(1) | {"blk.0.ffn_up_exps.weight": (16, 4096, 4096)}
    chosen = choose_types(MIXES["MXFP4_MOE"], tensors, FACTS)
    assert chosen["blk.0.ffn_up_exps.weight"] == "MXFP4"
    assert chosen["blk.0.attn_q.weight"] == "Q8_0"
    assert chosen["output.weight"] == "Q8_0"


def test_falcon_has_rules_of_its_own() -> None:
    facts = ModelFacts("falcon", 32, heads=71, kv_heads=1)
    chosen = choose_types(MIXES["Q4_K_M"], llama(), facts)
    down = [chosen[f"blk.{layer}.ffn_down.weight"] for layer in range(7)]
    assert down == ["Q6_K", "Q6_K", "Q5_K", "Q5_K", "Q4_K", "Q4_K", "Q5_K"]
    assert chosen["output.weight"] == "Q8_0"


def test_llama_70b_has_more_bits_for_its_few_values() -> None:
    facts = ModelFacts("llama", 80, heads=64, kv_heads=8)
    chosen = choose_types(MIXES["Q4_K_M"], llama(80), facts)
    assert {chosen[f"blk.{layer}.attn_v.weight"] for layer in range(80)} == {"Q5_K", "Q6_K"}
    assert not ModelFacts("llama", 80, heads=64, kv_heads=64).is_70b


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("blk.0.attn_q.weight", (4096, 4096), True),
        ("blk.0.attn_q.bias", (4096,), False),
        ("blk.0.attn_q_norm.weight", (4, 4096), False),
        ("blk.0.ffn_gate_inp.weight", (8, 4096), False),
        ("blk.0.ssm_conv1d.weight", (4096, 4), False),
        ("blk.0.time_mix_w1.weight", (160, 4096), False),
        ("position_embd.weight", (512, 768), False),
        ("blk.0.attn_q.weight", (1, 4096), False),
        ("rope_freqs.weight", (64,), False),
    ],
)
def test_small_and_delicate_tensors_are_kept(
    name: str, shape: tuple[int, ...], expected: bool
) -> None:
    assert is_quantised(name, shape, "llama") is expected


def test_categories_are_found_by_name() -> None:
    assert find_category("blk.3.attn_qkv.weight") == "value"
    assert find_category("blk.3.ffn_down_exps.weight") == "down"
    assert find_category("blk.3.attn_k_norm.weight") == "other"
    assert find_category("output_norm.weight") == "other"


def test_names_are_found_in_any_case_and_by_alias() -> None:
    assert find_mix("q4_k") is MIXES["Q4_K_M"]
    assert find_mix("Q8_0").file_type == 7
    with pytest.raises(OptionError, match="no GGUF mix 'Q9'") as caught:
        find_mix("Q9")
    assert "Q4_K_M" in str(caught.value.hint)


def test_file_types_are_gguf_py_s() -> None:
    from gguf.constants import LlamaFileType

    prefixed = {
        name.partition("_")[2]: int(kind) for name, kind in LlamaFileType.__members__.items()
    }
    assert {name: mix.file_type for name, mix in MIXES.items()}.items() <= prefixed.items()
