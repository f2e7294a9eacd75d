"""What a Hub keeps: repositories, the faults planted in it, and its rules for model cards."""

from __future__ import annotations

import hashlib
import re
import threading
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".ckpt")
LICENSES = {
    "apache-2.0", "mit", "openrail", "creativeml-openrail-m", "openrail++", "llama2", "llama3",
    "llama3.1", "llama3.2", "gemma", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "cc0-1.0",
    "bsd-3-clause", "gpl-3.0", "bigscience-openrail-m", "other", "unknown",
}  # fmt: skip
PIPELINES = {
    "text-generation", "text-to-image", "text-to-video", "text-classification",
    "token-classification", "feature-extraction", "image-to-image", "question-answering",
}  # fmt: skip
RELATIONS = {"adapter", "merge", "quantized", "finetune"}


@dataclass
class Repo:
    """A model repository."""

    id: str
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    pulls: int = 0

    def commit(self, branch: str, files: dict[str, bytes], message: str = "") -> str:
        text = f"{self.id} {len(self.commits)} {message}".encode()
        sha = hashlib.sha1(text).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        self.messages.append(message)
        return sha

    def resolve(self, revision: str) -> str | None:
        revision = unquote(revision)
        found = self.branches.get(revision) or self.tags.get(revision)
        return found or (revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision) or ""]


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose path holds ``part``."""

    method: str
    part: str
    times: int
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    after: int | None = None
    skip: int = 0
    hold: Hold | None = None


class Hold:
    """A server that falls silent: ``reached`` when it does, until ``over``."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.over = threading.Event()


@dataclass
class Seen:
    """One request; ``sent`` is how many bytes of a body went out."""

    method: str
    path: str
    range: str | None
    token: str | None
    sent: int = 0


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def card_faults(text: str) -> list[str]:
    """Return what the Hub's own check of a card's metadata finds fault with."""
    data = card_data(text)
    if not data:
        return ["no metadata"]
    bases = data.get("base_model", [])
    bases = [bases] if isinstance(bases, str) else bases
    checks = {
        "license": data.get("license", "other") in LICENSES,
        "license_name": data.get("license") != "other" or "license_name" in data,
        "base_model": all(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) for base in bases),
        "base_model_relation": data.get("base_model_relation", "merge") in RELATIONS,
        "pipeline_tag": data.get("pipeline_tag", "text-to-image") in PIPELINES,
        "tags": all(isinstance(tag, str) for tag in data.get("tags", [])),
    }
    return [name for name, fine in checks.items() if not fine]


def card_data(text: str) -> dict[str, Any]:
    match = re.match(r"^---\r?\n([\S\s]*?)\r?\n---\r?\n", text)
    return (yaml.safe_load(match[1]) or {}) if match else {}
