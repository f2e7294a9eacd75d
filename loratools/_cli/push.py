"""``loratools push``."""

from __future__ import annotations

from typing import Any

import click

from loratools._cli.options import DRY_RUN, PATH, StrengthParam, examples, output_options
from loratools._cli.output import Output
from loratools._cli.startup import import_torch

RELATIONS = ("adapter", "merge", "quantized", "finetune")
"""Those of ``loratools.publishing.card``, which imports torch."""


@click.command(
    "push",
    epilog=examples(
        "loratools push my-adapter me/my-adapter --base-model me/llama-3-8b --private",
        "loratools push merged me/merged --base-model me/llama-3-8b --merged my-adapter:0.7",
    ),
)
@click.argument("path", type=PATH)
@click.argument("repo_id")
@click.option("--private", is_flag=True, help="Make the repository private, if it is made.")
@click.option(
    "--create-pr", is_flag=True, help="Propose the change as a pull request instead of making it."
)
@click.option(
    "--revision",
    metavar="BRANCH",
    help="Commit to this branch; made from the main branch if need be.",
)
@click.option("-m", "--message", metavar="TEXT", help="The commit's message.")
@click.option(
    "--base-model",
    multiple=True,
    metavar="ID",
    help="The base on the Hub, OWNER/NAME, where the files do not name it; repeat for several.",
)
@click.option(
    "--license",
    metavar="ID",
    help="The licence, in the Hub's words (apache-2.0 ...); by default the base model's.",
)
@click.option(
    "--relation", type=click.Choice(RELATIONS), help="To the base; by default as files tell."
)
@click.option(
    "--merged",
    multiple=True,
    type=StrengthParam(),
    metavar="ADAPTER[:STRENGTH]",
    help="An adapter that was merged, with its strength, for the card; repeat for several.",
)
@click.option(
    "--card",
    type=PATH,
    metavar="FILE",
    help="Use this Markdown file as the card, instead of the one that is there.",
)
@click.option("--allow-conflict", is_flag=True, help="Answer for a licence that is not the base's.")
@DRY_RUN
@output_options
def command(path: str, repo_id: str, out: Output, **options: Any) -> None:
    """Upload PATH to REPO_ID on the Hugging Face Hub, with a model card.

    PATH is an adapter of any format, a model or a diffusers pipeline. Its files get the names that
    tools look for. A card that is there keeps its text and gets what its metadata lacks.
    """
    import_torch()
    from loratools.push import push_to_hub

    out.report(push_to_hub(path, repo_id, **options))
