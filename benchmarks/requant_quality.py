"""What rounding back to 4 bits leaves of an adapter, in perplexity on a small trained model.

A byte-level Llama is trained from scratch on documentation, quantised, and adapted with PEFT to C
sources against the quantised weights. Then the ways of merging are compared on held-out text of
both kinds. Everything comes from the packages of this environment; nothing is downloaded.

    python benchmarks/requant_quality.py --work FOLDER [--minutes 20]
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONTEXT, BATCH = 128, 16
RANK = 8
STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
RATES = (2e-5, 1e-4, 5e-4)
SCHEMES = ("nf4", "q4_k", "int4")


# ── text ──


def documentation() -> bytes:
    """Prose about software: every Markdown and reStructuredText file of the environment."""
    return _joined(("*.md", "*.rst", "*.txt"), _roots())


def c_sources() -> bytes:
    """C and C++ headers: those that torch ships."""
    return _joined(("*.h",), [Path(torch.__file__).parent / "include"])


def _roots() -> list[Path]:
    paths = sysconfig.get_paths()
    return [Path(paths[name]) for name in ("purelib", "stdlib")]


def _joined(patterns: tuple[str, ...], roots: list[Path], most: int = 12_000_000) -> bytes:
    found: list[bytes] = []
    total = 0
    files = sorted({file for root in roots for p in patterns for file in root.rglob(p)})
    random.Random(0).shuffle(files)
    for file in files:
        text = file.read_bytes()[:60_000] if file.is_file() else b""
        if text.isascii() and len(text) > 500:
            found.append(text)
            total += len(text)
        if total > most:
            break
    return b"\n".join(found)


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes of one kind of text."""

    train: Tensor
    held_out: Tensor

    @staticmethod
    def of(text: bytes) -> Corpus:
        """Split a text: nine tenths for training."""
        every = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        cut = len(every) * 9 // 10
        return Corpus(every[:cut], every[cut:])

    def batches(self, seed: int) -> Iterator[Tensor]:
        """Yield (BATCH, CONTEXT) random windows for ever."""
        draw = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self.train) - CONTEXT, (BATCH,), generator=draw)
            yield torch.stack([self.train[s : s + CONTEXT] for s in starts.tolist()]).long()

    def windows(self, count: int) -> Tensor:
        """Return (count, CONTEXT) held-out windows, evenly spread."""
        starts = torch.linspace(0, len(self.held_out) - CONTEXT, count).long()
        return torch.stack([self.held_out[s : s + CONTEXT] for s in starts.tolist()]).long()


# ── model ──


