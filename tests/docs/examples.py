"""The files that the pages take for given.

``python tests/docs/examples.py FOLDER`` makes them for a reader who follows a page.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS = {"self_attn.q_proj": (64, 64), "self_attn.v_proj": (64, 64), "mlp.down_proj": (64, 160)}
RANK = 32


def make_files(folder: Path) -> None:
    """Make a base, as a folder and as a GGUF file, four adapters for it and one for SDXL."""
    from loratools.demo import make_adapter, make_base
    from tests.gguf_demo import write_demo_gguf
    from tests.image_adapters import write_kohya_sdxl

    make_base(folder / "base")
    make_adapter(folder / "adapter")
    make_adapter(folder / "style", seed=2)
    make_adapter(folder / "qlora", seed=3)
    record_base(folder / "qlora", "base-nf4")
    write_kohya_sdxl(folder / "ink.safetensors")
    write_wide(folder / "wide")
    write_demo_gguf(folder / "base", folder / "model.gguf")


def record_base(adapter: Path, name: str) -> None:
    """Write into an adapter's config which base it was trained on, as PEFT does."""
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**config, "base_model_name_or_path": name}), "utf-8")


def write_wide(folder: Path) -> None:
    """Write a PEFT adapter of rank 32 whose singular values fall, at another pace in each layer.

    σᵢ = exp(−i/τ) with τ from 2 to 12: the shape that spectra of trained adapters have, made up.
    """
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for layer in range(3):
        for place, (name, (rows, columns)) in enumerate(LAYERS.items()):
            pace = 2.0 + 10.0 * (3 * layer + place) / 8
            values = torch.exp(-torch.arange(RANK) / pace).sqrt()
            up, _ = torch.linalg.qr(torch.randn(rows, RANK, generator=generator))
            down, _ = torch.linalg.qr(torch.randn(columns, RANK, generator=generator))
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = (down * values).T.contiguous() / 4
            tensors[f"{prefix}.lora_B.weight"] = (up * values).contiguous() / 4
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    names = sorted(name.rpartition(".")[2] for name in LAYERS)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": names}
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    make_files(Path(sys.argv[1]))
