"""Shard indexes: names that stay in their folder, and shards that hold what is promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import save_torch_state_dict

from loratools.errors import CorruptFileError, MissingFileError
from loratools.tensorfiles.header import read_header
from loratools.tensorfiles.sharded import ShardIndex, check_index, encode_index, read_index


def write_index(folder: Path, content: Any) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_an_index_of_hugging_face(tmp_path: Path) -> None:
    weights = {f"layer.{i}.weight": torch.zeros(10, 10) for i in range(5)}
    save_torch_state_dict(weights, tmp_path, max_shard_size=900)
    path = tmp_path / "model.safetensors.index.json"
    index = read_index(path)
    assert index.weight_map.keys() == weights.keys()
    assert index.metadata["total_size"] == 2000
    files = set(index.weight_map.values())
    check_index(index, {file: read_header(tmp_path / file).tensors for file in files})
    written = encode_index(index.weight_map, 2000, index.metadata)
    assert json.loads(written) == json.loads(path.read_text())


def test_encoded_text() -> None:
    text = encode_index({"b": "2", "a": "1"}, 7, {"total_size": 3, "note": "n"})
    expected = """{
  "metadata": {
    "note": "n",
    "total_size": 7
  },
  "weight_map": {
    "a": "1",
    "b": "2"
  }
}
"""
    assert text == expected


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "sub/x.safetensors",
        "/etc/passwd",
        "..\\x.safetensors",
        "C:x.safetensors",
        "x.safetensors:stream",
        "..",
        ".",
        "",
        "x\0.safetensors",
        5,
        None,
        ["x"],
    ],
)
def test_shards_elsewhere_are_refused(tmp_path: Path, shard: object) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.safetensors").touch()
    path = write_index(tmp_path / "folder", {"weight_map": {"some.weight": shard}})
    with pytest.raises(CorruptFileError, match=r"'some\.weight': shard .* is not"):
        read_index(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "not a JSON object"),
        ("{", "not usable JSON"),
        ("{}", "weight_map"),
        ({"weight_map": ["a"]}, "weight_map"),
        ({"weight_map": {}, "metadata": 1}, "metadata"),
        ('{"weight_map": {"a": "x", "a": "y"}}', "'a' appears twice"),
    ],
)
def test_malformed_indexes(tmp_path: Path, content: object, words: str) -> None:
    with pytest.raises(CorruptFileError, match=words):
        read_index(write_index(tmp_path, content))


def test_missing_shards_are_named_together(tmp_path: Path) -> None:
    (tmp_path / "there").touch()
    (tmp_path / "a folder").mkdir()
    weight_map = {"a": "there", "b": "gone-1", "c": "gone-2", "d": "gone-1", "e": "a folder"}
    with pytest.raises(MissingFileError, match=r"3 of 4 shards .*: a folder, gone-1, gone-2"):
        read_index(write_index(tmp_path, {"weight_map": weight_map}))


def test_a_shard_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").touch()
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "x").symlink_to("../blobs/abc")
    assert read_index(write_index(tmp_path / "snapshot", {"weight_map": {"a": "x"}})).metadata == {}


def test_no_index(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        read_index(tmp_path / "absent.index.json")


INDEX = ShardIndex({"a": "one", "b": "one", "c": "two"}, {})


@pytest.mark.parametrize(
    ("headers", "words"),
    [
        ({"one": ["a"], "two": ["c"]}, ["'b' is not in one"]),
        ({"one": ["a", "b"]}, ["'c' is not in two"]),
        ({"one": ["a", "b"], "two": ["c", "d"]}, ["'d' in two is not in the index"]),
        ({"one": ["a", "b"], "two": ["c", "a"]}, ["'a' is in one and in two"]),
        (
            {"one": ["a", "d"], "two": ["b", "c"]},
            ["'b' is not in one", "'d' in one is not in the index"],
        ),
        ({"one": ["a", "b", *map(str, range(9))], "two": ["c"]}, ["and 4 more"]),
    ],
)
def test_disagreements(headers: dict[str, list[str]], words: list[str]) -> None:
    with pytest.raises(CorruptFileError) as refusal:
        check_index(INDEX, headers)
    assert [word for word in words if word not in refusal.value.message] == []


def test_agreement() -> None:
    check_index(INDEX, {"two": ["c"], "one": {"b": 1, "a": 2}})
