"""Merging into a diffusers pipeline: each network takes its share of the adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from loratools.adapter import Adapter
from loratools.basemodel import BaseModel, Pipeline
from loratools.errors import MatchError
from loratools.keymaps.translate import detect_architecture, translate
from loratools.planning.merge_plan import LoadedAdapter, MergePlan


def plan_pipeline(
    pipeline: Pipeline,
    loaded: Sequence[LoadedAdapter],
    plan: Callable[[BaseModel, Sequence[LoadedAdapter]], MergePlan],
    arch: str | None = None,
) -> Mapping[str, MergePlan]:
    """Plan the merge of every network; networks that no adapter changes are planned as copies.

    Args:
        pipeline: its networks.
        loaded: adapters, each for any of them.
        plan: plans the merge of one network.
        arch: the adapters' architecture, where the files do not tell.

    Raises:
        MatchError: an adapter changes a network that the pipeline lacks.
        UnknownArchitectureError, UnsupportedError: see ``plan_merge``.
    """
    shares: dict[str, list[LoadedAdapter]] = {name: [] for name in pipeline.components}
    for one in loaded:
        for name, share in split_networks(_in_diffusers_names(one.adapter, arch)).items():
            if name not in shares:
                raise MatchError(
                    f"{one.path}: changes {name}, which {pipeline.path} does not have",
                    hint=f"its networks are {', '.join(shares)}",
                )
            shares[name].append(replace(one, adapter=share))
    return {name: plan(pipeline.components[name], share) for name, share in shares.items()}


def _in_diffusers_names(adapter: Adapter, arch: str | None) -> Adapter:
    if adapter.naming == "diffusers":
        return adapter
    return translate(adapter, detect_architecture(adapter, arch), "diffusers")


def split_networks(adapter: Adapter) -> dict[str, Adapter]:
    """Return the adapter's share of each network, by name, with paths as the network has them."""
    names = dict.fromkeys(path.partition(".")[0] for path in (*adapter.layers, *adapter.extras))
    return {name: _share(adapter, f"{name}.") for name in names}


def _share(adapter: Adapter, prefix: str) -> Adapter:
    def own(items: Mapping[str, Any]) -> dict[str, Any]:
        return {k.removeprefix(prefix): v for k, v in items.items() if k.startswith(prefix)}

    return replace(
        adapter, layers=own(adapter.layers), extras=own(adapter.extras), naming="transformers"
    )
