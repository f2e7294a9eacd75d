"""An adapter value in another format's terms: names, parameterisations, float type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas import AdditiveDelta
from loratools.errors import NonFiniteError, OptionError, UnsupportedError
from loratools.formats.format import Format
from loratools.keymaps.gguf_base import GGUFBase
from loratools.keymaps.gguf_naming import concerns_gguf, renamed_gguf
from loratools.keymaps.mlx_base import MLXBase
from loratools.keymaps.mlx_naming import NAMING as MLX
from loratools.keymaps.mlx_naming import renamed_mlx
from loratools.keymaps.networks import SECOND, join_second, split_second
from loratools.keymaps.own_naming import respelled, respelled_bare
from loratools.keymaps.translate import detect_architecture, translate
from loratools.linalg.finite import is_finite, widened
from loratools.report import Note
from loratools.suggest import counted

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SHOWN = 12
_NAMING_READ_AS = {"original": "comfyui"}
"""Naming that a reader states → the naming in which files of that format are written."""


@dataclass(frozen=True, slots=True)
class Conversion:
    """An adapter in its target's naming, ready to be written.

    Attributes:
        adapter: what will be written.
        lost: module path or extra → why it is left out (only if losses were allowed).
        notes: what was rewritten or decided.
    """

    adapter: Adapter
    lost: Mapping[str, str]
    notes: tuple[str, ...]


def convert_value(
    adapter: Adapter,
    target: Format,
    *,
    arch: str | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    allow_loss: bool = False,
    language_base: GGUFBase | None = None,
    mlx_base: MLXBase | None = None,
) -> Conversion:
    """Return ``adapter`` in the naming of ``target``, with nothing in it that it cannot hold.

    ``language_base`` tells names and layout of a language model's GGUF tensors, ``mlx_base`` those
    of its modules in mlx-lm.

    Raises:
        UnknownArchitectureError, MatchError, UnsupportedError: see ``convert_adapter``.
    """
    plain = adapter
    if MLX in (adapter.naming, target.naming):
        plain = _from_or_to_mlx(adapter, target, arch, language_base, mlx_base)
    if concerns_gguf(plain.naming, target.naming):
        renamed = renamed_gguf(plain, target.naming, language_base)
    elif target.naming == MLX:
        renamed = plain
    else:
        renamed = _renamed(plain, target, arch, shapes)
    lifted, notes = _lifted(renamed, target)
    losses = dict(target.losses(lifted)) if target.losses else {}
    if losses and not allow_loss:
        lines = [f"  {name}: {reason}" for name, reason in list(losses.items())[:_SHOWN]]
        more = len(losses) - len(lines)
        lines += [f"  ... and {more} more"] if more > 0 else []
        raise UnsupportedError(
            f"{target.title} cannot hold {counted(len(losses), 'part')} of the adapter:\n"
            + "\n".join(lines),
            hint="--allow-loss leaves them out; merging into the base keeps everything",
        )
    kept = replace(
        lifted,
        layers={path: d for path, d in lifted.layers.items() if path not in losses},
        extras={name: e for name, e in lifted.extras.items() if name not in losses},
    )
    return Conversion(kept, losses, tuple(notes))


def _from_or_to_mlx(
    adapter: Adapter,
    target: Format,
    arch: str | None,
    language_base: GGUFBase | None,
    mlx_base: MLXBase | None,
) -> Adapter:
    """Return the adapter in mlx-lm's naming if the target has it, else in transformers'."""
    if adapter.naming == target.naming:
        return adapter
    if arch is not None:
        raise UnsupportedError(
            f"mlx-lm's adapters are for language models, and {arch} is none",
            hint="leave --arch out, or convert to another format; `loratools formats` lists them",
        )
    if target.naming != MLX:
        return renamed_mlx(adapter, "transformers", mlx_base)
    if concerns_gguf(adapter.naming):
        adapter = renamed_gguf(adapter, "transformers", language_base)
    return renamed_mlx(adapter, MLX, mlx_base)


def _renamed(
    adapter: Adapter,
    target: Format,
    arch: str | None,
    shapes: Mapping[str, Sequence[int]] | None,
) -> Adapter:
    if adapter.naming == "diffusers":
        rest, second = split_second(adapter)
        if second.layers or second.extras:
            return _with_second(rest, second, target, arch, shapes)
    return _renamed_whole(adapter, target, arch, shapes)


def _with_second(
    rest: Adapter,
    second: Adapter,
    target: Format,
    arch: str | None,
    shapes: Mapping[str, Sequence[int]] | None,
) -> Adapter:
    """Return an adapter of Wan 2.2's second transformer, or of both, in the target's naming."""
    if target.naming == "diffusers":
        halves = [
            _renamed_whole(half, target, arch, shapes) if half.layers or half.extras else half
            for half in (rest, second)
        ]
        return join_second(*halves)
    if rest.layers or rest.extras:
        raise UnsupportedError(
            f"the adapter changes two transformers (Wan 2.2), and a {target.name} file holds one",
            hint=f"--network transformer takes the one for high noise, --network {SECOND} the one "
            "for low noise",
        )
    note = f"{SECOND} is the expert for low noise; the file's names do not tell it from the other"
    done = _renamed_whole(second, target, arch, shapes)
    return replace(done, notes=(*done.notes, note))


def _renamed_whole(
    adapter: Adapter,
    target: Format,
    arch: str | None,
    shapes: Mapping[str, Sequence[int]] | None,
) -> Adapter:
    if adapter.naming == target.naming == "transformers" and arch is None:
        done = respelled_bare(adapter)
        return adapter if done is adapter else _without_component(done)
    if _NAMING_READ_AS.get(adapter.naming, adapter.naming) == target.naming != "transformers":
        return respelled(adapter, target.naming, arch=arch, shapes=shapes)  # type: ignore[arg-type]
    if target.naming == "transformers":
        return _without_component(_renamed_to(adapter, "diffusers", arch, shapes))
    return _renamed_to(adapter, target.naming, arch, shapes)


def _renamed_to(
    adapter: Adapter, naming: str, arch: str | None, shapes: Mapping[str, Sequence[int]] | None
) -> Adapter:
    architecture = detect_architecture(adapter, arch)
    return translate(adapter, architecture, naming, shapes=shapes)  # type: ignore[arg-type]


def _without_component(adapter: Adapter) -> Adapter:
    """Return the adapter with its network's name taken off the paths: PEFT holds one network."""
    components = Counter(path.partition(".")[0] for path in (*adapter.layers, *adapter.extras))
    if len(components) > 1:
        names = ", ".join(f"{name} ({counted(n, 'module')})" for name, n in components.items())
        raise UnsupportedError(
            f"a PEFT adapter is of one network, and this one is of several: {names}",
            hint="--network takes one of them; diffusers holds all in one file",
        )
    layers = {path.partition(".")[2]: delta for path, delta in adapter.layers.items()}
    extras = {name.partition(".")[2]: extra for name, extra in adapter.extras.items()}
    return replace(adapter, layers=layers, extras=extras, naming="transformers")


