"""8-bit floats, for which torch has gaps: finite or not, and what holds them exactly."""

from __future__ import annotations

import math

import pytest
import torch

from loratools.linalg.finite import is_finite, joint_dtype, widened

SMALL = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]
WIDE = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def every_value(dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(256, dtype=torch.uint8).view(dtype)


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_each_code_is_judged_as_its_number_is(dtype: torch.dtype) -> None:
    for code in every_value(dtype):
        assert is_finite(code.reshape(1)) == math.isfinite(float(code))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8, torch.bool], ids=str)
def test_others_are_judged_as_ever(dtype: torch.dtype) -> None:
    assert is_finite(torch.ones(3, dtype=dtype))
    if dtype.is_floating_point:
        assert not is_finite(torch.tensor([1, math.nan], dtype=dtype))
        assert not is_finite(torch.tensor([1, -math.inf], dtype=dtype))


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_widening_changes_no_value(dtype: torch.dtype) -> None:
    values = every_value(dtype)
    assert torch.equal(widened(values).double().nan_to_num(), values.double().nan_to_num())


@pytest.mark.parametrize("one", [*SMALL, *WIDE], ids=str)
@pytest.mark.parametrize("two", [*SMALL, *WIDE], ids=str)
def test_a_joint_dtype_holds_both(one: torch.dtype, two: torch.dtype) -> None:
    found = joint_dtype(one, two)
    for dtype in (one, two):
        values = every_value(dtype) if dtype in SMALL else torch.tensor([1 / 3, 3e4], dtype=dtype)
        kept = values.to(found).double()
        assert torch.equal(kept.nan_to_num(), values.double().nan_to_num())
    assert joint_dtype(one, one, one) is one
