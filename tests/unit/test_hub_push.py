"""Publishing on a Hub on the loopback interface: files, cards, licences, refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from loratools.convert import convert_adapter
from loratools.demo import make_adapter, make_base
from loratools.errors import HubError, InputError, OptionError, OutputError, UploadError
from loratools.merge import merge_into_base
from loratools.pull import pull_from_hub
from loratools.push import push_to_hub
from loratools.summary import summarize
from loratools.tensorfiles.gguf_reading import Value
from loratools.tensorfiles.gguf_types import ValueType
from loratools.verify import compare_adapters
from tests.gguf_models import write_adapter, write_model
from tests.hub_server import HubServer
from tests.image_adapters import write_kohya_sdxl

LLAMA = "meta/llama"
SDXL = "stability/sdxl"


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def bases(hub: HubServer) -> HubServer:
    """The Hub with two base models whose cards state licences."""
    llama = "license: llama3.1\npipeline_tag: text-generation"
    sdxl = "license: openrail++\npipeline_tag: text-to-image"
    for repo, data in ((LLAMA, llama), (SDXL, sdxl), ("free/model", "license: apache-2.0")):
        hub.add(repo, {"README.md": f"---\n{data}\n---\n# Base\n".encode()})
    return hub


def peft(folder: Path) -> Path:
    make_adapter(folder / "adapter")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": LLAMA, "task_type": "CAUSAL_LM"}
    (folder / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter" / "optimizer.pt").write_bytes(b"state")
    (folder / "adapter" / "tokenizer.json").write_text("{}")
    return folder / "adapter"


def kohya(folder: Path) -> Path:
    write_kohya_sdxl(folder / "ink.safetensors")
    return folder / "ink.safetensors"


def diffusers(folder: Path) -> Path:
    convert_adapter(kohya(folder), folder / "ink-diffusers.safetensors", to="diffusers")
    return folder / "ink-diffusers.safetensors"


def gguf(folder: Path) -> Path:
    make_base(folder / "base")
    make_adapter(folder / "plain")
    convert_adapter(folder / "plain", folder / "a.gguf", to="gguf", base=folder / "base")
    return folder / "a.gguf"


def mlx(folder: Path) -> Path:
    convert_adapter(peft(folder), folder / "mlx", to="mlx")
    return folder / "mlx"


ROUND_TRIPS = [
    (peft, LLAMA, {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"}, "peft"),
    (kohya, SDXL, {"ink.safetensors"}, "diffusers"),
    (diffusers, SDXL, {"pytorch_lora_weights.safetensors"}, "diffusers"),
    (gguf, LLAMA, {"a.gguf"}, "gguf"),
    (mlx, LLAMA, {"adapters.safetensors", "adapter_config.json"}, "mlx"),
]
SNIPPETS = {
    peft: 'PeftModel.from_pretrained(base, "me/lora")',
    kohya: 'load_lora_weights("me/lora", weight_name="ink.safetensors")',
    diffusers: 'weight_name="pytorch_lora_weights.safetensors"',
    gguf: "llama-cli -m base.gguf --lora a.gguf",
    mlx: f"mlx_lm.generate --model {LLAMA} --adapter-path adapter",
}


@pytest.mark.parametrize(("make", "base", "files", "library"), ROUND_TRIPS)
def test_what_is_pushed_comes_back(
    bases: HubServer, tmp_path: Path,
    make: Callable[[Path], Path], base: str, files: set[str], library: str,
) -> None:  # fmt: skip
    path = make(tmp_path)
    report = push_to_hub(path, "me/lora", base_model=[base], private=True, message="First")
    repo = bases.repos["me/lora"]
    assert repo.private
    assert repo.messages[-1] == "First"
    assert set(repo.files()) == {*files, "README.md", ".gitattributes"}
    assert report.facts["commit"] == repo.branches["main"]
    pull_from_hub("me/lora", tmp_path / "back")
    assert {p.name for p in (tmp_path / "back").iterdir()} == {*files, "README.md"}
    assert compare_adapters(path, tmp_path / "back").facts["same"]
    assert compare_adapters(path, "hf://me/lora").facts["same"]
    card = ModelCard((tmp_path / "back" / "README.md").read_text())
    card.validate()
    data = card.data
    assert (data.base_model, data.base_model_relation) == (base, "adapter")
    assert data.library_name == library
    assert data.license == {LLAMA: "llama3.1", SDXL: "openrail++"}[base]
    assert data.pipeline_tag == {LLAMA: "text-generation", SDXL: "text-to-image"}[base]
    assert {"lora", "loratools"} <= set(data.tags)
    assert SNIPPETS[make] in card.text
    assert bases.leaks == []


def test_large_files_go_up_in_parts_and_through_a_busy_hub(
    bases: HubServer, tmp_path: Path
) -> None:
    bases.part_bytes = 10_000
    for method, part in (
        ("GET", "/api/models/me/lora"), ("POST", "/preupload/"), ("POST", "/objects/batch"),
        ("PUT", "/lfs/"), ("POST", "/api/repos/create"), ("GET", "whoami"), ("POST", "validate"),
    ):  # fmt: skip
        bases.fail(method, part, 503 if method == "PUT" else 429, Retry_After="0")
    push_to_hub(peft(tmp_path), "me/lora")
    weights = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert bases.repos["me/lora"].files()["adapter_model.safetensors"] == weights
    assert len(weights) > 20_000
    assert len(bases.asked("PUT", "/lfs/")) > 3


def test_a_branch_is_made_and_a_change_proposed(bases: HubServer, tmp_path: Path) -> None:
    path = peft(tmp_path)
    push_to_hub(path, "me/lora", revision="v2")
    repo = bases.repos["me/lora"]
    assert "adapter_model.safetensors" in repo.files("v2")
    assert "adapter_model.safetensors" not in repo.files("main")
    report = push_to_hub(path, LLAMA, create_pr=True, base_model=["free/model"])
    assert report.facts["pull_request"].endswith("/discussions/1")
    assert "adapter_model.safetensors" in bases.repos[LLAMA].files("refs/pr/1")
    assert "adapter_model.safetensors" not in bases.repos[LLAMA].files("main")


TEXT = "# My own words\r\n\r\nKept as they are, with an odd   space and a trailing one. \n"


def test_a_card_keeps_its_text_and_gets_what_it_lacks(bases: HubServer, tmp_path: Path) -> None:
    head = "language: de\ntags:\n- mine\npipeline_tag: text-classification\nextra: 5"
    bases.add("me/lora", {"README.md": f"---\n{head}\n---\n{TEXT}".encode()})
    push_to_hub(peft(tmp_path), "me/lora")
    found = bases.repos["me/lora"].files()["README.md"].decode()
    assert found.endswith(TEXT)
    data = ModelCard(found).data
    assert (data.language, data.extra, data.pipeline_tag) == ("de", 5, "text-classification")
    assert data.tags == ["mine", "lora", "loratools"]
    assert (data.base_model, data.license) == (LLAMA, "llama3.1")
    push_to_hub(tmp_path / "adapter", "me/lora", base_model=["free/model"], license="mit")
    data = ModelCard(bases.repos["me/lora"].files()["README.md"].decode()).data
    assert (data.base_model, data.license, data.language) == ("free/model", "mit", "de")


def test_a_card_without_metadata_and_one_beside_the_files(bases: HubServer, tmp_path: Path) -> None:
    path = peft(tmp_path)
    (path / "README.md").write_text(TEXT, newline="")
    push_to_hub(path, "me/lora")
    found = bases.repos["me/lora"].files()["README.md"].decode()
    assert found.endswith(TEXT)
    assert ModelCard(found).data.base_model == LLAMA
    (tmp_path / "other.md").write_text("---\nlanguage: fr\n---\nAnother\n")
    push_to_hub(path, "me/lora", card=tmp_path / "other.md")
    assert bases.repos["me/lora"].files()["README.md"].decode().endswith("---\nAnother\n")


def untouched(hub: HubServer) -> bool:
    writing = ("/api/repos/create", "/preupload/", "/commit/", "/branch/", "/objects/batch")
    return not any(part in one.path for one in hub.seen for part in writing)


def test_a_missing_base_is_said_before_anything_is_uploaded(
    bases: HubServer, tmp_path: Path
) -> None:
    with pytest.raises(UploadError, match="base model is not known") as caught:
        push_to_hub(kohya(tmp_path), "me/lora")
    assert "--base-model" in str(caught.value.hint)
    path = peft(tmp_path)
    config = json.loads((path / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "/data/secret/llama"
    (path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UploadError, match="no name on the Hub"):
        push_to_hub(path, "me/lora")
    with pytest.raises(UploadError, match="licence cannot be taken over"):
        push_to_hub(path, "me/lora", base_model=["meta/lama"])
    with pytest.raises(OptionError, match="not a name"):
        push_to_hub(path, "me/lora", base_model=["./llama"])
    assert untouched(bases)
    push_to_hub(path, "me/lora", base_model=[LLAMA])
    pushed = json.loads(bases.repos["me/lora"].files()["adapter_config.json"])
    assert pushed == {**config, "base_model_name_or_path": LLAMA}


@pytest.mark.parametrize(
    ("bases_given", "stated", "fine"),
    [
        ([LLAMA], "apache-2.0", False),
        ([LLAMA], "llama3.1", True),
        (["free/model"], "mit", True),
        ([LLAMA, SDXL], None, False),
        ([LLAMA, "free/model"], None, True),
    ],
)
def test_a_conflict_of_licences_is_said_before_anything_is_uploaded(
    bases: HubServer, tmp_path: Path, bases_given: list[str], stated: str | None, fine: bool
) -> None:
    path = peft(tmp_path)
    if fine:
        push_to_hub(path, "me/lora", base_model=bases_given, license=stated)
        found = ModelCard(bases.repos["me/lora"].files()["README.md"].decode()).data.license
        assert found == (stated or "llama3.1")
        return
    with pytest.raises(UploadError, match="licence") as caught:
        push_to_hub(path, "me/lora", base_model=bases_given, license=stated)
    assert "--allow-conflict" in str(caught.value.hint)
    assert untouched(bases)
    push_to_hub(
        path, "me/lora", base_model=bases_given, license=stated or "mit", allow_conflict=True
    )
    found = ModelCard(bases.repos["me/lora"].files()["README.md"].decode()).data.license
    assert found == (stated or "mit")


def test_a_license_of_its_own_name_is_inherited_whole(bases: HubServer, tmp_path: Path) -> None:
    words = "license: other\nlicense_name: flux-dev\nlicense_link: https://x.y/z"
    bases.add("bfl/flux", {"README.md": f"---\n{words}\n---\n".encode()})
    push_to_hub(kohya(tmp_path), "me/lora", base_model=["bfl/flux"])
    data = ModelCard(bases.repos["me/lora"].files()["README.md"].decode()).data
    assert (data.license, data.license_name) == ("other", "flux-dev")
    assert data.license_link == "https://x.y/z"


def test_a_dry_run_checks_everything_and_uploads_nothing(bases: HubServer, tmp_path: Path) -> None:
    report = push_to_hub(peft(tmp_path), "me/lora", dry_run=True)
    assert report.dry_run
    assert untouched(bases)
    assert {item["file"] for item in report.items} >= {"adapter_model.safetensors", "README.md"}
    with pytest.raises(UploadError, match="refuses the card"):
        push_to_hub(tmp_path / "adapter", "me/lora", license="my-licence", dry_run=True,
                    base_model=["free/model"])  # fmt: skip


@pytest.mark.parametrize(
    ("token", "repo", "message", "hint"),
    [
        (None, "me/lora", "nobody is logged in", "hf auth login"),
        ("hf_expired1", "me/lora", "refused the access token", "hf auth login"),
        ("hf_reader", "me/lora", "does not allow", "write"),
        ("hf_writer", "other/lora", "does not allow", "write"),
    ],
)
def test_no_right_to_write(
    bases: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    token: str | None, repo: str, message: str, hint: str,
) -> None:  # fmt: skip
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(OutputError, match=message) as caught:
        push_to_hub(peft(tmp_path), repo)
    assert hint in str(caught.value.hint)
    assert "hf_expired1" not in caught.value.message
    assert repo not in bases.repos


def test_a_merged_model_says_what_was_merged(bases: HubServer, tmp_path: Path) -> None:
    make_base(tmp_path / "merged")
    report = push_to_hub(
        tmp_path / "merged", "me/model", base_model=[LLAMA], merged=[("hf://me/ink", 0.8)]
    )
    assert any("--relation" in note.message for note in report.notes)
    card = ModelCard(bases.repos["me/model"].files()["README.md"].decode())
    assert (card.data.base_model_relation, card.data.library_name) == ("merge", "transformers")
    assert "merge" in card.data.tags
    assert "| ink | 0.8 |" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("me/model")' in card.text
    assert set(bases.repos["me/model"].files()) >= {"model.safetensors", "config.json"}


def test_a_pickled_adapter_is_warned_of(bases: HubServer, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    path = peft(tmp_path)
    tensors = load_file(path / "adapter_model.safetensors")
    (path / "adapter_model.safetensors").unlink()
    torch.save(tensors, path / "adapter_model.bin")
    report = push_to_hub(path, "me/lora")
    assert "adapter_model.bin" in bases.repos["me/lora"].files()
    assert any("convert" in note.message for note in report.warnings)


def test_a_wrong_name_and_a_folder_without_a_model(bases: HubServer, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="not a name of a repository"):
        push_to_hub(peft(tmp_path), "lora")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError):
        push_to_hub(tmp_path / "empty", "me/lora")
    assert untouched(bases)


# ---------------------------------------------------------------------------- pull


def test_a_pull_that_broke_off_goes_on(
    bases: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {f"{i}.safetensors": bytes([i]) * 5000 for i in range(3)}
    bases.add("me/several", files)
    bases.fail("GET", "/2.safetensors", 403, times=9)
    bases.fail("HEAD", "/2.safetensors", 403, times=9)
    with pytest.raises(HubError):
        pull_from_hub("me/several", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    bases.faults.clear()
    count = len(bases.asked("GET", "/cdn/"))
    pull_from_hub("me/several", tmp_path / "out")
    assert len(bases.asked("GET", "/cdn/")) == count + 1
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == files
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_pull_of_a_file_or_folder_at_a_revision(bases: HubServer, tmp_path: Path) -> None:
    repo = bases.add("me/several", {"a/x.safetensors": b"one", "b/c/y.json": b"two"})
    repo.tags["v1"] = repo.branches["main"]
    repo.commit("main", {"a/x.safetensors": b"later"}, "second")
    pull_from_hub("hf://me/several@v1/a/x.safetensors", tmp_path / "x.safetensors")
    assert (tmp_path / "x.safetensors").read_bytes() == b"one"
    pull_from_hub("hf://me/several/b", tmp_path / "b", revision="v1")
    assert (tmp_path / "b" / "c" / "y.json").read_bytes() == b"two"
    with pytest.raises(OutputError, match="already exists"):
        pull_from_hub("me/several", tmp_path / "b")
    with pytest.raises(OptionError, match="revision"):
        pull_from_hub("hf://me/several@v1", tmp_path / "z", revision="main")
    before = len(bases.asked("GET", "/resolve/"))
    report = pull_from_hub("me/several", tmp_path / "z", dry_run=True)
    assert report.facts["bytes"] == 5
    assert len(bases.asked("GET", "/resolve/")) == before
    assert not (tmp_path / "z").exists()


# ---------------------------------------------------------------------------- GGUF models


def test_a_gguf_model_says_what_was_merged_into_it(bases: HubServer, tmp_path: Path) -> None:
    plain = write_model(tmp_path / "model.gguf", {"attn": "Q8_0"})
    ink = write_adapter(tmp_path / "ink")
    merge_into_base(plain, [(ink, 0.5)], tmp_path / "out.gguf")
    push_to_hub(tmp_path / "out.gguf", "me/model", base_model=[LLAMA])
    card = ModelCard(bases.repos["me/model"].files()["README.md"].decode())
    assert (card.data.base_model_relation, card.data.library_name) == ("merge", "gguf")
    assert "| ink | 0.5 |" in card.text
    assert "--hf-repo me/model --hf-file out.gguf" in card.text
    pull_from_hub("me/model", tmp_path / "back")
    assert (tmp_path / "back" / "out.gguf").read_bytes() == (tmp_path / "out.gguf").read_bytes()


def test_a_merge_of_gguf_from_the_hub_has_the_same_bytes_names_included(
    bases: HubServer, tmp_path: Path
) -> None:
    first = write_model(tmp_path / "model.gguf", {"attn": "Q4_0"}, parts=2)
    ink = write_adapter(tmp_path / "ink")
    bases.add("me/ink", {file.name: file.read_bytes() for file in ink.iterdir()})
    parts = {file.name: file.read_bytes() for file in tmp_path.glob("*.gguf")}
    bases.add("me/plain", {**parts, "other.gguf": b"GGUF"})
    named = f"hf://me/plain/{first.name}"
    merge_into_base(first, [(ink, 0.5)], tmp_path / "here")
    merge_into_base(named, [("hf://me/ink", 0.5)], tmp_path / "there")
    assert {f.name: f.read_bytes() for f in (tmp_path / "here").iterdir()} == {
        f.name: f.read_bytes() for f in (tmp_path / "there").iterdir()
    }
    report = push_to_hub(first, "me/again", base_model=[LLAMA], dry_run=True)
    assert report.facts["relation"] == "quantized"
    assert {item["file"] for item in report.items} == {*parts, "README.md"}


def test_inspecting_a_gguf_model_reads_its_headers(bases: HubServer, tmp_path: Path) -> None:
    first = write_model(tmp_path / "model.gguf", {}, parts=2)
    parts = {file.name: file.read_bytes() for file in tmp_path.glob("*.gguf")}
    bases.add("me/plain", parts)
    found = summarize(f"hf://me/plain/{first.name}")
    assert found.facts == summarize(first).facts
    assert len(bases.asked("GET", "/cdn/")) == 2
    assert all(one.range for one in bases.asked("GET", "/cdn/"))


def test_a_header_longer_than_the_first_request(bases: HubServer, tmp_path: Path) -> None:
    words = tuple(f"a long word of the vocabulary, number {number}" for number in range(40_000))
    tokens = Value(ValueType.ARRAY, words, ValueType.STRING)
    file = write_model(tmp_path / "model.gguf", {}, **{"tokenizer.ggml.tokens": tokens})
    bases.add("me/plain", {"model.gguf": file.read_bytes()})
    assert summarize("hf://me/plain").facts == summarize(file).facts
    ranges = [one.range for one in bases.asked("GET", "/cdn/")]
    assert ranges == ["bytes=0-1048575", f"bytes=1048576-{4 * 1048576 - 1}"]
