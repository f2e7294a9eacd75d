"""``loratools dequantize``."""

from __future__ import annotations

from typing import Any

import click

from loratools._cli.options import (
    DEVICE,
    DRY_RUN,
    FOR_ADAPTER,
    OVERWRITE,
    PATH,
    examples,
    output_option,
    output_options,
)
from loratools._cli.output import Output
from loratools._cli.startup import import_torch


@click.command(
    "dequantize",
    epilog=examples(
        "loratools dequantize model-q4_k_m.gguf -o half.gguf",
        "loratools dequantize model-q8_0.gguf -o folder --base-config llama-3-8b --dtype bf16",
        "loratools dequantize llama-3-8b -o seen --for-adapter my-qlora",
    ),
)
@click.argument("base", type=PATH)
@output_option("What to write; its ending decides the form.")
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "bf16", "fp16"]),
    help="Float type of every matrix. By default fp16 for what was quantised; other tensors of a "
    "GGUF output stay as they are, those of a checkpoint are fp16 too.",
)
@click.option(
    "--base-config",
    type=PATH,
    metavar="FOLDER",
    help="Write a Hugging Face folder, with this one's config and tokenizer; if it has weights "
    "too, their names settle the spelling.",
)
@FOR_ADAPTER
@DEVICE
@OVERWRITE
@DRY_RUN
@output_options
def command(base: str, out: Output, **options: Any) -> None:
    """Write the quantised model BASE in plain numbers.

    A checkpoint of bitsandbytes, GPTQ, AWQ, FP8, MLX ... becomes a folder or file like it. For a
    GGUF model OUT is a .gguf file, a .safetensors file with the tensors in Hugging Face's names
    and layout, or with --base-config a whole folder. What quantising lost stays lost.
    """
    import_torch()
    from loratools.quantize import dequantize_base

    with out.progress("dequantising") as progress:
        report = dequantize_base(base, progress=progress, **options)
    out.report(report)
