"""Which architecture an adapter or a base is of: exact lookups, then widths, then metadata."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from loratools.adapter import Adapter
from loratools.errors import UnknownArchitectureError
from loratools.keymaps.architecture import Architecture
from loratools.keymaps.base_names import stem
from loratools.keymaps.near_names import nearest_of_all
from loratools.keymaps.registry import ARCHITECTURES
from loratools.keymaps.vocabulary import vocabulary_of
from loratools.suggest import counted, did_you_mean

Widths = Mapping[str, int | None]
"""Module path → number of inputs of its weight, ``None`` where it has none."""

_PLACEHOLDER = re.compile(r"\{\w+\}")
# Names that language models have too: alone they tell nothing.
_LANGUAGE = re.compile(r"(?:^|\.)layers\.\d+\.(?:self_attn|mlp)\.\w+_proj$")
# Names that no language model and no plain vision transformer has.
_DIFFUSION = re.compile(
    r"(?:^|\.)(?:(?:single_)?transformer_blocks|(?:double|single|joint)_blocks"
    r"|(?:double|single)_layers|(?:double|single)_stream_blocks|(?:noise|context)_refiner"
    r"|(?:down|up|input|output)_blocks|mid_block|middle_block|adaLN_modulation\w*"
    r"|to_[qkv]|to_out|cross_attn|txtfusion|text_fusion)(?:\.|$)"
)
_SAMPLE = 64
_SHOWN = 4
_LEAST = 0.5
"""Share of an adapter's modules that an architecture must know to be the one."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How well an architecture explains the names: more known first, then fewer contradictions."""

    architecture: Architecture
    known: int
    contradicted: int

    @property
    def rank(self) -> tuple[int, int]:
        """Key by which the best fit is the greatest."""
        return self.known, -self.contradicted


def find_architecture(word: str) -> Architecture:
    """Return the architecture a user names; raises UnknownArchitectureError."""
    for architecture in ARCHITECTURES:
        if architecture.id == word.lower():
            return architecture
    known = [architecture.id for architecture in ARCHITECTURES]
    raise UnknownArchitectureError(
        f"no architecture is called {word!r}", hint=did_you_mean(word.lower(), known)
    )


def detect_architecture(adapter: Adapter, arch_hint: str | None = None) -> Architecture:
    """Return the architecture whose modules the adapter changes.

    Args:
        adapter: as its format read it, in any naming.
        arch_hint: the user's word, which settles it.

    Raises:
        UnknownArchitectureError: none knows at least half of the modules, or several fit equally
            well; the message names the best.
    """
    word = arch_hint or adapter.arch
    if word is not None:
        return find_architecture(word)
    best = _best(adapter)
    if len(best) > 1 and _name_alike([fit.architecture for fit in best], adapter):
        best = best[:1]
    if not best and adapter.naming != "transformers":
        _refuse_names(list(adapter.layers))
    return _only(best, len(adapter.layers), "adapter")


def _refuse_names(paths: Sequence[str]) -> NoReturn:
    """Raise UnknownArchitectureError for names of which no architecture knows one."""
    shown = list(paths[:_SHOWN])
    words = [vocabulary_of(architecture) for architecture in ARCHITECTURES]
    near = [nearest_of_all(words, path) for path in shown]
    lines = [
        f"  {path}" + (f" (nearest: {', '.join(names)})" if names else "")
        for path, names in zip(shown, near, strict=True)
    ]
    lines += [f"  ... and {len(paths) - _SHOWN} more"] if len(paths) > _SHOWN else []
    raise UnknownArchitectureError(
        f"the adapter's {counted(len(paths), 'module')} fit no known architecture:\n"
        + "\n".join(lines),
        hint="names of a model that loratools does not know can be written in the format that the "
        "file is in, and in no other",
    )


def possible_architectures(adapter: Adapter) -> list[Architecture]:
    """Return the architectures that explain at least half of the modules, and equally well."""
    best = _best(adapter)
    return [fit.architecture for fit in best if fit.known >= _LEAST * len(adapter.layers)]


def certain_architecture(adapter: Adapter) -> Architecture | None:
    """Return the architecture if it knows every module, and one has a name of such models alone.

    For adapters whose names state no network (PEFT's): most of those are of language models.
    """
    if not any(_DIFFUSION.search(path) for path in adapter.layers):
        return None
    try:
        found = detect_architecture(adapter)
    except UnknownArchitectureError:
        return None
    words = vocabulary_of(found)
    return found if all(words.look_up(path) for path in adapter.layers) else None


