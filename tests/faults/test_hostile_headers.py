"""Headers made by hand to mislead: each is refused by name, and never more is let through.

The safetensors library is the witness: whatever ``read_header`` accepts, it accepts too.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize

from loratools.errors import CorruptFileError
from loratools.tensorfiles.header import read_header


def framed(raw: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def file_of(data: int, **entries: Any) -> bytes:
    """Return a file with that many data bytes; an entry is (dtype, shape, offsets) or anything."""
    keys = ("dtype", "shape", "data_offsets")
    members = {
        name: dict(zip(keys, entry, strict=True)) if isinstance(entry, tuple) else entry
        for name, entry in entries.items()
    }
    return framed(json.dumps(members).encode(), bytes(data))


def one(dtype: Any = "U8", shape: Any = (1,), offsets: Any = (0, 1), data: int = 1) -> bytes:
    return file_of(data, w=(dtype, shape, offsets))


ENTRY = b'{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
LAYER = "base_model.model.model.layers.11.mlp.experts.127.gate_up_proj.lora_A.default.weight"

# name, bytes, words of the message
HOSTILE: list[tuple[str, bytes, list[str]]] = [
    ("empty file", b"", ["0 bytes are too few"]),
    ("seven bytes", b"\2\0\0\0\0\0\0", ["7 bytes are too few"]),
    ("length 0", framed(b"", b"{}", 0), ["header length 0 is outside"]),
    ("length 1", framed(b"{", b"}"), ["header length 1 is outside"]),
    ("length over the limit", framed(b"{}", length=100_000_001), ["100000001 is outside"]),
    ("length 2**63", framed(b"{}", length=2**63), ["is outside"]),
    ("length 2**64-1", framed(b"{}", length=2**64 - 1), ["is outside"]),
    ("length over the file", framed(b"{}", length=100), ["truncated, 98 bytes are missing"]),
    ("leading space", framed(b" {}"), ["begins with b' '"]),
    ("byte order mark", framed(b"\xef\xbb\xbf{}"), ["begins with"]),
    ("not UTF-8", framed(b'{"\xff":1}'), ["not UTF-8"]),
    ("escaped surrogate", framed(b'{"\\ud800":' + ENTRY + b"}", b"x"), ["not UTF-8"]),
    ("surrogate in metadata", framed(b'{"__metadata__":{"a":"\\udc00"}}'), ["not UTF-8"]),
    ("not JSON", framed(b"{'w': 1}"), ["not usable JSON"]),
    ("cut JSON", framed(b'{"w":'), ["not usable JSON"]),
    ("padded with zeros", framed(b"{}\0\0"), ["not usable JSON"]),
    ("control character", framed(b'{"a\n":' + ENTRY + b"}", b"x"), ["not usable JSON"]),
    ("a list", framed(b"[]"), ["begins with b'['"]),
    ("two documents", framed(b"{}{}"), ["not usable JSON"]),
    ("nested deeply", framed(b'{"w":' + b"[" * 200_000), ["nested too deeply"]),
    ("NaN", framed(b'{"w":NaN}'), ["NaN is not"]),
    ("repeated name", framed(b'{"w":' + ENTRY + b',"w":' + ENTRY + b"}", b"x"), ["'w'", "twice"]),
    ("repeated field", framed(b'{"w":{"dtype":"U8","dtype":"I8"}}'), ["'dtype'", "twice"]),
    (
        "repeated metadata key",
        framed(b'{"__metadata__":{"a":"1","a":"2"}}'),
        ["'a'", "twice"],
    ),
    ("repeated metadata", framed(b'{"__metadata__":{},"__metadata__":{}}'), ["twice"]),
    ("metadata a list", file_of(0, __metadata__=[]), ["__metadata__ is not an object"]),
    ("metadata number", file_of(0, __metadata__={"a": 1}), ["'a' is not text: 1"]),
    ("metadata nested", file_of(0, __metadata__={"a": {}}), ["'a' is not text"]),
    ("entry a number", file_of(0, w=3), ["'w'", "3 is not an object"]),
    ("entry empty", file_of(0, w={}), ["'w'", "lacks data_offsets, dtype, shape"]),
    (
        "unknown field",
        file_of(1, w={"dtype": "U8", "shape": [1], "data_offsets": [0, 1], "codec": "x"}),
        ["'w'", "unknown field 'codec'"],
    ),
    ("unknown dtype", one("U7"), ["'w'", "unknown dtype 'U7'"]),
    ("lower-case dtype", one("u8"), ["'w'", "unknown dtype 'u8'"]),
    ("dtype a number", one(8), ["'w'", "unknown dtype 8"]),
    ("dtype a list", one(["U8"]), ["'w'", "unknown dtype ['U8']"]),
    ("shape a number", one(shape=1), ["'w'", "shape 1 is not"]),
    ("shape text", one(shape="1"), ["'w'", "shape '1' is not"]),
    ("shape negative", one(shape=[-1]), ["'w'", "shape", "is not"]),
    ("shape twice negative", one(shape=[-1, -1]), ["'w'", "shape", "is not"]),
    ("shape true", one(shape=[True]), ["'w'", "shape [True] is not"]),
    ("shape a float", one(shape=[1.0]), ["'w'", "shape [1.0] is not"]),
    ("shape minus zero", framed(one(shape=[7])[8:-1].replace(b"7", b"-0")), ["shape [-0.0] is"]),
    ("shape null", one(shape=None), ["'w'", "shape None is not"]),
    ("extent of 5000 digits", framed(one(shape=[7])[8:-1].replace(b"7", b"7" * 5000)), ["shape"]),
    ("extent 2**64", one(shape=[2**64]), ["'w'", "overflows"]),
    ("product 2**64", one(shape=[2**32, 2**32], offsets=[0, 0], data=0), ["'w'", "overflows"]),
    ("overflow behind a zero", one(shape=[2**62, 2**62, 0], offsets=[0, 0]), ["overflows"]),
    ("bytes 2**66", one("F64", [2**62], [0, 0], 0), ["'w'", "takes 36893488147419103232 bytes"]),
    ("one offset", one(offsets=[1]), ["'w'", "data_offsets [1] is not two"]),
    ("three offsets", one(offsets=[0, 0, 1]), ["'w'", "is not two"]),
    ("offsets floats", one(offsets=[0.0, 1.0]), ["'w'", "is not two"]),
    ("offsets bools", one(offsets=[False, True]), ["'w'", "is not two"]),
    ("offsets text", one(offsets="01"), ["'w'", "is not two"]),
    ("offset negative", one(offsets=[-1, 0]), ["'w'", "is not two"]),
    ("ends before it begins", one(offsets=[1, 0]), ["'w'", "end before they begin"]),
    ("offsets 2**64", one(offsets=[2**64, 2**64 + 1]), ["'w'", "hole"]),
    ("too small for its shape", one(shape=[2]), ["'w'", "takes 2 bytes, not 1"]),
    ("too large for its shape", one(shape=[], offsets=[0, 2], data=2), ["takes 1 bytes, not 2"]),
    ("half a byte", one("F4", [1]), ["'w'", "whole byte"]),
    ("six bits", one("F6_E3M2", [3], [0, 2], 2), ["'w'", "whole byte"]),
    ("beyond the file", one(shape=[9], offsets=[0, 9]), ["'w'", "truncated, 8 bytes are missing"]),
    ("a name of usual length", file_of(0, **{LAYER: 3}), [f"{LAYER!r}: 3 is not an object"]),
    ("a very long name", file_of(0, **{"n" * 100_000: 3}), ["'nnn", "...", "not an object"]),
    ("hole at the start", one(offsets=[1, 2], data=2), ["'w'", "hole of 1 bytes"]),
    (
        "hole in the middle",
        file_of(3, v=("U8", [1], [0, 1]), w=("U8", [1], [2, 3])),
        ["'w'", "hole of 1 bytes"],
    ),
    (
        "overlap",
        file_of(3, v=("U8", [2], [0, 2]), w=("U8", [2], [1, 3])),
        ["'w'", "overlaps"],
    ),
    (
        "the same bytes twice",
        file_of(1, v=("U8", [1], [0, 1]), w=("U8", [1], [0, 1])),
        ["'w'", "overlaps"],
    ),
    (
        "nothing, but inside another",
        file_of(4, v=("U8", [4], [0, 4]), w=("U8", [0], [2, 2])),
        ["'w'", "overlaps"],
    ),
    ("nothing, but far away", one(shape=[0], offsets=[9, 9], data=0), ["'w'", "hole"]),
    ("trailing bytes", one(data=4), ["3 bytes trail"]),
    ("trailing bytes without tensors", framed(b"{}", b"hidden"), ["6 bytes trail"]),
    (
        "data missing",
        file_of(5, v=("U8", [4], [0, 4]), w=("F32", [2], [4, 12]), z=("U8", [1], [12, 13])),
        ["truncated, 8 bytes are missing", "'w' is the first cut off"],
    ),
]


@pytest.mark.parametrize(
    ("raw", "words"), [row[1:] for row in HOSTILE], ids=[row[0] for row in HOSTILE]
)
def test_refused_by_name(tmp_path: Path, raw: bytes, words: list[str]) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(raw)
    with pytest.raises(CorruptFileError) as refusal:
        read_header(path)
    assert [word for word in [str(path), *words] if word not in refusal.value.message] == []
    assert len(refusal.value.message) < 1000


@pytest.mark.parametrize(
    ("raw", "tensors"),
    [
        (framed(b"{}"), 0),
        (framed(b"{}   \n"), 0),
        (one(shape=[]), 1),
        (one(shape=[0, 5], offsets=[0, 0], data=0), 1),
        (file_of(0, v=("F32", [0], [0, 0]), w=("U8", [3, 0], [0, 0])), 2),
        (file_of(1, **{"": ("U8", [1], [0, 1])}), 1),
        (one("F4", [2]), 1),
        (one("F6_E2M3", [4], [0, 3], 3), 1),
    ],
)
def test_odd_but_legal(tmp_path: Path, raw: bytes, tensors: int) -> None:
    (tmp_path / "x").write_bytes(raw)
    assert len(read_header(tmp_path / "x").tensors) == tensors == len(deserialize(raw))


@pytest.mark.parametrize(
    ("raw", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
        (b"PK\x03\x04\x00\x00\x08\x08\x00\x00", ".bin"),
        (b"\x80\x02}q\x00(X\x01\x00", ".bin"),
        (b"GGUF\x03\x00\x00\x00\x10\x00", ".gguf"),
        (b"<!DOCTYPE html><html></html>", "web page"),
    ],
)
def test_impostors_get_advice(tmp_path: Path, raw: bytes, word: str) -> None:
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(CorruptFileError, match="not a safetensors file") as refusal:
        read_header(tmp_path / "x")
    assert word in f"{refusal.value.message} {refusal.value.hint}"


def test_a_hint_for_each_truncation(tmp_path: Path) -> None:
    whole = file_of(40, v=("U8", [4], [0, 4]), w=("F32", [9], [4, 40]))
    for size in range(len(whole)):
        (tmp_path / "x").write_bytes(whole[:size])
        with pytest.raises(CorruptFileError) as refusal:
            read_header(tmp_path / "x")
        assert "incomplete" in (refusal.value.hint or "")
        missing = len(whole) - size
        if size >= len(whole) - 40:
            assert f"{missing} bytes are missing" in refusal.value.message


VALID = file_of(9, __metadata__={"format": "pt"}, a=("F16", [2, 2], [0, 8]), b=("U8", [], [8, 9]))
START = VALID.index(b"{")
STOP = VALID.rindex(b"}") + 1
ALPHABET = b'{}[]":,. \\-+0123456789eEaubtFU_\x00\xff'


@given(
    edits=st.lists(
        st.tuples(
            st.integers(START, STOP), st.integers(0, 2), st.sampled_from(list(ALPHABET)).map(chr)
        ),
        min_size=1,
        max_size=3,
    )
)
def test_never_more_lenient_than_the_library(
    tmp_path_factory: pytest.TempPathFactory, edits: list[tuple[int, int, str]]
) -> None:
    """Headers one to three edits from a good one: refused, or read as the library reads them."""
    raw = bytearray(VALID[START:STOP])
    for at, cut, insert in edits:
        raw[at - START : at - START + cut] = insert.encode("latin-1")
    mutated = framed(bytes(raw), VALID[STOP:])
    path = tmp_path_factory.mktemp("mutated") / "x"
    path.write_bytes(mutated)
    try:
        header = read_header(path)
    except CorruptFileError:
        return
    seen = {(spec.name, spec.dtype, spec.shape) for spec in header.tensors.values()}
    assert seen == {
        (name, view["dtype"], tuple(view["shape"])) for name, view in deserialize(mutated)
    }


def test_metadata_may_be_null(tmp_path: Path) -> None:
    """MLX writes it so where there is none, and the library reads it."""
    path = tmp_path / "x"
    path.write_bytes(file_of(1, __metadata__=None, w=("U8", (1,), (0, 1))))
    header = read_header(path)
    assert [(name, view["shape"]) for name, view in deserialize(path.read_bytes())] == [("w", [1])]
    assert list(header.tensors) == ["w"]
    assert not header.metadata


KINDER = {
    "leading space",
    "repeated name",
    "repeated metadata key",
    "unknown field",
}
"""What the library lets pass. A row that moves in or out of here is news."""


def test_where_the_library_is_kinder() -> None:
    def passes(raw: bytes) -> bool:
        try:
            deserialize(raw)
        except SafetensorError:
            return False
        return True

    assert {name for name, raw, _ in HOSTILE if passes(raw)} == KINDER
