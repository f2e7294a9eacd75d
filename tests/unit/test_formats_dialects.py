"""The dialects of the diffusion formats: golden files of each, and which module a name means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from loratools.adapter import Adapter
from loratools.adapter_io import load_adapter, load_bundle, save_adapter
from loratools.deltas import (
    BOFT,
    IA3,
    OFT,
    DoRA,
    FullDelta,
    GLoRA,
    LayerDelta,
    LoHa,
    LoKr,
    LoRA,
    Replacement,
    RowReplacement,
    SparseResidual,
    SumDelta,
    TuckerLoRA,
)
from loratools.errors import MalformedAdapterError, UnsupportedError
from loratools.formats import get_format
from loratools.formats.format import Bundle
from tests.strategies import make_tensor

GOLDEN = Path(__file__).parents[1] / "golden"
WRITTEN = sorted(
    p for name in ("kohya", "comfyui", "diffusers") for p in (GOLDEN / name).glob("*.safetensors")
)
READ_ONLY = sorted(
    p
    for name in ("diffusers-old", "xlabs", "bfl-control", "peft-dump", "cloneofsimo")
    for p in (GOLDEN / name).glob("*.safetensors")
)


def label(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def stored(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


# What cannot come back as it was: an alpha that was nowhere, of another dtype or of one element,
# and the older GLoRA layout.
GAINED = {"lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"}
REWRITTEN = ("lora_unet_img_in.a", "lora_unet_img_in.b")


@pytest.mark.parametrize("path", WRITTEN, ids=label)
def test_file_to_adapter_to_file(path: Path, tmp_path: Path) -> None:
    """The same keys with the same bytes."""
    adapter = load_adapter(path)
    save_adapter(adapter, tmp_path / "again.safetensors", format=path.parent.name)
    before, after = stored(path), stored(tmp_path / "again.safetensors")
    assert after.keys() - before.keys() == (GAINED if path.stem == "odd" else set())
    assert before.keys() <= after.keys()
    for name, tensor in before.items():
        if name.endswith(".alpha"):
            assert float(after[name]) == float(tensor), name
        elif path.stem != "odd" or not name.startswith(REWRITTEN):
            assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape), name
            assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("path", WRITTEN + READ_ONLY, ids=label)
def test_no_tensor_is_lost(path: Path) -> None:
    """Every element of the file is in a delta, an extra, or was a number that a delta took in."""
    bundle = load_bundle(path, str(path))
    adapter = get_format(path.parent.name).read(bundle)
    numbers = ("alpha", "bias_indices", "bias_size", "on_input")
    elements = sum(t.numel() for name, t in bundle.tensors.items() if not name.endswith(numbers))
    made = sum(
        e.value.numel()
        for n, e in adapter.extras.items()
        if n == "diffusion_model.img_in.reshape_weight"
    )
    given = sum(t.numel() for n, t in bundle.tensors.items() if n.endswith("reshape_weight"))
    assert adapter.parameters == elements + (made - given)


@pytest.mark.parametrize("path", READ_ONLY, ids=label)
def test_read_only_formats_say_what_to_write(path: Path) -> None:
    chosen = get_format(path.parent.name)
    assert chosen.read_only
    with pytest.raises(UnsupportedError) as caught:
        chosen.write(load_adapter(path))
    assert caught.value.hint


# ── what LyCORIS' tensors become ──

LYCORIS: dict[str, type[LayerDelta]] = {
    "locon": LoRA,
    "loha": LoHa,
    "lokr": LoKr,
    "lokrfull": LoKr,
    "oft": OFT,
    "boft": BOFT,
    "glora": GLoRA,
    "ia3": IA3,
    "full": FullDelta,
    "dora": DoRA,
    "dorain": DoRA,
    "lokrtucker": LoKr,
    "lohatucker": LoHa,
}


@pytest.fixture(scope="module")
def lycoris() -> Adapter:
    return load_adapter(GOLDEN / "kohya/lycoris.safetensors")


@pytest.mark.parametrize(("block", "kind"), LYCORIS.items())
@pytest.mark.parametrize("leaf", ["to_q", "conv"])
def test_lycoris_kinds(block: str, kind: type[LayerDelta], leaf: str, lycoris: Adapter) -> None:
    assert type(lycoris.layers[f"lycoris_{block}_{leaf}"]) is kind


def test_lycoris_details(lycoris: Adapter) -> None:
    layers = lycoris.layers
    assert isinstance(layers["lycoris_tucker_conv"], TuckerLoRA)
    norm = layers["lycoris_norms_norm"]
    assert isinstance(norm, FullDelta)
    assert norm.norm_layer
    assert (layers["lycoris_dora_conv"].axis, layers["lycoris_dorain_conv"].axis) == ("out", "in")
    assert layers["lycoris_oft_to_q"].constraint == 0.5
    assert layers["lycoris_lokrtucker_conv"].t2 is not None
    assert not layers["lycoris_ia3_to_q"].on_input


def test_lycoris_changes(lycoris: Adapter) -> None:
    """ΔW by the formulas, from the file's tensors."""
    t = {k: v.float() for k, v in stored(GOLDEN / "kohya/lycoris.safetensors").items()}

    def get(block: str, *names: str) -> list[Tensor]:
        return [t[f"lycoris_{block}.{name}"] for name in names]

    up, down = get("locon_conv", "lora_up.weight", "lora_down.weight")
    wanted = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down) * 0.5
    torch.testing.assert_close(lycoris.layers["lycoris_locon_conv"].materialize(), wanted)
    up, mid, down = get("tucker_conv", "lora_up.weight", "lora_mid.weight", "lora_down.weight")
    wanted = torch.einsum("on,nmkl,mi->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0]) * 0.5
    torch.testing.assert_close(lycoris.layers["lycoris_tucker_conv"].materialize(), wanted)
    a, b, c, d = get("loha_to_q", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    torch.testing.assert_close(
        lycoris.layers["lycoris_loha_to_q"].materialize(), 0.5 * (a @ b) * (c @ d)
    )
    w1, w2_a, w2_b = get("lokr_to_q", "lokr_w1", "lokr_w2_a", "lokr_w2_b")
    wanted = torch.kron(w1, w2_a @ w2_b)
    torch.testing.assert_close(lycoris.layers["lycoris_lokr_to_q"].materialize(), wanted)
    w1, w2 = get("lokrfull_to_q", "lokr_w1", "lokr_w2")
    torch.testing.assert_close(
        lycoris.layers["lycoris_lokrfull_to_q"].materialize(), torch.kron(w1, w2)
    )


# ── names ──


def test_xlabs_names() -> None:
    adapter = load_adapter(GOLDEN / "xlabs/flux.safetensors")
    tensors = stored(GOLDEN / "xlabs/flux.safetensors")
    means = {
        "double_blocks.0.processor.qkv_lora1": "diffusion_model.double_blocks.0.img_attn.qkv",
        "double_blocks.0.processor.qkv_lora2": "diffusion_model.double_blocks.0.txt_attn.qkv",
        "double_blocks.0.processor.proj_lora1": "diffusion_model.double_blocks.0.img_attn.proj",
        "double_blocks.0.processor.proj_lora2": "diffusion_model.double_blocks.0.txt_attn.proj",
        "single_blocks.0.processor.qkv_lora": "diffusion_model.single_blocks.0.linear1_qkv",
        "single_blocks.0.processor.proj_lora": "diffusion_model.single_blocks.0.linear2",
    }
    assert adapter.naming == "original"
    assert set(adapter.layers) == set(means.values())
    for file, path in means.items():
        wanted = tensors[f"{file}.up.weight"].float() @ tensors[f"{file}.down.weight"].float()
        torch.testing.assert_close(adapter.layers[path].materialize(), wanted)


def test_bfl_control() -> None:
    adapter = load_adapter(GOLDEN / "bfl-control/canny.safetensors")
    tensors = stored(GOLDEN / "bfl-control/canny.safetensors")
    block = "double_blocks.0.img_attn"
    assert set(adapter.extras) == {
        f"diffusion_model.{block}.norm.query_norm.scale",
        "diffusion_model.single_blocks.0.norm.key_norm.scale",
        "diffusion_model.img_in.reshape_weight",
    }
    qkv = adapter.layers[f"diffusion_model.{block}.qkv"]
    torch.testing.assert_close(qkv.bias_change, tensors[f"{block}.qkv.lora_B.bias"].float())
    assert adapter.extras["diffusion_model.img_in.reshape_weight"].value.tolist() == [4, 6]


def test_bfl_control_in_comfyui() -> None:
    """What ComfyUI's own conversion of such files makes: diff_b, set_weight, reshape_weight."""
    adapter = load_adapter(GOLDEN / "bfl-control/canny.safetensors")
    before = stored(GOLDEN / "bfl-control/canny.safetensors")
    wanted = {
        "diffusion_model."
        + name.replace(".lora_B.bias", ".diff_b").replace("_norm.scale", "_norm.scale.set_weight")
        for name in before
    } | {"diffusion_model.img_in.reshape_weight"}
    assert get_format("comfyui").write(adapter).tensors.keys() == wanted


HEADS, HEAD = 2, 128


@pytest.mark.parametrize(
    ("name", "infix", "by_head"),
    [
        ("blocks.4.attn.qkv_proj", ".default", True),
        ("token_refiner.blocks.1.attn.qkv_proj", ".default", True),
        # ai-toolkit's, and another module of DiffSynth's
        ("blocks.4.attn.qkv_proj", "", False),
        ("blocks.4.attn.out_proj", ".default", False),
    ],
)
def test_diffsynths_heads_of_minimax(name: str, infix: str, by_head: bool) -> None:
    """The file has [q k v] of head 0, then of head 1; what is read has all of q first."""
    rows = 3 * HEADS * HEAD
    up = torch.arange(float(rows)).reshape(rows, 1)
    bundle = Bundle(
        {f"{name}.lora_A{infix}.weight": torch.ones(1, 8), f"{name}.lora_B{infix}.weight": up}
    )
    adapter = get_format("peft-dump").read(bundle)
    delta = adapter.layers[name]
    assert isinstance(delta, LoRA)
    expected = [
        head * 3 * HEAD + part * HEAD + row
        for part in range(3)
        for head in range(HEADS)
        for row in range(HEAD)
    ]
    assert delta.up.flatten().tolist() == (expected if by_head else list(range(rows)))
    assert any("head by head" in note for note in adapter.notes) == by_head


def test_rows_that_are_no_heads_are_refused() -> None:
    name = "blocks.0.attn.qkv_proj"
    tensors = {
        f"{name}.lora_A.default.weight": torch.ones(1, 8),
        f"{name}.lora_B.default.weight": torch.ones(96, 1),
    }
    with pytest.raises(MalformedAdapterError, match="heads of 128"):
        get_format("peft-dump").read(Bundle(tensors))


def test_old_diffusers_names() -> None:
    plain = load_adapter(GOLDEN / "diffusers-old/attn_procs.safetensors")
    block = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    assert set(plain.layers) == {f"{block}.{leaf}" for leaf in ("to_q", "to_k", "to_v", "to_out.0")}
    whole = load_adapter(GOLDEN / "diffusers-old/pipeline.safetensors")
    text = "text_encoder.text_model.encoder.layers.0"
    assert set(whole.layers) == {
        "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k",
        "unet.mid_block.attentions.0.proj_in",
        f"{text}.self_attn.q_proj",
        f"{text}.self_attn.out_proj",
        f"{text}.mlp.fc1",
    }
    assert plain.naming == whole.naming == "diffusers"


def test_cloneofsimo_text_encoder() -> None:
    adapter = load_adapter(GOLDEN / "cloneofsimo/text.safetensors")
    tensors = stored(GOLDEN / "cloneofsimo/text.safetensors")
    query = "text_encoder.text_model.encoder.layers.1.self_attn.q_proj"
    wanted = tensors["text_encoder:6:up"].float() @ tensors["text_encoder:6:down"].float()
    torch.testing.assert_close(adapter.layers[query].materialize(), wanted)
    assert adapter.extras["bundle_emb.<s1>.string_to_param.*"].value.shape == (1, 4)


def numbered(late_gate: bool, text_width: int = 768) -> dict[str, Tensor]:
    """Return all 144 numbered layers of a UNet, without memory behind them."""
    tensors: dict[str, Tensor] = {}
    number = 0
    for width, blocks in ((320, 2), (640, 2), (1280, 2), (1280, 3), (640, 3), (320, 3), (1280, 1)):
        own, gate = [(width, width)] * 4, [(8 * width, width)]
        cross = [(width, width), (width, text_width), (width, text_width), (width, width)]
        for _ in range(blocks):
            for out, inner in own + (cross + gate if late_gate else gate + cross):
                tensors[f"unet:{number}:up"] = torch.zeros(1).expand(out, 1)
                tensors[f"unet:{number}:down"] = torch.zeros(1).expand(1, inner)
                number += 1
    return tensors


@pytest.mark.parametrize("late_gate", [False, True])
def test_cloneofsimo_unet(late_gate: bool) -> None:
    """Names by number, in either order that diffusers has had."""
    layers = get_format("cloneofsimo").read(Bundle(numbered(late_gate))).layers
    assert len(layers) == 144
    block = "unet.up_blocks.1.attentions.0.transformer_blocks.0"
    assert layers[f"{block}.attn2.to_v"].weight_shape == (1280, 768)
    assert layers[f"{block}.ff.net.0.proj"].weight_shape == (8 * 1280, 1280)
    assert layers[
        "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn1.to_out.0"
    ].weight_shape == (320, 320)


def test_cloneofsimo_with_other_layers() -> None:
    tensors = numbered(late_gate=False)
    extended = tensors | {"unet:144:up": torch.ones(4, 1), "unet:144:down": torch.ones(1, 4)}
    with pytest.raises(UnsupportedError, match="145 numbered UNet layers"):
        get_format("cloneofsimo").read(Bundle(extended))


# ── what a target cannot hold ──

LORA = LoRA(make_tensor(1, 2, 4), make_tensor(2, 6, 2), 2.0)
LOHA = LoHa(*(make_tensor(i, *s) for i, s in enumerate(((6, 2), (2, 4), (6, 2), (2, 4)))), 2.0)
CHANGE = FullDelta(make_tensor(3, 6, 4))
SHIFT = FullDelta(None, make_tensor(4, 6))
LOSSES: dict[str, tuple[str, LayerDelta]] = {
    "diffusers: LoHa": ("diffusers", LOHA),
    "diffusers: a full change": ("diffusers", CHANGE),
    "diffusers: DoRA per input": ("diffusers", DoRA(LORA, make_tensor(1, 4), "in")),
    "diffusers: DoRA around LoHa": ("diffusers", DoRA(LOHA, make_tensor(1, 6))),
    "diffusers: LoRA and a full change": ("diffusers", SumDelta((LORA, CHANGE))),
    "comfyui: IA3": ("comfyui", IA3(make_tensor(1, 6), False)),
    "comfyui: LoRA and a full change": ("comfyui", SumDelta((LORA, CHANGE))),
    "kohya: two LoRAs": ("kohya", SumDelta((LORA, LORA))),
    "kohya: an embedding": ("kohya", LoRA(LORA.down, LORA.up, 1.0, role="embedding")),
}
PATHS = {"kohya": "lora_unet_{}", "comfyui": "diffusion_model.{}", "diffusers": "transformer.{}"}
NAMINGS = {"kohya": "kohya", "comfyui": "original", "diffusers": "diffusers"}


@pytest.mark.parametrize(("name", "delta"), LOSSES.values(), ids=LOSSES)
def test_losses_are_listed(name: str, delta: LayerDelta) -> None:
    bad, good = PATHS[name].format("bad"), PATHS[name].format("good")
    adapter = Adapter({bad: delta, good: LORA}, naming=NAMINGS[name])
    chosen = get_format(name)
    losses = chosen.losses(adapter)
    assert bad in losses
    with pytest.raises(UnsupportedError, match=bad) as caught:
        chosen.write(adapter)
    assert "--allow-loss" in (caught.value.hint or "")
    left = {path: kept for path, kept in adapter.layers.items() if path not in losses}
    assert chosen.write(Adapter(left or {good: LORA}, naming=NAMINGS[name])).tensors


def test_extras_that_are_lost() -> None:
    rows = RowReplacement(make_tensor(1, 1, 4), (3,))
    bundle = Replacement(make_tensor(1, 1, 4))
    for name, extras in {
        "kohya": {"lora_unet_x.weight": rows, "lora_unet_x.bias": bundle},
        "comfyui": {"diffusion_model.x.weight": rows},
        "diffusers": {"transformer.x.weight": bundle, "bundle_emb.word.clip_l": bundle},
    }.items():
        adapter = Adapter({PATHS[name].format("good"): LORA}, extras, naming=NAMINGS[name])
        assert get_format(name).losses(adapter).keys() == extras.keys()


@pytest.mark.parametrize("name", PATHS)
def test_names_of_another_naming_are_no_loss_but_a_mistake(name: str) -> None:
    adapter = Adapter({"model.layers.0.fc": LORA})
    with pytest.raises(UnsupportedError, match="transformers names"):
        get_format(name).write(adapter)


def test_a_bias_is_kept_by_every_format() -> None:
    biased = LoRA(LORA.down, LORA.up, 1.0, make_tensor(5, 6))
    for name, path in PATHS.items():
        chosen = get_format(name)
        for delta in (biased, SumDelta((LoRA(LORA.down, LORA.up, 1.0), SHIFT))):
            adapter = Adapter({path.format("x"): delta}, naming=NAMINGS[name])
            again = chosen.read(chosen.write(adapter)).layers[path.format("x")]
            torch.testing.assert_close(again.bias_change, delta.bias_change)
            torch.testing.assert_close(again.materialize(), delta.materialize())


@pytest.mark.parametrize("scale", [1.0, 0.5, 3.0])
def test_a_residual_keeps_its_own_scale(scale: float) -> None:
    """Readers scale it with the LoRA, whatever its scale was."""
    indices = torch.tensor([[0, 5], [1, 2]])
    residual = SparseResidual(indices, torch.tensor([1.0, 2.0]), (6, 4), scale)
    delta = SumDelta((LORA.scaled(0.5), residual))
    adapter = Adapter({"lora_unet_x": delta}, naming="kohya")
    again = get_format("kohya").read(get_format("kohya").write(adapter)).layers["lora_unet_x"]
    torch.testing.assert_close(again.materialize(), delta.materialize())


def test_comfyui_spellings() -> None:
    """Alpha only where it is not the rank; lora_mid beside lora_down alone."""
    tucker = TuckerLoRA(
        *(make_tensor(i, *s) for i, s in enumerate(((2, 4, 1, 1), (2, 2, 3, 3), (6, 2, 1, 1)))), 2.0
    )
    layers = {
        "diffusion_model.a": LORA,
        "diffusion_model.b": LORA.scaled(0.5),
        "diffusion_model.c": tucker,
    }
    keys = get_format("comfyui").write(Adapter(layers, naming="original")).tensors.keys()
    assert keys == {
        "diffusion_model.a.lora_A.weight",
        "diffusion_model.a.lora_B.weight",
        "diffusion_model.b.lora_A.weight",
        "diffusion_model.b.lora_B.weight",
        "diffusion_model.b.alpha",
        "diffusion_model.c.lora_down.weight",
        "diffusion_model.c.lora_mid.weight",
        "diffusion_model.c.lora_up.weight",
        "diffusion_model.c.alpha",
    }
