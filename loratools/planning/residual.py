"""What rounding to few bits left out of a merge, as a small adapter beside the merged model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.adapter_io import save_adapter
from loratools.basemodel import BaseModel, open_base
from loratools.deltas import LayerDelta
from loratools.deltas.spectral import lora_from_svd
from loratools.errors import OptionError, UnsupportedError
from loratools.linalg.randomized import randomized_svd
from loratools.planning.merge_plan import MergePlan
from loratools.report import Note
from loratools.streaming.blocks import Blocks, Buffers, TensorWork
from loratools.streaming.packed_source import PackedSource


def residual_folder(output: Path) -> Path:
    """Return where the residual adapter of an output goes."""
    return output.with_name(f"{output.stem if output.suffix else output.name}-residual")


def check_residual(plans: Mapping[str, MergePlan], rank: int) -> None:
    """Refuse a residual that there will not be.

    Raises:
        OptionError: a rank below 1, or an output without packed weights that are coded again.
        UnsupportedError: a pipeline.
    """
    if rank < 1:
        raise OptionError(f"--residual-rank {rank}: not a rank", hint="give a number from 1 on")
    if len(plans) > 1:
        raise UnsupportedError(
            "--residual-rank writes one adapter for one model", hint="merge into one component"
        )
    if not any(_coded(plan) for plan in plans.values()):
        raise OptionError(
            "--residual-rank: no packed weight is coded again, so nothing is left out",
            hint="use it with --quant keep, on a base of bitsandbytes, GPTQ, AWQ, FP8, MLX ...",
        )


def write_residual(plan: MergePlan, output: Path, rank: int, *, overwrite: bool) -> Note:
    """Write the truncated SVD of (wanted − stored) of every weight that was coded again.

    One weight at a time is in memory as a whole.
    """
    stored, layers, squares = open_base(output), dict[str, LayerDelta](), [0.0, 0.0]
    for work in _coded(plan):
        left = _wanted(work) - _stored(stored, work)
        found, error = randomized_svd(left, min(rank, *left.shape))
        layers[work.name.removesuffix(".weight")] = lora_from_svd(found, tuple(left.shape))
        whole = float(left.norm()) ** 2
        squares[0] += whole
        squares[1] += (1.0 - error**2) * whole
    folder = residual_folder(output)
    save_adapter(Adapter(layers), folder, overwrite=overwrite)
    share = squares[1] / squares[0] if squares[0] else 1.0
    return Note(
        f"what rounding left out is in {folder}: rank {rank}, {share:.1%} of its square; load it "
        "beside the merged model at strength 1"
    )


def _coded(plan: MergePlan) -> list[TensorWork]:
    works = plan.checkpoint.works.values()
    return [work for work in works if work.is_packed and work.folds and len(work.shape) == 2]


def _wanted(work: TensorWork) -> Tensor:
    """Return the sum before rounding, in float32."""
    assert work.folds is not None
    plain = replace(work, dtype="F32", rounding=None)
    found = torch.empty(work.shape)
    flat = found.view(-1).view(torch.uint8)
    with Blocks(plain, list(work.folds("cpu")), Buffers(), "cpu") as blocks:
        blocks.measure()
        for data, offset in blocks.folded():
            flat[offset : offset + len(data)] = torch.frombuffer(data, dtype=torch.uint8)
    return found


def _stored(model: BaseModel, work: TensorWork) -> Tensor:
    tensor = model.tensors[work.name]
    assert tensor.packed is not None
    return PackedSource(tensor).read(0, work.elements).view(work.shape)
