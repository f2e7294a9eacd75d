"""The rules of the house that a tool can check: layers, lazy imports, tables, sizes, picture."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "loratools"
SOURCES = sorted(PACKAGE.rglob("*.py"))

LONGEST_FUNCTION = 60
LONGEST_FILE = 500
ROWS = {PACKAGE / "keymaps"}
"""Folders whose files are tables of rows, which may be as long as the world they list."""


def identify(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def run_python(code: str) -> str:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout


def test_imports_run_downwards_only() -> None:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("module", ["loratools", "loratools.cli", "loratools.tensorfiles.header"])
def test_starts_without_torch(module: str) -> None:
    heavy = ("torch", "numpy", "transformers", "gguf")
    code = f"import sys, {module}; print(*[name for name in {heavy} if name in sys.modules])"
    assert run_python(code).split() == []


def test_every_format_has_its_row() -> None:
    modules = modules_of("loratools.formats")
    defined = {
        name: module.FORMAT.name for name, module in modules.items() if "FORMAT" in vars(module)
    }
    rows = importlib.import_module("loratools.formats").FORMATS
    assert {row.module: row.name for row in rows} == defined
    assert len({row.name for row in rows}) == len(rows)


def test_every_delta_is_listed() -> None:
    deltas = importlib.import_module("loratools.deltas")
    defined = {
        found
        for module in modules_of("loratools.deltas").values()
        for found in vars(module).values()
        if inspect.isclass(found)
        and issubclass(found, deltas.LayerDelta)
        and not inspect.isabstract(found)
    }
    assert set(deltas.DELTAS) == defined
    assert len({delta.kind for delta in deltas.DELTAS}) == len(deltas.DELTAS)


def modules_of(package: str) -> dict[str, ModuleType]:
    """Return the modules directly inside a package, imported, by full name."""
    path = importlib.import_module(package).__path__
    names = [f"{package}.{found.name}" for found in pkgutil.iter_modules(path)]
    return {name: importlib.import_module(name) for name in names}


@pytest.mark.parametrize("path", SOURCES, ids=identify)
def test_no_function_is_long(path: Path) -> None:
    lengths = dict(body_lengths(ast.parse(path.read_text("utf-8"))))
    assert {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("path", SOURCES, ids=identify)
def test_no_file_is_long(path: Path) -> None:
    if not ROWS & set(path.parents):
        assert len(path.read_text("utf-8").splitlines()) <= LONGEST_FILE


def body_lengths(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield each function's name and the lines from its first statement after the docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            first = body[0].lineno if body else node.end_lineno
            yield f"{node.name}:{node.lineno}", node.end_lineno - first + 1


def test_every_module_is_in_the_picture() -> None:
    found = {path.stem if path.suffix else f"{path.name}/" for path in top_level()}
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    tree = text.partition("```\nloratools/\n")[2].partition("```")[0]
    drawn = set(re.findall(r"^[├└]── (\w+(?:/|(?=\.py)))", tree, flags=re.MULTILINE))
    assert found - drawn == set()


def top_level() -> Iterator[Path]:
    """Yield the modules and packages directly under ``loratools``; an empty folder is neither."""
    yield from PACKAGE.glob("*.py")
    yield from {path.parent for path in PACKAGE.glob("*/*.py")}


def test_hooks_use_the_locked_versions() -> None:
    lock = (ROOT / "requirements/dev.txt").read_text("utf-8")
    hooks = (ROOT / ".pre-commit-config.yaml").read_text("utf-8")
    for tool in ("ruff", "codespell"):
        (locked,) = re.findall(rf"^{tool}==([\w.]+)$", lock, re.MULTILINE)
        assert set(re.findall(rf'"{tool}==([\w.]+)"', hooks)) == {locked}
