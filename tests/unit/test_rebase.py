"""Rebasing: base B with the result is base A with the adapter, as far as the rank allows.

The oracles are dense matrices in float64.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.adapter_io import load_adapter
from loratools.demo import make_adapter, make_base
from loratools.errors import (
    LoratoolsError,
    MatchError,
    NonFiniteError,
    OptionError,
    OutputError,
    UnsupportedError,
)
from loratools.merge import merge_into_base
from loratools.rebase import rebase_adapter

SHIFT_RANK = 3
LAYER = "model.layers.0.self_attn.q_proj"


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def product(lora: Any) -> Tensor:
    up, down = (t.double().flatten(1) for t in (lora.up, lora.down))
    return up @ down * lora.alpha / lora.rank


@pytest.fixture
def bases(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and the same with a change of rank 3 in every matrix."""
    one, two = tmp_path / "one", tmp_path / "two"
    make_base(one)
    make_base(two)
    make_adapter(tmp_path / "adapter")
    generator = torch.Generator().manual_seed(9)
    moved = {}
    for name, tensor in weights(one).items():
        moved[name] = tensor
        if tensor.dim() == 2:
            up, down = (torch.randn(n, SHIFT_RANK, generator=generator) for n in tensor.shape)
            moved[name] = tensor + 0.02 * up @ down.T
    save_file(moved, two / "model.safetensors", metadata={"format": "pt"})
    return one, two


@pytest.mark.parametrize("exact", [False, True])
def test_the_same_model_from_the_other_base(bases: tuple[Path, Path], exact: bool) -> None:
    one, two = bases
    folder = one.parent
    adapter, out = folder / "adapter", folder / "out"
    report = rebase_adapter(adapter, out, source=one, target=two, rank=SHIFT_RANK, exact=exact)
    assert report.facts["share_captured"] > 1 - 1e-9
    merge_into_base(one, adapter, folder / "from-one")
    merge_into_base(two, out, folder / "from-two")
    wanted, found, kept = (weights(folder / n) for n in ("from-one", "from-two", "two"))
    carried = {f"{path}.weight" for path in load_adapter(adapter).layers}
    for name, tensor in found.items():
        expected = wanted[name] if name in carried else kept[name]
        assert (tensor - expected).abs().max() < 1e-5, name


@pytest.mark.parametrize("rank", [1, 2])
def test_what_a_smaller_rank_captures(bases: tuple[Path, Path], rank: int) -> None:
    one, two = bases
    adapter, out = one.parent / "adapter", one.parent / "out"
    report = rebase_adapter(adapter, out, source=one, target=two, rank=rank)
    before, after = load_adapter(adapter).layers, load_adapter(out).layers
    squares = lost = 0.0
    for row in report.items:
        path = row["module"]
        apart = (weights(one)[f"{path}.weight"] - weights(two)[f"{path}.weight"]).double()
        values = torch.linalg.svdvals(apart) ** 2
        assert row["distance_of_bases"] == pytest.approx(float(apart.norm()), rel=1e-5)
        assert row["norm"] == pytest.approx(float(product(before[path]).norm()), rel=1e-5)
        share = float(values[:rank].sum() / values.sum())
        assert row["share_captured"] == pytest.approx(share, abs=0.01)
        added = product(after[path]) - product(before[path])
        assert int((torch.linalg.svdvals(added) > 1e-5).sum()) == rank
        left = float((apart - added).norm()) ** 2
        assert left == pytest.approx((1 - share) * float(values.sum()), rel=0.02)
        squares, lost = squares + float(values.sum()), lost + left
        assert after[path].rank == before[path].rank + rank  # type: ignore[attr-defined]
    assert report.facts["share_captured"] == pytest.approx(1 - lost / squares, abs=0.01)


