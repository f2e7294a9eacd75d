"""Carrying an adapter to another base of the same shape.

W_A + Δ is wanted on base B: Δ′ = Δ + SVD_k(W_A − W_B), layer by layer in the adapter's own layout,
summed exactly (rank r + k) or cut to a total rank. With k = 0 the bases are only measured.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.adapter_io import find_weights, open_adapter, save_adapter
from loratools.basemodel import BaseModel, elements, open_base
from loratools.compute import resolve_compute
from loratools.conversion import cast_adapter, convert_value, rounding_notes
from loratools.deltas import AdditiveDelta, LayerDelta, LoRA
from loratools.deltas.spectral import lora_from_svd, matrix_shape
from loratools.errors import MatchError, NonFiniteError, OptionError, UnsupportedError
from loratools.extraction.model_pair import refuse_quantised
from loratools.formats import get_written_format
from loratools.formats.format import Format
from loratools.hub.taking import takes_references
from loratools.keymaps.gguf_base import open_gguf_base
from loratools.keymaps.gguf_naming import concerns_gguf
from loratools.keymaps.mlx_base import open_mlx_base
from loratools.keymaps.mlx_naming import concerns_mlx
from loratools.linalg.factored import factored_svd
from loratools.linalg.gram import product_norm
from loratools.linalg.randomized import Truncation, truncated_svd
from loratools.planning.base_rows import BaseRows, locate_layers
from loratools.report import Json, Note, Report
from loratools.streaming.differences import Job, in_threads
from loratools.streaming.rewriting import Progress
from loratools.tensorfiles.destination import check_destination

PathLike = str | os.PathLike[str]
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class _Wish:
    """How much of the bases' difference to carry, and what rank the whole may have."""

    rank: int
    total_rank: int | None
    exact: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Layer:
    """One layer's result.

    Attributes:
        path: in the adapter.
        delta: the new change, or the old one where nothing was added.
        before: ‖Δ‖.
        apart: ‖W_A − W_B‖.
        base_norm: ‖W_A‖.
        lost: ‖(Δ + W_A − W_B) − Δ′‖.
        added: rank of what was added.
    """

    path: str
    delta: LayerDelta
    before: float
    apart: float
    base_norm: float
    lost: float
    added: int


