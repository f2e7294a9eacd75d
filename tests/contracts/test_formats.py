"""The contract of every file format: a format that is listed in ``FORMATS`` is tested here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loratools.adapter import Adapter, Extra, in_natural_order
from loratools.adapter_io import find_weights, load_bundle
from loratools.deltas import (
    DELTAS,
    DoRA,
    ExpertLoRA,
    LayerDelta,
    LoRA,
    MovedBase,
    Replacement,
    RowFold,
    RowReplacement,
)
from loratools.errors import OptionError, UnknownFormatError, UnsupportedError
from loratools.formats import FORMATS, FormatRow, detect_format, get_format
from loratools.formats.format import Format, Listing
from tests.strategies import adapters, make_tensor, mixed_adapters

# Every test runs for every kind that is listed, so each may look at fewer examples.
FEWER = settings(max_examples=max(1, settings().max_examples * 2 // 5))
GOLDEN = Path(__file__).parents[1] / "golden"
KINDS = {delta.kind for delta in DELTAS}
LAYER_KINDS = (LoRA.kind, DoRA.kind, ExpertLoRA.kind, MovedBase.kind)


# ── what an adapter means ────────────────────────────────────────────────────────────────────


def effect(delta: LayerDelta) -> tuple[Tensor, ...]:
    """Return tensors that are equal for two deltas if they change every weight alike."""
    bias = torch.zeros(0) if delta.bias_change is None else delta.bias_change
    if isinstance(delta, Replacement):
        return (delta.value, bias)
    if isinstance(delta, RowReplacement):
        return (delta.rows, torch.tensor(delta.indices), bias)
    if isinstance(delta, ExpertLoRA):
        # In stored order: a square stack is turned over by its flag alone.
        change = delta.materialize()
        flipped = delta.flipped_if_square and change.shape[1] == change.shape[2]
        return (change.mT if flipped else change, bias)
    weight = make_tensor(11, *delta.weight_shape)
    return (delta.apply(weight), bias)


def assert_same_effect(actual: Adapter, wanted: Adapter) -> None:
    """Assert that every layer and extra changes its tensor alike, up to a rounding of alpha."""
    for ours, theirs in ((actual.layers, wanted.layers), (actual.extras, wanted.extras)):
        assert list(in_natural_order(ours)) == list(in_natural_order(theirs))
        for name, delta in theirs.items():
            for got, expected in zip(effect(ours[name]), effect(delta), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=name)


def snapshot(adapter: Adapter) -> list[tuple[str, Tensor]]:
    """Return copies of all tensors by name."""
    return [(name, tensor.clone()) for name, tensor in adapter.named_tensors()]


def assert_same_bits(actual: Adapter, wanted: list[tuple[str, Tensor]]) -> None:
    """Assert the same names, dtypes, shapes and values, in the order of names."""
    found = sorted(actual.named_tensors(), key=lambda item: item[0])
    for (name, tensor), (other, value) in zip(
        found, sorted(wanted, key=lambda item: item[0]), strict=True
    ):
        assert (name, tensor.dtype) == (other, value.dtype)
        assert torch.equal(tensor, value), name


def listing_of(path: Path) -> Listing:
    """Return what detection sees of an adapter on disk."""
    bundle = load_bundle(find_weights(path), str(path))
    shapes = {name: tuple(tensor.shape) for name, tensor in bundle.tensors.items()}
    return Listing(shapes, bundle.metadata, bundle.sidecars)


def golden_cases() -> Iterator[tuple[str, Path]]:
    """Yield each golden adapter with the format it is in: the name of the folder it lies in."""
    for row in FORMATS:
        for case in sorted((GOLDEN / row.name).glob("*")):
            folder = any(case.glob("adapter_model.*")) or any(case.glob("adapters.*"))
            if folder or case.suffix in (".safetensors", ".gguf"):
                yield row.name, case


CASES = list(golden_cases())


# ── the names each format uses ───────────────────────────────────────────────────────────────

NAMINGS: dict[str, tuple[str, str]] = {
    "kohya": ("kohya", "lora_unet_{}"),
    "comfyui": ("original", "diffusion_model.{}"),
    "diffusers": ("diffusers", "transformer.{}"),
}
"""Naming and path template of the formats for images; PEFT's own names need neither."""


