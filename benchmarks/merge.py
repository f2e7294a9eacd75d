"""Merging a LoRA into a sharded base: loratools, PEFT and ``cp -r``, whole processes in one run.

Examples:
    python benchmarks/merge.py                          # all of it: 40 GB of free disk
    python benchmarks/merge.py --skip-8b                # 10 GB
    python benchmarks/merge.py --shape tiny --skip-8b   # seconds: does the benchmark itself work?
    python benchmarks/merge.py --tools peft,cp --work FOLDER
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from agreement import Agreement, compare_models
from measure import Measurement, run_measured
from models import GEOMETRIES, Geometry, write_adapter, write_base

SCHEMA = 1
RESULTS = Path(__file__).parent / "results"
LARGE = "8b"
LARGE_TOOLS = ("loratools", "loratools-call", "cp", "cp-sync")
COMPARED = ("loratools", "peft")
PACKAGES = ("loratools", "torch", "peft", "transformers", "safetensors", "numpy")


# ---------------------------------------------------------------------------- the contestants


def _loratools(base: Path, adapter: Path, output: Path) -> list[str]:
    program = Path(sys.executable).with_name("loratools")
    return [str(program), "merge", str(base), str(adapter), "-o", str(output), "-q"]


def _child(tool: str) -> Callable[[Path, Path, Path], list[str]]:
    """Return the command that runs one of ``CHILDREN`` in an interpreter of its own."""

    def command(base: Path, adapter: Path, output: Path) -> list[str]:
        script = str(Path(__file__).resolve())
        return [sys.executable, script, "--child", tool, str(base), str(adapter), str(output)]

    return command


def _copy(base: Path, _adapter: Path, output: Path) -> list[str]:
    return ["cp", "-r", str(base), str(output)]


def _copy_and_sync(base: Path, _adapter: Path, output: Path) -> list[str]:
    return ["sh", "-c", 'cp -r "$1" "$2" && sync "$2"/*', "sh", str(base), str(output)]


@dataclass(frozen=True)
class Tool:
    """A contestant: what the table calls it and the command that does the job."""

    title: str
    command: Callable[[Path, Path, Path], list[str]]


TOOLS = {
    "loratools": Tool("`loratools merge`", _loratools),
    "loratools-call": Tool("`merge_into_base` in Python", _child("loratools")),
    "peft": Tool("PEFT `merge_and_unload`", _child("peft")),
    "cp": Tool("`cp -r`", _copy),
    "cp-sync": Tool("`cp -r`, then fsync", _copy_and_sync),
}


@contextlib.contextmanager
def _timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    seconds[phase] = time.perf_counter() - started


def child_loratools(base: str, adapter: str, output: str) -> dict[str, float]:
    """Merge with one library call; the import is timed apart from it."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "import"):
        from loratools.merge import merge_into_base

        importlib.import_module("torch")  # so that the call does not pay for it
    with _timed(seconds, "merge"):
        merge_into_base(base, [adapter], output)
    return seconds


def child_peft(base: str, adapter: str, output: str) -> dict[str, float]:
    """Merge the way PEFT's documentation shows, on the CPU and in the base's dtype."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "import"):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
    with _timed(seconds, "load"):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    with _timed(seconds, "adapter"):
        model = PeftModel.from_pretrained(model, adapter)
    with _timed(seconds, "merge"):
        model = model.merge_and_unload()
    with _timed(seconds, "save"):
        model.save_pretrained(output)
    return seconds


CHILDREN = {"loratools": child_loratools, "peft": child_peft}


# ---------------------------------------------------------------------------- the race


@dataclass
class Case:
    """All runs on one base."""

    name: str
    base_bytes: int
    runs: dict[str, list[Measurement]] = field(default_factory=dict)
    agreement: Agreement | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the JSON form."""
        return {
            "case": self.name,
            "base_bytes": self.base_bytes,
            "runs": {tool: [_run_dict(run) for run in runs] for tool, runs in self.runs.items()},
            "agreement": self.agreement.to_dict() if self.agreement else None,
        }


def _run_dict(run: Measurement) -> dict[str, object]:
    values = asdict(run)
    phases = _phases(run)
    del values["stdout"]
    return {**values, "phases": phases}


def _phases(run: Measurement) -> dict[str, float]:
    """Return what a child of this script timed inside itself; empty for other commands."""
    last = run.stdout.strip().splitlines()[-1:]
    return json.loads(last[0])["phases"] if last and last[0].startswith('{"phases"') else {}


def race(geometry: Geometry, tools: Sequence[str], repeats: int, work: Path) -> Case:
    """Run every tool ``repeats`` times, in turn, so that a slow moment of the machine hits all."""
    base, adapter = prepared(geometry, work)
    outputs = {tool: work / f"out-{geometry.name}-{tool}" for tool in tools}
    comparing = all(tool in tools for tool in COMPARED)
    case = Case(geometry.name, geometry.nbytes)
    try:
        for repeat in range(repeats):
            for tool, output in outputs.items():
                run = one_run(TOOLS[tool].command(base, adapter, output), output)
                case.runs.setdefault(tool, []).append(run)
                say(f"{geometry.name} {repeat + 1}/{repeats} {tool}: {run.seconds:.2f} s")
                if not (comparing and tool in COMPARED):
                    shutil.rmtree(output)
        if comparing:
            case.agreement = compare_models(outputs["loratools"], outputs["peft"], base)
    finally:
        for output in outputs.values():
            shutil.rmtree(output, ignore_errors=True)
    return case


