"""A base's weights in an adapter's own terms: layer by layer, as the adapter names and lays them.

A base may fuse, split, reorder or turn over what an adapter has as one layer. Each layer sends a
probe through the same steps that a merge would take, a product whose elements say where they come
from; what arrives tells which rows of which tensor are the layer's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.basemodel import BaseModel, BaseTensor, elements
from loratools.deltas import DoRA, ExpertLoRA, LayerDelta, LoRA
from loratools.deltas.lora import Role
from loratools.errors import CorruptFileError, MatchError, UnsupportedError
from loratools.planning.base_names import in_base_names
from loratools.planning.placement import Placement, place_adapters
from loratools.planning.tied_embeddings import find_tie
from loratools.streaming.packed_source import PackedSource
from loratools.tensorfiles.copying import read_at
from loratools.tensorfiles.dtypes import torch_dtype
from loratools.tensorfiles.inputs import open_input

_FLOATS = ("F64", "F32", "BF16", "F16")
_BLOCK = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Some rows of a layer and where the base keeps them.

    Attributes:
        tensor: of the base.
        theirs: row numbers in the tensor, (n,), in mathematical order (out, in).
        ours: row numbers in the layer, (n,).
        columns: for each of the tensor's columns the layer's column, (in·k...,); None where they
            are the same.
        transposed: whether the tensor is stored as (in, out).
    """

    tensor: BaseTensor
    theirs: Tensor
    ours: Tensor
    columns: Tensor | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class BaseRows:
    """Where the layers of one adapter lie in one base.

    Attributes:
        pieces: module path → its pieces.
        stacks: module path of a stack of experts → the tensors that hold it.
        shapes: module path → (out, in[, k...]).
    """

    pieces: Mapping[str, Sequence[Piece]]
    stacks: Mapping[str, Sequence[BaseTensor]]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def weight(self, path: str) -> Tensor:
        """Return the layer's base weight, (out, in[, k...]), in float32."""
        shape = self.shapes[path]
        weight = torch.zeros(shape[0], elements(shape[1:]))
        for piece in self.pieces[path]:
            rows = _matrix(piece)[piece.theirs]
            if piece.columns is not None:
                rows = torch.empty_like(rows).index_copy_(1, piece.columns, rows)
            weight[piece.ours] = rows
        return weight.reshape(shape)

    def matrices(self, path: str) -> Iterator[Tensor]:
        """Yield float32 matrices that together are the layer's weight, in any order of rows."""
        for tensor in self.stacks.get(path, ()):
            whole = read_tensor(tensor)
            yield from whole if whole.dim() == 3 else (whole,)
        if path in self.pieces:
            yield self.weight(path).flatten(1)


def locate_layers(
    adapter: Adapter,
    paths: Sequence[str],
    base: BaseModel,
    arch: str | None = None,
    *,
    called: str = "the adapter",
) -> BaseRows:
    """Find where the base keeps the weights of the layers at ``paths``; nothing is read.

    ``called`` is what errors call the adapter.

    Raises:
        MatchError, UnknownArchitectureError: layers without a home; see ``place_adapters``.
        UnsupportedError: a quantised base weight.
    """
    numbers = {path: number for number, path in enumerate(paths)}
    probes: dict[str, LayerDelta] = {}
    for path, number in numbers.items():
        delta = adapter.layers[path]
        probes[path] = delta if isinstance(delta, ExpertLoRA) else _probe(delta, number)
    probing = replace(adapter, layers=probes, extras={}, notes=())
    tie = find_tie(base)
    tied = {tie.head: tie.input} if tie and tie.tied and not tie.stored else {}
    named = in_base_names(probing, base, arch)
    placed = place_adapters(base, [(named, 1.0)], names=[called], tied_heads=tied)
    pieces: dict[str, list[Piece]] = {path: [] for path in paths}
    stacks: dict[str, list[BaseTensor]] = {}
    for name, placements in placed.by_tensor.items():
        tensor = base.tensors[tied.get(name, name)]
        _refuse_quantised(tensor)
        for placement in placements:
            if placement.module in stacks or isinstance(
                adapter.layers.get(placement.module), ExpertLoRA
            ):
                stacks.setdefault(placement.module, []).append(tensor)
                continue
            for number, piece in _arrived(placement, tensor):
                pieces[paths[number]].append(piece)
    shapes = {path: adapter.layers[path].weight_shape for path in paths}
    _check_complete(pieces, stacks, shapes)
    return BaseRows(pieces, stacks, shapes)