def writer(row: FormatRow) -> Format:
    """Return the format, or skip a test of writing where it is only read."""
    chosen = get_format(row.name)
    if chosen.read_only:
        pytest.skip("is read, not written")
    return chosen


def held(chosen: Format) -> tuple[str, ...]:
    """Return which of the two kinds that most trainers write a format holds."""
    return tuple(kind for kind in (LoRA.kind, DoRA.kind) if kind in chosen.holds)


def renamed(path: str, row: FormatRow) -> str:
    naming, template = NAMINGS.get(row.name, ("", "{}"))
    return template.format(path.replace(".", "_") if naming == "kohya" else path)


def native(adapter: Adapter, row: FormatRow, *, biases: bool = True) -> Adapter:
    """Return the adapter in the format's names, without what only language models have.

    These are layers of other roles than linear, replaced rows, and full tensors where the format
    has no word for them. Without ``biases``, the trained biases too.
    """
    if row.name == "gguf":
        return for_llama_cpp(adapter)
    if row.name == "mlx":
        return for_mlx(adapter)
    if row.name not in NAMINGS:
        return adapter
    layers = {
        renamed(path, row): plain(delta, biases=biases)
        for path, delta in adapter.layers.items()
        if getattr(getattr(delta, "inner", delta), "role", "linear") == "linear"
    }
    extras = {
        renamed(name.removesuffix(".weight"), row) + ".weight": extra
        for name, extra in adapter.extras.items()
        if isinstance(extra, Replacement) and name.endswith(".weight") and row.name != "diffusers"
    }
    spare = LoRA(make_tensor(1, 1, 2), make_tensor(2, 2, 1), 1.0)
    layers = layers if layers or extras else {renamed("spare", row): spare}
    return Adapter(in_natural_order(layers), extras, naming=NAMINGS[row.name][0])


def for_llama_cpp(adapter: Adapter) -> Adapter:
    """Return what of an adapter a GGUF model could have: matrices, a table, one alpha for all."""
    layers: dict[str, LayerDelta] = {}
    for path, delta in adapter.layers.items():
        role = delta.role if isinstance(delta, LoRA) else "linear"
        if role == "embedding":
            layers["token_embd"] = one_alpha(delta)
        elif not isinstance(delta, LoRA) or (role == "linear" and len(delta.weight_shape) == 2):
            layers[path] = one_alpha(delta)
    spare = LoRA(make_tensor(1, 1, 2), make_tensor(2, 2, 1), 1.0)
    return Adapter(in_natural_order(layers or {"spare": spare}), naming="gguf", arch="llama")


def for_mlx(adapter: Adapter) -> Adapter:
    """Return what of an adapter a model of mlx-lm's could have: matrices, one rank, one scale."""
    layers: dict[str, LayerDelta] = {}
    for path, delta in adapter.layers.items():
        inner = getattr(delta, "inner", delta)
        role = getattr(inner, "role", "linear")
        if role.startswith("attention") or (role == "embedding" and inner is not delta):
            continue
        kernel = isinstance(inner, LoRA) and len(inner.weight_shape) > 2
        if not kernel:
            layers[path] = one_scale(delta)
    spare = LoRA(make_tensor(1, 1, 2), make_tensor(2, 2, 1), 4.0)
    return Adapter(in_natural_order(layers or {"spare": spare}), naming="mlx")


def one_scale(delta: LayerDelta) -> LayerDelta:
    """Return the delta at rank 1 and alpha 4, of factors and stacks of them."""
    if isinstance(delta, DoRA):
        inner = one_scale(delta.inner)
        assert isinstance(inner, LoRA)
        return replace(delta, inner=inner)
    if isinstance(delta, LoRA):
        return replace(delta, down=delta.down[:1], up=delta.up[:, :1], alpha=4.0, bias=None)
    if isinstance(delta, ExpertLoRA):
        return replace(delta, down=delta.down[:, :1], up=delta.up[..., :1], alpha=4.0)
    return delta


def one_alpha(delta: LayerDelta) -> LayerDelta:
    if isinstance(delta, LoRA):
        return replace(delta, alpha=4.0, bias=None)
    return replace(delta, alpha=4.0) if isinstance(delta, ExpertLoRA) else delta


