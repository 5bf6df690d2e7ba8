"""The pieces of a quantized folder: which experts share one, how many more are to be made, what was noted of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moepress.compress.gptq.coded import QuantizeOptions
from moepress.models.storage.checkpoint import Source
from moepress.models.storage.experts import is_fused
from moepress.runs.pieces import Piece

# What a killed run may lose, what --max-pieces counts, and what is held in memory until it is written. 256 MiB are 9
# experts of DeepSeek-R1 at 4 bits, and 29 files for each of its layers.
PIECE_BYTES = 256 << 20


@dataclass(slots=True, kw_only=True)
class Allowance:
    """How many more pieces this process is to make; None for all."""

    left: int | None

    def require(self) -> None:
        """Called before a piece is begun."""
        if self.left == 0:
            raise SpentError

    def spend(self) -> None:
        """Called when a piece is done."""
        if self.left is not None:
            self.left -= 1


class SpentError(Exception):
    """As many pieces are done as were asked for; the run goes on another time."""


def plan_chunks(
    source: Source, layers: int, experts: Mapping[int, int], options: QuantizeOptions
) -> dict[int, list[list[int]]]:
    """Which experts share a piece, per layer; a dense layer has one empty chunk. Depends on the model alone."""
    family, chunks = source.family, dict[int, list[list[int]]]()
    for layer in range(layers):
        count = experts.get(layer, 0)
        if not count:
            chunks[layer] = [[]]
            continue
        if is_fused(source, layer):
            elements = sum(math.prod(source.shapes[name][1:]) for name in family.fused_names(layer)[:2])
        else:
            elements = sum(math.prod(source.shapes[n]) for n in family.expert_names(layer, 0))
        each = elements * (options.scheme_of(layer).bits + 1) // 8
        size = max(1, PIECE_BYTES // each)
        chunks[layer] = [list(range(s, min(s + size, count))) for s in range(0, count, size)]
    return chunks


def piece_names(chunks: Mapping[int, Sequence[Sequence[int]]]) -> dict[str, str]:
    """Piece -> file name, for the chunks of all layers and what lies outside of them (`outer`), in that order."""
    ids = [f"layer-{layer}-{part}" for layer, parts in chunks.items() for part in range(len(parts))] + ["outer"]
    return {piece: f"model-{n:05d}-of-{len(ids):05d}.safetensors" for n, piece in enumerate(ids, start=1)}


def piece_file(piece: str) -> str:
    """A piece's file before it has its place among all."""
    return f"{piece}.safetensors"


def layer_report(pieces: Iterable[Piece]) -> dict[str, Any]:
    """Per layer: mean relative error, experts without tokens, experts that were rounded to nearest."""
    errors: dict[int, list[float]] = {}
    without: dict[str, list[int]] = {}
    rounded: dict[str, list[int]] = {}
    for piece in pieces:
        layer = piece.note.get("layer")
        if layer is None:
            continue
        # Sorted, because a journal read back has its keys in another order, and sums must not differ in the last bit.
        for expert, (tokens, first, second, fell_back) in sorted(piece.note["experts"].items(), key=_expert_number):
            errors.setdefault(layer, []).extend((first, second))
            if tokens == 0:
                without.setdefault(str(layer), []).append(int(expert))
            if fell_back:
                rounded.setdefault(str(layer), []).append(int(expert))
        errors.setdefault(layer, []).extend(error for _, error in sorted(piece.note["linears"].items()))
    means = {str(layer): _figure(sum(found) / len(found)) for layer, found in sorted(errors.items()) if found}
    return {"layer_error": means, "experts_without_tokens": without, "experts_rounded": rounded}


def _figure(value: float) -> float:
    """Six digits: sums of losses differ in the tenth with the number of threads, and a report is to be the same."""
    return float(f"{value:.6g}")


def _expert_number(row: tuple[str, Any]) -> int:
    return int(row[0])
