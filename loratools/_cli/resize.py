"""``loratools resize``."""

from __future__ import annotations

from typing import Any

import click

from loratools._cli.batch import run_each, split_inputs
from loratools._cli.options import (
    ADAPTER,
    ADAPTER_OUT,
    ARCH,
    DEVICE,
    DRY_RUN,
    DTYPE,
    OVERWRITE,
    PATH,
    examples,
    output_option,
    output_options,
)
from loratools._cli.output import Output
from loratools._cli.startup import import_torch


@click.command(
    "resize",
    epilog=examples(
        "loratools resize style.safetensors -o style-r8.safetensors --rank 8",
        "loratools resize loras/*.safetensors -o small --max-size 32MiB --dry-run",
    ),
)
@click.argument("adapters", nargs=-1, required=True, type=ADAPTER, metavar="ADAPTER...")
@output_option("What to write: a file; a folder for PEFT and for several ADAPTERs.", ADAPTER_OUT)
@click.option("--rank", type=int, metavar="N", help="This rank in every layer.")
@click.option("--energy", type=float, metavar="F", help="Keep this share of the energy Σσ².")
@click.option("--sv-ratio", type=float, metavar="X", help="Keep σ above the largest / X.")
@click.option("--sv-cumulative", type=float, metavar="F", help="Keep this share of Σσ.")
@click.option("--sv-fro", type=float, metavar="F", help="Keep this share of the Frobenius norm.")
@click.option("--max-size", metavar="SIZE", help="Most energy in SIZE (64MiB, 50MB) over all.")
@click.option("--mean-rank", type=float, metavar="F", help="Most energy at this mean rank.")
@click.option(
    "--conv-rank",
    type=int,
    metavar="N",
    help="With --rank: the rank of convolutions with kernels larger than 1.",
)
@click.option("--max-rank", type=int, metavar="N", help="With the other rules: no layer gets more.")
@click.option(
    "--scope",
    default="layer",
    show_default=True,
    type=click.Choice(["layer", "global"]),
    help="Whether --energy is of each layer, or of all together.",
)
@click.option(
    "--base",
    type=PATH,
    metavar="BASE",
    help="The model that the adapter is for; DoRA and --score need it.",
)
@click.option(
    "--score",
    default="absolute",
    show_default=True,
    type=click.Choice(["absolute", "frobenius", "spectral"]),
    help="Under a budget, compare layers by σ, or by σ over this norm of the base weight.",
)
@click.option(
    "--unbalanced",
    is_flag=True,
    help="Put σ into up alone, as sd-scripts does; otherwise √σ into both factors, which half "
    "precision holds better.",
)
@click.option(
    "--compat",
    type=click.Choice(["sd-scripts"]),
    help="Count singular values as its resize_lora.py does, which keeps one more than the rule "
    "says and gives --conv-rank to 1×1 convolutions too.",
)
@ARCH
@DTYPE
@DEVICE
@OVERWRITE
@DRY_RUN
@output_options
def command(adapters: tuple[str, ...], output: str, out: Output, **options: Any) -> None:
    """Write ADAPTERs at another rank, in their own format, with ΔW as near as the rank allows.

    Give one rule: --rank, --energy, --sv-ratio, --sv-cumulative, --sv-fro, --max-size or
    --mean-rank. With several ADAPTERs, or a folder of adapter files, OUT is a folder and each
    keeps its name. --dry-run also shows what other ranks would keep and cost.
    """
    import_torch()
    from loratools.svd_resize import resize_adapter

    paths, many = split_inputs(adapters)
    reports = run_each(
        paths,
        output,
        lambda path, target: resize_adapter(path, target, **options),
        many=many,
        to=_kind,
        overwrite=options["overwrite"],
    )
    out.reports(reports, many=many)


def _kind(path: str) -> str | None:
    """Return what tells the result's name: ``peft`` for a folder, ``gguf`` for such a file."""
    from pathlib import Path

    if Path(path).is_dir():
        return "peft"
    return "gguf" if Path(path).suffix == ".gguf" else None
