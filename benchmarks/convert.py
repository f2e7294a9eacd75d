"""Converting a large LoRA through the command line: whole processes, wall time and peak memory.

The adapter is a kohya file of SDXL's U-Net: its 722 attention and feed-forward layers and their
blocks' ends, rank 64, half precision, 341 MB.

Examples:
    python benchmarks/convert.py
    python benchmarks/convert.py --rank 1 --repeats 1   # seconds: does the benchmark itself work?
    python benchmarks/convert.py --work FOLDER          # keeps the adapter for the next run
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from measure import Measurement, run_measured

RESULTS = Path(__file__).parent / "results"
TARGETS = ("diffusers", "comfyui")
MODULES = 722
SECONDS, BYTES = 3.0, 600_000_000
"""What a run may take on an idle machine of two cores."""

# ---------------------------------------------------------------------------- the adapter

# Attention blocks of the U-Net: name, width, number of transformer blocks.
_STACKS = (
    *((f"input_blocks_{n}_1", width, depth) for n, width, depth in ((4, 640, 2), (5, 640, 2))),
    *((f"input_blocks_{n}_1", 1280, 10) for n in (7, 8)),
    ("middle_block_1", 1280, 10),
    *((f"output_blocks_{n}_1", 1280, 10) for n in range(3)),
    *((f"output_blocks_{n}_1", 640, 2) for n in range(3, 6)),
)
_CONTEXT = 2048


def modules() -> Iterator[tuple[str, int, int]]:
    """Yield kohya's name, rows and inputs of each linear layer."""
    for stack, width, depth in _STACKS:
        name = f"lora_unet_{stack}"
        yield f"{name}_proj_in", width, width
        yield f"{name}_proj_out", width, width
        for block in range(depth):
            yield from _block(f"{name}_transformer_blocks_{block}", width)


def _block(name: str, width: int) -> Iterator[tuple[str, int, int]]:
    for attention, context in (("attn1", width), ("attn2", _CONTEXT)):
        yield f"{name}_{attention}_to_q", width, width
        yield f"{name}_{attention}_to_k", width, context
        yield f"{name}_{attention}_to_v", width, context
        yield f"{name}_{attention}_to_out_0", width, width
    yield f"{name}_ff_net_0_proj", 8 * width, width
    yield f"{name}_ff_net_2", width, 4 * width


def write_adapter(path: Path, rank: int) -> None:
    """Write the adapter, unless it is there."""
    if path.exists():
        return
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, rows, inputs in modules():
        up = torch.randn(rows, rank, generator=generator) * 0.01
        tensors[f"{name}.lora_up.weight"] = up.half()
        down = torch.randn(rank, inputs, generator=generator)
        tensors[f"{name}.lora_down.weight"] = down.half()
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2).half()
    words = {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_module": "networks.lora"}
    save_file(tensors, path, words)


# ---------------------------------------------------------------------------- the runs


def convert(source: Path, output: Path, target: str) -> Measurement:
    """Convert in a process of its own, to a destination that is not there yet."""
    output.unlink(missing_ok=True)
    os.sync()
    program = Path(sys.executable).with_name("loratools")
    command = [str(program), "convert", str(source), "-o", str(output), "--to", target, "--json"]
    measured = run_measured(command)
    written = json.loads(measured.stdout)["facts"]["modules_written"]
    if written != MODULES:
        raise RuntimeError(f"{written} modules were written instead of {MODULES}")
    return measured


def race(source: Path, folder: Path, repeats: int) -> dict[str, list[Measurement]]:
    """Convert to every target in turns; the file is read once beforehand."""
    source.read_bytes()
    runs: dict[str, list[Measurement]] = {target: [] for target in TARGETS}
    for _ in range(repeats):
        for target, found in runs.items():
            found.append(convert(source, folder / "converted.safetensors", target))
    return runs


def peak(values: Sequence[int | None]) -> int | None:
    """Return the largest, or nothing where there is no /proc."""
    known = [value for value in values if value is not None]
    return max(known, default=None)


def summary(runs: Sequence[Measurement]) -> dict[str, float | int | None]:
    """Return the median and range of the times, and the peaks."""
    seconds = [run.seconds for run in runs]
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "peak_anonymous": peak([run.peak_anonymous for run in runs]),
        "peak_resident": peak([run.peak_resident for run in runs]),
    }


def table(rows: dict[str, dict[str, float | int | None]], size: int) -> str:
    """Return the results as Markdown."""
    lines = [
        f"A kohya file of {MODULES} modules, {size / 1e6:.0f} MB:",
        "",
        "| `loratools convert --to` | wall time, s | peak anonymous, MB | peak resident, MB |",
        "| --- | --- | --- | --- |",
    ]
    for target, row in rows.items():
        spread = f"{row['seconds']:.2f} ({row['fastest']:.2f} to {row['slowest']:.2f})"
        memory = (row["peak_anonymous"], row["peak_resident"])
        cells = [f"{value / 1e6:.0f}" if value else "?" for value in memory]
        lines.append(f"| {target} | {spread} | {' | '.join(cells)} |")
    return "\n".join(lines)


def holds(row: dict[str, float | int | None]) -> bool:
    """Return whether the median time and the peaks are within their limits."""
    memory = (row["peak_anonymous"], row["peak_resident"])
    return (row["seconds"] or 0) < SECONDS and all((value or 0) < BYTES for value in memory)


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=64, help="of every module (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs per target (%(default)s)")
    parser.add_argument("--work", type=Path, help="folder for the files; the adapter is kept there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; 1 if it takes more time or memory than it may."""
    options = parsed(arguments)
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        source = work / f"sdxl-{options.rank}.safetensors"
        write_adapter(source, options.rank)
        size = source.stat().st_size
        rows = {to: summary(runs) for to, runs in race(source, work, options.repeats).items()}
        (work / "converted.safetensors").unlink()
    text = table(rows, size)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "convert.md").write_text(text + "\n", encoding="utf-8")
    document = {"schema": 1, "bytes": size, "runs": rows}
    (options.out / "convert.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
    print(text)
    return 0 if all(map(holds, rows.values())) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
