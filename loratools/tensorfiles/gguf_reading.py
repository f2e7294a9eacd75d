"""A cursor over the first bytes of a GGUF file that believes nothing it reads."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import CorruptFileError
from loratools.tensorfiles.gguf_types import SCALARS, ValueType
from loratools.tensorfiles.inputs import INCOMPLETE_HINT, open_input, quoted

Scalar = int | float | bool | str

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_LEAST_BYTES = 8
"""What an item of unknown length takes at least: the length itself."""


@dataclass(frozen=True, slots=True)
class ArrayValue:
    """A metadata array that stays in its file until it is asked for.

    Attributes:
        item: type of the items.
        count: how many there are.
        path: the file.
        start: byte offset of the first item.
        stop: where the last item ends.
    """

    item: ValueType
    count: int
    path: Path
    start: int
    stop: int

    def __len__(self) -> int:
        """Return the number of items."""
        return self.count

    def raw(self) -> bytes:
        """Return the items as they lie in the file; raises CorruptFileError if it has shrunk."""
        with open_input(self.path) as file:
            file.seek(self.start)
            found = file.read(self.stop - self.start)
        if len(found) != self.stop - self.start:
            raise CorruptFileError(f"{self.path}: changed while it was read")
        return found

    def __iter__(self) -> Iterator[Scalar]:
        """Yield the items; text that is not UTF-8 has its odd bytes replaced."""
        raw = self.raw()
        if self.item != ValueType.STRING:
            yield from (value for (value,) in SCALARS[self.item].iter_unpack(raw))
            return
        place = 0
        for _ in range(self.count):
            (length,) = _U64.unpack_from(raw, place)
            place += 8 + length
            yield raw[place - length : place].decode("utf-8", "replace")


@dataclass(frozen=True, slots=True)
class Value:
    """One metadata value with the type that the file gives it."""

    type: ValueType
    data: Scalar | ArrayValue | tuple[Scalar, ...]
    item: ValueType | None = None

    def plain(self) -> Scalar | list[Scalar]:
        """Return a scalar as it is and an array as a list."""
        if isinstance(self.data, (ArrayValue, tuple)):
            return list(self.data)
        return self.data


class Cursor:
    """Reads forward through ``view``, and raises CorruptFileError where anything is missing.

    Args:
        view: the file's bytes.
        path: for messages.
    """

    def __init__(self, view: memoryview, path: Path) -> None:
        self.view = view
        self.path = path
        self.place = 0

    @property
    def left(self) -> int:
        """How many bytes follow."""
        return len(self.view) - self.place

    def take(self, count: int, what: str) -> int:
        """Step over ``count`` bytes and return where they begin."""
        if count > self.left:
            raise CorruptFileError(
                f"{self.path}: truncated, {what} takes {count} bytes and {self.left} follow",
                INCOMPLETE_HINT,
            )
        start = self.place
        self.place += count
        return start

    def u32(self, what: str) -> int:
        """Read four bytes as a number."""
        number: int = _U32.unpack_from(self.view, self.take(4, what))[0]
        return number

    def u64(self, what: str) -> int:
        """Read eight bytes as a number."""
        number: int = _U64.unpack_from(self.view, self.take(8, what))[0]
        return number

    def count(self, what: str, least: int) -> int:
        """Read a number of things that take ``least`` bytes each; it cannot exceed the file."""
        number = self.u64(what)
        if number * least > self.left:
            raise CorruptFileError(
                f"{self.path}: {what} {number} is more than {self.left} bytes can hold",
                INCOMPLETE_HINT,
            )
        return number

    def text(self, what: str) -> str:
        """Read a length and as many bytes of UTF-8."""
        length = self.u64(f"the length of {what}")
        start = self.take(length, what)
        raw = bytes(self.view[start : self.place])
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CorruptFileError(
                f"{self.path}: {what} is not UTF-8 text: {quoted(raw)}"
            ) from error

    def value(self, key: str) -> Value:
        """Read a type and a value of that type."""
        kind = self._type(f"metadata {quoted(key)}")
        if kind == ValueType.ARRAY:
            return self._array(key)
        if kind == ValueType.STRING:
            return Value(kind, self.text(f"metadata {quoted(key)}"))
        return Value(kind, self._scalar(kind, f"metadata {quoted(key)}"))

    def _scalar(self, kind: ValueType, what: str) -> Scalar:
        form = SCALARS[kind]
        start = self.take(form.size, what)
        if kind == ValueType.BOOL and self.view[start] > 1:
            raise CorruptFileError(f"{self.path}: {what} is {self.view[start]}, not a truth value")
        value: Scalar = form.unpack_from(self.view, start)[0]
        return value

    def _array(self, key: str) -> Value:
        what = f"metadata {quoted(key)}"
        item = self._type(what)
        if item == ValueType.ARRAY:
            raise CorruptFileError(f"{self.path}: {what} is an array of arrays")
        size = _LEAST_BYTES if item == ValueType.STRING else SCALARS[item].size
        count = self.count(f"the length of {what}", size)
        start = self.place
        if item == ValueType.STRING:
            self._skip_texts(count, what)
        else:
            self.take(count * size, what)
        return Value(ValueType.ARRAY, ArrayValue(item, count, self.path, start, self.place), item)

    def _skip_texts(self, count: int, what: str) -> None:
        """Step over strings without making them: a vocabulary has 150 000."""
        view, place, end, unpack = self.view, self.place, len(self.view), _U64.unpack_from
        for _ in range(count):
            if place + 8 > end:
                break
            place += 8 + unpack(view, place)[0]
        else:
            self.take(place - self.place, what)
            return
        self.take(end - self.place + 1, what)

    def _type(self, what: str) -> ValueType:
        number = self.u32(f"the type of {what}")
        try:
            return ValueType(number)
        except ValueError as error:
            raise CorruptFileError(f"{self.path}: {what} has the unknown type {number}") from error
