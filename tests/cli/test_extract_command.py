"""``extract`` and ``rebase``: exit codes, JSON, streams, and nothing written on failure."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Run, tree


@pytest.fixture
def tuned(here: Path, run: Run) -> Path:
    assert run("merge", "base", "adapter", "-o", "tuned", "-q").code == 0
    return here / "tuned"


def test_extract(tuned: Path, run: Run) -> None:
    done = run("extract", "base", "tuned", "-o", "found", "--rank", 4, "--json")
    assert done.code == 0
    assert done.err == ""
    document = done.document
    assert document["operation"] == "extract"
    assert document["inputs"] == ["base", "tuned"]
    assert document["output"] == "found"
    assert document["facts"]["factored"] == len(document["items"]) == 9
    assert len({tuple(row) for row in document["items"]}) == 1
    assert run("diff", "adapter", "found", "--tolerance", "1e-4").code == 0


def test_several_patterns(tuned: Path, run: Run) -> None:
    done = run(
        "extract", "base", "tuned", "-o", "found", "--energy", 0.9, "--rank", 3, "--json",
        "--include", "q_proj", "--include", "v_proj", "--exclude", r"layers\.1",
    )  # fmt: skip
    assert [row["module"] for row in done.document["items"]] == [
        f"model.layers.{layer}.self_attn.{leaf}"
        for layer in (0, 2)
        for leaf in ("q_proj", "v_proj")
    ]


FAILURES = {
    "neither": ([], 2, "--rank N or --energy F"),
    "rank 0": (["--rank", "0"], 2, "smallest rank is 1"),
    "rank beyond": (["--rank", "65"], 2, "at most 64"),
    "energy 2": (["--energy", "2"], 2, "0.9"),
    "no number": (["--rank", "many"], 2, "many"),
    "format": (["--rank", "2", "--to", "kohyo"], 2, "kohya"),
    "other names": (["--rank", "2", "--to", "kohya"], 1, "--arch"),
    "read only": (["--rank", "2", "--to", "xlabs"], 2, "read, not written"),
    "include": (["--rank", "2", "--include", "q_porj"], 2, "q_porj"),
    "exclude": (["--rank", "2", "--exclude", "nowhere"], 2, "--exclude 'nowhere'"),
    "full": (["--rank", "2", "--full", "nowhere"], 2, "--full 'nowhere'"),
    "arch": (["--rank", "2", "--arch", "sdxl"], 2, "Stable Diffusion XL"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_extract_fails(tuned: Path, run: Run, name: str) -> None:
    options, code, words = FAILURES[name]
    before = tree(tuned.parent)
    done = run("extract", "base", "tuned", "-o", "found", *options)
    assert done.code == code
    assert done.out == ""
    assert words in done.err
    assert tree(tuned.parent) == before


def test_nothing_changed(here: Path, run: Run) -> None:
    done = run("extract", "base", "base", "-o", "found", "--rank", 4, "--json")
    assert done.code == 1
    assert done.document["error"] == "MatchError"
    assert "nothing changed" in done.document["message"]
    assert not (here / "found").exists()


def test_not_two_versions_of_one_model(tuned: Path, run: Run, damaged: object) -> None:
    def change(tensors: dict[str, object]) -> None:
        tensors["model.norm.scale"] = tensors.pop("model.norm.weight")

    damaged(change, "tuned/model.safetensors")  # type: ignore[operator]
    done = run("extract", "base", "tuned", "-o", "found", "--rank", 4)
    assert done.code == 1
    assert "model.norm.weight: only in base" in done.err
    assert "model.norm.scale: only in tuned" in done.err


def test_rebase(tuned: Path, run: Run) -> None:
    options = ("rebase", "second", "--from", "base", "--onto", "tuned")
    measured = run(*options, "--rank", 0, "--json").document
    assert measured["output"] is None
    assert measured["facts"]["layers_apart"] == 9
    done = run(*options, "--rank", 4, "-o", "out", "--json").document
    assert done["facts"]["share_captured"] > 1 - 1e-6
    # base + second = tuned + out
    assert run("merge", "base", "second", "-o", "one", "-q").code == 0
    assert run("merge", "tuned", "out", "-o", "two", "-q").code == 0
    assert run("extract", "base", "one", "-o", "a", "--rank", 4, "-q").code == 0
    assert run("extract", "base", "two", "-o", "b", "--rank", 4, "-q").code == 0
    assert run("diff", "a", "b", "--tolerance", "1e-4", "-q").code == 0


def test_rebase_fails(tuned: Path, run: Run) -> None:
    before = tree(tuned.parent)
    options = ("rebase", "second", "--from", "base", "--onto")
    same = run(*options, "base", "--rank", 2, "-o", "out")
    assert same.code == 1
    assert "do not differ" in same.err
    assert run(*options, "tuned", "--rank", 2).code == 2
    assert run(*options, "tuned", "--rank", 0, "-o", "out").code == 2
    assert run(*options, "nowhere", "--rank", 2, "-o", "out").code == 1
    assert run("rebase", "second", "--onto", "tuned", "--rank", 2).code == 2
    assert tree(tuned.parent) == before
