"""Rules about what has to be there: index, experts, tensors, parts of codes. Each function yields what it found."""

from collections.abc import Iterator

from moepress.converters.safetensors.compressed_tensors_config import ZERO_SUFFIX
from moepress.converters.safetensors.scheme import PER_CHANNEL, Codes
from moepress.errors import InvalidInputError
from moepress.models.forward.tensor_check import check_tensors
from moepress.validation.rules.experts import count_in_config, equal_counts, expert_names, legal_count, whole_groups
from moepress.validation.rules.facts import SUFFIXES, Facts, Kind, Width
from moepress.validation.rules.findings import Effect, Happens, Problem, Runtime, first

_FOLDERS = (Runtime.VLLM, Runtime.SGLANG, Runtime.TRANSFORMERS, Runtime.GPTQMODEL, Runtime.LLAMA_CPP)
_UNLOADED = "may not notice it, and computes with weights that were never loaded"
_COPY = "copy the folder again, or export or quantize again"
_ONE_AXIS = (".g_idx", ".weight_shape", ".weight_global_scale")
_FLOAT_SCALES = {Codes.NVFP4: "F8_E4M3", Codes.MXFP4: "U8"}
_BY_INDEX = (Runtime.TRANSFORMERS, Runtime.GPTQMODEL)
# vLLM and SGLang read every tensor of the shards that the index names, and nothing else.
_UNREAD: Happens = {
    **dict.fromkeys((Runtime.VLLM, Runtime.SGLANG, Runtime.GPTQMODEL), (Effect.WRONG, _UNLOADED)),
    Runtime.TRANSFORMERS: (Effect.WRONG, "starts what is missing at random, with a line in its log"),
    Runtime.LLAMA_CPP: (Effect.REFUSES, "its converter holds the index against the shards and stops"),
}


def index(facts: Facts) -> Iterator[Problem]:
    """The index names the tensors of the shards that are there, no more and no fewer."""
    found = facts.index
    if found is None:
        return
    if not found.there:
        if len(found.shards) > 1:
            alone = dict.fromkeys(_BY_INDEX, (Effect.REFUSES, "finds the shards by the index, and stops without it"))
            what = f"{len(found.shards)} shards and no model.safetensors.index.json"
            yield Problem(what=what, happens=alone, mend=_COPY)
        return
    named = set(found.weight_map.values())
    gone = sorted(named - set(found.shards))
    if gone:
        stops = dict.fromkeys((Runtime.VLLM, *_BY_INDEX), (Effect.REFUSES, "stops at a shard that is not there"))
        yield Problem(what=f"the index names {first(gone)}, which is missing", happens={**_UNREAD, **stops}, mend=_COPY)
        return
    lacking = sorted(set(found.weight_map) - set(facts.tensors))
    if lacking:
        what = f"the index names {first(lacking)}, and no shard has it"
        yield Problem(what=what, happens=_UNREAD, mend=_COPY)
    surplus = sorted(set(facts.tensors) - set(found.weight_map))
    if surplus:
        unread = [name for name in surplus if facts.tensors[name].file.name not in named]
        what = f"the index does not name {first(unread or surplus)}, which a shard has"
        happens = _UNREAD if unread else {Runtime.LLAMA_CPP: _UNREAD[Runtime.LLAMA_CPP]}
        yield Problem(what=what, happens=happens, mend=_COPY)


def experts_complete(facts: Facts) -> Iterator[Problem]:
    """Every expert of every layer has its three matrices, with all their parts."""
    modules, coded = facts.modules(), facts.kind in SUFFIXES
    layers = facts.shape.layers
    if facts.kind is Kind.OTHER or any(expert_names(facts)):
        return  # nobody knows here which names its codes have
    for layer, rows in facts.router_rows().items():
        if facts.family.fused_gate_up and facts.family.at(facts.family.fused_gate_up, layer) in facts.tensors:
            continue
        lacking: dict[int, list[str]] = {0: [], 1: [], 2: []}
        for expert in range(rows):
            for place, name in enumerate(facts.family.expert_names(layer, expert)):
                module = name.removesuffix(".weight")
                there = coded and modules.get(module, frozenset()) >= frozenset(facts.parts_of(module))
                if name not in facts.tensors and not there:
                    lacking[place].append(name.removesuffix(".weight"))
        missing = [name for names in lacking.values() for name in names]
        if not missing or layer >= layers:  # of multi-token-prediction layers `mtp` speaks
            continue
        at_random = any(len(names) == rows for names in lacking.values())
        yield Problem(
            what=f"layer {layer} lacks {first(missing)}",
            happens={
                Runtime.VLLM: (Effect.WRONG, _UNLOADED),
                Runtime.SGLANG: (Effect.WRONG, _UNLOADED),
                Runtime.GPTQMODEL: (Effect.WRONG, _UNLOADED),
                Runtime.TRANSFORMERS: (Effect.WRONG, "starts the layer's experts at random, with a line in its log")
                if at_random
                else (Effect.REFUSES, "stops at a layer with fewer experts than the config states"),
                Runtime.LLAMA_CPP: (Effect.REFUSES, "its converter stops at experts that do not come to a full layer"),
            },
            mend=_COPY,
        )


