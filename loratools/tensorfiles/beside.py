"""The names of second outputs, which stand beside the first."""

from __future__ import annotations

from pathlib import Path

_FILES = (".safetensors", ".gguf")


def residual_path(output: Path, ending: str) -> Path:
    """Return where what a merge leaves out goes; ``ending`` is its file's, empty for a folder."""
    own = output.stem if output.suffix in _FILES else output.name
    return output.with_name(f"{own}-residual{ending}")


def residual_places(output: Path) -> tuple[Path, ...]:
    """Return where it may go, as far as the output's name tells."""
    # Beside one .safetensors file stands one more for an image model, a folder for others.
    endings = {".gguf": (".gguf",), ".safetensors": (".safetensors", "")}.get(output.suffix, ("",))
    return tuple(residual_path(output, ending) for ending in endings)
