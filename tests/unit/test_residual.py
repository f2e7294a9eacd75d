"""The adapter that holds what rounding left out: merged + residual is W + ΔW, in every layout."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import adapter_io, compute
from loratools.codecs.ggml import GGML_TYPES
from loratools.codecs.mlx_affine import quantise_mlx
from loratools.convert import convert_adapter
from loratools.errors import LoratoolsError, MatchError, OptionError, OutputError, UnsupportedError
from loratools.merge import merge_into_base
from loratools.planning import residual as residual_module
from loratools.quantize import dequantize_base
from loratools.tensorfiles.gguf import read_gguf_header
from loratools.tensorfiles.gguf_reading import Value
from loratools.tensorfiles.gguf_tensors import block_entry
from loratools.tensorfiles.gguf_types import ValueType
from loratools.tensorfiles.gguf_writing import save_gguf

from ..gguf_models import HIDDEN, VOCABULARY, words, write_adapter, write_model
from .packed import checkpoints
from .packed.checkpoints import TOUCHED, write_base
from .test_gguf_merge import changes, decoded

MIX = {"attn": "Q4_K", "attn_v": "Q6_K", "ffn": "Q5_K", "ffn_down": "Q8_0", "token_embd": "Q4_0"}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def lacking(file: Path) -> dict[str, Tensor]:
    """What a GGUF adapter adds to each tensor, by gguf-py's reader and llama.cpp's convention."""
    reader = gguf.GGUFReader(file)
    found = {tensor.name: torch.tensor(tensor.data).double() for tensor in reader.tensors}
    alpha = float(reader.fields["adapter.lora.alpha"].contents())
    made = {}
    for name, down in found.items():
        if name.endswith(".lora_a"):
            target = name.removesuffix(".lora_a")
            up = found[f"{target}.lora_b"]
            scale = alpha / up.shape[-1]
            made[target] = scale * (down @ up.mT if target == "token_embd.weight" else up @ down)
    return made


def assert_exact(wanted: Tensor, found: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * float(wanted.abs().max()))


# ── GGUF ──


@pytest.mark.parametrize(
    ("quant", "rounding"),
    [
        (None, "nearest"), ("q8_0", "nearest"), ("q4_0", "adapter-aware"),
    ],
)  # fmt: skip
def test_every_touched_block_and_its_residual_are_the_sum(
    tmp_path: Path, quant: str | None, rounding: str
) -> None:
    base = write_model(tmp_path / "base.gguf", MIX)
    adapter, out = write_adapter(tmp_path / "adapter"), tmp_path / "out.gguf"
    report = merge_into_base(
        base, [(adapter, 0.5)], out, quant=quant, rounding=rounding, residual_rank=512
    )
    before, after, rest = decoded(base), decoded(out), lacking(tmp_path / "out-residual.gguf")
    wanted = changes(adapter, 0.5)
    assert rest.keys() == wanted.keys()
    for name, change in wanted.items():
        assert_exact(before[name].double() + change, after[name].double() + rest[name])
    assert any("out-residual.gguf: rank 512, 100.0%" in note.message for note in report.notes)


def test_less_rank_is_the_best_of_that_rank(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", MIX)
    adapter, out = write_adapter(tmp_path / "adapter"), tmp_path / "out.gguf"
    report = merge_into_base(base, adapter, out, residual_rank=20)
    before, after, rest = decoded(base), decoded(out), lacking(tmp_path / "out-residual.gguf")
    left = whole = 0.0
    for name, change in changes(adapter).items():
        values = torch.linalg.svdvals(before[name].double() + change - after[name].double())
        least = float(values[20:].square().sum())
        now = before[name].double() + change - after[name].double() - rest[name]
        error = float(now.square().sum())
        assert least * 0.999 <= error <= 1.05 * least
        left, whole = left + error, whole + float(values.square().sum())
    (note,) = [n.message for n in report.notes if "out-residual" in n.message]
    assert f"rank 20, {1 - left / whole:.1%} of its square" in note


def test_what_llama_cpp_asks_for_is_said(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", MIX)
    adapter, out = write_adapter(tmp_path / "adapter"), tmp_path / "out.gguf"
    merge_into_base(base, adapter, out, residual_rank=4)
    fields = gguf.GGUFReader(tmp_path / "out-residual.gguf").fields
    said = {key: fields[key].contents() for key in fields if key.startswith(("gen", "adapter"))}
    assert said == {
        "general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora",
        "adapter.lora.alpha": 4.0, "general.name": "out-residual",
        "general.base_model.count": 1, "general.base_model.0.name": "out",
    }  # fmt: skip


def test_the_file_knows_the_way_back(tmp_path: Path) -> None:
    """The words that it keeps of the base undo the rotary layout of q and k."""
    base = write_model(tmp_path / "base.gguf", MIX)
    merge_into_base(base, write_adapter(tmp_path / "a"), tmp_path / "out.gguf", residual_rank=4)
    residual = tmp_path / "out-residual.gguf"
    for name, more in (("one", {}), ("two", {"base": base})):
        convert_adapter(residual, tmp_path / name, to="peft", **more)
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_tables_are_turned_as_llama_cpp_has_them(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", {"token_embd": "Q4_0", "output": "Q4_0"})
    prefix, adapter = "base_model.model", tmp_path / "adapter"
    adapter.mkdir()
    factors = {
        f"{prefix}.model.embed_tokens.lora_embedding_A": torch.randn(4, VOCABULARY),
        f"{prefix}.model.embed_tokens.lora_embedding_B": 0.01 * torch.randn(HIDDEN, 4),
        f"{prefix}.lm_head.lora_A.weight": torch.randn(4, HIDDEN),
        f"{prefix}.lm_head.lora_B.weight": 0.01 * torch.randn(VOCABULARY, 4),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    said |= {"target_modules": ["embed_tokens", "lm_head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    merge_into_base(base, adapter, tmp_path / "out.gguf", residual_rank=64)
    a, b, down, up = (tensor.double() for tensor in factors.values())
    wanted = {"token_embd.weight": (b @ a).T, "output.weight": up @ down}
    before, after = decoded(base), decoded(tmp_path / "out.gguf")
    rest = lacking(tmp_path / "out-residual.gguf")
    for name, change in wanted.items():
        assert_exact(before[name].double() + change, after[name].double() + rest[name])


def test_a_shared_table_is_refused_by_name(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", {"token_embd": "Q8_0"}, head=False)
    adapter, value = tmp_path / "adapter", torch.randn(4, VOCABULARY)
    adapter.mkdir()
    up = torch.randn(HIDDEN, 4)
    prefix = "base_model.model"
    factors = {
        f"{prefix}.model.embed_tokens.lora_embedding_A": value,
        f"{prefix}.model.embed_tokens.lora_embedding_B": up,
        f"{prefix}.lm_head.lora_A.weight": up.T.contiguous(),
        f"{prefix}.lm_head.lora_B.weight": value.T.contiguous(),
    }
    save_file(factors, adapter / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 4, "lora_alpha": 4}
    said |= {"target_modules": ["embed_tokens", "lm_head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    with pytest.raises(UnsupportedError, match=r"token_embd\.weight: the merged model has one"):
        merge_into_base(base, adapter, tmp_path / "out.gguf", residual_rank=4)
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "adapter"}


def write_expert_model(path: Path) -> tuple[Path, dict[str, Tensor]]:
    """A Qwen3-MoE block of three experts; returns what each stack stands for, too."""
    kinds = {"ffn_gate_exps": "Q4_0", "ffn_up_exps": "Q4_K", "ffn_down_exps": "Q5_0"}
    entries, meant = [], {}
    for name, kind in kinds.items():
        shape = (3, 256, 64) if "down" in name else (3, 64, 256)
        codec = GGML_TYPES[kind].codec
        raw = codec.encode(0.02 * torch.randn(shape))
        entries.append(block_entry(f"blk.0.{name}.weight", kind, shape, raw))
        meant[f"blk.0.{name}.weight"] = codec.decode(raw).view(shape).double()
    more = {
        "general.architecture": Value(ValueType.STRING, "qwen3moe"),
        "qwen3moe.expert_count": Value(ValueType.UINT32, 3),
        "qwen3moe.block_count": Value(ValueType.UINT32, 1),
    }
    save_gguf(path, words(**more), entries)
    return path, meant


@pytest.mark.parametrize("rank", [2, 64])
def test_stacks_of_experts(tmp_path: Path, rank: int) -> None:
    base, meant = write_expert_model(tmp_path / "base.gguf")
    names = {"gate_proj": (64, 256), "up_proj": (64, 256), "down_proj": (256, 64)}
    # Expert 1 stays as it is.
    modules = {f"model.layers.0.mlp.experts.{e}.{n}": s for e in (0, 2) for n, s in names.items()}
    adapter = write_adapter(tmp_path / "adapter", modules=modules)
    merge_into_base(base, adapter, tmp_path / "out.gguf", residual_rank=rank)
    tensors = load_file(adapter / "adapter_model.safetensors")
    rest, after = lacking(tmp_path / "out-residual.gguf"), decoded(tmp_path / "out.gguf")
    assert rest.keys() == meant.keys()
    for name, weight in meant.items():
        wanted = weight.clone()
        leaf = name.split("_")[1] + "_proj"
        for expert in (0, 2):
            path = f"base_model.model.model.layers.0.mlp.experts.{expert}.{leaf}"
            down, up = (tensors[f"{path}.lora_{x}.weight"].double() for x in "AB")
            wanted[expert] += 2 * up @ down
        for expert in range(3):
            error = wanted[expert] - after[name][expert].double()
            least = float(torch.linalg.svdvals(error)[rank:].norm())
            left = float((error - rest[name][expert]).norm())
            assert left <= 1.02 * least + 2e-6 * float(wanted[expert].norm())


def test_what_rounding_takes_from_replaced_tensors_is_in_it(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", {**MIX, "output": "Q6_K"})
    adapter = write_adapter(tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    head = torch.randn(VOCABULARY, HIDDEN)
    save_file(load_file(file) | {"base_model.model.lm_head.weight": head}, file)
    said = json.loads((adapter / "adapter_config.json").read_text())
    said |= {"modules_to_save": ["lm_head"]}
    (adapter / "adapter_config.json").write_text(json.dumps(said))
    merge_into_base(base, adapter, tmp_path / "out.gguf", residual_rank=64)
    rest = lacking(tmp_path / "out-residual.gguf")["output.weight"]
    assert_exact(head.double(), decoded(tmp_path / "out.gguf")["output.weight"].double() + rest)


def test_layers_that_llama_cpp_never_applies_are_warned_of(tmp_path: Path) -> None:
    shape = (256, 256)
    entry = block_entry(
        "blk.0.attn_output.weight", "Q4_0", shape,
        GGML_TYPES["Q4_0"].codec.encode(0.02 * torch.randn(shape)),
    )  # fmt: skip
    kimi = {"general.architecture": Value(ValueType.STRING, "bailingmoe3")}
    save_gguf(tmp_path / "base.gguf", words(**kimi), [entry])
    modules = {"model.layers.0.attention.dense": shape}
    adapter = write_adapter(tmp_path / "adapter", modules=modules)
    report = merge_into_base(
        tmp_path / "base.gguf", adapter, tmp_path / "out.gguf", residual_rank=2
    )
    assert any(n.level == "warning" and "never applies" in n.message for n in report.notes)


# ── checkpoints ──


def test_experts_of_a_packed_checkpoint(tmp_path: Path) -> None:
    """PEFT's target_parameters: the residual is folded into the dequantised merge."""
    from .test_quantised_merge import write_expert_adapter, write_experts

    base = write_experts(tmp_path / "base")
    (module,) = base.cases
    change = write_expert_adapter(tmp_path / "adapter", size=0.05)
    out, rest = tmp_path / "out", tmp_path / "out-residual"
    merge_into_base(base.path, tmp_path / "adapter", out, quant="keep", residual_rank=6)
    said = json.loads((rest / "adapter_config.json").read_text())
    assert said["target_parameters"] == [module]
    assert said["r"] == 6
    dequantize_base(out, tmp_path / "plain", dtype="fp32")
    merge_into_base(tmp_path / "plain", rest, tmp_path / "both")
    found = load_file(tmp_path / "both" / "model.safetensors")[module].double()
    assert_exact(base.dense(module).view(2, 6, 96) + change, found.mT)
    # Expert e has rows e·r … of A and columns e, e + E, ... of B: PEFT 0.21's reshaping.
    factors = load_file(rest / "adapter_model.safetensors")
    path = "base_model.model.model.layers.0.mlp.experts"
    down = factors[f"{path}.lora_A.weight"].double().view(2, 6, 96)
    up = factors[f"{path}.lora_B.weight"].double().reshape(6, 6, 2).permute(2, 0, 1)
    plain = load_file(tmp_path / "plain" / "model.safetensors")[module].double()
    assert_exact(base.dense(module).view(2, 6, 96) + change, plain.mT + up @ down)


