"""What a GGUF model says of itself, in the words of a report."""

from __future__ import annotations

from collections import Counter

from loratools.basemodel import BaseModel, elements
from loratools.codecs.ggml_mixes import MIXES
from loratools.planning.provenance import merged_adapters
from loratools.report import Json
from loratools.streaming.stored import stored_bytes
from loratools.tensorfiles.gguf import GGUFHeader

_TYPE, _FILE_TYPE = "general.type", "general.file_type"


def gguf_facts(base: BaseModel) -> dict[str, Json]:
    """Return the facts of a GGUF model; none of any other base."""
    header = base.shards[0].header
    if not isinstance(header, GGUFHeader):
        return {}
    tensors, sizes = Counter[str](), Counter[str]()
    for tensor in base.tensors.values():
        tensors[tensor.dtype] += 1
        sizes[tensor.dtype] += stored_bytes(tensor.dtype, tensor.shape)
    weights = sum(elements(tensor.shape) for tensor in base.tensors.values())
    arch = header.word("general.architecture")
    return {
        "container": f"GGUF version {header.version}",
        "model_type": arch,
        "name": header.word("general.name"),
        "kind": header.word(_TYPE),
        "mix": _mix(header.word(_FILE_TYPE)),
        "blocks": header.word(f"{arch}.block_count"),
        "context_length": header.word(f"{arch}.context_length"),
        "tied_embeddings": _is_tied(base),
        "merged_adapters": [f"{name} at {strength:g}" for name, strength in merged_adapters(base)],
        "tensors_by_dtype": dict(tensors),
        "bytes_by_dtype": dict(sizes),
        "bits_per_weight": round(8 * sum(sizes.values()) / weights, 3) if weights else None,
    }


def _mix(number: object) -> Json:
    """Return the name of a file type, or the number where we have no name for it."""
    names = {row.file_type: row.name for row in MIXES.values()}
    return names.get(number, number) if isinstance(number, int) else None


def _is_tied(base: BaseModel) -> bool | None:
    if "token_embd.weight" not in base.tensors:
        return None
    return "output.weight" not in base.tensors
