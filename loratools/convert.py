"""Converting adapters between formats: names, layout, file syntax; every key accounted for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.adapter_io import find_weights, open_adapter, save_adapter
from loratools.basemodel import BaseModel, open_base
from loratools.deltas import AdditiveDelta
from loratools.errors import (
    MatchError,
    NonFiniteError,
    OptionError,
    UnknownArchitectureError,
    UnsupportedError,
)
from loratools.formats import get_format
from loratools.formats.format import Format
from loratools.keymaps.repairs import repair_split_qkv_alpha
from loratools.keymaps.translate import (
    detect_architecture,
    detect_base,
    find_architecture,
    translate,
)
from loratools.keymaps.vocabulary import vocabulary_of
from loratools.planning.base_names import common_architecture
from loratools.planning.merge_plan import check_finite
from loratools.report import Json, Note, Report
from loratools.tensorfiles.destination import check_destination

PathLike = str | os.PathLike[str]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REPAIRS = ("split-qkv-alpha",)
_SHOWN = 12


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


def convert_adapter(
    adapter: PathLike,
    output: PathLike,
    *,
    to: str,
    base: PathLike | None = None,
    arch: str | None = None,
    dtype: str = "keep",
    repair: str | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write ``adapter`` in another format, with the same ΔW.

    Args:
        adapter: an adapter file or folder in any format that loratools reads.
        output: a file, or a folder where the format is one.
        to: the target format's name.
        base: a checkpoint whose tensor names and shapes serve as vocabulary.
        arch: the architecture's id, where the file does not tell.
        dtype: ``keep``, ``fp32``, ``bf16`` or ``fp16`` for every float tensor.
        repair: ``split-qkv-alpha`` for files whose fused projections were saved without their
            alpha multiplied.
        allow_loss: leave out what the target cannot hold instead of refusing.
        overwrite: replace an existing output.
        dry_run: convert in memory, write nothing.

    Raises:
        InputError: a file that cannot be read, an unknown architecture (see the subclasses).
        MatchError: modules without a name in the target, all of them listed.
        UnsupportedError: what the target cannot hold, unless ``allow_loss``.
        OptionError: an unknown format, dtype or repair.
        OutputError: the destination is refused.
    """
    target = get_format(to)
    source, loaded = open_adapter(adapter)
    check_finite(loaded, str(adapter))
    model = open_base(base) if base else None
    shapes = {name: t.shape for name, t in model.tensors.items()} if model else None
    arch = _settled(loaded, arch, model)
    prepared = _repaired(loaded, repair, arch)
    done = convert_value(prepared, target, arch=arch, shapes=shapes, allow_loss=allow_loss)
    final = cast_adapter(done.adapter, dtype)
    inputs = [find_weights(Path(adapter))]
    if dry_run:
        folder = target.weights_file is not None and not Path(output).suffix
        check_destination(Path(output), folder=folder, overwrite=overwrite, inputs=inputs)
    else:
        save_adapter(final, output, format=to, overwrite=overwrite)
    written = None if dry_run else str(output)
    return _report(str(adapter), written, source, target, loaded, replace(done, adapter=final))


def _settled(adapter: Adapter, arch: str | None, base: BaseModel | None) -> str | None:
    """Return the architecture's id as the user's word or the base tells it, if either does.

    Raises MatchError if the adapter is for another, naming both.
    """
    if arch is not None:
        _check_word(adapter, arch)
        return arch
    if base is None:
        return None
    try:
        theirs = detect_base({name: tensor.shape for name, tensor in base.tensors.items()})
    except UnknownArchitectureError:
        return None
    return common_architecture(adapter, base, theirs).id


def _check_word(adapter: Adapter, arch: str) -> None:
    """Raise MatchError if the user's architecture knows none of the modules and another does."""
    said = find_architecture(arch)
    words = vocabulary_of(said)
    if not adapter.layers or any(words.look_up(path) for path in adapter.layers):
        return
    try:
        ours = detect_architecture(adapter)
    except UnknownArchitectureError:
        return
    raise MatchError(
        f"the adapter is for {ours.title}, and --arch says {said.title}",
        hint=f"leave --arch out, or say --arch {ours.id}",
    )


