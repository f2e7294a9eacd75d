"""What is wrong with a quantised base ends every command with the tensor's and the scheme's name.

Every scheme, with each of its stored tensors missing, of another shape or type, damaged, or under
another config.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import cli
from loratools.basemodel import open_base
from loratools.errors import InputError, NonFiniteError
from loratools.merge import merge_into_base
from loratools.quantize import dequantize_base
from loratools.summary.files import summarize

from .checkpoints import ENTRIES, OTHER, TOUCHED, write_adapter, write_base

# Parts without which a weight is another one, but a whole one.
_OPTIONAL = ("zero_point", "g_idx")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@cache
def _sound(name: str) -> Path:
    """A folder with a base and an adapter for it."""
    folder = Path(_FOLDERS.name) / name.replace(" ", "-")
    folder.mkdir()
    write_adapter(folder / "adapter", write_base(folder / "base", name), size=0.3)
    return folder


_FOLDERS = tempfile.TemporaryDirectory(prefix="loratools-tests-")


class Broken:
    """A checkpoint that is changed in one place at a time, and what the commands say of it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.entry = ENTRIES[name]
        shutil.copytree(_sound(name), folder, dirs_exist_ok=True)
        self.base, self.adapter, self.out = (folder / n for n in ("base", "adapter", "out"))
        self.file = self.base / "model.safetensors"
        self.tensors = load_file(self.file)
        with safe_open(self.file, "pt") as opened:
            self.words = opened.metadata()
        opened = open_base(self.base).tensors[f"{OTHER}.weight"].packed
        assert opened is not None
        self.scheme = opened.scheme

    def parts(self) -> list[str]:
        """The stored tensors of one weight."""
        beside = (f"{OTHER}.", f"{OTHER}_")
        return [name for name in self.tensors if name.startswith(beside)]

    def store(self, tensors: Mapping[str, Tensor], **config: Any) -> None:
        # In place: opened tensors would hold a mapping of the file.
        save_file({n: t.contiguous() for n, t in tensors.items()}, self.file, self.words)
        words = {"model_type": "llama", "torch_dtype": "bfloat16"}
        words["quantization_config"] = {**self.entry.config, **config}
        (self.base / "config.json").write_text(json.dumps(words))

    def commands(self) -> Iterator[Callable[[], object]]:
        yield lambda: summarize(self.base)
        yield from self.writing()

    def writing(self) -> Iterator[Callable[[], object]]:
        yield lambda: dequantize_base(self.base, self.out)
        yield lambda: merge_into_base(self.base, self.adapter, self.out)

    def assert_refused(self, *words: str, module: str = OTHER, what: str = "") -> None:
        """Every command fails, names ``module`` and the words, and leaves nothing behind."""
        for run in self.commands():
            with pytest.raises(InputError) as caught:
                run()
            text = caught.value.message
            assert module.rpartition(".")[2] in text, (what, text)
            for word in words or (self.scheme,):
                assert word in text, (what, text)
            assert caught.value.hint
            assert not self.out.exists()


@pytest.fixture(params=list(ENTRIES))
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> Broken:
    return Broken(tmp_path, request.param)


def test_the_checkpoint_is_sound(broken: Broken) -> None:
    for run in broken.writing():
        run()
        assert broken.out.exists()
        for path in broken.out.iterdir():
            path.unlink()
        broken.out.rmdir()


def test_a_part_is_missing(broken: Broken) -> None:
    for part in broken.parts():
        if not broken.entry.subclass and part.endswith(_OPTIONAL):
            continue
        broken.store({n: t for n, t in broken.tensors.items() if n != part})
        broken.assert_refused(what=f"without {part}")


# One row more is in the last block, or under the only scale.
_LAST_BLOCK = ("fp8-block-192-rows", "fp8-exponents", "int-blocks", "int-whole")


def longer(tensor: Tensor, axis: int) -> Tensor:
    """The tensor with its first slice along an axis once more."""
    raw = tensor if tensor.dim() else tensor[None]
    bytes_ = raw.view(torch.uint8) if raw.dtype.itemsize == 1 else raw
    first = bytes_.narrow(axis, 0, 1)
    return torch.cat([bytes_, first], axis).view(raw.dtype)


