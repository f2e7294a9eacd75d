"""Alpha: where it hides, what it means, and that contradictions are refused. Scales are by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.errors import MalformedAdapterError
from loratools.formats import detect_format, get_format
from loratools.formats.format import Bundle, Listing
from loratools.formats.module_writing import alpha_tensor
from tests.strategies import make_tensor

DIFFUSERS = "transformer.transformer_blocks.0.attn.to_q"
ORIGINAL = "diffusion_model.blocks.0.attn"
FLAT = "lora_unet_proj_in"
WRAPPED = "base_model.model.transformer_blocks.0.attn.to_q"


def read(
    modules: dict[str, int],
    metadata: dict[str, str] | None = None,
    sidecar: Any = None,
    **more: Tensor,
) -> Adapter:
    """Read a file with a LoRA of the given rank for each module."""
    tensors: dict[str, Tensor] = dict(more)
    for path, rank in modules.items():
        tensors[f"{path}.lora_A.weight"] = make_tensor(1, rank, 4)
        tensors[f"{path}.lora_B.weight"] = make_tensor(2, 6, rank)
    sidecars = {} if sidecar is None else {"adapter_config.json": json.dumps(sidecar)}
    listing = Listing({k: tuple(t.shape) for k, t in tensors.items()}, metadata or {}, sidecars)
    bundle = Bundle(tensors, metadata or {}, sidecars, "x.safetensors")
    return detect_format(listing, "x").read(bundle)


def scales(adapter: Adapter) -> list[float]:
    return [delta.scale for delta in adapter.layers.values()]


def adapter_words(**fields: Any) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps(fields)}


TENSORS: dict[str, tuple[Tensor, int, float]] = {
    "a scalar": (torch.tensor(4.0), 8, 0.5),
    "half precision, one element": (torch.tensor([4.0], dtype=torch.float16), 8, 0.5),
    "a whole number": (torch.tensor(16), 8, 2.0),
    "257 in bfloat16 is 256": (torch.tensor(257.0).to(torch.bfloat16), 64, 4.0),
    "float64": (torch.tensor(0.1, dtype=torch.float64), 1, 0.1),
    "zero": (torch.tensor(0.0), 8, 0.0),
    "negative": (torch.tensor(-8.0), 8, -1.0),
}


@pytest.mark.parametrize(("alpha", "rank", "scale"), TENSORS.values(), ids=TENSORS)
@pytest.mark.parametrize("path", [FLAT, ORIGINAL, DIFFUSERS])
def test_alpha_tensors(path: str, alpha: Tensor, rank: int, scale: float) -> None:
    adapter = read({path: rank}, **{f"{path}.alpha": alpha})
    assert scales(adapter) == [scale]
    assert any("alpha is 0" in note for note in adapter.notes) == (scale == 0)


def test_nowhere_means_each_module_its_rank() -> None:
    adapter = read({f"{DIFFUSERS}_1": 4, f"{DIFFUSERS}_2": 16})
    assert scales(adapter) == [1.0, 1.0]
    assert any("no alpha is stated for 2 modules" in note for note in adapter.notes)


def test_scale_replaces_alpha_over_rank() -> None:
    assert scales(read({FLAT: 8}, **{f"{FLAT}.scale": torch.tensor(0.25)})) == [0.25]


WORDS: dict[str, tuple[dict[str, str], str, float]] = {
    "diffusers": (
        adapter_words(**{"transformer.r": 8, "transformer.lora_alpha": 16}),
        DIFFUSERS,
        2.0,
    ),
    "diffusers, one component": (adapter_words(r=8, lora_alpha=2), DIFFUSERS, 0.25),
    "rank-stabilised": (
        adapter_words(
            **{
                "transformer.r": 4,
                "transformer.lora_alpha": 16,
                "transformer.use_rslora": True,
                "transformer.rank_pattern": {"to_q": 8},
            }
        ),
        DIFFUSERS,
        16 / 8**0.5,
    ),
    "patterns": (
        adapter_words(
            **{
                "transformer.r": 8,
                "transformer.lora_alpha": 8,
                "transformer.alpha_pattern": {"^transformer_blocks.0.attn.to_q": 2},
            }
        ),
        DIFFUSERS,
        0.25,
    ),
    "the denoiser of another name": (
        adapter_words(**{"transformer.r": 8, "transformer.lora_alpha": 4}),
        ORIGINAL,
        0.5,
    ),
    "a text encoder's words are not the denoiser's": (
        adapter_words(**{"text_encoder.r": 8, "text_encoder.lora_alpha": 4}),
        DIFFUSERS,
        1.0,
    ),
    "PEFT's LoKr": (adapter_words(**{"transformer.r": 8, "transformer.alpha": 4}), DIFFUSERS, 0.5),
    "a loose alpha": ({"alpha": "0.5"}, ORIGINAL, 0.0625),
    "SimpleTuner": ({"transformer.lora_alpha": "4", "transformer.r": "8"}, DIFFUSERS, 0.5),
    "SimpleTuner, another rank": (
        {"transformer.lora_alpha": "4", "transformer.r": "16"},
        DIFFUSERS,
        0.25,
    ),
    "network_alpha": ({"network_alpha": "16.0"}, ORIGINAL, 2.0),
    "kohya's word is only a note": ({"ss_network_alpha": "1"}, ORIGINAL, 1.0),
}


@pytest.mark.parametrize(("metadata", "path", "scale"), WORDS.values(), ids=WORDS)
def test_alpha_in_metadata(metadata: dict[str, str], path: str, scale: float) -> None:
    assert scales(read({path: 8}, metadata)) == pytest.approx([scale], rel=1e-12)


def test_minimax_turbo() -> None:
    """alpha "8" at rank 128 is 1/16; alpha = rank would be sixteen times too strong."""
    assert scales(read({ORIGINAL: 128}, {"alpha": "8"})) == [0.0625]


def test_alpha_beside_the_file() -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 2}
    assert scales(read({ORIGINAL: 8}, sidecar=config)) == [0.25]
    # A folder of flattened files holds many: a config in it is somebody else's.
    assert scales(read({FLAT: 8}, sidecar=config)) == [1.0]


def test_places_that_agree() -> None:
    metadata = {**adapter_words(r=8, lora_alpha=4), "alpha": "4"}
    assert scales(read({DIFFUSERS: 8}, metadata, **{f"{DIFFUSERS}.alpha": torch.tensor(4)})) == [
        0.5
    ]
    rounded = torch.tensor(257.0).to(torch.bfloat16)
    assert scales(read({DIFFUSERS: 8}, {"alpha": "257"}, **{f"{DIFFUSERS}.alpha": rounded})) == [
        32.0
    ]


CONFLICTS: dict[str, tuple[dict[str, str], dict[str, Tensor]]] = {
    "tensor and JSON": (
        adapter_words(r=8, lora_alpha=4),
        {f"{DIFFUSERS}.alpha": torch.tensor(8.0)},
    ),
    "tensor and loose word": ({"alpha": "4"}, {f"{DIFFUSERS}.alpha": torch.tensor(8.0)}),
    "JSON and loose word": ({**adapter_words(r=8, lora_alpha=4), "alpha": "8"}, {}),
    "JSON of another rank": (
        {**adapter_words(r=16, lora_alpha=16)},
        {f"{DIFFUSERS}.alpha": torch.tensor(16.0)},
    ),
}


@pytest.mark.parametrize(("metadata", "tensors"), CONFLICTS.values(), ids=CONFLICTS)
def test_contradictions_are_refused(metadata: dict[str, str], tensors: dict[str, Tensor]) -> None:
    with pytest.raises(MalformedAdapterError, match=r"to_q.*says alpha"):
        read({DIFFUSERS: 8}, metadata, **tensors)


@pytest.mark.parametrize(
    "metadata",
    [
        {"alpha": "eight"},
        {"alpha": "nan"},
        {"alpha": "1", "lora_alpha": "2"},
        {"lora_adapter_metadata": "{"},
        {"lora_adapter_metadata": "[]"},
        {"lora_adapter_metadata": '{"transformer.lora_alpha": "x"}'},
        {"lora_adapter_metadata": '{"transformer.alpha_pattern": [1]}'},
    ],
)
def test_broken_words(metadata: dict[str, str]) -> None:
    with pytest.raises(MalformedAdapterError):
        read({DIFFUSERS: 8}, metadata)


@pytest.mark.parametrize(
    ("alpha", "dtype", "wanted"),
    [
        (4.0, torch.float16, torch.float16),
        (257.0, torch.bfloat16, torch.float32),
        (0.1, torch.float16, torch.float32),
        (8.0, torch.float8_e4m3fn, torch.float32),
        (0.1, torch.float64, torch.float64),
    ],
)
def test_alpha_is_written_in_a_dtype_that_can_say_it(
    alpha: float, dtype: torch.dtype, wanted: torch.dtype
) -> None:
    scalar = alpha_tensor(alpha, torch.zeros(1).to(dtype))
    assert (scalar.dtype, scalar.shape) == (wanted, ())
    assert float(scalar) == pytest.approx(alpha, rel=1e-7)


@pytest.mark.parametrize("name", ["kohya", "comfyui", "diffusers"])
def test_words_on_alpha_do_not_survive_beside_a_written_alpha(name: str) -> None:
    """A stale word would contradict the new tensors when the file is read again."""
    path = {"kohya": FLAT, "comfyui": ORIGINAL, "diffusers": DIFFUSERS}[name]
    metadata = {} if name == "kohya" else {"alpha": "2", "author": "me"}
    adapter = read({path: 8}, metadata)
    halved = {p: delta.scaled(0.5) for p, delta in adapter.layers.items()}
    moved = Adapter(halved, naming=adapter.naming, metadata=adapter.metadata)
    bundle = get_format(name).write(moved)
    again = get_format(name).read(bundle)
    assert scales(again) == [scale / 2 for scale in scales(adapter)]
    assert name == "kohya" or bundle.metadata["author"] == "me"
