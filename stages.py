"""The stages as functions: open the inputs, check everything that can be checked, do the work, leave the output.

`cli.py` and `recipe.py` call these; each stage reads files and writes files, and none calls another.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from moepress import __version__
from moepress.calibration.corpus import Corpus, build_corpus
from moepress.calibration.hessian import HessianOptions
from moepress.calibration.profile import (
    Profile,
    collect,
    describe_corpus,
    drop_hidden,
    fingerprint,
    load_profile,
    merge_profiles,
    save_profile,
)
from moepress.calibration.sources import embedded_sources, parse_sources
from moepress.compress.bit_losses import bit_loss_probe
from moepress.compress.estimate import Estimate, estimate_profile, estimate_prune, estimate_quantize
from moepress.compress.experts import QuantizeOptions
from moepress.compress.figures import figures_of
from moepress.compress.footprint import Workload
from moepress.compress.gptq import SolverOptions
from moepress.compress.linears import Include
from moepress.compress.mtp import Mtp, refuse_quantized_mtp
from moepress.compress.pieces import PIECE_BYTES
from moepress.compress.pipeline import quantize
from moepress.compress.plan import Plan, check_plan
from moepress.compress.pruning import mtp_keep, planned_bytes, planned_entries, prune
from moepress.compress.rates import measure_rates
from moepress.compress.repaired import Repairs, repaired_source
from moepress.compress.schemes import check_scheme, model_dtype, scale_value_dtype, settle_bits
from moepress.converters.scheme import Scheme
from moepress.errors import InvalidInputError, MoepressError
from moepress.journal import Run, check_output, open_run, partial_folder, previous_settings
from moepress.models.checkpoint import Checkpoint, Source, open_checkpoint
from moepress.models.experts import moe_layers, prune_source
from moepress.models.forward import StreamedModel
from moepress.models.inventory import inventory
from moepress.models.walk import Limits, choose_device, choose_dtype, choose_limits
from moepress.phases import phase

DEMO = "demo"
DEFAULT_TOKENS, EMBEDDED_TOKENS, DEFAULT_WINDOW = 131_072, 32_768, 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where and within what a stage runs.

    Attributes:
        device: auto, cpu, cuda or mps.
        dtype: auto, float32, bfloat16 or float16; what the forward pass computes in.
        memory_bytes: what may be used; None for half of what is free.
    """

    device: str = "auto"
    dtype: str = "auto"
    memory_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the model is fed.

    Attributes:
        sources: files, folders or data sets; none at all means the embedded text.
        domains: NAME=PATH.
        tokens: how many in all; None for the default.
        window: tokens per sequence; None for the model's context, at most 2048.
        seed: chooses the windows.
    """

    sources: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    tokens: int | None = None
    window: int | None = None
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where a stage writes, and what it may do to what is there."""

    folder: Path
    resume: bool = False
    force: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRequest:
    """Options of `quantize`; `layer_bits` are those of layers that do not have the scheme's."""

    scheme: Scheme
    layer_bits: Mapping[int, int] = field(default_factory=dict)
    include: frozenset[Include] = frozenset()
    hessian: HessianOptions = field(default_factory=HessianOptions)
    solver: SolverOptions = field(default_factory=SolverOptions)


def model_folder(name: str) -> Path:
    """The folder of a model: a path, or `demo` for the embedded one.

    Raises:
        InvalidInputError: there is no such folder.
    """
    folder = Path(name)
    if name == DEMO and not folder.exists():
        import moepress.models.demo as demo

        return Path(demo.__file__).parent
    if not folder.is_dir():
        raise InvalidInputError(f"{name} is not a folder; give the folder of a Hugging Face model, or `demo`.")
    return folder


