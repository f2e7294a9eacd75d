"""Asking the Hub: again where it is busy, without bars where nobody wants them."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from loratools.hub.failures import causes, is_unreachable, status_of

Answer = TypeVar("Answer")

BARS: ContextVar[bool] = ContextVar("BARS", default=True)
"""Whether progress may be shown; the command line turns it off for ``--json`` and ``--quiet``."""

BUSY = frozenset({408, 429, 500, 502, 503, 504})
_WAITS = (1.0, 2.0, 4.0, 8.0)
_LONGEST = 60.0
"""Seconds: between one try and the next, and the most that a busy server may ask for."""


def hub_api() -> Any:
    """Return the library's client for the endpoint and token of this moment's settings."""
    from huggingface_hub import HfApi

    return HfApi(library_name="loratools")


def persistently(ask: Callable[[], Answer]) -> Answer:
    """Return what ``ask`` returns, asked up to five times while the Hub is busy or silent.

    The library itself repeats downloads and uploads of files; this is for everything else, so
    ``ask`` must not change anything that asking twice would change again.
    """
    for wait in _WAITS:
        try:
            return ask()
        except Exception as error:
            delay = _delay(error, wait)
            if delay is None:
                raise
        time.sleep(delay)
    return ask()


def _delay(error: BaseException, wait: float) -> float | None:
    """Return the seconds after which to ask again, or ``None`` if that would be vain."""
    for cause in causes(error):
        if status_of(cause) in BUSY:
            headers = getattr(getattr(cause, "response", None), "headers", {})
            said = str(headers.get("Retry-After", ""))
            return min(float(said), _LONGEST) if said.isdigit() else wait
        if is_unreachable(cause):
            return None if type(cause).__name__ in _FINAL else wait
    return None


_FINAL = ("OfflineModeIsEnabled", "ConnectError", "ProxyError", "UnsupportedProtocol")
"""Nobody is there; the cache may help, another try will not."""


@contextmanager
def progress_bars() -> Iterator[None]:
    """Let the library show its bars on stderr where a person watches, unless ``BARS`` forbids."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    watched = BARS.get() and sys.stderr.isatty()
    if watched or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
