"""The weights of every layer: one for each adapter, and others where a pattern fits."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.errors import OptionError
from loratools.merge_methods.method import Method
from loratools.suggest import nearest

_WRITE = "write PATTERN=w1,w2,... with one number for each adapter"


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights by name of layer or tensor.

    Attributes:
        usual: one for each adapter.
        rules: patterns and the weights that take the place of the usual ones; the first that fits
            decides.
    """

    usual: tuple[float, ...]
    rules: tuple[tuple[re.Pattern[str], tuple[float, ...]], ...] = ()

    def of(self, name: str) -> Tensor:
        """Return the weights of a layer, (T,), float64."""
        fitting = (values for pattern, values in self.rules if pattern.search(name))
        return torch.tensor(next(fitting, self.usual), dtype=torch.float64)


def parse_weights(usual: Sequence[float], texts: Sequence[str]) -> Weights:
    """Return the weights that the command line says.

    Args:
        usual: one for each adapter.
        texts: ``PATTERN=w1,w2,...``; a pattern is a regular expression, searched for in the names.

    Raises:
        OptionError: what cannot be parsed, another number of weights, one that is not finite.
    """
    for value in usual:
        if not math.isfinite(value):
            raise OptionError(f"weight {value} is not finite", hint="give finite weights")
    return Weights(tuple(usual), tuple(_rule(text, len(usual)) for text in texts))


def _rule(text: str, count: int) -> tuple[re.Pattern[str], tuple[float, ...]]:
    pattern, sign, numbers = text.rpartition("=")
    if not sign or not pattern:
        raise OptionError(f"--weights {text!r} has no pattern", hint=_WRITE)
    try:
        found = re.compile(pattern), tuple(float(number) for number in numbers.split(","))
    except re.error as error:
        raise OptionError(f"--weights {text!r}: no pattern: {error}", hint=_WRITE) from error
    except ValueError as error:
        fault = f"--weights {text!r}: {numbers!r} is not a list of numbers"
        raise OptionError(fault, hint=_WRITE) from error
    if len(found[1]) != count:
        raise OptionError(
            f"--weights {text!r}: {len(found[1])} weights for {count} adapters", hint=_WRITE
        )
    if not all(math.isfinite(value) for value in found[1]):
        raise OptionError(f"--weights {text!r}: not finite", hint=_WRITE)
    return found


def check_weights(weights: Weights, names: Collection[str], method: Method) -> None:
    """Raise OptionError for a pattern that fits nothing, or weights that the method cannot take."""
    for pattern, _ in weights.rules:
        if not any(pattern.search(name) for name in names):
            near = nearest(pattern.pattern, names) or list(names)[:2]
            raise OptionError(
                f"--weights {pattern.pattern!r} fits no module",
                hint=f"they are called like {', '.join(near)}",
            )
    if not method.shares:
        return
    for values in (weights.usual, *(values for _, values in weights.rules)):
        if min(values) < 0 or sum(values) <= 0:
            raise OptionError(
                f"{method.name} takes weights as shares, and {', '.join(map(str, values))} "
                "are none",
                hint="give weights of at least 0 that are not all 0, or use --method linear",
            )