def plain(delta: LayerDelta, *, biases: bool) -> LayerDelta:
    return replace(delta, bias=None) if isinstance(delta, LoRA) and not biases else delta


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
class TestContract:
    """What every format keeps."""

    def test_row_and_record_agree(self, row: FormatRow) -> None:
        chosen = get_format(row.name)
        assert (chosen.name, chosen.title) == (row.name, row.title)
        assert chosen.spec.startswith("https://")
        assert chosen.holds
        assert chosen.holds <= KINDS

    def test_has_golden_files(self, row: FormatRow) -> None:
        assert any(name == row.name for name, _ in CASES)

    @FEWER
    @given(data=st.data())
    def test_round_trip(self, row: FormatRow, data: st.DataObject) -> None:
        """What a format says it holds comes back: the same ΔW, and the argument untouched."""
        chosen = writer(row)
        kinds = tuple(kind for kind in LAYER_KINDS if kind in chosen.holds)
        adapter = native(data.draw(adapters(kinds=kinds)), row)
        before = snapshot(adapter)
        again = chosen.read(chosen.write(adapter))
        assert_same_effect(again, adapter)
        assert_same_bits(adapter, before)

    @FEWER
    @given(data=st.data())
    def test_says_whether_it_is_a_folder(self, row: FormatRow, data: st.DataObject) -> None:
        chosen = writer(row)
        kinds = tuple(kind for kind in LAYER_KINDS if kind in chosen.holds)
        written = chosen.write(native(data.draw(adapters(kinds=kinds)), row))
        assert bool(written.sidecars) == chosen.has_side_files
        assert chosen.is_folder("out") == (chosen.weights_file is not None)
        assert chosen.is_folder("out.safetensors") == chosen.has_side_files

    @FEWER
    @given(data=st.data())
    def test_factors_keep_their_bits(self, row: FormatRow, data: st.DataObject) -> None:
        """Plain LoRA goes through a format that holds it without any arithmetic on tensors."""
        chosen = writer(row)
        if LoRA.kind not in chosen.holds:
            pytest.skip("holds no LoRA")
        adapter = native(data.draw(adapters(kinds=(LoRA.kind,))), row, biases=False)
        assert_same_bits(chosen.read(chosen.write(adapter)), snapshot(adapter))

    @FEWER
    @given(adapter=mixed_adapters())
    def test_kept_or_refused(self, row: FormatRow, adapter: Adapter) -> None:
        """Whatever is written reads back as it was; what cannot be is refused, never bent."""
        chosen, adapter = get_format(row.name), native(adapter, row)
        try:
            written = chosen.write(adapter)
        except UnsupportedError as error:
            assert error.hint  # noqa: PT017 - one of two allowed outcomes
            return
        assert_same_effect(chosen.read(written), adapter)

    @FEWER
    @given(data=st.data())
    def test_what_it_does_not_hold_is_refused(self, row: FormatRow, data: st.DataObject) -> None:
        chosen = get_format(row.name)
        foreign = [kind for kind in LAYER_KINDS if kind not in chosen.holds]
        for kind in foreign:
            with pytest.raises(UnsupportedError, match=kind):
                chosen.write(native(data.draw(adapters(kinds=(kind,))), row))

    def test_an_unknown_delta_is_refused_by_name(self, row: FormatRow) -> None:
        """Every future parameterisation is refused until the format says that it holds it."""
        chosen = get_format(row.name)
        delta = Stranger(make_tensor(1, 2, 2))
        with pytest.raises(UnsupportedError, match=re.escape(renamed("h.0.fc", row))) as caught:
            chosen.write(native(Adapter({"h.0.fc": delta}), row))
        assert caught.value.hint

    @FEWER
    @given(data=st.data())
    def test_writes_what_it_recognises(self, row: FormatRow, data: st.DataObject) -> None:
        chosen = writer(row)
        bundle = chosen.write(native(data.draw(adapters(kinds=held(chosen))), row))
        shapes = {name: tuple(tensor.shape) for name, tensor in bundle.tensors.items()}
        listing = Listing(shapes, bundle.metadata, bundle.sidecars)
        assert detect_format(listing, "x").name == row.name

    @FEWER
    @given(data=st.data())
    def test_written_twice_is_written_once(self, row: FormatRow, data: st.DataObject) -> None:
        """A second round trip writes the same names, values and words as the first."""
        chosen = writer(row)
        adapter = native(data.draw(adapters(kinds=held(chosen))), row)
        first = chosen.write(chosen.read(chosen.write(adapter)))
        second = chosen.write(chosen.read(first))
        assert first.sidecars == second.sidecars
        assert first.metadata == second.metadata
        assert first.tensors.keys() == second.tensors.keys()
        assert all(torch.equal(first.tensors[name], t) for name, t in second.tensors.items())

    def test_layers_come_in_natural_order(self, row: FormatRow) -> None:
        lora = LoRA(make_tensor(1, 1, 2), make_tensor(2, 2, 1), 1.0)
        names = [f"h.{number}.fc" for number in (10, 2, 0, 11, 1)]
        chosen = writer(row)
        read = chosen.read(chosen.write(native(Adapter(dict.fromkeys(names, lora)), row)))
        wanted = [renamed(f"h.{number}.fc", row) for number in (0, 1, 2, 10, 11)]
        assert list(read.layers) == wanted


