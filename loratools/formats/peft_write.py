"""Writing PEFT: tensor names of each delta, and a minimal adapter_config.json that reloads.

Only fields that differ from PEFT's defaults are written, because versions before October 2024
refuse fields they do not know.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from loratools.adapter import Adapter, Extra
from loratools.deltas import (
    DoRA,
    ExpertLoRA,
    LayerDelta,
    LoRA,
    MovedBase,
    Replacement,
    RowReplacement,
)
from loratools.errors import MalformedAdapterError, UnsupportedError
from loratools.formats.format import Bundle
from loratools.formats.peft_config import (
    CONFIG_NAME,
    PARAMETER_ORDER,
    PeftConfig,
    pattern_matches,
)

_PREFIX = "base_model.model."
# peft 0.21 writes the fields used here; older readers ignore or do not meet them.
_PEFT_VERSION = "0.21.2"
# Fields of a config that was read which stay true whatever the weights became, and the values
# that need not be said.
_CARRIED: Mapping[str, tuple[Any, ...]] = {
    "base_model_name_or_path": (None,),
    "revision": (None,),
    "task_type": (None,),
    "auto_mapping": (None,),
    "fan_in_fan_out": (False, None),
    "trainable_token_indices": (None,),
    "token_indices": (None, []),
    "bias": ("none", None),
    "ensure_weight_tying": (False, None),
    "modules_to_save": (None, []),
    "kasa_config": (None,),
    "alora_invocation_tokens": (None, []),
}
_SELECTING = ("layers_to_transform", "layers_pattern", "exclude_modules")


def write(adapter: Adapter) -> Bundle:
    """Write the adapter as PEFT tensors and config; raises UnsupportedError for other kinds."""
    _check_uniform(adapter)
    tensors: dict[str, Tensor] = {}
    for path, delta in adapter.layers.items():
        pieces = (
            _expert_tensors(path, delta, adapter)
            if isinstance(delta, ExpertLoRA)
            else _layer_tensors(path, delta)
        )
        for name, tensor in pieces:
            tensors[_PREFIX + name] = tensor.contiguous()
    for name, extra in adapter.extras.items():
        stored, tensor = _extra_tensor(name, extra, adapter)
        tensors[_PREFIX + stored] = tensor.contiguous()
    config = json.dumps(_config(adapter), indent=2, sort_keys=True) + "\n"
    return Bundle(tensors, {"format": "pt"}, {CONFIG_NAME: config})


def _layer_tensors(path: str, delta: LayerDelta) -> Iterator[tuple[str, Tensor]]:
    lora = _inner_lora(path, delta)
    if lora.role == "embedding":
        yield f"{path}.lora_embedding_A", lora.down
        yield f"{path}.lora_embedding_B", lora.up
    else:
        module = _stored_path(path, lora)
        yield f"{module}.lora_A.weight", lora.down
        yield f"{module}.lora_B.weight", lora.up
    if lora.bias is not None:
        yield f"{path}.lora_B.bias", lora.bias
    if isinstance(delta, DoRA):
        yield f"{path}.lora_magnitude_vector", _stored_magnitude(delta)
    if isinstance(delta, MovedBase) and delta.start == "kasa":
        # The reader folded the diagonal into down.
        yield f"{path}.lora_diag", torch.ones(lora.rank, dtype=lora.down.dtype)


def _expert_tensors(path: str, delta: ExpertLoRA, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
    """Yield a stack as PEFT's ParamWrapper stores it, nested in the order of registration."""
    owner, _, name = path.rpartition(".")
    later = PARAMETER_ORDER[PARAMETER_ORDER.index(name) + 1 :] if name in PARAMETER_ORDER else ()
    depth = sum(f"{owner}.{other}" in adapter.layers for other in later)
    module = owner + ".base_layer" * depth
    if delta.flipped_if_square and delta.weight_shape[1] == delta.weight_shape[2]:
        # Old files run lora_A over the other axis, which the version written here does not.
        delta = replace(delta, down=delta.up.mT, up=delta.down.mT, flipped_if_square=False)
    experts, out, _ = delta.weight_shape
    yield f"{module}.lora_A.weight", delta.down.reshape(experts * delta.rank, -1)
    yield f"{module}.lora_B.weight", delta.up.permute(1, 2, 0).reshape(out, -1)


def _inner_lora(path: str, delta: LayerDelta) -> LoRA:
    if isinstance(delta, LoRA):
        return delta
    if isinstance(delta, MovedBase):
        return delta.lora
    if isinstance(delta, DoRA) and isinstance(delta.inner, LoRA) and delta.axis == "out":
        return delta.inner
    raise UnsupportedError(
        f"{path}: PEFT's LoRA format cannot hold a {delta.kind} delta",
        hint="convert it to plain LoRA first, or merge it",
    )


