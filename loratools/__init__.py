"""LoRA adapters: convert them, fold them into models, take them out, from files alone.

Public names are imported on first use, so that ``import loratools`` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from loratools.adapter import Adapter
    from loratools.adapter_io import load_adapter, save_adapter
    from loratools.compose import compose_adapters
    from loratools.convert import convert_adapter
    from loratools.errors import LoratoolsError
    from loratools.extract import extract_adapter
    from loratools.merge import merge_into_base, unmerge_from_base
    from loratools.pull import pull_from_hub
    from loratools.push import push_to_hub
    from loratools.quantize import dequantize_base, quantize_base
    from loratools.rebase import rebase_adapter
    from loratools.report import Report
    from loratools.summary import summarize, summarize_files
    from loratools.svd_resize import resize_adapter
    from loratools.verify import compare_adapters

_HOMES = {
    "Adapter": "loratools.adapter",
    "LoratoolsError": "loratools.errors",
    "Report": "loratools.report",
    "compare_adapters": "loratools.verify",
    "compose_adapters": "loratools.compose",
    "convert_adapter": "loratools.convert",
    "dequantize_base": "loratools.quantize",
    "extract_adapter": "loratools.extract",
    "load_adapter": "loratools.adapter_io",
    "merge_into_base": "loratools.merge",
    "pull_from_hub": "loratools.pull",
    "push_to_hub": "loratools.push",
    "quantize_base": "loratools.quantize",
    "rebase_adapter": "loratools.rebase",
    "resize_adapter": "loratools.svd_resize",
    "save_adapter": "loratools.adapter_io",
    "summarize": "loratools.summary",
    "summarize_files": "loratools.summary",
    "unmerge_from_base": "loratools.merge",
}

__all__ = [
    "Adapter",
    "LoratoolsError",
    "Report",
    "compare_adapters",
    "compose_adapters",
    "convert_adapter",
    "dequantize_base",
    "extract_adapter",
    "load_adapter",
    "merge_into_base",
    "pull_from_hub",
    "push_to_hub",
    "quantize_base",
    "rebase_adapter",
    "resize_adapter",
    "save_adapter",
    "summarize",
    "summarize_files",
    "unmerge_from_base",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
