"""What a conversion refuses, rewrites and says; files are made and judged by hand here."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools import cli
from loratools.convert import convert_adapter
from loratools.errors import (
    InputError,
    LoratoolsError,
    MalformedAdapterError,
    MatchError,
    NonFiniteError,
    OptionError,
    OutputError,
    UnsupportedError,
)
from loratools.verify import compare_adapters
from tests.strategies import make_tensor

Tensors = dict[str, Tensor]
D = 32
FLUX = {
    "lora_unet_double_blocks_0_img_attn_qkv": (3 * D, D),
    "lora_unet_double_blocks_0_img_mod_lin": (6 * D, D),
    "lora_unet_single_blocks_0_linear1": (7 * D, D),
    "lora_unet_final_layer_adaLN_modulation_1": (2 * D, D),
}
QKV = "lora_unet_double_blocks_0_img_attn_qkv"
SDXL = "lora_unet_down_blocks_2_attentions_0_transformer_blocks_9_attn2_to_k"


def kohya(modules: Mapping[str, tuple[int, int]], rank: int = 2, alpha: float = 1.0) -> Tensors:
    tensors: Tensors = {}
    for seed, (name, (rows, inputs)) in enumerate(modules.items()):
        tensors[f"{name}.lora_up.weight"] = make_tensor(seed, rows, rank)
        tensors[f"{name}.lora_down.weight"] = make_tensor(seed + 100, rank, inputs)
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.safetensors"
    save_file(kohya(FLUX), path)
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "made" / "out.safetensors"


def convert(source: Path, output: Path, **options: Any) -> Tensors:
    convert_adapter(source, output, **{"arch": "flux1", **options})
    return load_file(output)


def product(tensors: Tensors, module: str) -> Tensor:
    """alpha/rank · up·down of a kohya module."""
    up, down = (tensors[f"{module}.lora_{side}.weight"].double() for side in ("up", "down"))
    return up @ down * (float(tensors[f"{module}.alpha"]) / len(down))


def refused(
    error: type[LoratoolsError], source: Path, output: Path, **options: Any
) -> LoratoolsError:
    """Return the error of a conversion that must leave nothing behind."""
    before = sorted(source.parent.rglob("*"))
    with pytest.raises(error) as raised:
        convert_adapter(source, output, **{"to": "diffusers", **options})
    assert sorted(source.parent.rglob("*")) == before
    assert raised.value.hint or error is MalformedAdapterError
    return raised.value


# ── names ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("to", ["diffusers", "comfyui"])
def test_every_unknown_module_is_listed(source: Path, output: Path, to: str) -> None:
    strays = [f"lora_unet_double_blocks_{i}_img_atn_qkv" for i in range(20)]
    save_file(kohya({**FLUX, **dict.fromkeys(strays, (96, 32))}), source)
    error = refused(MatchError, source, output, to=to, arch="flux1")
    assert "20 modules have no name in FLUX.1" in error.message
    assert all(stray in error.message for stray in strays)
    assert "nearest: lora_unet_double_blocks_3_img_attn_qkv" in error.message


def test_unknown_keys_are_listed(source: Path, output: Path) -> None:
    tensors = kohya(FLUX)
    tensors |= {f"{QKV}.wonder": torch.ones(1), f"{QKV}.marvel": torch.ones(1)}
    save_file(tensors, source)
    error = refused(MalformedAdapterError, source, output)
    assert f"{QKV}.wonder" in error.message
    assert f"{QKV}.marvel" in error.message


def test_the_users_word_is_another_architecture(tmp_path: Path, output: Path) -> None:
    source = tmp_path / "in.safetensors"
    save_file(kohya({SDXL: (1280, 2048)}), source)
    error = refused(MatchError, source, output, arch="flux1")
    assert "Stable Diffusion XL" in error.message
    assert "FLUX.1" in error.message


def write_base(path: Path) -> Path:
    """A checkpoint with what tells that it is SDXL's."""
    shapes = {
        "input_blocks.0.0": (320, 4, 3, 3),
        "out.2": (4, 320, 3, 3),
        "middle_block.1.transformer_blocks.0.attn2.to_k": (1280, 2048),
        "middle_block.1.transformer_blocks.9.attn2.to_k": (1280, 2048),
        "label_emb.0.0": (1280, 2816),
    }
    prefix = "model.diffusion_model."
    save_file(
        {f"{prefix}{n}.weight": torch.zeros(s, dtype=torch.float16) for n, s in shapes.items()},
        path,
    )
    return path


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_the_base_is_of_another_architecture(source: Path, output: Path, to: str) -> None:
    base = write_base(source.parent / "base.safetensors")
    error = refused(MatchError, source, output, base=base, to=to)
    assert "the adapter is for FLUX.1" in error.message
    assert "base.safetensors is Stable Diffusion XL" in error.message


