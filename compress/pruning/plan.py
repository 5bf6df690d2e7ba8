"""A plan: which experts stay, and how they are quantized. A file that a person can read, diff and edit."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializerFunctionWrapHandler, ValidationError, model_serializer

from moepress.calibration.profile import Profile
from moepress.compress.budget.mixes import CurvePoint
from moepress.compress.budget.search import Alternative, Budget
from moepress.compress.budget.sizes import Linear, part_sizes
from moepress.compress.gptq.block_choice import MIX_TYPES
from moepress.compress.gptq.grid_rows import GridRow
from moepress.compress.gptq.include import Include, Included, included
from moepress.compress.gptq.kinds import OUTSIDE
from moepress.compress.pruning.domains import (
    FACTOR,
    NO_PROTECTION,
    Protection,
    lost_domains,
    lost_text,
    protected_selection,
)
from moepress.compress.pruning.domains import (
    protection as protection_of,
)
from moepress.compress.pruning.scoring import (
    Criterion,
    Groups,
    Selection,
    default_criterion,
    domain_weights,
    keep_sets,
    mtp_keep_sets,
    removed_share,
    stability,
    super_experts,
    unsupported,
)
from moepress.compress.pruning.slack import Slack, slack_of
from moepress.converters.safetensors.scheme import FLOAT_GROUPS, SUPPORTED_BITS, Codes, Scheme
from moepress.errors import InvalidInputError, UsageError
from moepress.models.families.family import Shape, require_legal
from moepress.models.storage.folder import read_json
from moepress.models.storage.inside import require_own
from moepress.runs.text import cut

SCHEMA_VERSION: Literal["1.0"] = "1.0"
COLLAPSE_NOTE = (
    "frequency counts how often an expert is chosen and not what it contributes: rarely used experts that matter are "
    "lost first, and quality collapses at high ratios; prefer reap or easy-ep."
)


class Quantization(BaseModel):
    """Bits and group size of the quantized matrices, and what their codes are where those are no integers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bits: int = 4
    group_size: int = 128
    codes: Codes = Codes.INT

    @classmethod
    def of(cls, scheme: Scheme) -> "Quantization":
        """What a plan says of a scheme."""
        return cls(bits=scheme.bits, group_size=scheme.group_size, codes=scheme.codes)

    def scheme(self) -> Scheme:
        """The scheme that solver and packers use.

        Raises:
            UsageError: bits or group size are not supported.
        """
        return Scheme(bits=self.bits, group_size=self.group_size, codes=self.codes)

    @property
    def floats(self) -> bool:
        """Whether codes are 4-bit floats."""
        return self.codes in FLOAT_GROUPS

    @model_serializer(mode="wrap")
    def _stated(self, plainly: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Plans of integers say nothing of codes, as they did before there were others."""
        found: dict[str, Any] = plainly(self)
        return {name: value for name, value in found.items() if name != "codes" or self.floats}


class DomainLoss(BaseModel):
    """What a domain loses: the share of its mass that the removed experts carry (0..1, mean over layers)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gate_mass: float
    reap_sum_mass: float


class Sizes(BaseModel):
    """Estimated bytes of the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    before_bytes: int
    after_bytes: int


class Plan(BaseModel):
    """Everything that `prune` and `quantize` need besides the model. See docs/formats.md."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: Literal["1.0"] = SCHEMA_VERSION
    model: str
    model_name: str
    family: str
    criterion: Criterion
    domain_weights: dict[str, float]
    groups: Groups
    experts_before: int = Field(gt=0)
    experts: int = Field(gt=0)
    keep: dict[int, list[int]]
    mtp_keep: dict[int, list[int]] = {}
    quantization: Quantization | None
    layer_bits: dict[int, int] = {}
    grids: tuple[GridRow, ...] = ()
    include: tuple[Include, ...] = ()
    part_bits: dict[Include, int] = {}
    budget: Budget | None = None
    alternatives: list[Alternative] = []
    curve: list[CurvePoint] = []
    loss: dict[str, DomainLoss]
    protected_domains: tuple[str, ...] = ()
    max_domain_loss: str | None = None
    lost_domains: tuple[str, ...] = ()
    slack: Slack | None = None
    stability: float
    protected: dict[int, list[int]]
    unsupported: dict[int, list[int]]
    sizes: Sizes
    calibration: dict[str, Any]
    notes: list[str]

    @property
    def degroup(self) -> bool:
        """Whether the router's groups are dropped."""
        return self.groups is Groups.DEGROUP

    @property
    def included(self) -> Included:
        """The parts that are quantized besides the routed experts, with their bits."""
        return {part: self.part_bits.get(part) for part in self.include}

    @property
    def prunes(self) -> bool:
        """Whether any expert goes."""
        return self.experts < self.experts_before


def count_from_keep(shape: Shape, keep: float | None, experts: int | None, *, degroup: bool) -> int:
    """The number of experts kept, from `--keep` (a share) or `--experts` (a count).

    Raises:
        UsageError: both or neither are given, the share is not in (0, 1], or the count is not legal.
    """
    if (keep is None) == (experts is None):
        given = "both --keep and --experts were given" if keep is not None else "neither --keep nor --experts was given"
        raise UsageError(f"Say how much stays, --keep 0.75 (a share) or --experts 48 (a count): {given}.")
    if keep is not None and not 0 < keep <= 1:
        raise UsageError(f"--keep {keep} is not a share; give a number above 0 and up to 1.")
    if experts is not None and experts < 1:
        raise UsageError(f"--experts {experts} is not a count of experts.")
    count = experts if experts is not None else max(1, round(shape.experts * (keep or 1.0)))
    require_legal(shape, count, degroup=degroup)
    return count


def make_plan(
    profile: Profile,
    *,
    count: int,
    criterion: Criterion | None = None,
    weights: Mapping[str, float] | None = None,
    groups: Groups = Groups.BALANCED,
    scheme: Scheme | None = None,
    layer_bits: Mapping[int, int] | None = None,
    include: Iterable[Include] = (),
    linears: Sequence[Linear] = (),
    protection: Protection = NO_PROTECTION,
) -> Plan:
    """Decide what stays. Pure: the same profile and options give the same plan.

    Args:
        profile: how the model uses its experts.
        count: experts that stay in every layer.
        criterion: what they are ranked by; None for the default.
        weights: per domain; 1 where none is given.
        groups: what becomes of the router's groups.
        scheme: bits and group size; None for pruning alone.
        layer_bits: bits of the routed experts where they differ by layer, for all MoE layers.
        include: parts that are quantized besides the routed experts, with their bits where they have their own.
        linears: their matrices, `sizes.planned_linears`.
        protection: domains that must not lose too much; their weights are raised until they do not.

    Raises:
        UsageError: the count is not legal, a domain is unknown, or the group size does not divide the matrices.
        ThresholdMissedError: with so few experts a protected domain loses too much, whatever it weighs.
    """
    shape, every = profile.shape, domain_weights(profile.domains, weights or {})
    require_legal(shape, count, degroup=groups is Groups.DEGROUP)
    if scheme is not None:
        scheme.require((shape.hidden, shape.expert_width, *(linear.columns for linear in linears)))
    chosen = criterion or default_criterion(every)
    asked = Selection(criterion=chosen, count=count, weights=every, groups=groups)
    selection = protected_selection(profile, asked, protection)
    kept = keep_sets(profile, selection)
    gate, reap = (removed_share(profile, kept, name) for name in ("gate", "weighted_norm"))
    beyond = lost_domains(reap, every, protection.limit.factor or FACTOR)
    few = unsupported(profile, every)
    prunes = count < shape.experts
    return Plan(
        model=profile.model,
        model_name=profile.model_name,
        family=profile.family,
        criterion=chosen,
        domain_weights=dict(selection.weights),
        groups=groups,
        experts_before=shape.experts,
        experts=count,
        keep=kept,
        mtp_keep=mtp_keep_sets(profile, selection),
        quantization=Quantization.of(scheme) if scheme else None,
        layer_bits=dict(layer_bits or {}),
        include=tuple(sorted(include)),
        part_bits={part: bits for part, bits in included(include).items() if bits is not None},
        loss={d: DomainLoss(gate_mass=gate[d], reap_sum_mass=reap[d]) for d in profile.domains},
        protected_domains=protection.domains,
        max_domain_loss=protection.limit.text if protection.domains else None,
        lost_domains=beyond,
        slack=slack_of(profile, asked) if prunes else None,
        stability=stability(profile, selection) if prunes else 1.0,
        protected={layer: found for layer, found in super_experts(profile).items() if found},
        unsupported=few,
        sizes=estimate_sizes(profile.inventory, shape, count, scheme, layer_bits, linears),
        calibration=dict(profile.calibration),
        notes=[
            *_notes(profile, chosen, few, prunes=prunes),
            *(f"{lost_text(reap, d)}; --protect {d} would keep experts for it." for d in beyond),
        ],
    )


def _notes(profile: Profile, criterion: Criterion, few: Mapping[int, Sequence[int]], *, prunes: bool) -> list[str]:
    notes = []
    if criterion is Criterion.FREQUENCY and prunes:
        notes.append(COLLAPSE_NOTE)
    if few:
        total = sum(map(len, few.values()))
        notes.append(f"{total} experts in {len(few)} layers saw fewer than 32 tokens; their scores are unsupported.")
    return notes


def estimate_sizes(
    inventory: Mapping[str, Any],
    shape: Shape,
    count: int,
    scheme: Scheme | None,
    layer_bits: Mapping[int, int] | None = None,
    linears: Sequence[Linear] = (),
) -> Sizes:
    """Bytes of all weights before and after; the routed experts and `linears` quantized, the MTP layer dropped."""
    before = sum(int(row["bytes"]) for row in inventory.values())
    after = sum(part_sizes(inventory, shape, count, scheme, layer_bits, linears).values())
    return Sizes(before_bytes=before, after_bytes=round(after))


def plan_text(plan: Plan) -> str:
    """The plan as it is written to disk; keep lists have one layer a line so that diffs are readable."""
    data = plan.model_dump(mode="json")
    for name in ("mtp_keep", "grids", "curve", "protected_domains", "max_domain_loss", "lost_domains", "slack"):
        if not data[name]:
            del data[name]
    data["alternatives"] = [_row(row) for row in plan.alternatives]
    lists = {name: data[name] for name in ("keep", "mtp_keep", "grids", "curve") if name in data}
    text = json.dumps(data | {name: f"@{name}@" for name in lists}, indent=2, ensure_ascii=False)
    for name, found in lists.items():
        if isinstance(found, dict):
            rows, ends = [f'"{layer}": {json.dumps(experts)}' for layer, experts in found.items()], "{}"
        else:
            rows, ends = [json.dumps(row) for row in found], "[]"
        text = text.replace(f'"@{name}@"', ends[0] + "\n    " + ",\n    ".join(rows) + "\n  " + ends[1])
    return f"{text}\n"


def _row(row: Alternative) -> dict[str, Any]:
    """An alternative without the fields that only divergences have, where it has none."""
    usual = {name for name in ("unit", "part_bits") if getattr(row, name) == Alternative.model_fields[name].default}
    return row.model_dump(mode="json", exclude=usual)


def load_plan(file: Path) -> Plan:
    """Read and check a plan.

    Raises:
        InvalidInputError: it is not a plan, or its keep lists contradict each other.
    """
    try:
        require_own(file)
        plan = Plan.model_validate(read_json(file))
    except OSError as error:
        raise InvalidInputError(f"Cannot read {file}: {error.strerror or error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidInputError(
            f"{file} is not a valid plan: {where}: {first['msg']}; mend it or plan again."
        ) from error
    for layer, kept in (*plan.keep.items(), *plan.mtp_keep.items()):
        if kept != sorted(set(kept)) or not kept or kept[0] < 0 or kept[-1] >= plan.experts_before:
            raise InvalidInputError(
                f"{file}: the keep list of layer {layer} must hold expert numbers, ascending, once each."
            )
        if len(kept) != plan.experts:
            raise InvalidInputError(
                f"{file}: layer {layer} keeps {len(kept)} experts and the plan says {plan.experts}; no runtime takes "
                "counts that differ by layer."
            )
    _check_limit(file, plan)
    _check_floats(file, plan)
    _check_layer_bits(file, plan)
    _check_grids(file, plan)
    return plan


def _check_limit(file: Path, plan: Plan) -> None:
    """Refuse a limit on domains that is none: reports go by it."""
    try:
        protection_of(plan.protected_domains, plan.max_domain_loss)
    except UsageError as error:
        raise InvalidInputError(
            f"{file}: max_domain_loss is {cut(plan.max_domain_loss)}; it must be 2x or 10%, beside protected_domains."
        ) from error


def _check_floats(file: Path, plan: Plan) -> None:
    """Refuse bits and groups that a format of floats does not have."""
    said = plan.quantization
    if said is None or not said.floats:
        return
    if (said.bits, said.group_size) != (4, FLOAT_GROUPS[said.codes]) or plan.layer_bits or plan.part_bits:
        raise InvalidInputError(
            f"{file}: {said.codes} has 4 bits and groups of {FLOAT_GROUPS[said.codes]} columns, and quantization, "
            "layer_bits or part_bits say otherwise; mend it or plan again."
        )


def _check_grids(file: Path, plan: Plan) -> None:
    """Refuse types that are none, and rows that would not be seen: ranges of one kind do not meet."""
    if plan.curve and not plan.grids:
        raise InvalidInputError(f"{file} has a curve and no grids, of which its budget is made; plan again.")
    if plan.grids and plan.quantization is not None:
        raise InvalidInputError(f"{file} has a quantization and grids both; take one of them away.")
    seen: dict[str, int] = {}
    for row in sorted(plan.grids, key=lambda row: (row.kind, row.layers or (0, 0))):
        if row.type not in MIX_TYPES:
            raise InvalidInputError(f"{file}: grids has the type {row.type}; give one of {', '.join(MIX_TYPES)}.")
        first, last = row.layers or (0, 0)
        if (row.layers is None) != (row.kind in OUTSIDE) or last < first or first <= seen.get(row.kind, -1):
            raise InvalidInputError(
                f"{file}: the layers of {row.kind} in grids must be ranges, first and last, that do not meet; "
                f"{' and '.join(sorted(OUTSIDE))} have none."
            )
        seen[row.kind] = last


def _check_layer_bits(file: Path, plan: Plan) -> None:
    strange = [part.value for part in plan.part_bits if part not in plan.include]
    wrong = sorted(set(plan.part_bits.values()) - set(SUPPORTED_BITS))
    if strange or wrong:
        what = (
            f"names {strange[0]}, which include does not" if strange else f"holds {wrong[0]}; supported are 2, 3, 4, 8"
        )
        raise InvalidInputError(f"{file}: part_bits {what}.")
    if not plan.layer_bits:
        return
    if plan.quantization is None or set(plan.layer_bits) != set(plan.keep):
        raise InvalidInputError(f"{file}: layer_bits must name each layer of keep once, beside a quantization.")
    wrong = sorted(set(plan.layer_bits.values()) - set(SUPPORTED_BITS))
    if wrong:
        raise InvalidInputError(f"{file}: layer_bits holds {wrong[0]}; supported are 2, 3, 4 and 8 bits.")


def check_plan(plan: Plan, shape: Shape, layers: Sequence[int], model: str | None) -> None:
    """Hold a plan against the model it is to be used on.

    Raises:
        UsageError: it is for another model, or not legal for this one.
    """
    if model is not None and plan.model != model:
        raise UsageError(f"The plan was made for another model ({plan.model_name}); profile and plan this one.")
    if plan.experts_before != shape.experts or tuple(sorted(plan.keep)) != tuple(layers):
        raise UsageError("The plan's layers or experts are not those of this model; profile and plan this one.")
    require_legal(shape, plan.experts, degroup=plan.degroup)
    if plan.degroup or shape.groups == 1:
        return
    size = shape.experts // shape.groups
    for layer, kept in (*plan.keep.items(), *plan.mtp_keep.items()):
        held = [sum(e // size == g for e in kept) for g in range(shape.groups)]
        if len(set(held)) > 1:
            raise UsageError(
                f"The plan keeps {held} experts in the groups of layer {layer}; every group must keep the same."
            )
