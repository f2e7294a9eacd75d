"""diffusers: dotted diffusers names under a component, alpha in the file's metadata.

``pytorch_lora_weights.safetensors`` as ``save_lora_weights`` writes it. Sources: diffusers 0.42
``loaders/lora_base.py``, ``loaders/peft.py``, ``utils/peft_utils.py``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from loratools.adapter import Adapter, Extra
from loratools.deltas import DoRA, FullDelta, LayerDelta, LoRA, Replacement, SumDelta
from loratools.formats.alphas import ADAPTER_WORDS, COMPONENTS
from loratools.formats.detection import matcher
from loratools.formats.format import Bundle, Format
from loratools.formats.kohya_metadata import carried_words
from loratools.formats.module_reading import RESHAPE, read_modules
from loratools.formats.module_writing import find_losses, refuse_losses, write_module
from loratools.formats.parameters import PEFT_NAMES, split_dotted

_TITLE = "diffusers (pytorch_lora_weights.safetensors)"
_NORMS = frozenset({"norm_q", "norm_k", "norm_added_q", "norm_added_k"})
# transformers 5.6 dropped this level from CLIP's module names; a pattern without it fits both.
_DROPPED_LEVEL = "text_model."
_WAN_TEXT_KEY = re.compile(r"(blocks\.\d+\.attn2\.)to_k")
_IMAGE_LEAVES = ("add_k_proj", "add_v_proj")


def read(bundle: Bundle) -> Adapter:
    """Read a diffusers file.

    Raises:
        MalformedAdapterError: unknown keys, tensors that do not belong together, alphas that
            contradict each other; all are named.
        UnsupportedError: T-LoRA.
    """
    return read_modules(bundle, _split).adapter("diffusers", bundle)


def _split(key: str) -> tuple[str, str] | None:
    module, _, leaf = key.rpartition(".")
    # Norms that a FLUX Control LoRA replaces.
    if module.rpartition(".")[2] in _NORMS and leaf in ("weight", "bias"):
        return key, "set_weight"
    return split_dotted(key)


def find_diffusers_losses(adapter: Adapter) -> Mapping[str, str]:
    """Return what the format cannot hold: module path or extra → reason."""
    plain = replace(adapter, layers={p: _folded(d) for p, d in adapter.layers.items()})
    losses = find_losses(plain, "diffusers", HOLDS, _extra_loss)
    decomposed = {_component(p) for p, d in plain.layers.items() if isinstance(d, DoRA)}
    for path, delta in plain.layers.items():
        component = _component(path)
        if path in losses:
            continue
        if component not in COMPONENTS:
            losses[path] = f"names begin with a component: {', '.join(COMPONENTS)}"
        elif isinstance(delta, DoRA):
            losses |= _magnitude_loss(path, delta)
        elif component in decomposed:
            losses[path] = "PEFT has DoRA in all layers of a component or in none"
    return losses


def _magnitude_loss(path: str, delta: DoRA) -> dict[str, str]:
    if delta.axis == "in":
        return {path: "DoRA with one length per input is unknown to PEFT"}
    if not isinstance(delta.inner, LoRA):
        return {path: f"DoRA around {delta.inner.kind} is unknown to PEFT"}
    return {}


def _extra_loss(name: str, extra: Extra) -> str:
    if not isinstance(extra, Replacement):
        return "replaced rows of an embedding have no name in it"
    if name.endswith(RESHAPE) or _is_norm(name):
        return ""
    return "diffusers ignores full tensors other than the norms of FLUX Control LoRAs"


def _is_norm(name: str) -> bool:
    return name.rpartition(".")[0].rpartition(".")[2] in _NORMS


def write(adapter: Adapter) -> Bundle:
    """Write an adapter in diffusers' naming; raises UnsupportedError naming all it cannot hold.

    A ``reshape_weight`` is not written: diffusers widens the base to the shape of the LoRA.
    """
    refuse_losses(find_diffusers_losses(adapter), _TITLE)
    layers = {path: _folded(delta) for path, delta in adapter.layers.items()}
    tensors: dict[str, Tensor] = {}
    for path, delta in layers.items():
        tensors |= _module(path, delta)
    for name, extra in adapter.extras.items():
        if isinstance(extra, Replacement) and _is_norm(name):
            tensors[name] = extra.value.contiguous()
    words = {"format": "pt", **carried_words(adapter.metadata)}
    if layers:
        words[ADAPTER_WORDS] = json.dumps(_adapter_words(layers), indent=2, sort_keys=True)
    return Bundle(tensors, words)


def _folded(delta: LayerDelta) -> LayerDelta:
    """Return a LoRA and a change of its bias as one LoRA with a bias, if it is that."""
    if not isinstance(delta, SumDelta) or len(delta.parts) != 2:
        return delta
    lora, full = sorted(delta.parts, key=lambda part: part.kind, reverse=True)
    if not isinstance(lora, LoRA) or not isinstance(full, FullDelta):
        return delta
    if full.weight is not None or full.bias is None or lora.bias is not None or not lora.alpha:
        return delta
    bias = full.bias if lora.scale == 1 else full.bias.float() / lora.scale
    return replace(lora, bias=bias)


def _module(path: str, delta: LayerDelta) -> dict[str, Tensor]:
    inner = delta.inner if isinstance(delta, DoRA) else delta
    found = write_module(path, inner, PEFT_NAMES)
    found.pop(f"{path}.alpha")
    if isinstance(delta, DoRA):
        # PEFT keeps a convolution's magnitude as (1, out, 1...).
        ones = [1] * (len(delta.weight_shape) - 2)
        shape = (1, -1, *ones) if ones else (-1,)
        magnitude = delta.magnitude.reshape(shape).contiguous()
        found[f"{path}.{PEFT_NAMES['peft_magnitude']}"] = magnitude
    return found


def _component(path: str) -> str:
    return path.partition(".")[0]


def _adapter_words(layers: Mapping[str, LayerDelta]) -> dict[str, Any]:
    """Return LoraConfig's fields under each component: diffusers takes all of them or none."""
    words: dict[str, Any] = {}
    for component in sorted({_component(path) for path in layers}):
        own = {p.partition(".")[2]: d for p, d in layers.items() if _component(p) == component}
        fields = _config_fields(own)
        words |= {f"{component}.{name}": value for name, value in fields.items()}
    return words


