"""``loratools convert``."""

from __future__ import annotations

from typing import Any

import click

from loratools._cli.batch import run_each, split_inputs
from loratools._cli.options import (
    ADAPTER,
    ADAPTER_OUTPUT,
    ARCH,
    DRY_RUN,
    FORMAT_NAME,
    OVERWRITE,
    PATH,
    examples,
    output_options,
)
from loratools._cli.output import Output
from loratools._cli.startup import import_torch


@click.command(
    "convert",
    epilog=examples(
        "loratools convert style.safetensors -o style-diffusers.safetensors --to diffusers",
        "loratools convert my-adapter -o my-adapter.gguf --to gguf --base llama-3-8b",
    ),
)
@click.argument("adapters", nargs=-1, required=True, type=ADAPTER, metavar="ADAPTER...")
@ADAPTER_OUTPUT
@click.option(
    "--to", required=True, type=FORMAT_NAME, metavar="FORMAT", help="Target format; see `formats`."
)
@click.option(
    "--base",
    type=PATH,
    metavar="BASE",
    help="A checkpoint whose tensor names serve as vocabulary; for GGUF, the language model.",
)
@ARCH
@click.option(
    "--dtype",
    default="keep",
    show_default=True,
    type=click.Choice(["keep", "fp32", "bf16", "fp16", "q8_0"]),
    help="Type of the output's tensors; q8_0 in GGUF alone.",
)
@click.option(
    "--repair",
    type=click.Choice(["split-qkv-alpha"]),
    help="Mend a known fault: alpha of fused projections saved by split_qkv.",
)
@click.option(
    "--network", metavar="NETWORK", help="Convert one network alone, such as transformer_2."
)
@click.option("--allow-loss", is_flag=True, help="Leave out what FORMAT cannot hold.")
@OVERWRITE
@DRY_RUN
@output_options
def command(adapters: tuple[str, ...], output: str, out: Output, **options: Any) -> None:
    """Write ADAPTERs in another format with the same ΔW, every key accounted for.

    With several ADAPTERs, or a folder of adapter files, OUT is a folder and each keeps its name.
    """
    import_torch()
    from loratools.convert import convert_adapter

    paths, many = split_inputs(adapters)
    reports = run_each(
        paths,
        output,
        lambda path, target: convert_adapter(path, target, **options),
        many=many,
        to=lambda _: options["to"],
        overwrite=options["overwrite"],
    )
    out.reports(reports, many=many)
