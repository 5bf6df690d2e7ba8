"""plan: profiles read and merged; from a budget in bytes, or a GPU of the table, to a plan, as `run` does it too."""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moepress.calibration.profile import Profile, load_profile, merge_profiles
from moepress.compress.budget.damage import bare_space, space_of
from moepress.compress.budget.divergences import divergences_of
from moepress.compress.budget.gguf_sizes import FileWeights
from moepress.compress.budget.mixes import best_mix, curve, fallen_back, mix_space, smallest_mix
from moepress.compress.budget.search import (
    Budget,
    Candidate,
    Space,
    Unit,
    Width,
    choose,
    most_common,
    too_small,
    verdict,
)
from moepress.compress.budget.sizes import (
    Linear,
    group_size_for,
    group_size_within,
    planned_linears,
    predicting_bytes,
    probe_scheme,
    settled_parts,
)
from moepress.compress.gptq.block_choice import MIX_TYPES
from moepress.compress.gptq.include import IN_LAYERS, Asked, Include, Included, included
from moepress.compress.pruning.domains import NO_PROTECTION, Protection, selections_of
from moepress.compress.pruning.plan import Plan, count_from_keep, make_plan
from moepress.compress.pruning.scoring import Criterion, Groups, Selection, default_criterion, domain_weights, keep_sets
from moepress.converters.safetensors.scheme import PER_CHANNEL, SUPPORTED_BITS, Scheme
from moepress.errors import UsageError
from moepress.models.families.family import Shape, legal_counts
from moepress.models.forward.inventory import cache_bytes
from moepress.models.storage.mtp import Mtp
from moepress.stages.places import context_notes
from moepress.validation.rules.bits import bits_for, runtimes_of
from moepress.validation.rules.findings import Runtime
from moepress.validation.speed.targets import DEFAULT_CONTEXT, RESERVE, target_of

