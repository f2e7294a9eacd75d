"""What the Hub, the network or the library refuses, as errors that say what to do."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from loratools.errors import HubError, InputError, LoratoolsError, UploadError

LOG_IN = "run `hf auth login`, or set HF_TOKEN"
_TOKENS = re.compile(r"\b(hf|api_org)_\w{4,}\b|(?i:bearer)\s+\S+")
_OWNER_AND_NAME = re.compile(r"(?<![\w.-])(?!models/)[\w.-]+/[\w.-]+")
_LONG = 300
_UNREACHABLE = frozenset({"TransportError", "OfflineModeIsEnabled"})

Kind = type[HubError] | type[UploadError]


@contextmanager
def hub_errors(subject: str, *, uploading: bool = False) -> Iterator[None]:
    """Turn what goes wrong with the Hub in the block into a LoratoolsError about ``subject``.

    Raises:
        HubError: or UploadError, if ``uploading``.
    """
    try:
        yield
    except LoratoolsError:
        raise
    except Exception as error:
        found = explain(error, subject, UploadError if uploading else HubError)
        if found is None:
            raise
        raise found from error


def explain(error: BaseException, subject: str, kind: Kind = HubError) -> LoratoolsError | None:
    """Return the error to show for one of the Hub's library, or ``None`` for any other."""
    chain = list(causes(error))
    for cause in chain:
        names = {base.__name__ for base in type(cause).__mro__}
        for word, say in _BY_NAME:
            if word in names:
                message, hint = say(subject)
                return kind(message, hint)
    for cause in chain:
        status = status_of(cause)
        if status is not None:
            message, hint = _by_status(status, subject, _server_words(cause), kind)
            return kind(message, hint)
    if any(is_unreachable(cause) for cause in chain):
        return kind(*_unreachable(subject))
    return _leftover(error, subject, kind)


def is_unreachable(error: BaseException) -> bool:
    """Return whether no answer came: no network, a timeout, a dropped connection, offline mode."""
    return not _UNREACHABLE.isdisjoint(base.__name__ for base in type(error).__mro__)


def status_of(error: BaseException) -> int | None:
    """Return the status of the Hub's answer, if the error is about one."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def without_tokens(text: str) -> str:
    """Return ``text`` with everything that looks like an access token blotted out."""
    return _TOKENS.sub("***", text)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it, to the first cause."""
    while error is not None:
        yield error
        error = error.__cause__


def _server_words(error: BaseException) -> str:
    words = " ".join(without_tokens(str(getattr(error, "server_message", None) or "")).split())
    return f" ({words[:_LONG]})" if words else ""


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def has_token() -> bool:
    """Return whether this process has an access token, of whatever worth."""
    from huggingface_hub import get_token

    return get_token() is not None


def _missing(subject: str) -> tuple[str, str]:
    message = f"{subject}: no such repository on {_endpoint()}, or a private one"
    hint = "check the name (OWNER/NAME)"
    if has_token():
        return message, f"{hint}; if it is private, the token in use has no access to it"
    return message, f"{hint}; if it is private, {LOG_IN}"


def _gated(subject: str) -> tuple[str, str]:
    first = "" if has_token() else f", then {LOG_IN}"
    return (
        f"{subject}: a gated repository, which its owner opens to those who accept its conditions",
        f"ask for access on {_page(subject)}{first}",
    )


def _disabled(subject: str) -> tuple[str, str]:
    return f"{subject}: access is disabled by the Hub", f"see {_page(subject)}"


def _page(subject: str) -> str:
    """Return the address of a repository's page; ``subject`` is its name or a reference to it."""
    name = _OWNER_AND_NAME.search(subject)
    return f"{_endpoint()}/{name[0]}" if name else f"its page at {_endpoint()}"


def _no_revision(subject: str) -> tuple[str, str]:
    return (
        f"{subject}: no such revision",
        "a revision is a branch, a tag or a commit, with / written as %2F",
    )


def _no_entry(subject: str) -> tuple[str, str]:
    return f"{subject}: no such file in the repository", "check the path; case matters"


def _not_cached(subject: str) -> tuple[str, str]:
    return (
        f"{subject}: not in the cache, and the Hub is out of reach",
        "unset HF_HUB_OFFLINE if it is set, check the network, or name a local copy",
    )


def _no_token(subject: str) -> tuple[str, str]:
    return f"{subject}: nobody is logged in", LOG_IN


def _bad_name(subject: str) -> tuple[str, str]:
    return (
        f"{subject}: not a name of a repository",
        "write OWNER/NAME: letters, digits, - _ and ., without -- and .., at most 96",
    )


def _unreachable(subject: str) -> tuple[str, str]:
    return (
        f"{subject}: no answer from {_endpoint()}",
        "check the network, proxies and HF_ENDPOINT, and try again; what has come is kept",
    )


_BY_NAME: tuple[tuple[str, Callable[[str], tuple[str, str | None]]], ...] = (
    ("GatedRepoError", _gated),
    ("DisabledRepoError", _disabled),
    ("RepositoryNotFoundError", _missing),
    ("RevisionNotFoundError", _no_revision),
    ("OfflineModeIsEnabled", _not_cached),
    ("IncompleteSnapshotError", _not_cached),
    ("RemoteEntryNotFoundError", _no_entry),
    ("LocalTokenNotFoundError", _no_token),
    ("HFValidationError", _bad_name),
)
"""Class of the Hub's library → message and hint; the order is that of the search."""

_NO_RIGHT = "does not allow this"
_STATUS = {
    401: ("refused the access token", f"it may have expired: log in again, that is, {LOG_IN}"),
    403: (
        _NO_RIGHT,
        "use a token that may write here; without one, --create-pr proposes a change",
    ),
    409: ("says that it conflicts with the repository's state", "look at its page and try again"),
    413: ("takes no file as large as this", None),
    429: ("has had too many requests", "wait a few minutes; logged-in users may ask more often"),
}


def _by_status(status: int, subject: str, words: str, kind: Kind) -> tuple[str, str | None]:
    if status == 403 and kind is HubError:
        return f"{subject}: {_endpoint()} {_NO_RIGHT}{words}", "use a token that may read there"
    if status in _STATUS:
        message, hint = _STATUS[status]
        return f"{subject}: {_endpoint()} {message}{words}", hint
    if status >= 500:
        return (
            f"{subject}: {_endpoint()} has a fault (status {status}){words}",
            "try again in some minutes; https://status.huggingface.co tells how the Hub does",
        )
    return f"{subject}: {_endpoint()} answered with status {status}{words}", None


def _leftover(error: BaseException, subject: str, kind: Kind) -> LoratoolsError | None:
    """Return an error for what the library says in Python's own classes, or ``None``."""
    names = {base.__name__ for base in type(error).__mro__}
    if "LocalEntryNotFoundError" in names:
        return kind(*_not_cached(subject))
    if isinstance(error, OSError) and error.errno is None:
        words = without_tokens(str(error)).partition("\n")[0][:_LONG]
        return kind(f"{subject}: {words}", "try again")
    if isinstance(error, (ValueError, RuntimeError)) and not isinstance(error, InputError):
        return kind(f"{subject}: {without_tokens(str(error)).strip()[:_LONG]}", None)
    return None
