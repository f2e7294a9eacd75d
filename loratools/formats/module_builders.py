"""From the fields of one module to a delta: a function for each parameterisation.

All raise MalformedAdapterError, naming the keys, for tensors that do not belong together.
"""

from __future__ import annotations

import torch

from loratools.deltas import (
    BOFT,
    IA3,
    OFT,
    FullDelta,
    GLoRA,
    LayerDelta,
    LoHa,
    LoKr,
    LoRA,
    SparseResidual,
    TuckerLoRA,
)
from loratools.errors import MalformedAdapterError
from loratools.formats.alphas import read_scalar
from loratools.formats.module_tensors import (
    Context,
    Module,
    check_equal,
    check_matrices,
    lora_scale,
    resolve_alpha,
)

SD_SCRIPTS_OFT = "oft_unet_"
"""What names begin with in a file of sd-scripts' own OFT."""


def build_lora(module: Module, context: Context) -> LayerDelta:
    """Build a LoRA, with its core if it has one (Tucker)."""
    check_matrices(module, "down", "up", "mid")
    down, up = module.tensors["down"], module.tensors["up"]
    if up.shape[2:].numel() != 1:
        raise MalformedAdapterError(
            f"{module.keys['up']}: shape {tuple(up.shape)} has a kernel, which only down may have"
        )
    mid = module.tensors.get("mid")
    if mid is not None:
        check_equal(module, "mid", 1, "down", 0)
        check_equal(module, "up", 1, "mid", 0)
        if "bias" in module.tensors:
            raise module.refuse("a bias of the up projection beside lora_mid")
        return TuckerLoRA(down, mid, up, resolve_alpha(module, context, down.shape[0]))
    check_equal(module, "up", 1, "down", 0)
    bias = module.tensors.get("bias")
    if bias is not None and bias.shape != up.shape[:1]:
        raise MalformedAdapterError(
            f"{module.keys['bias']}: {tuple(bias.shape)} for {up.shape[0]} outputs"
        )
    return LoRA(down, up, resolve_alpha(module, context, down.shape[0]), bias)


def build_embedding(module: Module, context: Context) -> LayerDelta:
    """Build a LoRA of an embedding table, as PEFT names it."""
    check_matrices(module, "embedding_down", "embedding_up")
    check_equal(module, "embedding_up", 1, "embedding_down", 0)
    down = module.tensors["embedding_down"]
    alpha = resolve_alpha(module, context, down.shape[0])
    return LoRA(down, module.tensors["embedding_up"], alpha, role="embedding")


def build_loha(module: Module, context: Context) -> LayerDelta:
    """Build LoHa, with both cores or none."""
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    check_matrices(module, *names, "hada_t1", "hada_t2")
    tucker = {"hada_t1", "hada_t2"} & module.tensors.keys()
    if len(tucker) == 1:
        raise module.refuse("one of hada_t1 and hada_t2 is missing")
    for part in ("1", "2"):
        first, second = f"hada_w{part}_a", f"hada_w{part}_b"
        if tucker:
            check_equal(module, first, 0, f"hada_t{part}", 0)
            check_equal(module, second, 0, f"hada_t{part}", 1)
        else:
            check_equal(module, first, 1, second, 0)
    w1_a, w1_b, w2_a, w2_b = (module.tensors[name] for name in names)
    _check_sides(module, tucker=bool(tucker))
    alpha = resolve_alpha(module, context, w1_b.shape[0])
    t1, t2 = module.tensors.get("hada_t1"), module.tensors.get("hada_t2")
    return LoHa(w1_a, w1_b, w2_a, w2_b, alpha, t1, t2)


def _check_sides(module: Module, *, tucker: bool) -> None:
    check_equal(module, "hada_w1_a", int(tucker), "hada_w2_a", int(tucker))
    check_equal(module, "hada_w1_a", int(not tucker), "hada_w2_a", int(not tucker))
    check_equal(module, "hada_w1_b", 1, "hada_w2_b", 1)


def build_lokr(module: Module, context: Context) -> LayerDelta:
    """Build LoKr from either spelling of each side."""
    tensors = {name: t for name, t in module.tensors.items() if name.startswith("lokr_")}
    check_matrices(module, *tensors)
    ranks = [_kron_side(module, side) for side in ("lokr_w1", "lokr_w2")]
    rank = ranks[1] or ranks[0]
    if rank is None:
        # Both sides are full: the scale is 1 and alpha only a number to carry.
        stored = module.tensors.get("alpha")
        alpha = 1.0 if stored is None else resolve_alpha(module, context, 1)
    else:
        alpha = resolve_alpha(module, context, rank)
    found = tensors.get
    first = (found("lokr_w1"), found("lokr_w1_a"), found("lokr_w1_b"))
    second = (found("lokr_w2"), found("lokr_w2_a"), found("lokr_w2_b"))
    return LoKr(alpha, *first, *second, found("lokr_t2"))