def test_a_part_has_another_shape(broken: Broken) -> None:
    for part in broken.parts():
        tensor = broken.tensors[part]
        changed = {"longer": longer(tensor, 0), "empty": tensor.new_empty(0)}
        if part.endswith(".weight") and broken.entry.case in _LAST_BLOCK:
            del changed["longer"]
        if tensor.dim() > 1 and not part.endswith((".weight", "qdata")):
            changed["wider"] = longer(tensor, 1)
        for what, other in changed.items():
            broken.store({**broken.tensors, part: other})
            broken.assert_refused(what=f"{what} {part}")


def test_a_part_has_another_type(broken: Broken) -> None:
    for part in broken.parts():
        broken.store({**broken.tensors, part: broken.tensors[part] != 0})
        broken.assert_refused(what=f"bool {part}")


def damaged(tensor: Tensor, value: float) -> Tensor | None:
    """The tensor with a value among its first ones, if its type can hold it."""
    if tensor.dtype == torch.uint8 or not tensor.dtype.is_floating_point:
        return None
    wide = tensor.float().reshape(-1).clone()
    wide[0] = value
    found = wide.to(tensor.dtype).reshape(tensor.shape)
    return None if bool(found.float().isfinite().all()) else found


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_is_no_number(broken: Broken, value: float) -> None:
    """Values are read when they are used: merge and dequantize stop, inspect reads headers."""
    for part in broken.parts():
        other = damaged(broken.tensors[part], value)
        # A double-quantised offset is bitsandbytes' own business; codes of one level may be unused.
        if other is None or part.endswith(("quant_map", "nested_quant_map")):
            continue
        broken.store({**broken.tensors, part: other})
        for run in broken.writing():
            with pytest.raises(NonFiniteError) as caught:
                run()
            for word in (f"{OTHER}.weight", broken.scheme):
                assert word in caught.value.message, part
            assert not broken.out.exists()


def test_a_touched_scale_is_no_number(broken: Broken) -> None:
    names = [n for n in broken.tensors if n.startswith(TOUCHED)]
    changed = {n: d for n in names if (d := damaged(broken.tensors[n], float("nan"))) is not None}
    for part, other in changed.items():
        if part.endswith("quant_map"):
            continue
        broken.store({**broken.tensors, part: other})
        for quant in ("keep", "dequantize"):
            with pytest.raises(NonFiniteError, match=rf"{TOUCHED}.*{broken.scheme}"):
                merge_into_base(broken.base, broken.adapter, broken.out, quant=quant)
            assert not broken.out.exists()


def test_the_config_names_another_scheme(broken: Broken) -> None:
    own = broken.entry.config.get("quant_method")
    for method in {"gptq", "awq", "bitsandbytes", "hqq", "torchao", "mxfp4"} - {own}:
        broken.store(broken.tensors, quant_method=method)
        broken.assert_refused(method, module=TOUCHED, what=f"as {method}")


