"""One network of an adapter alone, and Wan 2.2's two transformers.

Wan 2.2 has an expert for high noise and one for low. diffusers holds the changes of both in one
file, as ``transformer`` and ``transformer_2``; everywhere else each has a file of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

from loratools.adapter import Adapter, in_natural_order
from loratools.errors import OptionError
from loratools.keymaps.detection import detect_architecture
from loratools.keymaps.translate import translate
from loratools.suggest import counted, did_you_mean

SECOND = "transformer_2"
_FIRST = "transformer"
_T = TypeVar("_T")


def take_network(adapter: Adapter, network: str, arch: str | None = None) -> Adapter:
    """Return the changes of one network, in diffusers' naming; a note says what is left out.

    Args:
        adapter: in any naming.
        network: diffusers' word for it (``unet``, ``transformer_2``, ``text_encoder``).
        arch: the architecture's id, where the file does not tell.

    Raises:
        OptionError: the adapter does not change it.
        UnknownArchitectureError, MatchError: see ``translate``.
    """
    named = adapter
    if adapter.naming != "diffusers":
        named = translate(adapter, detect_architecture(adapter, arch), "diffusers")
    sizes = Counter(path.partition(".")[0] for path in (*named.layers, *named.extras))
    if network not in sizes:
        raise OptionError(
            f"the adapter does not change a network called {network!r}",
            hint=did_you_mean(network, sizes),
        )
    others = [f"{name} ({counted(n, 'module')})" for name, n in sizes.items() if name != network]
    notes = (*named.notes, *([f"left out: {', '.join(others)}"] if others else []))
    return replace(
        named,
        layers=_within(named.layers, network),
        extras=_within(named.extras, network),
        notes=notes,
    )


def split_second(adapter: Adapter) -> tuple[Adapter, Adapter]:
    """Return the adapter without its second transformer, and that one under the first's names."""
    second = replace(
        adapter,
        layers=_called(_within(adapter.layers, SECOND), SECOND, _FIRST),
        extras=_called(_within(adapter.extras, SECOND), SECOND, _FIRST),
    )
    start = f"{SECOND}."
    rest = replace(
        adapter,
        layers={p: delta for p, delta in adapter.layers.items() if not p.startswith(start)},
        extras={p: extra for p, extra in adapter.extras.items() if not p.startswith(start)},
    )
    return rest, second


def join_second(rest: Adapter, second: Adapter) -> Adapter:
    """Return both as one adapter in diffusers' naming: the inverse of ``split_second``."""
    layers = {**rest.layers, **_called(second.layers, _FIRST, SECOND)}
    extras = {**rest.extras, **_called(second.extras, _FIRST, SECOND)}
    notes = tuple(dict.fromkeys((*rest.notes, *second.notes)))
    return replace(second, layers=in_natural_order(layers), extras=extras, notes=notes)


def _within(items: Mapping[str, _T], network: str) -> dict[str, _T]:
    return {path: item for path, item in items.items() if path.startswith(f"{network}.")}


def _called(items: Mapping[str, _T], old: str, new: str) -> dict[str, _T]:
    return {new + path.removeprefix(old): item for path, item in items.items()}
