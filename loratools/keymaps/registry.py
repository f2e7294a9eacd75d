"""Every architecture whose module names are known: a new one is a file of rows and a line here."""

from __future__ import annotations

from loratools.keymaps.architecture import Architecture
from loratools.keymaps.dit_anima import ANIMA
from loratools.keymaps.dit_auraflow import AURAFLOW
from loratools.keymaps.dit_flux import CHROMA, FLUX1, FLUX2, FLUX3
from loratools.keymaps.dit_hidream import HIDREAM
from loratools.keymaps.dit_hunyuan import (
    FRAMEPACK,
    HUNYUAN_IMAGE,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
)
from loratools.keymaps.dit_ideogram import ERNIE_IMAGE, IDEOGRAM4
from loratools.keymaps.dit_krea import KREA2
from loratools.keymaps.dit_ltx import LTX, LTX2
from loratools.keymaps.dit_minimax import MINIMAX_H3
from loratools.keymaps.dit_mochi import MOCHI
from loratools.keymaps.dit_pixart import PIXART, SANA, SANA_SPRINT
from loratools.keymaps.dit_qwen import QWEN_IMAGE, QWEN_IMAGE_21
from loratools.keymaps.dit_sd3 import SD3
from loratools.keymaps.dit_wan import WAN
from loratools.keymaps.dit_zimage import LUMINA2, ZIMAGE
from loratools.keymaps.unet import REFINER, SD1, SD2, SDXL

ARCHITECTURES: tuple[Architecture, ...] = (
    SD1,
    SD2,
    SDXL,
    REFINER,
    # transformers, from keymaps/dit_*.py
    FLUX1,
    CHROMA,
    FLUX2,
    FLUX3,
    SD3,
    AURAFLOW,
    ZIMAGE,
    LUMINA2,
    QWEN_IMAGE,
    QWEN_IMAGE_21,
    WAN,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_15,
    HUNYUAN_IMAGE,
    FRAMEPACK,
    ANIMA,
    LTX,
    LTX2,
    KREA2,
    IDEOGRAM4,
    ERNIE_IMAGE,
    MINIMAX_H3,
    PIXART,
    SANA,
    SANA_SPRINT,
    MOCHI,
    HIDREAM,
)
"""Relatives stand together; the order decides nothing."""
