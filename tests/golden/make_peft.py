"""Make the golden PEFT adapters: tiny bases, adapters, and the weights that PEFT merges.

    python tests/golden/make_peft.py

Versions stand in ``peft/versions.json``. The tests read the files alone; they need neither PEFT nor
this script. The expected weights are PEFT's own merge (``merge_and_unload``) of the files as
saved and loaded again; ``expected.safetensors`` holds the tensors that differ from the base.
"""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import peft
import safetensors
import torch
import transformers
from peft import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from peft.tuners.lora.config import BdLoraConfig, KasaConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HERE = Path(__file__).parent / "peft"
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HEAD = "score.weight"


def llama_config(**words: Any) -> transformers.LlamaConfig:
    """Return a Llama so small that its checkpoint takes a few kilobytes."""
    sizes = {
        "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 20,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16,
        "initializer_range": 0.3, "tie_word_embeddings": False, "pad_token_id": 0,
    }  # fmt: skip
    return transformers.LlamaConfig(**sizes, **words)


class Convs(nn.Module):
    """A 3x3 and a pointwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.square = nn.Conv2d(4, 6, 3)
        self.pixel = nn.Conv2d(6, 5, 1)


class Attention(nn.Module):
    """nn.MultiheadAttention beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.proj = nn.Linear(8, 6)


BASES: Mapping[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(llama_config()),
    "llama_bf16": lambda: transformers.LlamaForCausalLM(llama_config()).to(torch.bfloat16),
    "llama_biased": lambda: transformers.LlamaForCausalLM(llama_config(attention_bias=True)),
    "llama_cls": lambda: transformers.LlamaForSequenceClassification(llama_config(num_labels=3)),
    "convs": Convs,
    "attention": Attention,
}


@dataclass(frozen=True)
class Case:
    """One adapter: its base and the words of its configuration."""

    base: str
    words: Mapping[str, Any] = field(default_factory=dict)
    tokens: bool = False
    torch_file: bool = False

    def config(self) -> Any:
        """Return PEFT's configuration."""
        if self.tokens:
            return TrainableTokensConfig(**self.words)
        return LoraConfig(**({"r": 2, "lora_alpha": 6} | dict(self.words)))


PATTERNS = {
    "rank_pattern": {"layers.1.self_attn.q_proj": 1, "q_proj": 3, "mlp.*": 4},
    "alpha_pattern": {"k_proj|v_proj": 3, "layers.0.mlp.up_proj": 7.5, "q_proj": -2},
}
BLOCKS = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}

CASES: Mapping[str, Case] = {
    "lora": Case("llama", {"target_modules": LINEARS}),
    "lora_bf16_base": Case("llama_bf16", {"target_modules": LINEARS}),
    "rslora_patterns": Case("llama", {"target_modules": LINEARS, "use_rslora": True, **PATTERNS}),
    "dora": Case("llama", {"target_modules": LINEARS, "use_dora": True}),
    "dora_embedding": Case("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "embedding": Case("llama", {"target_modules": ["embed_tokens", "lm_head", "v_proj"]}),
    "conv2d": Case("convs", {"target_modules": ["square", "pixel"]}),
    "dora_conv2d": Case("convs", {"target_modules": ["square", "pixel"], "use_dora": True}),
    "mha": Case("attention", {"target_modules": ["mha"]}),
    "mha_patterns": Case(
        "attention",
        {
            "target_modules": ["mha", "proj"],
            "rank_pattern": {"mha": 4},
            "alpha_pattern": {"mha": 3},
        },
    ),
    "lora_bias": Case("llama_biased", {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "bias_all": Case("llama_biased", {"target_modules": ["q_proj"], "bias": "all"}),
    "seq_cls": Case("llama_cls", {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    "tokens": Case("llama", {"token_indices": [9, 3, 5]}, tokens=True),
    "lora_tokens": Case(
        "llama", {"target_modules": ["q_proj"], "trainable_token_indices": [7, 2, 11]}
    ),
    "pissa": Case("llama", {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "pissa"}),
    "olora": Case("llama", {"target_modules": ["q_proj", "up_proj"], "init_lora_weights": "olora"}),
    "dora_pissa": Case(
        "llama",
        {"target_modules": ["q_proj"], "use_dora": True, "init_lora_weights": "pissa"},
    ),
    "kasa": Case("llama", {"target_modules": ["q_proj", "up_proj"], "kasa_config": KasaConfig()}),
    "bdlora": Case(
        "llama", {"target_modules": ["q_proj", "o_proj"], "use_bdlora": BdLoraConfig(**BLOCKS)}
    ),
    "torch_file": Case("llama", {"target_modules": ["k_proj"]}, torch_file=True),
}


def make_base(name: str) -> nn.Module:
    """Return a base with settled random weights."""
    torch.manual_seed(sorted(BASES).index(name) + 1)
    return BASES[name]().eval()


def perturb(model: nn.Module) -> None:
    """Move every trainable parameter away from where its initialisation put it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))


def state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the weights."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def stored(base: str) -> dict[str, Tensor]:
    """Return the base's tensors on disk; a classifier's head is in the adapter alone."""
    tensors = state(make_base(base))
    tensors.pop(HEAD, None)
    return tensors


def settle_config(path: Path, case: Case) -> None:
    """Sort the lists that PEFT keeps as sets, and leave the patterns as they were given.

    PEFT sorts the patterns when it saves, although their order decides.
    """
    config = json.loads(path.read_text())
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config.get(key), list):
            config[key].sort()
    config |= {key: case.words[key] for key in PATTERNS if key in case.words}
    path.write_text(json.dumps(config, indent=2) + "\n")


def make_case(name: str, case: Case) -> None:
    """Save the adapter, load it again on a fresh base, merge, and keep what changed."""
    folder = HERE / name
    torch.manual_seed(100 + sorted(CASES).index(name))
    model = get_peft_model(make_base(case.base), case.config())
    perturb(model)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch, safe_serialization=not case.torch_file)
        folder.mkdir(parents=True)
        for file in sorted(Path(scratch).iterdir()):
            if file.name.startswith("adapter_"):
                shutil.copy(file, folder / file.name)
    settle_config(folder / "adapter_config.json", case)
    base = stored(case.base)
    merged = state(PeftModel.from_pretrained(make_base(case.base), folder).merge_and_unload())
    after = {
        key: tensor.contiguous()
        for key, tensor in merged.items()
        if key not in base or not torch.equal(base[key], tensor)
    }
    save_file(after, folder / "expected.safetensors", metadata={"base": case.base})


def main() -> None:
    """Make everything anew."""
    shutil.rmtree(HERE, ignore_errors=True)
    (HERE / "bases").mkdir(parents=True)
    for name in BASES:
        save_file(stored(name), HERE / "bases" / f"{name}.safetensors", metadata={"format": "pt"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, case in CASES.items():
            make_case(name, case)
    modules = (peft, transformers, torch, safetensors)
    versions = {module.__name__: module.__version__ for module in modules}
    versions["python"] = platform.python_version()
    (HERE / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
    for path in sorted(HERE.rglob("*.safetensors")):
        assert load_file(path), path


if __name__ == "__main__":
    main()
