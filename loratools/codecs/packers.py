"""Coding float weights into packed schemes, some rows at a time, with fresh scales.

Bytes are those of the schemes' own tools: bitsandbytes, MLX; FP8 blocks as DeepSeek-V3's.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loratools.codecs import bnb4
from loratools.codecs.bnb4_weight import quantise_bnb4
from loratools.codecs.fp8 import quantise_fp8
from loratools.codecs.int8_rows import quantise_int8
from loratools.codecs.mlx_affine import quantise_mlx
from loratools.codecs.packed import Patch
from loratools.codecs.scheme_records import FLOAT_NAMES

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A stored tensor of a packed weight: its name behind the module's, dtype word and shape."""

    ending: str
    dtype: str
    shape: Shape


class Packer(ABC):
    """A scheme with its settings, as a frozen value."""

    scheme: ClassVar[str]
    """The scheme's name, as reports use it."""

    two_pass: ClassVar[bool] = False
    """Whether scales depend on all rows, which are shown first."""

    @abstractmethod
    def parts(self, shape: Shape, dtype: str) -> Mapping[str, Part]:
        """Return the parts of a weight (out, in) of a float type, by the part they play."""

    @abstractmethod
    def row_step(self, shape: Shape) -> int:
        """Return the number that ranges of rows must start at multiples of."""

    @abstractmethod
    def start(self, shape: Shape, dtype: str) -> Packing:
        """Return the packing of one weight."""

    def fits(self, shape: Shape) -> bool:
        """Return whether a matrix can be stored so."""
        return len(shape) == 2


class Packing(ABC):
    """One weight on its way into a packed scheme."""

    def see(self, values: Tensor, start: int) -> None:
        """Take note of rows (n, in) in float32, for a scheme of two passes."""
        raise NotImplementedError

    @abstractmethod
    def code(self, values: Tensor, start: int) -> Iterator[Patch]:
        """Yield what rows (n, in) in float32 write where."""

    def finish(self) -> Iterator[Patch]:
        """Yield what is written once, after the last rows."""
        return iter(())


# ── bitsandbytes, 4 bits ──

_NAMES = {word: name for name, word in FLOAT_NAMES.items()}
# Room for the offset of nested scales, which is only known after all rows: 9 digits are a float32.
_OFFSET_WIDTH = 16


