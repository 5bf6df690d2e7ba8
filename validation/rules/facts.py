"""What the rules of runtimes look at: facts of a folder, from JSON and headers alone, or of one that is yet to be made.

Nothing is refused here that a rule can name: a folder whose expert is missing opens, and the rule says so. What is no
model folder at all is one sentence.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from moepress.compress.gptq.include import Include, included
from moepress.compress.pruning.plan import Plan
from moepress.converters.onnx.folder import is_onnx
from moepress.converters.safetensors import compressed_tensors_config, gptq_config
from moepress.converters.safetensors.patterns import PREFIX, matches
from moepress.converters.safetensors.scheme import PER_CHANNEL, Codes, Scheme
from moepress.converters.safetensors.targets import EXPERTS
from moepress.errors import InvalidInputError
from moepress.models.families.family import Family, Shape, shape_of, strange_prefix, with_experts, with_text
from moepress.models.families.table import family_of, is_row
from moepress.models.storage.block_types import BLOCK_SUFFIXES
from moepress.models.storage.folder import INDEX, OWN_NAMES, load_config, no_weights, read_json
from moepress.models.storage.foreign import BLOCKS_METHOD, stored_method
from moepress.models.storage.safetensors_file import Stored, read_header
from moepress.validation.rules.onnx_facts import Graph, read_graph

QUANTIZE_CONFIG = "quantize_config.json"


class Kind(StrEnum):
    """How the weights of a folder are laid out."""

    PLAIN = "unquantized"
    COMPRESSED = "compressed-tensors"
    GPTQ = "gptq"
    ONNX = "onnx"
    BLOCKS = "GGUF's blocks"
    GGUF = "gguf"
    MLX = "mlx"
    OTHER = "another layout"


SUFFIXES = {Kind.COMPRESSED: compressed_tensors_config.SUFFIXES, Kind.GPTQ: gptq_config.SUFFIXES}
EXTRAS = {
    Kind.COMPRESSED: (
        compressed_tensors_config.ZERO_SUFFIX,
        ".weight_g_idx",
        ".weight_global_scale",
        ".input_global_scale",
    ),
    Kind.GPTQ: (),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """How the config says that some modules are quantized.

    Attributes:
        targets: names, `re:` patterns, or `Linear` for all others.
        bits: of a code; None where the config does not say.
        group_size: input columns that share a scale, -1 for all.
        symmetric: there are no zero points.
    """

    targets: tuple[str, ...]
    bits: int | None
    group_size: int
    symmetric: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """model.safetensors.index.json beside the shards that are there."""

    there: bool
    weight_map: Mapping[str, str]
    shards: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of an output.

    Attributes:
        place: its folder, for messages.
        kind: how weights are laid out.
        config: config.json.
        family: the row of the family table.
        shape: the numbers in the config.
        quantization: `quantization_config`, empty where there is none.
        widths: bits and groups by module, as the config has them; the first that fits counts.
        excluded: names and `re:` patterns of modules that the config leaves unquantized.
        stored: every tensor's dtype and shape; None before anything was written.
        index: the index and the shards; None before anything was written, and for ONNX.
        quantize_config: quantize_config.json; None where it is not there.
        graph: of an ONNX model.
        form: how weights are quantized or stored that no layout here is for, in words.
        signed: scales have either sign.
        prefix: what is to be said of tensors whose names have another prefix than the family's.
        tensor_parallel, expert_parallel: over how many devices it is to be spread.
    """

    place: str
    kind: Kind
    config: Mapping[str, Any]
    family: Family
    shape: Shape
    quantization: Mapping[str, Any] = field(default_factory=dict)
    widths: tuple[Width, ...] = ()
    excluded: tuple[str, ...] = ()
    stored: Mapping[str, Stored] | None = None
    index: Index | None = None
    quantize_config: Mapping[str, Any] | None = None
    graph: Graph | None = None
    form: str | None = None
    prefix: str | None = None
    signed: bool = False
    tensor_parallel: int = 1
    expert_parallel: int = 1

    @property
    def is_quantized(self) -> bool:
        """Whether weights are codes that some runtime has kernels for."""
        return self.kind in SUFFIXES

    @property
    def codes(self) -> Codes:
        """What codes are, where there are some."""
        return compressed_tensors_config.stated_codes(self.quantization)

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Of the tensors that stand for one quantized matrix; none where no layout here is for them."""
        if self.kind is Kind.COMPRESSED:
            return compressed_tensors_config.parts_of(self.codes)
        return SUFFIXES.get(self.kind, ())

    @property
    def tensors(self) -> Mapping[str, Stored]:
        """Every tensor; none before anything was written."""
        return self.stored or {}

    def modules(self) -> dict[str, frozenset[str]]:
        """Quantized modules with the parts that are there, such as `weight_packed`."""
        found: dict[str, set[str]] = {}
        suffixes = self.suffixes
        for name in self.tensors:
            for suffix in (*suffixes, *EXTRAS.get(self.kind, ())):
                if name.endswith(suffix):
                    found.setdefault(name.removesuffix(suffix), set()).add(suffix)
        return {module: frozenset(parts) for module, parts in found.items()}

    def plain_linears(self) -> Iterator[str]:
        """Modules whose weight is a matrix and no codes, routers among them; embeddings are not."""
        for name, entry in self.tensors.items():
            if name.endswith(".weight") and len(entry.shape) == 2 and name != self.family.embeddings:
                yield name.removesuffix(".weight")

    def parts_of(self, module: str) -> tuple[str, ...]:
        """What a quantized module must have, zero points among it where the config says that there are some."""
        suffixes = self.suffixes
        if self.kind is not Kind.COMPRESSED or all(width.symmetric for width in self.widths):
            return suffixes
        width = self.width_of(module)
        return suffixes if width is None or width.symmetric else (*suffixes, compressed_tensors_config.ZERO_SUFFIX)

    def width_of(self, module: str) -> Width | None:
        """What the config says of a module's codes."""
        for width in self.widths:
            if any(matches(target, module) for target in width.targets):
                return width
        return next((width for width in self.widths if "Linear" in width.targets), None)

    def excluder(self) -> Callable[[str], bool]:
        """Tells of a module whether the config leaves it unquantized; made once, for there are many modules.

        Raises:
            InvalidInputError: a pattern is no regular expression.
        """
        names = {target for target in self.excluded if not target.startswith(PREFIX)}
        patterns = [target for target in self.excluded if target.startswith(PREFIX)]
        return lambda module: module in names or any(matches(pattern, module) for pattern in patterns)

    def router_rows(self) -> dict[int, int]:
        """Layer -> rows of its router, for decoder layers; empty before anything was written."""
        family, rows = self.family, dict[int, int]()
        if family.derived:
            routers = {family.at(family.router[0], n): n for n in range(self.shape.layers)}
            found = ((routers[name], entry) for name, entry in self.tensors.items() if name in routers)
            return {layer: entry.shape[0] - family.router_extra for layer, entry in sorted(found, key=lambda p: p[0])}
        pattern = re.escape(family.module_name(family.router[0])).replace(r"\{layer\}", r"(\d+)")
        for name, entry in self.tensors.items():
            matched = re.fullmatch(pattern, family.module_name(name))
            if matched and entry.shape:
                rows[int(matched[1])] = entry.shape[0]
        return dict(sorted(rows.items()))


