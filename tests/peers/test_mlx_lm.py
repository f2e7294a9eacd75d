"""mlx-lm runs what loratools writes as PEFT runs the original, and its own adapters come back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loratools

pytestmark = pytest.mark.slow
mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from mlx.utils import tree_flatten, tree_unflatten  # noqa: E402
from mlx_lm.tuner.utils import linear_to_lora_layers, load_adapters  # noqa: E402
from mlx_lm.utils import load_model, quantize_model, save_config, save_model  # noqa: E402

TOKENS = [[1, 5, 9, 17, 3, 2, 8]]
COMMON: Mapping[str, Any] = {
    "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 64,
    "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2}
KINDS: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 8}),
    "phi3": ("Phi3Config", {}),
    "gpt2": (
        "GPT2Config",
        {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "tie_word_embeddings": True},
    ),
    # Wide enough for mlx-lm's groups of 64.
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**MIXTURE, "head_dim": 16, "moe_intermediate_size": 64, "hidden_size": 64},
    ),
    "olmoe": ("OlmoeConfig", MIXTURE),
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "granitemoe": ("GraniteMoeConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "lfm2_moe": (
        "Lfm2MoeConfig",
        {
            **MIXTURE, "moe_intermediate_size": 24, "num_dense_layers": 1,
            "layer_types": ["full_attention", "conv"], "tie_word_embeddings": True,
        },
    ),
}  # fmt: skip
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
"""Both compute in float32; logits are of the order of 1."""


@dataclass(frozen=True)
class Model:
    """A base in two spellings: as transformers saves it, and with what mlx-lm's config needs."""

    kind: str
    folder: Path
    plain: Path
    torch_model: Any

    def logits(self, model: Any | None = None) -> np.ndarray:
        with torch.no_grad():
            return (model or self.torch_model)(torch.tensor(TOKENS)).logits[0].numpy()

    def reload(self, folder: Path | None = None) -> Any:
        found = transformers.AutoModelForCausalLM.from_pretrained(
            folder or self.plain, attn_implementation="eager"
        )
        return found.float().eval()

    def in_mlx(self, adapter: Path | None = None, folder: Path | None = None) -> np.ndarray:
        model, _ = load_model(folder or self.folder, lazy=False)
        if adapter:
            load_adapters(model, str(adapter))
        model.eval()
        return np.array(model(mx.array(TOKENS))[0].astype(mx.float32))


@pytest.fixture(scope="module", autouse=True)
def _on_the_cpu() -> Iterator[None]:
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    made: dict[str, Model] = {}

    def get(kind: str) -> Model:
        if kind not in made:
            made[kind] = make_model(kind, tmp_path_factory.mktemp(kind))
        return made[kind]

    return get


def make_model(kind: str, folder: Path) -> Model:
    torch.manual_seed(len(kind))
    name, words = KINDS[kind]
    config = getattr(transformers, name)(**{**COMMON, **words})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.15)
    model.float().eval().save_pretrained(folder / "plain")
    shutil.copytree(folder / "plain", folder / "mlx")
    path = folder / "mlx" / "config.json"
    said = json.loads(path.read_text())
    rope = (said.get("rope_parameters") or {}).get("rope_theta", 10000.0)
    # Released checkpoints have these words, which transformers 5 writes elsewhere.
    path.write_text(json.dumps({"rope_theta": rope, "n_ctx": 64, **MIXTURE, **said}))
    if kind == "gpt2":
        from safetensors.torch import load_file, save_file

        weights = folder / "mlx" / "model.safetensors"
        tensors = {n.removeprefix("transformer."): t for n, t in load_file(weights).items()}
        save_file(tensors, weights, {"format": "pt"})
    return Model(kind, folder / "mlx", folder / "plain", model)


