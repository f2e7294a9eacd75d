"""``loratools run``: the same bytes as the commands one by one; plans; what is refused."""

from __future__ import annotations

import importlib
import io
from pathlib import Path

import click
import pytest
import torch

from loratools import load_adapter
from loratools.cli import COMMANDS, cli
from loratools.held import hold, holding, is_held
from loratools.recipes.verbs import Verb
from loratools.report import SCHEMA
from tests.gguf_demo import write_demo_gguf

from .conftest import Outcome, Run, tree

RECIPE = """
steps:
  small:
    resize: adapter
    rank: 2
  both:
    compose: [$small:0.7, second:-0.5]
    rank: 3
  merged:
    merge: [base, $both:0.8]
    output: merged
    dtype: bf16
"""


def recipe(text: str) -> Path:
    path = Path("recipe.yaml")
    path.write_text(text, "utf-8")
    return path


def by_hand(run: Run) -> dict[str, bytes]:
    for line in (
        "resize adapter -o hand/small --rank 2",
        "compose hand/small:0.7 second:-0.5 -o hand/both --rank 3",
        "merge base hand/both:0.8 -o hand/merged --dtype bf16",
    ):
        assert run(*line.split()).code == 0
    return tree(Path("hand/merged"))


def test_a_recipe_gives_the_bytes_of_its_commands(here: Path, run: Run) -> None:
    outcome = run("run", recipe(RECIPE))
    assert outcome.code == 0, outcome.err
    assert tree(here / "merged") == by_hand(run)
    names = {path.name for path in here.iterdir()}
    assert names - {"hand"} == {
        "base", "adapter", "second", "ink.safetensors", "recipe.yaml", "merged",
        ".merged.recipe.json",
    }  # fmt: skip


def test_what_is_up_to_date_is_skipped_with_what_only_it_reads(here: Path, run: Run) -> None:
    run("run", recipe(RECIPE))
    before = (here / "merged" / "config.json").stat().st_mtime_ns
    items = run("run", "recipe.yaml", "--json").document["items"]
    assert [row["action"] for row in items] == ["skip"] * 3
    assert (here / "merged" / "config.json").stat().st_mtime_ns == before
    outcome = run("run", recipe(RECIPE.replace("rank: 2", "rank: 1")))
    assert outcome.code == 1
    assert "merged already exists ($both changed)" in outcome.err
    assert "Hint: --overwrite" in outcome.err
    changed = run("run", "recipe.yaml", "--overwrite", "--json").document
    assert [row["action"] for row in changed["items"]] == ["run"] * 3


def test_what_comes_after_a_value_in_memory_follows_a_file_before_it(here: Path, run: Run) -> None:
    text = """
steps:
  small: {resize: adapter, rank: 2, output: small}
  both: {compose: [$small, second]}
  merged: {merge: [base, $both], output: merged}
"""
    assert run("run", recipe(text)).code == 0
    first = tree(here / "merged")
    outcome = run("run", recipe(text.replace("rank: 2", "rank: 1")), "--overwrite", "--json")
    assert [row["action"] for row in outcome.document["items"]] == ["run"] * 3
    assert tree(here / "merged") != first


def test_json_is_one_document_with_every_report(here: Path, run: Run) -> None:
    outcome = run("run", recipe(RECIPE), "--json")
    document = outcome.document
    assert outcome.err == ""
    assert (document["schema"], document["operation"]) == (SCHEMA, "run")
    reports = document["facts"]["reports"]
    assert [reports[name][0]["operation"] for name in reports] == ["resize", "compose", "merge"]
    assert reports["small"][0]["output"] == "$small"


def test_standard_input(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(data: bytes) -> None:
        # In a legacy encoding, as a terminal of Windows is.
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="cp1252"))

    say(b"\xef\xbb\xbfsteps:\r\n  one: {inspect: adapter}\r\n")
    outcome = run("run", "-")
    assert outcome.code == 0
    assert outcome.out.startswith("adapter\n  what                 adapter\n")
    say(b"steps:\n  one: {inspekt: adapter}\n")
    assert "did you mean inspect?" in run("run", "-").err
    Path("\u00e9").symlink_to("adapter")
    say("steps:\n  one: {inspect: \u00e9}\n".encode())
    assert run("run", "-").code == 0
    say(b"\xff\xfe")
    assert "not UTF-8 text" in run("run", "-").err


def test_a_listing_is_an_answer(here: Path, run: Run) -> None:
    assert "\n  kohya " in run("run", recipe("steps:\n  one: {formats: }\n")).out


def test_a_plan_says_what_the_run_writes_and_writes_nothing(here: Path, run: Run) -> None:
    before = tree(here)
    text = RECIPE.replace("    rank: 3\n", "    rank: 3\n    output: both\n")
    plan = run("run", recipe(text), "--dry-run", "--json").document
    (here / "recipe.yaml").unlink()
    assert tree(here) == before
    done = run("run", recipe(text), "--json").document
    planned = {row["step"]: row for row in plan["items"]}
    assert [row["tried"] for row in plan["items"]] == [True] * 3
    for row in done["items"]:
        size = planned[row["step"]]["bytes_written"]
        # Side files and headers come on top of the tensors.
        assert size <= (row["bytes_written"] or 0) <= size + 6000
    read = sum(path.stat().st_size for path in (here / "base").iterdir())
    assert planned["merged"]["bytes_read"] - read < 40_000
    assert plan["facts"]["bytes_memory"] >= planned["merged"]["bytes_memory"]


