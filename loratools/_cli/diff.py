"""``loratools diff``."""

from __future__ import annotations

from typing import Any

import click

from loratools._cli.options import ADAPTER, ARCH, PATH, examples, output_options
from loratools._cli.output import Output
from loratools._cli.startup import import_torch


@click.command(
    "diff",
    epilog=examples(
        "loratools diff style.safetensors style-diffusers.safetensors",
        "loratools diff my-adapter other-adapter -v --tolerance 1e-3",
    ),
)
@click.argument("first", type=ADAPTER, metavar="A")
@click.argument("second", type=ADAPTER, metavar="B")
@ARCH
@click.option(
    "--base",
    type=PATH,
    metavar="BASE",
    help="The language model of GGUF adapters (folder, config.json or GGUF file), where the files "
    "do not tell.",
)
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    default=1e-5,
    show_default=True,
    help="Largest relative difference of ΔW that counts as the same.",
)
@output_options
def command(first: str, second: str, out: Output, **options: Any) -> int:
    """Compare two adapters in ΔW, whatever their formats; exit 1 if they differ."""
    import_torch()
    from loratools.verify import compare_adapters

    report = compare_adapters(first, second, **options)
    out.report(report)
    return 0 if report.facts["same"] else 1
