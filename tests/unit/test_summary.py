"""What ``summarize`` says of a file, against what was put in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools.errors import InputError, MissingFileError, UnknownFormatError
from loratools.report import Report
from loratools.summary import summarize

Tensors = dict[str, Tensor]
PREFIX = "base_model.model."


def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lora_keys(
    path: str, rank: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32
) -> Tensors:
    """Return the tensors of one layer, (6, 4)."""
    return {
        f"{PREFIX}{path}.lora_A.weight": random(seed, rank, 4, dtype=dtype),
        f"{PREFIX}{path}.lora_B.weight": random(seed + 1, 6, rank, dtype=dtype),
    }


def save_adapter(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def save_base(folder: Path, tensors: Tensors, config: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def words(report: Report) -> str:
    return " | ".join(f"{note.subject}: {note.message}" for note in report.notes)


# ── adapters ─────────────────────────────────────────────────────────────────────────────────


def test_adapter(tmp_path: Path) -> None:
    """Counts, sizes and norms, recomputed from the tensors that were written."""
    tensors = {
        **lora_keys("h.0.q", seed=1),
        **lora_keys("h.1.q", seed=3),
        **lora_keys("h.1.v", rank=3, seed=5, dtype=torch.bfloat16),
        f"{PREFIX}score.weight": random(7, 3, 4),
    }
    folder = save_adapter(
        tmp_path / "a",
        tensors,
        rank_pattern={"v": 3},
        alpha_pattern={"h.1.q": 5},
        base_model_name_or_path="some/base",
        modules_to_save=["score"],
    )
    report = summarize(folder)
    facts = report.facts
    assert (report.operation, report.inputs, report.output) == ("inspect", (str(folder),), None)
    assert (facts["what"], facts["base_model"]) == ("adapter", "some/base")
    assert facts["layers"] == len(report.items) == 3
    assert facts["kinds"] == {"lora": 3}
    assert facts["ranks"] == {"2": 2, "3": 1}
    assert facts["alphas"] == {"4": 2, "5": 1}
    assert facts["targets"] == {"q": 2, "v": 1}
    assert facts["extras"] == {"score.weight": [3, 4]}
    assert facts["dtypes"] == {"F32": 5, "BF16": 2}
    assert facts["parameters"] == sum(tensor.numel() for tensor in tensors.values())
    assert facts["bytes"] == sum(t.numel() * t.element_size() for t in tensors.values())
    norms = []
    for item, rank, alpha in zip(report.items, (2, 2, 3), (4, 5, 4), strict=True):
        up, down = (tensors[f"{PREFIX}{item['module']}.lora_{side}.weight"] for side in "BA")
        norms.append(float((alpha / rank * up.double() @ down.double()).norm()))
        assert item["delta_norm"] == pytest.approx(norms[-1], rel=1e-6)
        assert (item["rank"], item["alpha"], item["scale"]) == (rank, alpha, alpha / rank)
        assert (item["shape"], item["parameters"]) == ([6, 4], up.numel() + down.numel())
        assert item["dtype"] == ("BF16" if rank == 3 else "F32")
    assert facts["delta_norm"] == pytest.approx(math.hypot(*norms), rel=1e-6)


def test_layers_come_in_natural_order_with_the_same_columns(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for number in (10, 2, 1):
        tensors |= lora_keys(f"h.{number}.q")
    report = summarize(save_adapter(tmp_path / "a", tensors))
    assert [item["module"] for item in report.items] == ["h.1.q", "h.2.q", "h.10.q"]
    assert len({tuple(item) for item in report.items}) == 1


def test_alphas_that_round_alike_are_counted_together(tmp_path: Path) -> None:
    """1 / 49 · 49 is not 1 in floats; two layers of alpha 1 are two all the same."""
    tensors = {**lora_keys("h.0.q"), **lora_keys("h.1.q", rank=49)}
    report = summarize(
        save_adapter(tmp_path / "a", tensors, lora_alpha=1, rank_pattern={"h.1.q": 49})
    )
    assert sum(report.facts["alphas"].values()) == 2


def test_close_alphas_are_not_lost(tmp_path: Path) -> None:
    """Values that print alike in six digits are still all counted."""
    tensors = {**lora_keys("h.0.q"), **lora_keys("h.1.q")}
    pattern = {"h.0.q": 1.0000001, "h.1.q": 1.0000002}
    report = summarize(save_adapter(tmp_path / "a", tensors, alpha_pattern=pattern))
    assert sum(report.facts["alphas"].values()) == 2


def test_share_of_the_base(tmp_path: Path) -> None:
    folder = save_adapter(tmp_path / "a", lora_keys("h.0.q"))
    base = save_base(tmp_path / "b", {"h.0.q.weight": random(1, 6, 4), "x": random(2, 76)})
    facts = summarize(folder, base=base).facts
    assert facts["base_parameters"] == 100
    assert facts["share_of_base"] == 20 / 100


def test_dora_has_no_norm_without_a_base(tmp_path: Path) -> None:
    tensors = {**lora_keys("h.0.q"), f"{PREFIX}h.0.q.lora_magnitude_vector": random(9, 6)}
    report = summarize(save_adapter(tmp_path / "a", tensors, use_dora=True))
    assert report.facts["kinds"] == {"dora": 1}
    assert report.items[0]["delta_norm"] is None
    assert report.facts["delta_norm"] is None
    assert "nan" not in report.to_json().lower()


def test_shapes_that_only_the_base_knows() -> None:
    """OFT and IA3 act on one side; the other has no size before a base is there."""
    golden = Path(__file__).parents[1] / "golden/kohya/lycoris.safetensors"
    shapes = {item["module"]: item["shape"] for item in summarize(golden).items}
    unknown = {name for name, shape in shapes.items() if shape is None}
    assert unknown == {
        f"lycoris_{kind}_{layer}" for kind in ("oft", "boft", "ia3") for layer in ("conv", "to_q")
    }
    assert shapes["lycoris_dora_conv"] == [8, 4, 3, 3]


# ── anomalies ────────────────────────────────────────────────────────────────────────────────


def test_a_sound_adapter_has_no_anomalies(tmp_path: Path) -> None:
    tensors = {**lora_keys("h.0.q"), **lora_keys("h.1.q")}
    assert summarize(save_adapter(tmp_path / "a", tensors)).notes == ()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none(bad: float, tmp_path: Path) -> None:
    """Told with the tensor's name; the report stays strict JSON."""
    tensors = lora_keys("h.0.q")
    tensors[f"{PREFIX}h.0.q.lora_B.weight"][3, 1] = bad
    report = summarize(save_adapter(tmp_path / "a", tensors))
    (warning,) = report.warnings
    assert warning.subject == "h.0.q (up)"
    json.loads(report.to_json(), parse_constant=pytest.fail)