@takes_references(adapter="adapter", source="model", target="model")
def rebase_adapter(  # noqa: PLR0913 - one keyword for each option of the command
    adapter: PathLike,
    output: PathLike | None,
    *,
    source: PathLike,
    target: PathLike,
    rank: int,
    total_rank: int | None = None,
    to: str | None = None,
    exact: bool = False,
    dtype: str = "keep",
    device: str = "cpu",
    arch: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write ``adapter``, made for base ``source``, as one for base ``target``.

    Only layers that the adapter changes are carried; tensors that it replaces stay as they are.

    Args:
        adapter: an adapter file or folder in any format, of changes with exact factors.
        output: a file or folder; None with rank 0, which writes nothing.
        source: the base it was made for.
        target: the base it shall fit.
        rank: k, of what is added to each layer.
        total_rank: cut each layer's sum to this rank, optimally.
        to: the format; by default the adapter's own.
        exact: compute dense SVDs.
        dtype: see ``convert_adapter``; ``keep`` gives new factors float32.
        device: see ``extract_adapter``.
        arch: the architecture, where the files do not tell.
        overwrite: replace an existing output.
        dry_run: compute and report, write nothing.
        progress: called with the bytes just compared and those of the whole job.

    Raises:
        MatchError: bases of different shapes, or an adapter that fits one of them not at all.
        UnsupportedError: changes without exact factors (DoRA ...), quantised bases.
        OptionError: a negative rank, or none of anything to do.
        InputError, OutputError: files that cannot be used or written.
    """
    wish = _Wish(rank, total_rank, exact)
    _check(wish, output)
    compute = resolve_compute(device)
    found, loaded = open_adapter(adapter)
    chosen = get_written_format(to or found.name)
    bases = [open_base(path) for path in (source, target)]
    _check_shapes(*bases)
    plain = _with_factors(loaded)
    _check_rank(plain, wish)
    rows = [locate_layers(loaded, list(plain), one, arch, called=str(adapter)) for one in bases]
    _check_output(output, chosen, [adapter, *bases], overwrite)
    jobs = [Job(path, elements(plain[path].weight_shape)) for path in plain]
    every = 4 * sum(job.elements for job in jobs)
    done = (lambda job: progress(4 * job.elements, every)) if progress is not None else None
    work = partial(_carry, plain=plain, rows=rows, wish=wish, device=compute.device)
    layers = list(in_threads(jobs, work, compute, done))
    if rank and not any(one.apart for one in layers):
        raise MatchError(
            f"{source} and {target} do not differ in any layer that the adapter changes",
            hint="the adapter fits both as it is",
        )
    changed = {one.path: one.delta for one in layers if one.added}
    result = replace(loaded, layers={**loaded.layers, **changed})
    rounded: list[Note] = []
    if changed and output is not None:
        result = _converted(result, chosen, Path(target), arch) if to else result
        rounded = rounding_notes(result, dtype)
        result = cast_adapter(result, dtype)
        if not dry_run:
            save_adapter(result, output, format=chosen.name, overwrite=overwrite)
    written = str(output) if changed and output is not None and not dry_run else None
    inputs = (str(adapter), str(source), str(target))
    facts, items = _facts(layers, result), tuple(_item(one) for one in layers)
    notes = (*_notes(loaded, layers), *rounded)
    return Report("rebase", inputs, written, facts, items, notes, dry_run or not rank)


def _converted(adapter: Adapter, chosen: Format, base: Path, arch: str | None) -> Adapter:
    """Return the adapter in a format whose names may depend on the base that it now fits."""
    names = adapter.naming, chosen.naming
    gguf = open_gguf_base(base) if concerns_gguf(*names) else None
    is_mlx = concerns_mlx(*names) and base.suffix != ".gguf"
    mlx = open_mlx_base(base) if is_mlx else None
    return convert_value(adapter, chosen, arch=arch, language_base=gguf, mlx_base=mlx).adapter


def _check(wish: _Wish, output: PathLike | None) -> None:
    if wish.rank < 0:
        raise OptionError(f"--rank {wish.rank}: give 0 to measure only, or more")
    if wish.total_rank is not None and wish.total_rank < 1:
        raise OptionError(f"--total-rank {wish.total_rank}: the smallest rank is 1")
    if wish.total_rank is not None and not wish.rank:
        raise OptionError(
            "--total-rank cuts what --rank adds, and --rank 0 adds nothing",
            hint="`loratools resize` cuts an adapter by itself",
        )
    if wish.rank and output is None:
        raise OptionError("no output is named", hint="give -o OUT, or --rank 0 to measure only")
    if not wish.rank and output is not None:
        raise OptionError(
            "with --rank 0 nothing is written", hint="leave -o out, or give the rank to carry"
        )


def _check_rank(plain: Mapping[str, LoRA], wish: _Wish) -> None:
    """Raise OptionError for a rank above the shape of every layer."""
    most = max(min(matrix_shape(lora)) for lora in plain.values())
    for word, rank in (("rank", wish.rank), ("total-rank", wish.total_rank or 0)):
        if rank > most:
            raise OptionError(
                f"--{word} {rank} is above the shape of every layer", hint=f"give at most {most}"
            )


def _check_shapes(source: BaseModel, target: BaseModel) -> None:
    """Raise MatchError for two models of which the larger part of the names differs in shape."""
    for base in (source, target):
        refuse_quantised(base)
    both = source.tensors.keys() & target.tensors.keys()
    other = sorted(n for n in both if source.tensors[n].shape != target.tensors[n].shape)
    if other:
        lines = [
            f"  {name}: {_shape(source, name)} and {_shape(target, name)}"
            for name in other[:_SHOWN]
        ]
        lines += [f"  ... and {len(other) - _SHOWN} more"] if len(other) > _SHOWN else []
        raise MatchError(
            f"{source.path} and {target.path} are of different shapes:\n" + "\n".join(lines),
            hint="an adapter can be carried between bases of one shape only",
        )


def _shape(base: BaseModel, name: str) -> str:
    return "x".join(map(str, base.tensors[name].shape))


def _with_factors(adapter: Adapter) -> dict[str, LoRA]:
    """Return the layers that have exact factors.

    Raises UnsupportedError for layers whose change depends on the base, and if no layer has any.
    """
    plain = {}
    for path, delta in adapter.layers.items():
        if not isinstance(delta, AdditiveDelta):
            raise UnsupportedError(
                f"{path}: what a {delta.kind} layer changes depends on the base",
                hint="merge it into its own base, extract a LoRA from the result, and rebase that",
            )
        lora = delta.low_rank()
        if lora is not None:
            plain[path] = lora
    if not plain:
        raise UnsupportedError(
            "no layer of the adapter has low-rank factors", hint="its changes fit any base as is"
        )
    return plain


def _check_output(
    output: PathLike | None,
    target: Format,
    given: Sequence[PathLike | BaseModel],
    overwrite: bool,
) -> None:
    """Refuse a destination before the work."""
    if output is None:
        return
    files: list[Path] = []
    for one in given:
        files += one.files if isinstance(one, BaseModel) else (find_weights(Path(one)),)
    folder = target.is_folder(output)
    check_destination(Path(output), folder=folder, overwrite=overwrite, inputs=files)


# ── one layer ────────────────────────────────────────────────────────────────────────────────


def _carry(
    path: str, *, plain: Mapping[str, LoRA], rows: Sequence[BaseRows], wish: _Wish, device: str
) -> _Layer:
    lora = plain[path]
    theirs = rows[0].weight(path).flatten(1)
    base_norm = float(theirs.norm(dtype=torch.float64))
    apart = theirs.sub_(rows[1].weight(path).flatten(1))
    norm = float(apart.norm(dtype=torch.float64))
    if not math.isfinite(norm):
        raise NonFiniteError(
            f"{path}: NaN or infinity in the difference of the bases",
            hint="one of them is damaged; fetch it again",
        )
    before = abs(lora.scale) * product_norm(*lora.factors())
    if norm == 0 or wish.rank == 0:
        return _Layer(path, lora, before, norm, base_norm, norm, 0)
    kept = truncated_svd(apart.to(device), wish.rank, exact=wish.exact)
    total = _sum(lora, kept)
    if wish.total_rank is None or total.rank <= wish.total_rank:
        return _Layer(path, total, before, norm, base_norm, kept.error * norm, kept.rank)
    cut = _cut(total, wish.total_rank)
    lost = _distance(apart, lora, cut)
    return _Layer(path, cut, before, norm, base_norm, lost, kept.rank)


def _sum(lora: LoRA, kept: Truncation) -> LoRA:
    """Return Δ + USV with the factors side by side, in float32, at the layer's own scale."""
    scale = lora.scale or 1.0
    more = lora_from_svd(kept.svd, lora.weight_shape, scale=scale, role=lora.role)
    if not lora.scale:
        return replace(more, bias=None)
    down = torch.cat([lora.down.to(torch.float32), more.down])
    up = torch.cat([lora.up.to(torch.float32), more.up], dim=1)
    return replace(lora, down=down, up=up, alpha=scale * len(down))


def _cut(lora: LoRA, rank: int) -> LoRA:
    """Return the best approximation of a rank, at the same scale."""
    up, down = lora.factors()
    found = factored_svd(up * lora.scale, down).leading(rank)
    cut = lora_from_svd(found, lora.weight_shape, scale=lora.scale, role=lora.role)
    return replace(cut, bias=lora.bias)


def _distance(apart: Tensor, lora: LoRA, cut: LoRA) -> float:
    """Return ‖Δ + (W_A − W_B) − Δ′‖."""
    for one, sign in ((lora, 1.0), (cut, -1.0)):
        up, down = one.factors(apart.device)
        apart = torch.addmm(apart, up, down, alpha=sign * one.scale)
    return float(apart.norm(dtype=torch.float64))


# ── the report ───────────────────────────────────────────────────────────────────────────────


def _facts(layers: Sequence[_Layer], result: Adapter) -> dict[str, Json]:
    apart, lost = (_root(getattr(one, name) for one in layers) for name in ("apart", "lost"))
    carried = any(one.added for one in layers)
    base, before = (_root(getattr(one, name) for one in layers) for name in ("base_norm", "before"))
    return {
        "layers": len(layers),
        "layers_apart": sum(one.apart > 0 for one in layers),
        "relative_distance": apart / base if base else math.inf,
        "distance_to_change": apart / before if before else math.inf,
        "share_captured": 1 - (lost / apart) ** 2 if carried else None,
        "relative_error": lost / apart if carried else None,
        "parameters": result.parameters,
    }


def _root(values: Iterator[float]) -> float:
    return math.sqrt(sum(value**2 for value in values))


def _item(one: _Layer) -> dict[str, Json]:
    return {
        "module": one.path,
        "shape": list(one.delta.weight_shape),
        "rank": getattr(one.delta, "rank", None),
        "added": one.added,
        "norm": one.before,
        "distance_of_bases": one.apart,
        "relative_distance": one.apart / one.base_norm if one.base_norm else None,
        "share_captured": 1 - (one.lost / one.apart) ** 2 if one.apart else 1.0,
    }


def _notes(adapter: Adapter, layers: Sequence[_Layer]) -> Iterator[Note]:
    for word in adapter.notes:
        yield Note(word)
    left = adapter.layers.keys() - {one.path for one in layers}
    if left:
        yield Note(
            f"{len(left)} layers without low-rank factors stay as they are: {min(left)} ...",
            "warning",
        )
    if _root(one.lost for one in layers) > _root(one.apart for one in layers):
        yield Note(
            "the cut to --total-rank loses more than is carried: the adapter as it was is nearer "
            "to what it did on its own base",
            "warning",
        )
    if adapter.extras:
        yield Note(f"{len(adapter.extras)} full tensors stay as they are", "warning")
