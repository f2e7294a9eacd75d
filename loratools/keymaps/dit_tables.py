"""Words that the tables of the diffusion transformers share: prefixes of rows, identical names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from loratools.keymaps.architecture import Component, Fused, Row

Rows = tuple[Row | Fused, ...]

CHECKPOINT = ("model.diffusion_model.", "diffusion_model.", "")
"""What a transformer's tensors begin with in single-file checkpoints."""

QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")


def same(*names: str) -> Rows:
    """Return rows of modules that have one name in both trees."""
    return tuple(Row(name, name) for name in names)


def under(original: str, diffusers: str, rows: Iterable[Row | Fused]) -> Rows:
    """Return ``rows`` inside a block that has a name in each tree."""
    return tuple(_under(original + ".", diffusers + ".", row) for row in rows)


def of_width(inputs: tuple[int, ...], rows: Iterable[Row | Fused]) -> Rows:
    """Return ``rows`` as modules whose input widths in the released models are ``inputs``."""
    return tuple(replace(row, inputs=inputs) for row in rows)


def scales(rows: Iterable[Row | Fused]) -> Rows:
    """Return ``rows`` of norms as they stand in checkpoints that call their weight ``scale``."""
    return tuple(replace(row, original=row.original + ".scale") for row in rows)


def fused(original: str, prefix: str, parts: tuple[str, ...] = QKV) -> Fused:
    """Return the row of a projection whose equal parts stand under ``prefix`` in diffusers."""
    return Fused(original, tuple(f"{prefix}.{part}" for part in parts))


def transformer(rows: Rows, *, comfyui: Rows = (), checkpoint_rows: Rows = ()) -> Component:
    """Return the denoiser of a pipeline whose flattened names are made of the original ones."""
    return Component(
        name="transformer",
        original="diffusion_model",
        checkpoint=CHECKPOINT,
        kohya=("lora_unet",),
        rows=rows,
        comfyui=comfyui,
        checkpoint_rows=checkpoint_rows,
    )


def _under(original: str, diffusers: str, row: Row | Fused) -> Row | Fused:
    if isinstance(row, Row):
        return replace(row, original=original + row.original, diffusers=diffusers + row.diffusers)
    parts = tuple(diffusers + part for part in row.parts)
    return replace(row, original=original + row.original, parts=parts)