def new_model(seed: int) -> Any:
    """Return an untrained byte-level Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=768, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def train(model: Any, corpus: Corpus, *, steps: int, rate: float, seed: int) -> None:
    """Train what requires gradients, with a cosine schedule."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(weights, lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, steps + 1, pct_start=0.1)
    model.train()
    for _, batch in zip(range(steps), corpus.batches(seed), strict=False):
        loss = model(input_ids=batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimiser.step()
        schedule.step()
    model.eval()


@torch.no_grad()
def loss(model: Any, windows: Tensor) -> float:
    """Return the mean loss on held-out windows, in nats per byte."""
    parts = windows.split(32)
    each = [float(model(input_ids=p, labels=p).loss) * len(p) for p in parts]
    return sum(each) / len(windows)


def linears(model: Any) -> dict[str, torch.nn.Linear]:
    """Return the layers that are quantised and adapted: all linear layers of the blocks."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers." in name and "lora" not in name
    }


# ── grids ──


@dataclass(frozen=True)
class Quantised:
    """A weight on its grid: fresh scales, codes, and what they stand for."""

    grid: Any
    codes: Tensor
    values: Tensor


def quantise(weight: Tensor, scheme: str) -> Quantised:
    """Quantise a float32 matrix as the scheme's own tool does."""
    if scheme == "q4_k":
        from loratools.codecs.ggml import GGML_TYPES
        from loratools.codecs.ggml_grids import GGML_GRIDS

        raw = GGML_TYPES["Q4_K"].codec.encode(weight)
        codes, grid = GGML_GRIDS["Q4_K"].read(raw)
        return Quantised(grid, codes, grid.values(codes))
    from loratools.codecs.bnb4_weight import quantise_bnb4
    from loratools.codecs.mlx_affine import quantise_mlx

    packed = quantise_bnb4(weight, "nf4") if scheme == "nf4" else quantise_mlx(weight, 4, 64)
    rows = len(weight)
    return Quantised(packed.grid(0, rows), packed.codes(0, rows), packed.decode(0, rows))


# ── the ways of merging ──


@dataclass(frozen=True)
class Layer:
    """One adapted layer: the 16-bit original, the quantised one, the change and its directions."""

    original: Tensor
    quantised: Quantised
    change: Tensor
    basis: Tensor


Way = Callable[[Layer, str], Tensor]


def ways() -> dict[str, Way]:
    """Return every way of merging that is compared."""
    from loratools.codecs.rounding import nearest_codes, shaped_codes, weight_of

    def on_grid(layer: Layer, codes: Tensor) -> Tensor:
        return layer.quantised.grid.values(codes)

    def in_16_bits(layer: Layer, scheme: str) -> Tensor:
        return (layer.quantised.values + layer.change).bfloat16().float()

    def nearest(layer: Layer, scheme: str) -> Tensor:
        target = layer.quantised.values + layer.change
        return on_grid(layer, nearest_codes(target, layer.quantised.grid))

    def fresh(layer: Layer, scheme: str) -> Tensor:
        return quantise(layer.quantised.values + layer.change, scheme).values

    def from_original(layer: Layer, scheme: str) -> Tensor:
        return quantise(layer.original + layer.change, scheme).values

    def shaped(strength: float, *, original: bool) -> Way:
        def merge(layer: Layer, scheme: str) -> Tensor:
            start = layer.original if original else layer.quantised.values
            codes = shaped_codes(
                start + layer.change,
                layer.quantised.grid,
                layer.basis,
                weight_of(strength, layer.basis),
            )
            return on_grid(layer, codes)

        return merge

    def residual(layer: Layer, scheme: str) -> Tensor:
        target = layer.quantised.values + layer.change
        stored = nearest(layer, scheme)
        u, s, v = torch.linalg.svd(target - stored, full_matrices=False)
        return stored + (u[:, :RANK] * s[:RANK]) @ v[:RANK]

    found: dict[str, Way] = {
        "merged, 16 bit": lambda layer, _: (
            (layer.quantised.values + layer.change).bfloat16().float()
        ),
        "nearest, frozen scales": nearest,
        "nearest, fresh scales": fresh,
        "nearest, from the 16-bit original": from_original,
    }
    for strength in STRENGTHS:
        found[f"adapter-aware {strength:g}"] = shaped(strength, original=False)
    found["adapter-aware 10, from the 16-bit original"] = shaped(10.0, original=True)
    found[f"nearest + residual adapter of rank {RANK}"] = residual
    return found


def retained(found: Tensor, layer: Layer) -> tuple[float, float]:
    """Return ⟨Δ', Δ⟩ and ‖Δ‖² of a layer."""
    made = found - layer.quantised.values
    return float((made * layer.change).sum()), float(layer.change.square().sum())


# ── the study ──


@dataclass(frozen=True)
class Steps:
    """How long to train."""

    base: int
    adapter: int


def study(
    work: Path, steps: Steps, schemes: tuple[str, ...], seeds: int, rates: tuple[float, ...]
) -> list[dict[str, Any]]:
    """Train, quantise, adapt, merge, and return a row for every result."""
    docs, sources = Corpus.of(documentation()), Corpus.of(c_sources())
    held = {"documentation": docs.windows(256), "C sources": sources.windows(256)}
    rows: list[dict[str, Any]] = []
    for seed in range(seeds):
        base = trained_base(work, docs, steps.base, seed)
        plain = {name: loss(base, windows) for name, windows in held.items()}
        print(f"seed {seed}: 16-bit base {plain}", flush=True)
        for scheme in schemes:
            for rate in rates:
                rows += one_adapter(base, scheme, rate, seed, sources, held, steps.adapter, plain)
                (work / "rows.json").write_text(json.dumps(rows, indent=1))
    return rows


def trained_base(work: Path, corpus: Corpus, steps: int, seed: int) -> Any:
    """Return the model trained on documentation, from its file if it is there."""
    file = work / f"base-{seed}-{steps}.pt"
    model = new_model(seed)
    if file.exists():
        model.load_state_dict(torch.load(file))
        return model.eval()
    started = time.perf_counter()
    train(model, corpus, steps=steps, rate=2e-3, seed=seed)
    print(f"trained the base in {time.perf_counter() - started:.0f} s", flush=True)
    torch.save(model.state_dict(), file)
    return model


def one_adapter(
    base: Any,
    scheme: str,
    rate: float,
    seed: int,
    corpus: Corpus,
    held: Mapping[str, Tensor],
    steps: int,
    plain: Mapping[str, float],
) -> list[dict[str, Any]]:
    """Adapt one quantised model and evaluate every way of merging."""
    from peft import LoraConfig, get_peft_model

    originals = {name: m.weight.detach().clone() for name, m in linears(base).items()}
    quantised = {name: quantise(weight, scheme) for name, weight in originals.items()}
    put(base, {name: q.values for name, q in quantised.items()})
    start = {name: loss(base, windows) for name, windows in held.items()}
    torch.manual_seed(seed)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
    model = get_peft_model(base, config)
    train(model, corpus, steps=steps, rate=rate, seed=seed + 100)
    adapted = {name: loss(model, windows) for name, windows in held.items()}
    layers = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A"):
            plain_name = name.removeprefix("base_model.model.")
            down = module.lora_A["default"].weight.detach()
            change = module.get_delta_weight("default").detach().clone()
            basis = torch.linalg.qr(down.T).Q.contiguous()
            layers[plain_name] = Layer(originals[plain_name], quantised[plain_name], change, basis)
    base = model.unload()
    ratio = statistics.median(
        float(layer.change.norm() / layer.quantised.values.norm()) for layer in layers.values()
    )
    common = {"seed": seed, "scheme": scheme, "rate": rate, "ratio": ratio}
    rows = [{**common, "way": "base", **start}, {**common, "way": "base + adapter", **adapted}]
    for way, merge in ways().items():
        merged = {name: merge(layer, scheme) for name, layer in layers.items()}
        put(base, merged)
        kept, whole = map(sum, zip(*(retained(merged[n], layers[n]) for n in layers), strict=True))
        found = {name: loss(base, windows) for name, windows in held.items()}
        gain = (start["C sources"] - found["C sources"]) / (
            start["C sources"] - adapted["C sources"]
        )
        rows.append({**common, "way": way, **found, "gain kept": gain, "retained": kept / whole})
    put(base, originals)
    for row in rows:
        print(json.dumps(row), flush=True)
    assert math.isclose(loss(base, held["documentation"]), plain["documentation"], abs_tol=1e-5)
    return rows


def put(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Set the weights of the named linear layers."""
    modules = linears(model)
    with torch.no_grad():
        for name, weight in weights.items():
            modules[name].weight.copy_(weight)


def table(rows: list[dict[str, Any]]) -> str:
    """Return the median over seeds of every scheme, learning rate and way, as Markdown."""
    lines = [
        "| scheme | ΔW/W | way | C sources, nats/byte | gain kept | documentation | retained |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    keys = dict.fromkeys((row["scheme"], row["rate"], row["way"]) for row in rows)
    for scheme, rate, way in keys:
        some = [r for r in rows if (r["scheme"], r["rate"], r["way"]) == (scheme, rate, way)]

        def middle(word: str, some: list[dict[str, Any]] = some) -> str:
            values = [r[word] for r in some if word in r]
            return f"{statistics.median(values):.3f}" if values else ""

        ratio = statistics.median(r["ratio"] for r in some)
        cells = [
            scheme, f"{ratio:.4f}", way, middle("C sources"), middle("gain kept"),
            middle("documentation"), middle("retained"),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run the study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for the trained bases")
    parser.add_argument("--base-steps", type=int, default=600)
    parser.add_argument("--adapter-steps", type=int, default=100)
    parser.add_argument("--schemes", default=",".join(SCHEMES))
    parser.add_argument("--rates", default=",".join(map(str, RATES)), help="learning rates")
    parser.add_argument("--seeds", type=int, default=1)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    schemes = tuple(given.schemes.split(","))
    steps = Steps(given.base_steps, given.adapter_steps)
    rates = tuple(float(rate) for rate in given.rates.split(","))
    rows = study(given.work, steps, schemes, given.seeds, rates)
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "requant_quality.md").write_text(table(rows) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
