"""From the fields of one module to its delta, one function for each parameterisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from loratools.deltas import (
    BOFT,
    IA3,
    OFT,
    AdditiveDelta,
    DoRA,
    FullDelta,
    GLoRA,
    LayerDelta,
    LoHa,
    LoKr,
    LoRA,
    SparseResidual,
    SumDelta,
    TuckerLoRA,
)
from loratools.errors import MalformedAdapterError, UnsupportedError
from loratools.formats.alphas import AlphaSources, read_scalar

SD_SCRIPTS_OFT = "oft_unet_"
"""What names begin with in a file of sd-scripts' own OFT."""


@dataclass(slots=True)
class Module:
    """The tensors of one module by field, and the keys that they came under."""

    path: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def refuse(self, fault: str) -> MalformedAdapterError:
        """Return the error that names this module's first key."""
        return MalformedAdapterError(f"{next(iter(self.keys.values()))}: {fault}")


@dataclass(slots=True)
class Context:
    """What the tensors alone do not say, and what is worth saying about them."""

    alphas: AlphaSources
    notes: list[str] = field(default_factory=list)
    without_alpha: int = 0


Builder = Callable[[Module, Context], LayerDelta]


@dataclass(frozen=True, slots=True)
class Family:
    """The fields that make one parameterisation.

    Attributes:
        fields: all that it may have.
        required: those that it must have once it has any.
        build: makes the delta.
    """

    fields: frozenset[str]
    required: frozenset[str]
    build: Builder


def build_delta(module: Module, context: Context) -> LayerDelta | None:
    """Return the module's delta, or None if its tensors make none (replacements only).

    Raises:
        MalformedAdapterError: tensors that do not belong together.
        UnsupportedError: T-LoRA, or a rank that is chosen when prompting.
    """
    _refuse_unsupported(module)
    present = [family for family in FAMILIES if family.fields & module.tensors.keys()]
    for family in present:
        _check_complete(module, family)
    empty = [module.keys[name] for name, tensor in module.tensors.items() if not tensor.numel()]
    if empty:
        raise module.refuse(f"empty tensors: {', '.join(empty)}")
    parts = [family.build(module, context) for family in present]
    if not parts:
        _check_nothing(module)
        return None
    if {"diff", "w_norm"} & module.tensors.keys() and len(present) == 1:
        _note_useless_alpha(module, context)
    return _with_magnitude(module, _joined(module, parts))


def _refuse_unsupported(module: Module) -> None:
    if module.tensors.keys() & {"tlora", "tlora_p", "tlora_lambda"}:
        raise UnsupportedError(
            f"{module.path}: T-LoRA changes with the time step, so no fixed weight equals it",
            hint="use it in the tool that trained it",
        )
    if "dyn_dim" in module.tensors:
        raise UnsupportedError(
            f"{module.path}: dyn_dim asks for a rank that is chosen when prompting",
            hint="cut the adapter to that rank with resize, and remove dyn_dim",
        )


def _check_complete(module: Module, family: Family) -> None:
    missing = sorted(family.required - module.tensors.keys())
    if missing:
        here = ", ".join(key for name, key in module.keys.items() if name in family.fields)
        names = ", ".join(_SHOWN.get(name, name) for name in missing)
        raise MalformedAdapterError(f"{here}: no {names} beside it")


_SHOWN = {"up": "up (lora_up, lora_B)", "down": "down (lora_down, lora_A)"}


def _check_nothing(module: Module) -> None:
    loose = module.tensors.keys() - {"set_weight", "reshape_weight"}
    if loose:
        raise module.refuse("belongs to no factors")


def _note_useless_alpha(module: Module, context: Context) -> None:
    if "alpha" in module.tensors:
        context.notes.append(f"{module.path}: alpha has no meaning beside a full difference")


def _joined(module: Module, parts: list[LayerDelta]) -> LayerDelta:
    if len(parts) == 1:
        return parts[0]
    additive = tuple(part for part in parts if isinstance(part, AdditiveDelta))
    if len(additive) < len(parts):
        kinds = ", ".join(part.kind for part in parts)
        raise module.refuse(f"mixes parameterisations that have no sum ({kinds})")
    return SumDelta(additive)


# ── alpha ────────────────────────────────────────────────────────────────────────────────────


def _alpha(module: Module, context: Context, rank: int) -> float:
    stored = module.tensors.get("alpha")
    scale = module.tensors.get("scale")
    try:
        alpha = context.alphas.resolve(module.path, rank, stored)
        if scale is not None:
            alpha = _from_scale(module, read_scalar(scale) * rank, alpha, stored)
    except MalformedAdapterError as error:
        shown = error.message.removeprefix(f"{module.path}: ")
        raise MalformedAdapterError(f"{module.path}: {shown}", error.hint) from error
    if stored is None and scale is None and not context.alphas.stated(module.path, rank):
        context.without_alpha += 1
    if alpha == 0:
        context.notes.append(
            f"{module.path}: alpha is 0, so it changes nothing (sd-scripts would use its rank)"
        )
    return alpha


