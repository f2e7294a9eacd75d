"""``loratools merge``."""

from __future__ import annotations

from typing import Any

import click

from loratools._cli.options import (
    ARCH,
    DEVICE,
    DRY_RUN,
    DTYPE,
    OUTPUT,
    OVERWRITE,
    PATH,
    Strengths,
    adapters_argument,
    examples,
    output_options,
)
from loratools._cli.output import Output
from loratools._cli.startup import import_torch

COMPAT = ("comfyui", "lycoris", "sd-scripts", "a1111")
"""The tools of ``loratools.deltas.compat``, which imports torch."""


@click.command(
    "merge",
    epilog=examples(
        "loratools merge llama-3-8b my-adapter -o merged",
        "loratools merge base style:0.7 task:-0.2 -o merged --dtype bf16 --dry-run",
    ),
)
@click.argument("base", type=PATH)
@adapters_argument(required=True)
@OUTPUT
@DTYPE
@DEVICE
@ARCH
@click.option(
    "--block-strengths",
    metavar="LIST",
    help="Strengths by block: 12, 17, 20 or 26 numbers (SD), or PATTERN=NUMBER,...",
)
@click.option(
    "--compat",
    type=click.Choice(COMPAT),
    help="Fold as this tool does where that is not the formula.",
)
@click.option(
    "--quant",
    metavar="TYPE",
    help="Quantised bases: keep, dequantize, or for GGUF q8_0, q6_k ... "
    "[default: keep for GGUF, dequantize for others]",
)
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "adapter-aware"]),
    default="nearest",
    show_default=True,
    help="How codes of few bits are chosen.",
)
@click.option(
    "--rounding-strength",
    type=float,
    metavar="NUMBER",
    help="Weight of errors that the adapter sees, for adapter-aware rounding.",
)
@click.option(
    "--residual-rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="With --quant keep: also write OUT-residual, what rounding left out.",
)
@click.option(
    "--residual-base",
    is_flag=True,
    help="BASE already lacks what PiSSA, OLoRA, CorDA ... took out of it.",
)
@OVERWRITE
@DRY_RUN
@output_options
def command(base: str, adapters: Strengths, out: Output, **options: Any) -> None:
    """Fold ADAPTERs into BASE and write the merged model.

    BASE is a Hugging Face folder, a diffusers pipeline or component folder, or one .safetensors
    or .gguf file. Each ADAPTER, of any format, may carry a strength after its last colon.
    Everything no adapter touches is copied byte for byte; every adapter tensor must find its
    place, or nothing is written. A base of 4 or 8 bits is written in 16, unless --quant says keep.
    """
    import_torch()
    from loratools.merge import merge_into_base

    with out.progress("merging") as progress:
        report = merge_into_base(base, list(adapters), progress=progress, **options)
    out.report(report)
