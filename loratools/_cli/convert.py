"""``loratools convert``."""

from __future__ import annotations

from typing import Any

import click

from loratools._cli.batch import run_each, split_inputs
from loratools._cli.options import (
    ADAPTER,
    ADAPTER_OUT,
    ARCH,
    DRY_RUN,
    FORMAT_NAME,
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
    "convert",
    epilog=examples(
        "loratools convert style.safetensors -o style-diffusers.safetensors --to diffusers",
        "loratools convert my-adapter -o my-adapter.gguf --to gguf --base llama-3-8b",
    ),
)
@click.argument("adapters", nargs=-1, required=True, type=ADAPTER, metavar="ADAPTER...")
@output_option("What to write: a file; a folder for peft and for several ADAPTERs.", ADAPTER_OUT)
@click.option(
    "--to", required=True, type=FORMAT_NAME, metavar="FORMAT", help="Target format; see `formats`."
)
@click.option(
    "--base",
    type=PATH,
    metavar="BASE",
    help="A checkpoint whose tensor names and shapes serve as vocabulary, for modules that no "
    "table of names has. To and from gguf and mlx, the language model: its folder, config.json or "
    "GGUF file.",
)
@ARCH
@dtype_option(
    "Type of the output's float tensors; q8_0 in GGUF alone, where rows are whole blocks of 32 "
    "(others become fp16).",
    "q8_0",
)
@click.option(
    "--repair",
    type=click.Choice(["split-qkv-alpha"]),
    help="Mend a known fault: the alpha of fused projections that were saved split.",
)
@click.option(
    "--network",
    metavar="NETWORK",
    help="Convert one network alone, by diffusers' word for it: unet, transformer, text_encoder "
    "...",
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
