"""Commands on GGUF models: dry runs, JSON, odd outputs, other architectures, exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools.tensorfiles.gguf import read_gguf_header
from tests.gguf_demo import write_demo_gguf

from .conftest import Run, tree


@pytest.fixture
def model(here: Path) -> Path:
    """Return the demo's base as a GGUF file, beside the demo's adapters."""
    return write_demo_gguf(here / "base", here / "model.gguf", "Q8_0")


@pytest.mark.usefixtures("model")
def test_a_dry_run_foresees_the_report(here: Path, run: Run) -> None:
    before = tree(here)
    planned = run(
        "merge", "model.gguf", "adapter", "-o", "out.gguf", "--dry-run", "--json"
    ).document
    assert tree(here) == before
    done = run("merge", "model.gguf", "adapter", "-o", "out.gguf", "--json").document
    known = {key: done["facts"][key] for key in planned["facts"]}
    assert planned["facts"] == known
    assert planned["dry_run"]
    assert not done["dry_run"]
    assert 0.99 < done["facts"]["retained"] < 1.01
    assert all(item["dtype"] == "Q8_0" for item in done["items"])


@pytest.mark.usefixtures("model")
@pytest.mark.parametrize(
    ("line", "code", "word"),
    [
        ("merge model.gguf adapter -o out", 1, "-o out.gguf"),
        ("merge model.gguf adapter -o base", 1, "base"),
        ("merge model.gguf adapter -o model.gguf --overwrite", 1, "is the input"),
        ("merge model.gguf ink.safetensors -o out.gguf", 1, "image model"),
        ("merge model.gguf ink.safetensors -o out.gguf", 1, "it was trained on"),
        ("merge base adapter -o out.gguf", 1, "--template makes a GGUF file"),
        ("merge base adapter -o out.safetensors", 1, "-o out\n"),
        ("merge base model.gguf -o out", 1, "not of an adapter"),
        ("merge model.gguf adapter -o out.gguf --quant q9", 2, "q9"),
        ("merge model.gguf adapter -o out.gguf --quant iq2_xxs", 2, "iq2_xxs"),
        ("unmerge model.gguf adapter -o out.gguf", 1, "--base"),
        ("quantize model.gguf -o out.gguf --to q9", 2, "q8_0"),
        ("quantize model.gguf -o out.gguf --to iq1_s", 1, "importance matrix"),
        ("quantize model.gguf -o out.gguf --to q8_0", 1, "nothing would change"),
        ("quantize model.gguf -o out --to q4_0", 1, "-o out.gguf"),
        ("quantize base -o out.gguf --to q4_0", 1, "--template"),
        ("quantize adapter -o out.gguf --to q4_0", 1, "adapter"),
        ("dequantize base -o out.gguf", 1, "neither quantised nor a GGUF model"),
        ("dequantize model.gguf -o out", 1, "one file"),
        ("dequantize model.gguf -o out --base-config adapter", 1, "config.json"),
        ("dequantize gone.gguf -o out.gguf", 1, "gone.gguf"),
    ],
)
def test_what_is_refused_leaves_nothing(
    here: Path, run: Run, line: str, code: int, word: str
) -> None:
    before = tree(here)
    outcome = run(*line.split())
    assert (outcome.code, outcome.out) == (code, "")
    assert word in outcome.err
    assert "Traceback" not in outcome.err
    assert tree(here) == before
    document = run(*line.split(), "--json").document
    assert document.keys() == {"schema", "error", "message", "hint"}


def test_damaged_files_are_refused(here: Path, run: Run, model: Path) -> None:
    data = model.read_bytes()
    for length in (0, 100, len(data) - 1):
        model.write_bytes(data[:length])
        for line in (
            "quantize model.gguf -o out.gguf --to q4_0",
            "dequantize model.gguf -o o.gguf",
        ):
            outcome = run(*line.split())
            assert outcome.code == 1
            assert "model.gguf" in outcome.err
    assert not (here / "out.gguf").exists()


def test_there_and_back_through_every_form(here: Path, run: Run, model: Path) -> None:
    """GGUF → folder → merged folder → GGUF is the merged GGUF, but for roundings."""
    assert (
        run("dequantize", model, "-o", "folder", "--base-config", "base", "--dtype", "fp32").code
        == 0
    )
    assert run("merge", "folder", "adapter", "-o", "merged").code == 0
    line = ("quantize", "merged", "-o", "one.gguf", "--to", "q8_0", "--template", model)
    assert run(*line).code == 0
    assert run("merge", model, "adapter", "-o", "two.gguf").code == 0
    for name in ("one", "two"):
        line = ("dequantize", f"{name}.gguf", "-o", f"{name}.safetensors", "--dtype", "fp32")
        assert run(*line).code == 0
    one, two = (load_file(here / f"{name}.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() == load_file(here / "base/model.safetensors").keys()
    for name, weight in one.items():
        torch.testing.assert_close(weight, two[name], rtol=0, atol=float(weight.abs().max()) / 64)
        assert float((weight != two[name]).float().mean()) < 0.001


@pytest.mark.usefixtures("model")
def test_inspect_shows_types_and_what_was_merged(here: Path, run: Run) -> None:
    assert run("merge", "model.gguf", "adapter:0.5", "-o", "out.gguf", "-q").code == 0
    facts = run("inspect", "out.gguf", "--json").document["facts"]
    header = read_gguf_header(here / "out.gguf")
    assert facts["model_type"] == "llama"
    assert facts["tensors_by_dtype"] == {"F32": 7, "Q8_0": 23}
    assert sum(facts["bytes_by_dtype"].values()) == facts["bytes"]
    assert facts["bytes"] == sum(tensor.nbytes for tensor in header.tensors.values())
    assert facts["parameters"] == 174_528
    assert facts["merged_adapters"] == ["adapter at 0.5"]
    assert "Q8_0: 23" in run("inspect", "out.gguf").out


def test_quiet_and_progress_words(here: Path, run: Run, model: Path) -> None:
    outcome = run("quantize", model, "-o", "out.gguf", "--to", "q4_0", "-q")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert (here / "out.gguf").stat().st_size < model.stat().st_size
    again = run("quantize", model, "-o", "out.gguf", "--to", "q4_0")
    assert again.code == 1
    assert "--overwrite" in again.err
    assert run("quantize", model, "-o", "out.gguf", "--to", "q5_0", "--overwrite").code == 0


def test_rebasing_to_gguf_takes_the_names_of_the_base_it_is_for(here: Path, run: Run) -> None:
    assert run("merge", "base", "second", "-o", "tuned").code == 0
    words = ("rebase", "adapter", "--from", "base", "--onto", "tuned", "--rank", "2")
    assert run(*words, "-o", "plain").code == 0
    assert run("convert", "plain", "-o", "plain.gguf", "--to", "gguf", "--base", "tuned").code == 0
    done = run(*words, "-o", "moved.gguf", "--to", "gguf")
    assert done.code == 0, done.err
    assert (here / "moved.gguf").read_bytes() == (here / "plain.gguf").read_bytes()


@pytest.mark.usefixtures("model")
def test_an_unknown_type_is_answered_with_types(run: Run) -> None:
    done = run("merge", "model.gguf", "adapter", "-o", "o.gguf", "--quant", "q5_9")
    assert done.err.endswith("Hint: did you mean q5_0 or q5_1 or q5_k?\n")
