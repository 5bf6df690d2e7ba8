"""run: the stages in order, from one recipe, into one folder; a run that was interrupted goes on where it was.

OUT/recipe.yaml      everything that was used, complete
OUT/journal.jsonl    settings and finished stages
OUT/profile/         how the model uses its experts
OUT/plan.json        what stays
OUT/repair/          what is mended of it, where that is asked for
OUT/model/           the canonical artifact, compressed-tensors; with --grid GGUF's blocks
OUT/exports/<fmt>/   the same codes in other layouts; onnx-before: the original, to be timed beside exports/onnx
OUT/report.{html,md,json}, junit.xml, provenance.json
"""

import itertools
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from moepress import __version__
from moepress.calibration.hessian import hessian_for
from moepress.calibration.profile import Profile, fingerprint, load_profile
from moepress.compress.budget.sizes import planned_linears
from moepress.compress.gptq.block_choice import PLANNED, nearest_scheme
from moepress.compress.gptq.grid_rows import mix_text
from moepress.compress.gptq.layer_bits import fallback_text, listed
from moepress.compress.gptq.options import solver_of
from moepress.compress.pruning.plan import Plan, load_plan, make_plan, plan_text
from moepress.compress.pruning.repaired import Repairs
from moepress.converters.gguf.export import GgufRequest
from moepress.converters.gguf.file import gguf_file
from moepress.converters.onnx.folder import open_onnx
from moepress.converters.safetensors.scheme import Scheme
from moepress.errors import UsageError
from moepress.models.forward.walk import default_memory
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.inside import watched
from moepress.runs.byte_sizes import size_text
from moepress.runs.files import JOURNAL, sha256_of, write_atomically
from moepress.runs.journal import Run, open_run
from moepress.runs.output import check_output, is_ours
from moepress.runs.progress import note, stage
from moepress.runs.rows import first_settings
from moepress.stages.evaluation import check_evaluation
from moepress.stages.export import export_stage, gguf_stage, onnx_stage
from moepress.stages.groundwork import load_corpus, opened, opened_artifact, opened_source
from moepress.stages.places import Machine, Output, model_folder
from moepress.stages.plan import mix_within, plan_within
from moepress.stages.profile import profile_stage
from moepress.stages.prune import prune_stage
from moepress.stages.quantize import QuantizeRequest, block_choice, on_grid, quantize_stage
from moepress.stages.repair import load_repairs, repair_stage
from moepress.stages.run.recipe import (
    LATE_FIELDS,
    Recipe,
    as_before,
    asked_of,
    budget_request,
    calibration_of,
    check_recipe,
    evaluation_of,
    mixes,
    portable,
    protection_of,
    recipe_text,
    resolve,
    settled,
    wish_of,
)
from moepress.stages.subjects import elsewhere_subject, open_subject, pruned_subject, subject_of
from moepress.stages.tasks import files_digest
from moepress.stages.validate import validate_stage
from moepress.stages.workers import by_workers
from moepress.validation.report.files import JSON_NAME, write_report
from moepress.validation.report.model_card import CARD_NAME, Format, model_card
from moepress.validation.report.provenance import files_below, provenance, write_provenance
from moepress.validation.report.schema import Quantization, Report
from moepress.validation.report.sections import (
    calibration_section,
    choice_section,
    pruning_section,
    quantization_section,
    scheme_text,
    usage_section,
)
from moepress.validation.rules.check import planned_notes


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
    recipe: Recipe
    out: Path
    count: int
    scheme: Scheme | None
    machine: Machine
    workers: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exports:
    """Exports that are measured too, with what the report says of them.

    Attributes:
        after: the result in ONNX.
        before: the original in ONNX, to be timed.
        gguf: the result as GGUF.
        notes: for people.
    """

    after: Path | None = None
    before: Path | None = None
    gguf: Path | None = None
    notes: tuple[str, ...] = ()


