"""The tensors of one module of a file, its alpha, and checks that name the key at fault."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from loratools.errors import MalformedAdapterError
from loratools.formats.alphas import AlphaSources, read_scalar


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


def resolve_alpha(module: Module, context: Context, rank: int) -> float:
    """Return the module's alpha, and note what is odd about it; raises MalformedAdapterError."""
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


def lora_scale(module: Module, context: Context) -> float:
    """Return alpha / rank of the module's LoRA, 1 if it has none."""
    if "down" not in module.tensors:
        return 1.0
    rank = module.tensors["down"].shape[0]
    return context.alphas.resolve(module.path, rank, module.tensors.get("alpha")) / rank


def check_matrices(module: Module, *names: str) -> None:
    """Raise MalformedAdapterError if one of the fields has fewer than two axes."""
    for name in names:
        if name in module.tensors and module.tensors[name].dim() < 2:
            shape = tuple(module.tensors[name].shape)
            raise MalformedAdapterError(f"{module.keys[name]}: shape {shape} is no matrix")


def check_equal(module: Module, first: str, axis: int, second: str, other: int) -> None:
    """Raise MalformedAdapterError unless two fields share the size of an inner axis."""
    one, two = module.tensors[first], module.tensors[second]
    if one.shape[axis] != two.shape[other]:
        raise MalformedAdapterError(
            f"ranks disagree: {module.keys[first]} is {tuple(one.shape)} and "
            f"{module.keys[second]} is {tuple(two.shape)}"
        )