def test_untrained_layers(tmp_path: Path) -> None:
    tensors = {**lora_keys("h.0.q"), **lora_keys("h.1.q")}
    tensors[f"{PREFIX}h.1.q.lora_B.weight"].zero_()
    report = summarize(save_adapter(tmp_path / "a", tensors))
    assert [w.message for w in report.warnings if "1 layer changes nothing" in w.message]


def test_gaps_between_layers(tmp_path: Path) -> None:
    """Layers in between that lack a target which others have; not the layers beyond them all."""
    tensors: Tensors = {}
    for number in (0, 1, 2, 3):
        tensors |= lora_keys(f"h.{number}.q")
    for number in (0, 3):
        tensors |= lora_keys(f"h.{number}.v")
    report = summarize(save_adapter(tmp_path / "a", tensors))
    (gap,) = [note for note in report.notes if "not in" in note.message]
    assert gap.subject == "h.N.v"
    assert gap.message.endswith("not in: 1, 2")


def test_stacks_of_different_lengths_have_no_gaps(tmp_path: Path) -> None:
    """FLUX has 19 double and 38 single blocks: neither lacks what only the other has."""
    tensors: Tensors = {}
    for number in range(2):
        tensors |= lora_keys(f"transformer_blocks.{number}.attn.to_q")
    for number in range(4):
        tensors |= lora_keys(f"single_transformer_blocks.{number}.attn.to_q")
    report = summarize(save_adapter(tmp_path / "a", tensors))
    assert "not in" not in words(report)


