"""Adapter file syntaxes, one per file; ``FORMATS`` is the table of them.

Importing this package imports neither torch nor any format: a row names the module that holds
``FORMAT``, and ``get_format`` imports it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

from loratools.errors import OptionError, UnknownFormatError
from loratools.formats.likeness import looks_like_model
from loratools.suggest import did_you_mean

if TYPE_CHECKING:
    from loratools.formats.format import Format, Listing


_IMAGES = ("lora", "dora", "loha", "lokr", "tucker", "oft", "boft", "glora", "full")


@dataclass(frozen=True, slots=True)
class FormatRow:
    """What the command line says of a format without importing it.

    Attributes:
        name: the word for ``--to``.
        title: one line for people.
        module: where ``FORMAT`` is.
        kinds: what the record ``holds``; a test compares the two.
        models: whose modules its names can say: ``language``, ``image`` (and video), or both.
            Conversions go between formats that share one.
        file: the weights' name that the format's tools look for; ``*`` is the file's own.
        writes: whether files are written too.
        extracts: whether ``extract`` writes it; only where ``writes`` is true.
    """

    name: str
    title: str
    module: str
    kinds: tuple[str, ...]
    models: tuple[str, ...] = ("image",)
    file: str = "*.safetensors"
    writes: bool = True
    extracts: bool = True


FORMATS: tuple[FormatRow, ...] = (
    FormatRow(
        "peft",
        "PEFT (adapter_config.json and weights)",
        "loratools.formats.peft",
        ("lora", "dora", "moved_base", "expert_lora", "rows", "replacement"),
        models=("language", "image"),
        file="adapter_model.safetensors",
    ),
    FormatRow(
        "kohya",
        "kohya (sd-scripts, LyCORIS, OneTrainer, musubi-tuner)",
        "loratools.formats.kohya",
        (*_IMAGES, "ia3", "sparse", "sum", "replacement"),
    ),
    FormatRow(
        "comfyui",
        "ComfyUI (original names; ai-toolkit, diffusion-pipe)",
        "loratools.formats.comfyui",
        (*_IMAGES, "sum", "replacement"),
    ),
    FormatRow(
        "diffusers",
        "diffusers (pytorch_lora_weights.safetensors)",
        "loratools.formats.diffusers",
        ("lora", "dora", "replacement"),
        file="pytorch_lora_weights.safetensors",
    ),
    FormatRow(
        "gguf",
        "GGUF (llama.cpp, Ollama)",
        "loratools.formats.gguf",
        ("lora", "expert_lora"),
        models=("language",),
        file="*.gguf",
        extracts=False,
    ),
    FormatRow(
        "mlx",
        "MLX (mlx-lm)",
        "loratools.formats.mlx",
        ("lora", "dora", "expert_lora", "replacement"),
        models=("language",),
        file="adapters.safetensors",
        extracts=False,
    ),
    FormatRow(
        "diffusers-old",
        "diffusers of 2023 (attention processors)",
        "loratools.formats.diffusers_old",
        ("lora",),
        writes=False,
        extracts=False,
    ),
    FormatRow(
        "xlabs",
        "XLabs (FLUX)",
        "loratools.formats.xlabs",
        ("lora",),
        writes=False,
        extracts=False,
    ),
    FormatRow(
        "bfl-control",
        "Black Forest Labs' Control LoRA (FLUX)",
        "loratools.formats.bfl_control",
        ("lora", "replacement"),
        writes=False,
        extracts=False,
    ),
    FormatRow(
        "peft-dump",
        "PEFT state dict without a config, or bare names",
        "loratools.formats.peft_dump",
        ("lora", "dora", "loha", "lokr"),
        models=("language", "image"),
        writes=False,
        extracts=False,
    ),
    FormatRow(
        "cloneofsimo",
        "cloneofsimo's numbered layers (Stable Diffusion 1 and 2)",
        "loratools.formats.cloneofsimo",
        ("lora",),
        writes=False,
        extracts=False,
    ),
)


def get_format(name: str) -> Format:
    """Return the format called ``name``; raises OptionError with the nearest name."""
    loaded: Format = import_module(get_row(name).module).FORMAT
    return loaded


def get_row(name: str) -> FormatRow:
    """Return the row of the format called ``name``; raises OptionError with the nearest name."""
    for row in FORMATS:
        if row.name == name:
            return row
    names = [row.name for row in FORMATS]
    raise OptionError(f"unknown format {name!r}", hint=did_you_mean(name, names))


def get_written_format(name: str) -> Format:
    """Return the format called ``name``; raises OptionError for one that is only read, too."""
    found = get_format(name)
    if found.read_only:
        written = ", ".join(row.name for row in FORMATS if row.writes)
        raise OptionError(
            f"{name} files are read, not written", hint=f"choose --to among {written}"
        )
    return found


def detect_format(listing: Listing, source: str) -> Format:
    """Return the one format whose ``matches`` accepts ``listing``.

    Raises UnknownFormatError if none does, or several do.
    """
    found = [fmt for row in FORMATS if (fmt := get_format(row.name)).matches(listing)]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(fmt.name for fmt in found)
        raise UnknownFormatError(
            f"{source}: fits several adapter formats ({names})",
            hint="please report this file's key names",
        )
    if not listing.shapes:
        raise UnknownFormatError(
            f"{source}: holds no tensors at all",
            hint="the file is empty: fetch or train the adapter again",
        )
    sample = ", ".join(list(listing.shapes)[:3])
    if looks_like_model(listing.shapes):
        raise UnknownFormatError(
            f"{source}: a model's weights by their names, not an adapter's (such as {sample})",
            hint="name the adapter's folder or file; `loratools inspect` says what a file is",
        )
    raise UnknownFormatError(
        f"{source}: not in an adapter format that loratools knows (keys such as {sample})",
        hint="`loratools formats` lists the formats; a PEFT file needs its adapter_config.json "
        "beside it; a base model is not an adapter",
    )
