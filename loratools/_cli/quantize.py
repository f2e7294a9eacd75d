"""``loratools quantize``."""

from __future__ import annotations

from typing import Any

import click

from loratools._cli.options import (
    DEVICE,
    DRY_RUN,
    FOR_ADAPTER,
    OVERWRITE,
    PATH,
    TYPE_NAME,
    examples,
    output_option,
    output_options,
)
from loratools._cli.output import Output
from loratools._cli.startup import import_torch


@click.command(
    "quantize",
    epilog=examples(
        "loratools quantize model-f16.gguf -o smaller.gguf --to q4_k_m",
        "loratools quantize my-finetune -o tuned.gguf --to q8_0 --template base.gguf",
        "loratools quantize llama-3-8b -o llama-nf4 --for-adapter my-qlora",
    ),
)
@click.argument("base", type=PATH)
@output_option("What to write: a .gguf file; a folder for a split model or one of Hugging Face.")
@click.option(
    "--to",
    type=TYPE_NAME,
    metavar="TYPE",
    help="A GGUF type or mix, in any case: f16, q8_0, q6_k, q5_k_m, q4_k_m, q3_k_l, q2_k, iq4_xs "
    "...; for a Hugging Face folder nf4, nf4-double, fp4, int8, fp8, mlx-4 ...",
)
@click.option(
    "--template",
    type=PATH,
    metavar="MODEL.gguf",
    help="From a Hugging Face folder to GGUF: a GGUF of the same model, for metadata and "
    "tokenizer.",
)
@FOR_ADAPTER
@DEVICE
@OVERWRITE
@DRY_RUN
@output_options
def command(base: str, out: Output, **options: Any) -> None:
    """Write the GGUF model BASE in other types, as llama-quantize would, or a folder in few bits.

    The mixes (q4_k_m ...) give tensors that matter more a larger type; norms and other vectors stay
    as they are, and so does what already is in its type. Types that are chosen by an importance
    matrix (iq1, iq2, iq3) are refused.
    """
    import_torch()
    from loratools.quantize import quantize_base

    with out.progress("quantising") as progress:
        report = quantize_base(base, progress=progress, **options)
    out.report(report)
