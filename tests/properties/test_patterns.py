"""rank_pattern and alpha_pattern: what is written means the same under PEFT's own matching."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from loratools.adapter import Adapter
from loratools.deltas import LoRA
from loratools.formats.peft import FORMAT
from loratools.formats.peft_config import parse_config
from tests.strategies import alphas, make_tensor, ranks

# Components that are prefixes, suffixes and wildcards of each other; torch forbids only the dot.
parts = st.sampled_from(
    [
        *("a", "b", "aa", "1", "11", "1x1", "q_proj", "my_q_proj", "layers", "h"),
        *("c+d", "c(d", "x|y", "[0]", "a*", "$", "^", "\\d", "q?", "{2}", "-"),
    ]
)
paths = st.lists(parts, min_size=1, max_size=4).map(".".join)
layer_values = st.dictionaries(paths, st.tuples(ranks, alphas), min_size=1, max_size=8)
Patterns = Mapping[str, Any]


def peft_value(patterns: Patterns, path: str, default: Any) -> Any:
    """Look a module up as PEFT 0.21 does (``utils/other.py``: get_pattern_key, then dict.get)."""
    for key in patterns:
        if re.match(rf"(.*\.)?({key})$", path):
            return patterns[key]
    return patterns.get(path, default)


def make_lora(rank: int, alpha: float) -> LoRA:
    return LoRA(make_tensor(1, rank, 3), make_tensor(2, 3, rank), alpha)


@given(layer_values)
@example({"a.q_proj": (2, 4.0), "b.a.q_proj": (3, 5.0), "h.a": (1, 1.0), "h.b": (1, 1.0)})
@example({"h.1.1": (2, 4.0), "h.1x1": (3, 5.0), "h.a": (1, 1.0), "h.b": (1, 1.0)})
@example({"c+d": (2, 4.0), "h.a": (1, 1.0), "h.b": (1, 1.0)})
@example({"q_proj": (2, 1.0), "my.q_proj": (1, 1.0), "h": (1, 1.0)})
def test_written_config_means_every_rank_and_alpha(values: dict[str, tuple[int, float]]) -> None:
    """PEFT, reading the written JSON, gives each layer its rank and alpha; so do we."""
    adapter = Adapter({path: make_lora(*value) for path, value in values.items()})
    bundle = FORMAT.write(adapter)
    config = json.loads(bundle.sidecars["adapter_config.json"])
    again = FORMAT.read(bundle)
    for path, (rank, alpha) in values.items():
        assert peft_value(config.get("rank_pattern", {}), path, config["r"]) == rank
        assert peft_value(config.get("alpha_pattern", {}), path, config["lora_alpha"]) == alpha
        assert again.layers[path].alpha / again.layers[path].rank == alpha / rank
    assert again.layers.keys() == values.keys()


@given(layer_values)
def test_every_layer_is_a_target(values: dict[str, tuple[int, float]]) -> None:
    """PEFT's rule for lists: the whole name, or its ending after a dot."""
    adapter = Adapter({path: make_lora(*value) for path, value in values.items()})
    targets = json.loads(FORMAT.write(adapter).sidecars["adapter_config.json"])["target_modules"]
    assert all(any(p == t or p.endswith(f".{t}") for t in targets) for p in values)


def compiles(pattern: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({pattern})$")
    except re.error:
        return False
    return True


keys = st.one_of(
    paths.filter(compiles),
    st.sampled_from((".*", "q_proj|a", r"^layers\.1\..*", ".*1.*q_proj", r"layers\.\d+\.a")),
)


@given(
    rank_pattern=st.dictionaries(keys, ranks, max_size=4),
    alpha_pattern=st.dictionaries(keys, alphas, max_size=4),
    path=paths,
    rslora=st.booleans(),
)
@example({"c+d": 3}, {"x|y": 2.0, "q": 5.0}, "c+d", False)
@example({"a": 3, "b.a": 4}, {"b.a": 2.0, "a": 5.0}, "b.a", True)
@example({"h.1.1": 3}, {"1x1": 2.0}, "h.1x1", False)
def test_read_as_peft_reads(
    rank_pattern: dict[str, int], alpha_pattern: dict[str, float], path: str, rslora: bool
) -> None:
    """Rank and alpha are looked up apart; the first match counts, and the name itself last."""
    fields = {
        "peft_type": "LORA",
        "r": 7,
        "lora_alpha": 11,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": rslora,
    }
    config = parse_config(json.dumps(fields), "x")
    rank = peft_value(rank_pattern, path, 7)
    alpha = peft_value(alpha_pattern, path, 11)
    assert config.rank(path) == rank
    assert config.scale(path) == alpha / (rank**0.5 if rslora else rank)
