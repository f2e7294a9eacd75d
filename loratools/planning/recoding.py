"""A GGUF model in other types: which tensor gets which, by llama.cpp's mixes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from loratools.basemodel import BaseModel, BaseTensor, elements
from loratools.codecs.ggml import GGML_TYPES
from loratools.codecs.ggml_mixes import ALIASES, MIXES, Mix, ModelFacts, choose_types, find_mix
from loratools.errors import InputError, OptionError, UnsupportedError
from loratools.planning.base_names import is_image
from loratools.planning.pack_targets import PACKED_TARGETS
from loratools.report import Json, Note
from loratools.streaming.checkpoint import Checkpoint, plan_checkpoint, with_words
from loratools.streaming.stored import block_elements
from loratools.streaming.works import TensorWork
from loratools.suggest import did_you_mean
from loratools.tensorfiles.dtypes import DTYPES, FLOAT_WORDS
from loratools.tensorfiles.gguf import GGUFHeader
from loratools.tensorfiles.gguf_reading import Value
from loratools.tensorfiles.gguf_types import ValueType

FLOAT_MIXES: Mapping[str, str] = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
"""``--dtype``'s word → the mix of that type."""

_NEED_MATRIX = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M",
    "Q2_K_S",
)  # fmt: skip
_IMATRIX = "quantize.imatrix."
_IN_BLOCK = re.compile(r"(?:^|\.)\w*(?:blocks|layers|block)\.\d+\.")


@dataclass(frozen=True, slots=True)
class Recoding:
    """A planned output.

    Attributes:
        checkpoint: the output.
        mix: the name of what it is.
        notes: decisions to report.
    """

    checkpoint: Checkpoint
    mix: str
    notes: tuple[Note, ...]


def writable_mix(name: str) -> Mix:
    """Return the mix that the user names.

    Raises:
        UnsupportedError: a type that takes an importance matrix, with the choice there is.
        OptionError: no such type.
    """
    upper = name.upper()
    if upper in _NEED_MATRIX:
        row = GGML_TYPES.get(upper)
        remedy = row.codec.remedy if row else None
        raise UnsupportedError(
            f"{name}: this type takes an importance matrix of the model's activations, which "
            "weights alone do not give",
            hint=remedy or "choose a type that needs none: q2_k, q3_k_m, iq4_xs, q4_k_m ...",
        )
    if ALIASES.get(upper, upper) not in MIXES:
        raise OptionError(
            f"unknown type {name!r}",
            hint=did_you_mean(name, [*(mix.lower() for mix in MIXES), *PACKED_TARGETS]),
        )
    return find_mix(name)


def plan_recoding(base: BaseModel, mix: Mix) -> Recoding:
    """Plan a GGUF model's tensors in the types of a mix.

    Tensors that already are of their type are copied, as are those that llama.cpp never quantises.

    Raises:
        InputError: nothing would change.
        UnsupportedError: an adapter, or a tensor of a type that cannot be read.
    """
    types = {
        name: wanted
        for name, wanted in chosen_types(base, mix).items()
        if wanted is not None and wanted != base.tensors[name].dtype
    }
    if not types:
        raise InputError(
            f"{base.path}: already is {mix.name}: nothing would change", hint="copy the file"
        )
    return Recoding(_checkpoint(base, types, mix), mix.name, tuple(_notes(base, types, mix)))


def plan_dequantising(base: BaseModel, dtype: str | None) -> Recoding:
    """Plan a GGUF model in plain numbers.

    Args:
        base: the model.
        dtype: ``fp32``, ``fp16`` or ``bf16`` for every matrix; ``None``: float16 for tensors in
            blocks, and the others as they are.

    Raises:
        InputError: nothing would change.
        UnsupportedError: an adapter, or a tensor of a type that cannot be read.
    """
    mix = MIXES[FLOAT_MIXES[dtype or "fp16"]]
    in_blocks = {name: t for name, t in base.tensors.items() if t.dtype not in DTYPES}
    types = {name: mix.name if len(t.shape) > 1 else "F32" for name, t in in_blocks.items()}
    if dtype is not None:
        wanted = chosen_types(base, mix).items()
        types |= {n: kind for n, kind in wanted if kind and kind != base.tensors[n].dtype}
    if not types:
        raise InputError(
            f"{base.path}: holds plain numbers: nothing would change",
            hint="copy the file, or choose another type with --dtype",
        )
    return Recoding(_checkpoint(base, types, mix), mix.name, ())


def chosen_types(base: BaseModel, mix: Mix) -> dict[str, str | None]:
    """Return the type that every tensor gets in a mix, or ``None`` for one that stays.

    Raises UnsupportedError for an adapter.
    """
    header = first_header(base)
    if header.word("general.type") == "adapter":
        raise UnsupportedError(
            f"{base.path}: an adapter, not a model",
            hint="`loratools convert --dtype` changes the type of adapters",
        )
    folded = {
        name: tensor.shape
        for shard in base.shards
        if isinstance(shard.header, GGUFHeader)
        for name, tensor in shard.header.tensors.items()
    }
    chosen = choose_types(mix, folded, model_facts(header, base))
    image = is_image(base)
    return {
        name: None if _stays(base.tensors[name], image=image) else kind
        for name, kind in chosen.items()
    }


