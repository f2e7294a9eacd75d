"""Figures: files that are what their suffix says, complete, and made without a display."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import matplotlib as mpl
import pytest
import torch

from loratools.adapter import Adapter
from loratools.deltas import IA3, ExpertLoRA, LayerDelta, LoRA
from loratools.errors import OptionError, OutputError, UnsupportedError
from loratools.plots.alignment import draw_alignment
from loratools.plots.drawing import Drawing, house_style
from loratools.plots.files import check_plot, write_plot
from loratools.plots.grids import grids_of
from loratools.plots.heatmaps import cell_size
from loratools.plots.page import page_of
from loratools.plots.spectrum import draw_spectrum
from loratools.plots.svg import svg_of
from loratools.spectra.alignment import align
from loratools.spectra.alignment_figures import describe_alignment
from loratools.spectra.figures import places_of
from loratools.spectra.layers import measure_spectrum
from loratools.spectra.places import place_of
from tests.strategies import make_tensor

SVG = "{http://www.w3.org/2000/svg}"
FACTS = {"format": "peft", "layers": 3, "ranks": {"2": 3}, "parameters": 60, "delta_norm": 1.5}
HOSTILE = "a $x$ <b>&amp;\"' \x07\ud800 日本.safetensors"


def lora(seed: int, width: int = 5) -> LoRA:
    return LoRA(make_tensor(seed, 2, width), make_tensor(seed + 1, 6, 2), 2.0)


def small() -> Adapter:
    """Three blocks: one lacks a module, one changes nothing, one has no spectrum."""
    still = LoRA(make_tensor(1, 2, 5), torch.zeros(6, 2), 2.0)
    layers: dict[str, LayerDelta] = {
        "model.layers.0.self_attn.q_proj": lora(1),
        "model.layers.0.mlp.up_proj": lora(3),
        "model.layers.1.self_attn.q_proj": still,
        "model.layers.2.self_attn.q_proj": lora(5),
        "model.layers.2.mlp.up_proj": IA3(make_tensor(7, 5), True, shape=(6, 5)),
        "lm_head": lora(9),
    }
    return Adapter(layers)


def drawn(adapter: Adapter, source: str = "a.safetensors", naming: str = "transformers") -> Drawing:
    return draw_spectrum(measure_spectrum(adapter), naming, source, FACTS)


def titles(svg: str) -> list[str]:
    return [element.text or "" for element in ET.fromstring(svg).iter(f"{SVG}title")]


@pytest.fixture(scope="module")
def svg() -> str:
    with house_style():
        return svg_of(drawn(small()))


# ── SVG ──────────────────────────────────────────────────────────────────────────────────────


def test_every_module_has_a_tooltip_in_both_maps(svg: str) -> None:
    words = titles(svg)
    for path in small().layers:
        assert len([word for word in words if word.startswith(f"{path}\n")]) == 2


def test_tooltips_have_the_numbers(svg: str) -> None:
    (layer, *_) = measure_spectrum(small()).layers
    (first, _) = [word for word in titles(svg) if word.startswith(f"{layer.module}\n")]
    assert f"‖ΔW‖ = {layer.norm:.4g}" in first
    assert f"effective rank {layer.effective_rank:.3g}" in first
    (ia3, _) = [word for word in titles(svg) if word.startswith("model.layers.2.mlp.up_proj\n")]
    assert "depends on the base" in ia3


def cells(svg: str, name: str) -> dict[str, str]:
    """Return the fill of each cell of a map, by its row and column."""
    found = {}
    for group in ET.fromstring(svg).iter(f"{SVG}g"):
        if group.get("id", "").startswith(f"cell-{name}-0-"):
            style = group.find(f"{SVG}path").get("style")  # type: ignore[union-attr]
            found[group.get("id", "")[len(f"cell-{name}-0-") :]] = style.split(";")[0]  # type: ignore[union-attr]
    return found


def test_missing_modules_are_blank_and_zero_is_marked(svg: str) -> None:
    """No cell is drawn where nothing is adapted; zero and no spectrum share a grey."""
    fills = cells(svg, "norm")
    rows, columns = ("0", "1", "2", ""), ("q_proj", "up_proj", "lm_head")
    assert len(fills) == len(small().layers)
    present = {
        (place_of(p, networks=False).block[-1:], p.rpartition(".")[2]) for p in small().layers
    }
    places = {
        f"{rows.index(row)}-{columns.index(column)}": (row, column) for row, column in present
    }
    assert fills.keys() == places.keys()
    grey = {places[key] for key, fill in fills.items() if fill == "fill: #ececec"}
    assert grey == {("1", "q_proj"), ("2", "up_proj")}


def test_the_largest_change_has_the_brightest_cell(svg: str) -> None:
    layers = measure_spectrum(small()).layers
    largest = max(layers, key=lambda layer: layer.norm)
    bright = [key for key, fill in cells(svg, "norm").items() if fill == "fill: #fde725"]
    assert len(bright) == 1
    tip = next(word for word in titles(svg) if word.startswith(f"{largest.module}\n"))
    assert f'id="cell-norm-0-{bright[0]}"><title>{tip.splitlines()[0]}' in svg


def test_no_address_outside_of_the_file(svg: str) -> None:
    assert set(re.findall(r"https?://[^\s\"'<>]+", svg)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    links = re.findall(r"(?:href|src)=\"([^\"]*)\"", svg)
    assert all(link.startswith(("#", "data:")) for link in links)


def test_hostile_names() -> None:
    path = "model.layers.0.<script>alert(1)</script>\x00$\\frac"
    adapter = Adapter({path: lora(1)})
    with house_style():
        text = svg_of(drawn(adapter, HOSTILE))
        page = page_of(drawn(adapter, HOSTILE))
    ET.fromstring(text)
    assert "<script>alert" not in text
    assert "<script>alert" not in page
    assert any("<script>alert(1)</script>\ufffd$\\frac" in word for word in titles(text))
    page.encode()


# ── HTML ─────────────────────────────────────────────────────────────────────────────────────


class Table(HTMLParser):
    """Collects the cells of a page's table and sees that tags are closed in order."""

    VOID = frozenset({"meta", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[list[str]] = []
        self.scripts = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.scripts += tag == "script"
        assert not {"src", "srcset", "data", "action"} & {name for name, _ in attrs}
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data


def test_the_page(svg: str) -> None:
    with house_style():
        text = page_of(drawn(small()))
    page = Table()
    page.feed(text)
    page.close()
    assert (page.open, page.scripts) == ([], 1)
    head, *rows = page.rows
    assert len(head) == 9
    assert {len(row) for row in rows} == {9}
    assert {row[0] for row in rows} == set(small().layers)
    numbers = {layer.module: layer for layer in measure_spectrum(small()).layers}
    for name, *_, effective, stable, low, high in rows:
        if name in numbers:
            layer = numbers[name]
            assert (float(effective), float(stable)) == pytest.approx(
                (layer.effective_rank, layer.stable_rank), rel=1e-3
            )
            assert (low, high) == (str(layer.energy_rank(0.95)), str(layer.energy_rank(0.99)))
    assert svg.rstrip("\n") in text
    assert "@import" not in text
    assert "url(" not in text.partition("<svg")[0]


# ── files ────────────────────────────────────────────────────────────────────────────────────


def png_size(path: Path) -> tuple[int, int]:
    header = path.read_bytes()[:24]
    assert header[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", header[16:24])
    return width, height


@pytest.mark.parametrize("suffix", [".png", ".svg", ".html", ".PNG"])
def test_files_by_suffix(suffix: str, tmp_path: Path) -> None:
    target = tmp_path / f"a{suffix}"
    write_plot(lambda: drawn(small()), target, overwrite=False)
    if suffix.lower() == ".png":
        width, height = png_size(target)
        assert 800 < width < 3000
        assert 500 < height < 3000
    else:
        assert "model.layers.0.mlp.up_proj" in target.read_text("utf-8")
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        write_plot(lambda: drawn(small()), tmp_path / name, overwrite=False)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_an_unknown_suffix(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"\.png, \.svg or \.html"):
        check_plot(tmp_path / "a.jpg", overwrite=False)


def test_an_existing_file_stays(tmp_path: Path) -> None:
    target = tmp_path / "a.svg"
    target.write_text("mine")
    with pytest.raises(OutputError):
        write_plot(lambda: drawn(small()), target, overwrite=False)
    assert target.read_text() == "mine"
    write_plot(lambda: drawn(small()), target, overwrite=True)
    assert "<svg" in target.read_text("utf-8")


def test_nothing_is_left_of_a_drawing_that_fails(tmp_path: Path) -> None:
    def fail() -> Drawing:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        write_plot(fail, tmp_path / "a.svg", overwrite=False)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UnsupportedError) as caught:
        check_plot(tmp_path / "a.png", overwrite=False)
    assert "pip install 'loratools[plot]'" in (caught.value.hint or "")


def test_matplotlib_is_as_it_was(tmp_path: Path) -> None:
    """The user's settings hold before and after, and none of them in the figure."""
    with mpl.rc_context({"font.size": 31.0, "svg.fonttype": "path"}):
        before = dict(mpl.rcParams)
        write_plot(lambda: drawn(small()), tmp_path / "a.svg", overwrite=False)
        assert dict(mpl.rcParams) == before
    assert "31px" not in (tmp_path / "a.svg").read_text("utf-8")
    assert ">q_proj</text>" in (tmp_path / "a.svg").read_text("utf-8")


def test_no_display_and_no_pyplot(tmp_path: Path) -> None:
    """A fresh process with a backend that needs a display: none is opened, pyplot is not loaded."""
    code = f"""
import os, sys
os.environ["MPLBACKEND"] = "tkagg"
os.environ.pop("DISPLAY", None)
import loratools.summary
assert "matplotlib" not in sys.modules
import torch
from loratools.adapter import Adapter
from loratools.deltas import LoRA
from loratools.plots.files import write_plot
from loratools.plots.spectrum import draw_spectrum
from loratools.spectra.layers import measure_spectrum
from pathlib import Path
adapter = Adapter({{"h.0.q": LoRA(torch.ones(2, 4), torch.ones(3, 2), 1.0)}})
found = measure_spectrum(adapter)
build = lambda: draw_spectrum(found, "transformers", "a", {{}})
write_plot(build, Path({str(tmp_path / "a.png")!r}), overwrite=False)
assert "matplotlib.pyplot" not in sys.modules and "tkinter" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert png_size(tmp_path / "a.png") > (0, 0)


# ── shapes of adapters ───────────────────────────────────────────────────────────────────────


def test_rows_are_blocks_in_natural_order_and_columns_as_people_read_them() -> None:
    modules = ("mlp.down_proj", "mlp.gate_proj", "self_attn.o_proj", "self_attn.q_proj")
    paths = [f"model.layers.{n}.{module}" for n in (10, 2, 1) for module in modules]
    (grid,) = grids_of({path: place_of(path, networks=False) for path in paths})
    assert (grid.stack, grid.rows) == ("model.layers", ["1", "2", "10"])
    assert grid.columns == ["q_proj", "o_proj", "gate_proj", "down_proj"]
    assert sorted(path for cell in grid.cells.values() for path in cell) == sorted(paths)


def test_each_network_has_its_grid() -> None:
    paths = [
        "unet.mid_block.attentions.0.proj_in",
        "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
    ]
    grids = grids_of({path: place_of(path, networks=True) for path in paths})
    assert [grid.network for grid in grids] == ["unet", "text_encoder"]
    assert grids[0].rows == ["down.0.attn.1.tf.0", "mid.attn.0"]
    assert grids[1].rows == ["0"]


def test_experts_of_a_layer_share_a_cell() -> None:
    stack = ExpertLoRA(make_tensor(1, 3, 2, 5), make_tensor(2, 3, 6, 2), 4.0)
    with house_style():
        drawing = drawn(Adapter({"model.layers.0.mlp.experts.up_proj": stack}))
    (norm, _) = drawing.tips.values()
    assert [f"up_proj[{n}]\n" in norm for n in range(3)] == [True] * 3
    assert len(drawing.rows) == 3


@pytest.mark.parametrize(
    ("blocks", "modules"), [(1, 1), (4, 2), (32, 7), (81, 12), (200, 7), (3, 90)]
)
def test_cells_are_legible_and_figures_bounded(blocks: int, modules: int) -> None:
    """At 120 dots to the inch; row labels stay apart as long as the figure stays below 3 m."""
    paths = [f"h.{n}.m{m}" for n in range(blocks) for m in range(modules)]
    (grid,) = grids_of({path: place_of(path, networks=False) for path in paths})
    size = cell_size([grid])
    assert size.height * blocks <= 24.01
    assert size.width * modules <= 24.01
    assert size.height >= 0.11 or blocks > 200
    assert size.width >= 0.2 or modules > 100


def test_adapters_of_nothing_and_of_zeros(tmp_path: Path) -> None:
    still = LoRA(make_tensor(1, 2, 5), torch.zeros(6, 2), 2.0)
    for name, layers in (("a", {}), ("b", {"h.0.q": still})):
        write_plot(lambda: drawn(Adapter(layers)), tmp_path / f"{name}.png", overwrite=False)  # noqa: B023
        assert png_size(tmp_path / f"{name}.png") > (0, 0)


# ── alignment ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("count", [2, 3, 14])
def test_the_alignment(count: int) -> None:
    adapters = [Adapter({"h.0.q": lora(n), "h.1.q": lora(n + 30)}) for n in range(count)]
    names = [f"adapter-{n}.safetensors" for n in range(count)]
    found = align(adapters)
    with house_style():
        drawing = draw_alignment(found, names, describe_alignment(found, names))
        words = titles(svg_of(drawing))
    assert any(word.startswith(f"Cosine of ΔW: {found.cosine(0, 1):.4g}\n") for word in words)
    mapped = [word for word in words if word.startswith("h.1.q\ncosine")]
    assert len(mapped) == (count * (count - 1) // 2 if count <= 3 else 0)
    assert len(drawing.rows) == len(found.pairs)
    assert len(drawing.rows[0]) == len(drawing.columns)


def test_places_of_an_adapter_cover_all_its_modules() -> None:
    places = places_of(measure_spectrum(small()), "transformers")
    assert places.keys() == small().layers.keys()
