"""quantize: GPTQ over the model, pruned by a plan where there is one, to a compressed-tensors folder."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moepress.calibration.answer_ends import end_marks, end_notes
from moepress.calibration.corpus import Corpus
from moepress.calibration.hessian import HessianOptions
from moepress.calibration.profile import describe_corpus, fingerprint
from moepress.compress.budget.sizes import included_linears, settled_parts
from moepress.compress.estimates.estimate import Estimate
from moepress.compress.estimates.figures import figures_of
from moepress.compress.estimates.quantize import estimate_quantize
from moepress.compress.estimates.rates import measure_rates
from moepress.compress.gptq.block_choice import PLANNED, PRESETS, BlockChoice
from moepress.compress.gptq.coded import QuantizeOptions
from moepress.compress.gptq.grid_rows import GridRow
from moepress.compress.gptq.include import AUTO_BITS, IN_LAYERS, Asked, Include, Included, included, part_bits
from moepress.compress.gptq.layer_bits import check_scheme, fallback_text, model_dtype, scale_value_dtype, settle_bits
from moepress.compress.gptq.options import SolverOptions
from moepress.compress.gptq.pieces import PIECE_BYTES
from moepress.compress.gptq.pipeline import quantize
from moepress.compress.pruning.plan import Plan
from moepress.compress.pruning.repaired import Repairs, repaired_source
from moepress.compress.pruning.rewrite import mtp_keep, plan_summary
from moepress.converters.gguf.architectures import architecture_of, described, gguf_refusal
from moepress.converters.gguf.placed import column_runs
from moepress.converters.safetensors.scheme import Codes, Scheme
from moepress.errors import UnsupportedError, UsageError
from moepress.models.families.hf_config import hf_config
from moepress.models.forward.streamed import StreamedModel
from moepress.models.forward.tensor_check import check_mtp
from moepress.models.forward.walk import Limits
from moepress.models.storage.checkpoint import Checkpoint, Source
from moepress.models.storage.experts import mtp_layers, prune_source
from moepress.models.storage.inside import watched
from moepress.models.storage.mtp import Mtp, mtp_note
from moepress.runs.journal import Run
from moepress.runs.output import check_output
from moepress.runs.progress import note
from moepress.stages.groundwork import (
    announce,
    checked_plan,
    load_corpus,
    load_tokenizer,
    model_run,
    opened,
    require_room,
    streamed,
    warn_of_memory,
    workload,
)
from moepress.stages.places import Calibration, Machine, Output, display_name, model_folder
from moepress.validation.quality.decoding import stop_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRequest:
    """Options of `quantize`.

    Attributes:
        layer_bits: of layers that do not have the scheme's.
        include: parts besides the routed experts, with their bits where those are not the scheme's.
        auto: what `--include auto` adds comes on top.
        grid: of GGUF, in the place of the scheme; `PLANNED` with the rows of a plan's mix in `mix`.
    """

    scheme: Scheme
    layer_bits: Mapping[int, int] = field(default_factory=dict)
    include: Included = field(default_factory=dict)
    auto: bool = False
    hessian: HessianOptions = field(default_factory=HessianOptions)
    solver: SolverOptions = field(default_factory=SolverOptions)
    grid: str | None = None
    mix: tuple[GridRow, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A model that is to be quantized, all that was asked for settled.

    Attributes:
        folder: of the model.
        checkpoint: as it is there.
        plan: by which it is pruned.
        request: with the bits and parts that this model can have.
        predicting: MTP layers that stay, and which of their experts.
        model: pruned and repaired, to be walked.
        options: scheme, Hessians, solver.
    """

    folder: Path
    checkpoint: Checkpoint
    plan: Plan | None
    request: QuantizeRequest
    predicting: Mapping[int, list[int]]
    model: StreamedModel
    options: QuantizeOptions

    @property
    def notes(self) -> list[str]:
        """What is to be said of MTP layers that stay."""
        return _mtp_notes(self.checkpoint, self.plan, self.predicting)


