"""``loratools compose`` and ``loratools methods``: files in, one adapter out, or a reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.demo import make_adapter

from .conftest import Run, tree

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
Q1 = "model.layers.1.self_attn.q_proj"
NAMES = {"q": f"base_model.model.{Q1}", "v": "base_model.model.model.layers.0.self_attn.v_proj"}


def config(folder: Path | str, **changes: Any) -> dict[str, Any]:
    """Return a PEFT config, after writing changes to it."""
    path = Path(folder) / CONFIG
    words: dict[str, Any] = json.loads(path.read_text())
    if changes:
        path.write_text(json.dumps({**words, **changes}))
    return words


def rewrite(
    folder: Path | str, change: Callable[[dict[str, Tensor]], Mapping[str, Tensor] | None]
) -> None:
    path = Path(folder) / WEIGHTS
    tensors = load_file(path)
    found = change(tensors)
    save_file(dict(tensors if found is None else found), path, {"format": "pt"})


def change_of(folder: Path | str, module: str = Q1) -> Tensor:
    """alpha/rank·B·A of a plain PEFT folder, in float64; patterns by the module's full name."""
    words, tensors = config(folder), load_file(Path(folder) / WEIGHTS)
    up = tensors[f"base_model.model.{module}.lora_B.weight"].double()
    down = tensors[f"base_model.model.{module}.lora_A.weight"].double()
    ranks, alphas = words.get("rank_pattern", {}), words.get("alpha_pattern", {})
    rank = ranks.get(module, words["r"])
    assert down.shape[0] == rank
    return alphas.get(module, words["lora_alpha"]) / rank * up @ down


def near(found: Tensor, wanted: Tensor, tolerance: float = 1e-6) -> None:
    assert float((found - wanted).norm()) <= tolerance * float(wanted.norm())


# ── what comes out ───────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("here")
def test_the_default_is_the_exact_weighted_sum(run: Run) -> None:
    done = run("compose", "adapter:0.7", "second:-0.3", "-o", "out")
    assert done.code == 0, done.err
    assert "composed adapter + second -> out" in done.out
    near(change_of("out"), 0.7 * change_of("adapter") - 0.3 * change_of("second"))
    assert config("out")["r"] == 8
    assert config("out")["task_type"] == "CAUSAL_LM"


@pytest.mark.usefixtures("here")
def test_one_adapter_of_weight_1_keeps_every_byte_of_its_tensors(run: Run) -> None:
    assert run("compose", "adapter", "-o", "out").code == 0
    before, after = load_file(f"adapter/{WEIGHTS}"), load_file(f"out/{WEIGHTS}")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("here")
def test_the_same_bytes_on_every_run_and_other_ones_for_another_seed(run: Run) -> None:
    arguments = ("compose", "adapter", "second", "--method", "dare-ties", "--rank", "4", "-o")
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        assert run(*arguments, name, "--seed", seed).code == 0
    assert tree(Path("one")) == tree(Path("two"))
    assert tree(Path("one")) != tree(Path("three"))


@pytest.mark.usefixtures("here")
def test_weights_by_pattern_take_the_place_of_the_usual_ones(run: Run) -> None:
    rules = ("--weights", "q_proj=0.5,2", "--weights", "layers.1=0,1")
    assert run("compose", "adapter", "second:-1", "-o", "out", *rules).code == 0
    near(change_of("out"), 0.5 * change_of("adapter") + 2 * change_of("second"))
    down = "model.layers.1.mlp.down_proj"
    near(change_of("out", down), change_of("second", down))
    other = "model.layers.0.mlp.down_proj"
    near(change_of("out", other), change_of("adapter", other) - change_of("second", other))


