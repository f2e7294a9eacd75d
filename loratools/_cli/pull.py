"""``loratools pull``."""

from __future__ import annotations

from typing import Any

import click

from loratools._cli.options import (
    DRY_RUN,
    OVERWRITE,
    RepositoryParam,
    examples,
    output_option,
    output_options,
)
from loratools._cli.output import Output


@click.command(
    "pull",
    epilog=examples(
        "loratools pull me/my-adapter -o fetched",
        "loratools pull hf://me/loras@v2/ink.safetensors -o ink-v2.safetensors",
    ),
)
@click.argument("repo_id", type=RepositoryParam())
@output_option("A folder, or a file if REPO_ID names one.")
@click.option("--revision", metavar="REVISION", help="A branch, tag or commit.")
@OVERWRITE
@DRY_RUN
@output_options
def command(repo_id: str, output: str, out: Output, **options: Any) -> None:
    """Write the files of REPO_ID on the Hugging Face Hub to OUT.

    REPO_ID is OWNER/NAME, or hf://OWNER/NAME[@REVISION][/PATH] for a file or folder of it. A pull
    that was broken off goes on where it was.
    """
    from loratools.pull import pull_from_hub

    out.report(pull_from_hub(repo_id, output, **options))