def prepare(
    folder: Path,
    plan: Plan | None,
    request: QuantizeRequest,
    machine: Machine,
    *,
    mtp: Mtp = Mtp.KEEP,
    repairs: Repairs | None = None,
) -> Prepared:
    """Open a model and settle what is asked of it; notes go to stderr.

    Raises:
        InvalidInputError, UnsupportedError: it cannot be walked.
        UsageError: the plan is not for it, or what is asked for does not fit.
    """
    checkpoint = opened(folder)
    announce(checkpoint)
    if checkpoint.pressed_as == Codes.MXFP4 and request.scheme.codes is Codes.MXFP4:
        note("The experts are MXFP4 already: they keep their codes and scales.")
    elif checkpoint.pressed_as:
        note(f"The experts are stored as {checkpoint.pressed_as} already; quantizing them again costs quality.")
    if plan is not None:
        checked_plan(checkpoint, plan)
    predicting = _predicting(checkpoint, plan, mtp)
    source = _seen(checkpoint, plan, repairs, predicting)
    asked = Asked(auto=request.auto, parts=included(request.include))
    parts, notes = settled_parts(
        asked, included_linears(source, IN_LAYERS), request.scheme.group_size, floats=request.scheme.floats
    )
    note(*notes)
    request = replace(request, include=on_grid(checkpoint, request.grid, parts), auto=False)
    if request.grid is None:
        scheme, layer_bits, parts = settle_bits(source, request.scheme, request.layer_bits, parts)
        request = replace(request, scheme=scheme, layer_bits=layer_bits, include=parts)
    if request.scheme.floats or not request.scheme.symmetric:  # all scales are positive, which files of the result say
        request = replace(request, solver=replace(request.solver, signed=False))
    request = replace(request, hessian=_with_marks(folder, request.hessian))
    options = _options(source, request)
    check_scheme(source, options.scheme, request.include, options.blocks)
    if options.blocks is not None and (others := fallback_text(source, request.include, options.blocks)):
        note(f"{options.blocks.main} has blocks of 256 columns; as in llama.cpp there is {others}.")
    return Prepared(
        folder=folder,
        checkpoint=checkpoint,
        plan=plan,
        request=request,
        predicting=predicting,
        model=streamed(source, machine),
        options=options,
    )


def corpus_for(prepared: Prepared, calibration: Calibration) -> Corpus:
    """The calibration text as the model's windows; raises as `load_corpus`."""
    shape = prepared.checkpoint.shape
    corpus = load_corpus(prepared.folder, calibration, context=shape.context, vocabulary=shape.vocabulary)
    return replace(corpus, notes=(*corpus.notes, *end_notes(corpus.windows, prepared.options.hessian)))


def settings_of(prepared: Prepared, seed: int, repairs: Repairs | None = None) -> dict[str, Any]:
    """All that the result depends on besides the text and the machine."""
    plan, predicting = prepared.plan, prepared.predicting
    return {
        "command": "quantize",
        "model": fingerprint(prepared.checkpoint) if plan is None else plan.model,
        **_settings(plan, prepared.options, prepared.request, repairs, seed),
        "mtp": {str(layer): kept for layer, kept in predicting.items()},
    }


def summary_of(
    prepared: Prepared,
    model_name: str,
    corpus: Mapping[str, Any],
    settings: Mapping[str, Any],
    repairs: Repairs | None = None,
) -> dict[str, Any]:
    """What moepress.json says of the model, the plan and the text (`describe_corpus`)."""
    plan, shape = prepared.plan, prepared.checkpoint.shape
    return {
        "model": settings["model"],
        "model_name": display_name(prepared.folder, model_name),
        "source_notes": list(prepared.checkpoint.notes),
        "calibration": corpus,
        "experts_before": shape.experts,
        "experts": plan.experts if plan else shape.experts,
        "repair": None if repairs is None else repairs.model_dump(mode="json", exclude={"calibration"}),
        "hessian": settings["hessian"],
        "solver": settings["solver"],
    }


By = Callable[[Prepared, Corpus, Run, Limits], dict[str, Any]]
"""Makes a run's output of a prepared model and its text, and finishes the run; returns as `pipeline.quantize`."""


