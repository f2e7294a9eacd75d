"""``loratools inspect``: several inputs, folders, spectra, plots, alignments."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.image_adapters import write_kohya_sdxl

from .conftest import WEIGHTS, Run

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def folder(here: Path) -> Path:
    """Return a folder with two adapter files, an adapter folder and something else."""
    made = here / "loras"
    made.mkdir()
    for number in (1, 2):
        write_kohya_sdxl(made / f"{number}.safetensors", seed=number)
    shutil.copytree(here / "adapter", made / "z")
    (made / "notes.txt").write_text("none of these")
    (made / "pictures").mkdir()
    return made


# ── several inputs ───────────────────────────────────────────────────────────────────────────


def test_each_of_a_folder(run: Run, folder: Path) -> None:
    document = run("inspect", "loras", "--json").document
    reports = document["facts"]["reports"]
    assert document["operation"] == "inspect"
    names = [Path(report["inputs"][0]).name for report in reports]
    assert names == ["1.safetensors", "2.safetensors", "z"]
    assert [report["facts"]["format"] for report in reports] == ["kohya", "kohya", "peft"]


def test_several_paths_of_any_kind(run: Run, here: Path) -> None:
    outcome = run("inspect", "adapter", "base", "ink.safetensors")
    assert outcome.code == 0
    heads = [line for line in outcome.out.splitlines() if line and not line.startswith(" ")]
    assert heads == ["adapter", "base", "ink.safetensors"]


def test_a_folder_of_one(run: Run, folder: Path) -> None:
    for name in ("2.safetensors", "z"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    document = run("inspect", "loras", "--json").document
    assert document["facts"]["format"] == "kohya"


def test_a_model_is_no_folder_of_adapters(run: Run, here: Path) -> None:
    """Several shards beside a config, and an index, are one model."""
    (here / "base/model.safetensors").rename(here / "base/model-00001-of-00002.safetensors")
    shutil.copy(here / "ink.safetensors", here / "base/model-00002-of-00002.safetensors")
    shards = {
        name: file.name
        for file in (here / "base").glob("*.safetensors")
        for name in load_file(file)
    }
    (here / "base/model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    document = run("inspect", "base", "--json").document
    assert document["facts"]["what"] == "base model"
    assert document["facts"]["files"] == 2


def test_one_that_cannot_be_read(run: Run, folder: Path) -> None:
    """The others are described, the reason stands among them, and the exit code tells."""
    (folder / "1.safetensors").write_bytes(b"\x00")
    outcome = run("inspect", "loras", "--json")
    assert outcome.code == 1
    first, *others = outcome.document["facts"]["reports"]
    assert first["facts"]["what"] == "unreadable"
    assert first["facts"]["error"] == "CorruptFileError"
    assert "1.safetensors" in first["facts"]["message"]
    assert [report["facts"]["what"] for report in others] == ["adapter", "adapter"]


@pytest.mark.parametrize("folder", ["xlabs", "kohya", "diffusers-old", "peft"])
def test_no_line_of_the_answer_is_huge(run: Run, folder: str) -> None:
    """Lists of targets and extras are broken; what cannot be (a path, a message) may be long."""
    for line in run("inspect", GOLDEN / folder).out.splitlines():
        assert len(line) <= 125 or line.lstrip().startswith(("message", "hint")), line
        assert not line.startswith("  ") or " 1 layers" not in line


# ── spectrum ─────────────────────────────────────────────────────────────────────────────────


def test_without_spectrum_nothing_is_added(run: Run, here: Path) -> None:
    plain, full = (
        run("inspect", "adapter", "--json", *flag).document for flag in ([], ["--spectrum"])
    )
    assert full["facts"].keys() - plain["facts"].keys() == {"spectrum"}
    assert full["items"] == plain["items"]


def test_spectrum_in_json_agrees_with_numpy(run: Run, here: Path) -> None:
    facts = run("inspect", "adapter", "--spectrum", "--json").document["facts"]["spectrum"]
    tensors = load_file(here / "adapter" / WEIGHTS)
    assert len(facts["by_layer"]) == 9
    for row in facts["by_layer"]:
        stem = f"base_model.model.{row['module']}.lora_"
        change = 2.0 * tensors[f"{stem}B.weight"].double() @ tensors[f"{stem}A.weight"].double()
        values = torch.linalg.svdvals(change)[:4].tolist()
        assert row["singular_values"] == pytest.approx(values, rel=1e-6)
        assert row["norm"] == pytest.approx(float(change.norm()), rel=1e-6)


def test_spectrum_in_text(run: Run, here: Path) -> None:
    brief, full = (
        run("inspect", "adapter", "--spectrum", *flag).out.splitlines() for flag in ([], ["-v"])
    )
    assert full[: len(brief)] == brief
    head, *rows = full[len(brief) :]
    assert head.split()[:4] == ["module", "kind", "shape", "norm"]
    assert len(rows) == 9
    (start,) = [n for n, line in enumerate(brief) if line.split()[:2] == ["module", "layers"]]
    assert [line.split()[0] for line in brief[start + 1 :]] == [
        "mlp.down_proj", "self_attn.q_proj", "self_attn.v_proj"
    ]  # fmt: skip


def test_spectrum_of_every_parameterisation(run: Run) -> None:
    outcome = run("inspect", GOLDEN / "kohya/lycoris.safetensors", "--spectrum")
    assert outcome.code == 0
    assert "22 layers; not 8 others: its change depends on the base weight" in outcome.out


def test_spectrum_of_a_base(run: Run, here: Path) -> None:
    outcome = run("inspect", "base", "--spectrum")
    assert outcome.code == 2
    assert "a spectrum is of an adapter" in outcome.err


# ── plots ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("suffix", ["png", "svg", "html"])
def test_plot(run: Run, here: Path, suffix: str) -> None:
    outcome = run("inspect", "adapter", "--plot", f"out/a.{suffix}", "--json")
    assert outcome.code == 0
    assert outcome.document["facts"]["plot"] == f"out/a.{suffix}"
    assert "spectrum" in outcome.document["facts"]
    assert (here / f"out/a.{suffix}").stat().st_size > 5000


def test_plot_of_an_unknown_kind(run: Run, here: Path) -> None:
    outcome = run("inspect", "adapter", "--plot", "a.pdf")
    assert outcome.code == 2
    assert ".png, .svg or .html" in outcome.err


def test_an_existing_plot_is_refused_before_anything_is_measured(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "a.png").write_text("mine")
    monkeypatch.setattr("loratools.summary.files.measure_spectrum", pytest.fail)
    outcome = run("inspect", "adapter", "--plot", "a.png")
    assert (outcome.code, (here / "a.png").read_text()) == (1, "mine")
    assert "--overwrite" in outcome.err
    monkeypatch.undo()
    assert run("inspect", here / "adapter", "--plot", here / "a.png", "--overwrite").code == 0


def test_the_adapter_is_not_overwritten(run: Run, here: Path) -> None:
    shutil.copy(here / "ink.safetensors", here / "ink.png")
    assert run("inspect", "ink.png", "--plot", "ink.png", "--overwrite").code == 1


def test_plot_without_matplotlib(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = run("inspect", "adapter", "--plot", "a.png")
    assert outcome.code == 1
    assert "Hint: pip install 'loratools[plot]'" in outcome.err
    assert run("inspect", "adapter", "--spectrum").code == 0


def test_a_plot_of_several_needs_an_alignment(run: Run, here: Path) -> None:
    outcome = run("inspect", "adapter", "second", "--plot", "a.png")
    assert outcome.code == 2
    assert "--alignment" in outcome.err


# ── alignment ────────────────────────────────────────────────────────────────────────────────


def test_alignment(run: Run, here: Path) -> None:
    outcome = run("inspect", "adapter", "second", "adapter", "--alignment", "--json")
    *each, found = outcome.document["facts"]["reports"]
    assert [report["facts"]["what"] for report in each] == ["adapter"] * 3
    facts = found["facts"]
    assert (facts["what"], facts["compared"]) == ("alignment", ["adapter", "second", "adapter"])
    assert facts["cosine"][0][2] == pytest.approx(1, abs=1e-6)
    assert abs(facts["cosine"][0][1]) < 0.1
    assert len(found["items"]) == 3 * 9


def test_alignment_in_text_and_as_plot(run: Run, here: Path) -> None:
    outcome = run("inspect", "adapter", "second", "--alignment", "--plot", "a.html")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    row = next(n for n, line in enumerate(lines) if line.split()[:1] == ["cosine"])
    assert lines[row + 1].split()[:2] == ["1", "1.0000"]
    assert "adapter, second" in lines
    assert "model.layers.1.self_attn.q_proj" in (here / "a.html").read_text("utf-8")


def test_alignment_of_one(run: Run, here: Path) -> None:
    assert run("inspect", "adapter", "--alignment").code == 2


def test_alignment_of_different_models(run: Run, here: Path) -> None:
    outcome = run("inspect", "adapter", "ink.safetensors", "--alignment")
    assert (outcome.code, outcome.out) == (1, "")


def test_an_unknown_architecture(run: Run, here: Path) -> None:
    for more in ((), ("--spectrum",), ("second", "--alignment")):
        done = run("inspect", "adapter", *more, "--arch", "nowhere")
        assert (done.code, "no architecture" in done.err) == (2, True)


def test_8_bit_floats(run: Run, here: Path) -> None:
    file = here / "adapter/adapter_model.safetensors"
    save_file({n: t.to(torch.float8_e4m3fn) for n, t in load_file(file).items()}, file)
    tensors = load_file(file)
    done = run("inspect", "adapter", "--spectrum", "--json")
    assert done.code == 0, done.err
    assert not done.document["notes"]
    for row in done.document["facts"]["spectrum"]["by_layer"]:
        up, down = (
            tensors[f"base_model.model.{row['module']}.lora_{side}.weight"].double()
            for side in "BA"
        )
        assert row["norm"] == pytest.approx(2 * float((up @ down).norm()), rel=1e-5)


def test_which_adapter_has_no_known_architecture(run: Run, here: Path) -> None:
    done = run("inspect", "ink.safetensors", "adapter", "--alignment")
    assert done.code == 1
    assert "adapter 2 of 2" in done.err
