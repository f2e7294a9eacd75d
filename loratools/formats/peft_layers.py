"""From PEFT's tensors of one module to its delta, with every variant resolved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from loratools.deltas import DoRA, ExpertLoRA, LayerDelta, LoRA, MovedBase
from loratools.deltas.lora import Role
from loratools.errors import MalformedAdapterError, UnsupportedError
from loratools.formats.peft_config import PeftConfig

_HUSK_HINT = (
    "the file was saved from sharded training (DeepSpeed ZeRO-3 or FSDP) without gathering the "
    "weights; gather them (stage3_gather_16bit_weights_on_model_save, FULL_STATE_DICT) and save "
    "again"
)
# PEFT up to at least 0.21 adds out_proj's delta twice, in forward and in merge (PR #3774), so a
# trained nn.MultiheadAttention adapter means twice the product.
_ATTENTION_OUT_FACTOR = 2.0


@dataclass(slots=True)
class ModuleTensors:
    """The tensors of one module by field, and the PEFT words and names they came under."""

    path: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    raw: dict[str, str] = field(default_factory=dict)
    embedding: bool = False


@dataclass(frozen=True, slots=True)
class Reading:
    """What a reader needs besides the tensors."""

    config: PeftConfig
    notes: list[str]


def build_layer(module: ModuleTensors, role: Role, reading: Reading) -> LayerDelta:
    """Return the module's delta; raises MalformedAdapterError naming the tensor at fault."""
    _check_shapes(module, reading.config)
    lora = _plain_lora(module, role, reading)
    if "magnitude" in module.tensors:
        return _dora(module, lora, reading.config)
    return _with_start(lora, module, reading.config)


def build_parameter(module: ModuleTensors, reading: Reading) -> LayerDelta:
    """Return the delta of a bare parameter: a LoRA for each expert where it is a stack of them.

    Layout (PEFT's ParamWrapper): rows of lora_A run expert by expert, columns of lora_B rank by
    rank with the expert fastest.
    """
    _check_shapes(module, reading.config)
    down, up = module.tensors["down"], module.tensors["up"]
    rank = reading.config.rank(module.path)
    experts, odd = divmod(down.shape[0], rank)
    if odd or up.shape[1] != down.shape[0]:
        raise MalformedAdapterError(
            f"{reading.config.source}: {module.raw['down']} {tuple(down.shape)} and "
            f"{module.raw['up']} {tuple(up.shape)} are no stack of rank {rank}"
        )
    if experts <= 1:
        return _plain_lora(module, "linear", reading)
    return ExpertLoRA(
        down.reshape(experts, rank, -1),
        up.reshape(up.shape[0], rank, experts).permute(2, 0, 1),
        reading.config.alpha(module.path, rank),
        flipped_if_square=reading.config.swaps_parameter_axes,
    )


def _check_shapes(module: ModuleTensors, config: PeftConfig) -> None:
    for name, tensor in module.tensors.items():
        if tensor.numel() == 0 or (tensor.dim() < 2 and name in ("down", "up")):
            raise MalformedAdapterError(
                f"{config.source}: {module.raw[name]} has shape {tuple(tensor.shape)}, "
                "not a matrix",
                hint=_HUSK_HINT,
            )
    for name, partner in (("down", "lora_B"), ("up", "lora_A")):
        if name in module.tensors and len({"down", "up"} & module.tensors.keys()) < 2:
            raise MalformedAdapterError(
                f"{config.source}: {module.raw[name]} has no {partner} beside it",
                hint="the file is incomplete or a key was renamed; save the adapter again",
            )
    if "down" not in module.tensors:
        raise MalformedAdapterError(
            f"{config.source}: {next(iter(module.raw.values()))} has no lora_A and lora_B beside it"
        )
    if config.flag("use_dora") != ("magnitude" in module.tensors):
        raise MalformedAdapterError(
            f"{config.source}: use_dora is {config.flag('use_dora')} in the config but "
            f"{module.path} has {'a' if 'magnitude' in module.tensors else 'no'} "
            "lora_magnitude_vector",
            hint="correct use_dora in adapter_config.json, or save the adapter again",
        )


