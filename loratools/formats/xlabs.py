"""XLabs' FLUX LoRAs: one processor per block (``double_blocks.0.processor.qkv_lora1.down.weight``).

Source: https://github.com/XLabs-AI/x-flux ``src/flux/modules/layers.py``. Number 1 is the image
stream and 2 the text stream; a single block's ``qkv_lora`` acts on the first 3·d rows of linear1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from loratools.adapter import Adapter
from loratools.deltas import LoRA
from loratools.formats.detection import matcher
from loratools.formats.format import Bundle, Format
from loratools.formats.module_reading import read_modules
from loratools.formats.read_only import refuse_writing

_KEY = re.compile(
    r"^(?:diffusion_model\.)?(?P<block>(?:double|single)_blocks\.\d+)\.processor\."
    r"(?P<name>\w+)\.(?P<side>down|up)\.weight$"
)
MODULES: Mapping[str, str] = {
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
    "qkv_lora": "linear1_qkv",
    "proj_lora": "linear2",
}
"""Module of the original model by XLabs' word; ``linear1_qkv`` is linear1 without its MLP rows."""


def read(bundle: Bundle) -> Adapter:
    """Read a file of XLabs' names; raises as ``module_reading.read_modules``."""
    return read_modules(bundle, _split).adapter("original", bundle)


def _split(key: str) -> tuple[str, str] | None:
    match = _KEY.match(key)
    module = MODULES.get(match["name"]) if match else None
    if match is None or module is None:
        return None
    return f"diffusion_model.{match['block']}.{module}", match["side"]


FORMAT = Format(
    name="xlabs",
    title="XLabs (FLUX)",
    spec="https://github.com/XLabs-AI/x-flux",
    holds=frozenset({LoRA.kind}),
    matches=matcher("xlabs"),
    read=read,
    write=refuse_writing("xlabs", "comfyui or kohya"),
    read_only=True,
)