def one_weight(folder: Path, module: str, weight: Tensor, model_type: str) -> Tensor:
    """A checkpoint of one MLX weight; returns what it stands for."""
    packed = quantise_mlx(weight, 4, 32)
    folder.mkdir()
    tensors = {f"{module}.{part}": tensor for part, tensor in packed.parts.items()}
    save_file(tensors, folder / "model.safetensors")
    said = {"model_type": model_type, "quantization": {"bits": 4, "group_size": 32}}
    (folder / "config.json").write_text(json.dumps({**said, "torch_dtype": "float32"}))
    return packed.decode(0, len(weight)).double()


@pytest.mark.parametrize(
    ("module", "model_type", "names"),
    [
        ("model.embed_tokens", "llama", ("lora_embedding_A", "lora_embedding_B")),
        ("transformer.h.0.attn.c_attn", "gpt2", ("lora_A.weight", "lora_B.weight")),
    ],
)
def test_weights_that_are_stored_in_out(
    tmp_path: Path, module: str, model_type: str, names: tuple[str, str]
) -> None:
    """Tables and Conv1D: PEFT's factors make (out, in) and the checkpoint has (in, out)."""
    dense = one_weight(tmp_path / "base", module, torch.randn(48, 96), model_type)
    path = f"base_model.model.{module}"
    factors = {f"{path}.{names[0]}": torch.randn(2, 48), f"{path}.{names[1]}": torch.randn(96, 2)}
    (tmp_path / "a").mkdir()
    save_file(factors, tmp_path / "a" / "adapter_model.safetensors")
    leaf = module.rpartition(".")[2]
    said = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [leaf]}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(said))
    out = tmp_path / "out"
    merge_into_base(tmp_path / "base", tmp_path / "a", out, quant="keep", residual_rank=48)
    rest = load_file(tmp_path / "out-residual" / "adapter_model.safetensors")
    a, b = (rest[f"{path}.{name}"].double() for name in names)
    dequantize_base(out, tmp_path / "plain", dtype="fp32")
    stored = load_file(tmp_path / "plain" / "model.safetensors")[f"{module}.weight"].double()
    down, up = (tensor.double() for tensor in factors.values())
    assert_exact(dense + (up @ down).T, stored + (b @ a).T)


