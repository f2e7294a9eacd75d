"""A large file's bytes from any place to its end, several parts of it under way at a time."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Generator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from urllib.parse import urlsplit

from loratools.errors import CorruptFileError
from loratools.hub.client import persistently
from loratools.hub.failures import status_of
from loratools.hub.listing import Listing

PART = 8 * 2**20
"""Bytes of one request. What a killed process loses is at most ``PART * AT_ONCE``."""

AT_ONCE = 6
_CHUNK = 2**20

_EXPIRED = frozenset({401, 403, 410})
"""What a CDN answers when the signature in an address is too old."""


class NoRangesError(Exception):
    """The server answers a range request with the whole file, as some mirrors do."""


class LargeFile:
    """One file of a listing that the Hub gave.

    Attributes:
        text: the reference to it.
        size: in bytes.
        etag: the SHA-256 of its bytes, for files in LFS or Xet.
    """

    def __init__(self, listing: Listing, name: str) -> None:
        """Ask where the file lies; raises what the Hub's library raises."""
        from huggingface_hub import hf_hub_url

        self.text = listing.reference.inside(name)
        self.size = listing.files[name]
        self._url = hf_hub_url(listing.reference.repo, name, revision=listing.commit)
        self.etag, self._place = self._look_up()

    def _look_up(self) -> tuple[str, str]:
        from huggingface_hub import get_hf_file_metadata

        found = persistently(lambda: get_hf_file_metadata(self._url, library_name="loratools"))
        return found.etag or "", found.location

    def from_byte(self, start: int) -> Generator[bytearray, None, None]:
        """Yield the bytes from ``start`` to the end, in order.

        Raises:
            NoRangesError: the server gives no parts.
        """
        spans = [(at, min(at + PART, self.size)) for at in range(start, self.size, PART)]
        under_way: deque[Future[bytearray]] = deque()
        stopped = threading.Event()
        with ThreadPoolExecutor(AT_ONCE) as threads:
            try:
                for span in spans:
                    under_way.append(threads.submit(self._part, *span, stopped))
                    if len(under_way) == AT_ONCE:
                        yield under_way.popleft().result()
                while under_way:
                    yield under_way.popleft().result()
            finally:
                stopped.set()
                threads.shutdown(wait=False, cancel_futures=True)

    def _part(self, start: int, stop: int, stopped: threading.Event) -> bytearray:
        try:
            return persistently(lambda: self._get(start, stop, stopped))
        except Exception as error:
            if status_of(error) not in _EXPIRED:
                raise
        _, self._place = self._look_up()
        return persistently(lambda: self._get(start, stop, stopped))

    def _get(self, start: int, stop: int, stopped: threading.Event) -> bytearray:
        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        if stopped.is_set():
            raise CancelledError
        # A signed address on another host needs no token, and must not see it.
        away = urlsplit(self._place).netloc != urlsplit(self._url).netloc
        headers = build_hf_headers(token=False if away else None, library_name="loratools")
        words = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        found = bytearray()
        with http_stream_backoff(
            "GET",
            self._place,
            headers={**headers, **words},
            max_retries=0,
            retry_on_exceptions=(),
            follow_redirects=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        ) as answer:
            hf_raise_for_status(answer)
            if answer.status_code != 206:
                raise NoRangesError
            for chunk in answer.iter_bytes(_CHUNK):
                found += chunk
                if stopped.is_set():
                    raise CancelledError
        if len(found) != stop - start:
            raise CorruptFileError(
                f"{self.text}: {len(found)} bytes came where {stop - start} were asked for",
                hint="try again",
            )
        return found
