"""The records by which quantised weights are recognised among a checkpoint's tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from loratools.codecs.packed import PackedWeight
from loratools.errors import CorruptFileError, UnsupportedError

FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
FLOATS8 = frozenset({"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ"})
EXPONENTS = frozenset({"U8", "F8_E8M0"})
WHOLE = frozenset({"I8", "U8", "I16", "I32", "I64"})

FLOAT_NAMES: Mapping[str, str] = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""torch's names of the float types that weights are quantised from → dtype words."""

ORIGINAL = "merge into the 16-bit original of this base"
"""The next step where a scheme cannot be read."""

AGAIN = "fetch or save the file again"
"""The next step where a file contradicts itself."""


def always(found: Found) -> bool:
    """Return True: a scheme that its marker alone tells."""
    return True


def float_word(name: object) -> str | None:
    """Return the dtype word of a float type by torch's name, with or without ``torch.``."""
    return FLOAT_NAMES.get(str(name).removeprefix("torch."))


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
        metadata: words of the files' headers.
    """

    module: str
    names: Mapping[str, str]
    specs: Mapping[str, Spec]
    config: Mapping[str, Any]
    read: Callable[[str], Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def dtype(self, part: str) -> str:
        """Return a part's dtype word."""
        return self.specs[part].dtype

    def shape(self, part: str) -> tuple[int, ...]:
        """Return a part's shape."""
        return tuple(self.specs[part].shape)

    def value(self, part: str) -> Tensor:
        """Return a part's tensor."""
        return self.read(self.names[part])

    def sizes(self, part: str) -> tuple[int, ...]:
        """Return the whole numbers that a small part holds."""
        return tuple(int(size) for size in self.value(part).flatten().tolist())

    def expect(self, scheme: str, part: str, *shapes: tuple[int, ...]) -> None:
        """Raise CorruptFileError unless a part has one of the shapes."""
        if self.shape(part) not in shapes:
            wanted = " or ".join(map(str, dict.fromkeys(shapes)))
            raise self.fault(
                scheme, f"{self.ending(part)} has shape {self.shape(part)}, not {wanted}"
            )

    def expect_rank(self, scheme: str, part: str, *ranks: int) -> None:
        """Raise CorruptFileError unless a part has one of the numbers of dimensions, none empty."""
        shape = self.shape(part)
        if len(shape) not in ranks or 0 in shape:
            raise self.fault(scheme, f"{self.ending(part)} has shape {shape}")

    def number(
        self,
        scheme: str,
        words: Mapping[str, Any],
        name: str,
        *,
        among: Collection[int] | None = None,
    ) -> int:
        """Return a whole number of a config, 0 for a word that is not there or null.

        Raises:
            CorruptFileError: no whole number.
            UnsupportedError: one that is not ``among`` those which the scheme knows.
        """
        said = words.get(name)
        if said is None:
            return 0
        try:
            value = int(said)
        except (TypeError, ValueError, OverflowError):
            raise self.fault(scheme, f"{name} is {said!r}, not a whole number") from None
        if among is not None and value not in among:
            raise self.unknown(scheme, f"with {name} {value}")
        return value

    def ending(self, part: str) -> str:
        """Return the stored name of a part behind the module's."""
        return self.names[part].removeprefix(self.module)

    def fault(self, scheme: str, problem: str) -> CorruptFileError:
        """Return the error for parts that do not belong together."""
        return CorruptFileError(f"{self.module}: stored as {scheme}, but {problem}", hint=AGAIN)

    def unknown(self, scheme: str, what: str) -> UnsupportedError:
        """Return the error for a variant of a scheme that cannot be read."""
        return UnsupportedError(
            f"{self.module}: stored as {scheme} {what}, which loratools does not know",
            hint=ORIGINAL,
        )


Build = Callable[[Mapping[str, Tensor]], PackedWeight]
Understood = tuple[tuple[int, ...], Build, str | None]
"""The shape of the float weight, what builds it, and the dtype word it was made from."""


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
        weight: the ending of the float tensor's name, which takes the marker's place; or what
            makes the name of the module's.
        methods: words by which ``quant_method`` may call it.
        dtypes: part → the dtype words that it may have, of parts that are told by nothing else.
    """

    name: str
    marker: str
    parts: Mapping[str, tuple[str, ...]]
    applies: Callable[[Found], bool]
    understand: Callable[[Found], Understood]
    optional: frozenset[str] = field(default_factory=frozenset)
    weight: str | Callable[[str], str] = ".weight"
    methods: frozenset[str] = field(default_factory=frozenset)
    dtypes: Mapping[str, Collection[str]] = field(default_factory=dict)

    def weight_name(self, module: str) -> str:
        """Return the name of the float tensor that a module stands for."""
        return module + self.weight if isinstance(self.weight, str) else self.weight(module)