@pytest.mark.usefixtures("here")
def test_rank_gives_the_best_approximation_and_says_what_it_cost(run: Run) -> None:
    done = run("compose", "adapter", "second", "-o", "out", "--rank", "5", "--json")
    assert done.code == 0
    item = next(row for row in done.document["items"] if row["module"] == Q1)
    exact = change_of("adapter") + change_of("second")
    missed = float((change_of("out") - exact).norm())
    values = torch.linalg.svdvals(exact)
    assert missed == pytest.approx(float(values[5:].norm()), rel=1e-5)
    assert item["rank"] == 5
    assert item["relative_error"] == pytest.approx(missed / float(exact.norm()), rel=1e-4)
    assert item["retained_energy"] == pytest.approx(1 - item["relative_error"] ** 2)
    first, second = change_of("adapter"), change_of("second")
    cosine = float((first * second).sum() / (first.norm() * second.norm()))
    assert item["cosines"]["1-2"] == pytest.approx(cosine, abs=1e-6)


@pytest.mark.usefixtures("here")
def test_layers_that_only_one_has_are_kept(run: Run) -> None:
    rewrite("second", lambda tensors: {n: t for n, t in tensors.items() if ".0." not in n})
    done = run("compose", "adapter:2", "second", "-o", "out", "--rank", "6", "--json")
    assert done.code == 0, done.err
    alone = "model.layers.0.self_attn.q_proj"
    near(change_of("out", alone), 2 * change_of("adapter", alone))
    assert done.document["facts"]["layers_shared"] == 6
    assert done.document["facts"]["ranks"] == {"4": 3, "6": 6}


@pytest.mark.usefixtures("here")
def test_dry_run_writes_nothing_and_reports_alike(run: Run) -> None:
    planned = run("compose", "adapter", "second", "-o", "out", "--dry-run", "--json")
    assert not Path("out").exists()
    real = run("compose", "adapter", "second", "-o", "out", "--json")
    assert planned.document["facts"] == real.document["facts"]


@pytest.mark.usefixtures("here")
def test_dtype_rounds_and_keep_says_that_factors_widened(run: Run) -> None:
    said = run("compose", "adapter", "second", "-o", "dry", "--dtype", "bf16", "--dry-run")
    assert "rounded to bf16" in said.err
    for name in ("adapter", "second"):
        rewrite(name, lambda tensors: {n: t.bfloat16() for n, t in tensors.items()})
    done = run("compose", "adapter:0.7", "second", "-o", "wide")
    assert "written in fp32" in done.err
    near(change_of("wide"), 0.7 * change_of("adapter") + change_of("second"))
    assert run("compose", "adapter:0.7", "second", "-o", "narrow", "--dtype", "bf16").code == 0
    assert {t.dtype for t in load_file(f"narrow/{WEIGHTS}").values()} == {torch.bfloat16}
    near(change_of("narrow"), change_of("wide"), 1e-2)


