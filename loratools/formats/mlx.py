"""mlx-lm's adapters: ``adapters.safetensors`` beside ``adapter_config.json``.

Shapes: ``lora_a`` (in, r) and ``lora_b`` (r, out) of a layer, (rows, r) and (r, width) of a table,
(experts, r, in) and (experts, out, r) of a stack; DoRA's ``m`` is (out,), of a table (rows,). ΔW is
scale · (lora_a lora_b)ᵀ. Specification:
https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/tuner/lora.py
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from loratools.adapter import Adapter, in_natural_order
from loratools.deltas import DoRA, ExpertLoRA, LayerDelta, LoRA, Replacement
from loratools.deltas.one_scale import with_one_scale
from loratools.errors import MalformedAdapterError, UnsupportedError
from loratools.formats.activated import invocation_tokens
from loratools.formats.detection import matcher
from loratools.formats.format import Bundle, Format
from loratools.formats.mlx_config import (
    BASE_NAME,
    MLXConfig,
    full_config,
    is_selected,
    mlx_config,
    parse_mlx_config,
)
from loratools.formats.peft_config import CONFIG_NAME

NAMING = "mlx"
_FIELDS = {"lora_a": "a", "lora_b": "b", "m": "m"}
_TABLE = re.compile(
    r"(?:^|\.)(?:embed(?:_tokens(?:_per_layer)?|_in|ding|dings)?|(?:tok|token|word)_embeddings"
    r"|position_embedding_table|wte|wpe)$"
)
"""Names of ``nn.Embedding`` in mlx-lm's models, whose factors have a linear layer's shapes."""

_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")
_NO_LANGUAGE = re.compile(
    r"(?:model\.)?(?:visual|vision_tower|vision_model|audio_tower|multi_modal_projector"
    r"|embed_vision|embed_audio)\."
)
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_NARROWER = frozenset(
    {*_FLOATS, *(getattr(torch, name) for name in dir(torch) if name.startswith("float8_"))}
)
"""Dtypes whose numbers float32 holds."""

_MERGE = "merge it into the base instead (`loratools merge`)"
_AGAIN = "the file is incomplete or a key was renamed; save the adapter again"


# ── reading ──────────────────────────────────────────────────────────────────────────────────


def read(bundle: Bundle) -> Adapter:
    """Read an adapter of mlx-lm's, in its models' own names.

    Raises MalformedAdapterError for tensors and config that contradict each other.
    """
    config = parse_mlx_config(bundle.sidecars.get(CONFIG_NAME), bundle.source)
    metadata = {**bundle.metadata, CONFIG_NAME: _settled(bundle.sidecars[CONFIG_NAME], config)}
    if config.kind == "full":
        extras = {name: Replacement(tensor) for name, tensor in bundle.tensors.items()}
        return Adapter({}, extras, naming=NAMING, metadata=metadata)
    modules = _grouped(bundle)
    layers = {path: _layer(path, found, config, bundle) for path, found in modules.items()}
    if not layers:
        raise MalformedAdapterError(f"{bundle.source}: holds no adapter tensors")
    notes = tuple(_oddities(layers, config))
    return Adapter(in_natural_order(layers), naming=NAMING, metadata=metadata, notes=notes)


def _settled(text: str, config: MLXConfig) -> str:
    """Return the config with the base under the name that PEFT's has for it."""
    fields = json.loads(text)
    return json.dumps({**fields, BASE_NAME: config.base} if config.base else fields, sort_keys=True)


def _grouped(bundle: Bundle) -> dict[str, dict[str, Tensor]]:
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in bundle.tensors.items():
        path, _, leaf = name.rpartition(".")
        if leaf not in _FIELDS or not path:
            raise MalformedAdapterError(
                f"{bundle.source}: unexpected key {name}",
                hint="mlx-lm's LoRA and DoRA adapters hold lora_a, lora_b and m alone; was a key "
                "renamed?",
            )
        modules.setdefault(path, {})[_FIELDS[leaf]] = tensor
    return modules


