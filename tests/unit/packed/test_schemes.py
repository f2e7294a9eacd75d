"""Which scheme a checkpoint's tensors are in, and what is wrong with those that are in none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.basemodel import open_base
from loratools.codecs.bnb4 import STORAGES
from loratools.codecs.bnb4_weight import quantise_bnb4
from loratools.codecs.scheme_rows import SCHEMES
from loratools.codecs.schemes import find_packed
from loratools.errors import CorruptFileError, UnsupportedError
from loratools.tensorfiles.dtypes import dtype_word, torch_dtype

from .checkpoints import ENTRIES, write_base
from .loops import CASES


@dataclass(frozen=True)
class Spec:
    dtype: str
    shape: tuple[int, ...]


def specs(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    return {name: Spec(dtype_word(t.dtype), tuple(t.shape)) for name, t in tensors.items()}


def found(tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None):
    return find_packed(specs(tensors), config or {}, tensors.__getitem__)


def bnb_state(weight: Any, kind: str) -> Tensor:
    words = {
        "quant_type": kind, "blocksize": weight.blocksize, "dtype": "bfloat16",
        "shape": list(weight.shape),
    }  # fmt: skip
    if weight.nested:
        words |= {"nested_blocksize": weight.nested, "nested_offset": weight.nested_offset}
    return torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8)


def bnb_tensors(kind: str, *, nested: bool) -> dict[str, Tensor]:
    weight = quantise_bnb4(torch.randn(6, 64), kind, 32, nested=nested)
    tensors = {
        f"m.weight{'' if part == 'weight' else '.' + part}": tensor
        for part, tensor in weight.parts.items()
    }
    state = f"m.weight.quant_state.bitsandbytes__{kind}"
    return {**tensors, state: bnb_state(weight, kind)}


# Case of loops.py → how its parts are called in a checkpoint, and the checkpoint's config.
STORED: dict[str, tuple[str, dict[str, str], dict[str, Any]]] = {
    "gptq-4-v1": ("gptq", {}, {"quant_method": "gptq", "bits": 4}),
    "gptq-3-v2-act-order": ("gptq", {}, {"bits": 3, "checkpoint_format": "gptq_v2"}),
    "awq": ("awq", {}, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "fp8-row": ("fp8", {"scale": "weight_scale"}, {}),
    "fp8-block-192-rows": ("fp8", {"scale": "weight_scale_inv"}, {"quant_method": "fp8"}),
    "int8": ("bitsandbytes int8", {}, {"quant_method": "bitsandbytes"}),
    "pack-quantized-4": ("compressed-tensors pack-quantized", {}, {}),
    "pack-quantized-3": (
        "compressed-tensors pack-quantized",
        {},
        {"config_groups": {"group_0": {"weights": {"num_bits": 3}}}},
    ),
    "nvfp4-modelopt": ("nvfp4", {"scale": "weight_scale", "scale_2": "weight_scale_2"}, {}),
    "nvfp4-compressed-tensors": (
        "compressed-tensors nvfp4",
        {
            "weight": "weight_packed", "scale": "weight_scale",
            "global_scale": "weight_global_scale",
        },
        {},
    ),
    "mlx-4": ("mlx affine", {}, {"bits": 4, "group_size": 32}),
    "mlx-5": ("mlx affine", {}, {"bits": 4, "group_size": 64, "m": {"bits": 5, "group_size": 32}}),
}  # fmt: skip


def stored(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    case = CASES[name]()
    names = STORED[name][1]
    tensors = {f"m.{names.get(part, part)}": tensor for part, tensor in case.weight.parts.items()}
    if name.startswith("pack"):
        tensors["m.weight_shape"] = torch.tensor(case.weight.shape)
    return tensors, STORED[name][2]


@pytest.mark.parametrize("name", list(STORED))
def test_a_scheme_is_found_by_its_tensors(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    torch.manual_seed(0)
    tensors, config = stored(name)
    (packing,) = found(tensors, config)
    assert packing.scheme == STORED[name][0]
    assert packing.weight == "m.weight"
    assert packing.shape == case.weight.shape
    built = packing.build({part: tensors[stored] for part, stored in packing.names.items()})
    rows = case.weight.rows
    assert torch.equal(built.decode(0, rows), case.weight.decode(0, rows))


WITHOUT_CHECKPOINT = {"mxfp4", "mlx mxfp4", "mlx nvfp4", "mlx mxfp8", "torchao"}
"""Stacks, words that are seen as bytes, and what is refused: they have tests of their own here."""


def test_every_row_has_a_checkpoint(tmp_path: Path) -> None:
    """What is in ``ENTRIES`` is merged, rounded, dequantised and broken by the tests beside."""
    seen = set()
    for name in ENTRIES:
        base = open_base(write_base(tmp_path / name, name).path)
        seen |= {weight.packed.scheme for weight in base.packed if weight.packed}
    assert {scheme.name for scheme in SCHEMES} - seen == WITHOUT_CHECKPOINT


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_is_found_by_its_state(kind: str, nested: bool) -> None:
    torch.manual_seed(0)
    tensors = bnb_tensors(kind, nested=nested)
    (packing,) = found(tensors)
    assert (packing.scheme, packing.shape, packing.dtype) == ("bitsandbytes 4-bit", (6, 64), "BF16")
    built = packing.build({part: tensors[name] for part, name in packing.names.items()})
    torch.manual_seed(0)
    expected = quantise_bnb4(torch.randn(6, 64), kind, 32, nested=nested).decode(0, 6)
    assert torch.equal(built.decode(0, 6), expected)


@pytest.mark.parametrize("nested", [False, True])
def test_a_bitsandbytes_model_may_have_been_cast(nested: bool) -> None:
    """``model.to(bfloat16)`` rounds scales and the table of codes; the table's own values count."""
    tensors = bnb_tensors("nf4", nested=nested)
    cast = {n: t.bfloat16() if t.dtype == torch.float32 else t for n, t in tensors.items()}
    (packing,) = found(dict(reversed(cast.items())))
    decoded = packing.build({p: cast[n] for p, n in packing.names.items()}).decode(0, 6)
    words = json.loads(bytes(tensors["m.weight.quant_state.bitsandbytes__nf4"].tolist()))
    absmax = cast["m.weight.absmax"].float()
    if nested:
        table = cast["m.weight.nested_quant_map"].float()
        outer = float(cast["m.weight.nested_absmax"][0])
        absmax = table[absmax.long()] * outer + words["nested_offset"]
    flat = tensors["m.weight"].flatten()
    codes = torch.stack([flat >> 4, flat & 15], 1).flatten().long()
    values = tensors["m.weight.quant_map"][codes].view(-1, 32) * absmax[:, None]
    torch.testing.assert_close(decoded, values.view(6, 64), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("word", STORAGES)
def test_bitsandbytes_bytes_may_be_declared_as_any_type(word: str) -> None:
    tensors = bnb_tensors("nf4", nested=False)
    viewed = {**tensors, "m.weight": tensors["m.weight"].view(-1).view(torch_dtype(word))}
    plain, other = (
        packing.build({p: stored[n] for p, n in packing.names.items()}).decode(0, 6)
        for stored in (tensors, viewed)
        for packing in found(stored)
    )
    assert torch.equal(other, plain)


@pytest.mark.parametrize("config", [{}, {"quant_method": "fp8", "weight_block_size": [128, 128]}])
def test_as_many_blocks_as_rows_are_no_scales_of_rows(config: Mapping[str, Any]) -> None:
    """A projection of 3 heads from 3 blocks of inputs: its scales are (1, 3)."""
    scale = torch.tensor([[1.0, 2.0, 4.0]])
    tensors = {
        "m.weight": torch.ones(3, 300).to(torch.float8_e4m3fn),
        "m.weight_scale_inv": scale,
    }
    (packing,) = found(tensors, config)
    weight = packing.build({"weight": tensors["m.weight"], "scale": scale})
    row = torch.cat([torch.full((128,), 1.0), torch.full((128,), 2.0), torch.full((44,), 4.0)])
    assert torch.equal(weight.decode(0, 3), row.expand(3, 300))
    # One for each row says so by its shape.
    tensors["m.weight_scale_inv"] = scale.T.contiguous()
    (packing,) = found(tensors, config)
    weight = packing.build({"weight": tensors["m.weight"], "scale": scale.T})
    assert torch.equal(weight.decode(0, 3), scale.T.expand(3, 300))


def test_experts_of_gpt_oss_are_found_under_their_own_name() -> None:
    case = CASES["mxfp4"]()
    tensors = {f"experts.gate_up_proj_{part}": t for part, t in case.weight.parts.items()}
    (packing,) = found(tensors, {"quant_method": "mxfp4"})
    assert (packing.weight, packing.shape) == ("experts.gate_up_proj", (2, 6, 96))


@pytest.mark.parametrize(
    ("mode", "case", "codes", "scales", "factor"),
    [
        ("mxfp4", "mxfp4", "blocks", "scales", 1.0),
        ("nvfp4", "nvfp4-modelopt", "weight", "scale", 1 / 0.37),
        ("mxfp8", "fp8-exponents-32", "weight", "scale", 1.0),
    ],
)
def test_mlx_stores_small_floats_in_words(
    mode: str, case: str, codes: str, scales: str, factor: float
) -> None:
    own = CASES[case]()
    parts, rows = own.weight.parts, own.weight.rows
    tensors = {
        "m.weight": parts[codes].view(torch.uint8).reshape(rows, -1).view(torch.uint32),
        "m.scales": parts[scales].view(torch.uint8).reshape(rows, -1),
    }
    (packing,) = found(tensors, {"mode": mode})
    assert packing.scheme == f"mlx {mode}"
    decoded = packing.build({part: tensors[n] for part, n in packing.names.items()}).decode(0, rows)
    for row, column in ((0, 0), (1, 17), (rows - 1, own.weight.columns - 1), (2, 32)):
        expected = pytest.approx(factor * own.element(row, column), rel=1e-5)
        assert float(decoded[row, column]) == expected
    tensors["m.scales"] = tensors["m.scales"][:, 1:]
    with pytest.raises(CorruptFileError, match=rf"^m: stored as mlx {mode}, but .scales has shape"):
        found(tensors, {"mode": mode})


def test_plain_tensors_are_left_alone() -> None:
    tensors = {
        "m.weight": torch.randn(4, 4),
        "m.bias": torch.randn(4),
        "n.scale": torch.randn(4),
    }
    assert found(tensors) == ()


@pytest.mark.parametrize("name", list(STORED))
def test_a_missing_part_is_named(name: str) -> None:
    optional = ("weight_zero_point", "g_idx", "weight_g_idx")
    tensors, config = stored(name)
    marker = next(n for n in tensors if n.endswith(("weight", "qweight", "weight_packed")))
    for left_out in [n for n in tensors if n != marker and not n.endswith(optional)]:
        fewer = {n: t for n, t in tensors.items() if n != left_out}
        if left_out.endswith((".SCB", "scale_2", "global_scale", ".scales")) and name != "awq":
            # Without what marks the scheme the tensors may be somebody else's.
            continue
        with_method = {"quant_method": "compressed-tensors", **config}
        with pytest.raises((CorruptFileError, UnsupportedError), match=r"^m"):
            found(fewer, with_method)


@pytest.mark.parametrize(
    ("name", "part", "shape"),
    [
        ("gptq-4-v1", "m.qzeros", (2, 5)),
        ("awq", "m.scales", (2, 24)),
        ("fp8-block-192-rows", "m.weight_scale_inv", (3, 2)),
        ("int8", "m.SCB", (5,)),
        ("nvfp4-modelopt", "m.weight_scale", (6, 3)),
        ("pack-quantized-4", "m.weight_packed", (8, 9)),
        ("mlx-4", "m.weight", (6, 9)),
    ],
)
def test_shapes_that_disagree_are_named(name: str, part: str, shape: tuple[int, ...]) -> None:
    tensors, config = stored(name)
    tensors[part] = torch.zeros(shape).to(tensors[part].dtype)
    with pytest.raises(CorruptFileError, match=r"^m: stored as ") as caught:
        found(tensors, config)
    assert str(shape[-1]) in caught.value.message


def test_absmax_of_another_length_is_named() -> None:
    tensors = bnb_tensors("nf4", nested=False)
    tensors["m.weight.absmax"] = torch.zeros(5)
    with pytest.raises(
        CorruptFileError, match=r"m: stored as bitsandbytes 4-bit, but \.weight\.absmax has"
    ):
        found(tensors)


def test_unknown_schemes_are_refused_with_their_name() -> None:
    with pytest.raises(UnsupportedError, match="'aqlm'"):
        found({"m.codes": torch.zeros(4, dtype=torch.int8)}, {"quant_method": "aqlm"})
    with pytest.raises(UnsupportedError, match="SVDQuant"):
        found({"m.qweight": torch.zeros(4, 4, dtype=torch.int8), "m.wscales": torch.zeros(4)})
    with pytest.raises(UnsupportedError, match=r"m\.weight_packed: I8"):
        found({"m.weight_packed": torch.zeros(4, 4, dtype=torch.int8)})