def test_blocks_of_a_unet_differ_by_design(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for block in (1, 3):
        tensors |= lora_keys(f"down_blocks.{block}.attentions.0.proj_in")
        tensors |= lora_keys(f"down_blocks.{block - 1}.resnets.0.conv1")
    assert "not in" not in words(summarize(save_adapter(tmp_path / "a", tensors)))


def test_gaps_of_flattened_names(tmp_path: Path) -> None:
    tensors: Tensors = {}
    for number in (0, 1, 2):
        for part in ("q", "v") if number != 1 else ("q",):
            stem = f"lora_te_text_model_encoder_layers_{number}_self_attn_{part}_proj"
            tensors[f"{stem}.lora_down.weight"] = random(number, 2, 4)
            tensors[f"{stem}.lora_up.weight"] = random(number + 9, 6, 2)
            tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "a.safetensors")
    (gap,) = [n for n in summarize(tmp_path / "a.safetensors").notes if "not in" in n.message]
    assert gap.subject == "lora_te_text_model_encoder_layers_N_self_attn_v_proj"
    assert gap.message == "adapted in 2 layers, but not in: 1"


def test_an_architecture_that_is_not_known_is_told_in_one_line(tmp_path: Path) -> None:
    tensors = {
        "lora_unet_odd.lora_down.weight": random(1, 2, 4),
        "lora_unet_odd.lora_up.weight": random(2, 6, 2),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    notes = summarize(tmp_path / "a.safetensors").notes
    assert [note.message.count("\n") for note in notes] == [0] * len(notes)
    assert any(note.subject == "architecture" for note in notes)


@pytest.mark.parametrize(("start", "word"), [("pissa", "moved the base"), ("corda", "cannot")])
def test_starts_that_moved_the_base(start: str, word: str, tmp_path: Path) -> None:
    report = summarize(save_adapter(tmp_path / "a", lora_keys("h.0.q"), init_lora_weights=start))
    assert word in words(report)
    assert report.facts["kinds"] == {"moved_base": 1}


def test_what_the_reader_resolved_is_told(tmp_path: Path) -> None:
    report = summarize(save_adapter(tmp_path / "a", lora_keys("h.0.q", rank=3)))
    assert "rank 3" in words(report)


# ── bases and other files ────────────────────────────────────────────────────────────────────


def test_base(tmp_path: Path) -> None:
    tensors = {
        "a.weight": random(1, 6, 4),
        "b.weight": random(2, 5, dtype=torch.bfloat16),
        "n": torch.arange(3),
    }
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": True,
        "quantization_config": {"quant_method": "gptq"},
    }
    report = summarize(save_base(tmp_path / "b", tensors, config))
    facts = report.facts
    assert facts["what"] == "base model"
    assert (facts["model_type"], facts["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert (facts["tied_embeddings"], facts["quantisation"]) == (True, "gptq")
    assert (facts["files"], facts["tensors"], facts["parameters"]) == (1, 3, 32)
    assert facts["parameters_by_dtype"] == {"F32": 24, "BF16": 5, "I64": 3}
    assert facts["bytes"] == 24 * 4 + 5 * 2 + 3 * 8
    rows = {item["tensor"]: (item["dtype"], item["shape"], item["file"]) for item in report.items}
    assert rows == {
        "a.weight": ("F32", [6, 4], "model.safetensors"),
        "b.weight": ("BF16", [5], "model.safetensors"),
        "n": ("I64", [3], "model.safetensors"),
    }


def test_a_single_file_without_adapter_words_is_a_base(tmp_path: Path) -> None:
    save_file({"a.weight": random(1, 2, 2)}, tmp_path / "x.safetensors")
    assert summarize(tmp_path / "x.safetensors").facts["what"] == "base model"


def test_a_base_with_adapters_in_sub_folders_is_a_base(tmp_path: Path) -> None:
    base = save_base(tmp_path / "b", {"h.0.q.weight": random(1, 6, 4)})
    save_adapter(base / "run1", lora_keys("h.0.q"))
    assert summarize(base).facts["what"] == "base model"


def test_an_adapter_in_an_unknown_format_is_no_base(tmp_path: Path) -> None:
    save_file({"h.0.lora_sideways": random(1, 2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(UnknownFormatError):
        summarize(tmp_path / "x.safetensors")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        summarize(tmp_path / "nowhere")
    with pytest.raises(InputError):
        summarize(tmp_path)