# ── image models ──


def test_a_pipeline_has_one_residual_for_all_networks(tmp_path: Path) -> None:
    root, out = tmp_path / "pipeline", tmp_path / "out"
    modules = {
        "unet": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_encoder": "text_model.encoder.layers.0.self_attn.q_proj",
    }
    marks = {
        "conv_in": (8, 4, 3, 3), "conv_out": (4, 8, 3, 3), "add_embedding.linear_1": (8, 2816),
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (8, 2048),
    }  # fmt: skip
    dense, factors = {}, {}
    (tmp_path / "ink").mkdir()
    for component, module in modules.items():
        size = 640 if component == "unet" else 768
        root.mkdir(exist_ok=True)
        dense[component] = one_weight(
            root / component, module, 0.02 * torch.randn(size, size), "clip"
        )
        file = root / component / "model.safetensors"
        if component == "unet":
            plain = {f"{name}.weight": torch.randn(shape).half() for name, shape in marks.items()}
            save_file(load_file(file) | plain, file)
            file.rename(file.with_name("diffusion_pytorch_model.safetensors"))
        path = f"{component}.{module}"
        factors[f"{path}.lora_A.weight"] = torch.randn(2, size)
        factors[f"{path}.lora_B.weight"] = 1e-4 * torch.randn(size, 2)
    (root / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    save_file(factors, tmp_path / "ink" / "pytorch_lora_weights.safetensors")
    merge_into_base(root, tmp_path / "ink", out, quant="keep", arch="sdxl", residual_rank=768)
    rest = load_file(tmp_path / "out-residual" / "pytorch_lora_weights.safetensors")
    dequantize = {}
    for component, module in modules.items():
        dequantize_base(out / component, tmp_path / component, dtype="fp32")
        (file,) = (tmp_path / component).glob("*.safetensors")
        dequantize[component] = load_file(file)[f"{module}.weight"].double()
        down, up, a, b = (
            side[f"{component}.{module}.lora_{x}.weight"].double()
            for side in (factors, rest) for x in "AB"
        )  # fmt: skip
        assert_exact(dense[component] + up @ down, dequantize[component] + b @ a)
    assert len(rest) == 4


def test_a_single_file_of_an_image_model_gets_comfyuis(tmp_path: Path) -> None:
    """Rows that are no whole blocks stand folded in the file; convolutions are matrices."""
    from .test_gguf_unmerge import FOLDED, SDXL, write_sdxl

    meant, factors, wanted = write_sdxl(tmp_path / "unet.gguf"), {}, {}
    for name in FOLDED:
        out, *inner = SDXL[name]
        module = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        ones = [1] * (len(inner) - 1)
        up, down = 0.01 * torch.randn(out, 4, *ones), torch.randn(4, *inner)
        factors[f"{module}.lora_up.weight"], factors[f"{module}.lora_down.weight"] = up, down
        factors[f"{module}.alpha"] = torch.tensor(4.0)
        change = up.double().flatten(1) @ down.double().flatten(1)
        wanted[name] = meant[name].double().flatten(1) + change
    save_file(factors, tmp_path / "ink.safetensors")
    merge_into_base(
        tmp_path / "unet.gguf",
        tmp_path / "ink.safetensors",
        tmp_path / "out.gguf",
        residual_rank=640,
    )
    codec, header = GGML_TYPES["Q4_K"].codec, read_gguf_header(tmp_path / "out.gguf")
    data = (tmp_path / "out.gguf").read_bytes()
    rest = load_file(tmp_path / "out-residual.safetensors")
    assert len(rest) == 4
    for name, whole in wanted.items():
        stored = header.tensors[name]
        raw = torch.frombuffer(bytearray(data[stored.start : stored.stop]), dtype=torch.uint8)
        found = codec.decode(raw.view(stored.rows, -1)).double().view(len(whole), -1)
        module = "diffusion_model." + name.removesuffix(".weight")
        down, up = (rest[f"{module}.lora_{x}.weight"].double().flatten(1) for x in "AB")
        assert_exact(whole, found + up @ down)


# ── what is refused, and what a failure leaves ──


@pytest.mark.parametrize(
    ("types", "options", "word"),
    [
        ({"attn": "F16"}, {}, "no touched weight is written in few bits"),
        (MIX, {"quant": "dequantize"}, "no touched weight is written in few bits"),
        (MIX, {"residual_rank": 0}, "not a rank"),
    ],
)
def test_options_without_a_meaning(tmp_path: Path, types: dict, options: dict, word: str) -> None:
    base = write_model(tmp_path / "base.gguf", types)
    adapter = write_adapter(tmp_path / "adapter")
    with pytest.raises(OptionError, match=word):
        merge_into_base(base, adapter, tmp_path / "out.gguf", **{"residual_rank": 4, **options})
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "adapter"}


