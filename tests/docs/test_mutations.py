"""``make docs`` fails for what is left out: each mutation of the code is seen by its checks.

A plugin changes one table before anything else is loaded; the checks then run as they always do.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from .test_commands import ROOT


@dataclass(frozen=True)
class Mutation:
    """A change of the code, and which checks must see it.

    Attributes:
        code: what the plugin does.
        checks: a choice of tests, as pytest's ``-k`` takes it; all others would run too long.
        seen: a part of the output of those that fail.
    """

    code: str
    checks: str
    seen: str


MUTATIONS: Mapping[str, Mutation] = {
    "nothing": Mutation("", "test_tables or test_generated or json_envelope", ""),
    "a command": Mutation(
        "from loratools import cli\n"
        "from loratools._cli import formats\n"
        "sys.modules['loratools._cli.frobnicate'] = formats\n"
        "cli.COMMANDS = (*cli.COMMANDS, ('frobnicate', 'Frobnicate.'))\n",
        "test_tables or test_generated",
        "frobnicate",
    ),
    "an option": Mutation(
        "import click\n"
        "from loratools._cli import merge\n"
        "merge.command.params.append(click.Option(['--frobnicate'], help='Frobnicate.'))\n",
        "test_generated and merge.md",
        "frobnicate",
    ),
    "a help text": Mutation(
        "from loratools._cli import merge\nmerge.command.params[-4].help = 'Frobnicate OUT.'\n",
        "test_generated and merge.md",
        "Frobnicate OUT",
    ),
    "a format": Mutation(
        "import loratools.formats as formats\n"
        "row = dataclasses.replace(formats.FORMATS[0], name='frobnicate')\n"
        "formats.FORMATS = (*formats.FORMATS, row)\n",
        "test_tables or test_generated",
        "frobnicate",
    ),
    "an operation that a format takes part in": Mutation(
        "import loratools.formats as formats\n"
        "*rows, last = formats.FORMATS\n"
        "formats.FORMATS = (*rows, dataclasses.replace(last, extracts=True))\n",
        "test_generated and README",
        "cloneofsimo",
    ),
    "a method": Mutation(
        "import loratools.merge_methods as methods\n"
        "row = dataclasses.replace(methods.METHODS[0], name='frobnicate')\n"
        "methods.METHODS = (*methods.METHODS, row)\n",
        "test_tables",
        "frobnicate",
    ),
    "a public name": Mutation(
        "import loratools\nloratools.__all__.append('frobnicate')\n",
        "test_generated and public",
        "frobnicate",
    ),
    "an example's output": Mutation(
        "from loratools._cli import output\n"
        "output._DONE['diff'] = ('frobnicated', 'frobnicated')\n",
        "print_what_the_page_says and diff.md",
        "frobnicated ink",
    ),
    "an example that fails": Mutation(
        "import loratools.verify\ndel loratools.verify.compare_adapters\n",
        "print_what_the_page_says and diff.md",
        "compare_adapters",
    ),
    "Python that fails": Mutation(
        "import loratools\ndel loratools._HOMES['load_adapter']\n",
        "test_python_runs and api.md",
        "load_adapter",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_the_checks_see(name: str, tmp_path: Path) -> None:
    mutation = MUTATIONS[name]
    (tmp_path / "mutation.py").write_text(f"import dataclasses, sys\n{mutation.code}", "utf-8")
    paths = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    # What a run of many processes says of itself is none of this one's business.
    names = {key: word for key, word in os.environ.items() if not key.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "mutation", "-p", "no:cacheprovider",
         "-n", "0", "tests/docs", "-k", mutation.checks],
        check=False, cwd=ROOT, capture_output=True, text=True, env=names | {"PYTHONPATH": paths},
    )  # fmt: skip
    assert done.returncode == (1 if mutation.seen else 0), done.stdout
    assert mutation.seen in done.stdout
