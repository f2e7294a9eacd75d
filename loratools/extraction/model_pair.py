"""Two checkpoints of one model side by side: which tensor of one is which of the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from loratools.basemodel import BaseModel, BaseTensor, Pipeline
from loratools.codecs.scheme_floats import CAST
from loratools.errors import MatchError, UnsupportedError
from loratools.keymaps.names import NameIndex
from loratools.planning.tied_embeddings import find_tie

_PACKED = ("U8", "I8", "I32", "U32", "F4", "F8_E8M0")
_BUFFERS = (
    ".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq", "position_ids", "token_type_ids",
    "num_batches_tracked", "_float_tensor",
)  # fmt: skip
"""Buffers that some versions of transformers store and others do not."""

_SCALES = (
    ".weight_scale", ".weight_scale_inv", ".scale_weight", ".scale_input", ".qweight", ".qzeros",
    ".g_idx", ".absmax", ".quant_map", ".SCB", "scaled_fp8",
)  # fmt: skip
"""What quantised checkpoints keep beside their weights."""

_SHOWN = 6


@dataclass(frozen=True, slots=True, eq=False)
class TensorPair:
    """One tensor in both checkpoints.

    Attributes:
        component: the network of a pipeline, or the empty text.
        name: what the base calls the tensor.
        base: where the base keeps it.
        tuned: where the other keeps it; of the same shape.
    """

    component: str
    name: str
    base: BaseTensor
    tuned: BaseTensor

    @property
    def full_name(self) -> str:
        """The name, behind that of its network."""
        return f"{self.component}.{self.name}" if self.component else self.name

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""
        return self.base.shape


@dataclass(frozen=True, slots=True, eq=False)
class ModelPair:
    """Two checkpoints, matched.

    Attributes:
        base: the network's checkpoint (each network's of a pipeline) by component.
        tuned: the other's.
        pairs: every tensor that both have.
        notes: what was found odd and passed over.
    """

    base: Mapping[str, BaseModel]
    tuned: Mapping[str, BaseModel]
    pairs: tuple[TensorPair, ...]
    notes: tuple[str, ...]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape by full name."""
        return {pair.full_name: pair.shape for pair in self.pairs}


Opened = BaseModel | Pipeline


def pair_models(base: Opened, tuned: Opened) -> ModelPair:
    """Match the tensors of two checkpoints by name.

    Names may differ by a prefix that a version of transformers writes; a head that one keeps tied
    is the table it shares. Networks that only one pipeline has are an error.

    Raises:
        MatchError: tensors that only one has, or of two shapes; the first are named.
        UnsupportedError: a pipeline and a single model, or quantised weights.
    """
    ours, theirs = networks(base), networks(tuned)
    if ours.keys() != theirs.keys():
        raise _different(
            base,
            tuned,
            [f"networks: {', '.join(filter(None, found)) or 'one'}" for found in (ours, theirs)],
        )
    pairs: list[TensorPair] = []
    notes: list[str] = []
    for model in (*ours.values(), *theirs.values()):
        refuse_quantised(model)
        notes += _cast_notes(model)
    ours, theirs = ({n: _as_numbers(m) for n, m in found.items()} for found in (ours, theirs))
    for component, model in ours.items():
        matched = _Matching(component, model, theirs[component])
        matched.refuse_strangers()
        pairs += matched.pairs
        notes += matched.notes
    return ModelPair(ours, theirs, tuple(pairs), tuple(notes))


def networks(opened: Opened) -> Mapping[str, BaseModel]:
    """Return the networks by name; the empty name for a model by itself."""
    return opened.components if isinstance(opened, Pipeline) else {"": opened}


def refuse_quantised(model: BaseModel) -> None:
    """Raise UnsupportedError if the checkpoint's stored numbers are not its weights."""
    scheme = model.config_word("quantization_config")
    packed = {weight.packed.scheme for weight in model.packed if weight.packed} - {CAST}
    if packed and not scheme:
        raise _quantised(model, f"quantised ({min(packed)})")
    if scheme:
        word = scheme.get("quant_method", "unknown") if isinstance(scheme, Mapping) else scheme
        raise _quantised(model, f"quantised ({word})")
    scales = [name for name in model.tensors if name.endswith(_SCALES)]
    if scales:
        raise _quantised(model, f"quantised ({scales[0]} is beside its weights)")
    for name, tensor in model.tensors.items():
        if tensor.dtype in _PACKED and len(tensor.shape) > 1 and not name.endswith(_BUFFERS):
            raise _quantised(model, f"quantised ({name} is {tensor.dtype})")