def all_tensors(facts: Facts) -> Iterator[Problem]:
    """Everything besides the experts is there too, in the shape that the config states."""
    if facts.kind is Kind.OTHER or facts.stored is None or facts.prefix is not None:
        return
    own, counts = (index, experts_complete, complete_codes), (count_in_config, equal_counts, legal_count, whole_groups)
    if any(problem for rule in (*own, expert_names, *counts) for problem in rule(facts)):
        return  # what they say would be said again
    modules = facts.modules()
    parts = {module + part for module, own in modules.items() for part in own}
    shapes = {n: e.shape for n, e in facts.tensors.items() if n not in parts and not n.endswith("_scale_inv")}
    try:
        dense = _dense_shapes(facts)
        whole = (module for module, own in modules.items() if own >= set(facts.parts_of(module)))
        shapes |= {f"{module}.weight": dense[module] for module in whole}
        check_tensors(facts.family, facts.config, facts.shape, shapes, folder=facts.place)
    except InvalidInputError as error:
        text = str(error)
        found = text.partition("config.json: ")[2].rpartition("; restore")[0] or text
        yield Problem(
            what=found,
            happens=dict.fromkeys(_FOLDERS, (Effect.WRONG, _UNLOADED))
            | {Runtime.TRANSFORMERS: (Effect.WRONG, "starts what is missing at random, with a line in its log")},
            mend=_COPY,
        )


def _dense_shapes(facts: Facts) -> dict[str, tuple[int, ...]]:
    """Quantized module -> shape [out, in] of the weight that it stands for; by the scales, for codes may be padded."""
    found: dict[str, tuple[int, ...]] = {}
    for module in facts.modules():
        width = facts.width_of(module)
        packed, scales = facts.tensors.get(f"{module}.weight_packed"), facts.tensors.get(f"{module}.weight_scale")
        order = facts.tensors.get(f"{module}.g_idx")
        words = facts.tensors.get(f"{module}.qweight")
        if words is not None and order is not None:
            found[module] = (words.shape[1], order.shape[0])
        elif packed is not None and scales is not None and width is not None:
            columns = packed.shape[1] * 32 // (width.bits or 4)
            if width.group_size > 0:
                columns = scales.shape[1] * width.group_size
            found[module] = (packed.shape[0], columns)
    return found


def complete_codes(facts: Facts) -> Iterator[Problem]:
    """Every quantized matrix has all its parts, in the shapes and dtypes that bits and groups give."""
    wrong = []
    for module, there in facts.modules().items():
        width, suffixes = facts.width_of(module), facts.parts_of(module)
        if not there >= set(suffixes):
            if not facts.family.expert_of(f"{module}.weight"):  # of experts `experts-complete` speaks
                wrong.append(f"{module} lacks {', '.join(s for s in suffixes if s not in there)}")
        elif width is None:
            wrong.append(f"{module} has codes, and no group of the config is for it")
        else:
            misfit = _wrong_rank(facts, module) or (_misfit(facts, module, width) if width.bits is not None else None)
            wrong += [f"{module}{misfit}"] if misfit else []
    if wrong:
        yield Problem(
            what=first(wrong, 1),
            happens=dict.fromkeys(_FOLDERS, (Effect.REFUSES, "has no place for a tensor of that shape"))
            | {
                Runtime.VLLM: (Effect.WRONG, "of an expert loads what is too short, the rest is whatever memory held"),
                Runtime.TRANSFORMERS: (Effect.WRONG, "spreads scales that are too few, or ends with an error"),
            },
            mend=_COPY,
        )


def _wrong_rank(facts: Facts, module: str) -> str | None:
    """The first part of a matrix that has not as many axes as its kind."""
    for suffix in facts.parts_of(module):
        shape = facts.tensors[module + suffix].shape
        if len(shape) != (1 if suffix in _ONE_AXIS else 2):
            return f"{suffix} has the shape {list(shape)}"
    return None


def _misfit(facts: Facts, module: str, width: Width) -> str | None:
    """The first part of a matrix that does not fit the others, and what is wrong with it."""
    bits, size = width.bits or 0, width.group_size
    parts = {suffix: facts.tensors[module + suffix] for suffix in facts.parts_of(module)}
    if facts.kind is Kind.GPTQ:
        columns, rows = parts[".g_idx"].shape[0], parts[".qweight"].shape[1]
        groups = 1 if size == PER_CHANNEL else -(-columns // size)
        want = {
            ".qweight": ("I32", (columns * bits // 32, rows)),
            ".qzeros": ("I32", (groups, rows * bits // 32)),
            ".scales": ("F16", (groups, rows)),
            ".g_idx": ("I32", (columns,)),
        }
    elif facts.codes in _FLOAT_SCALES:
        rows, groups = parts[".weight_packed"].shape[0], parts[".weight_scale"].shape[1]
        want = {
            ".weight_packed": ("U8", (rows, groups * size // 2)),
            ".weight_scale": (_FLOAT_SCALES[facts.codes], (rows, groups)),
            ".weight_global_scale": ("F32", (1,)),
        }
    else:
        (rows, words), groups = parts[".weight_packed"].shape, parts[".weight_scale"].shape[1]
        columns = words * 32 // bits if size == PER_CHANNEL else groups * size
        want = {
            ".weight_packed": ("I32", (rows, -(-columns * bits // 32))),
            ".weight_scale": (parts[".weight_scale"].dtype, (rows, 1 if size == PER_CHANNEL else groups)),
            ".weight_shape": ("I64", (2,)),
        }
        if ZERO_SUFFIX in parts:
            want[ZERO_SUFFIX] = ("I32", (-(-rows * bits // 32), groups))
    for suffix, (dtype, shape) in want.items():
        if suffix not in parts:
            continue
        if (parts[suffix].dtype, parts[suffix].shape) != (dtype, shape):
            found = f"{parts[suffix].dtype} {list(parts[suffix].shape)}"
            return f"{suffix} is {found}, and {bits} bits in groups of {size} want {dtype} {list(shape)}"
    return None
