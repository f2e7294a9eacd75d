"""GGUF adapters, as llama.cpp reads them: one pair of factors a tensor, one alpha a file.

Specification: https://github.com/ggml-org/llama.cpp/blob/master/src/llama-adapter.cpp
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loratools.adapter import Adapter, in_natural_order
from loratools.deltas import ExpertLoRA, LayerDelta, LoRA
from loratools.deltas.one_alpha import usual_alpha, with_alpha
from loratools.errors import MalformedAdapterError, UnsupportedError
from loratools.formats.detection import matcher
from loratools.formats.format import Bundle, Format

ARCHITECTURE = "general.architecture"
ALPHA = "adapter.lora.alpha"
_TYPE = {"general.type": "adapter", "adapter.type": "lora"}
_A, _B = ".weight.lora_a", ".weight.lora_b"
_EMBEDDING = "token_embd"
_WORDS = ("general.", "adapter.", "gguf.", "loratools.")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_MERGE = "merge it into the base instead (`loratools merge`), and convert the merged model"


# ── reading ──────────────────────────────────────────────────────────────────────────────────


def read(bundle: Bundle) -> Adapter:
    """Read a GGUF adapter, in GGUF's own names and layout.

    Raises:
        MalformedAdapterError: factors without a partner or of ranks that differ.
        UnsupportedError: an adapter of another type than LoRA.
    """
    _check_type(bundle)
    alpha = _alpha(bundle)
    layers: dict[str, LayerDelta] = {}
    others = []
    for name, tensor in bundle.tensors.items():
        if name.endswith(_A):
            path = name.removesuffix(_A)
            layers[path] = _layer(path, tensor, _partner(bundle, path, _B), alpha, bundle.source)
        elif name.endswith(_B):
            _partner(bundle, name.removesuffix(_B), _A)
        elif not name.endswith("_norm.weight"):
            raise MalformedAdapterError(
                f"{bundle.source}: {name} is no factor of a LoRA, and llama.cpp refuses the file",
                hint="convert the adapter again",
            )
        else:
            others.append(name)
    if not layers:
        raise MalformedAdapterError(f"{bundle.source}: holds no adapter tensors")
    notes = [
        f"{len(others)} norms are left out, which llama.cpp ignores too: {', '.join(others[:4])}"
    ][: len(others)]
    return Adapter(
        in_natural_order(layers),
        naming="gguf",
        arch=bundle.metadata.get(ARCHITECTURE),
        metadata=bundle.metadata,
        notes=tuple(notes),
    )


def _check_type(bundle: Bundle) -> None:
    kind = bundle.metadata.get("adapter.type", "lora")
    if kind != "lora":
        raise UnsupportedError(
            f"{bundle.source}: an adapter of type {kind!r}, and llama.cpp knows only 'lora'",
            hint="convert the adapter again with a current version of its tool",
        )


def _alpha(bundle: Bundle) -> float | None:
    """Return the file's alpha; ``None`` where it is missing or 0, which means a scale of 1."""
    try:
        alpha = float(bundle.metadata.get(ALPHA, 0))
    except ValueError:
        alpha = math.nan
    if not math.isfinite(alpha):
        raise MalformedAdapterError(f"{bundle.source}: {ALPHA} is {bundle.metadata[ALPHA]}")
    return alpha or None


def _partner(bundle: Bundle, path: str, suffix: str) -> Tensor:
    found = bundle.tensors.get(path + suffix)
    if found is None:
        raise MalformedAdapterError(
            f"{bundle.source}: {path}{suffix} is missing beside its other factor",
            hint="the file is incomplete: convert the adapter again",
        )
    return found


def _layer(path: str, a: Tensor, b: Tensor, alpha: float | None, source: str) -> LayerDelta:
    table = path == _EMBEDDING and a.dim() == 2
    down = a.mT if table else a
    if a.dim() not in (2, 3) or a.dim() != b.dim() or down.shape[-2] != b.shape[-1]:
        raise _mismatch(path, a, b, source)
    rank = down.shape[-2]
    if not down.numel() or not b.numel():
        raise _mismatch(path, a, b, source)
    scale = float(rank) if alpha is None else alpha
    if a.dim() == 2:
        return LoRA(down, b, scale, role="embedding" if table else "linear")
    if a.shape[0] != b.shape[0]:
        raise _mismatch(path, a, b, source)
    return ExpertLoRA(down, b, scale)


