"""What rounding to few bits left out of a merge, as a small adapter beside the merged model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loratools.adapter import Adapter, in_natural_order
from loratools.adapter_io import save_adapter
from loratools.basemodel import elements
from loratools.deltas import ExpertLoRA, LayerDelta
from loratools.errors import OptionError, UnsupportedError
from loratools.formats import get_format
from loratools.keymaps.gguf_base import open_gguf_base
from loratools.keymaps.gguf_naming import gguf_warnings
from loratools.planning.base_names import is_image
from loratools.planning.merge_plan import MergePlan
from loratools.planning.placement import Placement
from loratools.planning.residual_layers import (
    in_names_of_comfyui,
    in_words_of_gguf,
    residual_layers,
)
from loratools.report import Json, Note
from loratools.streaming.checkpoint import Checkpoint, Results
from loratools.streaming.gate import Gate
from loratools.streaming.residuals import Residual, ResidualWish, empty_residual, share_kept
from loratools.streaming.works import TensorWork
from loratools.tensorfiles.atomic import StagedOutput, staged_output
from loratools.tensorfiles.beside import residual_path
from loratools.tensorfiles.destination import check_destination
from loratools.tensorfiles.dtypes import DTYPES

_ENDINGS = {"peft": "", "diffusers": "", "gguf": ".gguf", "comfyui": ".safetensors"}
"""Formats of residual adapters → how their names end; those without an ending are folders."""
_TABLES = ("token_embd", "output")
_NOISE = 4 * torch.finfo(torch.float32).eps


@dataclass(frozen=True, slots=True)
class ResidualPlan:
    """A merge that keeps what rounding leaves out.

    Attributes:
        plans: sub-folder → plan, of which the touched tensors of few bits gather it.
        path: where the adapter goes.
        rank: of its layers, at most.
        format: its file syntax.
        arch: the user's word for the architecture.
    """

    plans: Mapping[str, MergePlan]
    path: Path
    rank: int
    format: str
    arch: str | None = None

    def check(self, inputs: Sequence[Path], *, overwrite: bool) -> None:
        """Raise OutputError if the adapter's destination is refused; nothing is changed."""
        check_destination(self.path, folder=self._is_folder, overwrite=overwrite, inputs=inputs)

    def staged(self, inputs: Sequence[Path], *, overwrite: bool) -> StagedOutput:
        """Return the context in which ``write`` may be called: it appears as the context ends."""
        return staged_output(self.path, folder=self._is_folder, overwrite=overwrite, inputs=inputs)

    def write(self, results: Results, staged: Path) -> None:
        """Write the adapter to its staged path."""
        save_adapter(self.adapter(_found(results)), staged, format=self.format, overwrite=True)

    @property
    def _is_folder(self) -> bool:
        return not _ENDINGS[self.format]

    def adapter(self, found: Mapping[tuple[str, str], Residual]) -> Adapter:
        """Return the residuals, by component and tensor, as an adapter in its format's names."""
        layers: dict[str, LayerDelta] = {}
        for component, plan in self.plans.items():
            own = {name: residual for (home, name), residual in found.items() if home == component}
            named = residual_layers(plan, own, straight=self.format == "gguf")
            layers |= {f"{component}.{n}".lstrip("."): layer for n, layer in named.items()}
        plain = Adapter(in_natural_order(layers))
        base = next(iter(self.plans.values())).checkpoint.base
        if self.format == "gguf":
            return in_words_of_gguf(plain, base, self.path)
        if self.format == "comfyui":
            return in_names_of_comfyui(plain, base, self.arch)
        return replace(plain, naming=get_format(self.format).naming)

    def facts(self, results: Results) -> dict[str, Json]:
        """Return what a report says of the adapter; its share is null before the merge."""
        found = list(_found(results).values())
        return {
            "path": str(self.path),
            "format": self.format,
            "rank": self.rank,
            "bytes": self._nbytes(),
            "share_captured": share_kept(found) if results else None,
        }

    def _nbytes(self) -> int:
        """Return the bytes of all factors, in float32."""
        size = 0
        for plan in self.plans.values():
            for work in plan.checkpoint.works.values():
                if work.residual:
                    rows, columns = work.residual.matrix_shape(work.shape)
                    count = work.shape[0] if work.residual.stacked else 1
                    size += 4 * count * min(self.rank, rows, columns) * (rows + columns)
        return size

    def notes(self, results: Results | None) -> Iterator[Note]:
        """Yield what is in the adapter, or before the merge where it will be."""
        found = _found(results) if results else self.nothing()
        if results:
            share = share_kept(list(found.values()))
            yield Note(
                f"what rounding left out is in {self.path}: rank {self.rank}, {share:.1%} of its "
                "square; load it beside the merged model at strength 1"
            )
        else:
            yield Note(f"what rounding leaves out goes to {self.path}, at rank {self.rank}")
        if self.format == "gguf":
            yield from (Note(word, "warning") for word in gguf_warnings(self.adapter(found)))

    def nothing(self) -> dict[tuple[str, str], Residual]:
        """Return a residual of zeros for every tensor that gathers one."""
        return {
            (component, work.name): empty_residual(work.shape, work.residual)
            for component, plan in self.plans.items()
            for work in plan.checkpoint.works.values()
            if work.residual
        }


