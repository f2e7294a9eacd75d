"""``loratools extract``."""

from __future__ import annotations

from typing import Any

import click

from loratools._cli.options import (
    ADAPTER_OUT,
    ARCH,
    DEVICE,
    DRY_RUN,
    EXTRACTED_NAME,
    OVERWRITE,
    PATH,
    dtype_option,
    examples,
    output_option,
    output_options,
)
from loratools._cli.output import Output
from loratools._cli.startup import import_torch


@click.command(
    "extract",
    epilog=examples(
        "loratools extract llama-3-8b my-finetune -o adapter --rank 32",
        "loratools extract base my-finetune -o adapter --energy 0.9 --dtype bf16",
    ),
)
@click.argument("base", type=PATH)
@click.argument("tuned", type=PATH)
@output_option("What to write: a file, or a folder for peft.", ADAPTER_OUT)
@click.option(
    "--rank", type=int, metavar="N", help="Rank of each layer; with --energy, the largest."
)
@click.option(
    "--energy",
    type=float,
    metavar="F",
    help="Share of each layer's ‖ΔW‖² to keep, above 0 and at most 1, with as small a rank as that "
    "takes.",
)
@click.option(
    "--conv-rank",
    type=int,
    metavar="N",
    help="Rank of convolutions with kernels beyond 1×1.",
)
@click.option(
    "--to",
    type=EXTRACTED_NAME,
    metavar="FORMAT",
    help="Format to write; by default the model's own.",
)
@click.option("--exact", is_flag=True, help="Compute dense SVDs: slow, never needed for accuracy.")
@click.option(
    "--include",
    multiple=True,
    metavar="REGEX",
    help="Only modules in whose name this is found; repeat for several.",
)
@click.option(
    "--exclude",
    multiple=True,
    metavar="REGEX",
    help="No modules in whose name this is found; repeat for several.",
)
@click.option(
    "--full",
    multiple=True,
    metavar="REGEX",
    help="Write the change of modules in whose name this is found whole; repeat for several.",
)
@dtype_option(
    "Type of the output's float tensors; keep gives float32 factors, and copies as they are."
)
@DEVICE
@ARCH
@OVERWRITE
@DRY_RUN
@output_options
def command(base: str, tuned: str, output: str, out: Output, **options: Any) -> None:
    """Write what TUNED changed in BASE as an adapter.

    BASE and TUNED are Hugging Face folders, diffusers folders or single weights files with the
    same tensors. Each layer's difference is cut to a rank, with its error measured; norms and
    biases are written whole where the format has words for them, and what is left out is reported.
    """
    import_torch()
    from loratools.extract import extract_adapter

    with out.progress("extracting") as progress:
        report = extract_adapter(base, tuned, output, progress=progress, **options)
    out.report(report)
