"""What a newcomer gets wrong, in every place where it can be: errors say what, where, what to do.

Every place that takes an adapter or a base meets every situation, for real, as a dry run and with
``--json``; the three must say the same in one line and a hint, and nothing may be written.
"""

from __future__ import annotations

import os
import shutil
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.cli import COMMANDS
from tests.hub_server import HubServer

from .conftest import WEIGHTS, Run

LONGEST = 260
"""Characters of a message that a newcomer reads to its end."""

posix = pytest.mark.skipif(os.name == "nt", reason="another meaning on Windows")


# ---------------------------------------------------------------------------- places

ADAPTER = {
    "merge": "merge base {} -o out",
    "merge with a strength": "merge base {}:0.8 -o out",
    "unmerge": "unmerge base {} -o out",
    "convert": "convert {} -o out --to peft",
    "resize": "resize {} -o out --rank 2",
    "compose": "compose adapter {} -o out",
    "rebase": "rebase {} --from base --onto tuned -o out --rank 2",
    "diff": "diff adapter {}",
    "inspect": "inspect {}",
    "push": "push {} me/x --base-model me/base --license mit",
}
BASE = {
    "merge": "merge {} adapter -o out",
    "unmerge": "unmerge {} adapter -o out",
    "unmerge --base": "unmerge base adapter -o out --base {}",
    "resize --base": "resize adapter -o out --max-size 20kB --score frobenius --base {}",
    "extract": "extract {} tuned -o out --rank 2",
    "extract tuned": "extract base {} -o out --rank 2",
    "rebase --from": "rebase adapter --from {} --onto tuned -o out --rank 2",
    "rebase --onto": "rebase adapter --from base --onto {} -o out --rank 2",
    "quantize": "quantize {} -o out --to nf4",
    "dequantize": "dequantize {} -o out",
}
NAMED = {
    "convert --base": "convert adapter -o out.gguf --to gguf --base {}",
}
"""Places where a base is named for something else than its weights."""

NO_DRY_RUN = ("diff", "inspect")


# ---------------------------------------------------------------------------- situations

Words = tuple[str, str]
"""Of the message and of the hint."""


@dataclass(frozen=True)
class Situation:
    """A path that is given, and the words by which each kind of place must answer."""

    path: str
    adapter: Words | None
    base: Words | None
    make: Callable[[Path], None] = lambda path: None


def both(path: str, said: str, hint: str, make: Callable[[Path], None]) -> Situation:
    return Situation(path, (said, hint), (said, hint), make)


def none(_: Path) -> None:
    """Make nothing."""


def wrote(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data) and None


def saved(path: Path) -> None:
    torch.save({"a": torch.ones(3)}, path)


