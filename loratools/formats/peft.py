"""PEFT: ``adapter_config.json`` beside ``adapter_model.safetensors`` or ``.bin``.

Specification: https://huggingface.co/docs/peft/developer_guides/checkpoint and peft 0.21
``utils/save_and_load.py``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from torch import Tensor

from loratools.adapter import Adapter, Extra, in_natural_order
from loratools.deltas import (
    DoRA,
    ExpertLoRA,
    LayerDelta,
    LoRA,
    MovedBase,
    Replacement,
    RowReplacement,
)
from loratools.deltas.lora import Role
from loratools.errors import MalformedAdapterError
from loratools.formats.detection import matcher
from loratools.formats.format import Bundle, Format
from loratools.formats.peft_config import CONFIG_NAME, PeftConfig, parse_config
from loratools.formats.peft_keys import Key, classify_keys, looks_like_tuner
from loratools.formats.peft_layers import ModuleTensors, Reading, build_layer, build_parameter
from loratools.formats.peft_write import write

_ATTENTION_OUT = ".base_layer.out_proj"


def read(bundle: Bundle) -> Adapter:
    """Read a PEFT bundle.

    Args:
        bundle: the weights, with ``adapter_config.json`` among the sidecars.

    Raises:
        MalformedAdapterError: tensors and config that contradict each other.
        UnsupportedError: methods that no fixed weight equals.
    """
    config = _config(bundle)
    notes: list[str] = []
    keys = classify_keys(bundle.tensors, bundle.source)
    modules = _group_factors(keys, bundle.tensors, bundle.source)
    reading = Reading(config, notes)
    layers = _build_layers(modules, reading)
    extras = _build_extras(keys, bundle, config)
    notes += _left_out(keys)
    notes += _untargeted(layers, config)
    notes += [f"{word} is not in the config: PEFT's default is taken" for word in _unsaid(config)]
    if not layers and not extras:
        raise MalformedAdapterError(f"{bundle.source}: holds no adapter tensors")
    metadata = {**bundle.metadata, CONFIG_NAME: bundle.sidecars[CONFIG_NAME]}
    return Adapter(
        layers=in_natural_order(layers), extras=extras, metadata=metadata, notes=tuple(notes)
    )


def _config(bundle: Bundle) -> PeftConfig:
    text = bundle.sidecars.get(CONFIG_NAME)
    if text is None:
        raise MalformedAdapterError(
            f"{bundle.source}: {CONFIG_NAME} is missing, so rank scaling (alpha) is unknown",
            hint=f"put the {CONFIG_NAME} of the training run beside the weights",
        )
    return parse_config(text, bundle.source)


def _group_factors(
    keys: list[Key], tensors: Mapping[str, Tensor], source: str
) -> dict[str, ModuleTensors]:
    modules: dict[str, ModuleTensors] = {}
    for key in keys:
        if key.kind != "factor":
            continue
        module = modules.setdefault(key.target, ModuleTensors(key.target))
        if key.field in module.tensors:
            raise MalformedAdapterError(
                f"{source}: {key.raw} and {module.raw[key.field]} are the same tensor twice"
            )
        module.tensors[key.field] = tensors[key.raw]
        module.raw[key.field] = key.raw
        module.embedding |= key.marker.startswith("lora_embedding")
    return modules


def _build_layers(modules: Mapping[str, ModuleTensors], reading: Reading) -> dict[str, LayerDelta]:
    attention = {
        path.removesuffix(_ATTENTION_OUT) for path in modules if path.endswith(_ATTENTION_OUT)
    }
    layers: dict[str, LayerDelta] = {}
    for path, module in modules.items():
        parameter = _parameter_path(module, reading.config)
        if parameter:
            module.path = parameter
            layers[parameter.removesuffix(".weight")] = build_parameter(module, reading)
        elif path.endswith(_ATTENTION_OUT):
            layers[path.replace(".base_layer.", ".")] = build_layer(
                module, "attention_out", reading
            )
        else:
            layers[path] = build_layer(module, _role(module, attention), reading)
    return layers


def _role(module: ModuleTensors, attention: set[str]) -> Role:
    if module.path in attention:
        return "attention_in"
    return "embedding" if module.embedding else "linear"


def _parameter_path(module: ModuleTensors, config: PeftConfig) -> str | None:
    """Return the parameter that a wrapper's tensors adapt, or None for an ordinary layer.

    The outermost wrapper has the module's own path; each one inside adds ``.base_layer``.
    """
    owner, depth = module.path, 0
    while owner.endswith(".base_layer"):
        owner, depth = owner.removesuffix(".base_layer"), depth + 1
    names = config.parameters(owner)
    if depth < len(names):
        return f"{owner}.{names[-1 - depth]}"
    if depth == 0:
        return None
    raise MalformedAdapterError(
        f"{config.source}: {next(iter(module.raw.values()))} is nested {depth} deep, but "
        f"target_parameters names {len(names)} parameters of {owner}"
    )


def _build_extras(keys: list[Key], bundle: Bundle, config: PeftConfig) -> dict[str, Extra]:
    extras: dict[str, Extra] = {}
    tokens: list[Key] = []
    for key in keys:
        if key.kind == "tokens":
            tokens.append(key)
        elif key.kind in ("token_base", "base_copy", "bias_copy", "module"):
            if key.target in extras:
                raise MalformedAdapterError(
                    f"{bundle.source}: {key.raw} is a second tensor for {key.target}",
                    hint="the file mixes several spellings of one tensor; save the adapter again",
                )
            extras[key.target] = _replacement(key, bundle, config)
    for key in tokens:
        name = f"{key.target}.weight"
        rows = RowReplacement(bundle.tensors[key.raw], _indices(key, bundle, config))
        # A replaced table with replaced rows on top is one replacement.
        extras[name] = _on_top(extras[name], rows) if name in extras else rows
    return extras


def _replacement(key: Key, bundle: Bundle, config: PeftConfig) -> Replacement:
    tensor = bundle.tensors[key.raw]
    if looks_like_tuner(key.target):
        raise MalformedAdapterError(
            f"{bundle.source}: unexpected key {key.raw}",
            hint="it is no tensor that a LORA adapter has; was a key renamed?",
        )
    if tensor.numel() == 0:
        raise MalformedAdapterError(
            f"{bundle.source}: {key.raw} is empty",
            hint="saved from sharded training without gathering; save it again",
        )
    if key.kind == "base_copy":
        return Replacement(tensor, "base_copy")
    trains_bias = str(config.fields.get("bias", "none")) != "none"
    is_bias = key.kind == "bias_copy" or (trains_bias and key.target.endswith(".bias"))
    if is_bias:
        return Replacement(tensor, "bias")
    return Replacement(tensor, "module", expected=config.saves_module(key.target))


def _on_top(table: Extra, rows: RowReplacement) -> Replacement:
    if not isinstance(table, Replacement):
        raise MalformedAdapterError("two sets of trainable tokens for one embedding")
    value = table.value.clone()
    value[list(rows.indices)] = rows.rows.to(value.dtype)
    return Replacement(value, "module", expected=True)


def _indices(key: Key, bundle: Bundle, config: PeftConfig) -> tuple[int, ...]:
    configured = config.fields.get("trainable_token_indices") or config.fields.get("token_indices")
    if isinstance(configured, Mapping):
        fitting = (
            indices for name, indices in configured.items() if key.target.endswith("." + name)
        )
        configured = configured.get(key.target) or next(fitting, None)
    rows = bundle.tensors[key.raw].shape[0]
    if not isinstance(configured, list) or len(configured) != rows:
        found = "none" if configured is None else len(configured)
        raise MalformedAdapterError(
            f"{bundle.source}: {key.raw} has {rows} rows but the config lists {found} token indices"
        )
    if min(configured, default=0) < 0:
        raise MalformedAdapterError(f"{bundle.source}: negative token index for {key.raw}")
    return tuple(int(i) for i in configured)


def _unsaid(config: PeftConfig) -> list[str]:
    """Return the words that the scale depends on and the config does not say."""
    if config.fields.get("peft_type") != "LORA":
        return []
    return [word for word in ("r", "lora_alpha") if word not in config.fields]


def _untargeted(layers: Mapping[str, LayerDelta], config: PeftConfig) -> list[str]:
    strangers = [path for path in layers if not config.targets(path)]
    return [
        f"{len(strangers)} modules are not among target_modules, so PEFT would not apply them: "
        + ", ".join(strangers[:4])
    ][: len(strangers)]


def _left_out(keys: list[Key]) -> list[str]:
    words = {
        "ignored": "are copies of untrained modules (original_module)",
        "training": "matter only in training (VeLoRA, MonteCLoRA)",
    }
    counts = Counter(key.kind for key in keys if key.kind in words)
    return [f"left out: {count} tensors that {words[kind]}" for kind, count in counts.items()]


FORMAT = Format(
    name="peft",
    title="PEFT (adapter_config.json and weights)",
    spec="https://huggingface.co/docs/peft/developer_guides/checkpoint",
    holds=frozenset(
        delta.kind for delta in (LoRA, DoRA, ExpertLoRA, MovedBase, Replacement, RowReplacement)
    ),
    matches=matcher("peft"),
    read=read,
    write=write,
    weights_file="adapter_model.safetensors",
    has_side_files=True,
)