def load_tokenizer(folder: Path) -> Any:
    """The model's tokenizer; code from the folder is never run.

    Raises:
        InvalidInputError: there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # transformers raises many types here
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__).strip().rstrip(".:")
        raise InvalidInputError(
            f"{folder} has no tokenizer that transformers can read ({reason}); put the tokenizer files of the original "
            "model into it."
        ) from error


@phase("start")
def load_corpus(folder: Path, calibration: Calibration, *, context: int, vocabulary: int) -> Corpus:
    """Tokenized calibration windows."""
    sources = parse_sources(calibration.sources, calibration.domains)
    tokens = calibration.tokens or (DEFAULT_TOKENS if sources else EMBEDDED_TOKENS)
    return build_corpus(
        sources or embedded_sources("calibration"),
        load_tokenizer(folder),
        tokens=tokens,
        window=calibration.window or min(context, DEFAULT_WINDOW),
        seed=calibration.seed,
        vocab_size=vocabulary,
    )


@contextmanager
def model_run(
    output: Output, model: StreamedModel, corpus: Corpus, machine: Machine, settings: Mapping[str, Any]
) -> Iterator[tuple[Run, Limits]]:
    """Open a run that depends on a forward pass: batch sizes are part of the settings, and a resume keeps them."""
    before = previous_settings(partial_folder(output.folder)) if output.resume else {}
    memory = machine.memory_bytes or before.get("memory_bytes")
    window = int(corpus.windows.shape[1])
    limits = choose_limits(model.shape, window, memory, before.get("batch_windows"), model.device)
    every = {
        "moepress": __version__,
        "torch": torch.__version__,
        "corpus": corpus.digest,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "memory_bytes": limits.memory_bytes,
        "batch_windows": limits.batch_windows,
        **settings,
    }
    with open_run(output.folder, every, resume=output.resume, force=output.force) as run:
        yield run, limits


@phase("start")
def streamed(source: Source, machine: Machine) -> StreamedModel:
    """A source's forward pass on that machine."""
    device = choose_device(machine.device)
    return StreamedModel(source, device=device, dtype=choose_dtype(machine.dtype, device))


def _free_disk(output: Output) -> tuple[Path, int]:
    """The nearest folder that is there, and bytes free on its disk."""
    parent = next(p for p in (output.folder, *output.folder.resolve().parents) if p.exists())
    return parent, shutil.disk_usage(parent).free


def require_room(output: Output, disk_bytes: int) -> None:
    """Refuse to start what the disk can not hold.

    Raises:
        MoepressError: with what is free and what is needed.
    """
    parent, free = _free_disk(output)
    if free < disk_bytes and not output.resume:
        raise MoepressError(
            f"{parent} has {free / 2**30:.1f} GiB free and the output needs about "
            f"{disk_bytes / 2**30:.1f} GiB; make room or write to another disk."
        )


def profile_stage(
    model_name: str,
    output: Output,
    calibration: Calibration,
    machine: Machine,
    *,
    leave_one_out: bool = True,
    bit_losses: bool = True,
    allow_nonfinite: bool = False,
) -> Profile:
    """Run the model over calibration text and write its profile."""
    folder = model_folder(model_name)
    check_output(output.folder, [folder], resume=output.resume, force=output.force)
    checkpoint = open_checkpoint(folder, allow_nonfinite=allow_nonfinite)
    shape = checkpoint.shape
    corpus = load_corpus(folder, calibration, context=shape.context, vocabulary=shape.vocabulary)
    model = streamed(checkpoint, machine)
    work = _profile_workload(corpus, machine, output)
    require_room(output, estimate_profile(figures_of(checkpoint), work, leave_one_out=leave_one_out).disk_bytes)
    digest = fingerprint(checkpoint)
    settings = {
        "command": "profile",
        "model": digest,
        "leave_one_out": leave_one_out,
        "bit_losses": bit_losses,
        "seed": calibration.seed,
    }
    probe = bit_loss_probe(checkpoint.config) if bit_losses else None
    with model_run(output, model, corpus, machine, settings) as (run, limits):
        statistics = collect(model, corpus, run, limits, leave_one_out=leave_one_out, probe=probe)
        profile = Profile(
            model=digest,
            model_name=display_name(folder, model_name),
            family=checkpoint.family.name,
            config=checkpoint.config,
            shape=shape,
            domains=corpus.domains,
            layers=moe_layers(checkpoint),
            calibration=describe_corpus(corpus, calibration.seed),
            inventory=inventory(checkpoint),
            statistics=statistics,
        )
        save_profile(profile, run.folder)
        drop_hidden(run)
        run.finish()
    return profile


