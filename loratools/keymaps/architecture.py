"""What an architecture's rows say: the same module's name in the original and in diffusers' tree.

Templates hold block numbers as ``{i}`` (and ``{j}``); how many blocks there are is inferred from a
file or a base. Rows are read in both directions; nothing here is ever inverted by hand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Sizes = Literal["equal", "inner", "gqa"] | tuple[int, ...]
"""Row counts of a fused projection's parts, from its total T and its input width D: equal parts;
``inner``: D for each part but the last, which has the rest; ``gqa``: D, then equal parts of the
rest; or the counts themselves."""

Order = Literal["same", "halves_swapped", "halves_swapped_if_two"]
"""Whether output rows stand in the same order, or their two halves are swapped (adaLN's
shift/scale, gate/proj); ``_if_two``: only where there are twice as many rows as inputs (the last
block of SD3, whose siblings have six chunks)."""


@dataclass(frozen=True, slots=True)
class Row:
    """One module under two names.

    Attributes:
        original: template of its name in the original tree.
        diffusers: template of its name in diffusers' tree.
        order: how the output rows differ.
        inputs: how many inputs the released models have here, where that tells them from a
            relative with the same names; empty: any number.
        transposed: whether the original stores (in, out) where diffusers stores (out, in).
        vectors: how many vectors the original holds end to end, (n·D,), where diffusers has a
            table of them, (n, D); 0: both have the same shape.
    """

    original: str
    diffusers: str
    order: Order = "same"
    inputs: tuple[int, ...] = ()
    transposed: bool = False
    vectors: int = 0

    @property
    def parts(self) -> tuple[str, ...]:
        """Diffusers' modules: the one."""
        return (self.diffusers,)


@dataclass(frozen=True, slots=True)
class Fused:
    """One original module whose output rows are several of diffusers' modules, in order.

    Attributes:
        original: template of its name in the original tree.
        parts: templates of diffusers' modules.
        sizes: how many rows each has.
        inputs: as in ``Row``.
        typical: the parts' rows as multiples of D in the released models, for adapters that lack
            a part whose size nothing else tells; empty: such adapters are refused.
    """

    original: str
    parts: tuple[str, ...]
    sizes: Sizes = "equal"
    inputs: tuple[int, ...] = ()
    typical: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Component:
    """One network of a pipeline: the denoiser or a text encoder.

    Attributes:
        name: diffusers' component (``unet``, ``transformer``, ``text_encoder_2``); paths in the
            naming ``diffusers`` begin with it.
        original: what paths in the naming ``original`` begin with (``diffusion_model``,
            ``text_encoders.clip_l.transformer``).
        checkpoint: prefixes of its tensors in single-file checkpoints, the longest first
            (``model.diffusion_model.``, ``net.``); the empty prefix for files of its own.
        kohya: prefixes that flattened names begin with (``lora_unet``); the first is written.
        flattens: whose names kohya's flattened ones are made of.
        rows: its modules.
        comfyui: rows that differ in ComfyUI's own base (its name as ``original``).
        checkpoint_rows: rows that differ in single-file checkpoints (OpenCLIP's fused attention;
            the tensor's name as ``original`` where it does not end in ``.weight``).
        levels: leading parts of diffusers' and original names that a file may write or omit
            (``text_model.``).
    """

    name: str
    original: str
    checkpoint: tuple[str, ...]
    kohya: tuple[str, ...]
    rows: tuple[Row | Fused, ...]
    flattens: Literal["original", "diffusers"] = "original"
    comfyui: tuple[Row | Fused, ...] = ()
    checkpoint_rows: tuple[Row | Fused, ...] = ()
    levels: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Architecture:
    """A pipeline: its networks, and what tells it from its relatives.

    Attributes:
        id: the word for ``--arch`` (``sdxl``, ``flux1``).
        title: for people.
        components: the denoiser first.
        signature: original names (templates) that only this architecture's denoiser has, of
            which a base has all.
        blocks: diffusers' block lists and how many blocks the released models have, where that
            tells relatives with the same names apart.
        modelspec: ``modelspec.architecture`` of its LoRAs, without ``/lora``.
        base_versions: values of ``ss_base_model_version`` that mean it; the first is written.
    """

    id: str
    title: str
    components: tuple[Component, ...]
    signature: tuple[str, ...]
    modelspec: str = ""
    blocks: tuple[tuple[str, int], ...] = ()
    base_versions: tuple[str, ...] = ()
