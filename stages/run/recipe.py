"""The recipe of a run: its fields and defaults, and all that can be wrong with it, found before any work."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from moepress.calibration.hessian import MOST_END_WEIGHT
from moepress.compress.budget.search import most_common
from moepress.compress.budget.sizes import included_linears, predicting_bytes, settled_parts
from moepress.compress.gptq.block_choice import PLANNED, PRESETS, nearest_scheme
from moepress.compress.gptq.include import IN_LAYERS, NONE, Asked, Include, Included, asked_for
from moepress.compress.gptq.layer_bits import check_scheme, settle_bits
from moepress.compress.pruning.domains import Protection, protection
from moepress.compress.pruning.plan import count_from_keep
from moepress.compress.pruning.repair import Repair
from moepress.compress.pruning.scoring import Criterion, Groups, default_criterion, domain_weights
from moepress.converters.safetensors.artifact import refuse_floats
from moepress.converters.safetensors.scheme import SUPPORTED_BITS, Codes, Scheme, floats_alone
from moepress.errors import InvalidInputError, UsageError
from moepress.hub.snapshot import hub_model, origin_of
from moepress.models.forward.inventory import inventory
from moepress.models.forward.tensor_check import check_mtp
from moepress.models.forward.walk import choose_device, choose_dtype
from moepress.models.storage.checkpoint import Checkpoint
from moepress.models.storage.experts import mtp_layers
from moepress.models.storage.mtp import Mtp
from moepress.runs.byte_sizes import parse_bytes, parse_share
from moepress.runs.text import suggestion
from moepress.stages.answers import LEAST_NEW_TOKENS, MAX_NEW_TOKENS, answering_of
from moepress.stages.evaluation import Evaluation, check_evaluation
from moepress.stages.export import check_gguf, check_onnx, onnx_bits
from moepress.stages.groundwork import gguf_weights, load_corpus, opened
from moepress.stages.places import DEFAULT_TOKENS, DEFAULT_WINDOW, EMBEDDED_TOKENS, Calibration, model_folder
from moepress.stages.plan import BudgetRequest, Wish, budget_of, loadable, possible_mix, require_possible
from moepress.stages.quantize import block_choice, on_grid
from moepress.stages.repair import check_repair
from moepress.stages.tasks import TaskRequest, check_request
from moepress.validation.quality.thresholds import Thresholds
from moepress.validation.rules.check import notes_before
from moepress.validation.rules.findings import Runtime
from moepress.validation.speed.targets import all_targets
from moepress.validation.tasks.names import is_place

# What may change on resume: it touches exports and the report alone, which are then made (again).
LATE_FIELDS = (
    *("to", "data", "data_domain", "max_windows", "throughput", "max_ppl_increase", "max_kl"),
    *("tasks", "limit", "chat", "min_recovery"),
    *("generations", "prompts", "max_new_tokens", "temperature", "generation_seed", "max_loop_increase"),
)


def _bytes(value: Any) -> Any:
    """A size as --budget and --max-memory take it; numbers stay what they are."""
    try:
        return parse_bytes(value) if isinstance(value, str) else value
    except UsageError:
        raise ValueError(f"{value!r} is not a size; write for example 8GiB") from None


def _share(value: Any) -> Any:
    return parse_share(value) if isinstance(value, str) else value  # a ValueError is pydantic's to tell


Bytes = Annotated[int, BeforeValidator(_bytes)]
Count = Annotated[int, Field(ge=1, lt=1 << 40)]
Share = Annotated[float, BeforeValidator(_share)]


class Recipe(BaseModel):
    """Everything that a run depends on; written to OUT/recipe.yaml with all defaults filled in."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal["1.0"] = "1.0"
    model: str
    calibration: tuple[str, ...] = ()
    domain: tuple[str, ...] = ()
    tokens: Count | None = None
    window: int | None = Field(default=None, ge=2, lt=1 << 40)
    seed: int = Field(default=0, ge=-(1 << 63), lt=1 << 63)
    keep: Share | None = None
    experts: int | None = Field(default=None, lt=1 << 40)
    criterion: Criterion | None = None
    domain_weight: dict[str, float] = {}
    protect: tuple[str, ...] = ()
    max_domain_loss: str | None = None
    groups: Groups = Groups.BALANCED
    bits: int | None = Field(default=None, lt=1 << 40)
    group_size: int | None = Field(default=None, lt=1 << 40)
    scheme: Literal["nvfp4", "mxfp4"] | None = None
    grid: str | None = None
    budget: Bytes | None = Field(default=None, ge=1)
    target: str | None = None
    targets_file: str | None = None
    context: Count | None = None
    mixed_bits: bool = False
    runtime: Runtime | None = None
    include: tuple[Literal["auto"] | Include, ...] = ("auto",)
    part_bits: dict[Include, int] = {}
    match: Literal["auto", "own", "original"] = "auto"
    effort: Literal["fast", "normal", "high", "max"] = "normal"
    end_weight: float = Field(default=1.0, ge=1, le=MOST_END_WEIGHT, allow_inf_nan=False)
    positive_scales: bool = False
    asymmetric: bool = False
    repair: tuple[Repair, ...] = ()
    mtp: Mtp = Mtp.KEEP
    to: tuple[Literal["gptq", "onnx", "gguf"], ...] = ()
    data: tuple[str, ...] = ()
    data_domain: tuple[str, ...] = ()
    max_windows: Count | None = None
    throughput: bool = True
    max_ppl_increase: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_kl: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    tasks: tuple[str, ...] = ()
    limit: Count | None = None
    chat: bool = False
    min_recovery: Share | None = Field(default=None, gt=0, le=10, allow_inf_nan=False)
    generations: Count | None = None
    prompts: tuple[str, ...] = ()
    max_new_tokens: int = Field(default=MAX_NEW_TOKENS, ge=LEAST_NEW_TOKENS, lt=1 << 40)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    generation_seed: int = Field(default=0, ge=0, lt=1 << 63)
    max_loop_increase: float | None = Field(default=None, ge=0, le=1)
    device: str = "auto"
    dtype: str = "auto"
    max_memory: Bytes | None = None


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Check values and fill in the defaults: three quarters of the experts stay, unless a budget decides.

    Bits stay open: `settled` looks at the model first.

    Raises:
        InvalidInputError: naming the first field that is wrong.
    """
    try:
        recipe = Recipe.model_validate(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        why = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            why = f"there is no such field{suggestion(where, Recipe.model_fields)}"
        raise InvalidInputError(f"The recipe's {where}: {why}; mend it.") from error
    if budget_request(recipe) is not None:
        return recipe.model_copy(update={"grid": PLANNED}) if _may_mix(recipe) else recipe
    own_groups = recipe.grid is not None or recipe.scheme is not None
    defaults: dict[str, Any] = {} if own_groups else {"group_size": recipe.group_size or 128}
    if recipe.keep is None and recipe.experts is None:
        defaults["keep"] = 0.75
    return recipe.model_copy(update=defaults)


def budget_request(recipe: Recipe) -> BudgetRequest | None:
    """The budget that a recipe names, or None."""
    if recipe.budget is None and recipe.target is None:
        return None
    return BudgetRequest(
        limit_bytes=recipe.budget,
        target=recipe.target,
        context=recipe.context,
        targets_file=_targets_file(recipe),
    )


def _targets_file(recipe: Recipe) -> Path | None:
    return None if recipe.targets_file is None else Path(recipe.targets_file)


def wish_of(recipe: Recipe) -> Wish:
    """What the recipe leaves to its budget; codes that ONNX has no kernel for are no choice where it is asked for."""
    made, asked = onnx_bits() if "onnx" in recipe.to else SUPPORTED_BITS, asked_of(recipe)
    request = budget_request(recipe) or BudgetRequest()
    return Wish(
        keep=recipe.keep,
        experts=recipe.experts,
        **({"widths": (recipe.bits,)} if recipe.bits is not None else loadable(request, recipe.runtime, made)),
        group_size=recipe.group_size,
        mixed=recipe.mixed_bits,
        criterion=recipe.criterion,
        weights=recipe.domain_weight,
        groups=recipe.groups,
        include=asked.parts,
        auto=asked.auto,
        protection=protection_of(recipe),
    )


def protection_of(recipe: Recipe) -> Protection:
    """The domains that must not lose too much."""
    return protection(recipe.protect, recipe.max_domain_loss)


def asked_of(recipe: Recipe) -> Asked:
    """What is to be quantized besides the routed experts; a list that is empty says nothing."""
    return asked_for(recipe.include or (NONE,), recipe.part_bits)


def _may_mix(recipe: Recipe) -> bool:
    """Whether a budget is to be spent on a mix of GGUF's types: nothing but a GGUF is wanted, and no bits are named."""
    runtime = None if recipe.runtime is Runtime.LLAMA_CPP else recipe.runtime
    named = (recipe.bits, recipe.group_size, recipe.scheme, recipe.grid, recipe.mixed_bits or None, runtime)
    return set(recipe.to) == {"gguf"} and all(given is None for given in named) and not _names_parts(recipe)