def _lifted(adapter: Adapter, target: Format) -> tuple[Adapter, list[str]]:
    """Write deltas that the target has no words for as plain LoRA, where that is exact."""
    layers = dict(adapter.layers)
    lifted: Counter[str] = Counter()
    for path, delta in adapter.layers.items():
        if delta.kind in target.holds or not isinstance(delta, AdditiveDelta):
            continue
        plain = delta.low_rank()
        if plain is not None and "lora" in target.holds:
            layers[path] = plain
            lifted[delta.kind] += 1
    notes = [f"{counted(n, f'{kind} layer')} written as LoRA (exact)" for kind, n in lifted.items()]
    return replace(adapter, layers=layers), notes


def cast_adapter(adapter: Adapter, dtype: str) -> Adapter:
    """Return the adapter with every float tensor in ``dtype`` (``keep`` leaves them).

    Raises:
        OptionError: an unknown dtype.
        NonFiniteError: a value beyond the dtype.
        UnsupportedError: a tensor of which the dtype leaves nothing but zeros.
    """
    if dtype == "keep":
        return adapter
    if dtype not in _DTYPES:
        raise OptionError(f"unknown dtype {dtype!r}", hint=f"use keep, {', '.join(_DTYPES)}")

    def cast(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        narrow = tensor.to(_DTYPES[dtype])
        if not is_finite(narrow) and is_finite(tensor):
            raise NonFiniteError(
                f"a value of {float(tensor.abs().max()):g} is beyond {dtype}",
                hint="use --dtype bf16 or fp32",
            )
        if not bool(narrow.any()) and bool((wide := widened(tensor)).any()):
            raise UnsupportedError(
                f"values of at most {float(wide.abs().max()):g} are all 0 in {dtype}",
                hint="use --dtype bf16 or fp32",
            )
        return narrow

    return adapter.map_tensors(cast)


_STEPS = {"bf16": "0.2 %", "fp16": "0.03 %"}
"""How far a change is from its factors rounded to nearest, typically."""


def rounding_notes(adapter: Adapter, dtype: str) -> list[Note]:
    """Return a note on what ``cast_adapter`` rounds away of factors wider than ``dtype``."""
    widths = [
        tensor.element_size()
        for delta in adapter.layers.values()
        for name, tensor in delta.tensors().items()
        if name in ("up", "down")
    ]
    if dtype not in _STEPS or max(widths, default=0) <= _DTYPES[dtype].itemsize:
        return []
    return [
        Note(f"factors rounded to {dtype}, which adds about {_STEPS[dtype]} of each layer's change")
    ]
