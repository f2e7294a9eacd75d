"""What an adapter was trained against, by its own record: the base's name leads to its config."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

from loratools.adapter import Adapter
from loratools.adapter_io import open_adapter
from loratools.basemodel import open_base
from loratools.basetensors import float_word, quantisation_words
from loratools.errors import HubError, InputError, MissingFileError, UnsupportedError
from loratools.hub.fetching import fetch_files
from loratools.hub.listing import list_files
from loratools.hub.references import SCHEME, Reference, is_reference, repository_of
from loratools.planning.merge_plan import PathLike
from loratools.planning.pack_targets import PACKED_TARGETS, Target
from loratools.planning.trained_schemes import Scheme, measured, read_scheme
from loratools.tensorfiles.file_names import ADAPTER_CONFIG
from loratools.tensorfiles.inputs import read_json_object

_CONFIG = "config.json"
# Where older tools wrote what transformers keeps in the config.
_OWN_CONFIGS: Mapping[str, str] = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_REPOSITORY = re.compile(r"(https?://(www\.)?huggingface\.co/)?(?P<id>[\w.-]+(/[\w.-]+)?)/?")
_SNAPSHOT = re.compile(r"[/\\]snapshots[/\\](\w+)")
_UNSLOTH = re.compile(r"-bnb-4bit$", re.IGNORECASE)
_BY_HAND = "choose by hand: `loratools quantize --to nf4`, then `dequantize`"


@dataclass(frozen=True, slots=True)
class Trained:
    """What an adapter was trained against.

    Attributes:
        adapter: its path, as errors call it.
        base: the base's name, as the adapter records it.
        origin: a sentence for the report: where the choice came from.
        scheme: in which the base is quantised.
        dtype: safetensors' word of the float type that was quantised, where it is known.
        layers: the adapter whose layers alone are quantised, or None for all that the scheme takes.
    """

    adapter: str
    base: str
    origin: str
    scheme: Scheme
    dtype: str | None = None
    layers: Adapter | None = None


def find_trained(path: PathLike) -> Trained:
    """Return what the adapter at ``path`` was trained against.

    Of a base on the Hub only the config is fetched.

    Raises:
        InputError: the adapter records no base, or one that is not quantised.
        MissingFileError: it records a folder that is not here.
        HubError: the Hub does not give the base's config.
        UnsupportedError: LoftQ in a way that cannot be repeated.
    """
    _, adapter = open_adapter(path, activated=True)
    fields = _fields(adapter)
    name, where = _recorded_name(adapter, fields, path)
    if fields.get("init_lora_weights") == "loftq":
        return _loftq(adapter, fields, path, name)
    revision = fields.get("revision") or None
    config, found = _config_of(name, revision, path)
    words = _words(config, found)
    if not words:
        raise _not_quantised(path, name)
    scheme = read_scheme(words)
    if found.is_local:
        scheme = _measured(scheme, found.folder)
    at = f" at {revision}" if revision else ""
    origin = f"{path} was trained against {name}{at} ({where}): {scheme.title}"
    return Trained(str(path), name, origin, scheme, float_word(config))


# ── the adapter's record ──


def _fields(adapter: Adapter) -> Mapping[str, Any]:
    fields = json.loads(adapter.metadata.get(ADAPTER_CONFIG, "{}"))
    return fields if isinstance(fields, dict) else {}


_MLX_WORD = "model"
_WORDS = ("base_model_name_or_path", "ss_base_model", "base_model")


def _recorded_name(adapter: Adapter, fields: Mapping[str, Any], path: PathLike) -> tuple[str, str]:
    """Return the base's name and which word of the adapter says it."""
    for word in (_WORDS[0], _MLX_WORD):
        if fields.get(word):
            return str(fields[word]), f"{ADAPTER_CONFIG}: {word}"
    urls = sorted(word for word in adapter.metadata if word.endswith("base_model.0.repo_url"))
    for word in (*urls, *_WORDS):
        # Image trainers write file names there.
        if "/" in (adapter.metadata.get(word) or ""):
            return adapter.metadata[word], word
    raise InputError(
        f"{path}: does not record which base it was trained on, so --for-adapter has nothing to "
        "go by",
        hint=f"set {_WORDS[0]} in its {ADAPTER_CONFIG}; or {_BY_HAND}",
    )


