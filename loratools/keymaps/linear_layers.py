"""Which tensors of a transformers model are linear layers' weights, and which of those stay float.

transformers' quantisers replace modules whose class is ``nn.Linear`` or ``Conv1D`` itself, but for
tied and output heads, the last parameter's module and what a class keeps in float32
(``quantizers/base.py``, ``integrations/bitsandbytes.py`` of 5.23). A checkpoint names tensors and
no classes; these rows say the same by name. Their oracle is ``tests/peers/test_linear_layers.py``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from loratools.keymaps.transformers_rows import CONV1D_LEAVES, CONV1D_TYPES, PREFIXES, TIED

_LINEAR_LEAVES = (
    r"patch_embed(ding)?", r"\w*(project|_dense|_linear_|transformation|mapping|relative_pos)\w*",
    r"xpath_unitseq\w*|inner\d*emb", r"vision_embed_tokens", r"(enc_out_)?class_embed",
    r"embed_(out|action|return|state)", r"predictor_embeddings",
)  # fmt: skip
"""Names with ``embed`` in them that are linear layers even so."""

_TABLE = re.compile(
    rf"(?!(?:{'|'.join(_LINEAR_LEAVES)})$)\w*embed\w*"
    r"|wte|wpe|shared|relative_attention_bias|codebook|pe_k|freq_emb|bias_values|query_feat"
    r"|\w*pos_emb|segment_emb|reference_points|queries_features"
    r"|(iou|obj_score|presence|hq|mask|audio_bos_eos)_tokens?|HashBucketCodepointEmbedder_\d+",
    re.IGNORECASE,
)
"""The last word of a table, whose rows are looked up."""

_ROUTER = re.compile(r"(^|\.)(gate|router)(\.\w+)?$")
_EXPERT = re.compile(r"\.experts\.")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out|patcher\.lm_head|audio_lm_head)$")
_TIED_HEADS = frozenset(head for head, _ in TIED)
# The last parameter's module is left; where it has a bias, the parameter is that.
_BARE_HEAD = re.compile(r"(^|\.)(score|classifier|qa_outputs)$")

FLOAT_OF_TYPE: Mapping[str, str] = {
    # kept in float32 by the class
    **dict.fromkeys(("t5", "mt5", "umt5", "udop", "pop2piano"), r"\.wo$"),
    **dict.fromkeys(
        ("deepseek_v32", "glm_moe_dsa", "axk2", "mistral_large4", "mistral_large4_text"),
        r"indexer\.weights_proj$",
    ),
    "deepseek_v4": r"compressor\.(indexer\.)?(gate|kv|scorer\.weights)_proj$|o_a_proj$",
    "blip-2": r"(^|\.)qformer\.",
    # classes of their own, derived from nn.Linear
    "falcon": r"\.(self_attention|mlp)\.",
    "ibert": r"\.layer\.\d+\..*\.(query|key|value|dense)$",
    "ctrl": r"(^|\.)w$",
    # shared between layers
    "zamba": r"shared_transf|\.(self_attn|feed_forward)\.",
    "zamba2": r"shared_transf|\.(self_attn|feed_forward)\.|_adapter_list\.",
}
"""``model_type`` → modules that are float whatever the quantiser is told."""

HEAD_OF_TYPE: Mapping[str, str] = {
    "rwkv": r"^head$",
    "git": r"^output$",
    "fsmt": r"output_projection$",
    "ultrabert": r"^head\.decoder$",
    "mobilebert": r"predictions\.dense$",
    **dict.fromkeys(
        ("embedding_gemma2", "embedding_gemma2_text", "neomme"), r"(^|\.)embedding_projection$"
    ),
    # the last parameter
    **dict.fromkeys(
        (
            "clip", "clipseg", "chinese_clip", "altclip", "aimv2", "blip", "metaclip_2", "owlvit",
            "owlv2", "vision-text-dual-encoder",
        ),
        r"^text_projection$",
    ),
    "splinter": r"end_classifier$",
    "voxtral_realtime": r"multi_modal_projector\.linear_2$",
    "gemma3n_text": r"^model\.altup_unembed_projections\.2$",
}  # fmt: skip
"""``model_type`` → modules that stay float unless a list says which do, beside ``lm_head``."""

CODED_OF_TYPE: Mapping[str, str] = {
    "afmoe": r"router\.gate$",
    **dict.fromkeys(
        ("switch_transformers", "nllb-moe"), r"router\.classifier$|experts\.expert_\d+\."
    ),
    "longcat_flash": r"router\.classifier$",
    "jetmoe": r"router\.layer$",
    "zaya": r"gate\.down_proj$",
    **dict.fromkeys(("d_fine", "deimv2"), r"gateway\.gate$"),
    "bark": r"(coarse_acoustics|semantic)\.lm_head$",
    "clvp": r"speech_decoder_model\.lm_head$",
    "nemotron_h_omni": r"language_model\.lm_head$",
}
"""``model_type`` → modules that are coded although the general rules would leave them."""


class LinearLayers:
    """The rules for one checkpoint."""

    def __init__(self, model_types: Collection[str], names: Collection[str]) -> None:
        """Take the config's ``model_type``, its sections' too, and the tensors' names."""
        self._names = names
        self._float, self._heads, self._coded = (
            [table[kind] for kind in model_types if kind in table]
            for table in (FLOAT_OF_TYPE, HEAD_OF_TYPE, CODED_OF_TYPE)
        )
        self._conv1d = not CONV1D_TYPES.isdisjoint(model_types)

    def is_linear(self, name: str) -> bool:
        """Return whether a matrix of this name is a layer's weight, and no table of rows."""
        module = name.removesuffix(".weight")
        # Members of a list have numbers.
        leaf = re.sub(r"(\.\d+)+$", "", module).rpartition(".")[2]
        return module != name and not _TABLE.fullmatch(leaf)

    def is_coded(
        self, name: str, skip: Collection[str] | None = None, *, experts: bool = False
    ) -> bool:
        """Return whether transformers' quantisers take a layer.

        Args:
            name: of its weight.
            skip: the modules that the quantiser is told to leave; None for those that it leaves by
                itself, which are output heads.
            experts: whether experts that are stored one by one are taken, which transformers'
                models hold as one parameter.
        """
        if not self.is_linear(name):
            return False
        module = name.removesuffix(".weight")
        if not _any(self._coded, module):
            if self._is_float(module, experts=experts):
                return False
            if skip is None:
                return not self.is_head(module)
        return not any(is_skipped(spelling, skip or ()) for spelling in spellings(module))

    def is_turned(self, name: str) -> bool:
        """Return whether the layer is stored as (in, out)."""
        leaf = name.removesuffix(".weight").rpartition(".")[2]
        return self._conv1d and leaf in CONV1D_LEAVES

    def is_head(self, module: str) -> bool:
        """Return whether a module is an output head, or else left without being told."""
        if _HEAD.search(module) or module in _TIED_HEADS or _any(self._heads, module):
            return True
        return bool(_BARE_HEAD.search(module)) and f"{module}.bias" not in self._names

    def _is_float(self, module: str, *, experts: bool) -> bool:
        """Return whether a module is no ``nn.Linear``, or kept in float32 in this type of model."""
        if _ROUTER.search(module) or (_EXPERT.search(module) and not experts):
            return True
        # nn.MultiheadAttention's projection has a class of its own.
        owner = module.removesuffix(".out_proj")
        if owner != module and f"{owner}.in_proj_weight" in self._names:
            return True
        return _any(self._float, module)


def _any(patterns: Iterable[str], module: str) -> bool:
    return any(re.search(pattern, module) for pattern in patterns)


def is_skipped(module: str, words: Collection[str]) -> bool:
    """Return whether a list of modules to leave alone names this one, as transformers reads it.

    A word is the beginning of a name up to a dot, a regular expression for one, or an ending.
    """
    return any(
        module.endswith(word) or re.match(rf"(?:{word})(?:(?<=\.)|(?=\.|$))", module)
        for word in words
    )


def spellings(module: str) -> Iterator[str]:
    """Yield a module's name on disk, and those that it may have in memory."""
    yield module
    for one, other in PREFIXES:
        for here, there in ((one, other), (other, one)):
            if f"{module}.".startswith(here):
                yield (there + f"{module}."[len(here) :]).removesuffix(".")
