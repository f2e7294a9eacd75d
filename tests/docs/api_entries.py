"""The reference of the public names, from their signatures and docstrings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import griffe

from loratools.cli import COMMANDS

from .regions import table

ROOT = Path(__file__).parents[2]
_ONE_LINE = 88


@cache
def _package() -> griffe.Module:
    loaded = griffe.load("loratools", search_paths=[ROOT])
    assert isinstance(loaded, griffe.Module)
    return loaded


def _target(name: str) -> griffe.Object:
    found = _package()[name]
    target = found.final_target if found.is_alias else found
    assert isinstance(target, griffe.Object)
    return target


def api_entries(names: str) -> str:
    """Return the entries of public names with spaces between them."""
    return "\n\n".join(_entry(name) for name in names.split())


def _entry(name: str) -> str:
    target = _target(name)
    parts = [f"### {name}"]
    if isinstance(target, griffe.Function):
        parts.append(f"```python signature\n{signature(target)}\n```")
    parts += _sections(target)
    if isinstance(target, griffe.Class):
        parts += _methods(target)
    command = next((word for word, _ in COMMANDS if _is_twin(word, name)), None)
    if command and isinstance(target, griffe.Function):
        parts.append(
            f"On the command line: [`loratools {command}`]({command}.md). "
            f"The report's keys: [{command}](json.md#{command})."
        )
    return "\n\n".join(parts)


def _is_twin(command: str, function: str) -> bool:
    source = (ROOT / f"loratools/_cli/{command}.py").read_text("utf-8")
    return re.search(rf"import (?:\w+, )*{function}\b", source) is not None


# ── signatures ───────────────────────────────────────────────────────────────────────────────


def signature(function: griffe.Function, *, bound: bool = False) -> str:
    """Return a function's signature: on one line if it is short, else an argument a line."""
    words = list(_arguments(list(function.parameters)[1 if bound else 0 :]))
    ending = f") -> {function.returns}"
    line = f"{function.name}({', '.join(words)}{ending}"
    if len(line) <= _ONE_LINE:
        return line
    return f"{function.name}(\n" + "".join(f"    {word},\n" for word in words) + ending


def _arguments(parameters: Iterable[griffe.Parameter]) -> Iterator[str]:
    named = False
    for one in parameters:
        if one.kind is griffe.ParameterKind.keyword_only and not named:
            named = True
            yield "*"
        default = f" = {_value(one.default)}" if one.default is not None else ""
        yield f"{one.name}: {one.annotation}{default}"


def _value(default: str | griffe.Expr) -> str:
    """Return a default as it is typed; a constant of ours as what it stands for."""
    if isinstance(default, griffe.ExprName) and default.canonical_path.startswith("loratools."):
        module, _, constant = default.canonical_path.rpartition(".")
        return _value(repr(getattr(import_module(module), constant)))
    return str(default).replace("'", '"')


# ── docstrings ───────────────────────────────────────────────────────────────────────────────


def _parsed(target: griffe.Object) -> list[griffe.DocstringSection]:
    if target.docstring is None:
        return []
    return target.docstring.parse("google", returns_named_value=False, warnings=False)


def _sections(target: griffe.Object) -> Iterator[str]:
    for section in _parsed(target):
        kind = section.kind
        if kind is griffe.DocstringSectionKind.text:
            yield from (_line(part) for part in section.value.split("\n\n"))
        elif kind is griffe.DocstringSectionKind.parameters:
            rows = [(f"`{one.name}`", _line(one.description)) for one in section.value]
            yield table(("argument", "meaning"), rows)
        elif kind is griffe.DocstringSectionKind.attributes:
            yield table(
                ("attribute", "type", "meaning"),
                [
                    (
                        f"`{one.name}`",
                        f"`{one.annotation}`".replace("|", "\\|"),
                        _line(one.description),
                    )
                    for one in section.value
                ],
            )
        elif kind is griffe.DocstringSectionKind.returns:
            yield "Returns " + _line(section.value[0].description)
        elif kind is griffe.DocstringSectionKind.raises:
            rows = [
                (f"`{str(one.annotation).strip('()')}`", _line(one.description))
                for one in section.value
            ]
            yield table(("raises", "when"), rows)
        else:
            raise ValueError(f"{target.path}: no form for a section of {kind.value}")


def _methods(target: griffe.Class) -> Iterator[str]:
    rows = []
    for name, member in target.members.items():
        if name.startswith("_") or member.docstring is None:
            continue
        call = name
        if isinstance(member, griffe.Function):
            call = signature(member, bound=True).replace("|", "\\|")
        rows.append((f"`{call}`", _line(member.docstring.value)))
    if rows:
        yield table(("method or property", "meaning"), rows)


def _line(text: str) -> str:
    """Return a paragraph of a docstring on one line, as Markdown."""
    flat = " ".join(text.split()).replace("``", "`")
    pieces = re.split(r"(`[^`]+`)", flat)
    return "".join(
        piece if piece.startswith("`") else re.sub(r"([*<_])", r"\\\1", piece) for piece in pieces
    ).replace("|", "\\|")


# ── what signatures and tables of errors name ────────────────────────────────────────────────


def type_table(_: str) -> str:
    """Return what the words in signatures that are not Python's stand for."""
    rows = {}
    for name in public_names():
        target = _target(name)
        if isinstance(target, griffe.Function):
            for annotation in (one.annotation for one in target.parameters):
                rows |= dict(_aliases(annotation))
    return table(
        ("word", "what it stands for"), [(f"`{word}`", rows[word]) for word in sorted(rows)]
    )


def _aliases(annotation: object) -> Iterator[tuple[str, str]]:
    if not isinstance(annotation, griffe.Expr):
        return
    for part in annotation.iterate(flat=True):
        if isinstance(part, griffe.ExprName) and part.canonical_path.startswith("loratools."):
            found = _follow(part.canonical_path)
            if isinstance(found, griffe.Attribute):
                value = f"`{found.value}`".replace("|", "\\|")
                said = f": {_line(found.docstring.value)}" if found.docstring else ""
                yield part.name, value + said


def _follow(path: str) -> griffe.Object:
    found = _package()[path.removeprefix("loratools.")]
    target = found.final_target if found.is_alias else found
    assert isinstance(target, griffe.Object)
    return target


def error_tree(_: str) -> str:
    """Return the tree of errors that the module draws."""
    docstring = _package()["errors"].docstring
    assert docstring is not None
    drawn = [line[4:] for line in docstring.value.splitlines() if line.startswith("    ")]
    return "```text\n" + "\n".join(drawn) + "\n```"


def public_names() -> list[str]:
    """Return what ``from loratools import *`` would give."""
    return [str(name) for name in _package().exports or ()]
