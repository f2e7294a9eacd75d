"""docs/json.md against what the commands really print, key by key and type by type."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections import defaultdict
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import cli
from loratools.report import SCHEMA

from .conftest import served
from .test_commands import NAMES, ROOT, make_files

PAGE = ROOT / "docs/json.md"

RUNS = """
merge base adapter -o o1
merge base adapter:0.5 style -o o2 --dtype bf16 --dry-run
merge q8.gguf tiny -o o3.gguf
merge plain.gguf tiny -o o4.gguf --quant q6_k
merge q8.gguf tiny -o o5.gguf --residual-rank 1
unmerge o1 adapter -o u1
unmerge o1 -o u2 --base base
unmerge o3.gguf -o u3.gguf --base q8.gguf
convert ink.safetensors -o c1.safetensors --to diffusers
convert adapter -o c2.gguf --to gguf --base base
resize adapter -o r1 --rank 2
resize adapter -o r2 --energy 0.9 --scope global --dry-run
resize adapter style -o r3 --rank 1
compose adapter style:0.5 -o k1
compose adapter style -o k2 --method ties --rank 4 --density 0.5
extract base o1 -o e1 --rank 4
extract base o1 -o e2 --energy 0.9 --dry-run
rebase adapter --from base --onto o1 -o b1 --rank 2
rebase adapter --from base --onto o1 --rank 0
quantize plain.gguf -o q1.gguf --to q8_0
dequantize q1.gguf -o q2.gguf
quantize base -o base-nf4 --to nf4
quantize base -o q3 --for-adapter qlora
dequantize base -o q4 --for-adapter qlora
diff adapter style
inspect adapter --spectrum
inspect adapter --base base --plot p.svg
inspect adapter style
inspect adapter style --alignment
inspect base
inspect ink.safetensors
inspect plain.gguf
inspect c2.gguf
formats
methods
push adapter me/new-adapter --base-model me/base --dry-run
push adapter me/new-adapter --base-model me/base
pull me/adapter -o p1
demo
demo -o kept
run recipe.yaml --dry-run
run recipe.yaml
run stop.yaml
"""
"""Commands whose documents show every key."""

RECIPE = "steps:\n  a: {resize: adapter, rank: 1}\n  b: {merge: [base, $a], output: run1}\n"
STOP = "steps:\n  a: {diff: [adapter, style]}\n"

TYPES: Mapping[str, tuple[type, ...]] = {
    "text": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "list": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def documents(line: str) -> list[dict[str, Any]]:
    """Run a command with ``--json``; returns its report, or the reports in it."""
    printed = io.StringIO()
    with redirect_stdout(printed), redirect_stderr(io.StringIO()) as said:
        cli.run([*shlex.split(line), "--json"])
    assert said.getvalue() == "", line
    document = json.loads(printed.getvalue())
    assert "error" not in document, f"{line}: {document}"
    if list(document["facts"]) == ["reports"]:
        return list(document["facts"]["reports"])
    return [document]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Return operation → the documents of all runs."""
    folder = tmp_path_factory.mktemp("json")
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make_files(folder)
        make_gguf(folder)
        Path("recipe.yaml").write_text(RECIPE)
        Path("stop.yaml").write_text(STOP)
        with served(ROOT / "docs/push.md", tmp_path_factory.mktemp("hub")):
            for line in RUNS.strip().splitlines():
                for document in documents(line):
                    found[document["operation"]].append(document)
    return found


def make_gguf(folder: Path) -> None:
    """Make two GGUF models, one of 8 bits, and an adapter for them."""
    from tests.gguf_models import write_adapter, write_model

    torch.manual_seed(0)
    write_model(folder / "plain.gguf", {})
    write_model(folder / "q8.gguf", {"": "Q8_0"})
    write_adapter(folder / "tiny")


def tables(name: str) -> dict[str, dict[str, str]]:
    """Return ``facts`` and ``items`` of a command as the page has them: key → type."""
    text = PAGE.read_text("utf-8")
    section = re.split(r"^## ", text.partition(f"\n## {name}\n")[2], flags=re.MULTILINE)[0]
    found: dict[str, dict[str, str]] = {"facts": {}, "items": {}}
    for where, key, kind in re.findall(
        r"^\| (facts|items) \| `(\w+)` \| ([\w ,?]+) \|", section, re.MULTILINE
    ):
        found[where][key] = kind
    return found


def fits(value: Any, kind: str) -> bool:
    words = [word.strip() for word in kind.replace("?", "").split(" or ")]
    if isinstance(value, bool):
        return "boolean" in words
    return any(isinstance(value, TYPES[word]) for word in words)


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_keys_that_are_printed(
    seen: Mapping[str, list[dict[str, Any]]], name: str
) -> None:
    """Every key that is seen is on the page with its type; those without ? are always there."""
    page = tables(name)
    assert seen[name], "no run of this command"
    for document in seen[name]:
        rows = [("facts", document["facts"]), *(("items", row) for row in document["items"])]
        for where, row in rows:
            known = page[where]
            assert set(row) - set(known) == set(), f"{where}: not on the page"
            always = {key for key, kind in known.items() if not kind.endswith("?")}
            assert always - set(row) == set(), f"{where}: not always there"
            wrong = {key: value for key, value in row.items() if not fits(value, known[key])}
            assert wrong == {}, where


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_no_other_keys(seen: Mapping[str, list[dict[str, Any]]], name: str) -> None:
    facts = {key for document in seen[name] for key in document["facts"]}
    items = {key for document in seen[name] for row in document["items"] for key in row}
    page = tables(name)
    assert set(page["facts"]) - facts == set()
    assert set(page["items"]) - items == set()


def test_the_envelope_and_its_number(seen: Mapping[str, list[dict[str, Any]]]) -> None:
    text = PAGE.read_text("utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\w ]+) \|", text.partition("\n## ")[0], re.MULTILINE))
    keys = ["schema", "operation", "dry_run", "inputs", "output", "facts", "items", "notes"]
    failure = ["error", "message", "hint"]
    assert list(rows) == [*keys, *failure]
    assert f"`schema` is {SCHEMA}" in text
    for document in (one for each in seen.values() for one in each):
        assert list(document) == keys
        assert all(fits(document[key], rows[key]) for key in keys)
        for note in document["notes"]:
            assert list(note) == ["level", "message", "subject"]
    document = json.loads(_failure())
    assert list(document) == ["schema", *failure]
    assert all(fits(document[key], rows[key]) for key in failure)


def _failure() -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert cli.run(["merge", "nothing", "adapter", "-o", "x", "--json"]) == 1
    return printed.getvalue()