def train_peft(model: Model, out: Path, **words: Any) -> np.ndarray:
    """Save a PEFT adapter of random factors; return the logits of base and adapter."""
    base = model.reload()
    linear = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    left = ("router", "gate", "lm_head")
    targets = [n for n, m in base.named_modules() if isinstance(m, linear) and not n.endswith(left)]
    stacks = [n for n, p in base.named_parameters() if p.dim() == 3 and "experts" in n]
    # Two ranks and two scales, which a config of mlx-lm's cannot say.
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=targets, target_parameters=None if words else stacks,
        task_type="CAUSAL_LM", fan_in_fan_out=model.kind == "gpt2",
        rank_pattern={targets[0]: 3}, alpha_pattern={targets[1]: 9}, **words,
    )  # fmt: skip
    trained = peft.get_peft_model(base, config)
    for name, parameter in trained.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
        elif "magnitude" in name:
            parameter.data *= 1.2
    trained.eval().save_pretrained(out, save_embedding_layers=False)
    return model.logits(trained)


@pytest.mark.parametrize("kind", KINDS)
def test_mlx_lm_runs_a_converted_adapter(
    kind: str, models: Callable[[str], Model], tmp_path: Path
) -> None:
    model = models(kind)
    wanted = train_peft(model, tmp_path / "peft")
    assert np.abs(wanted - model.logits()).max() > 0.5
    np.testing.assert_allclose(model.in_mlx(), model.logits(), **CLOSE)
    out = tmp_path / "mlx"
    loratools.convert_adapter(tmp_path / "peft", out, to="mlx", base=model.plain)
    np.testing.assert_allclose(model.in_mlx(out), wanted, **CLOSE)
    back = tmp_path / "back"
    loratools.convert_adapter(out, back, to="peft", base=model.plain)
    again = peft.PeftModel.from_pretrained(model.reload(), back).eval()
    np.testing.assert_allclose(model.logits(again), wanted, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_merges_into_either_spelling_of_a_base(
    kind: str, models: Callable[[str], Model], tmp_path: Path
) -> None:
    """transformers' checkpoint, and the model that mlx-lm itself saves of it."""
    model = models(kind)
    wanted = train_peft(model, tmp_path / "peft")
    loratools.convert_adapter(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=model.plain)
    loratools.merge_into_base(model.plain, tmp_path / "mlx", tmp_path / "merged")
    found = model.logits(model.reload(tmp_path / "merged"))
    np.testing.assert_allclose(found, wanted, **CLOSE)
    converted, _ = load_model(model.folder, lazy=False)
    (tmp_path / "converted").mkdir()
    save_model(tmp_path / "converted", converted)
    shutil.copy(model.folder / "config.json", tmp_path / "converted")
    for adapter in ("peft", "mlx"):
        out = tmp_path / f"from {adapter}"
        loratools.merge_into_base(tmp_path / "converted", tmp_path / adapter, out)
        np.testing.assert_allclose(model.in_mlx(folder=out), wanted, **CLOSE)


def test_mlx_lm_runs_a_converted_dora(models: Callable[[str], Model], tmp_path: Path) -> None:
    model = models("llama")
    wanted = train_peft(model, tmp_path / "peft", use_dora=True)
    loratools.convert_adapter(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    np.testing.assert_allclose(model.in_mlx(tmp_path / "mlx"), wanted, **CLOSE)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("tuned", ["lora", "dora"])
def test_what_mlx_lm_trained_runs_in_peft(
    kind: str, tuned: str, models: Callable[[str], Model], tmp_path: Path
) -> None:
    """mlx-lm's default targets: every linear layer of the blocks, the experts' among them."""
    if tuned == "dora" and kind in ("qwen3_moe", "mixtral"):
        pytest.skip("mlx-lm has no DoRA on stacks")
    model = models(kind)
    wanted = train_mlx(model, tmp_path / "mlx", tuned)
    assert np.abs(wanted - model.in_mlx()).max() > 0.3
    loratools.merge_into_base(model.plain, tmp_path / "mlx", tmp_path / "merged")
    found = model.logits(model.reload(tmp_path / "merged"))
    np.testing.assert_allclose(found, wanted, **CLOSE)
    if kind in ("qwen3_moe", "mixtral"):
        # Its router is a parameter to PEFT, which the names of a module do not reach.
        return
    loratools.convert_adapter(tmp_path / "mlx", tmp_path / "peft", to="peft", base=model.plain)
    again = peft.PeftModel.from_pretrained(model.reload(), tmp_path / "peft").eval()
    np.testing.assert_allclose(model.logits(again), wanted, **CLOSE)


def train_mlx(model: Model, out: Path, tuned: str, num_layers: int = 1) -> np.ndarray:
    """Save an adapter of random factors as mlx-lm's trainer does; return the logits."""
    found, _ = load_model(model.folder, lazy=False)
    found.freeze()
    parameters = {"rank": 4, "scale": 2.5, "dropout": 0.0}
    linear_to_lora_layers(found, num_layers, parameters, use_dora=tuned == "dora")
    mx.random.seed(7)
    trained = [
        (name, value + 0.15 * mx.random.normal(value.shape))
        for name, value in tree_flatten(found.trainable_parameters())
    ]
    found.update(tree_unflatten(trained))
    out.mkdir()
    mx.save_safetensors(str(out / "adapters.safetensors"), dict(trained))
    words = {"model": "x/y", "fine_tune_type": tuned, "num_layers": num_layers}
    save_config({**words, "lora_parameters": parameters}, out / "adapter_config.json")
    found.eval()
    return np.array(found(mx.array(TOKENS))[0].astype(mx.float32))


def test_a_resized_adapter_keeps_its_blocks(models: Callable[[str], Model], tmp_path: Path) -> None:
    """mlx-lm loads it again: blocks counted from the last, as in the config that it came with."""
    model = models("llama")
    wanted = train_mlx(model, tmp_path / "mlx", "lora")
    loratools.resize_adapter(tmp_path / "mlx", tmp_path / "same", rank=4)
    config = json.loads((tmp_path / "same" / "adapter_config.json").read_text())
    assert config["num_layers"] == 1
    np.testing.assert_allclose(model.in_mlx(tmp_path / "same"), wanted, **CLOSE)


def test_merges_into_a_quantised_base(models: Callable[[str], Model], tmp_path: Path) -> None:
    """Layers and stacked experts in 8 bits: what mlx-lm fuses, exact, or on the base's own grid."""
    model = models("qwen3_moe")
    loaded, config = load_model(model.folder, lazy=False)
    packed, config = quantize_model(loaded, config, group_size=32, bits=8)
    base = tmp_path / "packed"
    base.mkdir()
    save_model(base, packed)
    save_config(dict(config), base / "config.json")
    train_mlx(model, tmp_path / "mlx", "lora", num_layers=2)
    for quant in ("dequantize", "keep"):
        loratools.merge_into_base(base, tmp_path / "mlx", tmp_path / quant, quant=quant)
    fused, _ = load_model(base, lazy=False)
    load_adapters(fused, str(tmp_path / "mlx"))
    layers = {n: m.fuse(dequantize=True) for n, m in fused.named_modules() if hasattr(m, "fuse")}
    assert sum("switch_mlp" in name for name in layers) == 6
    plain, kept = (
        dict(load_model(tmp_path / quant, lazy=False)[0].named_modules())
        for quant in ("dequantize", "keep")
    )
    for name, wanted in layers.items():
        np.testing.assert_allclose(
            np.array(plain[name].weight), np.array(wanted.weight), atol=1e-5, rtol=1e-5
        )
        held = kept[name]
        words = {"group_size": held.group_size, "bits": held.bits}
        scales, low = (
            mx.repeat(part, held.group_size, axis=-1) for part in (held.scales, held.biases)
        )
        # The grid stays; what lies beyond its ends is at them.
        high = low + (2**held.bits - 1) * scales
        inside = mx.clip(wanted.weight, mx.minimum(low, high), mx.maximum(low, high))
        weight = mx.dequantize(held.weight, held.scales, held.biases, **words)
        assert float((mx.abs(weight - inside) / mx.abs(scales)).max()) < 0.51, name
