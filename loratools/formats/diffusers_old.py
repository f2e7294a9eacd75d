"""diffusers of 2023: attention processors and glued names (``…processor.to_q_lora.down.weight``).

Also the first text-encoder spellings and AnimateDiff's motion LoRAs. Source: diffusers
``utils/state_dict_utils.py``.
"""

from __future__ import annotations

import re

from loratools.adapter import Adapter
from loratools.deltas import LoRA
from loratools.formats.detection import matcher
from loratools.formats.format import Bundle, Format
from loratools.formats.module_reading import read_modules
from loratools.formats.parameters import split_dotted
from loratools.formats.read_only import refuse_writing

_GLUED = re.compile(
    r"^(?P<owner>.*?)\.(?:processor\.)?(?P<leaf>to_(?:q|k|v|out)|add_[qkv]_proj)_lora\."
    r"(?P<side>down|up)\.weight$"
)
_PREFIX = re.compile(r"^(?:unet|transformer|text_encoder(?:_2)?)\.")
_UNET_ROOT = re.compile(r"^(?:down_blocks|up_blocks|mid_block)\.")
_UNET_LEAVES = {"to_out": "to_out.0"}
_TEXT_LEAVES = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def read(bundle: Bundle) -> Adapter:
    """Read a file of the old spellings; raises as ``module_reading.read_modules``."""
    return read_modules(bundle, _split).adapter(_naming(bundle), bundle)


def _split(key: str) -> tuple[str, str] | None:
    name = f"unet.{key}" if _UNET_ROOT.match(key) else key
    glued = _GLUED.match(name)
    if glued is None:
        found = split_dotted(name)
        return found and (found[0].replace(".processor.", "."), found[1])
    leaves = _TEXT_LEAVES if name.startswith("text_encoder") else _UNET_LEAVES
    leaf = leaves.get(glued["leaf"], glued["leaf"])
    return f"{glued['owner']}.{leaf}", glued["side"]


def _naming(bundle: Bundle) -> str:
    """Return ``diffusers``, or ``transformers`` for bare names that state no component."""
    known = any(_PREFIX.match(name) or _UNET_ROOT.match(name) for name in bundle.tensors)
    return "diffusers" if known else "transformers"


FORMAT = Format(
    name="diffusers-old",
    title="diffusers of 2023 (attention processors)",
    spec="https://github.com/huggingface/diffusers/blob/main/src/diffusers/utils/state_dict_utils.py",
    holds=frozenset({LoRA.kind}),
    matches=matcher("diffusers-old"),
    read=read,
    write=refuse_writing("diffusers-old", "diffusers or kohya"),
    read_only=True,
)