def _stays(tensor: BaseTensor, *, image: bool) -> bool:
    """Return whether a tensor is kept where the mixes, made for language models, say nothing."""
    if tensor.dtype in DTYPES and tensor.dtype not in FLOAT_WORDS:
        return True
    outside = not _IN_BLOCK.search(tensor.name) or "embed" in tensor.name
    return image and (outside or len(tensor.shape) != 2)


def first_header(base: BaseModel) -> GGUFHeader:
    """Return the header that has the metadata; raises UnsupportedError if the base is no GGUF."""
    header = base.shards[0].header
    if not isinstance(header, GGUFHeader):
        raise UnsupportedError(f"{base.path}: not a GGUF model", hint="name a .gguf file")
    return header


def model_facts(header: GGUFHeader, base: BaseModel) -> ModelFacts:
    """Return what the mixes' rules ask of a model."""
    arch = str(header.word("general.architecture") or "")

    def number(word: str) -> int:
        value = header.word(f"{arch}.{word}")
        value = value[0] if isinstance(value, list) and value else value
        return value if isinstance(value, int) else 0

    found = {int(m[1]) for name in base.tensors if (m := re.match(r"blk\.(\d+)\.", name))}
    heads = number("attention.head_count")
    said = header.word(f"{arch}.attention.head_count_kv")
    kv_heads = heads if said is None else number("attention.head_count_kv")
    layers = number("block_count") or len(found)
    return ModelFacts(arch, layers, heads, kv_heads, number("expert_count"))


def _checkpoint(base: BaseModel, types: Mapping[str, str], mix: Mix) -> Checkpoint:
    works = {
        name: TensorWork(name, kind, base.tensors[name].shape, base.tensors[name])
        for name, kind in types.items()
    }
    for work in works.values():
        _check_types(work)
    metadata = first_header(base).metadata
    gone = [key for key in metadata if key.startswith(_IMATRIX)]
    words: dict[str, Value | None] = dict.fromkeys(gone)
    return with_words(plan_checkpoint(base, works), {**words, **type_words(mix)})


def type_words(mix: Mix) -> dict[str, Value]:
    """Return the metadata that say which types a file has."""
    return {
        "general.quantization_version": Value(ValueType.UINT32, 2),
        "general.file_type": Value(ValueType.UINT32, mix.file_type),
    }


def _check_types(work: TensorWork) -> None:
    for word in (work.dtype, work.source.dtype):
        if word not in DTYPES and word not in GGML_TYPES:
            raise UnsupportedError(
                f"{work.name}: stored as {word}, which cannot be read",
                hint=f"types that can: {', '.join(GGML_TYPES)}",
            )


def _notes(base: BaseModel, types: Mapping[str, str], mix: Mix) -> Iterator[Note]:
    before = Counter(base.tensors[name].dtype for name in types)
    again = {word: count for word, count in before.items() if word not in DTYPES}
    if again:
        kinds = ", ".join(f"{count} {word}" for word, count in again.items())
        yield Note(
            f"{sum(again.values())} tensors were quantised before ({kinds}): what that lost stays "
            "lost, and this rounding adds to it (llama-quantize asks for --allow-requantize); "
            "better start from the 16-bit model",
            "warning",
        )
    size = block_elements(mix.default)
    short = Counter(kind for name, kind in types.items() if base.tensors[name].shape[-1] % size)
    if short:
        kinds = ", ".join(f"{count} as {kind}" for kind, count in short.items())
        yield Note(f"rows that are no whole blocks of {mix.default} are stored otherwise: {kinds}")


def size_facts(base: BaseModel, checkpoint: Checkpoint) -> dict[str, Json]:
    """Return the report's figures of an output beside its base."""
    works = checkpoint.works.values()
    before = sum(unit.nbytes for unit in _as_they_are(base))
    weights = sum(elements(work.shape) for work in works)
    counts = Counter(work.dtype for work in works)
    return {
        "tensors": len(works),
        "tensors_coded": sum(not is_copied(work) for work in works),
        "tensors_by_dtype": dict(counts),
        "parameters": weights,
        "bytes_before": before,
        "bytes_written": checkpoint.nbytes,
        "bits_per_weight": round(8 * checkpoint.nbytes / weights, 3) if weights else None,
    }


def is_copied(work: TensorWork) -> bool:
    """Return whether a tensor's bytes are those of the base, in their order."""
    return work.is_copy and work.source.rows is None


def _as_they_are(base: BaseModel) -> Iterator[TensorWork]:
    for shard in base.shards:
        for tensor in shard.tensors:
            yield TensorWork(tensor.name, tensor.dtype, tensor.shape, tensor)