# ── formats ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("here")
def test_formats_meet_and_the_first_one_is_written(run: Run) -> None:
    from tests.image_adapters import write_kohya_sdxl

    write_kohya_sdxl(Path("other.safetensors"), seed=8)
    assert run("convert", "other.safetensors", "-o", "o.safetensors", "--to", "diffusers").code == 0
    for name in ("other.safetensors", "o.safetensors"):
        done = run("compose", "ink.safetensors:0.7", f"{name}:-0.3", "-o", f"sum-{name}", "--json")
        assert done.code == 0, done.out
        assert done.document["facts"]["to"] == "kohya"
    module = "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k"
    ink, other, made = (load_file(f"{name}.safetensors") for name in ("ink", "other", "sum-o"))

    def dense(tensors: dict[str, Tensor]) -> Tensor:
        up, down = (tensors[f"{module}.lora_{w}.weight"].double() for w in ("up", "down"))
        return float(tensors[f"{module}.alpha"]) / len(down) * up @ down

    near(dense(made), 0.7 * dense(ink) - 0.3 * dense(other))
    assert run("diff", "sum-o.safetensors", "sum-other.safetensors").code == 0
    done = run(
        "compose", "ink.safetensors:0.7", "o.safetensors:-0.3", "-o", "d.safetensors",
        "--to", "diffusers",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert run("diff", "sum-o.safetensors", "d.safetensors").code == 0


@pytest.mark.usefixtures("here")
def test_what_kohya_files_say_of_themselves_stays_true(run: Run) -> None:
    from safetensors import safe_open

    assert run("compose", "ink.safetensors", "ink.safetensors:0.5", "-o", "k.safetensors").code == 0
    with safe_open("k.safetensors", "pt") as file:
        words = file.metadata()
    assert words["ss_network_dim"] == "2"
    assert "2 adapters composed (linear, 1 + 0.5)" in words["ss_training_comment"]


def test_projections_that_the_target_fuses_get_one_rank(run: Run, here: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        tensors = {}
        for part in ("to_q", "to_k", "to_v"):
            path = f"transformer.transformer_blocks.0.attn.{part}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(2, 3072, generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(3072, 2, generator=generator)
        save_file(tensors, f"{name}.safetensors", {"format": "pt"})
    done = run(
        "compose", "a.safetensors", "b.safetensors", "-o", "f.safetensors", "--to", "kohya",
        "--rank", "3", "--arch", "flux1", "--json",
    )  # fmt: skip
    assert done.code == 0, done.out
    assert [row["rank"] for row in done.document["items"]] == [3]


@pytest.mark.usefixtures("here")
def test_gguf_and_peft_meet(run: Run) -> None:
    assert run("convert", "second", "-o", "s.gguf", "--to", "gguf", "--base", "base").code == 0
    assert run("compose", "adapter:0.7", "s.gguf:-0.3", "-o", "out").code == 0
    near(change_of("out"), 0.7 * change_of("adapter") - 0.3 * change_of("second"))
    pair = ("compose", "s.gguf:-0.3", "adapter:0.7", "-o", "out.gguf")
    refused = run(*pair)
    assert (refused.code, "--base" in refused.err) == (1, True)
    assert run(*pair, "--base", "base").code == 0
    assert run("diff", "out", "out.gguf").code == 0


# ── experts, attention, embeddings ───────────────────────────────────────────────────────────


def write_peft(folder: str, tensors: Mapping[str, Tensor], **words: Any) -> None:
    Path(folder).mkdir()
    named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
    save_file(named, f"{folder}/{WEIGHTS}", {"format": "pt"})
    (Path(folder) / CONFIG).write_text(json.dumps({"peft_type": "LORA", **words}))


@pytest.mark.usefixtures("here")
def test_stacked_experts_are_combined_one_by_one(run: Run) -> None:
    from loratools.adapter_io import load_adapter

    generator = torch.Generator().manual_seed(3)
    path = "model.layers.0.mlp.experts"
    for name, rank in (("a", 2), ("b", 1)):
        factors = {
            f"{path}.lora_A.weight": torch.randn(3 * rank, 8, generator=generator),
            f"{path}.lora_B.weight": torch.randn(6, 3 * rank, generator=generator),
        }
        target = ["mlp.experts.down_proj"]
        write_peft(name, factors, r=rank, lora_alpha=4, target_modules=[], target_parameters=target)
    assert run("compose", "a:0.5", "b:-1", "-o", "sum").code == 0
    (made,), (first,), (second,) = (
        list(load_adapter(name).layers.values()) for name in ("sum", "a", "b")
    )
    exact = 0.5 * first.materialize().double() - second.materialize().double()
    near(made.materialize().double(), exact)
    done = run("compose", "a:0.5", "b:-1", "-o", "cut", "--rank", "2", "--json")
    (cut,) = load_adapter("cut").layers.values()
    tails = [torch.linalg.svdvals(matrix)[2:] for matrix in exact]
    missed = float(torch.cat(tails).norm() / exact.norm())
    assert float((cut.materialize() - exact).norm() / exact.norm()) == pytest.approx(
        missed, rel=1e-4
    )
    assert done.document["facts"]["relative_error"] == pytest.approx(missed, rel=1e-4)


@pytest.mark.usefixtures("here")
def test_attention_keeps_one_rank_and_alpha_for_its_two_layers(run: Run) -> None:
    from loratools.adapter_io import load_adapter

    generator = torch.Generator().manual_seed(3)
    for name, rank in (("a", 2), ("b", 3)):
        factors = {
            "attn.lora_A.weight": torch.randn(rank, 8, generator=generator),
            "attn.lora_B.weight": torch.randn(24, rank, generator=generator),
            "attn.base_layer.out_proj.lora_A.weight": torch.randn(rank, 8, generator=generator),
            "attn.base_layer.out_proj.lora_B.weight": torch.randn(8, rank, generator=generator),
        }
        write_peft(name, factors, r=rank, lora_alpha=4, target_modules=["attn"])
    for extra in ((), ("--rank", "2")):
        assert run("compose", "a", "b:0.5", "-o", f"out{len(extra)}", *extra).code == 0
    made, first, second = (load_adapter(name).layers for name in ("out0", "a", "b"))
    for path in ("attn", "attn.out_proj"):
        exact = first[path].materialize().double() + 0.5 * second[path].materialize().double()
        near(made[path].materialize().double(), exact)


@pytest.mark.usefixtures("here")
def test_attention_keeps_one_rank_where_one_of_its_layers_needs_less(run: Run) -> None:
    from loratools.adapter_io import load_adapter

    generator = torch.Generator().manual_seed(3)
    same = torch.randn(2, 8, generator=generator), torch.randn(8, 2, generator=generator)
    for name in ("a", "b"):
        factors = {
            "attn.lora_A.weight": torch.randn(2, 8, generator=generator),
            "attn.lora_B.weight": torch.randn(24, 2, generator=generator),
            "attn.base_layer.out_proj.lora_A.weight": same[0],
            "attn.base_layer.out_proj.lora_B.weight": same[1],
        }
        write_peft(name, factors, r=2, lora_alpha=4, target_modules=["attn"])
    done = run("compose", "a", "b:0.5", "-o", "out", "--method", "svd")
    assert done.code == 0, done.err
    assert config("out")["r"] == 4
    made, first = (load_adapter(name).layers["attn.out_proj"] for name in ("out", "a"))
    near(made.materialize().double(), 1.5 * first.materialize().double())


def test_a_bias_is_not_scaled_with_attention() -> None:
    from loratools.composition.layers import Recipe, combine_layer
    from loratools.deltas import LoRA
    from loratools.merge_methods import get_method

    generator = torch.Generator().manual_seed(1)
    down, up = torch.randn(2, 4, generator=generator), torch.randn(5, 2, generator=generator)
    lora = LoRA(down, up, 3.0, torch.ones(5), "attention_out")
    weights = torch.tensor([1.0, 2.0], dtype=torch.float64)
    done = combine_layer("m", (lora, lora), weights, Recipe(get_method("linear"), 1.0, 0, None))
    assert done.delta.bias_change is not None
    torch.testing.assert_close(done.delta.bias_change, torch.full((5,), 4.5))


@pytest.mark.usefixtures("here")
def test_biases_and_embeddings_add_up(run: Run) -> None:
    from loratools.adapter_io import load_adapter

    generator = torch.Generator().manual_seed(3)
    for name, rank in (("a", 2), ("b", 3)):
        factors = {
            "wte.lora_embedding_A": torch.randn(rank, 9, generator=generator),
            "wte.lora_embedding_B": torch.randn(5, rank, generator=generator),
            "fc.lora_A.weight": torch.randn(rank, 4, generator=generator),
            "fc.lora_B.weight": torch.randn(5, rank, generator=generator),
            "fc.lora_B.bias": torch.randn(5, generator=generator),
        }
        write_peft(
            name, factors, r=rank, lora_alpha=4, target_modules=["wte", "fc"], lora_bias=True
        )
    assert run("compose", "a:0.5", "b:-2", "-o", "out").code == 0
    made, first, second = (load_adapter(name).layers for name in ("out", "a", "b"))
    for path in ("wte", "fc"):
        exact = 0.5 * first[path].materialize().double() - 2 * second[path].materialize().double()
        near(made[path].materialize().double(), exact)
    a, b = (load_file(f"{name}/{WEIGHTS}")["base_model.model.fc.lora_B.bias"] for name in "ab")
    assert made["fc"].bias_change is not None
    near(made["fc"].bias_change.double(), 0.5 * 2 * a.double() - 2 * 4 / 3 * b.double())


# ── full tensors ─────────────────────────────────────────────────────────────────────────────


def add_head(folder: str, value: float) -> None:
    head = {"base_model.model.lm_head.weight": torch.full((256, 64), value)}
    rewrite(folder, lambda tensors: tensors | head)
    config(folder, modules_to_save=["lm_head"])


@pytest.mark.usefixtures("here")
def test_replaced_tensors_whose_weights_sum_to_1_need_no_base(run: Run) -> None:
    add_head("adapter", 1.0)
    add_head("second", 5.0)
    assert run("compose", "adapter:0.75", "second:0.25", "-o", "out").code == 0
    made = load_file(f"out/{WEIGHTS}")["base_model.model.lm_head.weight"]
    assert torch.equal(made, torch.full((256, 64), 2.0))


@pytest.mark.usefixtures("here")
def test_replaced_tensors_of_other_weights_need_the_base(run: Run) -> None:
    add_head("adapter", 1.0)
    add_head("second", 5.0)
    done = run("compose", "adapter", "second", "-o", "out")
    assert done.code == 1
    assert "lm_head.weight" in done.err
    assert "--base" in done.err
    assert not Path("out").exists()
    assert run("compose", "adapter", "second", "-o", "out", "--base", "base").code == 0
    made = load_file(f"out/{WEIGHTS}")["base_model.model.lm_head.weight"]
    base = load_file("base/model.safetensors")["lm_head.weight"]
    torch.testing.assert_close(made, base + (1.0 - base) + (5.0 - base))
    weights = ("--weights", "lm_head=0.5,0.5")
    assert run("compose", "adapter", "second", "-o", "half", *weights).code == 0
    made = load_file(f"half/{WEIGHTS}")["base_model.model.lm_head.weight"]
    assert torch.equal(made, torch.full((256, 64), 3.0))


@pytest.mark.usefixtures("here")
def test_a_replaced_tensor_that_one_adapter_brings_counts_with_its_own_weight(run: Run) -> None:
    add_head("adapter", 1.0)
    assert run("compose", "adapter", "second:0.5", "-o", "out").code == 0
    made = load_file(f"out/{WEIGHTS}")["base_model.model.lm_head.weight"]
    assert torch.equal(made, torch.ones(256, 64))
    assert run("compose", "adapter:0.5", "second", "-o", "part").code == 1


@pytest.mark.usefixtures("here")
def test_replaced_tensors_keep_the_widest_float_type_of_all(run: Run) -> None:
    make_adapter(Path("third"), seed=3)
    head = "base_model.model.lm_head.weight"
    for name, dtype in (
        ("adapter", torch.float16), ("second", torch.float32), ("third", torch.float8_e4m3fn),
    ):  # fmt: skip
        add_head(name, 1.0)
        rewrite(name, lambda t, d=dtype: t | {head: torch.full((256, 64), 1.0, dtype=d)})  # type: ignore[misc]
    rewrite("second", lambda t: t | {head: torch.full((256, 64), 1 / 3)})
    done = run("compose", "adapter:0.5", "second:0.25", "third:0.25", "-o", "out")
    assert done.code == 0, done.err
    made = load_file(f"out/{WEIGHTS}")[head]
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, torch.full((256, 64), 0.75 + 1 / 12))


@pytest.mark.usefixtures("here")
def test_trained_rows_of_both_are_there(run: Run) -> None:
    table = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    for name, rows, value in (("adapter", [3, 7], 1.0), ("second", [7, 9], 3.0)):
        rewrite(name, lambda t, v=value: t | {table: torch.full((2, 64), v)})  # type: ignore[misc]
        config(name, trainable_token_indices={"embed_tokens": rows})
    assert run("compose", "adapter", "second", "-o", "out").code == 1
    assert run("compose", "adapter", "second", "-o", "out", "--base", "base").code == 0
    base = load_file("base/model.safetensors")["model.embed_tokens.weight"]
    made = load_file(f"out/{WEIGHTS}")[table]
    assert list(config("out")["trainable_token_indices"].values()) == [[3, 7, 9]]
    assert torch.equal(made[0], torch.ones(64))
    torch.testing.assert_close(made[1], base[7] + (1 - base[7]) + (3 - base[7]))
    assert torch.equal(made[2], torch.full((64,), 3.0))


# ── warnings ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.usefixtures("here")
def test_warns_of_different_base_models_and_of_a_zero_result(run: Run) -> None:
    config("adapter", base_model_name_or_path="one/model")
    config("second", base_model_name_or_path="other/model")
    done = run("compose", "adapter", "second", "-o", "out")
    assert done.code == 0
    assert "adapter on one/model, second on other/model" in done.err
    for method in ("svd", "linear"):
        done = run("compose", "adapter", "adapter:-1", "-o", method, "--method", method)
        assert done.code == 0
        assert "every layer is zero" in done.err
    assert config("svd")["r"] == 1
    assert not change_of("svd").any()


# ── refusals ─────────────────────────────────────────────────────────────────────────────────

_BAD_OPTIONS = [
    (("--method", "tise"), "did you mean ties"),
    (("--method", "ties"), "--rank"),
    (("--method", "ties", "--rank", "4", "--density", "0"), "outside (0, 1]"),
    (("--method", "ties", "--rank", "4", "--density", "1.5"), "outside (0, 1]"),
    (("--density", "nan"), "outside (0, 1]"),
    (("--density", "0.5"), "linear has no density"),
    (("--rank", "0"), "no rank"),
    (("--rank", "65"), "give at most 64"),
    (("--method", "slerp", "--weights", "q_proj=-1,1"), "shares"),
    (("--weights", "q_proj=1"), "1 weights for 2 adapters"),
    (("--weights", "q_proj"), "PATTERN=w1,w2"),
    (("--weights", "=1,2"), "no pattern"),
    (("--weights", "1,2"), "no pattern"),
    (("--weights", "q_proj=1,x"), "PATTERN=w1,w2"),
    (("--weights", "q_proj=1,inf"), "not finite"),
    (("--weights", "(=1,2"), "PATTERN=w1,w2"),
    (("--weights", "nowhere=1,2"), "fits no module"),
    (("--to", "pfet"), "did you mean peft"),
    (("--to", "xlabs"), "read, not written"),
]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("options", "words"), _BAD_OPTIONS, ids=str)
def test_wrong_options_exit_2_with_the_remedy(
    run: Run, options: tuple[str, ...], words: str
) -> None:
    done = run("compose", "adapter", "second", "-o", "out", *options)
    assert done.code == 2, done.err
    assert words in done.err
    assert not Path("out").exists()


