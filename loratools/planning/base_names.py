"""An adapter's paths as a base spells them: from any naming to the base's own tensor names."""

from __future__ import annotations

from dataclasses import replace

from loratools.adapter import Adapter
from loratools.basemodel import BaseModel
from loratools.errors import MatchError, UnknownArchitectureError
from loratools.keymaps.architecture import Architecture
from loratools.keymaps.detection import possible_architectures, told_architectures
from loratools.keymaps.gguf_base import open_gguf_base
from loratools.keymaps.gguf_naming import renamed_gguf
from loratools.keymaps.mlx_base import MLXBase
from loratools.keymaps.mlx_naming import NAMING as MLX
from loratools.keymaps.mlx_naming import has_stacks, is_mlx_named, renamed_mlx
from loratools.keymaps.mlx_tying import with_tied_head
from loratools.keymaps.names import NameIndex
from loratools.keymaps.translate import (
    detect_architecture,
    detect_base,
    find_architecture,
    translate,
)
from loratools.keymaps.vocabulary import vocabulary_of
from loratools.planning.gguf_extras import in_gguf_names


def in_base_names(adapter: Adapter, base: BaseModel, arch: str | None = None) -> Adapter:
    """Return the adapter with the paths and the layout that the base has.

    Adapters of transformers' models are looked up as they are (see ``NameIndex``). Those of
    diffusion models are translated through the rows of their architecture.

    Args:
        adapter: in any naming.
        base: whose tensor names and shapes are the vocabulary.
        arch: the architecture, where the files do not tell.

    Raises:
        UnknownArchitectureError: the adapter's modules are those of no known architecture.
        MatchError: adapter and base are of different architectures; or modules without a name.
    """
    adapter = _across_mlx(adapter, base)
    if base.is_gguf and not is_image(base):
        known = open_gguf_base(base.path)
        return in_gguf_names(renamed_gguf(adapter, "gguf", known, for_merge=True), base, known)
    if adapter.naming == "gguf":
        return renamed_gguf(adapter, "transformers", open_gguf_base(base.path))
    if adapter.naming == "transformers" and (_fits_as_it_is(adapter, base) or not is_image(base)):
        return adapter
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    if arch:
        architecture = find_architecture(arch)
    else:
        architecture = common_architecture(adapter, base, _architecture_of(base, adapter))
    return translate(adapter, architecture, "checkpoint", shapes=shapes)


def _across_mlx(adapter: Adapter, base: BaseModel) -> Adapter:
    """Return the adapter in the base's names where one of the two is mlx-lm's, else as it is.

    Names that the base has are taken as they stand, whoever gave them.
    """
    shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
    known = MLXBase(base.config or {}, {} if base.is_gguf else shapes)
    named = is_mlx_named(known)
    if adapter.naming == MLX:
        there = named or (not has_stacks(adapter) and _fits_as_it_is(adapter, base))
        layers = with_tied_head(adapter.layers, known)
        fits = replace(adapter, layers=layers, naming="transformers")
        return fits if there else renamed_mlx(adapter, "transformers", known, for_merge=True)
    if adapter.naming == "transformers" and named and not _fits_as_it_is(adapter, base):
        return replace(renamed_mlx(adapter, MLX, known), naming="transformers")
    return adapter


def _architecture_of(base: BaseModel, adapter: Adapter) -> Architecture:
    """Return the base's architecture.

    Raises MatchError, naming the adapter's, where the base's names tell none.
    """
    try:
        return detect_base({name: tensor.shape for name, tensor in base.tensors.items()})
    except UnknownArchitectureError as error:
        ours = told_architectures(adapter.metadata) or possible_architectures(adapter)
        if not ours:
            raise
        raise MatchError(
            f"the adapter is for {ours[0].title}, and {base.path} does not look it: "
            f"{error.message}",
            hint=f"give the base that it was trained on, or say --arch {ours[0].id} if this is one",
        ) from error


def common_architecture(adapter: Adapter, base: BaseModel, theirs: Architecture) -> Architecture:
    """Return the base's architecture if the adapter is for it, by its own words or its names.

    Raises MatchError, naming both, if it is for another.
    """
    told = told_architectures(adapter.metadata)
    known = vocabulary_of(theirs).resolve(adapter.layers, adapter.naming)
    if all(hit is not None for hit in known.values()) and (not told or theirs in told):
        return theirs
    ours = told[0] if told else detect_architecture(adapter)
    if ours.id == theirs.id:
        return theirs
    raise MatchError(
        f"the adapter is for {ours.title} and {base.path} is {theirs.title}",
        hint="give a base of the adapter's architecture, or settle it with --arch",
    )


def _fits_as_it_is(adapter: Adapter, base: BaseModel) -> bool:
    index = NameIndex(base.tensors)
    return all(
        any(index.find(f"{path}.{leaf}".rstrip(".")) for leaf in delta.parameter_names)
        for path, delta in adapter.layers.items()
    )


def is_image(base: BaseModel) -> bool:
    """Return whether the base is a diffusion model that rows know."""
    try:
        detect_base({name: tensor.shape for name, tensor in base.tensors.items()})
    except UnknownArchitectureError:
        return False
    return True
