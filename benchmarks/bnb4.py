"""NF4 and FP4, ours and bitsandbytes' on the CPU, in MB/s of float32, in one run.

The contestants take turns on the same matrix, N(0, 0.02); the median of the rounds counts. Ours
works as in a merge: row blocks on as many threads as the machine has cores, one-thread kernels.

Examples:
    python benchmarks/bnb4.py
    python benchmarks/bnb4.py --rows 8192 --rounds 9
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from torch import Tensor

from loratools.codecs.bnb4 import encode_scales
from loratools.codecs.bnb4_weight import BnB4Weight, quantise_bnb4
from loratools.compute import one_thread_kernels

RESULTS = Path(__file__).parent / "results"
COLUMNS = 4096
BLOCK = 2**19
"""Elements that one thread takes at a time."""
LEAST_DECODING = 400.0
"""MB/s of float32 that decoding is to reach on the machine."""


@dataclass(frozen=True)
class Row:
    """Median speeds in MB/s of float32, ours and bitsandbytes', and whether results are equal."""

    kind: str
    dtype: str
    nested: bool
    direction: str
    ours: float
    bitsandbytes: float
    same: bool

    def line(self) -> str:
        """Return the row as Markdown."""
        name = f"{self.kind}{' double' if self.nested else ''}"
        speeds = f"{self.ours:.0f} | {self.bitsandbytes:.0f} | {self.ours / self.bitsandbytes:.2f}"
        same = "yes" if self.same else "NO"
        return f"| {name} | {self.dtype} | {self.direction} | {speeds} | {same} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Time both directions; return 1 where bytes differ, or a speed is less than it is to be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args(arguments)
    print("| | weights | | ours | bitsandbytes | ratio | same |\n|---|---|---|---|---|---|---|")
    rows = []
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(given.rows, COLUMNS, generator=draw) * 0.02
    for kind in ("nf4", "fp4"):
        for dtype in (torch.float32, torch.bfloat16):
            for nested in (False, True):
                for row in race(weight.to(dtype), kind, nested, given.rounds):
                    rows.append(row)
                    print(row.line(), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "bnb4.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(any(_fails(row) for row in rows))


def _fails(row: Row) -> bool:
    slow = row.ours < (row.bitsandbytes if row.direction == "encode" else LEAST_DECODING)
    return slow or not row.same


def race(weight: Tensor, kind: str, nested: bool, rounds: int) -> Iterator[Row]:
    """Yield a row for each direction."""
    dtype = str(weight.dtype).removeprefix("torch.")
    quantised = quantise_bnb4(weight.float(), kind, nested=nested)

    def theirs() -> Any:
        return bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)

    packed, state = theirs()
    ours_speed, their_speed, ours_made, _ = _turns(
        lambda: encode(weight, kind, nested), theirs, rounds, weight.numel()
    )
    same = torch.equal(ours_made.parts["weight"].flatten(), packed.flatten())
    same &= torch.equal(ours_made.parts["absmax"], state.absmax)
    yield Row(kind, dtype, nested, "encode", ours_speed, their_speed, same)
    ours_speed, their_speed, ours_values, their_values = _turns(
        lambda: decode(quantised, weight.dtype),
        lambda: bnb.dequantize_4bit(packed, state),
        rounds,
        weight.numel(),
    )
    same = torch.equal(ours_values, their_values)
    yield Row(kind, dtype, nested, "decode", ours_speed, their_speed, same)


def encode(weight: Tensor, kind: str, nested: bool) -> BnB4Weight:
    """Quantise by row blocks; the scales' own quantisation needs all of them."""
    return _joined(list(_by_blocks(weight, lambda b: quantise_bnb4(b.float(), kind))), nested)


def _joined(blocks: list[BnB4Weight], nested: bool) -> BnB4Weight:
    parts = {n: torch.cat([b.parts[n] for b in blocks]) for n in ("weight", "absmax")}
    whole = replace(blocks[0], parts={**blocks[0].parts, **parts})
    if not nested:
        return whole
    codes = encode_scales(parts["absmax"]).codes
    return replace(whole, parts={**whole.parts, "absmax": codes})


def decode(weight: BnB4Weight, dtype: torch.dtype) -> Tensor:
    """Dequantise by row blocks into one matrix."""
    made = torch.empty(weight.shape, dtype=dtype)
    step = BLOCK // COLUMNS

    def one(start: int) -> None:
        stop = min(start + step, len(made))
        made[start:stop] = weight.decode(start, stop)

    with one_thread_kernels(), ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, range(0, len(made), step)))
    return made


def _by_blocks(weight: Tensor, work: Callable[[Tensor], BnB4Weight]) -> Iterator[BnB4Weight]:
    with one_thread_kernels(), ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(work, weight.split(BLOCK // COLUMNS))


def _turns(
    ours: Callable[[], Any], theirs: Callable[[], Any], rounds: int, elements: int
) -> tuple[float, float, Any, Any]:
    """Return the median speed of each, and what each made."""
    seconds: tuple[list[float], list[float]] = ([], [])
    made: list[Any] = [None, None]
    for _ in range(rounds):
        for which, run in enumerate((ours, theirs)):
            started = time.perf_counter()
            made[which] = run()
            seconds[which].append(time.perf_counter() - started)
    speeds = [elements * 4 / statistics.median(each) / 1e6 for each in seconds]
    return speeds[0], speeds[1], made[0], made[1]


if __name__ == "__main__":
    sys.exit(main())