def _names_parts(recipe: Recipe) -> bool:
    """Whether the recipe says what is quantized besides the routed experts."""
    return asked_of(recipe) != Asked(auto=True)


def mixes(recipe: Recipe) -> bool:
    """Whether the budget is spent on a mix of GGUF's types."""
    return recipe.grid == PLANNED


@dataclass(frozen=True, slots=True, kw_only=True)
class Settled:
    """What is known of the result before there is a plan.

    Attributes:
        count: experts in every layer.
        scheme: bits and groups; None where the model is only pruned: its experts have four bits already, and no others
            were asked for.
        layer_bits: of layers with experts, if mixed.
        include: what is quantized besides the routed experts.
        notes: what is to be said of that.
    """

    count: int
    scheme: Scheme | None
    layer_bits: Mapping[int, int] = field(default_factory=dict)
    include: Included = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def settled(recipe: Recipe, checkpoint: Checkpoint) -> Settled:
    """Count and bits; under a budget, which decides after the profile, the most experts that fit, and bits that fill
    what they leave.

    Raises:
        UsageError: options exclude each other, or nothing fits.
    """
    shape, request = checkpoint.shape, budget_request(recipe)
    if recipe.scheme is not None:
        floats_of(recipe)
    if recipe.grid is not None:
        require_grid(recipe)
    if recipe.asymmetric and request is not None:
        raise UsageError(
            "--asymmetric does not go with --budget and --target, which count codes without zero points; say how much "
            "stays with --keep."
        )
    if request is None:
        return _settled_alone(recipe, checkpoint)
    if mixes(recipe):
        budget = budget_of(request, checkpoint.config, shape)
        most, name = possible_mix(gguf_weights(checkpoint), shape, budget, wish_of(recipe))
        include = on_grid(checkpoint, recipe.grid, ())
        return Settled(count=most, scheme=nearest_scheme(name.lower()), include=include)
    if recipe.mixed_bits and recipe.bits is not None:
        raise UsageError("--mixed-bits chooses the bits of every layer; leave out --bits.")
    if recipe.mixed_bits and "gptq" in recipe.to:
        raise UsageError("--mixed-bits and --to gptq exclude each other: the GPTQ layout has one width for all layers.")
    wish, kept = wish_of(recipe), inventory(checkpoint)
    predicting = predicting_bytes(kept, shape, wish.widths) if recipe.mtp is Mtp.KEEP else 0
    budget = budget_of(request, checkpoint.config, shape, predicting=predicting)
    include, notes = wish.parts(shape, included_linears(checkpoint, IN_LAYERS))
    linears = included_linears(checkpoint, include)
    layers = checkpoint.outline.moe_layers
    found = require_possible(kept, shape, len(layers), budget, wish, linears, mixed=recipe.mixed_bits)
    scheme = Scheme(bits=most_common(found.widths) or 4, group_size=wish.group(shape, linears))
    bits = {layers[n]: width for n, width in found.widths.items() if width is not None}
    return Settled(
        count=found.count,
        scheme=scheme,
        layer_bits=bits if found.mixed else {},
        include=include,
        notes=tuple(notes),
    )


