"""The unmodified client of the Hub, pointed at a server on the loopback interface."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.hub_server import HubServer

ROOT = Path(__file__).parents[1]


@contextmanager
def connected(patch: pytest.MonkeyPatch, folder: Path) -> Iterator[HubServer]:
    """Serve a Hub and point this process's client at it, as HF_ENDPOINT does at its import."""
    from huggingface_hub import constants
    from huggingface_hub.utils import close_session

    with HubServer() as server:
        patch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", "hf_writer")
        close_session()
        yield server
        close_session()


def settings(server: HubServer, folder: Path, token: str | None = "hf_writer") -> dict[str, str]:
    """Return the environment of a process that talks to the server."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    own = {
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(folder / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": str(ROOT),
    }
    return {**kept, **own, **({"HF_TOKEN": token} if token else {})}


def loratools(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a process of its own."""
    command = [sys.executable, "-m", "loratools", *map(str, arguments)]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
