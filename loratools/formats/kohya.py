"""kohya: flattened module names (``lora_unet_down_blocks_0_…``) in one safetensors file.

Written by sd-scripts, musubi-tuner, LyCORIS and OneTrainer; every loader of images knows it.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from loratools.adapter import Adapter, Extra
from loratools.formats.detection import FLATTENED, matcher
from loratools.formats.format import Bundle, Format
from loratools.formats.kohya_metadata import carried_words, training_words
from loratools.formats.module_reading import read_modules
from loratools.formats.module_writing import (
    KINDS,
    find_losses,
    refuse_losses,
    replacement_loss,
    write_extras,
    write_module,
)
from loratools.formats.parameters import KOHYA_NAMES, is_carried, split_flattened

_TITLE = "kohya (sd-scripts, LyCORIS, OneTrainer, musubi-tuner)"
_VIDEOX = "lora_unet__"


def read(bundle: Bundle) -> Adapter:
    """Read a file of flattened names.

    Raises:
        MalformedAdapterError: unknown keys, or tensors that do not belong together; all are named.
        UnsupportedError: T-LoRA and ranks chosen when prompting.
    """
    repaired: set[str] = set()

    def split(key: str) -> tuple[str, str] | None:
        found = split_flattened(key)
        if found is None or not FLATTENED.match(key):
            return None
        module = _mended(found[0])
        if module != found[0]:
            repaired.add(found[0])
        return module, found[1]

    # Folders of such files hold many; an adapter_config.json among them is not theirs.
    parsed = read_modules(bundle, split, ignore_config=True)
    if repaired:
        parsed.notes.append(
            f"{len(repaired)} module names with a stray underscore, such as {min(repaired)}: read "
            "without it"
        )
    return parsed.adapter("kohya", bundle)


def _mended(module: str) -> str:
    if module.startswith(_VIDEOX):
        module = "lora_unet_" + module.removeprefix(_VIDEOX)
    return module.removesuffix("_")


def find_kohya_losses(adapter: Adapter) -> Mapping[str, str]:
    """Return what the format cannot hold: module path or extra → reason."""
    return find_losses(adapter, "kohya", KINDS, _extra_loss)


def _extra_loss(name: str, extra: Extra) -> str:
    module, _, leaf = name.partition(".")
    if is_carried(name) or (module and leaf in ("weight", "reshape_weight")):
        return replacement_loss(name, extra)
    return "a flattened name stands for a module's weight, not for this tensor"


def write(adapter: Adapter) -> Bundle:
    """Write an adapter in kohya's naming; raises UnsupportedError naming all it cannot hold."""
    refuse_losses(find_kohya_losses(adapter), _TITLE)
    tensors: dict[str, Tensor] = {}
    for path, delta in adapter.layers.items():
        tensors |= write_module(path, delta, KOHYA_NAMES)
    tensors |= {name: tensor.contiguous() for name, tensor in write_extras(adapter.extras)}
    return Bundle(tensors, {**carried_words(adapter.metadata), **training_words(adapter)})


FORMAT = Format(
    name="kohya",
    naming="kohya",
    title=_TITLE,
    spec="https://github.com/kohya-ss/sd-scripts/blob/main/networks/lora.py",
    holds=KINDS,
    matches=matcher("kohya"),
    read=read,
    write=write,
    losses=find_kohya_losses,
)
