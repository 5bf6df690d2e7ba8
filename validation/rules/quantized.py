"""Rules about codes: bits, groups, zero points, which modules may have them. Each function yields what it found."""

from collections.abc import Iterable, Iterator

from moepress.converters.safetensors.compressed_tensors_config import ZERO_SUFFIX
from moepress.converters.safetensors.patterns import PREFIX
from moepress.converters.safetensors.scheme import PER_CHANNEL, Codes
from moepress.converters.safetensors.targets import JOINED
from moepress.models.families.family import Part, part_of
from moepress.validation.rules.bits import bits_for
from moepress.validation.rules.facts import Facts, Kind, Width
from moepress.validation.rules.findings import Effect, Happens, Problem, Runtime, first

KERNEL_BITS = bits_for()
GPTQ_GROUPS = (PER_CHANNEL, 32, 64, 128)
MARLIN_HIDDEN, MARLIN_WIDTH = 128, 64
_HF = (Runtime.VLLM, Runtime.SGLANG, Runtime.TRANSFORMERS, Runtime.GPTQMODEL, Runtime.LLAMA_CPP)
_AGAIN = "quantize again with moepress"
_AT_RANDOM = "starts its weights at random, with a line in its log"
_REFUSES, _WRONG, _SLOWER = Effect.REFUSES, Effect.WRONG, Effect.SLOWER


def layout(facts: Facts) -> Iterator[Problem]:
    """The runtime reads this layout at all."""
    what = f"the folder is {facts.kind.value}"
    if facts.kind is Kind.ONNX:
        happens = dict.fromkeys(_HF, (_REFUSES, "does not read ONNX"))
        yield Problem(what=what, happens=happens, mend="give it the folder that was exported")
        return
    if facts.kind is Kind.MLX:
        happens = dict.fromkeys((*_HF, Runtime.ONNXRUNTIME), (_REFUSES, "does not read MLX's layout"))
        yield Problem(what=what, happens=happens, mend="give it the folder that was exported")
        return
    if facts.kind is Kind.BLOCKS:
        happens = dict.fromkeys((*_HF, Runtime.ONNXRUNTIME), (_REFUSES, "does not know such a folder"))
        yield Problem(
            what=what, happens=happens, mend="`moepress export FOLDER --to gguf`, and give the file to llama.cpp"
        )
        return
    if facts.codes is not Codes.INT:
        yield from _float_layout(facts)
        return
    happens = {Runtime.ONNXRUNTIME: (_REFUSES, "reads ONNX only")}
    yield Problem(what=what, happens=happens, mend="`moepress export FOLDER --to onnx`")
    if facts.kind in (Kind.COMPRESSED, Kind.PLAIN):
        before = "quantize it, then " if facts.kind is Kind.PLAIN else ""
        happens = {Runtime.GPTQMODEL: (_REFUSES, "reads the GPTQ layout")}
        yield Problem(what=what, happens=happens, mend=f"{before}`moepress export FOLDER --to gptq`")
    if facts.kind is Kind.OTHER:
        method = facts.quantization.get("quant_method")
        named = f"quantization_config names {method!r}, which is neither compressed-tensors nor gptq"
        yield Problem(
            what=named if facts.form is None else f"the weights are stored as {facts.form}",
            happens=dict.fromkeys(_HF, (_REFUSES, "is not known to read it for experts")),
            mend=_AGAIN,
        )


def _float_layout(facts: Facts) -> Iterator[Problem]:
    happens: Happens = {
        Runtime.ONNXRUNTIME: (_REFUSES, "reads ONNX only"),
        Runtime.GPTQMODEL: (_REFUSES, "reads the GPTQ layout"),
    }
    what = f"the folder is {facts.kind.value} with {facts.codes} floats"
    yield Problem(what=what, happens=happens, mend="quantize the original with --bits, and export that")
    if facts.codes is Codes.MXFP4:
        happens = {Runtime.LLAMA_CPP: (_REFUSES, "has a converter that reads MXFP4 of a few models alone")}
        yield Problem(what=what, happens=happens, mend="`moepress export FOLDER --to gguf`, which changes no code")


