"""``loratools merge`` and ``unmerge`` as people use them: odd paths, odd folders, dry runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import WEIGHTS, Run, tree

MERGE = ["merge", "base", "adapter", "-o", "out"]
links = pytest.mark.skipif(os.name == "nt", reason="symbolic links need a privilege")


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = load_file(Path(folder) / "model.safetensors")
    return tensors


@pytest.fixture(scope="session")
def expected(originals: Path) -> dict[str, torch.Tensor]:
    """W + (alpha / rank) B A, from the files alone."""
    base = weights(originals / "base")
    lora = load_file(originals / "adapter" / WEIGHTS)
    for name in list(base):
        module = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" in lora:
            down, up = (lora[f"{module}.lora_{letter}.weight"].double() for letter in "AB")
            base[name] = (base[name].double() + 2 * up @ down).float()
    return base


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        torch.allclose(found[name], expected[name], rtol=0, atol=1e-6) for name in expected
    )


# ---------------------------------------------------------------------------- done


def test_merge(here: Path, run: Run, expected: dict[str, torch.Tensor]) -> None:
    before = tree(here)
    assert run(*MERGE).code == 0
    assert same(weights("out"), expected)
    assert {name: data for name, data in tree(here).items() if name in before} == before
    assert {path.name for path in here.iterdir()} == {
        "base",
        "adapter",
        "second",
        "ink.safetensors",
        "out",
    }


def test_unmerge_restores_the_bytes(here: Path, run: Run) -> None:
    assert run(*MERGE).code == 0
    assert run("unmerge", "out", "adapter", "-o", "back", "--base", "base").code == 0
    assert run("unmerge", "out", "-o", "all", "--base", "base").code == 0
    assert tree(here / "back") == tree(here / "all") == tree(here / "base")


def test_unmerge_subtracts(here: Path, run: Run) -> None:
    assert run("merge", "base", "adapter:0.7", "-o", "out").code == 0
    document = run("unmerge", "out", "adapter:0.7", "-o", "back", "--json").document
    found, base = weights("back"), weights("base")
    error = sum(float((found[name] - base[name]).square().sum()) for name in base) ** 0.5
    assert error <= document["facts"]["error_bound"] < 1e-3
    assert document["notes"][-1]["level"] == "warning"


def test_dry_run_writes_nothing_and_foresees_the_report(here: Path, run: Run) -> None:
    before = tree(here)
    planned = run(*MERGE, "--dry-run", "--json").document
    assert tree(here) == before
    assert planned["output"] is None
    done = run(*MERGE, "--json").document
    assert planned["facts"].items() <= done["facts"].items()
    assert [i["tensor"] for i in planned["items"]] == [i["tensor"] for i in done["items"]]
    assert planned["notes"] == done["notes"]


@pytest.mark.parametrize("arguments", [["--overwrite"], ["--overwrite", "--dry-run"]])
def test_overwrite(here: Path, run: Run, arguments: list[str]) -> None:
    assert run("merge", "base", "second", "-o", "out").code == 0
    (here / "out/stale.json").write_text("{}")
    before = tree(here / "out")
    assert run(*MERGE).code == 1
    assert tree(here / "out") == before
    assert run(*MERGE, *arguments).code == 0
    assert (tree(here / "out") == before) == ("--dry-run" in arguments)
    assert (here / "out/stale.json").exists() == ("--dry-run" in arguments)


@pytest.mark.parametrize(("word", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_dtype(here: Path, run: Run, word: str, dtype: torch.dtype) -> None:
    assert run(*MERGE, "--dtype", word).code == 0
    assert {tensor.dtype for tensor in weights("out").values()} == {dtype}


def test_several_adapters_are_one_sum(here: Path, run: Run) -> None:
    assert run("merge", "base", "adapter:0.5", "second:-0.25", "-o", "out").code == 0
    assert run("merge", "base", "adapter:0.5", "-o", "one").code == 0
    assert run("merge", "one", "second:-0.25", "-o", "two").code == 0
    assert same(weights("out"), weights("two"))


# ---------------------------------------------------------------------------- paths


@pytest.mark.parametrize(
    ("base", "adapter", "output"),
    [
        ("my base", "my adapter", "my out"),
        ("базa", "ünï", "出力"),
        ("base/", "adapter/", "out/"),
        ("./base", "../here/adapter", "deep/er/out"),
        ("base", "{here}/adapter", "{here}/out"),
        pytest.param(
            "base:0.5", "adapter:v2", "out:1",
            marks=pytest.mark.skipif(os.name == "nt", reason="a colon in a name"),
        ),
    ],
)  # fmt: skip
def test_paths(
    here: Path, run: Run, expected: dict[str, torch.Tensor], base: str, adapter: str, output: str
) -> None:
    adapter, output = adapter.format(here=here), output.format(here=here)
    for old, new in (("base", base), ("adapter", adapter)):
        if not Path(new).exists():
            shutil.move(old, new)
    assert run("merge", base, adapter, "-o", output).code == 0
    assert same(weights(output), expected)


def test_the_working_directory_as_base(
    here: Path, run: Run, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(here / "base")
    assert run("merge", ".", "../adapter", "-o", "../out").code == 0
    assert same(weights(here / "out"), expected)


def cached(folder: Path) -> Path:
    """Move a folder into the shape of the Hub's cache: blobs, and links to them."""
    blobs = folder.parent / f"models--{folder.name}" / "blobs"
    snapshot = blobs.parent / "snapshots" / "0123abc"
    for made in (blobs, snapshot):
        made.mkdir(parents=True)
    for number, file in enumerate(sorted(folder.iterdir())):
        file.rename(blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(Path("../../blobs", f"{number:040x}"))
    folder.rmdir()
    return snapshot


@links
def test_snapshots_of_the_cache(here: Path, run: Run, expected: dict[str, torch.Tensor]) -> None:
    base, adapter = cached(here / "base"), cached(here / "adapter")
    before = tree(here)
    assert run("merge", base, adapter, "-o", "out").code == 0
    assert same(weights("out"), expected)
    assert not any(path.is_symlink() for path in (here / "out").iterdir())
    assert {name: data for name, data in tree(here).items() if name in before} == before


@links
def test_the_files_behind_links_survive(here: Path, run: Run) -> None:
    (here / "store").mkdir()
    for file in list((here / "base").iterdir()):
        shutil.move(file, here / "store" / file.name)
        file.symlink_to(here / "store" / file.name)
    before = tree(here / "store")
    assert run("merge", "base", "adapter", "-o", "store", "--overwrite").code == 1
    assert tree(here / "store") == before


@links
def test_a_side_file_that_leads_nowhere(here: Path, run: Run) -> None:
    (here / "base/tokenizer.json").symlink_to("gone")
    assert run(*MERGE, "--dry-run").code == 1
    outcome = run(*MERGE)
    assert outcome.code == 1
    assert "tokenizer.json" in outcome.err


@links
def test_a_side_folder_that_is_a_link(here: Path, run: Run) -> None:
    (here / "pooling").mkdir()
    (here / "pooling/config.json").write_text("{}")
    (here / "base/1_Pooling").symlink_to(here / "pooling")
    assert run(*MERGE).code == 0
    assert (here / "out/1_Pooling/config.json").read_text() == "{}"
    assert not (here / "out/1_Pooling").is_symlink()


@links
@pytest.mark.parametrize("target", [".", "..", "1_Pooling"])
def test_a_side_folder_that_leads_back(here: Path, run: Run, target: str) -> None:
    (here / "base/1_Pooling").mkdir()
    (here / "base/1_Pooling/again").symlink_to(here / "base" / target)
    outcome = run(*MERGE)
    assert outcome.code == 1
    assert "again: a link to a folder around it" in outcome.err


# ---------------------------------------------------------------------------- what is in the base


def test_side_files_come_along(here: Path, run: Run) -> None:
    base = here / "base"
    texts = {
        "generation_config.json": '{"temperature": 0.7}',
        "tokenizer.json": "{}",
        "chat_template.jinja": "{{ messages }}",
        "README.md": "# A model",
        "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    }
    for name, text in texts.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(text)
    assert run(*MERGE).code == 0
    assert {name: (here / "out" / name).read_text() for name in texts} == texts
    assert (here / "out/config.json").read_bytes() == (base / "config.json").read_bytes()


def test_modules_of_sentence_transformers(here: Path, run: Run) -> None:
    dense = here / "base/2_Dense"
    dense.mkdir()
    (dense / "config.json").write_text("{}")
    save_file({"linear.weight": torch.ones(2, 2)}, dense / "model.safetensors")
    (here / "base/modules.json").write_text("[]")
    assert run(*MERGE).code == 0
    assert tree(here / "out/2_Dense") == tree(dense)


@pytest.mark.skipif(os.name == "nt", reason="POSIX permissions")
def test_permissions_come_along(here: Path, run: Run) -> None:
    script = here / "base/serve.sh"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    assert run(*MERGE).code == 0
    assert os.access(here / "out/serve.sh", os.X_OK)


def test_other_copies_of_the_weights_stay_behind(
    here: Path, run: Run, expected: dict[str, torch.Tensor]
) -> None:
    torch.save({"other": torch.ones(2)}, here / "base/pytorch_model.bin")
    (here / "base/onnx").mkdir()
    (here / "base/onnx/model.onnx").write_bytes(b"x")
    outcome = run(*MERGE)
    assert outcome.code == 0
    assert same(weights("out"), expected)
    assert sorted(tree(here / "out")) == ["config.json", "model.safetensors"]
    assert "pytorch_model.bin" in outcome.err
    assert "model.onnx" in outcome.err


def test_a_torch_base(here: Path, run: Run, expected: dict[str, torch.Tensor]) -> None:
    torch.save(weights("base"), here / "base/pytorch_model.bin")
    (here / "base/model.safetensors").unlink()
    assert run(*MERGE).code == 0
    assert sorted(tree(here / "out")) == ["config.json", "model.safetensors"]
    assert same(weights("out"), expected)


def test_another_container_is_reported(here: Path, run: Run) -> None:
    torch.save(weights("base"), here / "base/pytorch_model.bin")
    (here / "base/model.safetensors").unlink()
    assert "safetensors" in str(run(*MERGE, "--json").document["notes"])


def test_a_whole_file_beside_an_index(
    here: Path, run: Run, expected: dict[str, torch.Tensor]
) -> None:
    index: dict[str, Any] = {
        "metadata": {},
        "weight_map": {"x": "model-00001-of-00001.safetensors"},
    }
    (here / "base/model.safetensors.index.json").write_text(json.dumps(index))
    assert run(*MERGE).code == 0
    assert same(weights("out"), expected)


def test_a_base_with_an_adapter_inside(here: Path, run: Run) -> None:
    for name in (WEIGHTS, "adapter_config.json"):
        shutil.copy(here / "adapter" / name, here / "base" / name)
    assert run(*MERGE).code == 0
    assert not (here / "out/adapter_config.json").exists()


def test_checkpoints_of_the_training_run_stay_behind(here: Path, run: Run) -> None:
    shutil.copytree(here / "base", here / "checkpoint")
    (here / "checkpoint").rename(here / "base/checkpoint-500")
    assert run(*MERGE).code == 0
    assert not (here / "out/checkpoint-500").exists()


@pytest.mark.parametrize("config", [None, '{"hidden_size": 64}'])
def test_a_config_that_says_little(
    here: Path, run: Run, expected: dict[str, torch.Tensor], config: str | None
) -> None:
    if config is None:
        (here / "base/config.json").unlink()
    else:
        (here / "base/config.json").write_text(config)
    assert run(*MERGE).code == 0
    assert same(weights("out"), expected)


def test_one_file_as_base(here: Path, run: Run, expected: dict[str, torch.Tensor]) -> None:
    (here / "base/model.safetensors").rename(here / "model.safetensors")
    assert run("merge", "model.safetensors", "adapter", "-o", "out.safetensors").code == 0
    assert same(load_file(here / "out.safetensors"), expected)


def test_an_adapter_in_a_sub_folder(
    here: Path, run: Run, expected: dict[str, torch.Tensor]
) -> None:
    (here / "run").mkdir()
    (here / "adapter").rename(here / "run/style")
    assert run("merge", "base", "run", "-o", "out").code == 0
    assert same(weights("out"), expected)
