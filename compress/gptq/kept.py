"""Matrices that are MXFP4 already, where MXFP4 is asked for: their bytes are laid out anew, and nothing is solved."""

import torch
from torch import Tensor

from moepress.compress.gptq.coded import CodedExpert, FloatCoded, biases_of
from moepress.converters.safetensors import floats
from moepress.converters.safetensors.scheme import Codes, Scheme
from moepress.models.storage.checkpoint import Checkpoint, Source, SourceView
from moepress.models.storage.experts import Expert, PrunedSource, halves, is_fused
from moepress.models.storage.packed import Packing
from moepress.models.storage.unpack import exponents, read_stored


def kept_expert(
    source: Source, layer: int, expert: int, weights: Expert, tokens: int, stored: torch.dtype
) -> CodedExpert | None:
    """An expert by the codes and scales that it has; None where it is not all MXFP4, or the source changes it.

    Args:
        source: a folder, or a view of one.
        layer, expert: which.
        weights: what the source gives for it.
        tokens: that reach it, for the report.
        stored: dtype of biases.
    """
    matrices = _matrices(source, layer, expert)
    found = [_same(one, weight) for one, weight in zip(matrices, weights.matrices, strict=bool(matrices))]
    kept = [one for one in found if one is not None]
    if not kept or len(kept) < len(found):
        return None
    *gate, up, down = kept
    return CodedExpert(
        gate=gate[0] if gate else None,
        up=up,
        down=down,
        tokens=tokens,
        error=(0.0, 0.0),
        rounded=False,
        biases=biases_of(weights, stored),
    )


def kept_linear(source: Source, name: str, scheme: Scheme) -> FloatCoded | None:
    """A Linear by the codes and scales that it has, likewise."""
    stored = stored_mxfp4(source, name) if scheme.codes is Codes.MXFP4 else None
    return None if stored is None else _same(stored, source.read(name))


def stored_mxfp4(source: Source, name: str, row: int | None = None) -> FloatCoded | None:
    """What a folder stores for a matrix, or a row of a fused one; None where it is not MXFP4.

    Views are looked through: whether one changes the weights is not asked here.
    """
    if isinstance(source, PrunedSource):
        cut = source.cuts.get(name)
        if cut is not None and row is not None:
            row = None if cut.table or cut.axis else cut.kept[row]
        return stored_mxfp4(source.base, source.renamed.get(name, name), row)
    if isinstance(source, SourceView):
        return stored_mxfp4(source.base, name, row)
    packed = source.packed.get(name) if isinstance(source, Checkpoint) else None
    if packed is None or packed.packing is not Packing.MXFP4 or (row is None) != (len(packed.shape) == 2):
        return None
    codes, scales = (read_stored(packed.parts[part], row) for part in ("codes", "scales"))
    return FloatCoded(codes=floats.unpack(codes.flatten(1)), scales=exponents(scales.flatten(1)))


def _matrices(source: Source, layer: int, expert: int) -> list[FloatCoded | None]:
    """Of an expert, in the order of `Expert.matrices`; nothing where they lie as MXFP4 never does."""
    family = source.family
    if not is_fused(source, layer):
        return [stored_mxfp4(source, name) for name in family.expert_names(layer, expert)]
    if family.fused_transposed or family.fused_gate:
        return []
    first, down = (stored_mxfp4(source, name, expert) for name in family.fused_names(layer)[:2])
    if first is None:
        return []
    parts = zip(halves(family, first.codes), halves(family, first.scales), strict=True)
    return [*(FloatCoded(codes=c, scales=s) for c, s in parts if c is not None and s is not None), down]


def _same(stored: FloatCoded | None, weight: Tensor) -> FloatCoded | None:
    """What is stored, where it stands for these weights."""
    if stored is None:
        return None
    dense = floats.dense(stored.codes, stored.scales, exact=True)
    return stored if dense.shape == weight.shape and bool((dense == weight.float().cpu()).all()) else None
