"""Activated LoRA (aLoRA, arXiv:2504.12397): an adapter that acts only after certain tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from loratools.errors import UnsupportedError

PEFT_WORD = "alora_invocation_tokens"
GGUF_WORD = "adapter.alora.invocation_tokens"


def invocation_tokens(metadata: Mapping[str, str]) -> list[int]:
    """Return the tokens that switch the adapter on, by its file's words; none for most adapters."""
    config: Any = json.loads(metadata.get("adapter_config.json", "{}"))
    tokens = config.get(PEFT_WORD) or json.loads(metadata.get(GGUF_WORD, "[]"))
    return list(tokens)


def refuse_activated(metadata: Mapping[str, str], source: str) -> None:
    """Raise UnsupportedError for an adapter that no fixed weight equals."""
    if invocation_tokens(metadata):
        raise UnsupportedError(
            f"{source}: {PEFT_WORD} is set: an activated LoRA acts only after its invocation "
            "tokens, so no fixed weight equals it",
            hint="serve it as an adapter; `loratools convert` takes it to GGUF and back",
        )