def divided_scales(facts: Facts) -> Iterator[Problem]:
    """transformers takes the scales of experts as they are, and NVFP4's have a divisor."""
    if facts.codes is Codes.NVFP4 and facts.family.loads_single:
        happens = "leaves the divisor out: experts' weights are thousands of times too large, without an error"
        yield Problem(
            what="the scales of experts are to be divided by weight_global_scale",
            happens={Runtime.TRANSFORMERS: (_WRONG, happens)},
            mend="run it in vLLM, or quantize with --scheme mxfp4 or --bits where transformers is to run it",
        )


def negative_scales(facts: Facts) -> Iterator[Problem]:
    """Scales of either sign: vLLM's kernels with activations of 8 bits take them for positive."""
    if facts.signed and facts.kind in (Kind.COMPRESSED, Kind.GPTQ):
        happens = "with VLLM_MARLIN_INPUT_DTYPE=int8 computes something else, without an error (its issue 48905)"
        yield Problem(
            what="about half of the scales are negative",
            happens={Runtime.VLLM: (Effect.OPTION, happens)},
            mend="leave that variable unset, which is its default, or quantize with --positive-scales",
        )


def mlx(facts: Facts) -> Iterator[Problem]:
    """mlx-lm reads the folder: its own layout, plain weights, and of DeepSeek-V3 codes of 4 bits."""
    if facts.kind in (Kind.PLAIN, Kind.MLX):
        return
    effect, happens, mend = (
        _REFUSES,
        "does not read it",
        "`moepress export FOLDER --to mlx` of the compressed-tensors folder",
    )
    if facts.codes is not Codes.INT:
        mend = "quantize the original with --bits, and export that"
    if facts.kind is Kind.COMPRESSED and facts.family.name in ("deepseek_v3", "kimi_k2"):
        if all(width.bits == 4 and width.symmetric for width in facts.widths):
            return
        effect, happens = _WRONG, "takes all codes for ones of 4 bits, without an error"
    if facts.kind is Kind.BLOCKS:
        mend = "`moepress export FOLDER --to gguf`, and run it in llama.cpp"
    yield Problem(what=f"the folder is {facts.kind.value}", happens={Runtime.MLX: (effect, happens)}, mend=mend)


def gptq_in_transformers(facts: Facts) -> Iterator[Problem]:
    """transformers has no loader for GPTQ experts."""
    if facts.kind is Kind.GPTQ:
        yield Problem(
            what="the experts are in the GPTQ layout",
            happens={Runtime.TRANSFORMERS: (_WRONG, "starts the experts at random, without an error")},
            mend="use the compressed-tensors folder that it was exported from",
        )


def single_in_transformers(facts: Facts) -> Iterator[Problem]:
    """Of some models transformers makes the experts of a layer of one tensor alone, which has no quantized form."""
    if facts.kind is Kind.COMPRESSED and not facts.family.loads_single:
        yield Problem(
            what="the experts are stored one by one, and transformers has no loader of such for this model",
            happens={Runtime.TRANSFORMERS: (_WRONG, "starts the experts at random, with a warning")},
            mend="prune without quantizing where transformers is to run it",
        )


def gptqmodel_names(facts: Facts) -> Iterator[Problem]:
    """GPTQModel looks for experts under the names of transformers' modules."""
    own = facts.family.down
    if facts.kind is Kind.GPTQ and ".mlp.experts.{expert}.down_proj." not in own:
        if any(".mlp.experts." in name for name in facts.tensors):
            return
        yield Problem(
            what=f"experts have the names of the original folder ({own.removesuffix('.weight')})",
            happens={Runtime.GPTQMODEL: (_REFUSES, "wants mlp.experts.E.gate_proj, up_proj and down_proj")},
            mend="export it with `--to gptq --names transformers`, or run it in vLLM or SGLang",
        )