def owners_of(paths: Iterable[str]) -> list[Architecture]:
    """Return the architectures that know all of these modules."""
    widths: dict[str, int | None] = dict.fromkeys(paths)
    fits = best_fits(widths, ARCHITECTURES)
    return [fit.architecture for fit in fits if fit.known == len(widths)]


def _best(adapter: Adapter) -> list[Fit]:
    """Return the fits between which nothing in the adapter decides."""
    widths = {path: _inputs(delta.weight_shape) for path, delta in adapter.layers.items()}
    best = best_fits(widths, ARCHITECTURES)
    if adapter.naming == "transformers":
        best = [fit for fit in best if _knows_more_than_language(fit.architecture, widths)]
    breakers: tuple[Callable[[Architecture], bool], ...] = (
        lambda arch: _is_flattened_so(arch, widths),
        lambda arch: _is_told(arch, adapter.metadata),
        lambda arch: _has_its_blocks(arch, adapter),
        lambda arch: _signature_in(arch, widths, by_diffusers=_are_supersets(arch, best)),
    )
    for shows in breakers:
        if len(best) > 1:
            best = [fit for fit in best if shows(fit.architecture)] or best
    return best


def _knows_more_than_language(architecture: Architecture, paths: Iterable[str]) -> bool:
    words = vocabulary_of(architecture)
    return any(words.look_up(path) for path in paths if not _LANGUAGE.search(path))


def _has_its_blocks(architecture: Architecture, adapter: Adapter) -> bool:
    """Return whether the last blocks that the adapter changes are the architecture's last."""
    words = vocabulary_of(architecture)
    hits = words.resolve(adapter.layers, adapter.naming).values()
    paths = [hit.paths[0] for hit in hits if hit is not None and hit.paths]
    last: dict[str, int] = {}
    for path in paths:
        stack, _, rest = path.partition(".")
        number = rest.partition(".")[0]
        if number.isdigit():
            last[stack] = max(last.get(stack, 0), int(number) + 1)
    counts = dict(architecture.blocks)
    known = [stack for stack in last if stack in counts]
    return bool(known) and all(last[stack] == counts[stack] for stack in known)


def _name_alike(candidates: Sequence[Architecture], adapter: Adapter) -> bool:
    """Return whether every candidate gives these modules the same names and layout everywhere.

    FLUX.1 and Chroma do for adapters of attention layers alone, the commonest kind; which one is
    meant then decides no name. Where the widths themselves differ (SD1 and SD2), it is a question.
    """
    if not all(candidate.blocks for candidate in candidates):
        return False
    spellings = [_spellings(candidate, adapter) for candidate in candidates]
    return all(spelling == spellings[0] for spelling in spellings)


def _spellings(architecture: Architecture, adapter: Adapter) -> list[object]:
    words = vocabulary_of(architecture)
    found: list[object] = []
    for hit in words.resolve(adapter.layers, adapter.naming).values():
        if hit is None:
            return [architecture.id]
        one = hit.component
        originals = words.names_of(one).rowset("original").parts
        rows = [
            (row, place, one.flattens)
            for path in hit.paths
            for (row, place), _ in [originals.find(path) or ((None, 0), {})]
        ]
        found.append((one.name, one.original, one.kohya[0], hit.paths, rows))
    return found


def detect_base(shapes: Mapping[str, Sequence[int]]) -> Architecture:
    """Return the architecture of a checkpoint, from its tensors' names and shapes.

    Raises:
        UnknownArchitectureError: none has all its decisive modules there, or several have.
    """
    widths = {stem(n): _inputs(shape) for n, shape in shapes.items() if not n.endswith(".bias")}
    present = [a for a in ARCHITECTURES if _signature_in(a, widths, whole=True)]
    return _only(best_fits(widths, present), len(widths), "base", share=0)


