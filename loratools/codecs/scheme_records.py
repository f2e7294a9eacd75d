"""The records by which quantised weights are recognised among a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from loratools.codecs.packed import PackedWeight
from loratools.errors import CorruptFileError


class Spec(Protocol):
    """What a header says of a tensor: safetensors' dtype word and the shape."""

    @property
    def dtype(self) -> str:
        """Return the dtype's word (``BF16``)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape as stored."""


@dataclass(frozen=True, slots=True)
class Found:
    """The stored tensors of one module, before they are understood.

    Attributes:
        module: the name that they share.
        names: part → the stored tensor's name.
        specs: part → its dtype and shape.
        config: the checkpoint's quantisation config; empty if it has none.
        read: returns a (small) stored tensor by name.
    """

    module: str
    names: Mapping[str, str]
    specs: Mapping[str, Spec]
    config: Mapping[str, Any]
    read: Callable[[str], Tensor]

    def dtype(self, part: str) -> str:
        """Return a part's dtype word."""
        return self.specs[part].dtype

    def shape(self, part: str) -> tuple[int, ...]:
        """Return a part's shape."""
        return tuple(self.specs[part].shape)

    def value(self, part: str) -> Tensor:
        """Return a part's tensor."""
        return self.read(self.names[part])

    def fault(self, scheme: str, problem: str) -> CorruptFileError:
        """Return the error for parts that do not belong together."""
        return CorruptFileError(
            f"{self.module}: stored as {scheme}, but {problem}", hint="fetch or save the file again"
        )


Build = Callable[[Mapping[str, Tensor]], PackedWeight]


@dataclass(frozen=True, slots=True)
class Packing:
    """One weight of a quantised checkpoint.

    Attributes:
        scheme: as reports call it.
        weight: the name of the float tensor that it stands for.
        shape: of that tensor.
        names: part → the stored tensor's name.
        build: makes the weight of its stored tensors, by part.
        dtype: safetensors' word of the float type it was made from, if the file tells.
    """

    scheme: str
    weight: str
    shape: tuple[int, ...]
    names: Mapping[str, str]
    build: Build
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Scheme:
    """How to find one kind of packed weight, and what it is.

    Attributes:
        name: as reports call it.
        marker: the ending of the stored name that gives a module away.
        parts: part → endings, of which the first that is there is taken.
        applies: whether a module with that marker is of this kind.
        understand: returns shape, builder and dtype word of a module.
        optional: parts that may be absent.
        weight: the ending of the float tensor's name.
    """

    name: str
    marker: str
    parts: Mapping[str, tuple[str, ...]]
    applies: Callable[[Found], bool]
    understand: Callable[[Found], tuple[tuple[int, ...], Build, str | None]]
    optional: frozenset[str] = field(default_factory=frozenset)
    weight: str = ".weight"
