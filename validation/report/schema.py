"""The report as data: what report.json holds. Measured rows are those of `validation.quality.results`, unchanged."""

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from moepress.compress.budget.mixes import CurvePoint
from moepress.compress.budget.search import Alternative
from moepress.compress.gptq.grid_rows import GridRow
from moepress.validation.quality.generation import Generation
from moepress.validation.quality.results import ALL_WINDOWS, Quality, QualityRow, Samples, Throughput
from moepress.validation.quality.thresholds import Outcome
from moepress.validation.speed.results import Targets
from moepress.validation.tasks.results import TaskResults

SCHEMA_VERSION: Literal["1.0"] = "1.0"


class _Section(BaseModel):
    """Read-only; unknown keys are refused; infinities are written as strings, which JSON can hold."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class SubjectInfo(_Section):
    """One model of the report.

    Attributes:
        label: as in the rows.
        folder: name of its folder, without the path, or owner/name@commit of the hub; None: it was only in memory.
        stored_bytes: size of its weights on disk.
        parameters: weights when dense; 0 where nobody knows.
        experts_per_layer: routed experts in each MoE layer; (fewest, most) where layers differ.
        bits: stored bits per weight, over all weights, scales included.
        onnx: it is an ONNX folder.
        gguf: it is a GGUF file.
        parts: stored bytes by part of the model; empty where they are not known.
    """

    label: str
    folder: str | None = None
    stored_bytes: int
    parameters: int
    experts_per_layer: int | tuple[int, int] | None = None
    bits: float | None = None
    onnx: bool = False
    gguf: bool = False
    parts: dict[str, int] = {}


class DomainLoss(_Section):
    """What the removed experts had carried in one calibration domain, as shares (0 to 1) of all routed experts.

    Attributes:
        domain: its name.
        gate_mass_lost: of the sum of combine weights.
        reap_mass_lost: of the sum of combine weight times output norm (`reap-sum`).
    """

    domain: str
    gate_mass_lost: float
    reap_mass_lost: float


class Pruning(_Section):
    """Which experts were removed, and why.

    Attributes:
        criterion: its name.
        kept: experts kept in each layer.
        total: experts that each layer had.
        domains: loss in each calibration domain.
        keep_set_stability: share of kept experts (0 to 1) that two halves of the calibration tokens agree on.
        protected: domains that were not to lose more than a limit.
        limit: that limit, as `--max-domain-loss` takes it; None where no domain was protected.
        given_up: domains that were given a weight below 1.
        lost: domains that nobody gave up, with more than so many times the mean damage of the others (2, or the limit).
    """

    criterion: str
    kept: int
    total: int
    domains: tuple[DomainLoss, ...] = ()
    keep_set_stability: float | None = None
    protected: tuple[str, ...] = ()
    limit: str | None = None
    given_up: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()


class DomainUsage(_Section):
    """How often the experts were chosen in one calibration domain.

    Attributes:
        domain: its name.
        counts: tokens that reached an expert, [layer][expert] in the order of the section's layers.
    """

    domain: str
    counts: tuple[tuple[int, ...], ...]


class Usage(_Section):
    """How the calibration text used the experts, and which of them stay.

    Attributes:
        layers: numbers of the layers with experts.
        top_k: experts that a token chooses in each.
        kept: numbers of the experts that stay, for each of the layers; None: all.
        domains: one entry a domain.
    """

    layers: tuple[int, ...]
    top_k: int
    kept: tuple[tuple[int, ...], ...] | None = None
    domains: tuple[DomainUsage, ...]


class Choice(_Section):
    """What a budget was chosen from.

    Attributes:
        limit_bytes: what the weights may take.
        rows: the alternatives, with their estimated loss.
        curve: of a mix of GGUF's types, the best ones of several sizes.
        grids: the types that were chosen, by kind of matrix and layers.
    """

    limit_bytes: int
    rows: tuple[Alternative, ...]
    curve: tuple[CurvePoint, ...] = ()
    grids: tuple[GridRow, ...] = ()


class LayerError(_Section):
    """Mean relative error of a layer's quantized matrices, |(W - Wq) X| / |W X|."""

    layer: int
    mean_relative_error: float


class ExpertName(_Section):
    """One routed expert by its layer and its number."""

    layer: int
    expert: int


