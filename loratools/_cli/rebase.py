"""``loratools rebase``."""

from __future__ import annotations

from typing import Any

import click

from loratools._cli.options import (
    ADAPTER,
    ADAPTER_OUT,
    ARCH,
    DEVICE,
    DRY_RUN,
    FORMAT_NAME,
    OVERWRITE,
    PATH,
    dtype_option,
    examples,
    output_options,
)
from loratools._cli.output import Output
from loratools._cli.startup import import_torch


@click.command(
    "rebase",
    epilog=examples(
        "loratools rebase my-adapter --from base --onto my-finetune -o rebased --rank 16",
        "loratools rebase my-adapter --from base --onto my-finetune --rank 0",
    ),
)
@click.argument("adapter", type=ADAPTER)
@click.option(
    "--from",
    "source",
    required=True,
    type=PATH,
    metavar="BASE",
    help="The base that ADAPTER was made for.",
)
@click.option(
    "--onto", "target", required=True, type=PATH, metavar="BASE", help="The base that it shall fit."
)
@click.option(
    "--rank", required=True, type=int, metavar="K",
    help="The rank of what is added to each layer; 0 only measures.",
)  # fmt: skip
@click.option(
    "-o",
    "--output",
    type=ADAPTER_OUT,
    metavar="OUT",
    help="What to write; required unless the rank is 0.",
)
@click.option(
    "--total-rank",
    type=int,
    metavar="N",
    help="Cut each layer's sum to this rank; a warning says if that loses more than was carried.",
)
@click.option(
    "--to",
    type=FORMAT_NAME,
    metavar="FORMAT",
    help="The format to write; by default ADAPTER's.",
)
@click.option("--exact", is_flag=True, help="Compute dense SVDs: slow, never needed for accuracy.")
@dtype_option("Type of the output's float tensors; keep gives new factors in float32.")
@DEVICE
@ARCH
@OVERWRITE
@DRY_RUN
@output_options
def command(adapter: str, output: str | None, out: Output, **options: Any) -> None:
    """Carry ADAPTER from the base it was made for to another of the same shape.

    To each layer's change the difference of the bases is added, cut to rank K: base B with the
    result is then nearly base A with ADAPTER. The report says how far apart the bases are.
    """
    import_torch()
    from loratools.rebase import rebase_adapter

    with out.progress("comparing") as progress:
        report = rebase_adapter(adapter, output, progress=progress, **options)
    out.report(report)
