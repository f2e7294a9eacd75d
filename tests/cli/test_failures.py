"""Failures through the command line: exit 1, what and where, the next step, nothing written.

Each case is run for real, as a dry run and with ``--json``; the three must agree.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from loratools import cli
from loratools.errors import LoratoolsError, OptionError

from .conftest import FACTOR, WEIGHTS, Run, tree

Damage = Callable[..., None]
Case = tuple[list[str], str]

MERGE = ["merge", "base", "adapter", "-o", "out"]
UP = FACTOR.replace("lora_A", "lora_B")
MODULE = "model.layers.1.self_attn.q_proj"
CASES: dict[str, Callable[[Path, Damage], Case]] = {}
"""Name of a fault → makes it, and returns the command line and the words that must name it."""


def case(make: Callable[[Path, Damage], Case]) -> Callable[[Path, Damage], Case]:
    CASES[make.__name__] = make
    return make


def rename(old: str, new: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def put(name: str, value: float) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors[name].view(-1).__setitem__(3, value)


# ---------------------------------------------------------------------------- adapters


@case
def renamed_key(_: Path, damage: Damage) -> Case:
    damage(rename(FACTOR, FACTOR.replace("q_proj", "q_porj")))
    return MERGE, FACTOR.replace("q_proj", "q_porj")


@case
def renamed_pair(_: Path, damage: Damage) -> Case:
    for key in (FACTOR, UP):
        damage(rename(key, key.replace("q_proj", "q_porj")))
    return MERGE, f"{MODULE}.weight"  # the nearest name of the base


@case
def missing_key(_: Path, damage: Damage) -> Case:
    damage(lambda tensors: tensors.pop(FACTOR))
    return MERGE, f"{UP} has no lora_A"


@case
def misshaped_key(_: Path, damage: Damage) -> Case:
    damage(lambda tensors: tensors.update({FACTOR: torch.ones(4, 63)}))
    return MERGE, f"{MODULE}.weight is (64, 64)"


@case
def complex_factor(_: Path, damage: Damage) -> Case:
    damage(lambda tensors: tensors.update({FACTOR: tensors[FACTOR].to(torch.complex64)}))
    return MERGE, f"{FACTOR} holds complex numbers"


@case
def ranks_that_differ(_: Path, damage: Damage) -> Case:
    damage(lambda tensors: tensors.update({FACTOR: torch.ones(3, 64)}))
    return MERGE, f"{FACTOR} is (3, 64)"


@case
def surplus_key(_: Path, damage: Damage) -> Case:
    damage(lambda tensors: tensors.update({"stray.tensor": torch.ones(3)}))
    return MERGE, "stray.tensor"


@case
def nothing_matches(_: Path, damage: Damage) -> Case:
    def elsewhere(tensors: dict[str, Any]) -> None:
        for key in list(tensors):
            tensors[key.replace("model.layers", "encoder.block")] = tensors.pop(key)

    damage(elsewhere)
    return MERGE, "nothing matches"


@case
def nan_in_adapter(_: Path, damage: Damage) -> Case:
    damage(put(FACTOR, float("nan")))
    return MERGE, f"{MODULE} (down) holds NaN"


@case
def infinity_in_adapter(_: Path, damage: Damage) -> Case:
    damage(put(UP, float("-inf")))
    return MERGE, f"{MODULE} (up) holds infinity"


@case
def adapter_without_weights(here: Path, _: Damage) -> Case:
    (here / "adapter" / WEIGHTS).unlink()
    return MERGE, "adapter: no adapter weights"


@case
def adapter_without_config(here: Path, _: Damage) -> Case:
    (here / "adapter/adapter_config.json").unlink()
    return MERGE, "adapter_config.json is missing"


@case
def config_cut_short(here: Path, _: Damage) -> Case:
    (here / "adapter/adapter_config.json").write_text('{"r": 4,')
    return MERGE, "adapter_config.json is not JSON"


@case
def adapter_cut_short(here: Path, _: Damage) -> Case:
    os.truncate(here / "adapter" / WEIGHTS, 20_000)
    return MERGE, f"adapter/{WEIGHTS}: truncated"


@case
def adapter_of_no_bytes(here: Path, _: Damage) -> Case:
    (here / "adapter" / WEIGHTS).write_bytes(b"")
    return MERGE, f"adapter/{WEIGHTS}: 0 bytes"


@case
def large_file_pointer(here: Path, _: Damage) -> Case:
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 25304\n"
    (here / "adapter" / WEIGHTS).write_text(text)
    return MERGE, "git lfs pull"


@case
def gguf_as_adapter(here: Path, _: Damage) -> Case:
    (here / "x.gguf").write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    return ["merge", "base", "x.gguf", "-o", "out"], "GGUF"


@case
def unknown_syntax(here: Path, damage: Damage) -> Case:
    def elsewhere(tensors: dict[str, Any]) -> None:
        for number, key in enumerate(list(tensors)):
            tensors[f"patches.{number}"] = tensors.pop(key)

    damage(elsewhere)
    (here / "adapter" / WEIGHTS).rename(here / "style.safetensors")
    return ["merge", "base", "style.safetensors", "-o", "out"], "`loratools formats` lists"


@case
def image_renamed(here: Path, _: Damage) -> Case:
    (here / "x.safetensors").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    return ["merge", "base", "x.safetensors", "-o", "out"], "x.safetensors: not a safetensors file"


@case
def several_adapters(here: Path, _: Damage) -> Case:
    (here / "run").mkdir()
    for name in ("adapter", "second"):
        (here / name).rename(here / "run" / name)
    return ["merge", "base", "run", "-o", "out"], "several adapters (adapter, second)"


@case
def base_as_adapter(_: Path, __: Damage) -> Case:
    return ["merge", "base", "base", "-o", "out"], "looks like a base model"


# ---------------------------------------------------------------------------- bases


@case
def adapter_as_base(_: Path, __: Damage) -> Case:
    return ["merge", "adapter", "base", "-o", "out"], "adapter: an adapter, not a base model"


@case
def missing_base(_: Path, __: Damage) -> Case:
    return ["merge", "bsae", "adapter", "-o", "out"], "no such file or folder: bsae"


@case
def missing_adapter(_: Path, __: Damage) -> Case:
    return ["merge", "base", "adpater:0.5", "-o", "out"], "no such file or folder: adpater"


@case
def folder_without_weights(here: Path, _: Damage) -> Case:
    (here / "empty").mkdir()
    return ["merge", "empty", "adapter", "-o", "out"], "empty: no model weights"


@case
def base_cut_short(here: Path, _: Damage) -> Case:
    os.truncate(here / "base/model.safetensors", 600_000)
    return MERGE, "base/model.safetensors: truncated"


@case
def missing_shard(here: Path, _: Damage) -> Case:
    shard = "model-00001-of-00001.safetensors"
    index = {"metadata": {}, "weight_map": {"model.norm.weight": shard}}
    (here / "base/model.safetensors").unlink()
    (here / "base/model.safetensors.index.json").write_text(json.dumps(index))
    return MERGE, shard


@case
def diffusers_pipeline(here: Path, _: Damage) -> Case:
    """Without networks: a pipeline is a base by itself."""
    (here / "base/model_index.json").write_text("{}")
    return MERGE, "base: a pipeline without any of unet, transformer"


@case
def quantised_base(here: Path, _: Damage) -> Case:
    config = json.loads((here / "base/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq"}
    (here / "base/config.json").write_text(json.dumps(config))
    return MERGE, "quantised (gptq)"


@case
def pickled_code(here: Path, _: Damage) -> Case:
    class Harmful:
        def __reduce__(self) -> Any:
            return (print, ("harm",))

    torch.save({"a": Harmful()}, here / "base/pytorch_model.bin")
    (here / "base/model.safetensors").unlink()
    return MERGE, "could run code"


# ---------------------------------------------------------------------------- destinations


@case
def output_exists(here: Path, _: Damage) -> Case:
    (here / "out").mkdir()
    return MERGE, "out: already exists"


@case
def output_is_a_file(here: Path, _: Damage) -> Case:
    (here / "out").write_text("mine")
    return [*MERGE, "--overwrite"], "out: is not a folder"


@case
def output_is_another_folder(here: Path, _: Damage) -> Case:
    (here / "out").mkdir()
    (here / "out/thesis.txt").write_text("mine")
    return [*MERGE, "--overwrite"], "holds no model files"


@case
def output_is_the_base(_: Path, __: Damage) -> Case:
    return ["merge", "base", "adapter", "-o", "base", "--overwrite"], "is the input base"


@case
def output_in_the_base(_: Path, __: Damage) -> Case:
    return ["merge", "base", "adapter", "-o", "base/out"], "lies inside the input base"


@case
def output_around_the_inputs(_: Path, __: Damage) -> Case:
    return ["merge", "base", "adapter", "-o", ".", "--overwrite"], "contains the input"


@case
def output_is_the_adapter(_: Path, __: Damage) -> Case:
    return ["merge", "base", "adapter", "-o", "adapter", "--overwrite"], "contains the input"


@case
def output_below_a_file(here: Path, _: Damage) -> Case:
    (here / "file").write_text("mine")
    return ["merge", "base", "adapter", "-o", "file/out"], "file is not a folder"


@case
def single_file_without_suffix(here: Path, _: Damage) -> Case:
    (here / "base/model.safetensors").rename(here / "model.safetensors")
    return ["merge", "model.safetensors", "adapter", "-o", "out"], "-o out.safetensors"


# ---------------------------------------------------------------------------- unmerge


@case
def unmerge_from_another_model(here: Path, _: Damage) -> Case:
    shutil.copytree(here / "base", here / "other")
    from safetensors.torch import save_file

    save_file({"other.weight": torch.ones(4)}, here / "other/model.safetensors")
    arguments = ["unmerge", "base", "-o", "out", "--base", "other", "adapter"]
    return arguments, f"{MODULE}: no such tensor in the base"


# ---------------------------------------------------------------------------- the three runs


@pytest.fixture(params=CASES)
def fault(request: pytest.FixtureRequest, here: Path, damaged: Damage) -> Case:
    """Make one fault in the working directory."""
    return CASES[request.param](here, damaged)


@pytest.mark.parametrize("flags", [[], ["--dry-run"]], ids=["real", "dry"])
def test_refused_by_name_with_nothing_written(
    here: Path, run: Run, fault: Case, flags: list[str]
) -> None:
    arguments, named = fault
    before = tree(here)
    outcome = run(*arguments, *flags)
    assert outcome.code == 1
    assert outcome.out == ""
    assert outcome.err.startswith("Error: ")
    assert named in outcome.err
    assert "Traceback" not in outcome.err
    assert tree(here) == before


def test_failures_as_json(run: Run, fault: Case) -> None:
    arguments, named = fault
    outcome = run(*arguments, "--json")
    assert outcome.code == 1
    assert outcome.err == ""
    assert list(outcome.document) == ["schema", "error", "message", "hint"]
    assert outcome.document["schema"] == 1
    assert named in f"{outcome.document['message']} {outcome.document['hint']}"
    assert issubclass(getattr(loratools_errors(), outcome.document["error"]), LoratoolsError)


def loratools_errors() -> Any:
    import loratools.errors

    return loratools.errors


# ---------------------------------------------------------------------------- values


def test_nan_in_a_base_weight(here: Path, run: Run, damaged: Damage) -> None:
    damaged(put(f"{MODULE}.weight", float("nan")), "base/model.safetensors")
    before = tree(here)
    outcome = run(*MERGE)
    assert outcome.code == 1
    assert f"{MODULE}.weight: the result is NaN" in outcome.err
    assert "bf16" not in outcome.err
    assert tree(here) == before


def test_a_result_beyond_the_output_type(here: Path, run: Run) -> None:
    before = tree(here)
    outcome = run("merge", "base", "adapter:1e7", "-o", "out", "--dtype", "fp16")
    assert outcome.code == 1
    assert "weight: the result is infinite in F16" in outcome.err
    assert "--dtype bf16" in outcome.err
    assert tree(here) == before


def untrain(tensors: dict[str, Any]) -> None:
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            tensor.zero_()


def test_an_untrained_adapter(here: Path, run: Run, damaged: Damage) -> None:
    damaged(untrain)
    before = tree(here)
    outcome = run(*MERGE)
    assert outcome.code == 1
    assert "changes nothing" in outcome.err
    assert "trained?" in outcome.err
    assert tree(here) == before


def test_a_dry_run_sees_an_untrained_adapter(run: Run, damaged: Damage) -> None:
    damaged(untrain)
    assert run(*MERGE, "--dry-run").code == 1


@pytest.mark.parametrize("strength", ["1e-12", "1e-30", "1e-60"])
def test_a_change_below_the_precision(here: Path, run: Run, strength: str) -> None:
    """However small: float32 has no words for the last two, or for their squares."""
    before = tree(here)
    outcome = run("merge", "base", f"adapter:{strength}", "-o", "out")
    assert outcome.code == 1
    assert "below the base's precision" in outcome.err
    assert tree(here) == before


def test_adapters_that_cancel_are_not_called_untrained(here: Path, run: Run) -> None:
    outcome = run("merge", "base", "adapter:0.5", "adapter:-0.5", "-o", "out")
    assert outcome.code == 1
    assert "cancel each other" in outcome.err


def test_adapters_that_cancel_out_of_sight_are_below_the_precision(here: Path, run: Run) -> None:
    outcome = run("merge", "base", "adapter:1e-12", "adapter:-1e-12", "-o", "out")
    assert outcome.code == 1
    assert "below the base's precision" in outcome.err


# ---------------------------------------------------------------------------- conventions


@pytest.mark.parametrize("device", ["tpu", "", "cpu:1", "cuda:", "cuda:x", "cuda:-1", "CUDA"])
def test_a_device_that_is_none_is_wrong_usage(here: Path, run: Run, device: str) -> None:
    outcome = run(*MERGE, "--device", device)
    assert outcome.code == 2
    assert f"unknown device '{device}'" in outcome.err
    assert not (here / "out").exists()


def test_unmerge_needs_adapters_or_a_base(run: Run, here: Path) -> None:
    assert run("unmerge", "base", "-o", "out").code == 2


@pytest.mark.parametrize(
    "arguments",
    [["merge"], ["merg"], ["inspect", "x", "--nope"], ["merge", "base", "a:0", "-o", "x"]],
)
def test_wrong_usage_as_json(run: Run, here: Path, arguments: list[str]) -> None:
    outcome = run(*arguments, "--json")
    assert (outcome.code, outcome.err) == (2, "")
    assert list(outcome.document) == ["schema", "error", "message", "hint"]
    assert outcome.document["error"] == "UsageError"


def test_json_after_two_dashes_is_a_path(run: Run, here: Path) -> None:
    outcome = run("merge", "-o", "out", "base", "--", "--json")
    assert (outcome.code, outcome.out) == (1, "")
    assert "no such file or folder: --json" in outcome.err


def test_a_traceback_only_when_asked_for(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "Traceback" not in run("inspect", "nowhere").err
    monkeypatch.setenv("LORATOOLS_DEBUG", "1")
    with pytest.raises(LoratoolsError, match="nowhere"):
        run("inspect", "nowhere")


@pytest.mark.parametrize(("error", "code"), [(LoratoolsError, 1), (OptionError, 2)])
def test_exit_codes_of_errors(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: type[LoratoolsError], code: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("no", hint="try yes")

    monkeypatch.setattr("loratools.summary.summarize_files", fail)
    outcome = run("inspect", "x")
    assert (outcome.code, outcome.err) == (code, "Error: no\nHint: try yes\n")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("loratools.summary.summarize_files", interrupt)
    outcome = run("inspect", "x", *flags)
    assert outcome.code == 130
    if flags:
        assert outcome.document["error"] == "Interrupted"
    else:
        assert "interrupted" in outcome.err


def test_the_reader_has_gone(monkeypatch: pytest.MonkeyPatch, here: Path) -> None:
    """``loratools inspect adapter | head -0``: no traceback, no second failure at exit."""

    def gone(*_: object, **__: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("click.echo", gone)
    # To be put back: the command line replaces it, so that the flush at exit succeeds.
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    assert cli.run(["inspect", "adapter"]) == 1
    assert sys.stdout.name == os.devnull
    sys.stdout.close()


def test_a_system_error_is_a_stated_reason(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "base/model.safetensors")

    monkeypatch.setattr("loratools.summary.summarize_files", refuse)
    outcome = run("inspect", "base", "--json")
    assert outcome.code == 1
    assert "base/model.safetensors" in outcome.document["message"]


def test_a_config_in_another_encoding(run: Run, here: Path) -> None:
    (here / "adapter/adapter_config.json").write_bytes(b'{"r": 4, "author": "Andr\xe9"}')
    outcome = run(*MERGE)
    assert outcome.code == 1
    assert "adapter_config.json" in outcome.err


def test_one_of_several_adapters_is_named(run: Run, here: Path, damaged: Damage) -> None:
    damaged(lambda tensors: tensors.update({"stray.tensor": torch.ones(3)}))
    outcome = run("merge", "base", "second", "adapter", "-o", "out")
    assert outcome.code == 1
    assert "adapter onto base: 1 adapter tensor does not fit\n  stray.tensor" in outcome.err
    assert "second onto" not in outcome.err


def test_a_folder_is_not_called_like_a_file(run: Run, here: Path) -> None:
    assert run("merge", "base", "adapter", "-o", "out.safetensors").code == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["merge", "", "adapter", "-o", "../out"],
        ["merge", "base", "", "-o", "../out"],
        ["merge", "base", ":0.5", "-o", "../out"],
        ["merge", "base", "adapter", "-o", ""],
        ["unmerge", "", "adapter", "-o", "out"],
        ["unmerge", "base", "-o", "out", "--base", ""],
        ["convert", "", "-o", "out", "--to", "peft"],
        ["diff", "adapter", ""],
        ["inspect", ""],
        ["demo", "-o", ""],
    ],
)
def test_an_empty_path_is_wrong_usage(run: Run, here: Path, arguments: list[str]) -> None:
    assert run(*arguments).code == 2


def test_demo_into_a_file(run: Run, here: Path) -> None:
    (here / "file").write_text("mine")
    assert run("demo", "-o", "file").code == 1


def test_demo_over_an_earlier_demo(run: Run, here: Path) -> None:
    assert run("demo", "-o", "kept").code == 0
    assert run("demo", "-o", "kept").code == 1
    before = tree(here / "kept")
    assert run("demo", "-o", "kept", "--overwrite").code == 0
    assert tree(here / "kept") == before


def test_demo_spares_a_model_that_is_not_its_own(run: Run, here: Path, damaged: Damage) -> None:
    damaged(lambda tensors: tensors["lm_head.weight"].zero_(), "base/model.safetensors")
    before = tree(here / "base")
    run("demo", "-o", ".", "--overwrite")
    assert tree(here / "base") == before