@pytest.mark.usefixtures("here")
def test_a_number_of_adapters_that_the_method_does_not_take(run: Run) -> None:
    done = run("compose", "adapter", "second", "adapter", "-o", "out", "--method", "slerp")
    assert (done.code, "karcher" in done.err) == (2, True)


@pytest.mark.usefixtures("here")
def test_shapes_that_differ_are_named_both(run: Run) -> None:
    rewrite("second", lambda t: t.update({f"{NAMES['q']}.lora_A.weight": torch.ones(4, 32)}))
    done = run("compose", "adapter", "second", "-o", "out")
    assert done.code == 1
    for words in (Q1, "(64, 64)", "(64, 32)", "adapter", "second"):
        assert words in done.err


@pytest.mark.usefixtures("here")
def test_no_module_in_common(run: Run) -> None:
    rewrite("adapter", lambda tensors: {n: t for n, t in tensors.items() if "q_proj" in n})
    rewrite("second", lambda tensors: {n: t for n, t in tensors.items() if "v_proj" in n})
    done = run("compose", "adapter", "second", "-o", "out")
    assert done.code == 1
    assert "no module in common" in done.err


@pytest.mark.usefixtures("here")
def test_adapters_for_different_models_are_named_both(run: Run) -> None:
    done = run("compose", "ink.safetensors", "adapter", "-o", "out.safetensors")
    assert done.code == 1
    sd1 = {
        f"lora_unet_{block}_attentions_0_transformer_blocks_0_attn2_to_k": width
        for block, width in (("down_blocks_0", 320), ("down_blocks_1", 640), ("mid_block", 1280))
    }
    tensors = {}
    for name, width in sd1.items():
        tensors[f"{name}.lora_down.weight"] = torch.ones(2, 768)
        tensors[f"{name}.lora_up.weight"] = torch.ones(width, 2)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, "sd1.safetensors", {"ss_base_model_version": "sd_v1"})
    done = run("compose", "ink.safetensors", "sd1.safetensors", "-o", "out.safetensors")
    assert done.code == 1
    assert "ink.safetensors is for Stable Diffusion XL" in done.err
    assert "sd1.safetensors is for Stable Diffusion 1" in done.err


