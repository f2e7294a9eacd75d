"""Where a base keeps an adapter's layers, scores by its norms, and DoRA at another rank."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools.adapter import Adapter
from loratools.adapter_io import load_adapter, save_adapter
from loratools.basemodel import open_base
from loratools.deltas import DoRA, ExpertLoRA, LoRA
from loratools.errors import MatchError, UnsupportedError
from loratools.planning.base_rows import layer_norms, locate_layers
from loratools.svd_resize import resize_adapter
from tests.resize_cases import dense_of
from tests.strategies import make_tensor


def lora(seed: int, out: int, *inner: int, rank: int = 3) -> LoRA:
    down = make_tensor(seed, rank, *inner)
    return LoRA(down, make_tensor(seed + 1, out, rank, *[1] * (len(inner) - 1)) / 3, 2.0)


def base_at(path: Path, tensors: dict[str, Tensor]) -> Path:
    file = path / "base.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return file


# ── where a layer's weight lies ──────────────────────────────────────────────────────────────


def test_fused_split_and_reordered_rows_are_found(tmp_path: Path) -> None:
    """FLUX in the original's layout, the adapter in diffusers': thirds of qkv, halves swapped."""
    width = 8
    qkv = make_tensor(1, 3 * width, width)
    proj, modulation = make_tensor(2, width, width), make_tensor(3, 2 * width, width)
    base = base_at(
        tmp_path,
        {
            "double_blocks.0.img_attn.qkv.weight": qkv,
            "double_blocks.0.img_attn.proj.weight": proj,
            "final_layer.adaLN_modulation.1.weight": modulation,
        },
    )
    block = "transformer.transformer_blocks.0.attn"
    expected = {
        f"{block}.to_q": qkv[:width],
        f"{block}.to_v": qkv[2 * width :],
        f"{block}.to_out.0": proj,
        "transformer.norm_out.linear": torch.cat([modulation[width:], modulation[:width]]),
    }
    layers = {path: lora(n, *weight.shape) for n, (path, weight) in enumerate(expected.items())}
    adapter = Adapter(layers, naming="diffusers")
    rows = locate_layers(adapter, list(layers), open_base(base), "flux1")
    for path, weight in expected.items():
        assert torch.equal(rows.weight(path), weight), path
        assert torch.equal(torch.cat(list(rows.matrices(path))), weight)


def test_turned_over_weights_are_turned_back(tmp_path: Path) -> None:
    weight = make_tensor(4, 6, 10)
    base = base_at(tmp_path, {"wte.weight": weight.to(torch.bfloat16)})
    table = replace(lora(1, 10, 6), role="embedding")
    rows = locate_layers(Adapter({"wte": table}), ["wte"], open_base(base))
    assert torch.equal(rows.weight("wte"), weight.to(torch.bfloat16).float().T)


def test_norms_are_those_of_the_weights(tmp_path: Path) -> None:
    linear, stack = make_tensor(5, 9, 7), make_tensor(6, 3, 8, 5)
    base = base_at(tmp_path, {"a.weight": linear, "experts.up_proj": stack, "z.weight": linear * 0})
    experts = ExpertLoRA(make_tensor(1, 3, 2, 5), make_tensor(2, 3, 8, 2), 1.0)
    layers = {"a": lora(1, 9, 7), "experts.up_proj": experts, "z": lora(3, 9, 7)}
    rows = locate_layers(Adapter(layers), list(layers), open_base(base))
    found = {kind: layer_norms(rows, list(layers), kind) for kind in ("frobenius", "spectral")}
    assert found["frobenius"]["a"] == pytest.approx(float(linear.norm()))
    assert found["frobenius"]["experts.up_proj"] == pytest.approx(float(stack.norm()))
    assert found["spectral"]["a"] == pytest.approx(float(torch.linalg.svdvals(linear)[0]), rel=0.01)
    largest = float(torch.linalg.svdvals(stack).max())
    assert found["spectral"]["experts.up_proj"] == pytest.approx(largest, rel=0.01)
    assert found["frobenius"]["z"] == found["spectral"]["z"] == 1.0


def test_a_base_of_other_shapes_is_refused(tmp_path: Path) -> None:
    base = base_at(
        tmp_path, {"a.weight": make_tensor(1, 4, 4), "q.weight": torch.ones(3, 3).char()}
    )
    with pytest.raises(MatchError):
        locate_layers(Adapter({"a": lora(1, 9, 7)}), ["a"], open_base(base))
    with pytest.raises(UnsupportedError, match="quantised"):
        locate_layers(Adapter({"q": lora(1, 3, 3)}), ["q"], open_base(base))


# ── scores ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("score", ["frobenius", "spectral"])
def test_scores_weigh_layers_by_their_base(score: str, tmp_path: Path) -> None:
    """The same change on a weight a hundred times larger counts for nothing beside the other."""
    small, large = make_tensor(1, 8, 8), make_tensor(1, 8, 8) * 100
    base = base_at(tmp_path, {"a.weight": small, "b.weight": large})
    adapter = Adapter({"a": lora(7, 8, 8, rank=4), "b": lora(7, 8, 8, rank=4).scaled(2.0)})
    save_adapter(adapter, tmp_path / "adapter")
    ranks = {}
    for word in ("absolute", score):
        report = resize_adapter(
            tmp_path / "adapter", tmp_path / word, mean_rank=2.5, base=base, score=word
        )
        ranks[word] = [item["rank"] for item in report.items]
    assert ranks["absolute"][1] >= ranks["absolute"][0]
    assert ranks[score] == [4, 1]


# ── DoRA ─────────────────────────────────────────────────────────────────────────────────────

SHAPES = [(12, 9), (10, 4, 3, 3)]


def channels_first(tensor: Tensor, axis: str) -> Tensor:
    return tensor.movedim(0 if axis == "out" else 1, 0).flatten(1)


def adapted(weight: Tensor, change: Tensor, magnitude: Tensor, axis: str) -> Tensor:
    """magnitude · V / ‖V‖ in float64, V = W + ΔW; channels first, everything else flattened."""
    direction = channels_first(weight.double() + change.reshape(weight.shape), axis)
    lengths = direction.square().sum(dim=1, keepdim=True).sqrt()
    return magnitude.double().reshape(-1, 1) * direction / lengths


def inner_change(delta: object) -> Tensor:
    assert isinstance(delta, DoRA)
    assert isinstance(delta.inner, LoRA)
    return dense_of(delta.inner)


def write_dora(tmp_path: Path, shape: tuple[int, ...], axis: str) -> tuple[Path, Path, DoRA]:
    weight = make_tensor(1, *shape) / 3
    channels = shape[0] if axis == "out" else shape[1]
    magnitude = make_tensor(2, channels).abs() * torch.logspace(-1, 1, channels)
    delta = DoRA(lora(5, *shape, rank=4), magnitude, axis)  # type: ignore[arg-type]
    adapter = Adapter({"lora_unet_input_blocks_0_0": delta}, naming="kohya")
    save_adapter(adapter, tmp_path / "dora.safetensors", format="kohya")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    return tmp_path / "dora.safetensors", base_at(tmp_path, {name: weight}), delta


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("rank", [1, 3, 4, 6])
def test_dora_stays_near_the_adapted_weight(
    shape: tuple[int, ...], axis: str, rank: int, tmp_path: Path
) -> None:
    source, base, old = write_dora(tmp_path, shape, axis)
    weight, change = make_tensor(1, *shape) / 3, inner_change(old)
    target = tmp_path / "new.safetensors"
    report = resize_adapter(source, target, rank=rank, base=base, arch="sd1")
    (new,) = load_adapter(target).layers.values()
    assert isinstance(new, DoRA)
    assert new.rank == rank
    before = adapted(weight, change, old.magnitude, axis)
    after = adapted(weight, inner_change(new), new.magnitude, axis)
    lost = float((after - before).norm())
    moved = float((before - channels_first(weight, axis)).norm())
    assert report.facts["relative_error"] == pytest.approx(lost / moved, rel=1e-4, abs=1e-6)
    if rank >= 4:
        assert lost <= 1e-6 * moved
        return
    # Cutting ΔW by itself, magnitude left as it is, is what other tools do.
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    cut = (left[:, :rank] * values[:rank]) @ right[:rank]
    assert lost < float((adapted(weight, cut, old.magnitude, axis) - before).norm())
    # The optimum with gains kept: the tail of the spectrum of G·ΔW.
    direction = channels_first(weight.double() + change.reshape(shape), axis)
    gains = old.magnitude.double().flatten() / direction.norm(dim=1)
    wide = [1] * len(shape)
    wide[0 if axis == "out" else 1] = -1
    gained = (change.reshape(shape) * gains.reshape(wide)).flatten(1)
    tail = float(torch.linalg.svdvals(gained)[rank:].norm())
    assert math.isclose(lost, tail, rel_tol=1e-4)


def test_dora_without_its_base_is_refused(tmp_path: Path) -> None:
    source, _, _ = write_dora(tmp_path, SHAPES[0], "out")
    with pytest.raises(UnsupportedError, match="input_blocks_0_0") as failure:
        resize_adapter(source, tmp_path / "new.safetensors", rank=2)
    assert "--base" in (failure.value.hint or "")
    assert not (tmp_path / "new.safetensors").exists()
