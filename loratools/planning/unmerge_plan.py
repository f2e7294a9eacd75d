"""Planning how adapters are taken out again: copied back from the base, or subtracted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loratools.basemodel import BaseModel, BaseTensor, Pipeline
from loratools.codecs.rounding import STRENGTH
from loratools.errors import MatchError, UnsupportedError
from loratools.formats.module_reading import RESHAPE
from loratools.formats.parameters import is_carried
from loratools.planning.merge_plan import LoadedAdapter, MergePlan, plan_merge
from loratools.planning.networks import share_networks
from loratools.planning.provenance import provenance_of
from loratools.planning.quantising import rounding_of
from loratools.planning.widening import find_left_wide
from loratools.report import Json, Note
from loratools.streaming.blocks import sample
from loratools.streaming.checkpoint import Checkpoint, plan_checkpoint, unchanged, with_words
from loratools.streaming.works import TensorResult, TensorWork
from loratools.tensorfiles.dtypes import DTYPES, torch_dtype

# What a merge may have corrected in config.json.
_CORRECTED = (
    "tie_word_embeddings", "vocab_size", "dtype", "torch_dtype", "in_channels", "out_channels",
    "id2label", "label2id", "num_labels",
)  # fmt: skip
# Words that mean something by being null or absent, and what to write then.
_ABSENT = {
    "tie_word_embeddings": True, "out_channels": None, "id2label": None, "label2id": None,
}  # fmt: skip


def plan_unmerge(
    merged: BaseModel,
    base: BaseModel | None,
    loaded: Sequence[LoadedAdapter],
    arch: str | None = None,
) -> MergePlan:
    """Plan taking the adapters out of one model: copied from ``base`` if there is one."""
    if base is None:
        return plan_subtraction(merged, loaded, arch)
    return MergePlan(plan_restore(merged, base, loaded, arch), {}, ())


def plan_pipeline_unmerge(
    merged: Pipeline,
    base: Pipeline | None,
    loaded: Sequence[LoadedAdapter],
    arch: str | None = None,
) -> Mapping[str, MergePlan]:
    """Plan every network of a pipeline; those that no adapter changes are planned as copies.

    Without adapters every network is taken from the base.

    Raises:
        MatchError: the two pipelines have other networks, or see ``share_networks``.
        UnsupportedError: see ``plan_subtraction``.
    """
    if base is not None and base.components.keys() != merged.components.keys():
        raise MatchError(
            f"{merged.path} has {', '.join(merged.components)}, "
            f"but {base.path} has {', '.join(base.components)}",
            hint="is --base the pipeline that the adapters were merged into?",
        )
    plans = {}
    for name, share in share_networks(merged, loaded, arch).items():
        model = merged.components[name]
        if loaded and not share:
            plans[name] = MergePlan(plan_checkpoint(model, {}), {}, ())
        else:
            original = base.components[name] if base is not None else None
            plans[name] = plan_unmerge(model, original, share, arch)
    return plans


def plan_restore(
    merged: BaseModel, base: BaseModel, loaded: Sequence[LoadedAdapter], arch: str | None = None
) -> Checkpoint:
    """Lay out ``merged`` with everything the adapters touched copied back from ``base``.

    Without adapters every tensor is taken from the base. Tensors that the merge added are
    dropped; tensors whose dtype or shape it changed are restored too.

    Raises:
        MatchError: the two are not the same model.
    """
    if loaded:
        check_merged(merged, base, loaded, arch)
    if base.packed and not merged.packed:
        raise UnsupportedError(
            f"{base.path} is quantised and {merged.path} is not: its tensors have no place there",
            hint="use the base itself, or leave --base out to subtract",
        )
    touched = set(plan_merge(base, loaded, arch=arch).placements) if loaded else set(base.tensors)
    added = {name for name in touched if name not in base.tensors and name in merged.tensors}
    if not loaded:
        added = set(merged.tensors) - set(base.tensors)
    strangers = sorted(set(merged.tensors) - set(base.tensors) - added)
    if strangers:
        raise MatchError(
            f"{merged.path}: has tensors that neither {base.path} nor the adapters explain: "
            + ", ".join(strangers[:4]),
            hint="is --base the model that the adapters were merged into?",
        )
    restored = {
        name: unchanged(tensor)
        for name, tensor in base.tensors.items()
        if name in touched or _looks_different(merged, base, name)
    }
    checkpoint = plan_checkpoint(merged, restored, dropped=added, config=_config_back(merged, base))
    if merged.is_gguf and base.is_gguf:
        return with_words(checkpoint, provenance_of(base, merged))
    return checkpoint


def check_merged(
    merged: BaseModel, base: BaseModel, loaded: Sequence[LoadedAdapter], arch: str | None = None
) -> None:
    """Raise MatchError if ``merged`` does not look like ``base`` with the adapters folded in.

    The first rows of every touched tensor are compared: the change found there must be the
    adapters' change, and nothing else, up to a rounding other than ours.
    """
    nearest, *others = _roundings(base, loaded, arch)
    for name in nearest.placements:
        found = merged.tensors.get(name)
        if found is None or found.shape != nearest.checkpoint.works[name].shape:
            continue
        if not any(_may_be(plan.checkpoint.works[name], found) for plan in (nearest, *others)):
            raise MatchError(
                f"{merged.path}: {name} is not what these adapters make of {base.path}",
                hint="give the adapters and strengths it was merged with, and that base; without "
                "adapters, --base alone takes every tensor from it",
            )


def _roundings(
    base: BaseModel, loaded: Sequence[LoadedAdapter], arch: str | None
) -> Iterator[MergePlan]:
    """Yield the plan of the merge for every way in which it may have rounded to few bits."""
    yield plan_merge(base, loaded, arch=arch)
    if base.is_gguf:
        yield plan_merge(base, loaded, arch=arch, shaping=STRENGTH)


def _may_be(work: TensorWork, found: BaseTensor) -> bool:
    """Return whether the first rows of a tensor are what a work makes, or cannot be compared."""
    # In the type that the merge wrote, which --quant or --dtype may have chosen.
    expected, stored = sample(replace(work, dtype=found.dtype)), sample(unchanged(found))
    if expected is None or stored is None:
        return True
    return _is_same_change(*expected, stored[1], found.dtype)


def _is_same_change(before: Tensor, after: Tensor, stored: Tensor, dtype: str) -> bool:
    # Blocks begin alike, and one may be longer.
    rows = min(before.numel(), stored.numel()) // before.shape[-1]
    before, after = before[:rows], after[:rows]
    stored = stored.flatten()[: before.numel()].view(before.shape)
    change, found = after - before, stored - before
    size = float(change.norm())
    if size == 0:
        return True
    noise = rounding_of(dtype, before) * float(before.norm())
    share = float((change * found).sum()) / size**2
    return abs(share - 1) <= 0.25 + noise / size and float((found - change).norm()) <= max(
        size / 2, 2 * noise
    )


def _looks_different(merged: BaseModel, base: BaseModel, name: str) -> bool:
    ours, theirs = merged.tensors.get(name), base.tensors[name]
    return ours is None or (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape)


def _config_back(merged: BaseModel, base: BaseModel) -> dict[str, Json]:
    if merged.config is None or base.config is None:
        return {}
    words = {name: (merged.config_word(name), base.config_word(name)) for name in _CORRECTED}
    return {
        # A merge writes the tie's flag only to say false where it was true, if not in words.
        name: _ABSENT[name] if before is None else before
        for name, (now, before) in words.items()
        if now != before and (before is not None or name in _ABSENT)
    }


def plan_subtraction(
    merged: BaseModel, loaded: Sequence[LoadedAdapter], arch: str | None = None
) -> MergePlan:
    """Plan W = W' − Σ strength·ΔW.

    Raises:
        UnsupportedError: a change that subtraction cannot undo.
    """
    problems = [line for one in loaded for line in _irreversible(one)]
    if merged.packed:
        problems.insert(
            0, f"  {merged.path}: its weights have few bits, and rounding lost the rest"
        )
    if problems:
        raise UnsupportedError(
            "subtraction cannot take this out again:\n" + "\n".join(problems),
            hint="give the model it was merged into with --base, to copy its tensors back",
        )
    plan = plan_merge(merged, [replace(one, strength=-one.strength) for one in loaded], arch=arch)
    _refuse_rounded(plan)
    modules = [p.module for placements in plan.placements.values() for p in placements]
    text = "keeps its columns; if the merge widened it, only --base narrows it again"
    notes = [Note(text, "warning", name) for name in find_left_wide(merged, modules)]
    return replace(plan, notes=(*plan.notes, *notes))


def _refuse_rounded(plan: MergePlan) -> None:
    """Refuse tensors in blocks of few bits: rounding has taken a part of the change already."""
    works = plan.checkpoint.works
    coded = [name for name in plan.placements if works[name].source.dtype not in DTYPES]
    if coded:
        types = ", ".join(sorted({works[name].source.dtype for name in coded}))
        more = f" and {len(coded) - 1} more" if len(coded) > 1 else ""
        raise UnsupportedError(
            f"{coded[0]}{more}: stored as {types}, from which subtraction cannot restore what "
            "rounding has lost",
            hint="give the model it was merged into with --base: its tensors are copied back, "
            "bit for bit",
        )


def _irreversible(one: LoadedAdapter) -> Iterator[str]:
    kinds = sorted({d.kind for d in one.adapter.layers.values() if not d.additive})
    if kinds:
        yield f"  {one.path}: {', '.join(kinds)} layers depend on the base weight"
    tensors = [name for name in one.adapter.extras if not is_carried(name)]
    widened = [name.removesuffix(RESHAPE) for name in tensors if name.endswith(RESHAPE)]
    if widened:
        yield f"  {one.path}: what it widened would stay so ({', '.join(widened[:4])})"
    if len(tensors) > len(widened):
        names = ", ".join([name for name in tensors if not name.endswith(RESHAPE)][:4])
        yield f"  {one.path}: the tensors it replaced are gone ({names})"


def error_bounds(
    works: Mapping[str, TensorWork], results: Mapping[str, TensorResult]
) -> dict[str, float]:
    """Return for every subtracted tensor a bound on ‖result − original‖ (Frobenius).

    Two roundings stand between them, of W' and of the result, each by at most half a unit in the
    last place of every element: u·(‖W'‖ + ‖result‖) with unit roundoff u. float32 accumulation
    adds the same with its own u.
    """
    bounds = {}
    for name, result in results.items():
        dtype = torch_dtype(works[name].dtype)
        roundoff = torch.finfo(dtype).eps / 2 + torch.finfo(torch.float32).eps
        merged_norm = result.result_norm + result.change_norm
        bounds[name] = roundoff * (merged_norm + result.result_norm)
    return bounds


def bound_notes(
    bounds: Mapping[str, float], results: Mapping[str, TensorResult]
) -> tuple[dict[str, Json], list[Note]]:
    """Return the report's facts and notes about what subtraction may have left behind."""
    bound = sum(value**2 for value in bounds.values()) ** 0.5
    change = sum(result.change_norm**2 for result in results.values()) ** 0.5
    facts = {"error_bound": bound, "change_norm": change}
    note = Note(
        f"subtracted, not restored: the result is within {bound:.3g} of the original weights "
        f"(Frobenius), against a change of {change:.3g}; --base restores them exactly",
        "warning",
    )
    return facts, [note]