def test_the_config_names_an_unknown_scheme(broken: Broken) -> None:
    broken.store(broken.tensors, quant_method="quanto")
    broken.assert_refused("'quanto'", module="model.")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("gptq", {"bits": 5}),
        ("gptq", {"bits": "four"}),
        ("gptq", {"group_size": 16}),
        ("gptq", {"checkpoint_format": "marlin"}),
        ("awq", {"bits": 8}),
        ("awq", {"group_size": 16}),
        ("awq", {"version": "gemv"}),
        ("mlx", {"bits": 7}),
        ("mlx", {"bits": 8}),
        ("mlx", {"group_size": 48}),
        ("mlx", {"mode": "mxfp2"}),
        ("fp8 blocks", {"weight_block_size": [64, 64]}),
        ("fp8 blocks", {"weight_block_size": "128"}),
        ("fp8 exponents", {"weight_block_size": [0, 32]}),
    ],
)
def test_the_config_does_not_fit(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    broken = Broken(tmp_path, name)
    broken.store(broken.tensors, **config)
    broken.assert_refused(module=TOUCHED, what=str(config))


@pytest.mark.parametrize(
    ("name", "weights"),
    [
        ("int rows", {"num_bits": 9}),
        ("int rows", {"type": "float"}),
        ("int rows", {"group_size": 7}),
        ("int groups of 4 bits", {"group_size": 32}),
        ("int blocks", {"block_structure": [16, 16]}),
        ("int blocks", {"block_structure": "sixteen"}),
        ("int whole", {"symmetric": False}),
        ("float groups", {"num_bits": 4}),
        ("float groups", {"type": "int"}),
        ("mxfp6", {"num_bits": 4}),
        ("pack-quantized", {"num_bits": 8}),
        ("pack-quantized", {"group_size": 16}),
        ("pack-quantized 3", {"symmetric": False}),
    ],
)
def test_the_group_does_not_fit(tmp_path: Path, name: str, weights: dict[str, Any]) -> None:
    broken = Broken(tmp_path, name)
    groups = broken.entry.config.get("config_groups", {"group_0": {"weights": {}}})
    own = groups["group_0"]["weights"]
    broken.store(broken.tensors, config_groups={"group_0": {"weights": {**own, **weights}}})
    broken.assert_refused(module=TOUCHED, what=str(weights))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("int rows", "pack-quantized"),
        ("pack-quantized", "int-quantized"),
        ("float groups", "nvfp4-pack-quantized"),
    ],
)
def test_the_format_does_not_fit(tmp_path: Path, name: str, word: str) -> None:
    broken = Broken(tmp_path, name)
    broken.store(broken.tensors, format=word)
    broken.assert_refused(broken.scheme, word, module=TOUCHED)


@pytest.mark.parametrize(
    ("attributes", "word"),
    [
        ({"block_size": [1, 7]}, "scale"),
        ({"block_size": "rows"}, "block_size"),
        ({"target_dtype": {"_data": "int9"}}, "int9"),
    ],
)
def test_torchaos_words_do_not_fit(tmp_path: Path, attributes: dict[str, Any], word: str) -> None:
    broken = Broken(tmp_path, "torchao intx")
    said = json.loads(broken.words[f"{TOUCHED}.weight"])
    said["_data"] |= attributes
    broken.words[f"{TOUCHED}.weight"] = json.dumps(said)
    broken.store(broken.tensors)
    broken.assert_refused(broken.scheme, word, module=TOUCHED)


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ({"_type": "Int4TilePackedTo4dTensor", "_data": {}}, "order of one GPU's instructions"),
        ({"_type": "NF4Tensor", "_data": {}}, "torchao NF4Tensor"),
        (None, "header says nothing"),
    ],
)
def test_torchaos_other_layouts_are_named(tmp_path: Path, said: Any, word: str) -> None:
    broken = Broken(tmp_path, "torchao int8")
    del broken.words[f"{TOUCHED}.weight"]
    if said is not None:
        broken.words[f"{TOUCHED}.weight"] = json.dumps(said)
    broken.store(broken.tensors)
    broken.assert_refused("torchao", word, module=TOUCHED)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("model.layers.0.q_proj.scale_packed", {}),
        ("model.layers.0.q_proj.bitmask", {}),
        ("model.layers.0.q_proj.weight", {"format": "marlin-24"}),
        ("model.layers.0.q_proj.weight", {"sparsity_config": {"format": "sparse-24-bitmask"}}),
    ],
)
def test_sparse_formats_are_refused_with_the_reason(
    tmp_path: Path, name: str, config: dict[str, Any]
) -> None:
    broken = Broken(tmp_path, "int rows")
    broken.store({name: torch.zeros(4, 4)}, **config)
    broken.assert_refused("which", module="q_proj")


def test_a_failing_command_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = Broken(tmp_path, "gptq")
    broken.store({n: t for n, t in broken.tensors.items() if n != f"{OTHER}.qzeros"})
    base, adapter, out = (str(p) for p in (broken.base, broken.adapter, broken.out))
    for words in (["inspect", base], ["dequantize", base, "-o", out],
                  ["merge", base, adapter, "-o", out]):  # fmt: skip
        assert cli.run(words) == 1
        said = capsys.readouterr().err
        assert f"{OTHER}: stored as gptq, but there is no .qzeros" in said
        assert not broken.out.exists()