def _from_scale(module: Module, wanted: float, alpha: float, stored: Tensor | None) -> float:
    """Return the alpha that A1111's ``scale``, which replaces alpha / rank, stands for."""
    if stored is not None and abs(wanted - alpha) > 1e-6 * max(abs(wanted), abs(alpha)):
        raise module.refuse(f"scale means alpha {wanted:g}, but alpha says {alpha:g}")
    return wanted


# ── one function for each parameterisation ───────────────────────────────────────────────────


def _check_matrices(module: Module, *names: str) -> None:
    for name in names:
        if name in module.tensors and module.tensors[name].dim() < 2:
            shape = tuple(module.tensors[name].shape)
            raise MalformedAdapterError(f"{module.keys[name]}: shape {shape} is no matrix")


def _check_equal(module: Module, first: str, axis: int, second: str, other: int) -> None:
    """Raise MalformedAdapterError unless two fields share the size of an inner axis."""
    one, two = module.tensors[first], module.tensors[second]
    if one.shape[axis] != two.shape[other]:
        raise MalformedAdapterError(
            f"ranks disagree: {module.keys[first]} is {tuple(one.shape)} and "
            f"{module.keys[second]} is {tuple(two.shape)}"
        )


def _lora(module: Module, context: Context) -> LayerDelta:
    _check_matrices(module, "down", "up", "mid")
    down, up = module.tensors["down"], module.tensors["up"]
    if up.shape[2:].numel() != 1:
        raise MalformedAdapterError(
            f"{module.keys['up']}: shape {tuple(up.shape)} has a kernel, which only down may have"
        )
    mid = module.tensors.get("mid")
    if mid is not None:
        _check_equal(module, "mid", 1, "down", 0)
        _check_equal(module, "up", 1, "mid", 0)
        if "bias" in module.tensors:
            raise module.refuse("a bias of the up projection beside lora_mid")
        return TuckerLoRA(down, mid, up, _alpha(module, context, down.shape[0]))
    _check_equal(module, "up", 1, "down", 0)
    bias = module.tensors.get("bias")
    if bias is not None and bias.shape != up.shape[:1]:
        raise MalformedAdapterError(
            f"{module.keys['bias']}: {tuple(bias.shape)} for {up.shape[0]} outputs"
        )
    return LoRA(down, up, _alpha(module, context, down.shape[0]), bias)


def _embedding(module: Module, context: Context) -> LayerDelta:
    _check_matrices(module, "embedding_down", "embedding_up")
    _check_equal(module, "embedding_up", 1, "embedding_down", 0)
    down = module.tensors["embedding_down"]
    alpha = _alpha(module, context, down.shape[0])
    return LoRA(down, module.tensors["embedding_up"], alpha, role="embedding")


def _loha(module: Module, context: Context) -> LayerDelta:
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    _check_matrices(module, *names, "hada_t1", "hada_t2")
    tucker = {"hada_t1", "hada_t2"} & module.tensors.keys()
    if len(tucker) == 1:
        raise module.refuse("one of hada_t1 and hada_t2 is missing")
    for part in ("1", "2"):
        first, second = f"hada_w{part}_a", f"hada_w{part}_b"
        if tucker:
            _check_equal(module, first, 0, f"hada_t{part}", 0)
            _check_equal(module, second, 0, f"hada_t{part}", 1)
        else:
            _check_equal(module, first, 1, second, 0)
    w1_a, w1_b, w2_a, w2_b = (module.tensors[name] for name in names)
    _check_sides(module, tucker=bool(tucker))
    alpha = _alpha(module, context, w1_b.shape[0])
    t1, t2 = module.tensors.get("hada_t1"), module.tensors.get("hada_t2")
    return LoHa(w1_a, w1_b, w2_a, w2_b, alpha, t1, t2)


def _check_sides(module: Module, *, tucker: bool) -> None:
    _check_equal(module, "hada_w1_a", int(tucker), "hada_w2_a", int(tucker))
    _check_equal(module, "hada_w1_a", int(not tucker), "hada_w2_a", int(not tucker))
    _check_equal(module, "hada_w1_b", 1, "hada_w2_b", 1)


