"""Help, twins, start-up: what the command line promises before it does anything."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import pytest

from loratools import __version__, merge_into_base, summarize_files, unmerge_from_base
from loratools._cli.usage import HELP
from loratools.cli import COMMANDS
from loratools.compose import compose_adapters
from loratools.convert import convert_adapter
from loratools.demo import run_demo
from loratools.extract import extract_adapter
from loratools.formats import FORMATS, get_format
from loratools.pull import pull_from_hub
from loratools.push import push_to_hub
from loratools.quantize import dequantize_base, quantize_base
from loratools.rebase import rebase_adapter
from loratools.svd_resize import resize_adapter
from loratools.verify import compare_adapters
from tests.gguf_demo import write_demo_gguf
from tests.hub_server import HubServer
from tests.image_adapters import write_kohya_sdxl

from .conftest import Run

NAMES = [name for name, _ in COMMANDS]
TWINS: dict[str, Callable[..., Any]] = {
    "merge": merge_into_base,
    "unmerge": unmerge_from_base,
    "convert": convert_adapter,
    "resize": resize_adapter,
    "compose": compose_adapters,
    "extract": extract_adapter,
    "rebase": rebase_adapter,
    "diff": compare_adapters,
    "inspect": summarize_files,
    "demo": run_demo,
    "quantize": quantize_base,
    "dequantize": dequantize_base,
    "push": push_to_hub,
    "pull": pull_from_hub,
}
GGUF_MODELS = {
    "model-f16.gguf": "F16",
    "base.gguf": "F16",
    "model-q4_k_m.gguf": "Q4_0",
    "model-q8_0.gguf": "Q8_0",
}
WITHOUT_TWIN = {"formats", "methods", "run"}
SEVERAL = {"convert": {"adapters": "adapter"}, "resize": {"adapters": "adapter"}}
"""Commands that call their twin for each of several inputs: their word → the twin's."""
SHARED = {"json", "quiet", "verbose"}
"""How a command speaks: no business of the library."""

LIMIT = 0.3
"""Seconds, DESIGN.md §5."""


def command(name: str) -> click.Command:
    found: click.Command = import_module(f"loratools._cli.{name}").command
    return found


def examples(name: str) -> list[str]:
    """Return the command lines of an epilog."""
    _, _, lines = (command(name).epilog or "").partition("Examples:\n")
    return [line.strip() for line in lines.splitlines()]


def all_examples() -> Iterator[tuple[str, str]]:
    for name in NAMES:
        yield from ((name, line) for line in examples(name))


# ---------------------------------------------------------------------------- help


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(run: Run, name: str, flag: str) -> None:
    outcome = run(name, flag)
    assert outcome.code == 0
    assert outcome.err == ""
    assert outcome.out.startswith(f"Usage: loratools {name} [OPTIONS]")
    for line in examples(name):
        assert f"\n    {line}\n" in outcome.out


@pytest.mark.parametrize("name", NAMES)
def test_two_examples_or_three(name: str) -> None:
    lines = examples(name)
    assert len(lines) in (2, 3)
    assert all(line.startswith(f"loratools {name}") for line in lines)


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_explained(name: str) -> None:
    options = [param for param in command(name).params if isinstance(param, click.Option)]
    assert [option.name for option in options if not option.help] == []


def test_the_group_lists_every_command(run: Run) -> None:
    lines = run("--help").out.splitlines()
    for name, text in COMMANDS:
        assert any(line.split(maxsplit=1) == [name, text] for line in lines)


def test_the_version(run: Run) -> None:
    assert run("--version").out == f"loratools, version {__version__}\n"


# ---------------------------------------------------------------------------- examples


