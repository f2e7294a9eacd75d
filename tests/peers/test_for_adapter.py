"""What an adapter was trained against: transformers, bitsandbytes and PEFT make it, we find it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loratools.errors import UnsupportedError
from loratools.quantize import dequantize_base, quantize_base

IDS = torch.arange(24)[None]
CASES: dict[str, dict[str, Any]] = {
    "nf4": {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "nf4 double, computed in float16": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float16,
    },
    "fp4, computed in float32": {"bnb_4bit_quant_type": "fp4"},
    "made in float16, computed in bfloat16": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "dtype": torch.float16,
    },
    "stored as bfloat16": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "bnb_4bit_quant_storage": torch.bfloat16,
    },
    "modules skipped": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "llm_int8_skip_modules": ["lm_head", "model.layers.1", "v_proj", r"model.*gate_proj"],
    },
    "head too": {
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": torch.bfloat16,
        "llm_int8_skip_modules": ["up_proj"],
    },
    "int8": {"load_in_8bit": True},
}


FAST = ("nf4 double, computed in float16", "made in float16, computed in bfloat16", "int8")
EVERY = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("bitsandbytes")
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def plain(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bfloat16."""
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def train(transformers: Any, plain: Path, folder: Path, name: str) -> tuple[Path, Path]:
    """Return the base in the case's scheme, and an adapter that PEFT made on it."""
    peft = pytest.importorskip("peft")
    words = dict(CASES[name])
    dtype = words.pop("dtype", torch.bfloat16)
    words.setdefault("load_in_4bit", "load_in_8bit" not in words)
    config = transformers.BitsAndBytesConfig(**words)
    models = transformers.AutoModelForCausalLM
    models.from_pretrained(plain, quantization_config=config, dtype=dtype).save_pretrained(
        folder / "trained"
    )
    model = models.from_pretrained(folder / "trained")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"])
    peft.get_peft_model(model, lora).save_pretrained(folder / "adapter")
    return folder / "trained", folder / "adapter"


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def same_bytes(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one, other)))


def logits(transformers: Any, folder: Path) -> Tensor:
    with torch.no_grad():
        found: Tensor = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()(IDS).logits
    return found


@pytest.mark.parametrize("name", EVERY)
def test_the_original_is_quantised_as_the_trained_base_was(
    transformers: Any, plain: Path, tmp_path: Path, name: str
) -> None:
    trained, adapter = train(transformers, plain, tmp_path, name)
    report = quantize_base(plain, tmp_path / "ours", for_adapter=adapter)
    found, expected = tensors(tmp_path / "ours"), tensors(trained)
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        if "quant_state" in key:
            states = [json.loads(bytes(t.tolist())) for t in (tensor, expected[key])]
            offsets = [torch.tensor(state.pop("nested_offset", 0.0)) for state in states]
            assert states[0] == states[1]
            assert offsets[0] == offsets[1]
        else:
            assert same_bytes(tensor, expected[key]), key
    folders = (tmp_path / "ours", trained)
    ours, theirs = (config(folder)["quantization_config"] for folder in folders)
    if theirs["llm_int8_skip_modules"] is None:
        theirs["llm_int8_skip_modules"] = ["lm_head"]
    assert ours == theirs
    assert config(tmp_path / "ours")["dtype"] == config(trained)["dtype"]
    assert torch.equal(logits(transformers, tmp_path / "ours"), logits(transformers, trained))
    assert str(trained) in report.notes[0].message
    assert report.facts["trained_base"] == str(trained)


def weights_seen(transformers: Any, trained: Path) -> dict[str, Tensor]:
    """The linear layers' weights as bitsandbytes itself uses them, in the type of the product."""
    bnb = pytest.importorskip("bitsandbytes")
    model = transformers.AutoModelForCausalLM.from_pretrained(trained)
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, bnb.nn.Linear4bit):
            decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
            found[f"{name}.weight"] = decoded.to(module.compute_dtype)
        elif isinstance(module, bnb.nn.Linear8bitLt):
            decoded = bnb.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
            found[f"{name}.weight"] = decoded.to(torch.bfloat16)
    return found


