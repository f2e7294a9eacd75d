"""ComfyUI: dotted original module names (``diffusion_model.…``) in one safetensors file.

Written by ai-toolkit, diffusion-pipe, musubi-tuner (``--target other``), ComfyUI's own nodes and
the makers of Wan, LTX and Krea models. Source: ComfyUI ``comfy/lora.py``, ``comfy/weight_adapter``.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas import IA3, DoRA, FullDelta, LayerDelta, SparseResidual, SumDelta
from loratools.errors import UnsupportedError
from loratools.formats.alphas import read_scalar
from loratools.formats.detection import CONTROL_MARKER, matcher
from loratools.formats.format import Bundle, Format
from loratools.formats.kohya_metadata import carried_words
from loratools.formats.module_reading import read_modules
from loratools.formats.module_writing import (
    KINDS,
    find_losses,
    refuse_losses,
    replacement_loss,
    write_extras,
    write_module,
)
from loratools.formats.parameters import KOHYA_NAMES, PEFT_NAMES, split_dotted

_TITLE = "ComfyUI (original names; ai-toolkit, diffusion-pipe)"
_NAMES = {**KOHYA_NAMES, "down": PEFT_NAMES["down"], "up": PEFT_NAMES["up"]}


def read(bundle: Bundle) -> Adapter:
    """Read a file of dotted original names.

    Raises:
        MalformedAdapterError: unknown keys, or tensors that do not belong together; all are named.
        UnsupportedError: T-LoRA, ranks chosen when prompting, Stability's Control-LoRAs.
    """
    if CONTROL_MARKER in bundle.tensors:
        raise UnsupportedError(
            f"{bundle.source}: a Control-LoRA makes a ControlNet of the base; it is no change of "
            "its weights",
            hint="load it with ComfyUI's or diffusers' ControlNet loader",
        )
    return read_modules(bundle, split_dotted).adapter("original", bundle)


def find_comfyui_losses(adapter: Adapter) -> Mapping[str, str]:
    """Return what the format cannot hold: module path or extra → reason."""
    losses = find_losses(adapter, "original", HOLDS, replacement_loss)
    for path, delta in adapter.layers.items():
        if path not in losses and _changes_weight_twice(delta):
            losses[path] = "ComfyUI applies only the last of several changes of one weight"
    return losses


def write(adapter: Adapter) -> Bundle:
    """Write an adapter in original names; raises UnsupportedError naming all it cannot hold."""
    refuse_losses(find_comfyui_losses(adapter), _TITLE)
    tensors: dict[str, Tensor] = {}
    for path, delta in adapter.layers.items():
        tensors |= _module(path, delta)
    tensors |= {name: tensor.contiguous() for name, tensor in write_extras(adapter.extras)}
    return Bundle(tensors, {"format": "pt", **carried_words(adapter.metadata)})


def _module(path: str, delta: LayerDelta) -> dict[str, Tensor]:
    """Return one module's tensors; alpha only where it is not the rank, as ai-toolkit does.

    ComfyUI looks for lora_mid beside lora_down alone, and diffusers refuses an alpha beside
    lora_A in some models.
    """
    found = write_module(path, delta, _NAMES)
    if f"{path}.lora_mid.weight" in found:
        return write_module(path, delta, KOHYA_NAMES)
    down, alpha = found.get(f"{path}.lora_A.weight"), found.get(f"{path}.alpha")
    if down is not None and alpha is not None and read_scalar(alpha) == down.shape[0]:
        del found[f"{path}.alpha"]
    return found


def _changes_weight_twice(delta: LayerDelta) -> bool:
    if isinstance(delta, DoRA):
        return _changes_weight_twice(delta.inner)
    if not isinstance(delta, SumDelta):
        return False
    biases = [p for p in delta.parts if isinstance(p, FullDelta) and p.weight is None]
    return len(delta.parts) - len(biases) > 1


HOLDS = KINDS - {IA3.kind, SparseResidual.kind}

FORMAT = Format(
    name="comfyui",
    naming="comfyui",
    title=_TITLE,
    spec="https://github.com/Comfy-Org/ComfyUI/blob/master/comfy/lora.py",
    holds=HOLDS,
    matches=matcher("comfyui"),
    read=read,
    write=write,
    losses=find_comfyui_losses,
)
