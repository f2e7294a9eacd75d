"""Converting adapters between formats: names, layout, file syntax; every key accounted for."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

from loratools.adapter import Adapter
from loratools.adapter_io import find_weights, open_adapter, save_adapter
from loratools.basemodel import BaseModel, open_base
from loratools.conversion import Conversion, cast_adapter, convert_value
from loratools.errors import MatchError, OptionError, UnknownArchitectureError
from loratools.formats import get_written_format
from loratools.formats.format import Format
from loratools.hub.taking import takes_references
from loratools.keymaps.gguf_base import open_gguf_base
from loratools.keymaps.gguf_naming import concerns_gguf, gguf_warnings
from loratools.keymaps.mlx_base import open_mlx_base
from loratools.keymaps.mlx_naming import concerns_mlx
from loratools.keymaps.networks import take_network
from loratools.keymaps.repairs import repair_split_qkv_alpha
from loratools.keymaps.translate import (
    detect_architecture,
    detect_base,
    find_architecture,
)
from loratools.keymaps.vocabulary import vocabulary_of
from loratools.planning.base_names import common_architecture
from loratools.planning.finite import check_finite
from loratools.report import Json, Note, Report
from loratools.tensorfiles.destination import check_destination

PathLike = str | os.PathLike[str]

REPAIRS = ("split-qkv-alpha",)


@takes_references(adapter="adapter", base="names")
def convert_adapter(  # noqa: PLR0913 - one keyword for each option of the command
    adapter: PathLike,
    output: PathLike,
    *,
    to: str,
    base: PathLike | None = None,
    arch: str | None = None,
    dtype: str = "keep",
    repair: str | None = None,
    network: str | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write ``adapter`` in another format, with the same ΔW.

    Args:
        adapter: an adapter file or folder in any format that loratools reads.
        output: a file, or a folder where the format is one.
        to: the target format's name.
        base: a checkpoint whose tensor names and shapes serve as vocabulary. To and from GGUF: the
            language model's folder, its config.json, or its GGUF file, which tells the layout. To
            and from mlx: the same, but no GGUF file, where experts or other names depend on it.
        arch: the architecture's id, where the file does not tell.
        dtype: ``keep``, ``fp32``, ``bf16`` or ``fp16`` for every float tensor; ``q8_0`` to GGUF.
        repair: ``split-qkv-alpha`` for files whose fused projections were saved without their
            alpha multiplied.
        network: convert the changes of this network alone, by diffusers' word for it.
        allow_loss: leave out what the target cannot hold instead of refusing.
        overwrite: replace an existing output.
        dry_run: convert in memory, write nothing.

    Raises:
        InputError: a file that cannot be read, an unknown architecture (see the subclasses).
        MatchError: modules without a name in the target, all of them listed.
        UnsupportedError: what the target cannot hold, unless ``allow_loss``.
        OptionError: an unknown format, dtype, repair or network.
        OutputError: the destination is refused.
    """
    target = get_written_format(to)
    source, loaded = open_adapter(adapter, activated=True)
    check_finite(loaded, str(adapter))
    for_gguf = concerns_gguf(loaded.naming, target.naming)
    language_base = open_gguf_base(Path(base)) if base and for_gguf else None
    for_mlx = concerns_mlx(loaded.naming, target.naming)
    is_gguf = base is not None and Path(base).suffix == ".gguf"
    mlx_base = open_mlx_base(Path(base)) if base and for_mlx and not is_gguf else None
    model = open_base(base) if base and not for_gguf and not for_mlx else None
    shapes = {name: t.shape for name, t in model.tensors.items()} if model else None
    storage = _storage(dtype, target)
    arch = _settled(loaded, arch, model)
    prepared = _repaired(loaded, repair, arch)
    if network is not None:
        prepared = take_network(prepared, network, arch)
    done = convert_value(
        prepared,
        target,
        arch=arch,
        shapes=shapes,
        allow_loss=allow_loss,
        language_base=language_base,
        mlx_base=mlx_base,
    )
    final = cast_adapter(done.adapter, "keep" if storage else dtype)
    inputs = [find_weights(Path(adapter))]
    if dry_run:
        folder = target.is_folder(output)
        check_destination(Path(output), folder=folder, overwrite=overwrite, inputs=inputs)
    else:
        save_adapter(final, output, format=to, overwrite=overwrite, storage=storage)
    written = None if dry_run else str(output)
    return _report(str(adapter), written, source, target, loaded, replace(done, adapter=final))


def _storage(dtype: str, target: Format) -> str | None:
    """Return the dtype if it is one of GGUF's block types; raises OptionError in other files."""
    if dtype != "q8_0":
        return None
    if target.container != "gguf":
        raise OptionError(f"a {target.name} file has no q8_0 tensors", hint="q8_0 is for --to gguf")
    return dtype


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


def _repaired(adapter: Adapter, repair: str | None, arch: str | None) -> Adapter:
    if repair is None:
        return adapter
    if repair not in REPAIRS:
        raise OptionError(f"unknown repair {repair!r}", hint=f"known: {', '.join(REPAIRS)}")
    return repair_split_qkv_alpha(adapter, detect_architecture(adapter, arch))


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
    notes += [Note(word, "warning") for word in gguf_warnings(written)]
    notes += [Note(f"left out: {reason}", "warning", name) for name, reason in done.lost.items()]
    return Report(
        "convert", (source_path,), output, facts, items, tuple(notes), dry_run=output is None
    )