def _settled_alone(recipe: Recipe, checkpoint: Checkpoint) -> Settled:
    """The same where no budget chooses."""
    if recipe.context is not None or recipe.mixed_bits or recipe.runtime is not None:
        raise UsageError("--context, --mixed-bits and --runtime go with --budget or --target only.")
    degroup = recipe.groups is Groups.DEGROUP
    count = count_from_keep(checkpoint.shape, recipe.keep, recipe.experts, degroup=degroup)
    if checkpoint.pressed_as and recipe.bits is None and recipe.scheme is None and recipe.grid is None:
        return Settled(count=count, scheme=None)
    scheme = _scheme(recipe)
    every = included_linears(checkpoint, IN_LAYERS)
    include, notes = settled_parts(asked_of(recipe), every, scheme.group_size, floats=scheme.floats)
    if recipe.grid is not None:
        include = on_grid(checkpoint, recipe.grid, include)
    else:
        include = {part: None if bits == scheme.bits else bits for part, bits in include.items()}
    return Settled(count=count, scheme=scheme, include=include, notes=tuple(notes))


def _scheme(recipe: Recipe) -> Scheme:
    """What a recipe without a budget says of codes; a grid counts as the integers nearest to it."""
    if recipe.grid is not None:
        return nearest_scheme(recipe.grid)
    if recipe.scheme is not None:
        return floats_of(recipe)
    return Scheme(bits=recipe.bits or 4, group_size=recipe.group_size or 128, symmetric=not recipe.asymmetric)


