"""mlx-lm's ``adapter_config.json``: one rank and one scale, and the layers that have them.

Source: mlx-lm 0.32 ``tuner/utils.py`` (``load_adapters``, ``linear_to_lora_layers``). ``keys`` are
module paths inside a block or from the model's root; ``num_layers`` counts blocks from the last.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from loratools.errors import MalformedAdapterError
from loratools.formats.peft_config import CONFIG_NAME, LARGEST_ALPHA

BASE_WORD = "model"
BASE_NAME = "base_model_name_or_path"
_BLOCK = re.compile(r"(?P<list>.*?\.?(?:layers|h|blocks))\.(?P<number>\d+)\.(?P<inner>.+)")
_TYPES = ("lora", "dora", "full")
_WORDS = ("fine_tune_type", "lora_parameters")
"""Words of which every config of mlx-lm has one, and none of PEFT's."""

ALL = -1
"""``num_layers`` for every block."""


@dataclass(frozen=True, slots=True)
class MLXConfig:
    """What the weights mean.

    Attributes:
        kind: ``lora``, ``dora`` or ``full``.
        rank: of all factors; None where the config does not say.
        scale: on every product.
        keys: the modules' names; None for all linear layers.
        base: what the config calls the base model.
        num_layers: how many blocks from the last.
    """

    kind: str
    rank: int | None
    scale: float
    keys: tuple[str, ...] | None
    base: str | None
    num_layers: int | None


def is_mlx_config(text: str | None) -> bool:
    """Return whether a side file is a config of mlx-lm's."""
    try:
        fields = json.loads(text or "null")
    except json.JSONDecodeError:
        return False
    return isinstance(fields, dict) and any(word in fields for word in _WORDS)


def parse_mlx_config(text: str | None, source: str) -> MLXConfig:
    """Parse the config beside the weights.

    Raises MalformedAdapterError where it is missing, no config of mlx-lm's, or says no scale.
    """
    fields = _fields(text, source)
    kind = fields.get("fine_tune_type", "lora")
    if kind not in _TYPES:
        raise MalformedAdapterError(
            f"{source}: fine_tune_type is {kind!r}, and mlx-lm knows {', '.join(_TYPES)}",
            hint=f"correct it in {CONFIG_NAME}",
        )
    base, layers = fields.get(BASE_WORD), fields.get("num_layers")
    words = fields.get("lora_parameters")
    words = words if isinstance(words, dict) and kind != "full" else {}
    rank, keys = words.get("rank"), words.get("keys")
    return MLXConfig(
        kind,
        rank if isinstance(rank, int) else None,
        1.0 if kind == "full" else _scale(words.get("scale"), source),
        tuple(map(str, keys)) if isinstance(keys, list) else None,
        base if isinstance(base, str) and base else None,
        layers if isinstance(layers, int) else None,
    )


def _fields(text: str | None, source: str) -> Mapping[str, Any]:
    if text is None:
        raise MalformedAdapterError(
            f"{source}: {CONFIG_NAME} is missing, so the scale is unknown",
            hint=f"put the {CONFIG_NAME} of the training run beside the weights",
        )
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise MalformedAdapterError(f"{source}: {CONFIG_NAME} is not JSON ({error})") from error
    if not is_mlx_config(text):
        raise MalformedAdapterError(
            f"{source}: {CONFIG_NAME} is none of mlx-lm's, and the factors are (lora_a, lora_b)",
            hint=f"put the {CONFIG_NAME} that mlx_lm.lora wrote beside the weights",
        )
    found: Mapping[str, Any] = fields
    return found


def _scale(value: object, source: str) -> float:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not plain or not math.isfinite(value) or abs(value) > LARGEST_ALPHA:  # type: ignore[arg-type]
        raise MalformedAdapterError(
            f"{source}: lora_parameters has {json.dumps(value)} for a scale, and mlx-lm needs a "
            "number",
            hint=f"give the training run's scale in {CONFIG_NAME}; older runs used 20",
        )
    return float(value)  # type: ignore[arg-type]


def mlx_config(
    kind: str, paths: Collection[str], rank: int, scale: float, read: Mapping[str, Any]
) -> str:
    """Return the text of a config that loads the modules at ``paths``.

    Args:
        kind: ``lora`` or ``dora``.
        paths: from the model's root.
        rank: of all of them.
        scale: of all of them.
        read: the words that the adapter came with, for the base's name and number of blocks.
    """
    keys, layers = _selection(paths, read.get("num_layers"))
    parameters = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys}
    return _text(kind, read, num_layers=layers, lora_parameters=parameters)


def full_config(read: Mapping[str, Any]) -> str:
    """Return the text of a config for whole tensors."""
    return _text("full", read, num_layers=ALL)


def _text(kind: str, read: Mapping[str, Any], **words: Any) -> str:
    named = {BASE_WORD: read[BASE_NAME]} if read.get(BASE_NAME) else {}
    fields = {"fine_tune_type": kind, **words, **named}
    return json.dumps(fields, indent=4, sort_keys=True) + "\n"


def _selection(paths: Collection[str], said: object) -> tuple[list[str], int]:
    """Return (keys, num_layers) that select the modules at ``paths`` and no other.

    Names inside a block, as mlx-lm's own configs have them, where all blocks from some number on
    have the same modules and that is what they say; else full paths. A model may have more blocks
    than the adapter: with ``ALL`` they get factors that are zero.
    """
    parts = [_BLOCK.fullmatch(path) for path in paths]
    blocks: dict[int, set[str]] = {}
    for part in parts:
        if part:
            blocks.setdefault(int(part["number"]), set()).add(part["inner"])
    inner = next(iter(blocks.values()), set())
    alike = all(names == inner for names in blocks.values())
    single = len({part["list"] for part in parts if part}) == 1
    first, last = min(blocks, default=0), max(blocks, default=-1)
    whole = alike and single and len(blocks) == last - first + 1
    layers = ALL if first == 0 else len(blocks)
    if not whole or (first and said != layers):
        return sorted(paths), ALL
    rest = [path for path, part in zip(paths, parts, strict=True) if not part]
    return sorted([*inner, *rest]), layers


def is_selected(path: str, keys: Collection[str]) -> bool:
    """Return whether ``keys`` name the module, from the root or inside a block."""
    part = _BLOCK.fullmatch(path)
    return path in keys or (part is not None and part["inner"] in keys)
