"""Every cell of the table formats × operations: what it promises works, the rest is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratools import (
    compare_adapters,
    compose_adapters,
    convert_adapter,
    extract_adapter,
    load_adapter,
    merge_into_base,
    rebase_adapter,
    resize_adapter,
    summarize,
    unmerge_from_base,
)
from loratools.adapter import Adapter
from loratools.deltas import Replacement
from loratools.demo import make_adapter, make_base
from loratools.errors import LoratoolsError, UnsupportedError
from loratools.formats import FORMATS, FormatRow, get_format
from loratools.publishing.contents import read_contents
from tests.docs.format_tables import OPERATIONS
from tests.strategies import make_tensor

GOLDEN = Path(__file__).parents[1] / "golden"
WRITTEN = [row for row in FORMATS if row.writes]


@dataclass(frozen=True)
class Case:
    """A tiny adapter in a format, a base that it fits, and where the adapters lie."""

    adapter: Path
    base: Path
    arch: str | None
    folder: Path

    @property
    def language(self) -> Path | None:
        """The base where GGUF's names depend on it."""
        return self.base if self.arch is None else None

    def like_base(self, path: Path) -> Path:
        """Return the path for a model in a file, if the base is one, or in a folder."""
        return path.with_suffix(self.base.suffix)


# ── adapters and bases ───────────────────────────────────────────────────────────────────────

READ_ONLY: Mapping[str, tuple[str, str, str]] = {
    # golden file, architecture, part of the keys that no base or no other format takes
    "diffusers-old": ("attn_procs.safetensors", "sd1", ""),
    "xlabs": ("flux.safetensors", "flux1", "single_blocks."),
    "bfl-control": ("canny.safetensors", "flux1", ""),
    "peft-dump": ("flux.safetensors", "flux1", ""),
    "cloneofsimo": ("text.safetensors", "sd1", "<"),
}


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Return format → its case."""
    folder = tmp_path_factory.mktemp("cases")
    return {case[0]: case[1] for case in (*_language(folder), *_images(folder), *_old(folder))}


def _language(folder: Path) -> Iterator[tuple[str, Case]]:
    base, adapter = folder / "base", folder / "adapter"
    make_base(base)
    make_adapter(adapter)
    convert_adapter(adapter, folder / "adapter.gguf", to="gguf", base=base)
    yield "peft", Case(adapter, base, None, folder)
    yield "gguf", Case(folder / "adapter.gguf", base, None, folder)
    convert_adapter(adapter, folder / "mlx", to="mlx")
    yield "mlx", Case(folder / "mlx", base, None, folder)


def _images(folder: Path) -> Iterator[tuple[str, Case]]:
    source = GOLDEN / "comfyui" / "ai_toolkit.safetensors"
    base = _base_of(load_adapter(source), folder / "flux")
    for name in ("kohya", "comfyui", "diffusers"):
        adapter = folder / f"{name}.safetensors"
        convert_adapter(source, adapter, to=name, arch="flux1")
        yield name, Case(adapter, base, "flux1", folder)


def _old(folder: Path) -> Iterator[tuple[str, Case]]:
    for name, (file, arch, left) in READ_ONLY.items():
        source, adapter = GOLDEN / name / file, folder / f"{name}-adapter.safetensors"
        with safe_open(source, "pt") as opened:
            words = opened.metadata()
        tensors = {key: t for key, t in load_file(source).items() if not left or left not in key}
        save_file(tensors, adapter, words)
        yield name, Case(adapter, _base_of(load_adapter(adapter), folder / name), arch, folder)


def _base_of(adapter: Adapter, path: Path) -> Path:
    """Write random weights for all that an adapter changes: one file, or a component's folder."""
    tensors: dict[str, torch.Tensor] = {}
    for number, (name, delta) in enumerate(adapter.layers.items()):
        inner = name if adapter.naming == "transformers" else name.partition(".")[2]
        tensors[f"{inner}.weight"] = make_tensor(number, *delta.weight_shape)
        if delta.bias_change is not None:
            tensors[f"{inner}.bias"] = torch.zeros_like(delta.bias_change)
    for name, extra in adapter.extras.items():
        assert isinstance(extra, Replacement)
        tensors[name.partition(".")[2]] = torch.zeros_like(extra.value)
    if adapter.naming == "original":
        save_file(tensors, path.with_suffix(".safetensors"))
        return path.with_suffix(".safetensors")
    path.mkdir()
    text = next(iter(adapter.layers)).startswith("text_encoder")
    file = "model.safetensors" if text else "diffusion_pytorch_model.safetensors"
    save_file(tensors, path / file, {"format": "pt"})
    (path / "config.json").write_text("{}")
    return path


# ── operations ───────────────────────────────────────────────────────────────────────────────


def look(case: Case, row: FormatRow, out: Path) -> None:
    assert summarize(case.adapter).facts["format"] == row.name
    assert_same(case, case.adapter, case.adapter)


def assert_same(case: Case, first: Path, second: Path, tolerance: float = 1e-5) -> None:
    """Assert that two adapters change every weight alike, up to a relative error."""
    report = compare_adapters(
        first, second, arch=case.arch, base=case.language, tolerance=tolerance
    )
    assert report.facts["same"], report.facts