def floats_of(recipe: Recipe) -> Scheme:
    """The scheme of 4-bit floats that a recipe names.

    Raises:
        UsageError: something besides says what codes are.
        UnsupportedError: an export does not take them.
    """
    assert recipe.scheme is not None
    scheme = floats_alone(Codes(recipe.scheme), dict(recipe))
    for target in recipe.to:
        refuse_floats(scheme.codes, target)
    return scheme


def require_grid(recipe: Recipe) -> None:
    """Refuse what a grid of GGUF does not go with.

    Raises:
        UsageError: naming it.
    """
    if recipe.bits is not None or recipe.group_size is not None or recipe.mixed_bits:
        raise UsageError("--bits, --group-size and --mixed-bits do not go with --grid, which says all of that.")
    if recipe.positive_scales or recipe.asymmetric:
        named = "--positive-scales" if recipe.positive_scales else "--asymmetric"
        raise UsageError(f"{named} is for codes of integers; GGUF's types say themselves what scales are.")
    if mixes(recipe) and (budget_request(recipe) is None or _names_parts(recipe)):
        raise UsageError("The grid `mix` spends a --budget or --target on the whole model; give one, and no --include.")
    if budget_request(recipe) is not None and not mixes(recipe):
        raise UsageError(
            "--grid does not go with --budget and --target, which choose bits; say how much stays with --keep."
        )
    if set(recipe.to) - {"gguf"}:
        raise UsageError("Blocks of GGUF go into no other format: with --grid the only export is --to gguf.")


def check_recipe(recipe: Recipe) -> tuple[Checkpoint, int, Criterion]:
    """Everything that can be wrong with a recipe, found before the first hour of work instead of after it.

    Returns:
        The opened model, the number of experts that stay, and the criterion that chooses them.

    Raises:
        UsageError, InvalidInputError, UnsupportedError: as the stage concerned would.
    """
    folder = model_folder(recipe.model)
    all_targets(_targets_file(recipe))
    checkpoint = opened(folder)
    shape, asked = checkpoint.shape, task_request(recipe)
    if asked is not None:
        check_request(asked, checkpoint, choose_device(recipe.device), recipe.dtype)
    known = settled(recipe, checkpoint)
    for layer in mtp_layers(checkpoint) if recipe.mtp is Mtp.KEEP else ():
        check_mtp(checkpoint, layer, folder=folder)
    if recipe.repair:
        check_repair(checkpoint, known.count, frozenset(recipe.repair))
    if recipe.grid is not None:
        assert known.scheme is not None
        named = "q4_k" if mixes(recipe) else recipe.grid
        check_scheme(checkpoint, known.scheme, known.include, block_choice(checkpoint, named, include=known.include))
    elif known.scheme is None:
        _check_unquantized(recipe, checkpoint)
    else:
        check_scheme(checkpoint, known.scheme, known.include)
        settle_bits(checkpoint, known.scheme, known.layer_bits, known.include)
    if "gptq" in recipe.to and Include.LM_HEAD in known.include:
        raise UsageError("--include lm_head and --to gptq exclude each other: no MoE loader reads a quantized lm_head.")
    if "onnx" in recipe.to and known.scheme is not None:
        check_onnx(checkpoint, known.scheme, known.include)
    if "gguf" in recipe.to and known.scheme is not None:
        check_gguf(checkpoint, known.scheme)
    corpus = load_corpus(folder, calibration_of(recipe), context=shape.context, vocabulary=shape.vocabulary)
    weights = domain_weights(corpus.domains, recipe.domain_weight)
    criterion = recipe.criterion or default_criterion(weights)
    protection_of(recipe).require(corpus.domains, weights)
    check_evaluation(folder, evaluation_of(recipe), context=shape.context, vocabulary=shape.vocabulary)
    return checkpoint, known.count, criterion


