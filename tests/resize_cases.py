"""Changes of every kind that has a rank, each beside its dense matrix by the plain formula."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from loratools.deltas import AdditiveDelta, ExpertLoRA, LoHa, LoKr, LoRA, SumDelta, TuckerLoRA
from tests.strategies import make_tensor


@dataclass(frozen=True)
class Case:
    """A change and what it is: (out, in·k...) in float64; experts stand in a batch."""

    name: str
    delta: AdditiveDelta
    dense: Tensor


def dense_of(delta: LoRA | ExpertLoRA) -> Tensor:
    """alpha / rank · up · down, by einsum in float64."""
    up, down = delta.up.double(), delta.down.double()
    if isinstance(delta, ExpertLoRA):
        return torch.einsum("eor,eri->eoi", up, down) * (delta.alpha / down.shape[1])
    product = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1))
    return product * (delta.alpha / down.shape[0])


def lora(seed: int, shape: tuple[int, ...], rank: int, alpha: float, dtype: torch.dtype) -> Case:
    out, *rest = shape
    down = make_tensor(seed, rank, *rest, dtype=dtype)
    up = make_tensor(seed + 1, out, rank, *[1] * (len(rest) - 1), dtype=dtype)
    delta = LoRA(down, up, alpha)
    return Case("lora", delta, dense_of(delta))


def deficient(seed: int) -> Case:
    """Rank 3 in five columns; one of them is zero and two are equal."""
    case = lora(seed, (9, 7), 5, 2.0, torch.float32).delta
    assert isinstance(case, LoRA)
    up = case.up.clone()
    up[:, 1], up[:, 2] = 0, up[:, 0]
    delta = LoRA(case.down, up, 2.0)
    return Case("deficient", delta, dense_of(delta))


def zero(seed: int) -> Case:
    delta = LoRA(make_tensor(seed, 3, 6), torch.zeros(5, 3), 1.5)
    return Case("zero", delta, torch.zeros(5, 6, dtype=torch.float64))


def alpha_zero(seed: int) -> Case:
    delta = LoRA(make_tensor(seed, 3, 6), make_tensor(seed + 1, 5, 3), 0.0)
    return Case("alpha 0", delta, torch.zeros(5, 6, dtype=torch.float64))


def tucker(seed: int) -> Case:
    down, mid = make_tensor(seed, 3, 6, 1, 1), make_tensor(seed + 1, 4, 3, 2, 3)
    up = make_tensor(seed + 2, 8, 4, 1, 1)
    factors = (up[:, :, 0, 0].double(), mid.double(), down[:, :, 0, 0].double())
    dense = torch.einsum("on,nmhw,mi->oihw", *factors) * (1.5 / 3)
    return Case("tucker", TuckerLoRA(down, mid, up, 1.5), dense.flatten(1))


def loha(seed: int, rank: int, out: int = 11, inner: int = 10) -> Case:
    shapes = ((out, rank), (rank, inner), (out, rank), (rank, inner))
    w1_a, w1_b, w2_a, w2_b = (make_tensor(seed + n, *shape) for n, shape in enumerate(shapes))
    one, two = w1_a.double() @ w1_b.double(), w2_a.double() @ w2_b.double()
    dense = one * two * (2.0 / rank)
    return Case(f"loha {rank}", LoHa(w1_a, w1_b, w2_a, w2_b, 2.0), dense)


def loha_core(seed: int) -> Case:
    """A convolution: a Tucker product in each half."""
    halves, fields = [], {}
    for n in (1, 2):
        t, a, b = (
            make_tensor(seed + 10 * n + i, *shape)
            for i, shape in enumerate(((2, 2, 3, 3), (2, 9), (2, 7)))
        )
        halves.append(torch.einsum("ijkl,io,jn->onkl", t.double(), a.double(), b.double()))
        fields |= {f"t{n}": t, f"w{n}_a": a, f"w{n}_b": b}
    dense = halves[0] * halves[1] * (-3.0 / 2)
    return Case("loha core", LoHa(alpha=-3.0, **fields), dense.flatten(1))


def lokr(seed: int) -> Case:
    """Both sides full: no alpha in effect."""
    w1, w2 = make_tensor(seed, 3, 2), make_tensor(seed + 1, 4, 5)
    return Case("lokr", LoKr(1.0, w1=w1, w2=w2), torch.kron(w1.double(), w2.double()))


def lokr_factors(seed: int) -> Case:
    w1 = make_tensor(seed, 3, 3)
    w2_a, w2_b = make_tensor(seed + 1, 4, 2), make_tensor(seed + 2, 2, 5)
    dense = torch.kron(w1.double(), w2_a.double() @ w2_b.double()) * (-3.0 / 2)
    return Case("lokr factors", LoKr(-3.0, w1=w1, w2_a=w2_a, w2_b=w2_b), dense)


def lokr_convolution(seed: int) -> Case:
    w1, w2 = make_tensor(seed, 2, 3), make_tensor(seed + 1, 4, 2, 3, 3)
    blocks = torch.einsum("ab,cdhw->acbdhw", w1.double(), w2.double())
    return Case("lokr conv", LoKr(1.0, w1=w1, w2=w2), blocks.reshape(8, 6 * 9))


def summed(seed: int) -> Case:
    one = lora(seed, (8, 9), 2, 3.0, torch.float32)
    two = lora(seed + 5, (8, 9), 3, -1.0, torch.float32)
    return Case("sum", SumDelta((one.delta, two.delta)), one.dense + two.dense)


def experts(seed: int) -> Case:
    down, up = make_tensor(seed, 3, 4, 7), make_tensor(seed + 1, 3, 6, 4)
    delta = ExpertLoRA(down, up, -2.0)
    return Case("experts", delta, dense_of(delta))


_MAKERS: Mapping[str, Callable[[int], Case]] = {
    "linear": lambda seed: lora(seed, (12, 9), 4, 3.0, torch.float32),
    "square": lambda seed: lora(seed, (8, 8), 8, 8.0, torch.float32),
    "wide rank": lambda seed: lora(seed, (4, 9), 6, 2.0, torch.float32),
    "half": lambda seed: lora(seed, (12, 9), 4, 2.0, torch.float16),
    "bfloat": lambda seed: lora(seed, (7, 9), 3, -1.0, torch.bfloat16),
    "convolution": lambda seed: lora(seed, (10, 3, 3, 3), 4, 1.0, torch.float32),
    "deficient": deficient,
    "zero": zero,
    "alpha zero": alpha_zero,
    "tucker": tucker,
    "loha": lambda seed: loha(seed, 2),
    "loha dense": lambda seed: loha(seed, 4),
    "loha core": loha_core,
    "lokr": lokr,
    "lokr factors": lokr_factors,
    "lokr convolution": lokr_convolution,
    "sum": summed,
    "experts": experts,
}
NAMES = tuple(_MAKERS)


def make_case(name: str, seed: int) -> Case:
    return _MAKERS[name](seed)


SEEDS = st.integers(0, 2**31)
