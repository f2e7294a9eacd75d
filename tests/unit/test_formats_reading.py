"""Reading the diffusion formats: spellings, faults that are told together, hostile tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas import DoRA, GLoRA, LoHa, LoRA, SumDelta
from loratools.errors import MalformedAdapterError, UnsupportedError
from loratools.formats import detect_format
from loratools.formats.format import Bundle, Listing
from loratools.formats.parameters import split_dotted, split_flattened
from tests.strategies import make_tensor

Tensors = dict[str, Tensor]
DOWN, UP = make_tensor(1, 2, 4), make_tensor(2, 6, 2)
FLAT = "lora_unet_mid_block_attentions_0_proj_in"
DOTTED = "diffusion_model.blocks.0.attn"


def read(tensors: Tensors, **words: object) -> Adapter:
    bundle = Bundle(tensors, source="x.safetensors", **words)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return detect_format(Listing(shapes, bundle.metadata, bundle.sidecars), "x").read(bundle)


def refusal(tensors: Tensors, error: type[Exception] = MalformedAdapterError) -> str:
    with pytest.raises(error) as caught:
        read(tensors)
    assert caught.value.hint
    return caught.value.message


# ── spellings ────────────────────────────────────────────────────────────────────────────────

PAIRS = (
    ("lora_down.weight", "lora_up.weight"),
    ("lora_A.weight", "lora_B.weight"),
    ("lora_A", "lora_B"),
    ("lora_A.default.weight", "lora_B.default.weight"),
    ("lora_A.default", "lora_B.default"),
    ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
)
MODULES = (
    "blocks.0.mlp.down",
    "transformer_blocks.0.attn.to_q",
    "a.lora.weight",
    "x.alpha",
    "y.scale",
)


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize(("down", "up"), PAIRS)
def test_every_spelling_means_the_same(module: str, down: str, up: str) -> None:
    assert split_dotted(f"{module}.{down}") == (module, "down")
    assert split_dotted(f"{module}.{up}") == (module, "up")
    flat = module.replace(".", "_")
    assert split_flattened(f"{flat}.{down}") == (flat, "down")


@pytest.mark.parametrize(
    "name", ["weight", "alpha", "lora_A.weight", "", ".", "..", "a.b.c", "lora_sideways.weight"]
)
def test_what_is_no_parameter(name: str) -> None:
    assert split_dotted(name) is None
    assert split_flattened("lora_unet_x.lora_sideways.weight") is None


SOURCES = {
    "kohya": {"lora_unet_to_q.lora_down.weight": DOWN, "lora_unet_to_q.lora_up.weight": UP},
    "kohya with an underscore too many": {
        "lora_unet_to_q_.lora_down.weight": DOWN,
        "lora_unet_to_q_.lora_up.weight": UP,
    },
    "VideoX": {"lora_unet__to_q.lora_down.weight": DOWN, "lora_unet__to_q.lora_up.weight": UP},
    "anime": {"lora_unet_to_q.lora.down.weight": DOWN, "lora_unet_to_q.lora.up.weight": UP},
}


@pytest.mark.parametrize("tensors", SOURCES.values(), ids=SOURCES)
def test_flattened_variants(tensors: Tensors) -> None:
    adapter = read(tensors)
    assert adapter.naming == "kohya"
    assert list(adapter.layers) == ["lora_unet_to_q"]
    lora = adapter.layers["lora_unet_to_q"]
    assert torch.equal(lora.materialize(), UP @ DOWN)
    stray = any("__" in name or "_." in name for name in tensors)
    assert any("stray underscore" in note for note in adapter.notes) == stray


WRAPPED = {
    "base_model.model.transformer_blocks.0.attn.to_q": (
        "transformers",
        "transformer_blocks.0.attn.to_q",
    ),
    "unet.base_model.model.down_blocks.0.proj_in": ("diffusers", "unet.down_blocks.0.proj_in"),
    "base_model.model.diffusion_model.blocks.0.wq": ("original", "diffusion_model.blocks.0.wq"),
    "transformer_blocks.0.attn.to_q": ("transformers", "transformer_blocks.0.attn.to_q"),
}


@pytest.mark.parametrize(("module", "wanted"), WRAPPED.items())
def test_wrappers_are_taken_off(module: str, wanted: tuple[str, str]) -> None:
    adapter = read({f"{module}.lora_A.default.weight": DOWN, f"{module}.lora_B.default.weight": UP})
    assert (adapter.naming, *adapter.layers) == wanted


# ── shapes decide ────────────────────────────────────────────────────────────────────────────


def decomposed(shape: tuple[int, ...], suffix: str = "dora_scale", **more: Tensor) -> DoRA:
    down, up = make_tensor(1, 2, 6), make_tensor(2, 6, 2)
    tensors = {f"{FLAT}.lora_down.weight": down, f"{FLAT}.lora_up.weight": up}
    found = read({**tensors, f"{FLAT}.{suffix}": make_tensor(3, *shape), **more}).layers[FLAT]
    assert isinstance(found, DoRA)
    return found


@pytest.mark.parametrize(
    ("shape", "suffix", "axis"),
    [
        ((6, 1), "dora_scale", "out"),
        ((1, 6), "dora_scale", "in"),
        ((6,), "dora_scale", "out"),
        ((6,), "lora_magnitude_vector", "out"),
        ((6,), "lora_magnitude_vector.weight", "out"),
        ((1, 6), "lora_magnitude_vector", "out"),
        ((6,), "magnitude", "out"),
    ],
)
def test_magnitude_axis_of_a_square_layer(shape: tuple[int, ...], suffix: str, axis: str) -> None:
    delta = decomposed(shape, suffix)
    assert delta.axis == axis
    weight = make_tensor(4, 6, 6)
    moved = weight + delta.inner.materialize()
    norm = moved.norm(dim=1 if axis == "out" else 0, keepdim=True)
    wanted = moved / norm * make_tensor(3, *shape).reshape(norm.shape)
    torch.testing.assert_close(delta.apply(weight), wanted)


def test_magnitude_of_a_convolution_per_input() -> None:
    tensors = {
        f"{FLAT}.lora_down.weight": make_tensor(1, 2, 4, 3, 3),
        f"{FLAT}.lora_up.weight": make_tensor(2, 6, 2, 1, 1),
        f"{FLAT}.dora_scale": make_tensor(3, 1, 4, 1, 1),
    }
    assert read(tensors).layers[FLAT].axis == "in"


def test_both_glora_layouts_are_one() -> None:
    left, right, up, down = (
        make_tensor(i, *s) for i, s in enumerate(((4, 2), (2, 4), (6, 2), (2, 4)))
    )
    new = {"a1": left, "a2": right, "b1": up, "b2": down}
    old = {"a2": left, "a1": right, "b2": up, "b1": down}
    weight = make_tensor(9, 6, 4)
    wanted = weight + 0.5 * (up @ down + weight @ left @ right)
    for layout in (new, old):
        tensors = {f"{FLAT}.{name}.weight": tensor for name, tensor in layout.items()}
        delta = read({**tensors, f"{FLAT}.alpha": torch.tensor(1)}).layers[FLAT]
        assert isinstance(delta, GLoRA)
        torch.testing.assert_close(delta.apply(weight), wanted)


def test_a_residual_is_scaled_with_its_lora() -> None:
    tensors = {
        f"{FLAT}.lora_down.weight": DOWN,
        f"{FLAT}.lora_up.weight": UP,
        f"{FLAT}.alpha": torch.tensor(1.0),
        f"{FLAT}.bias_indices": torch.tensor([[0, 5], [1, 2]], dtype=torch.int16),
        f"{FLAT}.bias_values": torch.tensor([1.0, 2.0]),
        f"{FLAT}.bias_size": torch.tensor([6, 4], dtype=torch.int16),
    }
    wanted = UP @ DOWN
    wanted[0, 1] += 1
    wanted[5, 2] += 2
    torch.testing.assert_close(read(tensors).layers[FLAT].materialize(), wanted * 0.5)


def test_lora_and_differences_are_summed() -> None:
    tensors = {
        f"{DOTTED}.lora_A.weight": DOWN,
        f"{DOTTED}.lora_B.weight": UP,
        f"{DOTTED}.diff": make_tensor(3, 6, 4),
        f"{DOTTED}.diff_b": make_tensor(4, 6),
    }
    delta = read(tensors).layers[DOTTED]
    assert isinstance(delta, SumDelta)
    torch.testing.assert_close(delta.materialize(), UP @ DOWN + make_tensor(3, 6, 4))
    torch.testing.assert_close(delta.bias_change, make_tensor(4, 6))


# ── what is no layer ─────────────────────────────────────────────────────────────────────────


def test_bundles_and_notes_are_carried() -> None:
    carried = {
        "bundle_emb.word.string_to_param.*": make_tensor(1, 1, 4),
        "bundle_emb.word.clip_l": make_tensor(2, 1, 4),
        "lora_unet_x._aux.mean": make_tensor(3, 2),
    }
    adapter = read({**SOURCES["kohya"], **carried})
    assert {name: extra.value for name, extra in adapter.extras.items()} == carried
    assert list(adapter.layers) == ["lora_unet_to_q"]


def test_set_and_reshape_weight() -> None:
    tensors = {
        f"{DOTTED}.set_weight": make_tensor(1, 6, 4),
        f"{DOTTED}.norm.query_norm.scale.set_weight": make_tensor(2, 4),
        "diffusion_model.img_in.reshape_weight": torch.tensor([6, 8]),
    }
    extras = read(tensors).extras
    assert list(extras) == [
        f"{DOTTED}.weight",
        f"{DOTTED}.norm.query_norm.scale",
        "diffusion_model.img_in.reshape_weight",
    ]


def twice(change: float = 0.0, sep: str = "_", alpha: float = 2.0) -> Tensors:
    """Return a fused projection and its parts, which differ by ``change``."""
    names = ("to_q", "to_k", "to_v")
    down, ups = make_tensor(1, 2, 4), [make_tensor(5 + i, 4, 2) for i in range(3)]
    block = "lora_unet_layers_0_attention" if sep == "_" else "diffusion_model.layers.0.attention"
    tensors = {
        f"{block}{sep}qkv.lora.down.weight": down,
        f"{block}{sep}qkv.lora.up.weight": torch.cat(ups),
    }
    for name, up in zip(names, ups, strict=True):
        # The same product from other factors and another alpha.
        tensors[f"{block}{sep}{name}.lora.down.weight"] = down * 4 + change
        tensors[f"{block}{sep}{name}.lora.up.weight"] = up / alpha
        tensors[f"{block}{sep}{name}.alpha"] = torch.tensor(alpha * 2 / 4)
    return tensors


@pytest.mark.parametrize("sep", ["_", "."])
def test_repeated_projections_are_dropped_if_equal(sep: str) -> None:
    adapter = read(twice(sep=sep))
    assert [path.rpartition("attention")[2][1:] for path in adapter.layers] == [
        "to_k",
        "to_q",
        "to_v",
    ]
    assert any("parts say the same" in note for note in adapter.notes)
    assert adapter.naming == ("kohya" if sep == "_" else "original")


def test_repeated_projections_that_differ_are_refused() -> None:
    assert "attention_qkv" in refusal(twice(change=1e-3))


# ── faults ───────────────────────────────────────────────────────────────────────────────────


def pair(module: str, down: Tensor = DOWN, up: Tensor = UP) -> Tensors:
    return {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}


GOOD = pair("lora_unet_good")


def test_all_faults_are_told_at_once() -> None:
    tensors = {
        **GOOD,
        "lora_unet_half.lora_up.weight": UP,
        **pair("lora_unet_ranks", DOWN, make_tensor(1, 6, 3)),
        "lora_unet_x.lora_sideways.weight": UP,
        "model.diffusion_model.weight": UP,
        "optimizer.state": UP,
        "lora_unet_alone.alpha": torch.tensor(1.0),
        "lora_unet_gain.weight": UP,
    }
    message = refusal(tensors)
    for name in (
        "half",
        "ranks",
        "sideways",
        "model.diffusion_model",
        "optimizer",
        "alone",
        "gain",
    ):
        assert name in message
    assert "lora_unet_good" not in message


BROKEN: dict[str, Tensors] = {
    "a vector": pair(FLAT, make_tensor(1, 4), UP),
    "nothing in it": pair(FLAT, torch.empty(0, 4), torch.empty(6, 0)),
    "a kernel in up": pair(FLAT, DOWN, make_tensor(2, 6, 2, 3, 3)),
    "two spellings": {**pair(FLAT), f"{FLAT}.lora_A.weight": DOWN},
    "alpha is a vector": {**pair(FLAT), f"{FLAT}.alpha": torch.ones(2)},
    "alpha is NaN": {**pair(FLAT), f"{FLAT}.alpha": torch.tensor(float("nan"))},
    "alpha is infinite": {**pair(FLAT), f"{FLAT}.alpha": torch.tensor(float("inf"))},
    "scale against alpha": {
        **pair(FLAT),
        f"{FLAT}.alpha": torch.tensor(1.0),
        f"{FLAT}.scale": torch.tensor(3.0),
    },
    "magnitude of no side": {**pair(FLAT), f"{FLAT}.dora_scale": make_tensor(1, 5, 1)},
    "magnitude of both": {
        **pair(FLAT),
        f"{FLAT}.dora_scale": make_tensor(1, 6, 1),
        f"{FLAT}.magnitude": make_tensor(1, 6),
    },
    "half a LoHa": {f"{FLAT}.hada_w1_a": UP, f"{FLAT}.hada_w1_b": DOWN},
    "LoHa of two sizes": {
        f"{FLAT}.hada_w1_a": UP,
        f"{FLAT}.hada_w1_b": DOWN,
        f"{FLAT}.hada_w2_a": make_tensor(1, 5, 2),
        f"{FLAT}.hada_w2_b": DOWN,
    },
    "half a core": {
        f"{FLAT}.hada_w1_a": UP,
        f"{FLAT}.hada_w1_b": DOWN,
        f"{FLAT}.hada_w2_a": UP,
        f"{FLAT}.hada_w2_b": DOWN,
        f"{FLAT}.hada_t1": make_tensor(1, 2, 2, 3, 3),
    },
    "half a LoKr": {f"{FLAT}.lokr_w1": UP},
    "LoKr twice": {
        f"{FLAT}.lokr_w1": UP,
        f"{FLAT}.lokr_w2": UP,
        f"{FLAT}.lokr_w2_a": UP,
        f"{FLAT}.lokr_w2_b": DOWN,
    },
    "LoKr ranks": {
        f"{FLAT}.lokr_w1": UP,
        f"{FLAT}.lokr_w2_a": UP,
        f"{FLAT}.lokr_w2_b": make_tensor(1, 3, 4),
    },
    "no square blocks": {f"{FLAT}.oft_blocks": make_tensor(1, 2, 3, 4)},
    "GLoRA that does not chain": {
        f"{FLAT}.{n}.weight": make_tensor(1, 3, 5) for n in ("a1", "a2", "b1", "b2")
    },
    "a residual outside": {
        f"{FLAT}.bias_indices": torch.tensor([[7], [0]]),
        f"{FLAT}.bias_values": torch.ones(1),
        f"{FLAT}.bias_size": torch.tensor([6, 4]),
    },
    "a residual before the start": {
        f"{FLAT}.bias_indices": torch.tensor([[-1], [0]]),
        f"{FLAT}.bias_values": torch.ones(1),
        f"{FLAT}.bias_size": torch.tensor([6, 4]),
    },
    "LoRA and a rotation": {**pair(FLAT), f"{FLAT}.oft_blocks": make_tensor(1, 2, 3, 3)},
    "a bias of another size": {**pair(FLAT), f"{FLAT}.lora_up.bias": make_tensor(1, 5)},
    "Tucker ranks": {**pair(FLAT), f"{FLAT}.lora_mid.weight": make_tensor(1, 2, 3, 3, 3)},
}


@pytest.mark.parametrize("tensors", BROKEN.values(), ids=BROKEN)
def test_tensors_that_do_not_belong_together(tensors: Tensors) -> None:
    message = refusal({**GOOD, **tensors})
    assert FLAT in message
    assert "lora_unet_good" not in message


REFUSED: dict[str, tuple[Tensors, str]] = {
    "T-LoRA": ({f"{FLAT}.q_layer.weight": UP, f"{FLAT}.p_layer.weight": UP, **GOOD}, "T-LoRA"),
    "dyn_dim": ({**pair(FLAT), f"{FLAT}.dyn_dim": torch.tensor(2)}, "dyn_dim"),
    "Control-LoRA": (
        {
            "lora_controlnet": torch.tensor(1),
            "input_blocks.1.0.down": DOWN,
            "input_blocks.1.0.up": UP,
        },
        "ControlNet",
    ),
}


@pytest.mark.parametrize(("tensors", "word"), REFUSED.values(), ids=REFUSED)
def test_refused_with_the_reason(tensors: Tensors, word: str) -> None:
    assert word in refusal(tensors, UnsupportedError)


def test_tucker_and_loha_keep_their_tensors() -> None:
    names = {"hada_w1_a": (6, 2), "hada_w1_b": (2, 36), "hada_w2_a": (6, 2), "hada_w2_b": (2, 36)}
    tensors = {
        f"{FLAT}.{name}": make_tensor(i, *shape) for i, (name, shape) in enumerate(names.items())
    }
    delta = read({**tensors, f"{FLAT}.alpha": torch.tensor(1.0)}).layers[FLAT]
    assert isinstance(delta, LoHa)
    one, two, three, four = tensors.values()
    torch.testing.assert_close(delta.materialize(), 0.5 * (one @ two) * (three @ four))


def test_embeddings_of_a_dump() -> None:
    module = "base_model.model.text_fusion.embed"
    tensors = {
        f"{module}.lora_embedding_A": make_tensor(1, 2, 9),
        f"{module}.lora_embedding_B": make_tensor(2, 4, 2),
    }
    delta = read(tensors).layers["text_fusion.embed"]
    assert isinstance(delta, LoRA)
    assert delta.role == "embedding"
