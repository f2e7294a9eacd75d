"""``loratools resize``: what is written, what is said, and what is refused with which exit code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.cli.conftest import Run
from tests.strategies import make_tensor

MODULE = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"


def product(file: Path, module: str) -> torch.Tensor:
    """alpha / rank · up · down in float64."""
    tensors = load_file(file)
    up, down = (tensors[f"{module}.lora_{side}.weight"].double() for side in ("up", "down"))
    return up.flatten(1) @ down.flatten(1) * (float(tensors[f"{module}.alpha"]) / len(down))


def words(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        found: dict[str, str] = opened.metadata()
    return found


def write_kohya(file: Path, rank: int = 6, metadata: dict[str, str] | None = None) -> None:
    """A linear layer, a convolution and a trained bias of another layer."""
    tensors = {
        f"{MODULE}.lora_up.weight": make_tensor(1, 32, rank),
        f"{MODULE}.lora_down.weight": make_tensor(2, rank, 24),
        f"{MODULE}.alpha": torch.tensor(3.0),
        "lora_unet_input_blocks_4_0_in_layers_2.lora_up.weight": make_tensor(3, 16, rank, 1, 1),
        "lora_unet_input_blocks_4_0_in_layers_2.lora_down.weight": make_tensor(4, rank, 8, 3, 3),
        "lora_unet_input_blocks_4_0_in_layers_2.alpha": torch.tensor(3.0),
        "lora_unet_out_2.diff_b": make_tensor(5, 4),
    }
    save_file(tensors, file, metadata)


def test_the_nearest_change_of_a_rank_is_written(run: Run, tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_kohya(source)
    outcome = run("resize", source, "-o", target, "--rank", 2, "--json")
    assert outcome.code == 0, outcome.err
    before, after = product(source, MODULE), product(target, MODULE)
    left, values, right = torch.linalg.svd(before, full_matrices=False)
    nearest = (left[:, :2] * values[:2]) @ right[:2]
    assert float((after - nearest).norm()) <= 1e-6 * float(before.norm())
    item = next(i for i in outcome.document["items"] if i["module"] == MODULE)
    true = float((after - before).norm()) / float(before.norm())
    assert item["relative_error"] == pytest.approx(true, rel=1e-5)
    assert item["rank"] == 2
    assert item["alpha"] == 1.0
    bias = "lora_unet_out_2.diff_b"
    assert torch.equal(load_file(target)[bias], load_file(source)[bias])
    assert outcome.document["facts"]["layers_carried"] == 1
    notes = [note["message"] for note in outcome.document["notes"]]
    assert any("full" in note and "carried" in note for note in notes)
    sizes = [sum(t.nbytes for t in load_file(file).values()) for file in (source, target)]
    facts = outcome.document["facts"]
    assert [facts["bytes_before"], facts["bytes_after"]] == sizes


def test_training_words_become_true(run: Run, tmp_path: Path) -> None:
    said = {
        "ss_network_dim": "6",
        "ss_network_alpha": "3",
        "ss_network_args": json.dumps({"conv_dim": "6", "conv_alpha": "3", "dropout": "0"}),
        "ss_training_comment": "ink",
        "ss_output_name": "a",
        "sshs_model_hash": "0" * 64,
    }
    source = tmp_path / "a.safetensors"
    write_kohya(source, metadata=said)
    fixed, chosen = tmp_path / "fixed.safetensors", tmp_path / "chosen.safetensors"
    assert run("resize", source, "-o", fixed, "--rank", 4, "--conv-rank", 2).code == 0
    found = words(fixed)
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("4", "2")
    assert json.loads(found["ss_network_args"])["conv_dim"] == "2"
    assert json.loads(found["ss_network_args"])["dropout"] == "0"
    assert found["ss_training_comment"].endswith("; ink")
    assert "rank 4" in found["ss_training_comment"]
    assert found["ss_output_name"] == "a"
    assert found["sshs_model_hash"] != "0" * 64
    assert run("resize", source, "-o", chosen, "--sv-ratio", 1.5).code == 0
    ranks = {len(t) for n, t in load_file(chosen).items() if "lora_down" in n}
    assert len(ranks) > 1
    assert words(chosen)["ss_network_dim"] == "Dynamic"


def test_a_dry_run_shows_choices_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_kohya(source)
    outcome = run("resize", source, "-o", target, "--max-size", "4kB", "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    assert not target.exists()
    rows = {row["choice"]: row for row in outcome.document["facts"]["choices"]}
    for rank in (1, 2, 4):
        real = tmp_path / f"{rank}.safetensors"
        run("resize", source, "-o", real, "--rank", rank)
        assert rows[f"rank {rank}"]["bytes"] == sum(t.nbytes for t in load_file(real).values())
    assert rows["energy 0.9"]["retained_energy"] >= 0.9
    text = run("resize", source, "-o", target, "--max-size", "4kB", "--dry-run")
    assert "rank 2" in text.out
    assert "would resize" in text.out


def test_several_adapters_go_into_a_folder(run: Run, here: Path) -> None:
    write_kohya(here / "loras.safetensors")
    outcome = run("resize", "ink.safetensors", "loras.safetensors", "adapter", "-o", "out",
                  "--rank", 1, "--json")  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert len(outcome.document["facts"]["reports"]) == 3
    assert (here / "out/ink.safetensors").is_file()
    assert (here / "out/loras.safetensors").is_file()
    assert json.loads((here / "out/adapter/adapter_config.json").read_text("utf-8"))["r"] == 1


def test_dtypes_are_kept_or_changed(run: Run, here: Path) -> None:
    for word, dtype in (("keep", torch.float16), ("bf16", torch.bfloat16)):
        outcome = run("resize", "ink.safetensors", "-o", f"{word}.safetensors", "--rank", 3,
                      "--dtype", word)  # fmt: skip
        assert outcome.code == 0, outcome.err
        found = load_file(here / f"{word}.safetensors")
        assert {t.dtype for n, t in found.items() if "alpha" not in n} == {dtype}


REFUSED = [
    ((), 2, "which rank"),
    (("--rank", 2, "--energy", 0.5), 2, "exactly one"),
    (("--rank", 0), 2, "no rank"),
    (("--rank", 500), 2, "above the shape"),
    (("--energy", 1.5), 2, "share"),
    (("--max-size", "500B"), 2, "rank 1"),
    (("--max-size", "huge"), 2, "no size"),
    (("--mean-rank", 2, "--score", "frobenius"), 2, "--base"),
    (("--rank", 2, "--base", "nowhere"), 1, "nowhere"),
    (("--rank", 2, "--arch", "nowhere"), 2, "no architecture"),
]


@pytest.mark.parametrize(("options", "code", "word"), REFUSED, ids=str)
def test_refusals(
    options: tuple[object, ...], code: int, word: str, run: Run, tmp_path: Path
) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_kohya(source)
    outcome = run("resize", source, "-o", target, *options)
    assert outcome.code == code, outcome.err
    assert word in outcome.err
    assert "Hint:" in outcome.err
    assert not target.exists()


def test_what_has_no_rank_is_named(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "norms.safetensors"
    save_file({f"{MODULE}.diff": make_tensor(1, 8, 8)}, source)
    outcome = run("resize", source, "-o", tmp_path / "b.safetensors", "--rank", 2)
    assert outcome.code == 1
    assert MODULE in outcome.err


def test_a_format_that_is_only_read_is_refused(run: Run, tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "golden/xlabs/flux.safetensors"
    outcome = run("resize", source, "-o", tmp_path / "b.safetensors", "--rank", 1)
    assert outcome.code == 1
    assert "loratools convert" in outcome.err


def test_an_initialisation_that_moved_the_base_is_refused(run: Run, here: Path) -> None:
    config = here / "adapter/adapter_config.json"
    said = json.loads(config.read_text("utf-8")) | {"init_lora_weights": "pissa"}
    config.write_text(json.dumps(said), "utf-8")
    outcome = run("resize", "adapter", "-o", "out", "--rank", 2)
    assert outcome.code == 1
    assert "q_proj" in outcome.err
    assert not (here / "out").exists()


def test_values_that_are_no_numbers_are_named(run: Run, tmp_path: Path) -> None:
    source = tmp_path / "a.safetensors"
    write_kohya(source)
    tensors = load_file(source)
    tensors[f"{MODULE}.lora_up.weight"][3, 1] = torch.nan
    save_file(tensors, source)
    outcome = run("resize", source, "-o", tmp_path / "b.safetensors", "--rank", 2)
    assert outcome.code == 1
    assert MODULE in outcome.err


@pytest.mark.parametrize("rank", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8], ids=str)
def test_factors_of_8_bits(run: Run, tmp_path: Path, dtype: torch.dtype, rank: int) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_kohya(source, rank=4)
    tensors = load_file(source)
    small = {n: (t * 8).to(dtype) if ".lora_" in n else t for n, t in tensors.items()}
    save_file(small, source)
    for word in ("keep", "fp16"):
        options = ("--rank", rank, "--dtype", word, "--overwrite", "--json")
        done = run("resize", source, "-o", target, *options)
        assert done.code == 0, done.err
        before, after = product(source, MODULE), product(target, MODULE)
        item = next(i for i in done.document["items"] if i["module"] == MODULE)
        true = float((after - before).norm() / before.norm())
        assert item["relative_error"] == pytest.approx(true, rel=1e-4, abs=1e-7)
        kept = load_file(target)[f"{MODULE}.lora_up.weight"].dtype
        floats = dtype if dtype.is_floating_point else torch.float32
        assert kept == (torch.float16 if word == "fp16" else floats if rank < 4 else dtype)


def test_a_dtype_that_leaves_only_zeros_is_refused(run: Run, tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_kohya(source)
    save_file({n: t * 1e-20 if "lora" in n else t for n, t in load_file(source).items()}, source)
    assert run("resize", source, "-o", target, "--rank", 2, "--dtype", "bf16").code == 0
    done = run("resize", source, "-o", tmp_path / "c", "--rank", 2, "--dtype", "fp16")
    assert done.code == 1
    assert "lora_unet_input_blocks_4_0_in_layers_2: the values" in done.err
    assert not (tmp_path / "c").exists()


# ── several at a time ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("command", ["resize", "convert"])
def test_two_results_of_one_name_are_refused_before_the_first(
    run: Run, here: Path, command: str
) -> None:
    options = ("--rank", 1) if command == "resize" else ("--to", "kohya")
    (here / "more").mkdir()
    write_kohya(here / "more/ink.safetensors")
    for more in ((), ("--dry-run",), ("--overwrite",)):
        done = run(command, "ink.safetensors", "more/ink.safetensors", "-o", "out", *options, *more)
        assert done.code == 2
        assert "ink.safetensors and more/ink.safetensors" in done.err
    assert not (here / "out").exists()


@pytest.mark.parametrize("command", ["resize", "convert"])
def test_a_result_that_exists_is_refused_before_the_first(
    run: Run, here: Path, command: str
) -> None:
    options = ("--rank", 1) if command == "resize" else ("--to", "kohya")
    write_kohya(here / "loras.safetensors")
    (here / "out").mkdir()
    (here / "out/loras.safetensors").write_bytes(b"mine")
    for more in ((), ("--dry-run",)):
        done = run(command, "ink.safetensors", "loras.safetensors", "-o", "out", *options, *more)
        assert done.code == 1
        assert "out/loras.safetensors: already exists" in done.err
    assert [path.name for path in (here / "out").iterdir()] == ["loras.safetensors"]


def test_what_was_written_before_a_failure_is_told(run: Run, here: Path) -> None:
    done = run("resize", "ink.safetensors", "nowhere", "-o", "out", "--rank", 1, "--json")
    assert done.code == 1
    assert "nowhere" in done.document["message"]
    assert "written before: out/ink.safetensors" in done.document["message"]
    assert (here / "out/ink.safetensors").is_file()


def test_gguf_files_keep_their_suffix(run: Run, here: Path) -> None:
    made = run("convert", "adapter", "-o", "one.gguf", "--to", "gguf", "--base", "base")
    assert made.code == 0, made.err
    done = run("resize", "one.gguf", "ink.safetensors", "-o", "out", "--rank", 2)
    assert done.code == 0, done.err
    assert sorted(p.name for p in (here / "out").iterdir()) == ["ink.safetensors", "one.gguf"]
    assert run("inspect", "out/one.gguf", "--json").document["facts"]["ranks"] == {"2": 9}