def test_a_total_rank_is_the_best_of_the_sum(bases: tuple[Path, Path]) -> None:
    one, two = bases
    adapter, folder = one.parent / "adapter", one.parent
    rebase_adapter(adapter, folder / "sum", source=one, target=two, rank=SHIFT_RANK)
    report = rebase_adapter(
        adapter, folder / "cut", source=one, target=two, rank=SHIFT_RANK, total_rank=4
    )
    whole, cut = (load_adapter(folder / name).layers for name in ("sum", "cut"))
    for row in report.items:
        path = row["module"]
        values = torch.linalg.svdvals(product(whole[path]))
        error = float((product(whole[path]) - product(cut[path])).norm())
        assert error == pytest.approx(float(values[4:].norm()), rel=1e-4)
        apart = (weights(one)[f"{path}.weight"] - weights(two)[f"{path}.weight"]).double()
        wanted = product(load_adapter(adapter).layers[path]) + apart
        lost = float((wanted - product(cut[path])).norm())
        assert row["share_captured"] == pytest.approx(
            1 - (lost / float(apart.norm())) ** 2, abs=1e-4
        )
        assert cut[path].rank == 4  # type: ignore[attr-defined]


def test_a_cut_that_loses_more_than_is_carried_is_warned_of(bases: tuple[Path, Path]) -> None:
    one, two = bases
    folder = one.parent
    for total, worse in ((1, True), (40, False)):
        report = rebase_adapter(
            folder / "adapter", folder / f"to {total}", source=one, target=two, rank=SHIFT_RANK,
            total_rank=total,
        )  # fmt: skip
        assert (report.facts["share_captured"] < 0) == worse
        assert any("loses more" in note.message for note in report.notes) == worse


def test_rank_0_measures_and_writes_nothing(bases: tuple[Path, Path]) -> None:
    one, two = bases
    before = sorted(one.parent.iterdir())
    report = rebase_adapter(one.parent / "adapter", None, source=one, target=two, rank=0)
    assert sorted(one.parent.iterdir()) == before
    paths = load_adapter(one.parent / "adapter").layers
    apart, base = (
        sum(
            float((weights(one)[f"{p}.weight"] - factor * weights(two)[f"{p}.weight"]).norm()) ** 2
            for p in paths
        )
        for factor in (1, 0)
    )
    assert report.facts["relative_distance"] == pytest.approx((apart / base) ** 0.5, rel=1e-4)
    assert report.facts["layers"] == report.facts["layers_apart"] == len(paths)


