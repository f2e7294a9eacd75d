"""Extracting rank 32 from two models: ``loratools extract`` and mergekit's, with their errors.

Both run as whole processes on the same pair: a Llama of 1.1B parameters in bfloat16, and the same
with a change of rank 16 and dense noise, rounded to bfloat16. The least error of each layer comes
from the eigenvalues of its Gram matrix in float64, for the layers of ``--measured`` blocks.

mergekit wants a torch of its own; give the interpreter that has it:

    python -m venv mergekit && mergekit/bin/pip install mergekit==0.1.5
    python benchmarks/extract.py --mergekit mergekit/bin/python
    python benchmarks/extract.py --blocks 1 --mergekit ...   # one block of 22: a quick look
    python benchmarks/extract.py --tools loratools           # without mergekit
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from measure import Measurement, run_measured
from models import GEOMETRIES, Geometry, write_base

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).parent / "results"
RANK, TRUE_RANK = 32, 16
SPEEDUP, TOLERANCE = 5.0, 1.02
"""What must hold: so many times faster than mergekit, an error so near the least."""

LOW_RANK_SHARE, NOISE_SHARE = 0.01, 0.003
"""Deviations of the two parts of the change, as shares of the weights'."""

EXCLUDED = "embed_tokens|lm_head"
"""mergekit copies the tables whole unless they are excluded."""


# ---------------------------------------------------------------------------- the tuned model