@pytest.fixture
def named_as_in_examples(here: Path, run: Run) -> Path:
    """Return a working directory where every file that the examples name exists."""
    (here / "base").rename(here / "llama-3-8b")
    (here / "adapter").rename(here / "my-adapter")
    for name in ("style", "task"):
        shutil.copytree(here / "second", here / name)
    shutil.copytree(here / "llama-3-8b", here / "base")
    shutil.copytree(here / "my-adapter", here / "other-adapter")
    write_qlora(here)
    write_kohya_sdxl(here / "style.safetensors")
    for name, kind in GGUF_MODELS.items():
        write_demo_gguf(here / "base", here / name, kind)
    recipe = "steps:\n  small: {resize: my-adapter, rank: 2, output: small}\n"
    (here / "recipe.yaml").write_text(recipe, "utf-8")
    (here / "loras").mkdir()
    for number in (1, 2):
        write_kohya_sdxl(here / f"loras/{number}.safetensors", seed=number)
    assert run("merge", "llama-3-8b", "my-adapter:0.7", "-o", "given", "-q").code == 0
    shutil.copytree(here / "given", here / "my-finetune")
    return here


def write_qlora(here: Path) -> None:
    """Write my-qlora, which records a base that is quantised, of which the config is there."""
    shutil.copytree(here / "my-adapter", here / "my-qlora")
    (here / "llama-nf4-base").mkdir()
    words = json.loads((here / "llama-3-8b/config.json").read_text("utf-8"))
    words["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    }  # fmt: skip
    (here / "llama-nf4-base/config.json").write_text(json.dumps(words), "utf-8")
    config = here / "my-qlora/adapter_config.json"
    fields = json.loads(config.read_text("utf-8"))
    fields["base_model_name_or_path"] = "llama-nf4-base"
    config.write_text(json.dumps(fields), "utf-8")


def fill_hub(hub: HubServer, folder: Path) -> None:
    """Put on the Hub what the examples take to be there."""
    adapter = {file.name: file.read_bytes() for file in (folder / "my-adapter").iterdir()}
    hub.add("me/my-adapter", adapter)
    hub.add("me/llama-3-8b", {"README.md": b"---\nlicense: llama3\n---\n"})
    loras = hub.add("me/loras", {"ink.safetensors": (folder / "style.safetensors").read_bytes()})
    loras.tags["v2"] = loras.branches["main"]


@pytest.mark.parametrize(("name", "line"), list(all_examples()))
def test_examples_run(
    named_as_in_examples: Path, run: Run, name: str, line: str, request: pytest.FixtureRequest
) -> None:
    if name in ("push", "pull"):
        fill_hub(request.getfixturevalue("hub"), named_as_in_examples)
    if name in ("unmerge", "push"):
        (named_as_in_examples / "given").rename("merged")
    words = [
        found
        for word in shlex.split(line.partition("|")[0])[1:]
        for found in (sorted(map(str, Path().glob(word))) if "*" in word else [word])
    ]
    if name == "diff" and "style-diffusers.safetensors" in words:
        files = ("style.safetensors", "-o", "style-diffusers.safetensors")
        assert run("convert", *files, "--to", "diffusers", "-q").code == 0
    outcome = run(*words)
    assert outcome.code == 0, outcome.err
    for flag in ("-o", "--output"):
        if flag in words and "--dry-run" not in words:
            assert Path(words[words.index(flag) + 1]).exists()


def test_filters_in_examples_name_real_keys(run: Run) -> None:
    """A ``jq '.items[].KEY'`` after the bar asks for a key that the items have."""
    filters = {
        name: line.partition("| jq ")[2].strip("'")
        for name, line in all_examples()
        if "| jq" in line
    }
    assert filters.keys() == {"formats", "methods"}
    for name, text in filters.items():
        key = text.rpartition(".")[2]
        assert text == f".items[].{key}"
        assert all(key in item for item in run(name, "--json").document["items"])


# ---------------------------------------------------------------------------- twins


def test_every_command_has_a_twin() -> None:
    assert TWINS.keys() | WITHOUT_TWIN == set(NAMES)


@pytest.mark.parametrize("name", TWINS)
def test_options_are_the_parameters_of_the_twin(name: str) -> None:
    parameters = inspect.signature(TWINS[name]).parameters
    several = SEVERAL.get(name, {})
    words = [param.name or "" for param in command(name).params]
    offered = {several.get(word, word) for word in words}
    assert offered >= SHARED
    assert offered - SHARED == parameters.keys() - {"progress"}


REQUIRED = {
    "merge": ["base", "adapter", "-o", "out"],
    "unmerge": ["merged", "-o", "out"],
    "convert": ["adapter", "-o", "out", "--to", "kohya"],
    "resize": ["adapter", "-o", "out"],
    "compose": ["adapter", "-o", "out"],
    "extract": ["base", "tuned", "-o", "out"],
    "rebase": ["adapter", "--from", "a", "--onto", "b", "--rank", "0"],
    "diff": ["adapter", "second"],
    "inspect": ["adapter"],
    "demo": [],
    "quantize": ["base", "-o", "out"],
    "dequantize": ["base", "-o", "out"],
    "push": ["adapter", "me/x"],
    "pull": ["me/x", "-o", "out"],
}
"""The least that each command must be given."""


@pytest.mark.parametrize("name", TWINS)
def test_defaults_are_those_of_the_twin(name: str) -> None:
    parameters = inspect.signature(TWINS[name]).parameters
    values = command(name).make_context(name, list(REQUIRED[name]), **HELP).params
    optional = {
        key: value.default for key, value in parameters.items() if value.default is not value.empty
    }
    optional.pop("progress", None)
    assert {key: values[key] for key in optional} == optional


def test_every_command_takes_the_shared_options() -> None:
    for name in NAMES:
        assert {param.name for param in command(name).params} >= SHARED


# ---------------------------------------------------------------------------- formats


def test_the_listing_says_what_the_records_say(run: Run) -> None:
    """The command has its own words for them, because the records need torch."""
    items = {item["format"]: item for item in run("formats", "--json").document["items"]}
    assert list(items) == [row.name for row in FORMATS]
    for name, item in items.items():
        record = get_format(name)
        assert item["read"]
        assert item["write"] == (not record.read_only)
        assert set(item["kinds"]) == record.holds
        assert item["title"] in record.title


# ---------------------------------------------------------------------------- start-up

LIGHT = {
    "help": (["--help"], {}),
    "version": (["--version"], {}),
    "formats": (["formats"], {}),
    "methods": (["methods"], {}),
    "merge help": (["merge", "--help"], {}),
    "run help": (["run", "--help"], {}),
    "completion of a format": (
        [],
        {
            "_LORATOOLS_COMPLETE": "bash_complete",
            "COMP_WORDS": "loratools convert a --to ",
            "COMP_CWORD": "4",
        },
    ),
    "completion of a method": (
        [],
        {
            "_LORATOOLS_COMPLETE": "bash_complete",
            "COMP_WORDS": "loratools compose a b --method core",
            "COMP_CWORD": "5",
        },
    ),
    "completion of an architecture": (
        [],
        {
            "_LORATOOLS_COMPLETE": "bash_complete",
            "COMP_WORDS": "loratools convert a --arch s",
            "COMP_CWORD": "4",
        },
    ),
    "completion": (
        [],
        {"_LORATOOLS_COMPLETE": "bash_complete", "COMP_WORDS": "loratools me", "COMP_CWORD": "1"},
    ),
}


def start(arguments: list[str], environment: dict[str, str], *python: str) -> tuple[str, str]:
    command_line = [sys.executable, *python, "-m", "loratools", *arguments]
    root = str(Path(__file__).parents[2])
    places = os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    everything = os.environ | {"PYTHONPATH": places} | environment
    done = subprocess.run(command_line, check=True, capture_output=True, text=True, env=everything)
    return done.stdout, done.stderr


@pytest.mark.parametrize("case", LIGHT)
def test_answers_without_torch(case: str) -> None:
    out, imported = start(*LIGHT[case], "-X", "importtime")
    assert out
    modules = {line.rpartition("|")[2].strip() for line in imported.splitlines()}
    assert "loratools.cli" in modules
    assert modules & {"torch", "numpy", "rich", "safetensors", "huggingface_hub"} == set()


@pytest.mark.parametrize("case", LIGHT)
def test_answers_at_once(case: str) -> None:
    def seconds() -> float:
        before = time.perf_counter()
        start(*LIGHT[case])
        return time.perf_counter() - before

    # The best of a few: what the machine does beside is not the question.
    taken: list[float] = []
    while len(taken) < 5 and min(taken, default=LIMIT) >= LIMIT:
        taken.append(seconds())
    assert min(taken) < LIMIT


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("loratools me", "plain,merge"),
        ("loratools merge --o", "plain,--output"),
        ("loratools -", "plain,--version"),
        ("loratools merge ba", "file,ba"),
        ("loratools merge base ad", "file,ad"),
        ("loratools merge base adapter -o me", "file,me"),
        ("loratools convert a --to dif", "plain,diffusers"),
        ("loratools compose a --to kohy", "plain,kohya"),
        ("loratools compose a b --method core-t", "plain,core-ties"),
        ("loratools merge b a --arch sdx", "plain,sdxl"),
        ("loratools merge b a --dtype bf", "plain,bf16"),
    ],
)
def test_completion(words: str, offered: str) -> None:
    position = str(len(words.split()) - 1)
    asked = {"_LORATOOLS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": position}
    out, _ = start([], asked)
    assert offered in out.splitlines()


