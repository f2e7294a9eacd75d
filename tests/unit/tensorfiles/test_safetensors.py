"""Whole files: bytes equal to the library's, values equal to the library's, memory left alone."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import pytest
import safetensors.torch as library
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.errors import CorruptFileError, OutputError, UnsupportedError
from loratools.tensorfiles.dtypes import DTYPES, torch_dtype
from loratools.tensorfiles.header import encode_header
from loratools.tensorfiles.safetensors import load_tensors, save_tensors

WORDS = [word for word in DTYPES if not word.startswith("F6")]


def random_tensor(word: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Return random bytes as a tensor: NaN patterns and all."""
    dtype = torch_dtype(word)
    generator = torch.Generator().manual_seed(seed)
    high = 2 if word == "BOOL" else 256
    size = torch.Size(shape).numel() * dtype.itemsize
    return (
        torch.randint(high, (size,), generator=generator, dtype=torch.uint8).view(dtype).view(shape)
    )


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    flat = (tensor.reshape(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(*flat)


@st.composite
def files(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    names = draw(
        st.lists(st.text(st.characters(exclude_categories=["Cs"])), unique=True, max_size=6)
    )
    shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)
    packed = shapes.map(lambda shape: (*shape, 2))
    tensors = {}
    for seed, name in enumerate(name for name in names if name != "__metadata__"):
        word = draw(st.sampled_from(WORDS))
        tensors[name] = random_tensor(word, draw(packed if word == "F4" else shapes), seed)
    return tensors


@given(tensors=files(), text=st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_are_those_of_the_library(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor], text: str
) -> None:
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    save_tensors(path, tensors, {"text": text})
    assert path.read_bytes() == library.save(tensors, {"text": text})


@given(tensors=files())
def test_what_the_library_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, torch.Tensor]
) -> None:
    path = tmp_path_factory.mktemp("files") / "x.safetensors"
    library.save_file(tensors, path, {"a": "b"})
    loaded, metadata = load_tensors(path)
    assert metadata == {"a": "b"}
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bytes(loaded[name], tensor)


@pytest.mark.parametrize("order", [("b", "a", "c"), ("c", "b", "a")])
def test_order_does_not_matter(tmp_path: Path, order: tuple[str, ...]) -> None:
    words = {"a": "F32", "b": "BF16", "c": "F32"}
    whole = {name: random_tensor(word, (3,)) for name, word in words.items()}
    save_tensors(tmp_path / "x", whole, {"k": "1", "l": "2"})
    save_tensors(tmp_path / "y", {name: whole[name] for name in order}, {"l": "2", "k": "1"})
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    assert list(load_tensors(tmp_path / "x")[0]) == ["a", "c", "b"]


def test_views_and_shared_storage_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(12.0, requires_grad=True).view(3, 4)
    tensors = {"base": base, "again": base, "columns": base.T, "part": base[1:, ::2]}
    tensors |= {
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
    }
    save_tensors(tmp_path / "x", tensors, {})
    loaded = library.load_file(tmp_path / "x")
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor)


def test_misaligned_tensors_are_copied(tmp_path: Path) -> None:
    values = torch.tensor([1.5, -2.0])
    header = encode_header([("byte", "U8", (1,)), ("floats", "F32", (2,))], {})
    (tmp_path / "x").write_bytes(header + b"\7" + values.numpy().tobytes())
    loaded, _ = load_tensors(tmp_path / "x")
    assert torch.equal(loaded["floats"], values)
    assert loaded["floats"].data_ptr() % 4 == 0
    assert loaded["byte"].tolist() == [7]


def test_tensors_are_private_and_apart(tmp_path: Path) -> None:
    path = tmp_path / "x"
    save_tensors(path, {"a": torch.zeros(4), "b": torch.ones(4)}, {})
    before = path.read_bytes()
    loaded, _ = load_tensors(path)
    assert loaded["a"].untyped_storage().nbytes() == 16
    loaded["a"].fill_(9)
    assert path.read_bytes() == before
    assert torch.equal(loaded["b"], torch.ones(4))
    assert torch.equal(load_tensors(path)[0]["a"], torch.zeros(4))


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps mapped files")
def test_one_tensor_outlives_the_others_and_the_file(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", {"a": torch.zeros(4), "b": torch.ones(1 << 16)}, {})
    kept = load_tensors(tmp_path / "x")[0]["b"]
    (tmp_path / "x").unlink()
    gc.collect()
    assert kept.sum() == 1 << 16


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_takes_no_anonymous_memory(tmp_path: Path) -> None:
    size = 64 << 20
    with (tmp_path / "x").open("wb") as file:
        file.write(encode_header([("a", "F32", (size // 4,))], {}))
        file.truncate(file.tell() + size)
    torch.zeros(1 << 20).sum()
    before = anonymous_bytes()
    tensor = load_tensors(tmp_path / "x")[0]["a"]
    assert tensor.sum() == 0
    assert anonymous_bytes() - before < size // 8


def test_packed_pairs_must_not_be_split(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encode_header([("odd", "F4", (2, 3))], {}) + bytes(3))
    with pytest.raises(UnsupportedError, match=r"'odd'.*even length"):
        load_tensors(tmp_path / "x")


def test_a_dtype_unknown_to_torch(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(encode_header([("six", "F6_E2M3", (4,))], {}) + bytes(3))
    with pytest.raises(UnsupportedError, match="F6_E2M3"):
        load_tensors(tmp_path / "x")


def test_a_corrupt_file_is_never_mapped(tmp_path: Path) -> None:
    save_tensors(tmp_path / "x", {"a": torch.zeros(4)}, {})
    os.truncate(tmp_path / "x", (tmp_path / "x").stat().st_size - 1)
    with pytest.raises(CorruptFileError, match="1 bytes are missing"):
        load_tensors(tmp_path / "x")


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(2, 2).to_sparse(), "dense"),
        (torch.zeros(2, device="meta"), "dense"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        (torch.zeros(1, dtype=torch.uint8).view(torch_dtype("F4")).squeeze(), "dimension"),
    ],
)
def test_what_cannot_be_saved_is_refused(tmp_path: Path, tensor: torch.Tensor, words: str) -> None:
    with pytest.raises(OutputError, match=f"'bad'.*{words}"):
        save_tensors(tmp_path / "x", {"good": torch.zeros(1), "bad": tensor}, {})
    assert not (tmp_path / "x").exists()
