"""``loratools merge``."""

from __future__ import annotations

from typing import Any

import click

from loratools._cli.options import (
    ARCH,
    DEVICE,
    DRY_RUN,
    DTYPE,
    OVERWRITE,
    PATH,
    QUANT_NAME,
    Strengths,
    adapters_argument,
    examples,
    output_option,
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
@output_option("What to write: a folder if BASE is one, else a .safetensors or .gguf file.")
@DTYPE
@DEVICE
@ARCH
@click.option(
    "--block-strengths",
    metavar="LIST",
    help="Strengths by block, which multiply those of the ADAPTERs: 12, 17, 20 or 26 numbers for "
    "Stable Diffusion's blocks, or PATTERN=NUMBER pairs, separated by commas.",
)
@click.option(
    "--compat",
    type=click.Choice(COMPAT),
    help="Fold as this tool does, where that is not the formula.",
)
@click.option(
    "--quant",
    type=QUANT_NAME,
    metavar="TYPE",
    help="Of a quantised base: keep, dequantize, or for GGUF a type such as q8_0. "
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
    help="With adapter-aware rounding: how much more an error counts that the adapter sees. "
    "[default: 10]",
)
@click.option(
    "--residual-rank",
    type=click.IntRange(min=1),
    metavar="N",
    help="Where few bits stay few: also write OUT-residual, an adapter of this rank with what "
    "rounding left out, for runtimes that load both.",
)
@click.option(
    "--residual-base",
    is_flag=True,
    help="BASE already lacks what PiSSA, OLoRA, CorDA ... took out of it: recompute nothing.",
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
