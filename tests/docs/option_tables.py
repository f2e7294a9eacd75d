"""The table of a command's options, from what click knows of them."""

from __future__ import annotations

import re
from importlib import import_module

import click

from .regions import prose, table

SHARED = ("json", "quiet", "verbose")
"""Options that every command has; one row speaks of the three."""
EVERYWHERE = (
    "`--json`, `-q`/`--quiet`, `-v`/`--verbose`",
    "[as everywhere](index.md#what-every-command-does)",
)


def options_table(name: str) -> str:
    """Return the Markdown table of a command's options, in the order of its help."""
    params = import_module(f"loratools._cli.{name}").command.params
    options = [param for param in params if isinstance(param, click.Option)]
    rows = [(_words(option), _meaning(option)) for option in options if option.name not in SHARED]
    return table(("option", "meaning"), [*rows, EVERYWHERE])


def _words(option: click.Option) -> str:
    """Return ``-o``, ``--output OUT``."""
    metavar = option.metavar or ("" if option.is_flag else _type_word(option))
    *short, long = sorted(option.opts, key=len)
    return ", ".join([*(f"`{word}`" for word in short), f"`{f'{long} {metavar}'.strip()}`"])


def _type_word(option: click.Option) -> str:
    return "" if isinstance(option.type, click.Choice) else option.type.name.split()[0].upper()


def _meaning(option: click.Option) -> str:
    text, _, default = (option.help or "").partition(" [default: ")
    parts = [prose(text)]
    if isinstance(option.type, click.Choice):
        values = [f"`{choice}`" for choice in option.type.choices]
        parts.append(f"One of {', '.join(values)}." if len(values) > 1 else f"Only {values[0]}.")
    if default:
        parts.append(f"Default: {prose(default.rstrip(']'))}.")
    elif option.show_default and not option.is_flag:
        parts.append(f"Default: `{_value(option.default)}`.")
    if option.required:
        parts.append("**Required.**")
    return " ".join(parts)


def _value(default: object) -> str:
    return re.sub(r"e-0(\d)$", r"e-\1", f"{default}")
