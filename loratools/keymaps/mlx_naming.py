"""Between transformers' naming and mlx-lm's, whose names differ in a few types of models."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from loratools.adapter import Adapter, in_natural_order
from loratools.deltas import ExpertLoRA, LayerDelta, LoRA
from loratools.errors import UnsupportedError
from loratools.keymaps.detection import certain_architecture
from loratools.keymaps.mlx_base import MLXBase, own_base
from loratools.keymaps.mlx_experts import stacked_experts, unstacked_experts
from loratools.keymaps.mlx_rows import NEOX_LEAVES, NESTED, MLXRow
from loratools.keymaps.mlx_tying import with_tied_head, without_tied_head

NAMING = "mlx"
_CONFIG = "adapter_config.json"
_NESTED = re.compile(r"(?:model\.)?language_model\.")
_OTHER_FORM = re.compile(r"conv(?:1d|_1d)?\.weight$|linear_attn|switch_mlp|switch_glu|\.experts\.")
"""Tensors that mlx-lm stores with other axes or numbers, or stacked."""

_STACKED = re.compile(r"\.switch_(?:mlp|glu)\.|\.experts\.(?:gate|up|down)_proj\.weight$")

V = TypeVar("V")


def concerns_mlx(*namings: str) -> bool:
    """Return whether any of the namings is mlx-lm's, and any is not."""
    return NAMING in namings and set(namings) != {NAMING}


def is_mlx_named(base: MLXBase) -> bool:
    """Return whether a checkpoint has mlx-lm's names where they differ from transformers'."""
    if any(map(_STACKED.search, base.shapes)):
        return True
    prefixes = () if base.row.prefixes == NESTED else base.row.prefixes
    old, new = (tuple(pair[n] for pair in prefixes) for n in (0, 1))
    return any(n.startswith(new) and not n.startswith(old) for n in base.shapes)


def renamed_mlx(
    adapter: Adapter, naming: str, base: MLXBase | None = None, *, for_merge: bool = False
) -> Adapter:
    """Return an adapter with paths and experts in the other naming, to or from mlx-lm's.

    Args:
        adapter: in mlx-lm's naming or transformers'.
        naming: the one that is wanted.
        base: what the adapter is for; by default the folder that it names itself, if it is there.
        for_merge: whether experts are wanted as the checkpoint has them, not as in memory.

    Raises:
        UnsupportedError: namings of image models; modules that only one of the two has.
        InputError: experts whose layout the base alone tells.
    """
    if adapter.naming == naming:
        return adapter
    words = json.loads(adapter.metadata.get(_CONFIG, "{}"))
    known = base or own_base(words) or MLXBase()
    if adapter.naming == NAMING:
        return _from_mlx(adapter, known, for_merge=for_merge)
    image = certain_architecture(adapter)
    if adapter.naming != "transformers" or image:
        raise UnsupportedError(
            "mlx-lm's adapters are for language models, and this adapter's names are those of an "
            f"image model ({image.title if image else adapter.naming})",
            hint="convert it to another format; `loratools formats` lists them",
        )
    return _to_mlx(adapter, known)


def meeting(adapters: Sequence[Adapter], base: MLXBase | None = None) -> tuple[Adapter, ...]:
    """Return adapters of which some are in mlx-lm's naming and some in transformers', in one.

    That is mlx-lm's where experts meet and the base is known, as checkpoints and memory have them
    in several ways; else transformers'.
    """
    stacks = any(a.naming == "transformers" and has_stacks(a) for a in adapters)
    naming = NAMING if stacks and base is not None else "transformers"
    both = (NAMING, "transformers")
    return tuple(renamed_mlx(a, naming, base) if a.naming in both else a for a in adapters)


# ── to mlx-lm ────────────────────────────────────────────────────────────────────────────────


def _to_mlx(adapter: Adapter, base: MLXBase) -> Adapter:
    _check_extras(adapter, base)
    row = base.row
    nested = any(map(_NESTED.match, (*adapter.layers, *adapter.extras)))
    prefixes = row.prefixes or (NESTED if nested and base.model_type is None else ())
    named = _renamed(without_tied_head(adapter.layers, base), prefixes, row)
    _check_present(named, row, base)
    layers, notes = stacked_experts(named, base)
    notes += _levelling(layers)
    return replace(
        adapter,
        layers=in_natural_order(layers),
        extras=_renamed(adapter.extras, prefixes, row),
        naming=NAMING,
        notes=(*adapter.notes, *notes),
    )