def quantize_stage(
    model_name: str,
    output: Output,
    plan: Plan | None,
    request: QuantizeRequest,
    calibration: Calibration,
    machine: Machine,
    *,
    mtp: Mtp = Mtp.KEEP,
    repairs: Repairs | None = None,
    max_pieces: int | None = None,
    dry_run: bool = False,
    by: By | None = None,
) -> dict[str, Any]:
    """Quantize the model, pruned by the plan where there is one, to a compressed-tensors folder.

    With `max_pieces` it stops after so many new pieces: the result then says `"finished": False` and how far it is,
    there is no folder yet, and a resume goes on. `repairs` were made for the same plan, see `repair.repair_stage`.
    `by` are others who do the work, with the same bytes (`stages.workers`).
    """
    folder = model_folder(model_name)
    check_output(output.folder, [folder], resume=output.resume, force=output.force)
    inputs = watched(folder)
    prepared = prepare(folder, plan, request, machine, mtp=mtp, repairs=repairs)
    corpus = corpus_for(prepared, calibration)
    estimate = _estimate(prepared, corpus, machine, timed=dry_run)
    if dry_run:
        return asdict(estimate)
    require_room(output, estimate.disk_bytes)
    warn_of_memory(estimate)
    settings = settings_of(prepared, calibration.seed, repairs)
    summary = summary_of(prepared, model_name, describe_corpus(corpus, calibration.seed), settings, repairs)
    summary_and_plan = summary | {"plan": None if plan is None else plan_summary(plan)}
    with model_run(output, prepared.model, corpus, machine, settings, inputs) as (run, limits):
        if by is not None:
            result = by(prepared, corpus, run, limits)
        else:
            result = quantize(
                prepared.model,
                corpus,
                run,
                limits,
                options=prepared.options,
                include=prepared.request.include,
                companions=folder,
                summary=summary_and_plan,
                mtp_notes=prepared.notes,
                max_pieces=max_pieces,
            )
    return {"bytes_before": prepared.checkpoint.total_bytes, **result, **summary, "scheme": settings["scheme"]}


def _with_marks(folder: Path, hessian: HessianOptions) -> HessianOptions:
    """The same with the tokens that end answers and reasoning, where they count more."""
    if hessian.end_weight == 1 or hessian.end_marks:
        return hessian
    tokenizer = load_tokenizer(folder)
    return replace(hessian, end_marks=end_marks(tokenizer, stop_tokens(folder, tokenizer)))


def _predicting(checkpoint: Checkpoint, plan: Plan | None, mtp: Mtp) -> dict[int, list[int]]:
    """The experts that multi-token-prediction layers keep; empty where they go.

    Raises:
        InvalidInputError: such a layer is to stay and is not whole.
        UnsupportedError: nothing says which of its experts should stay.
    """
    if plan is not None:
        return mtp_keep(checkpoint, plan, mtp)
    layers = mtp_layers(checkpoint) if mtp is Mtp.KEEP else ()
    for layer in layers:
        check_mtp(checkpoint, layer, folder=checkpoint.folder)
    return {layer: list(range(checkpoint.shape.experts)) for layer in layers}


def _mtp_notes(checkpoint: Checkpoint, plan: Plan | None, predicting: Mapping[int, list[int]]) -> list[str]:
    measured = plan is not None and predicting.keys() <= plan.mtp_keep.keys()
    notes = mtp_note(0, predicting, checkpoint.shape.experts, measured=measured)
    return [*notes, "Its experts are quantized like the others; the rest of it keeps its weights."] if notes else []


def _seen(
    checkpoint: Checkpoint, plan: Plan | None, repairs: Repairs | None, predicting: Mapping[int, list[int]]
) -> Source:
    """The model that is quantized: pruned by the plan, and repaired, without being written."""
    source: Source = checkpoint
    if plan is not None and plan.prunes:
        source = prune_source(checkpoint, {**plan.keep, **predicting}, degroup=plan.degroup)
    return source if repairs is None else repaired_source(source, repairs)


