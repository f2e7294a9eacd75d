"""Adapters of image models: inspected, converted, compared, merged into a pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.image_adapters import MODULES

from .conftest import Run, tree

MERGE = ["merge", "pipeline", "ink.safetensors:0.5", "-o", "out"]
PLACES = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
        "unet",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_v": (
        "unet",
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v",
    ),
    "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k": (
        "unet",
        "mid_block.attentions.0.transformer_blocks.9.attn2.to_k",
    ),
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (
        "text_encoder",
        "text_model.encoder.layers.0.self_attn.q_proj",
    ),
}
"""kohya's names → where diffusers has the weight."""
UNTOUCHED = {
    "conv_in": (8, 4, 3, 3),
    "conv_out": (4, 8, 3, 3),
    "add_embedding.linear_1": (8, 2816),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (8, 2048),
}
"""What tells, besides, that a U-Net is that of SDXL."""


@pytest.fixture
def pipeline(here: Path) -> Path:
    """Make a pipeline with what the adapter changes, and a tokenizer and a VAE that it does not."""
    root = here / "pipeline"
    files = {
        "unet": "diffusion_pytorch_model.safetensors",
        "text_encoder": "model.safetensors",
        "vae": "diffusion_pytorch_model.safetensors",
    }
    weights: dict[str, dict[str, torch.Tensor]] = {name: {} for name in files}
    for module, (component, path) in PLACES.items():
        weights[component][f"{path}.weight"] = torch.randn(MODULES[module]).half()
    for name, shape in UNTOUCHED.items():
        weights["unet"][f"{name}.weight"] = torch.randn(shape).half()
    weights["vae"]["decoder.conv_in.weight"] = torch.randn(4, 4)
    for component, tensors in weights.items():
        (root / component).mkdir(parents=True)
        save_file(tensors, root / component / files[component], {"format": "pt"})
        (root / component / "config.json").write_text("{}")
    (root / "tokenizer").mkdir()
    (root / "tokenizer/vocab.json").write_text("{}")
    (root / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    return root


def expected(root: Path, adapter: Path, strength: float) -> dict[str, dict[str, torch.Tensor]]:
    """W + strength · alpha / rank · up · down, from the files alone."""
    factors = load_file(adapter)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for module, (component, path) in PLACES.items():
        (file,) = (root / component).glob("*.safetensors")
        weight = load_file(file)[f"{path}.weight"].double()
        up, down = (factors[f"{module}.lora_{side}.weight"].double() for side in ("up", "down"))
        change = strength * float(factors[f"{module}.alpha"]) * up @ down
        found.setdefault(component, {})[f"{path}.weight"] = weight + change
    return found


def test_merge_into_a_pipeline(here: Path, run: Run, pipeline: Path) -> None:
    """Both networks get their share; everything else is the same bytes."""
    wanted = expected(pipeline, here / "ink.safetensors", 0.5)
    outcome = run(*MERGE, "--json")
    assert outcome.code == 0
    facts = outcome.document["facts"]
    assert (facts["tensors_touched"], facts["tensors_changed"]) == (4, 4)
    assert facts["components"] == ["unet", "text_encoder"]
    for component, tensors in wanted.items():
        (file,) = (here / "out" / component).glob("*.safetensors")
        merged = load_file(file)
        for name, weight in tensors.items():
            torch.testing.assert_close(merged[name].double(), weight, rtol=2**-10, atol=1e-6)
    before, after = tree(pipeline), tree(here / "out")
    assert before.keys() == after.keys()
    same = {name for name in before if before[name] == after[name]}
    touched = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    assert before.keys() - same == touched


def test_merge_into_a_pipeline_as_a_dry_run(here: Path, run: Run, pipeline: Path) -> None:
    before = tree(here)
    outcome = run(*MERGE, "--dry-run")
    assert outcome.code == 0
    assert outcome.out.startswith("would merge pipeline + ink.safetensors (dry run")
    assert tree(here) == before


def test_unmerge_from_a_pipeline(here: Path, run: Run, pipeline: Path) -> None:
    """With the base the same bytes; without it the bound of both networks together."""
    assert run(*MERGE).code == 0
    restore = ("unmerge", "out", "ink.safetensors:0.5", "-o", "back", "--arch", "sdxl")
    before = tree(here)
    assert run(*restore, "--base", "pipeline", "--dry-run").code == 0
    assert tree(here) == before
    assert run(*restore, "--base", "pipeline").code == 0
    assert tree(here / "back") == tree(pipeline)
    outcome = run(*restore, "--overwrite", "--json")
    facts = outcome.document["facts"]
    assert (facts["method"], facts["tensors_changed"]) == ("subtracted", 4)
    assert facts["error_bound"] > 0


def test_a_network_that_the_pipeline_lacks(here: Path, run: Run, pipeline: Path) -> None:
    for file in (pipeline / "text_encoder").iterdir():
        file.unlink()
    (pipeline / "text_encoder").rmdir()
    outcome = run(*MERGE)
    assert outcome.code == 1
    assert "ink.safetensors: changes text_encoder, which pipeline does not have" in outcome.err
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("arch", "code", "words"),
    [("sdxl", 0, "merged"), ("sdlx", 2, "sdxl"), ("flux1", 1, "lora_unet")],
)
def test_the_users_word_for_the_architecture(
    here: Path, run: Run, pipeline: Path, arch: str, code: int, words: str
) -> None:
    outcome = run(*MERGE, "--arch", arch)
    assert outcome.code == code
    assert words in outcome.out + outcome.err
    assert (here / "out").exists() == (code == 0)


