"""Recipes against brute force: what is skipped, what is refused and where, what is handed on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from loratools import __version__
from loratools.errors import InputError, LoratoolsError, MissingFileError, OptionError, OutputError
from loratools.recipes.order import in_order
from loratools.recipes.reading import read_recipe
from loratools.recipes.records import fingerprint, record_of
from loratools.recipes.running import Done, run_recipe
from loratools.recipes.steps import check_steps
from loratools.recipes.verbs import Outcome, Parameter, Verb
from loratools.report import Report

# ---------------------------------------------------------------------------- verbs of the tests


@dataclass
class Shop:
    """Commands that write their words into a file, and remember that they ran."""

    ran: list[str] = field(default_factory=list)

    @property
    def verbs(self) -> dict[str, Verb]:
        joined = (
            Parameter("inputs", "inputs", None, "input", several=True, required=True),
            Parameter("output", "output", "--output", "output", required=True),
            Parameter("side", "side", "--side", "input"),
            Parameter("number", "number", "--number", convert=_number),
            Parameter("tag", "tag", "--tag", several=True),
            Parameter("overwrite", "overwrite", "--overwrite", switch=True),
        )
        look = (Parameter("path", "path", None, "input", required=True),)
        return {
            "join": _verb("join", joined, partial(self._join, joined)),
            "look": _verb("look", look, partial(self._look, look)),
        }

    def _join(self, parameters: Sequence[Parameter], words: Sequence[str]) -> Outcome:
        values = _parse(parameters, words)
        self.ran.append(values["output"])
        texts = [Path(path).read_text("utf-8") for path in values["inputs"]]
        Path(values["output"]).write_text("+".join(texts) + str(values.get("number", "")))
        return Outcome(0, (Report("join", output=values["output"]),))

    def _look(self, parameters: Sequence[Parameter], words: Sequence[str]) -> Outcome:
        values = _parse(parameters, words)
        self.ran.append(f"look {values['path']}")
        return Outcome(int(Path(values["path"]).read_text("utf-8") == "bad"), (Report("look"),))


def _verb(name: str, parameters: Sequence[Parameter], run: Any) -> Verb:
    parse = partial(_parse, parameters)
    other = ("glue",) if name == "join" else ()
    return Verb(name, tuple(parameters), None, parse, lambda values: False, run, elsewhere=other)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise OptionError(f"{text!r} is not a number") from error


def _parse(parameters: Sequence[Parameter], words: Sequence[str]) -> Mapping[str, Any]:
    """Parse ``--flag=value ... -- inputs``, the form in which recipes give words."""
    cut = words.index("--")
    values: dict[str, Any] = {}
    for word in words[:cut]:
        flag, _, text = word.partition("=")
        one = next(one for one in parameters if one.flag == flag)
        value = True if one.switch else one.convert(text)
        values[one.key] = (*values.get(one.key, ()), value) if one.several else value
    first = parameters[0]
    rest = tuple(words[cut + 1 :])
    values[first.key] = rest if first.several else (rest or (None,))[0]
    missing = [one.name for one in parameters if one.required and not values.get(one.key)]
    if missing:
        raise OptionError(f"missing: {', '.join(missing)}")
    return values


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        Path(name).write_text(name)
    return Shop()


def run(shop: Shop, text: str, **options: Any) -> Done:
    shop.ran.clear()
    return run_recipe(text, "recipe.yaml", shop.verbs, **options)


CHAIN = """
steps:
  last:
    join: [$middle, c]
    output: z
  middle:
    join: [x, b]
    output: y
  first:
    join: [a, b]
    output: x
    number: 7