@dataclass(frozen=True)
class Stranger(LayerDelta):
    """A parameterisation that no format has heard of."""

    kind: ClassVar[str] = "stranger"

    value: Tensor
    weight_shape: tuple[int, ...] = (2, 2)

    def tensors(self) -> dict[str, Tensor]:
        return {"value": self.value}

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Stranger:
        return Stranger(function(self.value))

    def norm(self) -> None:
        return None

    def row_fold(self, strength: float, **options: object) -> RowFold:
        raise NotImplementedError


# ── detection ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("row", FORMATS, ids=lambda row: row.name)
@pytest.mark.parametrize(("owner", "case"), CASES, ids=[f"{n}-{p.name}" for n, p in CASES])
def test_detection_matrix(owner: str, case: Path, row: FormatRow) -> None:
    """Every golden file against every format is the identity."""
    assert get_format(row.name).matches(listing_of(case)) == (owner == row.name)


@pytest.mark.parametrize(("owner", "case"), CASES, ids=[f"{n}-{p.name}" for n, p in CASES])
def test_golden_files_are_read_and_rewritten(owner: str, case: Path) -> None:
    """What the format's own tool wrote survives a round trip."""
    chosen = get_format(owner)
    try:
        adapter = chosen.read(load_bundle(find_weights(case), str(case)))
    except UnsupportedError as error:
        assert error.hint  # noqa: PT017 - refused with the next step, instead of read wrongly
        return
    if chosen.read_only:
        with pytest.raises(UnsupportedError):
            chosen.write(adapter)
        return
    assert_same_effect(chosen.read(chosen.write(adapter)), adapter)


NONSENSE = {
    "nothing": [],
    "a base model": ["model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"],
    "one stray key": ["base_model.model.h.0.fc.lora_A.weight", "optimizer.state"],
    "kohya-like with a twist": ["lora_unet_mid_block.lora_sideways.weight"],
    "words of ours": ["lora", "down", "up", "alpha"],
}


@pytest.mark.parametrize("names", NONSENSE.values(), ids=NONSENSE)
def test_nonsense_is_in_no_format(names: list[str]) -> None:
    with pytest.raises(UnknownFormatError, match=r"nonsense\.safetensors") as caught:
        detect_format(Listing(dict.fromkeys(names, (2, 2))), "nonsense.safetensors")
    assert caught.value.hint
    assert all(name in caught.value.message for name in names[:1])