def fold(case: Case, row: FormatRow, out: Path) -> None:
    merged, restored = case.like_base(out / "merged"), case.like_base(out / "restored")
    report = merge_into_base(case.base, case.adapter, merged, arch=case.arch)
    assert report.facts["tensors_changed"]
    # What it replaced cannot be subtracted.
    base = case.base if row.name == "bfl-control" else None
    unmerge_from_base(merged, case.adapter, restored, arch=case.arch, base=base)


def take(case: Case, row: FormatRow, out: Path) -> None:
    """Convert to some written format, and compose with itself."""
    again = {"to": "peft" if case.arch is None else "comfyui", "arch": case.arch}
    convert_adapter(case.adapter, out / "converted", base=case.language, **again)
    assert_same(case, out / "converted", case.adapter)
    weighted = [case.adapter, (case.adapter, 0.5)]
    compose_adapters(weighted, out / "composed", base=case.base, **again)


def give(case: Case, row: FormatRow, out: Path) -> None:
    """Convert and compose an adapter in another format."""
    image = "comfyui.safetensors" if row.name == "kohya" else "kohya.safetensors"
    language = "adapter.gguf" if row.name == "peft" else "adapter"
    source = case.folder / (language if case.arch is None else image)
    again = {"to": row.name, "arch": case.arch and "flux1", "base": case.language}
    convert_adapter(source, out / "converted", **again)
    assert_same(case, out / "converted", source)
    compose_adapters([source, source], out / "composed", **again)
    for result in ("converted", "composed"):
        assert summarize(out / result).facts["format"] == row.name


def change(case: Case, row: FormatRow, out: Path) -> None:
    """Resize, and carry to another base."""
    resize_adapter(case.adapter, out / "resized", rank=1)
    other = case.like_base(out / "other")
    merge_into_base(case.base, case.adapter, other, arch=case.arch)
    bases = {"source": case.base, "target": other}
    rebase_adapter(case.adapter, out / "rebased", **bases, rank=1, arch=case.arch)
    for result in ("resized", "rebased"):
        assert summarize(out / result).facts["format"] == row.name


def find(case: Case, row: FormatRow, out: Path) -> None:
    tuned = case.like_base(out / "tuned")
    merge_into_base(case.base, case.adapter, tuned, arch=case.arch)
    extract_adapter(case.base, tuned, out / "found", rank=4, to=row.name, arch=case.arch)
    # What float32 lost in the merged weight.
    assert_same(case, out / "found", case.adapter, tolerance=1e-4)
    assert summarize(out / "found").facts["format"] == row.name


TRIALS: Mapping[str, Callable[[Case, FormatRow, Path], None]] = {
    "`inspect`, `diff`": look,
    "`merge`, `unmerge`": fold,
    "`convert`, `compose` from": take,
    "`convert`, `compose` to": give,
    "`resize`, `rebase`": change,
    "`extract` to": find,
}


def test_every_column_is_tried() -> None:
    assert TRIALS.keys() == OPERATIONS.keys()


@pytest.mark.parametrize("column", TRIALS)
@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_the_cell_is_true(
    cases: dict[str, Case], row: FormatRow, column: str, tmp_path: Path
) -> None:
    refusal = refused(lambda: TRIALS[column](cases[row.name], row, tmp_path))
    assert (refusal is None) == OPERATIONS[column](row), refusal


def refused(work: Callable[[], object]) -> str | None:
    """Return why the work was refused, or None if it was done; a refusal says the next step."""
    try:
        work()
    except LoratoolsError as error:
        return f"{error.message} Hint: {error.hint}" if error.hint else ""
    return None


@pytest.mark.parametrize("target", WRITTEN, ids=lambda row: row.name)
@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_conversions_go_between_formats_of_the_same_models(
    cases: dict[str, Case], row: FormatRow, target: FormatRow, tmp_path: Path
) -> None:
    """Of each format the adapter at hand, which is of a language or of an image model."""
    case = cases[row.name]
    models = "language" if case.arch is None else "image"
    assert models in row.models
    again = {"to": target.name, "arch": case.arch, "base": case.language}
    # It replaces norms, which kohya's syntax has no word for.
    again |= {"allow_loss": row.name == "bfl-control"}
    refusal = refused(lambda: convert_adapter(case.adapter, tmp_path / "converted", **again))
    assert (refusal is None) == (models in target.models), refusal


def test_an_image_model_is_not_extracted_to_gguf(cases: dict[str, Case], tmp_path: Path) -> None:
    """It was: a file with names that no tool reads."""
    case = cases["comfyui"]
    tuned, out = case.like_base(tmp_path / "tuned"), tmp_path / "out.gguf"
    merge_into_base(case.base, case.adapter, tuned, arch=case.arch)
    with pytest.raises(UnsupportedError, match="no names in GGUF"):
        extract_adapter(case.base, tuned, out, rank=1, to="gguf", arch=case.arch)
    assert not out.exists()


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_files_are_published_under_the_name(cases: dict[str, Case], row: FormatRow) -> None:
    record = get_format(row.name)
    assert fnmatch(read_contents(cases[row.name].adapter).weights, row.file)
    assert row.file == (record.weights_file or f"*.{record.container}")


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
def test_what_extract_writes_is_written(row: FormatRow) -> None:
    assert row.writes or not row.extracts
    assert row.writes != get_format(row.name).read_only