def _check_unquantized(recipe: Recipe, checkpoint: Checkpoint) -> None:
    """Refuse what needs new codes, where the experts keep those that they have."""
    stored = checkpoint.pressed_as
    if recipe.to or _names_parts(recipe) or recipe.asymmetric:
        other = "--include" if _names_parts(recipe) else "--asymmetric"
        what = f"--to {','.join(recipe.to)}" if recipe.to else other
        raise UsageError(
            f"The experts of this model are stored as {stored} already, so `run` prunes them and keeps their codes, "
            f"and {what} needs others; ask for --bits 4 to quantize again, which costs quality."
        )


def resolve(recipe: Recipe, checkpoint: Checkpoint, criterion: Criterion, memory_bytes: int) -> Recipe:
    """The recipe with every default filled in, so that it says all that was used."""
    embedded = not (recipe.calibration or recipe.domain)
    device = choose_device(recipe.device)
    if Path(recipe.model).is_dir():
        model = str(Path(recipe.model).resolve())
    else:  # of the hub with its commit, so that a resume has the same weights
        model = str(origin_of(checkpoint.folder) or recipe.model)
    values = {
        "model": model,
        **{name: tuple(map(_absolute, getattr(recipe, name))) for name in _PLACES},
        "tasks": tuple(_absolute(name) if is_place(name) else name for name in recipe.tasks),
        "targets_file": None if recipe.targets_file is None else _absolute(recipe.targets_file),
        "tokens": recipe.tokens or (EMBEDDED_TOKENS if embedded else DEFAULT_TOKENS),
        "window": recipe.window or min(checkpoint.shape.context, DEFAULT_WINDOW),
        "criterion": criterion,
        "bits": recipe.bits or _bits(recipe, checkpoint),
        **_parts(recipe, checkpoint),
        "device": str(device),
        "dtype": str(choose_dtype(recipe.dtype, device)).removeprefix("torch."),
        "max_memory": memory_bytes,
    }
    return recipe.model_copy(update=values)


def _bits(recipe: Recipe, checkpoint: Checkpoint) -> int | None:
    """What is taken where a recipe does not say; a budget chooses by itself, and a grid or floats have their own."""
    open_yet = recipe.grid is None and recipe.scheme is None and budget_request(recipe) is None
    known = settled(recipe, checkpoint) if open_yet else None
    return known.scheme.bits if known is not None and known.scheme is not None else None


def _parts(recipe: Recipe, checkpoint: Checkpoint) -> dict[str, Any]:
    """The parts by their names, in place of `auto`; a mix is for all of them, and a budget is held to these."""
    if recipe.grid in (PLANNED, *PRESETS) or not asked_of(recipe).auto:
        return {}
    known = settled(recipe, checkpoint).include
    return {"include": tuple(known), "part_bits": {part: bits for part, bits in known.items() if bits is not None}}


_PLACES = ("calibration", "domain", "data", "data_domain", "prompts")
"""Fields that hold paths, `NAME=PATH` among them; a resume from another folder means the same files."""


def _absolute(given: str) -> str:
    """A path that is there, from the root; what is none, such as a data set's id, as it is."""
    return _moved(given, lambda path: str(path.resolve()))


def _moved(given: str, to: Callable[[Path], str]) -> str:
    name, equals, place = (
        given.partition("=") if "=" in given and not Path(given).expanduser().exists() else ("", "", given)
    )
    path = Path(place).expanduser()
    return f"{name}{equals}{to(path)}" if place and path.exists() else given