def run_recipe(
    recipe: Recipe, out: Path, *, resume: bool = False, force: bool = False, workers: int | None = None
) -> Report:
    """Run all stages; the model is quantized by so many processes, with the same bytes.

    Raises:
        UsageError: an option or the expert count is not legal, or the output is taken.
        InvalidInputError: model or text are not sound.
    """
    if workers and recipe.repair:
        raise UsageError("--workers does not go with --repair yet; leave one of them out.")
    before = first_settings(out) if resume else {}
    recipe = as_before(recipe, before)
    check_output(out, [model_folder(recipe.model)], resume=resume, force=force, in_place=True)
    inputs = watched(model_folder(recipe.model))
    checkpoint, count, criterion = check_recipe(recipe)
    # Batch sizes depend on the memory, and the last bits of the result on them.
    asked, recipe = (
        recipe,
        resolve(
            recipe, checkpoint, criterion, recipe.max_memory or before.get("recipe.max_memory") or default_memory()
        ),
    )
    settings: dict[str, Any] = {"command": "run", "moepress": __version__, "model": fingerprint(checkpoint)}
    settings |= {f"recipe.{k}": v for k, v in recipe.model_dump(mode="json", exclude=set(LATE_FIELDS)).items()}
    shape, text = checkpoint.shape, calibration_of(recipe)
    corpus = load_corpus(checkpoint.folder, text, context=shape.context, vocabulary=shape.vocabulary)
    settings["corpus"] = corpus.digest  # a text may change under its name; the stages that read it may be finished
    machine = Machine(device=recipe.device, dtype=recipe.dtype, memory_bytes=recipe.max_memory)
    scheme = settled(recipe, checkpoint).scheme
    setup = _Setup(recipe=recipe, out=out, count=count, scheme=scheme, machine=machine, workers=workers)
    with open_run(out, settings, resume=resume, force=force, in_place=True, inputs=inputs) as run:
        write_atomically(out / "recipe.yaml", recipe_text(recipe, asked, out))
        number, of = itertools.count(1), 3 + bool(recipe.repair) + bool(recipe.to)  # a plan is made in no time
        with stage(next(number), of):
            profile = _profile(setup, run)
        plan, repairs = _plan(setup, run, profile), None
        if recipe.repair:
            with stage(next(number), of):
                repairs = _repair(setup, run, plan)
        with stage(next(number), of):
            if setup.scheme is None:
                quantized = _prune(setup, run, plan, profile, checkpoint)
            else:
                quantized = _quantize(setup, run, plan, repairs)
        exported = _Exports()
        if recipe.to:
            with stage(next(number), of):
                exported = _exports(setup, run)
        with stage(next(number), of):
            report = _report(setup, run, (profile, plan), repairs, quantized, exported)
        run.complete()
        return report


def _stage_output(setup: _Setup, name: str) -> Output:
    return Output(folder=setup.out / name, resume=True)


def _is_made(folder: Path) -> bool:
    """Whether a stage's folder is there and whole, though its line in the journal is not: killed in between.

    Raises:
        UsageError: somebody else has made it.
    """
    if not folder.exists() or (folder / JOURNAL).exists():  # then the stage has to end it
        return False
    if folder.name != "repair" and not is_ours(folder):
        raise UsageError(f"{folder} is not what this run makes there; move it away.")
    return True


def _profile(setup: _Setup, run: Run) -> Profile:
    folder = setup.out / "profile"
    if run.done("profile") is None and not _is_made(folder):
        recipe = setup.recipe
        budgeted, place = budget_request(recipe) is not None, _stage_output(setup, "profile")
        text = calibration_of(recipe)
        profile_stage(recipe.model, place, text, setup.machine, bit_losses=budgeted, grid_losses=mixes(recipe))
    if run.done("profile") is None:
        run.mark("profile", folder="profile")
    return load_profile(folder)


def _plan(setup: _Setup, run: Run, profile: Profile) -> Plan:
    recipe = setup.recipe
    include = {} if recipe.grid is not None else asked_of(recipe).parts
    if run.done("plan") is None:
        request = budget_request(recipe)
        if request is not None and mixes(recipe):
            plan = mix_within(profile, request, wish_of(recipe))
        elif request is not None:
            plan = plan_within(profile, request, wish_of(recipe), mtp=recipe.mtp)
        else:
            plan = make_plan(
                profile,
                count=setup.count,
                criterion=recipe.criterion,
                weights=recipe.domain_weight,
                groups=recipe.groups,
                scheme=setup.scheme if recipe.grid is None else None,
                include=include,
                linears=planned_linears(profile, include),
                protection=protection_of(recipe),
            )
        text = plan_text(plan)
        run.write("plan", "plan.json", lambda path: _text(path, text))
    plan = load_plan(setup.out / "plan.json")
    if budget_request(recipe) is not None:  # without a budget they were told before the profile
        note(*planned_notes(plan, profile.config, gptq="gptq" in recipe.to))
    return plan


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _repair(setup: _Setup, run: Run, plan: Plan) -> Repairs:
    recipe, folder = setup.recipe, setup.out / "repair"
    if run.done("repair") is None and not _is_made(folder):
        parts = frozenset(recipe.repair)
        repair_stage(recipe.model, _stage_output(setup, "repair"), plan, parts, calibration_of(recipe), setup.machine)
    if run.done("repair") is None:
        run.mark("repair", folder="repair")
    return load_repairs(folder)