def _kron_side(module: Module, side: str) -> int | None:
    """Return the rank of one Kronecker factor, None if it is stored in full."""
    names = {name for name in module.tensors if name.startswith(side)}
    core = f"{side.replace('w', 't')}"
    if names == {side} and core not in module.tensors:
        return None
    if names != {f"{side}_a", f"{side}_b"}:
        found = ", ".join(sorted(names)) or "nothing"
        raise module.refuse(f"{side} needs either {side} or {side}_a and {side}_b, not {found}")
    if core in module.tensors:
        check_equal(module, f"{side}_a", 0, core, 0)
        check_equal(module, f"{side}_b", 0, core, 1)
    else:
        check_equal(module, f"{side}_a", 1, f"{side}_b", 0)
    return module.tensors[f"{side}_b"].shape[0]


def build_full(
    module: Module, context: Context, *, names: tuple[str, str], norm: bool
) -> LayerDelta:
    """Build the difference of a weight, of a bias or of both."""
    weight, bias = (module.tensors.get(name) for name in names)
    return FullDelta(weight, bias, norm)


def build_oft(module: Module, context: Context) -> LayerDelta:
    """Build OFT, or BOFT where the blocks come in stages."""
    blocks, rescale = module.tensors["oft_blocks"], module.tensors.get("rescale")
    if blocks.dim() not in (3, 4) or blocks.shape[-1] != blocks.shape[-2]:
        raise module.refuse(f"blocks of shape {tuple(blocks.shape)} are not square")
    stored = module.tensors.get("alpha")
    try:
        constraint = 0.0 if stored is None else read_scalar(stored)
    except MalformedAdapterError as error:
        raise module.refuse(error.message) from error
    if blocks.dim() == 4:
        return BOFT(blocks, constraint, rescale)
    if not module.path.startswith(SD_SCRIPTS_OFT):
        return OFT(blocks, constraint, rescale, "lycoris")
    if constraint == 0:
        context.notes.append(
            f"{module.path}: a constraint of 0 is read as none; sd-scripts itself would not rotate"
        )
    return OFT(blocks, constraint, rescale, "sd-scripts")


def build_glora(module: Module, context: Context) -> LayerDelta:
    """Build GLoRA from either layout; b is the additive pair and a the one applied to W."""
    check_matrices(module, "glora_a1", "glora_a2", "glora_b1", "glora_b2", "glora_bm")
    a1, a2, b1, b2 = (module.tensors[f"glora_{name}"] for name in ("a1", "a2", "b1", "b2"))
    mid = module.tensors.get("glora_bm")
    new = b1.shape[1] == (b2 if mid is None else mid).shape[0]
    new &= a1.shape[1] == a2.shape[0] and b2.shape[1] == a2.shape[1] == a1.shape[0]
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    old &= b1.shape[1] == a1.shape[1] == a2.shape[0]
    if not (new or old):
        shapes = ", ".join(str(tuple(t.shape)) for t in (a1, a2, b1, b2))
        raise module.refuse(f"a1, a2, b1, b2 of shapes {shapes} do not chain")
    if new and old:
        context.notes.append(f"{module.path}: square GLoRA, read in LyCORIS' present layout")
    if not new:
        a1, a2, b1, b2 = a2, a1, b2, b1
    return GLoRA(a1, a2, b1, b2, resolve_alpha(module, context, b2.shape[0]), mid)


def build_ia3(module: Module, context: Context) -> LayerDelta:
    """Build IA3."""
    on_input = module.tensors["on_input"]
    if on_input.numel() != 1:
        raise MalformedAdapterError(f"{module.keys['on_input']}: not one truth value")
    return IA3(module.tensors["ia3_weight"], bool(on_input.item()))


def build_sparse(module: Module, context: Context) -> LayerDelta:
    """Build the residual that LyCORIS' extraction leaves beside a LoRA."""
    indices, values = module.tensors["bias_indices"], module.tensors["bias_values"]
    size = tuple(int(extent) for extent in module.tensors["bias_size"].flatten().tolist())
    if indices.dim() != 2 or indices.shape != (len(size), values.numel()):
        raise module.refuse(
            f"indices {tuple(indices.shape)} for {values.numel()} values in {len(size)} dimensions"
        )
    limits = torch.tensor(size).unsqueeze(1)
    if bool(((indices.to(torch.int64) < 0) | (indices.to(torch.int64) >= limits)).any()):
        raise MalformedAdapterError(f"{module.keys['bias_indices']}: outside {size}")
    # Tools add the residual before they scale the sum.
    return SparseResidual(indices, values, size, lora_scale(module, context))