@pytest.mark.usefixtures("here")
def test_changes_that_depend_on_the_base_are_refused_by_name(run: Run) -> None:
    def with_magnitude(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("lora_A.weight")]:
            path = name.removesuffix(".lora_A.weight")
            rows = tensors[f"{path}.lora_B.weight"].shape[0]
            tensors[f"{path}.lora_magnitude_vector"] = torch.ones(rows)

    rewrite("second", with_magnitude)
    config("second", use_dora=True)
    done = run("compose", "adapter", "second", "-o", "out")
    assert done.code == 1
    assert f"second: {Q1} (dora)" in done.err
    assert "loratools extract" in done.err


@pytest.mark.usefixtures("here")
def test_methods_on_factors_need_equal_ranks(run: Run) -> None:
    half = {"lora_A": lambda t: t[:2].clone(), "lora_B": lambda t: t[:, :2].clone()}
    rewrite("second", lambda ts: {n: half[n.split(".")[-2]](t) for n, t in ts.items()})
    config("second", r=2)
    done = run("compose", "adapter", "second", "-o", "out", "--method", "peft-linear")
    assert done.code == 1
    assert "peft-linear needs equal ranks, and these are 4, 2" in done.err


@pytest.mark.usefixtures("here")
def test_an_input_is_never_overwritten_and_an_output_only_on_demand(run: Run) -> None:
    before = tree(Path("adapter"))
    assert run("compose", "adapter", "second", "-o", "adapter", "--overwrite").code == 1
    assert tree(Path("adapter")) == before
    assert run("compose", "adapter", "second", "-o", "out").code == 0
    assert run("compose", "adapter", "second", "-o", "out").code == 1
    assert run("compose", "adapter", "second", "-o", "out", "--overwrite").code == 0


