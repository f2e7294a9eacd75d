"""Describing files: one, several, or several beside each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from loratools.adapter import Adapter
from loratools.adapter_io import find_weights, open_adapter
from loratools.basemodel import elements, is_pipeline, open_base, open_pipeline
from loratools.errors import InputError, OptionError, UnknownFormatError
from loratools.hub.sketching import is_sketch
from loratools.hub.taking import takes_references
from loratools.keymaps.detection import find_architecture
from loratools.plots.alignment import draw_alignment
from loratools.plots.files import check_plot, write_plot
from loratools.plots.spectrum import draw_spectrum
from loratools.report import Json, Report
from loratools.spectra.alignment import align
from loratools.spectra.alignment_figures import describe_alignment
from loratools.spectra.figures import spectrum_facts
from loratools.spectra.layers import AdapterSpectrum, measure_spectrum
from loratools.summary.adapters import describe_adapter
from loratools.summary.bases import describe_base, describe_pipeline
from loratools.tensorfiles.file_names import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from loratools.tensorfiles.header import read_header

PathLike = str | os.PathLike[str]

_ADAPTER_WORDS = ("lora", "hada_w", "lokr_w", "dora_scale", "oft_blocks")


@takes_references(path="anything", base="names")
def summarize(
    path: PathLike,
    *,
    base: PathLike | None = None,
    spectrum: bool = False,
    plot: PathLike | None = None,
    overwrite: bool = False,
) -> Report:
    """Describe the adapter, base model or diffusers pipeline at ``path``.

    Args:
        path: an adapter file or folder of any format, a base model, or a pipeline's folder.
        base: the adapter's base, to state its share of the parameters.
        spectrum: add the singular values of every layer's ΔW and what they say.
        plot: draw the spectrum into this ``.png``, ``.svg`` or ``.html`` file.
        overwrite: replace an existing plot.

    Raises:
        InputError: nothing there, or a file that cannot be read (see the subclasses).
        OptionError: a spectrum of what is no adapter, or a plot of an unknown kind.
        OutputError: the plot's destination is refused.
    """
    if plot is not None:
        check_plot(Path(plot), overwrite=overwrite, inputs=[Path(path)])
    where = Path(path)
    found = None if is_pipeline(where) else _open_if_adapter(where)
    if found is None:
        if spectrum or plot is not None:
            raise OptionError(
                f"{path}: a spectrum is of an adapter, and this is none",
                hint="name an adapter, or leave out --spectrum and --plot",
            )
        given = str(path)
        return describe_pipeline(where, given) if is_pipeline(where) else _base(path)
    sizes = _sizes_of(Path(base)) if base else None
    report = describe_adapter(*found, str(path), sizes, values=not is_sketch(where))
    if not spectrum and plot is None:
        return report
    return _with_spectrum(report, found[1], plot, overwrite)


def _base(path: PathLike) -> Report:
    return describe_base(open_base(path), str(path))


def _with_spectrum(
    report: Report, adapter: Adapter, plot: PathLike | None, overwrite: bool
) -> Report:
    measured = measure_spectrum(adapter)
    facts: dict[str, Json] = {"spectrum": spectrum_facts(measured, adapter.naming)}
    if plot is not None:
        facts["plot"] = str(plot)
        _draw(report, measured, adapter.naming, Path(plot), overwrite)
    return replace(report, facts={**report.facts, **facts})


def _draw(
    report: Report, measured: AdapterSpectrum, naming: str, target: Path, overwrite: bool
) -> None:
    source = Path(report.inputs[0])
    build = partial(draw_spectrum, measured, naming, source.name or str(source), report.facts)
    write_plot(build, target, overwrite=overwrite, inputs=[source])


def summarize_files(
    paths: Sequence[PathLike],
    *,
    base: PathLike | None = None,
    spectrum: bool = False,
    alignment: bool = False,
    arch: str | None = None,
    plot: PathLike | None = None,
    overwrite: bool = False,
) -> tuple[Report, ...]:
    """Describe each of several files, and with ``alignment`` how their changes align.

    A file that cannot be read has a report too, which says why: ``what`` is ``unreadable``.

    Args:
        paths: what to describe; at least one, and two adapters for an alignment.
        base: see ``summarize``.
        spectrum: see ``summarize``.
        alignment: add a last report that compares the adapters pairwise.
        arch: the architecture's id, where adapters to align are in different namings and the files
            do not tell.
        plot: draw the alignment if there is one, else the spectrum of the only path.
        overwrite: replace an existing plot.

    Raises:
        InputError: the only path cannot be read, an unknown architecture, or adapters of several.
        OptionError: a plot of several files, an alignment of one.
        OutputError: the plot's destination is refused.
    """
    if arch is not None:
        find_architecture(arch)
    if len(paths) > 1 and plot is not None and not alignment:
        raise OptionError(
            f"a plot shows one adapter, and these are {len(paths)}",
            hint="plot each by itself, or add --alignment to draw how they relate",
        )
    if alignment:
        return _aligned(paths, base, spectrum, arch, plot, overwrite)
    if len(paths) == 1:
        return (summarize(paths[0], base=base, spectrum=spectrum, plot=plot, overwrite=overwrite),)
    return tuple(_summary_or_reason(path, base, spectrum) for path in paths)


def _aligned(
    paths: Sequence[PathLike],
    base: PathLike | None,
    spectrum: bool,
    arch: str | None,
    plot: PathLike | None,
    overwrite: bool,
) -> tuple[Report, ...]:
    if len(paths) < 2:
        raise OptionError("an alignment needs two adapters or more", hint="name another")
    if plot is not None:
        check_plot(Path(plot), overwrite=overwrite, inputs=[Path(path) for path in paths])
    each = tuple(summarize(path, base=base, spectrum=spectrum) for path in paths)
    adapters = [open_adapter(path)[1] for path in paths]
    found = align(adapters, arch)
    names = [str(path) for path in paths]
    report = describe_alignment(found, names)
    if plot is None:
        return (*each, report)
    inputs = [Path(path) for path in paths]
    build = partial(draw_alignment, found, names, report)
    write_plot(build, Path(plot), overwrite=overwrite, inputs=inputs)
    return (*each, replace(report, facts={**report.facts, "plot": str(plot)}))


def _summary_or_reason(path: PathLike, base: PathLike | None, spectrum: bool) -> Report:
    try:
        return summarize(path, base=base, spectrum=spectrum)
    except InputError as error:
        facts = {
            "what": "unreadable",
            "error": type(error).__name__,
            "message": error.message,
            "hint": error.hint,
        }
        return Report("inspect", (str(path),), None, facts)


def _open_if_adapter(path: Path) -> tuple[str, Adapter] | None:
    """Return the format's name and the adapter, or None for what is no adapter."""
    if path.is_dir():
        # A base folder may hold adapters in sub-folders; its own weights say what it is.
        is_adapter = any((path / name).is_file() for name in (*ADAPTER_WEIGHTS, ADAPTER_CONFIG))
        if not is_adapter and (path / "config.json").is_file():
            return None
        path = find_weights(path)
    try:
        found, adapter = open_adapter(path, activated=True)
    except UnknownFormatError:
        if _has_adapter_words(path):
            raise
        # A file that is in no adapter format is described as a base model.
        return None
    return found.name, adapter


def _has_adapter_words(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    names = read_header(path).tensors
    return any(word in name for name in names for word in _ADAPTER_WORDS)


def _sizes_of(path: Path) -> int:
    """Return the number of parameters of a base model or pipeline."""
    models = open_pipeline(path).components.values() if is_pipeline(path) else [open_base(path)]
    return sum(elements(tensor.shape) for model in models for tensor in model.tensors.values())
