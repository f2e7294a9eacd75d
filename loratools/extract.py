"""Extracting an adapter from two versions of a model: the change, tensor by tensor, at low rank.

ΔW = W_tuned − W_base in float32, truncated by a randomised SVD whose error is measured and
certified near the least (``linalg.randomized``); nothing is clamped. What has no low-rank form is
written whole where the format has words for it, else reported with its size.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from loratools.adapter import Adapter
from loratools.adapter_io import save_adapter
from loratools.basemodel import elements, is_pipeline, open_base, open_pipeline
from loratools.compute import resolve_compute
from loratools.conversion import cast_adapter, rounding_notes
from loratools.errors import MatchError, OptionError, UnsupportedError
from loratools.extraction.assembly import assemble, without_lone_biases
from loratools.extraction.changes import (
    Change,
    Family,
    compiled,
    find_family,
    matches,
    plan_changes,
)
from loratools.extraction.factoring import Found, Wish, find_change
from loratools.extraction.model_pair import ModelPair, Opened, pair_models
from loratools.formats import get_row, get_written_format
from loratools.formats.format import Format
from loratools.held import is_held
from loratools.hub.taking import takes_references
from loratools.report import Json, Note, Report
from loratools.streaming.differences import Job, in_threads
from loratools.streaming.rewriting import Progress
from loratools.suggest import nearest
from loratools.tensorfiles.atomic import require_space
from loratools.tensorfiles.destination import check_destination
from loratools.tensorfiles.dtypes import DTYPES

PathLike = str | os.PathLike[str]

_POOR = 0.5
"""Share of the change below which a warning says that little of it has low rank."""

_ROUNDING = 1e-4
"""Relative error up to which float32's rounding decides how it compares with the least."""

_SHOWN = 8


