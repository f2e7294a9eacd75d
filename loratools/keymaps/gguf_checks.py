"""Whether a base has what a GGUF adapter would change, and in which shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratools.deltas import ExpertLoRA, LoRA
from loratools.errors import MatchError, UnsupportedError
from loratools.keymaps.gguf_base import GGUFBase
from loratools.keymaps.gguf_model import GGUFModel, Step
from loratools.keymaps.gguf_names import bare_names, is_there, names_of, spell
from loratools.suggest import counted

EMBEDDING = "token_embd"
OTHER_BASE = "is this the model that the adapter was trained on?"
MERGE = "merge it into the base instead (`loratools merge`), and convert the merged model"

Home = tuple[str, Step, int | None, tuple[int, ...]]
"""A module's path, its row and block, and the shape of the weight that it changes."""

_HEAD = "output"
_SHOWN = 12


def check_modules(homes: Sequence[Home], model: GGUFModel, base: GGUFBase) -> None:
    """Raise MatchError for modules that a checkpoint, whose parameters are known, does not have."""
    if base.parameters is None:
        return
    known, names = base.named_parameters, names_of(model)
    faults = []
    for path, step, block, shape in homes:
        start = base.first_stack if step.shifts else 0
        hits = names.targets(spell(step.targets[0], block, None, start))
        if not any(is_there(hit.step, block, known) for hit in hits):
            faults.append(f"  {path}: not there")
        elif fault := _shape_fault(path, shape, base):
            faults.append(f"  {path}: {fault}")
    if faults:
        raise MatchError(
            f"{base.source} does not have {counted(len(faults), 'module')} as the adapter changes "
            "them:\n" + "\n".join(faults[:_SHOWN]),
            hint=OTHER_BASE,
        )


def _shape_fault(path: str, ours: tuple[int, ...], base: GGUFBase) -> str:
    known = base.named_parameters
    shape = next((known[name] for name in bare_names(path) if name in known), None)
    # Stored (in, out) or (out, in): a Conv1D, an embedding, experts.
    if shape is None or len(shape) != len(ours) or sorted(shape) == sorted(ours):
        return ""
    return f"{tuple(shape)} in the base, {tuple(ours)} adapted"


def fitted_to_base(
    layers: Mapping[str, LoRA | ExpertLoRA], base: GGUFBase
) -> dict[str, LoRA | ExpertLoRA]:
    """Return the layers in the base's shapes; raises MatchError for what it does not have."""
    done = {name: _as_embedding(name, layer) for name, layer in layers.items()}
    if base.tensors is None:
        return done
    missing = [name for name in done if f"{name}.weight" not in base.tensors]
    missing = [name for name in missing if name != _HEAD]
    if missing:
        shown = "\n".join(f"  {name}.weight" for name in missing[:_SHOWN])
        raise MatchError(
            f"{base.source} lacks {counted(len(missing), 'tensor')} that the adapter changes:\n"
            f"{shown}",
            hint=OTHER_BASE,
        )
    wrong = []
    for name, layer in done.items():
        shape = base.tensors.get(f"{name}.weight")
        ours = layer.weight_shape[::-1] if name == EMBEDDING else layer.weight_shape
        if shape is not None and tuple(shape) != tuple(ours):
            wrong.append(f"  {name}.weight: {tuple(shape)} in the base, {tuple(ours)} adapted")
    if wrong:
        raise MatchError(
            f"{base.source}: {counted(len(wrong), 'tensor has', 'tensors have')} another shape:\n"
            + "\n".join(wrong[:_SHOWN]),
            hint=OTHER_BASE,
        )
    return done


def _as_embedding(name: str, layer: LoRA | ExpertLoRA) -> LoRA | ExpertLoRA:
    """Return the table's change in an embedding's own orientation, (dimension, tokens)."""
    if name != EMBEDDING or not isinstance(layer, LoRA) or layer.role == "embedding":
        return layer
    return replace(layer, down=layer.up.mT, up=layer.down.mT, role="embedding")


def refuse_tied_embeddings(
    layers: Mapping[str, LoRA | ExpertLoRA], model: GGUFModel, base: GGUFBase
) -> None:
    """Raise UnsupportedError for an embedding or head that is one tensor with the other."""
    touched = [name for name in (EMBEDDING, _HEAD) if name in layers]
    if not touched or not base.is_tied(model):
        return
    what = " and ".join("the embedding" if name == EMBEDDING else "the head" for name in touched)
    raise UnsupportedError(
        f"the adapter changes {what}, which {base.source} keeps in one tensor: llama.cpp refuses "
        "such an adapter or aborts",
        hint=MERGE,
    )