@pytest.mark.parametrize("name", EVERY)
def test_the_weights_are_those_that_the_adapter_saw(
    transformers: Any, plain: Path, tmp_path: Path, name: str
) -> None:
    trained, adapter = train(transformers, plain, tmp_path, name)
    seen = weights_seen(transformers, trained)
    for label, base in (("decoded", trained), ("original", plain)):
        report = dequantize_base(base, tmp_path / label, for_adapter=adapter)
        found = tensors(tmp_path / label)
        assert found.keys() == tensors(plain).keys()
        for key, weight in seen.items():
            assert torch.equal(found[key].to(weight.dtype), weight), key
            # Nothing is stored wider than what was seen, nor narrower.
            assert found[key].dtype == weight.dtype or weight.dtype == torch.float32
        assert str(trained) in report.notes[0].message
        assert "quantization_config" not in config(tmp_path / label)
        logits(transformers, tmp_path / label)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("nf4 double, computed in float16", None),
        ("made in float16, computed in bfloat16", "fp32"),
        pytest.param("made in float16, computed in bfloat16", None, marks=pytest.mark.slow),
        pytest.param("modules skipped", None, marks=pytest.mark.slow),
        pytest.param("stored as bfloat16", "fp16", marks=pytest.mark.slow),
        pytest.param("int8", None, marks=pytest.mark.slow),
    ],
)
def test_one_step_is_two_steps(
    transformers: Any, plain: Path, tmp_path: Path, name: str, dtype: str | None
) -> None:
    _, adapter = train(transformers, plain, tmp_path, name)
    dequantize_base(plain, tmp_path / "one", for_adapter=adapter, dtype=dtype)
    quantize_base(plain, tmp_path / "half", for_adapter=adapter)
    dequantize_base(tmp_path / "half", tmp_path / "two", for_adapter=adapter, dtype=dtype)
    one, two = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert one.keys() == two.keys()
    assert all(same_bytes(one[key], two[key]) for key in one)
    assert config(tmp_path / "one") == config(tmp_path / "two")


def test_loftq_is_bitsandbytes_on_the_adapters_layers(
    transformers: Any, plain: Path, tmp_path: Path
) -> None:
    """PEFT's own needs a GPU: its one step is this, in float32 and back in the weight's type."""
    functional = pytest.importorskip("bitsandbytes.functional")
    peft = pytest.importorskip("peft")
    model = transformers.AutoModelForCausalLM.from_pretrained(plain)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(
        tmp_path / "adapter"
    )
    file = tmp_path / "adapter" / "adapter_config.json"
    words = {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **words}))
    dequantize_base(plain, tmp_path / "out", for_adapter=tmp_path / "adapter")
    for name, weight in tensors(plain).items():
        expected = weight
        if "q_proj" in name:
            coded, state = functional.quantize_4bit(weight.float(), quant_type="nf4")
            expected = functional.dequantize_4bit(coded, state).to(weight.dtype)
        assert torch.equal(tensors(tmp_path / "out")[name], expected), name


def test_another_scheme_is_refused_naming_both(
    transformers: Any, plain: Path, tmp_path: Path
) -> None:
    trained, adapter = train(transformers, plain, tmp_path, "nf4")
    quantize_base(plain, tmp_path / "fp4", to="fp4-double")
    for run in (quantize_base, dequantize_base):
        with pytest.raises(UnsupportedError) as caught:
            run(tmp_path / "fp4", tmp_path / "out", for_adapter=adapter)
        for word in ("bitsandbytes nf4", "bitsandbytes fp4 with double", str(trained)):
            assert word in caught.value.message
        assert not (tmp_path / "out").exists()


def test_other_layers_are_refused_by_name(transformers: Any, plain: Path, tmp_path: Path) -> None:
    _, adapter = train(transformers, plain, tmp_path, "modules skipped")
    quantize_base(plain, tmp_path / "all", to="nf4")
    with pytest.raises(UnsupportedError, match=r"other layers.*gate_proj"):
        dequantize_base(tmp_path / "all", tmp_path / "out", for_adapter=adapter)
