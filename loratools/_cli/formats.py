"""``loratools formats``."""

from __future__ import annotations

import click

from loratools._cli.options import examples, output_options
from loratools._cli.output import Output
from loratools.formats import FORMATS
from loratools.report import Json, Report

_IMAGES = ("lora", "dora", "loha", "lokr", "tucker", "oft", "boft", "glora", "full")
KINDS: dict[str, tuple[str, ...]] = {
    "peft": ("lora", "dora", "moved_base", "expert_lora", "rows", "replacement"),
    "kohya": (*_IMAGES, "ia3", "sparse", "sum", "replacement"),
    "comfyui": (*_IMAGES, "sum", "replacement"),
    "diffusers": ("lora", "dora", "replacement"),
    "diffusers-old": ("lora",),
    "xlabs": ("lora",),
    "bfl-control": ("lora", "replacement"),
    "peft-dump": ("lora", "dora", "loha", "lokr"),
    "cloneofsimo": ("lora",),
}
"""What each format's record says it holds, here because the records need torch; a test compares."""

_READ_ONLY = ", read only"
"""How a row's title says that ``write`` always refuses."""


@click.command(
    "formats",
    epilog=examples("loratools formats", "loratools formats --json | jq '.items[].format'"),
)
@output_options
def command(out: Output) -> None:
    """List the adapter formats: which are read and written, and what they hold."""
    items: list[dict[str, Json]] = [
        {
            "format": row.name,
            "read": True,
            "write": not row.title.endswith(_READ_ONLY),
            "title": row.title.removesuffix(_READ_ONLY),
            "kinds": list(KINDS[row.name]),
        }
        for row in FORMATS
    ]
    facts = {"formats": len(items), "written": sum(item["write"] for item in items)}
    out.listing(Report("formats", facts=facts, items=tuple(items)))
