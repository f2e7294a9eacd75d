"""Rows of weights that exercise a block codec."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.float32]
ROW = 512
"""Weights in a row: two super-blocks."""


def random_rows(count: int, seed: int = 0, spread: float = 0.02) -> Rows:
    return np.random.default_rng(seed).normal(0, spread, (count, ROW)).astype(np.float32)


def _spread_by_group(random: np.random.Generator, size: int) -> Rows:
    groups = random.normal(0, 0.02, (64, ROW // size, size))
    return (groups * 10.0 ** random.uniform(-8, 2, (64, ROW // size, 1))).reshape(-1, ROW)


def _one_each(random: np.random.Generator, rest: float) -> Rows:
    rows = random.normal(0, 1, (32, ROW)) * rest
    rows[np.arange(32), random.integers(0, ROW, 32)] = random.normal(0, 50, 32)
    return rows


def edge_cases() -> dict[str, Rows]:
    """Return rows by what is special about them; all can be encoded, all finite."""
    random = np.random.default_rng(1)
    zeroed = random.normal(0, 0.02, (64, ROW // 32, 32))
    zeroed[:, ::2] = 0
    below = np.nextafter(np.float32(1), np.float32(0))
    powers = 2.0 ** np.arange(-130, 14)[:, None] * np.ones((1, ROW))
    powers[:, : ROW // 2] *= below
    constants = [1, -1, 0.3, -0.3, 1e-3, -1e-9, 1e-20, -1e-41]
    cases = {
        "zeros": np.zeros((2, ROW)),
        "negative zeros": -np.zeros((2, ROW)),
        "constants": np.repeat(np.array(constants)[:, None], ROW, 1),
        "one weight": _one_each(random, 0.0),
        "one outlier": _one_each(random, 0.02),
        "negatives": -np.abs(random.normal(0, 0.02, (32, ROW))),
        "positives": np.abs(random.normal(0, 0.02, (32, ROW))),
        "shifted": 5 + random.normal(0, 1e-3, (32, ROW)),
        "hardly varying": -5 + random.normal(0, 1e-6, (32, ROW)),
        "zero groups": zeroed.reshape(-1, ROW),
        "groups of 16": _spread_by_group(random, 16),
        "groups of 32": _spread_by_group(random, 32),
        "denormals": random.normal(0, 1e-40, (32, ROW)),
        "tiny": random.normal(0, 1e-8, (32, ROW)),
        "below 1e-15": random.normal(0, 1e-16, (32, ROW)),
        "huge": random.normal(0, 2e3, (32, ROW)),
        "below powers of two": powers,
        "ties": random.integers(-15, 16, (64, ROW)) / 8.0,
        "plus and minus": random.choice([-0.3, 0.3], (32, ROW)),
        "ternary": random.choice([-0.3, 0.0, 0.3], (32, ROW)),
        "heavy tails": random.standard_t(2, (64, ROW)) * 0.01,
    }
    return {name: np.asarray(rows, dtype=np.float32) for name, rows in cases.items()}
