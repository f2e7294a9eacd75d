"""Merging into GGUF models: every tensor in its own type, against the sum taken row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loratools.codecs.ggml import GGML_TYPES
from loratools.errors import LoratoolsError, MatchError, UnsupportedError
from loratools.merge import merge_into_base
from loratools.tensorfiles.gguf import GGUFHeader, read_gguf_header
from loratools.tensorfiles.gguf_reading import Value
from loratools.tensorfiles.gguf_split import open_gguf
from loratools.tensorfiles.gguf_tensors import block_entry
from loratools.tensorfiles.gguf_types import ValueType
from loratools.tensorfiles.gguf_writing import save_gguf

from ..gguf_models import (
    BLOCKS,
    HEADS,
    HIDDEN,
    HUGGING_FACE,
    KEYS,
    PER_HEAD,
    SHAPES,
    VOCABULARY,
    words,
    write_adapter,
    write_model,
)  # fmt: skip

MIX = {"attn": "Q4_K", "attn_v": "Q6_K", "ffn": "Q5_K", "ffn_down": "Q8_0", "token_embd": "Q4_0"}


def raw(file: Path) -> dict[str, Tensor]:
    """Every tensor's stored bytes."""
    data, found = file.read_bytes(), {}
    for name, tensor in read_gguf_header(file).tensors.items():
        found[name] = torch.frombuffer(
            bytearray(data[tensor.start : tensor.stop]), dtype=torch.uint8
        )
    return found


def decoded(file: Path) -> dict[str, Tensor]:
    header, found = read_gguf_header(file), {}
    for name, stored in raw(file).items():
        tensor = header.tensors[name]
        codec = GGML_TYPES[tensor.type.name].codec
        found[name] = codec.decode(stored.view(tensor.rows, -1)).view(tensor.shape)
    return found


