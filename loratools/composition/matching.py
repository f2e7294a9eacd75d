"""Adapters lined up layer by layer, with every reason why they cannot be combined found first."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from loratools.adapter import Adapter, natural_key
from loratools.deltas import AdditiveDelta, ExpertLoRA, LayerDelta
from loratools.errors import InputError, MatchError, UnsupportedError
from loratools.formats.peft_config import CONFIG_NAME
from loratools.keymaps.detection import possible_architectures
from loratools.report import Note

Column = tuple[AdditiveDelta | None, ...]
"""One layer's change in each adapter; ``None`` where an adapter lacks it."""

_SHOWN = 12
_BASE_WORDS = ("ss_base_model_version", "modelspec.architecture")


def check_architectures(
    names: Sequence[str], adapters: Sequence[Adapter], arch: str | None
) -> None:
    """Raise InputError if two adapters cannot be for one model, naming both.

    Adapters in transformers' names, and those of no known architecture, are told apart by their
    modules and shapes alone; those with the very same modules need no telling.
    """
    same = all(adapter.layers.keys() == adapters[0].layers.keys() for adapter in adapters)
    if arch is not None or same:
        return
    fits = [
        (name, possible_architectures(adapter))
        for name, adapter in zip(names, adapters, strict=True)
        if adapter.naming not in ("transformers", "mlx")
    ]
    known = [(name, found) for name, found in fits if found]
    for name, found in known[1:]:
        if {one.id for one in found}.isdisjoint(one.id for one in known[0][1]):
            words = " and ".join(f"{n} is for {f[0].title}" for n, f in (known[0], (name, found)))
            raise InputError(
                f"the adapters are for different models: {words}",
                hint="take adapters of one architecture, or settle it with --arch",
            )


def check_additive(names: Sequence[str], adapters: Sequence[Adapter]) -> None:
    """Raise UnsupportedError if a change depends on its base weight, naming the modules."""
    found = [
        f"  {name}: {path} ({delta.kind})"
        for name, adapter in zip(names, adapters, strict=True)
        for path, delta in adapter.layers.items()
        if not isinstance(delta, AdditiveDelta)
    ]
    if found:
        more = [f"  ... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        raise UnsupportedError(
            f"{len(found)} modules have a change that depends on the base weight, so that none "
            "can be added to it:\n" + "\n".join([*found[:_SHOWN], *more]),
            hint="merge such an adapter into its base (`loratools merge`), extract a LoRA from "
            "the difference (`loratools extract`), and compose that",
        )


def line_up(names: Sequence[str], adapters: Sequence[Adapter]) -> dict[str, Column]:
    """Return every layer with its change in each adapter, shaped alike, in natural order.

    Raises:
        MatchError: several adapters, and no module that two of them have.
        InputError: shapes that differ, naming the module and both.
        UnsupportedError: stacked experts beside another kind of change.
    """
    paths = dict.fromkeys(path for adapter in adapters for path in adapter.layers)
    columns = {path: tuple(a.layers.get(path) for a in adapters) for path in paths}
    parts = {name for adapter in adapters for name in adapter.extras}
    shared = any(sum(d is not None for d in column) > 1 for column in columns.values()) or any(
        sum(name in adapter.extras for adapter in adapters) > 1 for name in parts
    )
    if len(adapters) > 1 and not shared:
        raise _no_shared_modules(names, adapters)
    alike = {path: _alike(path, names, column) for path, column in columns.items()}
    return dict(sorted(alike.items(), key=lambda item: natural_key(item[0])))


def _no_shared_modules(names: Sequence[str], adapters: Sequence[Adapter]) -> MatchError:
    lines = [
        f"  {name}: {', '.join([*adapter.layers, *adapter.extras][:2])} ..."
        for name, adapter in zip(names, adapters, strict=True)
    ]
    return MatchError(
        "the adapters have no module in common:\n" + "\n".join(lines),
        hint="are they for the same base? `loratools merge BASE A B` folds adapters of different "
        "parts of one model",
    )


def _alike(path: str, names: Sequence[str], column: Sequence[LayerDelta | None]) -> Column:
    here = [(name, d) for name, d in zip(names, column, strict=True) if d is not None]
    _check_stacks(path, [delta for _, delta in here])
    first = next((one for one in here if one[1].changes_weight), here[0])
    return tuple(_shaped(path, first, name, d) for name, d in zip(names, column, strict=True))


def _check_stacks(path: str, deltas: Sequence[LayerDelta]) -> None:
    stacks = [delta for delta in deltas if isinstance(delta, ExpertLoRA)]
    if not stacks:
        return
    flips = {stack.flipped_if_square for stack in stacks}
    _, out, inner = stacks[0].weight_shape
    if len(stacks) < len(deltas) or (len(flips) > 1 and out == inner):
        raise UnsupportedError(
            f"{path}: a stack of experts can be combined with its like alone",
            hint="save the adapters with one version of PEFT, for one form of the model",
        )


def _shaped(
    path: str, first: tuple[str, LayerDelta], name: str, delta: LayerDelta | None
) -> AdditiveDelta | None:
    if delta is None:
        return None
    assert isinstance(delta, AdditiveDelta)
    wanted = first[1].weight_shape
    if not delta.changes_weight or delta.weight_shape == wanted:
        return delta
    if not delta.is_same_matrix(wanted):
        raise InputError(
            f"{path}: {first[0]} changes a weight of {wanted} and {name} one of "
            f"{delta.weight_shape}",
            hint="combine adapters of the same base model",
        )
    return delta.reshaped(wanted)


def base_notes(names: Sequence[str], adapters: Sequence[Adapter]) -> Iterator[Note]:
    """Yield a warning if the adapters' own words name different base models."""
    told = {name: _base(adapter) for name, adapter in zip(names, adapters, strict=True)}
    if len({word for word in told.values() if word}) > 1:
        words = ", ".join(f"{name} on {word}" for name, word in told.items() if word)
        yield Note(f"trained on different base models: {words}", "warning")


def _base(adapter: Adapter) -> str | None:
    config = adapter.metadata.get(CONFIG_NAME)
    if config is not None:
        word = json.loads(config).get("base_model_name_or_path")
        return str(word) if word else None
    return next((adapter.metadata[k] for k in _BASE_WORDS if adapter.metadata.get(k)), None)
