"""Small bases and adapters, made by transformers and PEFT in a folder; every seed is fixed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

Tensors = dict[str, Tensor]
HIDDEN = 32
VOCAB = 64
PREFIX = "base_model.model."
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _identity(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Base:
    """A base checkpoint on disk and the way to bring it (or a copy of its layout) to life.

    Attributes:
        folder: where the checkpoint lies.
        build: a folder with this layout → a module holding its weights.
        to_disk: the module's state dict → the names which the checkpoint uses.
    """

    folder: Path
    build: Callable[[Path], nn.Module]
    to_disk: Callable[[Tensors], Tensors] = _identity

    def load(self, folder: Path | None = None) -> nn.Module:
        """Return a fresh module in evaluation mode, from this folder or one merged from it."""
        return self.build(self.folder if folder is None else folder).eval()

    @property
    def tensors(self) -> Tensors:
        """Every tensor of the checkpoint."""
        return load_tensors(self.folder)


# ── files ────────────────────────────────────────────────────────────────────────────────────


def load_tensors(path: Path) -> Tensors:
    """Return every tensor of a file, or of all .safetensors files of a folder."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def adapter_tensors(folder: Path) -> Tensors:
    """Return the tensors of a canonical PEFT folder, named without ``base_model.model.``."""
    stored = load_file(folder / "adapter_model.safetensors")
    return {name.removeprefix(PREFIX): tensor for name, tensor in stored.items()}