def convert_value(
    adapter: Adapter,
    target: Format,
    *,
    arch: str | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
    allow_loss: bool = False,
) -> Conversion:
    """Return ``adapter`` in the naming of ``target``, with nothing in it that it cannot hold.

    Raises:
        UnknownArchitectureError, MatchError, UnsupportedError: see ``convert_adapter``.
    """
    renamed = _renamed(adapter, target, arch, shapes)
    lifted, notes = _lifted(renamed, target)
    losses = dict(target.losses(lifted)) if target.losses else {}
    if losses and not allow_loss:
        lines = [f"  {name}: {reason}" for name, reason in list(losses.items())[:_SHOWN]]
        more = len(losses) - len(lines)
        lines += [f"  ... and {more} more"] if more > 0 else []
        raise UnsupportedError(
            f"{target.title} cannot hold {len(losses)} parts of the adapter:\n" + "\n".join(lines),
            hint="--allow-loss leaves them out; merging into the base keeps everything",
        )
    kept = replace(
        lifted,
        layers={path: d for path, d in lifted.layers.items() if path not in losses},
        extras={name: e for name, e in lifted.extras.items() if name not in losses},
    )
    return Conversion(kept, losses, tuple(notes))


def _renamed(
    adapter: Adapter,
    target: Format,
    arch: str | None,
    shapes: Mapping[str, Sequence[int]] | None,
) -> Adapter:
    if adapter.naming == target.naming and shapes is None:
        return adapter
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
        names = ", ".join(f"{name} ({count} modules)" for name, count in components.items())
        raise UnsupportedError(
            f"a PEFT adapter is of one network, and this one is of several: {names}",
            hint="convert to diffusers, which holds all of them in one file",
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
    notes = [f"{count} {kind} layers written as LoRA (exact)" for kind, count in lifted.items()]
    return replace(adapter, layers=layers), notes


def _repaired(adapter: Adapter, repair: str | None, arch: str | None) -> Adapter:
    if repair is None:
        return adapter
    if repair not in REPAIRS:
        raise OptionError(f"unknown repair {repair!r}", hint=f"known: {', '.join(REPAIRS)}")
    return repair_split_qkv_alpha(adapter, detect_architecture(adapter, arch))


def cast_adapter(adapter: Adapter, dtype: str) -> Adapter:
    """Return the adapter with every float tensor in ``dtype`` (``keep`` leaves them).

    Raises:
        OptionError: an unknown dtype.
        NonFiniteError: a value beyond the dtype.
    """
    if dtype == "keep":
        return adapter
    if dtype not in _DTYPES:
        raise OptionError(f"unknown dtype {dtype!r}", hint=f"use keep, {', '.join(_DTYPES)}")

    def cast(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        narrow = tensor.to(_DTYPES[dtype])
        if not bool(torch.isfinite(narrow).all()) and bool(torch.isfinite(tensor).all()):
            raise NonFiniteError(
                f"a value of {float(tensor.abs().max()):g} is beyond {dtype}",
                hint="use --dtype bf16 or fp32",
            )
        return narrow

    return adapter.map_tensors(cast)


def _report(
    source_path: str,
    output: str | None,
    source: Format,
    target: Format,
    loaded: Adapter,
    done: Conversion,
) -> Report:
    written = done.adapter
    facts: dict[str, Json] = {
        "from": source.name,
        "to": target.name,
        "architecture": written.arch,
        "modules_read": len(loaded.layers),
        "modules_written": len(written.layers),
        "extras": len(written.extras),
        "lost": dict(done.lost),
        "kinds": dict(Counter(delta.kind for delta in written.layers.values())),
        "parameters": written.parameters,
    }
    items = tuple(
        {
            "module": path,
            "kind": delta.kind,
            "rank": getattr(delta, "rank", None),
            "alpha": getattr(delta, "alpha", None),
            "shape": list(delta.weight_shape),
        }
        for path, delta in written.layers.items()
    )
    words = dict.fromkeys((*written.notes, *done.notes))
    notes = [Note(word) for word in words]
    notes += [Note(f"left out: {reason}", "warning", name) for name, reason in done.lost.items()]
    return Report(
        "convert", (source_path,), output, facts, items, tuple(notes), dry_run=output is None
    )