def read_facts(folder: Path, *, tensor_parallel: int = 1, expert_parallel: int = 1) -> Facts:
    """The facts of a folder: JSON files and headers, no weights.

    Raises:
        InvalidInputError: it is no model folder, or a file in it is not what it says it is.
        UnsupportedError: the model type is not in the table; an ONNX folder, and onnx is not installed.
    """
    config = load_config(folder)
    if is_onnx(folder):
        family = family_of(config)
        shape = shape_of(family, config)
        graph = read_graph(folder)
        return Facts(place=str(folder), kind=Kind.ONNX, config=config, family=family, shape=shape, graph=graph)
    if is_row(config) or not isinstance(config.get("model_type"), str):
        shape_of(family_of(config), config)  # refuses what no header need be read for
    stored, index = _read_shards(folder)
    family = family_of(config, _dense_names(stored))
    shape = shape_of(family, config)
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise InvalidInputError(f"{folder / 'config.json'}: quantization_config is no object; restore the file.")
    kind = Kind.MLX if isinstance(config.get("quantization"), dict) else _kind(quantization)
    foreign = stored_method(stored) if kind in (Kind.PLAIN, Kind.OTHER) else None
    file = folder / QUANTIZE_CONFIG
    return Facts(
        place=str(folder),
        kind=kind if foreign is None else Kind.OTHER,
        form=None if foreign is None else foreign[0],
        prefix=None if family.derived else strange_prefix({family.module_name(name): name for name in stored}),
        config=config,
        family=family,
        shape=shape,
        quantization=quantization,
        widths=_widths(kind, quantization),
        excluded=_excluded(kind, quantization),
        stored=stored,
        index=index,
        quantize_config=read_json(file) if file.is_file() else None,
        signed=_signed(folder),
        tensor_parallel=tensor_parallel,
        expert_parallel=expert_parallel,
    )