def test_no_known_architecture(source: Path, output: Path) -> None:
    save_file(kohya({"lora_unet_this_that": (4, 4), "lora_unet_other": (4, 4)}), source)
    assert "no known architecture" in refused(InputError, source, output).message


# ── damaged files ────────────────────────────────────────────────────────────────────────────


def damaged(kind: str) -> Tensors:
    tensors = kohya(FLUX)
    if kind == "rank":
        tensors[f"{QKV}.lora_up.weight"] = torch.ones(3 * D, 5)
    elif kind == "up alone":
        del tensors[f"{QKV}.lora_down.weight"]
    elif kind == "down alone":
        del tensors[f"{QKV}.lora_up.weight"]
    else:
        tensors[f"{QKV}.lora_up.weight"][3, 1] = float(kind)
    return tensors


@pytest.mark.parametrize("to", ["diffusers", "comfyui", "kohya"])
@pytest.mark.parametrize(
    ("kind", "error", "word"),
    [
        ("rank", MalformedAdapterError, "ranks disagree"),
        ("up alone", MalformedAdapterError, "lora_up"),
        ("down alone", MalformedAdapterError, "lora_down"),
        ("nan", NonFiniteError, "holds NaN"),
        ("-inf", NonFiniteError, "holds infinity"),
    ],
)
def test_damage_is_refused(
    source: Path, output: Path, kind: str, error: type[LoratoolsError], word: str, to: str
) -> None:
    save_file(damaged(kind), source)
    found = refused(error, source, output, to=to, arch="flux1")
    assert QKV in found.message
    assert word in found.message


@pytest.mark.parametrize("kind", ["rank", "up alone", "nan"])
def test_damage_on_the_command_line(
    source: Path, output: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(damaged(kind), source)
    assert cli.run(["convert", str(source), "-o", str(output), "--to", "diffusers"]) == 1
    assert QKV in capsys.readouterr().err
    assert not output.parent.exists()


def test_an_existing_output_stays(source: Path) -> None:
    before = source.read_bytes()
    with pytest.raises(OutputError):
        convert_adapter(source, source, to="diffusers", arch="flux1")
    assert source.read_bytes() == before


# ── losses ───────────────────────────────────────────────────────────────────────────────────


def lossy() -> Tensors:
    """A file with things for which diffusers has no words."""
    tensors = kohya(FLUX)
    tensors |= {
        "lora_unet_img_in.diff": make_tensor(1, D, 4),
        "lora_unet_img_in.diff_b": make_tensor(2, D),
        "lora_unet_txt_in.on_input": torch.tensor(True),
        "lora_unet_txt_in.weight": make_tensor(3, 24),
    }
    return tensors


LOST = {"transformer.x_embedder", "transformer.context_embedder"}


def test_losses_are_listed_and_refused(source: Path, output: Path) -> None:
    save_file(lossy(), source)
    error = refused(UnsupportedError, source, output, arch="flux1")
    assert "cannot hold 2 parts" in error.message
    assert all(module in error.message for module in LOST)
    assert "--allow-loss" in (error.hint or "")


def test_allowed_losses_are_exactly_those(source: Path, output: Path) -> None:
    convert_adapter(source, source.with_name("rest.safetensors"), to="diffusers", arch="flux1")
    save_file(lossy(), source)
    report = convert_adapter(source, output, to="diffusers", arch="flux1", allow_loss=True)
    assert report.facts["lost"].keys() == LOST
    assert {note.subject for note in report.notes if note.level == "warning"} == LOST
    kept, rest = load_file(output), load_file(source.with_name("rest.safetensors"))
    assert kept.keys() == rest.keys()
    assert all(torch.equal(kept[key], rest[key]) for key in rest)


# ── dtype ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("word", "dtype"),
    [("fp16", torch.float16), ("bf16", torch.bfloat16), ("keep", torch.float32)],
)
def test_dtype(source: Path, output: Path, word: str, dtype: torch.dtype) -> None:
    exact = convert(source, output, to="diffusers")
    narrow = convert(source, output, to="diffusers", dtype=word, overwrite=True)
    assert narrow.keys() == exact.keys()
    assert all(torch.equal(narrow[key], exact[key].to(dtype)) for key in exact)


def test_a_value_beyond_the_dtype(source: Path, output: Path) -> None:
    tensors = kohya(FLUX)
    tensors[f"{QKV}.lora_up.weight"][0, 0] = 1e6
    save_file(tensors, source)
    error = refused(NonFiniteError, source, output, arch="flux1", dtype="fp16")
    assert "1e+06" in error.message


@pytest.mark.parametrize("option", [{"dtype": "fp8"}, {"to": "kohay"}, {"repair": "magic"}])
def test_unknown_words(source: Path, output: Path, option: dict[str, str]) -> None:
    refused(OptionError, source, output, arch="flux1", **option)


