"""The Hub's words for libraries, tasks and licences, and the names of its repositories."""

from __future__ import annotations

import re

LIBRARIES = {"peft": "peft", "gguf": "gguf", "peft-dump": "peft", "mlx": "mlx"}
"""Adapter format → the library that loads it; diffusers for the rest, which are image models'."""

BASE_WORDS = {"mlx": "model"}
"""Adapter format → its config's word for the base, where that is not PEFT's."""

LORA_KINDS = frozenset({"lora", "dora", "moved_base", "expert_lora", "tucker", "rows"})

TASKS = {
    "CAUSAL_LM": "text-generation",
    "SEQ_CLS": "text-classification",
    "TOKEN_CLS": "token-classification",
    "QUESTION_ANS": "question-answering",
    "FEATURE_EXTRACTION": "feature-extraction",
}
"""PEFT's task_type → the Hub's task, https://huggingface.co/tasks; where they are one to one."""

IMAGE_ARCHITECTURES = frozenset(
    {"sd1", "sd2", "sdxl", "sd3", "flux1", "pixart", "sana", "auraflow", "lumina2", "hidream"}
)
"""Architectures of which every model makes images from text."""

PERMISSIVE = frozenset(
    {
        "apache-2.0", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "isc", "unlicense", "cc0-1.0",
        "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "wtfpl", "zlib", "0bsd", "afl-3.0", "artistic-2.0",
    }
)  # fmt: skip
"""Licences under which what is derived may have another one; the Hub's identifiers,
https://huggingface.co/docs/hub/repositories-licenses."""

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*\w")
_URL = re.compile(r"https?://(?:www\.)?(?:huggingface\.co|hf\.co)/(?P<id>[^/]+/[^/?#]+)/?")


def repo_id_of(name: str) -> str | None:
    """Return ``OWNER/NAME`` if ``name`` is one, or the address of one, and not a local path."""
    match = _URL.fullmatch(name)
    found = match["id"] if match else name.removeprefix("hf://")
    return found if _ID.fullmatch(found) and "--" not in found and ".." not in found else None