def _quantize(setup: _Setup, run: Run, plan: Plan, repairs: Repairs | None) -> Mapping[str, Any]:
    recipe = setup.recipe
    done = run.done("model")
    if done is not None:
        return done.note
    folder = setup.out / "model"
    if _is_made(folder):
        from moepress.models.storage.folder import read_json

        result: Mapping[str, Any] = read_json(folder / "moepress.json")
    else:
        scheme = _scheme(setup, plan)
        result = quantize_stage(
            recipe.model,
            _stage_output(setup, "model"),
            plan,
            QuantizeRequest(
                scheme=scheme,
                layer_bits=plan.layer_bits,
                include=asked_of(recipe).parts if recipe.grid is not None else plan.included,
                hessian=hessian_for(recipe.match, scheme.bits, plan.layer_bits, recipe.effort, recipe.end_weight),
                solver=solver_of(recipe.effort, positive=recipe.positive_scales),
                grid=recipe.grid,
                mix=plan.grids,
            ),
            calibration_of(recipe),
            setup.machine,
            mtp=recipe.mtp,
            repairs=repairs,
            by=by_workers(setup.workers, setup.machine, recipe.model, recipe.seed) if setup.workers else None,
        )
    note(*(text for text in result["notes"] if "multi-token" in text))
    kept = ("layer_error", "experts_without_tokens", "experts_rounded", "calibration")
    run.mark("model", {k: result[k] for k in kept}, folder="model")
    return run.pieces["model"].note


def _scheme(setup: _Setup, plan: Plan) -> Scheme:
    """The plan's, which a budget chose, or what the recipe says; of a mix what it is counted as."""
    if plan.grids:
        return nearest_scheme(PLANNED, plan.grids)
    scheme = plan.quantization.scheme() if plan.quantization else setup.scheme
    assert scheme is not None, "a model that is only pruned goes another way"
    return replace(scheme, symmetric=not setup.recipe.asymmetric)


