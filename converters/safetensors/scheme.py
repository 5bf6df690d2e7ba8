"""How a weight matrix is quantized: the few numbers that solver, packers and runtimes must agree on."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from moepress.errors import UsageError

SUPPORTED_BITS = (2, 3, 4, 8)
PER_CHANNEL = -1


class Codes(StrEnum):
    """What a code stands for, before its scale."""

    INT = "int"
    NVFP4 = "nvfp4"
    MXFP4 = "mxfp4"


FLOAT_GROUPS = {Codes.NVFP4: 16, Codes.MXFP4: 32}
"""Codes that are 4-bit floats (E2M1), and the input columns that share a scale of one byte: an fp8 number (E4M3) that
a number of the whole matrix divides, or a power of two (E8M0)."""


def is_group_size(value: object) -> bool:
    """Whether a value from a file is a group size: -1, or a multiple of 8."""
    return type(value) is int and (value == PER_CHANNEL or (value >= 8 and value % 8 == 0))


def is_one_of(value: object, accepted: Collection[object]) -> bool:
    """Whether a value from a file is one of those, and of its type: 4.0 and True are no numbers of bits."""
    return any(type(value) is type(choice) and value == choice for choice in accepted)


def proposed_group(group_size: int, columns: Iterable[int]) -> str:
    """A sentence that names the largest smaller group size that divides all these widths."""
    every = set(columns)
    sizes = [size for size in _SIZES if size < group_size and all(count % size == 0 for count in every)]
    if not sizes:
        return "No group size divides all of them; --group-size -1 takes one scale per output row."
    return f"--group-size {sizes[0]} is the largest that divides all."


_SIZES = (128, 64, 32, 16, 8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """Quantization with one scale per output row and group of input columns, and perhaps one zero point.

    A code q is an integer in `[code_min, code_max]`, or one of the 4-bit floats; the weight it stands for is
    `q * scale`, or with zero points `(q - zero) * scale` with another such integer. Groups run along the input
    dimension and are static: column i belongs to group i // group_size, whatever order the solver works in.

    Attributes:
        bits: width of a code; one of 2, 3, 4, 8.
        group_size: input columns that share a scale, or -1 for one scale per output row.
        codes: integers, or 4-bit floats, whose groups are those of their format.
        symmetric: there are no zero points.
    """

    bits: int = 4
    group_size: int = 128
    codes: Codes = Codes.INT
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.floats:
            assert (self.bits, self.group_size) == (4, FLOAT_GROUPS[self.codes]), f"{self}: not of that format"
            return
        if self.bits not in SUPPORTED_BITS:
            raise UsageError(
                f"--bits {self.bits} is not supported; choose one of {', '.join(map(str, SUPPORTED_BITS))}."
            )
        if not is_group_size(self.group_size):
            raise UsageError(
                f"--group-size {self.group_size} is not supported; choose 32, 64 or 128 (other multiples of 8 load "
                "in few runtimes), or -1 for one scale per output row."
            )

    @classmethod
    def of_floats(cls, codes: Codes) -> "Scheme":
        """The scheme of a format of 4-bit floats."""
        return cls(bits=4, group_size=FLOAT_GROUPS[codes], codes=codes)

    def of_bits(self, bits: int) -> "Scheme":
        """The same with so many bits; floats have theirs. Of 8 bits beside narrower ones there are no zero points: they
        gain nothing by them, and few runtimes take them."""
        if self.floats:
            return self
        return replace(self, bits=bits, symmetric=self.symmetric or (bits == 8 and self.bits != 8))

    def stated(self) -> dict[str, Any]:
        """As files of moepress hold it: what codes are is said of floats, `symmetric` where it is false."""
        found: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size}
        return (
            found
            | ({"codes": self.codes.value} if self.floats else {})
            | ({} if self.symmetric else {"symmetric": False})
        )

    @property
    def short(self) -> str:
        """For people: `4 bit`, or the name of a format of floats, `NVFP4`."""
        return self.codes.upper() if self.floats else f"{self.bits} bit"

    @property
    def floats(self) -> bool:
        """Whether codes are 4-bit floats."""
        return self.codes in FLOAT_GROUPS

    @property
    def code_min(self) -> int:
        """The smallest code, -2**(bits-1)."""
        return -(1 << (self.bits - 1))

    @property
    def code_max(self) -> int:
        """The largest code, 2**(bits-1) - 1."""
        return (1 << (self.bits - 1)) - 1

    def groups(self, in_features: int) -> int:
        """Number of groups along an input dimension of that size.

        Raises:
            UsageError: the group size does not divide it.
        """
        if self.group_size == PER_CHANNEL:
            return 1
        if in_features % self.group_size and self.floats:
            raise UsageError(
                f"{self.codes} has groups of {self.group_size} columns, which do not divide the {in_features} input "
                "columns of a matrix; quantize with --bits and a --group-size that does."
            )
        if in_features % self.group_size:
            raise UsageError(
                f"--group-size {self.group_size} does not divide the {in_features} input columns of a matrix."
            )
        return in_features // self.group_size

    def require(self, columns: Iterable[int]) -> None:
        """Refuse matrices of other widths, and name the largest group size that fits all of them.

        Raises:
            UsageError: the group size does not divide one of them.
        """
        every = set(columns)
        for count in sorted(every):
            try:
                self.groups(count)
            except UsageError as error:
                raise UsageError(f"{error} {self.proposed(every)}".strip()) from error

    def proposed(self, columns: Iterable[int]) -> str:
        """`proposed_group` of these widths; nothing where the format has one size of groups."""
        return "" if self.floats else proposed_group(self.group_size, columns)

    def columns_per_group(self, in_features: int) -> int:
        """Input columns that share a scale, for a matrix of that many columns."""
        return in_features // self.groups(in_features)

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Stored bits per weight: the code and its share of a scale (one byte of floats) and of a zero point."""
        zero_bits = 0 if self.symmetric else self.bits
        return self.bits + ((8 if self.floats else scale_bits) + zero_bits) / self.columns_per_group(in_features)


_SAY_CODES_TOO = (
    (("grid",), "--grid does not go with {floats}; one of them says what codes are."),
    (("bits", "group_size", "part_bits"), "--bits and --group-size do not go with {floats}, which says both."),
    (("positive_scales",), "--positive-scales is for codes of integers; scales of 4-bit floats are always positive."),
    (("asymmetric",), "--asymmetric is for codes of integers; 4-bit floats have no zero points."),
    (
        ("budget", "target", "mixed_bits"),
        "--budget, --target and --mixed-bits choose bits, and {floats} says them; say what stays with --keep.",
    ),
    (("types",), "--to gguf chooses types of GGUF, and {floats} says what codes are; leave out one of them."),
    (("no_quantization",), "--no-quantization does not go with {floats}, which says what codes are."),
)
"""Options, by their names as values, and why they do not go with 4-bit floats."""


def floats_alone(codes: Codes, given: Mapping[str, object], *, floats: str = "--scheme") -> Scheme:
    """The scheme of a format of 4-bit floats, held against what else is asked for.

    Args:
        codes: the format.
        given: options by name; those that were not given are absent, or nothing.
        floats: what names the format.

    Raises:
        UsageError: something besides says what codes are.
    """
    for names, why in _SAY_CODES_TOO:
        if any(given.get(name) for name in names):
            raise UsageError(why.format(floats=floats))
    return Scheme.of_floats(codes)
