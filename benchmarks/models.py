"""Llama-shaped bases and adapters with random weights, written without building a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

SEED = 20240601
WEIGHT_STD = 0.02
"""Standard deviation of the weights, Llama's ``initializer_range``."""

DELTA_SHARE = 0.01
"""Standard deviation of the delta as a share of the weights': what fine-tuning typically leaves."""

BLOCK = 1 << 26
"""Elements of the random block that a reused base is filled from."""


@dataclass(frozen=True)
class Geometry:
    """The sizes of a Llama model and the number of files its weights are written to."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    shards: int
    fresh: bool
    """True: every weight drawn anew. False: one random block reused with a scale per tensor."""

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return the seven linear layers of a decoder layer: path inside it → (out, in)."""
        kv = self.hidden // self.heads * self.kv_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (kv, self.hidden),
            "self_attn.v_proj": (kv, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield every tensor of the checkpoint in the model's order."""
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for path, shape in self.linears().items():
                yield f"{prefix}.{path}.weight", shape
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in bfloat16."""
        return sum(2 * _elements(shape) for _, shape in self.shapes())

    def config(self) -> dict[str, object]:
        """Return what ``config.json`` says."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "bos_token_id": 1,
            "dtype": "bfloat16",
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": WEIGHT_STD,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 2048,
            "model_type": "llama",
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "vocab_size": self.vocabulary,
        }


GEOMETRIES = {
    geometry.name: geometry
    for geometry in (
        Geometry("tiny", 64, 176, 2, 4, 2, 256, 3, fresh=True),
        # TinyLlama-1.1B
        Geometry("1.1b", 2048, 5632, 22, 32, 4, 32000, 3, fresh=True),
        # Llama-3-8B
        Geometry("8b", 4096, 14336, 32, 32, 8, 128256, 4, fresh=False),
    )
}


def write_base(folder: Path, geometry: Geometry) -> None:
    """Write the checkpoint in ``geometry.shards`` files, ``config.json`` last, as the seal."""
    folder.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    weights = _Weights(fresh=geometry.fresh)
    for number, shard in enumerate(_shards(geometry), start=1):
        file = f"model-{number:05}-of-{geometry.shards:05}.safetensors"
        _save({name: weights.draw(shape) for name, shape in shard.items()}, folder / file)
        weight_map.update(dict.fromkeys(shard, file))
    index = {"metadata": {"total_size": geometry.nbytes}, "weight_map": weight_map}
    _write_json(folder / "model.safetensors.index.json", index)
    _write_json(folder / "config.json", geometry.config())


def write_adapter(folder: Path, geometry: Geometry, rank: int = 16) -> None:
    """Write a float32 LoRA on every linear layer in PEFT's layout; its delta is ~1 % of W."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(SEED + 1)
    tensors: dict[str, torch.Tensor] = {}
    alpha = 2 * rank
    # An entry of B·A sums `rank` products, so its deviation is sqrt(rank)·std(A)·std(B).
    down_std = WEIGHT_STD
    up_std = DELTA_SHARE * WEIGHT_STD / (alpha / rank * rank**0.5 * down_std)
    for layer in range(geometry.layers):
        for path, (rows, columns) in geometry.linears().items():
            prefix = f"base_model.model.model.layers.{layer}.{path}"
            down = torch.randn(rank, columns, generator=generator) * down_std
            up = torch.randn(rows, rank, generator=generator) * up_std
            tensors[f"{prefix}.lora_A.weight"] = down
            tensors[f"{prefix}.lora_B.weight"] = up
    _save(tensors, folder / "adapter_model.safetensors")
    config = {
        "base_model_name_or_path": None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted(path.rpartition(".")[2] for path in geometry.linears()),
        "task_type": "CAUSAL_LM",
        "use_rslora": False,
    }
    _write_json(folder / "adapter_config.json", config)


def _shards(geometry: Geometry) -> list[dict[str, tuple[int, ...]]]:
    """Cut the tensors, in order, into files of about equal size."""
    share = geometry.nbytes / geometry.shards
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(geometry.shards)]
    written = 0
    for name, shape in geometry.shapes():
        shards[min(int(written / share), geometry.shards - 1)][name] = shape
        written += 2 * _elements(shape)
    return shards


class _Weights:
    """Draws bfloat16 weights: normal for matrices, ones for the norms."""

    def __init__(self, *, fresh: bool) -> None:
        import torch

        self.generator = torch.Generator().manual_seed(SEED)
        self.count = 0
        self.block = None if fresh else self._normal((BLOCK,))

    def draw(self, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        self.count += 1
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        if self.block is None:
            return self._normal(shape)
        count = _elements(shape)
        copies = -(-count // BLOCK)
        scale = 1 + (self.count % 13) / 16
        return (self.block * scale).repeat(copies)[:count].reshape(shape)

    def _normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        import torch

        values = torch.empty(shape, dtype=torch.bfloat16)
        return values.normal_(0, WEIGHT_STD, generator=self.generator)


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _save(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(tensors), path, metadata={"format": "pt"})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