def _plain_lora(module: ModuleTensors, role: Role, reading: Reading) -> LoRA:
    down, up = _expanded(module, reading.config)
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise MalformedAdapterError(
            f"{reading.config.source}: ranks disagree: {module.raw['down']} is "
            f"{tuple(module.tensors['down'].shape)} and {module.raw['up']} is "
            f"{tuple(module.tensors['up'].shape)}"
        )
    # PEFT configures an nn.MultiheadAttention as one module, out_proj included.
    configured = module.path.removesuffix(".base_layer.out_proj")
    _note_other_rank(configured, rank, reading)
    alpha = reading.config.alpha(configured, rank)
    if role == "attention_out":
        alpha *= _ATTENTION_OUT_FACTOR
        reading.notes.append(
            f"{module.path.replace('.base_layer.', '.')}: its change counts twice, as in PEFT's "
            "own forward pass and merge of nn.MultiheadAttention"
        )
    return LoRA(down, up, alpha, module.tensors.get("bias"), role)


def _note_other_rank(path: str, rank: int, reading: Reading) -> None:
    configured = reading.config.rank(path)
    if configured == rank:
        return
    row = reading.config.resorted_row(path, rank)
    if row is not None:
        word = f"rank_pattern {row!r} is taken, which says so (PEFT sorts its patterns on saving)"
    else:
        word = "the scale is alpha over the config's, as in the run that wrote it"
    reading.notes.append(
        f"{path}: the tensors have rank {rank}, the config's first match says {configured}; {word}"
    )


def _expanded(module: ModuleTensors, config: PeftConfig) -> tuple[Tensor, Tensor]:
    """Return plain (down, up): diagonals folded in, block-diagonal factors written out."""
    down, up = module.tensors["down"], module.tensors["up"]
    if "diagonal" in module.tensors:
        diagonal = module.tensors["diagonal"].to(torch.float32)
        down = down.to(torch.float32) * diagonal[:, None]
    blocks = config.fields.get("use_bdlora")
    return _block_diagonal(module.path, down, up, blocks) if blocks else (down, up)


def _block_diagonal(
    path: str, down: Tensor, up: Tensor, blocks: Mapping[str, object]
) -> tuple[Tensor, Tensor]:
    """Write BD-LoRA's compact factor out: its row blocks stand on a diagonal."""
    count = int(str(blocks["nblocks"]))
    leaf = path.rsplit(".", 1)[-1]

    def chosen(name: str) -> bool:
        patterns = blocks.get(name) or []
        return isinstance(patterns, list) and any(str(p) in leaf for p in patterns)

    if chosen("target_modules_bd_a"):
        down = _on_diagonal(down, count)
    elif chosen("target_modules_bd_b"):
        up = _on_diagonal(up, count)
    return down, up


def _on_diagonal(factor: Tensor, count: int) -> Tensor:
    blocks: Tensor = torch.block_diag(*torch.chunk(factor, count, dim=0))
    return blocks


def _dora(module: ModuleTensors, lora: LoRA, config: PeftConfig) -> DoRA:
    if config.start is not None and _moves(lora):
        raise UnsupportedError(
            f"{config.source}: {module.path} is a DoRA whose initialisation ({config.start}) moved "
            "the base, which is not supported",
            hint="merge it with PEFT",
        )
    return DoRA(lora, _magnitude(module, lora))


def _magnitude(module: ModuleTensors, lora: LoRA) -> Tensor:
    magnitude = module.tensors["magnitude"].flatten()
    if magnitude.shape[0] != lora.weight_shape[0]:
        raise MalformedAdapterError(
            f"{module.raw['magnitude']} has {magnitude.shape[0]} elements for "
            f"{lora.weight_shape[0]} outputs"
        )
    return magnitude


def _with_start(lora: LoRA, module: ModuleTensors, config: PeftConfig) -> LayerDelta:
    if "diagonal" in module.tensors:
        return MovedBase(lora, "kasa")
    if config.start is None or not _moves(lora):
        return lora
    return MovedBase(lora, config.start)


def _moves(lora: LoRA) -> bool:
    """Say whether an initialisation may move the weight: PEFT does so in linear layers only."""
    return lora.role == "linear" and len(lora.weight_shape) == 2