def one_run(command: Sequence[str], output: Path) -> Measurement:
    """Run with the destination absent and no earlier writes left for the disk to do."""
    shutil.rmtree(output, ignore_errors=True)
    os.sync()
    return run_measured(command)


def prepared(geometry: Geometry, work: Path) -> tuple[Path, Path]:
    """Return the base and the adapter, written now if ``work`` lacks them, and read once."""
    base, adapter = work / f"base-{geometry.name}", work / f"adapter-{geometry.name}"
    if not (base / "config.json").exists():
        say(f"writing a base of {geometry.nbytes / 1e6:,.0f} MB")
        write_base(base, geometry)
    if not (adapter / "adapter_config.json").exists():
        write_adapter(adapter, geometry)
    for path in sorted(base.iterdir()):
        warm(path)
    return base, adapter


def warm(path: Path) -> None:
    """Read a file to its end, so that no contestant pays for the first read."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def require_disk(work: Path, needed: int) -> None:
    """Stop before half a base is written."""
    free = shutil.disk_usage(work).free
    if free < needed:
        sys.exit(f"{work}: {needed / 1e9:.0f} GB needed, {free / 1e9:.0f} GB free")


# ---------------------------------------------------------------------------- the results


def table(case: Case) -> str:
    """Return the case as a Markdown table: medians, with the range in brackets."""
    reference = (
        statistics.median(run.seconds for run in case.runs["cp"]) if "cp" in case.runs else 0
    )
    lines = [
        f"### {case.name}: {case.base_bytes / 1e6:,.0f} MB of bfloat16",
        "",
        "| | wall time, s | × `cp -r` | peak anonymous MB | peak resident MB |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for tool, runs in case.runs.items():
        title = TOOLS[tool].title
        lines.append(_row(title, [run.seconds for run in runs], runs, reference))
        inside = [_phases(run).get("merge") for run in runs]
        if tool == "loratools-call" and None not in inside:
            lines.append(_row(f"{title}, the call alone", inside, runs, reference))
    if case.agreement:
        lines += ["", f"loratools against PEFT: {case.agreement}."]
    return "\n".join(lines) + "\n"


def _row(title: str, seconds: list[float], runs: list[Measurement], reference: float) -> str:
    median = statistics.median(seconds)
    ratio = f"{median / reference:.2f}" if reference else "–"
    spread = f"{median:.2f} ({min(seconds):.2f}–{max(seconds):.2f})"
    anonymous = _megabytes([run.peak_anonymous for run in runs])
    resident = _megabytes([run.peak_resident for run in runs])
    return f"| {title} | {spread} | {ratio} | {anonymous} | {resident} |"


def _megabytes(values: list[int | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known) / 1e6:.0f}" if known else "–"


def machine() -> dict[str, object]:
    """Say what the figures were measured on."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        memory = None
    return {
        "system": platform.system(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": memory,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_results(folder: Path, cases: Sequence[Case]) -> str:
    """Write ``merge.json`` and ``merge.md``; return the latter's text."""
    about = machine()
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "schema": SCHEMA,
        "machine": about,
        "cases": [case.to_dict() for case in cases],
    }
    (folder / "merge.json").write_text(json.dumps(document, indent=2) + "\n")
    packages = ", ".join(f"{name} {found}" for name, found in about["packages"].items() if found)
    heading = f"{about['processor']}, {about['cores']} cores, Python {about['python']}; {packages}"
    text = "\n".join([heading + "\n", *(table(case) for case in cases)])
    (folder / "merge.md").write_text(text)
    return text


def say(text: str) -> None:
    """Tell how far it is, on stderr."""
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------- the command


def parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tools", default=",".join(TOOLS), help="comma-separated, of: %(default)s")
    add("--shape", choices=("1.1b", "tiny"), default="1.1b", help="of the first base")
    add("--repeats", type=int, default=3, help="runs of each tool (%(default)s)")
    add(
        "--skip-8b", action="store_true", help="leave out the 8B-shaped base (one run of each tool)"
    )
    add("--work", type=Path, help="folder for the models; the first base is kept there")
    add("--out", type=Path, default=RESULTS, help="folder for merge.md and merge.json")
    add("--child", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.tools = options.tools.split(",")
    unknown = [tool for tool in options.tools if tool not in TOOLS]
    if unknown:
        parser.error(f"unknown tool {', '.join(unknown)}; known: {', '.join(TOOLS)}")
    return options


def run_cases(options: argparse.Namespace, work: Path) -> list[Case]:
    """Race on the first base, then, unless told otherwise, on the large one."""
    first, large = GEOMETRIES[options.shape], GEOMETRIES[LARGE]
    require_disk(work, 4 * first.nbytes + (1 << 30))
    cases = [race(first, options.tools, options.repeats, work)]
    large_tools = [tool for tool in options.tools if tool in LARGE_TOOLS]
    if not options.skip_8b and large_tools:
        require_disk(work, 2 * large.nbytes + (4 << 30))
        try:
            cases.append(race(large, large_tools, 1, work))
        finally:
            shutil.rmtree(work / f"base-{LARGE}", ignore_errors=True)
            shutil.rmtree(work / f"adapter-{LARGE}", ignore_errors=True)
    return cases


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; 1 if loratools and PEFT do not agree."""
    options = parsed(arguments)
    if options.child:
        tool, *paths = options.child
        print(json.dumps({"phases": CHILDREN[tool](*paths)}))
        return 0
    if options.work:
        options.work.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        work = options.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        cases = run_cases(options, work)
    print(write_results(options.out, cases))
    return 0 if all(case.agreement is None or case.agreement.holds for case in cases) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