# ── repairs ──────────────────────────────────────────────────────────────────────────────────


def block_diagonal(sizes: tuple[int, ...], rank: int) -> Tensor:
    """``up`` of a fused projection whose parts were trained apart."""
    blocks = [make_tensor(7 + n, size, rank) for n, size in enumerate(sizes)]
    return torch.block_diag(*blocks)


def test_split_qkv_alpha(source: Path, output: Path) -> None:
    """Three parts in a double block, four in linear1; dense modules stay as they are."""
    tensors = kohya(FLUX)
    linear1 = "lora_unet_single_blocks_0_linear1"
    for module, sizes in ((QKV, (D,) * 3), (linear1, (D, D, D, 4 * D))):
        tensors[f"{module}.lora_up.weight"] = block_diagonal(sizes, 2)
        tensors[f"{module}.lora_down.weight"] = make_tensor(9, 2 * len(sizes), D)
    save_file(tensors, source)
    mended = convert(source, output, to="kohya", repair="split-qkv-alpha")
    times = {QKV: 3, linear1: 4}
    for module in FLUX:
        torch.testing.assert_close(
            product(mended, module), times.get(module, 1) * product(tensors, module)
        )


@pytest.mark.parametrize("kind", ["dense", "dense with a zero", "swapped blocks", "untrained"])
def test_nothing_to_repair(source: Path, output: Path, kind: str) -> None:
    tensors = kohya(FLUX, rank=6)
    key = f"{QKV}.lora_up.weight"
    if kind == "dense with a zero":
        tensors[key][:40, 2] = 0
    elif kind == "swapped blocks":
        tensors[key] = block_diagonal((D,) * 3, 2).roll(D, 0)
    elif kind == "untrained":
        tensors[key].zero_()
    save_file(tensors, source)
    error = refused(UnsupportedError, source, output, arch="flux1", repair="split-qkv-alpha")
    assert "block-diagonal" in error.message


# ── parameterisations ────────────────────────────────────────────────────────────────────────


def loha(module: str, rows: int, inputs: int, rank: int = 2, alpha: float = 0.5) -> Tensors:
    tensors = {f"{module}.alpha": torch.tensor(alpha)}
    for seed, (name, shape) in enumerate(
        {"w1_a": (rows, rank), "w1_b": (rank, inputs), "w2_a": (rows, rank), "w2_b": (rank, inputs)}
        .items()
    ):  # fmt: skip
        tensors[f"{module}.hada_{name}"] = make_tensor(seed + 20, *shape)
    return tensors


def test_loha_is_lifted_to_lora(source: Path, output: Path) -> None:
    tensors = loha("lora_unet_double_blocks_0_img_mod_lin", 6 * D, D)
    save_file(tensors, source)
    report = convert_adapter(source, output, to="diffusers", arch="flux1")
    assert any("1 loha layer written as LoRA (exact)" in note.message for note in report.notes)
    a, b, c, d = (
        tensors[f"lora_unet_double_blocks_0_img_mod_lin.hada_{name}"].double()
        for name in ("w1_a", "w1_b", "w2_a", "w2_b")
    )
    expected = (a @ b) * (c @ d) * 0.25
    with safe_open(output, "pt") as file:
        words = json.loads(file.metadata()["lora_adapter_metadata"])
    written = load_file(output)
    path = "transformer.transformer_blocks.0.norm1.linear"
    up, down = (written[f"{path}.lora_{side}.weight"].double() for side in "BA")
    assert words["transformer.r"] == len(down) == 4
    scale = words["transformer.lora_alpha"] / words["transformer.r"]
    torch.testing.assert_close(up @ down * scale, expected, rtol=1e-6, atol=1e-6)


# ── metadata ─────────────────────────────────────────────────────────────────────────────────

WORDS = {
    "ss_base_model_version": "flux1",
    "ss_network_module": "networks.lora_flux",
    "ss_network_dim": "2",
    "ss_network_alpha": "1.0",
    "ss_tag_frequency": json.dumps({"a": {"ink": 3}}),
    "modelspec.sai_model_spec": "1.0.1",
    "modelspec.title": "Ink",
    "author": "somebody",
}
STALE = {
    "sshs_model_hash": "0" * 64,
    "sshs_legacy_hash": "00000000",
    "modelspec.hash_sha256": "0x00",
}