# ---------------------------------------------------------------------------- inspect


def test_inspect_a_kohya_file(here: Path, run: Run) -> None:
    facts = run("inspect", "ink.safetensors", "--json").document["facts"]
    assert (facts["format"], facts["naming"], facts["architecture"]) == ("kohya", "kohya", "sdxl")
    assert (facts["name"], facts["base_model"]) == ("ink", "sdxl_base_v1-0")
    assert facts["components"] == {"lora_te1": 1, "lora_unet": 3}
    assert facts["targets"] == {"self_attn_q_proj": 1, "to_q": 1, "to_v": 1, "to_k": 1}
    assert facts["kinds"] == {"lora": 4}


@pytest.mark.parametrize("target", ["diffusers", "comfyui", "kohya"])
def test_inspect_what_was_converted(here: Path, run: Run, target: str) -> None:
    assert run("convert", "ink.safetensors", "-o", "new.safetensors", "--to", target).code == 0
    before, after = (
        run("inspect", file, "--json").document["facts"]
        for file in ("ink.safetensors", "new.safetensors")
    )
    assert (after["format"], after["architecture"]) == (target, "sdxl")
    for word in ("layers", "kinds", "ranks", "alphas", "parameters"):
        assert after[word] == before[word]
    assert after["delta_norm"] == pytest.approx(before["delta_norm"], rel=1e-5)


def test_inspect_an_adapter_of_no_known_architecture(here: Path, run: Run) -> None:
    """No error: what the modules are of is one fact among many."""
    tensors = {
        "lora_unet_nothing_we_know.lora_up.weight": torch.ones(4, 1),
        "lora_unet_nothing_we_know.lora_down.weight": torch.ones(1, 4),
    }
    save_file(tensors, here / "odd.safetensors")
    document = run("inspect", "odd.safetensors", "--json").document
    assert document["facts"]["architecture"] is None
    assert any(note["subject"] == "architecture" for note in document["notes"])


def test_inspect_a_pipeline(here: Path, run: Run, pipeline: Path) -> None:
    facts = run("inspect", "pipeline", "--json").document["facts"]
    assert facts["what"] == "diffusers pipeline"
    assert facts["class"] == "StableDiffusionXLPipeline"
    assert facts["architecture"] == "sdxl"
    assert list(facts["components"]) == ["unet", "text_encoder"]
    assert facts["components"]["text_encoder"] == 768 * 768
    total = run("inspect", "ink.safetensors", "--base", "pipeline", "--json").document["facts"]
    assert total["base_parameters"] == facts["parameters"]


# ---------------------------------------------------------------------------- convert and diff


def test_a_round_trip_changes_no_weight(here: Path, run: Run) -> None:
    run("convert", "ink.safetensors", "-o", "there.safetensors", "--to", "comfyui")
    run("convert", "there.safetensors", "-o", "back.safetensors", "--to", "kohya")
    for file in ("there.safetensors", "back.safetensors"):
        facts = run("diff", "ink.safetensors", file, "--json").document["facts"]
        assert facts["same"]
        assert (facts["modules"], facts["modules_differing"]) == (4, 0)
    old, new = (load_file(here / file) for file in ("ink.safetensors", "back.safetensors"))
    assert old.keys() == new.keys()


def test_diff_tells_adapters_apart(here: Path, run: Run) -> None:
    outcome = run("diff", "adapter", "second")
    assert outcome.code == 1
    assert "same                 no" in outcome.out
    assert run("diff", "adapter", "second", "--tolerance", "10").code == 0


def test_diff_of_different_models(here: Path, run: Run) -> None:
    outcome = run("diff", "adapter", "ink.safetensors")
    assert outcome.code == 1
    assert outcome.err.startswith("Error: ")


def test_convert_a_folder(here: Path, run: Run) -> None:
    """One document for all, each under its own name."""
    (here / "loras").mkdir()
    for name in ("a", "b"):
        (here / f"loras/{name}.safetensors").write_bytes((here / "ink.safetensors").read_bytes())
    outcome = run("convert", "loras", "-o", "new", "--to", "diffusers", "--json")
    assert outcome.code == 0
    assert len(outcome.document["facts"]["reports"]) == 2
    assert sorted(path.name for path in (here / "new").iterdir()) == [
        "a.safetensors",
        "b.safetensors",
    ]


def test_convert_dry_run_writes_nothing(here: Path, run: Run) -> None:
    before = tree(here)
    outcome = run("convert", "ink.safetensors", "-o", "x.safetensors", "--to", "kohya", "--dry-run")
    assert outcome.code == 0
    assert tree(here) == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["ink.safetensors", "-o", "x", "--to", "kohay"], 2, "unknown format 'kohay'"),
        (["ink.safetensors", "-o", "x", "--to", "peft"], 1, "of several"),
        (["adapter", "-o", "x.safetensors", "--to", "kohya"], 1, "no known architecture"),
        (["ink.safetensors", "-o", "ink.safetensors", "--to", "diffusers"], 1, "exists"),
        (["nowhere", "-o", "x", "--to", "kohya"], 1, "no such file or folder: nowhere"),
    ],
)
def test_what_convert_refuses(
    here: Path, run: Run, arguments: list[str], code: int, words: str
) -> None:
    before = tree(here)
    outcome = run("convert", *arguments)
    assert outcome.code == code
    assert words in outcome.err
    assert outcome.err.startswith("Error: ")
    assert "\nHint: " in outcome.err
    assert tree(here) == before
    assert run("convert", *arguments, "--dry-run").code == code
    assert json.loads(run("convert", *arguments, "--json").out)["schema"] == 1
