"""The tensors of a base: as they lie in its files, and the weights that several of them make up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import CorruptFileError, UnsupportedError
from loratools.keymaps.linear_layers import LinearLayers
from loratools.tensorfiles.dtypes import DTYPES, FLOAT_NAMES

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.codecs.packed import PackedWeight
    from loratools.codecs.scheme_records import Packing


@dataclass(frozen=True, slots=True, eq=False)
class BaseTensor:
    """One tensor of a base and where its values are.

    Attributes:
        name: as the checkpoint calls it.
        dtype: safetensors' word (``BF16``), or ggml's name of a type (``Q4_K``).
        shape: as stored.
        file: the shard that holds it.
        start: absolute byte offset of its contiguous values in ``file``, or ``None`` when they
            are in ``values`` or ``packed``.
        values: the (memory-mapped) tensor, for containers without byte ranges.
        packed: the stored tensors that the weight is made of; ``dtype`` is then the float type it
            stands for, and ``shape`` that of the float weight.
        rows: reads the rows from one number up to another, (n, columns) of ``dtype``, of values
            that are put together from several tensors.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int | None = None
    values: Tensor | None = None
    packed: StoredParts | None = None
    rows: Callable[[int, int], Tensor] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StoredParts:
    """The stored tensors of one quantised weight.

    Attributes:
        scheme: as reports call it.
        tensors: part → the stored tensor.
        build: makes the weight of its parts' values.
        companions: stored tensors that only matter beside the parts (scales of activations).
        turned: whether the float weight's last two axes are those of the stored codes turned over
            (gpt-oss stores experts as (out, in) and computes with (in, out)).
    """

    scheme: str
    tensors: Mapping[str, BaseTensor]
    build: Callable[[Mapping[str, Tensor]], PackedWeight]
    companions: tuple[BaseTensor, ...] = ()
    turned: bool = False

    def open(self) -> PackedWeight:
        """Return the weight; its parts are mapped into memory, pages are read when touched."""
        return self.build({part: read_stored(tensor) for part, tensor in self.tensors.items()})


def elements(shape: Sequence[int]) -> int:
    """Return the number of elements of a shape."""
    count = 1
    for size in shape:
        count *= size
    return count


def as_stored(tensor: BaseTensor) -> BaseTensor:
    """Return a packed weight with its axes in the order of the stored codes."""
    if tensor.packed is None or not tensor.packed.turned:
        return tensor
    *leading, one, other = tensor.shape
    straight = replace(tensor.packed, turned=False)
    return replace(tensor, shape=(*leading, other, one), packed=straight)


def read_stored(tensor: BaseTensor) -> Tensor:
    """Return one stored tensor's values, mapped into memory.

    Raises CorruptFileError if the file ends before it.
    """
    import torch

    from loratools.tensorfiles.dtypes import torch_dtype

    if tensor.values is not None:
        return tensor.values
    assert tensor.start is not None
    dtype = torch_dtype(tensor.dtype)
    stop = tensor.start + elements(tensor.shape) * DTYPES[tensor.dtype] // 8
    size = tensor.file.stat().st_size
    if size < stop:
        raise CorruptFileError(
            f"{tensor.file}: ends inside {tensor.name}", hint="was it changed meanwhile?"
        )
    if stop == tensor.start:
        return torch.empty(tensor.shape, dtype=dtype)
    mapped = torch.from_file(str(tensor.file), shared=False, size=size, dtype=torch.uint8)
    storage = mapped.untyped_storage()[tensor.start : stop]
    if tensor.start % dtype.itemsize:
        storage = storage.clone()
    return torch.empty(0, dtype=dtype).set_(storage).view(tensor.shape)


# ── finding them ─────────────────────────────────────────────────────────────────────────────

QUANTISATION_FIELDS = ("quantization_config", "compression_config", "quantization")
"""Fields of ``config.json`` that speak of quantisation."""

DTYPE_FIELDS = ("dtype", "torch_dtype")
"""Fields that name the weights' float type; transformers 5 renamed the second."""

# What some schemes keep beside a weight for the activations, or as a mark.
_COMPANIONS = (
    ".input_scale", ".scale_input", ".input_global_scale", ".input_zero_point", ".output_scale",
    ".output_zero_point", ".activation_scale", ".comfy_quant",
)  # fmt: skip
_TURNING = ("bitsandbytes 4-bit", "bitsandbytes int8")
"""Schemes that store transposed layers as (out, in)."""