def rotary(rows: Tensor, heads: int) -> Tensor:
    """Half-split rows as adjacent pairs, one row at a time (as llama.cpp stores them)."""
    turned = rows.clone()
    for head in range(heads):
        for place in range(PER_HEAD // 2):
            for half in range(2):
                source = head * PER_HEAD + half * PER_HEAD // 2 + place
                turned[head * PER_HEAD + 2 * place + half] = rows[source]
    return turned


def changes(adapter: Path, strength: float = 1.0) -> dict[str, Tensor]:
    """ΔW of every GGUF tensor that the adapter changes, in float64."""
    tensors, found = load_file(adapter / "adapter_model.safetensors"), {}
    for block in range(BLOCKS):
        for name, theirs in HUGGING_FACE.items():
            path = f"base_model.model.model.layers.{block}.{theirs}"
            if f"{path}.lora_A.weight" not in tensors:
                continue
            down, up = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
            change = 2.0 * strength * up.double() @ down.double()
            heads = {"attn_q": HEADS, "attn_k": KEYS}.get(name)
            found[f"blk.{block}.{name}.weight"] = rotary(change, heads) if heads else change
    return found


def merged_types(header: GGUFHeader) -> dict[str, str]:
    return {name: tensor.type.name for name, tensor in header.tensors.items()}


@pytest.fixture
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.usefixtures("seed")
def test_every_tensor_is_coded_again_in_its_own_type(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", MIX)
    adapter = write_adapter(tmp_path / "adapter")
    merge_into_base(base, adapter, tmp_path / "out.gguf")
    before, after = read_gguf_header(base), read_gguf_header(tmp_path / "out.gguf")
    assert merged_types(after) == merged_types(before)
    offsets = [
        [tensor.start - header.data_start for tensor in header.tensors.values()]
        for header in (before, after)
    ]
    assert offsets[0] == offsets[1]
    stored, found, weights = raw(base), raw(tmp_path / "out.gguf"), decoded(base)
    expected = changes(adapter)
    assert len(expected) == BLOCKS * len(SHAPES)
    for name, tensor in after.tensors.items():
        if name not in expected:
            assert torch.equal(found[name], stored[name])
            continue
        codec = GGML_TYPES[tensor.type.name].codec
        wanted = weights[name].double() + expected[name]
        coded = codec.encode(wanted.float()).flatten()
        # The sum in float32 may fall on the other side of a rounding now and then.
        assert float((coded != found[name]).float().mean()) < 0.01
        kept = codec.decode(found[name].view(tensor.rows, -1)).double()
        again = codec.decode(coded.view(tensor.rows, -1)).double()
        assert float((kept - again).norm() / expected[name].norm()) < 0.02


@pytest.mark.usefixtures("seed")
def test_plain_types_hold_the_sum(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", {"attn": "F32", "ffn": "BF16"})
    adapter = write_adapter(tmp_path / "adapter")
    merge_into_base(base, [(adapter, 0.5)], tmp_path / "out.gguf")
    weights, found = decoded(base), decoded(tmp_path / "out.gguf")
    for name, change in changes(adapter, 0.5).items():
        wanted = weights[name].double() + change
        exact = {"F32": 1e-6, "BF16": 2**-8}["F32" if "attn" in name else "BF16"]
        torch.testing.assert_close(found[name].double(), wanted, rtol=exact, atol=1e-7)


@pytest.mark.usefixtures("seed")
def test_metadata_is_kept_and_tells_of_the_merge(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", MIX)
    adapter = write_adapter(tmp_path / "adapter")
    merge_into_base(base, [(adapter, 0.7)], tmp_path / "out.gguf")
    before, after = read_gguf_header(base), read_gguf_header(tmp_path / "out.gguf")
    for key in before.metadata:
        assert after.word(key) == before.word(key)
    added = {key: after.word(key) for key in after.metadata if key not in before.metadata}
    assert added == {
        "loratools.merged.count": 1,
        "loratools.merged.0.name": "adapter",
        "loratools.merged.0.strength": pytest.approx(0.7),
    }


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(
    ("quant", "types"), [("q8_0", {"Q8_0"}), ("dequantize", {"F16"}), ("Q6_K", {"Q6_K"})]
)
def test_only_touched_tensors_are_promoted(tmp_path: Path, quant: str, types: set[str]) -> None:
    base = write_model(tmp_path / "base.gguf", {"attn": "Q4_K", "ffn": "Q4_K"})
    modules = {"model.layers.0.mlp.up_proj": SHAPES["ffn_up"]}
    adapter = write_adapter(tmp_path / "adapter", modules=modules, size=0.001)
    report = merge_into_base(base, adapter, tmp_path / "out.gguf", quant=quant)
    before, after = read_gguf_header(base), read_gguf_header(tmp_path / "out.gguf")
    touched = {"blk.0.ffn_up.weight"}
    moved = {n for n, t in merged_types(after).items() if t != merged_types(before)[n]}
    assert moved == touched
    assert {merged_types(after)[name] for name in touched} == types
    stored, found = raw(base), raw(tmp_path / "out.gguf")
    assert all(torch.equal(found[n], stored[n]) for n in stored if n not in touched)
    (change,) = changes(adapter).values()
    kept = decoded(tmp_path / "out.gguf")["blk.0.ffn_up.weight"].double()
    made = kept - decoded(base)["blk.0.ffn_up.weight"].double()
    retained = float((made * change).sum() / change.square().sum())
    (item,) = report.items
    if quant == "dequantize":
        assert retained == pytest.approx(1.0, abs=0.01)
        assert item["retained"] is None
    else:
        assert item["retained"] == pytest.approx(retained, abs=1e-3)


@pytest.mark.usefixtures("seed")
def test_what_rounding_erases_is_reported_and_warned_of(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", {"attn": "Q4_K", "ffn": "Q8_0"})
    adapter = write_adapter(tmp_path / "adapter", size=2e-5)
    report = merge_into_base(base, adapter, tmp_path / "out.gguf")
    weights, found = decoded(base), decoded(tmp_path / "out.gguf")
    expected = changes(adapter)
    for item in report.items:
        name = item["tensor"]
        change = expected[name]
        made = found[name].double() - weights[name].double()
        retained = float((made * change).sum() / change.square().sum())
        assert item["retained"] == pytest.approx(retained, abs=2e-3)
    lost = [item for item in report.items if item["retained"] < 0.5]
    assert any("attn" in item["tensor"] for item in lost)
    warnings = [note.message for note in report.notes if note.level == "warning"]
    assert any(w.startswith(f"{len(lost)} requantised tensors keep less") for w in warnings)
    assert any("--quant q8_0" in w for w in warnings)


@pytest.mark.usefixtures("seed")
def test_parts_and_another_alignment_make_no_difference(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter")
    torch.manual_seed(1)
    whole = write_model(tmp_path / "whole.gguf", MIX)
    torch.manual_seed(1)
    wide = {"general.alignment": Value(ValueType.UINT32, 128)}
    first = write_model(tmp_path / "base.gguf", MIX, parts=3, **wide)
    merge_into_base(whole, adapter, tmp_path / "out.gguf")
    merge_into_base(first, adapter, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == [f"base-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    model = open_gguf(tmp_path / "out" / names[0])
    assert all(part.alignment == 128 for part in model.parts)
    found = {n: t for part in model.parts for n, t in raw(part.path).items()}
    expected = raw(tmp_path / "out.gguf")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.usefixtures("seed")
def test_an_adapter_of_the_head_unties_it(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", {"token_embd": "Q8_0"}, head=False)
    adapter = write_adapter(tmp_path / "adapter", modules={"lm_head": (VOCABULARY, HIDDEN)})
    merge_into_base(base, adapter, tmp_path / "out.gguf")
    tensors = load_file(adapter / "adapter_model.safetensors")
    down, up = (
        tensors["base_model.model.lm_head.lora_A.weight"],
        tensors["base_model.model.lm_head.lora_B.weight"],
    )
    table, found = decoded(base)["token_embd.weight"], decoded(tmp_path / "out.gguf")
    assert torch.equal(found["token_embd.weight"], table)
    wanted = table.double() + 2.0 * up.double() @ down.double()
    error = (found["output.weight"].double() - wanted).norm() / wanted.norm()
    assert float(error) < 0.01
    assert merged_types(read_gguf_header(tmp_path / "out.gguf"))["output.weight"] == "Q8_0"


@pytest.mark.usefixtures("seed")
def test_types_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    rows = torch.zeros(HIDDEN, 66 * HIDDEN // 256, dtype=torch.uint8)
    entries = [block_entry("blk.0.attn_q.weight", "IQ2_XXS", (HIDDEN, HIDDEN), rows)]
    save_gguf(base, words(), entries)
    modules = {"model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN)}
    adapter = write_adapter(tmp_path / "adapter", modules=modules)
    with pytest.raises(UnsupportedError, match=r"blk\.0\.attn_q\.weight: stored as IQ2_XXS") as e:
        merge_into_base(base, adapter, tmp_path / "out.gguf")
    assert "--quant q8_0" in (e.value.hint or "")
    merge_into_base(base, adapter, tmp_path / "out.gguf", quant="q8_0")


@pytest.mark.usefixtures("seed")
@pytest.mark.parametrize(
    ("modules", "word"),
    [
        ({"model.layers.7.mlp.up_proj": SHAPES["ffn_up"]}, "blk.7.ffn_up"),
        ({"model.layers.0.mlp.up_proj": (FF_WRONG := 500, HIDDEN)}, "blk.0.ffn_up"),
        ({"model.layers.0.mlp.sideways": (FF_WRONG, HIDDEN)}, "model.layers.0.mlp.sideways"),
    ],
)
def test_what_the_base_lacks_is_named(
    tmp_path: Path, modules: dict[str, tuple[int, ...]], word: str
) -> None:
    base = write_model(tmp_path / "base.gguf", MIX)
    adapter = write_adapter(tmp_path / "adapter", modules=modules)
    with pytest.raises(MatchError) as caught:
        merge_into_base(base, adapter, tmp_path / "out.gguf")
    assert word in caught.value.message
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.usefixtures("seed")
def test_truncated_files_are_refused(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", MIX)
    adapter = write_adapter(tmp_path / "adapter")
    data = base.read_bytes()
    for length in (0, 3, 100, len(data) // 2, len(data) - 1):
        base.write_bytes(data[:length])
        with pytest.raises(LoratoolsError, match=r"base\.gguf"):
            merge_into_base(base, adapter, tmp_path / "out.gguf")
        assert not (tmp_path / "out.gguf").exists()
