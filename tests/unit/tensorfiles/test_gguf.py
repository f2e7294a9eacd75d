"""GGUF files against the gguf package, both ways; and files that are not to be believed."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest

from loratools.errors import CorruptFileError, LoratoolsError, MissingFileError, UnsupportedError
from loratools.tensorfiles.gguf import read_gguf_header, read_row_blocks
from loratools.tensorfiles.gguf_reading import Value
from loratools.tensorfiles.gguf_split import open_gguf, split_name
from loratools.tensorfiles.gguf_tensors import map_tensors
from loratools.tensorfiles.gguf_types import ValueType, storage_types
from loratools.tensorfiles.gguf_words import metadata_from_words, words_from_metadata
from loratools.tensorfiles.gguf_writing import Entry, encode_gguf_header, save_gguf

RNG = np.random.default_rng(1)
SCALARS = {
    "uint8": 200, "int8": -3, "uint16": 60000, "int16": -300, "uint32": 4_000_000_000,
    "int32": -7, "uint64": 2**63 + 1, "int64": -(2**62), "float32": 1.5, "float64": 0.1,
    "bool": True, "string": "γράμμα",
}  # fmt: skip
ARRAYS = {"words": ["a", "", "βγ"], "numbers": [1, 2, 3], "halves": [0.5, -1.25]}


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(path: Path, *, alignment: int | None = None, split: tuple[int, int, int] | None = None,
         names: tuple[str, ...] = ("a.weight", "b.weight", "c.weight")) -> Path:  # fmt: skip
    """Write a file with the gguf package: every scalar type, arrays, three kinds of tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for kind, value in SCALARS.items():
        getattr(writer, f"add_{kind}")(f"x.{kind}", value)
    for name, values in ARRAYS.items():
        writer.add_array(f"x.{name}", values)
    if split:
        writer.add_uint16("split.no", split[0])
        writer.add_uint16("split.count", split[1])
        writer.add_int32("split.tensors.count", split[2])
    wide = RNG.standard_normal((3, 64)).astype(np.float32)
    quant = gguf.quants.quantize(wide, gguf.GGMLQuantizationType.Q8_0)
    data = (wide[:, :5].copy(), quant, RNG.standard_normal((2, 3, 4)).astype(np.float16))
    kinds = (None, gguf.GGMLQuantizationType.Q8_0, None)
    for name, values, kind in zip(names, data, kinds, strict=False):
        writer.add_tensor(name, values, raw_dtype=kind)
    finish(writer)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return make(tmp_path_factory.mktemp("gguf") / "small.gguf").read_bytes()


# ── reading and writing ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("alignment", [None, 64, 8])
def test_reads_what_the_package_writes(tmp_path: Path, alignment: int | None) -> None:
    path = make(tmp_path / "a.gguf", alignment=alignment)
    header = read_gguf_header(path)
    for kind, value in SCALARS.items():
        assert header.word(f"x.{kind}") == value, kind
    for name, values in ARRAYS.items():
        assert header.word(f"x.{name}") == values
    assert header.alignment == (alignment or 32)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    mapped = map_tensors(header)
    assert list(mapped) == [*theirs]
    for name, tensor in theirs.items():
        ours = header.tensors[name]
        assert (ours.type.name, ours.nbytes) == (tensor.tensor_type.name, tensor.n_bytes)
        assert ours.shape == tuple(reversed(tensor.shape.tolist()))
        assert ours.start == tensor.data_offset
        assert np.array_equal(mapped[name].numpy(), tensor.data)


def test_types_are_those_of_the_package() -> None:
    for kind, (elements, size) in gguf.GGML_QUANT_SIZES.items():
        ours = storage_types()[int(kind)]
        assert (ours.name, ours.elements, ours.size) == (kind.name, elements, size)


def test_header_is_rewritten_byte_for_byte(tmp_path: Path) -> None:
    """Every value type, arrays that stay in the file, padding: what is written is what was read."""
    header = read_gguf_header(make(tmp_path / "a.gguf", alignment=64))
    entries = [Entry(t.name, t.type.name, t.shape) for t in header.tensors.values()]
    assert encode_gguf_header(header.metadata, entries) == header.raw()


def test_package_reads_what_is_written(tmp_path: Path) -> None:
    source = read_gguf_header(make(tmp_path / "a.gguf"))
    words = words_from_metadata(source.metadata)
    metadata = metadata_from_words(words)
    metadata["general.alignment"] = Value(ValueType.UINT32, 128)
    data = {name: b"".join(raw for _, raw in read_row_blocks(t, 2))
            for name, t in source.tensors.items()}  # fmt: skip
    tensors = [
        (Entry(t.name, t.type.name, t.shape), memoryview(data[name]))
        for name, t in source.tensors.items()
    ]
    save_gguf(tmp_path / "b.gguf", metadata, tensors)
    reader = gguf.GGUFReader(tmp_path / "b.gguf")
    for kind, value in SCALARS.items():
        field = reader.get_field(f"x.{kind}")
        assert field.contents() == value
        assert field.types[0].name == kind.upper()
    for tensor in reader.tensors:
        assert tensor.data_offset % 128 == 0
        assert tensor.data.tobytes() == data[tensor.name]


