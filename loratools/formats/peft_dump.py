"""State dicts of PEFT models without a config, and bare dotted names.

``base_model.model.…`` wrappers, in-memory adapter names (``lora_A.default.weight``), or no prefix
at all: fal, DiffSynth, ai-toolkit's Krea, Qwen lightning, LTX, Mochi, ACE-Step. Without a config
alpha is the rank.
"""

from __future__ import annotations

from loratools.adapter import Adapter
from loratools.deltas import DoRA, LoHa, LoKr, LoRA
from loratools.formats.alphas import COMPONENTS
from loratools.formats.detection import PEFT_PREFIX, matcher
from loratools.formats.format import Bundle, Format
from loratools.formats.module_reading import read_modules
from loratools.formats.parameters import split_dotted
from loratools.formats.read_only import refuse_writing


def read(bundle: Bundle) -> Adapter:
    """Read a dump; raises as ``module_reading.read_modules``.

    Names without a component stay bare, in the naming ``transformers``: the file cannot tell
    whose they are.
    """
    parsed = read_modules(bundle, _split)
    heads = {path.partition(".")[0] for path in parsed.layers}
    if heads <= {"diffusion_model", "text_encoders"}:
        return parsed.adapter("original", bundle)
    naming = "diffusers" if heads <= set(COMPONENTS) else "transformers"
    return parsed.adapter(naming, bundle)


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
