"""State dicts of PEFT models without a config, and bare dotted names.

``base_model.model.…`` wrappers, in-memory adapter names (``lora_A.default.weight``), or no prefix
at all: fal, DiffSynth, ai-toolkit's Krea, Qwen lightning, LTX, Mochi, ACE-Step. Without a config
alpha is the rank.

DiffSynth trains MiniMax-H3 on its authors' own shards, whose fused projections hold query, key and
value head by head; every other tool has them one after the other under the same names and shapes.
What tells are PEFT's in-memory names (diffusers 0.42.1 ``lora_conversion_utils.py``).
"""

from __future__ import annotations

import re
from dataclasses import replace

import torch

from loratools.adapter import Adapter
from loratools.deltas import DoRA, LayerDelta, LoHa, LoKr, LoRA
from loratools.errors import MalformedAdapterError
from loratools.formats.alphas import COMPONENTS
from loratools.formats.detection import PEFT_PREFIX, matcher
from loratools.formats.format import Bundle, Format
from loratools.formats.module_reading import Parsed, read_modules
from loratools.formats.parameters import split_dotted
from loratools.formats.read_only import refuse_writing
from loratools.suggest import counted

_IN_MEMORY = re.compile(r"\.lora_[AB]\.default\.")
_BY_HEAD = re.compile(
    r"^(?:(?:diffusion_model|transformer)\.)?(?:token_refiner\.)?blocks\.\d+\.attn\.qkv_proj$"
)
_HEAD = 128
"""Rows of a head of every released MiniMax-H3."""


def read(bundle: Bundle) -> Adapter:
    """Read a dump; raises as ``module_reading.read_modules``.

    Names without a component stay bare, in the naming ``transformers``: the file cannot tell
    whose they are.
    """
    parsed = read_modules(bundle, _split)
    if any(map(_IN_MEMORY.search, bundle.tensors)):
        parsed = _with_stacked_heads(parsed)
    heads = {path.partition(".")[0] for path in parsed.layers}
    if heads <= {"diffusion_model", "text_encoders"}:
        return parsed.adapter("original", bundle)
    naming = "diffusers" if heads <= set(COMPONENTS) else "transformers"
    return parsed.adapter(naming, bundle)


def _with_stacked_heads(parsed: Parsed) -> Parsed:
    """Return the layers with fused projections as query, key and value one after the other."""
    fused = [path for path in parsed.layers if _BY_HEAD.match(path)]
    if not fused:
        return parsed
    layers = {p: _stacked(p, d) if p in fused else d for p, d in parsed.layers.items()}
    note = f"{counted(len(fused), 'fused projection')} read as DiffSynth trains them: head by head"
    return replace(parsed, layers=layers, notes=[*parsed.notes, note])


def _stacked(path: str, delta: LayerDelta) -> LayerDelta:
    rows = delta.weight_shape[0]
    if rows % (3 * _HEAD):
        raise MalformedAdapterError(
            f"{path}: {rows} rows are not query, key and value of heads of {_HEAD}"
        )
    order = torch.arange(rows).view(-1, 3, _HEAD).transpose(0, 1).flatten()
    return delta.permute_rows(order)


def _split(key: str) -> tuple[str, str] | None:
    found = split_dotted(key)
    return found and (_unwrapped(found[0]), found[1])


def _unwrapped(module: str) -> str:
    """Return the module without PEFT's wrapper, wherever it stands."""
    match = PEFT_PREFIX.search(module)
    if match is None:
        return module
    before = module[: match.start()]
    after = module[match.end() :]
    return f"{before}.{after}" if before else after


FORMAT = Format(
    name="peft-dump",
    title="PEFT state dict without a config, or bare names",
    spec="https://huggingface.co/docs/peft/developer_guides/checkpoint",
    holds=frozenset({LoRA.kind, DoRA.kind, LoHa.kind, LoKr.kind}),
    matches=matcher("peft-dump"),
    read=read,
    write=refuse_writing("peft-dump", "peft or diffusers"),
    read_only=True,
)
