"""Composing four adapters of a 1.1B Llama to rank 16, beside PEFT and the dense algorithm.

The adapters are of rank 16 on all seven linear layers of 22 blocks (154 layers), in PEFT's layout.
loratools runs on all of them as a whole process, and again on a sample of blocks, on which PEFT's
``add_weighted_adapter("svd")`` and the plain dense algorithm (sum, thin SVD, cut) run too; nobody
waits for those on all blocks.

Examples:
    python benchmarks/compose.py
    python benchmarks/compose.py --tiny --repeats 1     # seconds: does the benchmark itself work?
    python benchmarks/compose.py --work FOLDER          # keeps the adapters for the next run
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from measure import Measurement, run_measured

RESULTS = Path(__file__).parent / "results"
WEIGHTS = (0.5, 0.3, -0.2, 1.0)
RANK, BLOCKS = 16, 22
SECONDS = 6.0
"""What the whole job may take on an idle machine of two cores."""
NEAR = 1e-3
"""Largest relative difference of two float32 results of one formula."""

# ---------------------------------------------------------------------------- the adapters


def layers(hidden: int, inner: int, blocks: int) -> Iterator[tuple[str, int, int]]:
    """Yield the name, rows and inputs of each adapted layer."""
    narrow = hidden // 8
    for block in range(blocks):
        path = f"model.layers.{block}"
        yield f"{path}.self_attn.q_proj", hidden, hidden
        yield f"{path}.self_attn.k_proj", narrow, hidden
        yield f"{path}.self_attn.v_proj", narrow, hidden
        yield f"{path}.self_attn.o_proj", hidden, hidden
        yield f"{path}.mlp.gate_proj", inner, hidden
        yield f"{path}.mlp.up_proj", inner, hidden
        yield f"{path}.mlp.down_proj", hidden, inner


def write_adapters(folder: Path, shapes: Sequence[tuple[str, int, int]]) -> list[Path]:
    """Write four adapters, unless they are there."""
    import torch
    from safetensors.torch import save_file

    paths = [folder / f"adapter-{number}" for number in range(len(WEIGHTS))]
    for seed, path in enumerate(paths):
        if path.exists():
            continue
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for name, rows, inputs in shapes:
            key = f"base_model.model.{name}"
            down = torch.randn(RANK, inputs, generator=generator)
            tensors[f"{key}.lora_A.weight"] = down / inputs**0.5
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) / 50
        path.mkdir(parents=True)
        save_file(tensors, path / "adapter_model.safetensors", {"format": "pt"})
        targets = sorted({name.rpartition(".")[2] for name, _, _ in shapes})
        config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 32, "target_modules": targets}
        (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return paths


# ---------------------------------------------------------------------------- the contestants


def run_peft(folder: Path, output: Path) -> float:
    """Combine with PEFT on a model of linear layers; returns the seconds of the call alone."""
    import torch
    from peft import PeftModel
    from torch import nn

    shapes = json.loads((folder / "shapes.json").read_text())
    root = nn.Module()
    for name, rows, inputs in shapes:
        *parents, leaf = name.split(".")
        owner = root
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = getattr(owner, parent)
        owner.add_module(leaf, nn.Linear(inputs, rows, bias=False))
    names = [f"a{number}" for number in range(len(WEIGHTS))]
    model = PeftModel.from_pretrained(root, folder / "adapter-0", adapter_name=names[0])
    for number, name in enumerate(names[1:], 1):
        model.load_adapter(folder / f"adapter-{number}", adapter_name=name)
    start = time.perf_counter()
    with torch.no_grad():
        model.add_weighted_adapter(
            names, list(WEIGHTS), "sum", combination_type="svd", svd_rank=RANK
        )
    seconds = time.perf_counter() - start
    model.save_pretrained(output, selected_adapters=["sum"])
    return seconds


def run_dense(folder: Path, output: Path) -> float:
    """Build each ΔW, sum, cut by a thin SVD; returns the seconds without reading and writing."""
    import torch
    from safetensors.torch import load_file, save_file

    shapes = json.loads((folder / "shapes.json").read_text())
    files = [load_file(folder / f"adapter-{n}/adapter_model.safetensors") for n in range(4)]
    made = {}
    start = time.perf_counter()
    for name, rows, inputs in shapes:
        key = f"base_model.model.{name}"
        total = torch.zeros(rows, inputs)
        for weight, tensors in zip(WEIGHTS, files, strict=True):
            scale = weight * 32 / RANK
            total += scale * tensors[f"{key}.lora_B.weight"] @ tensors[f"{key}.lora_A.weight"]
        left, values, right = torch.linalg.svd(total, full_matrices=False)
        made[f"{key}.lora_B.weight"] = left[:, :RANK] * values[:RANK]
        made[f"{key}.lora_A.weight"] = right[:RANK].contiguous()
    seconds = time.perf_counter() - start
    output.mkdir()
    save_file({name: t.contiguous() for name, t in made.items()}, output / "dense.safetensors")
    return seconds


CONTESTANTS: dict[str, Callable[[Path, Path], float]] = {"peft": run_peft, "dense": run_dense}


def run_loratools(folder: Path, output: Path) -> Measurement:
    """Compose through the command line."""
    program = Path(sys.executable).with_name("loratools")
    pairs = [f"{folder / f'adapter-{n}'}:{weight}" for n, weight in enumerate(WEIGHTS)]
    how = ["-o", str(output), "--rank", str(RANK), "--method", "svd", "--json", "--overwrite"]
    return run_measured([str(program), "compose", *pairs, *how])


# ---------------------------------------------------------------------------- the race


def largest_gap(ours: Path, theirs: Path, names: Sequence[str]) -> float:
    """Return the largest relative difference of ΔW of two files whose scales are 1."""
    from safetensors.torch import load_file

    one, other = load_file(ours), load_file(theirs)
    gaps = []
    for name in names:
        keys = [f"base_model.model.{name}.lora_{part}.weight" for part in "BA"]
        first = one[keys[0]].double() @ one[keys[1]].double()
        second = other[keys[0]].double() @ other[keys[1]].double()
        gaps.append(float((first - second).norm() / first.norm()))
    return max(gaps)


def race(folder: Path, names: Sequence[str], repeats: int) -> dict[str, dict[str, float]]:
    """Run everybody in turns on the sample; the times of the others are of their call alone."""
    ours = [run_loratools(folder, folder / "ours") for _ in range(repeats)]
    rows = {"loratools, whole process": summary([run.seconds for run in ours], ours)}
    for tool in CONTESTANTS:
        output = folder / tool
        run = run_measured([sys.executable, __file__, "--contestant", tool, str(folder)])
        seconds = float(run.stdout.strip().splitlines()[-1])
        rows[f"{tool}, the call alone"] = summary([seconds], [run])
        written = next(output.rglob("*.safetensors"))
        gap = largest_gap(folder / "ours/adapter_model.safetensors", written, names)
        rows[f"{tool}, the call alone"]["difference"] = gap
    return rows


def summary(seconds: Sequence[float], runs: Sequence[Measurement]) -> dict[str, float]:
    """Return the median and range of the times, and the largest peak."""
    return {
        "seconds": statistics.median(seconds),
        "fastest": min(seconds),
        "slowest": max(seconds),
        "peak_anonymous": max(run.peak_anonymous or 0 for run in runs),
    }


def table(title: str, rows: dict[str, dict[str, float]]) -> str:
    """Return the results as Markdown; ratios are to the first row."""
    first = next(iter(rows.values()))["seconds"]
    lines = [
        title,
        "",
        "| | wall time, s | ratio | peak anonymous, MB | differs by |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, row in rows.items():
        spread = f"{row['seconds']:.2f} ({row['fastest']:.2f} to {row['slowest']:.2f})"
        gap = f"{row['difference']:.1e}" if "difference" in row else ""
        memory = f"{row['peak_anonymous'] / 1e6:.0f}"
        lines.append(f"| {name} | {spread} | {row['seconds'] / first:.1f} | {memory} | {gap} |")
    return "\n".join(lines) + "\n"


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small layers, two blocks")
    parser.add_argument("--sample", type=int, default=1, help="blocks for all (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="loratools' runs (%(default)s)")
    parser.add_argument("--work", type=Path, help="folder for the files, which are kept there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    parser.add_argument("folder", type=Path, nargs="?", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def prepare(folder: Path, shapes: Sequence[tuple[str, int, int]]) -> Path:
    """Write adapters and their shapes, and remove earlier results."""
    import shutil

    folder.mkdir(parents=True, exist_ok=True)
    for name in ("ours", *CONTESTANTS):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "shapes.json").write_text(json.dumps(shapes), encoding="utf-8")
    write_adapters(folder, shapes)
    os.sync()
    return folder


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; 1 if the whole job takes too long or the results disagree."""
    options = parsed(arguments)
    if options.contestant:
        output = options.folder / options.contestant
        print(CONTESTANTS[options.contestant](options.folder, output))
        return 0
    sizes = (256, 704) if options.tiny else (2048, 5632)
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        whole = prepare(work / "whole", list(layers(*sizes, 2 if options.tiny else BLOCKS)))
        runs = [run_loratools(whole, whole / "ours") for _ in range(options.repeats)]
        job = {"loratools, whole process": summary([run.seconds for run in runs], runs)}
        shapes = list(layers(*sizes, options.sample))
        sample = prepare(work / "sample", shapes)
        rows = race(sample, [name for name, _, _ in shapes], options.repeats)
    count = 7 * (2 if options.tiny else BLOCKS)
    texts = (
        table(f"Four adapters of rank {RANK}, {count} layers, to rank {RANK}:", job),
        table(f"The same on {len(shapes)} layers:", rows),
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "compose.md").write_text("\n".join(texts), encoding="utf-8")
    document = {"schema": 1, "whole": job, "sample": rows}
    (options.out / "compose.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
    print("\n".join(texts))
    quick = job["loratools, whole process"]["seconds"] < SECONDS
    return 0 if quick and all(row.get("difference", 0) < NEAR for row in rows.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