def _layer(path: str, found: Mapping[str, Tensor], config: MLXConfig, bundle: Bundle) -> LayerDelta:
    _check_complete(path, found, config, bundle.source)
    a, b = found["a"], found["b"]
    if b.dim() == 3:
        return _stack(path, a, b, config, bundle.source)
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or not a.numel() or not b.numel():
        raise _mismatch(path, a, b, bundle.source)
    table = bool(_TABLE.search(path))
    alpha = config.scale * a.shape[1]
    lora = LoRA(a.mT, b.mT, alpha, role="embedding" if table else "linear")
    if config.kind == "lora":
        return lora
    magnitude = found["m"].flatten()
    if len(magnitude) != lora.weight_shape[1 if table else 0]:
        raise _mismatch(path, a, b, bundle.source, magnitude)
    return DoRA(lora, magnitude, "in" if table else "out")


def _check_complete(path: str, found: Mapping[str, Tensor], config: MLXConfig, source: str) -> None:
    wanted = {"a", "b", "m"} if config.kind == "dora" else {"a", "b"}
    for leaf, field in _FIELDS.items():
        if (field in found) == (field in wanted):
            continue
        word = "has no" if field in wanted else "has an unexpected"
        raise MalformedAdapterError(
            f"{source}: {path} {word} {leaf}, and fine_tune_type is {config.kind}", hint=_AGAIN
        )


def _stack(path: str, a: Tensor, b: Tensor, config: MLXConfig, source: str) -> ExpertLoRA:
    experts, _, rank = b.shape
    if a.dim() == 2 and a.shape[0] == experts * rank:
        # Older versions of mlx-lm keep the rows of all experts in one matrix, expert by expert.
        a = a.reshape(experts, rank, -1)
    fits = a.dim() == 3 and a.shape[:2] == (experts, rank)
    if not fits or not a.numel() or not b.numel() or config.kind == "dora":
        raise _mismatch(path, a, b, source)
    return ExpertLoRA(a, b, config.scale * rank)


def _mismatch(
    path: str, a: Tensor, b: Tensor, source: str, m: Tensor | None = None
) -> MalformedAdapterError:
    third = "" if m is None else f" and m {tuple(m.shape)}"
    return MalformedAdapterError(
        f"{source}: the tensors of {path} do not belong together: lora_a is {tuple(a.shape)}, "
        f"lora_b {tuple(b.shape)}{third}",
        hint=_AGAIN,
    )


def _oddities(layers: Mapping[str, LayerDelta], config: MLXConfig) -> Iterator[str]:
    ranks = {getattr(delta, "rank", None) for delta in layers.values()}
    if config.rank is not None and ranks != {config.rank}:
        found = ", ".join(sorted(map(str, ranks)))
        yield (
            f"the config says rank {config.rank} and the factors have {found}: the scale is the "
            "config's, but mlx-lm refuses the file"
        )
    strangers = [] if config.keys is None else _unselected(layers, config.keys)
    if strangers:
        yield (
            f"{len(strangers)} modules are not among the config's keys, so mlx-lm refuses the "
            "file: " + ", ".join(strangers[:4])
        )


def _unselected(layers: Mapping[str, LayerDelta], keys: tuple[str, ...]) -> list[str]:
    return [path for path in layers if not is_selected(path, keys)]


# ── writing ──────────────────────────────────────────────────────────────────────────────────


def write(adapter: Adapter) -> Bundle:
    """Write the adapter; raises UnsupportedError for what mlx-lm cannot load."""
    for name, reason in losses(adapter).items():
        raise UnsupportedError(f"{name}: {reason}", hint=_MERGE)
    said = json.loads(adapter.metadata.get(CONFIG_NAME, "{}"))
    if not adapter.layers:
        values = {name: extra.tensors()["value"] for name, extra in adapter.extras.items()}
        tensors = {name: value.contiguous() for name, value in values.items()}
        return Bundle(tensors, {"format": "mlx"}, {CONFIG_NAME: full_config(said)})
    loras = {path: _factors(delta) for path, delta in adapter.layers.items()}
    levelled, rank, scale = with_one_scale(loras)
    tensors = {}
    for path, lora in levelled.items():
        tensors |= {f"{path}.{leaf}": _plain(tensor) for leaf, tensor in _stored(lora)}
        delta = adapter.layers[path]
        if isinstance(delta, DoRA):
            tensors[f"{path}.m"] = _plain(delta.magnitude.flatten())
    kind = "dora" if any(f"{path}.m" in tensors for path in levelled) else "lora"
    config = mlx_config(kind, list(levelled), rank, scale, said)
    return Bundle(tensors, {"format": "mlx"}, {CONFIG_NAME: config})