def test_what_is_there_is_refused_first(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", MIX)
    adapter = write_adapter(tmp_path / "adapter")
    (tmp_path / "out-residual.gguf").write_text("mine")
    for dry_run in (True, False):
        with pytest.raises(OutputError, match=r"out-residual\.gguf: already exists"):
            merge_into_base(base, adapter, tmp_path / "out.gguf", residual_rank=4, dry_run=dry_run)
    assert not (tmp_path / "out.gguf").exists()
    report = merge_into_base(
        base, adapter, tmp_path / "out.gguf", residual_rank=4, dry_run=True, overwrite=True
    )
    assert (tmp_path / "out-residual.gguf").read_text() == "mine"
    assert any("out-residual.gguf, at rank 4" in note.message for note in report.notes)
    merge_into_base(base, adapter, tmp_path / "out.gguf", residual_rank=4, overwrite=True)
    assert lacking(tmp_path / "out-residual.gguf")


def test_a_failure_leaves_neither(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = write_model(tmp_path / "base.gguf", MIX)
    adapter = write_adapter(tmp_path / "adapter")

    def full(*args: object, **options: object) -> None:
        raise OutputError("no space")

    monkeypatch.setattr(residual_module, "save_adapter", full)
    with pytest.raises(LoratoolsError, match="no space"):
        merge_into_base(base, adapter, tmp_path / "out.gguf", residual_rank=4)
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "adapter"}
    monkeypatch.setattr(residual_module, "save_adapter", adapter_io.save_adapter)
    merge_into_base(base, adapter, tmp_path / "out.gguf", residual_rank=4)
    assert (tmp_path / "out-residual.gguf").is_file()


def test_a_change_that_rounds_away_is_in_the_residual(tmp_path: Path) -> None:
    """The merged codes are the base's own, and nothing is lost."""
    base = write_base(tmp_path / "base", "gptq")
    change = checkpoints.write_adapter(tmp_path / "adapter", base, size=1e-4)
    out = tmp_path / "out"
    merge_into_base(base.path, tmp_path / "adapter", out, quant="keep", residual_rank=2)
    assert (out / "model.safetensors").read_bytes() == (
        base.path / "model.safetensors"
    ).read_bytes()
    rest = load_file(tmp_path / "out-residual" / "adapter_model.safetensors")
    down, up = (rest[f"base_model.model.{TOUCHED}.lora_{x}.weight"].double() for x in "AB")
    assert float((up @ down - change).norm() / change.norm()) < 1e-2


@pytest.mark.parametrize("strengths", [(0.7, -0.7), (0.1, 0.2, -0.3)])
def test_adapters_that_cancel_each_other_leave_nothing(
    tmp_path: Path, strengths: tuple[float, ...]
) -> None:
    base = write_base(tmp_path / "base", "gptq")
    checkpoints.write_adapter(tmp_path / "adapter", base, size=0.01)
    with pytest.raises(MatchError, match="cancel each other"):
        merge_into_base(
            base.path,
            [(tmp_path / "adapter", strength) for strength in strengths],
            tmp_path / "out",
            quant="keep",
            residual_rank=2,
        )
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_the_same_bytes_for_any_number_of_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_model(tmp_path / "base.gguf", MIX)
    adapter = write_adapter(tmp_path / "adapter")
    found = []
    for number in (2, 7):
        monkeypatch.setattr(compute, "available_cores", lambda n=number: n)
        merge_into_base(base, adapter, tmp_path / f"{number}" / "out.gguf", residual_rank=20)
        found.append((tmp_path / f"{number}" / "out-residual.gguf").read_bytes())
    assert found[0] == found[1]
