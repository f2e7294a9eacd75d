"""How a format that nobody should write any more refuses to."""

from __future__ import annotations

from collections.abc import Callable

from loratools.adapter import Adapter
from loratools.errors import UnsupportedError
from loratools.formats.format import Bundle


def refuse_writing(name: str, instead: str) -> Callable[[Adapter], Bundle]:
    """Return a writer that always raises UnsupportedError and says what to write instead."""

    def write(adapter: Adapter) -> Bundle:
        paths = ", ".join(list(adapter.layers)[:3])
        kinds = ", ".join(sorted({delta.kind for delta in adapter.layers.values()}))
        raise UnsupportedError(
            f"{name} files are read, not written ({kinds or 'no layers'} at {paths or 'none'})",
            hint=f"write {instead}, which newer tools and old ones read",
        )

    return write