def harmful(path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> tuple[object, ...]:
            return (print, ("harm",))

    torch.save({"a": Harmful()}, path)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("style.safetensors", b"\0" * 100)


def adapters_in(path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(path.parent / "adapter", path / name)


def files_in(path: Path) -> None:
    path.mkdir()
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(path.parent / "ink.safetensors", path / name)


def without(name: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        shutil.copytree(path.parent / "adapter", path)
        (path / name).unlink()

    return make


def cut(path: Path) -> None:
    shutil.copytree(path.parent / "adapter", path)
    os.truncate(path / WEIGHTS, 20_000)


def in_cache(path: Path) -> None:
    (path / "snapshots" / "0a1b").mkdir(parents=True)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><body>Log in</body></html>\n"
PICKLE = b"\x80\x04\x95\x10\0\0\0\0\0\0\0}\x94\x8c\x01a\x94]\x94s."
CUT_GGUF = b"GGUF" + struct.pack("<IQQ", 3, 5, 5)
FETCH = ("incomplete", "fetch the file again")

SITUATIONS: dict[str, Situation] = {
    "missing": both("nowhere", "no such file or folder: nowhere", "paths start in", none),
    "typo": both("adaptr", "no such file or folder: adaptr", "did you mean adapter?", none),
    "without its ending": both(
        "ink", "no such file or folder: ink", "did you mean ink.safetensors", none
    ),
    "in a folder that is missing": both(
        "lors/a.safetensors", "no such file", "no folder lors either; did you mean loras?",
        lambda path: files_in(path.parent.parent / "loras"),
    ),
    "id of the Hub": both("me/adapter", "me/adapter", "write hf://me/adapter", none),
    "page of the Hub": both(
        "https://huggingface.co/me/a/blob/v2/ink.safetensors", "no such file",
        "write hf://me/a@v2/ink.safetensors", none,
    ),
    "another address": both(
        "https://example.org/ink.safetensors", "no such file", "download the file", none
    ),
    "one slash": both("hf:/me/adapter", "no such file", "hf://me/adapter", none),
    "no owner": both("hf://adapter", "hf://adapter: ", "write hf://ID", none),
    "a dataset": both("hf://datasets/me/x", "a dataset", "write hf://ID", none),
    "an empty revision": both("hf://me/x@", "revision", "write hf://ID", none),
    "out of reach": both(
        "hf://me/x", "hf://me/x: not in the cache", "unset HF_HUB_OFFLINE", none
    ),
    "home": both("~/ink.safetensors", "no such file", "the shell did not replace", none),
    "pattern": both("lor*/*.bin", "no such file", "no name fits the pattern", none),
    "line end": both("no\nwhere", "no such file or folder: 'no\\nwhere'", "path", none),
    "blank at its end": both("adapter ", "'adapter '", "did you mean adapter?", none),
    "another alphabet": both("стиль", "no such file or folder: стиль", "path", none),
    "broken link": both(
        "link", "no such file", "it is a link to gone", lambda path: path.symlink_to("gone")
    ),
    "pipe": both("pipe", "neither a file nor a folder", "a file on a disk", os.mkfifo),
    "empty folder": both(
        "void", "weights in this folder", "the folder is empty", lambda path: path.mkdir()
    ),
    "folder of the cache": both("models--me--x", "weights in this", "0a1b", in_cache),
    "empty file": both("none.safetensors", "0 bytes are too few", FETCH[1], wrote(b"")),
    "Git LFS": both("lfs.safetensors", "a Git LFS pointer", "git lfs pull", wrote(POINTER)),
    "Git LFS, pickle": both("lfs.bin", "a Git LFS pointer", "git lfs pull", wrote(POINTER)),
    "Git LFS, GGUF": both("lfs.gguf", "a Git LFS pointer", "git lfs pull", wrote(POINTER)),
    "web page": both("page.safetensors", "a web page", "download the file", wrote(PAGE)),
    "web page, pickle": both("page.ckpt", "a web page", "download the file", wrote(PAGE)),
    "JSON": both(
        "answer.safetensors", 'a JSON text ({"error": "Not found"})', "a server answered",
        wrote(b'{"error": "Not found"}'),
    ),
    "text": both(
        "text.safetensors", "a text (Entry not found)", "a server answered",
        wrote(b"Entry not found"),
    ),
    "picture": both("ink.png", "a picture (PNG)", "name the weights", wrote(b"\x89PNG\r\n\x1a\n")),
    "zip": both("style.zip", "a zip archive", "unpack it", zipped),
    "zip for a pickle": both("style.pt", "a zip archive", "unpack it", zipped),
    "pickle": both("saved.safetensors", "a torch.save file", "name it .bin or .pt", saved),
    "plain pickle": both("plain.bin", "not a torch.save file", FETCH[1], wrote(PICKLE)),
    "pickle with code": both("harm.ckpt", "could run code", "safetensors version", harmful),
    "cut GGUF": both("cut.gguf", "cut.gguf: ", FETCH[1], wrote(CUT_GGUF)),
    "config alone": Situation(
        "half", ("no adapter weights", "finish the download"), ("half: an adapter", ""),
        without(WEIGHTS),
    ),
    "weights alone": Situation(
        "bare", ("adapter_config.json is missing", "put the adapter_config.json"),
        ("bare: an adapter", ""), without("adapter_config.json"),
    ),
    "cut": Situation("cut", ("truncated", FETCH[1]), ("cut: an adapter", ""), cut),
    "several": Situation(
        "run", ("holds several adapters (one, two)", "such as run/one"),
        ("no model weights", "its folders are adapters"), adapters_in,
    ),
    "several files": Situation(
        "files", ("holds several adapters (a.safetensors, b.safetensors)", "files/a.safetensors"),
        ("no model weights", "name the file itself"), files_in,
    ),
    "a base": Situation("base", ("no adapter weights", "looks like a base model"), None),
    "a base's file": Situation(
        "base/model.safetensors", ("a model's weights by their names", "name the adapter's"), None
    ),
    "an adapter": Situation("adapter", None, ("adapter: an adapter, not a base model", "")),
    "an adapter's file": Situation(
        f"adapter/{WEIGHTS}", None, (f"{WEIGHTS}: an adapter, not a base model", "")
    ),
    "a kohya file": Situation(
        "ink.safetensors", None, ("ink.safetensors: an adapter, not a base model", "")
    ),
}  # fmt: skip

NOTHING_THERE = ("missing", "typo", "id of the Hub", "one slash", "home", "pattern")
BASE_HINTS = {"merge": "the base comes first", "unmerge": "the merged model comes first"}
OTHER_BASE = "name a base model's folder or file"
"""Next steps where an adapter is given for a base."""

SEVERAL_TAKEN = ("convert", "resize", "inspect")
BASES_TAKEN = ("inspect", "push")


def cases() -> Iterator[tuple[str, list[str], Words]]:
    """Yield the id, the command line and the words of every place in every situation."""
    for name, one in SITUATIONS.items():
        for place, line in ADAPTER.items():
            taken = (name.startswith("several") and place in SEVERAL_TAKEN) or (
                name.startswith("a base") and place in BASES_TAKEN
            )
            if one.adapter and not taken:
                yield f"{name}: {place}", filled(line, one.path), one.adapter
        for place, line in BASE.items():
            if one.base:
                said, hint = one.base
                hint = BASE_HINTS.get(place, OTHER_BASE) if hint == "" else hint
                yield f"{name}: {place} (base)", filled(line, one.path), (said, hint)
        for place, line in NAMED.items():
            if one.adapter == one.base and one.adapter and name in NOTHING_THERE:
                yield f"{name}: {place} (file)", filled(line, one.path), one.adapter


def filled(line: str, path: str) -> list[str]:
    return [word.replace("{}", path) for word in line.split(" ")]


CASES = list(cases())


@pytest.fixture(scope="session")
def field(originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that holds every situation at once; nothing is ever written to it."""
    folder = tmp_path_factory.mktemp("first") / "here"
    shutil.copytree(originals, folder)
    shutil.copytree(folder / "base", folder / "tuned")
    tensors = load_file(folder / "tuned/model.safetensors")
    tuned = {name: value + 0.01 * torch.randn_like(value) for name, value in tensors.items()}
    save_file(tuned, folder / "tuned/model.safetensors", metadata={"format": "pt"})
    for one in SITUATIONS.values():
        one.make(folder / one.path)
    return folder


@pytest.fixture
def there(field: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(field)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(field.parent / "no-cache"))
    return field


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def told(err: str) -> tuple[str, str]:
    """Return the message and the hint: one line each, and nothing else."""
    lines = err.splitlines()
    assert len(lines) == 2, err
    assert lines[0].startswith("Error: ")
    assert lines[1].startswith("Hint: ")
    return lines[0].removeprefix("Error: "), lines[1].removeprefix("Hint: ")


def check(run: Run, folder: Path, arguments: list[str], said: Words, code: int) -> None:
    before = names(folder)
    outcome = run(*arguments)
    assert outcome.code == code, outcome.err
    assert outcome.out == ""
    message, hint = told(outcome.err)
    assert said[0] in message
    assert said[1] in hint
    assert len(message) <= LONGEST
    if arguments[0] not in NO_DRY_RUN and "--dry-run" not in arguments:
        dry = run(*arguments, "--dry-run")
        assert (dry.code, dry.out, dry.err) == (code, "", outcome.err)
    document = run(*arguments, "--json").document
    assert list(document) == ["schema", "error", "message", "hint"]
    assert (document["message"], document["hint"]) == (message, hint)
    assert names(folder) == before


@posix
@pytest.mark.parametrize(
    ("arguments", "said"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_what_is_given_is_named_with_the_next_step(
    there: Path, run: Run, arguments: list[str], said: Words
) -> None:
    check(run, there, arguments, said, 1)


def test_every_command_has_its_places() -> None:
    lines = (*ADAPTER.values(), *BASE.values(), *(line for line, *_ in USAGE))
    assert {name for name, _ in COMMANDS} <= {line.split(" ")[0] for line in lines}


# ---------------------------------------------------------------------------- wrong usage

USAGE: list[tuple[str, str, str]] = [
    ("merge", "Missing argument 'BASE'", "for example `loratools merge llama-3-8b"),
    ("merge base adapter", "Missing option '-o'", "loratools merge --help"),
    ("merge base adapter -o", "Option '-o' requires an argument", "loratools merge --help"),
    ("diff adapter second adapter", "extra argument (adapter)", "for example `loratools diff"),
    ("merg base adapter -o out", "No such command 'merg'", "did you mean merge"),
    ("MERGE base adapter -o out", "No such command 'MERGE'", "did you mean merge"),
    ("fuse base adapter -o out", "No such command 'fuse'", "did you mean merge?"),
    ("unfuse base adapter -o out", "No such command 'unfuse'", "did you mean unmerge?"),
    ("upload adapter me/x", "No such command 'upload'", "did you mean push?"),
    ("download me/x", "No such command 'download'", "did you mean pull?"),
    ("combine adapter second", "No such command 'combine'", "did you mean compose?"),
    ("xyzzy", "No such command 'xyzzy'", "loratools --help"),
    ("--verbose merge base", "No such option '--verbose'", "behind the command"),
    ("merge base adapter -o out --dtpye bf16", "'--dtpye'", "did you mean --dtype?"),
    ("merge base adapter -o out --force", "'--force'", "did you mean --overwrite?"),
    ("merge base adapter -o out --strength 0.5", "'--strength'", "ADAPTER:0.8"),
    ("merge base adapter -0.5 -o out", "'-0'", "ADAPTER:-0.5"),
    ("merge base -o out --lora adapter", "'--lora'", "BASE ADAPTER[:STRENGTH]..."),
    ("resize adapter -o out --dim 4", "'--dim'", "did you mean --rank?"),
    ("convert adapter -o out --format peft", "'--format'", "did you mean --to?"),
    ("push adapter me/x --token hf_x", "'--token'", "HF_TOKEN"),
    ("inspect -x.safetensors", "'-x'", "./-x.safetensors"),
    ("merge base adapter -o out --dtype bf6", "'bf6' is not one of", "did you mean bf16?"),
    ("merge base adapter -o out --dtype float16", "'float16'", "did you mean fp16?"),
    ("merge base adapter -o out --rounding nearst", "'nearst'", "did you mean nearest?"),
    ("merge base adapter -o out --device cdua", "unknown device 'cdua'", "cuda"),
    ("merge base adapter -o out --quant q8", "unknown type 'q8'", "q8_0"),
    ("merge base adapter -o out --arch sdlx", "'sdlx'", "did you mean sdxl?"),
    ("resize adapter -o out --arch sdlx --rank 2", "'sdlx'", "did you mean sdxl?"),
    ("inspect adapter --arch sdlx", "'sdlx'", "did you mean sdxl?"),
    ("convert adapter -o out --to dffusers", "unknown format 'dffusers'", "diffusers"),
    ("convert adapter -o out --to GGUF", "unknown format 'GGUF'", "did you mean gguf?"),
    ("extract base tuned -o out --rank 2 --to pefd", "unknown format", "did you mean peft"),
    ("compose adapter second -o out --method tise", "unknown method 'tise'", "did you mean ties"),
    ("compose adapter second -o out --method TIES", "unknown method", "did you mean ties"),
    ("quantize base -o out --to nf5", "unknown type 'nf5'", "nf4"),
    ("quantize base -o out --to q4km", "unknown type 'q4km'", "did you mean q4_k_m"),
    ("dequantize base -o out --dtype half", "'half' is not one of", "did you mean fp16?"),
    ("push adapter me/x --relation adaptor", "'adaptor'", "did you mean adapter?"),
    ("resize adapter -o out --rank eight", "'eight' is not a whole number", "resize --help"),
    ("diff adapter second --tolerance tiny", "'tiny' is not a number", "diff --help"),
    ("extract base tuned -o out", "how much to keep is not said", "--rank N"),
    ("extract base tuned -o out --rank 0", "smallest rank is 1", "at least 1"),
    ("rebase adapter --from base -o out --rank 2", "Missing option '--onto'", "--onto"),
    ("merge base adapter:abc -o out", "strength 'abc' after adapter", "adapter:0.8"),
    ("merge base adapter: -o out", "strength '' after adapter", "leave out the colon"),
    ("merge base adapter:0 -o out", "strength 0 after adapter", "leave the adapter out"),
    ("merge base adapter:1e400 -o out", "strength 1e400 after adapter", "adapter:0.8"),
    ("merge base adapter:0,8 -o out", "strength '0,8'", "write adapter:0.8"),
    ("merge base adapter:80% -o out", "strength '80%'", "write adapter:0.8"),
    ("merge base : -o out", "strength ''", "ADAPTER:0.8"),
    ("merge base adapter :0.5 -o out", "':0.5' has a strength but no path", "ADAPTER:0.5"),
    ("merge base hf://a/b:abc -o out", "strength 'abc' after hf://a/b", "hf://a/b:0.8"),
    ("compose adapter:x second -o out", "weight 'x' after adapter", "adapter:0.8"),
    ("unmerge base adapter:x -o out", "strength 'x' after adapter", "adapter:0.8"),
    ("merge base adapter -o hf://me/out", "hf://me/out is not on this machine", "push"),
    ("convert adapter -o https://a.b/c --to peft", "is not on this machine", "push"),
    ("demo -o hf://me/out", "is not on this machine", "push"),
    ("pull me/x", "Missing option '-o'", "for example `loratools pull"),
    ("run", "Missing argument 'RECIPE'", "for example `loratools run"),
    ("formats peft", "extra argument", "for example `loratools formats"),
    ("methods --all", "'--all'", "methods --help"),
]


@pytest.mark.parametrize(("line", "said", "hint"), USAGE, ids=[line for line, *_ in USAGE])
def test_wrong_usage_is_answered_with_what_to_write(
    there: Path, run: Run, line: str, said: str, hint: str
) -> None:
    before = names(there)
    arguments = line.split(" ")
    outcome = run(*arguments)
    assert (outcome.code, outcome.out) == (2, "")
    message, step = told(outcome.err)
    assert said in message
    assert hint in step
    if not line.endswith("-o"):
        document = run(*arguments, "--json").document
        assert (document["message"], document["hint"]) == (message, step)
    assert names(there) == before


@pytest.mark.parametrize(
    "line", ["", "help", "help merge", "merge --help", "merge base adapter -h", "--version", "-h"]
)
def test_asking_for_help(run: Run, line: str) -> None:
    outcome = run(*line.split())
    words = {"--version": "loratools, version", "help merge": "Usage: loratools merge"}
    assert words.get(line, "Usage: loratools") in outcome.out + outcome.err
    assert outcome.code == (0 if line else 2)


# ---------------------------------------------------------------------------- strengths

STRENGTHS: list[tuple[str, str, str]] = [
    ("adapter=0.8", "adapter=0.8", "adapter:0.8"),
    ("adapter@0.8", "adapter@0.8", "adapter:0.8"),
    ("adapter:0.5:0.7", "adapter:0.5", "one only"),
    ("0.8", "no such file or folder: 0.8", "ADAPTER:0.8"),
    ("nope:abc", "no such file or folder: nope:abc", "paths start in"),
    (
        r"C:\loras\style.safetensors:0.8",
        r"folder: C:\loras\style.safetensors",
        "/mnt/c/loras/style",
    ),
    ("C:/loras/style.safetensors", "C:/loras/style.safetensors", "/mnt/c/loras/style.safetensors"),
    (r"loras\a.safetensors:0.8", r"loras\a.safetensors", "did you mean loras/a.safetensors?"),
    ("hf://me/x:0.8", "hf://me/x: not in the cache", "HF_HUB_OFFLINE"),
]


@posix
@pytest.mark.parametrize(("given", "said", "hint"), STRENGTHS, ids=[row[0] for row in STRENGTHS])
@pytest.mark.parametrize("command", ["merge base", "compose second"])
def test_strengths_that_are_none(
    there: Path, run: Run, command: str, given: str, said: str, hint: str
) -> None:
    check(run, there, [*command.split(), given, "-o", "out"], (said, hint), 1)


@pytest.mark.parametrize(
    "line", [ADAPTER[name] for name in ("convert", "resize", "rebase", "diff", "inspect")]
)
def test_a_strength_where_none_is_taken(there: Path, run: Run, line: str) -> None:
    said = ("no such file or folder: adapter:0.5", "adapter is there; a strength")
    check(run, there, filled(line, "adapter:0.5"), said, 1)


# ---------------------------------------------------------------------------- outputs

OUTPUTS = {
    "merge": "merge base adapter -o {}",
    "unmerge": "unmerge base adapter -o {}",
    "convert": "convert adapter -o {} --to peft",
    "resize": "resize adapter -o {} --rank 2",
    "compose": "compose adapter second -o {}",
    "extract": "extract base tuned -o {} --rank 2",
    "rebase": "rebase adapter --from base --onto tuned -o {} --rank 2",
    "quantize": "quantize base -o {} --to nf4",
}


def is_closed(folder: str) -> bool:
    return Path(folder).is_dir() and not os.access(folder, os.W_OK)


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[str]:
    """Yield a folder in which nothing can be made, not even by root if the system has one."""
    if os.geteuid() == 0:
        found = next(filter(is_closed, ("/proc/sys", "/sys")), None)
        if found is None:
            pytest.skip("root may write everywhere here")
        yield found
        return
    folder = tmp_path / "closed"
    folder.mkdir()
    folder.chmod(0o555)
    yield str(folder)
    folder.chmod(0o755)


@posix
@pytest.mark.parametrize("line", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("below", ["out", "not/yet/there"])
def test_a_dry_run_foresees_that_the_output_cannot_be_made(
    there: Path, run: Run, closed: str, line: str, below: str
) -> None:
    said = (f"{closed} is not writable", "another output path")
    check(run, there, filled(line, f"{closed}/{below}"), said, 1)


@pytest.mark.parametrize("line", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize(
    ("output", "said"), [("second", "second: "), ("ink.safetensors/out", "is not a folder")]
)
def test_an_output_that_is_taken(there: Path, run: Run, line: str, output: str, said: str) -> None:
    before = names(there)
    for more in ([], ["--dry-run"]):
        outcome = run(*filled(line, output), *more)
        assert (outcome.code, outcome.out) == (1, "")
        message, hint = told(outcome.err)
        assert said in message
        assert "--overwrite" in hint or "another output path" in hint
    assert names(there) == before


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("merge base adapter -o base", "is the input base"),
        ("unmerge base adapter -o base/out", "lies inside the input base"),
        ("extract base tuned -o tuned", "is the input tuned"),
        ("extract base tuned -o base/x --rank 2", "lies inside the input base"),
        ("quantize base -o base --to nf4", "is the input base"),
        ("rebase adapter --from base --onto tuned -o tuned --rank 2", "is the input tuned"),
        ("resize adapter -o adapter --rank 2", "contains the input adapter"),
        ("compose adapter second -o second", "contains the input second"),
    ],
)
def test_an_output_that_is_an_input(there: Path, run: Run, line: str, said: str) -> None:
    rank = ["--rank", "2"] if line.startswith("extract") and "--rank" not in line else []
    for flag in ([], ["--overwrite"]):
        arguments = [*line.split(), *rank, *flag]
        check(run, there, arguments, (said, "another output path"), 1)


# ---------------------------------------------------------------------------- rights


@contextmanager
def as_nobody() -> Iterator[None]:
    """Drop root's rights for a while."""
    dropped = os.geteuid() == 0
    if dropped:
        os.seteuid(65534)
    try:
        yield
    finally:
        if dropped:
            os.seteuid(0)


@posix
@pytest.mark.parametrize("line", ["merge base {} -o out", "merge {} adapter -o out", "inspect {}"])
def test_what_may_not_be_read(originals: Path, run: Run, line: str) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "here"
        shutil.copytree(originals, folder)
        shutil.copytree(folder / "base", folder / "locked")
        before = Path.cwd()
        os.chdir(folder)
        try:
            # What root's Python imports on the way, nobody may not find.
            run(*filled(line, "locked"), "--json")
            for found in (Path(place), folder, *folder.rglob("*")):
                found.chmod(0o755)
            Path("locked").chmod(0)
            with as_nobody():
                outcome = run(*filled(line, "locked"))
        finally:
            os.chdir(before)
            (folder / "locked").chmod(0o755)
    assert outcome.code == 1
    message, hint = told(outcome.err)
    assert "locked" in message
    assert "Permission denied" in message
    assert "permission" in hint


# ---------------------------------------------------------------------------- parts, recipes


def test_a_plot_without_matplotlib(there: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = ("plots need matplotlib", "pip install 'loratools[plot]'")
    check(run, there, ["inspect", "adapter", "--plot", "x.png"], said, 1)


RECIPES: list[tuple[str, int, str, str]] = [
    ("a: {mrege: [base, adapter], output: out}", 2, "step a: no command", "did you mean merge"),
    ("a: {merge: [base, adapter], outputt: out}", 2, "no option 'outputt'", "did you mean output?"),
    ("a: {merge: [base, adapter], output: out, dtype: bf6}", 2, "'bf6'", "did you mean bf16?"),
    ("a: {merge: [base, adapter], output: out, arch: sdlx}", 2, "'sdlx'", "did you mean sdxl?"),
    ("a: {convert: adapter, to: dffusers, output: out}", 2, "'dffusers'", "did you mean diffusers"),
    ("a: {merge: [base, adaptr], output: out}", 1, "folder: adaptr", "did you mean adapter?"),
    ("a: {merge: [base, 'adapter:abc'], output: out}", 2, "strength 'abc'", "adapter:0.8"),
    ("a: {merge: [base, adapter], output: 'hf://me/x'}", 2, "not on this machine", "push"),
    ("a: {merge: [base, adapter]}", 2, "Missing option", "add `output: ...`"),
    ("a: {merge: [base], output: out}", 2, "Missing argument", "behind the command"),
    ("\ta: {merge: [base, adapter]}", 1, "not YAML", "by blanks"),
]


@pytest.mark.parametrize(("step", "code", "said", "hint"), RECIPES, ids=[row[0] for row in RECIPES])
def test_a_recipe_with_a_slip(
    there: Path, run: Run, tmp_path: Path, step: str, code: int, said: str, hint: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"steps:\n  {step}\n".replace("  \t", "\t"))
    before = names(there)
    outcome = run("run", recipe)
    assert (outcome.code, outcome.out) == (code, "")
    message, step_to_take = told(outcome.err)
    assert said in message
    assert "line 2" in message
    assert hint in step_to_take
    assert names(there) == before


# ---------------------------------------------------------------------------- the Hub


@pytest.fixture
def hubs(hub: HubServer, originals: Path) -> HubServer:
    """The Hub with repositories of every kind of access."""
    adapter, base = (
        {path.name: path.read_bytes() for path in (originals / name).iterdir()}
        for name in ("adapter", "base")
    )
    hub.add("me/adapter", adapter)
    hub.add("me/base", base)
    hub.add("me/private", adapter, private=True)
    hub.add("me/gated", adapter, gated=True)
    hub.add("me/gated-base", base, gated=True)
    hub.add("me/several", {f"{a}/{name}": data for a in "ab" for name, data in adapter.items()})
    return hub


PUSH = "push adapter me/x --base-model me/base --license mit"
NO_TOKEN, OTHER, WRONG = None, "hf_reader", "hf_expired1"
ACCESS: list[tuple[str | None, str, str, str]] = [
    (NO_TOKEN, "merge base hf://me/gated -o out", "me/gated: a gated", "{url}/me/gated, then run"),
    (OTHER, "merge base hf://me/gated -o out", "me/gated: a gated", "access on {url}/me/gated"),
    (OTHER, "merge hf://me/gated-base adapter -o out", "a gated", "{url}/me/gated-base"),
    (OTHER, "inspect hf://me/gated", "a gated repository", "{url}/me/gated"),
    (NO_TOKEN, "merge base hf://me/private -o out", "or a private one", "hf auth login"),
    (OTHER, "merge base hf://me/private -o out", "or a private one", "token in use has no access"),
    (NO_TOKEN, "merge base hf://me/adaptr -o out", "no such repository", "check the name"),
    (NO_TOKEN, "pull me/private -o out", "or a private one", "hf auth login"),
    (NO_TOKEN, "pull adapter -o out", "adapter: not a name of a repository", "OWNER/NAME"),
    (NO_TOKEN, "pull https://huggingface.co/me/adapter -o out", "not a name", "hf://me/adapter"),
    (NO_TOKEN, "pull me/adapter@v9 -o out", "no such revision", "a branch, a tag"),
    (NO_TOKEN, "merge base hf://me/adapter/adaptr_model.safetensors -o out", "has no adaptr_",
     "did you mean adapter_model.safetensors"),
    (NO_TOKEN, "merge base hf://me/base -o out", "no adapter weights", "looks like a base model"),
    (NO_TOKEN, "merge hf://me/adapter adapter -o out", "an adapter, not a base", "comes first"),
    (NO_TOKEN, "merge base hf://me/several -o out", "several adapters (a, b)", "hf://me/several/a"),
    (WRONG, "merge base hf://me/adapter -o out", "refused the access token", "log in again"),
]  # fmt: skip


@pytest.mark.parametrize(("token", "line", "said", "hint"), ACCESS)
def test_what_the_hub_does_not_give(
    hubs: HubServer, here: Path, run: Run, monkeypatch: pytest.MonkeyPatch,
    token: str | None, line: str, said: str, hint: str,
) -> None:  # fmt: skip
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    before = names(here)
    for more in ([], ["--dry-run"]) if not line.startswith("inspect") else ([],):
        outcome = run(*line.split(), *more)
        assert (outcome.code, outcome.out) == (1, "")
        message, step = told(outcome.err)
        assert said in message
        assert hint.format(url=hubs.url) in step
    assert names(here) == before
    assert hubs.leaks == []


@pytest.mark.parametrize(
    ("token", "said", "hint"),
    [
        (NO_TOKEN, "me/x: nobody is logged in", "hf auth login"),
        (OTHER, "does not allow this", "a token that may write"),
        (WRONG, "refused the access token", "log in again"),
    ],
)
def test_a_push_that_the_hub_does_not_take(
    hubs: HubServer, here: Path, run: Run, monkeypatch: pytest.MonkeyPatch,
    token: str | None, said: str, hint: str,
) -> None:  # fmt: skip
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    outcome = run(*PUSH.split())
    assert (outcome.code, outcome.out) == (1, "")
    message, step = told(outcome.err)
    assert said in message
    assert hint in step
    assert "me/x" not in hubs.repos


def test_a_dry_push_says_that_nobody_is_logged_in(
    hubs: HubServer, here: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = [*PUSH.split(), "--dry-run"]
    assert "logged in" not in run(*line).err
    monkeypatch.delenv("HF_TOKEN")
    outcome = run(*line)
    assert outcome.code == 0
    assert "Warning: nobody is logged in" in outcome.err


def test_no_network(here: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here.parent / "cache"))
    said = ("hf://me/x: no answer from http://127.0.0.1:9", "check the network")
    check(run, here, ["merge", "base", "hf://me/x", "-o", "out"], said, 1)


# ---------------------------------------------------------------------------- plans


def test_a_dry_extraction_says_what_it_would_read_and_write(here: Path, run: Run) -> None:
    shutil.copytree(here / "base", here / "tuned")
    tensors = load_file(here / "tuned/model.safetensors")
    changed = {name: value.half() + 1 for name, value in tensors.items()}
    save_file(changed, here / "tuned/model.safetensors", metadata={"format": "pt"})
    line = ["extract", "base", "tuned", "-o", "out", "--rank", "2", "--dtype", "fp16", "--json"]
    planned = run(*line, "--dry-run").document["facts"]
    assert not (here / "out").exists()
    done = run(*line).document["facts"]
    written = load_file(here / "out" / WEIGHTS).values()
    read = [*tensors.values(), *changed.values()]
    for facts in (planned, done):
        assert facts["bytes_written"] == sum(tensor.nbytes for tensor in written)
        assert facts["bytes_read"] == sum(tensor.nbytes for tensor in read)