def profile_estimate(
    model_name: str,
    calibration: Calibration,
    machine: Machine,
    *,
    leave_one_out: bool = True,
    bit_losses: bool = True,
    output: Output | None = None,
) -> Estimate:
    """What `profile` would take; without an output its disk is taken to have room."""
    folder = model_folder(model_name)
    checkpoint = open_checkpoint(folder)
    corpus = load_corpus(folder, calibration, context=checkpoint.shape.context, vocabulary=checkpoint.shape.vocabulary)
    work = _profile_workload(corpus, machine, output)
    rates = measure_rates(checkpoint, work.device, work.dtype)
    return estimate_profile(figures_of(checkpoint), work, rates, leave_one_out=leave_one_out, bit_losses=bit_losses)


def _profile_workload(corpus: Corpus, machine: Machine, output: Output | None) -> Workload:
    tokens, window = corpus.windows.numel(), corpus.windows.shape[1]
    work = workload(machine, tokens=tokens, window=window, domains=len(corpus.domains))
    return work if output is None else replace(work, free_bytes=_free_disk(output)[1])


def workload(machine: Machine, *, tokens: int, window: int, domains: int = 1) -> Workload:
    """That much text on that machine."""
    device = choose_device(machine.device)
    dtype = choose_dtype(machine.dtype, device)
    return Workload(
        tokens=tokens, window=window, domains=domains, device=device, dtype=dtype, memory_bytes=machine.memory_bytes
    )


def display_name(folder: Path, given: str) -> str:
    """A model's name for people: `demo`, or its folder's name."""
    return DEMO if given == DEMO else folder.resolve().name


def load_profiles(folders: Sequence[Path]) -> Profile:
    """One profile, or several of one model merged."""
    return merge_profiles([load_profile(folder) for folder in folders])


def checked_plan(checkpoint: Checkpoint, plan: Plan) -> Plan:
    """The plan, held against the model.

    Raises:
        UsageError: it is for another model or not legal.
    """
    check_plan(plan, checkpoint.shape, moe_layers(checkpoint), None)  # first what needs no weight to be read
    check_plan(plan, checkpoint.shape, moe_layers(checkpoint), fingerprint(checkpoint))
    return plan