def _stored_path(path: str, lora: LoRA) -> str:
    if lora.role != "attention_out":
        return path
    module, _, leaf = path.rpartition(".")
    return f"{module}.base_layer.{leaf}" if module else f"base_layer.{leaf}"


def _stored_magnitude(delta: DoRA) -> Tensor:
    # PEFT keeps a convolution's magnitude as (1, out, 1...).
    spatial = len(delta.weight_shape) - 2
    if spatial == 0:
        return delta.magnitude
    return delta.magnitude.reshape(1, -1, *([1] * spatial))


def _extra_tensor(name: str, extra: Extra, adapter: Adapter) -> tuple[str, Tensor]:
    module, _, leaf = name.rpartition(".")
    if isinstance(extra, RowReplacement):
        standalone = not adapter.layers
        infix = "" if standalone else "token_adapter."
        return f"{module}.{infix}trainable_tokens_delta", extra.rows
    if extra.origin == "base_copy" or (extra.origin == "bias" and module in adapter.layers):
        return f"{module}.base_layer.{leaf}", extra.value
    return name, extra.value


def _check_uniform(adapter: Adapter) -> None:
    """Refuse layers that one config cannot speak for.

    Raises UnsupportedError for DoRA beside other layers, and for several initialisations.
    """
    kinds = {delta.kind for delta in adapter.layers.values()}
    if DoRA.kind in kinds and len(kinds) > 1:
        raise UnsupportedError(
            f"PEFT has DoRA in all layers or in none; these are {', '.join(sorted(kinds))}",
            hint="merge it, or write the layers of each kind apart",
        )
    for path, delta in adapter.layers.items():
        if isinstance(delta, MovedBase) and not _may_move(delta.lora):
            raise UnsupportedError(
                f"{path}: PEFT moves the base ({delta.start}) in linear layers only",
                hint="merge it instead",
            )
    if len(starts := _starts(adapter)) > 1:
        words = ", ".join(sorted(str(start) for start in starts))
        raise UnsupportedError(
            f"PEFT has one initialisation for all linear layers, and this adapter has: {words}",
            hint="merge it, or write the layers of each apart",
        )


def _may_move(lora: LoRA) -> bool:
    return lora.role == "linear" and len(lora.weight_shape) == 2


def _starts(adapter: Adapter) -> set[str | None]:
    """Return the initialisations of the layers that one could move, None for the plain ones."""
    plain = {
        None for delta in adapter.layers.values() if isinstance(delta, LoRA) and _may_move(delta)
    }
    moved = {delta.start for delta in adapter.layers.values() if isinstance(delta, MovedBase)}
    return plain | moved


def _start(adapter: Adapter) -> str | None:
    return next(iter(_starts(adapter)), None)


