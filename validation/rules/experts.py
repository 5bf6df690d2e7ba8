"""Rules about the model itself: experts, groups, names. Each function yields what it found."""

from collections.abc import Iterator

from moepress.converters.gguf.architectures import ARCHITECTURES, Described, gguf_refusal
from moepress.models.families.family import MTP_KEYS, Part
from moepress.validation.rules.facts import Facts
from moepress.validation.rules.findings import Effect, Problem, Runtime

LLAMA_CPP_EXPERTS = 1024
FUSED_SHARED_EXPERTS = 256
_FOLDERS = (Runtime.VLLM, Runtime.SGLANG, Runtime.TRANSFORMERS, Runtime.GPTQMODEL, Runtime.LLAMA_CPP)
_PRUNE_AGAIN = "prune or quantize the original again with moepress, which writes both together"


def expert_names(facts: Facts) -> Iterator[Problem]:
    """Experts have the names of the original folder."""
    if not _renamed(facts):
        return
    yield Problem(
        what=f"experts are named as in transformers' modules, not as {facts.family.gate} on disk",
        happens={
            Runtime.VLLM: (Effect.REFUSES, "has no place for weights of such names"),
            Runtime.TRANSFORMERS: (Effect.WRONG, "finds no experts under their names and starts them at random"),
        },
        mend="keep the original names: prune, quantize and export with moepress, without `--names transformers`",
    )


def _renamed(facts: Facts) -> bool:
    """Whether a family that has names of its own on disk has its experts under those of the modules."""
    if facts.family.derived:
        return False
    own, other = facts.family.gate.split("{layer}")[1].split("{expert}")[0], ".mlp.experts."
    return own != other and any(other in name for name in facts.tensors)


def count_in_config(facts: Facts) -> Iterator[Problem]:
    """The config states as many experts as the routers have rows."""
    rows = {n for layer, n in facts.router_rows().items() if layer < facts.shape.layers}
    if len(rows) == 1 and rows != {facts.shape.experts}:
        yield Problem(
            what=f"config.json states {facts.shape.experts} experts and the routers have {rows.pop()} rows",
            happens=dict.fromkeys(_FOLDERS, (Effect.REFUSES, "cannot load weights of another size")),
            mend=_PRUNE_AGAIN,
        )


def equal_counts(facts: Facts) -> Iterator[Problem]:
    """All layers have the same number of experts."""
    rows = {layer: n for layer, n in facts.router_rows().items() if layer < facts.shape.layers}
    counts = sorted(set(rows.values()))
    if len(counts) > 1:
        yield Problem(
            what=f"layers have between {counts[0]} and {counts[-1]} experts",
            happens=dict.fromkeys(_FOLDERS, (Effect.REFUSES, "builds every layer with one number of experts")),
            mend="keep the same number in every layer (a plan of `moepress plan` does), or export to ONNX",
        )


def whole_groups(facts: Facts) -> Iterator[Problem]:
    """The router's groups have the same number of experts."""
    shape = facts.shape
    if shape.groups > 1 and shape.experts % shape.groups:
        yield Problem(
            what=f"{shape.experts} experts do not fall into {shape.groups} router groups of one size",
            happens={
                Runtime.VLLM: (Effect.WRONG, "drops the grouping without a word"),
                Runtime.SGLANG: (Effect.REFUSES, "its torch path ends with an error"),
                Runtime.TRANSFORMERS: (Effect.WRONG, "mixes tokens without a word"),
                Runtime.GPTQMODEL: (Effect.WRONG, "runs transformers' router, which mixes tokens without a word"),
                Runtime.LLAMA_CPP: (Effect.REFUSES, "aborts"),
            },
            mend=f"keep a multiple of {shape.groups}, or plan with --groups degroup",
        )


def legal_count(facts: Facts) -> Iterator[Problem]:
    """The router can choose as many experts as it does for every token."""
    shape, in_group = facts.shape, facts.shape.experts // facts.shape.groups
    if shape.groups > 1 and shape.experts % shape.groups:
        return  # of which `router-groups` speaks
    happens = (Effect.REFUSES, "its router wants more experts than there are to choose from")
    if shape.experts < shape.top_k:
        what = f"{shape.experts} experts, and the router chooses {shape.top_k}"
    elif shape.groups > 1 and in_group < 2 and facts.family.rule and facts.family.rule.group_score == "top2":
        what = "router groups of one expert, and groups are ranked by their two best"
    elif shape.groups > 1 and shape.top_groups * in_group < shape.top_k:
        what = f"{shape.top_groups} router groups of {in_group} experts, and the router chooses {shape.top_k} of them"
        happens = (Effect.WRONG, "fills up with experts of other groups")
    else:
        return
    yield Problem(
        what=what,
        happens=dict.fromkeys(_FOLDERS, happens),
        mend="keep more experts (`moepress inspect` lists the legal counts)",
    )


def llama_cpp_limit(facts: Facts) -> Iterator[Problem]:
    """llama.cpp has room for so many experts."""
    if facts.shape.experts > LLAMA_CPP_EXPERTS:
        yield Problem(
            what=f"{facts.shape.experts} experts in a layer",
            happens={Runtime.LLAMA_CPP: (Effect.REFUSES, f"takes at most {LLAMA_CPP_EXPERTS}")},
            mend=f"keep at most {LLAMA_CPP_EXPERTS} experts",
        )