def prune_stage(
    model_name: str,
    output: Output,
    plan: Plan,
    *,
    mtp: Mtp = Mtp.DROP,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Rewrite the checkpoint without the experts that the plan leaves out."""
    folder = model_folder(model_name)
    check_output(output.folder, [folder], resume=output.resume, force=output.force)
    checkpoint = open_checkpoint(folder, allow_nonfinite=allow_nonfinite)
    checked_plan(checkpoint, plan)
    keep = {**plan.keep, **mtp_keep(checkpoint, plan, mtp)}
    size = planned_bytes(planned_entries(checkpoint, keep))  # known to the byte before any is written
    if dry_run:
        rates = measure_rates(checkpoint, torch.device("cpu"), torch.float32)
        return asdict(estimate_prune(size, rates))
    require_room(output, size)
    settings = {
        "command": "prune",
        "moepress": __version__,
        "model": plan.model,
        "keep": {str(layer): kept for layer, kept in plan.keep.items()},
        "groups": plan.groups.value,
        "mtp": mtp.value,
        "allow_nonfinite": allow_nonfinite,
    }
    with open_run(output.folder, settings, resume=output.resume, force=output.force) as run:
        return prune(checkpoint, plan, run, mtp=mtp)


def quantize_stage(
    model_name: str,
    output: Output,
    plan: Plan | None,
    request: QuantizeRequest,
    calibration: Calibration,
    machine: Machine,
    *,
    mtp: Mtp = Mtp.DROP,
    repairs: Repairs | None = None,
    max_pieces: int | None = None,
    dry_run: bool = False,
) -> dict[str, Any]:
    """Quantize the model, pruned by the plan where there is one, to a compressed-tensors folder.

    With `max_pieces` it stops after so many new pieces: the result then says `"finished": False` and how far it is,
    there is no folder yet, and a resume goes on. `repairs` were made for the same plan, see `repairing.repair_stage`.
    """
    folder = model_folder(model_name)
    check_output(output.folder, [folder], resume=output.resume, force=output.force)
    checkpoint = open_checkpoint(folder)
    if mtp is Mtp.KEEP:
        refuse_quantized_mtp(checkpoint)
    shape = checkpoint.shape
    if plan is not None:
        checked_plan(checkpoint, plan)
    prunes = plan is not None and plan.prunes
    source: Source = prune_source(checkpoint, plan.keep, degroup=plan.degroup) if plan and prunes else checkpoint
    source = source if repairs is None else repaired_source(source, repairs)
    stored = model_dtype(checkpoint.config)
    scheme, layer_bits = settle_bits(source, request.scheme, request.layer_bits, request.include)
    options = QuantizeOptions(
        scheme=scheme,
        layer_bits=layer_bits,
        scale_dtype=scale_value_dtype(stored),
        stored_dtype=stored,
        hessian=request.hessian,
        solver=request.solver,
    )
    check_scheme(source, scheme, request.include)
    corpus = load_corpus(folder, calibration, context=shape.context, vocabulary=shape.vocabulary)
    model = streamed(source, machine)
    work = workload(machine, tokens=corpus.windows.numel(), window=corpus.windows.shape[1])
    estimate = estimate_quantize(
        checkpoint,
        figures_of(checkpoint),
        plan.experts if plan else shape.experts,
        scheme,
        work,
        measure_rates(checkpoint, work.device, work.dtype) if dry_run else None,
        include=request.include,
        layer_bits=layer_bits,
        original_targets=request.hessian.asymmetry > 0,
        balanced=request.hessian.least_tokens > 0,
    )
    if dry_run:
        return asdict(estimate)
    require_room(output, estimate.disk_bytes)
    digest = fingerprint(checkpoint) if plan is None else plan.model
    settings = {
        "command": "quantize",
        "model": digest,
        "keep": {str(layer): kept for layer, kept in plan.keep.items()} if plan and prunes else None,
        "groups": plan.groups.value if plan and prunes else None,
        "repair": None if repairs is None else repairs.digest,
        "scheme": asdict(scheme),
        "layer_bits": {str(layer): bits for layer, bits in layer_bits.items()} or None,
        "include": sorted(request.include),
        "hessian": asdict(request.hessian),
        "solver": asdict(request.solver),
        "seed": calibration.seed,
        "piece_bytes": PIECE_BYTES,
    }
    summary = {
        "model": digest,
        "model_name": display_name(folder, model_name),
        "calibration": describe_corpus(corpus, calibration.seed),
        "experts_before": shape.experts,
        "experts": plan.experts if plan else shape.experts,
        "repair": None if repairs is None else repairs.model_dump(mode="json", exclude={"calibration"}),
        "hessian": settings["hessian"],
        "solver": settings["solver"],
    }
    with model_run(output, model, corpus, machine, settings) as (run, limits):
        result = quantize(
            model,
            corpus,
            run,
            limits,
            options=options,
            include=request.include,
            companions=folder,
            summary=summary,
            max_pieces=max_pieces,
        )
    return {"bytes_before": checkpoint.total_bytes, **result, **summary, "scheme": settings["scheme"]}