@pytest.mark.usefixtures("here")
def test_nan_is_refused(run: Run, damaged: Callable[..., None]) -> None:
    damaged(lambda tensors: tensors[f"{NAMES['q']}.lora_A.weight"].fill_(float("nan")))
    done = run("compose", "adapter", "second", "-o", "out")
    assert (done.code, "NaN" in done.err) == (1, True)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("weight", "options"),
    [
        ("1e308", ()),
        ("1e300", ("--method", "svd")),
        ("1e300", ("--method", "ties", "--rank", "2")),
        ("1e300", ("--method", "core-ties")),
    ],
    ids=str,
)
def test_a_result_beyond_float32_is_refused(
    run: Run, weight: str, options: tuple[str, ...]
) -> None:
    for second in ("second", "adapter"):
        done = run("compose", f"adapter:{weight}", f"{second}:{weight}", "-o", "out", *options)
        assert (done.code, "beyond float32" in done.err) == (1, True), done.err
        assert "model.layers.0" in done.err
        assert not Path("out").exists()


@pytest.mark.usefixtures("here")
def test_an_alpha_beyond_float32_is_refused(run: Run) -> None:
    config("adapter", lora_alpha=1e300)
    done = run("compose", "adapter", "second", "-o", "out")
    assert (done.code, "lora_alpha is 1e+300" in done.err) == (1, True)