def plan_residual(
    plans: Mapping[str, MergePlan], output: Path, rank: int, arch: str | None = None
) -> ResidualPlan:
    """Plan a residual adapter beside a merge.

    Args:
        plans: of the merge; the empty name for a model by itself, else a pipeline's networks.
        output: the merged model.
        rank: of every matrix.
        arch: the user's word for the architecture.

    Raises:
        OptionError: a rank below 1, or an output without touched weights of few bits.
        UnsupportedError: what the residual's format cannot hold, or its runtime not load.
    """
    if rank < 1:
        raise OptionError(f"--residual-rank {rank}: not a rank", hint="give a number from 1 on")
    coded = {name: _coded(plan) for name, plan in plans.items()}
    if not any(coded.values()):
        raise OptionError(
            "--residual-rank: no touched weight is written in few bits, so nothing is left out "
            "that is worth a file",
            hint="use it with --quant keep, or for GGUF with a type such as --quant q4_0",
        )
    format_name = _format_for(plans)
    made = ResidualPlan(
        _gathering(plans, coded, rank),
        residual_path(output, _ENDINGS[format_name]),
        rank,
        format_name,
        arch,
    )
    if format_name == "gguf":
        _refuse_tied(plans[""].checkpoint, coded[""])
    # What the format cannot hold shows without values too, before anything is written.
    get_format(format_name).write(made.adapter(made.nothing()))
    return made


def left_nothing(results: Results) -> bool:
    """Return whether rounding left no more out of any tensor than float32's own rounding does."""
    return not any(
        result.residual and result.residual.square > (_NOISE * result.result_norm) ** 2
        for found in results.values()
        for result in found.values()
    )


def _found(results: Results) -> dict[tuple[str, str], Residual]:
    return {
        (component, name): result.residual
        for component, found in results.items()
        for name, result in found.items()
        if result.residual
    }


# ── which tensors ────────────────────────────────────────────────────────────────────────────


def _coded(plan: MergePlan) -> list[TensorWork]:
    return [work for work in plan.checkpoint.works.values() if work.folds and _is_narrow(work)]


def _is_narrow(work: TensorWork) -> bool:
    return len(work.shape) > 1 and (work.is_packed or work.dtype not in DTYPES)


def _gathering(
    plans: Mapping[str, MergePlan], coded: Mapping[str, Sequence[TensorWork]], rank: int
) -> dict[str, MergePlan]:
    """Return the plans with works that gather what is left out, two of the largest at a time."""
    gate = Gate(0)
    done = {}
    for component, plan in plans.items():
        wishes = {
            work.name: ResidualWish(rank, _is_stack(plan.placements[work.name]), gate)
            for work in coded[component]
        }
        shapes = (wishes[work.name].matrix_shape(work.shape) for work in coded[component])
        gate.room = max(gate.room, *(2 * elements(shape) for shape in shapes), 0)
        done[component] = replace(plan, checkpoint=_with_wishes(plan.checkpoint, wishes))
    return done


def _with_wishes(checkpoint: Checkpoint, wishes: Mapping[str, ResidualWish]) -> Checkpoint:
    def wishing(work: TensorWork) -> TensorWork:
        whole = wishing(work.whole) if work.whole else None
        # The part that holds the codes may be called as the whole is.
        return replace(work, whole=whole, residual=wishes.get(work.name) if work.folds else None)

    files = tuple(
        replace(file, tensors=tuple(wishing(work) for work in file.tensors))
        for file in checkpoint.files
    )
    return replace(checkpoint, files=files)


def _is_stack(placements: Sequence[Placement]) -> bool:
    return any(isinstance(placement.delta, ExpertLoRA) for placement in placements)


def _format_for(plans: Mapping[str, MergePlan]) -> str:
    """Return the format that the merged model's runtime loads."""
    if "" not in plans:
        return "diffusers"
    base = plans[""].checkpoint.base
    if not base.path.is_dir() and is_image(base):
        return "comfyui"
    return "gguf" if base.is_gguf else "peft"


def _refuse_tied(checkpoint: Checkpoint, coded: Sequence[TensorWork]) -> None:
    """Raise UnsupportedError for a table that the merged model uses as its head too."""
    names = [work.name.removesuffix(".weight") for work in coded]
    tables = [name for name in _TABLES if name in names]
    if not tables:
        return
    known = open_gguf_base(checkpoint.base.path)
    merged = replace(known, tensors={n: work.shape for n, work in checkpoint.works.items()})
    if merged.is_tied(merged.model_for(names)):
        raise UnsupportedError(
            f"{tables[0]}.weight: the merged model has one tensor for the embedding and the head, "
            "and llama.cpp refuses an adapter for it or aborts",
            hint="leave --residual-rank out, or take the embedding out of the adapter",
        )