def _config_fields(layers: Mapping[str, LayerDelta]) -> dict[str, Any]:
    loras = {path: _inner(delta) for path, delta in layers.items()}
    ranks = {path: lora.rank for path, lora in loras.items()}
    alphas = {path: _plain_number(lora.alpha) for path, lora in loras.items()}
    rank, alpha = _usual(ranks), _usual(alphas)
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _patterns(ranks | _image_ranks(ranks), rank),
        "alpha_pattern": _patterns(alphas, alpha),
        "target_modules": sorted(path.removeprefix(_DROPPED_LEVEL) for path in loras),
        "use_dora": any(isinstance(delta, DoRA) for delta in layers.values()),
        "lora_bias": any(lora.bias is not None for lora in loras.values()),
    }


def _image_ranks(ranks: Mapping[str, int]) -> dict[str, int]:
    """Return the ranks of projections that diffusers adds when it loads a Wan text-to-video file.

    An image-to-video model gets zeros for them, of the rank of ``to_k`` beside them, and PEFT must
    expect that rank. Where a model lacks them the words are without effect.
    """
    if any(path.endswith(_IMAGE_LEAVES) for path in ranks):
        return {}
    found = {path: _WAN_TEXT_KEY.fullmatch(path) for path in ranks}
    return {
        f"{match[1]}{leaf}": ranks[path]
        for path, match in found.items()
        if match
        for leaf in _IMAGE_LEAVES
    }


def _inner(delta: LayerDelta) -> LoRA:
    lora = delta.inner if isinstance(delta, DoRA) else delta
    if not isinstance(lora, LoRA):
        raise TypeError(f"refused before: {lora.kind}")
    return lora


def _usual(values: Mapping[str, float]) -> float:
    return Counter(values.values()).most_common(1)[0][0]


def _patterns(values: Mapping[str, float], usual: float) -> dict[str, float]:
    """Return the odd values by a regular expression that fits this one module.

    Without the caret PEFT would also take every longer path that ends in the same words.
    """
    odd = {path: value for path, value in values.items() if value != usual}
    return {_pattern(path): value for path, value in sorted(odd.items())}


def _pattern(path: str) -> str:
    if path.startswith(_DROPPED_LEVEL):
        return re.escape(path.removeprefix(_DROPPED_LEVEL))
    return f"^{re.escape(path)}"


def _plain_number(value: float) -> float:
    return int(value) if value == int(value) else value


HOLDS = frozenset({LoRA.kind, DoRA.kind, Replacement.kind})

FORMAT = Format(
    name="diffusers",
    naming="diffusers",
    title=_TITLE,
    spec="https://huggingface.co/docs/diffusers/main/en/api/loaders/lora",
    holds=HOLDS,
    matches=matcher("diffusers"),
    read=read,
    write=write,
    weights_file="pytorch_lora_weights.safetensors",
    losses=find_diffusers_losses,
)
