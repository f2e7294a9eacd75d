"""GGUF block codecs on one thread: ours, gguf-py's and ggml's own C, in MB/s of float32.

The contestants take turns on the same weights, N(0, 0.02), and the best of the rounds counts.
libggml-base comes with the wheel pywhispercpp; without it the C columns stay empty.

Examples:
    python benchmarks/codecs.py                       # every type that can be written
    python benchmarks/codecs.py --types Q4_K Q6_K --mib 32 --rounds 5
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from loratools.codecs.ggml import GGML_TYPES, GGMLType

RESULTS = Path(__file__).parent / "results"
COLUMNS = 4096
MUST_KEEP_UP = ("Q4_K", "Q5_K", "Q6_K")
"""Encoders that are to be no slower than the C reference on one thread."""

Array = Any
Contestants = Mapping[str, Callable[[], Array]]


@dataclass(frozen=True)
class Row:
    """Speeds of one type in MB/s of float32, and whether the bytes are the reference's."""

    type: str
    direction: str
    ours: float
    gguf_py: float | None
    c: float | None
    same: bool | None

    def line(self) -> str:
        """Return the row as Markdown."""
        ratio = f"{self.ours / self.c:.2f}" if self.c else "–"
        speeds = [f"{speed:.0f}" if speed else "–" for speed in (self.ours, self.gguf_py, self.c)]
        same = {True: "yes", False: "NO", None: "–"}[self.same]
        return f"| {self.type} | {self.direction} | {' | '.join(speeds)} | {ratio} | {same} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Time every type asked for; return 1 if bytes differ or an encoder falls behind C."""
    options = _parse(arguments)
    torch.set_num_threads(1)
    library = load_ggml()
    weights = _weights(options.mib)
    print("| type | | ours | gguf-py | C | ours / C | same bytes |\n|---|---|---|---|---|---|---|")
    rows = []
    for name in options.types:
        few = weights[: max(1, len(weights) // 8)] if name.startswith("IQ") else weights
        for row in time_type(GGML_TYPES[name], few, options.rounds, library):
            rows.append(row)
            print(row.line(), flush=True)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "codecs.json").write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return int(any(_fails(row) for row in rows))


def _fails(row: Row) -> bool:
    slow = row.type in MUST_KEEP_UP and row.direction == "encode" and row.c and row.ours < row.c
    return row.same is False or bool(slow)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    written = [name for name, row in GGML_TYPES.items() if row.codec.can_encode and name != "F32"]
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--types", nargs="+", default=written, choices=list(GGML_TYPES))
    parser.add_argument("--mib", type=int, default=16, help="of float32 weights")
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(arguments)


def _weights(mib: int) -> Array:
    shape = (mib * 2**20 // 4 // COLUMNS, COLUMNS)
    return np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)


def load_ggml() -> ctypes.CDLL | None:
    """Return libggml-base from the wheel that carries it, or None."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        for file in metadata.files("pywhispercpp") or []:
            if "libs/libggml-base" in str(file):
                return ctypes.CDLL(str(file.locate()))
    return None


def time_type(row: GGMLType, weights: Array, rounds: int, library: ctypes.CDLL | None) -> list[Row]:
    """Return the rows of one type."""
    found = []
    tensor = torch.from_numpy(weights)
    raw = row.codec.encode(tensor) if row.codec.can_encode else _random_bytes(row, weights.shape)
    if row.codec.can_encode:
        encoders = _encoders(row, weights, library) | {"ours": lambda: row.codec.encode(tensor)}
        found.append(_race(row.name, "encode", encoders, rounds, weights.nbytes))
    decoders = _decoders(row, raw.numpy(), library) | {"ours": lambda: row.codec.decode(raw)}
    found.append(_race(row.name, "decode", decoders, rounds, weights.nbytes))
    return found


def _random_bytes(row: GGMLType, shape: tuple[int, int]) -> torch.Tensor:
    size = shape[1] // row.codec.elements * row.codec.bytes
    return torch.randint(0, 256, (shape[0], size), dtype=torch.uint8)


def _encoders(row: GGMLType, weights: Array, library: ctypes.CDLL | None) -> dict[str, Any]:
    """Return C's encoder, and gguf-py's if it has one."""
    found: dict[str, Callable[[], Array]] = {}
    with contextlib.suppress(NotImplementedError):
        kind = GGMLQuantizationType[row.name]
        quantize(weights[:1], kind)
        found["gguf_py"] = lambda: quantize(weights, kind)
    if library is not None:
        size = weights.shape[1] // row.codec.elements * row.codec.bytes
        raw = np.zeros((len(weights), size), dtype=np.uint8)
        found["c"] = lambda: _quantize_chunk(library, row.id, weights, raw)
    return found


def _quantize_chunk(library: ctypes.CDLL, type_id: int, weights: Array, raw: Array) -> Array:
    pointers = (ctypes.c_void_p(array.ctypes.data) for array in (weights, raw))
    sizes = (ctypes.c_int64(number) for number in (0, *weights.shape))
    library.ggml_quantize_chunk(ctypes.c_int(type_id), *pointers, *sizes, None)
    return raw


def _decoders(row: GGMLType, raw: Array, library: ctypes.CDLL | None) -> dict[str, Any]:
    kind = GGMLQuantizationType[row.name]
    found: dict[str, Callable[[], Array]] = {"gguf_py": lambda: dequantize(raw, kind)}
    name = row.name.lower().replace("_k", "_K")
    decode = getattr(library, f"dequantize_row_{name}", None)
    if decode is not None:
        count = raw.shape[1] // row.codec.bytes * row.codec.elements
        values = np.empty((len(raw), count), dtype=np.float32)
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (raw, values)]
        found["c"] = lambda: (decode(*pointers, ctypes.c_int64(values.size)), values)[1]
    return found


def _race(name: str, direction: str, runs: Contestants, rounds: int, size: int) -> Row:
    """Return the best speeds of contestants that take turns."""
    best = dict.fromkeys(runs, float("inf"))
    results: dict[str, Array] = {}
    with np.errstate(all="ignore"):
        for _ in range(rounds):
            for contestant, run in runs.items():
                started = time.perf_counter()
                results[contestant] = run()
                best[contestant] = min(best[contestant], time.perf_counter() - started)
    speeds = {contestant: size / seconds / 1e6 for contestant, seconds in best.items()}
    judge = results.get("c", results.get("gguf_py"))
    ours = results["ours"].numpy()
    same = (
        None
        if judge is None
        else bool(np.array_equal(ours, judge, equal_nan=ours.dtype.kind == "f"))
    )
    return Row(name, direction, speeds["ours"], speeds.get("gguf_py"), speeds.get("c"), same)


if __name__ == "__main__":
    sys.exit(main())