class Quantization(_Section):
    """How the weights were quantized.

    Attributes:
        scheme: in words, for example `4 bits, groups of 128, symmetric`.
        layers: errors by layer.
        fallback_experts: rounded to nearest because the solver failed on them.
        unsupported_experts: with too few calibration tokens of their own.
    """

    scheme: str
    layers: tuple[LayerError, ...] = ()
    fallback_experts: tuple[ExpertName, ...] = ()
    unsupported_experts: tuple[ExpertName, ...] = ()


class Calibration(_Section):
    """The text that decisions were based on.

    Attributes:
        sources: files, folders or datasets.
        embedded: whether any of it is the default text that comes with moepress.
        domains: names.
        tokens: how many.
        seed: that chose them.
        digest: SHA-256 of the windows.
    """

    sources: tuple[str, ...]
    embedded: bool
    domains: tuple[str, ...] = ()
    tokens: int
    seed: int | None = None
    digest: str | None = None


class RuntimeCheck(_Section):
    """What the rules of one runtime say of one folder, as `moepress check` does.

    Attributes:
        subject: the folder's label.
        layout: how its weights are laid out.
        runtime: the runtime's name.
        outcome: `loads`, `slower`, `wrong with an option`, `refuses` or `silently wrong`: the worst that was found.
        findings: how many there are for this runtime.
        first: the first of those, in a sentence; None where nothing was found.
    """

    subject: str
    layout: str
    runtime: str
    outcome: Literal["loads", "slower", "wrong with an option", "refuses", "silently wrong"]
    findings: int
    first: str | None = None


class Environment(_Section):
    """Where it ran: package to version, device, processor."""

    versions: dict[str, str]
    device: str
    cpus: int | None
    platform: str


class Report(_Section):
    """Everything that `report.json`, `report.md` and `report.html` show.

    Attributes:
        created: ISO 8601 time with its zone.
        title: the model's name.
        subjects: in the order of the rows; the first one is the reference.
        quality: of all subjects.
        usage: how the calibration text used the experts; None without a profile.
        choice: what the plan was chosen from; None without a budget.
        samples: text that the first model and the result write; None where they were not run.
        tasks: what the first model and the result score at tasks; None where none were asked for.
        generation: how many answers to many prompts loop or do not end; None where nobody was asked.
        checks: what the rules of the runtimes say of what was made.
        targets: which GPU holds the models that are folders of safetensors; projected.
        recipe: the recipe file's text.
        commands: that reproduce the result.
        notes: warnings that the reader must see.
    """

    schema_version: Literal["1.0"] = SCHEMA_VERSION
    tool_version: str | None = None
    created: str | None = None
    title: str | None = None
    subjects: tuple[SubjectInfo, ...]
    quality: Quality
    throughput: Throughput | None = None
    thresholds: tuple[Outcome, ...] = ()
    pruning: Pruning | None = None
    usage: Usage | None = None
    choice: Choice | None = None
    quantization: Quantization | None = None
    calibration: Calibration | None = None
    targets: Targets | None = None
    samples: Samples | None = None
    tasks: TaskResults | None = None
    generation: Generation | None = None
    checks: tuple[RuntimeCheck, ...] = ()
    notes: tuple[str, ...] = ()
    environment: Environment | None = None
    commands: tuple[str, ...] = ()
    recipe: str | None = None

    def overall(self, label: str) -> QualityRow:
        """A subject's row over all windows."""
        return self.quality.row(label, ALL_WINDOWS)


def schema_text() -> str:
    """The JSON Schema (2020-12) of report.json, as docs/report.schema.json holds it.

    Infinite and undefined numbers are strings in report.json, which the schema allows wherever there is a number.
    """
    schema = Report.model_json_schema(mode="serialization")
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "moepress report.json"}
    return json.dumps(_with_strings(schema) | head, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _with_strings(node: Any) -> Any:
    if isinstance(node, list):
        return [_with_strings(item) for item in node]
    if not isinstance(node, dict):
        return node
    if node.get("type") == "number":
        rest = {key: value for key, value in node.items() if key != "type"}
        return rest | {"anyOf": [{"type": "number"}, {"enum": ["Infinity", "-Infinity", "NaN"]}]}
    return {key: _with_strings(value) for key, value in node.items()}
