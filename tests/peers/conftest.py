"""Bases built once for the session, and the merge under test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from . import builders
from .builders import Base, Tensors

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder as one that runs a peer."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.peers)


@pytest.fixture(scope="package", autouse=True)
def _peers() -> Iterator[None]:
    """Skip where PEFT or transformers is absent, and keep both off the network.

    One thread: the models are tiny, and on a busy machine waiting for a second one costs most.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        pytest.importorskip("peft")
        pytest.importorskip("transformers").utils.logging.disable_progress_bar()
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Merged:
    """What loratools wrote and said."""

    folder: Path
    tensors: Tensors
    report: Any

    def notes_on(self, *words: str) -> list[str]:
        """Return the notes in which every word occurs, in the message or as the subject."""
        said = (f"{note.subject or ''}: {note.message}" for note in self.report.notes)
        return [text for text in said if all(word in text for word in words)]


Merge = Callable[..., Merged]


@pytest.fixture
def merge(tmp_path: Path) -> Merge:
    """Merge with loratools into ``tmp_path / name``."""

    def run(base: Base, adapters: Any, *, name: str = "merged", **options: Any) -> Merged:
        from loratools.merge import merge_into_base

        report = merge_into_base(base.folder, adapters, tmp_path / name, **options)
        return Merged(tmp_path / name, builders.load_tensors(tmp_path / name), report)

    return run


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder which holds the session's bases."""
    return tmp_path_factory.mktemp("bases")


@pytest.fixture(scope="session")
def llama(shelf: Path) -> Base:
    """Llama, float32."""
    return builders.llama(shelf / "llama")


@pytest.fixture(scope="session")
def llama_bf16(shelf: Path) -> Base:
    """Llama, bfloat16, in several shards."""
    return builders.llama(shelf / "llama_bf16", torch.bfloat16, shard_size="16KB")


@pytest.fixture(scope="session")
def llama_fp16(shelf: Path) -> Base:
    """Llama, float16."""
    return builders.llama(shelf / "llama_fp16", torch.float16)


@pytest.fixture(scope="session")
def llama_biased(shelf: Path) -> Base:
    """Llama whose linear layers have biases."""
    return builders.llama(shelf / "llama_biased", attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="session")
def llama_tied(shelf: Path) -> Base:
    """Llama whose head is its embedding: one tensor on disk."""
    return builders.llama(shelf / "llama_tied", tied=True)


@pytest.fixture(scope="session")
def gpt2(shelf: Path) -> Base:
    """GPT-2 under the Hub's names."""
    return builders.gpt2(shelf / "gpt2")


@pytest.fixture(scope="session")
def bert(shelf: Path) -> Base:
    """BERT with its masked-word head."""
    return builders.bert(shelf / "bert")


@pytest.fixture(scope="session")
def wide_bf16(shelf: Path) -> Base:
    """Two large linear layers, bfloat16."""
    return builders.custom(shelf / "wide_bf16", builders.Wide, torch.bfloat16)