def _lokr(module: Module, context: Context) -> LayerDelta:
    tensors = {name: t for name, t in module.tensors.items() if name.startswith("lokr_")}
    _check_matrices(module, *tensors)
    ranks = [_kron_side(module, side) for side in ("lokr_w1", "lokr_w2")]
    rank = ranks[1] or ranks[0]
    if rank is None:
        # Both sides are full: the scale is 1 and alpha only a number to carry.
        stored = module.tensors.get("alpha")
        alpha = 1.0 if stored is None else _alpha(module, context, 1)
    else:
        alpha = _alpha(module, context, rank)
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
        _check_equal(module, f"{side}_a", 0, core, 0)
        _check_equal(module, f"{side}_b", 0, core, 1)
    else:
        _check_equal(module, f"{side}_a", 1, f"{side}_b", 0)
    return module.tensors[f"{side}_b"].shape[0]


def _full(module: Module, context: Context, *, names: tuple[str, str], norm: bool) -> LayerDelta:
    weight, bias = (module.tensors.get(name) for name in names)
    return FullDelta(weight, bias, norm)


def _oft(module: Module, context: Context) -> LayerDelta:
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


def _glora(module: Module, context: Context) -> LayerDelta:
    """Build GLoRA from either layout; b is the additive pair and a the one applied to W."""
    _check_matrices(module, "glora_a1", "glora_a2", "glora_b1", "glora_b2", "glora_bm")
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
    return GLoRA(a1, a2, b1, b2, _alpha(module, context, b2.shape[0]), mid)


def _ia3(module: Module, context: Context) -> LayerDelta:
    on_input = module.tensors["on_input"]
    if on_input.numel() != 1:
        raise MalformedAdapterError(f"{module.keys['on_input']}: not one truth value")
    return IA3(module.tensors["ia3_weight"], bool(on_input.item()))


def _sparse(module: Module, context: Context) -> LayerDelta:
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
    return SparseResidual(indices, values, size, _lora_scale(module, context))


def _lora_scale(module: Module, context: Context) -> float:
    if "down" not in module.tensors:
        return 1.0
    rank = module.tensors["down"].shape[0]
    return context.alphas.resolve(module.path, rank, module.tensors.get("alpha")) / rank


# ── DoRA ─────────────────────────────────────────────────────────────────────────────────────


def _with_magnitude(module: Module, delta: LayerDelta) -> LayerDelta:
    named = {"magnitude", "peft_magnitude"} & module.tensors.keys()
    if not named:
        return delta
    if len(named) == 2:
        raise module.refuse("two magnitudes (dora_scale and lora_magnitude_vector)")
    if not isinstance(delta, AdditiveDelta):
        raise module.refuse(f"a magnitude beside {delta.kind}")
    (name,) = named
    magnitude = module.tensors[name]
    out, inner = delta.weight_shape[:2]
    # Factors that flatten a kernel do not tell how many axes the magnitude had: it keeps them.
    flattened = magnitude.dim() > len(delta.weight_shape)
    lengths = magnitude if flattened else magnitude.flatten()
    if name == "peft_magnitude" and magnitude.numel() == out:
        return DoRA(delta, magnitude.flatten(), "out")
    if _is_column(magnitude, out):
        return DoRA(delta, lengths, "out")
    if name == "magnitude" and _is_row(magnitude) and inner % magnitude.shape[1] == 0:
        return DoRA(delta, lengths, "in")
    raise MalformedAdapterError(
        f"{module.keys[name]}: shape {tuple(magnitude.shape)} is neither one length for each of "
        f"{out} outputs nor one for each of {inner} inputs"
    )


def _is_column(magnitude: Tensor, out: int) -> bool:
    return magnitude.dim() >= 1 and magnitude.shape[0] == out == magnitude.numel()


def _is_row(magnitude: Tensor) -> bool:
    return magnitude.dim() >= 2 and magnitude.numel() == magnitude.shape[1]


def _family(build: Builder, required: str, optional: str = "") -> Family:
    needed = frozenset(required.split())
    return Family(needed | frozenset(optional.split()), needed, build)


FAMILIES: tuple[Family, ...] = (
    _family(_lora, "down up", "mid bias"),
    _family(_embedding, "embedding_down embedding_up"),
    _family(_loha, "hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "hada_t1 hada_t2"),
    Family(
        frozenset({f"lokr_w{n}{side}" for n in "12" for side in ("", "_a", "_b")} | {"lokr_t2"}),
        frozenset(),
        _lokr,
    ),
    _family(_glora, "glora_a1 glora_a2 glora_b1 glora_b2", "glora_bm"),
    _family(_oft, "oft_blocks", "rescale"),
    _family(_ia3, "ia3_weight on_input"),
    _family(_sparse, "bias_indices bias_values bias_size"),
    _family(partial(_full, names=("diff", "diff_b"), norm=False), "", "diff diff_b"),
    _family(partial(_full, names=("w_norm", "b_norm"), norm=True), "", "w_norm b_norm"),
)
"""Every parameterisation that tensors can make; a module may have several, which are summed."""
