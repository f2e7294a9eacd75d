"""Stable Diffusion's U-Nets: LDM's numbered blocks and diffusers' nested ones, from the same shape.

The arithmetic follows from how both build the network: LDM appends every resnet, attention and
resampler to one list of input and one of output blocks, diffusers nests them by level.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from loratools.keymaps.architecture import Architecture, Component, Row
from loratools.keymaps.text_encoders import clip_g, clip_h, clip_l


@dataclass(frozen=True, slots=True)
class UNetShape:
    """What a U-Net's module names depend on, level by level from the finest.

    Attributes:
        channels: width of each level.
        depths: transformer blocks in each attention of a level; 0: no attention there.
        middle: the same for the middle block.
        context: width of the text the cross-attention reads.
        label: whether a vector embedding is added to the time's.
        resnets: resnets of a level on the way down; there is one more on the way up.
    """

    channels: tuple[int, ...]
    depths: tuple[int, ...]
    middle: int
    context: int
    label: bool = False
    resnets: int = 2

    @property
    def widening(self) -> tuple[int, ...]:
        """Levels that are wider than the one before."""
        pairs = zip(self.channels, self.channels[1:], strict=False)
        return tuple(level for level, (one, two) in enumerate(pairs, 1) if one != two)


def unet_rows(shape: UNetShape) -> tuple[Row, ...]:
    """Return a row for every module of the U-Net that has parameters."""
    return (*_root(shape), *_down(shape), *_middle(shape), *_up(shape))


def _root(shape: UNetShape) -> Iterator[Row]:
    for original, diffusers in _ROOT:
        yield Row(original, diffusers)
    for original, diffusers in _LABEL if shape.label else ():
        yield Row(original, diffusers)


def _down(shape: UNetShape) -> Iterator[Row]:
    block = 1
    for level, depth in enumerate(shape.depths):
        diffusers = f"down_blocks.{level}"
        for position in range(shape.resnets):
            places = (f"input_blocks.{block}.0", f"{diffusers}.resnets.{position}")
            yield from _resnet(*places, widens=position == 0 and level in shape.widening)
            places = (f"input_blocks.{block}.1", f"{diffusers}.attentions.{position}")
            yield from _attention(*places, depth, shape.channels[level], shape.context)
            block += 1
        if level < len(shape.depths) - 1:
            yield Row(f"input_blocks.{block}.0.op", f"{diffusers}.downsamplers.0.conv")
            block += 1


def _middle(shape: UNetShape) -> Iterator[Row]:
    yield from _resnet("middle_block.0", "mid_block.resnets.0", widens=False)
    places = ("middle_block.1", "mid_block.attentions.0")
    yield from _attention(*places, shape.middle, shape.channels[-1], shape.context)
    yield from _resnet("middle_block.2", "mid_block.resnets.1", widens=False)


def _up(shape: UNetShape) -> Iterator[Row]:
    block = 0
    last = len(shape.depths) - 1
    for level, depth in enumerate(reversed(shape.depths)):
        diffusers = f"up_blocks.{level}"
        channels = shape.channels[last - level]
        for position in range(shape.resnets + 1):
            places = (f"output_blocks.{block}.0", f"{diffusers}.resnets.{position}")
            yield from _resnet(*places, widens=True)
            places = (f"output_blocks.{block}.1", f"{diffusers}.attentions.{position}")
            yield from _attention(*places, depth, channels, shape.context)
            if position == shape.resnets and level < last:
                place = 2 if depth else 1
                upsampler = f"{diffusers}.upsamplers.0.conv"
                yield Row(f"output_blocks.{block}.{place}.conv", upsampler)
            block += 1


def _resnet(original: str, diffusers: str, *, widens: bool) -> Iterator[Row]:
    """Yield a resnet's modules; only one that changes the width has a convolution to skip by."""
    for theirs, ours in (*_RESNET, _SKIP) if widens else _RESNET:
        yield Row(f"{original}.{theirs}", f"{diffusers}.{ours}")


def _attention(
    original: str, diffusers: str, depth: int, channels: int, context: int
) -> Iterator[Row]:
    """Yield a spatial transformer's modules; both trees give them the same names."""
    if not depth:
        return
    for leaf in ("norm", "proj_in", "proj_out"):
        yield Row(f"{original}.{leaf}", f"{diffusers}.{leaf}")
    widths = {"": (), "channels": (channels,), "context": (context,), "mlp": (4 * channels,)}
    for block in range(depth):
        for leaf, width in _TRANSFORMER:
            name = f"transformer_blocks.{block}.{leaf}"
            yield Row(f"{original}.{name}", f"{diffusers}.{name}", inputs=widths[width])