def test_bases_that_name_and_fuse_otherwise(tmp_path: Path) -> None:
    """From a folder with diffusers' names to a file with BFL's, where q, k and v are one."""
    width = 32
    shapes = {f"transformer_blocks.0.attn.to_{n}": (width, width) for n in "qkv"} | {
        "transformer_blocks.0.norm1.linear": (6 * width, width),
        "time_text_embed.text_embedder.linear_1": (width, 20),
    }
    generator = torch.Generator().manual_seed(0)
    ours = {f"{n}.weight": torch.randn(s, generator=generator) for n, s in shapes.items()}
    theirs = {n: t + torch.randn(t.shape, generator=generator) for n, t in ours.items()}
    (tmp_path / "a").mkdir()
    save_file(ours, tmp_path / "a" / "diffusion_pytorch_model.safetensors")
    (tmp_path / "a" / "config.json").write_text(
        json.dumps({"_class_name": "FluxTransformer2DModel"})
    )
    qkv = torch.cat([theirs[f"transformer_blocks.0.attn.to_{n}.weight"] for n in "qkv"])
    file = {
        "double_blocks.0.img_attn.qkv.weight": qkv,
        "double_blocks.0.img_mod.lin.weight": theirs["transformer_blocks.0.norm1.linear.weight"],
        "vector_in.in_layer.weight": theirs["time_text_embed.text_embedder.linear_1.weight"],
    }
    save_file(file, tmp_path / "b.safetensors")
    path = "lora_unet_double_blocks_0_img_attn_qkv"
    lora = {
        f"{path}.lora_up.weight": torch.randn(3 * width, 2, generator=generator),
        f"{path}.lora_down.weight": torch.randn(2, width, generator=generator),
        f"{path}.alpha": torch.tensor(2.0),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    rebase_adapter(
        tmp_path / "lora.safetensors",
        tmp_path / "out.safetensors",
        source=tmp_path / "a",
        target=tmp_path / "b.safetensors",
        rank=width,
        arch="flux1",
    )
    found = product(load_adapter(tmp_path / "out.safetensors").layers[path])
    mine = torch.cat([ours[f"transformer_blocks.0.attn.to_{n}.weight"] for n in "qkv"])
    change = lora[f"{path}.lora_up.weight"] @ lora[f"{path}.lora_down.weight"]
    assert (found - (change + mine - qkv).double()).abs().max() < 1e-4


# ── failures ─────────────────────────────────────────────────────────────────────────────────

WRONG: dict[str, tuple[dict[str, Any], bool, type[LoratoolsError], str]] = {
    "negative": ({"rank": -1}, True, OptionError, "rank -1"),
    "total 0": ({"rank": 2, "total_rank": 0}, True, OptionError, "total-rank 0"),
    "no output": ({"rank": 2}, False, OptionError, "no output"),
    "output for nothing": ({"rank": 0}, True, OptionError, "nothing is written"),
    "format": ({"rank": 2, "to": "pefd"}, True, OptionError, "pefd"),
    "read only": ({"rank": 2, "to": "xlabs"}, True, OptionError, "read, not written"),
    "rank beyond": ({"rank": 65}, True, OptionError, "give at most 64|above the shape"),
    "total rank beyond": ({"rank": 2, "total_rank": 65}, True, OptionError, "above the shape"),
    "total of nothing": ({"rank": 0, "total_rank": 2}, False, OptionError, "adds nothing"),
    "other names": ({"rank": 2, "to": "kohya"}, True, LoratoolsError, "architecture"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(bases: tuple[Path, Path], name: str) -> None:
    options, named, kind, words = WRONG[name]
    out = bases[0].parent / "out"
    with pytest.raises(kind, match=words):
        rebase_adapter(
            bases[0].parent / "adapter",
            out if named else None,
            source=bases[0],
            target=bases[1],
            **options,
        )
    assert not out.exists()


def rewritten(folder: Path, change: Any) -> None:
    tensors = weights(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_other_shapes_are_named(bases: tuple[Path, Path]) -> None:
    one, two = bases
    name = f"{LAYER}.weight"
    rewritten(two, lambda tensors: tensors.update({name: torch.zeros(63, 64)}))
    with pytest.raises(MatchError, match=rf"{LAYER}.weight: 64x64 and 63x64"):
        rebase_adapter(one.parent / "adapter", one.parent / "out", source=one, target=two, rank=2)


def test_an_adapter_of_other_shapes_is_named(bases: tuple[Path, Path]) -> None:
    one, two = bases
    file = one.parent / "adapter/adapter_model.safetensors"
    tensors = load_file(file)
    wide = {n: torch.cat([t, t[:, :1]], 1) if "lora_A" in n else t for n, t in tensors.items()}
    save_file(wide, file, metadata={"format": "pt"})
    with pytest.raises(MatchError, match=f"{one.parent / 'adapter'} onto .*do not fit"):
        rebase_adapter(one.parent / "adapter", one.parent / "out", source=one, target=two, rank=2)


def test_the_same_base(bases: tuple[Path, Path]) -> None:
    one = bases[0]
    options: dict[str, Any] = {"source": one, "target": one}
    with pytest.raises(MatchError, match="do not differ"):
        rebase_adapter(one.parent / "adapter", one.parent / "out", rank=2, **options)
    report = rebase_adapter(one.parent / "adapter", None, rank=0, **options)
    assert report.facts["relative_distance"] == 0


def test_what_is_no_number(bases: tuple[Path, Path]) -> None:
    one, two = bases
    rewritten(two, lambda tensors: tensors[f"{LAYER}.weight"][0].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match="q_proj"):
        rebase_adapter(one.parent / "adapter", one.parent / "out", source=one, target=two, rank=2)


def test_dora_depends_on_its_base(bases: tuple[Path, Path]) -> None:
    one, two = bases
    folder = one.parent / "adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    for path, delta in load_adapter(folder).layers.items():
        key = f"base_model.model.{path}.lora_magnitude_vector"
        tensors[key] = torch.ones(delta.weight_shape[0])
    save_file(tensors, folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text()) | {"use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match="dora layer changes depends on the base"):
        rebase_adapter(folder, one.parent / "out", source=one, target=two, rank=2)


def test_an_output_that_exists_or_is_an_input(bases: tuple[Path, Path]) -> None:
    one, two = bases
    adapter = one.parent / "adapter"
    for out, overwrite in ((one.parent / "two", False), (adapter, True), (two, True)):
        with pytest.raises(OutputError):
            rebase_adapter(adapter, out, source=one, target=two, rank=2, overwrite=overwrite)
