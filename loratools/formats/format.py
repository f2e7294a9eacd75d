"""The record that describes an adapter file syntax, and the values it reads and writes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from loratools.adapter import Adapter


@dataclass(frozen=True, slots=True)
class Listing:
    """What detection may see of a file: no values.

    Attributes:
        shapes: tensor name → shape.
        metadata: the container's string metadata.
        sidecars: file name → text of the small files beside the weights.
    """

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    sidecars: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True, eq=False)
class Bundle:
    """An adapter file without its path: what a reader takes and a writer gives.

    Attributes:
        tensors: name → tensor, as stored.
        metadata: the container's string metadata.
        sidecars: file name → text.
        source: how errors call this input.
    """

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    sidecars: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    source: str = "adapter"


@dataclass(frozen=True, slots=True)
class Format:
    """An adapter syntax.

    Attributes:
        name: the word for ``--to`` and in reports.
        title: one line for people.
        spec: URL of the documentation or code that defines it.
        holds: kinds of deltas (``LayerDelta.kind``) that it can express.
        matches: whether a Listing is in this syntax; exactly one format must say yes.
        read: Bundle → Adapter; raises MalformedAdapterError or UnsupportedError.
        write: Adapter → Bundle; raises UnsupportedError for what it cannot hold.
        naming: which names its module paths are written in.
        weights_file: the weights' file name inside an adapter folder; ``None`` for formats that
            are a single file of any name.
        losses: Adapter → what ``write`` would refuse, as module path or extra → reason; ``None``
            where only ``write`` knows.
        read_only: whether ``write`` always refuses, because no tool needs such files any more.
        container: what its weights file is.
        has_side_files: whether files stand beside the weights, so that they are always a folder.
    """

    name: str
    title: str
    spec: str
    holds: frozenset[str]
    matches: Callable[[Listing], bool]
    read: Callable[[Bundle], Adapter]
    write: Callable[[Adapter], Bundle]
    naming: str = "transformers"
    weights_file: str | None = None
    losses: Callable[[Adapter], Mapping[str, str]] | None = None
    read_only: bool = False
    container: Literal["safetensors", "gguf"] = "safetensors"
    has_side_files: bool = False

    def is_folder(self, output: str | os.PathLike[str]) -> bool:
        """Return whether what is written to ``output`` is a folder with the weights in it."""
        alone = not self.has_side_files and Path(output).suffix == ".safetensors"
        return self.weights_file is not None and not alone
