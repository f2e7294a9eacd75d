"""The block engine against whole-tensor arithmetic, and what it leaves behind when it fails."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.basemodel import BaseModel, BaseTensor, open_base
from loratools.compute import Compute
from loratools.deltas import DoRA, ExpertLoRA, LayerDelta, LoRA, MovedBase, Replacement, RowFold
from loratools.deltas.base import ShiftFold
from loratools.errors import CorruptFileError, LoratoolsError, NonFiniteError, OutputError
from loratools.streaming import blocks
from loratools.streaming.blocks import Blocks, Buffers
from loratools.streaming.checkpoint import (
    Checkpoint,
    edited_config,
    output_dtype,
    plan_checkpoint,
    write_checkpoints,
)
from loratools.streaming.works import TensorResult, TensorWork
from loratools.tensorfiles.dtypes import dtype_word

Tensors = dict[str, Tensor]
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MakeFolds = Callable[[str], Sequence[RowFold]]


@pytest.fixture(params=[1, 7, 1 << 18], ids=lambda size: f"block {size}")
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Cut tensors into blocks of this many elements."""
    monkeypatch.setitem(blocks._BLOCK, "cpu", request.param)
    return int(request.param)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut tensors into blocks of at most 7 elements."""
    monkeypatch.setitem(blocks._BLOCK, "cpu", 7)


def dyadic(
    seed: int, *shape: int, dtype: torch.dtype = torch.float32, unit: float = 0.125
) -> Tensor:
    """Return small multiples of ``unit``: sums of their products are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(-9, 10, shape, generator=generator) * unit).to(dtype)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def save_base(folder: Path, shards: Mapping[str, Tensors], config: Mapping[str, object]) -> Path:
    """Write a sharded or single base with an index and a config."""
    folder.mkdir()
    for name, tensors in shards.items():
        save_file(tensors, folder / name, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {tensor: name for name, tensors in shards.items() for tensor in tensors}
        index = {"metadata": {"total_size": 1, "total_parameters": 1}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def work(base: BaseModel, name: str, folds: MakeFolds | None, dtype: str = "keep") -> TensorWork:
    """Return the work that folds into one of the base's tensors."""
    source = base.tensors[name]
    return TensorWork(name, output_dtype(source.dtype, dtype), source.shape, source, folds)


def fold_of(delta: LayerDelta, strength: float = 1.0, *, transposed: bool = False) -> MakeFolds:
    return lambda device: [delta.row_fold(strength, transposed=transposed, device=device)]


def write(
    plan: Checkpoint, output: Path, *, workers: int = 2, **options: object
) -> dict[str, TensorResult]:
    """Write one checkpoint; its base must survive."""
    found = write_checkpoints(
        {"": plan},
        output,
        compute=Compute("cpu", workers),
        root=plan.base.path,
        inputs=[plan.base.path],
        **options,
    )
    return dict(found[""])


def run(
    base: BaseModel,
    works: Mapping[str, TensorWork],
    output: Path,
    *,
    dtype: str = "keep",
    **options: object,
) -> dict[str, TensorResult]:
    return write(plan_checkpoint(base, works, dtype=dtype), output, **options)


def read(folder: Path) -> Tensors:
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_bits(actual: Tensor, wanted: Tensor, name: str) -> None:
    assert (actual.dtype, actual.shape) == (wanted.dtype, wanted.shape), name
    bits = [tensor.contiguous().flatten().view(torch.uint8) for tensor in (actual, wanted)]
    assert torch.equal(*bits), name


def exact(delta: LoRA | ExpertLoRA) -> Tensor:
    """Return ΔW in float64."""
    up, down = delta.up.double(), delta.down.double()
    if isinstance(delta, LoRA):
        product = (up.flatten(1) @ down.flatten(1)).reshape(delta.weight_shape)
        return delta.alpha / down.shape[0] * product
    return delta.alpha / down.shape[1] * (up @ down)


# ── every dtype to every dtype, bit for bit ──────────────────────────────────────────────────

LINEAR = LoRA(dyadic(1, 4, 5), dyadic(2, 9, 4), 2.0)
CONV = LoRA(dyadic(3, 2, 3, 2, 2), dyadic(4, 4, 2, 1, 1), 1.0)
STACK = ExpertLoRA(dyadic(5, 3, 2, 5), dyadic(6, 3, 4, 2), -1.0)
SHIFT = dyadic(7, 11)


def all_shapes(dtype: torch.dtype) -> Tensors:
    """Return tensors of every shape that a checkpoint may hold, floats in ``dtype``."""
    return {
        "linear": dyadic(10, 9, 5, dtype=dtype),
        "table": dyadic(11, 5, 9, dtype=dtype),
        "conv": dyadic(12, 4, 3, 2, 2, dtype=dtype),
        "stack": dyadic(13, 3, 4, 5, dtype=dtype),
        "bias": dyadic(14, 11, dtype=dtype),
        "free": dyadic(15, 6, 3, dtype=dtype),
        "scalar": dyadic(16, dtype=dtype),
        "empty": torch.zeros(0, 4, dtype=dtype),
        "hollow": torch.zeros(3, 0, dtype=dtype),
        "numbers": torch.arange(12).reshape(3, 4) - 5,
        "mask": torch.tensor([True, False, True]),
    }


def exact_sums(tensors: Tensors) -> Tensors:
    """Return what folding must give, in float64."""
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    wide["linear"] += exact(LINEAR)
    wide["table"] += 0.5 * exact(LINEAR).T
    wide["conv"] += exact(CONV)
    wide["stack"] += exact(STACK)
    wide["bias"] += SHIFT.double()
    return wide


def all_folds() -> dict[str, MakeFolds]:
    return {
        "linear": fold_of(LINEAR),
        "table": fold_of(LINEAR, 0.5, transposed=True),
        "conv": fold_of(CONV),
        "stack": fold_of(STACK),
        "bias": lambda device: [ShiftFold(SHIFT)],
    }


@pytest.mark.parametrize("dtype", ["keep", *OUTPUTS])
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_one_rounding_of_the_exact_sum(
    source: torch.dtype, dtype: str, block: int, tmp_path: Path
) -> None:
    """Where float32 sums are exact, every element is the sum rounded once to the output dtype."""
    tensors = all_shapes(source)
    base = open_base(save_base(tmp_path / "base", {"model.safetensors": tensors}, {}))
    works = {name: work(base, name, folds, dtype) for name, folds in all_folds().items()}
    run(base, works, tmp_path / "out", dtype=dtype)
    actual = read(tmp_path / "out")
    assert actual.keys() == tensors.keys()
    sums = exact_sums(tensors)
    for name, tensor in actual.items():
        kept = dtype == "keep" or not tensors[name].is_floating_point()
        wanted = sums[name].to(tensors[name].dtype if kept else OUTPUTS[dtype])
        assert_same_bits(tensor, wanted, name)


@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_numbers_of_every_size(source: torch.dtype, block: int, tmp_path: Path) -> None:
    """Random factors: within half a unit of the output and float32's error of the change."""
    lora = LoRA(normal(1, 8, 33), normal(2, 21, 8), 12.0)
    weight = normal(3, 21, 33, dtype=source)
    base = open_base(save_base(tmp_path / "base", {"model.safetensors": {"w": weight}}, {}))
    result = run(base, {"w": work(base, "w", fold_of(lora, -0.7))}, tmp_path / "out")["w"]
    actual = read(tmp_path / "out")["w"]
    wanted = weight.double() - 0.7 * exact(lora)
    terms = 0.7 * 1.5 * (lora.up.double().abs() @ lora.down.double().abs())
    allowed = (
        wanted.abs() * torch.finfo(source).eps / 2 + terms * 8 * torch.finfo(torch.float32).eps
    )
    assert bool(((actual.double() - wanted).abs() <= allowed + 1e-12).all())
    assert result.changed
    assert result.change_norm == pytest.approx(float(0.7 * exact(lora).norm()), rel=1e-5)
    assert result.result_norm == pytest.approx(float(wanted.norm()), rel=1e-5)


def dora_formula(weight: Tensor, lora: LoRA, magnitude: Tensor) -> Tensor:
    moved = weight.double() + exact(lora)
    return magnitude.double()[:, None] * moved / moved.norm(dim=1, keepdim=True)


def pissa_formula(weight: Tensor, lora: LoRA) -> Tensor:
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    start = (left[:, : lora.rank] * values[: lora.rank]) @ right[: lora.rank]
    return weight.double() - start + exact(lora)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["dora", "pissa"])
def test_changes_that_need_more_than_their_rows(
    kind: str, transposed: bool, block: int, tmp_path: Path
) -> None:
    """Norms along the stored rows need a first pass; singular vectors need the whole matrix."""
    lora = LoRA(normal(1, 3, 13), normal(2, 10, 3), 3.0)
    weight, magnitude = normal(3, 10, 13), normal(4, 10)
    delta: LayerDelta = DoRA(lora, magnitude) if kind == "dora" else MovedBase(lora, "pissa")
    full = dora_formula(weight, lora, magnitude) if kind == "dora" else pissa_formula(weight, lora)
    wanted = weight.double() + 0.5 * (full - weight.double())
    stored = weight.T.contiguous() if transposed else weight
    base = open_base(save_base(tmp_path / "base", {"model.safetensors": {"w": stored}}, {}))
    run(base, {"w": work(base, "w", fold_of(delta, 0.5, transposed=transposed))}, tmp_path / "out")
    actual = read(tmp_path / "out")["w"]
    straight = actual.T if transposed else actual
    torch.testing.assert_close(straight.double(), wanted, rtol=0, atol=2e-5)


def test_several_changes_are_rounded_once(small_blocks: None, tmp_path: Path) -> None:
    """Forty changes of a fortieth of a unit each move bf16 by one unit; each alone by none."""
    ones = torch.ones(3, 3, dtype=torch.bfloat16)
    tiny = LoRA(torch.ones(1, 3), torch.ones(3, 1), 2**-7 / 40)
    base = open_base(save_base(tmp_path / "base", {"model.safetensors": {"w": ones}}, {}))
    many: MakeFolds = lambda device: [tiny.row_fold(1.0) for _ in range(40)]  # noqa: E731
    run(base, {"w": work(base, "w", many)}, tmp_path / "many")
    run(base, {"w": work(base, "w", fold_of(tiny))}, tmp_path / "one")
    assert torch.equal(read(tmp_path / "many")["w"], ones + 2**-7)
    assert torch.equal(read(tmp_path / "one")["w"], ones)


def test_a_replaced_weight_is_what_others_change(small_blocks: None, tmp_path: Path) -> None:
    """The replacement comes first; DoRA and LoRA then see the new weight, not the base's."""
    weight, value = normal(1, 5, 4), normal(2, 5, 4)
    lora, magnitude = LoRA(normal(3, 2, 4), normal(4, 5, 2), 2.0), normal(5, 5)
    dora = DoRA(lora, magnitude)
    replacing = Replacement(value)
    base = open_base(save_base(tmp_path / "base", {"model.safetensors": {"w": weight}}, {}))
    both: MakeFolds = lambda device: [dora.row_fold(1.0), replacing.row_fold(1.0)]  # noqa: E731
    run(base, {"w": work(base, "w", both)}, tmp_path / "out")
    wanted = dora_formula(value, lora, magnitude)
    torch.testing.assert_close(read(tmp_path / "out")["w"].double(), wanted, rtol=0, atol=1e-5)


# ── what is said of the result ───────────────────────────────────────────────────────────────


@pytest.mark.parametrize("dtype", ["keep", "fp16", "fp32"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
def test_changed_is_said_whatever_the_dtype(
    source: torch.dtype, dtype: str, small_blocks: None, tmp_path: Path
) -> None:
    """Replaced, folded and untouched tensors, with and without a conversion on the way."""
    weight = dyadic(1, 4, 3, dtype=source)
    lora = LoRA(dyadic(2, 1, 3), dyadic(3, 4, 1), 1.0)
    cases: dict[str, LayerDelta] = {
        "replaced": Replacement(weight + 1),
        "same": Replacement(weight.clone()),
        "folded": lora,
        "zero": LoRA(lora.down, torch.zeros(4, 1), 1.0),
    }
    tensors = {name: weight.clone() for name in cases}
    base = open_base(save_base(tmp_path / "base", {"model.safetensors": tensors}, {}))
    works = {name: work(base, name, fold_of(delta), dtype) for name, delta in cases.items()}
    results = run(base, works, tmp_path / "out", dtype=dtype)
    assert {name: result.changed for name, result in results.items()} == {
        "replaced": True,
        "same": False,
        "folded": True,
        "zero": False,
    }
    assert results["replaced"].change_norm == pytest.approx(12**0.5)
    assert results["same"].change_norm == results["zero"].change_norm == 0


def test_results_come_in_the_order_of_the_files(small_blocks: None, tmp_path: Path) -> None:
    """Reports are the same on every run, whichever thread is done first."""
    tensors = {f"w{i}": normal(i, 40 if i % 2 else 3, 4) for i in range(12)}
    base = open_base(save_base(tmp_path / "base", {"model.safetensors": tensors}, {}))
    works = {
        name: work(base, name, fold_of(LoRA(normal(1, 2, 4), normal(2, len(tensor), 2), 1.0)))
        for name, tensor in tensors.items()
    }
    for workers in (1, 5):
        results = run(base, works, tmp_path / str(workers), workers=workers)
        assert list(results) == [name for name in base.tensors if name in works]


def test_progress_counts_every_byte(small_blocks: None, tmp_path: Path) -> None:
    tensors = all_shapes(torch.float32)
    base = open_base(save_base(tmp_path / "base", {"model.safetensors": tensors}, {}))
    counts: list[tuple[int, int]] = []
    works = {name: work(base, name, folds) for name, folds in all_folds().items()}
    run(base, works, tmp_path / "out", workers=3, progress=lambda *told: counts.append(told))
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    assert sum(count for count, _ in counts) == size
    assert {total for _, total in counts} == {size}


def test_buffers_do_not_grow_with_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thousand rows pass through the memory of eight."""
    monkeypatch.setitem(blocks._BLOCK, "cpu", 64)
    weight = normal(1, 1000, 8, dtype=torch.bfloat16)
    base = open_base(save_base(tmp_path / "base", {"model.safetensors": {"w": weight}}, {}))
    lora = LoRA(normal(2, 2, 8), normal(3, 1000, 2), 1.0)
    buffers = Buffers()
    with Blocks(work(base, "w", None), [lora.row_fold(1.0)], buffers, "cpu") as tensor:
        spans = [(len(data), offset) for data, offset in tensor.folded()]
    assert spans == [(128, 128 * i) for i in range(125)]
    # As stored, in float32, the change, rounded: 2 + 4 + 4 + 2 bytes an element.
    assert sum(held.numel() for held in buffers.memory.values()) <= 64 * 12


# ── bytes, files, layout ─────────────────────────────────────────────────────────────────────


def odd_file(path: Path, tensors: Tensors) -> dict[str, tuple[int, int]]:
    """Write a legal file as no library would: spaces, words in another order; return ranges."""
    rows, payload, position = [], b"", 0
    for name, tensor in tensors.items():
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        rows.append(
            f'"{name}" : {{"shape":{list(tensor.shape)}, "data_offsets": '
            f'[{position}, {position + len(data)}], "dtype":"{dtype_word(tensor.dtype)}"}}'
        )
        payload += data
        position += len(data)
    text = (
        "{ " + ", ".join(rows) + ', "__metadata__": {"made by":"hand", "format":"pt"}}'
    ).encode()
    text += b" " * (-len(text) % 8 + 24)
    path.write_bytes(struct.pack("<Q", len(text)) + text + payload)
    start = 8 + len(text)
    ranges, position = {}, start
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        ranges[name] = (position, position + size)
        position += size
    return ranges


def test_all_other_bytes_are_the_bases(small_blocks: None, tmp_path: Path) -> None:
    """Header, order, spacing and every untouched tensor, NaN and all, byte for byte."""
    strange = torch.tensor([float("nan"), -0.0, float("inf"), 1e-40])
    tensors = {
        "b": normal(1, 6, 5),
        "a": strange,
        "touched": normal(2, 6, 5),
        "c": torch.arange(6),
        "z": normal(3, 4, dtype=torch.float16),
    }
    source = tmp_path / "base.safetensors"
    start, stop = odd_file(source, tensors)["touched"]
    base = open_base(source)
    lora = LoRA(normal(4, 2, 5), normal(5, 6, 2), 1.0)
    output = tmp_path / "out.safetensors"
    run(base, {"touched": work(base, "touched", fold_of(lora))}, output)
    before, after = source.read_bytes(), output.read_bytes()
    assert len(before) == len(after)
    assert before[:start] == after[:start]
    assert before[stop:] == after[stop:]
    assert before[start:stop] != after[start:stop]
    wanted = (tensors["touched"].double() + exact(lora)).float()
    torch.testing.assert_close(load_file(output)["touched"], wanted, rtol=0, atol=1e-6)


def test_a_new_layout_keeps_order_and_metadata(tmp_path: Path) -> None:
    """Another dtype needs another header; names, order of the data and words stay."""
    tensors = {"b": normal(1, 6, 5), "a": normal(2, 3), "i": torch.arange(4)}
    odd_file(tmp_path / "base.safetensors", tensors)
    base = open_base(tmp_path / "base.safetensors")
    run(base, {}, tmp_path / "out.safetensors", dtype="bf16")
    assert list(open_base(tmp_path / "out.safetensors").tensors) == ["b", "a", "i"]
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert file.metadata() == {"made by": "hand", "format": "pt"}
        for name, tensor in tensors.items():
            wanted = tensor.bfloat16() if tensor.is_floating_point() else tensor
            assert_same_bits(file.get_tensor(name), wanted, name)


def shards() -> dict[str, Tensors]:
    return {
        "model-00001-of-00002.safetensors": {"a": dyadic(1, 4, 3), "b": dyadic(2, 5)},
        "model-00002-of-00002.safetensors": {"c": dyadic(3, 2, 2), "d": dyadic(4, 3)},
    }


def new_tensor(name: str, value: Tensor) -> TensorWork:
    shape = tuple(value.shape)
    word = dtype_word(value.dtype)
    return TensorWork(name, word, shape, BaseTensor(name, word, shape, Path(name), values=value))


@pytest.mark.parametrize("dtype", ["keep", "bf16"])
def test_added_and_dropped_tensors(dtype: str, small_blocks: None, tmp_path: Path) -> None:
    """New names go to the last shard, and the index tells where everything is and how much."""
    base = open_base(save_base(tmp_path / "base", shards(), {"dtype": "float32"}))
    lora = LoRA(dyadic(5, 2, 3), dyadic(6, 4, 2), 1.0)
    head = dyadic(7, 6, 3, dtype=torch.float16)
    works = {"a": work(base, "a", fold_of(lora), dtype), "head": new_tensor("head", head)}
    plan = plan_checkpoint(base, works, dropped={"b"}, dtype=dtype)
    write(plan, tmp_path / "out")
    tensors = read(tmp_path / "out")
    assert tensors.keys() == {"a", "c", "d", "head"}
    old = {name: t for group in shards().values() for name, t in group.items()}
    wide = torch.float32 if dtype == "keep" else torch.bfloat16
    assert_same_bits(tensors["a"], (old["a"].double() + exact(lora)).to(wide), "a")
    assert_same_bits(tensors["c"], old["c"].to(wide), "c")
    assert_same_bits(tensors["head"], head, "head")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    first, last = shards()
    assert index["weight_map"] == {"a": first, "c": last, "d": last, "head": last}
    assert index["metadata"] == {
        "total_size": sum(t.numel() * t.element_size() for t in tensors.values()),
        "total_parameters": sum(t.numel() for t in tensors.values()),
    }
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"dtype": "float32" if dtype == "keep" else "bfloat16"}


def test_unedited_config_and_side_files_keep_their_bytes(tmp_path: Path) -> None:
    folder = save_base(tmp_path / "base", shards(), {})
    odd = b'{ "a" : 1.0e-05 , "b":[ ] }'
    (folder / "config.json").write_bytes(odd)
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_bytes(b"{}")
    (folder / "pytorch_model.bin").write_bytes(b"another copy of the weights")
    base = open_base(folder)
    run(base, {}, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == odd
    assert (tmp_path / "out" / "1_Pooling" / "config.json").read_bytes() == b"{}"
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert base.left_out == (Path("pytorch_model.bin"),)


def test_a_torch_base_becomes_safetensors(small_blocks: None, tmp_path: Path) -> None:
    """Values without byte ranges go through the same blocks, under Hugging Face's file names."""
    (tmp_path / "base").mkdir()
    tensors = all_shapes(torch.bfloat16)
    torch.save(tensors, tmp_path / "base" / "pytorch_model.bin")
    base = open_base(tmp_path / "base")
    works = {name: work(base, name, folds) for name, folds in all_folds().items()}
    run(base, works, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model.safetensors"]
    sums = exact_sums(tensors)
    for name, tensor in read(tmp_path / "out").items():
        assert_same_bits(tensor, sums[name].to(tensors[name].dtype), name)


@pytest.mark.parametrize(
    ("config", "edits", "wanted"),
    [
        ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
        ({"text_config": {"b": 1}}, {"b": 2}, {"text_config": {"b": 2}}),
        ({"b": 0, "text_config": {"b": 1}}, {"b": 2}, {"b": 2, "text_config": {"b": 2}}),
        ({"text_config": {}}, {"b": 2}, {"b": 2, "text_config": {}}),
        (
            {"text_config": {"tie_word_embeddings": True}},
            {"tie_word_embeddings": False},
            {"tie_word_embeddings": False, "text_config": {"tie_word_embeddings": False}},
        ),
    ],
)
def test_edited_config(
    config: dict[str, object], edits: dict[str, object], wanted: dict[str, object]
) -> None:
    before = json.dumps(config)
    assert edited_config(config, edits) == wanted
    assert json.dumps(config) == before


# ── the same bytes on every run ──────────────────────────────────────────────────────────────


def many_works(base: BaseModel) -> dict[str, TensorWork]:
    """Return works of every reach, some with several folds."""
    lora = LoRA(normal(1, 3, 16), normal(2, 24, 3), 2.0)
    dora = DoRA(lora, normal(3, 24))
    makers: tuple[MakeFolds, ...] = (
        fold_of(lora),
        fold_of(dora),
        fold_of(MovedBase(lora, "pissa")),
        lambda device: [lora.row_fold(0.3), dora.row_fold(-1.0), lora.row_fold(0.1)],
    )
    names = [name for name in base.tensors if name.startswith("w")]
    return {name: work(base, name, makers[i % 4]) for i, name in enumerate(names)}


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def test_same_bytes_for_any_number_of_workers(small_blocks: None, tmp_path: Path) -> None:
    content: dict[str, Tensors] = {
        f"model-{s:05d}-of-00003.safetensors": {
            **{f"w{s}.{i}": normal(s * 10 + i, 24, 16, dtype=torch.bfloat16) for i in range(4)},
            f"rest{s}": normal(s, 50),
        }
        for s in (1, 2, 3)
    }
    base = open_base(save_base(tmp_path / "base", content, {}))
    found = []
    for number, workers in enumerate((1, 2, 5, 2)):
        run(base, many_works(base), tmp_path / f"out{number}", workers=workers)
        found.append(digests(tmp_path / f"out{number}"))
    assert len(found[0]) == 5
    assert all(other == found[0] for other in found)


def test_threads_are_given_back(tmp_path: Path) -> None:
    """torch's own setting is as it was, also after a failure."""
    before = torch.get_num_threads()
    base = open_base(
        save_base(tmp_path / "base", {"model.safetensors": {"w": normal(1, 2, 2)}}, {})
    )
    run(base, {}, tmp_path / "out")
    assert torch.get_num_threads() == before
    with pytest.raises(ZeroDivisionError):
        run(base, {"w": work(base, "w", lambda device: [1 / 0])}, tmp_path / "other")  # type: ignore[list-item]
    assert torch.get_num_threads() == before


# ── numbers that are none ────────────────────────────────────────────────────────────────────


def one_tensor(folder: Path, weight: Tensor) -> BaseModel:
    return open_base(save_base(folder, {"model.safetensors": {"the.weight": weight}}, {}))


def assert_nothing_left(folder: Path, *kept: str) -> None:
    """Assert that nothing but what was there before is in the folder, hidden files included."""
    assert sorted(path.name for path in folder.iterdir()) == sorted(kept)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_a_result_that_is_no_number(
    source: torch.dtype, bad: float, small_blocks: None, tmp_path: Path
) -> None:
    weight = normal(1, 9, 4, dtype=source)
    weight[7, 2] = bad
    base = one_tensor(tmp_path / "base", weight)
    lora = LoRA(normal(2, 1, 4), normal(3, 9, 1), 1.0)
    with pytest.raises(NonFiniteError, match=r"the\.weight.*row 7") as caught:
        run(base, {"the.weight": work(base, "the.weight", fold_of(lora))}, tmp_path / "out")
    assert ("NaN" if bad != bad else "infinite") in caught.value.message  # noqa: PLR0124
    assert_nothing_left(tmp_path, "base")


@pytest.mark.parametrize(("value", "fits"), [(65519.0, True), (65520.0, False), (-7e4, False)])
@pytest.mark.parametrize("folded", [True, False], ids=["folded", "converted"])
def test_beyond_half_precision(value: float, fits: bool, folded: bool, tmp_path: Path) -> None:
    """What rounds to 65504 is kept, what rounds to infinity is refused by the tensor's name."""
    weight = torch.zeros(300, 30)
    weight[211, 7] = 1.0 if folded else value
    base = one_tensor(tmp_path / "base", weight)
    down, up = torch.zeros(1, 30), torch.zeros(300, 1)
    down[0, 7], up[211, 0] = 1.0, value - 1
    folds = fold_of(LoRA(down, up, 1.0)) if folded else None
    works = {"the.weight": work(base, "the.weight", folds, "fp16")}
    if fits:
        run(base, works, tmp_path / "out", dtype="fp16")
        assert float(read(tmp_path / "out")["the.weight"][211, 7]) == 65504
        return
    with pytest.raises(NonFiniteError, match=r"the\.weight.*F16.*row 211") as caught:
        run(base, works, tmp_path / "out", dtype="fp16")
    assert "bf16" in (caught.value.hint or "")
    assert_nothing_left(tmp_path, "base")


def test_large_numbers_are_no_infinities(tmp_path: Path) -> None:
    """A norm that float32 cannot hold says nothing about the elements."""
    weight = torch.full((64, 64), 3e38)
    base = one_tensor(tmp_path / "base", weight)
    lora = LoRA(torch.ones(1, 64), torch.full((64, 1), 1e37), 1.0)
    run(base, {"the.weight": work(base, "the.weight", fold_of(lora))}, tmp_path / "out")
    assert torch.equal(read(tmp_path / "out")["the.weight"], weight + 1e37)


# ── failures ─────────────────────────────────────────────────────────────────────────────────


def big_base(folder: Path) -> tuple[BaseModel, dict[str, TensorWork]]:
    """Return a base of a few copied and folded tensors, 16 kB each."""
    tensors = {name: normal(i, 64, 64) for i, name in enumerate(("a", "b", "fold", "y", "z"))}
    base = open_base(save_base(folder, {"model.safetensors": tensors}, {}))
    lora = LoRA(normal(1, 2, 64), normal(2, 64, 2), 1.0)
    return base, {name: work(base, name, fold_of(lora)) for name in ("fold", "z")}


@pytest.mark.parametrize("left", [0, 8, 100, 20_000, 40_000, 81_000])
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("folded", [True, False], ids=["folded", "copied"])
def test_a_base_cut_off_after_its_header_was_read(
    left: int, workers: int, folded: bool, tmp_path: Path
) -> None:
    """However much is left of the file, the error names it and nothing is written."""
    base, works = big_base(tmp_path / "base")
    os.truncate(tmp_path / "base" / "model.safetensors", left)
    with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
        run(base, works if folded else {}, tmp_path / "out", workers=workers)
    assert_nothing_left(tmp_path, "base")


def test_a_base_cut_off_during_the_run(tmp_path: Path) -> None:
    base, works = big_base(tmp_path / "base")
    seen: list[int] = []

    def cut(count: int, total: int) -> None:
        seen.append(count)
        os.truncate(tmp_path / "base" / "model.safetensors", 50_000)

    with pytest.raises(CorruptFileError, match=r"model\.safetensors"):
        run(base, works, tmp_path / "out", workers=1, progress=cut)
    assert seen
    assert_nothing_left(tmp_path, "base")


def test_a_base_that_went_away(tmp_path: Path) -> None:
    """A failure with a stated reason, not a bare OSError."""
    base, works = big_base(tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(LoratoolsError, match=r"model\.safetensors"):
        run(base, works, tmp_path / "out")
    assert_nothing_left(tmp_path, "base")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OutputError])
@pytest.mark.parametrize("workers", [1, 4])
def test_a_failing_worker_stops_the_others(
    error: type[BaseException], workers: int, small_blocks: None, tmp_path: Path
) -> None:
    """The first failure is the one that is raised; what waits is not begun; nothing stays."""
    tensors = {f"w{i:02d}": normal(i, 8, 4) for i in range(40)}
    base = open_base(save_base(tmp_path / "base", {"model.safetensors": tensors}, {}))
    lora = LoRA(normal(1, 1, 4), normal(2, 8, 1), 1.0)
    begun: list[str] = []

    def folds(name: str) -> MakeFolds:
        def make(device: str) -> list[RowFold]:
            begun.append(name)
            if name == "w03":
                raise error("broken on purpose")
            return [lora.row_fold(1.0)]

        return make

    works = {name: work(base, name, folds(name)) for name in tensors}
    with pytest.raises(error, match="broken on purpose"):
        run(base, works, tmp_path / "out", workers=workers)
    assert len(begun) < len(tensors)
    assert_nothing_left(tmp_path, "base")


def test_an_interrupt_stops_the_workers(
    small_blocks: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C reaches the main thread, which waits: a tensor in work stops at its next block."""
    weight = normal(1, 12_000, 2)
    base = one_tensor(tmp_path / "base", weight)
    lora = LoRA(normal(2, 1, 2), normal(3, 12_000, 1), 1.0)
    works = {"the.weight": work(base, "the.weight", fold_of(lora))}
    written: list[int] = []
    running = threading.Event()

    def progress(count: int, total: int) -> None:
        written.append(count)
        running.set()

    def interrupted(*args: object, **options: object) -> None:
        assert running.wait(30)
        raise KeyboardInterrupt

    monkeypatch.setattr("loratools.streaming.rewriting.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(base, works, tmp_path / "out", workers=1, progress=progress)
    assert 0 < sum(written) < weight.nbytes
    assert_nothing_left(tmp_path, "base")


def test_a_failure_spares_what_was_there(tmp_path: Path) -> None:
    base, works = big_base(tmp_path / "base")
    run(base, works, tmp_path / "out")
    before = digests(tmp_path / "out")

    def refuse(results: Mapping[str, Mapping[str, TensorResult]]) -> None:
        assert results[""].keys() == works.keys()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(base, {**works}, tmp_path / "out", overwrite=True, accept=refuse)
    assert digests(tmp_path / "out") == before
    assert_nothing_left(tmp_path, "base", "out")