def on_grid(checkpoint: Checkpoint, grid: str | None, include: Iterable[Include]) -> Included:
    """What is quantized besides the experts: a mix of GGUF's types stands for the whole model.

    Raises:
        UnsupportedError: llama.cpp does not compute such a model.
        UsageError: a part is to have other bits than there is a type for.
    """
    if grid is None:
        return included(include)
    odd = [part for part, bits in included(include).items() if bits not in (None, AUTO_BITS)]
    if odd:
        raise UsageError(f"With --grid {odd[0]} has the grid's type, or 8 bits (Q8_0); give --bits {odd[0]}=8 or none.")
    refusal = gguf_refusal(described(checkpoint))
    if refusal is not None:
        raise UnsupportedError(refusal)
    if grid not in (*PRESETS, PLANNED):
        return included(include)
    return included(set(Include) - (set() if checkpoint.family.head in checkpoint.shapes else {Include.LM_HEAD}))


def _options(source: Source, request: QuantizeRequest) -> QuantizeOptions:
    stored = model_dtype(source.config)
    blocks = None if request.grid is None else block_choice(source, request.grid, request.mix, request.include)
    return QuantizeOptions(
        scheme=request.scheme,
        layer_bits=request.layer_bits,
        scale_dtype=scale_value_dtype(stored),
        stored_dtype=stored,
        hessian=request.hessian,
        solver=request.solver,
        blocks=blocks,
    )


def block_choice(
    source: Source, name: str, mix: tuple[GridRow, ...] = (), include: Iterable[Include] = ()
) -> BlockChoice:
    """What `--grid` names, or a plan's mix, for a model; parts of 8 bits lie in Q8_0."""
    config = hf_config(source.config).get_text_config()
    heads = int(config.num_attention_heads)
    shared = int(getattr(config, "num_key_value_heads", None) or heads)
    shape = source.outline.shape
    return BlockChoice(
        name=name,
        layers=shape.layers,
        experts=shape.experts,
        shared_heads=heads // max(1, shared),
        rows=mix,
        family=source.family,
        beside=dict.fromkeys(part_bits(include), "Q8_0"),
        runs=column_runs(source, architecture_of(described(source))),
    )


def _estimate(prepared: Prepared, corpus: Corpus, machine: Machine, *, timed: bool) -> Estimate:
    work = workload(machine, tokens=corpus.windows.numel(), window=corpus.windows.shape[1])
    checkpoint, plan, request = prepared.checkpoint, prepared.plan, prepared.request
    return estimate_quantize(
        checkpoint,
        figures_of(checkpoint),
        plan.experts if plan else checkpoint.shape.experts,
        prepared.options.scheme,
        work,
        measure_rates(checkpoint, work.device, work.dtype) if timed else None,
        include=request.include,
        layer_bits=prepared.options.layer_bits,
        original_targets=request.hessian.asymmetry > 0 and not request.hessian.independent,
        balanced=request.hessian.least_tokens > 0,
        solver=request.solver,
        end_tokens=request.hessian.end_tokens,
        predicting=prepared.predicting,
    )


def _mix_settings(request: QuantizeRequest) -> dict[str, Any]:
    return {"mix": [row.model_dump(mode="json") for row in request.mix]} if request.mix else {}


def _settings(
    plan: Plan | None, options: QuantizeOptions, request: QuantizeRequest, repairs: Repairs | None, seed: int
) -> dict[str, Any]:
    """All that the codes depend on besides the model and the text."""
    pruned = plan if plan is not None and plan.prunes else None
    return {
        "keep": {str(layer): kept for layer, kept in pruned.keep.items()} if pruned else None,
        "groups": pruned.groups.value if pruned else None,
        "repair": None if repairs is None else repairs.digest,
        "scheme": options.scheme.stated()
        if request.grid is None
        else {"grid": request.grid, "bits": options.scheme.bits, **_mix_settings(request)},
        "layer_bits": {str(layer): bits for layer, bits in options.layer_bits.items()} or None,
        "include": sorted(request.include),
        "part_bits": {part.value: bits for part, bits in request.include.items() if bits is not None} or None,
        "hessian": asdict(request.hessian),
        "solver": asdict(request.solver),
        "seed": seed,
        "piece_bytes": PIECE_BYTES,
    }
