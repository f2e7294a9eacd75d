"""Files beside what is published that stay where they are."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from loratools.tensorfiles.file_names import LEFT_FOLDERS

_STAYS = re.compile(
    r"\..+"
    r"|__pycache__|wandb|runs|mlruns|logs|lightning_logs|global_step\d+|latest|zero_to_fp32\.py"
    r"|trainer_state\.json|training_args\.bin|events\.out\.tfevents\..*"
    r"|(optimizer|scheduler|scaler|rng_state).*\.(bin|pt|pth)"
    r"|thumbs\.db|desktop\.ini|.*~|.*\.(bak|log|lock|orig|pyc|swp|tmp)",
    re.IGNORECASE,
)
"""Hidden files (keys and tokens among them), and what trainers, editors and desktops leave."""


def staying(inner: Path) -> Path | None:
    """Return the outermost part of a path that is not to be published, or ``None``."""
    for count, part in enumerate(inner.parts, 1):
        if _STAYS.fullmatch(part) or LEFT_FOLDERS.fullmatch(part):
            return Path(*inner.parts[:count])
    return None


def told(stayed: Iterable[Path]) -> tuple[str, ...]:
    """Return the names to tell, each once; nobody misses what is hidden."""
    names = dict.fromkeys(path.as_posix() for path in stayed)
    return tuple(name for name in names if not name.rpartition("/")[2].startswith("."))