def parse(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return a file's header and the bytes behind it."""
    raw = path.read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


@pytest.mark.parametrize("to", ["kohya", "comfyui", "diffusers"])
@pytest.mark.parametrize("large", [False, True])
def test_hashes_are_those_of_the_bytes(source: Path, output: Path, to: str, large: bool) -> None:
    """sd-scripts' recipes, followed by hand; the old one looks behind the first mebibyte."""
    rank = 1024 if large else 2
    save_file(kohya(FLUX, rank), source, {**WORDS, **STALE})
    convert_adapter(source, output, to=to, arch="flux1")
    header, data = parse(output)
    words = header["__metadata__"]
    kept = {key: word for key, word in WORDS.items() if key != "ss_network_dim"}
    assert kept.items() <= words.items()
    digest = hashlib.sha256(data).hexdigest()
    assert words["sshs_model_hash"] == digest
    assert words["modelspec.hash_sha256"] == f"0x{digest}"
    trained = output.with_name("trained.safetensors")
    carried = {k: w for k, w in words.items() if k.startswith("ss_")}
    save_file(load_file(output), trained, carried)
    window = trained.read_bytes()[0x100000 : 0x100000 + 0x10000]
    assert bool(window) == large
    # The order of metadata is chance in safetensors' writer: only its length reaches the window.
    assert words["sshs_legacy_hash"] == hashlib.sha256(window).hexdigest()[:8]


def test_without_training_words_there_are_no_hashes(source: Path, output: Path) -> None:
    save_file(kohya(FLUX), source, STALE)
    convert_adapter(source, output, to="comfyui", arch="flux1")
    assert not STALE.keys() & parse(output)[0]["__metadata__"].keys()


# ── comparison across formats ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("first", ["kohya", "diffusers", "comfyui"])
@pytest.mark.parametrize("second", ["kohya", "diffusers", "comfyui"])
def test_compare_across_formats(source: Path, first: str, second: str) -> None:
    """The same adapter in two formats, and one with a change known by hand."""
    tensors = kohya(FLUX)
    other = source.with_name("changed.safetensors")
    changed = {**tensors, f"{QKV}.lora_up.weight": tensors[f"{QKV}.lora_up.weight"] * 1.5}
    save_file(changed, other)
    paths = {}
    for name, path in (("one", source), ("two", other)):
        for to in {first, second}:
            paths[name, to] = source.with_name(f"{name}-{to}.safetensors")
            convert_adapter(path, paths[name, to], to=to, arch="flux1")
    same = compare_adapters(paths["one", first], paths["one", second], arch="flux1")
    assert same.facts["same"]
    assert same.facts["largest_difference"] < 1e-6
    differing = compare_adapters(paths["one", first], paths["two", second], arch="flux1")
    assert not differing.facts["same"]
    assert differing.facts["largest_difference"] == pytest.approx(0.5, rel=1e-5)
    whole = sum(float(product(tensors, module).square().sum()) for module in FLUX)
    part = 0.25 * float(product(tensors, QKV).square().sum())
    assert differing.facts["relative_difference"] == pytest.approx((part / whole) ** 0.5, rel=1e-5)


def test_compare_tells_missing_modules(source: Path, tmp_path: Path) -> None:
    fewer = tmp_path / "fewer.safetensors"
    save_file(kohya(dict(list(FLUX.items())[:3])), fewer)
    report = compare_adapters(source, fewer)
    assert not report.facts["same"]
    assert report.facts["modules_differing"] == 1
    assert [row["why"] for row in report.items if row.get("why")] == ["only in the first"]


# ── several inputs ───────────────────────────────────────────────────────────────────────────


def run_json(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, Any]:
    capsys.readouterr()
    code = cli.run([*map(str, arguments), "--json"])
    return code, json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("given", ["files", "folder"])
@pytest.mark.parametrize("to", ["diffusers", "comfyui"])
def test_several_inputs(
    source: Path, tmp_path: Path, to: str, given: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "loras"
    folder.mkdir()
    files = [folder / name for name in ("a.safetensors", "b.safetensors", "c.safetensors")]
    for rank, file in enumerate(files, 1):
        save_file(kohya(FLUX, rank), file)
    inputs = files if given == "files" else [folder]
    out = tmp_path / "out"
    code, document = run_json(capsys, "convert", *inputs, "-o", out, "--to", to, "--arch", "flux1")
    assert code == 0
    assert len(document["facts"]["reports"]) == 3
    assert sorted(path.name for path in out.iterdir()) == [file.name for file in files]
    for file in files:
        single = tmp_path / f"single-{file.name}"
        convert_adapter(file, single, to=to, arch="flux1")
        assert single.read_bytes() == (out / file.name).read_bytes()


def test_one_bad_input_among_several(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error names it; what was whole before it is there, whole."""
    bad = tmp_path / "bad.safetensors"
    save_file(damaged("nan"), bad)
    out = tmp_path / "out"
    code, document = run_json(
        capsys, "convert", source, bad, "-o", out, "--to", "diffusers", "--arch", "flux1"
    )
    assert code == 1
    assert "bad.safetensors" in document["message"]
    assert not (out / "bad.safetensors").exists()
