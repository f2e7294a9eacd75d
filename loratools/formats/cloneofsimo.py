"""cloneofsimo's safetensors: layers of Stable Diffusion 1 and 2 by number (``unet:0:down``).

The numbers count the adapted layers in the order in which PyTorch walks through the model, so names
come from that order alone; shapes confirm it. Source: https://github.com/cloneofsimo/lora
``lora_diffusion/lora.py``. There is no alpha: the scale is 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from loratools.adapter import Adapter, Extra, in_natural_order
from loratools.deltas import LayerDelta, LoRA, Replacement
from loratools.errors import MalformedAdapterError, UnsupportedError
from loratools.formats.detection import matcher
from loratools.formats.format import Bundle, Format
from loratools.formats.module_reading import Parsed, read_modules
from loratools.formats.read_only import refuse_writing

_KEY = re.compile(r"^(?P<module>(?:unet|text_encoder):\d+):(?P<side>up|down)$")
_EMBEDDING = "<embed>"
_ATTENTIONS = ("to_q", "to_k", "to_v", "to_out.0")
_GATE = "ff.net.0.proj"
# diffusers moved the feed-forward layer behind the second attention in 2023.
_BLOCK_ORDERS = (
    (*(f"attn1.{leaf}" for leaf in _ATTENTIONS), _GATE, *(f"attn2.{x}" for x in _ATTENTIONS)),
    (*(f"attn1.{leaf}" for leaf in _ATTENTIONS), *(f"attn2.{x}" for x in _ATTENTIONS), _GATE),
)
# Up blocks are registered before the middle one.
_STAGES = (
    *((f"down_blocks.{i}", 2, width) for i, width in enumerate((320, 640, 1280))),
    *((f"up_blocks.{i}", 3, width) for i, width in ((1, 1280), (2, 640), (3, 320))),
    ("mid_block", 1, 1280),
)
_TEXT_ORDER = ("k_proj", "v_proj", "q_proj", "out_proj")


def read(bundle: Bundle) -> Adapter:
    """Read a file of numbered layers into diffusers' names.

    Raises:
        MalformedAdapterError: unknown keys, pairs that do not belong together.
        UnsupportedError: layers that are not the attentions of Stable Diffusion 1 or 2.
    """
    tokens = [name for name, word in bundle.metadata.items() if word == _EMBEDDING]
    kept = {name: tensor for name, tensor in bundle.tensors.items() if name not in tokens}
    parsed = read_modules(Bundle(kept, bundle.metadata, {}, bundle.source), _split)
    numbered = in_natural_order(parsed.layers)
    unet = [delta for path, delta in numbered.items() if path.startswith("unet:")]
    text = [delta for path, delta in numbered.items() if path.startswith("text_encoder:")]
    _check_numbers(numbered, len(unet), len(text), bundle.source)
    layers = {**_named_unet(unet, bundle.source), **_named_text(text, bundle.source)}
    extras: dict[str, Extra] = {
        f"bundle_emb.{name}.string_to_param.*": Replacement(bundle.tensors[name].reshape(1, -1))
        for name in tokens
        if name in bundle.tensors
    }
    return Parsed(layers, extras, parsed.notes).adapter("diffusers", bundle)


def _split(key: str) -> tuple[str, str] | None:
    match = _KEY.match(key)
    return (match["module"], match["side"]) if match else None


def _check_numbers(layers: Mapping[str, LayerDelta], unet: int, text: int, source: str) -> None:
    wanted = [f"unet:{i}" for i in range(unet)] + [f"text_encoder:{i}" for i in range(text)]
    missing = sorted(set(wanted) - layers.keys())
    if missing:
        raise MalformedAdapterError(f"{source}: numbers are missing: {', '.join(missing)}")


def _unet_names(order: tuple[str, ...]) -> Iterator[tuple[str, int, int]]:
    """Yield each adapted layer's name, outputs and inputs; 0 inputs for the text's width."""
    for stage, count, width in _STAGES:
        for index in range(count):
            block = f"unet.{stage}.attentions.{index}.transformer_blocks.0"
            for leaf in order:
                out = 8 * width if leaf == _GATE else width
                crosses = leaf in ("attn2.to_k", "attn2.to_v")
                yield f"{block}.{leaf}", out, 0 if crosses else width


def _named_unet(deltas: list[LayerDelta], source: str) -> dict[str, LayerDelta]:
    if not deltas:
        return {}
    for order in _BLOCK_ORDERS:
        rows = list(_unet_names(order))
        shapes = [delta.weight_shape for delta in deltas]
        fits = len(rows) == len(shapes) and all(
            shape[0] == out and shape[1] == (inner or shape[1])
            for shape, (_, out, inner) in zip(shapes, rows, strict=True)
        )
        if fits:
            return {name: delta for (name, _, _), delta in zip(rows, deltas, strict=True)}
    raise UnsupportedError(
        f"{source}: its {len(deltas)} numbered UNet layers are not the attention and gate layers "
        "of Stable Diffusion 1 or 2, so their names are unknown",
        hint="load it in cloneofsimo's tool and save it by name",
    )


def _named_text(deltas: list[LayerDelta], source: str) -> dict[str, LayerDelta]:
    square = all(delta.weight_shape[0] == delta.weight_shape[1] for delta in deltas)
    if len(deltas) % len(_TEXT_ORDER) or not square:
        raise UnsupportedError(
            f"{source}: its {len(deltas)} numbered text-encoder layers are not CLIP's attentions",
            hint="load it in cloneofsimo's tool and save it by name",
        )
    names = (
        f"text_encoder.text_model.encoder.layers.{number // 4}.self_attn.{_TEXT_ORDER[number % 4]}"
        for number in range(len(deltas))
    )
    return dict(zip(names, deltas, strict=True))


FORMAT = Format(
    name="cloneofsimo",
    title="cloneofsimo's numbered layers (Stable Diffusion 1 and 2)",
    spec="https://github.com/cloneofsimo/lora/blob/master/lora_diffusion/lora.py",
    holds=frozenset({LoRA.kind}),
    matches=matcher("cloneofsimo"),
    read=read,
    write=refuse_writing("cloneofsimo", "diffusers or kohya"),
    read_only=True,
)
