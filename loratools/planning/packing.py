"""A checkpoint of plain numbers in a packed scheme, as the scheme's own tool would write it."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from loratools.basemodel import BaseModel, BaseTensor
from loratools.codecs.packers import BnB4Packer, Int8Packer, Packer
from loratools.errors import InputError, UnsupportedError
from loratools.keymaps.linear_layers import LinearLayers
from loratools.planning.pack_targets import Target
from loratools.planning.tied_embeddings import find_tie
from loratools.report import Note
from loratools.streaming.checkpoint import (
    Checkpoint,
    output_dtype,
    plan_checkpoint,
)
from loratools.streaming.derived import rounded, turned
from loratools.streaming.layouts import FileWork
from loratools.streaming.works import TensorWork
from loratools.tensorfiles.dtypes import DTYPES, FLOAT_NAMES, FLOAT_WORDS

_ROUTERS = re.compile(r"(^|\.)(gate|router|shared_expert_gate)\.(weight|\w+\.weight)$")
_BITSANDBYTES = (BnB4Packer, Int8Packer)
# transformers 5.23 quantizers/base.py: MODULES_TO_PATCH_FOR_QUANTIZATION.
_ONE_BY_ONE = frozenset({"llama4", "llama4_text"})
_EXPERT = re.compile(r"(\w+\.experts)\.")


@dataclass(frozen=True, slots=True)
class Packed:
    """The layers of a checkpoint that are to be packed.

    Attributes:
        works: the weight's name → the work that packs it.
        config: fields of ``config.json``.
        notes: decisions to report.
    """

    works: Mapping[str, TensorWork]
    config: Mapping[str, Any]
    notes: tuple[Note, ...]


def plan_packing(
    base: BaseModel,
    target: Target,
    title: str,
    *,
    dtype: str = "keep",
    only: Collection[str] | None = None,
) -> tuple[Checkpoint, tuple[Note, ...]]:
    """Plan the linear layers of a checkpoint in a packed scheme; see ``pack_works``."""
    _refuse_unloadable(base, target)
    packed = pack_works(base, target, title, dtype=dtype, only=only)
    shards = tuple(replace(shard, metadata={"format": target.metadata}) for shard in base.shards)
    whole = replace(base, shards=shards)
    checkpoint = plan_checkpoint(whole, packed.works, config=packed.config, dtype=dtype)
    files = tuple(_aligned(file) for file in checkpoint.files)
    return replace(checkpoint, files=files), packed.notes


def pack_works(
    base: BaseModel,
    target: Target,
    title: str,
    *,
    dtype: str = "keep",
    only: Collection[str] | None = None,
) -> Packed:
    """Choose the layers of a checkpoint that a scheme packs, as its own tool does.

    Args:
        base: of plain numbers.
        target: the scheme.
        title: what notes call it.
        dtype: ``keep``, or the word of the float type that weights are rounded to before.
        only: the weights to pack; by default all that the tool would.

    Raises:
        UnsupportedError: a base that is quantised already, GGUF, or whose layers lie turned over.
        InputError: no linear layer that the scheme could hold.
    """
    layers = linear_layers(base)
    _refuse(base, target, layers)
    choose = _Chooser(target, layers, only)
    chosen = {t.name: p for t in base.tensors.values() if (p := choose.packer(t))}
    if not chosen:
        raise InputError(
            f"{base.path}: no matrix that {target.packer.scheme} could hold",
            hint="is this a model whose layers transformers would quantise?",
        )
    works = {
        name: _work(base.tensors[name], packer, layers, dtype) for name, packer in chosen.items()
    }
    left = _left(base, chosen, layers)
    words = target.config(_skipped(base, left, layers), _float_name(base, dtype))
    notes = [Note(f"{len(works)} matrices are coded as {target.packer.scheme} ({title})")]
    if left:
        shown = ", ".join(left[:4]) + (f" and {len(left) - 4} more" if left[4:] else "")
        notes.append(Note(f"left as they are: {shown}"))
    return Packed(works, words, tuple(notes))


def linear_layers(base: BaseModel) -> LinearLayers:
    """Return the rules by which a base's linear layers are told."""
    types = [str(kind) for kind in base.config_words("model_type")]
    return LinearLayers(types, base.tensors)


def coded_layers(base: BaseModel, skip: Collection[str] | None) -> frozenset[str]:
    """Return the weights that transformers would quantise, told to skip these modules."""
    layers = linear_layers(base)
    matrices = (t for t in base.tensors.values() if len(t.shape) == 2)
    return frozenset(t.name for t in matrices if layers.is_coded(t.name, skip))