def test_row_blocks_are_the_tensor(tmp_path: Path) -> None:
    header = read_gguf_header(make(tmp_path / "a.gguf"))
    whole = header.path.read_bytes()
    for tensor in header.tensors.values():
        for rows in (1, 2, 100):
            blocks = list(read_row_blocks(tensor, rows))
            assert b"".join(raw for _, raw in blocks) == whole[tensor.start : tensor.stop]
            assert [first for first, _ in blocks] == list(range(0, tensor.rows, rows))


def test_version_2_is_read(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "v2.gguf"
    path.write_bytes(small[:4] + struct.pack("<I", 2) + small[8:])
    assert read_gguf_header(path).version == 2


def test_a_vocabulary_stays_in_the_file(tmp_path: Path) -> None:
    """150 000 strings cost no memory until they are asked for."""
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_array("tokenizer.ggml.tokens", [f"token {n}" for n in range(150_000)])
    writer.add_tensor("a.weight", np.zeros((1, 4), np.float32))
    finish(writer)
    tracemalloc.start()
    header = read_gguf_header(tmp_path / "a.gguf")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200_000
    tokens = header.word("tokenizer.ggml.tokens")
    assert isinstance(tokens, list)
    assert (len(tokens), tokens[149_999]) == (150_000, "token 149999")


# ── split files ──────────────────────────────────────────────────────────────────────────────


def make_split(folder: Path, said: int = 4) -> list[Path]:
    names = (("a.weight",), ("b.weight", "c.weight"), ("d.weight",))
    return [
        make(folder / split_name("m", number, 3), split=(number, 3, said), names=part)
        for number, part in enumerate(names)
    ]


def test_any_part_opens_the_model(tmp_path: Path) -> None:
    parts = make_split(tmp_path)
    assert parts[1].name == "m-00002-of-00003.gguf"
    for part in parts:
        model = open_gguf(part)
        assert list(model.tensors) == ["a.weight", "b.weight", "c.weight", "d.weight"]
        assert [t.file.name for t in model.tensors.values()] == [
            parts[0].name, parts[1].name, parts[1].name, parts[2].name
        ]  # fmt: skip


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts = make_split(tmp_path)
    parts[2].unlink()
    with pytest.raises(MissingFileError, match="m-00003-of-00003"):
        open_gguf(parts[0])


def test_parts_that_disagree_are_refused(tmp_path: Path) -> None:
    parts = make_split(tmp_path, said=5)
    with pytest.raises(CorruptFileError, match="5 tensors are said, 4"):
        open_gguf(parts[0])
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CorruptFileError, match="says it is part 2"):
        open_gguf(parts[0])
    alone = tmp_path / "other.gguf"
    parts[0].rename(alone)
    with pytest.raises(CorruptFileError, match="one of 3 parts"):
        open_gguf(alone)


# ── hostile files ────────────────────────────────────────────────────────────────────────────


