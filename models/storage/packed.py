"""Weights that a checkpoint stores in other tensors than one dense one: found here, read as fp32 by `unpack`.

| packing | codes of the dense X (`X` = `BASE.weight`, or a fused name) | scales | more |
|---|---|---|---|
| fp8 | X F8_E4M3 [..., O, I] | X_scale_inv, X_scale, BASE.scale or BASE.qscale_weight: one, by row, column or block | |
| mxfp4 | X_blocks U8 [E, O, I/32, 16]; X or BASE.weight_packed U8, I8, F4 [..., O, I/2] | X_scales; as fp8, E8M0 | |
| int4 | BASE.weight_packed I32 [O, I*bits/32] | BASE.weight_scale [O, G] | weight_shape, weight_zero_point |
| gptq | BASE.qweight I32 [I*bits/32, O] | BASE.scales [G, O] | qzeros, g_idx |
| awq | BASE.qweight I32 [I, O/8] | BASE.scales [G, O] | qzeros |
| nvfp4 | X or BASE.weight_packed U8 [O, I/2] | BASE.weight_scale F8_E4M3 [O, I/16] | weight_scale_2 or _global_scale |
| gguf | X_q4_k U8 [O, bytes of a row], or another of GGUF's block types, which hold their scales themselves | | |

Letters: E experts, O out, I in, G groups along in. What a tensor is says more than the config, which is asked for the
rest: block sizes, group sizes, whether GPTQ's zeros are stored one too low.

Sources: DeepSeek-V3 (arXiv 2412.19437) 3.3; OCP Microscaling Formats 1.0; transformers 5.23 `integrations/mxfp4.py`,
`finegrained_fp8.py`, `fbgemm_fp8.py`; compressed-tensors 0.20 `compressors/`; AutoGPTQ 0.7.1 and GPTQModel 7.7; AutoAWQ
0.2 `WQLinear_GEMM`; NVIDIA ModelOpt's unified checkpoints.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.storage.block_types import BLOCK_SUFFIXES, BlockType
from moepress.models.storage.foreign import FP8, PLAIN_DTYPES
from moepress.models.storage.safetensors_file import Stored, read_array


class Packing(StrEnum):
    """How a weight is stored."""

    FP8 = "fp8"
    MXFP4 = "mxfp4"
    INT4 = "int4"
    GPTQ = "gptq"
    AWQ = "awq"
    NVFP4 = "nvfp4"
    GGUF = "gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """One dense weight and the stored tensors that stand for it.

    Attributes:
        name: the dense tensor's name.
        packing: how it is stored.
        shape: dense shape, [O, I] or [E, O, I].
        parts: the stored tensors by role: codes, scales, and where there are such, zeros, order (GPTQ's g_idx), shape,
            global (a scale of scales) and, under their own suffix, those of activations, which are not read.
        bits: of a code.
        block: rows and columns that one scale stands for; the last ones may be cut off by the edge.
        zeros_less_one: GPTQ v1, whose zeros are stored one too low.
        kind: GGUF's block type; None for other packings.
    """

    name: str
    packing: Packing
    shape: tuple[int, ...]
    parts: Mapping[str, Stored]
    bits: int
    block: tuple[int, int]
    zeros_less_one: bool = False
    kind: BlockType | None = None

    @property
    def part_names(self) -> tuple[str, ...]:
        """Names of all stored tensors that it stands for."""
        return tuple(part.name for part in self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stated:
    """What a config states of the weights' quantization, whoever wrote it."""

    method: str = ""
    version: str = ""
    in_order: bool = False
    asymmetric: bool = False
    bits: set[int] = field(default_factory=set)
    groups: set[int] = field(default_factory=set)
    blocks: list[tuple[int, int]] = field(default_factory=list)

    @property
    def zeros_less_one(self) -> bool:
        """Whether GPTQ's zeros are v1's; AutoRound's own format is v2's, and says `gptq` where it is not."""
        return "v2" not in self.version and (self.method != "auto-round" or "gptq" in self.version)


_Found = Packed | None
_Build = Callable[[Stored, Mapping[str, Stored], _Stated], _Found]

_BYTES = ("U8", "I8", "F4")
EXPONENTS = ("U8", "F8_E8M0")
_OF_INPUTS = ("input_scale", "input_global_scale", "activation_scale", "qscale_act")
_SCALE_PARTS = (
    *("_scale", "_scales", "_scale_inv", "_scale_2", ".scale", ".scales", ".qscale_weight"),
    *("_zero_point", "_shape", "g_idx", ".qzeros"),
)
_NEVER_ALONE = (
    *(".weight_scale", "_scale_inv", ".weight_scale_2", ".weight_global_scale", ".qscale_weight"),
    *(".qzeros", ".g_idx", ".weight_shape", ".weight_zero_point", ".weight_g_idx"),
)
"""Suffixes of parts that no module calls its own parameters."""
_OTHER_FLOATS = ("F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F6_E2M3", "F6_E3M2")
_WIDTHS = (2, 4, 8)
_DEFAULT_BLOCKS = ((128, 128), (1, 32))
_AGAIN = "download the folder again"


def find_packed(config: Mapping[str, Any], stored: Mapping[str, Stored]) -> dict[str, Packed]:
    """All weights that are stored packed; takes time in proportion to the number of names.

    Reads headers' entries alone, and of compressed-tensors' integers the `weight_shape` of one matrix of every size.

    Args:
        config: config.json, with its quantization at the top or in `text_config`; or a parsed sidecar file.
        stored: every tensor of the folder.

    Returns:
        Dense names to what is stored for them.

    Raises:
        InvalidInputError: a part is missing, or parts do not fit each other.
        UnsupportedError: a packing that is not read.
    """
    stated, found = _stated(config), dict[str, Packed]()
    sizes: dict[tuple[object, ...], tuple[int, ...]] = {}
    for name, entry in stored.items():
        if entry.dtype in PLAIN_DTYPES:
            continue
        packed = _build_of(name, entry)(entry, stored, stated)
        if packed is None:
            continue
        if packed.packing is Packing.INT4:
            packed = _sized(packed, stated, sizes)
        if packed.name in found or (packed.name in stored and packed.name != name):
            raise InvalidInputError(f"{entry.file}: {packed.name} is stored more than once, as {name} too; {_AGAIN}.")
        found[packed.name] = packed
    used = {part for packed in found.values() for part in packed.part_names}
    for name, entry in stored.items():
        if name not in used and (name.endswith(_NEVER_ALONE) or (entry.dtype in EXPONENTS and _is_scale(entry))):
            raise InvalidInputError(f"{entry.file}: {name} belongs to no quantized weight; {_AGAIN}.")
    return found


def _is_scale(entry: Stored) -> bool:
    return entry.dtype == "F8_E8M0" or entry.name.endswith("_scales")


def _build_of(name: str, entry: Stored) -> _Build:
    """What is asked whether an entry holds codes."""
    for suffix, build in _BY_SUFFIX.items():
        if name.endswith(suffix):
            return build
    if entry.dtype == "U8" and name.endswith(tuple(BLOCK_SUFFIXES)):
        return _gguf_blocks
    if entry.dtype in (FP8, *_BYTES, *_OTHER_FLOATS) and not name.endswith(_SCALE_PARTS):
        return _in_place
    return _no_codes


def _no_codes(_codes: Stored, _stored: Mapping[str, Stored], _stated: _Stated) -> _Found:
    return None


def _blocks(codes: Stored, stored: Mapping[str, Stored], _stated: _Stated) -> _Found:
    """gpt-oss: a layer's experts, 32 values of a row in 16 bytes."""
    if codes.dtype != "U8":
        return None
    name = codes.name.removesuffix("_blocks")
    scales = _part(f"{name}_scales", codes, stored)
    if len(codes.shape) < 3 or codes.shape[-1] != 16 or scales.dtype not in EXPONENTS:
        raise misfit(codes, scales)
    *lead, groups, _ = codes.shape
    return _packed(Packing.MXFP4, name, (*lead, 32 * groups), {"codes": codes, "scales": scales}, (1, 32), stored)


def _compressed(codes: Stored, stored: Mapping[str, Stored], stated: _Stated) -> _Found:
    """compressed-tensors: `weight_packed` holds words of integers or bytes of 4-bit floats."""
    base = codes.name.removesuffix("_packed")
    scales = _part(f"{base}_scale", codes, stored)
    if codes.dtype != "I32":
        return _nibbles(base, codes, scales, stored, "global_scale")
    if f"{base}_g_idx" in stored:
        raise UnsupportedError(f"{base}_g_idx means columns grouped out of order (actorder group), which is not read.")
    if len(codes.shape) != 2:
        raise UnsupportedError(f"{codes.name} has shape {list(codes.shape)}: packed integers are read as matrices.")
    parts = {"codes": codes, "scales": scales, "shape": _part(f"{base}_shape", codes, stored)}
    if (zeros := stored.get(f"{base}_zero_point")) is not None:
        parts["zeros"] = zeros
    elif stated.asymmetric:
        raise InvalidInputError(
            f"{codes.file}: {base}_zero_point is missing, and the config says that codes are not symmetric; {_AGAIN}."
        )
    # The true size is in the data of `weight_shape`: `_sized`
    return _packed(Packing.INT4, base, codes.shape, parts, (1, 1), stored, fits=False)


def _gguf_blocks(codes: Stored, _stored: Mapping[str, Stored], _stated: _Stated) -> _Found:
    """A matrix in one of GGUF's block types, which its name ends with."""
    suffix, kind = next((end, kind) for end, kind in BLOCK_SUFFIXES.items() if codes.name.endswith(end))
    if len(codes.shape) != 2 or codes.shape[1] % kind.size or 0 in codes.shape:
        raise InvalidInputError(
            f"{codes.file}: {codes.name} is U8 {list(codes.shape)}, and {kind.name} has blocks of {kind.size} bytes; "
            f"{_AGAIN}."
        )
    return Packed(
        name=codes.name.removesuffix(suffix),
        packing=Packing.GGUF,
        shape=(codes.shape[0], codes.shape[1] // kind.size * kind.columns),
        parts={"codes": codes},
        bits=kind.bits,
        block=(1, kind.group),
        kind=kind,
    )


def _nibbles(name: str, codes: Stored, scales: Stored, stored: Mapping[str, Stored], second: str) -> _Found:
    """Two 4-bit floats a byte, scaled by powers of two (MXFP4), or by fp8 numbers and those by one more (NVFP4)."""
    per_byte = 1 if codes.dtype == "F4" else 2  # the format counts F4 by its elements
    if codes.dtype not in _BYTES or len(codes.shape) < 2:
        raise misfit(codes, scales)
    shape, parts = (*codes.shape[:-1], codes.shape[-1] * per_byte), {"codes": codes, "scales": scales}
    if scales.dtype in EXPONENTS:
        return _packed(Packing.MXFP4, name, shape, parts, (1, 32), stored)
    if scales.dtype != FP8:
        raise UnsupportedError(
            f"{codes.name} is {codes.dtype} with {scales.dtype} scales in {scales.name}: 8-bit integers, or a packing "
            "that is not read here."
        )
    parts["global"] = _part(f"{name}_{second}", codes, stored)
    if parts["global"].shape not in ((), (1,)) or parts["global"].dtype not in PLAIN_DTYPES:
        raise misfit(codes, parts["global"])
    return _packed(Packing.NVFP4, name, shape, parts, (1, 16), stored)


def _in_place(codes: Stored, stored: Mapping[str, Stored], stated: _Stated) -> _Found:
    """Codes under the weight's own name."""
    name, is_weight = codes.name, codes.name.endswith(".weight")
    base = name.removesuffix("weight")
    names = (f"{name}_scale_inv", f"{name}_scale", *((f"{base}scale", f"{base}qscale_weight") if is_weight else ()))
    scales = next((stored[each] for each in names if each in stored), None)
    if scales is None:
        if f"{name}_weight_scale" in stored:
            raise UnsupportedError(f"{name} holds the experts of a layer in one NVFP4 tensor, which is not read.")
        if is_weight or codes.dtype == FP8:
            raise InvalidInputError(f"{codes.file}: {name} is {codes.dtype}, but its {names[1]} is missing; {_AGAIN}.")
        return None  # bytes that are no weight: a mask, a table
    if codes.dtype in _OTHER_FLOATS:
        raise UnsupportedError(f"{name} is {codes.dtype}, which is not read.")
    if codes.dtype != FP8:
        return _nibbles(name, codes, scales, stored, "scale_2")
    block = _fp8_block(codes, scales, stated)
    return _packed(Packing.FP8, name, codes.shape, {"codes": codes, "scales": scales}, block, stored, fits=False)


def _fp8_block(codes: Stored, scales: Stored, stated: _Stated) -> tuple[int, int]:
    """Rows and columns that one scale stands for, told by the number of scales."""
    if len(codes.shape) not in (2, 3) or scales.dtype not in (*PLAIN_DTYPES, *EXPONENTS):
        raise misfit(codes, scales)
    *lead, rows, columns = codes.shape
    grid, row, column = scales.shape, (rows, 1), (1, columns)
    if grid in ((), (1,)):
        return rows, columns
    if lead:
        if grid[0] != lead[0]:
            raise misfit(codes, scales)
        grid = grid[1:]
        if math.prod(grid) == 1:
            return rows, columns
    for block in (*stated.blocks, *_DEFAULT_BLOCKS):
        if grid == grid_of((rows, columns), block):
            return block
    if grid in (row, row[:1]):
        return 1, columns
    if lead and grid in (column, (columns, 1)):  # FBGEMM's experts lie transposed: [E, I, O], scaled by their outputs
        return rows, 1
    raise misfit(codes, scales)


def _words(codes: Stored, stored: Mapping[str, Stored], stated: _Stated) -> _Found:
    """GPTQ and AWQ, which differ in the axis that is packed: in it, words are fewer than what they stand for."""
    base = codes.name.removesuffix("qweight")
    scales, zeros = _part(f"{base}scales", codes, stored), _part(f"{base}qzeros", codes, stored)
    version = next((other for other in ("gemv", "marlin", "bitblas", "ipex") if other in stated.version), None)
    if version is not None or codes.dtype != "I32":
        raise UnsupportedError(f"{codes.name} is {codes.dtype}, packed as {version or 'unknown'}, which is not read.")
    if not len(codes.shape) == len(scales.shape) == len(zeros.shape) == 2 or 0 in (*scales.shape, *codes.shape):
        raise misfit(codes, scales)
    groups, outputs = scales.shape
    awq = codes.shape[1] == zeros.shape[1] and codes.shape[1] != outputs
    bits, rest = divmod(32 * zeros.shape[1], outputs)
    if rest or zeros.shape[0] != groups or zeros.dtype != "I32":
        raise misfit(scales, zeros)
    if scales.dtype not in PLAIN_DTYPES or (not awq and codes.shape[1] != outputs):
        raise misfit(codes, scales)
    if stated.bits and bits not in stated.bits:
        raise misfit(scales, zeros)
    if bits not in ((4,) if awq else _WIDTHS):
        raise UnsupportedError(f"{codes.name} holds codes of {bits} bits, which are not read.")
    inputs, parts = 32 * codes.shape[0] // (32 if awq else bits), {"codes": codes, "scales": scales, "zeros": zeros}
    order = stored.get(f"{base}g_idx")
    if order is not None:
        if awq or order.shape != (inputs,) or order.dtype not in ("I32", "I64"):
            raise misfit(codes, order)
        parts["order"] = order
    elif not awq and not stated.in_order:
        _part(f"{base}g_idx", codes, stored)
    return _packed(
        Packing.AWQ if awq else Packing.GPTQ,
        f"{base}weight",
        (outputs, inputs),
        parts,
        (1, _group(inputs, groups, codes, scales, stated)),
        stored,
        bits=bits,
        zeros_less_one=not awq and stated.zeros_less_one,
        fits=False,
    )


def _sized(packed: Packed, stated: _Stated, sizes: dict[tuple[object, ...], tuple[int, ...]]) -> Packed:
    """Packed integers with their size; `weight_shape` is read once for all that look alike, and again with the data."""
    codes, scales, shape = (packed.parts[role] for role in ("codes", "scales", "shape"))
    alike = (codes.shape, scales.shape, packed.name.rpartition(".")[0].rpartition(".")[2])
    if alike not in sizes:
        sizes[alike] = true_shape(shape)
    rows, columns = size = sizes[alike]
    widths = [bits for bits in sorted(stated.bits or (4, 8)) if math.ceil(columns * bits / 32) == codes.shape[1]]
    if not widths or codes.shape[0] != rows:
        raise misfit(codes, shape)
    if (bits := widths[0]) not in _WIDTHS:
        raise UnsupportedError(f"{codes.name} holds codes of {bits} bits, which are not read.")
    if len(scales.shape) != 2 or scales.shape[0] != rows or scales.dtype not in PLAIN_DTYPES:
        raise misfit(codes, scales)
    zeros = packed.parts.get("zeros")
    wanted = {"I32": (math.ceil(rows * bits / 32), scales.shape[1]), "I8": scales.shape}
    if zeros is not None and wanted.get(zeros.dtype) != zeros.shape:
        raise misfit(codes, zeros)
    group = _group(columns, scales.shape[1], codes, scales, stated)
    return replace(packed, shape=size, bits=bits, block=(1, group))


def true_shape(shape: Stored) -> tuple[int, int]:
    """Rows and columns that a `weight_shape`, I64 [2], holds."""
    numbers = read_array(shape).tolist() if shape.dtype in ("I64", "I32") and len(shape.shape) == 1 else []
    if len(numbers) != 2 or min(numbers) < 1:
        raise InvalidInputError(f"{shape.file}: {shape.name} holds no rows and columns ({numbers}); {_AGAIN}.")
    return int(numbers[0]), int(numbers[1])


def _group(columns: int, groups: int, codes: Stored, scales: Stored, stated: _Stated) -> int:
    """Columns of a group. Where the config states sizes, one must fit, and 0 is that of a whole row."""
    sizes = [size or columns for size in sorted(stated.groups)] or ([columns // groups] if groups else [])
    fitting = next((size for size in sizes if math.ceil(columns / size) == groups), None)
    if fitting is None or (not stated.groups and columns % groups):
        raise misfit(codes, scales)
    return min(fitting, columns)


def _packed(
    packing: Packing,
    name: str,
    shape: tuple[int, ...],
    parts: dict[str, Stored],
    block: tuple[int, int],
    stored: Mapping[str, Stored],
    *,
    bits: int = 0,
    zeros_less_one: bool = False,
    fits: bool = True,
) -> Packed:
    """A weight with what is stored for its inputs; `fits` asks whether there is a scale for every block, all whole."""
    grid = (*shape[:-1], shape[-1] // block[1])
    if fits and (len(shape) not in (2, 3) or shape[-1] % block[1] or parts["scales"].shape != grid):
        raise misfit(parts["codes"], parts["scales"])
    base = name.removesuffix("weight") if name.endswith(".weight") else f"{name}_"
    for suffix in _OF_INPUTS:
        if (part := stored.get(base + suffix)) is not None:
            parts[suffix] = part
    width = bits or (8 if packing is Packing.FP8 else 4)
    return Packed(
        name=name, packing=packing, shape=shape, parts=parts, bits=width, block=block, zeros_less_one=zeros_less_one
    )


def grid_of(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Blocks of [O, I]; those at the edge may be cut off."""
    return tuple(-(-size // step) for size, step in zip(shape, block, strict=True))


_BY_SUFFIX: dict[str, _Build] = {"_blocks": _blocks, ".weight_packed": _compressed, ".qweight": _words}


def _part(name: str, codes: Stored, stored: Mapping[str, Stored]) -> Stored:
    try:
        return stored[name]
    except KeyError:
        raise InvalidInputError(f"{codes.file}: {name}, which {codes.name} needs, is missing; {_AGAIN}.") from None


def misfit(codes: Stored, part: Stored) -> InvalidInputError:
    """The refusal of two tensors that cannot stand for one weight."""
    return InvalidInputError(
        f"{part.file}: {part.name} is {part.dtype} {list(part.shape)}, which does not fit {codes.name} {codes.dtype} "
        f"{list(codes.shape)}; {_AGAIN}."
    )


def _stated(config: Mapping[str, Any]) -> _Stated:
    text = config.get("text_config")
    for holder in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            if isinstance(holder.get(key), dict) and holder[key]:
                return _stated_in(holder[key])
    return _stated_in(config)  # a sidecar file, or nothing


def _stated_in(stated: Mapping[str, Any]) -> _Stated:
    method = str(stated.get("quant_method") or "")
    versions = (stated.get(key) for key in ("checkpoint_format", "packing_format", "backend", "version"))
    found = _Stated(
        method=method,
        version=" ".join(value.lower() for value in versions if isinstance(value, str)),
        in_order=stated.get("desc_act") is False or method == "auto-round",
    )
    for rows in _rows(stated):
        if rows.get("symmetric") is False:
            found = replace(found, asymmetric=True)
        found.bits.update(_sizes(rows, "bits", "w_bit", "num_bits"))
        found.groups.update(_sizes(rows, "group_size", "q_group_size"))
        found.groups.update(0 for key in ("group_size", "q_group_size") if rows.get(key, 0) in (None, -1))
        for key in ("weight_block_size", "block_structure"):
            block = rows.get(key)
            if isinstance(block, list) and len(block) == 2 and all(type(n) is int and n > 0 for n in block):
                found.blocks.append((block[0], block[1]))
    return found


def _rows(stated: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The settings of all weights, then those of some: by groups, by names."""
    yield stated
    for key in ("config_groups", "dynamic", "extra_config"):
        some = stated.get(key)
        for row in some.values() if isinstance(some, dict) else ():
            if isinstance(row, dict):
                weights = row.get("weights")
                yield weights if isinstance(weights, dict) else row


def _sizes(row: Mapping[str, Any], *keys: str) -> list[int]:
    return [row[key] for key in keys if type(row.get(key)) is int and row[key] > 0]
