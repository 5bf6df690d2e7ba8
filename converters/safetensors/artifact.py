"""Quantized folders, read as if they were dense: a `Source` over codes and scales."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from moepress.converters.safetensors import compressed_tensors, compressed_tensors_config, floats, gptq, gptq_config
from moepress.converters.safetensors.scheme import FLOAT_GROUPS, Codes, Scheme
from moepress.errors import InvalidInputError, UnsupportedError
from moepress.models.families.family import Family
from moepress.models.families.table import family_of
from moepress.models.storage.checkpoint import Checkpoint, Source, open_checkpoint
from moepress.models.storage.folder import load_config, open_shards, unread_weights
from moepress.models.storage.foreign import refuse_foreign
from moepress.models.storage.outline import Outline, outline_of
from moepress.models.storage.placed import place
from moepress.models.storage.safetensors_file import Stored
from moepress.models.storage.settled import leftover_quantization, settle
from moepress.models.storage.tensors import read_row, read_tensor, require_finite


class Layout(Protocol):
    """The functions that a quantized layout module offers for reading."""

    def read_layer(self, module_name: str, tensors: Mapping[str, Tensor], scheme: Scheme) -> tuple[Tensor, Tensor]:
        """Codes int8 [O, I] and scales [O, G]."""

    def read_zeros(self, module_name: str, tensors: Mapping[str, Tensor], scheme: Scheme, rows: int) -> Tensor | None:
        """Zero points int16 [O, G]; None where the scheme has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A folder that moepress (or a compatible tool) quantized; also a `Source` of dequantized weights.

    Attributes:
        folder: where it lies.
        config: config.json, parsed and settled (`storage.settled`).
        family: the row of the family table.
        outline: what config and names say.
        stored: every tensor in every shard, but those that are dropped.
        shards: shard file names.
        shapes: the dense tensors that `read` gives.
        schemes: bits, group size and what codes are, with the modules they are for; one for all Linears unless bits
            are mixed.
        layout: `compressed-tensors` or `gptq`.
        suffixes: the quantized tensors that stand for one weight, one of zero points last where some matrix has it.
        notes: what was settled or is left out, for people.
        exact: `read` multiplies in fp32 instead of the scales' dtype, as runtimes do that keep the codes.
    """

    folder: Path
    config: dict[str, Any]
    family: Family
    outline: Outline
    stored: dict[str, Stored]
    shards: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    schemes: compressed_tensors_config.Groups
    layout: str
    suffixes: tuple[str, ...]
    notes: tuple[str, ...] = ()
    exact: bool = False

    @property
    def total_bytes(self) -> int:
        """Size of all tensors."""
        return sum(entry.bytes for entry in self.stored.values())

    def is_quantized(self, name: str) -> bool:
        """Whether a weight is stored as codes."""
        return name not in self.stored

    @property
    def scheme(self) -> Scheme:
        """Bits and group size; where they are mixed, those of the first routed experts that are quantized."""
        firsts = (self.family.expert_names(layer, 0)[0] for layer in self.outline.moe_layers)
        coded = (name for name in firsts if name in self.shapes and self.is_quantized(name))
        name = None if len(self.schemes) == 1 else next(coded, None)
        return self.schemes[0][1] if name is None else self.scheme_of(name)

    @property
    def floats(self) -> Codes | None:
        """The 4-bit floats that all codes are, or None."""
        return self.schemes[0][1].codes if self.schemes[0][1].floats else None

    def scheme_of(self, name: str) -> Scheme:
        """Bits and group size of a quantized weight."""
        if len(self.schemes) == 1:
            return self.schemes[0][1]
        return compressed_tensors_config.scheme_for(name.removesuffix(".weight"), self.schemes)

    def scales(self, name: str) -> Tensor:
        """Scales [O, G] of a quantized weight, without reading its codes."""
        if self.floats:
            return self.codes(name)[1]
        suffix, by_groups = _SCALES[self.layout]
        entry = self.stored[f"{name.removesuffix('.weight')}.{suffix}"]
        scales = read_tensor(entry)
        require_finite(entry, scales)
        return scales.mT.contiguous() if by_groups else scales

    def zeros(self, name: str) -> Tensor | None:
        """Zero points int16 [O, G] of a quantized weight, without reading its codes; None where codes are symmetric."""
        scheme, module = self.scheme_of(name), name.removesuffix(".weight")
        if scheme.symmetric:
            return None
        part = f"{module}.{_ZEROS[self.layout]}"
        if part not in self.stored:
            raise InvalidInputError(f"{self.folder} lacks {part}; download or make the folder again.")
        reader: Layout = _READERS[self.layout]
        zeros = reader.read_zeros(module, {part: read_tensor(self.stored[part])}, scheme, self.shapes[name][0])
        groups = scheme.groups(self.shapes[name][1])
        if zeros is not None and tuple(zeros.shape) != (self.shapes[name][0], groups):
            raise InvalidInputError(
                f"{part} holds {tuple(zeros.shape)} zero points, want {(self.shapes[name][0], groups)}; the files are "
                "not of one model."
            )
        return zeros

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """Codes int8 [O, I] and scales [O, G] of a quantized weight, as `dense` takes them; `zeros` has what codes are
        taken less.

        Raises:
            InvalidInputError: a part of it is missing or does not fit.
        """
        module = name.removesuffix(".weight")
        parts = {f"{module}.{s}" for s in self.suffixes}
        if self.layout == "compressed-tensors" and self.scheme_of(name).symmetric:
            parts.discard(f"{module}.{_ZEROS[self.layout]}")  # others may have some
        missing = sorted(parts - self.stored.keys())
        if missing:
            raise InvalidInputError(f"{self.folder} lacks {missing[0]}; download or make the folder again.")
        tensors = {part: read_tensor(self.stored[part]) for part in parts}
        for part in parts:
            require_finite(self.stored[part], tensors[part])
        reader: Layout = _READERS[_parts_of(self.layout, self.scheme)]
        return reader.read_layer(module, tensors, self.scheme_of(name))

    def read(self, name: str) -> Tensor:
        """One dense tensor, as stored where it was not quantized.

        Else in its scales' dtype, of 4-bit floats in bf16, and in fp32 if `exact`.
        """
        if not self.is_quantized(name):
            tensor = read_tensor(self.stored[name])
            require_finite(self.stored[name], tensor)
            return place(tensor)
        codes, scales = map(place, self.codes(name))
        if self.floats:
            return floats.dense(codes, scales, exact=self.exact)
        zeros = self.zeros(name)
        return dense(codes, scales.float() if self.exact else scales, None if zeros is None else place(zeros))

    def read_row(self, name: str, row: int) -> Tensor:
        """`read(name)[row]`; only unquantized tensors have rows that can be read alone."""
        return place(read_row(self.stored[name], row))


_READERS = {"compressed-tensors": compressed_tensors, "gptq": gptq, "nvfp4": floats, "mxfp4": floats}
_ZEROS = {"compressed-tensors": "weight_zero_point", "gptq": "qzeros"}
_SCALES = {"compressed-tensors": ("weight_scale", False), "gptq": ("scales", True)}  # suffix, stored as [G, O]


def _parts_of(layout: str, scheme: Scheme) -> str:
    """The key of what matrices are made of: the layout, or the floats that compressed-tensors holds in it."""
    return scheme.codes.value if scheme.floats else layout


_TAKE_FLOATS = {"gguf": frozenset({Codes.MXFP4})}
"""Exports that take 4-bit floats, and which; all others hold integers."""


def refuse_floats(codes: Codes | None, target: str, holder: object = "The result of --scheme") -> None:
    """Refuse 4-bit floats where an export does not take them.

    Args:
        codes: of the folder; None as good as integers.
        target: the export, as `--to` names it.
        holder: the folder, or what is to become of it.

    Raises:
        UnsupportedError: saying what can be done with the folder.
    """
    if codes not in FLOAT_GROUPS or codes in _TAKE_FLOATS.get(target, ()):
        return
    others = "".join(f" export it with --to {name}," for name, taken in _TAKE_FLOATS.items() if codes in taken)
    raise UnsupportedError(
        f"{holder} holds {codes} floats, which --to {target} does not take: give the folder to vLLM as it is,{others} "
        "or quantize the original with --bits."
    )


def dense(codes_OI: Tensor, scales_OG: Tensor, zeros_OG: Tensor | None = None) -> Tensor:
    """The weights that codes stand for: q * scale or (q - zero) * scale, [O, I], multiplied in the scales' dtype.

    transformers and the Marlin kernels multiply in that dtype, so a bf16 product is rounded to bf16 here too; the
    difference of two codes is exact in all of them.
    """
    grouped = codes_OI.to(scales_OG.dtype).unflatten(1, (scales_OG.shape[1], -1))
    if zeros_OG is not None:
        grouped = grouped - zeros_OG.to(scales_OG.dtype)[:, :, None]
    weight: Tensor = (grouped * scales_OG[:, :, None]).flatten(1)
    return weight


def open_artifact(folder: Path) -> Artifact:
    """Open a folder in compressed-tensors or GPTQ layout.

    Raises:
        UnsupportedError: another quantization method, or a variant that moepress does not read.
        InvalidInputError: the folder is not sound.
    """
    config = load_config(folder)
    quantization, method = _stated(config)
    if method not in _METHODS:
        refuse_foreign(folder, config, open_shards(folder)[0], also_read=True)  # names what it is, where that shows
        raise UnsupportedError(
            f"{folder} is not in a quantized layout that moepress reads (compressed-tensors or gptq, not {method!r}); "
            "make one with `moepress quantize`."
        )
    if method == "gptq":
        schemes, _plain = gptq_config.parse_groups(quantization)
    else:
        schemes, _ignored = compressed_tensors_config.parse_groups(quantization)
    every, shards = open_shards(folder)
    if leftover_quantization(config, every):
        raise UnsupportedError(
            f"{folder}: config.json states a quantization ({method}) and no tensor is quantized; remove it from "
            "config.json, or take the folder that it was made for."
        )
    made_of = _parts_of(method, schemes[0][1])
    unread, suffixes = unread_weights(folder, shards, every), _SUFFIXES[made_of]
    if method == "compressed-tensors" and not all(scheme.symmetric for _targets, scheme in schemes):
        suffixes = (*suffixes, _ZEROS[method])
    for name, entry in every.items():
        _check_part(name, entry, made_of)
    family = family_of(config, _dense_shapes(every, suffixes, schemes, method))
    settled = settle(family, config, every)
    stored = settled.stored
    shapes = _dense_shapes(stored, suffixes, schemes, method)
    return Artifact(
        folder=folder,
        config=settled.config,
        family=family,
        outline=outline_of(family, settled.config, shapes),
        stored=stored,
        shards=shards,
        shapes=shapes,
        schemes=schemes,
        layout=method,
        suffixes=suffixes,
        notes=(*unread, *settled.notes),
    )


_METHODS = ("compressed-tensors", "gptq")
_SUFFIXES = {  # by layout, or by the floats that compressed-tensors holds in it
    "compressed-tensors": ("weight_packed", "weight_scale", "weight_shape"),
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    **{
        codes.value: tuple(suffix.removeprefix(".") for suffix in suffixes)
        for codes, suffixes in compressed_tensors_config.FLOAT_SUFFIXES.items()
    },
}
_FLOATS = ("BF16", "F16", "F32")
_PARTS: dict[str, dict[str, tuple[int, tuple[str, ...]]]] = {  # suffix -> number of axes, dtypes
    "compressed-tensors": {
        "weight_packed": (2, ("I32",)),
        "weight_scale": (2, _FLOATS),
        "weight_shape": (1, ("I64",)),
        "weight_zero_point": (2, ("I32",)),
    },
    "gptq": {"qweight": (2, ("I32",)), "qzeros": (2, ("I32",)), "scales": (2, _FLOATS), "g_idx": (1, ("I32", "I64"))},
    "nvfp4": {
        "weight_packed": (2, ("U8",)),
        "weight_scale": (2, ("F8_E4M3",)),
        "weight_global_scale": (1, ("F32",)),
    },
    "mxfp4": {"weight_packed": (2, ("U8",)), "weight_scale": (2, ("U8",))},
}


def _check_part(name: str, entry: Stored, method: str) -> None:
    """Refuse a part of codes that is not what its name says, before anything is computed with it."""
    part = _PARTS[method].get(name.rpartition(".")[2])
    if part is not None and (len(entry.shape) != part[0] or entry.dtype not in part[1]):
        raise InvalidInputError(
            f"{entry.file}: {name} is {entry.dtype} {list(entry.shape)}, where {method} has {' or '.join(part[1])} of "
            f"{part[0]} axes; download or make the folder again."
        )


def _stated(config: Mapping[str, Any]) -> tuple[dict[str, Any], str | None]:
    """What a config says of its codes, and the name of their layout; None where it has no name."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return {}, None
    method = quantization.get("quant_method")
    return quantization, method if isinstance(method, str) else None


