"""run: the stages in order, from one recipe, into one folder; a run that was interrupted goes on where it was.

OUT/recipe.yaml      everything that was used, complete
OUT/journal.jsonl    settings and finished stages
OUT/profile/         how the model uses its experts
OUT/plan.json        what stays
OUT/model/           the canonical artifact, compressed-tensors
OUT/exports/<fmt>/   the same codes in other layouts; onnx-before: the original, to be timed beside exports/onnx
OUT/report.{html,md,json}
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moepress import __version__
from moepress.calibration.profile import Profile, fingerprint, load_profile
from moepress.comparison import (
    Evaluation,
    evaluation_corpus,
    onnx_subject,
    pruned_subject,
    subject_of,
    validate_stage,
)
from moepress.compress.estimate import estimate_profile, estimate_quantize
from moepress.compress.figures import figures_of
from moepress.compress.linears import Include, linear_groups
from moepress.compress.pipeline import check_scheme
from moepress.compress.plan import Plan, count_from_keep, estimate_sizes, load_plan, make_plan, plan_text
from moepress.compress.rates import measure_rates
from moepress.compress.scoring import Criterion, Groups, default_criterion, domain_weights
from moepress.converters.artifact import open_artifact, open_source
from moepress.converters.onnx_folder import open_onnx
from moepress.converters.onnx_runtime import require_onnx, require_onnxruntime
from moepress.converters.scheme import Scheme
from moepress.errors import InvalidInputError, UsageError
from moepress.exports import export_stage, onnx_stage
from moepress.journal import Run, check_output, open_run, previous_settings, write_atomically
from moepress.models.checkpoint import Checkpoint, open_checkpoint
from moepress.models.experts import moe_layers
from moepress.models.inventory import inventory
from moepress.models.walk import choose_device, choose_dtype, default_memory
from moepress.stages import (
    DEFAULT_TOKENS,
    DEFAULT_WINDOW,
    EMBEDDED_TOKENS,
    Calibration,
    Machine,
    Output,
    QuantizeRequest,
    load_corpus,
    model_folder,
    profile_stage,
    quantize_stage,
    workload,
)
from moepress.validation.report import write_report
from moepress.validation.schema import Report
from moepress.validation.sections import calibration_section, pruning_section, quantization_section
from moepress.validation.thresholds import Thresholds

# What may change on resume: it touches exports and the report alone, which are then made (again).
LATE_FIELDS = ("to", "data", "data_domain", "max_windows", "throughput", "max_ppl_increase", "max_kl")


class Recipe(BaseModel):
    """Everything that a run depends on; written to OUT/recipe.yaml with all defaults filled in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal["1.0"] = "1.0"
    model: str
    calibration: tuple[str, ...] = ()
    domain: tuple[str, ...] = ()
    tokens: int | None = Field(default=None, ge=1)
    window: int | None = Field(default=None, ge=2)
    seed: int = 0
    keep: float | None = None
    experts: int | None = None
    criterion: Criterion | None = None
    domain_weight: dict[str, float] = {}
    groups: Groups = Groups.BALANCED
    bits: int = 4
    group_size: int = 128
    include: tuple[Include, ...] = ()
    to: tuple[Literal["gptq", "onnx"], ...] = ()
    data: tuple[str, ...] = ()
    data_domain: tuple[str, ...] = ()
    max_windows: int | None = Field(default=None, ge=1)
    throughput: bool = True
    max_ppl_increase: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_kl: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    device: str = "auto"
    dtype: str = "auto"
    max_memory: int | None = None