def kernel_bits(facts: Facts) -> Iterator[Problem]:
    """Experts have 4 or 8 bits, for which there are kernels."""
    wrong = sorted({w.bits for w in facts.widths if w.bits is not None and w.bits not in KERNEL_BITS})
    if not wrong:
        return
    vllm = "takes 4 and 8 bits only"
    if facts.kind is Kind.COMPRESSED:
        vllm = "takes other than 4 and 8 bits in its Humming kernels alone, of a package of their own, for NVIDIA GPUs"
    yield Problem(
        what=f"codes have {' and '.join(map(str, wrong))} bits",
        happens={Runtime.VLLM: (_REFUSES, vllm), Runtime.SGLANG: (_REFUSES, "takes 4 and 8 bits only")},
        mend="quantize with --bits 4 or 8, export to ONNX, GGUF or MLX"
        + (", or start vLLM with `--moe-backend humming`" if facts.kind is Kind.COMPRESSED else ""),
    )


def group_size(facts: Facts) -> Iterator[Problem]:
    """GPTQ experts have groups of 32, 64, 128 columns or one."""
    wrong = sorted({w.group_size for w in facts.widths} - set(GPTQ_GROUPS))
    if facts.kind is Kind.GPTQ and wrong:
        yield Problem(
            what=f"groups have {wrong[0]} columns",
            happens={Runtime.VLLM: (_REFUSES, "takes groups of 32, 64 and 128 columns, or one scale per row")},
            mend="quantize with --group-size 32, 64 or 128",
        )