def best_fits(widths: Widths, architectures: Iterable[Architecture]) -> list[Fit]:
    """Return the architectures that explain the modules best; several where they do so equally."""
    step = max(1, len(widths) // _SAMPLE)
    sample = dict(list(widths.items())[::step])
    tried = [_fit(architecture, sample) for architecture in architectures]
    most = max((fit.known for fit in tried), default=0)
    # What knows less than half as many of a sample is no candidate for the whole.
    fits = [_fit(fit.architecture, widths) for fit in tried if fit.known * 2 >= most > 0]
    top = max((fit.rank for fit in fits), default=None)
    return [fit for fit in fits if fit.rank == top]


def _fit(architecture: Architecture, widths: Widths) -> Fit:
    words = vocabulary_of(architecture)
    known = contradicted = 0
    for path, width in widths.items():
        inputs = words.inputs_of(path)
        known += inputs is not None
        contradicted += bool(inputs) and width is not None and width not in (inputs or ())
    return Fit(architecture, known, contradicted)


def _only(best: list[Fit], total: int, what: str, share: float = _LEAST) -> Architecture:
    if not best or best[0].known < share * total or not best[0].known:
        near = ", ".join(_describe(fit, total) for fit in best[:_SHOWN])
        raise UnknownArchitectureError(
            f"the {what}'s {counted(total, 'module')} fit no known architecture"
            + (f" (nearest: {near})" if near else ""),
            hint="if it is of an image or video model, say which with --arch: "
            + ", ".join(architecture.id for architecture in ARCHITECTURES),
        )
    if len(best) > 1:
        names = " or ".join(fit.architecture.title for fit in best)
        words = " or ".join(f"--arch {fit.architecture.id}" for fit in best)
        raise UnknownArchitectureError(
            f"the {what}'s modules fit {names} equally well", hint=f"say which it is: {words}"
        )
    return best[0].architecture


def _describe(fit: Fit, total: int) -> str:
    return f"{fit.architecture.title} knows {fit.known} of {total}"


def _inputs(shape: Sequence[int]) -> int | None:
    return shape[1] if len(shape) > 1 else None


def told_architectures(metadata: Mapping[str, str]) -> list[Architecture]:
    """Return the architectures that a file's own words name: none, one or close relatives."""
    return [architecture for architecture in ARCHITECTURES if _is_told(architecture, metadata)]


def _is_told(architecture: Architecture, metadata: Mapping[str, str]) -> bool:
    """Return whether the file's own words name the architecture."""
    version = metadata.get("ss_base_model_version", "").lower()
    spec = metadata.get("modelspec.architecture", "").lower().partition("/")[0]
    own = architecture.modelspec.lower()
    versions = [word.lower() for word in architecture.base_versions]
    return version in versions or (bool(own) and spec.startswith(own))


def _is_flattened_so(architecture: Architecture, paths: Iterable[str]) -> bool:
    """Return whether kohya's flattened names are made of the names it flattens here.

    Other trainers' prefixes (``lycoris_``) say nothing: theirs are diffusers' names always.
    """
    words = vocabulary_of(architecture)
    starts = tuple(f"{names.component.kohya[0]}_" for names in words.components)
    flat = (words.look_up(path) for path in paths if path.startswith(starts))
    return all(
        any(dialect == words.components[place].component.flattens for place, dialect in found)
        for found in flat
        if found
    )


def _are_supersets(architecture: Architecture, fits: Iterable[Fit]) -> bool:
    """Return whether the rivals have the decisive modules too: relatives with more besides."""
    signature = set(architecture.signature)
    rivals = (fit.architecture.components[0].rows for fit in fits)
    return all(signature <= {row.original for row in rows} for rows in rivals)


def _signature_in(
    architecture: Architecture,
    paths: Iterable[str],
    *,
    whole: bool = False,
    by_diffusers: bool = True,
) -> bool:
    """Return whether any of the decisive modules is there, or all of them (a base's).

    What is decisive in the authors' tree may have a common name in diffusers' (``norm1.linear``):
    ``by_diffusers`` says whether that counts.
    """
    words = vocabulary_of(architecture)
    wanted = _signature(architecture)
    count = len(wanted)
    for path in paths:
        for (place, dialect), hit in words.look_up(path).items():
            if place == 0 and (by_diffusers or dialect != "diffusers"):
                wanted.difference_update(hit.paths)
        if not wanted or (not whole and len(wanted) < count):
            return True
    return not wanted


def _signature(architecture: Architecture) -> set[str]:
    """Return diffusers' names of the decisive modules, those of the first block."""
    rows = {row.original: row for row in architecture.components[0].rows}
    parts = (part for name in architecture.signature for part in rows[name].parts)
    return {_PLACEHOLDER.sub("0", part) for part in parts}
