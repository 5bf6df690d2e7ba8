"""How a phase of one layer grows with tokens, experts and bytes: what r1_layer.py and r1_projection.py project by.

Counts are those of the shapes in config.json. A phase that computes is taken apart by its FLOP: what every token
passes, what routed tokens pass, what an expert costs however few tokens it has. Two readings of the measured seconds
bound the projection: all of them grow with the FLOP, or only as many as the matmul rate explains, and the rest stays.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from make_r1 import BYTES, r1_tensors

from moepress.calibration.hessian import HessianOptions, gram_flops
from moepress.compress.gptq.moments import picked_tokens
from moepress.converters.safetensors.scheme import Scheme

HESSIANS, FORWARD, READ, BESIDE, WRITE, HIDDEN, SPILL = (
    *("Hessian", "forward", "read", "read beside", "write", "hidden states", "spill"),
)
SCHEME = Scheme(bits=4, group_size=128)


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """A projected phase: seconds from `low` to `high`, and by what it was scaled."""

    name: str
    low: float
    high: float
    scaled: str
    flops: float = 0.0
    bytes: float = 0.0

    def times(self, count: float) -> "Term":
        """The same of so many layers."""
        low, high, flops, size = (count * value for value in (self.low, self.high, self.flops, self.bytes))
        return Term(name=self.name, low=low, high=high, scaled=self.scaled, flops=flops, bytes=size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What passes a layer: all tokens, experts that are worked on, (token, expert) pairs of these."""

    tokens: int
    window: int
    experts: int
    routed: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Sizes of one layer of R1.

    Attributes:
        rest, rest_bytes: parameters of the matrices without routed experts; bytes of all its tensors as stored.
        expert, expert_bytes: the same of one routed expert; 0 in a dense layer.
    """

    config: Mapping[str, Any]
    rest: int
    rest_bytes: int
    expert: int
    expert_bytes: int

    @property
    def hidden(self) -> int:
        """Its columns."""
        return int(self.config["hidden_size"])

    @property
    def written_rest(self) -> float:
        """Bytes of the rest in a quantized folder: fp8 becomes bf16."""
        return 2.0 * self.rest

    @property
    def written_expert(self) -> float:
        """Bytes of one packed expert."""
        return self.expert * SCHEME.bits_per_weight(self.hidden, 16) / 8


def layer_of(config: Mapping[str, Any], layer: int) -> Layer:
    """Count the tensors of a layer."""
    prefix = f"model.layers.{layer}."
    rest, rest_bytes, expert, expert_bytes = 0, 0, 0, 0
    for name, dtype, shape in r1_tensors(config):
        if not name.startswith(prefix):
            continue
        size = math.prod(shape)
        matrix = size if len(shape) == 2 and not name.endswith("scale_inv") else 0
        if ".experts." not in name:
            rest, rest_bytes = rest + matrix, rest_bytes + size * BYTES[dtype]
        elif ".experts.0." in name:
            expert, expert_bytes = expert + matrix, expert_bytes + size * BYTES[dtype]
    return Layer(config=config, rest=rest, rest_bytes=rest_bytes, expert=expert, expert_bytes=expert_bytes)


def first_step_flops(layer: Layer, work: Work) -> float:
    """Everything but routed experts, the scores of attention included (as `models.forward.costs` counts it)."""
    config = layer.config
    width = config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"]
    return 2.0 * work.tokens * (layer.rest + work.window * config["num_attention_heads"] * width)


def expert_forward(layer: Layer) -> float:
    """FLOP of a routed token in the forward pass of `quantize`: down alone.

    What gate and up give was formed for down's Hessian, where `hessian_parts` counts it, and is kept while it fits into
    an eighth of the memory, as it does at R1's width with 5 GiB and more.
    """
    return 2.0 * layer.expert / 3


def hessian_parts(layer: Layer, work: Work) -> tuple[float, float, float]:
    """FLOP of the layer's pooled Hessian, of the experts' own tokens, and of the sample sent through every expert."""
    hidden, width = layer.hidden, int(layer.config["moe_intermediate_size"])
    sampled, again = min(HessianOptions().pooled_tokens, work.tokens), 2.0 * 2 * width * hidden
    sample = len(picked_tokens(sampled, int(work.routed / max(work.experts, 1))))
    own = work.routed * (gram_flops(1, hidden) + gram_flops(1, width) + again)
    return gram_flops(work.tokens, hidden), own, work.experts * sample * (gram_flops(1, width) + again)


def computed(
    name: str, row: Mapping[str, Any], parts: Sequence[tuple[float, float, float]], rate: float, scaled: str
) -> Term:
    """A phase whose FLOP are known.

    Args:
        name: of the term.
        row: as measured.
        parts: FLOP measured, FLOP projected, and how often what does not depend on tokens comes again.
        rate: FLOP per second of large matmuls.
        scaled: in words.
    """
    total, low, high = sum(part[0] for part in parts) or 1.0, 0.0, 0.0
    for measured, projected, again in parts:
        seconds = row["seconds"] * measured / total
        grown = seconds * projected / measured if measured else projected / rate
        fixed = max(0.0, seconds - measured / rate) * again + projected / rate
        low, high = low + min(grown, fixed), high + max(grown, fixed)
    return Term(name=name, low=low, high=high, scaled=scaled, flops=sum(part[1] for part in parts))


def moved(name: str, seconds: float, measured: float, projected: float, rate: float | None) -> Term:
    """A phase that reads or writes; `rate` is the disk's, which what lay in the system's cache did not have to meet."""
    low = seconds * projected / measured if measured else 0.0
    slow = projected / rate if rate else low
    return Term(name=name, low=min(low, slow), high=max(low, slow), scaled="per byte", bytes=projected)


def by_phase(rows: Iterable[Mapping[str, Any]], layer: int | None) -> dict[str, Mapping[str, Any]]:
    """The rows of a layer by their phase."""
    return {row["phase"]: row for row in rows if row["layer"] == layer}


def _seconds(rows: Mapping[str, Mapping[str, Any]], name: str) -> float:
    return float(rows[name]["seconds"]) if name in rows else 0.0


def _read_bytes(rows: Mapping[str, Mapping[str, Any]]) -> float:
    return float(sum(rows[name]["bytes"] for name in (READ, BESIDE) if name in rows))


def project_quantize(
    rows: Mapping[str, Mapping[str, Any]], layer: Layer, measured: Work, wanted: Work, rates: Mapping[str, Any]
) -> list[Term]:
    """The phases of one layer of `quantize` as `wanted`; `rows` are those of a layer of its kind."""
    more = wanted.experts / max(measured.experts, 1)
    longer = wanted.tokens / measured.tokens
    flops, fp32 = rates["forward_flops"], rates["fp32_flops"]
    found = []
    for name, row in rows.items():
        if row["background"]:
            continue
        if name == FORWARD:
            each = expert_forward(layer)
            parts = [
                (first_step_flops(layer, measured), first_step_flops(layer, wanted), 1.0),
                (measured.routed * each, wanted.routed * each, more),
            ]
            found.append(computed(name, row, parts, flops, "per token, by FLOP; the rest per expert"))
        elif name == HESSIANS:
            again = (1.0, more, more)
            parts = list(zip(hessian_parts(layer, measured), hessian_parts(layer, wanted), again, strict=True))
            found.append(computed(name, row, parts, fp32, "per token, by FLOP; the rest per expert"))
        elif name == READ:
            before = _read_bytes(rows) or layer.rest_bytes + measured.experts * layer.expert_bytes
            # The rest of a layer may be read twice, for the forward pass and to be written.
            rest = max(float(layer.rest_bytes), before - measured.experts * layer.expert_bytes)
            size = rest + wanted.experts * layer.expert_bytes
            found.append(moved(name, row["seconds"], before, size, rates["read_bytes_per_second"]))
        elif name == WRITE:
            before = row["bytes"] or layer.written_rest + measured.experts * layer.written_expert
            size = layer.written_rest + wanted.experts * layer.written_expert
            found.append(moved(name, row["seconds"], before, size, rates["write_bytes_per_second"]))
        elif name in (HIDDEN, SPILL, "embed", "check"):
            found.append(_linear(name, row, longer, "per token"))
        else:
            ratio, scaled = (more, "per expert") if layer.expert else (1.0, "per layer")
            found.append(_linear(name, row, ratio, scaled))
    return found


def project_profile(
    rows: Mapping[str, Mapping[str, Any]], layer: Layer, measured: Work, wanted: Work, rates: Mapping[str, Any]
) -> list[Term]:
    """The phases of one layer of `profile` as `wanted`."""
    longer = wanted.tokens / measured.tokens
    passes, more = reading_passes(rows, layer, measured, wanted)
    found = []
    for name, row in rows.items():
        if row["background"]:
            continue
        if name == FORWARD:
            # The shares of first step and experts do not matter: with the same window both grow with the tokens.
            flops = row["flops"] or first_step_flops(layer, measured) + 2.0 * measured.routed * layer.expert
            parts = [(flops, flops * longer, 1.0)]
            found.append(computed(name, row, parts, rates["forward_flops"], "per token, by FLOP; the rest per layer"))
        elif name == READ:
            size = layer.rest_bytes + passes * more * layer.config["n_routed_experts"] * layer.expert_bytes
            before = _read_bytes(rows) or size / more
            found.append(moved(name, row["seconds"], before, size, rates["read_bytes_per_second"]))
        elif name in ("load", WRITE):
            found.append(_linear(name, row, more, "per layer and pass"))
        elif name == "release":
            found.append(_linear(name, row, 1.0, "per layer"))
        else:
            found.append(_linear(name, row, longer, "per token"))
    return found


def reading_passes(
    rows: Mapping[str, Mapping[str, Any]], layer: Layer, measured: Work, wanted: Work
) -> tuple[float, float]:
    """How often `profile` read every expert, and how many times as often it will.

    Where it read them more than once, it did so for every chunk of tokens.
    """
    experts = layer.config["n_routed_experts"] * layer.expert_bytes
    if not experts or not _read_bytes(rows):
        return 1.0, 1.0
    passes = max(1.0, (_read_bytes(rows) - layer.rest_bytes) / experts)
    return (passes, wanted.tokens / measured.tokens) if passes > 1.5 else (1.0, 1.0)


def _linear(name: str, row: Mapping[str, Any], ratio: float, scaled: str) -> Term:
    seconds = row["seconds"] * ratio
    return Term(name=name, low=seconds, high=seconds, scaled=scaled, flops=row["flops"] * ratio, bytes=row["bytes"])


def total(terms: Iterable[Term]) -> tuple[float, float]:
    """Least and most seconds of all terms."""
    found = list(terms)
    return sum(term.low for term in found), sum(term.high for term in found)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns side by side, the first to the left and the others to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(header))]
    return "\n".join(
        "  ".join(
            text.ljust(width) if place == 0 else text.rjust(width)
            for place, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def human(low: float, high: float) -> str:
    """An interval of seconds in the unit that suits it, one number where both ends are the same."""
    size, unit = next(((n, u) for n, u in ((3600, "h"), (60, "min")) if high >= 2 * n), (1, "s"))
    first, last = f"{low / size:.2f}", f"{high / size:.2f}"
    return f"{first} {unit}" if first == last else f"{first} to {last} {unit}"
