"""Recipes whose inputs are on the Hub: asked for before anything runs, and whether they moved."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from loratools.demo import make_adapter
from tests.hub_server import HubServer

from .conftest import Outcome, Run, tree

RECIPE = """
steps:
  small:
    resize: hf://me/adapter
    rank: 2
    output: small
  merged:
    merge: [hf://me/base, small:0.8, hf://me/second]
    output: merged
  fetched:
    pull: me/second
    revision: v1
    output: fetched
"""


@pytest.fixture
def there(hub: HubServer, here: Path) -> HubServer:
    """A Hub with the base and two adapters, one of which has a tag."""
    for name in ("base", "adapter", "second"):
        repo = hub.add(f"me/{name}", tree(here / name))
        repo.tags["v1"] = repo.branches["main"]
    return hub


def play(run: Run, text: str, *words: str) -> Outcome:
    Path("recipe.yaml").write_text(text, encoding="utf-8")
    return run("run", "recipe.yaml", *words, "--json")


def actions(done: Outcome) -> dict[str, str]:
    assert done.code == 0, done.out
    return {row["step"]: row["action"] for row in done.document["items"]}


def test_a_recipe_from_the_hub_has_the_bytes_of_the_commands(
    there: HubServer, here: Path, run: Run
) -> None:
    assert set(actions(play(run, RECIPE)).values()) == {"run"}
    assert run("resize", "adapter", "--rank", "2", "-o", "hand/small").code == 0
    assert run("merge", "base", "hand/small:0.8", "second", "-o", "hand/merged").code == 0
    assert tree(here / "merged") == tree(here / "hand" / "merged")
    assert tree(here / "fetched") == tree(here / "second")


def test_what_the_hub_has_not_is_told_before_anything_runs(
    there: HubServer, here: Path, run: Run
) -> None:
    text = RECIPE.replace("hf://me/second", "hf://me/sekond").replace(
        "revision: v1", "revision: v9"
    )
    text += "  wrong:\n    resize: hf://me/base\n    rank: 2\n    output: wrong\n"
    text += "  gone:\n    merge: [hf://me/base@v7, hf://me/adapter/no.safetensors]\n    output: g\n"
    done = play(run, text)
    assert done.code == 1
    assert done.document["error"] == "HubError"
    lines = done.document["message"].splitlines()
    assert lines[0] == "recipe.yaml: 5 faults:"
    expected = (
        "line 7: step merged: hf://me/sekond: no such repository",
        "line 10: step fetched: hf://me/second@v9: no such revision",
        "line 14: step wrong: hf://me/base: no adapter weights in there",
        "line 18: step gone: hf://me/base@v7: no such revision",
        "line 18: step gone: hf://me/adapter/no.safetensors: me/adapter has no no.safetensors",
    )
    for line, words in zip(lines[1:], expected, strict=True):
        assert line.strip().startswith(words)
    assert {path.name for path in here.iterdir()} == {
        "base", "adapter", "second", "ink.safetensors", "recipe.yaml"
    }  # fmt: skip
    assert not there.asked("GET", "/cdn/")


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
def test_a_missing_repository_in_the_last_step_fails_the_first(
    there: HubServer, here: Path, run: Run, words: tuple[str, ...]
) -> None:
    text = RECIPE + "  last:\n    inspect: hf://me/nothing\n"
    done = play(run, text, *words)
    assert done.code == 1
    assert "line 14: step last: hf://me/nothing: no such repository" in done.document["message"]
    assert not (here / "small").exists()


def test_what_has_not_moved_is_skipped_and_what_has_runs(there: HubServer, run: Run) -> None:
    play(run, RECIPE)
    fetched = there.sent("/cdn/")
    assert set(actions(play(run, RECIPE)).values()) == {"skip"}
    assert there.sent("/cdn/") == fetched
    make_adapter(Path("newer"), seed=7)
    there.repos["me/adapter"].commit("main", tree(Path("newer")), "newer")
    refused = play(run, RECIPE)
    assert refused.code == 1
    assert "small already exists (hf://me/adapter changed)" in refused.document["message"]
    done = play(run, RECIPE, "--overwrite")
    assert actions(done) == {"small": "run", "merged": "run", "fetched": "skip"}
    assert set(actions(play(run, RECIPE)).values()) == {"skip"}
    second = there.repos["me/second"]
    second.commit("main", second.files(), "the same again")
    done = play(run, RECIPE, "--overwrite")
    assert actions(done) == {"small": "skip", "merged": "run", "fetched": "skip"}
    second.tags["v1"] = second.branches["main"]
    assert actions(play(run, RECIPE, "--overwrite"))["fetched"] == "run"


def test_a_commit_that_is_named_is_not_asked_for(there: HubServer, run: Run) -> None:
    commit = there.repos["me/adapter"].branches["main"]
    text = RECIPE.split("  merged:", maxsplit=1)[0].replace("me/adapter", f"me/adapter@{commit}")
    play(run, text)
    before = len(there.seen)
    assert actions(play(run, text)) == {"small": "skip"}
    assert len(there.seen) == before


def test_offline_the_cache_says_which_commit_it_has(
    there: HubServer, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = RECIPE.split("  fetched:", maxsplit=1)[0]
    play(run, text)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    before = len(there.seen)
    assert set(actions(play(run, text)).values()) == {"skip"}
    assert len(there.seen) == before
    done = play(run, text.replace("hf://me/second", "hf://me/other"), "--overwrite")
    assert done.code == 1
    assert "step merged: hf://me/other: not in the cache" in done.document["message"]


def test_a_plan_estimates_what_comes_from_the_hub(there: HubServer, here: Path, run: Run) -> None:
    local = RECIPE.replace("hf://me/", "").replace("pull: me/second", "convert: second")
    local = local.replace("revision: v1", "to: peft")
    here_rows = play(run, local, "--dry-run").document["items"]
    done = play(run, RECIPE, "--dry-run").document
    for row, other in zip(done["items"][:2], here_rows[:2], strict=True):
        assert row["bytes_read"] == other["bytes_read"]
        assert row["bytes_written"] == other["bytes_written"]
        assert row["bytes_memory"] == other["bytes_memory"]
    size = sum(map(len, tree(here / "second").values()))
    assert (done["items"][2]["bytes_read"], done["items"][2]["bytes_written"]) == (size, size)
    assert not (here / "small").exists()
    # Adapters are read; of the base, its header.
    base = len(there.repos["me/base"].files()["model.safetensors"])
    assert there.sent("/cdn/") < base + 2 * size


def test_the_memory_that_comparing_models_takes_is_told_from_headers(
    there: HubServer, here: Path, run: Run
) -> None:
    run("merge", "base", "adapter", "-o", "merged")
    there.add("me/merged", tree(here / "merged"))
    text = "steps:\n  tuned: {extract: [hf://me/base, hf://me/merged], rank: 2, output: t}\n"
    local = play(run, text.replace("hf://me/", ""), "--dry-run").document["items"][0]
    row = play(run, text, "--dry-run").document["items"][0]
    assert row["bytes_memory"] == local["bytes_memory"]
    assert row["bytes_read"] == local["bytes_read"]