def portable(recipe: Recipe, out: Path) -> dict[str, Any]:
    """A recipe as plain JSON with paths as they are from `out`, so that they can be moved with it, and tell nothing of
    this machine.
    """

    def near(path: Path) -> str:
        try:
            return Path(os.path.relpath(path.resolve(), out.resolve())).as_posix()
        except ValueError:  # another drive
            return str(path)

    values = recipe.model_dump(mode="json")
    values |= {name: [_moved(place, near) for place in values[name]] for name in _PLACES}
    moved = {name: _moved(name, lambda path: f"./{near(path)}") for name in recipe.tasks if is_place(name)}
    values["tasks"] = [moved.get(name, name) for name in recipe.tasks]
    return values | {name: values[name] and _moved(values[name], near) for name in ("model", "targets_file")}


def recipe_text(recipe: Recipe, asked: Recipe, out: Path) -> str:
    """recipe.yaml: what was used, but the machine as it was asked for, so that another one may choose."""
    values = portable(recipe, out) | {name: getattr(asked, name) for name in ("device", "dtype", "max_memory")}
    return yaml.safe_dump(values, sort_keys=False)


def as_before(recipe: Recipe, before: Mapping[str, Any]) -> Recipe:
    """The recipe with what an interrupted run has decided, where it does not say otherwise itself: the commit of the
    hub, and whether a budget is spent on a mix of GGUF's types, which exports that come later do not change.

    Args:
        recipe: of the resume.
        before: what the interrupted run has noted; empty where there is none.
    """
    model, decided = before.get("recipe.model"), before.get("recipe.grid", recipe.grid)
    if {recipe.grid, decided} == {None, PLANNED}:
        recipe = recipe.model_copy(update={"grid": decided})
    named, began = hub_model(recipe.model), hub_model(model) if isinstance(model, str) else None
    if named is None or began is None or named.revision is not None or named.repo != began.repo:
        return recipe
    return recipe if Path(recipe.model).exists() else recipe.model_copy(update={"model": model})


def calibration_of(recipe: Recipe) -> Calibration:
    """The text that experts are judged by and quantized on."""
    return Calibration(
        sources=recipe.calibration,
        domains=recipe.domain,
        tokens=recipe.tokens,
        window=recipe.window,
        seed=recipe.seed,
    )


def evaluation_of(recipe: Recipe) -> Evaluation:
    """The text that the models are compared on, and the thresholds."""
    return Evaluation(
        data=recipe.data,
        domains=recipe.data_domain,
        window=recipe.window,
        max_windows=recipe.max_windows,
        throughput=recipe.throughput,
        context=recipe.context,
        targets_file=_targets_file(recipe),
        target=recipe.target,
        thresholds=Thresholds(
            max_ppl_increase=recipe.max_ppl_increase,
            max_kl=recipe.max_kl,
            max_loop_increase=recipe.max_loop_increase,
        ),
        answering=answering_of(dict(recipe)),
        tasks=task_request(recipe),
    )


def task_request(recipe: Recipe) -> TaskRequest | None:
    """What the recipe's models are to be asked.

    Raises:
        UsageError: it says how without saying what.
    """
    if recipe.tasks:
        return TaskRequest(names=recipe.tasks, limit=recipe.limit, chat=recipe.chat, min_recovery=recipe.min_recovery)
    given = next((name for name in ("limit", "chat", "min_recovery") if getattr(recipe, name)), None)
    if given is not None:
        raise UsageError(f"--{given.replace('_', '-')} goes with --tasks; name some, such as gsm8k.")
    return None


def runtime_notes(recipe: Recipe) -> list[str]:
    """What would not work of the result in the runtimes that its layouts are made for, known before any work; nothing
    under a budget, which decides about experts and bits after the profile (`run_recipe` tells it then).

    Raises:
        UsageError, InvalidInputError, UnsupportedError: as `check_recipe`.
    """
    if budget_request(recipe) is not None or recipe.grid is not None:  # blocks are read by moepress alone
        return []
    checkpoint = opened(model_folder(recipe.model))
    known, degroup = settled(recipe, checkpoint), recipe.groups is Groups.DEGROUP
    found = notes_before(
        checkpoint.config,
        known.count,
        known.scheme,
        degroup=degroup,
        gptq="gptq" in recipe.to,
        include=known.include,
    )
    return [*found, *known.notes]
