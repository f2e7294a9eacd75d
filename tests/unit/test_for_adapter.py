"""``--for-adapter``: from the adapter's record to the scheme, and what is refused on the way."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import cli
from loratools.codecs.bnb4_weight import quantise_bnb4
from loratools.codecs.fp8 import quantise_fp8
from loratools.codecs.mlx_affine import quantise_mlx
from loratools.demo import make_adapter, make_base
from loratools.errors import HubError, InputError, MissingFileError, OptionError, UnsupportedError
from loratools.quantize import dequantize_base, quantize_base
from tests.hub_server import HubServer

NF4 = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "float32",
}  # fmt: skip
FP8 = {"quant_method": "fp8", "weight_block_size": [32, 64], "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128}
LINEAR = "model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A small Llama in bfloat16."""
    make_base(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    weights = {name: weight.bfloat16() for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    edit(tmp_path / "base" / "config.json", dtype="bfloat16")
    return tmp_path / "base"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    make_adapter(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(file: Path, **words: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **words}))


def record(adapter: Path, name: object, **words: Any) -> Path:
    edit(adapter / "adapter_config.json", base_model_name_or_path=str(name), **words)
    return adapter


def trained(folder: Path, words: dict[str, Any] | None, **more: Any) -> Path:
    """Make a base's folder with nothing but its config, which is all that is read of it."""
    folder.mkdir()
    fields: dict[str, Any] = {"model_type": "llama", "dtype": "bfloat16", **more}
    fields |= {"quantization_config": words} if words else {}
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def test_the_words_of_the_trained_base_are_those_that_are_written(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    words = {**NF4, "llm_int8_skip_modules": ["lm_head", ".*mlp"], "something_else": 3}
    record(adapter, trained(tmp_path / "t", words))
    quantize_base(base, tmp_path / "out", for_adapter=adapter)
    assert config(tmp_path / "out")["quantization_config"] == words
    coded = {name for name in tensors(tmp_path / "out") if name.endswith("absmax")}
    assert coded == {
        f"model.layers.{layer}.self_attn.{kind}_proj.weight.absmax"
        for layer in range(len(coded) // 4)
        for kind in "qkvo"
    }


@pytest.mark.parametrize("nested", [False, True])
def test_the_weights_seen_are_the_codecs(
    base: Path, adapter: Path, tmp_path: Path, nested: bool
) -> None:
    record(adapter, trained(tmp_path / "t", {**NF4, "bnb_4bit_use_double_quant": nested}))
    report = dequantize_base(base, tmp_path / "out", for_adapter=adapter)
    found, plain = tensors(tmp_path / "out"), tensors(base)
    assert found.keys() == plain.keys()
    for name, weight in plain.items():
        expected = weight
        if "_proj" in name:
            coded = quantise_bnb4(weight.float(), "nf4", 64, nested=nested)
            expected = coded.decode(0, len(weight)).bfloat16()
        assert torch.equal(found[name], expected), name
    assert str(tmp_path / "t") in report.notes[0].message
    assert "bitsandbytes nf4" in report.notes[0].message


def test_blocks_of_another_size_are_found_in_the_weights(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Where bitsandbytes' AMD builds made the base: the config does not tell."""
    folder = trained(tmp_path / "t", NF4)
    coded = quantise_bnb4(torch.randn(64, 64), "nf4", 128)
    state = {"quant_type": "nf4", "blocksize": 128, "dtype": "bfloat16", "shape": [64, 64]}
    parts = {f"{LINEAR}.weight.{part}": tensor for part, tensor in coded.parts.items()}
    parts[f"{LINEAR}.weight"] = parts.pop(f"{LINEAR}.weight.weight")
    words = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    parts[f"{LINEAR}.weight.quant_state.bitsandbytes__nf4"] = words
    save_file(parts, folder / "model.safetensors", {"format": "pt"})
    report = quantize_base(base, tmp_path / "out", for_adapter=record(adapter, folder))
    weight = tensors(base)[f"{LINEAR}.weight"].float()
    expected = quantise_bnb4(weight, "nf4", 128)
    assert torch.equal(
        tensors(tmp_path / "out")[f"{LINEAR}.weight.absmax"], expected.parts["absmax"]
    )
    assert "blocks of 128" in report.notes[0].message
    quantize_base(base, tmp_path / "other", to="nf4")
    with pytest.raises(UnsupportedError, match="blocks of 128"):
        dequantize_base(tmp_path / "other", tmp_path / "no", for_adapter=adapter)


def test_fp8_blocks_are_those_of_the_trained_base(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    words = {**FP8, "modules_to_not_convert": ["lm_head", "down_proj"]}
    record(adapter, trained(tmp_path / "t", words))
    quantize_base(base, tmp_path / "out", for_adapter=adapter)
    found, plain = tensors(tmp_path / "out"), tensors(base)
    assert config(tmp_path / "out")["quantization_config"] == words
    for name, weight in plain.items():
        if "_proj" not in name or "down" in name:
            assert torch.equal(found[name], weight)
            continue
        expected = quantise_fp8(weight.float(), (32, 64)).parts
        assert torch.equal(found[name].float(), expected["weight"].float())
        assert torch.equal(found[f"{name}_scale_inv"], expected["scale"])
    dequantize_base(base, tmp_path / "one", for_adapter=adapter)
    dequantize_base(tmp_path / "out", tmp_path / "two", for_adapter=adapter)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in plain)


def test_layers_of_mlx_may_have_settings_of_their_own(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    own = {LINEAR: {"bits": 8, "group_size": 64}, "lm_head": False}
    words = {"bits": 4, "group_size": 32, **own}
    folder = trained(tmp_path / "t", None, quantization=words, quantization_config=words)
    quantize_base(base, tmp_path / "out", for_adapter=record(adapter, folder))
    found, plain = tensors(tmp_path / "out"), tensors(base)
    assert config(tmp_path / "out")["quantization"] == words
    for name, weight in plain.items():
        module = name.removesuffix(".weight")
        if "norm" in name or module == "lm_head":
            assert torch.equal(found[name], weight)
            continue
        bits, size = (8, 64) if module == LINEAR else (4, 32)
        expected = quantise_mlx(weight.float(), bits, size).parts
        assert torch.equal(found[name].view(torch.int32), expected["weight"].view(torch.int32))
        assert torch.equal(found[f"{module}.scales"], expected["scales"].bfloat16())
    dequantize_base(base, tmp_path / "one", for_adapter=adapter)
    dequantize_base(tmp_path / "out", tmp_path / "two", for_adapter=adapter)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(torch.equal(one[name], two[name]) for name in plain)


def test_an_adapter_of_mlx_records_its_model(base: Path, tmp_path: Path) -> None:
    words = {"bits": 4, "group_size": 64}
    folder = trained(tmp_path / "t", None, quantization=words, quantization_config=words)
    factors = {f"{LINEAR}.lora_a": torch.randn(64, 2), f"{LINEAR}.lora_b": torch.randn(2, 64)}
    (tmp_path / "mlx").mkdir()
    save_file(factors, tmp_path / "mlx" / "adapters.safetensors")
    fields = {"fine_tune_type": "lora", "model": str(folder), "num_layers": -1}
    fields["lora_parameters"] = {"rank": 2, "scale": 1.0, "dropout": 0.0}
    (tmp_path / "mlx" / "adapter_config.json").write_text(json.dumps(fields))
    report = dequantize_base(base, tmp_path / "out", for_adapter=tmp_path / "mlx")
    assert str(folder) in report.notes[0].message
    weight = tensors(base)[f"{LINEAR}.weight"]
    expected = quantise_mlx(weight.float(), 4, 64)
    scales = {part: expected.parts[part].bfloat16() for part in ("scales", "biases")}
    seen = replace(expected, parts={**expected.parts, **scales}).decode(0, 64).bfloat16()
    assert torch.equal(tensors(tmp_path / "out")[f"{LINEAR}.weight"], seen)


@pytest.mark.parametrize("bits", [4, 8])
def test_loftq_codes_the_adapters_own_layers_alone(
    base: Path, adapter: Path, tmp_path: Path, bits: int
) -> None:
    words = {"loftq_bits": bits, "loftq_iter": 1}
    record(adapter, "me/plain", init_lora_weights="loftq", loftq_config=words)
    report = dequantize_base(base, tmp_path / "out", for_adapter=adapter)
    found, plain = tensors(tmp_path / "out"), tensors(base)
    own = ("q_proj", "v_proj", "down_proj")
    for name, weight in plain.items():
        expected = weight
        if any(word in name for word in own) and bits == 4:
            expected = quantise_bnb4(weight.float(), "nf4").decode(0, len(weight)).bfloat16()
        elif any(word in name for word in own):
            size = weight.float().abs().amax(1, keepdim=True)
            expected = ((weight.float() * (127 / size)).round() * size / 127).bfloat16()
        assert torch.equal(found[name], expected), name
    assert "LoftQ" in report.notes[0].message
    quantize_base(base, tmp_path / "half", for_adapter=adapter)
    dequantize_base(tmp_path / "half", tmp_path / "two")
    assert all(torch.equal(t, found[n]) for n, t in tensors(tmp_path / "two").items())


def test_loftq_of_several_steps_cannot_be_repeated(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    words = {"loftq_bits": 4, "loftq_iter": 5}
    record(adapter, "me/plain", init_lora_weights="loftq", loftq_config=words)
    refused(UnsupportedError, "5 steps", base, adapter, tmp_path / "out")


def refused(kind: type[Exception], word: str, base: Path, adapter: Path, out: Path) -> str:
    """See that both commands refuse, and return the hint."""
    hints = []
    for run in (quantize_base, dequantize_base):
        with pytest.raises(kind, match=word) as caught:
            run(base, out, for_adapter=adapter)
        assert str(adapter) in str(caught.value)
        assert not out.exists()
        hints.append(caught.value.hint)  # type: ignore[attr-defined]
    return str(hints[-1])


def test_what_nothing_is_to_be_chosen_from(base: Path, adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    hint = refused(InputError, "does not record which base", base, adapter, out)
    assert "adapter_config.json" in hint
    record(adapter, trained(tmp_path / "plain", None))
    hint = refused(InputError, "nothing to choose", base, adapter, out)
    assert "load_in_4bit" in hint
    assert "quantize --to nf4" in hint
    hint = refused(MissingFileError, "no such folder", base, record(adapter, "/x/y/z"), out)
    assert "adapter_config.json" in hint
    (tmp_path / "empty").mkdir()
    refused(MissingFileError, r"no config\.json", base, record(adapter, tmp_path / "empty"), out)


def test_a_scheme_that_is_only_read_names_the_base(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    folder = trained(tmp_path / "t", GPTQ)
    hint = refused(UnsupportedError, "gptq", base, record(adapter, folder), tmp_path / "out")
    assert str(folder) in hint


def test_older_bases_say_it_in_a_file_of_its_own(base: Path, adapter: Path, tmp_path: Path) -> None:
    folder = trained(tmp_path / "t", None)
    (folder / "quant_config.json").write_text("{}")
    refused(UnsupportedError, "awq", base, record(adapter, folder), tmp_path / "out")


def test_every_shape_is_read_in_its_own_rows(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Experts in one packed tensor, vectors and convolutions that are rounded twice."""
    folder = tmp_path / "mx"
    shutil.copytree(base, folder)
    experts = "model.layers.0.mlp.experts.gate_up_proj"
    packed = {
        f"{experts}_blocks": torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8),
        f"{experts}_scales": torch.randint(110, 130, (2, 6, 3), dtype=torch.uint8),
    }
    more = {"conv.weight": (1e-6 * torch.randn(3, 4, 2, 2)).bfloat16(), "none": torch.zeros(0, 4)}
    save_file({**tensors(base), **packed, **more}, folder / "model.safetensors", {"format": "pt"})
    words = {"quant_method": "mxfp4"}
    edit(folder / "config.json", quantization_config=words)
    record(adapter, trained(tmp_path / "t", words))
    dequantize_base(folder, tmp_path / "one", for_adapter=adapter)
    dequantize_base(folder, tmp_path / "two")
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one[experts].shape == (2, 96, 6)
    assert all(torch.equal(one[name], two[name]) for name in two)
    # A trained base of float16 from one of bfloat16, its plain tensors rounded on the way too.
    save_file({**tensors(base), **more}, base / "model.safetensors", {"format": "pt"})
    record(adapter, trained(tmp_path / "half", NF4, dtype="float16"))
    dequantize_base(base, tmp_path / "three", for_adapter=adapter, dtype="fp32")
    for name, tensor in more.items():
        assert torch.equal(tensors(tmp_path / "three")[name], tensor.half().float()), name


def test_llama_4_is_not_written_so_that_nobody_loads_it(base: Path, tmp_path: Path) -> None:
    """transformers' own quantised Llama 4 does not load in transformers 5.23 either."""
    fused = {"model.layers.0.feed_forward.experts.gate_up_proj": torch.randn(2, 64, 256)}
    save_file({**tensors(base), **fused}, base / "model.safetensors", {"format": "pt"})
    edit(base / "config.json", model_type="llama4_text")
    with pytest.raises(UnsupportedError, match="Llama 4"):
        quantize_base(base, tmp_path / "out", to="nf4")
    quantize_base(base, tmp_path / "fp8", to="fp8")
    left = config(tmp_path / "fp8")["quantization_config"]["modules_to_not_convert"]
    assert left == ["feed_forward.experts", "lm_head"]


def test_what_already_is_so_is_not_written_again(base: Path, adapter: Path, tmp_path: Path) -> None:
    record(adapter, trained(tmp_path / "t", NF4))
    quantize_base(base, tmp_path / "nf4", to="nf4")
    with pytest.raises(InputError, match="nothing would change"):
        quantize_base(tmp_path / "nf4", tmp_path / "out", for_adapter=adapter)


def test_the_options_that_contradict_it(base: Path, adapter: Path, tmp_path: Path) -> None:
    record(adapter, trained(tmp_path / "t", NF4))
    out = tmp_path / "out"
    for words in ({"to": "nf4-double"}, {"to": "q8_0"}, {"template": base}):
        with pytest.raises(OptionError):
            quantize_base(base, out, for_adapter=adapter, **words)  # type: ignore[arg-type]
    with pytest.raises(OptionError):
        dequantize_base(base, out, for_adapter=adapter, base_config=base)
    with pytest.raises(OptionError, match="neither"):
        quantize_base(base, out)
    quantize_base(base, out, for_adapter=adapter, to="NF4")
    quantize_base(base, tmp_path / "plain", to="nf4")
    one, two = tensors(out), tensors(tmp_path / "plain")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_commands_have_the_option(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(adapter, trained(tmp_path / "t", NF4))
    words = [str(base), "--for-adapter", str(adapter), "-o"]
    assert cli.run(["quantize", *words, str(tmp_path / "q"), "--to", "fp4"]) == 2
    assert cli.run(["quantize", *words, str(tmp_path / "q"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["trained_base"] == str(tmp_path / "t")
    assert cli.run(["dequantize", *words, str(tmp_path / "d")]) == 0
    assert "was trained against" in capsys.readouterr().err
    assert cli.run(["quantize", str(base), "-o", str(tmp_path / "n")]) == 2


def test_recipes_have_it_and_hand_over_adapters_in_memory(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    record(adapter, trained(tmp_path / "t", NF4))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "steps:\n"
        "  smaller:\n"
        f"    resize: {adapter}\n"
        "    rank: 2\n"
        "  seen:\n"
        f"    dequantize: {base}\n"
        "    for-adapter: $smaller\n"
        f"    output: {tmp_path / 'seen'}\n"
    )
    assert cli.run(["run", str(recipe)]) == 0
    dequantize_base(base, tmp_path / "again", for_adapter=adapter)
    one, two = tensors(tmp_path / "seen"), tensors(tmp_path / "again")
    assert all(torch.equal(one[name], two[name]) for name in two)


# ── a base on the Hub ──


@pytest.fixture
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)


def hub_files(words: dict[str, Any]) -> dict[str, bytes]:
    fields = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": words}
    return {
        "config.json": json.dumps(fields).encode(),
        "model.safetensors": b"weights" * 100,
        "tokenizer.json": b"{}",
    }


@pytest.mark.usefixtures("_no_waiting")
def test_of_a_base_on_the_hub_the_config_alone_is_fetched(
    hub: HubServer, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("me/small-bnb-4bit", hub_files(NF4))
    report = dequantize_base(
        base, tmp_path / "out", for_adapter=record(adapter, "me/small-bnb-4bit")
    )
    asked = [one.path for one in hub.seen if "/resolve/" in one.path]
    assert asked
    assert all(path.endswith("config.json") for path in asked)
    assert "me/small-bnb-4bit" in report.notes[0].message
    # Again out of the cache, when nobody is to be asked.
    hub.seen.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    dequantize_base(base, tmp_path / "again", for_adapter=adapter)
    assert hub.seen == []


@pytest.mark.usefixtures("_no_waiting")
def test_the_recorded_revision_is_what_counts(
    hub: HubServer, base: Path, adapter: Path, tmp_path: Path
) -> None:
    repo = hub.add("me/base", hub_files(NF4))
    repo.tags["v1"] = repo.branches["main"]
    repo.commit("main", hub_files({**NF4, "bnb_4bit_quant_type": "fp4"}))
    record(adapter, "https://huggingface.co/me/base", revision="v1")
    report = quantize_base(base, tmp_path / "one", for_adapter=adapter)
    assert report.facts["mix"] == "bitsandbytes nf4"
    report = quantize_base(
        base, tmp_path / "two", for_adapter=record(adapter, "me/base", revision=None)
    )
    assert report.facts["mix"] == "bitsandbytes fp4"


@pytest.mark.usefixtures("_no_waiting")
def test_a_base_that_the_hub_lacks_is_named_with_the_way_out(
    hub: HubServer, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record(adapter, "unsloth/some-model-bnb-4bit")
    hint = refused(HubError, "no such repository", base, adapter, tmp_path / "out")
    assert "nf4-double" in hint
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hint = refused(HubError, "not in the cache", base, adapter, tmp_path / "out")
    assert "HF_HUB_OFFLINE" in hint
    hub.add("me/gguf-only", {"model.gguf": b"GGUF"})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    record(adapter, "me/gguf-only")
    refused(HubError, r"has no config\.json", base, adapter, tmp_path / "out")
