"""Reading the adapters of a merge: strengths and values that make sense."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from loratools.adapter import Adapter
from loratools.adapter_io import load_adapter
from loratools.errors import OptionError
from loratools.planning.finite import check_finite

PathLike = str | os.PathLike[str]
AdapterInput = PathLike | tuple[PathLike, float]


@dataclass(frozen=True, slots=True)
class LoadedAdapter:
    """An adapter with its user's strength.

    Attributes:
        path: as the user gave it.
        strength: the multiplier on its change.
        adapter: the tensors.
    """

    path: str
    strength: float
    adapter: Adapter


def load_adapters(
    adapters: AdapterInput | Sequence[AdapterInput], *, allow_none: bool = False
) -> list[LoadedAdapter]:
    """Read the adapters and check strengths and values.

    Raises:
        OptionError: no adapter, or a strength that is 0 or not finite.
        NonFiniteError: NaN or infinity in an adapter, naming the tensor.
    """
    given: Sequence[AdapterInput]
    single = isinstance(adapters, (str, os.PathLike)) or _is_pair(adapters)
    given = [adapters] if single else adapters  # type: ignore[assignment, list-item]
    if not given and not allow_none:
        raise OptionError("no adapter given", hint="name at least one adapter after the model")
    loaded = []
    for item in given:
        path, strength = item if isinstance(item, tuple) else (item, 1.0)
        if not math.isfinite(strength) or strength == 0:
            raise OptionError(
                f"{path}: strength {strength} folds nothing",
                hint="give a finite strength other than 0, or leave the adapter out",
            )
        adapter = load_adapter(path)
        check_finite(adapter, str(path))
        loaded.append(LoadedAdapter(str(path), float(strength), adapter))
    return loaded


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], (int, float))
