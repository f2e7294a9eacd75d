"""Bounding what several threads hold in memory at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Gate:
    """Lets as many in as fit; one alone always does."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.held = 0
        self.changed = threading.Condition()

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        """Wait until there is room for ``size``, and take it until the context ends."""
        with self.changed:
            self.changed.wait_for(lambda: self.held + size <= self.room)
            self.held += size
        try:
            yield
        finally:
            with self.changed:
                self.held -= size
                self.changed.notify_all()
