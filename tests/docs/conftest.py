"""A Hub for the pages that speak of it: on the loopback interface, with a base and adapters."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from loratools.demo import make_adapter, make_base
from tests.image_adapters import write_kohya_sdxl

_BASE_CARD = "---\nlicense: llama3.1\npipeline_tag: text-generation\n---\n# base\n"
_WORDS = ("hf://", "loratools push", "loratools pull")


@contextmanager
def served(page: Path, folder: Path) -> Iterator[None]:
    """Serve ``me/base``, ``me/adapter`` and ``me/ink`` if the page needs a Hub."""
    if not any(word in page.read_text("utf-8") for word in _WORDS):
        yield
        return
    from tests.hub_client import connected

    make_base(folder / "base")
    make_adapter(folder / "adapter")
    (folder / "ink").mkdir()
    write_kohya_sdxl(folder / "ink" / "ink.safetensors")
    with pytest.MonkeyPatch.context() as patch, connected(patch, folder) as hub:
        base = {file.name: file.read_bytes() for file in (folder / "base").iterdir()}
        hub.add("me/base", {**base, "README.md": _BASE_CARD.encode()})
        for name in ("adapter", "ink"):
            files = {file.name: file.read_bytes() for file in (folder / name).iterdir()}
            hub.add(f"me/{name}", files)
        yield


@pytest.fixture(autouse=True)
def _hub(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    callspec = getattr(request.node, "callspec", None)
    page = callspec.params.get("page") if callspec else None
    if page is None:
        yield
        return
    with served(page, tmp_path_factory.mktemp("hub")):
        yield
