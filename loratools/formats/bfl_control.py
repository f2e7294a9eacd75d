"""Black Forest Labs' Control LoRAs (canny, depth): bare original names, biases and whole norms.

Source: https://github.com/black-forest-labs/flux ``src/flux/modules/lora.py``; ComfyUI
``comfy/lora_convert.py``. The norms replace the base's; a base whose ``img_in`` takes fewer
channels is padded with zeros first; there is no alpha, so the scale is 1.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from loratools.adapter import Adapter
from loratools.deltas import LoRA, Replacement
from loratools.formats.detection import matcher
from loratools.formats.format import Bundle, Format
from loratools.formats.module_reading import RESHAPE, read_modules
from loratools.formats.parameters import split_dotted
from loratools.formats.read_only import refuse_writing

_PREFIX = "diffusion_model."
_WIDENED = f"{_PREFIX}img_in"
_NORMS = ("query_norm.scale", "key_norm.scale")


def read(bundle: Bundle) -> Adapter:
    """Read a Control LoRA; raises as ``module_reading.read_modules``."""
    parsed = read_modules(bundle, _split)
    widened = parsed.layers.get(_WIDENED)
    if widened is not None:
        shape = torch.tensor(widened.weight_shape)
        parsed.extras[_WIDENED + RESHAPE] = Replacement(shape)
        parsed.notes.append(f"{_WIDENED}: the base is padded to {tuple(shape.tolist())} first")
    adapter = parsed.adapter("original", bundle)
    return replace(adapter, arch="flux1")


def _split(key: str) -> tuple[str, str] | None:
    if key.endswith(_NORMS):
        return _PREFIX + key, "set_weight"
    found = split_dotted(key)
    return found and (_PREFIX + found[0], found[1])


FORMAT = Format(
    name="bfl-control",
    title="Black Forest Labs' Control LoRA (FLUX)",
    spec="https://github.com/black-forest-labs/flux/blob/main/src/flux/modules/lora.py",
    holds=frozenset({LoRA.kind, Replacement.kind}),
    matches=matcher("bfl-control"),
    read=read,
    write=refuse_writing("bfl-control", "comfyui or diffusers"),
    read_only=True,
)