def _dense_shapes(
    stored: Mapping[str, Stored], suffixes: tuple[str, ...], schemes: compressed_tensors_config.Groups, method: str
) -> dict[str, tuple[int, ...]]:
    """The tensors that can be read, and their shapes."""
    endings, first = tuple(f".{suffix}" for suffix in suffixes), f".{suffixes[0]}"
    shapes = {name: entry.shape for name, entry in stored.items() if not name.endswith(endings)}
    for name, entry in stored.items():
        if name.endswith(first):
            shapes[name.removesuffix(first) + ".weight"] = _dense_shape(name, entry, stored, schemes, method)
    return shapes


def _dense_shape(
    name: str, entry: Stored, stored: Mapping[str, Stored], schemes: compressed_tensors_config.Groups, method: str
) -> tuple[int, ...]:
    module = name.rsplit(".", 1)[0]
    if method == "gptq":
        return entry.shape[1], entry.shape[0] * 32 // compressed_tensors_config.scheme_for(module, schemes).bits
    if schemes[0][1].floats:
        return entry.shape[0], 2 * entry.shape[1]
    key = f"{module}.weight_shape"
    if key not in stored:
        raise InvalidInputError(f"{entry.file} lacks {key}; download or make the folder again.")
    shape = tuple(int(n) for n in read_tensor(stored[key]).tolist())
    if len(shape) != 2 or min(shape) < 1 or max(shape) >= 1 << 31:
        raise InvalidInputError(f"{entry.file}: {key} holds {shape}, which is no matrix; make the folder again.")
    return shape


def open_source(folder: Path, *, allow_nonfinite: bool = False) -> Checkpoint | Artifact:
    """Open any folder that moepress can run: plain, fp8, compressed-tensors or GPTQ."""
    config = load_config(folder)
    _quantization, method = _stated(config)
    if method in _METHODS and not leftover_quantization(config, open_shards(folder)[0]):
        return open_artifact(folder)
    return open_checkpoint(folder, allow_nonfinite=allow_nonfinite)


__all__ = ["Artifact", "Source", "dense", "open_artifact", "open_source"]