@pytest.mark.usefixtures("here")
def test_a_dtype_that_leaves_only_zeros_is_refused(run: Run) -> None:
    rewrite("adapter", lambda tensors: {name: t * 1e-20 for name, t in tensors.items()})
    assert run("compose", "adapter", "-o", "out", "--dtype", "bf16").code == 0
    done = run("compose", "adapter", "-o", "half", "--dtype", "fp16")
    assert (done.code, "all 0 in fp16" in done.err) == (1, True)
    assert not Path("half").exists()


@pytest.mark.usefixtures("here")
def test_a_weight_of_no_use_is_called_a_weight(run: Run) -> None:
    for weight in ("0", "nan", "inf", "x"):
        done = run("compose", f"adapter:{weight}", "second", "-o", "out")
        assert done.code == 2
        assert f"weight {weight}" in done.err.replace("'", "")
    assert "strength 0" in run("merge", "base", "adapter:0", "-o", "out").err


@pytest.mark.usefixtures("here")
def test_the_base_is_looked_at_even_where_nothing_needs_it(run: Run) -> None:
    assert run("compose", "adapter", "second", "-o", "out", "--base", "nowhere").code == 1
    assert run("compose", "adapter", "second", "-o", "out", "--base", "adapter").code == 1
    assert run("compose", "adapter", "second", "-o", "out", "--base", "base").code == 0


