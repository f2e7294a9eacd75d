"""``loratools inspect``."""

from __future__ import annotations

from typing import Any

import click

from loratools._cli.batch import split_inputs
from loratools._cli.options import ADAPTER, ARCH, OUT, PATH, examples, output_options
from loratools._cli.output import Output
from loratools._cli.startup import import_torch


@click.command(
    "inspect",
    epilog=examples(
        "loratools inspect my-adapter --base llama-3-8b --json",
        "loratools inspect style.safetensors --spectrum --plot style.html",
    ),
)
@click.argument("paths", nargs=-1, required=True, type=ADAPTER, metavar="PATH...")
@click.option(
    "--base",
    type=PATH,
    metavar="BASE",
    help="The adapter's base, to state its share of the parameters.",
)
@click.option(
    "--spectrum",
    is_flag=True,
    help="Add singular values: effective ranks, energies, suggested ranks.",
)
@click.option(
    "--alignment",
    is_flag=True,
    help="Compare the adapters pairwise: cosines of ΔW, angles of their spaces.",
)
@ARCH
@click.option(
    "--plot",
    type=OUT,
    metavar="FILE",
    help="Draw the spectrum of one adapter, or the alignment of several: FILE.png, .svg or .html.",
)
@click.option("--overwrite", is_flag=True, help="Replace FILE if it exists.")
@output_options
def command(paths: tuple[str, ...], out: Output, **options: Any) -> int:
    """Say what is in each PATH: an adapter (format, ranks, targets, oddities) or a base model.

    Of a folder of adapters, each is described.
    """
    import_torch()
    from loratools.summary import summarize_files

    found, many = split_inputs(paths)
    reports = summarize_files(found, **options)
    out.reports(reports, many=many)
    return int(any(report.facts["what"] == "unreadable" for report in reports))
