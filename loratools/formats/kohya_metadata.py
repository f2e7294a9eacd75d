"""The words of kohya-style metadata: training notes, modelspec, and hashes of the written bytes.

Sources: sd-scripts ``library/train_util.py`` (``ss_*``, ``sshs_*``) and
``library/sai_model_spec.py``; https://github.com/Stability-AI/ModelSpec.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator, Mapping
from itertools import chain

import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas import LoRA
from loratools.formats.alphas import drop_alpha_words
from loratools.tensorfiles.dtypes import DTYPES, dtype_word
from loratools.tensorfiles.header import encode_header

MODEL_HASH = "sshs_model_hash"
LEGACY_HASH = "sshs_legacy_hash"
SPEC_HASH = "modelspec.hash_sha256"
COMMENT = "ss_training_comment"

_SPEC_VERSION = "1.0.1"
# What the first web UI read to recognise a checkpoint: 64 KiB from the first mebibyte on.
_LEGACY_START = 0x100000
_LEGACY_SIZE = 0x10000
_RANK = {word: rank for rank, word in enumerate(DTYPES)}

_NETWORKS: Mapping[str, str] = {
    "flux1": "networks.lora_flux",
    "chroma": "networks.lora_flux",
    "sd3": "networks.lora_sd3",
    "lumina2": "networks.lora_lumina",
    "anima": "networks.lora_anima",
    "hunyuan-image-2.1": "networks.lora_hunyuan_image",
}
_IMPLEMENTATIONS: tuple[tuple[str, str], ...] = (
    ("flux", "https://github.com/black-forest-labs/flux"),
    ("chroma", "https://huggingface.co/lodestones/Chroma"),
    ("stable-diffusion-xl", "https://github.com/Stability-AI/generative-models"),
    ("lumina", "https://github.com/Alpha-VLLM/Lumina-Image-2.0"),
)
"""Value of ``modelspec.implementation`` by how the architecture's word begins; else diffusers."""

_RESOLUTIONS: Mapping[str, str] = {
    "stable-diffusion-v1": "512x512",
    "stable-diffusion-v2-512": "512x512",
    "stable-diffusion-v2-768-v": "768x768",
}


def carried_words(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata without what a rewritten file makes untrue: alphas and hashes."""
    stale = {MODEL_HASH, LEGACY_HASH, SPEC_HASH}
    return {key: word for key, word in drop_alpha_words(metadata).items() if key not in stale}


def with_hashes(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the metadata with every hash that its kind of file has, true for ``tensors``.

    Files with training words (``ss_*``) get sd-scripts' two hashes, files with a modelspec get its
    own; other files get none, and no stale one survives.
    """
    words = {k: v for k, v in metadata.items() if k not in (MODEL_HASH, LEGACY_HASH, SPEC_HASH)}
    trained = any(key.startswith("ss_") for key in words)
    specified = "modelspec.sai_model_spec" in words
    if not (trained or specified):
        return words
    digest = model_hash(tensors)
    if trained:
        words |= {MODEL_HASH: digest, LEGACY_HASH: legacy_hash(tensors, words)}
    if specified:
        words[SPEC_HASH] = f"0x{digest}"
    return words


def model_hash(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the tensor data as a safetensors file holds it, in hex."""
    digest = hashlib.sha256()
    for name in _file_order(tensors):
        digest.update(_bytes(tensors[name]))
    return digest.hexdigest()


def legacy_hash(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return eight hex digits: SHA-256 of 64 KiB of the file that has only ``ss_*`` metadata."""
    words = {key: word for key, word in metadata.items() if key.startswith("ss_")}
    order = _file_order(tensors)
    entries = [(name, dtype_word(tensors[name].dtype), tensors[name].shape) for name in order]
    header = encode_header(entries, words)
    digest = hashlib.sha256()
    for piece in _window(header, tensors, order):
        digest.update(piece)
    return digest.hexdigest()[:8]


def _window(header: bytes, tensors: Mapping[str, Tensor], order: list[str]) -> Iterator[memoryview]:
    """Yield the pieces of header and data that lie in the legacy window."""
    position = 0
    pieces = (_bytes(tensors[name]) for name in order)
    for piece in chain([memoryview(header)], pieces):
        start = max(_LEGACY_START - position, 0)
        stop = _LEGACY_START + _LEGACY_SIZE - position
        if stop <= 0:
            return
        if start < len(piece):
            yield piece[start:stop]
        position += len(piece)


def _file_order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names in the order of their data in a safetensors file: wide dtypes first."""
    return sorted(tensors, key=lambda name: (-_RANK[dtype_word(tensors[name].dtype)], name))


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().flatten()
    raw: memoryview = flat.view(torch.uint8).numpy().data
    return raw


def training_words(adapter: Adapter) -> dict[str, str]:
    """Return the words that sd-scripts writes even without metadata, true for this adapter.

    What the adapter's own metadata already says is kept, unless no module has such a rank.
    """
    said = adapter.metadata
    loras = [delta for delta in adapter.layers.values() if isinstance(delta, LoRA)]
    plain = len(loras) == len(adapter.layers)
    network = _NETWORKS.get(adapter.arch or "", "networks.lora") if plain else "lycoris.kohya"
    ranks = {delta.rank for delta in loras}
    alphas = {delta.alpha for delta in loras}
    return {
        "ss_network_module": said.get("ss_network_module", network),
        "ss_network_dim": _settled(said.get("ss_network_dim"), {float(rank) for rank in ranks}),
        "ss_network_alpha": _settled(said.get("ss_network_alpha"), alphas),
    }


def _settled(word: str | None, values: set[float]) -> str:
    if word is not None and (not values or _as_number(word) in values):
        return word
    return f"{values.pop():g}" if len(values) == 1 else "Dynamic"


def _as_number(word: str) -> float | None:
    try:
        return float(word)
    except ValueError:
        return None


def with_comment(metadata: Mapping[str, str], text: str) -> dict[str, str]:
    """Return the metadata with ``text`` put before the training comment, as resize tools do."""
    before = metadata.get(COMMENT, "")
    known = before and before != "None"
    return {**metadata, COMMENT: f"{text}; {before}" if known else text}


def model_words(
    architecture: str, base_version: str, title: str, date: datetime.datetime | None = None
) -> dict[str, str]:
    """Return the modelspec and ``ss_base_model_version`` by which web UIs recognise a LoRA.

    Args:
        architecture: modelspec's word without ``/lora`` (``stable-diffusion-xl-v1-base``).
        base_version: kohya's word (``sdxl_base_v1-0``), or the empty text.
        title: the adapter's name.
        date: of creation; now if not given.
    """
    moment = date or datetime.datetime.now(datetime.timezone.utc)
    words = {
        "modelspec.sai_model_spec": _SPEC_VERSION,
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": next(
            (url for start, url in _IMPLEMENTATIONS if architecture.startswith(start)), "diffusers"
        ),
        "modelspec.title": title,
        "modelspec.date": moment.replace(microsecond=0, tzinfo=None).isoformat(),
        "modelspec.resolution": _RESOLUTIONS.get(architecture, "1024x1024"),
    }
    if base_version:
        words["ss_base_model_version"] = base_version
        words["ss_v2"] = str(base_version.startswith("sd_v2"))
    return words


def network_arguments(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return ``ss_network_args`` as text by name; empty if absent or broken."""
    try:
        parsed = json.loads(metadata.get("ss_network_args", "{}"))
    except json.JSONDecodeError:
        return {}
    return {k: str(v) for k, v in parsed.items()} if isinstance(parsed, dict) else {}