def test_a_plan_guesses_what_reads_a_model_that_is_not_made_yet(here: Path, run: Run) -> None:
    text = RECIPE + "  back: {unmerge: $merged, base: base, output: back}\n"
    plan = run("run", recipe(text), "--dry-run", "--json").document
    rows = {row["step"]: row for row in plan["items"]}
    assert rows["back"]["tried"] is False
    assert rows["back"]["bytes_written"] == rows["merged"]["bytes_written"]
    assert any(note["subject"] == "back" for note in plan["notes"])


def test_a_plan_fails_as_the_run_would(here: Path, run: Run) -> None:
    text = "steps:\n  one: {resize: adapter, rank: 500, output: x}\n"
    for flags in ([], ["--dry-run"]):
        outcome = run("run", recipe(text), *flags)
        assert outcome.code == 2
        assert "recipe.yaml, line 2: step one: --rank 500 is above" in outcome.err
    assert not Path("x").exists()


def test_a_difference_ends_the_recipe(here: Path, run: Run) -> None:
    text = (
        "steps:\n  same: {diff: [adapter, second]}\n  next: {resize: adapter, rank: 1, output: x}\n"
    )
    outcome = run("run", recipe(text), "--json")
    assert outcome.code == 1
    assert outcome.document["facts"]["stopped_at"] == "same"
    assert not Path("x").exists()


def test_a_folder_of_adapters_is_no_single_value(here: Path, run: Run) -> None:
    Path("many").mkdir()
    for name in ("adapter", "second"):
        (here / name).rename(here / "many" / name)
    text = "steps:\n  one: {convert: many, to: peft}\n  two: {inspect: $one}\n"
    outcome = run("run", recipe(text))
    assert outcome.code == 2
    assert "several results are no single value" in outcome.err
    assert run("run", recipe(text.replace("to: peft", "to: peft, output: all"))).code == 0
    assert (here / "all" / "second" / "adapter_config.json").exists()


def test_an_adapter_in_memory_is_no_base(here: Path, run: Run) -> None:
    text = "steps:\n  a: {resize: adapter, rank: 1}\n  b: {merge: [$a, second], output: x}\n"
    outcome = run("run", recipe(text))
    assert outcome.code == 2
    assert "$a is an adapter in memory, and merge wants files" in outcome.err


def test_an_adapter_that_nothing_uses_is_refused(here: Path, run: Run) -> None:
    outcome = run("run", recipe("steps:\n  a: {resize: adapter, rank: 1}\n"))
    assert outcome.code == 2
    assert "nothing uses its adapter" in outcome.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("merge: [base, adapter], output: x, dtype: bf61", "did you mean bf16?"),
        ("merge: [base, adapter], output: x, dry-run: true", "no option 'dry-run'"),
        ("merge: [base, 'adapter:0'], output: x", "finite number other than 0"),
        ("convert: adapter, output: x", "Missing option '--to'"),
    ],
)
def test_click_s_own_checks_come_before_the_first_step(
    here: Path, run: Run, line: str, message: str
) -> None:
    before = tree(here)
    outcome = run(
        "run", recipe(f"steps:\n  z: {{resize: adapter, rank: 1, output: r}}\n  a: {{{line}}}\n")
    )
    assert outcome.code == 2
    assert "recipe.yaml, line 3: step a" in outcome.err
    assert message in outcome.err
    (here / "recipe.yaml").unlink()
    assert tree(here) == before


@pytest.mark.parametrize(
    ("source", "words"),
    [("missing.yaml", "no such file: missing.yaml"), ("base", "base: a folder, not a recipe")],
)
def test_no_recipe(here: Path, run: Run, source: str, words: str) -> None:
    outcome = run("run", source)
    assert outcome.code == 1
    assert words in outcome.err
    assert "YAML file" in outcome.err


# ---------------------------------------------------------------------------- every command


@pytest.mark.parametrize("name", [name for name, _ in COMMANDS if name != "run"])
def test_every_command_is_a_verb(name: str) -> None:
    from loratools._cli.output import Output
    from loratools._cli.verbs import make_verb

    command: click.Command = importlib.import_module(f"loratools._cli.{name}").command
    verb: Verb = make_verb(command, Output())
    own = {"json", "quiet", "verbose", "dry_run"}
    flags = {param.name for param in command.params if isinstance(param, click.Option)} - own
    assert {one.key for one in verb.options.values()} == flags
    output = verb.options.get("output")
    assert output is None or output.role == "output", "say type=OUT, so that recipes see it"
    # In a step, options and the command's name are keys of one mapping.
    assert not set(verb.options) & set(cli.list_commands(click.Context(cli)))