def _announced(adapter: Adapter, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the words that full tensors and rows need: PEFT adds or finds nothing without them."""
    said = PeftConfig(config, "")
    new = [
        name.rpartition(".")[0]
        for name, extra in adapter.extras.items()
        if isinstance(extra, Replacement) and extra.expected and not said.saves_module(name)
    ]
    words: dict[str, Any] = {}
    if new:
        words["modules_to_save"] = [*(config.get("modules_to_save") or []), *dict.fromkeys(new)]
    tables = {
        name.rpartition(".")[0]: list(extra.indices)
        for name, extra in adapter.extras.items()
        if isinstance(extra, RowReplacement)
    }
    field = "trainable_token_indices" if adapter.layers else "token_indices"
    if tables and [config.get(field)] != list(tables.values()):
        words["trainable_token_indices"] = tables
    return words


def _without_layers(adapter: Adapter) -> dict[str, Any]:
    """Return the words for an adapter of replaced rows alone, or of full tensors too."""
    tables = [e for e in adapter.extras.values() if isinstance(e, RowReplacement)]
    if len(tables) == len(adapter.extras) and len({table.indices for table in tables}) == 1:
        modules = sorted(name.rpartition(".")[0] for name in adapter.extras)
        indices = list(tables[0].indices)
        words = {"target_modules": modules, "token_indices": indices}
        return {**words, "peft_type": "TRAINABLE_TOKENS", "trainable_token_indices": None}
    return {"peft_type": "LORA", "target_modules": []}


def _config(adapter: Adapter) -> dict[str, Any]:
    read = json.loads(adapter.metadata.get(CONFIG_NAME, "{}"))
    said = {name: read[name] for name in _CARRIED if name in read}
    config = {name: value for name, value in said.items() if value not in _CARRIED[name]}
    config["peft_version"] = _PEFT_VERSION
    config |= _announced(adapter, config)
    if not adapter.layers:
        config |= _without_layers(adapter)
        return {name: value for name, value in config.items() if value is not None}
    stacks = {p: delta for p, delta in adapter.layers.items() if isinstance(delta, ExpertLoRA)}
    loras = {p: _inner_lora(p, delta) for p, delta in adapter.layers.items() if p not in stacks}
    ranks = _by_module(loras, lambda lora: lora.rank) | {p: d.rank for p, d in stacks.items()}
    alphas = _by_module(loras, _stored_alpha) | {p: _stored_alpha(d) for p, d in stacks.items()}
    # A 2-D parameter that is no Linear's own (a router) is named as a parameter again.
    named = [str(entry) for entry in read.get("target_parameters") or []]
    parameters = [p for p in loras if any(f".{p}.weight".endswith(f".{n}") for n in named)]
    config |= {
        "peft_type": "LORA",
        "r": (rank := _usual(ranks)),
        "lora_alpha": (alpha := _usual(alphas)),
        "target_modules": _targets({p: d for p, d in loras.items() if p not in parameters}, read),
        **_pattern("rank_pattern", ranks, rank),
        **_pattern("alpha_pattern", alphas, alpha),
    }
    if stacks or parameters:
        config["target_parameters"] = sorted([*stacks, *(f"{path}.weight" for path in parameters)])
    if any(isinstance(delta, DoRA) for delta in adapter.layers.values()):
        config["use_dora"] = True
    start = _start(adapter)
    if start == "kasa":
        config.setdefault("kasa_config", {"beta": 1e-4, "gamma": 1e-3})
    elif start:
        config["init_lora_weights"] = start
    if any(lora.bias is not None for lora in loras.values()):
        config["lora_bias"] = True
    return config


def _stored_alpha(delta: LoRA | ExpertLoRA) -> float:
    doubled = isinstance(delta, LoRA) and delta.role == "attention_out"
    alpha = delta.alpha / 2 if doubled else delta.alpha
    return int(alpha) if alpha == int(alpha) else alpha


def _usual(values: Mapping[str, float]) -> float:
    return Counter(values.values()).most_common(1)[0][0]


def _by_module(loras: Mapping[str, LoRA], value: Callable[[LoRA], float]) -> dict[str, float]:
    """Return a value for every module that PEFT configures, attention's two layers as one."""
    values: dict[str, float] = {}
    for path, lora in loras.items():
        module = path.removesuffix(".out_proj") if lora.role == "attention_out" else path
        if values.setdefault(module, value(lora)) != value(lora):
            raise UnsupportedError(
                f"{module}: its two layers have different ranks or alphas, and PEFT has one word "
                "for both",
                hint="merge it instead",
            )
    return values


def _pattern(name: str, values: Mapping[str, float], usual: float) -> dict[str, Any]:
    """Return the pattern field, or nothing where every module has the usual value.

    A path used as a pattern also selects longer paths that end in it, and its characters may mean
    something else in a regular expression; then all rows are anchored and escaped instead. The
    rows are sorted, as PEFT sorts them when it saves.
    """
    rows = {path: value for path, value in sorted(values.items()) if value != usual}
    if not rows:
        return {}
    if not _says(rows, values, usual, name):
        rows = {f"^{re.escape(path)}": value for path, value in rows.items()}
    return {name: rows}


def _says(rows: Mapping[str, float], values: Mapping[str, float], usual: float, name: str) -> bool:
    """Return whether PEFT finds every module's value in the rows, first match first."""
    try:
        return all(
            next((rows[row] for row in rows if pattern_matches(row, path, name)), usual) == value
            for path, value in values.items()
        )
    except MalformedAdapterError:
        return False


def _targets(loras: Mapping[str, LoRA], read: Mapping[str, Any]) -> list[str]:
    """Return the targets as read, if they still select every layer; else the full paths."""
    paths = [
        path.removesuffix(".out_proj") if lora.role == "attention_out" else path
        for path, lora in loras.items()
    ]
    targets = read.get("target_modules")
    narrowed = any(read.get(name) for name in _SELECTING)
    if (
        not narrowed
        and isinstance(targets, list)
        and all(any(path == t or path.endswith("." + t) for t in targets) for path in paths)
    ):
        return sorted(str(t) for t in targets)
    return sorted(set(paths))
