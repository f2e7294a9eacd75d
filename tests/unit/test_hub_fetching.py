"""What is fetched from a Hub on the loopback interface, through the unmodified client."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loratools import load_adapter, merge_into_base, summarize
from loratools.convert import convert_adapter
from loratools.demo import make_adapter, make_base
from loratools.errors import CorruptFileError, HubError, LoratoolsError
from loratools.hub import client
from loratools.pull import pull_from_hub
from loratools.verify import compare_adapters
from tests.hub_server import HubServer
from tests.hub_store import Repo
from tests.image_adapters import write_kohya_sdxl


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    make_base(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    make_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def shard(base: Path) -> dict[str, bytes]:
    """Return a model in two shards, with an older copy of its weights beside them."""
    from safetensors.torch import load_file, save

    tensors = load_file(base / "model.safetensors")
    names = sorted(tensors)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    files = {f"model-0000{i + 1}-of-00002.safetensors": half for i, half in enumerate(halves)}
    index = {
        "metadata": {},
        "weight_map": {name: file for file, half in files.items() for name in half},
    }
    return {
        "config.json": (base / "config.json").read_bytes(),
        "tokenizer.json": b"{}",
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{file: save({n: tensors[n] for n in half}) for file, half in files.items()},
        "pytorch_model.bin": b"an older copy" * 1000,
        "onnx/model.onnx": b"another" * 1000,
    }


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def test_a_merge_from_the_hub_has_the_bytes_of_the_local_merge(
    hub: HubServer, base: Path, adapter: Path, tmp_path: Path
) -> None:
    model = shard(base)
    hub.add("me/base", model)
    hub.add("me/adapter", {**contents(adapter), "optimizer.pt": b"x" * 999, "README.md": b"#"})
    local = write(tmp_path / "sharded", model)
    merge_into_base(local, [(str(adapter), 0.8)], tmp_path / "here")
    report = merge_into_base("hf://me/base", [("hf://me/adapter", 0.8)], tmp_path / "there")
    assert contents(tmp_path / "there") == contents(tmp_path / "here")
    assert "model-00001-of-00002.safetensors" in contents(tmp_path / "there")
    assert report.inputs == ("hf://me/base", "hf://me/adapter")
    assert report.facts["adapters"][0]["path"] == "hf://me/adapter"
    fetched = {one.path.partition("/resolve/")[2][41:] for one in hub.asked("GET", "/resolve/")}
    needed = {"config.json", "tokenizer.json", "model.safetensors.index.json"}
    assert fetched == {*needed, "adapter_config.json"}
    assert len(hub.asked("GET", "/cdn/")) == 3
    assert hub.leaks == []


def test_the_cache_is_used_again_and_offline(
    hub: HubServer, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    hub.add("me/base", contents(base))
    hub.add("me/adapter", contents(adapter))
    merge_into_base("hf://me/base", "hf://me/adapter", tmp_path / "first")
    count = len(hub.asked("GET", "/cdn/"))
    merge_into_base("hf://me/base", "hf://me/adapter", tmp_path / "second")
    assert len(hub.asked("GET", "/cdn/")) == count
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(hub.seen)
    merge_into_base("hf://me/base", "hf://me/adapter", tmp_path / "third")
    assert len(hub.seen) == before
    assert contents(tmp_path / "first") == contents(tmp_path / "third")
    with pytest.raises(HubError, match="not in the cache") as caught:
        load_adapter("hf://me/other")
    assert "HF_HUB_OFFLINE" in str(caught.value.hint)


def test_a_revision_and_a_folder_are_those_that_are_named(
    hub: HubServer, adapter: Path, tmp_path: Path
) -> None:
    make_adapter(tmp_path / "new", seed=3)
    repo = hub.add("me/adapter", contents(adapter))
    nested = {f"v2/{name}": data for name, data in contents(tmp_path / "new").items()}
    repo.commit("next/try", {**repo.files(), **nested}, "second")
    assert compare_adapters("hf://me/adapter", str(adapter)).facts["same"]
    named = "hf://me/adapter@next%2Ftry/v2"
    assert compare_adapters(named, str(tmp_path / "new")).facts["same"]
    assert not compare_adapters(named, str(adapter)).facts["same"]


def test_a_broken_download_is_taken_up_where_it_broke(hub: HubServer, tmp_path: Path) -> None:
    """The client hands on chunks of 10 MiB; what it has of the next one comes again."""
    chunk = 10 * 2**20
    save_file({"w": torch.arange(6 * 2**20, dtype=torch.int32)}, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    hub.add("me/base", {"model.safetensors": data})
    hub.drop("/cdn/", after=chunk + 999, times=2)
    pull_from_hub("me/base", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == data
    ranges = [one.range for one in hub.asked("GET", "/cdn/")]
    assert ranges == [None, f"bytes={chunk}-", f"bytes={2 * chunk}-"]


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("part", ["/api/models/me/adapter", "/tree/", "/resolve/", "/cdn/"])
def test_a_busy_hub_is_asked_again(hub: HubServer, adapter: Path, status: int, part: str) -> None:
    hub.add("me/adapter", contents(adapter))
    for method in ("GET", "HEAD"):
        hub.fail(method, part, status, times=2, Retry_After="0")
    assert len(load_adapter("hf://me/adapter").layers) == 9


def test_a_wait_is_what_the_hub_asks_for_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    class BusyError(Exception):
        def __init__(self, status: int, after: str) -> None:
            self.response = type(
                "R", (), {"status_code": status, "headers": {"Retry-After": after}}
            )

    waits: list[float] = []
    monkeypatch.setattr(client.time, "sleep", waits.append)
    answers = [BusyError(429, "7"), BusyError(503, "9999"), BusyError(500, ""), None]

    def ask() -> int:
        if error := answers.pop(0):
            raise error
        return 1

    assert client.persistently(ask) == 1
    assert waits == [7, 60, 4]
    answers = [BusyError(404, ""), None]
    with pytest.raises(BusyError):
        client.persistently(ask)


def test_inspecting_a_base_reads_its_headers_alone(hub: HubServer, base: Path) -> None:
    model = shard(base)
    hub.add("me/base", model)
    found = summarize("hf://me/base")
    assert found.facts == summarize(write(base.parent / "sharded", model)).facts
    assert found.inputs == ("hf://me/base",)
    asked = hub.asked("GET", "/cdn/")
    assert len(asked) == 2
    # The files of this model are smaller than the first request of a header.
    assert all(one.range and one.range.startswith("bytes=0-") for one in asked)


def test_a_header_of_a_large_file_is_a_small_part_of_it(hub: HubServer, tmp_path: Path) -> None:
    big = {f"model.layers.{i}.mlp.up_proj.weight": torch.zeros(512, 1024) for i in range(4)}
    save_file(big, tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    hub.add("me/big", {"model.safetensors": data, "config.json": b'{"model_type": "llama"}'})
    assert summarize("hf://me/big").facts["parameters"] == 4 * 512 * 1024
    (asked,) = hub.asked("GET", "/cdn/")
    assert asked.range == f"bytes=0-{256 * 1024 - 1}"
    assert len(data) > 30 * 256 * 1024


def test_inspecting_an_adapter_reads_its_header_and_its_alphas(
    hub: HubServer, tmp_path: Path
) -> None:
    write_kohya_sdxl(tmp_path / "ink.safetensors")
    data = (tmp_path / "ink.safetensors").read_bytes()
    hub.add("me/ink", {"ink.safetensors": data, "README.md": b"#"})
    found, local = summarize("hf://me/ink"), summarize(tmp_path / "ink.safetensors")
    unread = {"delta_norm"}
    assert {key: value for key, value in found.facts.items() if key not in unread} == {
        key: value for key, value in local.facts.items() if key not in unread
    }
    assert found.facts["alphas"]
    assert found.facts["delta_norm"] is None
    assert "only the header" in found.notes[-1].message
    assert all(one.range for one in hub.asked("GET", "/cdn/"))
    assert summarize("hf://me/ink", spectrum=True).facts["delta_norm"] is not None


def test_a_base_that_is_only_a_vocabulary_is_not_fetched(
    hub: HubServer, base: Path, adapter: Path, tmp_path: Path
) -> None:
    hub.add("me/base", contents(base))
    out = tmp_path / "out"
    convert_adapter(str(adapter), out, to="peft", base="hf://me/base")
    assert compare_adapters(str(adapter), str(out)).facts["same"]
    assert all(one.range for one in hub.asked("GET", "/cdn/"))


def test_an_error_names_the_reference_and_not_the_cache(
    hub: HubServer, base: Path, adapter: Path, tmp_path: Path
) -> None:
    hub.add("me/base", contents(base))
    hub.add("me/adapter", contents(adapter))
    with pytest.raises(LoratoolsError) as caught:
        merge_into_base(
            "hf://me/adapter/adapter_model.safetensors", "hf://me/adapter", tmp_path / "o"
        )
    assert "hf://me/adapter/adapter_model.safetensors: an adapter" in caught.value.message
    assert "cache" not in caught.value.message
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("name", ["../up.safetensors", "a/../../b.json", "/etc/x", "c:\\x", "a//b"])
def test_names_that_lead_elsewhere_are_refused(hub: HubServer, tmp_path: Path, name: str) -> None:
    hub.add("me/evil", {"model.safetensors": b"x", "config.json": b"{}", name: b"evil"})
    for reach in (summarize, load_adapter, lambda text: pull_from_hub(text, tmp_path / "out")):
        with pytest.raises(HubError, match="unsafe name"):
            reach("hf://me/evil")
    assert not list(tmp_path.rglob("*evil*"))


def test_an_index_of_shards_that_are_not_there(hub: HubServer, base: Path) -> None:
    model = shard(base)
    del model["model-00002-of-00002.safetensors"]
    hub.add("me/base", model)
    with pytest.raises(CorruptFileError, match="model-00002") as caught:
        summarize("hf://me/base")
    assert "not complete" in str(caught.value.hint)


def _gate(repo: Repo) -> None:
    repo.gated = True


def _hide(repo: Repo) -> None:
    repo.private = True


@pytest.mark.parametrize(
    ("change", "token", "reference", "message", "hint"),
    [
        (_gate, "hf_reader", "hf://me/x", "gated", "/me/x"),
        (_gate, None, "hf://me/x", "gated", "hf auth login"),
        (_hide, None, "hf://me/x", "no such repository", "hf auth login"),
        (_hide, "hf_reader", "hf://me/x", "or a private one", "no access"),
        (None, "hf_reader", "hf://me/y", "no such repository", "check the name"),
        (None, "hf_expired1", "hf://me/x", "refused the access token", "again"),
        (None, "hf_reader", "hf://me/x@v9", "no such revision", "branch"),
        (None, "hf_reader", "hf://me/x/adaptr_config.json", "has no", "did you mean adapter_conf"),
    ],
)
def test_what_the_hub_refuses_says_what_to_do(
    hub: HubServer, adapter: Path, monkeypatch: pytest.MonkeyPatch,
    change: object, token: str | None, reference: str, message: str, hint: str,
) -> None:  # fmt: skip
    repo = hub.add("me/x", contents(adapter))
    if callable(change):
        change(repo)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    else:
        monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=message) as caught:
        load_adapter(reference)
    assert hint in str(caught.value.hint)
    assert reference in caught.value.message
    assert not token or token not in f"{caught.value.message} {caught.value.hint}"


def test_nobody_there(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="no answer from") as caught:
        load_adapter("hf://me/x")
    assert "HF_ENDPOINT" in str(caught.value.hint)


def test_a_hub_that_stays_broken(hub: HubServer, adapter: Path) -> None:
    hub.add("me/x", contents(adapter))
    hub.fail("GET", "/tree/", 503, times=99)
    with pytest.raises(HubError, match="status 503") as caught:
        load_adapter("hf://me/x")
    assert "try again" in str(caught.value.hint)