def load_recipe(file: Path) -> dict[str, Any]:
    """The values of a YAML recipe, not yet checked together with the command line's.

    Raises:
        InvalidInputError: it cannot be read or is not a mapping.
    """
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise InvalidInputError(f"{file} is not a readable YAML recipe ({why}).") from error
    if not isinstance(found, dict):
        raise InvalidInputError(f"{file} does not hold a YAML mapping; take OUT/recipe.yaml of a run as a pattern.")
    return found


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Check values and fill in the defaults; without --keep and --experts three quarters of the experts stay.

    Raises:
        InvalidInputError: naming the first field that is wrong.
    """
    try:
        recipe = Recipe.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidInputError(f"The recipe's {where}: {first['msg']}; mend it.") from error
    if recipe.keep is None and recipe.experts is None:
        recipe = recipe.model_copy(update={"keep": 0.75})
    return recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
    recipe: Recipe
    out: Path
    count: int
    machine: Machine


@dataclass(frozen=True, slots=True, kw_only=True)
class _Onnx:
    """Exports to ONNX: of the result, and of the original where there is one, with what the report says of them."""

    after: Path | None = None
    before: Path | None = None
    notes: tuple[str, ...] = ()


def check_recipe(recipe: Recipe) -> tuple[Checkpoint, int, Criterion]:
    """Everything that can be wrong with a recipe, found before the first hour of work instead of after it.

    Returns:
        The opened model, the number of experts that stay, and the criterion that chooses them.

    Raises:
        UsageError, InvalidInputError, UnsupportedError: as the stage concerned would.
    """
    folder = model_folder(recipe.model)
    checkpoint = open_checkpoint(folder)
    shape, degroup = checkpoint.shape, recipe.groups is Groups.DEGROUP
    count = count_from_keep(shape, recipe.keep, recipe.experts, degroup=degroup)
    scheme = Scheme(bits=recipe.bits, group_size=recipe.group_size)
    check_scheme(checkpoint, scheme, recipe.include)
    if "gptq" in recipe.to and Include.LM_HEAD in recipe.include:
        raise UsageError("--include lm_head and --to gptq exclude each other: no MoE loader reads a quantized lm_head.")
    if "onnx" in recipe.to:
        check_onnx(checkpoint, scheme, recipe.include)
    corpus = load_corpus(folder, _calibration(recipe), context=shape.context, vocabulary=shape.vocabulary)
    criterion = recipe.criterion or default_criterion(domain_weights(corpus.domains, recipe.domain_weight))
    evaluation_corpus(folder, _evaluation(recipe), context=shape.context, vocabulary=shape.vocabulary)
    return checkpoint, count, criterion


def check_onnx(checkpoint: Checkpoint, scheme: Scheme, include: Sequence[Include]) -> None:
    """Refuse what could not be exported to ONNX after it was quantized, as far as the original and the scheme tell.

    Raises:
        UnsupportedError: a package is missing, or a part of the model or the scheme has no kernel.
    """
    require_onnx()  # before the modules below, which import it
    require_onnxruntime()
    import torch

    from moepress.converters.onnx_export import OnnxRequest, plan_onnx
    from moepress.converters.onnx_weights import Weights, block_size

    weights = Weights(source=checkpoint, dtype=torch.float32)
    for layer in moe_layers(checkpoint):
        block_size(scheme, *weights.expert_shape(layer))
    layers = checkpoint.shape.layers
    groups = [group for layer in range(layers) for group in linear_groups(checkpoint, layer, layers, include)]
    names = {name for group in groups for name in group.names}
    for name in names | ({"lm_head.weight"} if Include.LM_HEAD in include else set()):
        block_size(scheme, checkpoint.shapes[name][1])
    plan_onnx(checkpoint, OnnxRequest())


def estimate_recipe(recipe: Recipe) -> dict[str, Any]:
    """What a run would take, after all its checks: the recipe in full, projected time, memory and disk by stage."""
    checkpoint, count, criterion = check_recipe(recipe)
    full = resolve(recipe, checkpoint, criterion, recipe.max_memory or default_memory())
    machine = Machine(device=full.device, dtype=full.dtype, memory_bytes=full.max_memory)
    work = workload(machine, tokens=full.tokens or DEFAULT_TOKENS, window=full.window or DEFAULT_WINDOW)
    scheme, figures = Scheme(bits=full.bits, group_size=full.group_size), figures_of(checkpoint)
    rates = measure_rates(checkpoint, work.device, work.dtype)
    quantized = estimate_quantize(checkpoint, figures, count, scheme, work, rates, include=full.include)
    return {
        "recipe": full.model_dump(mode="json"),
        "experts": count,
        "sizes": estimate_sizes(inventory(checkpoint), checkpoint.shape, count, scheme).model_dump(),
        "profile": asdict(estimate_profile(figures, work, rates)),
        "quantize": asdict(quantized),
    }


def resolve(recipe: Recipe, checkpoint: Checkpoint, criterion: Criterion, memory_bytes: int) -> Recipe:
    """The recipe with every default filled in, so that it says all that was used."""
    embedded = not (recipe.calibration or recipe.domain)
    device = choose_device(recipe.device)
    model = recipe.model if not Path(recipe.model).is_dir() else str(Path(recipe.model).resolve())
    values = {
        "model": model,
        "tokens": recipe.tokens or (EMBEDDED_TOKENS if embedded else DEFAULT_TOKENS),
        "window": recipe.window or min(checkpoint.shape.context, DEFAULT_WINDOW),
        "criterion": criterion,
        "device": str(device),
        "dtype": str(choose_dtype(recipe.dtype, device)).removeprefix("torch."),
        "max_memory": memory_bytes,
    }
    return recipe.model_copy(update=values)


def run_recipe(recipe: Recipe, out: Path, *, resume: bool = False, force: bool = False) -> Report:
    """Run all stages.

    Raises:
        UsageError: an option or the expert count is not legal, or the output is taken.
        InvalidInputError: model or text are not sound.
    """
    check_output(out, [model_folder(recipe.model)], resume=resume, force=force, in_place=True)
    checkpoint, count, criterion = check_recipe(recipe)
    before = previous_settings(out) if resume else {}
    # Batch sizes depend on the memory, and the last bits of the result on them.
    recipe = resolve(
        recipe, checkpoint, criterion, recipe.max_memory or before.get("recipe.max_memory") or default_memory()
    )
    settings: dict[str, Any] = {"command": "run", "moepress": __version__, "model": fingerprint(checkpoint)}
    settings |= {f"recipe.{k}": v for k, v in recipe.model_dump(mode="json", exclude=set(LATE_FIELDS)).items()}
    machine = Machine(device=recipe.device, dtype=recipe.dtype, memory_bytes=recipe.max_memory)
    setup = _Setup(recipe=recipe, out=out, count=count, machine=machine)
    with open_run(out, settings, resume=resume, force=force, in_place=True) as run:
        write_atomically(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        profile = _profile(setup, run)
        plan = _plan(setup, run, profile)
        quantized = _quantize(setup, run, plan)
        exported = _exports(setup, run)
        return _report(setup, run, plan, quantized, exported)


def _calibration(recipe: Recipe) -> Calibration:
    return Calibration(
        sources=recipe.calibration,
        domains=recipe.domain,
        tokens=recipe.tokens,
        window=recipe.window,
        seed=recipe.seed,
    )


def _evaluation(recipe: Recipe) -> Evaluation:
    return Evaluation(
        data=recipe.data,
        domains=recipe.data_domain,
        window=recipe.window,
        max_windows=recipe.max_windows,
        throughput=recipe.throughput,
        thresholds=Thresholds(max_ppl_increase=recipe.max_ppl_increase, max_kl=recipe.max_kl),
    )


def _stage_output(setup: _Setup, name: str) -> Output:
    return Output(folder=setup.out / name, resume=True)


def _profile(setup: _Setup, run: Run) -> Profile:
    folder = setup.out / "profile"
    if run.done("profile") is None and not folder.exists():
        profile_stage(setup.recipe.model, _stage_output(setup, "profile"), _calibration(setup.recipe), setup.machine)
    if run.done("profile") is None:
        run.mark("profile")
    return load_profile(folder)


def _plan(setup: _Setup, run: Run, profile: Profile) -> Plan:
    recipe = setup.recipe
    if run.done("plan") is None:
        plan = make_plan(
            profile,
            count=setup.count,
            criterion=recipe.criterion,
            weights=recipe.domain_weight,
            groups=recipe.groups,
            scheme=Scheme(bits=recipe.bits, group_size=recipe.group_size),
        )
        text = plan_text(plan)
        run.write("plan", "plan.json", lambda path: _text(path, text))
    return load_plan(setup.out / "plan.json")


def _text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _quantize(setup: _Setup, run: Run, plan: Plan) -> Mapping[str, Any]:
    recipe = setup.recipe
    done = run.done("model")
    if done is not None:
        return done.note
    folder = setup.out / "model"
    if folder.exists():  # killed between the stage's end and its line in the journal
        from moepress.models.checkpoint import read_json

        result: Mapping[str, Any] = read_json(folder / "moepress.json")
    else:
        result = quantize_stage(
            recipe.model,
            _stage_output(setup, "model"),
            plan,
            QuantizeRequest(
                scheme=Scheme(bits=recipe.bits, group_size=recipe.group_size), include=frozenset(recipe.include)
            ),
            _calibration(recipe),
            setup.machine,
        )
    run.mark(
        "model", {k: result[k] for k in ("layer_error", "experts_without_tokens", "experts_rounded", "calibration")}
    )
    return run.pieces["model"].note


def _exports(setup: _Setup, run: Run) -> _Onnx:
    recipe, exports = setup.recipe, setup.out / "exports"
    for target in recipe.to:
        if target != "onnx" and run.done(f"export-{target}") is None:
            if not (exports / target).exists():
                export_stage(str(setup.out / "model"), Output(folder=exports / target, resume=True), target)
            run.mark(f"export-{target}")
    if "onnx" not in recipe.to:
        return _Onnx()
    notes = _export_onnx(setup, run, "onnx", str(setup.out / "model"))
    if not recipe.throughput:
        return _Onnx(after=exports / "onnx", notes=notes)
    lack = None if (exports / "onnx-before").exists() else _no_room(setup)
    if lack is not None:
        return _Onnx(after=exports / "onnx", notes=(*notes, lack))
    notes += _export_onnx(setup, run, "onnx-before", recipe.model)
    return _Onnx(after=exports / "onnx", before=exports / "onnx-before", notes=notes)


def _export_onnx(setup: _Setup, run: Run, name: str, model: str) -> tuple[str, ...]:
    from moepress.converters.onnx_export import OnnxRequest

    folder, done = setup.out / "exports" / name, run.done(f"export-{name}")
    if done is None:
        made = None if folder.exists() else onnx_stage(model, Output(folder=folder, resume=True), OnnxRequest())
        run.mark(f"export-{name}", {"notes": [f"exports/{name}: {note}" for note in made.notes] if made else []})
    return tuple(run.pieces[f"export-{name}"].note["notes"])


def _no_room(setup: _Setup) -> str | None:
    """Why the original is not exported to ONNX, or None: it would be large, and is only needed to be timed."""
    from moepress.converters.onnx_export import OnnxRequest, onnx_bytes, plan_onnx

    size = onnx_bytes(plan_onnx(open_source(model_folder(setup.recipe.model)), OnnxRequest()))
    memory, disk = _free_memory(), shutil.disk_usage(setup.out).free
    lack = f"The original has no throughput in ONNX Runtime: in fp32 it has {size / 2**30:.1f} GiB, and"
    if 2 * size > memory:
        return f"{lack} {memory / 2**30:.1f} GiB of memory are free, of which it may take half."
    if size > disk:
        return f"{lack} {disk / 2**30:.1f} GiB of the disk are free."
    return None


def _free_memory() -> int:
    return int(psutil.virtual_memory().available)


def _report(setup: _Setup, run: Run, plan: Plan, quantized: Mapping[str, Any], onnx: _Onnx) -> Report:
    recipe, folder = setup.recipe, model_folder(setup.recipe.model)
    late = recipe.model_dump(mode="json", include=set(LATE_FIELDS) - {"to"})
    if onnx.after is not None:
        late["onnx"] = "before and after" if onnx.before is not None else "after"
    done = run.done("report")
    if done is not None and done.note == late:
        return Report.model_validate_json((setup.out / "report.json").read_text(encoding="utf-8"))
    original, artifact = open_checkpoint(folder), open_artifact(setup.out / "model")
    subjects = [subject_of("original", original)]
    if plan.prunes:
        subjects.append(pruned_subject("pruned", original, plan))
    name = f"pruned + {recipe.bits} bit" if plan.prunes else f"{recipe.bits} bit"
    subjects.append(subject_of(name, artifact))
    if onnx.after is not None:
        subjects.append(onnx_subject(f"{recipe.bits} bit, ONNX", open_onnx(onnx.after)))
    report = validate_stage(
        subjects,
        folder,
        _evaluation(recipe),
        setup.machine,
        setup.out,
        onnx_device="auto",  # the export is for the CPU; its throughput is taken on CUDA as well where there is one
        also_timed=[onnx_subject("original, ONNX", open_onnx(onnx.before))] if onnx.before is not None else [],
        title=plan.model_name,
        pruning=pruning_section(plan) if plan.prunes else None,
        quantization=quantization_section(quantized, artifact.scheme, plan),
        calibration=calibration_section(recipe.calibration + recipe.domain, quantized["calibration"]),
        notes=(*plan.notes, *onnx.notes),
        commands=(f"moepress run {recipe.model} --recipe recipe.yaml -o OUT",),
        recipe=(setup.out / "recipe.yaml").read_text(encoding="utf-8"),
    )
    write_report(report, setup.out)
    run.mark("report", late)
    return report