def _signed(folder: Path) -> bool:
    """Whether moepress.json says that scales have either sign; what other tools write is not known without weights."""
    note = read_json(folder / "moepress.json") if (folder / "moepress.json").is_file() else {}
    solver = note.get("solver")
    return isinstance(solver, dict) and solver.get("signed") is True and bool(solver.get("scale_search"))


def planned_facts(plan: Plan, config: Mapping[str, Any], kind: Kind) -> Facts:
    """The facts of what a plan will make, before anything is written.

    Args:
        plan: experts, groups and bits.
        config: of the model that it is for.
        kind: PLAIN where nothing is quantized; COMPRESSED, or GPTQ for the export.
    """
    scheme = plan.quantization.scheme() if plan.quantization else None
    return facts_to_be(
        config,
        plan.experts,
        scheme,
        kind,
        degroup=plan.degroup,
        layer_bits=plan.layer_bits,
        include=plan.included,
        place=plan.model_name,
    )


def facts_to_be(
    config: Mapping[str, Any],
    experts: int,
    scheme: Scheme | None,
    kind: Kind,
    *,
    degroup: bool = False,
    layer_bits: Mapping[int, int] | None = None,
    include: Iterable[Include] = (),
    place: str = "the result",
) -> Facts:
    """The facts of a model with so many experts, in that scheme; `layer_bits` where it differs by layer."""
    family = family_of(config)
    changed = with_experts(family, config, experts)
    changed.pop("quantization_config", None)
    if degroup and family.groups_key and family.top_groups_key:
        changed = with_text(family, changed, {family.groups_key: 1, family.top_groups_key: 1})
    if scheme is None or kind not in SUFFIXES:
        return Facts(place=place, kind=Kind.PLAIN, config=changed, family=family, shape=shape_of(family, changed))
    by_bits: dict[int, list[int]] = {}
    for layer, bits in (layer_bits or {}).items():
        by_bits.setdefault(bits, []).append(layer)
    groups = tuple(
        (
            (rf"{PREFIX}{re.escape(family.layers_at)}({'|'.join(map(str, layers))})\..*",),
            scheme.of_bits(bits),
        )
        for bits, layers in sorted(by_bits.items())
    )
    groups = groups if len(groups) > 1 else ()
    others = sorted({bits or scheme.bits for bits in included(include).values()} - ({scheme.bits} if groups else set()))
    if others != [scheme.bits] and others:
        linears = [(("Linear",), scheme.of_bits(bits)) for bits in others[-1:]]
        groups = (*(groups or (((EXPERTS,), scheme),)), *linears)
    if kind is Kind.GPTQ:
        quantization = gptq_config.quantize_config(scheme)
    else:
        quantization = compressed_tensors_config.quantization_config(scheme, (), groups)
    return Facts(
        place=place,
        kind=kind,
        config=changed,
        family=family,
        shape=shape_of(family, changed),
        quantization=quantization,
        widths=_widths(kind, quantization),
    )


