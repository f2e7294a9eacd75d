"""Strengths by block: slots by a second, independent arithmetic; patterns; refusals."""

from __future__ import annotations

import re

import pytest

from loratools.adapter import Adapter
from loratools.errors import LoratoolsError, OptionError, UnsupportedError
from loratools.keymaps.block_strengths import block_strengths
from loratools.keymaps.translate import find_architecture, translate
from tests.keymap_cases import whole

NAMES = ["BASE", *(f"IN{i:02}" for i in range(12)), "MID", *(f"OUT{i:02}" for i in range(12))]
SHORT = {
    12: "BASE IN04 IN05 IN07 IN08 MID OUT00 OUT01 OUT02 OUT03 OUT04 OUT05",
    17: "BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 OUT04 OUT05 OUT06 OUT07 OUT08 OUT09 OUT10 "
    "OUT11",
    20: " ".join(
        ["BASE", *(f"IN{i:02}" for i in range(9)), "MID", *(f"OUT{i:02}" for i in range(9))]
    ),
    26: " ".join(NAMES),
}


def slot_of_kohya(name: str) -> str | None:
    """Return the slot's name by the rules for kohya's flattened names (reference §1.4)."""
    if name.startswith("lora_te"):
        return "BASE"
    if match := re.search(r"(down|up)_blocks_(\d+)_(\w+?s)_(\d+)_", name):
        way, i, part, j = match[1], int(match[2]), match[3], int(match[4])
        if way == "down":
            block = 3 * (i + 1) if part == "downsamplers" else 3 * i + j + 1
            return f"IN{block:02}"
        return f"OUT{3 * i + 2 if part == 'upsamplers' else 3 * i + j:02}"
    if match := re.search(r"(input|output)_blocks_(\d+)_", name):
        return f"{'IN' if match[1] == 'input' else 'OUT'}{int(match[2]):02}"
    return "MID" if re.search(r"mid(dle)?_block", name) else None


@pytest.mark.parametrize(("arch", "length"), [("sd1", 17), ("sd1", 26), ("sdxl", 12), ("sdxl", 20)])
def test_lists(arch: str, length: int) -> None:
    slots = SHORT[length].split()
    assert len(slots) == length
    values = {slot: 0.1 + place / 100 for place, slot in enumerate(slots)}
    architecture = find_architecture(arch)
    adapter = whole(architecture, "kohya")
    factors = block_strengths(adapter, architecture, ",".join(map(str, values.values())))
    told = 0
    for path, factor in factors.items():
        slot = slot_of_kohya(path)
        if slot is not None:
            assert factor == pytest.approx(values.get(slot, 1.0)), path
            told += slot in values
    assert told > 200


def test_every_naming_gives_the_same() -> None:
    arch = find_architecture("sdxl")
    adapter = whole(arch, "kohya")
    text = ",".join(str(i / 10) for i in range(20))
    ours = list(block_strengths(adapter, arch, text).values())
    theirs = block_strengths(translate(adapter, arch, "diffusers"), arch, text)
    assert sorted(ours) == sorted(theirs.values())


def test_patterns() -> None:
    arch = find_architecture("flux1")
    adapter = whole(arch, "kohya")
    factors = block_strengths(adapter, arch, r"double_blocks\.0\.=0.5, ff\.=0, single=-1")
    for path, factor in factors.items():
        if "double_blocks_0_" in path:
            assert factor == 0.5
        elif "img_mlp" in path:
            assert factor == 0.0
        elif "single" in path:
            assert factor == -1.0


@pytest.mark.parametrize(
    ("arch", "text", "error"),
    [
        ("sdxl", "1,2,3", OptionError),
        ("sd1", ",".join("1" * 20), OptionError),
        ("flux1", ",".join("1" * 12), UnsupportedError),
        ("sdxl", "1,x", OptionError),
        ("sdxl", "(=1", OptionError),
        ("sdxl", "nowhere=1", OptionError),
        ("sdxl", "a=b", OptionError),
    ],
)
def test_refusals(arch: str, text: str, error: type[LoratoolsError]) -> None:
    architecture = find_architecture(arch)
    adapter: Adapter = whole(architecture, "kohya")
    with pytest.raises(error) as raised:
        block_strengths(adapter, architecture, text)
    assert raised.value.hint
