"""``loratools compose``."""

from __future__ import annotations

from typing import Any

import click

from loratools._cli.options import (
    ADAPTER_OUT,
    ARCH,
    DRY_RUN,
    FORMAT_NAME,
    METHOD_NAME,
    OVERWRITE,
    PATH,
    Strengths,
    adapters_argument,
    dtype_option,
    examples,
    output_option,
    output_options,
)
from loratools._cli.output import Output
from loratools._cli.startup import import_torch


@click.command(
    "compose",
    epilog=examples(
        "loratools compose style:0.7 task:-0.3 -o both --rank 16",
        "loratools compose style task -o both --method core-ties --density 0.3",
    ),
)
@adapters_argument(required=True, word="WEIGHT")
@output_option("What to write: a file, or a folder for peft.", ADAPTER_OUT)
@click.option(
    "--method",
    type=METHOD_NAME,
    default="linear",
    show_default=True,
    metavar="M",
    help="How: a name that `loratools methods` lists; linear is the sum.",
)
@click.option(
    "--rank",
    type=int,
    metavar="N",
    help="The largest rank of a layer; without it the result is exact. Methods on the elements of "
    "ΔW need it. Layers with a smaller side get that side.",
)
@click.option(
    "--density",
    type=float,
    metavar="F",
    help="Share of elements that pruning methods keep, in (0, 1]; each has a default.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    metavar="N",
    help="Settles the chance in DARE and DELLA; each layer draws its own numbers, by its name.",
)
@click.option(
    "--weights",
    multiple=True,
    metavar="PATTERN=W,W",
    help="Weights that take the place of the usual ones, one for each ADAPTER, in layers and "
    "tensors in whose name PATTERN, a regular expression, is found. Repeat for several; the first "
    "that fits decides.",
)
@click.option(
    "--to",
    type=FORMAT_NAME,
    metavar="FORMAT",
    help="The format of OUT; that of the first ADAPTER by default.",
)
@dtype_option("Type of OUT's float tensors; keep gives fp32 to what is computed.")
@ARCH
@click.option(
    "--base",
    type=PATH,
    metavar="BASE",
    help="The base model: for full tensors that ADAPTERs replace, and for GGUF adapters where the "
    "files do not tell the names.",
)
@OVERWRITE
@DRY_RUN
@output_options
def command(adapters: Strengths, output: str, out: Output, **options: Any) -> None:
    """Combine ADAPTERs into one adapter.

    Each ADAPTER, of any format, may carry a weight after its last colon. The default method is the
    exact sum of the changes, weighted. PATTERN is a regular expression, searched for in the names
    of modules.
    """
    import_torch()
    from loratools.compose import compose_adapters

    out.report(compose_adapters(list(adapters), output, **options))