def _mismatch(path: str, a: Tensor, b: Tensor, source: str) -> MalformedAdapterError:
    return MalformedAdapterError(
        f"{source}: the factors of {path} do not belong together: lora_a is {tuple(a.shape)} and "
        f"lora_b is {tuple(b.shape)}",
        hint="convert the adapter again",
    )


# ── writing ──────────────────────────────────────────────────────────────────────────────────


def write(adapter: Adapter) -> Bundle:
    """Write the adapter; raises UnsupportedError for what a GGUF adapter cannot hold."""
    for name, reason in losses(adapter).items():
        raise UnsupportedError(f"{name}: {reason}", hint=_MERGE)
    layers = {p: d for p, d in adapter.layers.items() if isinstance(d, (LoRA, ExpertLoRA))}
    alpha = _stored(usual_alpha(layers.values()))
    tensors: dict[str, Tensor] = {}
    for path, delta in layers.items():
        # An alpha that differs by its rounding to the file's float32 is this alpha.
        same = _stored(delta.alpha) == alpha
        layer = delta if same else with_alpha(delta, alpha)
        table = isinstance(layer, LoRA) and layer.role == "embedding"
        tensors[path + _A] = _plain(layer.down.mT if table else layer.down)
        tensors[path + _B] = _plain(layer.up)
    return Bundle(tensors, _metadata(adapter, alpha))


def losses(adapter: Adapter) -> Mapping[str, str]:
    """Return what a GGUF adapter cannot hold: module path or tensor name → reason."""
    found = {path: reason for path, d in adapter.layers.items() if (reason := _loss(path, d))}
    for name, extra in adapter.extras.items():
        found[name] = f"a {extra.kind} tensor, and a GGUF adapter holds LoRA factors alone"
    return found


def _loss(path: str, delta: LayerDelta) -> str:
    if not isinstance(delta, (LoRA, ExpertLoRA)):
        return f"a GGUF adapter cannot hold a {delta.kind} delta"
    if delta.up.dim() > (3 if isinstance(delta, ExpertLoRA) else 2):
        return "a convolution, which GGUF adapters do not change"
    if any(factor.dtype not in _NARROWER for factor in (delta.down, delta.up)):
        return f"{delta.up.dtype} factors; --dtype fp32 rounds them"
    return _role_loss(path, delta) if isinstance(delta, LoRA) else ""


def _role_loss(path: str, lora: LoRA) -> str:
    if lora.bias is not None:
        return "a trained bias, which GGUF adapters do not change"
    if lora.role.startswith("attention"):
        return "a projection of nn.MultiheadAttention, which no GGUF model has"
    if (lora.role == "embedding") != (path == _EMBEDDING):
        return f"an embedding's factors belong to {_EMBEDDING} alone"
    return ""


_NARROWER = frozenset(
    {*_FLOATS, *(getattr(torch, name) for name in dir(torch) if name.startswith("float8_"))}
)
"""Dtypes whose numbers float32 holds."""


def _plain(tensor: Tensor) -> Tensor:
    """Return the factor in a dtype that GGUF has; float8 becomes float32, which is exact."""
    wide = tensor if tensor.dtype in _FLOATS else tensor.to(torch.float32)
    return wide.contiguous()


def _stored(alpha: float) -> float:
    """Return the alpha as the file's float32 holds it."""
    value: float = struct.unpack("<f", struct.pack("<f", alpha))[0]
    return value


def _metadata(adapter: Adapter, alpha: float) -> dict[str, str]:
    words = {key: word for key, word in adapter.metadata.items() if key.startswith(_WORDS)}
    # Of an adapter's own data alone; the alignment is the writer's matter.
    words.pop("general.alignment", None)
    named: dict[str, Any] = {} if adapter.arch is None else {ARCHITECTURE: adapter.arch}
    return {**_TYPE, **words, **named, **_TYPE, ALPHA: json.dumps(alpha)}


FORMAT = Format(
    name="gguf",
    title="GGUF (llama.cpp, Ollama)",
    spec="https://github.com/ggml-org/llama.cpp/blob/master/convert_lora_to_gguf.py",
    holds=frozenset({LoRA.kind, ExpertLoRA.kind}),
    matches=matcher("gguf"),
    read=read,
    write=write,
    naming="gguf",
    losses=losses,
    container="gguf",
)