def _levelling(layers: Mapping[str, LayerDelta]) -> list[str]:
    """Return what one rank and one scale for all layers mean for these."""
    inner = [getattr(delta, "inner", delta) for delta in layers.values()]
    loras = [one for one in inner if isinstance(one, (LoRA, ExpertLoRA))]
    ranks = {lora.rank for lora in loras}
    notes = []
    if len(ranks) > 1:
        notes.append(f"mlx-lm has one rank for all: others have zeros up to {max(ranks)}")
    if len({f"{lora.scale:.6g}" for lora in loras}) > 1:
        notes.append("mlx-lm has one scale for all: others are folded into the factors")
    return notes


def _renamed(
    items: Mapping[str, V], prefixes: Sequence[tuple[str, str]], row: MLXRow
) -> dict[str, V]:
    return {_inner(_prefixed(name, prefixes), row.inner): item for name, item in items.items()}


_NO_LANGUAGE = re.compile(
    r"(?:model\.)?(?:visual|vision_tower|vision_model|audio_tower|multi_modal_projector"
    r"|embed_vision|embed_audio)\."
)
"""Modules that mlx-lm leaves out; a format that cannot hold them says so."""


def _prefixed(name: str, prefixes: Sequence[tuple[str, str]]) -> str:
    if _NO_LANGUAGE.match(name):
        return name
    fitting = ((old, new) for old, new in prefixes if name.startswith(old))
    old, new = next(fitting, ("", ""))
    return new + name.removeprefix(old)


def _inner(name: str, pairs: Sequence[tuple[str, str]]) -> str:
    for old, new in pairs:
        # Up to the part's end: mlp.gate is not mlp.gate_proj.
        found = re.sub(re.escape(old) + r"(?=\.(?:weight|bias)$|$)", new, name, count=1)
        if found != name:
            return found
    return name


def _check_present(layers: Mapping[str, LayerDelta], row: MLXRow, base: MLXBase) -> None:
    missing = [path for path in layers if path.rpartition(".")[2] in row.absent]
    if missing:
        raise UnsupportedError(
            f"mlx-lm's {base.model_type} has no linear layer for {', '.join(missing[:4])}",
            hint="merge the adapter into the base, and convert the merged model",
        )


def _check_extras(adapter: Adapter, base: MLXBase) -> None:
    """Raise UnsupportedError for whole tensors that one of the two stores in another form."""
    if adapter.layers:
        return
    odd = [name for name in adapter.extras if _OTHER_FORM.search(name)]
    if base.row.other_values:
        odd = list(adapter.extras)
    if odd:
        raise UnsupportedError(
            f"whole tensors that mlx-lm stores in another form: {', '.join(odd[:4])}",
            hint="fuse them into the model with mlx-lm itself",
        )


# ── from mlx-lm ──────────────────────────────────────────────────────────────────────────────


def _from_mlx(adapter: Adapter, base: MLXBase, *, for_merge: bool) -> Adapter:
    _check_extras(adapter, base)
    row = base.row
    inner = tuple((new, old) for old, new in row.inner if not row.fused)
    prefixes = _back(row) if base.model_type else _guessed(adapter)
    turned = replace(row, inner=inner)
    layers = unstacked_experts(adapter.layers, base, in_memory=not for_merge)
    words = json.loads(adapter.metadata.get(_CONFIG, "{}"))
    named = words.get("base_model_name_or_path")
    config = {"task_type": "CAUSAL_LM", **({"base_model_name_or_path": named} if named else {})}
    return replace(
        adapter,
        layers=in_natural_order(with_tied_head(_renamed(layers, prefixes, turned), base)),
        extras=_renamed(adapter.extras, prefixes, turned),
        naming="transformers",
        metadata={**adapter.metadata, _CONFIG: json.dumps(config, sort_keys=True)},
    )


_UNNESTED = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head", "lm_head"),
)


def _back(row: MLXRow) -> tuple[tuple[str, str], ...]:
    if row.prefixes == NESTED:
        return _UNNESTED
    pairs = tuple((new, old) for old, new in row.prefixes)
    return tuple(sorted(pairs, key=lambda pair: len(pair[0]), reverse=True))


def _guessed(adapter: Adapter) -> tuple[tuple[str, str], ...]:
    """Return what the names themselves tell of a model whose type is not known."""
    neox = any(path.endswith(NEOX_LEAVES) for path in adapter.layers)
    blocks = ("model.h.", "gpt_neox.layers." if neox else "transformer.h.")
    return (*_UNNESTED, blocks)


def has_stacks(adapter: Adapter) -> bool:
    """Return whether any layer is a stack, or one expert of one."""
    return any(
        isinstance(delta, ExpertLoRA) or ".experts." in path
        for path, delta in adapter.layers.items()
    )
