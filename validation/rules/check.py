"""The table of rules by which runtimes read an output, and what they find in it.

No runtime is needed for it. `rules.sources` says of which releases the rules are, and whether these were run or their
source was read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moepress.compress.gptq.include import Include
from moepress.compress.pruning.plan import Plan
from moepress.converters.gguf.file import gguf_file, open_gguf
from moepress.runs.store.remote import url_of
from moepress.validation.rules import experts, graphs, presence, quantized, sources, stated
from moepress.validation.rules.facts import Facts, Kind, facts_to_be, planned_facts, read_facts
from moepress.validation.rules.findings import Effect, Finding, Problem, Runtime
from moepress.validation.rules.gguf_files import FILE_RULES
from moepress.validation.rules.sources import Source, source_for

__all__ = ["MADE_FOR", "RULES", "Checked", "Rule", "check_folder", "findings", "notes_before", "planned_notes"]

_SERVERS = (sources.VLLM, sources.SGLANG)
_VLLM, _SGLANG, _TRANSFORMERS = (sources.VLLM,), (sources.SGLANG,), (sources.TRANSFORMERS,)
_VLLM_RAN, _GPTQMODEL = (sources.VLLM_RAN,), (sources.GPTQMODEL,)
_IN_VLLM = (sources.VLLM_RAN, sources.TRANSFORMERS)
_LOADERS = (*_SERVERS, sources.CONVERTER)
_ALL = (*_LOADERS, sources.TRANSFORMERS)
_ALL_RAN = (*_IN_VLLM, sources.SGLANG, sources.CONVERTER)
_SIGNS = (
    *sources.said("vLLM's issue 48905", Runtime.VLLM),
    *(sources.AUTOGPTQ, sources.GPTQMODEL, sources.TRANSFORMERS, sources.ONNXRUNTIME, sources.LLAMA_CPP_RAN),
    sources.MLX,
)
_KINDS = sources.said("what each runtime's loader is for")
_STATED = sources.said("bug reports (sglang 7593, 23841), and how such loaders work")
_REGISTRIES = (*_SERVERS, *sources.said("what llama.cpp's users report", Runtime.LLAMA_CPP))
_HEADS = (sources.VLLM_RAN, *sources.said("how such loaders work", Runtime.SGLANG, Runtime.LLAMA_CPP), *_TRANSFORMERS)
_ORT_CUDA = sources.said("ONNX Runtime's documents of July 2026 for CUDA", Runtime.ONNXRUNTIME)
_ORT = (sources.ONNXRUNTIME,)

MADE_FOR: Mapping[Kind, tuple[Runtime, ...]] = {
    Kind.PLAIN: (Runtime.VLLM, Runtime.SGLANG, Runtime.TRANSFORMERS, Runtime.LLAMA_CPP),
    Kind.COMPRESSED: (Runtime.VLLM, Runtime.SGLANG, Runtime.TRANSFORMERS, Runtime.LLAMA_CPP),
    Kind.GPTQ: (Runtime.VLLM, Runtime.SGLANG, Runtime.GPTQMODEL),
    Kind.ONNX: (Runtime.ONNXRUNTIME,),
    Kind.BLOCKS: (),
    Kind.GGUF: (Runtime.LLAMA_CPP,),
    Kind.MLX: (Runtime.MLX,),
    Kind.OTHER: tuple(Runtime),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A rule: its name, the function that looks, and what it was checked against."""

    name: str
    look: Callable[[Facts], Iterator[Problem]]
    sources: tuple[Source, ...]


def _rule(name: str, look: Callable[[Facts], Iterator[Problem]], sources: tuple[Source, ...]) -> Rule:
    return Rule(name=name, look=look, sources=sources)


