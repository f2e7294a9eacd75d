"""Resizing a large LoRA from rank 64 to 4: a whole `loratools resize` against a dense SVD a layer.

The adapter is that of ``convert.py``: a kohya file of SDXL's U-Net, 722 layers, rank 64, half
precision, 341 MB. The other side is the algorithm of sd-scripts' resize_lora.py, written here
anew: up @ down in float32, torch.linalg.svd with full matrices, the leading columns. Done for all
layers it takes a quarter of an hour and more, so it runs on one layer of every shape, in a process
of its own, and the time of all layers is extrapolated from those; the table says so.

Examples:
    python benchmarks/resize.py
    python benchmarks/resize.py --largest 2048 --repeats 1   # dense SVDs of the small shapes alone
    python benchmarks/resize.py --work FOLDER                # keeps the adapter for the next run
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from convert import MODULES, modules, write_adapter
from measure import Measurement, run_measured

RESULTS = Path(__file__).parent / "results"
RANK, TARGET = 64, 4
SECONDS = 5.0
"""What a run may take on an idle machine of two cores."""

Shape = tuple[int, int]

# ---------------------------------------------------------------------------- the runs


def resize(source: Path, output: Path) -> Measurement:
    """Resize in a process of its own, to a destination that is not there yet."""
    output.unlink(missing_ok=True)
    os.sync()
    program = Path(sys.executable).with_name("loratools")
    command = [str(program), "resize", str(source), "-o", str(output), "--rank", str(TARGET)]
    measured = run_measured([*command, "--json"])
    facts = json.loads(measured.stdout)["facts"]
    if facts["layers_resized"] != MODULES or facts["rank_after"]["most"] != TARGET:
        raise RuntimeError(f"not what was asked for: {facts}")
    return measured


def dense(source: Path, largest: int) -> Measurement:
    """Decompose one layer of every shape densely, in a process of its own."""
    command = [sys.executable, __file__, "--dense", str(source), "--largest", str(largest)]
    return run_measured(command)


def time_dense(source: Path, largest: int) -> dict[str, float]:
    """Return the seconds of one layer of every shape with sides of at most ``largest``."""
    import torch
    from safetensors import safe_open

    seconds: dict[str, float] = {}
    with safe_open(source, "pt") as file:
        for name, rows, inputs in modules():
            key = f"{rows}x{inputs}"
            if key in seconds or max(rows, inputs) > largest:
                continue
            started = time.perf_counter()
            up = file.get_tensor(f"{name}.lora_up.weight").float()
            down = file.get_tensor(f"{name}.lora_down.weight").float()
            left, values, right = torch.linalg.svd(up @ down, full_matrices=True)
            new_up = (left[:, :TARGET] @ torch.diag(values[:TARGET])).half()
            new_down = right[:TARGET].half()
            if not bool(torch.isfinite(new_up).all() and torch.isfinite(new_down).all()):
                raise RuntimeError(f"{name}: the dense SVD is not finite")
            seconds[key] = time.perf_counter() - started
    return seconds


def extrapolate(seconds: dict[str, float]) -> tuple[float, int]:
    """Return the seconds of every layer of the shapes that were timed, and their number."""
    counts = Counter(f"{rows}x{inputs}" for _, rows, inputs in modules())
    return sum(seconds[key] * counts[key] for key in seconds), sum(counts[k] for k in seconds)


# ---------------------------------------------------------------------------- the table


def peak(values: Sequence[int | None]) -> int | None:
    """Return the largest, or nothing where there is no /proc."""
    return max((value for value in values if value is not None), default=None)


def megabytes(value: int | None) -> str:
    """Return a peak as text."""
    return f"{value / 1e6:.0f}" if value else "?"


def table(runs: Sequence[Measurement], other: Measurement, size: int) -> str:
    """Return the results as Markdown."""
    seconds = [run.seconds for run in runs]
    ours = statistics.median(seconds)
    timed = json.loads(other.stdout)
    whole, covered = extrapolate(timed)
    share = "" if covered == MODULES else f" (of {covered} layers: larger shapes left out)"
    cells = (
        f"{ours:.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
        megabytes(peak([run.peak_anonymous for run in runs])),
        megabytes(peak([run.peak_resident for run in runs])),
    )
    theirs = (
        f"{whole:.0f}{share}, extrapolated from one layer of each of {len(timed)} shapes",
        megabytes(other.peak_anonymous),
        megabytes(other.peak_resident),
    )
    return "\n".join(
        [
            f"A kohya file of {MODULES} layers, {size / 1e6:.0f} MB, rank {RANK} to {TARGET}:",
            "",
            "| | time, s | peak anonymous, MB | peak resident, MB |",
            "| --- | --- | --- | --- |",
            f"| `loratools resize`, whole process | {' | '.join(cells)} |",
            f"| dense SVD with full matrices, decompositions alone | {' | '.join(theirs)} |",
            "",
            f"Ratio {whole / ours:.0f}.",
        ]
    )


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of ours (%(default)s)")
    parser.add_argument(
        "--largest", type=int, default=1 << 20, help="leave out dense SVDs with a longer side"
    )
    parser.add_argument("--work", type=Path, help="folder for the files; the adapter is kept there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--dense", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; 1 if ours takes more time than it may."""
    options = parsed(arguments)
    if options.dense is not None:
        print(json.dumps(time_dense(options.dense, options.largest)))
        return 0
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        source, output = work / f"sdxl-{RANK}.safetensors", work / "resized.safetensors"
        write_adapter(source, RANK)
        source.read_bytes()
        size = source.stat().st_size
        runs = [resize(source, output) for _ in range(options.repeats)]
        other = dense(source, options.largest)
        output.unlink()
    text = table(runs, other, size)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "resize.md").write_text(text + "\n", encoding="utf-8")
    document = {
        "schema": 1,
        "seconds": [run.seconds for run in runs],
        "dense_seconds_by_shape": json.loads(other.stdout),
        "dense_seconds_extrapolated": extrapolate(json.loads(other.stdout))[0],
    }
    (options.out / "resize.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
    print(text)
    return 0 if statistics.median(run.seconds for run in runs) < SECONDS else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
