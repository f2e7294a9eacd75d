"""Merging a LoRA into a Q4_K_M model: `loratools merge MODEL.gguf ADAPTER`, every type kept.

The base has the shapes of TinyLlama-1.1B and random normal weights, quantised as llama-quantize's
Q4_K_M mix; the adapter is that of ``merge.py``, rank 16 on all linear layers. Nobody else merges
into such a file, so there is no other contestant: beside the merge stands `cp` of the same file,
and the limits are stated (two cores).

Examples:
    python benchmarks/gguf_merge.py
    python benchmarks/gguf_merge.py --shape tiny      # does the benchmark itself work?
    python benchmarks/gguf_merge.py --work FOLDER     # keeps the base for the next run
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measure import Measurement, run_measured
from models import GEOMETRIES, SEED, WEIGHT_STD, Geometry, write_adapter

RESULTS = Path(__file__).parent / "results"
SECONDS, MEGABYTES = 90.0, 700.0
"""What a merge may take on an idle machine of two cores."""

_BLOCK = 1 << 22
_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}

# ---------------------------------------------------------------------------- the base


def shapes_of(geometry: Geometry) -> dict[str, tuple[int, ...]]:
    """Return the tensors of the model by their GGUF names."""
    found: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (geometry.vocabulary, geometry.hidden)
    }
    for layer in range(geometry.layers):
        for path, shape in geometry.linears().items():
            found[f"blk.{layer}.{_NAMES[path]}.weight"] = shape
        found[f"blk.{layer}.attn_norm.weight"] = (geometry.hidden,)
        found[f"blk.{layer}.ffn_norm.weight"] = (geometry.hidden,)
    found["output_norm.weight"] = (geometry.hidden,)
    found["output.weight"] = (geometry.vocabulary, geometry.hidden)
    return found


def write_base(path: Path, geometry: Geometry) -> None:
    """Write the model, a few rows at a time."""
    from loratools.codecs.ggml_mixes import ModelFacts, choose_types, find_mix
    from loratools.tensorfiles.gguf_reading import Value
    from loratools.tensorfiles.gguf_types import ValueType
    from loratools.tensorfiles.gguf_writing import Entry, encode_gguf_header, padding

    shapes = shapes_of(geometry)
    facts = ModelFacts("llama", geometry.layers, geometry.heads, geometry.kv_heads)
    types = choose_types(find_mix("Q4_K_M"), shapes, facts)
    entries = [Entry(name, types[name] or "F32", shape) for name, shape in shapes.items()]
    numbers = {
        "llama.block_count": geometry.layers,
        "llama.embedding_length": geometry.hidden,
        "llama.feed_forward_length": geometry.intermediate,
        "llama.attention.head_count": geometry.heads,
        "llama.attention.head_count_kv": geometry.kv_heads,
        "llama.vocab_size": geometry.vocabulary,
        "general.file_type": 15,
    }
    words = {"general.architecture": Value(ValueType.STRING, "llama")}
    words |= {key: Value(ValueType.UINT32, number) for key, number in numbers.items()}
    with path.with_suffix(".part").open("wb") as file:
        file.write(encode_gguf_header(words, entries))
        for entry in entries:
            for block in encoded(entry.type, entry.shape):
                file.write(block)
            file.write(bytes(padding(entry.nbytes, 32)))
    path.with_suffix(".part").rename(path)


def encoded(kind: str, shape: tuple[int, ...]) -> Iterator[bytes]:
    """Yield a random tensor's bytes; norms are ones."""
    import torch

    from loratools.codecs.ggml import GGML_TYPES

    columns = shape[-1]
    rows = 1 if len(shape) == 1 else shape[0]
    generator = torch.Generator().manual_seed(SEED + rows + columns)
    step = max(1, _BLOCK // columns)
    for start in range(0, rows, step):
        block = torch.empty(min(step, rows - start), columns)
        block = block.fill_(1) if rows == 1 else block.normal_(0, WEIGHT_STD, generator=generator)
        yield GGML_TYPES[kind].codec.encode(block).numpy().tobytes()


# ---------------------------------------------------------------------------- the runs


def merge(base: Path, adapter: Path, output: Path) -> Measurement:
    """Merge in a process of its own, to a destination that is not there yet."""
    output.unlink(missing_ok=True)
    os.sync()
    program = Path(sys.executable).with_name("loratools")
    command = [str(program), "merge", str(base), str(adapter), "-o", str(output), "--json"]
    return run_measured(command)


def check(measured: Measurement, base: Path, output: Path, layers: int) -> dict[str, object]:
    """Return the report's facts; raises if types, places or the number of changes are not right."""
    from loratools.tensorfiles.gguf import read_gguf_header

    facts = json.loads(measured.stdout)["facts"]
    before, after = (read_gguf_header(path) for path in (base, output))
    kinds = [{n: (t.type.name, t.shape) for n, t in h.tensors.items()} for h in (before, after)]
    if facts["tensors_changed"] != 7 * layers or kinds[0] != kinds[1]:
        raise RuntimeError(f"not what was asked for: {facts}")
    return facts


def copy(base: Path, output: Path) -> Measurement:
    """Copy the base, to the disk."""
    output.unlink(missing_ok=True)
    os.sync()
    return run_measured(["sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", str(base), str(output)])


def table(runs: list[Measurement], copies: list[Measurement], facts: dict[str, object]) -> str:
    """Return the results as Markdown."""
    seconds = statistics.median(run.seconds for run in runs)
    peak = max(run.peak_anonymous or 0 for run in runs) / 1e6
    copied = statistics.median(run.seconds for run in copies)
    touched = int(str(facts["parameters_touched"]))
    what = f"loratools merge, {touched / 1e9:.2f}e9 weights coded again"
    speed = f"{touched * 4 / 1e6 / seconds:.0f} MB of float32 weights a second"
    lines = [
        "| what | seconds | peak anonymous memory | limit |",
        "| --- | --- | --- | --- |",
        f"| {what} | {seconds:.1f} | {peak:.0f} MB | {SECONDS:.0f} s, {MEGABYTES:.0f} MB |",
        f"| cp and sync | {copied:.1f} | | |",
        "",
        f"{speed}; retained: {facts['retained']:.3f} of the change.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run the benchmark; 1 if a limit is not kept."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=GEOMETRIES, default="1.1b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, help="folder that keeps the base")
    options = parser.parse_args()
    geometry = GEOMETRIES[options.shape]
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        work.mkdir(parents=True, exist_ok=True)
        base = work / f"base-{geometry.name}-q4_k_m.gguf"
        adapter = work / f"adapter-{geometry.name}"
        if not base.exists():
            print(f"writing {base} ...", file=sys.stderr)
            write_base(base, geometry)
        if not (adapter / "adapter_config.json").exists():
            write_adapter(adapter, geometry)
        output = work / "merged.gguf"
        runs, copies, facts = [], [], {}
        for number in range(options.repeats):
            runs.append(merge(base, adapter, output))
            facts = check(runs[-1], base, output, geometry.layers)
            copies.append(copy(base, output))
            print(f"run {number + 1}: {runs[-1].seconds:.1f} s", file=sys.stderr)
        output.unlink()
    text = table(runs, copies, facts)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "gguf_merge.md").write_text(text)
    seconds = statistics.median(run.seconds for run in runs)
    peak = max(run.peak_anonymous or 0 for run in runs)
    return 0 if seconds <= SECONDS and peak <= MEGABYTES * 1e6 else 1


if __name__ == "__main__":
    sys.exit(main())
