"""Headers: what is encoded is what is read, and the safetensors library agrees on both."""

from __future__ import annotations

import json
import math
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import deserialize, safe_open

from loratools.errors import InputError, MissingFileError, OutputError
from loratools.tensorfiles.dtypes import DTYPES
from loratools.tensorfiles.header import Header, TensorSpec, encode_header, read_header

Entry = tuple[str, str, tuple[int, ...]]

NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


def on_whole_bytes(entry: Entry) -> bool:
    return math.prod(entry[2]) * DTYPES[entry[1]] % 8 == 0


ENTRIES = st.lists(
    st.tuples(
        NAMES.filter(lambda name: name != "__metadata__"), st.sampled_from(list(DTYPES)), SHAPES
    ).filter(on_whole_bytes),
    unique_by=lambda entry: entry[0],
    max_size=6,
)
METADATA = st.dictionaries(NAMES, NAMES, max_size=4)


def data_bytes(entries: list[Entry]) -> int:
    return sum(math.prod(shape) * DTYPES[dtype] // 8 for _, dtype, shape in entries)


@pytest.fixture(scope="module")
def read_back(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bytes], Header]:
    path = tmp_path_factory.mktemp("headers") / "x.safetensors"

    def read(raw: bytes) -> Header:
        path.write_bytes(raw)
        return read_header(path)

    return read


@given(entries=ENTRIES, metadata=METADATA)
def test_round_trip(
    read_back: Callable[[bytes], Header], entries: list[Entry], metadata: dict[str, str]
) -> None:
    encoded = encode_header(entries, metadata)
    header = read_back(encoded + bytes(data_bytes(entries)))
    specs = header.tensors.values()
    assert {(spec.name, spec.dtype, spec.shape) for spec in specs} == set(entries)
    assert dict(header.metadata) == metadata
    assert header.data_start == len(encoded)
    assert header.data_start % 8 == 0
    assert header.size == len(encoded) + data_bytes(entries)
    assert [spec.name for spec in specs if spec.nbytes] == [
        name for name, dtype, shape in entries if data_bytes([(name, dtype, shape)])
    ]


@given(entries=ENTRIES, metadata=METADATA)
def test_the_library_reads_what_is_encoded(entries: list[Entry], metadata: dict[str, str]) -> None:
    raw = encode_header(entries, metadata) + bytes(data_bytes(entries))
    read = {(name, view["dtype"], tuple(view["shape"])) for name, view in deserialize(raw)}
    assert read == set(entries)


def test_the_library_reads_the_metadata(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(encode_header([], {"b": "ü\n", "a": ""}))
    with safe_open(path, "np") as file:
        assert file.metadata() == {"a": "", "b": "ü\n"}


def test_header_bytes() -> None:
    """Written out by hand, so that a change of layout shows."""
    expected = (
        '{"__metadata__":{"a":"1","b":"2"},'
        '"é":{"dtype":"F16","shape":[2,1],"data_offsets":[0,4]},'
        '"x":{"dtype":"U8","shape":[],"data_offsets":[4,5]}}'
    ).encode()
    expected += b" " * (-len(expected) % 8)
    encoded = encode_header([("é", "F16", (2, 1)), ("x", "U8", ())], {"b": "2", "a": "1"})
    assert encoded == struct.pack("<Q", len(expected)) + expected


def test_tensors_come_in_the_order_of_their_data(tmp_path: Path) -> None:
    entries = {
        "last": {"dtype": "U8", "shape": [3], "data_offsets": [4, 7]},
        "first": {"dtype": "F16", "shape": [2], "data_offsets": [0, 4]},
        "empty": {"dtype": "F64", "shape": [0, 9], "data_offsets": [4, 4]},
    }
    raw = json.dumps(entries).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + bytes(7))
    start = 8 + len(raw)
    assert list(read_header(path).tensors.values()) == [
        TensorSpec("first", "F16", (2,), start, start + 4),
        TensorSpec("empty", "F64", (0, 9), start + 4, start + 4),
        TensorSpec("last", "U8", (3,), start + 4, start + 7),
    ]


@pytest.mark.parametrize(
    ("shape", "elements", "nbytes"), [((), 1, 2), ((3, 0), 0, 0), ((3, 4), 12, 24)]
)
def test_spec_sizes(
    read_back: Callable[[bytes], Header], shape: tuple[int, ...], elements: int, nbytes: int
) -> None:
    header = read_back(encode_header([("x", "BF16", shape)], {}) + bytes(nbytes))
    spec = header.tensors["x"]
    assert (spec.elements, spec.nbytes) == (elements, nbytes)


@pytest.mark.parametrize(
    ("entries", "metadata", "words"),
    [
        ([("x", "U8", (1,)), ("x", "U8", (1,))], {}, "'x': the name is taken"),
        ([("__metadata__", "U8", (1,))], {}, "the name is taken"),
        ([("x", "Q4", (1,))], {}, "unknown dtype 'Q4'"),
        ([("x", "F4", (3,))], {}, "whole byte"),
        ([("x", "U8", (-1,))], {}, "shape"),
        ([("x", "U8", (2**62, 4, 0))], {}, "overflows"),
        ([("\ud800", "U8", (1,))], {}, "Unicode"),
        ([], {"a": "\udfff"}, "Unicode"),
        ([], {"a": 1}, "'a': 1 is not text"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(
    entries: list[Entry], metadata: dict[str, str], words: str
) -> None:
    with pytest.raises(OutputError, match=words):
        encode_header(entries, metadata)


def test_headers_that_no_reader_takes_are_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratools.tensorfiles.header.MAX_HEADER_BYTES", 64)
    encode_header([], {"a": "x" * 39})
    with pytest.raises(OutputError, match="take 72 bytes; 64 is the most"):
        encode_header([], {"a": "x" * 40})


@pytest.mark.parametrize("name", ["absent.safetensors", ".", "file/below"])
def test_no_such_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MissingFileError, match=str(tmp_path)):
        read_header(tmp_path / name)


def test_a_file_that_cannot_be_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match="Permission denied"):
        read_header(tmp_path / "x")


MODULES = ("atomic", "copying", "dtypes", "header", "sharded")


@pytest.mark.parametrize("module", MODULES)
def test_starts_without_torch_and_numpy(module: str) -> None:
    code = f"import sys, loratools.tensorfiles.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert {"torch", "numpy"}.isdisjoint(done.stdout.split())