def test_every_prefix_is_refused(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    header = _header_of(small, tmp_path)
    last = max(tensor.stop for tensor in header.tensors.values())
    for length in range(last):
        path.write_bytes(small[:length])
        with pytest.raises((CorruptFileError, UnsupportedError)):
            read_gguf_header(path)
    path.write_bytes(small[:last])
    read_gguf_header(path)  # the padding after the last tensor is no one's data


def test_flipped_bytes_never_crash(small: bytes, tmp_path: Path) -> None:
    """Whatever byte is wrong, the file is read within its bounds or refused by name."""
    path, chance = tmp_path / "flipped.gguf", random.Random(7)
    end = _header_of(small, tmp_path).data_start
    for place in range(end):
        raw = bytearray(small)
        raw[place] ^= 1 << chance.randrange(8)
        if chance.random() < 0.3:
            raw[chance.randrange(end)] = chance.choice((0, 1, 127, 255))
        path.write_bytes(raw)
        try:
            header = read_gguf_header(path)
        except LoratoolsError as error:
            assert "flipped.gguf" in error.message  # noqa: PT017 - one of two outcomes
            continue
        for value in header.metadata.values():
            value.plain()
        assert all(tensor.stop <= len(raw) for tensor in header.tensors.values())


def _header_of(raw: bytes, folder: Path) -> object:
    (folder / "whole.gguf").write_bytes(raw)
    return read_gguf_header(folder / "whole.gguf")


def text(word: str) -> bytes:
    return struct.pack("<Q", len(word.encode())) + word.encode()


def entry(name: str, extents: tuple[int, ...], kind: int, offset: int) -> bytes:
    shape = struct.pack(f"<I{len(extents)}Q", len(extents), *extents)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def key(name: str, kind: int, raw: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + raw


def file(keys: list[bytes], tensors: list[bytes], *, said: tuple[int, int] | None = None) -> bytes:
    """Return a whole file; ``said``: the counts in its head, of tensors and of keys."""
    numbers = said or (len(tensors), len(keys))
    head = b"GGUF" + struct.pack("<IQQ", 3, *numbers) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(4096)


HUGE = 2**60
F32 = entry("a", (4, 2), 0, 0)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "tensor count": (file([], [F32], said=(HUGE, 0)), "tensors are more than"),
    "key count": (file([], [F32], said=(1, HUGE)), "number of metadata keys"),
    "key length": (file([struct.pack("<Q", HUGE) + bytes(64)], [F32]), "truncated"),
    "string length": (file([key("k", 8, struct.pack("<Q", HUGE))], [F32]), "truncated"),
    "array length": (file([key("k", 9, struct.pack("<IQ", 4, HUGE))], [F32]), "more than"),
    "strings' length": (file([key("k", 9, struct.pack("<IQQ", 8, 1, HUGE))], [F32]), "truncated"),
    "many strings": (file([key("k", 9, struct.pack("<IQ", 8, HUGE))], [F32]), "more than"),
    "nested array": (file([key("k", 9, struct.pack("<IQ", 9, 1))], [F32]), "array of arrays"),
    "value type": (file([key("k", 99, bytes(8))], [F32]), "unknown type 99"),
    "truth value": (file([key("k", 7, b"\x05")], [F32]), "not a truth value"),
    "not text": (file([struct.pack("<Q", 2) + b"\xff\xfe" + bytes(12)], [F32]), "not UTF-8"),
    "key twice": (file([key("k", 7, b"\x01")] * 2, [F32]), "appears twice"),
    "tensor twice": (file([], [F32, entry("a", (4, 2), 0, 32)]), "appears twice"),
    "dimensions": (file([], [entry("a", (1,) * 5, 0, 0)]), "5 dimensions"),
    "no dimension": (file([], [entry("a", (), 0, 0) + bytes(16)]), "0 dimensions"),
    "overflow": (file([], [entry("a", (2**40, 2**40), 0, 0)]), "overflows"),
    "hidden overflow": (file([], [entry("a", (2**62, 0, 4), 0, 0)]), "overflows"),
    "too large": (file([], [entry("a", (2**30, 4), 0, 0)]), "truncated"),
    "unaligned": (file([], [entry("a", (4, 2), 0, 8)]), "said to be at 8"),
    "out of order": (file([], [entry("a", (4, 2), 0, 64), entry("b", (4, 2), 0, 0)]), "to be at"),
    "overlap": (file([], [F32, entry("b", (4, 2), 0, 0)]), "said to be at 0"),
    "old type": (file([], [entry("a", (32, 1), 4, 0)]), "type 4"),
    "broken block": (file([], [entry("a", (33, 1), 8, 0)]), "no whole blocks of Q8_0"),
    "alignment 0": (file([key("general.alignment", 4, bytes(4))], [F32]), "power of two"),
    "alignment 48": (file([key("general.alignment", 4, b"\x30\0\0\0")], [F32]), "power of two"),
    "alignment text": (file([key("general.alignment", 8, text("32"))], [F32]), "power of two"),
    "huge alignment": (file([key("general.alignment", 4, b"\0\0\0\x80")], [F32]), "truncated"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(64), "big-endian"),
    "version 1": (b"GGUF" + struct.pack("<I", 1) + bytes(64), "version 1"),
    "another file": (b"PK\x03\x04" + bytes(64), "not a GGUF file"),
    "empty": (b"", "empty"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_headers_are_named_errors(case: str, tmp_path: Path) -> None:
    """Refused by what is wrong, before anything of a claimed size is made."""
    raw, words = HOSTILE[case]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises((CorruptFileError, UnsupportedError), match=words):
        read_gguf_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = make(tmp_path / "a.gguf")
    header = read_gguf_header(path)
    path.write_bytes(path.read_bytes()[:100])
    checks: Iterator[Callable[[], object]] = iter(
        (
            lambda: header.word("x.words"),
            lambda: list(read_row_blocks(header.tensors["c.weight"], 1)),
        )
    )
    for check in checks:
        with pytest.raises(CorruptFileError, match="changed while"):
            check()
