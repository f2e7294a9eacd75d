"""torch.save files: tensors come back, code never runs, damage is found."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from loratools.errors import CorruptFileError, InputError, MissingFileError, UnsupportedError
from loratools.tensorfiles.torch_zip import load_torch

TENSORS = {"a": torch.arange(600.0).view(20, 30), "b": torch.arange(3), "empty": torch.zeros(0, 2)}


def save(path: Path, content: Any, is_zip: bool = True) -> Path:
    torch.save(content, path, _use_new_zipfile_serialization=is_zip)
    return path


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("wrap", [dict, lambda x: {"state_dict": x, "epoch": 3}])
def test_round_trip(tmp_path: Path, is_zip: bool, wrap: Callable[[Any], Any]) -> None:
    loaded = load_torch(save(tmp_path / "x.bin", wrap(TENSORS), is_zip))
    assert list(loaded) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor)


def test_views_parameters_and_ties(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    content = {"base": base, "tied": base, "part": base[4:8], "grad": torch.nn.Parameter(base[:2])}
    loaded = load_torch(save(tmp_path / "x.bin", content))
    assert all(torch.equal(loaded[name], content[name]) for name in content)
    assert not loaded["grad"].requires_grad
    assert type(loaded["grad"]) is torch.Tensor


def test_zip_files_are_mapped_privately(tmp_path: Path) -> None:
    path = save(tmp_path / "x.bin", TENSORS)
    before = path.read_bytes()
    load_torch(path)["a"].zero_()
    assert path.read_bytes() == before


class Marker:
    """Unpickles by touching a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("is_zip", [True, False])
def test_code_is_named_and_not_run(tmp_path: Path, is_zip: bool) -> None:
    path = save(tmp_path / "x.bin", {"a": Marker(tmp_path / "ran")}, is_zip)
    with pytest.raises(UnsupportedError, match=r"\.mkdir, which could run code") as refusal:
        load_torch(path)
    assert "safetensors" in (refusal.value.hint or "")
    assert not (tmp_path / "ran").exists()


def test_a_plain_pickle_is_not_run(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"a": Marker(tmp_path / "ran")}))
    with pytest.raises(InputError):
        load_torch(tmp_path / "x.bin")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ([torch.zeros(1)], "holds a list"),
        (torch.zeros(1), "holds a Tensor"),
        ({"a": torch.zeros(1), "n": 3}, "'n' is a int"),
        ({"a": torch.zeros(1), "state_dict": {"b": torch.zeros(1)}}, "'state_dict' is a dict"),
        ({"model": {"b": torch.zeros(1)}}, "'model' is a dict"),
        ({3: torch.zeros(1)}, "3 is not named"),
        ({"s": torch.eye(2).to_sparse()}, "'s' is not a dense"),
        ({"m": torch.zeros(2, device="meta")}, "'m' is not a dense"),
        (torch.nn.Linear(1, 1), "Linear"),
    ],
)
def test_anything_but_named_tensors_is_refused(tmp_path: Path, content: Any, words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        load_torch(save(tmp_path / "x.bin", content))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "x.pt")
    with pytest.raises(UnsupportedError, match="TorchScript"):
        load_torch(tmp_path / "x.pt")


def rewrite(path: Path, compression: int, change: Callable[[str, bytes], bytes | None]) -> None:
    """Write a zip file anew, with each entry changed, or left out where the change is None."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            if (changed := change(name, data)) is not None:
                archive.writestr(name, changed)


def test_compressed_entries_are_decompressed(tmp_path: Path) -> None:
    path = save(tmp_path / "x.bin", TENSORS)
    rewrite(path, zipfile.ZIP_DEFLATED, lambda _, data: data)
    assert torch.equal(load_torch(path)["a"], TENSORS["a"])


@pytest.mark.parametrize("kept", [None, 4])
@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_short_and_missing_entries(tmp_path: Path, compression: int, kept: int | None) -> None:
    # Enough lies behind the first entry for a reader that does not look at its size.
    path = save(tmp_path / "x.bin", {"a": torch.zeros(100), "b": torch.ones(1000)})

    def cut(name: str, data: bytes) -> bytes | None:
        return data if not name.endswith("data/0") else kept and data[:kept]

    rewrite(path, compression, cut)
    with pytest.raises(CorruptFileError):
        load_torch(path)


def test_a_zip_of_something_else(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(CorruptFileError):
        load_torch(tmp_path / "x.bin")


def test_a_misleading_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="named as a safetensors file"):
        load_torch(save(tmp_path / "x.safetensors", TENSORS))


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        load_torch(tmp_path / "x.bin")


@pytest.fixture(scope="module", params=[True, False], ids=["zip", "legacy"])
def intact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("intact") / "x.bin", TENSORS, request.param)


@pytest.mark.parametrize("kept", [0, 2, 5, 0.3, 0.6, -20])
def test_truncated_files(tmp_path: Path, intact: Path, kept: float) -> None:
    data = intact.read_bytes()
    stop = int(kept * len(data)) if 0 < kept < 1 else int(kept)
    (tmp_path / "x.bin").write_bytes(data[:stop])
    with pytest.raises(CorruptFileError, match=r"truncated|damaged") as refusal:
        load_torch(tmp_path / "x.bin")
    assert "incomplete" in (refusal.value.hint or "")


@given(where=st.floats(0, 1, exclude_max=True), byte=st.integers(0, 255))
@example(where=0.5, byte=0)
def test_a_damaged_byte_never_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, intact: Path, where: float, byte: int
) -> None:
    data = bytearray(intact.read_bytes())
    data[int(where * len(data))] = byte
    path = tmp_path_factory.mktemp("damaged") / "x.bin"
    path.write_bytes(data)
    with suppress(InputError):
        load_torch(path)