@pytest.mark.usefixtures("here")
def test_a_file_is_not_replaced_by_a_folder(run: Run) -> None:
    Path("x.safetensors").write_bytes(b"mine")
    for more in ((), ("--dry-run",)):
        done = run("compose", "adapter", "second", "-o", "x.safetensors", "--overwrite", *more)
        assert (done.code, "is not a folder" in done.err) == (1, True)
    assert Path("x.safetensors").read_bytes() == b"mine"


@pytest.mark.usefixtures("here")
def test_8_bit_floats_are_read_and_combined(run: Run) -> None:
    rewrite("adapter", lambda tensors: {n: t.to(torch.float8_e4m3fn) for n, t in tensors.items()})
    assert run("compose", "adapter", "second:-1", "-o", "out").code == 0
    tensors = load_file("adapter/adapter_model.safetensors")
    up, down = (tensors[f"base_model.model.{Q1}.lora_{s}.weight"].double() for s in "BA")
    near(change_of("out"), 2 * up @ down - change_of("second"))


# ── methods ──────────────────────────────────────────────────────────────────────────────────


def test_methods_lists_every_row(run: Run) -> None:
    from loratools.merge_methods import METHODS

    listed = run("methods", "--json").document["items"]
    assert [row["method"] for row in listed] == [row.name for row in METHODS]
    assert "arXiv:2306.01708" in run("methods").out


@pytest.mark.usefixtures("here")
def test_every_listed_method_composes(run: Run) -> None:
    from loratools.merge_methods import METHODS

    for row in METHODS:
        rank = ("--rank", "3") if row.needs_rank else ()
        done = run(
            "compose", "adapter", "second", "-o", f"out-{row.name}", "--method", row.name, *rank
        )
        assert done.code == 0, done.err