# ---------------------------------------------------------------------------- values in memory


@pytest.mark.parametrize(
    ("to", "file", "more"),
    [
        ("peft", "out", {}),
        ("gguf", "out.gguf", {"base": "base"}),
        ("gguf", "out.gguf", {"base": "base", "dtype": "q8_0"}),
    ],
    ids=["peft", "gguf", "q8_0"],
)
def test_a_value_is_what_the_file_would_hold(
    here: Path, to: str, file: str, more: dict[str, str]
) -> None:
    from loratools import convert_adapter

    with holding(["$x"]):
        convert_adapter("adapter", "$x", to=to, **more)
        held = load_adapter("$x")
    convert_adapter("adapter", file, to=to, **more)
    read = load_adapter(file)
    assert held.metadata == read.metadata
    assert held.naming == read.naming
    pairs = zip(held.named_tensors(), read.named_tensors(), strict=True)
    for (name, ours), (other, theirs) in pairs:
        assert name == other
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert not is_held("$x")
    assert not Path("$x").exists()


def test_a_kohya_value_has_the_hashes_of_the_file(here: Path) -> None:
    from loratools import resize_adapter

    with holding(["$x"]):
        resize_adapter("ink.safetensors", "$x", rank=1, dtype="bf16")
        metadata = load_adapter("$x").metadata
    resize_adapter("ink.safetensors", "out.safetensors", rank=1, dtype="bf16")
    assert metadata == load_adapter("out.safetensors").metadata


def test_names_stand_for_values_only_inside_the_block(here: Path) -> None:
    from loratools.formats.format import Bundle

    with holding(["adapter"]):
        hold("./adapter", Bundle({"x": torch.zeros(3)}))
        assert is_held(here / "adapter")
    assert not is_held("adapter")


# ---------------------------------------------------------------------------- a second output

RESIDUAL = """
steps:
  later:
    convert: merged-residual.gguf
    to: peft
    base: base
    output: taken
  merged:
    merge: [q4.gguf, "adapter:0.02"]
    residual-rank: 2
    output: merged.gguf
"""


def actions(done: Outcome) -> dict[str, str]:
    assert done.code == 0, done.out
    return {row["step"]: row["action"] for row in done.document["items"]}


@pytest.fixture
def coded(here: Path, run: Run) -> Path:
    write_demo_gguf(here / "base", here / "plain.gguf")
    assert run("quantize", "plain.gguf", "-o", "q4.gguf", "--to", "q4_0").code == 0
    return here


def test_a_step_is_known_to_write_what_rounding_left_out(coded: Path, run: Run) -> None:
    path = recipe(RESIDUAL)
    rows = run("run", path, "--dry-run", "--json").document["items"]
    assert [row["step"] for row in rows] == ["merged", "later"]
    done = run("run", path, "--json")
    assert actions(done) == {"merged": "run", "later": "run"}
    both = [coded / "merged.gguf", coded / "merged-residual.gguf"]
    sizes = [file.stat().st_size for file in both]
    assert done.document["items"][0]["bytes_written"] == sum(sizes)
    # Tensors without headers: more than the model alone, and no more than both.
    assert 0.9 * sum(sizes) < rows[0]["bytes_written"] <= sum(sizes)
    assert actions(run("run", path, "--json")) == {"merged": "skip", "later": "skip"}
    for file in both:
        file.unlink()
        assert "already exists" in run("run", path).err
        done = run("run", path, "--json", "--overwrite")
        assert actions(done) == {"merged": "run", "later": "run"}
        assert all(one.exists() for one in both)


def test_what_rounding_left_out_collides_like_any_output(coded: Path, run: Run) -> None:
    text = RESIDUAL.replace("output: taken", "output: merged-residual.gguf").replace(
        "convert: merged-residual.gguf", "convert: adapter"
    )
    done = run("run", recipe(text), "--dry-run")
    assert done.code == 2
    assert "collides with that of" in done.err


def test_the_report_names_the_residual(coded: Path, run: Run) -> None:
    words = ["merge", "q4.gguf", "adapter:0.02", "-o", "m.gguf", "--residual-rank", "2", "--json"]
    planned = run(*words, "--dry-run").document["facts"]["residual"]
    told = run(*words).document["facts"]["residual"]
    share = told.pop("share_captured")
    assert planned.pop("share_captured") is None
    assert planned == told
    assert 0 < share < 1
    tensors = load_adapter("m-residual.gguf").layers.values()
    exact = sum(4 * layer.up.numel() + 4 * layer.down.numel() for layer in tensors)
    assert (told["bytes"], told["path"]) == (exact, "m-residual.gguf")


def test_a_residual_of_another_merge_is_warned_of(coded: Path, run: Run) -> None:
    words = ["merge", "q4.gguf", "-o", "m.gguf", "--overwrite"]
    assert run(*words, "adapter:0.02", "--residual-rank", "2").code == 0
    assert "Warning: m-residual.gguf" in run(*words, "second").err