def llama_cpp_model(facts: Facts) -> Iterator[Problem]:
    """llama.cpp computes such a model as transformers does: what its code has compiled in, the config says too."""
    if facts.family.name not in ARCHITECTURES or facts.shape.experts > LLAMA_CPP_EXPERTS:
        return  # llama.cpp may know more families than those that are written down
    layers = tuple(facts.router_rows())
    model = Described(family=facts.family, config=facts.config, shape=facts.shape, moe_layers=layers)
    why = gguf_refusal(model)
    if why is not None and not (facts.shape.groups > 1 and facts.shape.experts % facts.shape.groups):
        yield Problem(
            what=why.rstrip("."),
            happens={
                Runtime.LLAMA_CPP: (Effect.WRONG, "computes something else, refuses the file or ends the process")
            },
            mend="run this model in another runtime",
        )


def fast_router(facts: Facts) -> Iterator[Problem]:
    """SGLang's fast router wants a power of two."""
    count = facts.shape.experts
    if count & (count - 1):
        nearest = 1 << (count.bit_length() - 1)
        yield Problem(
            what=f"{count} experts, which is no power of two",
            happens={Runtime.SGLANG: (Effect.SLOWER, "leaves its fused router kernel for a slower path")},
            mend=f"keep {nearest} experts where that is enough",
        )


def fused_shared_expert(facts: Facts) -> Iterator[Problem]:
    """SGLang computes DeepSeek-V3's shared expert among the routed ones, with the original's count."""
    count = facts.shape.experts
    if (
        facts.family.rule
        and facts.family.rule.bias
        and facts.config.get("n_shared_experts")
        and count != FUSED_SHARED_EXPERTS
    ):
        yield Problem(
            what=f"{count} experts beside a shared one",
            happens={
                Runtime.SGLANG: (
                    Effect.SLOWER,
                    f"fuses the shared expert with the routed ones for {FUSED_SHARED_EXPERTS} experts only",
                )
            },
            mend="nothing is wrong; no pruned model has it",
        )


def spread(facts: Facts) -> Iterator[Problem]:
    """Experts can be spread over the devices that --tensor-parallel and --expert-parallel name."""
    count, tensor, expert = facts.shape.experts, facts.tensor_parallel, facts.expert_parallel
    if tensor > count:
        yield Problem(
            what=f"{count} experts for {tensor} devices in tensor parallel",
            happens={Runtime.SGLANG: (Effect.REFUSES, "takes no more devices than there are experts")},
            mend=f"use at most {count} devices, or keep more experts",
        )
    if count % expert:
        yield Problem(
            what=f"{count} experts for {expert} devices in expert parallel",
            happens={Runtime.VLLM: (Effect.REFUSES, "its expert load balancer (EPLB) wants the same number on each")},
            mend=f"keep a multiple of {expert}, or run without EPLB",
        )


def mtp(facts: Facts) -> Iterator[Problem]:
    """The multi-token-prediction layer has as many experts as the others, or is dropped in tensors and config."""
    family, layers, config = facts.family, facts.shape.layers, facts.family.text(facts.config)
    if facts.stored is None or not (family.mtp or family.derived):
        return
    behind = {layer for name in facts.tensors if (layer := family.layer_of(name)) is not None and layer >= layers}
    runtimes = (Runtime.VLLM, Runtime.SGLANG)
    stated = next((key for key in MTP_KEYS if type(config.get(key)) is int and config[key] > 0), None)
    elsewhere = any(".mtp" in f".{name}" or "nextn" in name for name in facts.tensors)  # under names not known here
    if stated is not None and not behind and not elsewhere:
        yield Problem(
            what=f"config.json states {stated} = {config[stated]}, and there is no such layer",
            happens=dict.fromkeys(runtimes, (Effect.REFUSES, "finds no weights for its draft model")),
            mend=f"set {stated} to 0, or prune with --mtp keep",
        )
    for layer in sorted(behind):
        name = family.at(family.router[0], layer)
        router = facts.tensors.get(name) or facts.tensors.get(family.module_name(name))
        rows = router.shape[0] - family.router_extra if router is not None and router.shape else None
        if rows is not None and rows != facts.shape.experts:
            yield Problem(
                what=f"the multi-token-prediction layer {layer} has {rows} experts, the others {facts.shape.experts}",
                happens=dict.fromkeys(runtimes, (Effect.REFUSES, "builds the draft model with the others' count")),
                mend="prune it equally (`moepress prune --mtp keep`) or drop it",
            )


def float32_bias(facts: Facts) -> Iterator[Problem]:
    """The router's correction bias is fp32."""
    wrong = [
        entry
        for name, entry in facts.tensors.items()
        if facts.family.float32 and name.endswith(facts.family.float32) and entry.dtype not in ("F32", "F64")
        # Of a derived family all that transformers keeps in fp32 is listed: norms and the like choose no experts.
        if not facts.family.derived or (name.endswith("bias") and facts.family.part_of(name) is Part.ROUTER)
    ]
    if wrong:
        yield Problem(
            what=f"{wrong[0].name} is {wrong[0].dtype}, not F32",
            happens=dict.fromkeys(_FOLDERS, (Effect.WRONG, "chooses other experts for some of the tokens")),
            mend="take the bias from the original folder, where it is F32: prune or quantize that one with moepress",
        )
