"""What the Hub says of a recipe's references: asked once for each, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

from loratools.errors import LoratoolsError
from loratools.hub.choosing import choose_adapter, choose_model, may_be_adapter
from loratools.hub.fetching import check_access, complete
from loratools.hub.listing import Listing, list_files
from loratools.hub.references import parse_reference
from loratools.hub.sketching import sketch_model
from loratools.recipes.records import fingerprint, remote_print


class Remote:
    """One reference and what the Hub, or out of its reach the cache, answers."""

    def __init__(self, text: str) -> None:
        self.text = text

    @cached_property
    def _answer(self) -> Listing | LoratoolsError:
        try:
            return list_files(parse_reference(self.text))
        except LoratoolsError as error:
            return error

    @property
    def listing(self) -> Listing:
        """The files; raises what ``list_files`` raises, each time."""
        if isinstance(self._answer, LoratoolsError):
            raise self._answer
        return self._answer

    @cached_property
    def fingerprint(self) -> str | None:
        """A hash of the commit it means now; None where nobody can tell."""
        if (pinned := fingerprint(self.text)) is not None:
            return pinned
        if isinstance(self._answer, LoratoolsError):
            return None
        return remote_print(self.text, self._answer.commit or self._answer.cached)

    def fault(self, *, adapter: bool) -> LoratoolsError | None:
        """Return what is wrong with it, as far as the names of files tell."""
        try:
            listing = self.listing
            check_access(listing, choose_adapter(listing).files if adapter else listing.below)
        except LoratoolsError as error:
            return error
        return None

    def nbytes(self, *, adapter: bool, whole: bool) -> int:
        """Return the bytes of what a step reads there: an adapter, a model, or all there is."""
        listing = self.listing
        names: Sequence[str] = listing.below
        if adapter or (not whole and may_be_adapter(listing)):
            names = choose_adapter(listing).files
        elif not whole:
            names = complete(listing, choose_model(listing)).files
        return sum(listing.files[name] for name in names)

    @contextmanager
    def headers(self) -> Iterator[Path]:
        """Give a folder or file with the headers of a model's weights, and holes for these."""
        with ExitStack() as stack:
            yield sketch_model(self.listing.reference, stack)


class Remotes(dict[str, Remote]):
    """Reference → what the Hub says, made where it is asked for."""

    def __missing__(self, text: str) -> Remote:
        """Return a reference's answer, which is kept."""
        return self.setdefault(text, Remote(text))