def _prune(setup: _Setup, run: Run, plan: Plan, profile: Profile, checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The model without the experts that go, where those that stay keep the four bits that they have."""
    note(
        f"The experts are stored as {checkpoint.pressed_as} already: they are pruned and keep every byte. --bits 4 "
        "would quantize them again, which costs quality."
    )
    if run.done("model") is None:
        if not _is_made(setup.out / "model"):
            prune_stage(setup.recipe.model, _stage_output(setup, "model"), plan, mtp=setup.recipe.mtp)
        run.mark("model", {"calibration": dict(profile.calibration)}, folder="model")
    return run.pieces["model"].note


def _exports(setup: _Setup, run: Run) -> _Exports:
    recipe, exports = setup.recipe, setup.out / "exports"
    for target in recipe.to:
        if target in ("gptq", "compressed-tensors") and run.done(f"export-{target}") is None:
            if not _is_made(exports / target):
                export_stage(str(setup.out / "model"), Output(folder=exports / target, resume=True), target)
            run.mark(f"export-{target}", folder=f"exports/{target}")
    made = _Exports()
    if "gguf" in recipe.to:
        made = _Exports(gguf=exports / "gguf", notes=_export_gguf(setup, run))
    return replace(_onnx_exports(setup, run, made.notes), gguf=made.gguf) if "onnx" in recipe.to else made


def _onnx_exports(setup: _Setup, run: Run, notes: tuple[str, ...]) -> _Exports:
    recipe, exports = setup.recipe, setup.out / "exports"
    notes += _export_onnx(setup, run, "onnx", str(setup.out / "model"))
    if not recipe.throughput:
        return _Exports(after=exports / "onnx", notes=notes)
    lack = None if (exports / "onnx-before").exists() else no_room(recipe.model, setup.out)
    if lack is not None:
        return _Exports(after=exports / "onnx", notes=(*notes, lack))
    before = exports / "onnx-before"
    notes += _export_onnx(setup, run, before.name, recipe.model)
    size = size_text(sum(file.stat().st_size for file in before.iterdir()))
    notes += (f"exports/{before.name} ({size}) is the original in ONNX, made only to be timed; it can be deleted.",)
    return _Exports(after=exports / "onnx", before=before, notes=notes)


def _export_gguf(setup: _Setup, run: Run) -> tuple[str, ...]:
    folder = setup.out / "exports" / "gguf"
    if run.done("export-gguf") is None:
        place = Output(folder=folder, resume=True)
        name = f"{run.settings.get('recipe.model', 'model')}".rstrip("/").rpartition("/")[2].partition("@")[0]
        request = GgufRequest(name=f"{name}-pressed")
        made = None if _is_made(folder) else gguf_stage(str(setup.out / "model"), place, request)
        run.mark(
            "export-gguf", {"notes": [f"exports/gguf: {n}" for n in made.notes] if made else []}, folder="exports/gguf"
        )
    return tuple(run.pieces["export-gguf"].note["notes"])


def _export_onnx(setup: _Setup, run: Run, name: str, model: str) -> tuple[str, ...]:
    from moepress.converters.onnx.export import OnnxRequest

    folder, done = setup.out / "exports" / name, run.done(f"export-{name}")
    passing = name == "onnx-before"  # a user may have deleted it: it is made again where it is wanted again
    if done is None or (passing and not folder.exists()):
        made = None if _is_made(folder) else onnx_stage(model, Output(folder=folder, resume=True), OnnxRequest())
        notes = [f"exports/{name}: {note}" for note in made.notes] if made else []
        run.mark(f"export-{name}", {"notes": notes}, folder=None if passing else f"exports/{name}")
    return tuple(run.pieces[f"export-{name}"].note["notes"])


def no_room(model: str, folder: Path) -> str | None:
    """Why the original is not exported to ONNX, or None: it would be large, and is only needed to be timed."""
    from moepress.converters.onnx.export import OnnxRequest, onnx_bytes, plan_onnx

    size = onnx_bytes(plan_onnx(opened_source(model_folder(model)), OnnxRequest()))
    memory, disk = _free_memory(), shutil.disk_usage(folder).free
    lack = f"The original has no throughput in ONNX Runtime: in fp32 it has {size / 2**30:.1f} GiB, and"
    if 2 * size > memory:
        return f"{lack} {memory / 2**30:.1f} GiB of memory are free, of which it may take half."
    if size > disk:
        return f"{lack} {disk / 2**30:.1f} GiB of the disk are free."
    return None


def _free_memory() -> int:
    return int(psutil.virtual_memory().available)


def _report(
    setup: _Setup,
    run: Run,
    decided: tuple[Profile, Plan],
    repairs: Repairs | None,
    quantized: Mapping[str, Any],
    made: _Exports,
) -> Report:
    recipe, folder, (profile, plan) = setup.recipe, model_folder(setup.recipe.model), decided
    late = recipe.model_dump(mode="json", include=set(LATE_FIELDS) - {"to"})
    if made.after is not None:
        late["onnx"] = "before and after" if made.before is not None else "after"
    if made.gguf is not None:
        late["gguf"] = "after"
    original = opened(folder)
    shape, text = original.shape, evaluation_of(recipe)
    late["text"], prompts = check_evaluation(folder, text, context=shape.context, vocabulary=shape.vocabulary)
    if prompts is not None:
        late["asked"] = prompts
    if recipe.tasks:
        late["task_files"] = files_digest(recipe.tasks)
    done = run.done("report")
    file = setup.out / JSON_NAME
    if done is not None and file.is_file() and done.note == late | {JSON_NAME: sha256_of(file)}:
        return Report.model_validate_json(file.read_text(encoding="utf-8"))
    subjects, pressed, bits = [subject_of("original", original)], opened_source(setup.out / "model"), ""
    if setup.scheme is None:
        subjects.append(subject_of("pruned", pressed))
    else:
        if plan.prunes:
            subjects.append(pruned_subject("pruned", original, plan, repairs))
        bits = _bits_text(setup, plan)
        subjects.append(subject_of(f"pruned + {bits}" if plan.prunes else bits, pressed))
    if made.after is not None:
        subjects.append(elsewhere_subject(f"{bits}, ONNX", open_onnx(made.after)))
    if made.gguf is not None:
        subjects.append(open_subject(f"{bits}, GGUF", made.gguf))
    report = validate_stage(
        subjects,
        folder,
        evaluation_of(recipe),
        setup.machine,
        setup.out,
        onnx_device="auto",  # the export is for the CPU; its throughput is taken on CUDA as well where there is one
        also_timed=[elsewhere_subject("original, ONNX", open_onnx(made.before))] if made.before is not None else [],
        also_checked=[(f"{bits}, GPTQ", gptq)] if (gptq := setup.out / "exports" / "gptq").is_dir() else [],
        title=plan.model_name,
        pruning=pruning_section(plan) if plan.prunes else None,
        usage=usage_section(profile, plan),
        choice=choice_section(plan),
        quantization=None if setup.scheme is None else _quantization(setup, original, quantized, plan),
        calibration=calibration_section(recipe.calibration + recipe.domain, quantized["calibration"]),
        notes=(
            *original.notes,
            *plan.notes,
            *made.notes,
            *(f"Calibration: {note}." for note in quantized["calibration"]["notes"]),
        ),
        commands=(f"moepress run {shlex.quote(recipe.model)} --recipe recipe.yaml -o OUT",),
        recipe=(setup.out / "recipe.yaml").read_text(encoding="utf-8"),
    )
    run.require_ready()
    write_report(report, setup.out)
    _describe(setup, report, original, plan)
    run.mark("report", late | {JSON_NAME: sha256_of(file)})
    return report


def _bits_text(setup: _Setup, plan: Plan) -> str:
    """How the report calls what was quantized."""
    if plan.grids:
        point = next((point for point in plan.curve if point.chosen), None)
        return "mix" if point is None else f"mix of {point.bits:.2f} bits"
    return "mixed bits" if plan.layer_bits else setup.recipe.grid or _scheme(setup, plan).short


def _quantization(setup: _Setup, original: Checkpoint, quantized: Mapping[str, Any], plan: Plan) -> Quantization:
    grid = setup.recipe.grid
    if plan.grids:
        return quantization_section(quantized, f"GGUF's types mixed by measured damage: {mix_text(plan.grids)}", plan)
    if grid is None:
        return quantization_section(quantized, scheme_text(_scheme(setup, plan), plan.layer_bits, plan.included), plan)
    include = on_grid(original, grid, asked_of(setup.recipe).parts)
    others = fallback_text(original, include, block_choice(original, grid))
    own = sorted(part for part, bits in include.items() if bits is not None)
    beside = f", {listed(own)} in Q8_0" if own else ""
    return quantization_section(quantized, f"GGUF's {grid}{f' ({others})' if others else ''}{beside}", plan)


def _describe(setup: _Setup, report: Report, original: Checkpoint, plan: Plan) -> None:
    """A model card in every folder that is to be published, and provenance.json, which has their digests too."""
    layouts: tuple[tuple[str, Format], ...] = (
        ("model", "compressed-tensors" if setup.recipe.grid is None else "gguf-blocks"),
        ("exports/gptq", "gptq"),
        ("exports/onnx", "onnx"),
        ("exports/gguf", "gguf"),
    )
    mixed = bool(plan.layer_bits)
    for name, layout in layouts:
        if (setup.out / name).is_dir() and setup.scheme is not None:
            size = opened_artifact(setup.out / name).total_bytes if layout == "gptq" else None
            if layout == "gguf":
                size = sum(file.stat().st_size for file in (setup.out / name).glob("*.gguf"))
            file = gguf_file(setup.out / name) if layout == "gguf" else None
            loaded = "" if file is None else file.name
            codes = _scheme(setup, plan).codes
            card = model_card(report, original, layout, stored_bytes=size, mixed=mixed, codes=codes, file=loaded)
            write_atomically(setup.out / name / CARD_NAME, card)
    made = files_below(setup.out, ("recipe.yaml", "plan.json", "profile", "repair", "model", "exports"))
    settings = portable(setup.recipe, setup.out)
    write_provenance(setup.out, provenance(report, {"original": original.folder}, made, settings))