"""


# ---------------------------------------------------------------------------- order, skipping


def test_steps_run_in_the_order_of_what_they_need(shop: Shop) -> None:
    run(shop, CHAIN)
    assert shop.ran == ["x", "y", "z"]
    assert Path("z").read_text() == "a+b7.0+b+c"


def test_in_order_is_a_topological_order_that_keeps_the_given_one() -> None:
    needs = {"d": ["b"], "a": [], "b": ["a"], "c": []}
    faults: list[Any] = []
    assert in_order(needs, dict.fromkeys(needs, 1), faults) == ["a", "b", "d", "c"]
    assert faults == []


def test_nothing_runs_twice(shop: Shop) -> None:
    run(shop, CHAIN)
    done = run(shop, CHAIN)
    assert shop.ran == []
    assert done.report.facts["skipped"] == 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda: Path("a").write_text("other"), ["x", "y", "z"]),
        (lambda: Path("c").write_text("other"), ["z"]),
        (lambda: Path("y").unlink(), ["y", "z"]),
        (lambda: Path("y").write_text("meddled"), ["y", "z"]),
        (lambda: record_of("z").unlink(), ["z"]),
        (lambda: os.utime("b", ns=(1, 1)), ["x", "y", "z"]),
    ],
    ids=["first input", "last input", "output gone", "output changed", "no record", "time"],
)
def test_a_change_runs_what_depends_on_it(shop: Shop, change: Any, expected: list[str]) -> None:
    run(shop, CHAIN)
    change()
    run(shop, CHAIN, overwrite=True)
    assert shop.ran == expected
    fresh = {name: Path(name).read_text() for name in "xyz"}
    run(shop, CHAIN, everything=True, overwrite=True)
    assert shop.ran == ["x", "y", "z"]
    assert {name: Path(name).read_text() for name in "xyz"} == fresh


def test_another_option_runs_the_step_and_overwrite_is_none(shop: Shop) -> None:
    run(shop, CHAIN)
    run(shop, CHAIN.replace("    number: 7", "    number: 7\n    overwrite: true"))
    assert shop.ran == []
    run(shop, CHAIN.replace("number: 7", "number: 8"), overwrite=True)
    assert shop.ran == ["x", "y", "z"]


def test_a_step_without_output_runs_each_time_and_its_code_ends_the_recipe(shop: Shop) -> None:
    text = "steps:\n  see: {look: a}\n  more: {join: [a], output: x}\n"
    assert run(shop, text).code == 0
    assert run(shop, text).code == 0
    assert shop.ran == ["look a"]
    Path("a").write_text("bad")
    done = run(shop, text, overwrite=True)
    assert (done.code, done.report.facts["stopped_at"]) == (1, "see")
    assert shop.ran == ["look a"]


def test_a_failure_names_step_and_line_and_what_is_done_stays_done(shop: Shop) -> None:
    verbs = shop.verbs

    def fail(words: Sequence[str]) -> Outcome:
        raise OutputError("the disk is full", hint="free some")

    broken = verbs | {"look": _verb("look", verbs["look"].parameters, fail)}
    text = "steps:\n  one: {join: [a], output: x}\n  two: {look: x}\n"
    with pytest.raises(OutputError, match=r"r\.yaml, line 3: step two: the disk is full") as caught:
        run_recipe(text, "r.yaml", broken)
    assert caught.value.hint == "free some"
    assert Path("x").exists()
    run(shop, text)
    assert shop.ran == ["look x"]


def test_a_plan_writes_nothing(shop: Shop) -> None:
    before = sorted(Path().iterdir())
    done = run(shop, CHAIN, dry_run=True)
    assert shop.ran == []
    assert sorted(Path().iterdir()) == before
    assert done.report.dry_run
    assert [row["action"] for row in done.report.items] == ["run"] * 3


# ---------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("text", "kind", "message", "hint"),
    [
        ("steps: [", InputError, "line 1: not YAML", "colon"),
        ("- a", OptionError, "line 1: no steps here", "steps:"),
        ("steps: {}", OptionError, "no steps here", "steps:"),
        ("step:\n  x: {look: a}", OptionError, "unknown word 'step'", None),
        ("steps:\n  x: {lok: a}", OptionError, "line 2: step x: no command", "look"),
        ("steps:\n  x: {look: a, join: b}", OptionError, "2 commands", "two steps"),
        ("steps:\n  x: {look: a}\n  x: {look: b}", OptionError, "line 3: 'x' is given twice", None),
        ("steps:\n  1x: {look: a}", OptionError, "'1x' is no name", "letter"),
        ("steps:\n  x: hello", OptionError, "step x: no command", "merge"),
        ("steps:\n  x:\n    look: {a: b}", OptionError, "line 3: look: a value is a text", None),
        ("steps:\n  x: {look: [a, b]}", OptionError, "look takes 1 inputs, not 2", None),
        (
            "steps:\n  x:\n    join: a\n    output: x\n    namber: 1",
            OptionError, "line 5: step x: join has no option 'namber'", "did you mean number?",
        ),
        (
            "steps:\n  x:\n    join: a\n    output: x\n    number: one",
            OptionError, "line 5: step x: number: 'one' is not a number", None,
        ),
        (
            "steps:\n  x: {join: a, output: [x, y]}",
            OptionError, "output: takes one value", None,
        ),
        ("steps:\n  x: {join: a, output: x, overwrite: 3}", OptionError, "true or false", None),
        ("steps:\n  x: {join: a, output: x, number: }", OptionError, "has no value", None),
        ("steps:\n  x: {join: a}", OptionError, "missing: output", None),
        ("steps:\n  x: {look: nothing}", MissingFileError, "no such file or folder", "check"),
        ("steps:\n  x: {look: $y}", OptionError, "there is no step 'y'", "known: x"),
        (
            "steps:\n  x: {look: a}\n  y: {look: $x}",
            OptionError, "step x is look: makes nothing", None,
        ),
        (
            "steps: {x: {join: $y, output: p}, y: {join: q, output: r}, z: {join: p, output: q}}",
            OptionError, "in a circle: x needs y needs z needs x", None,
        ),
        (
            "steps:\n  x: {join: a, output: p}\n  y: {join: b, output: ./p}",
            OptionError, "line 3: step y: output ./p collides with that of x", "another",
        ),
        (
            "steps:\n  x: {join: a, output: p}\n  y: {join: b, output: p/q}",
            OptionError, "collides", None,
        ),
        ("steps:\n  x: {join: a, output: b}", OutputError, "b already exists", "--overwrite"),
    ],
)  # fmt: skip
def test_faults_are_told_before_anything_runs(
    shop: Shop, text: str, kind: type[LoratoolsError], message: str, hint: str | None
) -> None:
    with pytest.raises(kind) as caught:
        run(shop, text)
    assert message in caught.value.message
    assert caught.value.message.startswith("recipe.yaml")
    assert hint is None or hint in (caught.value.hint or "")
    assert shop.ran == []


def test_all_faults_are_told_together(shop: Shop) -> None:
    text = "steps:\n  x: {look: one}\n  y: {look: two}\n  z: {join: a, output: b}\n"
    with pytest.raises(MissingFileError) as caught:
        run(shop, text)
    lines = caught.value.message.splitlines()
    assert lines[0] == "recipe.yaml: 2 faults:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["line 2", "line 3"]


# ---------------------------------------------------------------------------- text and references


def test_words_stay_as_they_are_written(shop: Shop) -> None:
    text = "steps:\n  x:\n    join: [no, 010, '$a']\n    tag: [1e-5, 'yes', ~, \"a b\"]\n"
    (step,) = read_recipe(text, "r", shop.verbs)
    assert [word.text for word in step.arguments] == ["no", "010", "$a"]
    tags = step.options["tag"]
    assert [word.text for word in tags.words] == ["1e-5", "yes", "~", "a b"]
    assert (tags.line, step.name.line) == (4, 2)


def test_a_reference_may_go_on_inside_a_folder(shop: Shop) -> None:
    Path("d").mkdir()
    text = "steps:\n  x: {join: a, output: e}\n  y: {join: $x/part, output: f, side: $x}\n"
    written = read_recipe(text, "r", shop.verbs)
    steps = check_steps(written, shop.verbs, "r")
    assert steps[1].inputs == ("e/part", "e")
    assert steps[1].needs == ("x",)


def test_a_deeply_nested_text_is_refused(shop: Shop) -> None:
    with pytest.raises(InputError):
        run(shop, "steps: " + "[" * 5000)


# ---------------------------------------------------------------------------- fingerprints


def test_a_fingerprint_sees_size_time_and_header(tmp_path: Path) -> None:
    import struct

    file = tmp_path / "a.safetensors"
    header = json.dumps({"__metadata__": {"x": "y" * 70_000}}).encode()
    data = struct.pack("<Q", len(header)) + header + b"weights"

    def write(content: bytes) -> str | None:
        file.write_bytes(content)
        os.utime(file, ns=(5, 5))
        return fingerprint(str(file))

    first = write(data)
    assert write(data) == first
    assert write(data[:-1] + b"S") == first, "weights of the same size and time are not read"
    changed = data.replace(b'yy"}}', b'yz"}}')
    assert len(changed) == len(data)
    assert write(changed) != first, "the end of a long header is"
    assert write(data + b"s") != first
    os.utime(file, ns=(6, 6))
    assert fingerprint(str(file)) != first


def test_a_fingerprint_of_a_folder_sees_names(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "a").write_text("a")
    first = fingerprint(str(folder))
    (folder / "a").rename(folder / "b")
    assert fingerprint(str(folder)) != first


def test_only_a_commit_of_the_hub_stays_as_it_is() -> None:
    assert fingerprint("hf://me/model") is None
    assert fingerprint("hf://me/model@main/x") is None
    assert fingerprint("hf://me/model@" + "0a" * 20) is not None


# ---------------------------------------------------------------------------- hints


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("{glue: [a], output: x}", "did you mean join for glue?"),
        ("{output: x, jion: [a]}", "did you mean join?"),
        ("{join: [x], output: x}", "reads what it writes"),
        ("{join: [a, b: 0.5], output: x}", "write b:0.5, without a blank"),
        ("{join: [a], output: x, quiet: true}", "loratools run --quiet"),
        ("{join: [a], output: x, dry-run: true}", "loratools run --dry-run"),
    ],
)
def test_a_fault_says_what_to_write_instead(shop: Shop, step: str, words: str) -> None:
    with pytest.raises(LoratoolsError) as caught:
        run(shop, f"steps:\n  one: {step}\n")
    assert words in f"{caught.value.message} {caught.value.hint}"


def test_another_version_is_named(shop: Shop, monkeypatch: pytest.MonkeyPatch) -> None:
    run(shop, CHAIN)
    monkeypatch.setattr("loratools.recipes.records.__version__", "99.0")
    with pytest.raises(OutputError, match=f"loratools {__version__} made it"):
        run(shop, CHAIN)