_WORDS = {"half": "F16", "float": "F32"} | {
    name: word for word, name in FLOAT_NAMES.items() if word != "F64"
}


def text_sections(config: Mapping[str, Any] | None) -> tuple[Mapping[str, Any], ...]:
    """Return a config's sections that speak of the text model: the whole, and its own if any."""
    config = config or {}
    text = config.get("text_config")
    return (config, text) if isinstance(text, Mapping) else (config,)


def quantisation_words(config: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """Return what ``config.json`` says of quantisation; empty if it says nothing."""
    for section in text_sections(config):
        for name in QUANTISATION_FIELDS:
            if isinstance(section.get(name), Mapping) and section[name]:
                found: Mapping[str, Any] = section[name]
                return found
    return {}


def quantisation_fields(config: Mapping[str, Any]) -> list[str]:
    """Return the fields of a config that speak of quantisation, at the top or in its text part."""
    sections = text_sections(config)
    return [name for name in QUANTISATION_FIELDS if any(name in section for section in sections)]


def float_word(config: Mapping[str, Any] | None) -> str | None:
    """Return the safetensors word of the float type that a config names, if it does."""
    for section in text_sections(config):
        for name in DTYPE_FIELDS:
            if str(section.get(name)) in _WORDS:
                return _WORDS[str(section[name])]
    return None


def _model_types(config: Mapping[str, Any] | None) -> set[str]:
    config = config or {}
    sections = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    return {str(part["model_type"]) for part in sections if part.get("model_type")}


def find_weights(
    stored: Sequence[BaseTensor],
    config: Mapping[str, Any] | None,
    metadata: Mapping[str, str] | None = None,
) -> tuple[BaseTensor, ...]:
    """Return the packed weights among a checkpoint's stored tensors.

    Args:
        stored: of all files.
        config: ``config.json``.
        metadata: words of the files' headers.

    Raises:
        CorruptFileError: a part is missing, or shapes disagree.
        UnsupportedError: a scheme that cannot be read, with the reason.
    """
    from loratools.codecs.schemes import find_packed

    by_name = {tensor.name: tensor for tensor in stored}
    words = quantisation_words(config)
    packings = find_packed(by_name, words, lambda name: read_stored(by_name[name]), metadata)
    named = float_word(config)
    layers = LinearLayers(_model_types(config), by_name)
    found = tuple(_weight(packing, by_name, named, layers) for packing in packings)
    _refuse_strange(stored, found, words)
    return found


def _weight(
    packing: Packing,
    stored: Mapping[str, BaseTensor],
    named: str | None,
    layers: LinearLayers,
) -> BaseTensor:
    parts = {part: stored[name] for part, name in packing.names.items()}
    module = packing.weight.removesuffix(".weight")
    beside = tuple(stored[module + end] for end in _COMPANIONS if module + end in stored)
    shape = tuple(packing.shape)
    # gpt-oss: transformers' parameter is the stored matrix turned over. bitsandbytes turns Conv1D.
    turned = packing.scheme == "mxfp4" and len(shape) == 3
    if packing.scheme in _TURNING:
        turned = layers.is_turned(packing.weight)
    if turned:
        shape = (*shape[:-2], shape[-1], shape[-2])
    own = StoredParts(packing.scheme, parts, packing.build, beside, turned)
    dtype = named or packing.dtype or "BF16"
    return BaseTensor(packing.weight, dtype, shape, next(iter(parts.values())).file, packed=own)


def _refuse_strange(
    stored: Sequence[BaseTensor], found: Sequence[BaseTensor], words: Mapping[str, Any]
) -> None:
    """Refuse weights of few bits that are in no known scheme, where the config says quantised."""
    if not words:
        return
    taken = {
        part.name for weight in found if weight.packed for part in weight.packed.tensors.values()
    }
    for tensor in stored:
        narrow = DTYPES.get(tensor.dtype, 16) <= 8 and len(tensor.shape) > 1
        if narrow and tensor.name.endswith(".weight") and tensor.name not in taken:
            method = words.get("quant_method") or words.get("format") or "unknown"
            raise UnsupportedError(
                f"{tensor.name}: {tensor.dtype} {tensor.shape} is in no scheme that loratools "
                f"knows (the config says {method!r})",
                hint="merge into the 16-bit original of this base",
            )