def _factors(delta: LayerDelta) -> LoRA | ExpertLoRA:
    inner = delta.inner if isinstance(delta, DoRA) else delta
    assert isinstance(inner, (LoRA, ExpertLoRA))
    square = isinstance(inner, ExpertLoRA) and inner.weight_shape[1] == inner.weight_shape[2]
    if isinstance(inner, ExpertLoRA) and inner.flipped_if_square and square:
        # mlx-lm stores every stack as (experts, out, in).
        return replace(inner, down=inner.up.mT, up=inner.down.mT, flipped_if_square=False)
    return inner


def _stored(lora: LoRA | ExpertLoRA) -> Iterator[tuple[str, Tensor]]:
    stacked = isinstance(lora, ExpertLoRA)
    yield "lora_a", lora.down if stacked else lora.down.mT
    yield "lora_b", lora.up if stacked else lora.up.mT


def _plain(tensor: Tensor) -> Tensor:
    """Return the tensor in a dtype that MLX has; float8 becomes float32, which is exact."""
    wide = tensor if tensor.dtype in _FLOATS else tensor.to(torch.float32)
    return wide.contiguous()


def losses(adapter: Adapter) -> Mapping[str, str]:
    """Return what an adapter of mlx-lm's cannot hold: module path or tensor name → reason."""
    if invocation_tokens(adapter.metadata):
        word = "acts only after its invocation tokens (aLoRA), which mlx-lm does not know"
        return dict.fromkeys(adapter.layers, word)
    found = {path: reason for path, d in adapter.layers.items() if (reason := _loss(path, d))}
    doras = [path for path, delta in adapter.layers.items() if isinstance(delta, DoRA)]
    plain = [path for path in adapter.layers if path not in doras and path not in found]
    if doras and plain:
        fewer, word = (doras, "plain layers") if len(doras) < len(plain) else (plain, "DoRA")
        for path in fewer:
            found.setdefault(path, f"mlx-lm has DoRA in all layers or none, beside it are {word}")
    for name, extra in adapter.extras.items():
        if adapter.layers or not isinstance(extra, Replacement):
            copy = isinstance(extra, Replacement) and extra.origin == "base_copy"
            what = "a copy of the base's own" if copy else f"a {extra.kind}"
            found[name] = f"{what} tensor, and mlx-lm loads factors alone beside factors"
    return found


def _loss(path: str, delta: LayerDelta) -> str:
    inner = delta.inner if isinstance(delta, DoRA) else delta
    if not isinstance(inner, (LoRA, ExpertLoRA)) or (inner is not delta and inner.kind != "lora"):
        return f"an adapter of mlx-lm's cannot hold a {delta.kind} delta"
    if _ONE_EXPERT.search(path):
        return f"a {delta.kind} delta of one expert, and mlx-lm has LoRA on all of them as a stack"
    if _NO_LANGUAGE.match(path):
        return "no part of the language model, which is all that mlx-lm has"
    if any(tensor.dtype not in _NARROWER for tensor in delta.tensors().values()):
        return f"{inner.up.dtype} factors; --dtype fp32 rounds them"
    return _lora_loss(path, delta, inner) if isinstance(inner, LoRA) else ""


def _lora_loss(path: str, delta: LayerDelta, lora: LoRA) -> str:
    if lora.up.dim() > 2 or lora.down.dim() > 2:
        return "a convolution, which mlx-lm does not adapt"
    if lora.bias is not None:
        return "a trained bias, which mlx-lm does not adapt"
    if lora.role.startswith("attention"):
        return "a projection of nn.MultiheadAttention, which no model of mlx-lm has"
    table = lora.role == "embedding"
    if table != bool(_TABLE.search(path)):
        return "mlx-lm tells tables from linear layers by their names, and this name is the other's"
    if isinstance(delta, DoRA) and delta.axis != ("in" if table else "out"):
        axes = "a table's rows, and this one its columns" if table else "rows, and this one columns"
        return f"mlx-lm's DoRA sets the lengths of {axes}"
    return ""


FORMAT = Format(
    name="mlx",
    title="MLX (mlx-lm)",
    spec="https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md",
    holds=frozenset({LoRA.kind, DoRA.kind, ExpertLoRA.kind, Replacement.kind}),
    matches=matcher("mlx"),
    read=read,
    write=write,
    naming=NAMING,
    weights_file="adapters.safetensors",
    losses=losses,
    has_side_files=True,
)
