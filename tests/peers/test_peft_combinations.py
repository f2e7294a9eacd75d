"""``compose --method peft-*`` against PEFT's ``add_weighted_adapter`` on the same adapters."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loratools.adapter_io import load_adapter
from loratools.compose import compose_adapters
from loratools.composition.layers import Recipe, settings_of
from loratools.merge_methods import get_method

from .builders import LINEARS, PREFIX, Base, lora

DENSITY, SEED = 0.5, 4
ON_FACTORS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
ON_DELTAS = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")

Changes = dict[str, Tensor]


@pytest.fixture(scope="module")
def three(llama: Base, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters of rank 3 and different scales."""
    folder = tmp_path_factory.mktemp("three")
    return [
        lora(llama, folder / str(n), seed=n, r=3, lora_alpha=alpha, target_modules=list(LINEARS))
        for n, alpha in enumerate((3, 6, 4.5))
    ]


@contextmanager
def our_chance(method: str) -> Iterator[None]:
    """Let PEFT draw its masks from the generator that loratools gives each layer.

    PEFT has no seed and draws from torch's global one, with Bernoulli's own numbers.
    """
    import peft.utils.merge_utils as utils
    from peft.tuners.lora import model

    recipe = Recipe(get_method(method), DENSITY, SEED, None)
    current: list[torch.Generator] = []

    def pruned(tensor: Tensor, density: float, rescale: bool) -> Tensor:
        assert rescale
        chance = torch.rand(tensor.shape, generator=current[-1], dtype=torch.float32)
        return tensor * (chance < density) / density

    def entering(name: str) -> Callable[..., Any]:
        original = getattr(model.LoraModel, name)

        def enter(self: Any, *args: Any, **kwargs: Any) -> Any:
            targets = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.nn.Module)]
            paths = {id(module): path for path, module in self.model.named_modules()}
            current.append(settings_of(paths[id(targets[0])], recipe).generator)
            return original(self, *args, **kwargs)

        return enter

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "random_pruning", pruned)
        for name in (
            "_generalized_task_arithmetic_weighted_adapter",
            "_svd_generalized_task_arithmetic_weighted_adapter",
        ):
            patch.setattr(model.LoraModel, name, entering(name))
        yield


def combined_by_peft(
    base: Base, adapters: Sequence[Path], weights: Sequence[float], **how: Any
) -> Changes:
    """ΔW of every layer as PEFT's runtime has it."""
    from peft import PeftModel

    names = [f"a{place}" for place in range(len(adapters))]
    model = PeftModel.from_pretrained(base.load(), adapters[0], adapter_name=names[0])
    for name, path in zip(names[1:], adapters[1:], strict=True):
        model.load_adapter(path, adapter_name=name)
    model.add_weighted_adapter(names, list(weights), "sum", **how)
    layers = ((n, m) for n, m in model.base_model.model.named_modules() if hasattr(m, "lora_A"))
    return {name: layer.get_delta_weight("sum").detach().double() for name, layer in layers}


def combined_by_us(
    folder: Path, adapters: Sequence[Path], weights: Sequence[float], method: str, **how: Any
) -> Changes:
    pairs = list(zip(adapters, weights, strict=True))
    compose_adapters(pairs, folder, method=method, seed=SEED, **how)
    layers = load_adapter(folder).layers
    return {path: layer.materialize().double() for path, layer in layers.items()}  # type: ignore[attr-defined]


def assert_same(ours: Changes, theirs: Changes, tolerance: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for path, change in theirs.items():
        assert float((ours[path] - change).norm()) <= tolerance * float(change.norm()), path


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, -0.4, 1.3)])
@pytest.mark.parametrize("kind", ON_FACTORS)
def test_formulas_on_factors(
    kind: str, weights: tuple[float, ...], llama: Base, three: list[Path], tmp_path: Path
) -> None:
    method = f"peft-{kind.replace('_', '-')}"
    density = None if kind == "linear" else DENSITY
    with our_chance(method):
        theirs = combined_by_peft(llama, three, weights, combination_type=kind, density=density)
    assert_same(combined_by_us(tmp_path / "o", three, weights, method, density=density), theirs)


@pytest.mark.parametrize("kind", ON_DELTAS)
def test_formulas_on_deltas(kind: str, llama: Base, three: list[Path], tmp_path: Path) -> None:
    method, weights = f"peft-{kind.replace('_', '-')}", (0.7, -0.4, 1.3)
    how = {"combination_type": kind, "density": DENSITY, "svd_rank": 5}
    with our_chance(method):
        theirs = combined_by_peft(llama, three, weights, **how)
    ours = combined_by_us(tmp_path / "o", three, weights, method, density=DENSITY, rank=5)
    assert_same(ours, theirs, 1e-4)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.7, -0.4, 1.3)])
def test_cat_and_svd(
    weights: tuple[float, ...], llama: Base, three: list[Path], tmp_path: Path
) -> None:
    theirs = combined_by_peft(llama, three, weights, combination_type="cat")
    for method in ("peft-cat", "linear", "svd", "peft-svd"):
        assert_same(combined_by_us(tmp_path / method, three, weights, method), theirs)
    cut = combined_by_peft(llama, three, weights, combination_type="svd", svd_rank=4)
    for method in ("peft-svd", "linear"):
        ours = combined_by_us(tmp_path / f"{method}4", three, weights, method, rank=4)
        assert_same(ours, cut)


def test_cat_has_the_very_factors(llama: Base, three: list[Path], tmp_path: Path) -> None:
    """up side by side as stored; weight and scale on down."""
    combined_by_us(tmp_path / "o", three, (0.5, 1.0, -2.0), "peft-cat")
    made = load_file(tmp_path / "o" / "adapter_model.safetensors")
    name = f"{PREFIX}model.layers.0.self_attn.q_proj"
    given = [load_file(path / "adapter_model.safetensors") for path in three]
    ups = [tensors[f"{name}.lora_B.weight"] for tensors in given]
    assert torch.equal(made[f"{name}.lora_B.weight"], torch.cat(ups, dim=1))


def test_peft_loads_the_result_and_adds_the_same(
    llama: Base, three: list[Path], tmp_path: Path
) -> None:
    """Layers of several ranks, as --rank and partial adapters leave them, need patterns."""
    from peft import PeftModel

    some = lora(llama, tmp_path / "some", seed=9, r=2, lora_alpha=8, target_modules=["q_proj"])
    compose_adapters([(three[0], 0.5), (some, -1.5)], tmp_path / "o")
    loaded = PeftModel.from_pretrained(llama.load(), tmp_path / "o")
    tokens = torch.arange(12)[None]
    both = PeftModel.from_pretrained(llama.load(), three[0], adapter_name="one")
    both.load_adapter(some, adapter_name="other")
    for name, weight in (("one", 0.5), ("other", -1.5)):
        for module in both.modules():
            if isinstance(scaling := getattr(module, "scaling", None), dict) and name in scaling:
                scaling[name] *= weight
    both.base_model.set_adapter(["one", "other"])
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, both(tokens).logits, rtol=1e-4, atol=1e-5)


def test_peft_linear_is_not_the_sum(llama: Base, three: list[Path], tmp_path: Path) -> None:
    """The cross terms that ``linear`` here does not have."""
    theirs = combined_by_peft(llama, three, (1.0, 1.0, 1.0), combination_type="linear")
    ours = combined_by_us(tmp_path / "o", three, (1.0, 1.0, 1.0), "linear")
    gaps = [float((ours[p] - theirs[p]).norm() / ours[p].norm()) for p in ours]
    assert min(gaps) > 0.5