def write_tuned(base: Path, folder: Path) -> None:
    """Write the base with a low-rank change and noise on every linear layer, tensor by tensor."""
    if (folder / "config.json").exists():
        return
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(7)
    for shard in sorted(base.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            names = list(file.keys())
            tensors = {n: changed(file.get_tensor(n), n, generator) for n in names}
        save_file(tensors, folder / shard.name, metadata={"format": "pt"})
    for name in ("model.safetensors.index.json", "config.json"):
        shutil.copy(base / name, folder / name)


def changed(weight: torch.Tensor, name: str, generator: torch.Generator) -> torch.Tensor:
    """Return the tuned weight; norms and tables stay."""
    import torch

    if weight.dim() != 2 or "layers" not in name:
        return weight
    wide = weight.float()
    size = float(wide.std())
    up, down = (torch.randn(n, TRUE_RANK, generator=generator) for n in weight.shape)
    # Directions of unequal weight, as training leaves them.
    up *= torch.logspace(0.5, -0.5, TRUE_RANK)
    wide += up @ down.T * (LOW_RANK_SHARE * size / TRUE_RANK**0.5)
    wide += torch.randn(weight.shape, generator=generator) * (NOISE_SHARE * size)
    return wide.to(weight.dtype)


# ---------------------------------------------------------------------------- the contestants


@dataclass(frozen=True)
class Job:
    """The pair, and which decoder blocks are extracted."""

    base: Path
    tuned: Path
    pattern: str
    mergekit: str


def loratools_command(job: Job, output: Path) -> list[str]:
    """Return the command line."""
    program = str(Path(sys.executable).with_name("loratools"))
    words = ["extract", str(job.base), str(job.tuned), "-o", str(output), "--rank", str(RANK)]
    return [program, *words, "--include", job.pattern, "--exclude", EXCLUDED, "--json"]


def mergekit_command(job: Job, output: Path) -> list[str]:
    """Return the command line, on the CPU."""
    program = str(Path(job.mergekit).with_name("mergekit-extract-lora"))
    models = ["--model", str(job.tuned), "--base-model", str(job.base), "--out-path", str(output)]
    chosen = ["--include-regex", job.pattern, "--exclude-regex", EXCLUDED]
    return [program, *models, *chosen, "--max-rank", str(RANK), "--skip-undecomposable", "--quiet"]


TOOLS: Mapping[str, Callable[[Job, Path], list[str]]] = {
    "loratools": loratools_command,
    "mergekit": mergekit_command,
}


def extract(tool: str, job: Job, output: Path) -> Measurement:
    """Extract in a process of its own, to a destination that is not there yet."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    return run_measured(TOOLS[tool](job, output))


# ---------------------------------------------------------------------------- the errors


@dataclass(frozen=True)
class Accuracy:
    """Errors over the measured layers, relative to ‖ΔW‖.

    Attributes:
        error: the root mean square.
        to_least: the largest ratio to the least error of the rank.
    """

    error: float
    to_least: float


def accuracies(job: Job, outputs: Mapping[str, Path], layers: Sequence[str]) -> dict[str, Accuracy]:
    """Return each output's errors against the float64 difference of the models."""
    import torch
    from safetensors.torch import load_file

    torch.set_num_threads(os.cpu_count() or 1)
    base, tuned = (Weights(folder) for folder in (job.base, job.tuned))
    found: dict[str, list[tuple[float, float]]] = {tool: [] for tool in outputs}
    loaded = {tool: load_file(path / "adapter_model.safetensors") for tool, path in outputs.items()}
    for layer in layers:
        change = tuned.get(f"{layer}.weight").double() - base.get(f"{layer}.weight").double()
        least = least_error(change)
        for tool, tensors in loaded.items():
            key = f"base_model.model.{layer}.lora_"
            up, down = (tensors[f"{key}{side}.weight"].double() for side in "BA")
            found[tool].append((float((change - up @ down).norm() / change.norm()), least))
    return {
        tool: Accuracy(
            (sum(error**2 for error, _ in pairs) / len(pairs)) ** 0.5,
            max(error / max(least, 1e-4) for error, least in pairs),
        )
        for tool, pairs in found.items()
    }


def least_error(change: torch.Tensor) -> float:
    """Return the relative error of the best matrix of the rank (Eckart and Young)."""
    import torch

    narrow = change if change.shape[0] <= change.shape[1] else change.T
    energies = torch.linalg.eigvalsh(narrow @ narrow.T)
    return float((energies[:-RANK].sum() / energies.sum()).sqrt())


class Weights:
    """Tensors of a sharded folder by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        text = (folder / "model.safetensors.index.json").read_text("utf-8")
        self.files: dict[str, str] = json.loads(text)["weight_map"]

    def get(self, name: str) -> torch.Tensor:
        """Return one tensor."""
        from safetensors import safe_open

        with safe_open(self.folder / self.files[name], "pt") as file:
            return file.get_tensor(name)


# ---------------------------------------------------------------------------- the runs


def race(job: Job, tools: Sequence[str], work: Path, repeats: int) -> dict[str, list[Measurement]]:
    """Run the tools in turns; mergekit, which takes long, once."""
    for folder in (job.base, job.tuned):
        for shard in folder.glob("*.safetensors"):
            shard.read_bytes()
    runs: dict[str, list[Measurement]] = {tool: [] for tool in tools}
    for turn in range(repeats):
        for tool in tools:
            if turn == 0 or tool != "mergekit":
                print(f"{tool}, run {turn + 1}", file=sys.stderr)
                runs[tool].append(extract(tool, job, work / f"adapter-{tool}"))
    return runs


def table(runs: Mapping[str, list[Measurement]], found: Mapping[str, Accuracy]) -> str:
    """Return the results as Markdown."""
    lines = [
        "| tool | wall time, s | peak anonymous, MB | error | largest error to least |",
        "| --- | --- | --- | --- | --- |",
    ]
    for tool, measured in runs.items():
        seconds = min(one.seconds for one in measured)
        memory = max(one.peak_anonymous or 0 for one in measured) / 1e6
        accuracy = found[tool]
        cells = f"{seconds:.1f} | {memory:.0f} | {accuracy.error:.4f} | {accuracy.to_least:.4f}"
        lines.append(f"| {tool} | {cells} |")
    return "\n".join(lines)


def holds(runs: Mapping[str, list[Measurement]], found: Mapping[str, Accuracy]) -> bool:
    """Return whether loratools is as fast and as accurate as it must be."""
    times = {tool: min(one.seconds for one in measured) for tool, measured in runs.items()}
    fast = "mergekit" not in times or times["mergekit"] >= SPEEDUP * times["loratools"]
    return fast and found["loratools"].to_least <= TOLERANCE


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=GEOMETRIES, default="1.1b", help="(%(default)s)")
    parser.add_argument("--blocks", type=int, help="extract the first blocks only")
    parser.add_argument("--measured", type=int, default=1, help="blocks whose errors are measured")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--mergekit", default=sys.executable, help="interpreter with mergekit")
    parser.add_argument("--repeats", type=int, default=2, help="runs of loratools (%(default)s)")
    parser.add_argument("--work", type=Path, help="folder for the models, which are kept there")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    return parser.parse_args(arguments)


def measured_layers(geometry: Geometry, blocks: int) -> list[str]:
    """Return the linear layers of the first blocks."""
    return [f"model.layers.{n}.{path}" for n in range(blocks) for path in geometry.linears()]


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; 1 if loratools is slower or less accurate than it must be."""
    options = parsed(arguments)
    geometry = GEOMETRIES[options.shape]
    blocks = min(options.blocks or geometry.layers, geometry.layers)
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base, tuned = work / f"base-{geometry.name}", work / f"tuned-{geometry.name}"
        if not (base / "config.json").exists():
            write_base(base, geometry)
        write_tuned(base, tuned)
        numbers = "|".join(map(str, range(blocks)))
        job = Job(base, tuned, rf"layers\.({numbers})\.", options.mergekit)
        runs = race(job, options.tools, work, options.repeats)
        outputs = {tool: work / f"adapter-{tool}" for tool in options.tools}
        layers = measured_layers(geometry, min(options.measured, blocks))
        found = accuracies(job, outputs, layers)
    text = table(runs, found)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "extract.md").write_text(text + "\n", encoding="utf-8")
    document = {
        "schema": 1,
        "blocks": blocks,
        "runs": {tool: [asdict(one) | {"stdout": ""} for one in r] for tool, r in runs.items()},
        "accuracy": {tool: asdict(one) for tool, one in found.items()},
    }
    (options.out / "extract.json").write_text(json.dumps(document, indent=2), encoding="utf-8")
    print(text)
    return 0 if holds(runs, found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