RULES: tuple[Rule, ...] = (
    _rule("layout", quantized.layout, _KINDS),
    _rule("mlx-layout", quantized.mlx, (sources.MLX,)),
    _rule("one-set-of-weights", stated.one_set, _TRANSFORMERS),
    _rule("tensor-names", stated.tensor_names, _IN_VLLM),
    _rule("quantization-stated", stated.quantization, _STATED),
    _rule("architectures", stated.architectures, _REGISTRIES),
    _rule("tied-head", stated.tied_head, _HEADS),
    _rule("index", presence.index, _ALL_RAN),
    _rule("experts-complete", presence.experts_complete, _ALL_RAN),
    _rule("expert-names", experts.expert_names, _IN_VLLM),
    _rule("tensors-complete", presence.all_tensors, _IN_VLLM),
    _rule("expert-count-in-config", experts.count_in_config, _IN_VLLM),
    _rule("expert-count-by-layer", experts.equal_counts, _ALL_RAN),
    _rule("router-groups", experts.whole_groups, _ALL),
    _rule("expert-count-legal", experts.legal_count, _IN_VLLM),
    _rule("expert-limit", experts.llama_cpp_limit, (sources.CONVERTER,)),
    _rule("llama-cpp-model", experts.llama_cpp_model, (sources.LLAMA_CPP, sources.LLAMA_CPP_RAN)),
    _rule("expert-power-of-two", experts.fast_router, _SGLANG),
    _rule("shared-expert-fusion", experts.fused_shared_expert, _SGLANG),
    _rule("parallel-experts", experts.spread, _SERVERS),
    _rule("mtp", experts.mtp, _SERVERS),
    _rule("correction-bias-fp32", experts.float32_bias, _GPTQMODEL),
    _rule("gptq-in-transformers", quantized.gptq_in_transformers, _TRANSFORMERS),
    _rule("experts-in-transformers", quantized.single_in_transformers, _TRANSFORMERS),
    _rule("gptqmodel-names", quantized.gptqmodel_names, (sources.GPTQMODEL_RAN,)),
    _rule("bits", quantized.kernel_bits, (sources.VLLM_RAN, sources.SGLANG)),
    _rule("group-size", quantized.group_size, _VLLM_RAN),
    _rule("group-size-in-width", quantized.whole_shards, _VLLM_RAN),
    _rule("marlin-shapes", quantized.marlin, _VLLM),
    _rule("symmetric", quantized.symmetric, (*_ALL_RAN, sources.GPTQMODEL_RAN)),
    _rule("divided-scales", quantized.divided_scales, _TRANSFORMERS),
    _rule("negative-scales", quantized.negative_scales, _SIGNS),
    _rule("desc-act", quantized.activation_order, _VLLM_RAN),
    _rule("mixed-bits-by-layer", quantized.mixed_by_layer, _ALL),
    _rule("mixed-bits-by-part", quantized.mixed_by_part, (*_TRANSFORMERS, sources.CONVERTER)),
    _rule("mixed-bits-in-layer", quantized.mixed_in_layer, _ALL_RAN),
    _rule("router-unquantized", quantized.plain_router, _ALL_RAN),
    _rule("router-excluded", quantized.excluded_router, _VLLM_RAN),
    _rule("linears-excluded", quantized.excluded_linears, _IN_VLLM),
    _rule("kv-b-proj-unquantized", quantized.kv_b_proj, _SGLANG),
    _rule("embeddings-unquantized", quantized.plain_embeddings, _IN_VLLM),
    _rule("fused-linears", quantized.fused_alike, _VLLM_RAN),
    _rule("fp8-beside-gptq", quantized.fp8_beside_gptq, _VLLM_RAN),
    _rule("config-keys", quantized.config_keys, (*_IN_VLLM, *_GPTQMODEL)),
    _rule("gptq-configs", quantized.same_configs, _GPTQMODEL),
    _rule("codes-complete", presence.complete_codes, (*_IN_VLLM, sources.COMPRESSED)),
    _rule("onnx-places", graphs.places, _ORT),
    _rule("onnx-bits", graphs.expert_bits, _ORT),
    _rule("onnx-interleaved-rows", graphs.interleaved_rows, _ORT),
    _rule("onnx-raw-codes", graphs.raw_weights, _ORT),
    _rule("onnx-routing", graphs.own_routing, _ORT_CUDA),
    _rule("onnx-no-g-idx", graphs.no_order, _ORT),
    _rule("onnx-codes-shape", graphs.packed_shape, _ORT),
    _rule("onnx-cache", graphs.caches, (sources.GENAI,)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What `check` found in a folder.

    Attributes:
        folder: where it lies.
        kind: how its weights are laid out.
        runtimes: those whose rules were held against it.
        rules: how many rules there are.
        findings: those that fail first.
    """

    folder: str
    kind: Kind
    runtimes: tuple[Runtime, ...]
    rules: int
    findings: tuple[Finding, ...]

    @property
    def failing(self) -> tuple[Finding, ...]:
        """Findings for which the folder cannot be used in a runtime."""
        return tuple(finding for finding in self.findings if finding.fails)


def findings(facts: Facts, runtimes: Iterable[Runtime]) -> tuple[Finding, ...]:
    """What the rules find for these runtimes; what fails comes before what is slower, else in the table's order."""
    asked = tuple(runtimes)
    found = [
        Finding(
            rule=rule.name,
            runtime=runtime,
            effect=problem.happens[runtime][0],
            what=problem.what,
            happens=problem.happens[runtime][1],
            mend=problem.mend,
            source=source_for(rule.sources, runtime),
        )
        for rule in RULES
        for problem in _looked(rule, facts)
        for runtime in asked
        if runtime in problem.happens
    ]
    return tuple(sorted(found, key=lambda finding: not finding.fails))


def _looked(rule: Rule, facts: Facts) -> Iterator[Problem]:
    """An ONNX folder's config.json is the original's: only its graph counts. MLX has names of its own."""
    if facts.kind in (Kind.ONNX, Kind.MLX) and not rule.name.startswith("onnx") and rule.name != "layout":
        return iter(())
    return rule.look(facts)


def check_folder(
    folder: Path, runtimes: Iterable[Runtime] = (), *, tensor_parallel: int = 1, expert_parallel: int = 1
) -> Checked:
    """Hold a folder against the rules of these runtimes; of none: of those that its layout is made for.

    Raises:
        InvalidInputError: it is no model folder, or a file in it is not what it says it is.
        UnsupportedError: the model type is not in the table; an ONNX folder, and onnx is not installed.
    """
    file = gguf_file(folder)
    if file is not None:
        return _check_gguf(file, runtimes)
    facts = read_facts(folder, tensor_parallel=tensor_parallel, expert_parallel=expert_parallel)
    asked = tuple(dict.fromkeys(runtimes)) or MADE_FOR[facts.kind]
    return Checked(
        folder=url_of(folder) or str(folder),
        kind=facts.kind,
        runtimes=asked,
        rules=len(RULES),
        findings=findings(facts, asked),
    )


def _check_gguf(file: Path, runtimes: Iterable[Runtime]) -> Checked:
    """A GGUF file, which llama.cpp alone reads."""
    model, asked = open_gguf(file), tuple(dict.fromkeys(runtimes)) or MADE_FOR[Kind.GGUF]
    found = [
        Finding(
            rule="layout",
            runtime=runtime,
            effect=Effect.REFUSES,
            what="the file is GGUF",
            happens="is not known to read it for experts",
            mend="give it the folder that was exported",
            source=source_for(_KINDS, runtime),
        )
        for runtime in asked
        if runtime is not Runtime.LLAMA_CPP
    ]
    for name, (look, known) in FILE_RULES.items() if Runtime.LLAMA_CPP in asked else ():
        for problem in look(model):
            effect, happens = problem.happens[Runtime.LLAMA_CPP]
            found.append(
                Finding(
                    rule=name,
                    runtime=Runtime.LLAMA_CPP,
                    effect=effect,
                    what=problem.what,
                    happens=happens,
                    mend=problem.mend,
                    source=source_for(known, Runtime.LLAMA_CPP),
                )
            )
    return Checked(
        folder=str(file),
        kind=Kind.GGUF,
        runtimes=asked,
        rules=len(FILE_RULES),
        findings=tuple(sorted(found, key=lambda finding: not finding.fails)),
    )


def planned_notes(plan: Plan, config: Mapping[str, Any], *, gptq: bool = False) -> list[str]:
    """What would not work of a plan's result, before anything is made; of its GPTQ export too, if asked for."""
    if plan.grids:  # of blocks there is a GGUF alone
        return _notes(planned_facts(plan, config, Kind.PLAIN), MADE_FOR[Kind.GGUF])
    kinds = (Kind.COMPRESSED if plan.quantization else Kind.PLAIN, *((Kind.GPTQ,) if gptq else ()))
    return list(dict.fromkeys(note for kind in kinds for note in _notes(planned_facts(plan, config, kind))))


def notes_before(
    config: Mapping[str, Any], experts: int, scheme: Any, *, degroup: bool, gptq: bool, include: Iterable[Include] = ()
) -> list[str]:
    """The same of a run, before its profile: of the compressed-tensors folder, and of the GPTQ export if asked for."""
    kinds = (Kind.COMPRESSED, Kind.GPTQ) if gptq else (Kind.COMPRESSED,)
    made = [facts_to_be(config, experts, scheme, kind, degroup=degroup, include=include) for kind in kinds]
    notes = [note for facts in made for note in _notes(facts)]
    return list(dict.fromkeys(notes))


def _notes(facts: Facts, runtimes: Sequence[Runtime] = ()) -> list[str]:
    """One sentence for each problem that fails, with the runtimes it fails in."""
    by_problem: dict[tuple[str, str], list[Finding]] = {}
    for finding in findings(facts, runtimes or MADE_FOR[facts.kind]):
        if finding.fails:
            by_problem.setdefault((finding.what, finding.mend), []).append(finding)
    return [
        f"{what}: " + "; ".join(f"{f.runtime} {f.effect} ({f.happens})" for f in found) + f". To mend it, {mend}."
        for (what, mend), found in by_problem.items()
    ]