@dataclass(frozen=True, slots=True)
class _Chooser:
    """Which scheme each tensor gets, if any."""

    target: Target
    layers: LinearLayers
    only: Collection[str] | None

    def packer(self, tensor: BaseTensor) -> Packer | None:
        """Return the tensor's scheme, or None for one that stays."""
        target, name = self.target, tensor.name
        packer = target.own.get(name.removesuffix(".weight"), target.packer)
        shape = tensor.shape[::-1] if self.layers.is_turned(name) else tensor.shape
        if tensor.dtype not in FLOAT_NAMES or packer is None or not packer.fits(shape):
            return None
        return packer if self._is_taken(name) else None

    def _is_taken(self, name: str) -> bool:
        if self.only is not None:
            return name in self.only
        if self.target.tables:
            whole = name.endswith(".weight") and "norm" not in name
            return whole and not _ROUTERS.search(name)
        return self.layers.is_coded(name, self.target.skip, experts=self.target.experts)


def _work(tensor: BaseTensor, packer: Packer, layers: LinearLayers, dtype: str) -> TensorWork:
    word = output_dtype("F32" if tensor.dtype == "F64" else tensor.dtype, dtype)
    source = tensor if word == tensor.dtype else rounded(tensor, word)
    if layers.is_turned(tensor.name):
        source = turned(source)
    return TensorWork(tensor.name, packer.scheme, source.shape, source, packer=packer)


def _left(base: BaseModel, chosen: Collection[str], layers: LinearLayers) -> list[str]:
    """Return the modules that stay as they are."""
    stay = (
        tensor.name.removesuffix(".weight")
        for tensor in base.tensors.values()
        if tensor.name not in chosen
        and (_EXPERT.search(tensor.name) or (_is_matrix(tensor) and layers.is_linear(tensor.name)))
    )
    # All experts by one word: there may be thousands.
    return sorted({match[1] if (match := _EXPERT.search(name)) else name for name in stay})


def _skipped(base: BaseModel, left: Collection[str], layers: LinearLayers) -> list[str]:
    """Return the words by which a loader knows what stays, heads also by their names in memory."""
    heads = {name for name in left if layers.is_head(name)}
    tie = find_tie(base)
    if tie and tie.tied and not tie.stored:
        heads.add(tie.head.removesuffix(".weight"))
    # Whatever the head is called on disk, and where: a word is also the ending of a name.
    return sorted({*left, *heads, *(("lm_head",) if heads else ())})


def _is_matrix(tensor: BaseTensor) -> bool:
    return tensor.dtype in FLOAT_WORDS and len(tensor.shape) == 2


def _float_name(base: BaseModel, dtype: str) -> str:
    return FLOAT_NAMES[output_dtype(base.main_dtype, dtype)]


def _refuse(base: BaseModel, target: Target, layers: LinearLayers) -> None:
    if base.is_gguf or base.packed:
        raise UnsupportedError(
            f"{base.path}: quantised already, or GGUF",
            hint="`loratools dequantize` it first; better, give the 16-bit original",
        )
    if isinstance(target.packer, _BITSANDBYTES):
        return
    if any(map(layers.is_turned, base.tensors)):
        raise UnsupportedError(
            f"{base.path}: its layers are stored turned over (Conv1D), which "
            f"{target.packer.scheme} has no word for",
            hint="use nf4, fp4 or int8, which bitsandbytes turns back",
        )


def _refuse_unloadable(base: BaseModel, target: Target) -> None:
    """Refuse what transformers quantises in memory and cannot load again."""
    fused = any(name.endswith(".experts.gate_up_proj") for name in base.tensors)
    types = _ONE_BY_ONE.intersection(map(str, base.config_words("model_type")))
    if fused and types and isinstance(target.packer, _BITSANDBYTES):
        raise UnsupportedError(
            f"{base.path}: transformers loads Llama 4 from bitsandbytes with its experts one by "
            "one alone, and here they are one tensor",
            hint="use --to fp8, or let bitsandbytes quantise it while loading",
        )


def _aligned(file: FileWork) -> FileWork:
    """Return a file with wide types first, so that numbers start at multiples of their size."""
    order = sorted(file.tensors, key=lambda work: (-DTYPES[work.dtype], work.name))
    return replace(file, tensors=tuple(order))