def edited(
    source: Path,
    folder: Path,
    *,
    tensors: Callable[[Tensors], Tensors] = _identity,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a copy of a PEFT adapter with other tensors (full key names) or config entries.

    Entries keep the order they are given in, which PEFT's own saving sorts.
    """
    folder.mkdir(parents=True)
    settings = json.loads((source / "adapter_config.json").read_text())
    settings.update(config or {})
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2))
    changed = tensors(load_file(source / "adapter_model.safetensors"))
    contiguous = {name: tensor.contiguous() for name, tensor in changed.items()}
    save_file(contiguous, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def renamed(rename: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    """Return an edit for :func:`edited` that renames every key."""
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return ``bfloat16`` for ``torch.bfloat16``."""
    return str(dtype).removeprefix("torch.")


# ── bases which transformers builds ──────────────────────────────────────────────────────────


def auto_class(name: str) -> Callable[[Path], nn.Module]:
    """Return a loader through a class of transformers, in the checkpoint's dtype."""

    def build(folder: Path) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        model: nn.Module = getattr(transformers, name).from_pretrained(folder, dtype="auto")
        return model

    return build


def without_head(tensors: Tensors) -> Tensors:
    """Drop the head, as a checkpoint with tied embeddings does."""
    return {name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}


def _with_biases(model: nn.Module, dtype: torch.dtype) -> Any:
    """Give the biases, which transformers starts at zero, values that a loss would show."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def llama(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    *,
    tied: bool = False,
    shard_size: str = "1GB",
    **config: Any,
) -> Base:
    """Build a two-layer Llama: 4 heads, 2 key/value heads, gated MLP."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(11)
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "tie_word_embeddings": tied,
    }
    model = _with_biases(LlamaForCausalLM(LlamaConfig(**(sizes | config))), dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    to_disk = without_head if tied else _identity
    return Base(folder, auto_class("LlamaForCausalLM"), to_disk)


def _hub_names(tensors: Tensors) -> Tensors:
    return {
        name.removeprefix("transformer."): tensor
        for name, tensor in tensors.items()
        if name != "lm_head.weight"
    }


def gpt2(folder: Path, dtype: torch.dtype = torch.float32) -> Base:
    """Build a GPT-2 whose file names lack ``transformer.``, as those of the Hub do."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(12)
    config = GPT2Config(
        n_embd=HIDDEN, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64, initializer_range=0.2
    )
    model = _with_biases(GPT2LMHeadModel(config), dtype)
    model.save_pretrained(folder)
    names = _hub_names(dict(load_file(folder / "model.safetensors")))
    save_file(names, folder / "model.safetensors", metadata={"format": "pt"})
    return Base(folder, auto_class("GPT2LMHeadModel"), _hub_names)


def bert(folder: Path, dtype: torch.dtype = torch.float32) -> Base:
    """Build a BERT with its masked-word head: ``bert.*`` and ``cls.*`` on disk."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(13)
    config = BertConfig(
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    _with_biases(BertForMaskedLM(config), dtype).save_pretrained(folder)
    return Base(folder, auto_class("BertForMaskedLM"))


# ── bases of plain torch modules ─────────────────────────────────────────────────────────────


def custom(folder: Path, make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> Base:
    """Save a torch module as model.safetensors beside a minimal config.json."""
    torch.manual_seed(14)
    folder.mkdir(parents=True)
    save_file(
        make().to(dtype).state_dict(), folder / "model.safetensors", metadata={"format": "pt"}
    )
    settings = {"architectures": [make.__name__], "dtype": dtype_name(dtype)}
    (folder / "config.json").write_text(json.dumps(settings))

    def build(path: Path) -> nn.Module:
        module = make().to(dtype)
        module.load_state_dict(load_tensors(path))
        return module

    return Base(folder, build)


class Wide(nn.Module):
    """Linear layers with enough elements for a share of 0.01 % to mean something."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(512, 512)
        self.second = nn.Linear(512, 768, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, 512)."""
        return self.second(torch.relu(self.first(x)))


class Embedded(nn.Module):
    """An embedding with more rows than columns, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 48)
        self.head = nn.Linear(48, 8)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, positions), integers under 256."""
        return self.head(self.embed(x))


class SquareEmbedded(Embedded):
    """An embedding whose shape does not tell rows from columns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(48, 48)


class Convs(nn.Module):
    """One convolution of each kind, all with biases."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(8, 12, 3)
        self.point = nn.Conv1d(12, 12, 1)
        self.square = nn.Conv2d(4, 6, 3, stride=2)
        self.pixel = nn.Conv2d(6, 10, 1)
        self.oblong = nn.Conv2d(10, 6, (1, 3))
        self.cube = nn.Conv3d(3, 5, 3)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, 1200)."""
        line = self.point(self.line(x[:, :80].reshape(-1, 8, 10)))
        plane = self.oblong(self.pixel(self.square(x[:, :400].reshape(-1, 4, 10, 10))))
        space = self.cube(x[:, :375].reshape(-1, 3, 5, 5, 5))
        return torch.cat([part.flatten(1) for part in (line, plane, space)], dim=1)


class ThinCube(nn.Module):
    """A Conv3d with the kernel (1, 1, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.cube = nn.Conv3d(3, 5, (1, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, 1200)."""
        return self.cube(x[:, :375].reshape(-1, 3, 5, 5, 5)).flatten(1)


class Grouped(nn.Module):
    """A Conv2d with two groups, which holds no dense kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, 1200)."""
        return self.conv(x[:, :400].reshape(-1, 4, 10, 10)).flatten(1)


class Attention(nn.Module):
    """nn.MultiheadAttention with 4 heads, attending to itself."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(HIDDEN, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, positions, 32)."""
        return self.mha(x, x, x, need_weights=False)[0]


# ── adapters which PEFT makes ────────────────────────────────────────────────────────────────


def perturb(model: nn.Module) -> None:
    """Move every trainable parameter, so that no delta, bias or replacement stays where it began.

    Zeros get noise of 0.2; other tensors noise of a fifth of their mean size.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                size = parameter.abs().mean() or 1.0
                parameter.add_(0.2 * size * torch.randn_like(parameter))


def train(base: Base, config: Any, seed: int = 1) -> Any:
    """Return PEFT's model on a fresh base, with its trainable parameters moved."""
    from peft import get_peft_model

    module = base.load()
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(module, config)
    perturb(model)
    return model


def save(model: Any, folder: Path, **options: Any) -> Path:
    """Save the adapters of PEFT's model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(folder, **options)
    return folder


def lora(base: Base, folder: Path, *, seed: int = 1, **config: Any) -> Path:
    """Make and save a LoRA adapter; ``config`` goes to PEFT's LoraConfig."""
    from peft import LoraConfig

    return save(train(base, LoraConfig(**config), seed), folder)