def _dense_names(stored: Mapping[str, Stored]) -> dict[str, tuple[int, ...]]:
    """Names and about the shapes of the dense tensors that stored ones stand for, whatever is wrong with them."""
    endings = [suffixes[0] for suffixes in SUFFIXES.values()]
    parts = tuple({suffix for suffixes in (*SUFFIXES.values(), *EXTRAS.values()) for suffix in suffixes})
    found: dict[str, tuple[int, ...]] = {}
    for name, entry in stored.items():
        coded = next((ending for ending in endings if name.endswith(ending)), None)
        if coded is not None:
            found[f"{name.removesuffix(coded)}.weight"] = entry.shape
        elif (block := next((end for end in BLOCK_SUFFIXES if name.endswith(end)), None)) is not None:
            found[name.removesuffix(block)] = entry.shape
        elif name.endswith((".scales", ".biases")):
            continue
        elif name.endswith("_blocks") and len(entry.shape) == 4:
            found[name.removesuffix("_blocks")] = (*entry.shape[:2], entry.shape[2] * 32)
        elif not name.endswith((*parts, "_scales", "_scale_inv")) or name.endswith(".weight"):
            found[name] = entry.shape
    return found


def _read_shards(folder: Path) -> tuple[dict[str, Stored], Index]:
    """Every tensor of every shard that is there, whatever the index says."""
    there = (folder / INDEX).is_file()
    weight_map = read_json(folder / INDEX).get("weight_map") if there else {}
    if not isinstance(weight_map, dict) or not all(isinstance(value, str) for value in weight_map.values()):
        raise InvalidInputError(f"{folder / INDEX} has no sound weight_map; restore it.")
    files = sorted(f for f in folder.glob("*.safetensors") if not f.name.startswith(OWN_NAMES))
    if not files:
        raise no_weights(folder)
    stored: dict[str, Stored] = {}
    for file in files:
        stored |= read_header(file)
    return stored, Index(there=there, weight_map=weight_map, shards=tuple(file.name for file in files))


def _kind(quantization: Mapping[str, Any]) -> Kind:
    method = quantization.get("quant_method")
    if not quantization or method == "fp8":  # block-scaled fp8 is what DeepSeek's own folders are in
        return Kind.PLAIN
    kinds = {"compressed-tensors": Kind.COMPRESSED, "gptq": Kind.GPTQ, BLOCKS_METHOD: Kind.BLOCKS}
    return kinds.get(str(method), Kind.OTHER)


def _widths(kind: Kind, quantization: Mapping[str, Any]) -> tuple[Width, ...]:
    if kind is Kind.GPTQ:
        overrides = {key: row for key, row in _dynamic(quantization).items() if not key.startswith("-:")}
        base = Width(
            targets=("Linear",),
            bits=_bits(quantization.get("bits")),
            group_size=_whole(quantization.get("group_size")) or PER_CHANNEL,
            symmetric=quantization.get("sym", True) is not False,
        )
        return (
            *(
                Width(
                    targets=(PREFIX + key.removeprefix("+:"),),
                    bits=_bits(row.get("bits")) or base.bits,
                    group_size=_whole(row.get("group_size")) or base.group_size,
                    symmetric=row.get("sym", base.symmetric) is not False,
                )
                for key, row in overrides.items()
                if isinstance(row, Mapping)
            ),
            base,
        )
    groups = quantization.get("config_groups") if kind is Kind.COMPRESSED else None
    return tuple(_compressed_width(group) for group in groups.values()) if isinstance(groups, Mapping) else ()


def _compressed_width(group: Any) -> Width:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    settings: Mapping[str, Any] = weights if isinstance(weights, Mapping) else {}
    targets = group.get("targets") if isinstance(group, Mapping) else None
    return Width(
        targets=tuple(map(str, targets)) if isinstance(targets, list) else (),
        bits=_bits(settings.get("num_bits")),
        group_size=_whole(settings.get("group_size")) or PER_CHANNEL,
        symmetric=settings.get("symmetric", True) is not False,
    )


def _excluded(kind: Kind, quantization: Mapping[str, Any]) -> tuple[str, ...]:
    if kind is Kind.GPTQ:
        return tuple(PREFIX + key.removeprefix("-:") for key in _dynamic(quantization) if key.startswith("-:"))
    ignore = quantization.get("ignore")
    return tuple(map(str, ignore)) if isinstance(ignore, list) else ()


def _dynamic(quantization: Mapping[str, Any]) -> Mapping[str, Any]:
    dynamic = quantization.get("dynamic")
    return dynamic if isinstance(dynamic, Mapping) else {}


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _bits(value: Any) -> int | None:
    bits = _whole(value)
    return bits if bits is not None and 0 < bits <= 32 else None
