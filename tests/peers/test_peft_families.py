"""Families whose embeddings are tied in other ways, and changes that fit only when turned over.

The oracle is the adapter's own forward pass, on a reloaded merged model that misses no weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.errors import MatchError

from . import builders, oracles
from .builders import HIDDEN, VOCAB, Base
from .conftest import Merge


def family(folder: Path, name: str, head: str, **config: Any) -> Base:
    """Build a small model of a family as transformers saves it."""
    import transformers

    torch.manual_seed(4)
    settings = getattr(transformers, f"{name}Config")(vocab_size=VOCAB, **config)
    getattr(transformers, f"{name}{head}")(settings).save_pretrained(folder)
    return Base(folder, builders.auto_class(f"{name}{head}"))


def bart(folder: Path) -> Base:
    """Build a BART: encoder, decoder and head share one table."""
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder")
             for what, n in (("layers", 1), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    return family(
        folder, "Bart", "ForConditionalGeneration", d_model=HIDDEN, max_position_embeddings=64,
        init_std=0.2, **sizes,
    )  # fmt: skip


def deberta(folder: Path) -> Base:
    """Build a DeBERTa-v2 with its masked-word head, which is tied to the input table."""
    return family(
        folder, "DebertaV2", "ForMaskedLM", hidden_size=HIDDEN, intermediate_size=48,
        num_hidden_layers=1, num_attention_heads=4, initializer_range=0.2,
    )  # fmt: skip


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "bart head": (bart, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "bart head LoRA": (bart, {"target_modules": ["q_proj", "lm_head"]}),
    "bart encoder's table": (bart, {"target_modules": ["encoder.embed_tokens"]}),
    "bart decoder's table": (bart, {"target_modules": ["q_proj", "decoder.embed_tokens"]}),
    "bart both tables": (bart, {"target_modules": ["embed_tokens"]}),
    "bart tables and head": (bart, {"target_modules": ["embed_tokens", "lm_head"]}),
    "deberta table": (deberta, {"target_modules": ["word_embeddings"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_forward(case: str, tmp_path: Path, merge: Merge) -> None:
    """Untying one end of a shared table leaves every other user of it as it was."""
    make, config = CASES[case]
    base = make(tmp_path / "base")
    adapter = builders.lora(base, tmp_path / "a", r=4, lora_alpha=8, **config)
    expected = oracles.output(oracles.peft_model(base, adapter))
    merged = merge(base, adapter)
    assert (oracles.output(base.load(merged.folder)) - expected).abs().max() < 1e-4


def test_only_what_may_be_turned_over_is(llama: Base, tmp_path: Path, merge: Merge) -> None:
    """An up_proj's LoRA under down_proj's name fits transposed; it is refused, naming it."""
    adapter = builders.lora(llama, tmp_path / "a", r=4, target_modules=["up_proj"])
    rename = builders.renamed(lambda key: key.replace("up_proj", "down_proj"))
    wrong = builders.edited(
        adapter, tmp_path / "b", tensors=rename, config={"target_modules": ["down_proj"]}
    )
    with pytest.raises(MatchError, match="down_proj"):
        merge(llama, wrong)