def whole_shards(facts: Facts) -> Iterator[Problem]:
    """A device's share of an expert's width holds whole groups."""
    width, devices = facts.shape.expert_width, facts.tensor_parallel
    for size in sorted({w.group_size for w in facts.widths if w.group_size > 0}):
        if width % devices or (width // devices) % size:
            over = f" over {devices} devices" if devices > 1 else ""
            yield Problem(
                what=f"experts of width {width}{over} do not fall into whole groups of {size}",
                happens={Runtime.VLLM: (_REFUSES, "cannot split the scales")},
                mend="quantize with a smaller --group-size, or use fewer devices",
            )


def marlin(facts: Facts) -> Iterator[Problem]:
    """The shapes suit Marlin, vLLM's fast kernel for quantized experts."""
    if not facts.is_quantized:
        return
    reasons = []
    if facts.shape.hidden % MARLIN_HIDDEN:
        reasons.append(f"hidden size {facts.shape.hidden} is no multiple of {MARLIN_HIDDEN}")
    share = facts.shape.expert_width // facts.tensor_parallel
    sizes = {w.group_size for w in facts.widths}
    if any(share % max(MARLIN_WIDTH, size) for size in sizes):
        reasons.append(f"expert width {share} is no multiple of {MARLIN_WIDTH} and of the groups")
    if facts.kind is Kind.COMPRESSED and facts.codes is Codes.INT and not sizes <= set(GPTQ_GROUPS):
        reasons.append(f"groups have {max(sizes - set(GPTQ_GROUPS))} columns")
    if reasons:
        yield Problem(
            what="; ".join(reasons),
            happens={Runtime.VLLM: (_SLOWER, "leaves Marlin, its fast kernel for experts, for a slower one")},
            mend="use groups of 32, 64 or 128; the model's own sizes cannot be changed",
        )


def symmetric(facts: Facts) -> Iterator[Problem]:
    """Codes are symmetric; vLLM and SGLang have kernels for compressed-tensors experts with zero points of 4 bits."""
    stored = [n for n in facts.tensors if n.endswith(ZERO_SUFFIX)]
    if not stored and all(width.symmetric for width in facts.widths):
        return
    happens = {Runtime.TRANSFORMERS: (_REFUSES, "fails to load asymmetric experts")}
    if any(width.bits == 8 and not width.symmetric for width in facts.widths):
        happens |= {Runtime.VLLM: (_REFUSES, "has kernels for experts with zero points at 4 bits only")}
    if facts.kind is Kind.GPTQ:
        happens = dict.fromkeys((Runtime.VLLM, Runtime.SGLANG), (_REFUSES, "takes symmetric GPTQ experts only"))
        happens |= {Runtime.GPTQMODEL: (_REFUSES, "takes zero points only of folders that say that it made them")}
    yield Problem(what="codes are asymmetric", happens=happens, mend=f"{_AGAIN}, without --asymmetric")


def activation_order(facts: Facts) -> Iterator[Problem]:
    """Groups are in the order of the columns (desc_act false)."""
    if facts.kind is not Kind.GPTQ:
        return
    grouped = any(width.group_size > 0 for width in facts.widths)
    if facts.quantization.get("desc_act") is True and grouped:
        yield Problem(
            what="desc_act is true, with groups",
            happens={Runtime.VLLM: (_REFUSES, "refuses activation order, which it no longer has")},
            mend=f"{_AGAIN}: its groups are static, whatever order the codes are solved in",
        )


def mixed_by_layer(facts: Facts) -> Iterator[Problem]:
    """The experts of all layers have the same bits."""
    if len(_expert_widths(facts)) < 2:
        return
    if facts.kind is Kind.GPTQ:
        yield Problem(
            what="quantization_config.dynamic gives some experts bits of their own",
            happens={
                Runtime.SGLANG: (_WRONG, "ignores it for experts"),
                Runtime.TRANSFORMERS: (_WRONG, "ignores it"),
            },
            mend="use one scheme for all experts",
        )
        return
    yield Problem(
        what=f"bits of experts are mixed: {len(facts.widths)} config groups",
        happens={
            Runtime.TRANSFORMERS: (_WRONG, "takes one config group for all experts, without an error"),
            Runtime.LLAMA_CPP: (_REFUSES, "its converter takes one config group"),
        },
        mend="quantize without --mixed-bits, or run it in vLLM, SGLang or ONNX Runtime",
    )


def mixed_by_part(facts: Facts) -> Iterator[Problem]:
    """All Linears have the experts' bits."""
    experts = _expert_widths(facts)
    if facts.kind is not Kind.COMPRESSED or len(experts) != 1 or len(facts.widths) < 2:
        return
    others = {_of(w) for m in facts.modules() if not facts.family.expert_of(f"{m}.weight") and (w := facts.width_of(m))}
    others = others or {_of(width) for width in facts.widths} - experts
    taken = next((w for w in facts.widths if any(_speaks_of_experts(target) for target in w.targets)), None)
    taken = taken or next(
        (w for w in facts.widths if any(not t.startswith(PREFIX) for t in w.targets)), facts.widths[0]
    )
    if {_of(taken)} != experts:
        yield Problem(
            what=f"the experts have another width than {', '.join(taken.targets)[:60]}, which seems to be theirs",
            happens={
                Runtime.TRANSFORMERS: (_WRONG, "unpacks experts by the first group whose `re:` target names them")
            },
            mend="put the experts' config group first, with a `re:` target that says `experts`",
        )
    elif len(others) > 1:
        yield Problem(
            what="Linears besides the experts have several widths",
            happens={
                Runtime.TRANSFORMERS: (Effect.OPTION, "with `dequantize=True` it takes one width for all of them")
            },
            mend="load it without that option, or give attention, shared experts and dense MLPs one width",
        )
    yield Problem(
        what=f"experts and other Linears have different bits: {len(facts.widths)} config groups",
        happens={Runtime.LLAMA_CPP: (Effect.EXPORT, "its converter takes one config group, its files any")},
        mend="`moepress export FOLDER --to gguf`",
    )


def _of(width: Width) -> tuple[int | None, int]:
    return width.bits, width.group_size


def _speaks_of_experts(target: str) -> bool:
    """As transformers 5.23 asks (`integrations/compressed_tensors.py`)."""
    return target.startswith(PREFIX) and "experts" in target


def _expert_widths(facts: Facts) -> set[tuple[int | None, int]]:
    """Bits and groups of routed experts; of what is yet to be made, those of each layer's first by the config."""
    if not facts.widths:
        return set()
    names: Iterable[str] = facts.modules()
    if not names:
        names = [facts.family.expert_names(layer, 0)[0].removesuffix(".weight") for layer in range(facts.shape.layers)]
    found = {m: facts.width_of(m) for m in names if facts.family.expert_of(f"{m}.weight") is not None}
    return {_of(width) for width in found.values() if width is not None}


def mixed_in_layer(facts: Facts) -> Iterator[Problem]:
    """The experts of a layer have the same bits, and gate, up and down too."""
    if len(facts.widths) < 2:
        return
    found: dict[int, set[tuple[int | None, int]]] = {}
    for module in facts.modules():
        layer, width = facts.family.layer_of(f"{module}."), facts.width_of(module)
        if layer is not None and width is not None and facts.family.expert_of(f"{module}.weight"):
            found.setdefault(layer, set()).add((width.bits, width.group_size))
    mixed = sorted(layer for layer, widths in found.items() if len(widths) > 1)
    if mixed:
        yield Problem(
            what=f"the experts of layer {mixed[0]} differ in bits or groups",
            happens={
                Runtime.VLLM: (_REFUSES, "wants one scheme for all matrices of a layer's experts"),
                Runtime.SGLANG: (_REFUSES, "has one width for a layer's experts"),
                Runtime.TRANSFORMERS: (_WRONG, "loads several config groups wrong, without an error"),
                Runtime.LLAMA_CPP: (_REFUSES, "its converter takes one config group"),
            },
            mend="give all experts of a layer the same bits",
        )


def plain_router(facts: Facts) -> Iterator[Problem]:
    """Routers are not quantized."""
    routers = sorted(m for m in facts.modules() if _part(facts, m) is Part.ROUTER)
    if routers:
        yield Problem(
            what=f"the router {routers[0]} is quantized",
            happens=dict.fromkeys((*_HF[:2], Runtime.LLAMA_CPP), (_REFUSES, "has a router with plain weights only"))
            | {Runtime.TRANSFORMERS: (_WRONG, _AT_RANDOM)},
            mend=f"{_AGAIN}: routers stay as they are",
        )


def excluded_router(facts: Facts) -> Iterator[Problem]:
    """The config says of every router that it is not quantized; of GPTQ vLLM sees that in the tensors."""
    if facts.kind is not Kind.COMPRESSED:
        return
    excluded = facts.excluder()
    open_ = [m for m in facts.plain_linears() if _part(facts, m) is Part.ROUTER and not excluded(m)]
    if open_:
        yield Problem(
            what=f"quantization_config.ignore does not name the router {first(open_, 1)}",
            happens={
                Runtime.VLLM: (_REFUSES, "builds the gate of some families (qwen3_moe) quantized, without weights")
            },
            mend="name every router in quantization_config.ignore",
        )


def excluded_linears(facts: Facts) -> Iterator[Problem]:
    """The ignore list names every Linear with plain weights, and none with codes."""
    if facts.kind is not Kind.COMPRESSED:
        return
    excluded = facts.excluder()
    plain = [m for m in facts.plain_linears() if _part(facts, m) not in (Part.ROUTER, Part.NORMS, Part.MTP)]
    open_ = [m for m in plain if not excluded(m)]
    in_vllm: Happens = {}
    if any(m != facts.family.head.removesuffix(".weight") for m in open_):  # whose codes vLLM wants by name
        in_vllm = {Runtime.VLLM: (_REFUSES, "builds it quantized and has no place for plain weights")}
    if open_:
        yield Problem(
            what=f"{first(open_, 1)} has plain weights, and quantization_config.ignore does not name it",
            happens={Runtime.TRANSFORMERS: (_REFUSES, "looks for its codes and ends with an error"), **in_vllm},
            mend="name it in quantization_config.ignore",
        )
    shut = [m for m in facts.modules() if excluded(m)]
    if shut:
        yield Problem(
            what=f"{first(shut, 1)} has codes, and quantization_config.ignore names it",
            happens={
                Runtime.TRANSFORMERS: (_WRONG, _AT_RANDOM),
                Runtime.VLLM: (_REFUSES, "builds it unquantized and has no place for codes"),
            },
            mend="take it out of quantization_config.ignore",
        )


def kv_b_proj(facts: Facts) -> Iterator[Problem]:
    """What a family never quantizes has plain weights: kv_b_proj of latent attention."""
    own = [m for m in facts.modules() if facts.family.never_quantize and m.endswith(facts.family.never_quantize)]
    if own:
        yield Problem(
            what=f"{own[0]} is quantized",
            happens={Runtime.SGLANG: (_WRONG, "unpacks its codes as AWQ")},
            mend=f"{_AGAIN}: kv_b_proj stays as it is",
        )


def plain_embeddings(facts: Facts) -> Iterator[Problem]:
    """Embeddings are not quantized, nor a GPTQ model's lm_head."""
    table = facts.family.embeddings.removesuffix(".weight")
    wrong = [m for m in facts.modules() if m == table or (facts.kind is Kind.GPTQ and m == "lm_head")]
    if wrong or (facts.kind is Kind.GPTQ and facts.quantization.get("lm_head") is True):
        yield Problem(
            what=f"{wrong[0] if wrong else 'lm_head'} is quantized",
            happens=dict.fromkeys(_HF, (_REFUSES, "reads it with plain weights only"))
            | {Runtime.TRANSFORMERS: (_WRONG, _AT_RANDOM)},
            mend="quantize without --include lm_head; embeddings are never quantized",
        )


def fused_alike(facts: Facts) -> Iterator[Problem]:
    """Matrices that a runtime joins are quantized alike."""
    if not facts.is_quantized:
        return
    quantized = facts.modules()
    every = {
        m: m in quantized for m in (*quantized, *facts.plain_linears()) if not facts.family.expert_of(f"{m}.weight")
    }
    for module in every:
        for names in JOINED.values():
            if not module.endswith(f".{names[0]}"):
                continue
            stem = module.removesuffix(names[0])
            there = {name: every[stem + name] for name in names if stem + name in every}
            if len(set(there.values())) > 1:
                yield Problem(
                    what=f"of {stem}{', '.join(there)} some are quantized and some are not",
                    happens={Runtime.VLLM: (_REFUSES, "joins them to one matrix, whose parts must agree")},
                    mend="quantize all of them or none (`--include attention` takes all)",
                )
                return


def fp8_beside_gptq(facts: Facts) -> Iterator[Problem]:
    """No fp8 weights beside GPTQ codes."""
    wrong = [name for name, entry in facts.tensors.items() if entry.dtype.startswith("F8")]
    if facts.kind is Kind.GPTQ and wrong:
        yield Problem(
            what=f"{wrong[0]} is fp8",
            happens={Runtime.VLLM: (_REFUSES, "takes bf16 and fp16 beside GPTQ codes, no fp8")},
            mend="write what is not quantized in bf16, as `moepress quantize` does",
        )


def config_keys(facts: Facts) -> Iterator[Problem]:
    """The config has the keys by which loaders tell what the codes are."""
    settings, lacking = facts.quantization, []
    if facts.kind is Kind.COMPRESSED:
        lacking = [key for key in ("format", "config_groups") if not settings.get(key)]
        lacking += ["num_bits"] if any(width.bits is None for width in facts.widths) else []
    elif facts.kind is Kind.GPTQ:
        lacking = [key for key in ("bits", "group_size", "desc_act", "sym") if key not in settings]
    if lacking:
        yield Problem(
            what=f"quantization_config lacks {', '.join(lacking)}",
            happens=dict.fromkeys(_HF, (_REFUSES, "cannot tell how the codes are to be read")),
            mend="restore config.json, or export or quantize again",
        )


def same_configs(facts: Facts) -> Iterator[Problem]:
    """quantize_config.json says what config.json says."""
    other = facts.quantize_config
    if facts.kind is not Kind.GPTQ or other is None:
        return
    wrong = [key for key in ("bits", "group_size", "desc_act", "sym", "checkpoint_format", "dynamic", "pack_dtype")
             if other.get(key) != facts.quantization.get(key)]  # fmt: skip
    if wrong:
        yield Problem(
            what=f"quantize_config.json and config.json disagree about {', '.join(wrong)}",
            happens=dict.fromkeys(
                (Runtime.VLLM, Runtime.SGLANG, Runtime.GPTQMODEL),
                (_WRONG, "goes by one of them, which may be the wrong one"),
            ),
            mend="write the same JSON into both, or export again",
        )


def _part(facts: Facts, module: str) -> Part:
    return part_of(facts.family, f"{module}.weight", facts.shape.layers)
