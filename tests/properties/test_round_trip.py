"""ΔW(read(write(a))) = ΔW(a), through real files."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load_file

from loratools.adapter import Adapter
from loratools.adapter_io import load_adapter, save_adapter
from loratools.deltas import ExpertLoRA, LayerDelta, LoRA
from loratools.errors import OutputError
from tests.strategies import adapters, attentions, layer_maps, make_tensor

FILES = settings(max_examples=25)


def through_a_file(adapter: Adapter) -> Adapter:
    """Return the adapter as it comes back from the disk."""
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(adapter, Path(folder) / "a")
        # Clones outlive the folder on every system.
        return load_adapter(Path(folder) / "a").map_tensors(torch.Tensor.clone)


def dense(delta: LayerDelta) -> torch.Tensor:
    """Return s·B·A in float64, from the stored tensors alone."""
    assert isinstance(delta, (LoRA, ExpertLoRA))
    stacked = isinstance(delta, ExpertLoRA)
    up, down = delta.up.double(), delta.down.double()
    rank = down.shape[1] if stacked else down.shape[0]
    pair = (up, down) if stacked else (up.flatten(1), down.flatten(1))
    return (delta.alpha / rank) * (pair[0] @ pair[1])


@FILES
@given(adapter=adapters(kinds=(LoRA.kind, ExpertLoRA.kind)))
def test_dense_change(adapter: Adapter) -> None:
    """Every ΔW, multiplied out in float64: equal up to the last place of alpha."""
    again = through_a_file(adapter)
    assert again.layers.keys() == adapter.layers.keys()
    for path, delta in adapter.layers.items():
        torch.testing.assert_close(dense(again.layers[path]), dense(delta), rtol=1e-12, atol=0)


@FILES
@given(adapter=adapters())
def test_stored_bits(adapter: Adapter) -> None:
    """No stored number is touched, whatever its dtype."""
    again = dict(through_a_file(adapter).named_tensors())
    for name, tensor in adapter.named_tensors():
        assert again[name].dtype == tensor.dtype, name
        assert torch.equal(again[name], tensor), name


@FILES
@given(layers=attentions("a"), other=layer_maps())
def test_attention_beside_other_layers(
    layers: dict[str, LayerDelta], other: dict[str, LayerDelta]
) -> None:
    """nn.MultiheadAttention has one rank and alpha for both of its layers."""
    again = through_a_file(Adapter({**other, **layers}))
    for path, delta in layers.items():
        torch.testing.assert_close(dense(again.layers[path]), dense(delta), rtol=1e-12, atol=0)


def test_what_is_written_is_what_others_read(tmp_path: Path) -> None:
    """The file holds PEFT's names, as the safetensors library reads it."""
    lora = LoRA(make_tensor(1, 2, 3), make_tensor(2, 4, 2), 4.0)
    save_adapter(Adapter({"h.0.fc": lora}), tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    prefix = "base_model.model.h.0.fc"
    assert stored.keys() == {f"{prefix}.lora_A.weight", f"{prefix}.lora_B.weight"}
    assert torch.equal(stored[f"{prefix}.lora_A.weight"], lora.down)
    assert torch.equal(stored[f"{prefix}.lora_B.weight"], lora.up)


def test_an_existing_output_is_refused(tmp_path: Path) -> None:
    adapter = Adapter({"fc": LoRA(make_tensor(1, 2, 3), make_tensor(2, 4, 2), 4.0)})
    save_adapter(adapter, tmp_path / "a")
    before = sorted((path.name, path.read_bytes()) for path in (tmp_path / "a").iterdir())
    with pytest.raises(OutputError):
        save_adapter(adapter.map_tensors(lambda t: t * 2), tmp_path / "a")
    assert sorted((p.name, p.read_bytes()) for p in (tmp_path / "a").iterdir()) == before
    save_adapter(adapter.map_tensors(lambda t: t * 2), tmp_path / "a", overwrite=True)
    assert torch.equal(
        load_adapter(tmp_path / "a").layers["fc"].tensors()["up"], 2 * make_tensor(2, 4, 2)
    )