def _unet(shape: UNetShape, flattened: str) -> Component:
    return Component(
        name="unet",
        original="diffusion_model",
        checkpoint=("model.diffusion_model.", "diffusion_model."),
        kohya=("lora_unet",),
        rows=unet_rows(shape),
        flattens="original" if flattened == "original" else "diffusers",
    )


_ROOT: tuple[tuple[str, str], ...] = (
    ("input_blocks.0.0", "conv_in"),
    ("time_embed.0", "time_embedding.linear_1"),
    ("time_embed.2", "time_embedding.linear_2"),
    ("out.0", "conv_norm_out"),
    ("out.2", "conv_out"),
)

_LABEL: tuple[tuple[str, str], ...] = (
    ("label_emb.0.0", "add_embedding.linear_1"),
    ("label_emb.0.2", "add_embedding.linear_2"),
)

_RESNET: tuple[tuple[str, str], ...] = (
    ("in_layers.0", "norm1"),
    ("in_layers.2", "conv1"),
    ("emb_layers.1", "time_emb_proj"),
    ("out_layers.0", "norm2"),
    ("out_layers.3", "conv2"),
)

_SKIP = ("skip_connection", "conv_shortcut")

_TRANSFORMER: tuple[tuple[str, str], ...] = (
    # leaf, what its inputs are
    ("norm1", ""),
    ("attn1.to_q", "channels"),
    ("attn1.to_k", "channels"),
    ("attn1.to_v", "channels"),
    ("attn1.to_out.0", "channels"),
    ("norm2", ""),
    ("attn2.to_q", "channels"),
    ("attn2.to_k", "context"),
    ("attn2.to_v", "context"),
    ("attn2.to_out.0", "channels"),
    ("norm3", ""),
    ("ff.net.0.proj", "channels"),
    ("ff.net.2", "mlp"),
)

_SD1 = UNetShape((320, 640, 1280, 1280), (1, 1, 1, 0), middle=1, context=768)
_SD2 = UNetShape((320, 640, 1280, 1280), (1, 1, 1, 0), middle=1, context=1024)
_SDXL = UNetShape((320, 640, 1280), (0, 2, 10), middle=10, context=2048, label=True)
_REFINER = UNetShape(
    (384, 768, 1536, 1536), (0, 4, 4, 0), middle=4, context=1280, label=True
)  # fmt: skip

_SIGNATURE = ("input_blocks.0.0", "middle_block.1.transformer_blocks.0.attn2.to_k", "out.2")

SD1 = Architecture(
    id="sd1",
    title="Stable Diffusion 1.x",
    components=(
        _unet(_SD1, "diffusers"),
        clip_l(kohya=("lora_te", "lora_te1"), checkpoint=("cond_stage_model.transformer.",)),
    ),
    signature=_SIGNATURE,
    modelspec="stable-diffusion-v1",
    base_versions=("sd_v1", "sd_v1_v", "sd_1.5"),
)

SD2 = Architecture(
    id="sd2",
    title="Stable Diffusion 2.x",
    components=(
        _unet(_SD2, "diffusers"),
        clip_h(kohya=("lora_te", "lora_te1"), checkpoint=("cond_stage_model.model.",)),
    ),
    signature=_SIGNATURE,
    modelspec="stable-diffusion-v2-512",
    base_versions=("sd_v2", "sd_v2_v", "sd_2.1"),
)

SDXL = Architecture(
    id="sdxl",
    title="Stable Diffusion XL",
    components=(
        _unet(_SDXL, "original"),
        clip_l(checkpoint=("conditioner.embedders.0.transformer.",)),
        clip_g(checkpoint=("conditioner.embedders.1.model.",)),
    ),
    signature=(*_SIGNATURE, "middle_block.1.transformer_blocks.9.attn2.to_k", "label_emb.0.0"),
    modelspec="stable-diffusion-xl-v1-base",
    base_versions=("sdxl_base_v1-0", "sdxl_1.0"),
)

REFINER = Architecture(
    id="sdxl-refiner",
    title="Stable Diffusion XL refiner",
    components=(
        _unet(_REFINER, "original"),
        clip_g(checkpoint=("conditioner.embedders.0.model.",)),
    ),
    signature=(*_SIGNATURE, "label_emb.0.0"),
    modelspec="stable-diffusion-xl-v1-refiner",
    base_versions=("sdxl_refiner_v1-0",),
)