def test_a_file_of_two_formats_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader that guesses between two formats would read one of them wrongly."""
    twin = FormatRow("twin", "PEFT again", FORMATS[0].module, ())
    monkeypatch.setattr("loratools.formats.FORMATS", (FORMATS[0], twin))
    with pytest.raises(UnknownFormatError, match="several"):
        detect_format(listing_of(CASES[0][1]), "x")


def test_unknown_words_name_the_nearest() -> None:
    with pytest.raises(OptionError) as caught:
        get_format("pefft")
    assert "peft" in (caught.value.hint or "")


# ── PEFT's own losses ────────────────────────────────────────────────────────────────────────


def lora(rank: int = 2, alpha: float = 4.0, **words: object) -> LoRA:
    return LoRA(make_tensor(1, rank, 4), make_tensor(2, 6, rank), alpha, **words)


def moved(start: str) -> MovedBase:
    return MovedBase(lora(), start)


CANNOT: dict[str, dict[str, LayerDelta]] = {
    "DoRA beside LoRA": {"a": lora(), "b": DoRA(lora(), make_tensor(3, 6))},
    "two starts": {"a": moved("pissa"), "b": moved("olora")},
    "a start beside none": {"a": moved("pissa"), "b": lora()},
    "a start of a convolution": {
        "a": MovedBase(LoRA(make_tensor(1, 2, 4, 3), make_tensor(2, 6, 2, 1), 1.0), "pissa")
    },
    "attention of two scales": {
        "a": LoRA(make_tensor(1, 2, 4), make_tensor(2, 12, 2), 1.0, role="attention_in"),
        "a.out_proj": LoRA(make_tensor(3, 2, 4), make_tensor(4, 4, 2), 7.0, role="attention_out"),
    },
}


@pytest.fixture
def peft() -> Format:
    return get_format("peft")


@pytest.mark.parametrize("layers", CANNOT.values(), ids=CANNOT)
def test_peft_refuses_or_keeps(layers: dict[str, LayerDelta], peft: Format) -> None:
    """One word of the config speaks for all layers: what it cannot say for each is refused."""
    try:
        written = peft.write(Adapter(layers))
    except UnsupportedError:
        return
    assert_same_effect(peft.read(written), Adapter(layers))


EXTRAS: dict[str, dict[str, Extra]] = {
    "a new head": {"score.weight": Replacement(make_tensor(1, 3, 4), expected=True)},
    "a norm": {"model.norm.weight": Replacement(make_tensor(1, 4))},
    "biases": {
        "a.bias": Replacement(make_tensor(1, 6), "bias"),
        "z.bias": Replacement(make_tensor(2, 6), "bias"),
    },
    "rows": {"wte.weight": RowReplacement(make_tensor(1, 2, 4), (5, 3))},
    "rows of two tables": {
        "wte.weight": RowReplacement(make_tensor(1, 2, 4), (5, 3)),
        "deep.wte.weight": RowReplacement(make_tensor(2, 1, 4), (7,)),
    },
}


@pytest.mark.parametrize("layers", [{"a": lora()}, {}], ids=["beside layers", "alone"])
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_peft_announces_extras(
    extras: dict[str, Extra], layers: dict[str, LayerDelta], peft: Format
) -> None:
    """Row numbers, and heads that the base lacks, are known to PEFT from the config alone."""
    adapter = Adapter(layers, extras)
    bundle = peft.write(adapter)
    again = peft.read(bundle)
    assert_same_effect(again, adapter)
    saved = json.loads(bundle.sidecars["adapter_config.json"]).get("modules_to_save") or []
    for name, extra in extras.items():
        if isinstance(extra, Replacement) and extra.expected:
            assert any(name.rpartition(".")[0].endswith(str(entry)) for entry in saved)
            assert again.extras[name].expected


def test_peft_turns_old_stacks_over(peft: Format) -> None:
    """Up to PEFT 0.18 lora_A ran over the stored first axis; a square stack cannot tell."""
    stack = ExpertLoRA(make_tensor(1, 2, 3, 4), make_tensor(2, 2, 4, 3), 6.0, True)
    adapter = Adapter({"h.0.experts.down_proj": stack})
    assert_same_effect(peft.read(peft.write(adapter)), adapter)
    straight = replace(stack, flipped_if_square=False)
    assert not torch.equal(effect(stack)[0], effect(straight)[0])


def test_peft_keeps_alpha_exactly(peft: Format) -> None:
    """alpha / r · r is not alpha for every r, so an alpha in the file is taken as it is."""
    layers = {"a": LoRA(make_tensor(1, 49, 2), make_tensor(2, 3, 49), 1.0)}
    assert peft.read(peft.write(Adapter(layers))).layers["a"].alpha == 1.0
