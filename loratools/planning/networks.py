"""Merging into a diffusers pipeline: each network takes its share of the adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from loratools.adapter import Adapter
from loratools.basemodel import BaseModel, Pipeline
from loratools.errors import MatchError, UnknownArchitectureError
from loratools.keymaps.architecture import Architecture
from loratools.keymaps.translate import detect_architecture, detect_base, translate
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

    Raises: as ``share_networks``, and see ``plan_merge``.
    """
    shares = share_networks(pipeline, loaded, arch)
    return {name: plan(pipeline.components[name], share) for name, share in shares.items()}


def share_networks(
    pipeline: Pipeline, loaded: Sequence[LoadedAdapter], arch: str | None = None
) -> Mapping[str, Sequence[LoadedAdapter]]:
    """Return what each network of the pipeline takes of the adapters; nothing, for some.

    Raises:
        MatchError: an adapter changes a network that the pipeline lacks.
        UnknownArchitectureError: see ``detect_architecture``.
    """
    shares: dict[str, list[LoadedAdapter]] = {name: [] for name in pipeline.components}
    for one in loaded:
        named = _in_diffusers_names(one.adapter, pipeline, arch)
        for name, share in split_networks(named).items():
            if name not in shares:
                raise MatchError(
                    f"{one.path}: changes {name}, which {pipeline.path} does not have",
                    hint=f"its networks are {', '.join(shares)}",
                )
            shares[name].append(replace(one, adapter=share))
    return shares


def _in_diffusers_names(adapter: Adapter, pipeline: Pipeline, arch: str | None) -> Adapter:
    if adapter.naming == "diffusers":
        return adapter
    try:
        found = detect_architecture(adapter, arch)
    except UnknownArchitectureError:
        # A text encoder's modules alone fit several: the pipeline's denoiser tells.
        theirs = None if arch else _architecture(pipeline)
        if theirs is None:
            raise
        found = theirs
    return translate(adapter, found, "diffusers")


def _architecture(pipeline: Pipeline) -> Architecture | None:
    for name, model in pipeline.components.items():
        if not name.startswith("text_encoder"):
            with suppress(UnknownArchitectureError):
                return detect_base({n: tensor.shape for n, tensor in model.tensors.items()})
    return None


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