def _probe(delta: LayerDelta, number: int) -> LoRA:
    """Return up · down with up = [number + 1, row + 1, 1] and down = [1, 1, column + 1]ᵀ."""
    out, *rest = delta.weight_shape
    columns = elements(tuple(rest))
    ones = torch.ones(out, dtype=torch.float64)
    rows = torch.arange(1, out + 1, dtype=torch.float64)
    up = torch.stack([ones * (number + 1), rows, ones], dim=1)
    wide = torch.ones(columns, dtype=torch.float64)
    counted = torch.arange(1, columns + 1, dtype=torch.float64)
    down = torch.stack([wide, wide, counted])
    shape = (3, *rest)
    return LoRA(
        down.reshape(shape), up.reshape(out, 3, *[1] * (len(rest) - 1)), 3.0, role=_role(delta)
    )


def _role(delta: LayerDelta) -> Role:
    inner = delta.inner if isinstance(delta, DoRA) else delta
    return inner.role if isinstance(inner, LoRA) else "linear"


def _arrived(placement: Placement, tensor: BaseTensor) -> Iterator[tuple[int, Piece]]:
    """Yield (layer's number, piece) for every layer whose rows a placed probe carries."""
    probe = placement.delta
    assert isinstance(probe, LoRA)
    up, down = probe.up.flatten(1), probe.down.flatten(1)
    for first in range(0, up.shape[1], 3):
        theirs = up[:, first].nonzero().flatten()
        columns = down[first + 2].round().long() - 1
        straight = torch.equal(columns, torch.arange(len(columns)))
        for number in up[theirs, first].unique():
            own = theirs[up[theirs, first] == number]
            ours = up[own, first + 1].round().long() - 1
            yield (
                int(number) - 1,
                Piece(tensor, own, ours, None if straight else columns, placement.transposed),
            )


def _check_complete(
    pieces: Mapping[str, Sequence[Piece]],
    stacks: Mapping[str, Sequence[BaseTensor]],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    for path, found in pieces.items():
        covered = sum(len(piece.ours) for piece in found)
        if path not in stacks and covered != shapes[path][0]:
            raise MatchError(
                f"{path}: the base has {covered} of its {shapes[path][0]} rows",
                hint="is this the base it was trained on?",
            )


def _refuse_quantised(tensor: BaseTensor) -> None:
    if tensor.dtype not in _FLOATS:
        raise UnsupportedError(
            f"{tensor.name}: stored as {tensor.dtype}, a quantised or integer type",
            hint="give the 16-bit original of this base",
        )


def _matrix(piece: Piece) -> Tensor:
    whole = read_tensor(piece.tensor)
    matrix = whole.flatten(1) if whole.dim() > 1 else whole.reshape(1, -1)
    return matrix.T if piece.transposed else matrix


def read_tensor(tensor: BaseTensor) -> Tensor:
    """Return a base tensor in float32, read block by block.

    Raises CorruptFileError if the file ends before it.
    """
    if tensor.values is not None:
        return tensor.values.to(torch.float32)
    if tensor.packed is not None:
        return PackedSource(tensor).read(0, elements(tensor.shape)).reshape(tensor.shape)
    assert tensor.start is not None
    dtype = torch_dtype(tensor.dtype)
    wide = torch.empty(elements(tensor.shape), dtype=torch.float32)
    raw = torch.empty(min(_BLOCK, max(len(wide), 1)), dtype=dtype)
    with open_input(tensor.file) as file:
        for start in range(0, len(wide), _BLOCK):
            part = raw[: len(wide) - start]
            view = part.view(torch.uint8).numpy().data
            if read_at(file.fileno(), view, tensor.start + start * dtype.itemsize) < len(view):
                raise CorruptFileError(
                    f"{tensor.file}: ends inside {tensor.name}", hint="was it changed meanwhile?"
                )
            wide[start : start + len(part)] = part
    return wide.reshape(tensor.shape)


def frobenius_norm(matrices: Iterator[Tensor]) -> float:
    """Return the Frobenius norm of matrices stacked."""
    return math.hypot(*(float(matrix.norm(dtype=torch.float64)) for matrix in matrices))


def spectral_norm(matrices: Iterator[Tensor], steps: int = 60) -> float:
    """Return the largest singular value of any of the matrices, to about 1 % (power iteration)."""
    return max((_largest(matrix, steps) for matrix in matrices), default=0.0)


def _largest(matrix: Tensor, steps: int) -> float:
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(matrix.shape[1], generator=generator)
    value, before = 0.0, -1.0
    for _ in range(steps):
        norm = float(vector.norm())
        if norm == 0 or abs(value - before) <= 1e-4 * value:
            break
        image = matrix @ (vector / norm)
        before, value = value, float(image.norm())
        vector = matrix.T @ image
    return value


def layer_norms(rows: BaseRows, paths: Sequence[str], kind: str) -> dict[str, float]:
    """Return ``frobenius`` or ``spectral`` norm of each layer's base weight; 1 where it is zero."""
    measure = {"frobenius": frobenius_norm, "spectral": spectral_norm}[kind]
    return {path: measure(rows.matrices(path)) or 1.0 for path in paths}
