"""Renaming and back is the identity in ΔW, for every architecture and random parts of it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.keymaps.architecture import Architecture
from loratools.keymaps.registry import ARCHITECTURES
from loratools.keymaps.translate import translate
from tests.keymap_cases import adapters, assert_same

every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.id)


@every_architecture
@settings(max_examples=15)
@given(data=st.data())
def test_round_trips_keep_every_change(arch: Architecture, data: st.DataObject) -> None:
    adapter = data.draw(adapters(arch))
    for naming in ("original", "kohya", "comfyui"):
        there = translate(adapter, arch, naming)
        back = translate(there, arch, "diffusers")
        assert back.naming == "diffusers"
        assert_same(back, adapter)
        assert_same(translate(back, arch, naming), there)


@every_architecture
@settings(max_examples=5)
@given(data=st.data())
def test_a_naming_is_its_own_translation(arch: Architecture, data: st.DataObject) -> None:
    adapter = data.draw(adapters(arch))
    for naming in ("diffusers", "original", "kohya", "comfyui"):
        once = translate(adapter, arch, naming)
        again = translate(once, arch, naming)
        assert list(again.layers) == list(once.layers)
        # Not only the same change: the same factors, untouched.
        assert all(delta is once.layers[path] for path, delta in again.layers.items())