@dataclass(frozen=True, slots=True)
class BnB4Packer(Packer):
    """NF4 or FP4; ``nested`` stores the scales in 8 bits.

    ``storage`` is the type that the codes' bytes are declared as (``bnb_4bit_quant_storage``).
    """

    scheme: ClassVar[str] = "bitsandbytes 4-bit"

    kind: str
    nested: bool = False
    blocksize: int = 64
    storage: str = "U8"

    @property
    def two_pass(self) -> bool:  # type: ignore[override]
        return self.nested

    def row_step(self, shape: Shape) -> int:
        return self.blocksize // math.gcd(self.blocksize, shape[-1])

    @property
    def _width(self) -> int:
        """Bytes of one element of the storage type."""
        return bnb4.STORAGES[self.storage]

    def fits(self, shape: Shape) -> bool:
        return len(shape) == 2 and -(-math.prod(shape) // 2) % self._width == 0

    def parts(self, shape: Shape, dtype: str) -> Mapping[str, Part]:
        count = math.prod(shape)
        scales = -(-count // self.blocksize)
        found = {
            "weight": Part(".weight", self.storage, (-(-count // 2) // self._width, 1)),
            "absmax": Part(".weight.absmax", "U8" if self.nested else "F32", (scales,)),
            "quant_map": Part(".weight.quant_map", "F32", (16,)),
        }
        if self.nested:
            outer = -(-scales // bnb4.NESTED_BLOCK)
            found["nested_absmax"] = Part(".weight.nested_absmax", "F32", (outer,))
            found["nested_quant_map"] = Part(".weight.nested_quant_map", "F32", (256,))
        ending = f".weight.quant_state.bitsandbytes__{self.kind}"
        found["state"] = Part(ending, "U8", (len(self.state(shape, dtype, 0.0)),))
        return found

    def state(self, shape: Shape, dtype: str, offset: float) -> bytes:
        """Return bitsandbytes' JSON, of one length whatever the offset."""
        words = {
            "quant_type": self.kind, "blocksize": self.blocksize, "dtype": _NAMES[dtype],
            "shape": list(shape),
        }  # fmt: skip
        if not self.nested:
            return json.dumps(words).encode()
        words |= {"nested_blocksize": bnb4.NESTED_BLOCK, "nested_dtype": "float32"}
        number = f"{offset:.9g}"
        text = f'{json.dumps(words)[:-1]}, "nested_offset": {number}}}'
        return (text + " " * (_OFFSET_WIDTH - len(number))).encode()

    def start(self, shape: Shape, dtype: str) -> Packing:
        return _BnB4Packing(self, shape, dtype)


class _BnB4Packing(Packing):
    def __init__(self, packer: BnB4Packer, shape: Shape, dtype: str) -> None:
        self.packer, self.shape, self.dtype = packer, shape, dtype
        blocks = -(-math.prod(shape) // packer.blocksize)
        self.scales = torch.empty(blocks if packer.nested else 0)

    def see(self, values: Tensor, start: int) -> None:
        flat, size = values.flatten().cpu(), self.packer.blocksize
        padded = torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)
        first = start * self.shape[-1] // size
        self.scales[first : first + len(padded)] = padded.abs().amax(1)

    def code(self, values: Tensor, start: int) -> Iterator[Patch]:
        packer, columns = self.packer, self.shape[-1]
        coded = quantise_bnb4(values.cpu(), packer.kind, packer.blocksize)
        yield Patch("weight", start * columns // 2, coded.parts["weight"])
        if not packer.nested:
            yield Patch("absmax", start * columns // packer.blocksize, coded.parts["absmax"])

    def finish(self) -> Iterator[Patch]:
        offset = 0.0
        if self.packer.nested:
            inner = bnb4.encode_scales(self.scales)
            offset = inner.offset
            yield Patch("absmax", 0, inner.codes)
            yield Patch("nested_absmax", 0, inner.absmax)
            yield Patch("nested_quant_map", 0, inner.table)
        # FP4's second zero is negative by its code, and stored without the sign.
        yield Patch("quant_map", 0, bnb4.levels(self.packer.kind) + 0.0)
        state = self.packer.state(self.shape, self.dtype, offset)
        yield Patch("state", 0, torch.frombuffer(bytearray(state), dtype=torch.uint8))


# ── 8 bits ──


@dataclass(frozen=True, slots=True)
class Int8Packer(Packer):
    """LLM.int8: one scale for each row."""

    scheme: ClassVar[str] = "bitsandbytes int8"

    def row_step(self, shape: Shape) -> int:
        return 1

    def parts(self, shape: Shape, dtype: str) -> Mapping[str, Part]:
        return {
            "weight": Part(".weight", "I8", shape),
            "SCB": Part(".SCB", "F32", shape[:1]),
            "format": Part(".weight_format", "U8", ()),
        }

    def start(self, shape: Shape, dtype: str) -> Packing:
        return _Int8Packing(shape)


class _Int8Packing(Packing):
    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def code(self, values: Tensor, start: int) -> Iterator[Patch]:
        coded = quantise_int8(values.cpu())
        yield Patch("weight", start * self.shape[-1], coded.parts["weight"])
        yield Patch("SCB", start, coded.parts["SCB"])

    def finish(self) -> Iterator[Patch]:
        # 0 stands for rows.
        yield Patch("format", 0, torch.zeros(1, dtype=torch.uint8))


@dataclass(frozen=True, slots=True)
class FP8Packer(Packer):
    """E4M3 with a float32 scale for blocks of 128×128."""

    scheme: ClassVar[str] = "fp8"

    block: tuple[int, int] = (128, 128)

    def row_step(self, shape: Shape) -> int:
        return self.block[0]

    def parts(self, shape: Shape, dtype: str) -> Mapping[str, Part]:
        blocks = tuple(-(-size // step) for size, step in zip(shape, self.block, strict=True))
        return {
            "weight": Part(".weight", "F8_E4M3", shape),
            "scale": Part(".weight_scale_inv", "F32", blocks),
        }

    def start(self, shape: Shape, dtype: str) -> Packing:
        return _FP8Packing(self, shape)


class _FP8Packing(Packing):
    def __init__(self, packer: FP8Packer, shape: Shape) -> None:
        self.packer, self.shape = packer, shape

    def code(self, values: Tensor, start: int) -> Iterator[Patch]:
        down, across = self.packer.block
        coded = quantise_fp8(values.cpu(), self.packer.block)
        yield Patch("weight", start * self.shape[-1], coded.parts["weight"])
        yield Patch("scale", start // down * -(-self.shape[-1] // across), coded.parts["scale"])


# ── MLX ──


@dataclass(frozen=True, slots=True)
class MLXPacker(Packer):
    """MLX's affine mode, scales in the weight's own float type."""

    scheme: ClassVar[str] = "mlx affine"

    bits: int = 4
    group: int = 64

    def row_step(self, shape: Shape) -> int:
        return 1

    def fits(self, shape: Shape) -> bool:
        return len(shape) == 2 and shape[-1] % self.group == 0

    def parts(self, shape: Shape, dtype: str) -> Mapping[str, Part]:
        groups = (*shape[:-1], shape[-1] // self.group)
        return {
            "weight": Part(".weight", "U32", (*shape[:-1], shape[-1] * self.bits // 32)),
            "scales": Part(".scales", dtype, groups),
            "biases": Part(".biases", dtype, groups),
        }

    def start(self, shape: Shape, dtype: str) -> Packing:
        return _MLXPacking(self, shape, {"F16": torch.float16, "BF16": torch.bfloat16}.get(dtype))


class _MLXPacking(Packing):
    def __init__(self, packer: MLXPacker, shape: Shape, dtype: torch.dtype | None) -> None:
        self.packer, self.columns = packer, shape[-1]
        self.dtype = dtype or torch.float32

    def code(self, values: Tensor, start: int) -> Iterator[Patch]:
        coded = quantise_mlx(values.cpu(), self.packer.bits, self.packer.group)
        yield Patch("weight", start * self.columns * self.packer.bits // 32, coded.parts["weight"])
        at = start * self.columns // self.packer.group
        yield Patch("scales", at, coded.parts["scales"].to(self.dtype))
        yield Patch("biases", at, coded.parts["biases"].to(self.dtype))