@takes_references(base="model", tuned="model")
def extract_adapter(  # noqa: PLR0913 - one keyword for each option of the command
    base: PathLike,
    tuned: PathLike,
    output: PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    conv_rank: int | None = None,
    to: str | None = None,
    exact: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    full: Sequence[str] = (),
    dtype: str = "keep",
    device: str = "cpu",
    arch: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the difference of two models as an adapter of the first; alpha is the rank (scale 1).

    Args:
        base: a Hugging Face folder, a diffusers pipeline or component folder, or one weights file.
        tuned: the same model after training, with the same tensors.
        output: a file, or a folder where the format is one.
        rank: of every layer, or all that a smaller layer has; with ``energy``, the largest rank.
        energy: the share of each layer's ‖ΔW‖² to capture, in (0, 1], with as small a rank as
            that takes.
        conv_rank: of convolutions with kernels beyond 1, instead of ``rank``.
        to: the format; by default ``peft`` for transformers' models, ``diffusers`` for its
            folders, ``kohya`` for single files of diffusion models.
        exact: compute dense SVDs.
        include: regular expressions; only modules that one is found in.
        exclude: regular expressions; no module that one is found in.
        full: regular expressions; modules whose change is written whole, not factored.
        dtype: ``keep`` (factors in float32, copies as they are), ``fp32``, ``bf16``, ``fp16``.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``auto``.
        arch: the diffusion architecture, where the files do not tell.
        overwrite: replace an existing output.
        dry_run: compute and report, write nothing.
        progress: called with the bytes just read and those of the whole job, from several threads.

    Raises:
        OptionError: neither rank nor energy, one out of range, an unknown format or pattern.
        MatchError: models with other tensors, or without any difference.
        UnsupportedError: quantised weights, a format without names for these models.
        NonFiniteError: NaN or infinity in a difference, naming the tensor.
        OutputError: the destination is refused.
    """
    wish = Wish(rank, energy, conv_rank, exact)
    _check_wish(wish)
    compute = resolve_compute(device)
    opened = [_open(Path(path)) for path in (base, tuned)]
    pair = pair_models(opened[0], opened[1])
    family = find_family(pair, arch)
    target = get_written_format(to or family.format)
    _check_target(family, target)
    changes = plan_changes(pair, family, target, full)
    chosen = _chosen(changes, include, exclude, full)
    _check_rank(chosen, wish)
    _check_output(output, target, opened, overwrite=overwrite)
    jobs = [Job(change, elements(change.pair.shape)) for change in chosen]
    every = sum(_nbytes(job.item) for job in jobs)
    done = partial(_tell, progress, every) if progress is not None else None
    work = partial(find_change, wish=wish, device=compute.device)
    found = [one for one in in_threads(jobs, work, compute, done) if one.norm > 0]
    if not found:
        raise _nothing_changed(opened, len(changes) - len(chosen))
    found = without_lone_biases(found, changes, family, target)
    whole = assemble(found, changes, pair, family, target)
    adapter = cast_adapter(whole, dtype)
    size = sum(tensor.nbytes for tensor in target.write(adapter).tensors.values())
    if not is_held(output):
        require_space(Path(output).parent, size)
    if not dry_run:
        save_adapter(adapter, output, format=target.name, overwrite=overwrite)
    written = None if dry_run else str(output)
    facts = {
        **_facts(adapter, target, found),
        "tensors": len(changes),
        "unchanged": len(chosen) - len(found),
        "excluded": len(changes) - len(chosen),
        "bytes_read": sum(_stored(change) for change in chosen),
        "bytes_written": size,
    }
    notes = [*_notes(adapter, pair, found), *rounding_notes(whole, dtype)]
    items = tuple(_item(one) for one in found)
    return Report("extract", (str(base), str(tuned)), written, facts, items, tuple(notes), dry_run)


def _open(path: Path) -> Opened:
    return open_pipeline(path) if is_pipeline(path) else open_base(path)


def _check_output(
    output: PathLike, target: Format, opened: Sequence[Opened], *, overwrite: bool
) -> None:
    inputs = [file for one in opened for file in one.files]
    folder = target.is_folder(output)
    check_destination(Path(output), folder=folder, overwrite=overwrite, inputs=inputs)


def _check_wish(wish: Wish) -> None:
    if wish.rank is None and wish.energy is None:
        raise OptionError("how much to keep is not said", hint="give --rank N or --energy F")
    for name, value in (("rank", wish.rank), ("conv-rank", wish.conv_rank)):
        if value is not None and value < 1:
            raise OptionError(
                f"--{name} {value}: the smallest rank is 1", hint="give a number of at least 1"
            )
    if wish.energy is not None and not 0 < wish.energy <= 1:
        raise OptionError(
            f"--energy {wish.energy:g} is no share of the change",
            hint="give a number above 0 and at most 1, such as 0.9",
        )


def _check_target(family: Family, target: Format) -> None:
    row = get_row(target.name)
    models = "language" if family.names == "transformers" else "image"
    if models not in row.models:
        raise UnsupportedError(
            f"these models have no names in {target.title}",
            hint="--to peft, or say with --arch which diffusion model they are"
            if models == "language"
            else "--to kohya, comfyui, diffusers, or peft for one network",
        )
    if not row.extracts:
        raise UnsupportedError(
            f"{target.title}: extract does not write this format",
            hint=f"--to peft, then `loratools convert --to {target.name} --base BASE`",
        )


def _chosen(
    changes: Sequence[Change], include: Sequence[str], exclude: Sequence[str], full: Sequence[str]
) -> list[Change]:
    wanted, left = compiled(include), compiled(exclude)
    chosen = [
        change
        for change in changes
        if (not wanted or matches(wanted, change.module)) and not matches(left, change.module)
    ]
    _check_patterns(changes, (("include", wanted), ("exclude", left), ("full", compiled(full))))
    if not chosen:
        raise OptionError(
            "no module is left to extract", hint="check the patterns of --include and --exclude"
        )
    return chosen


def _check_patterns(
    changes: Sequence[Change], said: Sequence[tuple[str, Sequence[re.Pattern[str]]]]
) -> None:
    """Raise OptionError for a pattern that is found in no module."""
    names = list(dict.fromkeys(change.module for change in changes))
    for option, patterns in said:
        for pattern in patterns:
            if not any(pattern.search(name) for name in names):
                near = nearest(pattern.pattern, names) or names[:2]
                raise OptionError(
                    f"--{option} {pattern.pattern!r} is found in no module",
                    hint=f"they are called like {', '.join(near)}",
                )


def _check_rank(chosen: Sequence[Change], wish: Wish) -> None:
    """Raise OptionError for a rank beyond every layer it is for."""
    sides: dict[str, int] = {}
    for change in chosen:
        if change.way == "factors":
            which = wish.word_for(change)
            sides[which] = max(sides.get(which, 0), change.side)
    for word, side in sides.items():
        value = wish.conv_rank if word == "conv-rank" else wish.rank
        if value is not None and value > side:
            raise OptionError(
                f"--{word} {value} is beyond the largest layer, whose rank is at most {side}",
                hint=f"give at most {side}",
            )


def _nothing_changed(opened: Sequence[Opened], excluded: int) -> MatchError:
    besides = f" outside the {excluded} excluded" if excluded else ""
    return MatchError(
        f"nothing changed: no tensor of {opened[1].path} differs from {opened[0].path}{besides}",
        hint="is this the tuned model, and were its weights saved?",
    )


def _nbytes(change: Change) -> int:
    return 4 * elements(change.pair.shape)


def _stored(change: Change) -> int:
    """Return the bytes of a tensor in both models."""
    pair = change.pair
    return sum(elements(one.shape) * DTYPES[one.dtype] // 8 for one in (pair.base, pair.tuned))


def _tell(progress: Progress, every: int, job: Job[Change]) -> None:
    progress(_nbytes(job.item), every)


# ── the report ───────────────────────────────────────────────────────────────────────────────


def _facts(adapter: Adapter, target: Format, found: Sequence[Found]) -> dict[str, Json]:
    whole = _square(found)
    lost = sum(one.lost**2 for one in found)
    factored = [one for one in found if one.rank is not None]
    ranks = [one.rank for one in factored if one.rank is not None]
    omitted = [one for one in found if one.change.way == "none"]
    pairs = [(one.error, one.least) for one in factored if one.error and one.least]
    certified = [error / least for error, least in pairs if error > _ROUNDING]
    facts: dict[str, Json] = {
        "format": target.name,
        "architecture": adapter.arch,
        "tensors_changed": len(found),
        "factored": len(factored),
        "written_whole": len(found) - len(factored) - len(omitted),
        "left_out": len(omitted),
        "rank": _range(ranks),
        "parameters": adapter.parameters,
        "relative_change": _ratio(whole, sum(one.base_norm**2 for one in found)),
        "share_captured": 1 - lost / whole,
        "relative_error": _ratio(lost, whole),
        "error_to_least": max(certified, default=None),
    }
    return facts


def _square(found: Sequence[Found]) -> float:
    return sum(one.norm**2 for one in found)


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else math.inf


def _range(ranks: Sequence[int]) -> Json:
    if not ranks:
        return None
    return ranks[0] if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}"


def _item(one: Found) -> Mapping[str, Json]:
    change = one.change
    return {
        "tensor": change.pair.full_name,
        "module": change.module,
        "kind": change.kind,
        "written": _WAYS[change.way],
        "shape": list(change.pair.shape),
        "rank": one.rank,
        "norm": one.norm,
        "relative_change": one.norm / one.base_norm if one.base_norm else None,
        "share_captured": 1 - (one.lost / one.norm) ** 2,
        "relative_error": one.error,
        "least_error": one.least,
        "method": one.method,
    }


_WAYS = {"factors": "factors", "whole": "whole", "copy": "tuned tensor", "none": "left out"}


def _notes(adapter: Adapter, pair: ModelPair, found: Sequence[Found]) -> list[Note]:
    notes = [Note(word) for word in dict.fromkeys((*pair.notes, *adapter.notes))]
    notes += _omission_notes(found)
    factored = [one for one in found if one.rank is not None]
    kept = _square(factored) - sum(one.lost**2 for one in factored)
    if factored and kept < _POOR * _square(factored):
        share = kept / _square(factored)
        notes.append(
            Note(
                f"only {share:.0%} of the layers' change has this rank: the training was not of "
                "low rank, or the models are further apart than one training",
                "warning",
            )
        )
    notes += _expert_notes(found)
    return notes


def _omission_notes(found: Sequence[Found]) -> list[Note]:
    """Return what is not in the adapter: reasons with their tensors and share of the change."""
    reasons: dict[str, list[Found]] = {}
    for one in found:
        if one.change.way == "none":
            reasons.setdefault(one.change.reason, []).append(one)
    notes = []
    for reason, ones in reasons.items():
        names = [f"{o.change.pair.full_name} (norm {o.norm:.3g})" for o in ones[:_SHOWN]]
        names += [f"and {len(ones) - _SHOWN} more"] if len(ones) > _SHOWN else []
        share = _square(ones) / _square(found)
        notes.append(
            Note(f"left out, {share:.2%} of the change: {reason}: {', '.join(names)}", "warning")
        )
    return notes


def _expert_notes(found: Sequence[Found]) -> list[Note]:
    single = [one for one in found if ".experts." in one.change.module and one.rank is not None]
    if not any(one.change.kind == "linear" for one in single):
        return []
    return [
        Note(
            "the experts are stored one by one, and so are their factors; transformers 5 fuses "
            "experts in memory, where PEFT may not find them"
        )
    ]