FEW_BITS_NOTE = (
    "2- and 3-bit experts load in transformers, and in vLLM by `--moe-backend humming` only; --bits 4 or --bits 8 "
    "keeps to what every runtime takes."
)
INCLUDE_NOTE = (
    "The estimated loss is that of the routed experts; what else is quantized has the bits that `part_bits` says, or "
    "theirs, and its loss is not in it."
)
PARTS_NOTE = (
    "The estimated loss is the KL divergence by all that is quantized or pruned, from what rounding each kind of "
    "matrix was measured to cost; `validate` measures what came of it."
)
MIXED_NOTE = (
    "Bits differ by layer: vLLM and SGLang take that; transformers loads such a folder wrong without saying so, and "
    "llama.cpp's converter refuses it."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetRequest:
    """What --budget, --target and --context say; one of the first two.

    Attributes:
        limit_bytes: for weights and, where a context is named, the KV cache.
        target: id of a GPU of the table.
        context: tokens in the KV cache; None for no cache under a plain budget, and for 8192 on a GPU.
        targets_file: the user's own GPUs, beside those of the table.
    """

    limit_bytes: int | None = None
    target: str | None = None
    context: int | None = None
    targets_file: Path | None = None


MIX_NOTE = (
    "The divergence is estimated: what rounding each kind of matrix costs was measured, the rest follows from the "
    "errors of types; `validate` measures what came of it."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What of a plan is decided already; None leaves it to the budget.

    Attributes:
        keep, experts: share or number of experts that stay.
        widths: bits to choose from; (None,) for pruning alone.
        beyond: bits that are no choice because the runtimes that are meant do not load them.
        group_size: None for the one that the profile's losses were measured with.
        mixed: bits may differ by layer.
        criterion, weights, groups: as in `make_plan`.
        include, auto: what is quantized besides the routed experts, see `Asked`.
        protection: domains that must not lose too much; counts with which they would are not chosen.
    """

    keep: float | None = None
    experts: int | None = None
    widths: tuple[Width, ...] = SUPPORTED_BITS
    beyond: tuple[Width, ...] = ()
    group_size: int | None = None
    mixed: bool = False
    criterion: Criterion | None = None
    weights: Mapping[str, float]
    groups: Groups = Groups.BALANCED
    include: Included = field(default_factory=dict)
    auto: bool = False
    protection: Protection = NO_PROTECTION

    def parts(self, shape: Shape, linears: Iterable[Linear]) -> tuple[Included, list[str]]:
        """`settled_parts` of a model with those Linears."""
        size = self.group_size or group_size_for(shape) or PER_CHANNEL
        return settled_parts(Asked(auto=self.auto, parts=included(self.include)), linears, size)

    def free(self, include: Included) -> frozenset[Include]:
        """Of the settled parts those whose bits nobody named."""
        return frozenset(include) - frozenset(included(self.include)) if self.auto else frozenset()

    def counts(self, shape: Shape) -> tuple[int, ...]:
        """The expert counts to choose from.

        Raises:
            UsageError: the one asked for is not legal.
        """
        degroup = self.groups is Groups.DEGROUP
        if self.keep is None and self.experts is None:
            return legal_counts(shape, degroup=degroup)
        return (count_from_keep(shape, self.keep, self.experts, degroup=degroup),)

    def group(self, shape: Shape, linears: Sequence[Linear] = ()) -> int:
        """The group size, held against the experts' matrices and those that are included.

        Raises:
            UsageError: it does not divide them.
        """
        size = self.group_size or group_size_within(shape, linears)
        if self.widths != (None,):
            scheme = Scheme(bits=SUPPORTED_BITS[0], group_size=size)
            for columns in (shape.hidden, shape.expert_width, *(linear.columns for linear in linears)):
                scheme.groups(columns)
        return size


def loadable(request: BudgetRequest, runtime: Runtime | None, among: Sequence[int] = SUPPORTED_BITS) -> dict[str, Any]:
    """`widths` and `beyond` of a `Wish` that leaves the bits open.

    Args:
        request: a GPU means the usual runtimes, where none is named; a plain size means any.
        runtime: what is to load the result.
        among: bits that can be made at all.

    Raises:
        UsageError: the runtime loads none of them.
    """
    taken = among if runtime is None and request.target is None else bits_for(runtime)
    widths = tuple(bits for bits in among if bits in taken)
    if not widths:
        raise UsageError(f"--runtime {runtime} loads none of {', '.join(map(str, among))} bits; name another one.")
    return {"widths": widths, "beyond": tuple(bits for bits in among if bits not in taken)}


def load_profiles(folders: Sequence[Path]) -> Profile:
    """One profile, or several of one model merged."""
    return merge_profiles([load_profile(folder) for folder in folders])


def budget_of(request: BudgetRequest, config: Mapping[str, Any], shape: Shape, *, predicting: int = 0) -> Budget:
    """The budget in bytes; `predicting` are those of a multi-token-prediction layer that stays (`predicting_bytes`).

    Raises:
        UsageError: both or neither of size and GPU are given, or there is no such GPU.
        InvalidInputError: the user's own table of GPUs can not be used.
    """
    if (request.limit_bytes is None) == (request.target is None):
        raise UsageError("Give either --budget, such as 12GiB, or --target, the id of a GPU.")
    if request.target is None:
        assert request.limit_bytes is not None
        cache = cache_bytes(config, request.context) if request.context else 0
        return Budget(
            limit_bytes=request.limit_bytes, cache_bytes=cache, context=request.context, predicting_bytes=predicting
        )
    target = target_of(request.target, request.targets_file)
    memory = target.memory_bytes + (0 if target.ram is None else target.ram.memory_bytes)
    context = request.context or min(DEFAULT_CONTEXT, shape.context)
    return Budget(
        limit_bytes=memory,
        reserve_bytes=math.ceil(memory * RESERVE),
        cache_bytes=cache_bytes(config, context),
        context=context,
        target=target.id,
        predicting_bytes=predicting,
    )


def plan_within(profile: Profile, request: BudgetRequest, wish: Wish, *, mtp: Mtp = Mtp.KEEP) -> Plan:
    """The plan of the smallest estimated loss that fits, with its alternatives.

    Raises:
        UsageError: nothing fits, or an option is wrong.
        InvalidInputError: the profile lacks what the estimate needs.
    """
    shape, every = profile.shape, domain_weights(profile.domains, wish.weights)
    include, left = wish.parts(shape, planned_linears(profile, IN_LAYERS))
    linears = planned_linears(profile, include)
    free = frozenset[Include]() if divergences_of(profile) is None else wish.free(include)
    predicting = predicting_bytes(profile.inventory, shape, wish.widths) if mtp is Mtp.KEEP else 0
    budget = budget_of(request, profile.config, shape, predicting=predicting)
    counts = wish.counts(shape)
    group_size = wish.group(shape, linears)
    criterion = wish.criterion or default_criterion(every)
    selection = Selection(criterion=criterion, count=counts[0], weights=every, groups=wish.groups)
    require_possible(profile.inventory, shape, len(profile.layers), budget, wish, linears, free=free)
    kept, left_out = _keep_sets(profile, selection, counts, wish.protection)

    def space_with(widths: tuple[Width, ...]) -> Space:
        return space_of(profile, kept, weights=every, widths=widths, group_size=group_size, linears=linears, free=free)

    space = space_with(wish.widths)
    with _told(left_out):
        chosen, rows = choose(space, budget, mixed=wish.mixed)
    include = included({**include, **chosen.part_bits})
    plan = make_plan(
        profile,
        count=chosen.count,
        criterion=criterion,
        weights=wish.weights,
        groups=wish.groups,
        scheme=_scheme(chosen, group_size),
        layer_bits={n: w for n, w in chosen.widths.items() if w is not None} if chosen.mixed else None,
        include=include,
        linears=planned_linears(profile, include),
        protection=wish.protection,
    )
    notes = [*plan.notes, *verdict(space, budget.weight_bytes, chosen), *_notes(profile, chosen, group_size, budget)]
    if wish.beyond and not wish.mixed:
        notes += _not_taken(space_with((*wish.beyond, *wish.widths)), budget, chosen)
    said = PARTS_NOTE if space.unit is Unit.NATS else INCLUDE_NOTE if include else None
    notes += [*left, *([] if said is None else [said]), *left_out]
    return plan.model_copy(update={"budget": budget, "alternatives": rows, "notes": notes})


def mix_within(profile: Profile, request: BudgetRequest, wish: Wish) -> Plan:
    """The plan of the smallest estimated divergence that fits as a GGUF file, type by type, with the curve.

    Raises:
        UsageError: nothing fits, or llama.cpp does not compute such a model.
        InvalidInputError: the profile lacks what the estimate needs.
    """
    shape, every = profile.shape, domain_weights(profile.domains, wish.weights)
    budget = budget_of(request, profile.config, shape)
    counts, criterion = wish.counts(shape), wish.criterion or default_criterion(every)
    selection = Selection(criterion=criterion, count=counts[0], weights=every, groups=wish.groups)
    kept, left_out = _keep_sets(profile, selection, counts, wish.protection)
    space = mix_space(profile, kept, every)
    chosen = best_mix(space, budget.weight_bytes)
    with _told(left_out):
        if chosen is None:
            least = smallest_mix(space)
            raise UsageError(too_small(budget, f"{least.count} experts in types of GGUF", least.size))
    plan = make_plan(
        profile,
        count=chosen.count,
        criterion=criterion,
        weights=wish.weights,
        groups=wish.groups,
        protection=wish.protection,
    )
    notes = [*plan.notes, MIX_NOTE, *fallen_back(profile, chosen), *context_notes(budget.context, shape.context)]
    notes += left_out
    return plan.model_copy(
        update={
            "budget": budget,
            "grids": chosen.rows(),
            "curve": curve(space, chosen),
            "sizes": plan.sizes.model_copy(update={"after_bytes": chosen.size}),
            "notes": notes,
        }
    )


def _keep_sets(
    profile: Profile, selection: Selection, counts: Sequence[int], protection: Protection
) -> tuple[dict[int, dict[int, list[int]]], list[str]]:
    """Count -> keep sets, of counts that keep within the limits of domains; and a sentence on those that do not."""
    found = selections_of(profile, selection, counts, protection)
    kept = {count: keep_sets(profile, chosen) for count, chosen in found.items()}
    out = [count for count in counts if count not in kept]
    if not out:
        return kept, []
    named = f"{out[0]} experts" if len(out) == 1 else f"{len(out)} counts, from {min(out)} to {max(out)} experts,"
    limit = f"a protected domain would lose more than {protection.limit.text}"
    return kept, [f"{named} {'is' if len(out) == 1 else 'are'} no choice: {limit}."]


@contextmanager
def _told(left_out: Sequence[str]) -> Iterator[None]:
    """Where nothing fits, which counts were no choice is part of why."""
    try:
        yield
    except UsageError as error:
        raise UsageError(" ".join([str(error), *left_out])) from error


def possible_mix(file: FileWeights, shape: Shape, budget: Budget, wish: Wish) -> tuple[int, str]:
    """Refuse a budget that no mix fits into; known from sizes alone, before any profile.

    Returns:
        The most experts that fit in some type, and the largest type that all matrices then fit in: what takes longest.

    Raises:
        UsageError: with the smallest size there is.
    """
    counts = sorted(wish.counts(shape), reverse=True)
    for count, name in itertools.product(counts, sorted(MIX_TYPES, key=lambda name: -file.bytes(counts[0], name))):
        if file.bytes(count, name) <= budget.weight_bytes:
            return count, name
    least = min(file.bytes(counts[-1], name) for name in MIX_TYPES)
    raise UsageError(too_small(budget, f"{counts[-1]} experts in types of GGUF", least))


def require_possible(
    inventory: Mapping[str, Any],
    shape: Shape,
    layers: int,
    budget: Budget,
    wish: Wish,
    linears: Sequence[Linear] = (),
    *,
    free: Collection[Include] = (),
    mixed: bool = False,
) -> Candidate:
    """Refuse a budget that nothing fits into; known from sizes alone, before any profile.

    Args:
        inventory, shape: of the model.
        layers: with routed experts.
        budget: what there is.
        wish: what is decided already.
        linears: quantized besides the experts.
        free: parts of these whose bits are to be chosen too.
        mixed: bits may differ by layer.

    Returns:
        The most experts that fit, in the most bits that then fit, by layer where `mixed`: what takes longest to make.
        Layers are counted from 0.

    Raises:
        UsageError: with the smallest size there is.
    """

    def chosen_of(widths: tuple[Width, ...]) -> Candidate:
        space = bare_space(
            inventory,
            shape,
            layers,
            counts=wish.counts(shape),
            widths=widths,
            group_size=wish.group(shape, linears),
            linears=linears,
            free=free,
        )
        return choose(space, budget, mixed=mixed)[0]

    try:
        return chosen_of(wish.widths)
    except UsageError as error:
        if mixed or not wish.beyond:  # what loads fewer bits does not load those that differ by layer
            raise
        raise _another_way(error, wish, chosen_of) from error


def _another_way(error: UsageError, wish: Wish, chosen_of: Callable[[tuple[Width, ...]], Candidate]) -> UsageError:
    """The refusal, and which bits would fit that were no choice."""
    try:
        found = chosen_of((*wish.beyond, *wish.widths))
    except UsageError:
        return error  # nothing fits with them either
    return UsageError(f"{error} Or take fewer bits: {_where(found)}.")


def _not_taken(space: Space, budget: Budget, chosen: Candidate) -> list[str]:
    """What bits would give that were no choice, where they lose less."""
    found, _ = choose(space, budget, mixed=False)
    if found.loss >= chosen.loss:
        return []
    unit = "estimated KL" if space.unit is Unit.NATS else "estimated loss"
    losses = (f"{c.loss:.2e}" if space.unit is Unit.NATS else f"{c.loss:.3%}" for c in (found, chosen))
    return [f"Fewer bits would lose less, {unit} {' in place of '.join(losses)}: {_where(found)}."]


def _where(found: Candidate) -> str:
    """A candidate in words, and what loads it."""
    bits = sorted({width for width in found.widths.values() if width is not None})
    names = [runtime for runtime in runtimes_of(bits[0]) if all(runtime in runtimes_of(each) for each in bits)]
    lists = (" and ".join(map(str, bits)), ", ".join(names))
    return f"{found.count} experts at {lists[0]} bits, which load in {lists[1]} (--runtime {names[0]} chooses so)"


def _scheme(chosen: Candidate, group_size: int) -> Scheme | None:
    """Of most layers where bits differ."""
    bits = most_common(chosen.widths)
    return None if bits is None else Scheme(bits=bits, group_size=group_size)


def _notes(profile: Profile, chosen: Candidate, group_size: int, budget: Budget) -> list[str]:
    notes, widths = [], {width for width in chosen.widths.values() if width is not None}
    if chosen.mixed:
        notes.append(MIXED_NOTE)
    if widths & {2, 3}:
        notes.append(FEW_BITS_NOTE)
    notes += context_notes(budget.context, profile.shape.context)
    measured = probe_scheme(profile.shape, SUPPORTED_BITS[0]).group_size
    if widths and group_size != measured:
        notes.append(f"The losses by bits were measured with groups of {measured}, not of {group_size}.")
    if sum(int(row["bytes"]) for row in profile.inventory.values()) <= budget.weight_bytes:
        notes.append("The original fits into this budget as it is.")
    return notes