def test_completion_offers_formats_that_are_written_and_all_methods() -> None:
    from loratools._cli.options import ARCH_NAME, FORMAT_NAME, METHOD_NAME
    from loratools.keymaps.registry import ARCHITECTURES
    from loratools.merge_methods import METHODS

    assert list(FORMAT_NAME.names()) == [
        row.name for row in FORMATS if not get_format(row.name).read_only
    ]
    assert list(METHOD_NAME.names()) == [row.name for row in METHODS]
    assert set(ARCH_NAME.names()) == {one.id for one in ARCHITECTURES}


# ---------------------------------------------------------------------------- wrong usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["merg"], "did you mean merge"),
        (["infect", "x"], "did you mean inspect?"),
        (["xyzzy"], "No such command 'xyzzy'."),
        (["merge"], "Missing argument 'BASE'"),
        (["merge", "b"], "Missing argument 'ADAPTER[:STRENGTH]...'"),
        (["merge", "b", "a"], "Missing option '-o' / '--output'"),
        (["merge", "b", "a", "-o", "x", "--dtpye", "bf16"], "did you mean --dtype?"),
        (["merge", "b", "a", "-o", "x", "--dtype", "fp8"], "'keep', 'fp32', 'bf16', 'fp16'"),
        (["formats", "x"], "unexpected extra argument"),
        (["inspect"], "Missing argument 'PATH...'"),
        (["convert", "a", "-o", "x"], "Missing option '--to'"),
        (["diff", "a"], "Missing argument 'B'"),
    ],
)
def test_wrong_usage(here: Path, run: Run, arguments: list[str], message: str) -> None:
    outcome = run(*arguments)
    assert outcome.code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("Error: ")
    assert message in outcome.err
    assert "\nHint: " in outcome.err
    assert "see `loratools" in outcome.err


def test_no_command_shows_the_help(run: Run) -> None:
    outcome = run()
    assert outcome.code == 2
    assert "Usage: loratools [OPTIONS] COMMAND" in outcome.err
    assert outcome.out == ""


def test_no_command_is_no_error_message(run: Run) -> None:
    assert run().err.startswith("Usage: loratools")
