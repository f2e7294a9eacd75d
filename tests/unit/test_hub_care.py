"""What push leaves alone and what pull leaves behind: cards, stray files, refusals, no network."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants

from loratools.demo import make_adapter, make_base
from loratools.errors import HubError, LoratoolsError, MissingFileError, OptionError, OutputError
from loratools.pull import pull_from_hub
from loratools.push import push_to_hub
from tests.hub_server import HubServer

WORDS = "license: mit\ntags:\n- mine"
CARDS = {
    "text alone": ("", "# Mine\n\n---\n\nand more\n"),
    "metadata": (f"---\n{WORDS}\n---\n", "# Mine\n---\nno metadata\n"),
    "no text": (f"---\n{WORDS}\n---", ""),
    "Windows": (f"---\n{WORDS}\n---\n".replace("\n", "\r\n"), "# Mine\r\n\r\nline\r\n"),
    "Windows, text alone": ("", "\r\n# Mine\r\n"),
    "a byte order mark": (f"\ufeff---\n{WORDS}\n---\n", "# Mine\n"),
    "blanks behind the dashes": (f"--- \n{WORDS}\n---  \n", "# Mine\n"),
    "empty metadata": ("---\n---\n", "# Mine\n"),
    "a title between dashes": ("", "-------\n# Mine\n-------\n"),
}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)


@pytest.fixture
def there(hub: HubServer) -> HubServer:
    """The Hub with a base whose licence is free."""
    hub.add("free/model", {"README.md": b"---\nlicense: mit\n---\n"})
    return hub


def adapter(folder: Path) -> Path:
    make_adapter(folder / "adapter")
    return folder / "adapter"


# ---------------------------------------------------------------------------- push


@pytest.mark.parametrize(("metadata", "text"), CARDS.values(), ids=CARDS)
def test_a_card_of_any_form_keeps_its_text(
    there: HubServer,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    metadata: str,
    text: str,
) -> None:
    path = adapter(tmp_path)
    (path / "README.md").write_bytes((metadata + text).encode())
    for _ in range(2):
        push_to_hub(path, "me/lora", base_model=["free/model"])
        raw = there.repos["me/lora"].files()["README.md"].decode()
        card = ModelCard(raw)
        assert card.text == text
        assert raw.endswith(text)
        assert raw.count("base_model:") == 1
        assert card.data.license == "mit"
        assert ("mine" in card.data.tags) == (WORDS in metadata.replace("\r\n", "\n"))
        ends = {line[len(line.rstrip("\r\n")) :] for line in raw.splitlines(keepends=True)}
        assert ends - {""} == {"\r\n" if "\r\n" in metadata + text else "\n"}
    assert not caplog.records


@pytest.mark.parametrize("make", [make_adapter, make_base])
def test_what_does_not_belong_there_stays(there: HubServer, tmp_path: Path, make: object) -> None:
    make(tmp_path / "folder")  # type: ignore[operator]
    own = {file.name for file in (tmp_path / "folder").iterdir()}
    stray = (
        ".env", ".DS_Store", ".git/config", "checkpoint-10/adapter_model.safetensors",
        "optimizer.pt", "rng_state_0.pth", "trainer_state.json", "Thumbs.db", "notes.txt~",
        "runs/events.out.tfevents.1", "wandb/x.json", "global_step5/x.json", "a.bak", "x.log",
    )  # fmt: skip
    for name in (*stray, "tokenizer.json", "samples/one.png"):
        (tmp_path / "folder" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_text("{}")
    report = push_to_hub(tmp_path / "folder", "me/x", base_model=["free/model"])
    sent = set(there.repos["me/x"].files()) - {".gitattributes"}
    assert sent == own | {"tokenizer.json", "samples/one.png", "README.md"}
    note = next(note.message for note in report.notes if note.message.startswith("stay here"))
    assert "optimizer.pt" in note
    assert ".env" not in note


def test_the_repository_s_own_revision_counts(there: HubServer, tmp_path: Path) -> None:
    path = adapter(tmp_path)
    base = ["free/model"]
    report = push_to_hub(path, "hf://me/lora@dev", base_model=base)
    repo = there.repos["me/lora"]
    assert "adapter_model.safetensors" in repo.files("dev")
    assert "adapter_model.safetensors" not in repo.files()
    assert report.output == "hf://me/lora@dev"
    with pytest.raises(OptionError, match="says revision dev, and --revision other"):
        push_to_hub(path, "hf://me/lora@dev", base_model=base, revision="other")
    with pytest.raises(OptionError, match="a place inside a repository"):
        push_to_hub(path, "hf://me/lora/sub", base_model=base)


def test_a_proposal_makes_no_branch(there: HubServer, tmp_path: Path) -> None:
    path = adapter(tmp_path)
    push_to_hub(path, "me/lora", base_model=["free/model"])
    for repo in ("me/lora", "me/new"):
        with pytest.raises(OptionError, match="has no branch exp"):
            push_to_hub(path, repo, base_model=["free/model"], create_pr=True, revision="exp")
    assert set(there.repos["me/lora"].branches) == {"main"}
    assert "me/new" not in there.repos


def test_path_and_repository_the_wrong_way_round(there: HubServer, tmp_path: Path) -> None:
    with pytest.raises(OptionError) as caught:
        push_to_hub("me/lora", str(adapter(tmp_path)))
    assert caught.value.hint == "the path comes first, then OWNER/NAME"


def test_a_card_that_is_not_there(there: HubServer, tmp_path: Path) -> None:
    (tmp_path / "card.md").write_text("# Mine\n")
    with pytest.raises(MissingFileError) as caught:
        push_to_hub(adapter(tmp_path), "me/x", base_model=["free/model"], card=tmp_path / "crad.md")
    assert "card.md" in (caught.value.hint or "")


# ---------------------------------------------------------------------------- pull


@pytest.mark.parametrize("dry_run", [True, False])
def test_a_gated_repository_is_said_at_once_and_leaves_nothing(
    there: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    there.add("them/gated", {"a.safetensors": b"x", "config.json": b"{}"}, gated=True)
    with pytest.raises(HubError, match="a gated repository"):
        pull_from_hub("them/gated", tmp_path / "new" / "out", dry_run=dry_run)
    assert not list(tmp_path.iterdir())
    there.users["hf_writer"] = "them"
    assert pull_from_hub("them/gated", tmp_path / "out", dry_run=dry_run).facts["files"] == 2


def test_a_pull_that_fetched_nothing_leaves_nothing(there: HubServer, tmp_path: Path) -> None:
    there.add("me/one", {"a.safetensors": b"x" * 5000})
    there.fail("HEAD", "/resolve/", 403, times=9)
    with pytest.raises(HubError) as caught:
        pull_from_hub("me/one", tmp_path / "new" / "out")
    assert "--create-pr" not in (caught.value.hint or "")
    assert not list(tmp_path.iterdir())


def test_one_file_does_not_become_a_folder_s_name(there: HubServer, tmp_path: Path) -> None:
    there.add("me/ink", {"sub/ink.safetensors": b"x"})
    for output in (f"{tmp_path}/new/", str(tmp_path)):
        with pytest.raises(OutputError) as caught:
            pull_from_hub("hf://me/ink/sub/ink.safetensors", output, overwrite=True)
        assert caught.value.hint == f"say -o {Path(output) / 'ink.safetensors'}"
    assert not list(tmp_path.iterdir())


def test_out_of_reach_the_cache_may_not_be_all(
    there: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    there.add("me/two", {"a.json": b"{}", "b.json": b"{}"})
    hf_hub_download("me/two", "a.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    report = pull_from_hub("me/two", tmp_path / "out")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.json"]
    assert any("may hold more" in note.message for note in report.warnings)


def test_a_gated_input_of_a_recipe_is_told_first(there: HubServer, tmp_path: Path) -> None:
    from loratools.recipes.remote import Remotes

    files = {file.name: file.read_bytes() for file in adapter(tmp_path).iterdir()}
    there.add("them/gated", files, gated=True)
    fault = Remotes()["hf://them/gated"].fault(adapter=True)
    assert isinstance(fault, LoratoolsError)
    assert "gated" in fault.message
