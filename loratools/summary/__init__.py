"""What is in files: an adapter's layers, oddities and spectrum, or a base model's tensors."""

from __future__ import annotations

from loratools.summary.files import summarize, summarize_files

__all__ = ["summarize", "summarize_files"]
