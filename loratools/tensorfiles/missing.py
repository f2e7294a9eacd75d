"""What to say of a path where nothing is: what was probably meant, and how it is written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from loratools.errors import MissingFileError
from loratools.tensorfiles.file_names import TORCH_SUFFIXES

_LISTED = 5000
"""Names of a folder that are looked at."""

_WEIGHTS = (*TORCH_SUFFIXES, ".safetensors", ".gguf")

_HUB_PAGE = re.compile(
    r"https?:/+(?:www\.)?(?:huggingface\.co|hf\.co)/+(?P<repo>[^/]+/[^/?#]+)"
    r"(?:/(?:blob|resolve|tree|raw)/(?P<revision>[^/?#]+)(?P<path>/[^?#]*)?)?/?(?:[?#].*)?"
)
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+:/.*")
_SCHEME = re.compile(r"(?i:hf|huggingface)(?::/*|//?)(?P<rest>[^/]+/.+)")
_STRENGTH = re.compile(r"(?P<head>.+?)(?P<sign>[:=@*])(?P<number>[+-]?(?:\d+[.,]?\d*|[.,]\d+))")
_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)")
_DRIVE = re.compile(r"(?P<drive>[A-Za-z]):[\\/](?P<rest>.*)")
_PATTERN = re.compile(r"[*?\[]")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def no_such_path(path: str | os.PathLike[str], what: str = "file or folder") -> MissingFileError:
    """Return the error for a path that names no file and no folder.

    Args:
        path: as the user gave it.
        what: what should have been there.
    """
    text = os.fspath(path)
    found = Path(text)
    if _exists(found):
        return MissingFileError(
            f"{shown(text)}: neither a file nor a folder",
            hint="give a file on a disk, which can be read from any place on",
        )
    hint = next((words for guess in _GUESSES if (words := guess(text))), None)
    return MissingFileError(
        f"no such {what}: {shown(text)}",
        hint=hint or f"check the path; relative paths start in {Path.cwd()}",
    )


def shown(text: str) -> str:
    """Return a path as a message can hold it: quoted where it has line ends or the like."""
    return text if text.isprintable() and text == text.strip() else repr(text)


def near_paths(text: str) -> list[str]:
    """Return up to three paths that are there and resemble ``text`` in their last part."""
    path = Path(text)
    names = list(_names(path.parent))
    longer = [name for name in names if path.name and name.startswith(f"{path.name}.")]
    close = get_close_matches(path.name, names, n=3, cutoff=0.7)
    return [str(path.parent / name) for name in dict.fromkeys([*longer, *close])][:3]


def address_hint(text: str) -> str | None:
    """Return how an address on the Web is written as a reference to the Hub, if it is one."""
    if page := _HUB_PAGE.fullmatch(text):
        revision = page["revision"]
        at = f"@{revision}" if revision and revision != "main" else ""
        return f"write hf://{page['repo']}{at}{page['path'] or ''}"
    if match := _SCHEME.fullmatch(text):
        return f"a repository on the Hub is written hf://{match['rest']}"
    if _ADDRESS.fullmatch(text):
        return "download the file and name it; addresses are read from the Hub alone, as hf://..."
    return None


def other_contents(folder: Path) -> str | None:
    """Return a hint on a folder without the weights it should hold, from what else is there."""
    names = sorted(_names(folder))
    if not names:
        return "the folder is empty; is the download or the training finished?"
    if "snapshots" in names:
        inside = sorted(_names(folder / "snapshots"))
        one = folder / "snapshots" / (inside[0] if inside else "COMMIT")
        return f"a folder of the Hub's cache: write hf://OWNER/NAME, or name {one}"
    weights = [name for name in names if name.endswith(_WEIGHTS)]
    return f"name the file itself: {folder / weights[0]}" if len(weights) == 1 else None


def _exists(path: Path) -> bool:
    return _asked(path.exists)


def _asked(question: Callable[[], bool]) -> bool:
    """Return the system's answer, which is no for a name that it cannot hold."""
    try:
        return question()
    except (OSError, ValueError):
        return False


def _names(folder: Path) -> Iterator[str]:
    try:
        with os.scandir(folder) as entries:
            yield from (entry.name for entry in islice(entries, _LISTED))
    except (OSError, ValueError):
        return


# ── guesses: each returns a hint, or None where it has nothing to say ────────────────────────


def _link(text: str) -> str | None:
    path = Path(text)
    if not _asked(path.is_symlink):
        return None
    return f"it is a link to {path.readlink()}, which is not there: finish the download"


def _strength(text: str) -> str | None:
    if _NUMBER.fullmatch(text):
        return f"if it is a strength, it stands after its adapter's last colon: ADAPTER:{text}"
    match = _STRENGTH.fullmatch(text)
    if match is None or not _exists(Path(match["head"])):
        return None
    head, number = match["head"], match["number"].replace(",", ".")
    if match["sign"] != ":":
        return f"a strength stands after a colon: {head}:{number}"
    return (
        f"{head} is there; a strength, and one only, may follow where the command's usage says "
        "[:STRENGTH] or [:WEIGHT]"
    )


def _home(text: str) -> str | None:
    if not text.startswith("~"):
        return None
    return f"the shell did not replace the ~: write {os.path.expanduser(text)}"  # noqa: PTH111


def _windows(text: str) -> str | None:
    if os.name == "nt":
        return None
    if match := _DRIVE.fullmatch(text):
        place = f"/mnt/{match['drive'].lower()}/" + match["rest"].replace("\\", "/")
        return f"a path of Windows, and this system is not; in WSL it is {place}"
    turned = text.replace("\\", "/")
    return f"did you mean {turned}?" if turned != text and _exists(Path(turned)) else None


def _blanks(text: str) -> str | None:
    bare = text.strip()
    return f"did you mean {bare}?" if bare != text and bare and _exists(Path(bare)) else None


def _near(text: str) -> str | None:
    close = near_paths(text)
    return f"did you mean {' or '.join(map(shown, close))}?" if close else None


def _pattern(text: str) -> str | None:
    return "no name fits the pattern; the shell left it as it is" if _PATTERN.search(text) else None


def _hub_id(text: str) -> str | None:
    if not _HUB_ID.fullmatch(text) or text.endswith(_WEIGHTS) or _exists(Path(text).parent):
        return None
    return f"if it is on the Hub, write hf://{text}; paths start in {Path.cwd()}"


def _parent(text: str) -> str | None:
    missing = [folder for folder in Path(text).parents if not _exists(folder)]
    if not missing:
        return None
    close = near_paths(str(missing[-1]))
    words = f"; did you mean {' or '.join(map(shown, close))}?" if close else ""
    return f"there is no folder {shown(str(missing[-1]))} either{words}"


_GUESSES: tuple[Callable[[str], str | None], ...] = (
    _link,
    address_hint,
    _strength,
    _home,
    _windows,
    _blanks,
    _near,
    _pattern,
    _hub_id,
    _parent,
)
"""The first that has something to say is heard."""
