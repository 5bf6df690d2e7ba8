"""GGUF's block types as data: how many columns a block has, in how many bytes, and what its codes stand for.

Source: llama.cpp's ggml-common.h; `blocks` has the layout of each and the arithmetic.
"""

from dataclasses import dataclass
from typing import Any

IQ4_TABLE = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4_TABLE = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice E2M1's numbers: ggml halves the scale


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockType:
    """One of ggml's types for weights.

    Attributes:
        name: as ggml spells it.
        number: in a file.
        columns: of a block.
        size: bytes of a block.
        bits: of a code.
        group: columns that share a scale.
        zero: what a stored code is too large by.
        scale_bits: of a group's integer scale; 0 where d is the group's scale.
        scale_zero: what a stored integer scale is too large by.
        minimum: groups have one.
        table: what codes stand for; None where they are integers.
    """

    name: str
    number: int
    columns: int
    size: int
    bits: int
    group: int
    zero: int = 0
    scale_bits: int = 0
    scale_zero: int = 0
    minimum: bool = False
    table: tuple[int, ...] | None = None

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row.

        Raises:
            ValueError: it is not a whole number of blocks.
        """
        if columns % self.columns:
            raise ValueError(f"{columns} columns are no whole number of {self.name}'s blocks of {self.columns}.")
        return columns // self.columns * self.size

    @property
    def bits_per_weight(self) -> float:
        """Bits that a weight takes in all."""
        return 8 * self.size / self.columns


def _type(name: str, number: int, columns: int, size: int, bits: int, group: int, **more: Any) -> BlockType:
    return BlockType(name=name, number=number, columns=columns, size=size, bits=bits, group=group, **more)


TYPES = {
    kind.name: kind
    for kind in (
        _type("Q4_0", 2, 32, 18, 4, 32, zero=8),
        _type("Q4_1", 3, 32, 20, 4, 32, minimum=True),
        _type("Q5_0", 6, 32, 22, 5, 32, zero=16),
        _type("Q5_1", 7, 32, 24, 5, 32, minimum=True),
        _type("Q8_0", 8, 32, 34, 8, 32, zero=128),
        _type("Q2_K", 10, 256, 84, 2, 16, scale_bits=4, minimum=True),
        _type("Q3_K", 11, 256, 110, 3, 16, zero=4, scale_bits=6, scale_zero=32),
        _type("Q4_K", 12, 256, 144, 4, 32, scale_bits=6, minimum=True),
        _type("Q5_K", 13, 256, 176, 5, 32, scale_bits=6, minimum=True),
        _type("Q6_K", 14, 256, 210, 6, 16, zero=32, scale_bits=8, scale_zero=128),
        _type("IQ4_NL", 20, 32, 18, 4, 32, table=IQ4_TABLE),
        _type("IQ4_XS", 23, 256, 136, 4, 32, scale_bits=6, scale_zero=32, table=IQ4_TABLE),
        _type("MXFP4", 39, 32, 17, 4, 32, table=FP4_TABLE),
    )
}
PLAIN = {"F32": 0, "F16": 1, "BF16": 30}
"""Types without blocks, and their numbers."""


def type_of(number: int) -> str:
    """A type's name by its number in a file; `type NUMBER` where it is none of those here."""
    for name, known in PLAIN.items():
        if known == number:
            return name
    return next((kind.name for kind in TYPES.values() if kind.number == number), f"type {number}")


BLOCK_SUFFIXES = {f"_{name.lower()}": kind for name, kind in TYPES.items()}
"""How names of tensors end that hold a matrix in such a type, in a folder of safetensors."""