def _as_numbers(model: BaseModel) -> BaseModel:
    """Return the model with tensors that were cast to float8 as the plain numbers they are."""
    return replace(model, packed=())


def _cast_notes(model: BaseModel) -> Iterator[str]:
    if model.packed:
        yield (
            f"{model.path}: {len(model.packed)} tensors are float8 without scales, taken at their "
            "values; what the cast to float8 rounded off is in the difference"
        )


def _quantised(model: BaseModel, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"{model.path}: {what}, so its stored numbers are not weights that could be subtracted",
        hint="give the 16-bit original, or dequantise it first",
    )


class _Matching:
    """The tensors of one network, matched."""

    def __init__(self, component: str, base: BaseModel, tuned: BaseModel) -> None:
        self.component, self.base, self.tuned = component, base, tuned
        self.pairs: list[TensorPair] = []
        self.notes: list[str] = []
        self.missing: list[str] = []
        self.shapes: list[str] = []
        left = dict(tuned.tensors)
        index = NameIndex(tuned.tensors)
        unmatched = []
        # Those of the same name first: another prefix must not take what is somebody's own.
        for name in sorted(base.tensors, key=lambda name: name not in left):
            found = index.find(name)
            if len(found) == 1 and found[0] in left:
                self._add(name, base.tensors[name], left.pop(found[0]))
            else:
                unmatched.append(name)
        self._ties(unmatched, left)
        self.extra = [name for name in left if not self._is_buffer(name)]
        self.missing = [name for name in unmatched if not self._is_buffer(name)]

    def _add(self, name: str, ours: BaseTensor, theirs: BaseTensor) -> None:
        if ours.shape != theirs.shape:
            self.shapes.append(f"{name}: {_shape(ours)} and {_shape(theirs)}")
        else:
            self.pairs.append(TensorPair(self.component, name, ours, theirs))

    def _ties(self, unmatched: list[str], left: dict[str, BaseTensor]) -> None:
        """Match a head that only one stores with the table that the other shares it with."""
        for name, model, other in (
            *((n, self.tuned, self.base.tensors) for n in list(unmatched)),
            *((n, self.base, self.tuned.tensors) for n in list(left)),
        ):
            tie = find_tie(model)
            if tie is None or not tie.tied or tie.stored or tie.head != name:
                continue
            stored, table = other[name], model.tensors[tie.input]
            ours, theirs = (stored, table) if model is self.tuned else (table, stored)
            self._add(name, ours, theirs)
            self.notes.append(f"{model.path}: {name} is tied to {tie.input}")
            unmatched[:] = [other_name for other_name in unmatched if other_name != name]
            left.pop(name, None)

    def _is_buffer(self, name: str) -> bool:
        if not name.endswith(_BUFFERS):
            return False
        self.notes.append(f"{name}: a buffer that only one of the models stores; passed over")
        return True

    def refuse_strangers(self) -> None:
        """Raise MatchError where the checkpoints are of different models."""
        lines = [
            *self.shapes,
            *(f"{name}: only in {self.base.path}" for name in self.missing),
            *(f"{name}: only in {self.tuned.path}" for name in self.extra),
        ]
        if lines:
            raise _different(self.base, self.tuned, lines)


def _shape(tensor: BaseTensor) -> str:
    return "x".join(map(str, tensor.shape)) or "scalar"


def _different(one: Opened, other: Opened, lines: Sequence[str]) -> MatchError:
    shown = [f"  {line}" for line in lines[:_SHOWN]]
    shown += [f"  ... and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return MatchError(
        f"{one.path} and {other.path} are not two versions of one model:\n" + "\n".join(shown),
        hint="give the base that the other was trained from",
    )