def _loftq(adapter: Adapter, fields: Mapping[str, Any], path: PathLike, name: str) -> Trained:
    """Return LoftQ's base: each layer's weight by itself, coded and decoded, if in one step."""
    words = fields.get("loftq_config") or {}
    bits, steps = words.get("loftq_bits", 4), words.get("loftq_iter", 1)
    kind = {4: "nf4", 8: "int8"}.get(bits)
    if kind is None or steps != 1:
        raise UnsupportedError(
            f"{path}: trained with LoftQ of {bits} bits in {steps} steps, whose base depends on "
            "the factors before training",
            hint="only one step (loftq_iter 1) of 4 or 8 bits can be repeated; use the base that "
            "the training script saved",
        )
    scheme = replace(read_scheme(_target_words(kind)), title=f"LoftQ of {bits} bits ({kind})")
    origin = (
        f"{path} was trained by LoftQ ({ADAPTER_CONFIG}: loftq_config) on {name}: its own layers "
        f"alone in {kind}"
    )
    return Trained(str(path), name, origin, scheme, None, adapter)


def _target_words(kind: str) -> Mapping[str, Any]:
    target: Target = PACKED_TARGETS[kind]
    words: Mapping[str, Any] = target.config([], "float32")["quantization_config"]
    # What is left is for whoever packs to say.
    return {**words, "llm_int8_skip_modules": None}


def _not_quantised(path: PathLike, name: str) -> InputError:
    return InputError(
        f"{path}: was trained on {name}, which is not quantised, so there is nothing to choose",
        hint="use that base as it is. If it was loaded with load_in_4bit, the adapter does not "
        "record that: `loratools quantize --to nf4` (or nf4-double) as the training script says, "
        "then `loratools dequantize`",
    )


# ── the base's config ──


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a base's config was found."""

    folder: Path
    is_local: bool
    names: tuple[str, ...]


def _config_of(name: str, revision: str | None, path: PathLike) -> tuple[Mapping[str, Any], _Place]:
    folder = Path(name.removeprefix(SCHEME)).expanduser()
    if not is_reference(name) and folder.is_dir():
        return _local(folder, path)
    reference = _reference(name, revision)
    if reference is None:
        raise MissingFileError(
            f"{path}: was trained on {name}, and there is no such folder here",
            hint=f"set {_WORDS[0]} in its {ADAPTER_CONFIG} to where the base is, on the Hub or "
            f"here; or {_BY_HAND}",
        )
    try:
        return _remote(reference)
    except HubError as error:
        raise HubError(f"{path}: its base: {error.message}", _with_guess(error, name)) from error


def _local(folder: Path, path: PathLike) -> tuple[Mapping[str, Any], _Place]:
    if not (folder / _CONFIG).is_file():
        raise MissingFileError(
            f"{path}: was trained on {folder}, which has no {_CONFIG}",
            hint=f"put the base's {_CONFIG} there; or {_BY_HAND}",
        )
    names = tuple(sorted(child.name for child in folder.iterdir()))
    return read_json_object(folder / _CONFIG), _Place(folder, True, names)


def _reference(name: str, revision: str | None) -> Reference | None:
    """Return the repository that a name means, or None for a path."""
    cached = repository_of(name)
    commit = _SNAPSHOT.search(name)
    if cached and commit:
        revision = commit[1]
    match = _REPOSITORY.fullmatch(cached or name.removeprefix(SCHEME))
    if match is None or PureWindowsPath(name).drive or match["id"].startswith("."):
        return None
    return Reference(f"{SCHEME}{match['id']}", match["id"], revision)


def _remote(reference: Reference) -> tuple[Mapping[str, Any], _Place]:
    listing = list_files(reference)
    if _CONFIG not in listing.files:
        raise HubError(f"{reference.text}: has no {_CONFIG}", hint=_BY_HAND)
    root = fetch_files(listing, (_CONFIG,))
    return read_json_object(root / _CONFIG), _Place(root, False, tuple(listing.files))


def _with_guess(error: HubError, name: str) -> str | None:
    if not _UNSLOTH.search(name):
        return error.hint
    guess = "by its name it is bitsandbytes 4-bit: `loratools quantize --to nf4-double`"
    return f"{error.hint}; {guess}" if error.hint else guess


def _words(config: Mapping[str, Any], place: _Place) -> Mapping[str, Any]:
    found = quantisation_words(config)
    if found:
        return found
    kinds = [method for name, method in _OWN_CONFIGS.items() if name in place.names]
    return {"quant_method": kinds[0]} if kinds else {}


def _measured(scheme: Scheme, folder: Path) -> Scheme:
    try:
        return measured(scheme, open_base(folder))
    except MissingFileError:
        # The config alone is here, which says all the rest.
        return scheme
