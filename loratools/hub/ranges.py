"""Parts of a file on the Hub: its header, or a few small tensors, by HTTP range requests."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import CorruptFileError
from loratools.hub.failures import hub_errors
from loratools.hub.listing import Listing
from loratools.tensorfiles.gguf import parse_gguf_header
from loratools.tensorfiles.header import MAX_HEADER_BYTES

FIRST_BYTES = 256 * 1024
"""The first request: enough for the headers of most files."""

_GGUF_FIRST = 1024 * 1024
_GGUF_MOST = 256 * 1024 * 1024
"""A vocabulary of a million words takes some tens of megabytes."""

_GAP = 64 * 1024
"""Two ranges that are nearer than this are asked for as one."""

_AT_ONCE = 8

Get = Callable[[int, int], bytes]
"""Returns the bytes of a file from ``start`` to before ``stop``."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository at a certain commit; ``size`` in bytes."""

    text: str
    url: str
    size: int

    def get(self, start: int, stop: int) -> bytes:
        """Return the bytes from ``start`` to before ``stop``; raises HubError."""
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        stop = min(stop, self.size)
        if stop <= start:
            return b""
        # A compressed answer would have other offsets.
        words = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with hub_errors(self.text):
            headers = {**build_hf_headers(library_name="loratools"), **words}
            answer = http_backoff("GET", self.url, headers=headers, follow_redirects=True)
            hf_raise_for_status(answer)
            found: bytes = answer.content
        if answer.status_code != 206:
            found = found[start:stop]
        if len(found) != stop - start:
            raise CorruptFileError(
                f"{self.text}: {len(found)} bytes came where {stop - start} were asked for",
                hint="try again",
            )
        return found


def remote_file(listing: Listing, name: str) -> RemoteFile:
    """Return a file of a listing that the Hub gave."""
    from huggingface_hub import hf_hub_url

    reference = listing.reference
    url = hf_hub_url(reference.repo, name, revision=listing.commit)
    return RemoteFile(reference.inside(name), url, listing.files[name])


def first_bytes(file: RemoteFile) -> bytes:
    """Return a weights file's bytes up to the end of its header.

    Raises:
        CorruptFileError: a GGUF header without an end; a safetensors header is checked by whoever
            reads it.
        HubError: the Hub does not give them.
    """
    return _gguf_header(file) if file.text.endswith(".gguf") else _safetensors_header(file)


def _safetensors_header(file: RemoteFile) -> bytes:
    found = file.get(0, FIRST_BYTES)
    if len(found) < 8:
        return found
    stop = 8 + int(struct.unpack("<Q", found[:8])[0])
    if stop > MAX_HEADER_BYTES:
        return found
    return found[:stop] + file.get(len(found), stop)


def _gguf_header(file: RemoteFile) -> bytes:
    found, stop = b"", _GGUF_FIRST
    while True:
        found += file.get(len(found), stop)
        try:
            header = parse_gguf_header(memoryview(found), Path(file.text), file.size)
        except CorruptFileError:
            # Cut off, or wrong: more bytes will tell.
            if len(found) >= min(file.size, _GGUF_MOST) or not found.startswith(b"GGUF"):
                raise
            stop = len(found) * 4
        else:
            return found[: header.data_start]


def get_ranges(file: RemoteFile, ranges: Sequence[tuple[int, int]]) -> list[tuple[int, bytes]]:
    """Return several parts of a file with their places, several at a time."""
    with ThreadPoolExecutor(_AT_ONCE) as threads:
        found = list(threads.map(lambda span: file.get(*span), ranges))
    return [(start, data) for (start, _), data in zip(ranges, found, strict=True)]


def join_ranges(ranges: Iterable[tuple[int, int]]) -> Sequence[tuple[int, int]]:
    """Return ranges in order, those that nearly touch as one."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if joined and start - joined[-1][1] <= _GAP:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        else:
            joined.append((start, stop))
    return joined
